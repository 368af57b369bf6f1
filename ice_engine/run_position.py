"""Where a run is, beside what its objects know of themselves: epoch, data, random generators, metrics."""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events

from ice_engine import random_state
from ice_engine.data_position import TrackedData, length, of_whose_data, shared_out
from ice_engine.distributed import world
from ice_engine.empty_epoch import EmptyEpoch
from ice_engine.errors import CheckpointError, warn
from ice_engine.evaluations import Evaluations
from ice_engine.hooks import HookRegistry
from ice_engine.of_engine import of_engine, optimizers_of
from ice_engine.orders import BEFORE, FIRST, LAST

logger = logging.getLogger(__name__)

_KINDS: dict[str, Any] = {
    "epoch": int,
    "epoch_length": int | None,
    "iteration": int,
    "in_epoch": bool,
    "through": bool,
    "began": int,
    "data": dict | None,
    "random": dict,
    "metrics": dict,
    "counted": dict,
    "places": int | None,
    "evaluations": dict | None,
}


class RunPosition:
    """Follows the run of one engine, and brings another one to the same place. See :func:`run_position`.

    Args:
        engine: The trainer.

    Attributes:
        in_epoch: Whether an epoch is under way.
        is_ended: Whether another rank has ended the run before this one came to the epoch's end.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._data: TrackedData | None = None
        self._began = 0  # iterations before this epoch
        self._resumed: dict[str, Any] | None = None
        self._ranks = self._places = 1  # that made what it resumes, and of them those with data of their own
        self._reload: Callable[[], object] = bool
        self._through = False  # with this epoch's data, if other ranks have more
        self.in_epoch = False
        self.is_ended: Callable[[], bool] = bool
        registry = HookRegistry(engine)
        for event, handler, order in (
            (Events.STARTED, self._on_starting, BEFORE),
            (Events.STARTED, self._on_started, LAST),
            (Events.EPOCH_STARTED, self._on_epoch_started, FIRST),
            (Events.EPOCH_COMPLETED | Events.TERMINATE_SINGLE_EPOCH, self._on_epoch_ending, BEFORE),
            (Events.EPOCH_COMPLETED | Events.TERMINATE_SINGLE_EPOCH, self._on_epoch_ended, FIRST),
            (Events.TERMINATE | Events.COMPLETED, self._on_run_ended, LAST),
        ):
            registry.add(event, handler, name=f"position.{handler.__name__.removeprefix('_on_')}", order=order)

    @property
    def at_last_iteration(self) -> bool:
        """Whether the epoch's last micro-batch is done, and its end still to come."""
        state = self._engine.state
        done = state.iteration - self._began
        return self.in_epoch and state.epoch_length is not None and 0 < state.epoch_length <= done

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain data, of this rank."""
        state = self._engine.state
        return {
            "epoch": state.epoch,
            "epoch_length": state.epoch_length,
            "iteration": state.iteration,
            "in_epoch": self.in_epoch,
            "through": self._through or bool(self._engine.should_terminate_single_epoch),
            "began": self._began,
            "data": None if self._data is None else self._data.position(),
            "random": random_state.capture(),
            "metrics": {name: value for name, value in state.metrics.items() if _is_plain(value)},
            "counted": {optimizer.name: optimizer.clocks["iteration"] for optimizer in optimizers_of(self._engine)},
            "places": self._places_now(),
            "evaluations": dict(of_engine(self._engine, Evaluations)),
        }

    def _places_now(self) -> int:
        """Return how many ranks have data of their own: others split a model with one of them, and have its data."""
        windows = (optimizer._window for optimizer in optimizers_of(self._engine))  # noqa: SLF001 - of this package
        return max((window.ranks for window in windows), default=world.world_size())

    @property
    def _is_alike(self) -> bool:
        """Whether the data is shared out among the ranks as it was then."""
        return (self._ranks, self._places) == (world.world_size(), self._places_now())

    def load_state_dict(self, states: Sequence[dict[str, Any]], reload: Callable[[], object]) -> None:
        """Let the next run, of an engine that is loaded already, go on where *states* are.

        With other ranks than then, or others with data of their own, each passes over as many batches as all together
        had taken, shared out among those there are and rounded down: none is missed. An epoch is as long as its data is
        now. A rank that is new draws from its generators as it finds them.

        Args:
            states: From :meth:`state_dict` of every rank.
            reload: Loads once more what the beginning of a run or of an epoch sets back, such as metrics.
        """
        self._ranks, now = len(states), world.world_size()
        state = states[world.rank() if world.rank() < self._ranks else 0]
        # Of which older files say nothing: with as many ranks, probably as many.
        self._places = state["places"] or (self._places_now() if self._ranks == now else self._ranks)
        if not self._is_alike and state["data"] is not None:
            data = [each["data"] for each in states]
            shared = shared_out(data, now, state["data"], before=self._places, now=self._places_now())
            state = {**state, "data": shared}
        if world.rank() >= self._ranks:
            state = {**state, "random": random_state.capture()}
        # Ignite would compute it from the iteration, and be wrong if an epoch was ended before its time.
        self._engine.state.epoch = state["epoch"] - state["in_epoch"]
        if self._is_alike:
            # What the engine has is of the rank that saved; where some have more data, each counts its own.
            elsewhere = self._engine.state.iteration != state["iteration"]
            self._engine.state.iteration = state["iteration"]
            self._engine.state.epoch_length = state["epoch_length"]
            for optimizer in optimizers_of(self._engine):
                if elsewhere or optimizer.name in state["counted"]:  # of which older files say nothing
                    optimizer.count_from(state["counted"].get(optimizer.name, state["iteration"]))
        if state["in_epoch"] and self._engine._is_done(self._engine.state):  # noqa: SLF001 - no public way to it
            self._engine.state.epoch_length = None  # else Ignite would start over; the run's beginning gives it back
        self._engine.state.metrics.update(state["metrics"])
        of_engine(self._engine, Evaluations).load(state["evaluations"])
        self._resumed, self._reload = state, reload

    def _on_starting(self, engine: Engine) -> None:
        """Count as this rank did, or as this many ranks do; Ignite would go by what the rank that saved had."""
        state = self._resumed
        if state is None:
            return
        if state["epoch_length"] is not None:
            engine.state.epoch_length = state["epoch_length"]
        if state["data"] is not None:
            self._recount(engine, state)
        done = engine.state.iteration - state["began"] if state["in_epoch"] else 0
        engine._init_iter = done  # noqa: SLF001 - no public way to it

    def _recount(self, engine: Engine, state: dict[str, Any]) -> None:
        """Count iterations as this many ranks do, where another number of them has made the checkpoint."""
        before, now = state["epoch_length"], length(engine.state.dataloader)
        if now is None or before != state["data"].get("length"):
            return  # an epoch is as long as the run says, not its data
        if self._is_alike:
            if now != before:
                warn(
                    f"the data has {now} batches, and had {before} when the run was saved, which goes on with epochs "
                    f"of {before}. Give it the same data in batches of the same size, or begin a run of its own"
                )
            return
        engine.state.epoch_length, state["began"] = now, engine.state.epoch * now
        engine.state.iteration = state["began"] + (state["data"]["taken"] if state["in_epoch"] else 0)
        for optimizer in optimizers_of(engine):
            optimizer.count_from(engine.state.iteration)
        if world.rank() == 0:
            ranks = world.world_size()
            logger.warning(
                "the run of %d rank%s%s goes on with %d%s after iteration %d%s",
                *(self._ranks, "s" if self._ranks > 1 else "", of_whose_data(self._ranks, self._places)),
                *(ranks, of_whose_data(ranks, self._places_now()), engine.state.iteration),
                f": an epoch has {now} micro-batches instead of {before}" if now != before else "",
            )

    def _on_started(self, engine: Engine) -> None:
        HookRegistry(engine).put_last(LAST)  # what was attached since then comes before a save, too
        data: Any = engine.state.dataloader
        self._data = data if data is None or isinstance(data, TrackedData) else TrackedData(data)
        engine.state.dataloader = self._data
        if self._resumed is None:
            self.in_epoch, self._began = False, engine.state.iteration
            return
        state = self._resumed
        self._reload()
        whole = engine._init_iter == engine.state.epoch_length  # noqa: SLF001 - as above
        if state["in_epoch"] and (state["through"] or whole):
            EmptyEpoch(engine, cut=not whole)
        if self._data is not None and state["data"] is not None:
            self._data.go_on(state["data"], functools.partial(self._arrived, state))
        else:
            registry, name = HookRegistry(engine), "position.go_on"

            def arrive() -> None:
                registry.remove(name)
                self._arrived(state)

            registry.add(Events.ITERATION_STARTED, arrive, name=name, order=FIRST)

    def _arrived(self, state: dict[str, Any]) -> None:
        if state["in_epoch"]:
            # The epoch's beginning has drawn, and set back what counts along it, a second time.
            random_state.restore(state["random"])
            self._reload()
        self._resumed = None

    def _on_epoch_started(self, engine: Engine) -> None:
        if self.is_ended():
            return  # with the epoch before, and this one is undone
        self._began, self.in_epoch, self._through = engine.state.iteration, True, False
        if self._resumed is None:
            return
        if self._resumed["in_epoch"]:
            self._began = self._resumed["began"]
        else:
            random_state.restore(self._resumed["random"])  # the run's beginning has drawn a second time

    def _on_epoch_ending(self, _: Engine, **__: Any) -> None:
        self._through = True

    def _on_epoch_ended(self, _: Engine, **__: Any) -> None:
        self.in_epoch = self.is_ended()  # in the epoch, where that rank is

    def _on_run_ended(self, engine: Engine) -> None:
        if isinstance(engine.state.dataloader, TrackedData):
            engine.state.dataloader = engine.state.dataloader.data


def run_position(engine: Engine) -> RunPosition:
    """Return the position of *engine*'s run, one object for one engine."""
    return of_engine(engine, RunPosition, engine)


