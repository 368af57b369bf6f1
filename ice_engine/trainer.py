"""An Ignite trainer in one call, as ``ignite.engine.create_supervised_trainer`` is."""

from collections.abc import Callable
from typing import Any

import torch
from ignite.engine import Engine
from ignite.engine import _prepare_batch as _ignites

from ice_engine.batches import batch_size, check_weight
from ice_engine.errors import ArgumentTypeError, ArgumentValueError
from ice_engine.optimizer import Optimizer
from ice_engine.quiet_engine import QuietEngine

_TRAIN = torch.nn.Module.train


def _loss_value(x: Any, y: Any, y_pred: Any, loss: torch.Tensor) -> float:  # noqa: ARG001 - Ignite's signature
    return loss.item()


def _prepare_batch(batch: Any, device: torch.device | None = None, non_blocking: bool = False) -> tuple[Any, Any]:
    """Do what Ignite's does, which takes 1.5 us to find that two tensors stay where they are."""
    x, y = batch
    if device is None and type(x) is type(y) is torch.Tensor:
        return x, y
    x, y = _ignites(batch, device=device, non_blocking=non_blocking)
    return x, y


def create_trainer(
    model: torch.nn.Module,
    optimizer: Optimizer,
    loss_fn: Callable[[Any, Any], torch.Tensor],
    *,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    prepare_batch: Callable[..., Any] = _prepare_batch,
    weight: Callable[[Any, Any], float] = batch_size,
    output_transform: Callable[[Any, Any, Any, torch.Tensor], Any] = _loss_value,
) -> Engine:
    """Make an engine that trains *model*, with *optimizer* attached.

    Args:
        model: In training mode during each iteration.
        optimizer: Steps after each full window; not attached yet.
        loss_fn: ``loss_fn(y_pred, y)``, a mean over the batch (or its sum, as the optimizer was told), shape ().
        device: Where batches are moved; the model is already there.
        autocast: ``torch.float16`` or ``torch.bfloat16`` to run model and loss under autocast; None for neither.
        prepare_batch: ``(batch, device=, non_blocking=) -> (x, y)``.
        weight: ``(x, y) ->`` items behind the loss; by default the samples, so that a window's gradient is
            their mean even if micro-batches differ in size.
        output_transform: ``(x, y, y_pred, loss) -> engine.state.output``; by default the loss as a number.

    Returns:
        An Ignite engine.

    Raises:
        ArgumentTypeError: If an argument has the wrong type.
        ArgumentValueError: If *device* or *autocast* is none that there is.
        AttachError: If the optimizer is attached already.

    Examples:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = Optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        >>> trainer = create_trainer(model, optimizer, torch.nn.functional.mse_loss)
        >>> state = trainer.run([(torch.ones(4, 2), torch.ones(4, 1))] * 3)
        >>> state.optimizer_step
        3

    .. versionadded:: 0.1.0
    """
    if not isinstance(model, torch.nn.Module):
        message = f"model must be a torch.nn.Module, got {type(model).__name__}"
        raise ArgumentTypeError(message)
    if isinstance(loss_fn, torch.optim.Optimizer):
        message = (
            f"loss_fn is an optimizer, {type(loss_fn).__name__}; the order is create_trainer(model, optimizer, loss_fn)"
        )
        raise ArgumentTypeError(message)
    if not isinstance(optimizer, Optimizer):
        message = (
            f"optimizer must be an ice_engine.Optimizer, got {type(optimizer).__name__}; "
            "wrap it: ice.Optimizer(optimizer)"
        )
        raise ArgumentTypeError(message)
    functions = {"loss_fn": loss_fn, "prepare_batch": prepare_batch, "weight": weight}
    for argument, function in {**functions, "output_transform": output_transform}.items():
        if not callable(function):
            message = f"{argument} must be callable, got {function!r} ({type(function).__name__})"
            raise ArgumentTypeError(message)
    check_weight(weight)
    _check_autocast(autocast)
    device = _device(device)

    def train_step(engine: Engine, batch: Any) -> Any:  # noqa: ARG001 - Ignite's signature
        _to_training(model)
        x, y = prepare_batch(batch, device=device, non_blocking=False)
        if autocast is None:
            y_pred = model(x)
            loss = loss_fn(y_pred, y)
        else:
            with torch.autocast(_device_type(model, device), dtype=autocast):
                y_pred = model(x)
                loss = loss_fn(y_pred, y)
        optimizer.backward(loss, weight=weight(x, y))
        return output_transform(x, y, y_pred, loss)

    trainer = QuietEngine(train_step)
    optimizer.attach(trainer, model=model)
    return trainer


def _device_type(model: torch.nn.Module, device: torch.device | None) -> str:
    # Where the model is now: it may have been moved since the trainer was made.
    return (device or next((p.device for p in model.parameters()), torch.device("cpu"))).type


def _to_training(module: torch.nn.Module) -> None:
    """Do what ``module.train()`` does, without setting what is set: a fifth of its price, in every iteration."""
    own = type(module).train is not _TRAIN or "train" in vars(module)
    if own or not module.training:
        module.train()
        return
    for child in module._modules.values():  # noqa: SLF001 - children() is half of that price
        if child is not None:
            _to_training(child)


def _check_autocast(autocast: Any) -> None:
    if autocast is not None and not isinstance(autocast, torch.dtype):
        message = f"autocast must be a torch.dtype or None, got {autocast!r}; such as autocast=torch.bfloat16"
        raise ArgumentTypeError(message)
    if autocast not in (None, torch.float16, torch.bfloat16):
        message = f"autocast must be torch.float16 or torch.bfloat16, got {autocast}"
        raise ArgumentValueError(message)


def _device(device: Any) -> torch.device | None:
    if device is None or isinstance(device, torch.device):
        return device
    if not isinstance(device, str):
        message = f"device must be a torch.device or a string, got {device!r} ({type(device).__name__})"
        raise ArgumentTypeError(message)
    try:
        return torch.device(device)
    except RuntimeError as err:
        message = f"device must be one that torch knows, such as 'cpu' or 'cuda:0', got {device!r}"
        raise ArgumentValueError(message) from err
