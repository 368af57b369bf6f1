"""When a save is taken: after all handlers of its iteration, else where its window, epoch or run ends; at a signal."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ignite.engine import Engine, Events

from ice_engine.distributed import world
from ice_engine.distributed.together import gather
from ice_engine.endings import when_left
from ice_engine.errors import Preempted
from ice_engine.events import is_running
from ice_engine.hooks import HookRegistry
from ice_engine.of_engine import optimizers_of
from ice_engine.orders import FIRST, LAST
from ice_engine.peers import peers
from ice_engine.preemption import Preemption, preemption
from ice_engine.run_position import RunPosition

# Events of a run after which no iteration and no epoch comes to its end; in others, handlers that change what is saved
# may still come.
_AFTER_EDGES = frozenset(
    {
        Events.STARTED,
        Events.TERMINATE_SINGLE_EPOCH,
        Events.TERMINATE,
        Events.COMPLETED,
        Events.INTERRUPT,
        Events.EXCEPTION_RAISED,
    }
)
# Events after which ranks of different data come to an iteration's end at different times, or to none.
_OF_ITERATIONS = frozenset(
    {
        Events.EPOCH_STARTED,
        Events.GET_BATCH_STARTED,
        Events.GET_BATCH_COMPLETED,
        Events.ITERATION_STARTED,
        Events.ITERATION_COMPLETED,
        Events.DATALOADER_STOP_ITERATION,
    }
)
# Events at which optimizers are through with an iteration or epoch before anybody else is called.
_EDGES = frozenset({Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED})


@dataclass(frozen=True)
class Request:
    """A save that was asked for, perhaps in the middle of a window.

    Attributes:
        engine: Whose event it was.
        event_name: That event.
        clock: What it counts, by which the file is numbered.
        score: What was measured then; None if nothing was.
    """

    engine: Engine
    event_name: Any
    clock: str
    score: float | None = None


class SaveTimes:
    """Has saves taken when what they hold can be gone on from exactly, and what is written finished with the run.

    Args:
        position: Where the run is in its data; None if it is not saved, and any time is as good.
        signals: At which the run saves and ends.
        take: Saves now.
        settle: Raises what went wrong with what was written; does not wait.
        finish: Waits for what is being written, and raises what went wrong, if ``raises``.

    Attributes:
        attached: Whether saves are asked for; on all ranks, or on none.
        agreed: Whether a rank of many has asked for a save, as all know.
        clock: By which a save at a signal is numbered, as the others are.
    """

    def __init__(
        self,
        position: RunPosition | None,
        signals: Iterable[int],
        take: Callable[[Request], None],
        settle: Callable[[], None],
        finish: Callable[..., None],
    ) -> None:
        self._position = position
        self._take, self._settle, self._finish = take, settle, finish
        self._signals = tuple(signals)
        self._wanted: Request | None = None
        self._run: Engine | None = None
        self._preemption: Preemption | None = None
        self._stopped = self._begun = self._over = False
        self.attached = self.agreed = False
        self.clock = "iteration"

    @property
    def run(self) -> Engine | None:
        """The engine that is followed."""
        return self._run

    def follow(self, run: Engine) -> None:
        """Be there when a save is ready, when a window closes, and when *run* ends."""
        if self._run is run:
            return
        self._run = run
        registry = HookRegistry(run)
        name = registry.free_name("checkpoint", ".edges") + "."
        edges = Events.ITERATION_COMPLETED | Events.EPOCH_COMPLETED
        registry.add(edges, self.on_edge, name=f"{name}edges", order=LAST)
        # Handlers of the run's end may look for the last file.
        registry.add(Events.TERMINATE | Events.COMPLETED, self._on_ended, name=f"{name}ended", order=FIRST)
        registry.add(Events.STARTED, self._on_started, name=f"{name}started", order=LAST)
        if self._signals:
            self._preemption = preemption(run, self._signals)
        when_left(run, self._on_left)

    def ask(self, engine: Engine, clock: str, measure: Callable[[Engine], float] | None) -> None:
        """Take a save as soon as it may be taken; one by score, of its *measure*, before an edge's other handlers."""
        event = engine.last_event_name
        # Now, as an evaluator may have another score when the save is taken; but then, where not all ranks ask: what
        # measures may need them all.
        score = None
        if measure is not None and self._all_ask(event):
            score = measure(engine)
        self.attached, self._wanted = True, Request(engine, event, clock, score)
        at_once = measure is not None and self._at_edge
        if not self._must_wait() and (at_once or self._edge_has_passed()):
            self._take_wanted()
            if self._over:
                self._finish(raises=True)  # the other ranks leave the run when this one does

    def take_wanted(self) -> None:
        """Take the save that waits for the event's other handlers, of which one asks for it; in one process."""
        if self._wanted is not None and self._at_edge and world.world_size() == 1 and not self._must_wait():
            self._take_wanted()

    def _take_wanted(self) -> None:
        request, self._wanted, self.agreed = self._wanted, None, False
        if request is not None:
            self._take(request)

    def _on_started(self, engine: Engine) -> None:
        self._begun, self._over = True, False
        if self._preemption is not None:
            self._preemption.listen()
        if world.world_size() > 1 and self._position is not None:
            together = peers(engine)
            if self._preemption is not None:
                together.wants_stop = self._preemption.is_asked
            if self not in together.savers:
                together.savers.append(self)
            self._position.is_ended = lambda: together.ending

    @property
    def asks(self) -> bool:
        """Whether this rank has been asked for a save."""
        return self._wanted is not None

    def on_edge(self, engine: Engine) -> None:
        """Take the save that waits, where it can be gone on from exactly."""
        self._settle()
        stops = self._is_preempted(engine) and not self._is_done(engine)
        self.agreed |= stops
        if self.agreed and self._wanted is None:
            self._wanted = Request(engine, engine.last_event_name, self.clock)
        if self._wanted is None:
            return
        if not self._must_wait():
            self._take_wanted()
            if stops:
                self._stopped = True
                engine.terminate(skip_completed=True)
        elif stops and world.world_size() == 1:
            self._take(self._wanted)  # and once more at the epoch's end, if its handlers leave the time

    def _is_preempted(self, engine: Engine) -> bool:
        if self._preemption is None:
            return False
        return peers(engine).stop_wanted if world.world_size() > 1 else self._preemption.is_asked()

    def _must_wait(self) -> bool:
        """Whether what would be saved now could not be gone on from exactly."""
        if self._position is None:
            return False
        if world.world_size() == 1 or self._run is None:
            return self._position.at_last_iteration
        optimizers, together = optimizers_of(self._run), peers(self._run)
        # Some may have no such iteration: all save where all have heard that one wants to.
        alone = self._wanted is not None and not self.agreed and not self._all_ask(self._wanted.event_name)
        if together.in_step:
            between = self._position.at_last_iteration
        else:
            between = any(optimizer.in_window for optimizer in optimizers)
        return together.inside or between or together.ending or alone

    def _all_ask(self, event: Any) -> bool:
        """Whether all ranks come to *event* together: to one of iterations if they have and count the same ones."""
        if event not in _OF_ITERATIONS or self._position is None or self._run is None or world.world_size() == 1:
            return True
        together = peers(self._run)
        return together.in_step and together.counts_alike

    @property
    def _at_edge(self) -> bool:
        return self._run is not None and self._run.last_event_name in _EDGES

    def _edge_has_passed(self) -> bool:
        if self._position is None or self._run is None:
            return True
        event = self._run.last_event_name
        # Ignite has no iterator yet where the first epoch starts, or where the run is ended there.
        started = self._begun or is_running(self._run) or event == Events.EPOCH_STARTED
        return not started or event in _AFTER_EDGES

    def _is_done(self, engine: Engine) -> bool:
        """Whether the last epoch is at its end."""
        state = engine.state
        last = state.max_epochs is not None and state.epoch >= state.max_epochs
        return last and self._position is not None and not self._position.in_epoch

    def _on_ended(self, engine: Engine) -> None:
        if self._over:
            return  # TERMINATE came before COMPLETED
        self._begun, self._over = False, True
        if world.world_size() == 1 and self._position is not None and self._position.at_last_iteration:
            self._position.in_epoch = False  # Ignite, too, goes on with the next one; of many, others may be in it
        request, self._wanted = self._wanted, None
        if not self._stopped and self._is_wanted(request):
            self._take(request or Request(engine, engine.last_event_name, self.clock))
        self._finish(raises=True)
        if self.attached and world.world_size() > 1:
            gather("what is written at the end of the run", "")  # handlers of every rank may look for it

    def _is_wanted(self, request: Request | None) -> bool:
        """Whether a save waits for the end of a run, on any rank: who was stopped by another may not have asked."""
        if self._position is None or world.world_size() == 1 or not self.attached:
            return request is not None
        return any(gather("the end of the run", "wanted" if request is not None else ""))

    def _on_left(self, error: BaseException | None) -> None:
        try:
            self._begun, self._wanted, self.agreed = False, None, False
            self._finish(raises=error is None)
        finally:
            if self._preemption is not None and self._run is not None and not is_running(self._run):
                self._preemption.leave()
                # Who is told to run it again, when it is at its end, starts anew.
                asked = self._preemption.is_asked() and not self._is_done(self._run)
                stopped, self._stopped = self._stopped or asked, False
                if stopped and error is None:
                    raise Preempted
