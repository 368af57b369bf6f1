"""Writes one state at a time while training goes on: a thread copies what steps change, and writes the copy."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from ice_engine.snapshot import Snapshot, Snapshots, changed_by_steps

Write = Callable[[Mapping[str, Any]], None]


class Writer:
    """Lets a function write states, one after the other.

    The thread is no daemon: an interpreter that ends waits for what it writes.
    """

    def __init__(self) -> None:
        self._snapshots = Snapshots()
        self._thread: ThreadPoolExecutor | None = None
        self._written: Future[None] | None = None
        self._snapshot: Snapshot | None = None

    def write_aside(self, state: Mapping[str, Any], optimizers: Iterable[torch.optim.Optimizer], write: Write) -> None:
        """Copy *state* and let *write* have the copy, in a thread; the next step waits until it is copied.

        Args:
            state: Plain data; containers are new already.
            optimizers: Whose steps alone change their parameters and their state, and come after
                :meth:`wait_for_copy`.
            write: Is called with the copy.
        """
        self.finish()
        optimizers = list(optimizers)
        snapshot = self._snapshots.take(state, (t for optimizer in optimizers for t in changed_by_steps(optimizer)))
        self._snapshot = snapshot
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="ice_engine.writer")
        self._written = self._thread.submit(lambda: write(snapshot.complete()))

    def wait_for_copy(self) -> None:
        """Wait until what is under way is copied; to be called before any of its optimizers steps."""
        if self._snapshot is not None:
            self._snapshot.wait()
            self._snapshot = None

    def write_now(self, state: Mapping[str, Any], write: Write) -> None:
        """Let *write* have *state* itself, and return when it is written; what it raises, :meth:`finish` does."""
        self.finish()
        written: Future[None] = Future()
        try:
            write(state)
            written.set_result(None)
        except BaseException as err:  # noqa: BLE001 - raised where all such errors are, Ctrl-C too
            written.set_exception(err)
        self._written = written

    @property
    def is_done(self) -> bool:
        """Whether nothing is under way."""
        return self._written is None or self._written.done()

    def finish(self) -> None:
        """Wait for what is under way, and raise what was raised there."""
        written, self._written = self._written, None
        if written is not None:
            written.result()
