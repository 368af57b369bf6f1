"""Which thread of this process trains: the one that met the other ranks last, or else the main one."""

import sys
import threading
import time
from types import FrameType


class TrainingThread:
    """That thread, for others that look at it."""

    def __init__(self) -> None:
        self._noted: tuple[threading.Thread, int | None] | None = None

    def note(self) -> None:
        """Note that it is the one which calls this."""
        thread = threading.current_thread()
        if self._noted is None or self._noted[0] is not thread:
            # The clock now: to ask for that of a thread which has ended is not safe.
            self._noted = thread, _clock(thread)

    @property
    def frame(self) -> FrameType | None:
        """Where it is, in Python."""
        return sys._current_frames().get(self._now()[0].ident or 0)  # noqa: SLF001 - no public way to it

    @property
    def seconds(self) -> float:
        """Of a processor that it has used; 0.0 where they cannot be told."""
        clock = self._now()[1]
        try:
            return 0.0 if clock is None else time.clock_gettime(clock)
        except OSError:  # it has ended just now
            return 0.0

    def _now(self) -> tuple[threading.Thread, int | None]:
        noted, main = self._noted, threading.main_thread()
        return noted if noted is not None and noted[0].is_alive() else (main, _clock(main))


def _clock(thread: threading.Thread) -> int | None:
    if thread.ident is None or not hasattr(time, "pthread_getcpuclockid"):
        return None
    return time.pthread_getcpuclockid(thread.ident)


training_thread = TrainingThread()
"""Of this process."""
