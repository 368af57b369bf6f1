"""A run in TensorBoard: loss, every scheduled key, gradient norm and loss scale against the step."""

import weakref
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events

from ice_engine.arguments import count
from ice_engine.errors import ArgumentTypeError, AttachError
from ice_engine.hooks import HookRegistry
from ice_engine.optimizer import Optimizer


class TensorBoard:
    """Writes what optimizers do, and what engines measure, as scalars over the optimizer's step.

    Tags: ``training/loss`` (the engine's output), ``optimizer/lr/group_0`` and so on for every key that a
    processor writes, ``optimizer/grad_norm``, ``optimizer/loss_scale``, ``optimizer/skipped``,
    ``validation/accuracy`` for an evaluator called ``validation``.

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
            AttachError: If there is no optimizer, or one is not attached to *engine*.
        """
        count("every", every, 1)
        hooks = HookRegistry(engine)
        if not optimizers:
            message = "TensorBoard needs an optimizer, whose steps are the time axis: attach(engine, optimizer)"
            raise AttachError(message)
        for optimizer in optimizers:
            if not isinstance(optimizer, Optimizer) or optimizer.engine is not engine:
                message = f"{optimizer!r} is not attached to this engine; call optimizer.attach(engine) before"
                raise AttachError(message)
        first = optimizers[0]
        hooks.add(Events.STARTED, lambda: self._open(first), name="tensorboard.open", order=-90)
        for optimizer in optimizers:
            name = optimizer.name
            completed, skipped = (optimizer.event(kind) for kind in ("STEP_COMPLETED", "STEP_SKIPPED"))
            hooks.add(completed(every=every), self._step_writer(optimizer), name=f"tensorboard.{name}.step")
            hooks.add(skipped, self._step_writer(optimizer), name=f"tensorboard.{name}.skip")
        hooks.add(Events.ITERATION_COMPLETED, self._loss_writer(first, every), name="tensorboard.loss", order=-90)
        for prefix, evaluator in (evaluators or {}).items():
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

    def _open(self, optimizer: Optimizer) -> None:
        if self._writer is None:
            # Imported here: it loads TensorBoard, which a run without it need not pay for.
            from torch.utils.tensorboard import SummaryWriter

            # What a run wrote after the checkpoint it is resumed from is taken back.
            step = optimizer.clocks["step"]
            self._writer = SummaryWriter(str(self._log_dir), purge_step=step + 1 if step else None)
            # The writer's thread is a daemon: without this, an exception would lose the last two minutes.
            weakref.finalize(self, self._writer.close)

    def _step_writer(self, optimizer: Optimizer) -> Any:
        def write() -> None:
            record, prefix = optimizer.record, optimizer.name
            if record is None:
                return
            scalars = {f"{key}/{group}": v for group, values in record.values.items() for key, v in values.items()}
            scalars |= {"grad_norm": record.grad_norm, "loss_scale": record.loss_scale}
            scalars |= {"weight": record.weight, "skipped": optimizer.clocks["skipped"]}
            for tag, value in scalars.items():
                self._write(f"{prefix}/{tag}", value, record.step)

        return write

    def _loss_writer(self, optimizer: Optimizer, every: int) -> Any:
        written = {"step": 0}

        def write(engine: Engine) -> None:
            step = optimizer.clocks["step"]
            if step != written["step"] and step % every == 0:
                written["step"] = step
                outputs = (
                    engine.state.output if isinstance(engine.state.output, Mapping) else {"loss": engine.state.output}
                )
                for key, value in outputs.items():
                    self._write(f"training/{key}", value, step)

        return write

    def _metrics_writer(self, prefix: str, optimizer: Optimizer) -> Any:
        def write(evaluator: Engine) -> None:
            for key, value in evaluator.state.metrics.items():
                self._write(f"{prefix}/{key}", value, optimizer.clocks["step"])

        return write

    def _write(self, tag: str, value: Any, step: int) -> None:
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, tuple | list):
            for i, element in enumerate(value):
                self._write(f"{tag}.{i}", element, step)
        elif isinstance(value, Real):
            self._writer.add_scalar(tag, float(value), step)
