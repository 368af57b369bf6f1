"""Before ranks talk: are all of them here, and about the same thing?"""

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
    said = rounds().texts(problem, what) if world.world_size() > 1 else [problem]
    problems = {rank: text for rank, text in enumerate(said) if text}
    if problems:
        message = f"{what} failed on {world.listed(list(problems))}: {next(iter(problems.values()))}"
        raise RankError(message)
