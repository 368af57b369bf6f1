"""The rows of a step for Ignite's own loggers: MLflow, Weights & Biases, ClearML and the others."""

from collections.abc import Callable
from typing import Any

from ignite.engine import Engine
from ignite.handlers.base_logger import BaseHandler, BaseLogger

from ice_engine.errors import ArgumentTypeError
from ice_engine.memory import memory_rows
from ice_engine.of_engine import optimizers_of, require_attached
from ice_engine.optimizer import Optimizer
from ice_engine.rows import kept, step_rows


class RecordHandler(BaseHandler):
    """Gives one of Ignite's loggers what TensorBoard shows of a step, under the same tags.

    It takes the way that each logger has for the output of an engine, so it works with all of them; and as they do, it
    works on the training thread. Texts, such as why a step was skipped, are left out.

    Args:
        optimizer: Whose records; attached to the engine. Of the engine's first one, the trainer's output goes along.

    Raises:
        ArgumentTypeError: If it is none of ours.

    Examples:
        >>> import torch
        >>> from ignite.handlers import TensorboardLogger
        >>> weight = torch.nn.Parameter(torch.ones(()))
        >>> optimizer = Optimizer(torch.optim.SGD([weight], lr=0.1))
        >>> trainer = Engine(lambda engine, batch: optimizer.backward(weight * batch))
        >>> _ = optimizer.attach(trainer)
        >>> logger = TensorboardLogger(log_dir="runs/docs")  # or an MLflowLogger, a WandBLogger, ...
        >>> handler = RecordHandler(optimizer)
        >>> _ = logger.attach(trainer, log_handler=handler, event_name=optimizer.events.OPTIMIZER_STEP_COMPLETED)
        >>> state = trainer.run([1.0, 2.0])
        >>> logger.close()

    .. versionadded:: 0.1.0
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Optimizer):
            message = f"optimizer must be an ice_engine.Optimizer, got {type(optimizer).__name__}"
            raise ArgumentTypeError(message)
        self._optimizer = optimizer.measure("grad_norm", "times")

    def __call__(self, engine: Engine, logger: BaseLogger, event_name: Any) -> None:
        """Write the last record; the handler that ``logger.attach`` adds.

        Raises:
            AttachError: If the optimizer is not attached to *engine*.
        """
        optimizer = self._optimizer
        require_attached(optimizer, engine)
        record = optimizer.record
        if record is None:
            return
        output = kept(engine.state.output) if optimizers_of(engine)[0] is optimizer else None
        rows = step_rows(optimizer.name, record, output) | memory_rows()
        by_source: dict[str, dict[str, float]] = {}
        for tag, value in rows.items():
            source, _, rest = tag.partition("/")
            if not isinstance(value, str):
                by_source.setdefault(source, {})[rest] = value
        for source, values in by_source.items():
            # The one way that all of Ignite's loggers have in common.
            make: Callable[..., Callable[..., None]] = logger._create_output_handler  # noqa: SLF001
            write = make(
                source,
                output_transform=lambda _, values=values: values,
                global_step_transform=lambda *_: record.step,
            )
            write(engine, logger, event_name)
