"""How the optimizer's state is spread over ranks; the only module that talks to ``torch.distributed``."""

import datetime
import functools
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.distributed as dist

from ice_engine.arguments import choice
from ice_engine.errors import ArgumentTypeError, ArgumentValueError, AttachError
from ice_engine.typing import OptimizerFactory

Sharding = Literal["zero1"]

_PATIENCE = datetime.timedelta(seconds=60)


def world_size() -> int:
    """Number of processes that train together; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gatherer() -> Callable[[str], list[str]] | None:
    """Return the function that gives every rank's text to every rank, in the order of ranks; None with one process."""
    return _gather_texts if world_size() > 1 else None


@functools.cache
def _own_group(_world: int) -> dist.ProcessGroup:
    # Not the user's group: its collectives may be under way on another thread or device, and it may wait for 30 min.
    return cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=_PATIENCE))


def _gather_texts(text: str) -> list[str]:
    group, data = _own_group(world_size()), text.encode()
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor([len(data)]), group=group)
    longest = max(int(length) for length in lengths)
    padded = torch.frombuffer(bytearray(data.ljust(longest)), dtype=torch.uint8)
    texts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(texts, padded, group=group)
    return [bytes(t[: int(n)].tolist()).decode() for t, n in zip(texts, lengths, strict=True)]


def require_one_process(what: str) -> None:
    """Refuse *what* where its gradients would be those of one rank only.

    Raises:
        AttachError: If the world has more than one rank.
    """
    if world_size() > 1:
        message = (
            f"{what} runs in one process so far; this is rank {rank()} of {world_size()}. "
            "Windows that are exact over many ranks are not implemented yet; run one process"
        )
        raise AttachError(message)


def build(
    optimizer: torch.optim.Optimizer | OptimizerFactory, params: Any, sharding: Sharding | None
) -> torch.optim.Optimizer:
    """Make the torch optimizer that is wrapped, or take the one that is given.

    In one process there is nothing to shard: ``"zero1"`` gives the plain optimizer, so that a
    script for many ranks runs unchanged on one.

    Raises:
        ArgumentTypeError: If *optimizer* is neither an optimizer nor a factory of one.
        ArgumentValueError: If *params* or *sharding* do not go with it.
        AttachError: If it would be sharded over many ranks.
    """
    choice("sharding", sharding, (None, "zero1"))
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
        return optimizer
    if not callable(optimizer):
        message = f"optimizer must be a torch.optim.Optimizer or a factory of one, got {type(optimizer).__name__}"
        raise ArgumentTypeError(message)
    if params is None:
        message = f"the factory {optimizer!r} needs params: Optimizer(factory, model.parameters())"
        raise ArgumentValueError(message)
    if isinstance(params, torch.nn.Module | torch.Tensor):
        message = f"params must be parameters, pairs or groups, got {type(params).__name__}; pass model.parameters()"
        raise ArgumentTypeError(message)
    if sharding is not None:
        require_one_process(f"sharding={sharding!r}")
    made = optimizer(params)
    if not isinstance(made, torch.optim.Optimizer):
        message = f"the factory {optimizer!r} returned {type(made).__name__}; it must return a torch.optim.Optimizer"
        raise ArgumentTypeError(message)
    return made
