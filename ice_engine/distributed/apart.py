"""All ranks wait in collectives of the user's own, and not in the same one: none of them will ever be joined.

Such as in a validation, where one rank has a micro-batch more: it gathers the parameters of its ``fully_shard``'ed
model, and the others sum up a metric. No rank is in a round then, and gloo would wait for half an hour.
"""

from ice_engine.distributed.suspects import PAIRS
from ice_engine.distributed.watch import Answer, Watch
from ice_engine.distributed.world import rank
from ice_engine.errors import RankError

_LONG = 12.0  # seconds in one collective, after which it is asked where the others are


class Apart:
    """Looks whether all ranks wait, and for different things.

    Args:
        watch: Knows where the other ranks are.
    """

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._at = Answer("")
        self._since = 0.0
        self._before: dict[int, Answer | None] = {}

    def look(self, at: Answer) -> None:
        """Raise RankError if this rank, which is *at* that place, waits there for ranks that will never come."""
        earlier, self._at = self._at, at
        if not at.collective or not at.waits_since(earlier):
            self._since, self._before = at.at, {}
            return
        if at.at - self._since < _LONG or self._watch.stopped():
            return
        answers, _ = self._watch.whereabouts()
        before, self._before = self._before, answers
        if not all(a and a.waits_since(before.get(r)) for r, a in answers.items()):
            return
        all_at = {r: a for r, a in sorted({**answers, rank(): at}.items()) if a is not None and a.collective}
        called = {a.collective for a in all_at.values()}
        if len(all_at) == len(answers) + 1 and len(called) > 1 and not called & PAIRS:
            where = "; ".join(f"rank {r} waits in {a.collective}(), called at {a.place}" for r, a in all_at.items())
            message = (
                f"{where}, and none comes to where another is. Call the same on every rank, equally often: a "
                "validation of a model that is fully_shard'ed needs as many micro-batches on each"
            )
            raise RankError(message)
