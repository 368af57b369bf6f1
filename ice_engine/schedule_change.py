"""What is different between the schedules that were saved and those that a run brings: the first value, and why."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ice_engine.forecast import Scene, Side
from ice_engine.processors.description import as_text, reads_lengths, same
from ice_engine.processors.group_mapping import group_name
from ice_engine.processors.processor import name_of
from ice_engine.schedule_terms import end_of

_PROBES = 64  # times between now and the end at which the values are compared
_FINE = 1000  # steps at most, before the first time that differs, among which the very first is looked for


@dataclasses.dataclass(frozen=True)
class Change:
    """The first value that differs between two sides, and why.

    Attributes:
        why: What differs.
        place: Key and group; None if no value is known to differ.
        clocks: When.
        text: The two values, as they are shown.
        label: Key and group, as they are shown.
        new: The value on the new side.
    """

    why: str
    place: tuple[str, int] | None = None
    clocks: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    text: str = ""
    label: str = ""
    new: float | None = None

    def declined(self, chosen: Side, scene: Scene) -> "Change":
        """Return it as what the new value does not become, because *chosen* holds."""
        if self.place is None:
            return self
        value = chosen.values(scene, self.clocks).get(self.place)
        return dataclasses.replace(self, text=f"{_number(value)} instead of {_number(self.new)}")

    def __str__(self) -> str:
        if self.place is None:
            return self.why
        return f"{self.label} at step {self.clocks['step'] + 1}: {self.text} ({self.why})"


def first_change(old: Side, new: Side, scene: Scene) -> Change | None:
    """Return the first value from *scene* on that *new* gives and *old* does not; None if nothing differs."""
    why = ", ".join(_reasons(old, new, scene.groups))
    if not why:
        return None

    def first(ahead: int) -> Change | None:
        at = scene.ahead(ahead, new.terms.run["accumulation_steps"], new.terms.plan["epoch_length"])
        before, after = (side.values(scene, at) for side in (old, new))
        for key, index in {**before, **after}:
            pair = before.get((key, index)), after.get((key, index))
            if pair[0] != pair[1]:
                group = "" if len(scene.groups) == 1 else f" of {group_name(scene.groups[index], index)!r}"
                return Change(why, (key, index), at, " -> ".join(map(_number, pair)), key + group, pair[1])
        return None

    equal_until = -1
    for ahead in _probes(old, new, scene):
        if (change := first(ahead)) is not None:
            between = (first(step) for step in range(max(equal_until + 1, ahead - _FINE), ahead))
            return next((earlier for earlier in between if earlier is not None), change)
        equal_until = ahead
    functions = [name_of(p) for p in new.processors if p is not None and reads_lengths(p)]
    if functions:
        why += f", which {', '.join(functions)} reads"
    return Change(why) if functions or not _same_processors(old, new) else None


def _probes(old: Side, new: Side, scene: Scene) -> list[int]:
    """Return steps ahead at which values are compared: spread over what is left, and close before both ends."""
    ends = [max((side.terms.plan["total_steps"] or 0) - scene.step - 1, 0) for side in (old, new)]
    spread = {round(part * max(ends) / _PROBES) for part in range(_PROBES + 1)}
    return sorted(spread | {max(end - 2**i, 0) for end in ends for i in range(10)} | {*ends})


def other_world_only(old: Side, new: Side, groups: Sequence[dict[str, Any]]) -> bool:
    """Whether nothing but the number of ranks has changed, and what follows from it with the same effective batch.

    The same items then take about as many steps, to what rounding leaves of a window; the user asked for no change.
    """
    follows = {"world_size", "accumulation_steps", "epoch_length"}
    runs = [{key: value for key, value in side.terms.run.items() if key not in follows} for side in (old, new)]
    same_rest = runs[0] == runs[1] and _same_processors(old, new) and not _initial_reasons(new, groups)
    same_batch = runs[1].get("effective_batch_size") is not None
    return same_rest and same_batch and old.terms.run["world_size"] != new.terms.run["world_size"]


def _same_processors(old: Side, new: Side) -> bool:
    pairs = zip(old.terms.processors, new.terms.processors, strict=False)
    return len(old.terms.processors) == len(new.terms.processors) and all(same(a, b) for a, b in pairs)


def _reasons(old: Side, new: Side, groups: Sequence[dict[str, Any]]) -> list[str]:
    found = []
    # What one side does not know is no change: a state may be saved before its run.
    totals = [side.terms.plan["total_steps"] for side in (old, new)]
    runs = [side.terms.run for side in (old, new)]
    if runs[0] != runs[1] and totals[0] != totals[1] and None not in totals:
        found.append(f"total {totals[0]} -> {totals[1]}")
    else:
        pairs = [(key, runs[0].get(key), value) for key, value in runs[1].items()]
        if runs[0]["max_iters"] != runs[1]["max_iters"]:
            pairs.append(("iterations", end_of(runs[0]), end_of(runs[1])))  # told in epochs by one of them
        found += [f"{key} {a} -> {b}" for key, a, b in pairs if a != b and a is not None and b is not None]
    if not _same_processors(old, new):
        before, after = (", ".join(map(as_text, side.terms.processors)) for side in (old, new))
        found.append(f"processors [{before}] -> [{after}]" if before != after else f"other code in [{after}]")
    return found + _initial_reasons(new, groups)


def _initial_reasons(new: Side, groups: Sequence[dict[str, Any]]) -> list[str]:
    found: list[str] = []
    for index, initial in enumerate(new.initial or []):
        saved = groups[index]
        found += [
            f"{key} {_number(saved.get(key))} -> {_number(value)}"
            for key, value in initial.items()
            if saved.get(key) != value
        ][: 1 - bool(found and found[-1].startswith("initial_"))]
    return found


def _number(value: Any) -> str:
    return "unscheduled" if value is None else f"{value:.4g}"
