"""The signal that a machine is about to be taken away: noted, for the run to end where nothing is lost."""

import ctypes
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
        signals: Those that are meant.
        asked: The signal that came; None as long as none did.
    """

    def __init__(self, signals: Iterable[int]) -> None:
        self.signals = tuple(signals)
        self._before: dict[int, Any] = {}
        self.asked: signal.Signals | None = None

    def is_asked(self) -> bool:
        """Whether a signal came."""
        return self.asked is not None

    def listen(self) -> None:
        """Take the signals over, where that is possible: in the main thread."""
        self.asked = None
        if threading.current_thread() is threading.main_thread() and not self._before:
            taken = [number for number in self.signals if not _is_handled_in_c(number)]
            self._before = {number: signal.signal(number, self._note) for number in taken}
            _listening.append(self)

    def leave(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        if self in _listening:
            _listening.remove(self)

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


def _is_handled_in_c(number: int) -> bool:
    """Whether the handler is none of Python's, which could not give it back, such as faulthandler.register()'s."""
    known = signal.getsignal(number)
    # Python knows of those that were there before it began; the system, of all.
    return known is None or (not callable(known) and _handler_of(number) not in {None, int(signal.SIG_IGN)})


_handler_of = ctypes.pythonapi.PyOS_getsig
_handler_of.argtypes, _handler_of.restype = [ctypes.c_int], ctypes.c_void_p


# -- children ------------------------------------------------------------------------------------------------------
# A forked child has the handlers of before: it would note Process.terminate(), and go on. Until it has them, the
# signals are held back, for Python forgets those that come in between.

_listening: list[Preemption] = []
_mask = threading.local()  # any thread may fork


def _before_fork() -> None:
    _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, {n for one in _listening for n in one.signals})


def _after_fork_in_parent() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _mask.before)


def _after_fork_in_child() -> None:
    for one in reversed(_listening.copy()):  # the last one gives back what those before it took
        one.leave()
    signal.pthread_sigmask(signal.SIG_SETMASK, _mask.before)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
