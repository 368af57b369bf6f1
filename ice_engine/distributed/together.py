"""A step that all ranks take or none: what fails on one of them is an error on all, and nobody waits for ever."""

import base64
import contextlib
import functools
import gc
import io
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from ice_engine.distributed import world
from ice_engine.distributed.rounds import rounds
from ice_engine.errors import CheckpointError, IceEngineError, RankError

T = TypeVar("T")


@functools.cache
def _group_of(_default: dist.ProcessGroup) -> dist.ProcessGroup:
    return cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=world.PATIENCE))


def group() -> dist.ProcessGroup | None:
    """Return a gloo group of all ranks for torch's own collectives on checkpoints; None with one process.

    Not that of the rounds: when a rank is gone, this one has to be closed for the others to notice.
    """
    return _group_of(dist.group.WORLD) if world.world_size() > 1 else None


@contextlib.contextmanager
def connected(doing: str) -> Iterator[None]:
    """Turn a connection lost inside, in a collective of torch's, into an error that says what was being done.

    Raises:
        CheckpointError: If another rank is gone, or this one is short of memory.
    """
    if world.world_size() == 1:
        yield
        return
    try:
        with rounds().transfer():
            yield
    except (MemoryError, RuntimeError) as err:  # RankError, or what this rank has no memory for
        _hang_up(err.__cause__ or err)
        message = f"{doing}: {reason(err)}"
        raise CheckpointError(message) from err


def _hang_up(err: BaseException) -> None:
    # Ranks that wait for this one, not for the one that is gone, hear of it only as this connection closes. Gloo closes
    # it when nothing refers to the group any more: neither destroying nor aborting it does, and a traceback refers.
    traceback.clear_frames(err.__traceback__)
    if _group_of.cache_info().currsize:
        dist.destroy_process_group(group())
    _group_of.cache_clear()
    gc.collect()


def gather(doing: str, text: str) -> list[str]:
    """Return every rank's *text*, in the order of ranks.

    Raises:
        CheckpointError: If another rank is gone, or does something else.
    """
    if world.world_size() == 1:
        return [text]
    try:
        return rounds().texts(text, doing)
    except RankError as err:
        message = f"{doing}: {err}"
        raise CheckpointError(message) from err


def gather_plain(doing: str, value: Any) -> list[Any]:
    """Return every rank's plain *value*, in the order of ranks.

    Raises:
        CheckpointError: If another rank is gone, or does something else.
    """
    if world.world_size() == 1:
        return [value]
    buffer = io.BytesIO()
    torch.save(value, buffer)
    texts = gather(doing, base64.b64encode(buffer.getvalue()).decode())
    return [torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True) for text in texts]


def agree(doing: str, text: str) -> None:
    """Meet all ranks; all must come with the same *text*.

    Raises:
        CheckpointError: If one comes with another, or does not come.
    """
    texts = gather(doing, text)
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
    reasons = gather(doing, "" if failure is None else reason(failure))
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
