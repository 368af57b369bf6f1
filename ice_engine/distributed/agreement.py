"""Before ranks talk: are all of them here, and about the same thing?"""

import json

from ice_engine.distributed import world
from ice_engine.distributed.rounds import rounds
from ice_engine.errors import RankError


def announce(what: str, problem: str = "") -> None:
    """Wait until every rank says that it does *what*; the call before any collective of ours.

    Args:
        what: What follows, in the words of an error; the same on all ranks.
        problem: Why this rank cannot.

    Raises:
        RankError: On all ranks, if one does something else, does not come, or has a problem.
    """
    mine = json.dumps([what, problem])
    _check([json.loads(text) for text in (rounds().texts(mine, what) if world.world_size() > 1 else [mine])])


def _check(said: list[list[str]]) -> None:
    problems = {rank: problem for rank, (_, problem) in enumerate(said) if problem}
    if problems:
        rank, problem = next(iter(problems.items()))
        message = f"{said[rank][0]} failed on {world.listed(list(problems))}: {problem}"
        raise RankError(message)
    if len({what for what, _ in said}) > 1:
        other = next(rank for rank, (what, _) in enumerate(said) if what != said[0][0])
        message = (
            f"ranks do different things at the same time: rank 0 {said[0][0]}, rank {other} {said[other][0]}. "
            "Let all ranks make the same calls in the same order"
        )
        raise RankError(message)
