"""The last line of a run in the log: what it did, where the time went, what came out and where it was written."""

import logging
import math
import re
import time
from collections.abc import Iterator
from numbers import Real
from typing import Any

from ignite.engine import Engine, Events

from ice_engine.distributed import world
from ice_engine.hooks import HookRegistry
from ice_engine.of_engine import forget, of_engine, optimizers_of

logger = logging.getLogger(__name__)

# The short ones as words of their own: there is "wer" in "answer" and "power", "cer" in "certainty".
_LOWER_IS_BETTER = re.compile(
    r"(?i:loss|error|perplexity)"
    r"|(?:(?<![A-Za-z])|(?<=[a-z])(?=[A-Z]))(?i:err|nll|ppl|r?mse|mae|wer|cer)(?![a-z])"
)


class Summary:
    """Logs one line, at level INFO, when a run of *engine* ends; :func:`summary` makes it, once for each engine.

    Attributes:
        places: Where something of the run is written.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.places: list[str] = []
        self._extremes: dict[str, tuple[float, int]] = {}
        self._begun: float | None = None
        self._steps: dict[str, int] = {}
        hooks = HookRegistry(engine)
        # Names of ours that the user has not chosen: one of theirs that is the same must not forbid attach().
        hooks.add(Events.STARTED, self._on_started, name=hooks.free_name("summary.start"), order=-80)
        hooks.add(Events.COMPLETED | Events.TERMINATE, self._on_ended, name=hooks.free_name("summary"), order=100)

    def leave(self) -> None:
        """Take it off its engine again."""
        HookRegistry(self._engine).remove_of(self)
        forget(self._engine, Summary)

    def wrote(self, place: object) -> None:
        """Name *place* among those where something is written."""
        if str(place) not in self.places:
            self.places.append(str(place))

    def follow(self, name: str, evaluator: Engine, optimizer: Any) -> None:
        """Watch for the best metrics of an evaluator called *name*, against the step of *optimizer*."""

        def look(evaluator: Engine) -> None:
            for metric, value in evaluator.state.metrics.items():
                if isinstance(value, Real) and math.isfinite(value):
                    self._compare(f"{name}/{metric}", float(value), optimizer.clocks["step"])

        hooks = HookRegistry(evaluator)
        if f"summary.{name}" not in hooks:
            hooks.add(Events.COMPLETED, look, name=f"summary.{name}", order=95)

    def _compare(self, tag: str, value: float, step: int) -> None:
        sign = -1 if _LOWER_IS_BETTER.search(tag) else 1
        if tag not in self._extremes or sign * value > sign * self._extremes[tag][0]:
            self._extremes[tag] = value, step

    def _on_started(self, engine: Engine) -> None:
        self._begun = time.monotonic()
        self._steps = {optimizer.name: optimizer.clocks["step"] for optimizer in optimizers_of(engine)}

    def _on_ended(self, engine: Engine) -> None:
        if self._begun is not None and world.rank() == 0:
            seconds, self._begun = time.monotonic() - self._begun, None
            logger.info("%s", "; ".join(self._parts(engine, seconds)))

    def _parts(self, engine: Engine, seconds: float) -> Iterator[str]:
        optimizers = optimizers_of(engine)
        yield f"run ended in epoch {engine.state.epoch}, after {engine.state.iteration} iterations and {seconds:.1f} s"
        for optimizer in optimizers:
            counts = optimizer.clocks
            steps = counts["step"] - self._steps.get(optimizer.name, 0)
            since = f", the last {steps} of them now" if steps != counts["step"] else ""
            yield (
                f"{optimizer.name}: {counts['step']} steps{since}, {optimizer.short_windows} of short windows, "
                f"{counts['skipped']} skipped"
            )
        spent = optimizers[0].seconds if optimizers else {}
        if sum(spent.values()) > 0:
            parts = {**spent, "other": max(seconds - sum(spent.values()), 0.0)}
            yield "time: " + ", ".join(f"{part} {100 * s / sum(parts.values()):.0f} %" for part, s in parts.items())
        for tag, (value, step) in self._extremes.items():
            yield f"{'lowest' if _LOWER_IS_BETTER.search(tag) else 'highest'} {tag} {value:.4g}, at step {step}"
        if self.places:
            yield f"written to {', '.join(self.places)}"


def summary(engine: Engine) -> Summary:
    """Return the summary of *engine*, one object for one engine."""
    return of_engine(engine, Summary, engine)
