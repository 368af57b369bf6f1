"""What a thread waits for before it reads tensors that another one's stream still computes.

With CUDA, and what torch has built alike, a thread has streams of its own, the default ones, which wait for no other
that training was given. Not run here, where there was none of these devices.
"""

from collections.abc import Iterable
from typing import Any

import torch


def streamed(tensors: Iterable[torch.Tensor]) -> set[torch.device]:
    """Return the devices of *tensors* that compute while Python goes on, in streams."""
    found = {tensor.device for tensor in tensors}
    return {device for device in found if device.type != "cpu" and hasattr(_module(device), "current_stream")}


def mark(devices: Iterable[torch.device]) -> list[Any]:
    """Mark, on each of *devices*, the end of what this thread has given it until now; for :func:`wait`."""
    return [_module(device).current_stream(device).record_event() for device in devices]


def wait(marks: Iterable[Any]) -> None:
    """Wait until what was given before *marks* is done."""
    for event in marks:
        event.synchronize()


def _module(device: torch.device) -> Any:
    return getattr(torch, device.type, None)  # such as torch.cuda
