"""Whether the lengths that schedules were given fit the run: in the right unit, and within it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ice_engine.processors.clocks import at_clock
from ice_engine.processors.composition import Sequence as Then
from ice_engine.processors.curve import Curve
from ice_engine.processors.description import schedules_in
from ice_engine.processors.schedule import Schedule

_LENGTHS = {
    # (factory, setting): what the setting is. A new schedule whose settings are lengths needs its rows here.
    ("*", "total"): "total",
    ("*", "warmup"): "warm-up",
    ("warmup", "steps"): "warm-up",
    ("*", "step_size"): "milestones",
    ("*", "periods"): "part",
    ("*", "up"): "part",
    ("*", "down"): "part",
    ("*", "decay"): "part",
    ("swa", "steps"): "part",
}
_UNITS = {"step": "steps", "iteration": "micro-batches", "epoch": "epochs"}
_FAR_MORE = 4  # steps per epoch from which on milestones within the number of epochs are taken for epochs
_TINY = 1e-6  # factor to which no one decays by design


@dataclass(frozen=True)
class PlannedRun:
    """The run that is planned, in numbers.

    Attributes:
        size: Micro-batches per full window.
        tail: What becomes of a short last window of an epoch.
        epoch_length: Micro-batches per epoch.
        iterations: Micro-batches of the run.
        steps: Steps of the run.
    """

    size: int
    tail: str
    epoch_length: int
    iterations: int
    steps: int

    @property
    def epochs(self) -> int:
        """Epochs begun."""
        return -(-self.iterations // self.epoch_length)

    def length(self, unit: str) -> int:
        """Return how many of *unit* the run has."""
        return {"step": self.steps, "iteration": self.iterations, "epoch": self.epochs}[unit]


def wrong_lengths(
    planned: PlannedRun, processors: Sequence[Callable[..., Any]], initial: Mapping[str, Any]
) -> Iterator[str]:
    """Yield the problems of schedules whose settings do not fit the run; *initial* are entries before it."""
    for schedule in schedules_in(processors):
        whole = not any(isinstance(part, Then) for part in _parts(schedule))
        for curve, start in schedule.curves():
            if start and start >= planned.length(curve.unit):
                yield (
                    f"schedule longer than the run: {curve!r} begins at {curve.unit} {start}, and the run has "
                    f"{_count(planned, curve.unit)}. Lower then(at=...), or train longer"
                )
                continue
            for setting, value in curve.settings:
                role = _LENGTHS.get((curve.name, setting)) or _LENGTHS.get(("*", setting))
                lengths = value if isinstance(value, tuple) else (value,)
                if role is None or not all(type(length) is int for length in lengths):
                    continue
                length = sum(lengths) if role == "part" else max(lengths)
                base = initial.get(f"initial_{curve.dst}") if curve is schedule else None
                where = _Length(curve, setting, role, lengths, length, start, base)
                yield from _wrong_unit(planned, where, whole) or _too_long(planned, where)


@dataclass(frozen=True)
class _Length:
    curve: Curve
    setting: str
    role: str
    given: tuple[int, ...]
    length: int
    start: int
    base: float | None  # what the curve starts from, if it is a whole schedule and not a factor of one

    def __str__(self) -> str:
        value = self.given if len(self.given) > 1 else self.given[0]
        return f"{self.setting}={value} of {self.curve!r}"


def _parts(schedule: Schedule) -> Iterator[Schedule]:
    yield schedule
    for part in schedule.parts:
        yield from _parts(part)


def _count(planned: PlannedRun, unit: str) -> str:
    return f"{planned.length(unit)} {_UNITS[unit]}"


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= 0.01 * b


def _wrong_unit(planned: PlannedRun, at: _Length, whole: bool) -> list[str]:
    unit, length, role = at.curve.unit, at.length, at.role
    meant = None
    if unit != "epoch" and whole and planned.length(unit) >= 2 * planned.epochs and _means_epochs(planned, at):
        meant = "epoch"
    elif (
        unit == "step"
        and planned.steps < planned.iterations
        and length > planned.steps
        and _near(length, planned.iterations)
    ):
        meant = "iteration"
    elif unit == "iteration" and role == "total" and whole and planned.steps < planned.iterations:
        meant = "step" if _near(length, planned.steps) else None
    elif unit == "epoch" and length > planned.epochs:
        meant = next((u for u in ("step", "iteration") if _near(length, planned.length(u))), None)
    if meant is None:
        return []
    mend = f"Write unit={meant!r}" + (", or leave total out to last the whole run" if role == "total" else "")
    if {meant, unit} == {"step", "iteration"}:
        mend = f"Write {at.setting}={planned.length(unit)}, or unit={meant!r}" if role == "total" else mend
    what = {"milestones": "fit into", "part": "fits into"}.get(role, "is") if meant == "epoch" else "is"
    found = (
        f"wrong unit: {at} {what} the number of {_UNITS[meant]} ({planned.length(meant)}), but it counts "
        f"{_UNITS[unit]}, of which the run has {planned.length(unit)}. {mend}"
    )
    return [found]


def _means_epochs(planned: PlannedRun, at: _Length) -> bool:
    length, units = at.length, planned.length(at.curve.unit)
    if at.role == "total":
        return _near(length, planned.epochs)
    if at.role == "part" and len(at.given) > 1:
        return _near(length, planned.epochs) and units >= _FAR_MORE * planned.epochs
    if at.role != "milestones" or length > planned.epochs or units < _FAR_MORE * planned.epochs:
        return False
    if isinstance(dict(at.curve.settings)[at.setting], tuple):
        return True
    # One number is a period: harmless, unless the decay it repeats ends in nothing.
    gamma = dict(at.curve.settings).get("gamma")
    return isinstance(gamma, float) and gamma < 1 and gamma ** (units // length) < _TINY


def _too_long(planned: PlannedRun, at: _Length) -> list[str]:
    unit, end = at.curve.unit, at.start + at.length
    run, has = planned.length(unit), _count(planned, unit)
    if at.role == "warm-up":
        if end < run or not at.length:
            return []
        when = f"reaches its peak after {end} {_UNITS[unit]}, and the run has {has}"
        return [f"warm-up longer than the run: {at} {when}. Shorten it, or train longer"]
    if end <= run:
        return []
    if at.setting == "decay":  # at the end of the run, wherever that is
        return [f"schedule longer than the run: {at} needs {at.length} {_UNITS[unit]}, and the run has {has}"]
    if at.role == "milestones" and len(at.given) > 1:
        late = sum(at.start + milestone > run for milestone in at.given)
        return [f"schedule longer than the run: {late} of the {len(at.given)} times in {at} come after its {has}"]
    return [
        f"schedule longer than the run: {at} ends after {end} {_UNITS[unit]}, and the run has {has}"
        + _unfinished(planned, at)
    ]


def _unfinished(planned: PlannedRun, at: _Length) -> str:
    unit, run = at.curve.unit, planned.length(at.curve.unit)
    mend = "Shorten it, or train longer"
    if at.role == "total":
        mend = f"Write {at.setting}={run - at.start}, leave it out to last the whole run, or train longer"
    if at.base is None:
        return f". {mend}"
    try:
        now, end = (at.curve.value(at.base, at_clock(unit, t)) for t in (run - 1, at.length))
    except (KeyError, ValueError, ArithmeticError):  # it reads more than its clock
        return f". {mend}"
    return f": {at.curve.dst} stops at {now:.3g}, and would end at {end:.3g}. {mend}"
