"""Rounds: one small row of numbers from every rank to every rank, before anything that needs them all.

What all ranks do together, they first say to each other. A row begins with what its rank is about to do; if two do not
go together, every rank learns it in that round and stops with the same error, instead of one waiting for the other.
"""

import array
import atexit
import collections
import contextlib
import datetime
import enum
import functools
import logging
import signal
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist

from ice_engine.distributed.arrival import meet
from ice_engine.distributed.guard import Guard
from ice_engine.distributed.suspects import Suspects
from ice_engine.distributed.training_thread import training_thread
from ice_engine.distributed.watch import describe, others, watch
from ice_engine.distributed.world import PATIENCE, OfGroup, listed, own_group, rank, world_size
from ice_engine.errors import RankError

logger = logging.getLogger(__name__)

WIDTH = 128  # numbers in a row, the kind included
_INLINE = WIDTH - 3  # bytes of a text that fit into one
_ZEROS = array.array("d", bytes(8 * WIDTH))
_PAIR = 2  # ranks, for which an all-gather is one hop
_SOON = datetime.timedelta(seconds=4)  # after which it is asked who is missing
_LOST = "lost the connection"
_LOST_IN_GLOO = ("Connection reset by peer", "Connection closed by peer")  # in a collective of the model's
_LEAVING = datetime.timedelta(seconds=5)  # what a rank that raised waits for the others
_END = 2  # seconds that a process has to end whose round cannot


class Kind(enum.IntEnum):
    """What a rank is about to do, or has done."""

    START = 0
    GATE = 1
    EPOCH_END = 2
    RUN_END = 3
    UNIT = 4
    CLOSE = 5
    TEXT = 6
    RAISED = 7
    EPOCH_START = 8
    AGAIN = 9
    LEFT = 10
    EPOCH_LAST = 11
    UPDATE = 12
    PART = 13
    EDGE = 14

    def __str__(self) -> str:
        return _WORDS[self]


_WORDS = {
    Kind.START: "starts a run",
    Kind.EPOCH_START: "begins an epoch",
    Kind.GATE: "goes on training",
    Kind.EPOCH_LAST: "has done the last micro-batch of its epoch",
    Kind.EPOCH_END: "is at the end of its epoch",
    Kind.RUN_END: "is at the end of its run",
    Kind.UNIT: "enters its first weighted loss",
    Kind.CLOSE: "closes a window",
    Kind.TEXT: "needs all ranks",
    Kind.RAISED: "raised",
    Kind.AGAIN: "differentiates one more loss of a micro-batch",
    Kind.LEFT: "has left its run",
    Kind.UPDATE: "calls update()",
    Kind.PART: "has no more loss in a micro-batch",
    Kind.EDGE: "is at the end of a micro-batch",
}
_TOGETHER = (
    *({kind} for kind in Kind),
    {Kind.GATE, Kind.EPOCH_LAST, Kind.EPOCH_END, Kind.RUN_END, Kind.UNIT},
    {Kind.EPOCH_START, Kind.RUN_END},
    {Kind.UNIT, Kind.CLOSE, Kind.AGAIN, Kind.PART},
    {Kind.UNIT, Kind.UPDATE, Kind.AGAIN},
    {Kind.UNIT, Kind.EDGE, Kind.AGAIN, Kind.PART},
    {Kind.UNIT, Kind.UPDATE, Kind.EPOCH_END, Kind.RUN_END},
    {Kind.UNIT, Kind.EDGE, Kind.EPOCH_LAST, Kind.EPOCH_END, Kind.RUN_END},
)

Row = list[float]


