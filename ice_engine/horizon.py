"""What schedules count on besides the clocks, and what becomes of them when a resumed run brings something else.

A schedule without a ``total`` of its own lasts the whole run; so its values change when a run is resumed with more
epochs, another window or another data set, and any schedule's do when its arguments or its initial value were edited.
:class:`Course` remembers what was in force, compares the values, and decides by a declared policy. Nothing changes
silently: every policy but ``"error"`` says in one line what the next value becomes.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ice_engine.arguments import choice
from ice_engine.clocks import Clocks, count_steps
from ice_engine.errors import ArgumentTypeError, ArgumentValueError, MissingKeyError, ScheduleChangedError
from ice_engine.processors.clocks import UNITS, run_length
from ice_engine.processors.dictprocess import Configured, Decorated
from ice_engine.processors.group_mapping import group_name
from ice_engine.processors.processor import Processor, name_of
from ice_engine.processors.schedule import Schedule
from ice_engine.processors.schedules import from_spec
from ice_engine.typing import DictProcessor

logger = logging.getLogger(__name__)

OnChange = Literal["error", "replan", "stretch", "keep"]
"""What a changed schedule means on resuming; to stop, take the new one, stretch the saved one, or keep it."""

_LENGTHS = ("epoch_length", "max_epochs", "max_iters", "total_steps", "epoch_size")
_PROBES = 64  # times between now and the end at which the values are compared


@dataclasses.dataclass(frozen=True)
class Terms:
    """What decides a schedule's values besides the clocks and the initial values.

    Attributes:
        run: The run's ``epoch_length``, ``max_epochs``, ``max_iters``, ``accumulation_steps`` and ``tail``.
        plan: Lengths that processors are shown, and ``stretch``; the run's own, unless an earlier run's were kept.
        processors: Each as plain data: the ``spec`` of a schedule, the expression or name of anything else.
    """

    run: Mapping[str, Any]
    plan: Mapping[str, Any]
    processors: Sequence[Any]

    @classmethod
    def of(cls, clocks: Clocks, size: int, tail: str, processors: Sequence[DictProcessor]) -> "Terms":
        """Return those of the run that *clocks* count, as if it were fresh."""
        run = {**clocks.run_lengths(), "accumulation_steps": size, "tail": tail}
        return cls(run, cls.own_plan(run), [_describe(processor) for processor in processors])

    @staticmethod
    def own_plan(run: Mapping[str, Any], step: int = 0, since: int = 0) -> dict[str, Any]:
        """Return what *run* shows to processors, if *step* steps were done at iteration *since*."""
        length, epochs, iters = run["epoch_length"], run["max_epochs"], run["max_iters"]
        left = count_steps(length, epochs, iters, run["accumulation_steps"], run["tail"], since=since)
        total = None if left is None else step + left
        return {
            "epoch_length": length,
            "epoch_size": length,
            "max_epochs": epochs,
            "max_iters": iters,
            "total_steps": total,
        }


class Course:
    """Remembers the terms in force and settles what holds when others come.

    Args:
        policy: ``"error"``, ``"replan"``, ``"stretch"`` or ``"keep"``.
    """

    def __init__(self, policy: OnChange) -> None:
        choice("on_change", policy, ("error", "replan", "stretch", "keep"))
        self.policy: OnChange = policy
        self.terms: Terms | None = None
        self.configured: list[dict[str, float]] | None = None

    def state_dict(self, terms: Terms) -> dict[str, Any]:
        """Return what is in force as plain data; *terms* are those of the run as it is."""
        if self.terms is not None and self.configured is not None:
            terms = self.terms  # loaded, and not settled yet
        elif self.terms is not None and self.terms.run == terms.run:
            terms = dataclasses.replace(terms, plan=self.terms.plan)
        return dataclasses.asdict(terms)

    def load_state_dict(self, state: Mapping[str, Any] | None, configured: list[dict[str, float]]) -> None:
        """Take over what was in force; *configured* are the initial values that this process was set up with."""
        self.terms = None if state is None else Terms(state["run"], state["plan"], state["processors"])
        self.configured = configured

    def start_afresh(self) -> None:
        """Forget what was in force: a fresh run has nothing to keep."""
        self.terms = self.configured = None

    def settle(
        self,
        name: str,
        terms: Terms,
        *,
        processors: tuple[DictProcessor, ...],
        groups: Sequence[dict[str, Any]],
        clocks: Clocks,
        owners: Mapping[str, Any],
    ) -> tuple[DictProcessor, ...]:
        """Decide what holds from now on, and set *clocks* and *groups* to it.

        Returns:
            The processors that hold.

        Raises:
            ScheduleChangedError: By the policy, or if it cannot be followed.
        """
        before, configured = self.terms, self.configured
        self.terms, self.configured = terms, None
        clocks.plan = {}
        if before is None:
            return processors
        new = _Side(terms, processors, configured)
        old = _Side(before, _restore(before, terms, processors), None)
        if terms.run == before.run:
            new = new.with_plan(before.plan)
        else:
            counts = clocks.counts
            new = new.with_plan(Terms.own_plan(terms.run, counts["step"], counts["iteration"]))
        chosen = new
        change = _first_change(old, new, groups, clocks, owners)
        if change is not None:
            if self.policy == "error":
                self.terms, self.configured = before, configured
                message = (
                    f"the schedule of optimizer {name!r} would change as the run goes on: {change}. Say which you "
                    "want: Optimizer(..., on_change='replan') takes the new values, 'keep' stays with the saved ones, "
                    "'stretch' stretches what is left of the saved schedule over what is left of the run"
                )
                raise ScheduleChangedError(message)
            if self.policy != "replan":
                chosen = old.kept(terms, new, clocks, stretch=self.policy == "stretch")
                change = change.declined(chosen, groups, owners)
            logger.warning("optimizer %r, on_change=%r: %s", name, self.policy, change)
        self.terms = dataclasses.replace(terms, plan=chosen.terms.plan, processors=chosen.terms.processors)
        if chosen.terms.plan != Terms.own_plan(terms.run):
            clocks.plan = dict(chosen.terms.plan)
        if change is not None:
            for group, initial in zip(groups, chosen.initial or [], strict=False):
                group.update(initial)
        return chosen.require_processors()


@dataclasses.dataclass(frozen=True)
class _Side:
    """The schedules of one side of a comparison, and all that they read."""

    terms: Terms
    processors: tuple[DictProcessor, ...] | None
    initial: list[dict[str, float]] | None

    def with_plan(self, plan: Mapping[str, Any]) -> "_Side":
        return dataclasses.replace(self, terms=dataclasses.replace(self.terms, plan=plan))

    def require_processors(self) -> tuple[DictProcessor, ...]:
        if self.processors is None:
            lost = [_text(described) for described in self.terms.processors if _made(described) is None]
            message = (
                f"the saved processors cannot be kept, as {', '.join(lost)} cannot be made from a checkpoint: it is "
                "not of ice.schedules, or holds a function. Give the optimizer the processors it was saved with, or "
                "on_change='replan'"
            )
            raise ScheduleChangedError(message)
        return self.processors

    def kept(self, run: Terms, new: "_Side", clocks: Clocks, *, stretch: bool) -> "_Side":
        """Return this side for a run of other *run* terms: its own lengths, stretched to the run's if asked for."""
        self.require_processors()
        plan = dict(self.terms.plan)
        if stretch and run.run != self.terms.run:
            plan["stretch"] = _stretch(plan, new.terms.plan, clocks)
        return self.with_plan(plan)

    def values(
        self, groups: Sequence[dict[str, Any]], clocks: Mapping[str, Any], owners: Mapping[str, Any]
    ) -> dict[tuple[str, str], float]:
        """Return what the schedules give at *clocks*, by key and group."""
        found = {}
        for index, group in enumerate(groups):
            initial = self.initial[index] if self.initial is not None and index < len(self.initial) else {}
            label = group_name(group, index)
            mapping = {**clocks, **owners, **self.terms.plan, **group, **initial}
            mapping.update(group_index=index, group_name=label)
            for processor in self.processors or ():
                if isinstance(processor, Schedule) and processor.applies(mapping):
                    found[processor.dst, label] = float(processor(mapping)[processor.dst])
        return found


