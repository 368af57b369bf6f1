"""All ranks of one engine as one: windows close, epochs end and runs stop on every rank, or on none.

Before the micro-batch in which a window closes, or before each if a model needs all ranks in it, every rank says
whether it has one (the *gate*). If all have, that backward reduces the gradients. If some are at the end of their data,
the others go on without: nobody reduces in the backward, and all do it together when the window closes, those without
data with weight 0. When a window closes, every rank says what it weighs, so that its mean is over the items of all. An
epoch ends, and a run, when it has on all ranks; whoever stops or raises, stops all. Where ``train_step`` calls
``update()``, all ranks with data do, in the same micro-batches, and its round is one at which a window can close, too.
At the end of such a micro-batch all meet once more: for losses after the last ``update()``, for saves and for stops.

.. code-block:: text

    rank 0   1 2 3 [gate] 4 [close]   5 6 7 [gate] 8 [close]   9    [end: close]
    rank 1   1 2 3 [gate] 4 [close]   5  [end:  gate] [close]       [end: close]      a shorter epoch
"""

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

from ignite.engine import Engine, Events

from ice_engine.alike import check_copies, check_facts, check_lengths
from ice_engine.distributed.rounds import Kind, Row, is_from_others
from ice_engine.distributed.world import listed, rank
from ice_engine.endings import when_left
from ice_engine.errors import RankError
from ice_engine.hooks import HookRegistry
from ice_engine.meeting import UNKNOWN, Meeting
from ice_engine.member import Member
from ice_engine.of_engine import forget, of_engine
from ice_engine.orders import LAST, MEETING, PEERS

logger = logging.getLogger(__name__)

_START = "the start of a run"


