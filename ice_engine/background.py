"""A thread that writes what another one hands over, in order, so that training does not wait for the disk."""

import collections
import logging
import os
import threading
from collections.abc import Callable
from typing import Any, Protocol

from ice_engine.errors import IceEngineError, WriteError

logger = logging.getLogger(__name__)

_PERIOD = 0.2  # seconds between two looks at what has come: many calls in one go cost less than each by itself
_PATIENCE = 60.0  # seconds that a disk may take


class File(Protocol):
    """What the calls write to; nobody else touches it, so it needs no lock."""

    def sync(self) -> None:
        """Hand over to the operating system what was written so far."""

    def close(self) -> None:
        """Write no more."""


class Background:
    """Calls functions in a thread of its own, one after the other, in the order in which they were put.

    The process that starts it owns it: in a fork of it nothing is written. The thread is a daemon, so whoever makes
    one sees to it that :meth:`close` is called, at the latest when the interpreter exits.

    Args:
        file: What the functions write to.
        what: What errors call it, such as ``"TensorBoard's files in runs/1"``.

    Attributes:
        put: Takes ``(function, *arguments)`` and returns at once; once a call has failed, it raises the error.
    """

    def __init__(self, file: File, what: str) -> None:
        self._file = file
        self._what = what
        self._calls: collections.deque[tuple[Any, ...]] = collections.deque()
        self._waiting: collections.deque[threading.Event] = collections.deque()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._process: int = 0
        self._ends: bool = False
        self._error: Exception | None = None
        # The deque's own method: nothing is between the training thread and the queue.
        self.put: Callable[[tuple[Any, ...]], None] = self._calls.append

    def start(self) -> None:
        """Start the thread, unless it runs."""
        if self._thread is None:
            self._process = os.getpid()
            self._thread = threading.Thread(target=self._work, name=f"ice_engine: {self._what}", daemon=True)
            self._thread.start()

    def flush(self) -> None:
        """Return when all that was put is done and handed over to the operating system.

        Raises:
            WriteError: If a call failed, or the thread does not come to an end within a minute.
        """
        if not self._is_mine:
            return
        done = threading.Event()
        self._waiting.append(done)
        self._wake.set()
        if not done.wait(_PATIENCE):
            message = f"{self._what} cannot be written: the disk has not answered for {_PATIENCE:.0f} s"
            raise WriteError(message)
        self._raise_error()

    def close(self) -> None:
        """Do what was put, close the file and end the thread; an error goes to the log."""
        if not self._is_mine or self._ends:
            return
        self._ends = True
        self._wake.set()
        if self._thread is None or self._thread is threading.current_thread():
            return  # the garbage collector found its owner on this very thread, which now ends by itself
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            logger.error("%s: what was recorded last is lost, the disk does not answer", self._what)

    @property
    def _is_mine(self) -> bool:
        # A fork has the queue and not the thread, and its parent writes what was in it.
        return self._thread is not None and self._process == os.getpid()

    def _work(self) -> None:
        while not self._ends:
            self._wake.wait(_PERIOD)
            self._wake.clear()
            self._catch_up()
        self._catch_up()
        try:
            self._file.close()
        except Exception as error:  # noqa: BLE001 - nobody is left who could catch it
            self._fail(error)

    def _catch_up(self) -> None:
        # Who waits now waits for what was put until now.
        waiting = [self._waiting.popleft() for _ in range(len(self._waiting))]
        count = len(self._calls)
        for _ in range(count):
            function, *arguments = self._calls.popleft()
            self._try(function, *arguments)
        if count:
            self._try(self._file.sync)
        for done in waiting:
            done.set()

    def _try(self, function: Callable[..., Any], *arguments: Any) -> None:
        if self._error is not None:
            return  # what comes after a torn write could not be read
        try:
            function(*arguments)
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to the training thread
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._error = error
        self.put = self._refuse
        logger.error("%s cannot be written: %s", self._what, error)  # it may be that nobody asks any more

    def _refuse(self, _: tuple[Any, ...]) -> None:
        self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            if isinstance(self._error, IceEngineError):
                raise self._error
            message = (
                f"{self._what} cannot be written: {self._error}. What was written before is whole; make room or choose "
                "another path, and resume from the last checkpoint"
            )
            raise WriteError(message) from self._error
