"""Which rank everybody is waiting for, and where in its code it is: asked when a wait gets long or a connection breaks.

A thread in every process answers for the one that trains. So a rank that is dead or stopped is told from one that is
slow, and one that waits in a collective of its own, which nobody else will ever join, is found in seconds instead of at
the end of torch's half an hour.
"""

import atexit
import contextlib
import dataclasses
import datetime
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any, cast

import ignite
import torch
import torch.distributed as dist

from ice_engine.distributed.process import Process, this_process
from ice_engine.distributed.training_thread import training_thread
from ice_engine.distributed.world import OfGroup, rank, world_size

logger = logging.getLogger(__name__)

_EVERY = 0.3  # seconds between two looks into the store
_ANSWER = 3.0  # seconds to wait for an answer
_READ = 8.0  # seconds for the others to look, which they do every 4
_CALL = 0.001  # of a processor, which a thread that sleeps in C uses less of; each call from Python takes some 0.1 ms
_IDLE = 0.05  # of its time that a process computes at most while nothing comes
_SPINS = 0.95  # of its time that a thread computes at least which waits for a device, as in NCCL's barrier
_AGAIN = 0.5  # seconds after which one that is stopped still is; a job that goes on does so process by process
# What DistributedDataParallel() calls, which are collectives in C.
_OF_DDP = {"_verify_param_shape_across_processes", "_sync_module_states"}
# Parts of its collectives of objects in which a rank computes: to pickle gigabytes takes as long.
_OF_OBJECTS = {"_object_to_tensor", "_tensor_to_object"}
_TORCH = str(Path(torch.__file__).parent)
_OURS = str(Path(__file__).parent.parent)
_IGNITE = str(Path(ignite.__file__).parent)


@dataclasses.dataclass(frozen=True)
class Answer:
    """Where a rank is.

    Attributes:
        place: The innermost line of the user's code, such as ``train.py:12 in evaluate``.
        collective: The function of ``torch.distributed`` that it waits in, other than for us; empty if in none.
        with_us: Whether it waits in a round of ours, where all come together.
        ours: Whether it is in this package, called by the user's code, as in a backward.
        reduction: Where it waits in a reduction of the model's, if it does.
        at: When that was, by a clock of its own.
        thread: Seconds of a processor that the thread has used so far, which trains.
        process: The same, of all threads, some of which move data for that one.
    """

    place: str
    collective: str = ""
    with_us: bool = False
    ours: bool = False
    reduction: str = ""
    at: float = dataclasses.field(default=0.0, compare=False)
    thread: float = dataclasses.field(default=0.0, compare=False)
    process: float = dataclasses.field(default=0.0, compare=False)

    def waits_since(self, before: "Answer | None") -> bool:
        """Return whether it has waited in one and the same call since it answered *before*, for what did not come."""
        if before is None or self != before:
            return False
        thread, process, passed = self.thread - before.thread, self.process - before.process, self.at - before.at
        return (thread < _CALL and process < _IDLE * passed) or thread > _SPINS * passed


