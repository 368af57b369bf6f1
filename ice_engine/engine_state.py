"""An engine's state as a mapping, for processors that run on events."""

from collections.abc import Iterator, MutableMapping
from typing import Any

from ignite.engine import Engine, State

from ice_engine.errors import UnknownKeyError

_METRICS = "metrics."
_IGNITE_OWN = frozenset(
    {
        "engine",
        "iteration",
        "epoch",
        "epoch_length",
        "max_epochs",
        "max_iters",
        "metrics",
        "dataloader",
        "times",
        "seed",
    }
)


class StateMapping(MutableMapping[str, Any]):
    """An engine's state as the mapping that a processor on an event reads and writes.

    ``output``, ``epoch`` and every other attribute by name, ``"metrics.accuracy"`` for a metric;
    ``engine`` is the engine. What Ignite or an optimizer counts and records is read-only. What is written is read back
    from here at once, and reaches the state by :meth:`commit`.

    Args:
        engine: The engine whose ``state`` it shows.

    Attributes:
        written: What was written, by key.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.written: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key in self.written:
            return self.written[key]
        if key == "engine":
            return self._engine
        if key.startswith(_METRICS):
            return self._engine.state.metrics[key.removeprefix(_METRICS)]
        return vars(self._engine.state)[key]

    def __setitem__(self, key: str, value: Any) -> None:
        check_writable(key)
        self.written[key] = value

    def __delitem__(self, key: str) -> None:
        message = f"engine.state.{key} cannot be deleted by a processor"
        raise UnknownKeyError(message)

    def __iter__(self) -> Iterator[str]:
        state = self._engine.state
        yield from dict.fromkeys(
            [*vars(state), *(f"{_METRICS}{name}" for name in state.metrics), "engine", *self.written]
        )

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def commit(self) -> None:
        """Write all that was written to the state and its metrics."""
        for key, value in self.written.items():
            if key.startswith(_METRICS):
                self._engine.state.metrics[key.removeprefix(_METRICS)] = value
            else:
                setattr(self._engine.state, key, value)


def check_writable(key: str) -> None:
    """Check that a processor on an event may write *key*.

    Raises:
        UnknownKeyError: If the run counts with it, or it cannot be an attribute of the engine's state.
    """
    counters = set(State.event_to_attr.values())
    is_record = key.endswith("_record") and f"{key.removesuffix('_record')}_step" in counters
    if key in _IGNITE_OWN or key in counters or is_record:
        message = f"engine.state.{key} is read-only for processors: the run counts with it"
        raise UnknownKeyError(message)
    if not key.startswith(_METRICS) and (not key.isidentifier() or hasattr(State, key)):
        message = f"{key!r} cannot be written to engine.state; choose a name such as 'my_value', or 'metrics.my_value'"
        raise UnknownKeyError(message)
