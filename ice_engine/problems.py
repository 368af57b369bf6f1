"""What people get wrong, found in the plan of a run: each problem a sentence with its numbers and the mend."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ice_engine.processors.clocks import at_clock
from ice_engine.processors.compose import Compose
from ice_engine.processors.composition import Sequence as Then
from ice_engine.processors.curve import Curve
from ice_engine.processors.processor import name_of
from ice_engine.processors.schedule import Schedule
from ice_engine.rehearsal import Witness

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
_NOTHING = 1e-9  # part of the highest lr below which a step changes nothing that float32 can hold
_SHARE = 0.05  # of the run that must be below it: every curve that goes to 0 smoothly ends with a few such steps
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


def find_problems(
    planned: PlannedRun,
    processors: Sequence[Callable[..., Any]],
    *,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    scheduled: Sequence[bool],
    witnesses: Iterable[Witness],
    initial: Mapping[str, Any],
) -> list[str]:
    """Return the problems of a planned run, the worst first.

    Args:
        planned: The run.
        processors: In the order they run.
        groups: Names of the param groups.
        series: Values per step, by ``key/group``.
        scheduled: For each group, whether any processor wrote anything in it.
        witnesses: What processors did at some of the steps.
        initial: Entries of the first group as they are before the first step.
    """
    rates = {group: series[f"lr/{group}"] for group in groups if f"lr/{group}" in series}
    return [
        *_windows(planned),
        *_lengths(planned, processors, initial),
        *_wasted_steps(rates, list(_schedules(processors))),
        *_overwritten(processors, witnesses),
        *_unscheduled(groups, scheduled),
    ]


# -- windows ------------------------------------------------------------------------------------------------


def _windows(planned: PlannedRun) -> Iterator[str]:
    size, length, tail = planned.size, planned.epoch_length, planned.tail
    if size > length:
        then = {
            "step": f"every step has {length} micro-batches at most",
            "drop": "with tail='drop' no window is ever full, and nothing is trained",
            "carry": f"every window spans {-(-size // length)} epochs or more",
        }[tail]
        yield (
            f"window longer than an epoch: accumulation_steps={size} and an epoch has {length} micro-batches, so "
            f"{then}. Write accumulation_steps={length} or less"
        )
        return
    rest, last = length % size, planned.iterations % length % size
    if tail == "carry":
        if short := planned.iterations % size:
            yield (
                f"short tail: the run's last window has {short} of {size} micro-batches, and its step counts as much "
                f"as any other. Train {planned.iterations - short} micro-batches, or take this as it is"
            )
    elif rest and planned.iterations >= length:
        mend = f"Choose accumulation_steps that divide {length}, or tail='carry'"
        epochs = planned.iterations // length
        if tail == "drop":
            yield (
                f"short tail: tail='drop' drops the last {rest} of {length} micro-batches of each epoch, "
                f"{epochs * rest + last} in the run. {mend}"
            )
        else:
            yield (
                f"short tail: the last window of each epoch has {rest} of {size} micro-batches, and its step counts "
                f"as much as any other. {mend}"
            )
    elif last:
        what = "is dropped" if tail == "drop" else "steps all the same"
        yield (
            f"short tail: the run ends inside an epoch; its last window has {last} of {size} micro-batches and {what}. "
            f"Train {planned.iterations - last} micro-batches, or take this as it is"
        )


# -- lengths of schedules -----------------------------------------------------------------------------------


def _schedules(processors: Iterable[Any]) -> Iterator[Schedule]:
    for processor in processors:
        if isinstance(processor, Schedule):
            yield processor
        elif isinstance(processor, Compose):
            yield from _schedules(processor.processors)


def _lengths(
    planned: PlannedRun, processors: Sequence[Callable[..., Any]], initial: Mapping[str, Any]
) -> Iterator[str]:
    for schedule in _schedules(processors):
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


# -- steps that change nothing --------------------------------------------------------------------------------


def _wasted_steps(rates: Mapping[str, Sequence[float]], schedules: Sequence[Schedule]) -> Iterator[str]:
    late: dict[int, list[str]] = {}
    early: dict[int, list[str]] = {}
    from_zero = any(
        dict(curve.settings).get("start") == 0.0 and not start and schedule.dst == "lr"
        for schedule in schedules
        for curve, start in schedule.curves()
    )
    for group, values in rates.items():
        count = len(values)
        least = _NOTHING * max(values, default=0.0)
        if not least > 0.0:
            continue  # frozen by intent
        zeros = next(i for i in range(count) if values[count - 1 - i] > 0.0)
        tiny = next(i for i in range(count) if values[count - 1 - i] > least)
        trailing = tiny if tiny > _SHARE * count else zeros
        leading = next(i for i in range(count) if values[i] > 0.0)
        if trailing > 1:
            late.setdefault(count - trailing + 1, []).append(group)
        if leading and (leading == 1 or from_zero):
            early.setdefault(leading, []).append(group)
    total = max(map(len, rates.values()), default=0)
    for step, groups in late.items():
        yield (
            f"lr reaches zero early: lr of {_list(groups)} is 0, or below a billionth of its highest value, from step "
            f"{step} of {total} on: {total - step + 1} steps change nothing. Lengthen the schedule (total={total}, or "
            "leave total out), decay more slowly, or give it a floor"
        )
    for steps, groups in early.items():
        first = "at the first step, which changes" if steps == 1 else f"at the first {steps} steps, which change"
        yield (
            f"first step wasted: lr of {_list(groups)} is 0 {first} nothing. Leave out start=0 of the warm-up, or set "
            "it above 0"
        )


# -- processors and groups ------------------------------------------------------------------------------------


def _overwritten(processors: Sequence[Callable[..., Any]], witnesses: Iterable[Witness]) -> Iterator[str]:
    wrote: dict[tuple[int, str], int] = {}
    lost: dict[tuple[int, str], int] = {}
    by: dict[tuple[int, str], int] = {}
    groups: dict[tuple[int, str], dict[str, None]] = {}
    for witness in witnesses:
        for i, (_, written) in enumerate(witness.accesses):
            for key in written:
                wrote[i, key] = wrote.get((i, key), 0) + 1
                other = _overwriter(witness.accesses, i, key)
                if other is not None:
                    lost[i, key] = lost.get((i, key), 0) + 1
                    by[i, key] = other
                    groups.setdefault((i, key), {})[witness.name] = None
    for (i, key), times in lost.items():
        # One that keeps its effect in some groups or at some steps was limited by intent, as with only() and when().
        if times == wrote[i, key]:
            first, second = (_expression(processors[p]) for p in (i, by[i, key]))
            mend = "Take one out"
            if all(isinstance(processors[p], Schedule) for p in (i, by[i, key])):
                mend = f"Take one out, or multiply them: {first} * {second}"
            yield (
                f"overwritten: {second} writes {key!r} of {_list(groups[i, key])} without reading it, after {first} "
                f"wrote it, which so has no effect. {mend}"
            )


def _overwriter(accesses: Sequence[tuple[frozenset[str], frozenset[str]]], i: int, key: str) -> int | None:
    for j, (read, written) in enumerate(accesses[i + 1 :], start=i + 1):
        if any(_overlap(key, other) for other in read):
            return None
        if any(key == other or key.startswith(f"{other}.") for other in written):
            return j
    return None


def _overlap(key: str, other: str) -> bool:
    return key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.")


def _expression(processor: Callable[..., Any]) -> str:
    return repr(processor) if isinstance(processor, Schedule) else name_of(processor)


def _unscheduled(groups: Sequence[str], scheduled: Sequence[bool]) -> Iterator[str]:
    without = [group for group, is_scheduled in zip(groups, scheduled, strict=True) if not is_scheduled]
    if without and any(scheduled):
        yield (
            f"group without a schedule: no processor writes anything in {_list(without)}; its lr stays as it is, while "
            "that of others changes. Name it in only(...), or give it a schedule of its own"
        )


def _list(names: Iterable[str]) -> str:
    found = list(names)
    shown = found if len(found) <= 3 else [*found[:2], f"{len(found) - 2} more groups"]  # noqa: PLR2004
    return " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))
