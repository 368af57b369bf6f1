"""Which piece of a DTensor this rank holds: to cut it from the whole, and to put the whole together."""

import math

import torch
from torch.distributed.tensor import DTensor, Placement, Replicate

from ice_engine.errors import StateDictError

Box = list[list[int]]
"""First index and length in each dimension."""


def box(tensor: DTensor) -> Box:
    """Return where this rank's piece of *tensor* lies in it.

    Raises:
        StateDictError: If it is a sum that is still to be made, which no rank has a piece of.
    """
    if any(placement.is_partial() for placement in tensor.placements):
        message = f"its layout {tensor.placements} is a sum over ranks that was not made; redistribute() it first"
        raise StateDictError(message)
    if tensor.device_mesh.get_coordinate() is None:
        return [[0, 0] for _ in tensor.shape]
    # torch's own protocol for checkpoints; it knows uneven shards, and dimensions sharded twice.
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    found = [[first, length] for first, length in zip(chunk.offsets, chunk.sizes, strict=True)]
    if tuple(length for _, length in found) != tuple(tensor.to_local().shape):
        message = f"its layout {tensor.placements} on {tensor.device_mesh} does not give each rank one piece"
        raise StateDictError(message)
    return found


def is_first_copy(tensor: DTensor) -> bool:
    """Whether of all ranks with the same piece of *tensor* this is the first."""
    coordinate = tensor.device_mesh.get_coordinate()
    return coordinate is not None and not any(
        place for place, placement in zip(coordinate, tensor.placements, strict=True) if placement.is_replicate()
    )


def cut(whole: torch.Tensor, where: Box) -> torch.Tensor:
    """Return the part of *whole* that lies at *where*, a view."""
    for dimension, (first, length) in enumerate(where):
        whole = whole.narrow(dimension, first if length else 0, length)
    return whole


def distribute(whole: torch.Tensor, like: DTensor, *, sharded: bool) -> DTensor:
    """Return this rank's piece of *whole* as a DTensor, without talking to anybody.

    Args:
        whole: The same on all ranks.
        like: What gives mesh and layout.
        sharded: Laid out as *like*, whose shape it has; else whole on every rank.
    """
    local = whole.to(like.to_local().device)
    placements: list[Placement] = [Replicate()] * like.device_mesh.ndim
    if sharded:
        # Cloned, or one piece would keep the whole in memory.
        local, placements = cut(local, box(like)).clone(memory_format=torch.contiguous_format), list(like.placements)
    return DTensor.from_local(
        local, like.device_mesh, placements, run_check=False, shape=whole.shape, stride=_strides(whole.shape)
    )


def _strides(shape: torch.Size) -> tuple[int, ...]:
    return tuple(math.prod(shape[dimension + 1 :]) for dimension in range(len(shape)))
