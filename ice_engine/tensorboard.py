"""A run in TensorBoard: loss, every scheduled key, gradient norm and loss scale against the step."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events

from ice_engine.arguments import count
from ice_engine.errors import ArgumentTypeError, AttachError
from ice_engine.events import StepRecord
from ice_engine.hooks import HookRegistry
from ice_engine.optimizer import Optimizer


class TensorBoard:
    """Writes what optimizers do, and what engines measure, as scalars over the optimizer's step.

    =========================  ================================================================================
    tag                        value
    =========================  ================================================================================
    ``training/loss``          the trainer's output in the micro-batch that filled the window, if it is a number
                               or a tensor with one element; of a dict, each such entry as ``training/<key>``.
                               Anything else, such as predictions, is no scalar and is left out.
    ``optimizer/lr/group_0``   and so on, for every param group and every key that a processor writes;
                               ``optimizer/betas/group_0.1`` for the second of a tuple
    ``optimizer/grad_norm``    before clipping
    ``.../clipped_norm``       after clipping, if ``clip_norm`` clips over all groups
    ``optimizer/loss_scale``   with a GradScaler
    ``optimizer/noise_scale``  and ``update_ratio/<group>``, ``time/<part>``: what :meth:`Optimizer.measure
                               <ice_engine.optimizer.Optimizer.measure>` was asked for
    ``optimizer/weight``       items, or micro-batches, behind the step
    ``optimizer/skipped``      steps skipped so far
    ``validation/accuracy``    metrics of an evaluator called ``validation``
    =========================  ================================================================================

    A skipped step writes ``skipped`` and ``loss_scale`` alone. In a resumed run, what was written after the
    checkpoint is taken back. The prefix ``optimizer`` is the optimizer's name.

    Args:
        log_dir: The run's folder; or a ``SummaryWriter`` or Ignite's ``TensorboardLogger`` that is there already.

    Raises:
        ArgumentTypeError: If it is none of these.

    Examples:
        >>> weight = torch.nn.Parameter(torch.ones(()))
        >>> optimizer = Optimizer(torch.optim.SGD([weight], lr=0.1))
        >>> trainer = Engine(lambda engine, batch: optimizer.backward(weight * batch))
        >>> _ = optimizer.attach(trainer)
        >>> _ = TensorBoard("runs/docs").attach(trainer, optimizer)
        >>> state = trainer.run([1.0, 2.0])

    .. versionadded:: 0.1.0
    """

    def __init__(self, log_dir: Any) -> None:
        self._writer: Any = None
        self._log_dir: Path | None = None
        if isinstance(log_dir, str | Path):
            self._log_dir = Path(log_dir)
            return
        self._writer = getattr(log_dir, "writer", log_dir)
        if not hasattr(self._writer, "add_scalar"):
            message = (
                f"log_dir must be a path, a SummaryWriter or an Ignite TensorboardLogger, got {type(log_dir).__name__}"
            )
            raise ArgumentTypeError(message)

    def attach(
        self, engine: Engine, *optimizers: Optimizer, every: int = 1, evaluators: Mapping[str, Engine] | None = None
    ) -> "TensorBoard":
        """Write from now on.

        Args:
            engine: The trainer.
            *optimizers: Optimizers attached to it, at least one; the first one's step is the axis of the losses
                and metrics.
            every: Write every so many steps, at least 1; skips and metrics are always written.
            evaluators: Engines whose metrics are written when they complete, by the name that prefixes the tags.

        Returns:
            This object.

        Raises:
            ArgumentTypeError: If *every* is no int, or *evaluators* not a dict of engines.
            ArgumentValueError: If *every* is below 1.
            AttachError: If there is no optimizer, or one is not attached to *engine*.
        """
        count("every", every, 1)
        hooks = HookRegistry(engine)
        if not optimizers:
            message = "TensorBoard needs an optimizer, whose steps are the time axis: attach(engine, optimizer)"
            raise AttachError(message)
        for optimizer in optimizers:
            if not isinstance(optimizer, Optimizer) or optimizer.engine is not engine:
                what = f"optimizer {optimizer.name!r}" if isinstance(optimizer, Optimizer) else repr(optimizer)
                message = f"{what} is not attached to this engine; call optimizer.attach(engine) before"
                raise AttachError(message)
        evaluators = _check_evaluators(evaluators)
        first = optimizers[0]
        hooks.add(Events.STARTED, lambda: self._open(first), name="tensorboard.open", order=-90)
        for optimizer in optimizers:
            optimizer.measure("grad_norm")
            name = optimizer.name
            completed, skipped = (optimizer.event(kind) for kind in ("STEP_COMPLETED", "STEP_SKIPPED"))
            hooks.add(completed(every=every), self._step_writer(optimizer), name=f"tensorboard.{name}.step")
            hooks.add(skipped, self._skip_writer(optimizer), name=f"tensorboard.{name}.skip")
        # The step of a short last window happens after the epoch's last iteration: the loss goes with the step.
        hooks.add(first.event("STEP_COMPLETED")(every=every), self._loss_writer(first), name="tensorboard.loss")
        for prefix, evaluator in evaluators.items():
            writer = self._metrics_writer(prefix, first)
            HookRegistry(evaluator).add(Events.COMPLETED, writer, name=f"tensorboard.{prefix}", order=90)
        hooks.add(
            Events.EPOCH_COMPLETED | Events.COMPLETED | Events.TERMINATE, self.flush, name="tensorboard.flush", order=90
        )
        return self

    def flush(self) -> None:
        """Bring everything written so far to disk."""
        if self._writer is not None:
            self._writer.flush()

    def _open(self, optimizer: Optimizer) -> Any:
        if self._writer is None:
            # Imported here: it loads TensorBoard, which a run without it need not pay for.
            from torch.utils.tensorboard import SummaryWriter

            # What a run wrote after the checkpoint it is resumed from is taken back.
            step = optimizer.clocks["step"]
            self._writer = SummaryWriter(str(self._log_dir), purge_step=step + 1 if step else None)
            # The writer's thread is a daemon: after an exception, this waits for what is still in its queue.
            weakref.finalize(self, self._writer.close)
        return self._writer

    def _step_writer(self, optimizer: Optimizer) -> Callable[[Engine], None]:
        prefix = optimizer.name

        def write(engine: Engine) -> None:
            record: StepRecord = getattr(engine.state, f"{prefix}_record")
            scalars = {f"{key}/{group}": v for group, values in record.values.items() for key, v in values.items()}
            scalars |= {
                "grad_norm": record.grad_norm,
                "clipped_norm": record.clipped_norm,
                "loss_scale": record.loss_scale,
                "noise_scale": record.noise_scale,
            }
            scalars |= {f"update_ratio/{group}": ratio for group, ratio in (record.update_ratio or {}).items()}
            scalars |= {f"time/{part}": seconds for part, seconds in (record.times or {}).items()}
            scalars |= {"weight": record.weight, "skipped": optimizer.clocks["skipped"]}
            for tag, value in scalars.items():
                for suffix, number in _numbers(value):
                    self._writer.add_scalar(f"{prefix}/{tag}{suffix}", number, record.step)

        return write

    def _skip_writer(self, optimizer: Optimizer) -> Callable[[Engine], None]:
        prefix = optimizer.name

        def write(engine: Engine) -> None:
            record: StepRecord = getattr(engine.state, f"{prefix}_record")
            for tag, value in (("loss_scale", record.loss_scale), ("skipped", optimizer.clocks["skipped"])):
                for _, number in _numbers(value):
                    self._writer.add_scalar(f"{prefix}/{tag}", number, record.step)

        return write

    def _loss_writer(self, optimizer: Optimizer) -> Callable[[Engine], None]:
        def write(engine: Engine) -> None:
            output = engine.state.output
            for key, value in output.items() if isinstance(output, Mapping) else [("loss", output)]:
                number = _number(value)
                if number is not None:
                    self._writer.add_scalar(f"training/{key}", number, optimizer.clocks["step"])

        return write

    def _metrics_writer(self, prefix: str, optimizer: Optimizer) -> Callable[[Engine], None]:
        def write(evaluator: Engine) -> None:
            # A first evaluation may come before the run.
            writer = self._open(optimizer)
            for key, value in evaluator.state.metrics.items():
                for suffix, number in _numbers(value):
                    writer.add_scalar(f"{prefix}/{key}{suffix}", number, optimizer.clocks["step"])

        return write


def _check_evaluators(evaluators: Any) -> Mapping[str, Engine]:
    found = {} if evaluators is None else evaluators
    if not isinstance(found, Mapping) or not all(isinstance(evaluator, Engine) for evaluator in found.values()):
        message = (
            f"evaluators must be a dict of engines by name, got {evaluators!r}; "
            "such as evaluators={'validation': evaluator}"
        )
        raise ArgumentTypeError(message)
    return found


def _number(value: Any) -> float | None:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    return float(value) if isinstance(value, Real) else None


def _numbers(value: Any) -> Iterator[tuple[str, float]]:
    """Yield the numbers in *value*, each with what its tag gets: nothing, or its place in a tuple such as betas."""
    elements = [(f".{i}", v) for i, v in enumerate(value)] if isinstance(value, tuple | list) else [("", value)]
    for suffix, element in elements:
        number = _number(element)
        if number is not None:
            yield suffix, number
