"""A run in TensorBoard: what optimizers do, what evaluators find and where the time goes, against the step."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events

from ice_engine import dashboard
from ice_engine.arguments import count
from ice_engine.distributed import world
from ice_engine.errors import ArgumentTypeError
from ice_engine.event_file import EventFile, GivenWriter, Target
from ice_engine.histograms import histogram
from ice_engine.hooks import HookRegistry
from ice_engine.optimizer import Optimizer
from ice_engine.processors.schedule import Schedule
from ice_engine.recording import Clocks, Recording
from ice_engine.rows import Line

logger = logging.getLogger(__name__)

_LONG = 100_000  # values of a plan, from which on computing it would hold up the run: about a second


class TensorBoard(Recording):
    """Writes a run for TensorBoard: curves over the optimizer's step, a dashboard, hyperparameters, the configuration.

    Curves are the rows of :mod:`ice_engine.rows`, under these tags. The tab *Custom Scalars* opens with those that
    belong together in one chart, each scheduled key with its plan, if the run's length is known. *HParams* has the
    run with its hyperparameters and metrics, *Text* its configuration and why steps were skipped, *Histograms* the
    parameters and gradients if they are asked for.

    The training thread only notes what happened; another one writes it, five times a second and at the end of each
    epoch and of the run, also when that ends with an exception. What cannot be written raises at the next step. A
    folder is one run: what is there beyond the step at which a run starts, such as what was written after the
    checkpoint that it was resumed from, is taken back. Of several optimizers that is the largest step.

    Args:
        log_dir: The run's folder; or a ``SummaryWriter`` or Ignite's ``TensorboardLogger`` that is there already,
            which stays open, and in which nothing is taken back but by its own ``purge_step``.

    Raises:
        ArgumentTypeError: If it is none of these.

    Examples:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(()))
        >>> optimizer = Optimizer(torch.optim.SGD([weight], lr=0.1))
        >>> trainer = Engine(lambda engine, batch: optimizer.backward(weight * batch))
        >>> _ = optimizer.attach(trainer)
        >>> _ = TensorBoard("runs/docs").attach(trainer, optimizer)
        >>> state = trainer.run([1.0, 2.0])

    .. versionadded:: 0.1.0
    """

    _kind = "tensorboard"

    def __init__(self, log_dir: Any) -> None:
        if isinstance(log_dir, str | Path):
            folder = Path(log_dir).expanduser()
            absolute = folder.absolute()  # it is opened when the run starts, perhaps in another working directory
            self._board = _Board(lambda: EventFile(absolute))
            super().__init__(self._board, "TensorBoard's file in", folder)
        else:
            writer = getattr(log_dir, "writer", log_dir)
            if not hasattr(writer, "add_scalar"):
                message = (
                    "log_dir must be a path, a SummaryWriter or an Ignite TensorboardLogger, got "
                    f"{type(log_dir).__name__}"
                )
                raise ArgumentTypeError(message)
            self._board = _Board(lambda: GivenWriter(writer))
            super().__init__(
                self._board, "TensorBoard's file in", getattr(writer, "log_dir", "the folder of its writer")
            )
        self._hparams: dict[str, Any] = {}
        self._described: bool = False

    def attach(
        self,
        engine: Engine,
        *optimizers: Optimizer,
        every: int = 1,
        evaluators: Mapping[str, Engine] | None = None,
        hparams: Mapping[str, Any] | None = None,
        histograms: int | None = None,
    ) -> "TensorBoard":
        """Write from now on.

        Args:
            engine: The trainer.
            *optimizers: Optimizers attached to it, at least one; the first one's step is the axis of the losses
                and metrics.
            every: Write every so many steps, at least 1; skips and metrics are always written.
            evaluators: Engines whose metrics are written when they complete, by the name that prefixes the tags.
            hparams: Hyperparameters to show besides those of the optimizers; what is no number is shown as a text.
            histograms: Write those of all parameters and gradients every so many steps, at least 1; None for none.
                They are computed on the training thread.

        Returns:
            This object.

        Raises:
            ArgumentTypeError: If *every* or *histograms* is no int, *evaluators* not a dict of engines, or *hparams*
                not a dict.
            ArgumentValueError: If *every* or *histograms* is below 1, or the name of an evaluator is taken.
            AttachError: If there is no optimizer, one is not attached to *engine*, or this is attached already.
        """
        if not (hparams is None or isinstance(hparams, Mapping)):
            message = f"hparams must be a dict, got {hparams!r}; such as hparams={{'width': 64}}, or vars(args)"
            raise ArgumentTypeError(message)
        if histograms is not None:
            count("histograms", histograms, 1)
        self._attach(engine, optimizers, every, evaluators)
        self._hparams = dict(hparams or {})
        if world.rank() == 0:
            hooks = HookRegistry(engine)
            ended = Events.COMPLETED | Events.TERMINATE
            hooks.add(ended, self._on_ended, name="tensorboard.hparams", order=30)  # before the flush
            for optimizer in optimizers if histograms is not None else ():
                event = optimizer.event("STEP_COMPLETED")(every=histograms)
                hooks.add(event, self._histogram_writer(optimizer), name=f"tensorboard.{optimizer.name}.histograms")
        return self

    def _describe(self, engine: Engine) -> None:
        put, board = self._background.put, self._board
        for optimizer in self._optimizers:
            put((board.plan, self._plan(optimizer)))
        if self._described:
            return
        self._described = True
        put((board.text, "configuration", dashboard.configuration(engine, self._optimizers, self._hparams)))
        put((board.hparams, dashboard.hyperparameters(self._optimizers, self._hparams)))

    def _plan(self, optimizer: Optimizer) -> list[tuple[str, int, float]]:
        """The points of its plan beyond the step at which the run starts."""
        name, now = optimizer.name, optimizer.clocks["step"]
        steps = optimizer.total_steps
        # Only schedules are known to be functions of the clocks: another processor may do anything when it is called.
        if steps is None or not optimizer.processors or not all(isinstance(p, Schedule) for p in optimizer.processors):
            return []
        if steps * len(optimizer.param_groups) > _LONG:
            logger.info("optimizer %r: no plan of %d steps in TensorBoard: it would hold up the run", name, steps)
            return []
        try:
            plan = optimizer.plan()
        except Exception as error:  # noqa: BLE001 - it may plan what the run will not come to, and is but a picture
            logger.info("optimizer %r: no plan in TensorBoard: %s", name, error)
            return []
        return [(f"{dashboard.PLAN}/{name}/{tag}", step, value) for tag, step, value in plan.points() if step > now]

    def _on_ended(self) -> None:
        self._background.put((self._board.end,))

    def _histogram_writer(self, optimizer: Optimizer) -> Callable[[], None]:
        def write() -> None:
            now, step = time.time(), optimizer.clocks["step"]
            for name, parameter in optimizer.named_parameters():
                for kind, tensor in (("parameters", parameter), ("gradients", parameter.grad)):
                    found = histogram(tensor)
                    if found is not None:
                        tag = f"{optimizer.name}/{kind}/{name}"
                        self._background.put((self._board.histogram, tag, found, step, now))

        return write


class _Board:
    """A run's curves, texts and tables, on the writing thread.

    Args:
        open_target: Makes what they are written to, when the run starts.
    """

    def __init__(self, open_target: Callable[[], Target]) -> None:
        self._open = open_target
        self._target: Any = None
        self._step: int = 0
        self._hparams: dict[str, float | str] = {}
        self._optimizers: Iterable[str] = ()
        self._curves: dict[str, None] = {}
        self._shown: int = 0
        self._metrics: dict[str, None] = {}
        self._reasons: tuple[str, int, str] = ("", 0, "")

    def begin(self, clocks: Clocks, _: Mapping[str, int]) -> None:
        self._step = max(counts["step"] for counts in clocks.values())
        self._optimizers = clocks.keys()
        if self._target is None:
            self._target = self._open()
        self._target.restart(self._step + 1)

    def write(self, line: Line) -> None:
        texts = {tag: value for tag, value in line.rows.items() if isinstance(value, str)}
        numbers: Any = {tag: line.rows[tag] for tag in line.rows if tag not in texts} if texts else line.rows
        self._scalars(numbers, line.step, line.time)
        if line.source not in self._optimizers:
            self._metrics |= dict.fromkeys(numbers)
        for tag, value in texts.items():
            self._target.text(tag, self._with_earlier(tag, line, value), line.step, line.time)

    def _with_earlier(self, tag: str, line: Line, reason: str) -> str:
        """Join the reasons of skips at the same step, of which TensorBoard would keep the last alone."""
        text = f"attempt {line.clocks['attempt']}, iteration {line.clocks['iteration']}: {reason}"
        if self._reasons[:2] == (tag, line.step):
            text = f"{self._reasons[2]}\n\n{text}"
        self._reasons = tag, line.step, text
        return text

    def plan(self, points: list[tuple[str, int, float]]) -> None:
        now = time.time()
        for tag, step, value in points:
            self._scalars({tag: value}, step, now)

    def _scalars(self, values: Mapping[str, float], step: int, now: float) -> None:
        self._curves |= dict.fromkeys(values)
        self._target.scalars(values, step, now)

    def text(self, tag: str, markdown: str) -> None:
        self._target.text(tag, markdown, self._step, time.time())

    def histogram(self, *args: Any) -> None:
        self._target.histogram(*args)

    def hparams(self, hparams: dict[str, float | str]) -> None:
        """Say what the run is made with; which metrics there are is known at its end."""
        self._hparams = hparams
        _, start, _ = _hparams_summaries(hparams, {})
        self._target.summary(start, 0)

    def end(self) -> None:
        experiment, _, end = _hparams_summaries(self._hparams, self._metrics)
        self._target.summary(experiment, 0)
        self._target.summary(end, 0)

    def sync(self) -> None:
        if self._target is None:
            return
        if len(self._curves) > self._shown:  # a first step, a first evaluation
            self._shown = len(self._curves)
            self._target.layout(dashboard.layout(self._curves, self._optimizers))
        self._target.sync()

    def close(self) -> None:
        if self._target is not None:
            self._target.close()


def _hparams_summaries(hparams: Mapping[str, Any], metrics: Mapping[str, None]) -> tuple[Any, Any, Any]:
    """Return what says which hyperparameters and metrics there are, what this run is made with, and that it ended."""
    from torch.utils.tensorboard import summary

    make: Callable[..., tuple[Any, Any, Any]] = summary.hparams
    return make(hparams, metrics)
