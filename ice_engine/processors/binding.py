"""What stays the same from step to step about processors and param groups, found once."""

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ice_engine.errors import ProcessorError
from ice_engine.fused import form
from ice_engine.processors.composition import When
from ice_engine.processors.group import followed_metrics, set_initial_values, take_back, written_keys
from ice_engine.processors.group_mapping import Written, group_name
from ice_engine.processors.schedule import Schedule


class Binding:
    """Processors and the param groups they change, with what follows from both.

    Args:
        processors: In the order they run.
        groups: The param groups; their initial values are remembered.

    Attributes:
        keys: The entries that a record shows.
        names: The names of the groups.
        clocks_alone: Whether all are schedules, whose values follow from the clocks; then they are the same on every
            rank.
        blind: Whether none is a function of the user's, which might look at the gradients of a group.

    Raises:
        MissingKeyError: If a processor is known to write a key that a group does not have.
    """

    def __init__(self, processors: Sequence[Callable[..., Any]], groups: Sequence[dict[str, Any]]) -> None:
        self._processors = processors
        self._groups = list(groups)
        self._by_hand = _by_hand(groups)
        if processors:
            set_initial_values(processors, groups)
        written = [key for _, key in written_keys(processors)]
        self.keys = list(dict.fromkeys(["lr", *(key.partition(".")[0] for key in written)]))
        self.names = [group_name(group, index) for index, group in enumerate(groups)]
        self.clocks_alone = all(isinstance(p, Schedule) for p in processors) and not followed_metrics(processors)
        self.blind = all(isinstance(p, Schedule) and not _asks(p) for p in processors)
        self._schedules = [(p, p.dst, f"initial_{p.dst}") for p in processors if isinstance(p, Schedule)]

    @functools.cached_property
    def form(self) -> str | None:
        """Which form of the optimizer steps the groups, see :func:`ice_engine.fused.form`."""
        return form(self._groups)

    def holds(self, processors: Sequence[Callable[..., Any]], groups: Sequence[dict[str, Any]]) -> bool:
        """Whether it is of these as they are, and not of others that have come since."""
        return (
            processors is self._processors
            and len(groups) == len(self._groups)
            and all(map(operator.is_, groups, self._groups))
            and self._by_hand == _by_hand(groups)
        )

    def run(self, context: Mapping[str, Any]) -> list[Written] | None:
        """Write what the schedules say at the clocks in *context*; if it is not that simple, nothing.

        What a schedule computes from the clocks is then computed once for all groups, and a float written to each:
        three keys of 100 groups, each from a value of its own, take 0.21 ms instead of 0.4 to 0.7.

        Returns:
            What was there before, for :func:`~ice_engine.processors.group.take_back`; None if it was not that simple,
            which is schedules alone, the same for every group, from floats to floats that can be used.
        """
        if not self.clocks_alone:
            return None
        written: list[Written] = []
        try:
            for schedule in self._schedules:
                self._write(*schedule, context, written)
        except (_NotThatSimple, ProcessorError, ArithmeticError):
            take_back(written)
            return None  # whoever does it step by step also says what is wrong
        except BaseException:
            take_back(written)
            raise
        return written

    def _write(
        self, schedule: Schedule, key: str, initial: str, context: Mapping[str, Any], written: list[Written]
    ) -> None:
        values = schedule.values(self._floats(initial), self._groups, context)
        if values is None:
            raise _NotThatSimple
        for group, value in zip(self._groups, values, strict=True):
            before = group.get(key)
            if type(before) is not float or type(value) is not float or not 0.0 <= value < math.inf:
                raise _NotThatSimple
            written.append((group, key, before))
            group[key] = value

    def _floats(self, key: str) -> list[float]:
        found = []
        for group in self._groups:
            value = group.get(key)
            if type(value) is not float:
                raise _NotThatSimple
            found.append(value)
        return found


class _NotThatSimple(Exception):  # noqa: N818 - no error
    """A value needs the whole way, through a mapping of its group."""


def _by_hand(groups: Sequence[Mapping[str, Any]]) -> list[tuple[Any, Any, Any]]:
    """Return what names and forms follow from, which a user may set in a group at any time."""
    return [(group.get("name"), group.get("foreach"), group.get("fused")) for group in groups]


def _asks(schedule: Schedule) -> bool:
    return isinstance(schedule, When) or any(_asks(part) for part in schedule.parts)
