"""How the entries of a tensor are spread, in a few numbers."""

import torch

from ice_engine.event_file import Histogram
from ice_engine.norms import entries, local_part

_BUCKETS = 64


def histogram(tensor: torch.Tensor | None) -> Histogram | None:
    """Return the histogram of the finite entries of *tensor*; None if there are none.

    Of a DTensor they are those of this rank's shard.
    """
    if tensor is None:
        return None
    local = local_part(entries(tensor))
    if local.is_complex():
        local = torch.view_as_real(local)
    values = local.flatten().float()
    values = values[values.isfinite()]
    if not values.numel():
        return None
    smallest, largest = (float(end) for end in values.aminmax())
    counts = torch.histc(values, _BUCKETS, smallest, largest).tolist()  # if they are equal, from 1 less to 1 more
    low, high = (smallest, largest) if smallest < largest else (smallest - 1, largest + 1)
    limits = [low + (high - low) * i / _BUCKETS for i in range(1, _BUCKETS + 1)]
    total, squares = float(values.sum(dtype=torch.float64)), float(values.double().square().sum())
    return Histogram(smallest, largest, values.numel(), total, squares, limits, counts)
