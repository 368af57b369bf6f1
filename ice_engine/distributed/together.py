"""A step that all ranks take or none: what fails on one of them is an error on all, and nobody waits for ever."""

import contextlib
import datetime
import functools
import gc
import re
import traceback
from collections.abc import Callable, Iterator
from typing import TypeVar, cast

import torch.distributed as dist

from ice_engine.distributed import world
from ice_engine.errors import CheckpointError, IceEngineError

T = TypeVar("T")

# For the slowest disk. A rank that is gone is noticed at once, as its connection closes.
_PATIENCE = datetime.timedelta(minutes=10)


@functools.cache
def _group_of(_default: dist.ProcessGroup) -> dist.ProcessGroup:
    # A rank may write for minutes while others wait, so not the group of the windows, whose patience is shorter.
    return cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=_PATIENCE))


def group() -> dist.ProcessGroup | None:
    """Return the gloo group of all ranks in which a checkpoint is spoken of; None with one process."""
    return _group_of(dist.group.WORLD) if world.world_size() > 1 else None


@contextlib.contextmanager
def connected(doing: str) -> Iterator[None]:
    """Turn a lost connection inside into an error that says what was being done.

    Raises:
        CheckpointError: If another rank is gone or does not answer.
    """
    try:
        yield
    except RuntimeError as err:
        if world.world_size() == 1:
            raise
        _hang_up(err)
        message = (
            f"{doing}: rank {world.rank()} lost another of the {world.world_size()} ranks, which has ended or does not "
            f"answer ({_brief(err)}). Start all ranks again"
        )
        raise CheckpointError(message) from err


def _hang_up(err: BaseException) -> None:
    # Ranks that wait for this one, not for the one that is gone, hear of it only as this connection closes. Gloo closes
    # it when nothing refers to the group any more: neither destroying nor aborting it does, and a traceback refers.
    traceback.clear_frames(err.__traceback__)
    if _group_of.cache_info().currsize:
        dist.destroy_process_group(group())
    _group_of.cache_clear()
    gc.collect()


def _brief(err: BaseException) -> str:
    # Gloo begins with a place in its source, and ends with advice.
    return re.sub(r"^\[\S+\] ", "", str(err).splitlines()[0]).partition(". This is")[0]


def gather(text: str) -> list[str]:
    """Return every rank's *text*, in the order of ranks."""
    if world.world_size() == 1:
        return [text]
    texts = [""] * world.world_size()
    dist.all_gather_object(texts, text, group=group())
    return texts


def agree(doing: str, text: str) -> None:
    """Meet all ranks; all must come with the same *text*.

    Raises:
        CheckpointError: If one comes with another, or does not come.
    """
    own = world.gatherer()
    if own is None:
        return
    try:
        # Of the windows' group and shorter patience: nobody is writing yet, and the other group may not exist.
        texts = own(text)
    except RuntimeError as err:
        message = (
            f"{doing}: rank {world.rank()} waited in vain for the other ranks ({_brief(err)}). "
            "Call it on every rank, not on one only"
        )
        raise CheckpointError(message) from err
    for rank, other in enumerate(texts):
        if other != texts[0]:
            message = f"{doing} differs between ranks: {texts[0]} on rank 0, {other} on rank {rank}; give all the same"
            raise CheckpointError(message)


def together(doing: str, step: Callable[[], T]) -> T:
    """Take *step* on this rank, and return what it returns if all ranks got through theirs.

    Args:
        doing: What it does, for an error.
        step: Talks to no other rank.

    Raises:
        CheckpointError: On every rank, with the reason of each that failed.
    """
    result: T | None = None
    failure: Exception | None = None
    try:
        result = step()
    except Exception as err:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
        failure = err
    with connected(doing):
        reasons = gather("" if failure is None else reason(failure))
    fail_if(doing, dict(enumerate(reasons)), failure)
    return cast("T", result)


def reason(error: BaseException) -> str:
    """Return what *error* says; of one that is not ours or the system's, what it is too."""
    return str(error) if isinstance(error, IceEngineError | OSError) else f"{type(error).__name__}: {error}"


def fail_if(doing: str, reasons: dict[int, str], cause: BaseException | None) -> None:
    """Raise the same error on every rank if any of them has a reason to.

    Raises:
        CheckpointError: With all *reasons* by rank; what all ranks say is said once.
    """
    failed = {rank: why for rank, why in reasons.items() if why}
    if not failed:
        return
    if len(failed) == world.world_size() and len(set(failed.values())) == 1:
        text = next(iter(failed.values()))
    else:
        text = "; ".join(f"rank {rank}: {why}" for rank, why in sorted(failed.items()))
    message = f"{doing}: {text}"
    raise CheckpointError(message) from cause
