"""What schedules count on besides the clocks, and what becomes of them when a resumed run brings something else.

A schedule without a ``total`` of its own lasts the whole run; so its values change when a run is resumed with more
epochs or another window, and any schedule's do when its arguments, its code or its initial value were edited.
:class:`Course` remembers what was in force, compares the values, and decides by a declared policy. Nothing changes
silently: every policy but ``"error"`` says in one line what the next value becomes.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ice_engine.arguments import choice
from ice_engine.clocks import Clocks, count_steps
from ice_engine.errors import MissingKeyError, ScheduleChangedError
from ice_engine.processors.clocks import UNITS, run_length
from ice_engine.processors.description import as_text, describe, made, reads_lengths, same, schedules_in
from ice_engine.processors.group_mapping import GroupMapping, group_name
from ice_engine.processors.processor import name_of
from ice_engine.typing import DictProcessor

logger = logging.getLogger(__name__)

OnChange = Literal["error", "replan", "stretch", "keep"]
"""What a changed schedule means on resuming; to stop, take the new one, stretch the saved one, or keep it."""

_PROBES = 64  # times between now and the end at which the values are compared
_FINE = 1000  # steps at most, before the first time that differs, among which the very first is looked for


@dataclasses.dataclass(frozen=True)
class Terms:
    """What decides a schedule's values besides the clocks and the initial values.

    Attributes:
        run: The run's ``epoch_length``, ``max_epochs``, ``max_iters``, ``accumulation_steps`` and ``tail``; with an
            ``effective_batch_size``, that and the ``world_size`` as well.
        plan: Lengths that processors are shown, and ``stretch``; the run's own, unless an earlier run's were kept.
        processors: Each as plain data: the ``spec`` of a schedule, the expression or name of anything else.
    """

    run: Mapping[str, Any]
    plan: Mapping[str, Any]
    processors: Sequence[Any]

    @classmethod
    def of(cls, clocks: Clocks, window: Mapping[str, Any], processors: Sequence[DictProcessor]) -> "Terms":
        """Return those of the run that *clocks* count, as if it were fresh, with *window* that of its windows."""
        run = {**clocks.run_lengths(), **window}
        return cls(run, cls.own_plan(run), [describe(processor) for processor in processors])

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

    @property
    def unsettled(self) -> bool:
        """Whether nothing is in force yet, or what is was loaded and not compared with what the run brings."""
        return self.terms is None or self.configured is not None

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
        pending: int = 0,
    ) -> tuple[DictProcessor, ...]:
        """Decide what holds from now on, and set *clocks* and *groups* to it; if it cannot, nothing has changed.

        Args:
            name: The optimizer's.
            terms: Of the run as it is.
            processors: That the optimizer was given.
            groups: Its param groups.
            clocks: Its clocks.
            owners: What processors see besides.
            pending: Micro-batches of the window that is being closed, which are counted already.

        Returns:
            The processors that hold.

        Raises:
            ScheduleChangedError: By the policy, or if it cannot be followed.
        """
        before = self.terms
        if before is None:
            self.terms, self.configured, clocks.plan = terms, None, {}
            return processors
        scene = _Scene(groups, clocks, owners, pending)
        new = _Side(terms, processors, self.configured)
        old = _Side(before, _restore(before, terms, processors), None)
        if terms.run == before.run:
            new = new.with_plan(before.plan)
        else:
            new = new.with_plan(Terms.own_plan(terms.run, clocks.counts["step"], scene.iteration))
        chosen = new
        change = _first_change(old, new, scene)
        policy = self.policy
        if policy == "error" and _other_world_only(old, new, groups):
            policy = "replan"
        if change is not None:
            if policy == "error":
                message = (
                    f"the schedule of optimizer {name!r} would change as the run goes on: {change}. Say which you "
                    "want: Optimizer(..., on_change='replan') takes the new values, 'keep' stays with the saved ones, "
                    "'stretch' stretches what is left of the saved schedule over what is left of the run"
                )
                raise ScheduleChangedError(message)
            if policy != "replan":
                chosen = old.kept(terms, new, scene, stretch=policy == "stretch")
                change = change.declined(chosen, scene)
        holds = chosen.require_processors()
        # Only now, when nothing can fail any more: whoever catches the error and runs again gets it again.
        self.terms = dataclasses.replace(terms, plan=chosen.terms.plan, processors=chosen.terms.processors)
        self.configured = None
        clocks.plan = {} if chosen.terms.plan == Terms.own_plan(terms.run) else dict(chosen.terms.plan)
        if change is not None:
            logger.warning("optimizer %r, on_change=%r: %s", name, policy, change)
            for group, initial in zip(groups, chosen.initial or [], strict=False):
                group.update(initial)
        return holds

    def outdated(self, clocks: Clocks) -> bool:
        """Whether the run became longer or shorter since it was settled, such as by ``engine.state.max_epochs = 8``."""
        if self.terms is None:
            return False
        known = self.terms.run
        for key, value in clocks.run_lengths().items():
            if value != known[key] and None not in (value, known[key]):
                return True
        return False


class _Scene:
    """Where the run is, and what processors see there."""

    def __init__(
        self, groups: Sequence[dict[str, Any]], clocks: Clocks, owners: Mapping[str, Any], pending: int
    ) -> None:
        self.groups = groups
        self.clocks = clocks
        self.owners = owners
        self.iteration: int = clocks.counts["iteration"] - pending  # before the window that is being closed
        self.step: int = clocks.counts["step"]

    def ahead(self, steps: int, size: int, length: int | None) -> dict[str, Any]:
        """Return the clocks as they will be *steps* steps from the next one."""
        iteration = self.iteration + (steps + 1) * size
        if steps == 0 and length:  # a short window ends with its epoch
            iteration = min(iteration, self.iteration // length * length + length)
        epoch = (iteration - 1) // length + 1 if length else self.clocks.epoch
        return {
            "step": self.step + steps,
            "attempt": self.clocks.counts["attempt"] + steps,
            "iteration": iteration,
            "global_steps": iteration,
            "epoch": epoch,
            "current_epoch": epoch,
            "epoch_steps": (iteration - 1) % length + 1 if length else None,
        }


@dataclasses.dataclass(frozen=True)
class _Side:
    """The schedules of one side of a comparison, and all that they read."""

    terms: Terms
    processors: tuple[DictProcessor | None, ...]
    initial: list[dict[str, float]] | None

    def with_plan(self, plan: Mapping[str, Any]) -> "_Side":
        return dataclasses.replace(self, terms=dataclasses.replace(self.terms, plan=plan))

    def require_processors(self) -> tuple[DictProcessor, ...]:
        pairs = zip(self.terms.processors, self.processors, strict=True)
        lost = [as_text(described) for described, processor in pairs if processor is None]
        if lost:
            message = (
                f"the saved processors cannot be kept, as {', '.join(lost)} cannot be made from a checkpoint: it is "
                "not of ice.schedules, or holds a function. Give the optimizer the processors it was saved with, or "
                "on_change='replan'"
            )
            raise ScheduleChangedError(message)
        return tuple(processor for processor in self.processors if processor is not None)

    def kept(self, run: Terms, new: "_Side", scene: _Scene, *, stretch: bool) -> "_Side":
        """Return this side for a run of other *run* terms: its own lengths, stretched to the run's if asked for."""
        processors = self.require_processors()
        plan = dict(self.terms.plan)
        if stretch and run.run != self.terms.run:
            rigid = [name_of(processor) for processor in processors if reads_lengths(processor)]
            if rigid:
                message = (
                    f"on_change='stretch' stretches schedules, and {', '.join(rigid)} is a function that reads how "
                    "long the run is; take 'replan' or 'keep', or make it a schedule"
                )
                raise ScheduleChangedError(message)
            plan["stretch"] = _stretch(plan, new.terms.plan, scene)
        return self.with_plan(plan)

    def values(self, scene: _Scene, clocks: Mapping[str, Any]) -> dict[tuple[str, int], float]:
        """Return what the schedules give at *clocks*, by key and group; without those that cannot say yet."""
        found = {}
        context = {**scene.clocks.context(1, "step"), **self.terms.plan, **clocks, **scene.owners}
        for index, group in enumerate(scene.groups):
            initial = self.initial[index] if self.initial is not None and index < len(self.initial) else {}
            for schedule in (schedule for processor in self.processors for schedule in schedules_in(processor)):
                mapping = GroupMapping({**group, **initial}, context, index)
                try:
                    if schedule.applies(mapping):
                        found[schedule.dst, index] = float(schedule(mapping)[schedule.dst])
                except Exception:  # noqa: BLE001, S112 - a length not known yet, a user's function at a far time: the step will say
                    continue
        return found


