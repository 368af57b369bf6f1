"""Whether a rank that is waited for will ever come, by where it is and what has become of its process."""

import logging

from ice_engine.distributed.watch import Answer
from ice_engine.distributed.world import listed, rank
from ice_engine.errors import RankError

logger = logging.getLogger(__name__)

_STUCK = 15.0  # seconds after which several ranks in collectives of their own count as stuck
_SILENT = 120.0  # without an answer, of a rank on another host: a call into C may keep its interpreter, as a sort does

PAIRS = {"send", "recv", "isend", "irecv", "batch_isend_irecv", "send_object_list", "recv_object_list"}
"""What two ranks call in different lines, and the others not at all, for as long as there is to send."""


class Suspects:
    """Who is waited for, from one look to the next.

    Args:
        in_round: Whether this rank waits in a round, where all that are not in a collective of their own would come.
    """

    def __init__(self, *, in_round: bool) -> None:
        self._in_round = in_round
        self._before: dict[int, Answer | None] = {}
        self._silent: dict[int, float] = {}
        self._said: set[str] = set()

    def look(self, answers: dict[int, Answer | None], fates: dict[int, str], waited: float, doing: str) -> None:
        """Raise RankError if somebody will never come; log whom we wait for otherwise.

        Args:
            answers: Where the other ranks are; None for one that did not answer.
            fates: What has become of the processes of some of them.
            waited: Seconds so far.
            doing: Where this rank waits.
        """
        for r, fate in fates.items():
            if fate in {"is stopped", "is gone"}:
                why = "by SIGSTOP or Ctrl-Z?" if fate == "is stopped" else "it does not answer any more: killed?"
                message = f"rank {r} {fate}, {why} The others wait for it at {doing}, and nobody goes on without it"
                raise RankError(message)
        self._silent = {r: self._silent.get(r, waited) for r, fate in fates.items() if fate == "unknown"}
        silent = [r for r, since in self._silent.items() if waited - since > _SILENT]
        if silent:
            seconds = waited - min(self._silent[r] for r in silent)
            message = f"{listed(silent)} did not answer for {seconds:.0f} s at {doing}: stopped, dead or out of reach"
            raise RankError(message)
        away = {r: a for r, a in answers.items() if a is not None and a.collective}
        same = {r: a for r, a in away.items() if a.waits_since(self._before.get(r))}
        reducing = {r: a for r, a in answers.items() if a is not None and a.reduction and r not in away}
        # One that computes may come to where those are, which may have a group of their own.
        computing = [r for r, a in answers.items() if r not in same and r not in reducing and not (a and a.with_us)]
        alone = len(same) == 1 and not reducing and self._in_round
        exchange = len(same) > 1 and {a.collective for a in same.values()} <= PAIRS
        if same and not (computing or exchange) and (alone or waited > _STUCK):
            where = "; ".join(f"rank {r} waits in {a.collective}(), called at {a.place}" for r, a in same.items())
            message = (
                f"{where}, and nobody else comes there: the others are at {doing}. "
                "Call it on every rank, or on none: a handler on one rank only must not communicate"
            )
            raise RankError(message)
        if reducing and self._in_round and waited > _STUCK:
            where = "; ".join(f"rank {r} is in {a.reduction}, at {a.place}" for r, a in reducing.items())
            message = (
                f"{where}, and waits for all ranks there, while others are at {doing}. Call backward() of the "
                "optimizers in the same order on every rank, and, if there are several, equally often"
            )
            raise RankError(message)
        for r, answer in answers.items():
            text = f"rank {r}, which is at {answer.place}" if answer else f"rank {r}, which does not answer"
            if text not in self._said and not (answer and answer.with_us):
                self._said.add(text)
                logger.warning("rank %d waits at %s for %.0f s, perhaps for %s", rank(), doing, waited, text)
        self._before = answers
