"""A run that has not happened: every scheduled key of every param group at every step."""

import csv
import textwrap
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, overload

from ice_engine import pictures
from ice_engine.arguments import count
from ice_engine.errors import ArgumentTypeError, ArgumentValueError
from ice_engine.problems import find_problems
from ice_engine.processors.group import check_processors
from ice_engine.rehearsal import Rehearsal, StandIn
from ice_engine.schedule_lengths import PlannedRun
from ice_engine.typing import DictProcessor
from ice_engine.window import Tail, Window, closing_windows

if TYPE_CHECKING:
    import matplotlib.figure

_COUNTS = ("step", "iteration", "epoch", "micro_batches")
_POINTS = 1000  # per series in TensorBoard
_WIDTH = 100


class Plan:
    """Every scheduled key of every param group at every step, computed by the processors that will run.

    :meth:`ice_engine.optimizer.Optimizer.plan` makes one from an optimizer's own settings. It runs copies of the
    processors on copies of the param groups, with the clocks of a fresh run in which no step is skipped; nothing else
    changes.

    Args:
        param_groups: Each with its entries, such as ``lr`` and ``betas``; ``params`` is not needed.
        processors: Functions from dict to dict, in the order they run.
        epoch_length: Micro-batches per epoch, at least 1.
        max_epochs: Epochs of the run, at least 1; instead, *max_iters*.
        max_iters: Micro-batches of the run, at least 1; it may end inside an epoch.
        accumulation_steps: Micro-batches per window, at least 1.
        tail: What becomes of a short last window of an epoch: ``"step"``, ``"carry"`` or ``"drop"``.
        name: The optimizer's name, which prefixes attributes of ``engine.state``.
        optimizer: Makes what processors see as ``optimizer``; None where there is none.
        resumed: Lengths, and ``stretch``, that a resumed run shows its processors instead of its own.

    Attributes:
        series: By ``key/group`` such as ``lr/group_0`` or ``betas.0/group_0``, one value per step: for each group, its
            ``lr`` and every other entry that a processor writes. Where an entry is no number, NaN.
        steps: The step's number, from 1; one per step, as in the following three.
        iterations: The iteration after which the step happens.
        epochs: The epoch in which it happens, from 1.
        micro_batches: How many it is the mean of.
        problems: What looks wrong: a label, a colon, and one or two sentences with the numbers and the mend.

    Raises:
        ArgumentTypeError: If an argument has the wrong type, or a processor cannot be copied.
        ArgumentValueError: If an argument has an impossible value, or the run's length is missing or given twice.
        ProcessorError: If a processor does something impossible; a note says at which step.

    Examples:
        >>> import torch
        >>> import ice_engine as ice
        >>> weight = torch.nn.Parameter(torch.ones(()))
        >>> optimizer = ice.Optimizer(
        ...     torch.optim.SGD([weight], lr=0.1),
        ...     accumulation_steps=4,
        ...     processors=[ice.schedules.linear()],
        ... )
        >>> plan = optimizer.plan(epoch_length=10, max_epochs=2)
        >>> len(plan), list(plan.iterations), list(plan.series["lr/group_0"])[:3]
        (6, [4, 8, 10, 14, 18, 20], [0.1, 0.08333333333333334, 0.06666666666666668])
        >>> plan.rows[2]
        {'step': 3, 'iteration': 10, 'epoch': 1, 'micro_batches': 2, 'lr/group_0': 0.06666666666666668}
        >>> print(plan)
        6 steps in 2 epochs of 10 iterations; 4 micro-batches a step, fewer in 2 short windows
        <BLANKLINE>
                                        first   highest      last
        lr/group_0                        0.1       0.1   0.01667  █▇▆▅▃▂
        <BLANKLINE>
        - short tail: the last window of each epoch has 2 of 4 micro-batches, and its step counts as much as
          any other. Choose accumulation_steps that divide 10, or tail='carry'

    .. versionadded:: 0.1.0
    """

    def __init__(
        self,
        param_groups: Sequence[Mapping[str, Any]],
        processors: Sequence[DictProcessor] = (),
        *,
        epoch_length: int,
        max_epochs: int | None = None,
        max_iters: int | None = None,
        accumulation_steps: int = 1,
        tail: Tail = "step",
        name: str = "optimizer",
        optimizer: StandIn | None = None,
        resumed: Mapping[str, Any] | None = None,
    ) -> None:
        window = Window(accumulation_steps, tail)
        length = count("epoch_length", epoch_length, 1)
        run = _run(length, max_epochs, max_iters)
        iterations = run.max_iters or length * run.max_epochs
        originals = check_processors(processors)
        rehearsal = Rehearsal(
            param_groups, originals, run=run, window=window, name=name, optimizer=optimizer, resumed=resumed or {}
        )
        windows = list(closing_windows(window.size, tail, length, iterations))
        self.steps: Sequence[int] = range(1, len(windows) + 1)
        self.iterations, self.epochs, self.micro_batches = (array("q", [w[i] for w in windows]) for i in range(3))
        rehearsal.play(self.iterations, self.epochs)
        self.series: dict[str, array[float]] = rehearsal.series()
        self._planned = PlannedRun(window.size, tail, length, iterations, len(windows))
        self.problems: list[str] = find_problems(
            self._planned,
            originals,
            groups=rehearsal.names,
            series=self.series,
            scheduled=rehearsal.scheduled,
            witnesses=rehearsal.witnesses,
            initial=rehearsal.start[0] if rehearsal.start else {},
        )

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def rows(self) -> "Rows":
        """One flat dict per step, with ``step``, ``iteration``, ``epoch``, ``micro_batches`` and every series.

        Made when asked for; ``pandas.DataFrame(plan.rows)`` takes it as it is. What is no number is left out.
        """
        return Rows(self._columns())

    def _columns(self) -> dict[str, Sequence[float]]:
        counts = (self.steps, self.iterations, self.epochs, self.micro_batches)
        return {**dict(zip(_COUNTS, counts, strict=True)), **self.series}

    def __repr__(self) -> str:
        return f"<Plan of {len(self)} steps, {len(self.series)} series, {len(self.problems)} problems>"

    def __str__(self) -> str:
        lines = [self._headline(), "", f"{'':27} {'first':>9} {'highest':>9} {'last':>9}"]
        for label, values in self._folded():
            numbers = (values[0], max(values), values[-1]) if values else ()
            figures = " ".join(f"{number:>9.4g}" for number in numbers)
            lines.append(f"{_short(label, 27):27} {figures}  {pictures.sparkline(values)}".rstrip())
        lines.append("")
        for problem in self.problems:
            lines += textwrap.wrap(problem, _WIDTH, initial_indent="- ", subsequent_indent="  ")
        if not self.problems:
            lines.append("no problems found")
        return "\n".join(lines)

    def _headline(self) -> str:
        planned = self._planned
        short = sum(size != planned.size for size in self.micro_batches)
        whole, rest = divmod(planned.iterations, planned.epoch_length)
        epochs = f"{_many(whole, 'epoch')} of {_many(planned.epoch_length, 'iteration')}" if whole else ""
        more = f"{_many(rest, 'iteration')}" if rest else ""
        windows = f"{_many(planned.size, 'micro-batch')} a step"
        if short:
            windows += f", fewer in {_many(short, 'short window')}"
        return f"{_many(len(self), 'step')} in {' and '.join(filter(None, (epochs, more)))}; {windows}"

    def _folded(self) -> list[tuple[str, "array[float]"]]:
        folded: list[tuple[str, array[float], int]] = []
        for tag, values in self.series.items():
            key = tag.partition("/")[0]
            for i, (label, other, groups) in enumerate(folded):
                if label.partition("/")[0] == key and other == values:
                    folded[i] = (label, other, groups + 1)
                    break
            else:
                folded.append((tag, values, 1))
        return [(f"{tag} ({groups} groups)" if groups > 1 else tag, values) for tag, values, groups in folded]

    def to_csv(self, path: str | Path) -> None:
        """Write one line per step, under a line of names; numbers are read back as they were.

        Args:
            path: The file, which is replaced if it exists.
        """
        columns = self._columns()
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(
                ["" if value != value else value for value in row]  # noqa: PLR0124 - NaN: no number there
                for row in zip(*columns.values(), strict=True)
            )

    def plot(self, *keys: str, ax: Any = None) -> "matplotlib.figure.Figure":
        """Draw each key in a panel, with a line per param group, and a mark where epochs end.

        Args:
            *keys: What to draw, such as ``"lr"`` or ``"betas.0"``, or ``"lr/head"`` for one group alone; all, if left
                out.
            ax: Matplotlib axes to draw one key in, instead of a new figure.

        Returns:
            The figure; ``.savefig("plan.png")`` writes it.

        Raises:
            ArgumentValueError: If there is no such key, or *ax* is given for several.
            ModuleNotFoundError: Without matplotlib.
        """
        panels: dict[str, dict[str, Sequence[float]]] = {}
        for tag, values in self.series.items():
            key, _, group = tag.partition("/")
            if not keys or key in keys or tag in keys:
                panels.setdefault(key, {})[group] = values
        known = [*self.series, *(tag.partition("/")[0] for tag in self.series)]
        unknown = [key for key in keys if key not in known]
        if unknown:
            message = f"the plan has no {unknown[0]!r}; it has: {', '.join(dict.fromkeys(known))}"
            raise ArgumentValueError(message)
        ends = [i + 1 for i in range(len(self) - 1) if self.epochs[i] != self.epochs[i + 1]]
        return pictures.figure(panels, what="plan.plot()", label="step", marks=ends, ax=ax)

    def to_tensorboard(self, log_dir: Any) -> None:
        """Write the :meth:`points` of every series as scalars over the step, under tags such as ``plan/lr/group_0``.

        Args:
            log_dir: A folder; or a ``SummaryWriter`` or Ignite's ``TensorboardLogger``, which stays open.

        Raises:
            ArgumentTypeError: If it is none of these.
        """
        if isinstance(log_dir, str | Path):
            from torch.utils.tensorboard import SummaryWriter

            with SummaryWriter(str(log_dir)) as writer:
                self.to_tensorboard(writer)
            return
        writer = getattr(log_dir, "writer", log_dir)
        if not hasattr(writer, "add_scalar"):
            message = (
                f"log_dir must be a path, a SummaryWriter or an Ignite TensorboardLogger, got {type(log_dir).__name__}"
            )
            raise ArgumentTypeError(message)
        for tag, step, value in self.points():
            writer.add_scalar(f"plan/{tag}", value, step)
        writer.flush()

    def points(self) -> Iterator[tuple[str, int, float]]:
        """Yield what of each series is worth drawing: the series, the step and the value there.

        Of more than 1000 steps, 1000: the first, the last, evenly spaced ones, and where the curve bends.
        """
        for tag, values in self.series.items():
            for i in pictures.corners(values, _POINTS):
                if values[i] == values[i]:
                    yield tag, i + 1, values[i]