def _restore(before: Terms, now: Terms, processors: tuple[DictProcessor, ...]) -> tuple[DictProcessor | None, ...]:
    """Return the processors of *before*: the present ones where they are the same, else made from their data."""
    found: list[DictProcessor | None] = []
    left = list(zip(processors, now.processors, strict=True))
    for saved in before.processors:
        place = next((i for i, (_, described) in enumerate(left) if same(described, saved)), None)
        found.append(made(saved) if place is None else left.pop(place)[0])
    return tuple(found)


def _stretch(old: Mapping[str, Any], new: Mapping[str, Any], scene: _Scene) -> dict[str, list[float]]:
    """Return, per unit, since when, from which time and how fast its clock runs to end where the run does."""
    length = new["epoch_length"]
    epochs = scene.iteration // length if length else (scene.clocks.epoch or 0)
    done = {"step": scene.step, "iteration": scene.iteration, "epoch": epochs}
    found, left = {}, False
    for unit in UNITS:
        try:
            planned, total = (run_length(lengths, unit, "stretch") for lengths in (old, new))  # type: ignore[arg-type]
        except MissingKeyError:
            continue
        since, begin, speed = (old.get("stretch") or {}).get(unit, (0, 0, 1))
        now = begin + (done[unit] - since) * speed
        rest = max(planned - now, 0)
        left = left or rest > 0
        found[unit] = [done[unit], now, rest / max(total - done[unit], 1)]
    if not found:
        message = "on_change='stretch' needs to know how long the run is; pass run(..., epoch_length=), or take 'keep'"
        raise ScheduleChangedError(message)
    if not left:
        message = (
            "on_change='stretch': nothing is left of the saved schedule, which has ended; take 'replan' for a new one "
            "over the longer run, or 'keep' to stay at its last value"
        )
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
    place: tuple[str, int] | None = None
    clocks: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    text: str = ""
    label: str = ""
    new: float | None = None

    def declined(self, chosen: "_Side", scene: _Scene) -> "_Change":
        """Return it as what the new value does not become, because *chosen* holds."""
        if self.place is None:
            return self
        value = chosen.values(scene, self.clocks).get(self.place)
        return dataclasses.replace(self, text=f"{_number(value)} instead of {_number(self.new)}")

    def __str__(self) -> str:
        if self.place is None:
            return self.why
        return f"{self.label} at step {self.clocks['step'] + 1}: {self.text} ({self.why})"


