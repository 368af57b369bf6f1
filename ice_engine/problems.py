"""What people get wrong, found in the plan of a run: each problem a sentence with its numbers and the mend."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ice_engine.processors.description import schedules_in
from ice_engine.processors.processor import name_of
from ice_engine.processors.schedule import Schedule
from ice_engine.rehearsal import Witness
from ice_engine.schedule_lengths import PlannedRun, wrong_lengths

_NOTHING = 1e-9  # part of the highest lr below which a step changes nothing that float32 can hold
_SHARE = 0.05  # of the run that must be below it: every curve that goes to 0 smoothly ends with a few such steps


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
        *wrong_lengths(planned, processors, initial),
        *_wasted_steps(rates, list(schedules_in(processors))),
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