def _describe(processor: DictProcessor) -> Any:
    if isinstance(processor, Schedule):
        try:
            return processor.spec
        except ArgumentTypeError:  # it holds a function
            return repr(processor)
    return repr(processor) if isinstance(processor, Processor) else name_of(processor)


def _restore(before: Terms, now: Terms, processors: tuple[DictProcessor, ...]) -> tuple[DictProcessor, ...] | None:
    """Return the processors of *before*: the present ones where they are the same, else made from their data."""
    found: list[DictProcessor] = []
    for saved in before.processors:
        same = [p for p, text in zip(processors, now.processors, strict=True) if text == saved]
        if same:
            found.append(same[0])
        elif (made := _made(saved)) is not None:
            found.append(made)
        else:
            return None
    return tuple(found)


def _made(described: Any) -> Schedule | None:
    """Return the schedule that plain data describe; None if it is none of the catalogue, such as one of the user's."""
    try:
        return from_spec(described)
    except (ArgumentTypeError, ArgumentValueError):
        return None


def _stretch(old: Mapping[str, Any], new: Mapping[str, Any], clocks: Clocks) -> dict[str, list[float]]:
    """Return, per unit, since when, from which time and how fast its clock runs to end where the run does."""
    counts, found = clocks.counts, {}
    length = new["epoch_length"]
    inside = length is not None and counts["iteration"] % length
    done = {"step": counts["step"], "iteration": counts["iteration"], "epoch": (clocks.epoch or 0) - bool(inside)}
    for unit in UNITS:
        try:
            planned, total = (run_length(lengths, unit, "stretch") for lengths in (old, new))  # type: ignore[arg-type]
        except MissingKeyError:
            continue
        since, begin, speed = (old.get("stretch") or {}).get(unit, (0, 0, 1))
        now = begin + (done[unit] - since) * speed
        if total > done[unit] and planned > now:
            found[unit] = [done[unit], now, (planned - now) / (total - done[unit])]
    if not found:
        message = "on_change='stretch' needs to know how long the run is; pass run(..., epoch_length=), or take 'keep'"
        raise ScheduleChangedError(message)
    return found