class Peers(Meeting):
    """Keeps the runs of one engine on all ranks together.

    Args:
        engine: The engine of this rank.

    Attributes:
        ending: Whether another rank is at the end of its run already, and waits there for what needs all ranks.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._resumed = 0
        self._layouts: Sequence[Sequence[int]] = ()
        self._epoch_over = self._run_over = True
        self.ending = False
        registry = HookRegistry(engine)
        for event, handler, order in (
            (Events.STARTED, self._on_starting, MEETING),
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

    def leave(self, member: Member) -> None:
        """Let an optimizer go; with the last one, the engine is as it was."""
        member.sync.leave()
        member.window.unit_of = float
        member.precision.elsewhere = False
        at = self._members.index(member)
        del self._members[at], self._before[at : at + 1]
        # In the middle of a micro-batch others may still reduce with it, but this rank has nothing to take part with.
        for several in (self._closing, self._expected):
            if member in several:
                several.remove(member)
        if not self._members:
            HookRegistry(self._engine).remove_of(self)
            self._forget_ending()
            forget(self._engine, Peers)

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
            self._rounds.guard.leave()
            for sync in self._syncs():
                sync.leave()

    def _on_raised(self, error: BaseException) -> None:
        if not any(member.broken for member in self._expected):
            with contextlib.suppress(Exception):
                self._release()
        self._reducing = False
        try:
            self._rounds.raised(error)
        except RankError as gone:
            raise gone from error

    def _release(self) -> None:
        """Let the other ranks go on that wait for this one in a reduction, up to a round."""
        if self._several:
            return  # they come to a round before they reduce
        for sync in self._waiting():
            if not all(m.met for m in self._expected if m.sync is sync):
                return  # they come to one with their first loss
            sync.take_part()

    def _on_starting(self, engine: Engine) -> None:
        self._closing, self._reducing, self._expected = [], False, []
        self._run_over = self.stop_wanted = self.ending = False
        length = engine.state.epoch_length
        own = [UNKNOWN if length is None else length, engine.state.iteration]
        rows = self._rounds.exchange(Kind.START, own, _START)
        self._rounds.leave_note(None)
        self._share([row[1] for row in rows], [row[2] for row in rows])

    def _on_started(self, engine: Engine) -> None:
        state = engine.state
        self._resumed = state.iteration % state.epoch_length if state.iteration and state.epoch_length else 0
        if engine._init_iter is not None:  # noqa: SLF001 - no public way to it
            self._resumed = engine._init_iter  # noqa: SLF001 - likewise
        facts = {"max_epochs": state.max_epochs, "max_iters": state.max_iters}
        for member in self._members:
            facts |= {f"{key} of optimizer {member.name!r}": value for key, value in member.facts().items()}
        begun = [member.window.micro_batches for member in self._members]
        places = {"epoch_length": state.epoch_length, "position": self._resumed, "micro-batches": begun}
        told = check_facts(self._rounds, facts | places, _START, free={*places})
        lengths = told["epoch_length"]
        self._length = lengths[0] if len(set(lengths)) == len(set(told["position"])) == 1 else None
        check_lengths(lengths, self._members)
        check_copies(self._rounds, self._members, _START)
        for member, counts in zip(self._members, zip(*told["micro-batches"], strict=True), strict=True):
            member.begun, member.unweighted = max(counts), False
        for sync, layout in zip(self._syncs(), self._layouts, strict=False):
            sync.lay_out(layout)
        self._layouts = ()
        self._switch()  # what a handler trains on before the first gate, others may have no loss for

    def _on_epoch_started(self, engine: Engine) -> None:
        self._position, self._resumed, self._epoch_over = self._resumed, 0, False
        # A handler may have stopped one rank when the last epoch was over.
        if self._stopped_by(self._gate(Kind.EPOCH_START)):
            engine.state.epoch -= 1
            self._epoch_over = self.ending = True
            engine.terminate()

    def _on_iteration_started(self, engine: Engine) -> None:
        self._position += 1
        last = self._position == self._length
        self._closing = [
            m
            for m in self._members
            if m.window.closes_next(last=last, begun=m.begun if self._counts_together else None)
        ]
        together = any(m.sync.together for m in self._members)
        self._reducing, self._expected = False, []
        self._joined.clear()
        self._passed.clear()
        if self._closing or together:
            rows = self._gate(Kind.GATE, self._closing)
            if self._stopped_by(rows):
                engine.state.iteration -= 1  # this one is not trained
                self._closing = []
                engine.terminate()
                return
            self._reducing = all(row[0] == Kind.GATE for row in rows)
            # Also one that is not full here, but on another rank, as ranks out of step may have them.
            self._closing = self._members_of(rows, 2)
        self._before = [m.differentiated for m in self._members]
        for member in self._members:
            member.broken = member.updated = False
        reduced = self._closing if self._reducing else []
        self._switch(reduced)
        if self._reducing:
            self._expected = [m for m in self._members if m in reduced or m.sync.always]
            # Who waits for a device is as idle as who waits for a rank.
            on_cpu = all(p.is_cpu for m in self._expected for p in m.parameters()[:1])
            self._rounds.guard.enter(f"the reduction of {self._place(Kind.GATE)}", collectives=on_cpu)

    def _on_iteration_completed(self, _: Engine) -> None:
        self._complete()

    def _complete(self, *, leaving: bool = False) -> None:
        """Reduce and close with the others what this micro-batch does; *leaving* its data or its run, with it."""
        updated = any(member.updated for member in self._members)
        for member in self._members:
            member.begun += not member.updated
            member.updated = False
        if self._several:
            self._take_parts()
        else:
            for sync in self._waiting():
                self._take_part(sync)
        for member in self._expected:
            if member not in self._closing:
                member.touched()
        self._rounds.guard.leave()
        closing = self._closing
        if updated or (closing and not self._reducing):
            closing = self._edge(closing)
        reduced = [member for member in closing if self._has_reduced(member)]
        self._reducing, self._closing, self._expected = False, [], []
        if closing:
            self._switch()
        for member in closing:
            self._close(member, reduced=member in reduced, leaving=leaving)

    def _edge(self, closing: Sequence[Member]) -> list[Member]:
        """Say at the end of a micro-batch what closes; return what does on any rank."""
        rows = self._gate(Kind.EDGE, [m for m in self._members if m in closing or m.window.is_full])
        if self._updates and self._stopped_by(rows):
            self.ending = True
            self._engine.terminate()
        return self._members_of(rows, 2)

    def _keep_promise(self, engine: Engine) -> None:
        """Do with the others what this rank said at a gate that it would, if a handler has stopped it since."""
        if self._closing or self._expected:
            self._complete(leaving=True)
            for saver in self.savers:
                saver.on_edge(engine)

    def _on_iteration_over(self, engine: Engine) -> None:
        if any(member.updated for member in self._members):  # by a handler
            self._edge([])
        # If a handler has stopped a rank now, its epoch is not completed, and so is nobody's: what is done then, such
        # as a validation, may need all ranks.
        known = self._position == self._length and not engine.should_terminate
        if known and self._stopped_by(self._go_along(Kind.EPOCH_LAST, {Kind.GATE})):
            engine.terminate()

    def _on_epoch_ended(self, engine: Engine, *_: Any, **__: Any) -> None:
        if self._epoch_over:
            return  # TERMINATE_SINGLE_EPOCH came before EPOCH_COMPLETED
        self._keep_promise(engine)
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
        # With windows that go on in the next epoch, ranks that were out of step close them at different micro-batches.
        carried = any(m.window.tail == "carry" and not m.sync.together for m in self._members_of(rows, 3))
        was_in_step = self.in_step
        in_step = len(lengths) == 1 and lengths != {UNKNOWN} and (was_in_step or not carried)
        self._length = int(lengths.pop()) if in_step else None
        for member in self._members_of(rows, 3):
            if member.window.tail == "step":
                self._close(member, at_end=True)
        carried_on = [m for m in self._members_of(rows, 3) if m.window.tail == "carry"]
        for member in self._members_of(rows, 3):
            if member.window.tail == "drop":
                self._drop(member, carried_on)
        for member in self._members:
            if member.window.tail != "carry":
                member.begun = 0

    def _on_run_ended(self, engine: Engine) -> None:
        if self._run_over:
            return  # TERMINATE came before COMPLETED
        self._keep_promise(engine)
        self._run_over = True
        rows = self._gate(Kind.RUN_END)
        while any(row[0] != Kind.RUN_END for row in rows):
            rows = self._gate(Kind.RUN_END)
        for member in self._members_of(rows, 3):
            if member.window.tail == "drop":
                self._drop(member, ())
            else:
                self._close(member, at_end=True, over=True)

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


def peers(engine: Engine) -> Peers:
    """Return the peers of *engine*, one object for one engine."""
    return of_engine(engine, Peers, engine)
