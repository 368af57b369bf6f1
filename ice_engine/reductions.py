"""What all ranks of one engine reduce in a micro-batch: each loss in the same turn, with zeros from who has none.

Before a window's first loss, ranks tell each other the unit of its weights. Where there are several optimizers, or one
more loss, they say before each reduction whose it is.
"""

from collections.abc import Sequence

from ignite.engine import Engine

from ice_engine.distributed.rounds import Kind, Row, rounds
from ice_engine.distributed.synchroniser import Synchroniser
from ice_engine.isolation import gradients_aside
from ice_engine.member import Member, syncs_of


class Reductions:
    """Keeps the reductions of one engine's optimizers together.

    Args:
        engine: The engine of this rank.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._rounds = rounds()
        self._members: list[Member] = []
        self._expected: list[Member] = []  # which all ranks reduce in this micro-batch
        self._reducing = False
        self._joined: set[int] = set()  # optimizers, by number, that this rank has reduced zeros of in this micro-batch
        self._passed: list[Synchroniser] = []  # what no rank has had a loss for in this micro-batch
        self._before: list[int] = []

    def _unit_of(self, member: Member, first: float) -> float:
        """Return the unit of *member*'s weights: the largest of the ranks' first ones, one and the same for all."""
        weighted = bool(member.window.weighted)
        if weighted or not member.met:
            self._tell_unit(member, first if weighted else 0.0, unweighted=not weighted)
        return member.window.common if weighted else first

    def _tell_unit(self, member: Member, weight: float, *, unweighted: bool = False) -> list[Row]:
        row = [self._members.index(member), weight, float(unweighted)]
        rows = self._rounds.exchange(Kind.UNIT, row, f"the first loss of {member.name!r}")
        self._take_unit(rows)
        return rows

    def _take_unit(self, rows: Sequence[Row]) -> bool:
        said = [row for row in rows if row[0] == Kind.UNIT]
        for index in {int(row[1]) for row in said}:
            member, window = self._members[index], self._members[index].window
            window.common = max(row[2] for row in said if row[1] == index)
            member.unweighted |= any(row[3] for row in said if row[1] == index)
            window.unit = window.unit or window.common
            window.decide(window.common)
        return bool(said)

    def _meet(self, member: Member) -> None:
        """Meet all ranks before a backward of *member* that reduces, which may be of another one on others, or of none.

        Then the one that was attached first goes first, and whoever is not there takes part with zeros.
        """
        if not (self._reducing and member.sync.reduces and member.sync.follows):
            return
        if not self._several and member.sync in self._waiting():
            return  # all come to it
        own = self._members.index(member)
        while True:
            rows = self._rounds.exchange(Kind.AGAIN, [own], "a loss of a micro-batch that reduces")
            if not self._take_unit(rows):
                if min(_said(rows)) == own:
                    return
                self._take_part_again(rows)

    def _take_part(self, sync: Synchroniser) -> None:
        """Do without a loss what the others do with one: tell the unit of a first loss, reduce."""
        for member in self._expected:
            while member.sync is sync and not member.met:
                rows = self._tell_unit(member, 0.0)
                if {row[1] for row in rows if row[0] == Kind.UNIT} == {self._members.index(member)}:
                    break  # else others were at the first loss of another optimizer
        self._joined |= {index for index, member in enumerate(self._members) if member.sync is sync}
        if sync.follows:
            sync.take_part()
        else:
            self._pass_over(sync)

    def _take_parts(self) -> None:
        """Take part in the reductions of several optimizers that this rank has had no backward for."""
        waiting = {self._members.index(member) for member in self._expected} - self._done()
        while waiting:
            rows = self._rounds.exchange(Kind.PART, doing="the end of a micro-batch that reduces")
            if not self._take_unit(rows):
                chosen = min(_said(rows) or waiting)  # where no rank has a loss, what was accumulated is reduced
                self._reduce_zeros(chosen)
                waiting.discard(chosen)

    def _take_part_again(self, rows: Sequence[Row]) -> bool:
        """Reduce zeros, where other ranks reduce one more loss of the micro-batch that this one is through with."""
        again = _said(rows)
        if again:
            self._reduce_zeros(min(again))
        return bool(again)

    def _reduce_zeros(self, index: int) -> None:
        """Take part in what the loss of an optimizer, by number, reduces: its own gradients, and no other's."""
        member = self._members[index]
        beside = [other for other in self._members if other is not member and other.sync is member.sync]
        with gradients_aside(parameter for other in beside for parameter in other.parameters()):
            member.sync.take_part()
        self._joined.add(index)
        member.touched()

    def _pass_over(self, sync: Synchroniser) -> None:
        """Meet all ranks in a micro-batch without a loss for *sync*; one that has one does not come, and is named."""
        names = " and ".join(repr(member.name) for member in self._members if member.sync is sync)
        doing = (
            f"the end of {self._place(Kind.GATE)}, without a backward() through the model of optimizer {names} (one "
            "that is fully_shard'ed needs it on all ranks or on none, with weight=0 where there is nothing to learn)"
        )
        while self._take_unit(self._rounds.exchange(Kind.PART, doing=doing)):
            pass
        self._passed.append(sync)

    def _has_reduced(self, member: Member) -> bool:
        """Whether the backward passes of this micro-batch have reduced for *member*."""
        return self._reducing and member in self._expected and member.sync not in self._passed

    def _waiting(self) -> list[Synchroniser]:
        """What the other ranks reduce with in this micro-batch, and this one has not had a backward for."""
        done = {id(self._members[index].sync) for index in self._done()}
        return [sync for sync in syncs_of(self._expected) if id(sync) not in done]

    def _done(self) -> set[int]:
        """The optimizers, by number, that this rank had a backward for in this micro-batch, or has taken part in."""
        counts = zip(self._members, self._before, strict=False)
        return self._joined | {index for index, (m, before) in enumerate(counts) if m.differentiated > before}

    @property
    def _several(self) -> bool:
        """Whether there are several optimizers, whose reductions ranks with fewer losses could take for each other."""
        return len(self._members) > 1 and not any(m.sync.together for m in self._members)

    def _syncs(self) -> list[Synchroniser]:
        return syncs_of(self._members)

    def _switch(self, closing: Sequence[Member] = ()) -> None:
        on = {id(m.sync) for m in closing}
        for sync in self._syncs():
            sync.on(id(sync) in on)

    def _place(self, kind: Kind) -> str:
        state = self._engine.state
        if kind is Kind.RUN_END:
            return "the end of the run"
        if kind in {Kind.EPOCH_START, Kind.EPOCH_END}:
            return f"the {'end' if kind is Kind.EPOCH_END else 'beginning'} of epoch {state.epoch}"
        return f"iteration {state.iteration} (epoch {state.epoch})"


def _said(rows: Sequence[Row]) -> set[int]:
    """The optimizers, by number, that some rank is about to reduce."""
    return {int(row[1]) for row in rows if row[0] == Kind.AGAIN}
