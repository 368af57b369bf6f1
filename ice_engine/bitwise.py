"""What is stored of a tensor, dense or sparse, and how it differs from what is stored of another one, to the bit."""

import math

import torch

_CHUNK = 1 << 18  # elements compared at a time
_PLACES: dict[torch.layout, tuple[str, ...]] = {
    torch.strided: (),
    torch.sparse_coo: ("_indices",),  # indices() and values() want no entry stored twice
    torch.sparse_csr: ("crow_indices", "col_indices"),
    torch.sparse_bsr: ("crow_indices", "col_indices"),
    torch.sparse_csc: ("ccol_indices", "row_indices"),
    torch.sparse_bsc: ("ccol_indices", "row_indices"),
    torch.jagged: ("offsets",),
}


def places(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return what says where the entries of a sparse *tensor* are; of a dense one nothing does."""
    return [getattr(tensor, name)() for name in _PLACES[tensor.layout]]


def entries(tensor: torch.Tensor) -> torch.Tensor:
    """Return the entries that are stored of *tensor*."""
    if tensor.layout is torch.strided:
        return tensor
    return tensor._values() if tensor.is_sparse else tensor.values()  # noqa: SLF001 - see above


def difference(first: torch.Tensor, second: torch.Tensor) -> str | None:
    """Say how tensors of one shape, type and layout differ; None if they do not. NaN is the same as NaN."""
    a, b = entries(first), entries(second)
    if a.shape != b.shape:
        return f"{a.numel():,} -> {b.numel():,} entries"
    if not all(map(torch.equal, places(first), places(second))):
        return "entries in other places"
    number, largest = 0, 0.0
    for one, other in zip(_chunks(a), _chunks(b), strict=True):
        differs = (one != other) & ~((one != one) & (other != other))  # noqa: PLR0124 - NaN alone is not itself
        number += int(differs.sum())
        if one.dtype != torch.bool and number:
            largest = max(largest, _largest(one[differs], other[differs]))
    return f"{number:,} of {a.numel():,} elements, by at most {largest:.3g}" if number else None


def _chunks(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.split(tensor.reshape(-1), _CHUNK)


def _largest(a: torch.Tensor, b: torch.Tensor) -> float:
    wide = torch.complex128 if a.dtype.is_complex else torch.float64
    apart = (a.to(wide) - b.to(wide)).abs()
    return math.inf if apart.isnan().any() else float(apart.max()) if apart.numel() else 0.0
