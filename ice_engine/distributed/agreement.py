"""Before ranks talk: are all of them here, and about the same thing?"""

import datetime
import json
from typing import Any

import torch.distributed as dist

from ice_engine.distributed import world
from ice_engine.errors import RankError

PATIENCE = 10.0  # seconds that ranks may come apart
_announced = 0  # how often all ranks met here


def announce(what: str, problem: str = "") -> None:
    """Wait until every rank says that it does *what*; the call before any collective of ours.

    Over the store that the ranks found each other by: unlike a collective that failed, it can be used again.

    Args:
        what: What follows, in the words of an error; the same on all ranks.
        problem: Why this rank cannot.

    Raises:
        RankError: On all ranks that came, if one does not, says something else, or has a problem.
    """
    global _announced  # noqa: PLW0603 - a count of this process, as its ranks are
    if world.world_size() == 1:
        if problem:
            message = f"{what}: {problem}"
            raise RankError(message)
        return
    store = dist.distributed_c10d._get_default_store()  # noqa: SLF001 - there is no public way to it
    mine, ranks = world.rank(), range(world.world_size())
    keys = [f"ice_engine/{_announced}/{rank}" for rank in ranks]
    store.set(keys[mine], json.dumps([what, problem]))
    missing = _missing(store, keys)
    if missing:
        # Withdrawn, so that nobody who comes later takes it for an answer.
        store.delete_key(keys[mine])
        message = (
            f"{what} is for all ranks together, but rank {mine} waited {PATIENCE:g} s for {_listed(missing)}. Call it "
            f"on every rank, outside of any `if rank == 0:`; if it is, look at the output of {_listed(missing)}"
        )
        raise RankError(message)
    said = [json.loads(store.get(key)) for key in keys]
    if _announced:
        # All ranks are here, so all have read what was said before.
        store.delete_key(f"ice_engine/{_announced - 1}/{mine}")
    _announced += 1
    _check(said)


def _missing(store: Any, keys: list[str]) -> list[int]:
    try:
        store.wait(keys, datetime.timedelta(seconds=PATIENCE))
    except RuntimeError:  # it waited long enough
        return [rank for rank, key in enumerate(keys) if not store.check([key])]
    return []


def _check(said: list[list[str]]) -> None:
    problems = {rank: problem for rank, (_, problem) in enumerate(said) if problem}
    if problems:
        rank, problem = next(iter(problems.items()))
        message = f"{said[rank][0]} failed on {_listed(list(problems))}: {problem}"
        raise RankError(message)
    if len({what for what, _ in said}) > 1:
        other = next(rank for rank, (what, _) in enumerate(said) if what != said[0][0])
        message = (
            f"ranks do different things at the same time: rank 0 {said[0][0]}, rank {other} {said[other][0]}. "
            "Let all ranks make the same calls in the same order"
        )
        raise RankError(message)


def _listed(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
