"""What was measured, one value after another, and what follows it without beginning anew each time."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar, overload


class Follower(Protocol):
    """Is given every measurement once, in order."""

    def add(self, measured: float) -> None:
        """Take the next one."""


F = TypeVar("F", bound=Follower)


class History(Sequence[float]):
    """All measurements of a metric; they only become more.

    Args:
        values: Those there are already.
    """

    def __init__(self, values: Iterable[float] = ()) -> None:
        self._values = list(map(float, values))
        self._followers: dict[Any, tuple[Any, int]] = {}

    def append(self, value: float) -> None:
        """Add the next measurement."""
        self._values.append(value)

    def followed_by(self, kind: type[F], *args: Any) -> F:
        """Return ``kind(*args)``, one for each *args*, that was given all measurements: now only the new ones."""
        follower, seen = self._followers.get((kind, args)) or (kind(*args), 0)
        for value in self._values[seen:]:
            follower.add(value)
        self._followers[kind, args] = follower, len(self._values)
        found: F = follower
        return found

    @overload
    def __getitem__(self, index: int) -> float: ...

    @overload
    def __getitem__(self, index: slice) -> list[float]: ...

    def __getitem__(self, index: int | slice) -> float | list[float]:
        return self._values[index]

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[float]:
        return iter(self._values)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._values!r})"
