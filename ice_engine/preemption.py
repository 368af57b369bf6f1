"""The signal that a machine is about to be taken away: noted, for the run to end where nothing is lost."""

import logging
import os
import signal
import threading
from collections.abc import Iterable
from types import FrameType
from typing import Any

from ignite.engine import Engine

from ice_engine.of_engine import of_engine

logger = logging.getLogger(__name__)

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Preemption:
    """Takes note of the first signal; at a second one, what would have happened without this happens at once.

    Args:
        signals: Those that are meant.

    Attributes:
        asked: The signal that came; None as long as none did.
    """

    def __init__(self, signals: Iterable[int]) -> None:
        self._signals = tuple(signals)
        self._before: dict[int, Any] = {}
        self.asked: signal.Signals | None = None

    def is_asked(self) -> bool:
        """Whether a signal came."""
        return self.asked is not None

    def listen(self) -> None:
        """Take the signals over, where that is possible: in the main thread."""
        self.asked = None
        if threading.current_thread() is threading.main_thread() and not self._before:
            self._before = {number: signal.signal(number, self._note) for number in self._signals}

    def leave(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.asked is None:
            self.asked = signal.Signals(number)
            logger.warning(
                "%s: the run saves and ends where its next window does; again, and it ends now", self.asked.name
            )
            return
        self.leave()
        os.kill(os.getpid(), number)


def preemption(engine: Engine, signals: Iterable[int]) -> Preemption:
    """Return what listens for *engine*'s run, one object for one engine, made with the first *signals*."""
    return of_engine(engine, Preemption, signals)
