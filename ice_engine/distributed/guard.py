"""The end of a process that waits in C, in its model's own collectives, for a rank that will never come.

Before a reduction all ranks meet in a round, and after it. In between a rank may be stopped, or wait in a collective of
its own. Nothing makes gloo give up what it has begun, and no error reaches a thread that is in it; so, as NCCL's own
watchdog does, this one ends the process, after it has said why.
"""

import atexit
import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator

from ice_engine.distributed.apart import Apart
from ice_engine.distributed.suspects import Suspects
from ice_engine.distributed.watch import Answer, Watch, here
from ice_engine.distributed.world import rank
from ice_engine.errors import RankError

logger = logging.getLogger(__name__)

_EVERY = 4.0  # seconds between two looks
_LONG = 12.0  # seconds from which on, if it does not compute, it is asked where the others are
_IDLE = 0.05  # of its time that a thread computes at most while it waits


class Guard:
    """Looks, in a thread, whom the thread that trains waits for.

    Args:
        watch: Knows where the other ranks are.
    """

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._entered: tuple[float, str, bool] | None = None
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def enter(self, doing: str, *, collectives: bool) -> None:
        """Begin what needs all ranks.

        Args:
            doing: What that is, such as ``"the reduction of iteration 4"``.
            collectives: Whether a rank that waits in one of its own is at a wrong place.
        """
        self._entered = time.monotonic(), doing, collectives
        if self._thread is None:
            self._thread = threading.Thread(target=self._look, daemon=True, name="ice_engine.guard")
            self._thread.start()
            # As the watch: an interpreter that ends while the thread is in the store, in C++, would abort.
            atexit.register(self.close)

    def leave(self) -> None:
        """End it."""
        self._entered = None

    @contextlib.contextmanager
    def during(self, doing: str) -> Iterator[None]:
        """Watch over what needs all ranks and is done inside something that may do so as well."""
        outer = self._entered
        self.enter(doing, collectives=False)
        try:
            yield
        finally:
            self._entered = outer

    def close(self) -> None:
        """Look no more."""
        self._done.set()
        if self._thread is not None:
            self._thread.join(_EVERY)
            atexit.unregister(self.close)

    def _look(self) -> None:
        answers: dict[int, Answer | None]
        before, suspects, used = None, Suspects(in_round=False), 0.0
        apart = Apart(self._watch)
        while not self._done.wait(_EVERY):
            self._watch.reduction = ""
            at = here()
            entered, used_before, used = self._entered, used, at.thread
            try:
                apart.look(at)
            except RankError as error:
                self._end(error)
            if entered is None or entered is not before or at.with_us:  # a round looks itself
                before, suspects = entered, Suspects(in_round=False)
                continue
            if used - used_before > _IDLE * _EVERY:
                continue
            begin, doing, collectives = entered
            waited = time.monotonic() - begin
            # In the user's code it may wait for anything, such as a compiler.
            if collectives and at.ours:
                self._watch.reduction = doing
            answers, fates = {}, self._watch.stopped()
            if self._watch.reduction and waited > _LONG and not fates:
                answers, fates = self._watch.whereabouts()
            try:
                suspects.look(answers, fates, waited, doing)
            except RankError as error:
                if self._entered is entered:
                    self._end(error)

    def _end(self, error: RankError) -> None:
        # Before the note: a store may be kept, or locked, by the very process that is stopped.
        logger.critical("rank %d ends here, as nothing else can end its wait: %s", rank(), error)
        self._watch.raised(error)
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(1)
