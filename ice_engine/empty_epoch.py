"""An epoch that is resumed where no micro-batch of it is left: it begins and ends, so that no handler is missed."""

from typing import Any

from ignite.engine import Engine, Events

from ice_engine.hooks import HookRegistry
from ice_engine.orders import BEFORE, LAST


class EmptyEpoch:
    """Lets Ignite find no data for the next epoch: it would train on more than is left, which is none.

    Args:
        engine: Its run has begun.
        cut: Whether ``terminate_epoch()`` ended the epoch before its time.
    """

    def __init__(self, engine: Engine, *, cut: bool) -> None:
        self._cut = cut
        self._length, self._epochs = engine.state.epoch_length, engine.state.max_epochs
        self._data: Any = None
        # Ignite would take a run for done whose last epoch has had all its micro-batches.
        engine.state.epoch_length = None
        registry = HookRegistry(engine)
        registry.add(Events.EPOCH_STARTED, self._on_starting, name="position.empty.begin", order=BEFORE)
        registry.add(Events.EPOCH_STARTED, self._on_started, name="position.empty.hide", order=LAST)
        registry.add(Events.EPOCH_COMPLETED, self._on_ended, name="position.empty.end", order=BEFORE)

    def _on_starting(self, engine: Engine) -> None:
        engine.state.epoch_length = self._length

    def _on_started(self, engine: Engine) -> None:
        engine._setup_dataloader_iter()  # noqa: SLF001 - what Ignite does next, if it has no iterator
        self._data = engine._dataloader_iter  # noqa: SLF001 - no public way to it
        # Of an epoch whose length it does not know, Ignite takes the end of the iterator for the end.
        engine._dataloader_iter, engine.state.epoch_length = iter(()), None  # noqa: SLF001 - likewise

    def _on_ended(self, engine: Engine) -> None:
        HookRegistry(engine).remove_of(self)
        engine._dataloader_iter = self._data  # noqa: SLF001 - likewise
        engine.state.epoch_length, engine.state.max_epochs = self._length, self._epochs
        if self._cut:
            engine._setup_dataloader_iter()  # noqa: SLF001 - as Ignite does after terminate_epoch()
