"""Who trains together: this process's rank, how many there are, and a group of our own to talk to them."""

import datetime
import functools
from collections.abc import Callable
from typing import cast

import torch
import torch.distributed as dist

from ice_engine.errors import AttachError

_PATIENCE = datetime.timedelta(seconds=60)


def world_size() -> int:
    """Number of processes that train together; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gatherer() -> Callable[[str], list[str]] | None:
    """Return the function that gives every rank's text to every rank, in the order of ranks; None with one process."""
    return _gather_texts if world_size() > 1 else None


@functools.cache
def _group_of(_world: int) -> dist.ProcessGroup:
    # Not the user's group: its collectives may be under way on another thread or device, and it may wait for 30 min.
    return cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=_PATIENCE))


def own_group() -> dist.ProcessGroup:
    """Return a gloo group of all ranks that nobody else uses; made at the first call, which all ranks must make."""
    return _group_of(world_size())


def _gather_texts(text: str) -> list[str]:
    group, data = own_group(), text.encode()
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor([len(data)]), group=group)
    longest = max(int(length) for length in lengths)
    padded = torch.frombuffer(bytearray(data.ljust(longest)), dtype=torch.uint8)
    texts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(texts, padded, group=group)
    return [bytes(t[: int(n)].tolist()).decode() for t, n in zip(texts, lengths, strict=True)]


def require_one_process(what: str) -> None:
    """Refuse *what* where its gradients would be those of one rank only.

    Raises:
        AttachError: If the world has more than one rank.
    """
    if world_size() > 1:
        message = (
            f"{what} runs in one process so far; this is rank {rank()} of {world_size()}. "
            "Windows that are exact over many ranks are not implemented yet; run one process"
        )
        raise AttachError(message)
