"""Who holds what: tensors that are spread over ranks, and optimizers that keep the state of some parameters only."""

from typing import Any, cast

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor


def is_sharded(value: object) -> bool:
    """Whether *value* is a DTensor, such as a parameter of ``fully_shard``."""
    return isinstance(value, DTensor)


def is_zero(optimizer: object) -> bool:
    """Whether *optimizer* is a ``ZeroRedundancyOptimizer``, ours or torch's own."""
    return isinstance(optimizer, ZeroRedundancyOptimizer)


def shard_of(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer with this rank's state: that inside a ``ZeroRedundancyOptimizer``, or *optimizer* itself."""
    return cast("Any", optimizer).optim if is_zero(optimizer) else optimizer


def empty_state(parameter: torch.Tensor, key: str, size: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Return room for the state *key* of *parameter*: spread as the parameter is, or a plain tensor on the CPU."""
    if is_sharded(parameter) and size == parameter.shape and key != "step":
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(size, dtype=dtype, device="cpu")
