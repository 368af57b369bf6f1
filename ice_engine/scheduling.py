"""What processors write to the param groups, once per step, and what they count on."""

import difflib
import logging
from numbers import Real
from types import MappingProxyType
from typing import Any

import torch

from ice_engine.announcing import Announcing
from ice_engine.clocks import count_steps
from ice_engine.distributed.rounds import gatherer
from ice_engine.errors import ArgumentTypeError, ArgumentValueError
from ice_engine.horizon import Course, OnChange
from ice_engine.member import Member
from ice_engine.processors.binding import Binding
from ice_engine.processors.description import describe
from ice_engine.processors.group import followed_metrics, run_processors
from ice_engine.processors.group_mapping import Written
from ice_engine.processors.history import History
from ice_engine.schedule_terms import Terms
from ice_engine.typing import DictProcessor
from ice_engine.window import Window

logger = logging.getLogger(__name__)


class Scheduling(Announcing):
    """Has processors, and windows whose length says how many steps a run has.

    Args:
        inner: The wrapped optimizer.
        name: Prefix of its events and state attributes.
        processors: In the order they run.
        window: Counts and weighs the micro-batches of a step.
        on_change: What holds when a resumed run's schedules would give other values.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        name: str,
        processors: tuple[DictProcessor, ...],
        window: Window,
        on_change: OnChange,
    ) -> None:
        super().__init__(inner, name)
        self._given = self._processors = processors
        # Before they run: what one keeps on itself as it goes, such as a cache, is no change of the schedule.
        self._described = [(processor, describe(processor)) for processor in processors]
        self._window = window
        self._size: int = window.size
        self._course = Course(on_change)
        self._measurements: dict[str, History] = {}
        self._changed: set[str] | None = set()  # by functions; None if those of an earlier process might have
        self._bound: Binding | None = None
        self._lengths: dict[str, Any] | None = None  # of the run, in the step before
        self._member: Member | None = None

    @property
    def accumulation_steps(self) -> int | None:
        """Micro-batches per window; None until the first loss has decided, with ``effective_batch_size``."""
        return self._window.size or None

    @property
    def in_window(self) -> bool:
        """Whether losses have entered since the last step or skip, which a step is still to come for."""
        return self._window.is_open

    @property
    def processors(self) -> tuple[DictProcessor, ...]:
        """Its processors, in the order they run."""
        return self._processors

    @property
    def steps_left(self) -> int | None:
        """Steps of this run still to come, if none is skipped, outside of a step; None while that is unknown."""
        since = self._clocks.iteration - self._window.micro_batches
        return count_steps(**self._clocks.run_lengths(), window_size=self._size, tail=self._window.tail, since=since)

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run it is attached to; None while its length or that of a window is unknown."""
        return self._clocks.total_steps(self._window.size, self._window.tail)

    def report(self, **metrics: float) -> None:
        """Tell schedules that follow a metric, such as ``schedules.plateau(metric="loss")``, what was measured.

        Args:
            metrics: One new value of each; a number or a tensor with one element, the same on every rank.

        Raises:
            ArgumentTypeError: If a value is not a number.
            ArgumentValueError: If no schedule follows it, and one follows a metric of almost this name.

        Examples:
            >>> from ice_engine import Optimizer
            >>> optimizer = Optimizer(torch.optim.SGD([torch.nn.Parameter(torch.ones(()))], lr=0.1))
            >>> optimizer.report(loss=0.25)  # such as evaluator.state.metrics["loss"], in a handler of EPOCH_COMPLETED

        Checkpoint:
            All values of the run are in :meth:`state_dict`, as lists of numbers.
        """
        for metric, value in metrics.items():
            plain = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
            if isinstance(plain, bool) or not isinstance(plain, Real):
                message = f"report({metric}=...) must be a number, got {value!r} ({type(value).__name__})"
                raise ArgumentTypeError(message)
            followed = followed_metrics(self._processors)
            if metric not in followed and (close := difflib.get_close_matches(metric, followed, n=1)):
                message = f"report({metric}=...): no schedule follows {metric!r}; did you mean {close[0]!r}?"
                raise ArgumentValueError(message)
            self._measurements.setdefault(metric, History()).append(float(plain))

    def _run_processors(self, binding: Binding) -> list[Written]:
        """Let processors, of the present *binding*, write to the groups, and return what was there before."""
        clocks, course = self._clocks, self._course
        lengths = clocks.lengths(self._size, self._window.tail)
        # Loaded in a loop without an engine, or in the middle of a run; or the run's length was changed; or attached in
        # the middle of a run, or the first loss has told how long windows are.
        if (
            course.configured is not None
            or (lengths is not self._lengths and course.outdated(clocks))
            or (course.terms is None and self._engine is not None)
        ):
            self._settle(self._window.micro_batches)
            lengths, binding = clocks.lengths(self._size, self._window.tail), self._binding
        self._lengths = lengths
        context = {**clocks.position(), **lengths}
        written = binding.run(context)
        if written is None:
            # What the clocks alone decide is the same on every rank, as they are; anything else has to be compared.
            gather = gatherer() if self._member is not None and not binding.clocks_alone else None
            _, written = run_processors(self._processors, self.param_groups, {**context, **self._owners()}, gather)
            if self._changed is not None:
                self._changed.update(key for _, key, _ in written)
        return written

    @property
    def _binding(self) -> Binding:
        groups = self._inner.param_groups
        if self._bound is None or not self._bound.holds(self._processors, groups):
            self._bound = Binding(self._processors, groups)
        return self._bound

    def _owners(self) -> dict[str, Any]:
        measurements = MappingProxyType(self._measurements)
        return {
            "optimizer": self,
            "engine": self._engine,
            "n": self,
            "module_node": self,
            "measurements": measurements,
        }

    def _terms(self) -> Terms:
        window = self._window.terms()
        described = [self._description(processor) for processor in self._processors]
        # Of the window that closed last; before the first one has, what was decided for it.
        window["accumulation_steps"] = self._size or window["accumulation_steps"]
        return Terms.of(self._clocks, window, described)

    def _description(self, processor: DictProcessor) -> Any:
        given = (described for known, described in self._described if known is processor)
        return next(given, None) or describe(processor)  # made from a checkpoint: a schedule, which keeps nothing

    def _settle(self, pending: int = 0) -> None:
        if not self._size:
            return  # nobody knows yet how many steps the run has; the first one settles it
        self._processors = self._course.settle(
            self._name,
            self._terms(),
            processors=self._processors,
            groups=self.param_groups,
            clocks=self._clocks,
            owners=self._owners(),
            pending=pending,
        )

    def _resume_size(self) -> None:
        """Go on with windows of the size that a loaded run had, if it is still due."""
        if self._window.batch is not None:
            self._window.resume({} if self._course.terms is None else self._course.terms.run)
            self._size = self._window.size

    def _say_size(self) -> None:
        """Tell what was decided; loudly, if a resumed run's windows no longer hold what they should."""
        window = self._window
        items = window.size * window.ranks * window.first
        other = window.batch is not None and window.size > 1 and not 0.5 < items / window.batch < 2.0  # noqa: PLR2004
        logger.log(
            logging.WARNING if other else logging.INFO,
            "optimizer %r, effective_batch_size=%s: windows of %d micro-batches, of %g items, in %d processes: %g",
            self._name,
            window.batch,
            window.size,
            window.first,
            window.ranks,
            items,
        )
