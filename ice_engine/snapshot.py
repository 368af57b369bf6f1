"""A copy of a state in memory that is this process's own, most of it made while training goes on.

Parameters and what an optimizer keeps for them change in ``optimizer.step()`` and nowhere else. So they are copied by
another thread during the next forward and backward, and the next step waits for it, if it must. Everything else, such
as the buffers of batch norm, is copied at once. The memory of one snapshot is that of the next.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from ice_engine.batches import replaced
from ice_engine.errors import CheckpointError
from ice_engine.norms import local_part
from ice_engine.streams import mark, streamed, wait

_Key = tuple[Any, ...]


class Snapshots:
    """Makes snapshots one after the other, in the same memory: one copy of the state, in the host's."""

    def __init__(self) -> None:
        self._memory: dict[_Key, torch.Tensor] = {}

    def take(self, state: Mapping[str, Any], later: Iterable[torch.Tensor]) -> "Snapshot":
        """Begin a snapshot of *state*.

        Args:
            state: Plain data; containers are new already.
            later: Tensors that only ``optimizer.step()`` changes.
        """
        addresses = {tensor.untyped_storage().data_ptr() for tensor in later if _has_storage(tensor)}
        copies: dict[_Key, torch.Tensor] = {}
        waiting: list[tuple[torch.Tensor, torch.Tensor, str]] = []

        def copy(tensor: torch.Tensor, path: str) -> torch.Tensor:
            if tensor.layout is not torch.strided:  # a sparse one has no memory that could be filled again
                return tensor.clone().cpu()
            key = _key(tensor)
            if key not in copies:  # tied weights are one
                room = self._memory.get(key)
                copies[key] = torch.empty_like(tensor, device="cpu") if room is None else room
                if tensor.untyped_storage().data_ptr() in addresses:
                    waiting.append((copies[key], tensor, path))
                else:
                    copies[key].copy_(tensor)
            return copies[key]

        whole = replaced(state, copy)
        self._memory = copies
        return Snapshot(whole, waiting)


class Snapshot:
    """A state of which parts are still to be copied.

    Args:
        state: The copy.
        waiting: Tensors of the copy with what they are to hold, and their place in the state.
    """

    def __init__(self, state: dict[str, Any], waiting: list[tuple[torch.Tensor, torch.Tensor, str]]) -> None:
        self._state = state
        self._waiting = waiting
        self._versions = [_version(source) for _, source, _ in waiting]
        self._marks = mark(streamed(source for _, source, _ in waiting))
        self._copied = threading.Event()

    def complete(self) -> dict[str, Any]:
        """Copy what is left, on whatever thread this is, and return the state.

        Raises:
            CheckpointError: If something was changed meanwhile by anything but ``optimizer.step()``.
        """
        try:
            wait(self._marks)
            for (target, source, path), version in zip(self._waiting, self._versions, strict=True):
                target.copy_(source)
                if _version(source) != version:
                    message = (
                        f"state{path} was changed in place while it was copied, outside of optimizer.step(); change "
                        "parameters in a handler of OPTIMIZER_STEP_COMPLETED, or save with background=False"
                    )
                    raise CheckpointError(message)
        finally:
            self._waiting = []
            self._copied.set()
        return self._state

    def wait(self) -> None:
        """Wait until nothing is left to be copied, for as long as copying takes."""
        self._copied.wait()


def changed_by_steps(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """Yield the parameters of *optimizer* and the tensors of its state; of DTensors, what this rank has of them."""
    for group in optimizer.param_groups:
        yield from map(local_part, group["params"])
    for state in optimizer.state.values():
        yield from (local_part(value) for value in state.values() if isinstance(value, torch.Tensor))


def _has_storage(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.numel() > 0


def _key(tensor: torch.Tensor) -> _Key:
    place = tensor.data_ptr() if _has_storage(tensor) else id(tensor)
    return place, tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001 - has no public name
