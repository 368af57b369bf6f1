"""What is not finite, in words."""

import math
from collections.abc import Iterable, Sequence

import torch

from ice_engine.norms import entries, local_part

Seen = tuple[tuple[int, str] | None, str]
"""The first parameter without a finite gradient, its number and what to call it, and :func:`nonfinite_loss`."""


def seen(
    named_parameters: Iterable[tuple[str, torch.Tensor]], losses: Iterable[tuple[int, float | torch.Tensor]]
) -> Seen:
    """Return what this rank sees, of sharded gradients in its own part."""
    for number, (name, parameter) in enumerate(named_parameters):
        if parameter.grad is not None and not bool(torch.isfinite(entries(local_part(parameter.grad))).all()):
            return (number, f"first in {name!r}, shape {tuple(parameter.shape)}"), nonfinite_loss(losses)
    return None, nonfinite_loss(losses)


def in_words(by_rank: Sequence[Seen]) -> str:
    """Say which parameter is the first without a finite gradient, and which losses it may have come from."""
    found = [tuple(first) for first, _ in by_rank if first is not None]
    where = min(found)[1] if found else "every entry is finite, their norm is not"
    bad = ", ".join(f"rank {r}: {loss}" if len(by_rank) > 1 else loss for r, (_, loss) in enumerate(by_rank) if loss)
    return f"{where}; {bad or 'micro-batch unknown: all losses were finite'}"


def nonfinite_loss(losses: Iterable[tuple[int, float | torch.Tensor]]) -> str:
    """Say which micro-batch is the first whose loss was not finite; nothing if all were."""
    bad = [index for index, loss in losses if not math.isfinite(float(loss))]
    return f"the loss of micro-batch {bad[0]} of its window was not finite" if bad else ""