class Rounds:
    """The rounds of all ranks; one object for one process group, see :func:`rounds`.

    Attributes:
        guard: Watches over what comes between two rounds.
    """

    def __init__(self) -> None:
        self._watch = watch()
        self._doing = "the first meeting of all ranks"
        try:
            meet(self._watch)
            self._group = own_group()
        except dist.DistError as error:  # the store is gone, or a rank, in between
            raise self.gone(error) from error
        self.guard = Guard(self._watch)
        # Made once: between forward and backward passes, which take the cache, five small tensors are 0.2 ms a round.
        self._rows = torch.empty(world_size(), WIDTH, dtype=torch.float64, device="cpu")
        self._parts = [*self._rows.unbind()]
        self._kept: collections.deque[Any] = collections.deque(maxlen=2)
        self._left: RankError | None = None  # why this rank gave a round up, which the others may still come to

    def close(self) -> None:
        """Look no more whom the others wait for."""
        self.guard.close()

    def exchange(self, kind: Kind, values: Sequence[float] = (), doing: str = "") -> list[Row]:
        """Give *values* to every rank and return everybody's, in the order of ranks, each after its kind.

        Args:
            kind: What this rank is about to do.
            values: At most ``WIDTH - 1`` numbers.
            doing: Where that is, such as ``"window 12"``; for messages on this rank.

        Raises:
            RankError: If another rank raised, is dead or stuck, or is about to do what does not go with *kind*.
        """
        self._doing = doing or str(kind)
        rows = self._gather(kind, values)
        kinds = [Kind(int(row[0])) for row in rows]
        if kind is not Kind.RAISED and Kind.RAISED in kinds:
            reasons = self._texts("", kinds)
            raised = [f"rank {r} raised {why}" for r, why in enumerate(reasons) if kinds[r] is Kind.RAISED]
            raise RankError("; ".join(raised))
        if Kind.RAISED not in kinds and not any({*kinds} <= allowed for allowed in _TOGETHER):
            places = self._texts(self._doing, kinds)
            said = "; ".join(f"rank {r} {other}, at {places[r]}" for r, other in enumerate(kinds))
            message = (
                f"the ranks are not at the same place: {said}. Do on every rank what one does: a handler, a "
                "checkpoint or a step on one rank only leaves the others waiting"
            )
            raise RankError(message)
        return rows

    def texts(self, text: str, doing: str) -> list[str]:
        """Give *text* to every rank and return everybody's, in the order of ranks.

        Raises:
            RankError: On all ranks, if they are not *doing* the same, and one's text would be taken for another's.
        """
        data = text.encode()
        inline = len(data) <= _INLINE
        rows = self.exchange(Kind.TEXT, [zlib.crc32(doing.encode()), len(data), *(data if inline else ())], doing)
        different = [r for r, row in enumerate(rows) if row[1] != rows[0][1]]
        if different:
            places, other = self._texts(doing, [Kind.TEXT] * world_size()), different[0]
            message = (
                f"ranks do different things at the same time: rank 0 {places[0]}, rank {other} {places[other]}. "
                "Let all ranks make the same calls in the same order"
            )
            raise RankError(message)
        if all(row[2] <= _INLINE for row in rows):
            return [bytes(map(int, row[3 : 3 + int(row[2])])).decode() for row in rows]
        return self._long_texts(data, [int(row[2]) for row in rows])

    @contextlib.contextmanager
    def transfer(self) -> Iterator[None]:
        """Watch over what all ranks send to each other, in collectives of torch's, after the last round.

        Raises:
            RankError: If another rank is gone; what this one has no memory for stays the error that it is.
        """
        with self.guard.during(self._doing):
            try:
                yield
            except (MemoryError, RuntimeError) as error:
                if _is_short_of_memory(error):
                    self.leave_note(error)  # for the others, whose connections close when this rank ends
                    raise
                raise self.gone(error) from error

    def leave_note(self, error: BaseException | None) -> None:
        """Let the others find out what this rank raised, even when it is gone; None takes it back."""
        self._watch.raised(error)

    def raised(self, error: BaseException) -> None:
        """Tell the others that this rank raised *error*, if they come within seconds.

        Raises:
            RankError: If another rank is dead or raised before and is gone, which *error* then comes from.
        """
        self._watch.raised(error)
        try:
            rows = self._gather(Kind.RAISED, (), _LEAVING)
            kinds = [Kind(int(row[0])) for row in rows]
            if any(kind is not Kind.RAISED for kind in kinds):
                self._texts(describe(error), kinds)
            self._watch.raised(None)  # all have heard it
        except TimeoutError:
            if self._watch.notes():  # another one did before, and this one perhaps for that
                raise self.gone(error) from error
            logger.warning("rank %d raised, and the others did not come to hear it", rank())

    def _texts(self, text: str, kinds: Sequence[Kind]) -> list[str]:
        # The second half of a round in which some rank raised: all ranks are in it.
        data = text.encode()[:2000]
        lengths = [int(row[1]) for row in self._gather(kinds[rank()], [len(data)])]
        return self._long_texts(data, lengths)

    def _long_texts(self, data: bytes, lengths: Sequence[int]) -> list[str]:
        longest = max(*lengths, 1)
        padded = torch.frombuffer(bytearray(data.ljust(longest)), dtype=torch.uint8)
        gathered = [torch.empty_like(padded) for _ in range(world_size())]
        self._do(self._group.allgather, [gathered], [padded], options=_of_all_gather())
        return [bytes(t[:n].tolist()).decode(errors="replace") for t, n in zip(gathered, lengths, strict=True)]

    def _gather(self, kind: Kind, values: Sequence[float], patience: datetime.timedelta | None = None) -> list[Row]:
        training_thread.note()
        if self._left is not None:
            message = f"this rank gave up waiting for the others before, and is a round ahead of them: {self._left}"
            raise RankError(message)
        numbers = _ZEROS[:]
        memoryview(numbers)[: 1 + len(values)] = array.array("d", [kind, *values])  # raises if there are too many
        row = torch.frombuffer(numbers, dtype=torch.float64)
        if world_size() == _PAIR:
            self._do(self._group.allgather, [self._parts], [row], options=_of_all_gather(), patience=patience)
        else:
            # Gloo's all-gather hands rows round, in as many hops as there are other ranks; to rank 0, and from there
            # down a tree, eight ranks on two cores take 4 ms instead of 15, four 1.3 instead of 1.7.
            outputs = [self._parts] if rank() == 0 else []
            self._do(self._group.gather, outputs, [row], options=dist.GatherOptions(), patience=patience)
            self._do(self._group.broadcast, [self._rows], options=dist.BroadcastOptions(), patience=patience)
        each: list[Row] = self._rows.tolist()
        return each

    def _do(
        self,
        collective: Callable[..., Any],
        *tensors: Any,
        options: Any,
        patience: datetime.timedelta | None = None,
    ) -> None:
        # Gloo's own, at which it closes the connection: who raised is not to wait at its end for who does not come.
        options.timeout = patience or PATIENCE
        try:
            work = collective(*tensors, options)
        except RuntimeError as error:
            raise self.gone(error) from error
        self._wait(work, patience)

    def _wait(self, work: Any, patience: datetime.timedelta | None = None) -> None:
        # Kept for a round: freed by the last to let go of it, which may be gloo's own thread, it would need the
        # interpreter there, and one that is about to end aborts the process.
        self._kept.append(work)
        begin, suspects = time.monotonic(), Suspects(in_round=True)
        while True:
            try:
                work.wait(patience or _SOON)
            except RuntimeError as error:
                over = time.monotonic() - begin > PATIENCE.total_seconds()  # gloo's own time, too, has run out
                if over or "timed out" not in str(error).lower():
                    raise self.gone(error) from error
                if patience is not None:
                    raise TimeoutError from error
            else:
                return
            stopped = self._watch.stopped()
            if not stopped and self._watch.notes():
                raise self.gone(TimeoutError("a rank that raised does not come"))
            waited = time.monotonic() - begin
            try:
                answers, fates = ({}, stopped) if stopped else self._watch.whereabouts()
                suspects.look(answers, fates, waited, self._doing)
            except RankError as error:
                self._left = error
                atexit.register(_end_anyway)
                raise

    def gone(self, error: BaseException) -> RankError:
        """Return the error that says who is gone, after a connection was lost with *error*."""
        notes = self._watch.notes()
        # Those who lost it as well say nothing new.
        first = {r: note for r, note in notes.items() if not any(lost in note for lost in (_LOST, *_LOST_IN_GLOO))}
        known = [f"rank {r} raised {note}" for r, note in first.items()]
        # Without a note, if its store is still there; that is kept by rank 0, or by torchrun. Those that run on this
        # host may be silent for want of a store, or because they are about to end: asked if nobody else is to blame.
        silent = [r for r in others() if r not in notes and self._watch.fate(r) == "is gone"]
        if not silent:
            asked = [r for r in others() if r not in notes and (not known or self._watch.fate(r) != "runs")]
            silent = [r for r, answer in self._watch.ask(asked).items() if answer is None]
        if silent:
            known.append(f"{listed(silent)} {'does' if len(silent) == 1 else 'do'} not answer any more: killed?")
        why = "; ".join(known) or describe(error)
        return RankError(
            f"{_LOST} at {self._doing}: {why}{'' if why.endswith('?') else '.'} Look for the first error in the output "
            "of that rank"
        )


def _of_all_gather() -> Any:
    return cast("Any", dist.distributed_c10d).AllgatherOptions()  # not exported by name, unlike the others


def _is_short_of_memory(error: BaseException) -> bool:
    # Torch's of the CPU is no class of its own.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def _end_anyway() -> None:
    # Gloo cannot take back what this rank has begun in the round that it gave up, and would wait for it at the end of
    # the process, for as long as a rank that is slow has. The others, and torchrun, wait for that end.
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_END)


def is_from_others(error: BaseException) -> bool:
    """Whether *error* is, or was raised for, one that other ranks have as well, or are the cause of."""
    chain: BaseException | None = error
    while chain is not None and not isinstance(chain, RankError):
        chain = chain.__cause__ or chain.__context__
    return chain is not None


_current = OfGroup(Rounds, Rounds.close)


def rounds() -> Rounds:
    """Return the rounds of the process group there is; the first call is one that all ranks must make."""
    return _current.get()


def gatherer() -> Callable[[str], list[str]] | None:
    """Return the function that gives every rank's text to every rank, in the order of ranks; None with one process."""
    return functools.partial(rounds().texts, doing="what its processors write") if world_size() > 1 else None
