"""What the schedules of a run will give, before it has happened; and what those that were saved would."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ice_engine.clocks import Clocks
from ice_engine.errors import MissingKeyError, ScheduleChangedError
from ice_engine.processors.clocks import UNITS, run_length
from ice_engine.processors.description import as_text, made, reads_lengths, same, schedules_in
from ice_engine.processors.group_mapping import GroupMapping
from ice_engine.processors.processor import name_of
from ice_engine.schedule_terms import Terms
from ice_engine.typing import DictProcessor


class Scene:
    """Where the run is, and what processors see there."""

    def __init__(
        self, groups: Sequence[dict[str, Any]], clocks: Clocks, owners: Mapping[str, Any], pending: int
    ) -> None:
        self.groups = groups
        self.clocks = clocks
        self.owners = owners
        self.iteration: int = clocks.iteration - pending  # before the window that is being closed
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
class Side:
    """The schedules of one side of a comparison, and all that they read.

    Attributes:
        terms: What they count on.
        processors: They themselves; None in place of one that could not be made.
        initial: The initial values by param group; None for those that the groups have.
    """

    terms: Terms
    processors: tuple[DictProcessor | None, ...]
    initial: list[dict[str, float]] | None

    def with_plan(self, plan: Mapping[str, Any]) -> "Side":
        """Return this side with other lengths to show to its processors."""
        return dataclasses.replace(self, terms=dataclasses.replace(self.terms, plan=plan))

    def require_processors(self) -> tuple[DictProcessor, ...]:
        """Return the processors.

        Raises:
            ScheduleChangedError: If one of them could not be made from a checkpoint.
        """
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

    def kept(self, run: Terms, new: "Side", scene: Scene, *, stretch: bool) -> "Side":
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

    def values(self, scene: Scene, clocks: Mapping[str, Any]) -> dict[tuple[str, int], float]:
        """Return what the schedules give at *clocks*, by key and group; without those that cannot say yet."""
        found = {}
        context = {**scene.clocks.context(1, "step"), **self.terms.plan, **clocks, **scene.owners}
        for index, group in enumerate(scene.groups):
            initial = self.initial[index] if self.initial is not None and index < len(self.initial) else {}
            for schedule in schedules_in(self.processors):
                mapping = GroupMapping({**group, **initial}, context, index)
                try:
                    if schedule.applies(mapping):
                        found[schedule.dst, index] = float(schedule(mapping)[schedule.dst])
                except Exception:  # noqa: BLE001, S112 - a length not known yet, a user's function at a far time: the step will say
                    continue
        return found


def restore(before: Terms, now: Terms, processors: tuple[DictProcessor, ...]) -> tuple[DictProcessor | None, ...]:
    """Return the processors of *before*: the present ones where they are the same, else made from their data."""
    found: list[DictProcessor | None] = []
    left = list(zip(processors, now.processors, strict=True))
    for saved in before.processors:
        place = next((i for i, (_, described) in enumerate(left) if same(described, saved)), None)
        found.append(made(saved) if place is None else left.pop(place)[0])
    return tuple(found)


def _stretch(old: Mapping[str, Any], new: Mapping[str, Any], scene: Scene) -> dict[str, list[float]]:
    """Return, per unit, since when, from which time and how fast its clock runs to end where the run does."""
    length = new["epoch_length"]
    epochs = scene.iteration // length if length else (scene.clocks.epoch or 0)
    done = {"step": scene.step, "iteration": scene.iteration, "epoch": epochs}
    found: dict[str, list[float]] = {}
    left = False
    for unit in UNITS:
        try:
            planned, total = (run_length(lengths, unit, "stretch") for lengths in (old, new))
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
