"""All ranks of one engine as one: windows close, epochs end and runs stop on every rank, or on none.

Before the micro-batch in which a window closes, every rank says whether it has one (the *gate*). If all have, that
backward reduces the gradients. If some are at the end of their data, the others go on without: nobody reduces in the
backward, and all do it together when the window closes, those without data with weight 0. When a window closes, every
rank says what it weighs, so that its mean is over the items of all. An epoch ends, and a run, when it has on all ranks;
whoever stops or raises, stops all.

.. code-block:: text

    rank 0   1 2 3 [gate] 4 [close]   5 6 7 [gate] 8 [close]   9    [end: close]
    rank 1   1 2 3 [gate] 4 [close]   5  [end:  gate] [close]       [end: close]      a shorter epoch
"""

import functools
import json
import logging
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from ignite import distributed as idist
from ignite.engine import Engine, Events

from ice_engine.alike import agree, check_close, check_gate, check_lengths
from ice_engine.distributed.rounds import Kind, Row, is_from_others, rounds
from ice_engine.distributed.sync import Synchroniser, release
from ice_engine.distributed.world import listed, rank, world_size
from ice_engine.endings import when_left
from ice_engine.errors import ArgumentValueError, AttachError, RankError
from ice_engine.hooks import HookRegistry
from ice_engine.member import Member
from ice_engine.of_engine import of_engine
from ice_engine.orders import LAST, PEERS

logger = logging.getLogger(__name__)

_MANY = 32  # optimizers on one engine: what a row has room for


