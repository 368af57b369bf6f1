"""The mean of gradients over ranks, where no backward of DDP's makes it."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from ice_engine.distributed.world import own_group

_BUCKET = 8 * 1024 * 1024  # elements that are reduced at once


@torch.no_grad()
def average(parameters: Sequence[torch.Tensor], group: dist.ProcessGroup) -> None:
    """Average the gradients of *parameters* over the ranks of *group*; one that a rank has none of counts as 0.

    A parameter that no rank has a gradient of keeps None.
    """
    parameters = [p for p in parameters if p.requires_grad]
    for bucket in _buckets([p for p, here in zip(parameters, present(parameters), strict=True) if here]):
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).to_dense().flatten() for p in bucket])
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
        for parameter, part in zip(bucket, torch.split(flat, [p.numel() for p in bucket]), strict=True):
            if parameter.grad is None or parameter.grad.is_sparse:
                parameter.grad = part.view_as(parameter).clone()
            else:
                parameter.grad.copy_(part.view_as(parameter))


def present(parameters: Sequence[torch.Tensor]) -> list[bool]:
    """Return which of *parameters* have a gradient on any rank."""
    found = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device="cpu")
    dist.all_reduce(found, dist.ReduceOp.MAX, group=own_group())
    return [bool(here) for here in found.tolist()]


def _buckets(parameters: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    filled: dict[tuple[torch.device, torch.dtype], list[list[torch.Tensor]]] = {}
    for parameter in parameters:
        same = filled.setdefault((parameter.device, parameter.dtype), [[]])
        if same[-1] and sum(p.numel() for p in same[-1]) + parameter.numel() > _BUCKET:
            same.append([])
        same[-1].append(parameter)
    return [bucket for same in filled.values() for bucket in same]
