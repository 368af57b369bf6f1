"""From an engine's events to rows in a file: what :class:`TensorBoard` and :class:`Ledger` have in common."""

import contextlib
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from ignite.engine import Engine, Events

from ice_engine.arguments import count
from ice_engine.background import Background, File
from ice_engine.distributed import world
from ice_engine.endings import when_left
from ice_engine.errors import ArgumentTypeError, ArgumentValueError, AttachError, IceEngineError
from ice_engine.evaluations import Evaluations
from ice_engine.events import StepRecord, is_running
from ice_engine.hooks import HookRegistry
from ice_engine.memory import memory_rows
from ice_engine.of_engine import of_engine, require_attached
from ice_engine.optimizer import Optimizer
from ice_engine.rows import MEMORY, OUTPUT, Line, kept, kept_metrics, metric_rows, step_clocks, step_rows
from ice_engine.streams import mark, streamed, wait
from ice_engine.summary import summary

Clocks = Mapping[str, Mapping[str, int]]
"""The clocks of each optimizer by its name, the first one's first."""

_MEMORY_PERIOD = 0.2  # seconds for which a reading holds; on a GPU it takes as long as all the rest


class RowFile(File, Protocol):
    """Where rows go; all of it is called by one thread."""

    def begin(self, clocks: Clocks, evaluations: Mapping[str, int]) -> None:
        """Open it where a run at *clocks* goes on: what it has beyond them is taken back.

        Of an evaluator, what is beyond its *evaluations*, if they are known.
        """

    def write(self, line: Line) -> None:
        """Add the rows of one moment."""


class Recording:
    """Notes what optimizers do and evaluators find, and has a thread of its own write it.

    In many processes, that of rank 0 writes; attach on all.
    """

    _kind: str

    def __init__(self, file: RowFile, what: str, place: object) -> None:
        self._file = file
        self._place = place
        self._background = Background(file, f"{what} {place}")
        self._optimizers: tuple[Optimizer, ...] = ()
        self._evaluations = Evaluations()
        self._begun: bool = False
        self._devices: set[torch.device] = set()
        # After an exception, and when the interpreter exits: what was put until then is still written.
        weakref.finalize(self, self._background.close)

    def flush(self) -> None:
        """Bring everything recorded so far to the file; it is done at the end of each epoch and of the run.

        Raises:
            WriteError: If something cannot be written.
        """
        self._background.flush()

    def _attach(
        self, engine: Engine, optimizers: tuple[Optimizer, ...], every: int, evaluators: Mapping[str, Engine] | None
    ) -> None:
        count("every", every, 1)
        hooks = HookRegistry(engine)
        found = _check_evaluators(evaluators)
        counts = of_engine(engine, Evaluations)
        self._check_optimizers(engine, optimizers, found)
        boundaries = Events.EPOCH_COMPLETED | Events.COMPLETED | Events.TERMINATE | Events.INTERRUPT
        wanted: list[tuple[HookRegistry, Any, Callable[..., None], str, int]] = [
            (hooks, Events.STARTED, self._on_started, "open", -90),
            (hooks, boundaries, self.flush, "flush", 40),
        ]
        for optimizer in optimizers:
            note = self._noter(optimizer, first=optimizer is optimizers[0])
            completed, skipped = (optimizer.event(kind) for kind in ("STEP_COMPLETED", "STEP_SKIPPED"))
            wanted += [
                (hooks, completed(every=every), note, f"{optimizer.name}.step", 0),
                (hooks, skipped, note, f"{optimizer.name}.skip", 0),
            ]
        for name, evaluator in found.items():
            counts.setdefault(f"{self._kind}.{name}", 0)
            wanted.append((HookRegistry(evaluator), Events.COMPLETED, self._metrics_noter(name), name, 90))
        if world.rank() == 0:
            self._add(wanted)
            when_left(engine, self._on_left)
            summary(engine).wrote(self._place)
            for name, evaluator in found.items():
                summary(engine).follow(name, evaluator, optimizers[0])
        of_engine(engine, Recordings).append(self)
        self._optimizers, self._evaluations = optimizers, counts
        for optimizer in optimizers:
            optimizer.measure("grad_norm", "times")  # on every rank: a norm may be that of all
        if is_running(engine) and world.rank() == 0:
            self._on_started(engine)

    def _add(self, wanted: list[tuple[HookRegistry, Any, Callable[..., None], str, int]]) -> None:
        added = []
        try:
            for hooks, event, hook, name, order in wanted:
                added.append(hooks.add(event, hook, name=f"{self._kind}.{name}", order=order))
        except BaseException:
            for one in added:
                one.remove()
            raise

    def _check_optimizers(
        self, engine: Engine, optimizers: tuple[Optimizer, ...], evaluators: Mapping[str, Engine]
    ) -> None:
        kind = type(self).__name__
        if self._optimizers:
            message = f"this {kind} is attached already, and writes one run; make another one, with a path of its own"
            raise AttachError(message)
        if not optimizers:
            message = f"{kind} needs an optimizer, whose steps are the time axis: attach(engine, optimizer)"
            raise AttachError(message)
        if f"{self._kind}.open" in HookRegistry(engine):
            message = f"this engine has a {kind} already, which can write of several optimizers; leave this one out"
            raise AttachError(message)
        for optimizer in optimizers:
            _check_attached(optimizer, engine, kind)
        for name in evaluators:
            if name in {OUTPUT, MEMORY, *(optimizer.name for optimizer in optimizers)}:
                message = f"evaluators={{{name!r}: ...}}: tags beginning with {name!r} are taken; use another name"
                raise ArgumentValueError(message)

    @property
    def _clocks(self) -> dict[str, dict[str, int]]:
        return {optimizer.name: optimizer.clocks for optimizer in self._optimizers}

    def _begin(self) -> None:
        self._begun = True
        self._devices = streamed(p for o in self._optimizers for group in o.param_groups for p in group["params"])
        self._background.start()
        own = f"{self._kind}."
        counts = {key.removeprefix(own): count for key, count in self._evaluations.items() if key.startswith(own)}
        self._background.put((self._file.begin, self._clocks, counts if self._evaluations.known else {}))

    def _on_started(self, engine: Engine) -> None:
        self._begin()
        self._describe(engine)
        self.flush()  # a path that cannot be written to is known now

    def _on_left(self, error: BaseException | None) -> None:
        """After an exception, too, all is written: who catches it may go on in the same file."""
        if error is not None:
            with contextlib.suppress(IceEngineError):  # the log has it, and the run's own error is the one to raise
                self.flush()

    def _describe(self, engine: Engine) -> None:
        """Write what is known when a run starts."""

    def _noter(self, optimizer: Optimizer, *, first: bool) -> Callable[[Engine], None]:
        attribute, background = f"{optimizer.name}_record", self._background
        write = _StepWriter(self._file, optimizer.name, first=first)

        def note(engine: Engine) -> None:
            state = engine.state
            output = kept(state.output) if first else None
            # The thread reads from the GPU on another stream than the one that computes.
            marks = mark(self._devices)
            background.put((write, time.time(), getattr(state, attribute), output, marks))

        return note

    def _metrics_noter(self, name: str) -> Callable[[Engine], None]:
        file, key = self._file, f"{self._kind}.{name}"

        def write(now: float, step: int, clocks: dict[str, int | None], metrics: dict[str, Any], marks: Any) -> None:
            wait(marks)
            file.write(Line(now, name, step, clocks, metric_rows(name, metrics)))

        def note(evaluator: Engine) -> None:
            if not self._begun:
                self._begin()  # a first evaluation may come before the run
            metrics = kept_metrics(evaluator.state.metrics)
            marks = mark(self._devices)
            clocks = self._optimizers[0].clocks
            # One in the middle of a window, or at the end of its epoch, is after a checkpoint of the step, or before.
            self._evaluations[key] += 1
            others = {"iteration": clocks["iteration"], "evaluation": self._evaluations[key]}
            self._background.put((write, time.time(), clocks["step"], others, metrics, marks))

        return note


