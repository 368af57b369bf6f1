"""How much memory this process has."""

import os
from pathlib import Path

import torch

_MIB = 2**20
_STATM = Path("/proc/self/statm")  # of Linux; elsewhere nothing says it without another package


def memory_rows() -> dict[str, float]:
    """Return MiB by tag: ``memory/host``, resident now; ``memory/cuda``, the most that tensors ever took of one GPU."""
    found: dict[str, float] = {}
    if _STATM.exists():
        found["memory/host"] = int(_STATM.read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE") / _MIB
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        peaks = (torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
        found["memory/cuda"] = max(peaks) / _MIB
    return found
