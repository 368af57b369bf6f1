"""The torch optimizer that is wrapped: the one that is given, or one made here, sharded over ranks or not."""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch

from ice_engine.arguments import choice
from ice_engine.distributed.watch import watch
from ice_engine.distributed.world import world_size
from ice_engine.distributed.zero import refuse_raw, shard
from ice_engine.errors import ArgumentTypeError, ArgumentValueError
from ice_engine.fused import prefer
from ice_engine.typing import OptimizerFactory

Sharding = Literal["zero1"]


def build(
    optimizer: torch.optim.Optimizer | OptimizerFactory, params: Any, sharding: Sharding | None
) -> torch.optim.Optimizer:
    """Make the torch optimizer that is wrapped, or take the one that is given.

    In one process there is nothing to shard: ``"zero1"`` gives the plain optimizer, so that a
    script for many ranks runs unchanged on one.

    Raises:
        ArgumentTypeError: If *optimizer* is neither an optimizer nor a factory of one.
        ArgumentValueError: If *params* or *sharding* do not go with it.
        ClosureError: If it would be sharded and needs a closure.
        RankError: If it would be sharded, and another rank does not build the same.
    """
    choice("sharding", sharding, (None, "zero1"))
    if world_size() > 1:
        # From here on the others can ask where this rank is, should it not come to where all meet; not over a store
        # that keeps nothing, as with torch's "fake" backend. What else is wrong with a store, attach() says.
        with contextlib.suppress(RuntimeError):
            watch()
    if isinstance(optimizer, torch.optim.Optimizer):
        if params is not None:
            message = "params go with a factory; an optimizer instance has its own. Leave params out"
            raise ArgumentValueError(message)
        if sharding is not None:
            message = (
                f"sharding={sharding!r} needs a factory, as each rank makes the state of its own shard: "
                f"Optimizer(functools.partial({type(optimizer).__name__}, lr=...), model.parameters(), sharding=...)"
            )
            raise ArgumentValueError(message)
        refuse_raw(type(optimizer))
        return optimizer
    if isinstance(optimizer, torch.nn.Module) or not callable(optimizer):
        message = (
            f"optimizer must be a torch.optim.Optimizer or a factory of one, got {type(optimizer).__name__}; such as "
            "Optimizer(torch.optim.AdamW(model.parameters(), lr=3e-3))"
        )
        raise ArgumentTypeError(message)
    if params is None:
        message = f"the factory {optimizer!r} needs params: Optimizer(factory, model.parameters())"
        raise ArgumentValueError(message)
    if isinstance(params, torch.nn.Module | torch.Tensor):
        message = f"params must be parameters, pairs or groups, got {type(params).__name__}; pass model.parameters()"
        raise ArgumentTypeError(message)
    params = list(params) if isinstance(params, Iterator) else params
    if isinstance(params, list) and not params:
        message = (
            "params is empty; model.parameters() can be gone through once, so pass a new one here, not one that was "
            "counted or printed before"
        )
        raise ArgumentValueError(message)
    if sharding is not None and world_size() > 1:
        return shard(optimizer, params)
    made = optimizer(params)
    if not isinstance(made, torch.optim.Optimizer):
        message = f"the factory {optimizer!r} returned {type(made).__name__}; it must return a torch.optim.Optimizer"
        raise ArgumentTypeError(message)
    refuse_raw(type(made))
    prefer(made)
    return made


def remove_last_param_group(optimizer: torch.optim.Optimizer) -> None:
    """Undo the last ``add_param_group()`` of *optimizer*, before its next step."""
    remove = getattr(optimizer, "remove_last_param_group", optimizer.param_groups.pop)
    remove()