def _first_change(old: _Side, new: _Side, scene: _Scene) -> _Change | None:
    why = ", ".join(_reasons(old, new, scene.groups))
    if not why:
        return None

    def first(ahead: int) -> _Change | None:
        at = scene.ahead(ahead, new.terms.run["accumulation_steps"], new.terms.plan["epoch_length"])
        before, after = (side.values(scene, at) for side in (old, new))
        for key, index in {**before, **after}:
            pair = before.get((key, index)), after.get((key, index))
            if pair[0] != pair[1]:
                group = "" if len(scene.groups) == 1 else f" of {group_name(scene.groups[index], index)!r}"
                return _Change(why, (key, index), at, " -> ".join(map(_number, pair)), key + group, pair[1])
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
    return _Change(why) if functions or not _same_processors(old, new) else None


def _probes(old: _Side, new: _Side, scene: _Scene) -> list[int]:
    """Return steps ahead at which values are compared: spread over what is left, and close before both ends."""
    ends = [max((side.terms.plan["total_steps"] or 0) - scene.step - 1, 0) for side in (old, new)]
    spread = {round(part * max(ends) / _PROBES) for part in range(_PROBES + 1)}
    return sorted(spread | {max(end - 2**i, 0) for end in ends for i in range(10)} | {*ends})


def _other_world_only(old: _Side, new: _Side, groups: Sequence[dict[str, Any]]) -> bool:
    """Whether nothing but the number of ranks has changed, and what follows from it with the same effective batch.

    The same items then take about as many steps, to what rounding leaves of a window; the user asked for no change.
    """
    follows = {"world_size", "accumulation_steps", "epoch_length"}
    runs = [{key: value for key, value in side.terms.run.items() if key not in follows} for side in (old, new)]
    same_rest = runs[0] == runs[1] and _same_processors(old, new) and not _initial_reasons(new, groups)
    same_batch = runs[1].get("effective_batch_size") is not None
    return same_rest and same_batch and old.terms.run["world_size"] != new.terms.run["world_size"]


def _same_processors(old: _Side, new: _Side) -> bool:
    pairs = zip(old.terms.processors, new.terms.processors, strict=False)
    return len(old.terms.processors) == len(new.terms.processors) and all(same(a, b) for a, b in pairs)


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
    if not _same_processors(old, new):
        before, after = (", ".join(map(as_text, side.terms.processors)) for side in (old, new))
        found.append(f"processors [{before}] -> [{after}]" if before != after else f"other code in [{after}]")
    return found + _initial_reasons(new, groups)


def _initial_reasons(new: _Side, groups: Sequence[dict[str, Any]]) -> list[str]:
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