class Recordings(list[Recording]):
    """Those of one engine. A checkpoint flushes them first: what is resumed is never further than what is recorded."""


class _StepWriter:
    """Makes rows of what was noted of a window, on the writing thread."""

    def __init__(self, file: RowFile, name: str, *, first: bool) -> None:
        self._file = file
        self._name = name
        self._first = first
        self._memory: dict[str, float] = {}
        self._memory_time: float = 0.0

    def __call__(self, now: float, record: StepRecord, output: Any, marks: list[Any]) -> None:
        wait(marks)
        rows = step_rows(self._name, record, output)
        if self._first and record.skipped is None:
            rows |= self._read_memory()
        self._file.write(Line(now, self._name, record.step, step_clocks(record), rows))

    def _read_memory(self) -> dict[str, float]:
        now = time.monotonic()
        if now - self._memory_time > _MEMORY_PERIOD:
            self._memory, self._memory_time = memory_rows(), now
        return self._memory


def _check_attached(optimizer: Any, engine: Engine, kind: str) -> None:
    if not isinstance(optimizer, Optimizer):
        if isinstance(optimizer, Engine):
            mend = (
                f"an evaluator goes by name: {kind}.attach(engine, optimizer, evaluators={{'validation': evaluator}})"
            )
        else:
            mend = "wrap it, and attach that to the engine: ice.Optimizer(optimizer).attach(engine)"
        message = f"{kind} writes what an ice.Optimizer does, got {type(optimizer).__name__}; {mend}"
        raise AttachError(message)
    require_attached(optimizer, engine)


def _check_evaluators(evaluators: Any) -> Mapping[str, Engine]:
    found = {} if evaluators is None else evaluators
    if not isinstance(found, Mapping) or not all(isinstance(evaluator, Engine) for evaluator in found.values()):
        message = (
            f"evaluators must be a dict of engines by name, got {evaluators!r}; "
            "such as evaluators={'validation': evaluator}"
        )
        raise ArgumentTypeError(message)
    return found
