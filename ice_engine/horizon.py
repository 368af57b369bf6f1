"""What becomes of schedules when a resumed run brings something else than they counted on.

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
from ice_engine.clocks import Clocks
from ice_engine.errors import ScheduleChangedError
from ice_engine.forecast import Scene, Side, restore
from ice_engine.schedule_change import first_change, other_world_only
from ice_engine.schedule_terms import Terms, end_of
from ice_engine.typing import DictProcessor

logger = logging.getLogger(__name__)

OnChange = Literal["error", "replan", "stretch", "keep"]
"""What a changed schedule means on resuming; to stop, take the new one, stretch the saved one, or keep it."""


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
        scene = Scene(groups, clocks, owners, pending)
        new = Side(terms, processors, self.configured)
        old = Side(before, restore(before, terms, processors), None)
        if terms.run == before.run:
            new = new.with_plan(before.plan)
        else:
            new = new.with_plan(Terms.own_plan(terms.run, clocks.counts["step"], scene.iteration))
        chosen = new
        change = first_change(old, new, scene)
        policy = self.policy
        if policy == "error" and other_world_only(old, new, groups):
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
        known, lengths = self.terms.run, clocks.run_lengths()
        # What was not known, such as an epoch's length in the first one, is no change; an end that is told in
        # iterations and was in epochs is.
        pairs = [(known[key], value) for key, value in lengths.items()]
        pairs.append((end_of(known), end_of(lengths)))
        return any(before != now and None not in (before, now) for before, now in pairs)