@dataclasses.dataclass(frozen=True)
class _Change:
    """The first value that differs between two sides, and why.

    Attributes:
        why: What differs.
        place: Key and group; None if no value is known to differ.
        clocks: When.
        text: The two values, as they are shown.
    """

    why: str
    place: tuple[str, str] | None = None
    clocks: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    text: str = ""
    label: str = ""
    new: float | None = None

    def declined(self, chosen: "_Side", groups: Sequence[dict[str, Any]], owners: Mapping[str, Any]) -> "_Change":
        """Return it as what the new value does not become, because *chosen* holds."""
        if self.place is None:
            return self
        value = chosen.values(groups, self.clocks, owners).get(self.place)
        return dataclasses.replace(self, text=f"{_number(value)} instead of {_number(self.new)}")

    def __str__(self) -> str:
        if self.place is None:
            return self.why
        return f"{self.label} at step {self.clocks['step'] + 1}: {self.text} ({self.why})"


def _first_change(
    old: _Side, new: _Side, groups: Sequence[dict[str, Any]], clocks: Clocks, owners: Mapping[str, Any]
) -> _Change | None:
    why = ", ".join(_reasons(old, new, groups))
    if not why:
        return None
    steps, size = clocks.counts["step"], new.terms.run["accumulation_steps"]
    end = max(side.terms.plan["total_steps"] or 0 for side in (old, new))
    for ahead in sorted({round(part * max(end - steps, 0) / _PROBES) for part in range(_PROBES + 1)}):
        at = _clocks_at(clocks, ahead, size, new.terms.plan["epoch_length"])
        try:
            before, after = (side.values(groups, at, owners) for side in (old, new))
        except MissingKeyError:  # of a length that is not known yet; the step itself will say so
            break
        for place in {**before, **after}:
            pair = before.get(place), after.get(place)
            if pair[0] != pair[1]:
                label = place[0] if len(groups) == 1 else f"{place[0]} of {place[1]!r}"
                return _Change(why, place, at, " -> ".join(map(_number, pair)), label, pair[1])
    changed = old.terms.processors != new.terms.processors
    return _Change(why) if changed or any(map(_reads_lengths, new.processors or ())) else None


def _clocks_at(clocks: Clocks, ahead: int, size: int, length: int | None) -> dict[str, Any]:
    iteration = clocks.counts["iteration"] + (ahead + 1) * size
    if ahead == 0 and length is not None:  # a short window ends with its epoch
        iteration = min(iteration, clocks.counts["iteration"] // length * length + length)
    epoch = clocks.epoch if length is None else (iteration - 1) // length + 1
    return {"step": clocks.counts["step"] + ahead, "attempt": 0, "iteration": iteration, "epoch": epoch}


def _reasons(old: _Side, new: _Side, groups: Sequence[dict[str, Any]]) -> list[str]:
    found = []
    # What one side does not know is no change: a state may be saved before its run.
    totals = [side.terms.plan["total_steps"] for side in (old, new)]
    runs = [side.terms.run for side in (old, new)]
    if runs[0] != runs[1] and totals[0] != totals[1] and None not in totals:
        found.append(f"total {totals[0]} -> {totals[1]}")
    else:
        pairs = [(key, runs[0].get(key), value) for key, value in runs[1].items()]
        found += [f"{key} {a} -> {b}" for key, a, b in pairs if a != b and a is not None and b is not None]
    texts = [", ".join(map(_text, side.terms.processors)) for side in (old, new)]
    if old.terms.processors != new.terms.processors:
        found.append(f"processors [{texts[0]}] -> [{texts[1]}]")
    for index, initial in enumerate(new.initial or []):
        saved = groups[index]
        found += [
            f"{key} {_number(saved.get(key))} -> {_number(value)}"
            for key, value in initial.items()
            if saved.get(key) != value
        ][: 1 - bool(found and found[-1].startswith("initial_"))]
    return found


def _text(described: Any) -> str:
    return str(_made(described) or described)


def _number(value: Any) -> str:
    return "unscheduled" if value is None else f"{value:.4g}"


def _reads_lengths(processor: DictProcessor) -> bool:
    """Whether a function of the user's own is known to read how long the run is."""
    if isinstance(processor, Configured):
        given = [value for value in processor.arguments.values() if isinstance(value, str)]
        named = [name for name in processor.decorated.parameters if name not in processor.arguments]
        return not set(_LENGTHS).isdisjoint([*given, *named])
    return isinstance(processor, Decorated) and not set(_LENGTHS).isdisjoint(processor.parameters)
