"""What is not finite, in words."""

import math
from collections.abc import Iterable

import torch

from ice_engine.norms import entries


def first_nonfinite(named_parameters: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Say which parameter is the first without a finite gradient."""
    for name, parameter in named_parameters:
        if parameter.grad is not None and not bool(torch.isfinite(entries(parameter.grad)).all()):
            return f"first in {name!r}, shape {tuple(parameter.shape)}"
    return "every entry is finite, their norm is not"


def nonfinite_loss(losses: Iterable[tuple[int, float | torch.Tensor]]) -> str:
    """Say which micro-batch is the first whose loss was not finite; nothing if all were."""
    bad = [index for index, loss in losses if not math.isfinite(float(loss))]
    return f"the loss of micro-batch {bad[0]} of its window was not finite" if bad else ""
