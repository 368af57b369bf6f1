"""Who trains together: this process's rank, how many there are, and a group of our own to talk to them."""

import datetime
import os
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, cast

import torch.distributed as dist

from ice_engine.errors import AttachError, warn

# For a rank that is slow, as torch has it. One that is dead, stopped or elsewhere is found in seconds, see watch.py.
PATIENCE = datetime.timedelta(minutes=30)

T = TypeVar("T")


class OfGroup(Generic[T]):
    """One object for the default process group there is, made when it is first asked for, and anew with the group.

    Args:
        make: Makes it.
        close: Is called with the one of a group that is gone, before another is made.

    Attributes:
        made: The last one; None before the first.
    """

    def __init__(self, make: Callable[[], T], close: Callable[[T], object] = bool) -> None:
        self._make, self._close = make, close
        self._group: object = None
        self.made: T | None = None

    def get(self) -> T:
        """Return it."""
        if self.made is None or self._group is not dist.group.WORLD:
            if self.made is not None:
                self._close(self.made)
            self.made, self._group = self._make(), dist.group.WORLD
        return self.made


def world_size() -> int:
    """Number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def warn_if_alone() -> None:
    """Warn where a launcher started several processes, which do not know of each other."""
    started = os.environ.get("WORLD_SIZE", "")
    if started.isdecimal() and int(started) > 1 and not dist.is_initialized():
        warn(
            f"this is process {os.environ.get('RANK', '?')} of WORLD_SIZE={started}, and there is no process group: "
            "each trains a model of its own. Before the optimizer is made, call "
            "torch.distributed.init_process_group(), or run under idist.Parallel(backend=...)"
        )


def listed(ranks: Sequence[int]) -> str:
    """Return *ranks* as a message names them: ``rank 1``, ``ranks 1, 2``."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


# Not the user's group: its collectives may be under way on another thread or device.
_own = OfGroup(lambda: cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=PATIENCE)))


def own_group() -> dist.ProcessGroup:
    """Return a gloo group of all ranks that nobody else uses; the first call is one that all ranks must make."""
    return _own.get()


def require_one_process(what: str, *, attached: bool) -> None:
    """Refuse *what* where it would be about one rank only, of an optimizer that is *attached* to an engine or is not.

    Raises:
        AttachError: If the world has more than one rank.
    """
    if world_size() > 1:
        mend = (
            "Take it out: the engine that the optimizer is attached to steps on all ranks at once"
            if attached
            else "In many, attach the optimizer to an engine, with the module that joins the ranks: "
            "optimizer.attach(engine, model=DistributedDataParallel(...))"
        )
        message = f"{what} is for one process; this is rank {rank()} of {world_size()}. {mend}"
        raise AttachError(message)