class Peers:
    """Keeps the runs of one engine on all ranks together.

    Args:
        engine: The engine of this rank.

    Attributes:
        wants_stop: Returns whether this rank wants the run to stop at the next window's edge.
        stop_wanted: Whether a rank does; known to all of them before the micro-batch in which a window closes.
        ending: Whether another rank is at the end of its run already, and waits there for what needs all ranks.
        edges: What is to be called where this rank, at the end of its data, has closed windows with others; by owner.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._rounds = rounds()
        # Ignite's first question for the rank is a collective; asked later, in a handler on one rank, it would hang.
        idist.sync()
        self._members: list[Member] = []
        self._length: int | None = None  # of an epoch, if all ranks end it at the same micro-batch
        self._resumed = self._position = 0
        self._closing: list[Member] = []
        self._reducing = False
        self._before: list[int] = []
        self._layouts: Sequence[Sequence[int]] = ()
        self._epoch_over = self._run_over = True
        self.wants_stop: Callable[[], bool] = bool
        self.edges: dict[int, Callable[[], object]] = {}
        self.stop_wanted = self.ending = False
        registry = HookRegistry(engine)
        for event, handler, order in (
            (Events.STARTED, self._on_started, PEERS),
            (Events.EPOCH_STARTED, self._on_epoch_started, PEERS),
            (Events.ITERATION_STARTED, self._on_iteration_started, PEERS),
            (Events.ITERATION_COMPLETED, self._on_iteration_completed, PEERS),
            (Events.ITERATION_COMPLETED, self._on_iteration_over, LAST),
            (Events.EPOCH_COMPLETED | Events.TERMINATE_SINGLE_EPOCH, self._on_epoch_ended, PEERS),
            (Events.TERMINATE | Events.COMPLETED, self._on_run_ended, PEERS),
        ):
            registry.add(event, handler, name=f"peers.{handler.__name__.removeprefix('_on_')}", order=order)
        self._forget_ending = when_left(engine, self._on_left)

    @property
    def in_step(self) -> bool:
        """Whether all ranks come to the end of their epoch with the same micro-batch."""
        return self._length is not None

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
        member.sync.again = functools.partial(self._reduce_again, member.sync)
        member.window.unit_of = functools.partial(self._common_unit, member)
        member.window.ranks = world_size()

    def leave(self, member: Member) -> None:
        """Let an optimizer go; with the last one, the engine is as it was."""
        member.sync.on(last=True)
        member.window.unit_of = float
        self._members.remove(member)
        if not self._members:
            HookRegistry(self._engine).remove_of(self)
            self._forget_ending()

    # -- a run ---------------------------------------------------------------------------------------------

    def _on_left(self, error: BaseException | None) -> None:
        try:
            if error is None:  # once more, for what handlers raise that come after the last round
                self._rounds.exchange(Kind.LEFT, doing="the end of run()")
            elif is_from_others(error):
                self._rounds.leave_note(error)  # every rank has it, is gone, or waits where nobody will come
            else:
                self._on_raised(error)
        finally:
            self._switch(last=True)

    def _on_raised(self, error: BaseException) -> None:
        if self._reducing and not any(member.broken for member in self._closing):
            for sync in self._waiting():
                release(sync)
        self._reducing = False
        try:
            self._rounds.raised(error)
        except RankError as gone:
            raise gone from error

    def _on_started(self, engine: Engine) -> None:
        self._closing, self._reducing = [], False
        self._run_over = self.stop_wanted = self.ending = False
        state = engine.state
        self._resumed = state.iteration % state.epoch_length if state.iteration and state.epoch_length else 0
        facts = {"max_epochs": state.max_epochs, "max_iters": state.max_iters}
        for member in self._members:
            facts |= {f"{key} of optimizer {member.name!r}": value for key, value in member.facts().items()}
        self._rounds.exchange(Kind.START, doing="the start of a run")
        self._rounds.leave_note(None)
        places = facts | {"epoch_length": state.epoch_length, "position": self._resumed}
        told = agree(self._rounds, places, free={"epoch_length", "position"})
        lengths = told["epoch_length"]
        self._length = lengths[0] if len(set(lengths)) == len(set(told["position"])) == 1 else None
        check_lengths(lengths, self._members)
        for sync, layout in zip(self._syncs(), self._layouts, strict=False):
            sync.lay_out(layout)
        self._layouts = ()

    def _on_epoch_started(self, engine: Engine) -> None:
        self._position, self._resumed, self._epoch_over = self._resumed, 0, False
        # A handler may have stopped one rank when the last epoch was over.
        if self._stopped_by(self._gate(Kind.EPOCH_START)):
            engine.state.epoch -= 1
            self._epoch_over = True
            engine.terminate()

    def _on_iteration_started(self, engine: Engine) -> None:
        self._position += 1
        last = self._position == self._length
        self._closing = [m for m in self._members if m.window.closes_next(last=last)]
        alone = self._length is None and any(m.sync.together for m in self._members)
        self._reducing = False
        if self._closing or alone:
            rows = self._gate(Kind.GATE)
            if self._stopped_by(rows):
                engine.state.iteration -= 1  # this one is not trained
                self._closing = []
                engine.terminate()
                return
            self._reducing = all(row[0] == Kind.GATE for row in rows)
        self._before = [m.differentiated for m in self._members]
        for member in self._members:
            member.broken = False
        # Where even the forward needs all ranks, a window whose end nobody knows cannot be reduced after the fact.
        self._switch(last=False, closing=self._members if alone else self._closing if self._reducing else [])

    def _on_iteration_completed(self, _: Engine) -> None:
        if not self._closing:
            return
        closing, reducing = self._closing, self._reducing
        if reducing:
            for sync in self._waiting():
                sync.take_part()
        self._reducing, self._closing = False, []
        self._switch(last=False)
        for member in closing:
            self._close(member, reduced=reducing)

    def _on_iteration_over(self, engine: Engine) -> None:
        # If a handler has stopped a rank now, its epoch is not completed, and so is nobody's: what is done then, such
        # as a validation, may need all ranks.
        known = self._position == self._length and not engine.should_terminate
        if known and self._stopped_by(self._go_along(Kind.EPOCH_LAST, {Kind.GATE})):
            engine.terminate()

    def _on_epoch_ended(self, engine: Engine, *_: Any, **__: Any) -> None:
        if self._epoch_over:
            return  # TERMINATE_SINGLE_EPOCH came before EPOCH_COMPLETED
        self._on_iteration_completed(engine)  # what was promised at a gate, if a handler stopped this rank after it
        self._epoch_over = True
        if engine.state.epoch_length == 0:
            engine.state.epoch_length = None  # Ignite takes a rank without data to be at the end of its run
        rows = self._go_along(Kind.EPOCH_END, {Kind.GATE, Kind.EPOCH_LAST})
        if self._stopped_by(rows):
            self.ending = True
            if not engine.should_terminate:
                engine.terminate()  # what is open closes with the run
            return
        lengths = {row[1] for row in rows}
        self._length = int(lengths.pop()) if len(lengths) == 1 and lengths != {-1.0} else None
        for member in self._members_of(rows, 3):
            if member.window.tail == "step":
                self._close(member, at_end=True)
        for member in self._members:
            if member.window.tail == "drop" and member.window.is_open:
                member.drop()

    def _on_run_ended(self, engine: Engine) -> None:
        if self._run_over:
            return  # TERMINATE came before COMPLETED
        self._on_iteration_completed(engine)  # likewise
        self._run_over = True
        rows = self._gate(Kind.RUN_END)
        while any(row[0] != Kind.RUN_END for row in rows):
            rows = self._gate(Kind.RUN_END)
        for member in self._members_of(rows, 3):
            if member.window.tail == "drop":
                member.drop()
            else:
                self._close(member, at_end=True)

    def _stopped_by(self, rows: Sequence[Row]) -> bool:
        """Whether others have ended their run, so that this rank ends its own; one of those that do says who."""
        ended = [r for r, row in enumerate(rows) if row[0] == Kind.RUN_END]
        if ended and rank() == next(r for r in range(len(rows)) if r not in ended):
            epoch = self._engine.state.epoch
            logger.warning("%s ended the run in epoch %d, as by terminate(), and so do all", listed(ended), epoch)
        return bool(ended)

    # -- a checkpoint --------------------------------------------------------------------------------------

    def layouts(self) -> list[list[int]]:
        """Return how gradients are laid out where they are reduced, for a process that is to round them alike."""
        return [sync.layout() for sync in self._syncs()]

    def lay_out(self, layouts: Sequence[Sequence[int]]) -> None:
        """Let the next run begin with *layouts*, from :meth:`layouts`."""
        self._layouts = layouts

    # -- rounds --------------------------------------------------------------------------------------------

    def _gate(self, kind: Kind) -> list[Row]:
        """Say where this rank is, until all say something that a window can close at."""
        while True:
            length = self._engine.state.epoch_length
            closing = [float(m in self._closing and kind is Kind.GATE) for m in self._members]
            is_open = [float(m.window.is_open) for m in self._members]
            flags = [flag for pair in zip(closing, is_open, strict=True) for flag in pair]
            row = [-1 if length is None else length, *flags, float(self.wants_stop())]
            rows = self._rounds.exchange(kind, row, self._place(kind))
            if not self._take_unit(rows):
                break
        self.stop_wanted = any(row[2 + 2 * len(self._members)] for row in rows)
        if {Kind.GATE, Kind.EPOCH_END} <= {row[0] for row in rows}:
            self._length = None
        check_gate(rows, self._members, self._engine.state.epoch)
        return rows

    def _go_along(self, kind: Kind, going: set[Kind]) -> list[Row]:
        """Say at *kind* that this rank has no more data, and close windows of ranks that have, while any is *going*."""
        rows = self._gate(kind)
        while (kinds := {row[0] for row in rows}) & going and Kind.RUN_END not in kinds:
            for member in self._members_of(rows, 2):
                self._close(member)
            for edge in [*self.edges.values()]:
                edge()
            rows = self._gate(kind)
        return rows

    def _common_unit(self, member: Member, weight: float) -> float:
        """Return the unit of *member*'s weights: the largest of the ranks' first ones, one and the same for all."""
        self._take_unit(
            self._rounds.exchange(
                Kind.UNIT, [self._members.index(member), weight], f"the first loss of {member.name!r}"
            )
        )
        return member.window.common

    def _reduce_again(self, sync: Synchroniser) -> None:
        """Meet all ranks before one more backward of the micro-batch that reduces, which others may not have."""
        if self._reducing and not sync.always:
            row = [self._syncs().index(sync)]
            while self._take_unit(self._rounds.exchange(Kind.AGAIN, row, "one more loss of a micro-batch")):
                pass

    def _take_part_again(self, rows: Sequence[Row]) -> bool:
        """Reduce zeros, where other ranks reduce one more loss of the micro-batch that this one is through with."""
        again = {int(row[1]) for row in rows if row[0] == Kind.AGAIN}
        for index in sorted(again):
            sync = self._syncs()[index]
            sync.settle()  # as they do
            sync.take_part()
        return bool(again)

    def _take_unit(self, rows: Sequence[Row]) -> bool:
        said = [row for row in rows if row[0] == Kind.UNIT]
        for index in {int(row[1]) for row in said}:
            window = self._members[index].window
            window.common = max(row[2] for row in said if row[1] == index)
            window.unit = window.unit or window.common
            window.decide(window.common)
        return bool(said)

    def _close(self, member: Member, *, reduced: bool = False, at_end: bool = False) -> None:
        window = member.window
        last = self._position == self._length and window.tail == "step" and window.is_open
        values = member.values()
        digest = zlib.crc32(json.dumps(values).encode())
        weighted = -1.0 if window.weighted is None else float(window.weighted)
        while True:
            row = [self._members.index(member), float(window.is_full or last), window.weight, weighted, digest]
            rows = self._rounds.exchange(Kind.CLOSE, row, self._place(Kind.CLOSE))
            if not (self._take_unit(rows) or self._take_part_again(rows)):
                break  # else a rank without data is here, and the others at their first loss, or at one more
        check_close(rows, member, self._members, self._rounds, values)
        if not (at_end or any(row[2] for row in rows)):
            # No rank had a loss for it in this iteration, or the first loss has told that its windows are longer.
            member.touched()
            if reduced:
                member.sync.settle()
            return
        window.share(sum(row[3] for row in rows), world_size())
        if reduced:
            member.sync.complete(member.parameters())
        whole = reduced or member.sync.reduce(member.parameters())
        member.sync.settle()  # before the handlers of the step, which may keep a rank
        if whole:
            member.close()
        else:
            member.discard("a stop")

    # -- what is where -------------------------------------------------------------------------------------

    def _members_of(self, rows: Sequence[Row], column: int) -> list[Member]:
        """The members with a flag on some rank: column 2 those that close, 3 those with an open window."""
        return [m for i, m in enumerate(self._members) if any(row[column + 2 * i] for row in rows)]

    def _waiting(self) -> list[Synchroniser]:
        """What the other ranks reduce with in this micro-batch, and this one has not had a backward for."""
        done = {id(m.sync) for m, n in zip(self._members, self._before, strict=False) if m.differentiated > n}
        return list({id(m.sync): m.sync for m in self._closing if id(m.sync) not in done}.values())

    def _syncs(self) -> list[Synchroniser]:
        return list({id(m.sync): m.sync for m in self._members}.values())

    def _switch(self, *, last: bool, closing: Sequence[Member] = ()) -> None:
        on = {id(m.sync) for m in closing}
        for sync in self._syncs():
            sync.on(last or id(sync) in on)

    def _place(self, kind: Kind) -> str:
        state = self._engine.state
        if kind is Kind.RUN_END:
            return "the end of the run"
        if kind in {Kind.EPOCH_START, Kind.EPOCH_END}:
            return f"the {'end' if kind is Kind.EPOCH_END else 'beginning'} of epoch {state.epoch}"
        return f"iteration {state.iteration} (epoch {state.epoch})"


def peers(engine: Engine) -> Peers:
    """Return the peers of *engine*, one object for one engine."""
    return of_engine(engine, Peers, engine)