class Watch:
    """Answers for this process, and asks the others.

    Args:
        store: Shared by all ranks.

    Attributes:
        reduction: Where the thread that trains waits in a reduction of the model's; as the guard says.
    """

    def __init__(self, store: Any) -> None:
        self._store = cast("Any", dist).PrefixStore("ice_engine", store)
        # As they are now: a script that fails may destroy its process group, as idist.Parallel does, before it ends.
        self._rank, self._others = rank(), others()
        training_thread.note()  # so far: it may wait for others before all meet
        self._done = threading.Event()
        self._processes: dict[int, Process] = {}
        self.reduction = ""
        self._failed = False
        self._store.set(f"process/{self._rank}", json.dumps(dataclasses.asdict(this_process())))
        # Of its own, as a client that waits in another thread would keep this one waiting.
        store = self._store.clone()
        self._thread = threading.Thread(target=self._answer, args=(store,), daemon=True, name="ice_engine.watch")
        self._thread.start()
        # An interpreter that ends while the thread is in the store, in C++, would abort.
        atexit.register(self._end)

    def close(self) -> None:
        """Stop answering."""
        self._done.set()
        self._thread.join(_ANSWER)
        atexit.unregister(self._end)

    def _end(self) -> None:
        self._note_uncaught(self._store)
        if self._failed and self._rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            # The store is in this process, not in torchrun's; the others look there for who was the first to fail.
            with contextlib.suppress(RuntimeError):
                self._get_to_know()
            end = time.monotonic() + _READ
            while time.monotonic() < end and any(self.fate(r) == "runs" for r in self._others):
                time.sleep(_EVERY / 10)
        self.close()

    def arrive(self) -> None:
        """Say that this rank is where all meet."""
        self._store.set(f"here/{self._rank}", "")

    def missing(self, patience: datetime.timedelta) -> list[int]:
        """Return the ranks that have not arrived within *patience*."""
        with contextlib.suppress(RuntimeError):  # not all came in that time, in the words of each kind of store
            self._store.wait([f"here/{r}" for r in self._others], patience)
        self._get_to_know()
        return [r for r in self._others if not self._store.check([f"here/{r}"])]

    def _get_to_know(self) -> None:
        for r in self._others:
            if r not in self._processes and self._store.check([f"process/{r}"]):
                self._processes[r] = Process(**json.loads(self._store.get(f"process/{r}")))

    def raised(self, error: BaseException | None) -> None:
        """Leave a note for the others, for when this rank is gone, that it raised *error*; None takes it back."""
        self._failed = error is not None
        with contextlib.suppress(RuntimeError):
            self._store.set(f"raised/{self._rank}", "" if error is None else describe(error))

    def _note_uncaught(self, store: Any) -> None:
        """Leave a note of what this process ends with, raised in no run."""
        error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
        if error is not None:
            self._failed = True
            with contextlib.suppress(RuntimeError):
                store.set(f"raised/{self._rank}", describe(error))

    def knows(self, of: int) -> bool:
        """Return whether rank *of* has made its optimizer, as far as was looked."""
        return of in self._processes

    def fate(self, of: int) -> str:
        """Return what has become of the process of rank *of*, as far as this host knows."""
        if of not in self._processes:
            return "unknown"
        fate = self._processes[of].fate
        if fate == "is stopped":
            time.sleep(_AGAIN)
            fate = self._processes[of].fate
        return fate

    def stopped(self) -> dict[int, str]:
        """Return the fate of the ranks that are stopped.

        To be asked before all that needs the store, which may be in one of them: who asks there would wait for it.
        """
        return {r: fate for r in self._others if (fate := self.fate(r)) == "is stopped"}

    def whereabouts(self) -> tuple[dict[int, Answer | None], dict[int, str]]:
        """Return where the other ranks are, and the fate of those that do not say."""
        answers = self.ask(self._others)
        return answers, {r: self.fate(r) for r, answer in answers.items() if answer is None}

    def notes(self) -> dict[int, str]:
        """Return what other ranks have raised, as they left it."""
        with contextlib.suppress(RuntimeError):
            left = [r for r in self._others if self._store.check([f"raised/{r}"])]
            return {r: note for r in left if (note := self._store.get(f"raised/{r}").decode())}
        return {}

    def ask(self, ranks: Iterable[int]) -> dict[int, Answer | None]:
        """Return where each of *ranks* is; None for one that does not answer within seconds."""
        ranks = list(ranks)
        found: dict[int, Answer | None] = dict.fromkeys(ranks)
        with contextlib.suppress(RuntimeError):  # the store is gone, and with it the rank that keeps it
            call = self._store.add("calls", 1)
            end = time.monotonic() + _ANSWER
            while None in found.values() and time.monotonic() < end:
                for other in (r for r in ranks if found[r] is None):
                    if self._store.check([f"{call}/{other}"]):
                        found[other] = Answer(**json.loads(self._store.get(f"{call}/{other}")))
                time.sleep(_EVERY / 10)
        return found

    def _answer(self, store: Any) -> None:
        answered = 0
        with contextlib.suppress(RuntimeError, ValueError):  # the store is gone, or the process group of this rank
            while not self._done.wait(_EVERY):
                calls = store.add("calls", 0)
                # At its end it may wait for others. Before, what is uncaught is of an earlier cell of a notebook.
                if calls > answered and not threading.main_thread().is_alive():
                    self._note_uncaught(store)
                for call in range(answered + 1, calls + 1):
                    answer = dataclasses.replace(here(), reduction=self.reduction)
                    store.set(f"{call}/{self._rank}", json.dumps(dataclasses.asdict(answer)))
                answered = calls


def here() -> Answer:
    """Return where the thread of this process is that trains."""
    return dataclasses.replace(
        where(training_thread.frame),
        at=time.monotonic(),
        thread=training_thread.seconds,
        process=time.process_time(),
    )


def where(frame: FrameType | None) -> Answer:
    """Return where *frame*, the innermost one of a thread, is in the user's code and in ``torch.distributed``."""
    collective, with_us, ours, packs = "", False, False, False
    while frame is not None:
        code = frame.f_code
        path = code.co_filename
        if path == dist.distributed_c10d.__file__:  # and not what computes with tensors spread over ranks
            packs |= code.co_name in _OF_OBJECTS
            if not packs and code.co_name not in {"wrapper", "wait"}:
                collective = code.co_name
        elif code.co_name in _OF_DDP and path == torch.distributed.utils.__file__:
            collective = code.co_name
        elif path.startswith(_OURS):
            ours, with_us = True, with_us or path.endswith("rounds.py")
        elif not path.startswith((_TORCH, _IGNITE, "<frozen")):
            place = f"{Path(path).name}:{frame.f_lineno} in {code.co_name}"
            return Answer(place, "" if with_us else collective, with_us, ours)
        frame = frame.f_back
    return Answer("no line of Python", "" if with_us else collective, with_us, ours)


def describe(error: BaseException) -> str:
    """Return *error* as one line."""
    text = ""
    with contextlib.suppress(Exception):  # it may be of anybody's class
        text = str(error)
    return f"{type(error).__name__}: {' '.join(text.split()) or 'no message'}"


def others() -> list[int]:
    """Return all ranks but this one."""
    return [each for each in range(world_size()) if each != rank()]


_current = OfGroup(lambda: Watch(dist.distributed_c10d._get_default_store()), Watch.close)  # noqa: SLF001 - no public way to it


def watch() -> Watch:
    """Return the watch of the process group there is; the first call, on this rank alone, begins it."""
    return _current.get()
