"""A run as JSON lines: what TensorBoard shows, for programs."""

import functools
import itertools
import json
import logging
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Engine

from ice_engine.appending import AppendedFile
from ice_engine.errors import ArgumentTypeError, ArgumentValueError, LedgerError
from ice_engine.optimizer import Optimizer
from ice_engine.recording import Clocks, Recording
from ice_engine.rows import Line

logger = logging.getLogger(__name__)

# JSON has no such numbers. As these texts, Python, JavaScript and pandas make numbers of them again.
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Ledger(Recording):
    """Writes a run as JSON lines, one for each step, skipped step and evaluation.

    A line has the ``time`` in seconds since 1970, its ``source``, which is the name of the optimizer or evaluator, the
    ``step`` and ``iteration``, for an optimizer also ``attempt``, ``epoch`` and ``micro_batches``, for an evaluator the
    number of its ``evaluation``, and the rows of :mod:`ice_engine.rows` under their tags.
    ``pandas.read_json(path, lines=True)`` is a table of it.

    The training thread only notes what happened; another one writes it, five times a second and at the end of each
    epoch and of the run, also when that ends with an exception. What cannot be written raises at the next step. Of a
    process that is killed, the last fifth of a second is missing and the last line may be torn; :func:`read` leaves
    that out.

    A file is one run. A resumed run goes on in it: what was written after the checkpoint is taken out. A fresh run
    begins a new one and keeps the old as ``<name>.1.jsonl``, and so on.

    Args:
        path: The file; its folder is made if it is not there.

    Raises:
        ArgumentTypeError: If it is no path.
        ArgumentValueError: If it is a folder.

    Examples:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(()))
        >>> optimizer = Optimizer(torch.optim.SGD([weight], lr=0.1))
        >>> trainer = Engine(lambda engine, batch: optimizer.backward(weight * batch))
        >>> _ = optimizer.attach(trainer)
        >>> _ = Ledger("runs/docs/ledger.jsonl").attach(trainer, optimizer)
        >>> state = trainer.run([1.0, 2.0])
        >>> [(row["step"], row["optimizer/grad_norm"]) for row in read("runs/docs/ledger.jsonl")]
        [(1, 1.0), (2, 2.0)]

    .. versionadded:: 0.1.0
    """

    _kind = "ledger"

    def __init__(self, path: str | Path) -> None:
        if not isinstance(path, str | Path):
            message = f"path must be a file's path such as 'runs/ledger.jsonl', got {type(path).__name__}"
            raise ArgumentTypeError(message)
        file = Path(path).expanduser()
        if file.is_dir():
            message = f"path must be a file such as '{file}/ledger.jsonl', got the folder '{file}'"
            raise ArgumentValueError(message)
        super().__init__(_LedgerFile(file.absolute()), "the ledger", file)

    def attach(
        self, engine: Engine, *optimizers: Optimizer, every: int = 1, evaluators: Mapping[str, Engine] | None = None
    ) -> "Ledger":
        """Write from now on.

        Args:
            engine: The trainer.
            *optimizers: Optimizers attached to it, at least one; the first one's line has the trainer's output.
            every: Write every so many steps, at least 1; skips and metrics are always written.
            evaluators: Engines whose metrics are written when they complete, by the name that prefixes their tags.

        Returns:
            This object.

        Raises:
            ArgumentTypeError: If *every* is no int, or *evaluators* not a dict of engines.
            ArgumentValueError: If *every* is below 1, or the name of an evaluator is taken.
            AttachError: If there is no optimizer, one is not attached to *engine*, or this is attached already.
        """
        self._attach(engine, optimizers, every, evaluators)
        return self


def read(path: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a ledger, with a last one left out that is torn.

    Args:
        path: The file; a run may be writing to it.

    Raises:
        FileNotFoundError: If it is not there.
        LedgerError: If another line is no JSON object.
    """
    return list(lines(path))


def lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a ledger one by one, as :func:`read` returns them, and with the same errors."""
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                row = _parsed(line, f"line {number} of {path}")
                yield {key: _NOT_FINITE.get(v, v) if isinstance(v, str) else v for key, v in row.items()}


class _LedgerFile:
    """The file, on the writing thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = None

    def begin(self, clocks: Clocks, evaluations: Mapping[str, int]) -> None:
        self.close()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists() and self._path.stat().st_size:
            self._take_back(clocks, evaluations)
        self._file = AppendedFile(self._path)

    def _take_back(self, clocks: Clocks, evaluations: Mapping[str, int]) -> None:
        with self._path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            whole = content.rfind(b"\n") + 1
            if content[whole : whole + 1] not in {b"", b"{"}:
                message = f"{self._path} is no ledger: it ends with {content[whole : whole + 20]!r}; give another path"
                raise LedgerError(message)
            beyond = functools.partial(_is_beyond, clocks=clocks, evaluations=evaluations)
            end = _end(content, whole, beyond, self._path)
        if end == whole or any(counts["attempt"] or counts["iteration"] for counts in clocks.values()):
            os.truncate(self._path, end)
            return
        numbered = (self._path.with_suffix(f".{i}{self._path.suffix}") for i in itertools.count(1))
        kept = next(path for path in numbered if not path.exists())
        self._path.rename(kept)
        logger.info("%s was of another run, and is now %s", self._path, kept)

    def write(self, line: Line) -> None:
        row = {"time": line.time, "source": line.source, "step": line.step, **line.clocks, **line.rows}
        plain = {key: _named(value) for key, value in row.items()}
        self._file.add(json.dumps(plain, separators=(",", ":"), allow_nan=False).encode() + b"\n")

    def sync(self) -> None:
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _end(content: mmap.mmap, whole: int, is_beyond: Callable[[dict[str, Any]], bool], path: Path) -> int:
    """Return where the lines end that a run goes on from; those beyond it are all at the end."""
    end = whole
    while end:
        begin = content.rfind(b"\n", 0, end - 1) + 1
        if not is_beyond(_parsed(content[begin:end], f"{path}, at byte {begin},")):
            break
        end = begin
    return end


def _is_beyond(row: Mapping[str, Any], clocks: Clocks, evaluations: Mapping[str, int]) -> bool:
    of_source = clocks.get(row["source"])
    if of_source is not None and "attempt" in row:  # else it is an evaluator's, which had that name then
        return bool(row["attempt"] > of_source["attempt"])
    if "evaluation" in row and row["source"] in evaluations:
        return bool(row["evaluation"] > evaluations[row["source"]])
    first = next(iter(clocks.values()))
    return bool(row["step"] > first["step"] or row.get("iteration", 0) > first["iteration"])


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        row = error
    if not isinstance(row, dict) or not {"source", "step"} <= row.keys():
        message = f"{where} is no line of a ledger: {line[:40]!r}; a ledger is what ice.Ledger writes"
        raise LedgerError(message)
    return row


def _named(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"  # noqa: PLR0124 - NaN alone is not itself
    return value
