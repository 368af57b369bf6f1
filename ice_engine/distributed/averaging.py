"""The mean of gradients over ranks, where no backward of DDP's makes it."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from ice_engine.distributed.world import own_group

_BUCKET = 8 * 1024 * 1024  # elements that are reduced at once
_DENSE = 255  # else 1 more than the sparse dimensions


@torch.no_grad()
def average(parameters: Sequence[torch.Tensor], group: dist.ProcessGroup) -> None:
    """Average the gradients of *parameters* over the ranks of *group*; one that a rank has none of counts as 0.

    A parameter that no rank has a gradient of keeps None. One that is sparse on all that have one stays so: some
    optimizers take no other.
    """
    parameters = [p for p in parameters if p.requires_grad]
    kinds = dict(zip(parameters, present(parameters), strict=True))
    for parameter in [p for p, kind in kinds.items() if 0 < kind < _DENSE]:
        gradient = _no_entries(parameter, kinds[parameter] - 1) if parameter.grad is None else parameter.grad
        dist.all_reduce(gradient, group=group)
        parameter.grad = gradient / dist.get_world_size(group)
    for bucket in _buckets([p for p, kind in kinds.items() if kind == _DENSE]):
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).to_dense().flatten() for p in bucket])
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
        for parameter, part in zip(bucket, torch.split(flat, [p.numel() for p in bucket]), strict=True):
            if parameter.grad is None or parameter.grad.is_sparse:
                parameter.grad = part.view_as(parameter).clone()
            else:
                parameter.grad.copy_(part.view_as(parameter))


def present(parameters: Sequence[torch.Tensor]) -> list[int]:
    """Return of which of *parameters* any rank has a gradient, and of what kind; 0 is none."""
    kinds = [0 if p.grad is None else 1 + p.grad.sparse_dim() if p.grad.is_sparse else _DENSE for p in parameters]
    found = torch.tensor(kinds, dtype=torch.uint8, device="cpu")
    dist.all_reduce(found, dist.ReduceOp.MAX, group=own_group())
    return [int(kind) for kind in found.tolist()]


def _no_entries(parameter: torch.Tensor, sparse: int) -> torch.Tensor:
    indices = torch.empty(sparse, 0, dtype=torch.int64, device=parameter.device)
    values = parameter.new_empty(0, *parameter.shape[sparse:])
    return torch.sparse_coo_tensor(indices, values, parameter.shape, check_invariants=False)


def _buckets(parameters: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    filled: dict[tuple[torch.device, torch.dtype], list[list[torch.Tensor]]] = {}
    for parameter in parameters:
        same = filled.setdefault((parameter.device, parameter.dtype), [[]])
        if same[-1] and sum(p.numel() for p in same[-1]) + parameter.numel() > _BUCKET:
            same.append([])
        same[-1].append(parameter)
    return [bucket for same in filled.values() for bucket in same]
