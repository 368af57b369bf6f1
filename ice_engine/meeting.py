"""What all ranks of one engine say to each other about its optimizers' windows, and do then: the same on each.

The *gate* comes before the micro-batch in which a window closes, and where an epoch or a run begins or ends; another
round closes a window. See peers.py for when.
"""

import functools
import json
import zlib
from collections.abc import Callable, Sequence
from typing import Protocol

from ignite import distributed as idist
from ignite.engine import Engine

from ice_engine.alike import CloseRow, check_close, check_gate, check_update
from ice_engine.distributed.agreement import announce
from ice_engine.distributed.rounds import Kind, Row
from ice_engine.errors import ArgumentValueError, AttachError
from ice_engine.member import SPOILED, Member
from ice_engine.reductions import Reductions

UNKNOWN = -1.0  # length of an epoch
_MANY = 32  # optimizers on one engine: what a row has room for


class Saver(Protocol):
    """What all ranks save together."""

    agreed: bool
    """Whether a rank has asked for a save, at a gate that all have gone through."""

    @property
    def asks(self) -> bool:
        """Whether this rank asks for one."""

    def on_edge(self, engine: Engine) -> None:
        """Save, if that is wanted; called where this rank, at the end of its data, has closed windows with others."""


class Meeting(Reductions):
    """Windows of one engine's optimizers, open and closed as all ranks say.

    Args:
        engine: The engine of this rank.

    Attributes:
        savers: What all ranks save together, in the same order on each.
        wants_stop: Returns whether this rank wants the run to stop at the next window's edge.
        stop_wanted: Whether a rank does; known to all of them before the micro-batch in which a window closes.
        counts_alike: Whether all were at the same iteration when they last said where they are: not since an epoch that
            ended earlier on some.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        # Ignite's first question for the rank is a collective; asked later, in a handler on one rank, it would hang.
        announce("attach() of the first optimizer of an engine")
        idist.sync()
        self._length: int | None = None  # of an epoch, if all ranks end it at the same micro-batch
        self._position = 0
        self._closing: list[Member] = []
        self.savers: list[Saver] = []
        self.wants_stop: Callable[[], bool] = bool
        self.stop_wanted = self._inside = self._updates = False
        self.counts_alike = True

    @property
    def in_step(self) -> bool:
        """Whether all ranks come to the end of their epoch with the same micro-batch."""
        return self._length is not None

    @property
    def inside(self) -> bool:
        """Whether a window is open on some rank, or where nobody knows, whether one may be until the next gate."""
        return any(m.begun for m in self._members) if self._counts_together else self._inside

    @property
    def _counts_together(self) -> bool:
        """Whether all know how many micro-batches the rank that is ahead has begun: in step, or by their updates."""
        return self.in_step or self._updates

    def join(self, member: Member) -> None:
        """Take an optimizer in.

        Raises:
            ArgumentValueError: If there are too many.
        """
        if len(self._members) == _MANY:
            message = f"at most {_MANY} optimizers on one engine in many processes; this would be one more"
            raise ArgumentValueError(message)
        for other in self._members:
            if other.sync.model is member.sync.model:
                if getattr(member.sync.model, "gradient_as_bucket_view", False):
                    message = (
                        f"optimizers {other.name!r} and {member.name!r} train one DistributedDataParallel whose "
                        "gradients are views of its buckets, into which each one's loss would write; make it without "
                        "gradient_as_bucket_view"
                    )
                    raise AttachError(message)
                member.sync = other.sync  # one switch for one model
        self._members.append(member)
        member.meet = functools.partial(self._meet, member)
        member.window.unit_of = functools.partial(self._unit_of, member)
        member.window.ranks = len(member.sync.ranks)
        member.end_micro_batch = functools.partial(self._end_micro_batch, member)

    def _gate(self, kind: Kind, closing: Sequence[Member] = (), *more: float) -> list[Row]:
        """Say where this rank is, until all say something that a window can close at."""
        after = 2 + 2 * len(self._members)
        while True:
            length = self._engine.state.epoch_length
            has = [(m in closing, m.window.micro_batches + m.window.pending) for m in self._members]
            saves = sum(1 << i for i, saver in enumerate(self.savers) if saver.asks)
            stops, iteration = float(self.wants_stop()), self._engine.state.iteration
            row = [UNKNOWN if length is None else length, *sum(has, ()), stops, saves, iteration, *more]
            rows = self._rounds.exchange(kind, row, self._place(kind))
            if self._take_unit(rows) or self._take_part_again(rows):
                continue
            check_gate(rows, self._members, self._engine.state.epoch)
            self._share([row[1] for row in rows], [row[after + 2] for row in rows])
            kinds = {row[0] for row in rows}
            if Kind.UPDATE in kinds:
                self._updates = True
            else:
                # Saves and stops wait for a micro-batch's end, or an epoch's.
                self.stop_wanted = any(row[after] for row in rows)
                for i, saver in enumerate(self.savers):
                    saver.agreed |= any(int(row[after + 1]) >> i & 1 for row in rows)
                for i, member in enumerate(self._members):
                    member.begun = int(max(row[3 + 2 * i] for row in rows))
            if kind in {Kind.UPDATE, Kind.EDGE}:
                return rows
            if not kinds & {Kind.UPDATE, Kind.EDGE}:
                break
            for member in self._members_of(rows, 2):
                self._close(member)
            if Kind.EDGE in kinds and Kind.RUN_END not in kinds:
                for saver in self.savers:
                    saver.on_edge(self._engine)
        if Kind.EPOCH_END in kinds and kinds & {Kind.GATE, Kind.EPOCH_LAST}:
            self._length = None
        self._inside = self._may_be_open(rows, kinds)
        return rows

    def _end_micro_batch(self, member: Member) -> bool:
        """Step with the others if a window of *member* is full on any of the ranks that call ``update()``."""
        if not self._several and member.sync in self._waiting():
            self._take_part(member.sync)
        own = self._members.index(member)
        rows = self._gate(Kind.UPDATE, [member] if member.window.is_full else [], own)
        check_update([int(row[5 + 2 * len(self._members)]) for row in rows if row[0] == Kind.UPDATE], self._members)
        member.updated, member.begun = True, int(max(row[3 + 2 * own] for row in rows))
        if member not in self._members_of(rows, 2):
            member.touched()
            return False
        return self._close(member, reduced=self._has_reduced(member), in_epoch=True)

    def _share(self, lengths: Sequence[float], iterations: Sequence[float]) -> None:
        """Let the schedules of every rank go by the longest epoch, if all are known, and by the rank that is ahead."""
        self.counts_alike = len({*iterations}) == 1
        for member in self._members:
            member.common["epoch_length"] = None if UNKNOWN in lengths else int(max(lengths))
            member.common["iteration"] = int(max(iterations))

    def _may_be_open(self, rows: Sequence[Row], kinds: set[float]) -> bool:
        """Whether a window may be open on some rank between the step that comes now, if any, and the next gate."""
        if Kind.GATE in kinds:
            return len(self._members_of(rows, 2)) < len(self._members)
        return Kind.RUN_END not in kinds and any(m.window.tail == "carry" for m in self._members_of(rows, 3))

    def _go_along(self, kind: Kind, going: set[Kind]) -> list[Row]:
        """Say at *kind* that this rank has no more data, while any that has is *going*."""
        rows = self._gate(kind)
        while (kinds := {row[0] for row in rows}) & going and Kind.RUN_END not in kinds:
            rows = self._gate(kind)
        return rows

    def _close(
        self,
        member: Member,
        *,
        reduced: bool = False,
        at_end: bool = False,
        leaving: bool = False,
        over: bool = False,
        in_epoch: bool = False,
    ) -> bool:
        window = member.window
        last = self._position == self._length and window.tail == "step" and window.is_open and not in_epoch
        values = member.values()
        digest = zlib.crc32(json.dumps(values).encode())
        while True:
            own = CloseRow(
                member=self._members.index(member),
                full=float(window.is_full or last),
                weight=window.weight,
                weighted=-1.0 if window.weighted is None else float(window.weighted),
                digest=digest,
                unit=window.unit,
                micro_batches=window.micro_batches,
                leaving=float(leaving),
                spoiled=float(over and member.is_spoiled()),
                beside=float(member.precision.open_beside),
            )
            told = self._rounds.exchange(Kind.CLOSE, own, self._place(Kind.CLOSE))
            if not (self._take_unit(told) or self._take_part_again(told)):
                break  # else a rank without data is here, and the others at their first loss, or at one more
        rows = [CloseRow.of(row) for row in told]
        check_close(rows, member, self._members, self._rounds, values)
        if any(row.leaving for row in rows):
            self._length = None
        if not (at_end or any(row.full for row in rows)):
            # No rank had a loss for it in this iteration, one has stopped in it, or the first loss has told that its
            # windows are longer.
            member.begun = int(max(row.micro_batches for row in rows))
            self._inside |= member.begun > 0
            member.touched()
            return False
        member.begun = 0
        member.precision.elsewhere = any(row.beside for row in rows)
        if any(row.spoiled for row in rows):
            member.discard(SPOILED)
            member.let_go()
            member.precision.close()  # also where it was not open
            return False
        # A rank without a loss has no unit, and takes that of the others, whose gradients it gets.
        window.unit = window.unit or max(row.unit for row in rows)
        window.share(sum(rows[r].weight for r in member.sync.ranks), window.ranks)
        self._rounds.guard.enter(f"the step of {self._place(Kind.CLOSE)}", collectives=False)
        if reduced:
            member.sync.complete(member.parameters())
        else:
            member.sync.reduce(member.parameters())
        member.sync.send_buffers()
        stepped = member.close()
        self._rounds.guard.leave()
        return stepped

    def _drop(self, member: Member, still_open: Sequence[Member]) -> None:
        """Drop a window that is open on some rank: on all of them the loss scale adapts if it was the last one."""
        member.precision.elsewhere = any(other.precision.scaler is member.precision.scaler for other in still_open)
        member.drop()
        member.let_go()
        member.precision.close()  # also where it was not open

    # -- what is where -------------------------------------------------------------------------------------

    def _members_of(self, rows: Sequence[Row], column: int) -> list[Member]:
        """The members with a flag on some rank: column 2 those that close, 3 those with an open window."""
        return [m for i, m in enumerate(self._members) if any(row[column + 2 * i] for row in rows)]
