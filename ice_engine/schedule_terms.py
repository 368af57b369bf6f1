"""What schedules count on besides the clocks: how long the run is, and what the schedules are, as plain data."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ice_engine.clocks import Clocks, count_steps, last_iteration


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
    def of(cls, clocks: Clocks, window: Mapping[str, Any], processors: Sequence[Any]) -> "Terms":
        """Return those of the run that *clocks* count, as if it were fresh, with its window's and the processors'."""
        run = {**clocks.run_lengths(), **window}
        return cls(run, cls.own_plan(run), processors)

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


def end_of(run: Mapping[str, Any]) -> int | None:
    """Return the micro-batches of *run*, of :class:`Terms` or of clocks; None while nobody knows them."""
    return last_iteration(run["epoch_length"], run["max_epochs"], run["max_iters"])
