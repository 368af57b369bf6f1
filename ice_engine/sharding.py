"""How the optimizer's state is spread over ranks; the only module that talks to ``torch.distributed``."""

from typing import Any, Literal

import torch
import torch.distributed as dist

from ice_engine.errors import ArgumentTypeError, AttachError
from ice_engine.typing import OptimizerFactory

Sharding = Literal["zero1"]


def world_size() -> int:
    """Number of processes that train together; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def require_one_process(what: str) -> None:
    """Refuse *what* where its gradients would be those of one rank only.

    Raises:
        AttachError: If the world has more than one rank.
    """
    if world_size() > 1:
        raise AttachError(
            f"{what} runs in one process so far; this is rank {rank()} of {world_size()}. "
            "Windows that are exact over many ranks are not implemented yet; run one process"
        )


def build(factory: OptimizerFactory, params: Any, sharding: Sharding | None) -> torch.optim.Optimizer:
    """Make the torch optimizer that is wrapped.

    In one process there is nothing to shard: ``"zero1"`` gives the plain optimizer, so that a
    script for many ranks runs unchanged on one.
    """
    if sharding is not None:
        require_one_process(f"sharding={sharding!r}")
    optimizer = factory(params)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ArgumentTypeError(
            f"the optimizer factory {factory!r} returned {type(optimizer).__name__}; it must return a torch.optim.Optimizer"
        )
    return optimizer
