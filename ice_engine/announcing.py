"""What an optimizer tells the engine that it is attached to: counts, events, and the record of its last window."""

from typing import Any

import torch
from ignite.engine import Engine

from ice_engine.arguments import choice
from ice_engine.clocks import Clocks
from ice_engine.events import StepRecord, by_kind, fire, has_listeners, is_running, optimizer_events
from ice_engine.facade import OptimizerFacade


class Announcing(OptimizerFacade):
    """Has a name, clocks and a last record; without an engine, tells nobody.

    Args:
        inner: The wrapped optimizer.
        name: Prefix of its events and state attributes.
    """

    def __init__(self, inner: torch.optim.Optimizer, name: str) -> None:
        super().__init__(inner)
        self._name = name
        self._clocks = Clocks()
        self._engine: Engine | None = None
        self._last_record: StepRecord | None = None

    @property
    def name(self) -> str:
        """The prefix of its events and state attributes."""
        return self._name

    @property
    def events(self) -> Any:
        """Its events, ``ice_engine.optimizer_events(name)``."""
        return optimizer_events(self._name)

    def event(self, kind: str) -> Any:
        """Return its event of a kind, such as ``optimizer.event("STEP_COMPLETED")``, whatever its name.

        Raises:
            ArgumentValueError: If there is no such kind.
        """
        choice("event()", kind, tuple(by_kind(self._name)))
        return by_kind(self._name)[kind]

    @property
    def engine(self) -> Engine | None:
        """The engine it is attached to, or None."""
        return self._engine

    @property
    def clocks(self) -> dict[str, int]:
        """A copy of its counts so far, by the names ``step``, ``attempt``, ``skipped`` and ``iteration``."""
        return dict(self._clocks.counts)

    @property
    def record(self) -> StepRecord | None:
        """What happened in the last closed window; None before the first."""
        return self._last_record

    @property
    def _running(self) -> bool:
        return self._engine is not None and is_running(self._engine)

    def _count(self, clock: str, by: int = 1) -> None:
        self._clocks.counts[clock] += by
        if self._engine is not None:
            setattr(self._engine.state, f"{self._name}_{clock}", self._clocks.counts[clock])

    def _fire(self, kind: str) -> bool:
        return self._engine is not None and fire(self._engine, by_kind(self._name)[kind])

    def _listens(self, kind: str) -> bool:
        return self._engine is not None and has_listeners(self._engine, by_kind(self._name)[kind])

    def _publish(self) -> None:
        if self._engine is not None:
            for clock in ("step", "attempt", "skipped"):
                self._count(clock, 0)
            setattr(self._engine.state, f"{self._name}_record", self._last_record)

    def _publish_record(self, record: StepRecord | None) -> None:
        self._last_record = record
        if self._engine is not None:
            setattr(self._engine.state, f"{self._name}_record", record)
