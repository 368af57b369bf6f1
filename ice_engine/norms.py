"""Norms of gradients: dense, sparse, complex, and sharded over ranks as DTensors (FSDP2, tensor parallel).

A norm is a p-norm of p-norms, so each rank takes that of what it holds, and only these numbers are exchanged, over
the mesh that the tensors themselves are spread on. ``torch.nn.utils.get_total_norm`` does the local work. It cannot do
the rest: it refuses tensors of several meshes, and plain ones among them
(`pytorch#180346 <https://github.com/pytorch/pytorch/issues/180346>`_), and for ``norm_type=inf`` it raises on a rank
whose shard is empty, while the others wait for it.
"""

import ctypes
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard


class Part(NamedTuple):
    """What this rank holds of a tensor.

    Attributes:
        local: A plain dense tensor; of a sparse one, the values.
        mesh: What the tensor is spread on; None if it is no DTensor.
        across: The dimensions of *mesh* along which ranks hold different parts.
        within: Those of *across* along which even a row is spread, the entries of one index of dimension 0; a tensor
            with fewer than two dimensions is one row.
    """

    local: torch.Tensor
    mesh: DeviceMesh | None = None
    across: tuple[int, ...] = ()
    within: tuple[int, ...] = ()


def part(tensor: torch.Tensor) -> Part:
    """Return what this rank holds of *tensor*, in the same memory if :func:`settled`; call it on every rank."""
    tensor = settled(tensor.detach())
    if not isinstance(tensor, DTensor):
        return Part(tensor.values() if tensor.is_sparse else tensor)
    placements: Any = tensor.placements
    across = tuple(i for i, placement in enumerate(placements) if not placement.is_replicate())
    within = across if tensor.ndim <= 1 else tuple(i for i in across if placements[i].dim != 0)
    return Part(tensor.to_local(), tensor.device_mesh, across, within)


def settled(gradient: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """Return *gradient* without sums that are still to be made; itself if there are none. Call on every rank.

    Args:
        gradient: A sparse one may hold several values of one entry, a DTensor may be a sum over ranks (``Partial``).
        like: A DTensor whose layout it is to have; ignored where *gradient* is no DTensor.
    """
    if gradient.is_sparse:
        return gradient.coalesce()
    if not isinstance(gradient, DTensor):
        return gradient
    placements: Any = (
        like.placements
        if isinstance(like, DTensor)
        else tuple(Replicate() if placement.is_partial() else placement for placement in gradient.placements)
    )
    return gradient if placements == gradient.placements else gradient.redistribute(placements=placements)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank holds of a DTensor; *tensor* itself if it is none. Talks to no other rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def entries(gradient: torch.Tensor) -> torch.Tensor:
    """Return what is stored of *gradient*: of a sparse one the values, of which one entry may have several."""
    gradient = gradient.detach()
    return gradient._values() if gradient.is_sparse else gradient  # noqa: SLF001 - values() wants them settled


def gradients_of(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return the gradients of *parameters* that have one, settled; call it on every rank."""
    # What is clipped must be what is stepped with: settled gradients take the place of the others.
    found = []
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = settled(parameter.grad, like=parameter)
            if gradient is not parameter.grad:
                parameter.grad = gradient
            found.append(gradient)
    return found


def total_norm(gradients: Iterable[torch.Tensor], norm_type: float = 2.0) -> torch.Tensor:
    """Return the p-norm over all *gradients* as a plain tensor, shape (), on the device of the first.

    Call on every rank, with the gradients in the same order. Without gradients it is 0.
    """
    with torch.no_grad():
        return norm_of_parts([part(gradient) for gradient in gradients], norm_type)


def norm_of_parts(parts: Iterable[Part], norm_type: float = 2.0) -> torch.Tensor:
    """Return the p-norm over tensors of which these are the *parts* of this rank, shape (). Call on every rank."""
    spread: dict[tuple[DeviceMesh | None, tuple[int, ...]], list[torch.Tensor]] = {}
    for local, mesh, across, _ in parts:
        # An empty tensor has no largest entry; a zero in its place changes no norm.
        spread.setdefault((mesh, across), []).append(local if local.numel() else local.new_zeros(1))
    norms = [
        over_ranks(torch.nn.utils.get_total_norm(locals_, norm_type), mesh, across, norm_type)
        for (mesh, across), locals_ in spread.items()
    ]
    return norm_of_norms(on_one_device(norms), norm_type)


def on_one_device(norms: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return *norms*, each of shape (), on the device of the first."""
    return [norm.to(norms[0].device) for norm in norms]


def norm_of_norms(norms: list[torch.Tensor] | tuple[torch.Tensor, ...], norm_type: float = 2.0) -> torch.Tensor:
    """Return the p-norm over tensors of which these are the *norms*, each of shape (), all on one device."""
    if not norms:
        return torch.zeros(())
    if len(norms) == 1:
        return norms[0]
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    return norm


def over_ranks(
    norms: torch.Tensor, mesh: DeviceMesh | None, across: tuple[int, ...], norm_type: float = 2.0
) -> torch.Tensor:
    """Return the p-norms over all ranks along the dimensions *across* of *mesh*, given those of each rank's part.

    Every norm is exchanged, rather than summed up on the way: a NaN survives, and no power overflows.
    """
    if mesh is None:
        return norms
    for dimension in across:
        placements = [Shard(0) if i == dimension else Replicate() for i in range(mesh.ndim)]
        gathered = DTensor.from_local(norms.unsqueeze(0), mesh, placements, run_check=False).full_tensor()
        norms = torch.linalg.vector_norm(gathered, norm_type, dim=0)
    return norms


def _single(value: float) -> float:
    return ctypes.c_float(value).value


ROUNDED: dict[torch.dtype, Callable[[float], float]] = {torch.float32: _single, torch.float64: float}
"""Rounds a number of the host's as a tensor would: what is computed here comes out as there, to the last bit."""
