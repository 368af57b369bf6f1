"""The save that is under way: begun when all is collected, and counted as saved when its file is whole."""

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from ignite.engine import Engine
from ignite.handlers.checkpoint import CheckpointEvents

from ice_engine.errors import CheckpointError, warn
from ice_engine.events import fire
from ice_engine.of_engine import of_engine
from ice_engine.optimizer import Optimizer
from ice_engine.recording import Recordings
from ice_engine.resuming import Item
from ice_engine.writer import Writer


@dataclass(frozen=True)
class Save:
    """A save that was decided on: its file, and which files there are once it is written, and are no more."""

    engine: Engine
    filename: str
    saved: list[Item]
    outdated: list[str]


class UnderWay:
    """The one save of a checkpoint that is under way, if any.

    Args:
        handler: Writes files and removes them.
        count: Is called with a save that is written.
        goes_on: Whether the run does if one cannot be.
    """

    def __init__(self, handler: Any, count: Callable[[Save], None], *, goes_on: bool) -> None:
        self._handler = handler
        self._count = count
        self._goes_on = goes_on
        self._writer = Writer()
        self._save: Save | None = None
        self._held: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()

    def begin(
        self,
        save: Save,
        content: Mapping[str, Any] | None,
        run: Engine | None,
        optimizers: Iterable[torch.optim.Optimizer] | None,
    ) -> None:
        """Begin *save*, and see it through unless *optimizers* are given.

        Args:
            save: What there is to do; none is under way.
            content: Of its file; None if another rank writes it.
            run: Whose recordings are to be written before it: a resumed run would have a hole there.
            optimizers: Those whose steps wait until what they change is copied, while training goes on.
        """
        write = functools.partial(self._write, save, run)
        if content is None:
            pass
        elif optimizers is None:
            self._writer.write_now(content, write)
        else:
            self._writer.write_aside(content, map(self._hold, optimizers), write)
        self._save = save  # not before: a state that cannot be copied is not written
        if optimizers is None:
            self.finish()

    def settle(self) -> None:
        """Finish what is written by now; does not wait."""
        if self._save is not None and self._writer.is_done:
            self.finish()

    def finish(self, *, raises: bool = True) -> None:
        """Wait for what is being written, and count it as saved.

        Raises:
            CheckpointError: If it could not be written; only warns if not *raises*, or if the run goes on.
        """
        save, self._save = self._save, None
        if save is None:
            return
        try:
            self._writer.finish()
        except CheckpointError as err:
            if raises and not self._goes_on:
                raise
            warn(str(err))
            return
        self._count(save)
        # In a handler of an edge, where other saves are still to be asked for: that event stays the engine's last.
        fire(save.engine, CheckpointEvents.SAVED_CHECKPOINT)

    def _hold(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Let the steps of *optimizer* wait for a copy of what they change."""
        if optimizer not in self._held:
            self._held.add(optimizer)
            if isinstance(optimizer, Optimizer):
                optimizer.wait_before_steps(self._writer.wait_for_copy)
            else:
                optimizer.register_step_pre_hook(lambda *_: self._writer.wait_for_copy())
        return optimizer

    def _write(self, save: Save, run: Engine | None, content: Mapping[str, Any]) -> None:
        for recording in of_engine(run, Recordings):
            recording.flush()
        self._handler(content, save.filename)
        for filename in save.outdated:
            self._handler.remove(filename)
