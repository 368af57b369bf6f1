"""Where two runs part, by their ledgers."""

import math
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ice_engine.arguments import at_least
from ice_engine.ledger import lines

# What differs from run to run though they compute the same.
_NOT_COMPARED = re.compile(r"time|evaluation|memory/.*|.*/time/.*|.*/items_per_second")
_SHOWN = 20  # differences of one line


@dataclass(frozen=True)
class Only:
    """Lines that one ledger has and the other has not.

    Attributes:
        number: How many.
        row: The first of them; None if there are none.
    """

    number: int
    row: Mapping[str, Any] | None


@dataclass(frozen=True)
class Comparison:
    """What two ledgers have in common, and the first line in which they differ.

    Attributes:
        paths: The two files.
        same: Lines, of those that both have, that are the same before they part.
        row: The line of the first one in which they part; None if all that both have are the same.
        differences: What differs in it: both values by key, None where one has nothing.
        only: The lines that only the first and only the second has.
    """

    paths: tuple[Path, Path]
    same: int
    row: Mapping[str, Any] | None
    differences: Mapping[str, tuple[Any, Any]]
    only: tuple[Only, Only]

    @property
    def is_same(self) -> bool:
        """Whether both have the same lines with the same values."""
        return self.row is None and not (self.only[0].number or self.only[1].number)

    def __str__(self) -> str:
        first, second = map(str, self.paths)
        if self.row is None:
            text = [f"{first} and {second} are the same in {_count(self.same)}, all that both have"]
        else:
            after = f"after {_count(self.same)} in common" if self.same else "from the beginning"
            text = [f"{first} and {second} part at {_place(self.row)}, {after}", "", *self._table()]
        for path, only in zip((first, second), self.only, strict=True):
            if only.row is not None:
                text += [f"only {path} has {_count(only.number)} more, the first at {_place(only.row)}"]
        return "\n".join(text)

    def _table(self) -> list[str]:
        shown = list(self.differences.items())[:_SHOWN]
        cells = [("", str(self.paths[0]), str(self.paths[1]), "relative")]
        cells += [(key, *_pair(a, b), _relative(a, b)) for key, (a, b) in shown]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        text = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
        more = len(self.differences) - len(shown)
        return [*text, *([f"and {more} more"] if more else [])]


def compare(first: str | Path, second: str | Path, *, rtol: float = 0.0, atol: float = 0.0) -> Comparison:
    r"""Find the first line in which two ledgers differ: by more than :math:`atol + rtol\,|b|` for numbers.

    Lines are of the same moment if their source is the same, and their attempt, or, for an evaluator, the step. What a
    clock or the machine says is not compared: ``time``, throughput and memory. NaN is the same as NaN.

    Args:
        first: A ledger.
        second: Another one, whose values are :math:`b`.
        rtol: Relative tolerance, at least 0.
        atol: Absolute tolerance, at least 0.

    Returns:
        What was found; ``print`` shows it.

    Raises:
        ArgumentValueError: If a tolerance is negative.
        FileNotFoundError: If one is not there.
        LedgerError: If one is no ledger.
    """
    at_least("rtol", rtol, 0.0)
    at_least("atol", atol, 0.0)
    others = dict(_keyed(second))
    ours, same, parted = [], 0, None
    differences: dict[str, tuple[Any, Any]] = {}
    for key, row in _keyed(first):
        other = others.pop(key, None)
        if other is None:
            ours.append(row)
        elif parted is None:
            differences = _differences(row, other, rtol, atol)
            parted = row if differences else None
            same += not differences
    only = Only(len(ours), ours[0] if ours else None), Only(len(others), next(iter(others.values()), None))
    return Comparison((Path(first), Path(second)), same, parted, differences, only)


def _keyed(path: str | Path) -> Iterator[tuple[Hashable, dict[str, Any]]]:
    """Yield each line with what says which moment it is of."""
    seen: Counter[tuple[str, int]] = Counter()
    for row in lines(path):
        moment = row["source"], row.get("attempt", row["step"])
        seen[moment] += 1  # an evaluator may run twice after the same step
        yield (*moment, seen[moment]), row


def _differences(
    row: Mapping[str, Any], other: Mapping[str, Any], rtol: float, atol: float
) -> dict[str, tuple[Any, Any]]:
    pairs = {key: (row.get(key), other.get(key)) for key in dict.fromkeys([*row, *other])}
    return {
        key: (a, b)
        for key, (a, b) in pairs.items()
        if not _NOT_COMPARED.fullmatch(key) and not _is_close(a, b, rtol, atol)
    }


def _is_close(a: Any, b: Any, rtol: float, atol: float) -> bool:
    if isinstance(a, float | int) and isinstance(b, float | int):
        return a == b or (a != a and b != b) or abs(a - b) <= atol + rtol * abs(b) < math.inf  # noqa: PLR0124 - NaN alone is not itself
    return bool(a == b)


def _place(row: Mapping[str, Any]) -> str:
    clocks = [f"{clock} {row[clock]}" for clock in ("attempt", "iteration", "epoch") if row.get(clock) is not None]
    return f"step {row['step']} of {row['source']!r}" + (f" ({', '.join(clocks)})" if clocks else "")


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.8g}" if isinstance(value, float) else str(value)


def _pair(a: Any, b: Any) -> tuple[str, str]:
    """Return both as text; in full if they would look the same."""
    first, second = _shown(a), _shown(b)
    return (first, second) if first != second else (repr(a), repr(b))


def _relative(a: Any, b: Any) -> str:
    if not (isinstance(a, float | int) and isinstance(b, float | int)) or not b or not math.isfinite(a - b):
        return ""
    return f"{abs((a - b) / b):.2g}"


def _count(number: int) -> str:
    return f"{number} line" if number == 1 else f"{number} lines"
