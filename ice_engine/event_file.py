"""The two places that TensorBoard's data can go to: a file of our own, or a writer that is there already."""

import functools
import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ice_engine.appending import AppendedFile
from ice_engine.crc32c import masked_crc32c

_KEPT = 64  # messages of scalars, one for each set of tags


class Histogram(NamedTuple):
    """How many values are how large, as TensorBoard has it.

    Attributes:
        smallest: Of the values.
        largest: Of the values.
        number: How many.
        total: Their sum.
        squares: The sum of their squares.
        limits: The upper end of each bucket.
        counts: How many values are in each.
    """

    smallest: float
    largest: float
    number: int
    total: float
    squares: float
    limits: Sequence[float]
    counts: Sequence[float]


class Target(Protocol):
    """What can be written for TensorBoard, each at a step and a time in seconds since 1970."""

    def scalars(self, values: Mapping[str, float], step: int, now: float) -> None:
        """Add a point to each of these curves."""

    def text(self, tag: str, markdown: str, step: int, now: float) -> None:
        """Add a text."""

    def histogram(self, tag: str, histogram: Histogram, step: int, now: float) -> None:
        """Add a histogram."""

    def layout(self, layout: Mapping[str, Mapping[str, Any]]) -> None:
        """Set what the tab Custom Scalars shows, as ``SummaryWriter.add_custom_scalars`` takes it."""

    def summary(self, summary: Any, step: int) -> None:
        """Add what only a plugin of TensorBoard's understands."""

    def restart(self, step: int) -> None:
        """Take back what was written from *step* on."""

    def sync(self) -> None:
        """Hand over to the operating system what was written so far."""

    def close(self) -> None:
        """Write no more."""


class EventFile:
    """A file of TensorBoard's, written by the thread that calls, which therefore sees what fails.

    Args:
        folder: Made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        # Imported here: it loads TensorBoard, which a run without it need not pay for.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from torch.utils.tensorboard import summary

        self._protos: Any = event_pb2
        self._summaries: Any = summary
        self._summary_proto: Any = summary_pb2.Summary
        # Every step has the same tags: one message, filled anew, takes a third of the time of a new one.
        self._of_scalars = functools.lru_cache(_KEPT)(self._make_of_scalars)
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names: nanoseconds, for runs that are short.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = AppendedFile(folder / name)
        self._records: list[bytes] = []
        self._event(time.time(), file_version="brain.Event:2")

    def scalars(self, values: Mapping[str, float], step: int, now: float) -> None:
        event = self._of_scalars(tuple(values))
        event.wall_time, event.step = now, step
        for entry, number in zip(event.summary.value, values.values(), strict=True):
            entry.simple_value = number
        self._add(event)

    def text(self, tag: str, markdown: str, step: int, now: float) -> None:
        self._event(now, step=step, summary=self._summaries.text(tag, markdown))

    def histogram(self, tag: str, histogram: Histogram, step: int, now: float) -> None:
        self._event(now, step=step, summary=self._summaries.histogram_raw(tag, *histogram))

    def layout(self, layout: Mapping[str, Mapping[str, Any]]) -> None:
        self.summary(self._summaries.custom_scalars(layout), 0)

    def summary(self, summary: Any, step: int) -> None:
        self._event(time.time(), step=step, summary=summary)

    def restart(self, step: int) -> None:
        started = self._protos.SessionLog(status=self._protos.SessionLog.START)
        self._event(time.time(), step=step, session_log=started)

    def sync(self) -> None:
        # All at once: numpy lets go of the interpreter in each call, which the training thread then takes.
        for record, checksum in zip(self._records, masked_crc32c(self._records), strict=True):
            self._file.add(_head(len(record)) + record + struct.pack("<I", checksum))
        self._records.clear()
        self._file.sync()

    def close(self) -> None:
        try:
            self.sync()
        finally:
            self._file.close()

    def _make_of_scalars(self, tags: Sequence[str]) -> Any:
        value = self._summary_proto.Value
        return self._protos.Event(summary=self._summary_proto(value=[value(tag=tag) for tag in tags]))

    def _event(self, now: float, **fields: Any) -> None:
        self._add(self._protos.Event(wall_time=now, **fields))

    def _add(self, proto: Any) -> None:
        self._records.append(proto.SerializeToString())


@functools.lru_cache
def _head(length: int) -> bytes:
    """Return what stands before a record: its length, of which there are few, and the checksum of that."""
    head = struct.pack("<Q", length)
    return head + struct.pack("<I", *masked_crc32c([head]))


class GivenWriter:
    """A ``SummaryWriter`` of torch or tensorboardX that somebody else made and closes.

    What tensorboardX has no way to write, the table of hyperparameters, is left out there. Nothing is taken back:
    what else is in its folder may stand over another axis than the optimizer's step.

    Args:
        writer: The writer.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def scalars(self, values: Mapping[str, float], step: int, now: float) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step, now)

    def text(self, tag: str, markdown: str, step: int, now: float) -> None:
        self._writer.add_text(tag, markdown, step, now)

    def histogram(self, tag: str, histogram: Histogram, step: int, now: float) -> None:
        self._writer.add_histogram_raw(tag, *histogram, step, now)

    def layout(self, layout: Mapping[str, Mapping[str, Any]]) -> None:
        self._writer.add_custom_scalars(layout)

    def summary(self, summary: Any, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if isinstance(self._writer, SummaryWriter):
            writer: Any = self._writer
            writer._get_file_writer().add_summary(summary, step)  # noqa: SLF001 - has no public way to its folder

    def restart(self, step: int) -> None:
        pass

    def sync(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        pass