def positions(saved: Any, engine: Any) -> list[dict[str, Any]]:
    """Return where a checkpoint says that each rank's run is; before anything is loaded.

    Args:
        saved: With the ranks' states under ``"positions"``.
        engine: The engine's state in the same checkpoint; of all ranks, where those say nothing of their own.

    Raises:
        CheckpointError: If a run cannot be there.
    """
    try:
        common = {"through": False, "counted": {}, "places": None, "evaluations": None} | {
            key: engine[key] for key in ("iteration", "epoch_length")
        }
        states = [{**common, **state} for state in saved["positions"]]
        kinds = len(states) > 0 and all(isinstance(state[key], _KINDS[key]) for state in states for key in _KINDS)
        fits = kinds and all(0 <= state["began"] <= state["iteration"] for state in states)
        fits = fits and all(1 <= (state["places"] or 1) <= len(states) for state in states)
    except (IndexError, KeyError, TypeError):
        states, fits = [], False
    if not fits:
        message = "its place in the run is damaged"
        raise CheckpointError(message)
    return states


def load_engine(engine: Engine, state: Mapping[str, Any]) -> None:
    """Load an engine's own *state*; also in its first epoch, of a length that nobody knows, which Ignite refuses."""
    if state.get("epoch_length") is not None or not state.get("iteration"):
        engine.load_state_dict(state)
        return
    engine.load_state_dict({**state, "epoch_length": state["iteration"] + 1})
    engine.state.epoch_length = None


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float | str | torch.Tensor)