class Rows(Sequence[dict[str, float]]):
    """The steps of a plan as flat dicts, made when asked for.

    Args:
        columns: Values of all steps, by name.
    """

    def __init__(self, columns: Mapping[str, Sequence[float]]) -> None:
        self._columns = columns

    def __len__(self) -> int:
        return len(self._columns["step"])

    @overload
    def __getitem__(self, index: int) -> dict[str, float]: ...

    @overload
    def __getitem__(self, index: slice) -> "Rows": ...

    def __getitem__(self, index: int | slice) -> "dict[str, float] | Rows":
        if isinstance(index, slice):
            return Rows({name: values[index] for name, values in self._columns.items()})
        row = ((name, values[index]) for name, values in self._columns.items())
        return {name: value for name, value in row if value == value}  # noqa: PLR0124 - NaN: no number there

    def __repr__(self) -> str:
        return f"<{len(self)} rows of {', '.join(self._columns)}>"


def _run(epoch_length: int, max_epochs: int | None, max_iters: int | None) -> SimpleNamespace:
    if (max_epochs is None) == (max_iters is None):
        found = "neither" if max_epochs is None else f"max_epochs={max_epochs!r} and max_iters={max_iters!r}"
        message = f"a plan needs max_epochs or max_iters, as Engine.run() takes them, got {found}; give one of them"
        raise ArgumentValueError(message)
    # Ignite has None for the one that was not given.
    epochs = None if max_epochs is None else count("max_epochs", max_epochs, 1)
    iters = None if max_iters is None else count("max_iters", max_iters, 1)
    return SimpleNamespace(iteration=0, epoch=0, epoch_length=epoch_length, max_epochs=epochs, max_iters=iters)


def _many(number: int, noun: str) -> str:
    plural = {"micro-batch": "micro-batches"}.get(noun, f"{noun}s")
    return f"{number} {noun if number == 1 else plural}"


def _short(label: str, width: int) -> str:
    return label if len(label) <= width else f"{label[: width - 1]}…"
