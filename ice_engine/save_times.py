"""When a save is taken: after all handlers of its iteration, else at its window's or epoch's end; and at a signal."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ignite.engine import Engine, Events

from ice_engine.distributed import world
from ice_engine.endings import when_left
from ice_engine.errors import Preempted
from ice_engine.events import is_running
from ice_engine.hooks import HookRegistry
from ice_engine.peers import peers
from ice_engine.preemption import Preemption, preemption
from ice_engine.run_position import FIRST, LAST, RunPosition

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


@dataclass(frozen=True)
class Request:
    """A save that was asked for, perhaps in the middle of a window.

    Attributes:
        engine: Whose event it was.
        event_name: That event.
        clock: What it counts, by which the file is numbered.
    """

    engine: Engine
    event_name: Any
    clock: str


class SaveTimes:
    """Has saves taken when what they hold can be gone on from exactly, and what is written finished with the run.

    Args:
        position: Where the run is in its data; None if it is not saved, and any time is as good.
        signals: At which the run saves and ends.
        take: Saves now.
        settle: Raises what went wrong with what was written; does not wait.
        finish: Waits for what is being written, and raises what went wrong, if ``raises``.

    Attributes:
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
        self._stopped = False
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
        registry.add(edges, self._on_edge, name=f"{name}edges", order=LAST)
        # Handlers of the run's end may look for the last file.
        registry.add(Events.TERMINATE | Events.COMPLETED, self._on_ended, name=f"{name}ended", order=FIRST)
        if self._signals:
            self._preemption = preemption(run, self._signals)
            listen = functools.partial(_listen, self._preemption)
            registry.add(Events.STARTED, listen, name=f"{name}started", order=LAST)
        when_left(run, self._on_left)

    def ask(self, request: Request, *, at_once: bool) -> None:
        """Take a save as soon as it may be taken; before the event's other handlers, if *at_once*."""
        if self._must_wait() or not (at_once or self._edge_has_passed()):
            self._wanted = request
        else:
            self._take(request)

    def take_wanted(self) -> None:
        """Take the save that waits for the event's other handlers, of which one asks for it; in one process."""
        at_edge = self._run is not None and self._run.last_event_name in {
            Events.ITERATION_COMPLETED,
            Events.EPOCH_COMPLETED,
        }
        if self._wanted is not None and at_edge and world.world_size() == 1 and not self._must_wait():
            request, self._wanted = self._wanted, None
            self._take(request)

    def _on_edge(self, engine: Engine) -> None:
        self._settle()
        stops = self._is_preempted(engine) and not self._is_done(engine)
        if stops and self._wanted is None:
            self._wanted = Request(engine, engine.last_event_name, self.clock)
        if self._wanted is None:
            return
        if not self._must_wait():
            request, self._wanted = self._wanted, None
            self._take(request)
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
        optimizers = vars(self._run).get("_ice_optimizers", ())
        inside = world.world_size() > 1 and any(optimizer.in_window for optimizer in optimizers)
        return inside or self._position.at_last_iteration

    def _edge_has_passed(self) -> bool:
        if self._position is None or self._run is None:
            return True
        event = self._run.last_event_name
        started = is_running(self._run) or event == Events.EPOCH_STARTED  # Ignite has no iterator yet in the first one
        return not started or event in _AFTER_EDGES

    def _is_done(self, engine: Engine) -> bool:
        """Whether the last epoch is at its end."""
        state = engine.state
        last = state.max_epochs is not None and state.epoch >= state.max_epochs
        return last and self._position is not None and not self._position.in_epoch

    def _on_ended(self, _: Engine) -> None:
        self._finish(raises=True)

    def _on_left(self, error: BaseException | None) -> None:
        try:
            self._wanted = None
            self._finish(raises=error is None)
        finally:
            if self._preemption is not None and self._run is not None and not is_running(self._run):
                self._preemption.leave()
                # Who is told to run it again, when it is at its end, starts anew.
                asked = self._preemption.is_asked() and not self._is_done(self._run)
                stopped, self._stopped = self._stopped or asked, False
                if stopped and error is None:
                    raise Preempted


def _listen(preempted: Preemption, engine: Engine) -> None:
    preempted.listen()
    if world.world_size() > 1:
        peers(engine).wants_stop = preempted.is_asked
