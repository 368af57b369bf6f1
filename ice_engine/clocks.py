"""Where in the run an optimizer is: its three clocks, and how long the run will be."""

from collections.abc import Mapping
from typing import Any

from ice_engine.arguments import count
from ice_engine.errors import ArgumentValueError


def last_iteration(epoch_length: int | None, max_epochs: int | None, max_iters: int | None) -> int | None:
    """Return the micro-batches of a whole run; None while nobody knows them."""
    if max_iters is not None:
        return max_iters
    return None if epoch_length is None or max_epochs is None else max_epochs * epoch_length


def count_steps(
    epoch_length: int | None,
    max_epochs: int | None,
    max_iters: int | None,
    window_size: int | None,
    tail: str,
    *,
    since: int = 0,
) -> int | None:
    """Return how many windows close after iteration *since* of a run; None while its length or theirs is unknown."""
    end = last_iteration(epoch_length, max_epochs, max_iters)
    if not window_size or epoch_length is None or end is None:
        return None
    left = max(end - since, 0)
    if tail == "carry":
        return -(-left // window_size)
    # The epoch under way, whole epochs, and what max_iters cuts off: each ends with a short window, or drops it.
    head = min(-since % epoch_length, left)
    whole, rest = divmod(left - head, epoch_length)
    per = [n // window_size if tail == "drop" else -(-n // window_size) for n in (head, epoch_length, rest)]
    return per[0] + whole * per[1] + per[2]


def _check_given(given: Mapping[str, int | None]) -> None:
    for argument, value in given.items():
        if value is not None:
            count(argument, value, 1)
    done, size = given.get("epoch_steps"), given.get("epoch_size")
    if done is not None and size is not None and done > size:
        message = f"epoch_steps ({done}) is beyond epoch_size ({size}); both count micro-batches"
        raise ArgumentValueError(message)


class Clocks:
    """Counts iterations (micro-batches), attempts (windows closed), steps (updates applied) and skips.

    Attributes:
        counts: ``step``, ``attempt``, ``skipped`` and ``iteration``, each so far.
        run: The state of the engine that runs it, for epoch and length; None in a loop of the user's own.
        common: What is the same on all ranks, where theirs differ: the longest ``epoch_length``, and ``iteration`` on
            the rank that is ahead; empty with one process.
        plan: Entries of :meth:`context` that stand for the present ones, such as the lengths of a run as it was
            before it was resumed.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {"step": 0, "attempt": 0, "skipped": 0, "iteration": 0}
        self.run: Any = None
        self.common: dict[str, Any] = {}
        self.plan: dict[str, Any] = {}
        self._given: dict[str, int | None] = {}
        self._lengths: tuple[tuple[dict[str, int | None], int, str], dict[str, Any], dict[str, Any]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "run": None, "common": {}, "_lengths": None}

    def leave(self) -> None:
        """Forget the engine, whose clocks say nothing about what comes."""
        self.run, self._given = None, {}
        self.common.clear()

    def micro_batch(self, **given: int | None) -> None:
        """Count a micro-batch; *given* is what the caller of ``update()`` knows of the run.

        Raises:
            ArgumentTypeError: If something given is not an integer.
            ArgumentValueError: If it is below 1, or ``epoch_steps`` is beyond ``epoch_size``.
        """
        if given:
            _check_given(given)
        if given or self.run is not None:  # else what was said before holds: this one is flushed
            self._given = given
        counted = self.counts["iteration"] + 1 if self.run is None else int(self.run.iteration)
        self.counts["iteration"] = given.get("global_steps") or counted

    @property
    def iteration(self) -> int:
        """The iteration that schedules go by, of the rank that is ahead."""
        own = self.counts["iteration"]
        return max(own, self.common["iteration"]) if self.common else own

    @property
    def epoch(self) -> int | None:
        """The epoch, from 1; None where nobody says."""
        return self._now("epoch", "current_epoch")

    @property
    def epoch_ends(self) -> bool:
        """Whether the caller of ``update()`` said that this micro-batch is its epoch's last."""
        return self._given.get("epoch_size") is not None and self._given["epoch_steps"] == self._given["epoch_size"]

    def run_lengths(self) -> dict[str, int | None]:
        """Return how long the run is: ``epoch_length``, ``max_epochs`` and ``max_iters``, None where unknown."""
        run = self.run
        if run is not None and not self._given:  # as in every step of an attached optimizer
            return {
                "epoch_length": self._now("epoch_length"),
                "max_epochs": getattr(run, "max_epochs", None),
                "max_iters": getattr(run, "max_iters", None),
            }
        return {
            "epoch_length": self._now("epoch_length", "epoch_size"),
            "max_epochs": self._now("max_epochs"),
            "max_iters": self._now("max_iters"),
        }

    def context(self, window_size: int, tail: str) -> dict[str, Any]:
        """Return what processors may know of the run, under our names and ice-learn's."""
        return {**self.position(), **self.lengths(window_size, tail)}

    def position(self) -> dict[str, int | None]:
        """Return the part of :meth:`context` that changes from step to step."""
        counts = self.counts
        iteration, epoch = self.iteration, self._now("epoch", "current_epoch")
        done = self._given.get("epoch_steps")
        if done is None and self.run is not None:
            length = self._now("epoch_length", "epoch_size")
            done = None if length is None else (iteration - 1) % length + 1
        return {
            "step": counts["step"],
            "attempt": counts["attempt"],
            "iteration": iteration,
            "epoch": epoch,
            "current_epoch": epoch,
            "epoch_steps": done,
            "global_steps": iteration,
        }

    def lengths(self, window_size: int, tail: str) -> dict[str, Any]:
        """Return the part of :meth:`context` that stays as it is along the run."""
        lengths = self.run_lengths()
        if self._lengths is not None:  # nearly always those of the step before
            terms, plan, found = self._lengths
            if plan is self.plan and terms == (lengths, window_size, tail):
                return found
        found = {
            **lengths,
            "epoch_size": lengths["epoch_length"],
            "total_steps": self.total_steps(window_size, tail),
            **self.plan,
        }
        self._lengths = (lengths, window_size, tail), self.plan, found
        return found

    def total_steps(self, window_size: int, tail: str) -> int | None:
        """Return the steps of the whole run; None while its length is unknown."""
        length, limit = self._now("epoch_length", "epoch_size"), self._now("max_iters")
        return count_steps(length, self._now("max_epochs"), limit, window_size, tail)

    def _now(self, attribute: str, argument: str = "") -> int | None:
        given = self._given.get(argument) if self._given else None
        if given is not None or self.run is None:
            return given
        now: int | None = self.common[attribute] if attribute in self.common else getattr(self.run, attribute, None)
        return now
