"""Draw the pictures of the documentation, from the code that they picture.

Run as `python docs/figures.py`, and they are in docs/figures/; another folder may be named after it. Every curve is
what a schedule gives, and the last picture is of runs that were trained, stopped and resumed.
"""

import argparse
import contextlib
import itertools
import logging
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # before pyplot: draws without a display

import matplotlib.pyplot as plt
import torch
from ignite.engine import Engine, Events
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import ice_engine as ice
from ice_engine import schedules
from ice_engine.errors import ScheduleChangedError
from ice_engine.ledger import read
from ice_engine.processors.schedules import Schedule

BLUE, ORANGE, GREEN, GREY, DARK = "#2166ac", "#d6712a", "#3a8f5c", "#a8a8a8", "#333333"
RUN = 100
LOSSES = [1 / (1 + min(t, 35) / 10) for t in range(RUN)]  # measured after each step; no better from 35 on
STYLE = {
    "axes.edgecolor": GREY,
    "axes.labelcolor": DARK,
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "figure.constrained_layout.use": True,
    "figure.dpi": 130,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same everywhere
    "font.size": 9,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "text.color": DARK,
    "xtick.color": GREY,
    "xtick.labelcolor": DARK,
    "xtick.labelsize": 8,
    "ytick.color": GREY,
    "ytick.labelcolor": DARK,
    "ytick.labelsize": 8,
}
MONO = "DejaVu Sans Mono"


def values(schedule: Schedule, count: int = RUN, *, run: int = RUN, epochs: int = 10, base: float = 1.0) -> list[float]:
    """Return what *schedule* gives at each step of a run of *run* steps, of one iteration each, in *epochs* epochs."""
    length = run // epochs
    found = []
    for t in range(count):
        clocks = {"step": t, "iteration": t + 1, "epoch": t // length + 1}
        lengths = {"total_steps": run, "epoch_length": length, "max_epochs": epochs}
        seen = {"measurements": {"loss": tuple(LOSSES[:t])}, f"initial_{schedule.dst}": base}
        found.append(schedule({**clocks, **lengths, **seen})[schedule.dst])
    return found


def draw(axes: Axes, found: Sequence[float], colour: str = BLUE, **line: Any) -> None:
    """Draw one value a step; where it jumps, the line is vertical."""
    steps = [b - a for a, b in itertools.pairwise(found)]
    xs, ys = [0], [found[0]]
    for t, step in enumerate(steps):
        beside = [abs(other) for other in (*steps[max(t - 1, 0) : t], *steps[t + 1 : t + 2])]
        if abs(step) > max(4 * max(beside), 0.01 * (max(found) - min(found))):
            xs.append(t + 1)
            ys.append(found[t])
        xs.append(t + 1)
        ys.append(found[t + 1])
    axes.plot(xs, ys, color=colour, **line)


def say(axes: Axes, x: float, y: float, text: str, colour: str = DARK, **font: Any) -> None:
    """Write *text* beside a curve, at x and y of the data."""
    axes.text(x, y, text, color=colour, **{"fontsize": 8.5, "va": "center", **font})


def code(axes: Axes, text: str) -> None:
    """Title *axes* with the expression that it shows."""
    axes.set_title(text, fontfamily=MONO, fontsize=8)


def frame(axes: Axes, *, top: float = 1.08, end: float = RUN, x: str = "step") -> None:
    """Give *axes* the frame of a whole run: from 0 to the peak."""
    axes.set(xlim=(0, end), ylim=(0, top), yticks=[0, 0.5, 1], xlabel=x)
    axes.set_yticklabels(["0", "", "peak"])
    axes.set_xticks([0, end // 2, end])


# -- the catalogue --------------------------------------------------------------------------------------------

CATALOGUE: list[tuple[str, str]] = [
    ("constant", "0.5"),
    ("warmup", "steps=30"),
    ("linear", ""),
    ("polynomial", "power=2"),
    ("cosine", ""),
    ("step", "step_size=30, gamma=0.4"),
    ("exponential", "gamma=0.97"),
    ("inverse", "gamma=0.1"),
    ("inverse_sqrt", "warmup=10"),
    ("plateau", 'metric="loss", factor=0.4'),
    ("wsd", "warmup=10, decay=30"),
    ("trapezoid", "warmup=10, decay=30"),
    ("flat_cosine", "flat=0.5"),
    ("swa", "target=0.3, steps=40"),
    ("one_cycle", ""),
    ("cosine_restarts", "periods=15, growth=2"),
    ("hard_restarts", "cycles=3"),
    ("cyclic", "peak=0.2, up=15"),
    ("cyclic_anneal", "target_ratio=(2, 0), times=2"),
    ("one_cycle_momentum", ""),
]


def overview() -> Figure:
    """Every shape of the catalogue."""
    figure, grid = plt.subplots(4, 5, figsize=(9.4, 6.3), sharex=True)
    for axes, (name, arguments) in zip(grid.flat, CATALOGUE, strict=True):
        schedule = eval(f"schedules.{name}({arguments})", {"schedules": schedules})  # noqa: S307 - from above
        draw(axes, values(schedule))
        axes.set_title(name, fontfamily=MONO, fontsize=9, pad=15)
        axes.text(0, 1.03, arguments or "()", transform=axes.transAxes, color="#777777", fontfamily=MONO, fontsize=6.6)
        axes.set(xlim=(0, RUN), ylim=(0, 2.15 if name == "cyclic_anneal" else 1.08), xticks=[0, RUN // 2, RUN])
        axes.set_yticks([0, 1])
    for axes in grid[-1]:
        axes.set_xlabel("step")
    return figure


# -- one subject each -----------------------------------------------------------------------------------------


def units() -> Figure:
    """One cosine by two clocks."""
    figure, axes = plt.subplots(figsize=(5.4, 2.5))
    draw(axes, values(schedules.cosine(unit="epoch")), ORANGE)
    draw(axes, values(schedules.cosine()), BLUE)
    say(axes, 53, 0.72, 'unit="epoch": once in 10 steps', ORANGE)
    say(axes, 9, 0.3, 'unit="step": at each step', BLUE)
    frame(axes)
    return figure


def warmups() -> Figure:
    """Where a ramp starts, and its shapes."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.0), width_ratios=[1, 1.25])
    ramps = (
        ("start=0.0: the first step does nothing", 0.0, GREY, (1.2, 0.13)),
        ("start not given: 1/5", None, BLUE, (0.0, 0.7)),
    )
    for text, start, colour, place in ramps:
        found = values(schedules.warmup(steps=4, start=start), 7)
        left.plot(range(7), found, color=colour, marker="o", markersize=5)
        say(left, *place, text, colour)
    left.set(xlim=(-0.25, 6.2), ylim=(-0.03, 1.08), xlabel="step", xticks=range(7), yticks=[0, 1])
    left.set_yticklabels(["0", "peak"])
    code(left, "warmup(steps=4)")
    places = {
        "constant": (33, 0.055),
        "exponential": (30, 0.22),
        "1-sqrt": (41, 0.42),
        "linear": (13, 0.56),
        "cosine": (23, 0.88),
    }
    shades = {"linear": BLUE, "cosine": ORANGE, "constant": GREY, "exponential": GREEN, "1-sqrt": "#8a5aa8"}
    for shape, colour in shades.items():
        draw(right, values(schedules.warmup(steps=50, start=0.1, shape=shape), 61), colour)  # type: ignore[arg-type]
        say(right, *places[shape], f'"{shape}"', colour)
    right.set(xlim=(0, 60), ylim=(0, 1.08), xlabel="step", yticks=[0, 0.1, 1])
    right.set_yticklabels(["0", "0.1", "peak"])
    code(right, "warmup(steps=50, start=0.1, shape=...)")
    return figure


def composition() -> Figure:
    """What combines schedules: the parts in grey, the whole in blue."""
    figure, grid = plt.subplots(2, 2, figsize=(8.6, 4.6))
    warmup, cosine, step = schedules.warmup(steps=20), schedules.cosine(), schedules.step(step_size=50, gamma=0.3)
    flat, swa = schedules.cosine(total=200), schedules.swa(target=0.25, steps=15)
    panels = [
        ("warmup(steps=20) * cosine()", warmup * cosine, [warmup, cosine]),
        ("cosine(total=200).then(swa(...), at=60, rebase=True)", flat.then(swa, at=60, rebase=True), [flat]),
        ("cosine().clamp(min=0.2)", cosine.clamp(min=0.2), [cosine]),
        ("cosine() * step(step_size=50, gamma=0.3)", cosine * step, [cosine, step]),
    ]
    for axes, (text, whole, parts) in zip(grid.flat, panels, strict=True):
        for part in parts:
            draw(axes, values(part), GREY, linestyle="--", linewidth=1.2)
        draw(axes, values(whole))
        frame(axes)
        code(axes, text)
    return figure


def restarts() -> Figure:
    """Again and again."""
    figure, grid = plt.subplots(2, 2, figsize=(8.6, 4.6))
    panels = [
        ("cosine_restarts(periods=14, growth=2)", schedules.cosine_restarts(periods=14, growth=2)),
        (
            "cosine_restarts(periods=[25, 25, 50], weights=[1, 0.7, 0.4])",
            schedules.cosine_restarts(periods=[25, 25, 50], weights=[1, 0.7, 0.4]),
        ),
        ("hard_restarts(cycles=4, warmup=12)", schedules.hard_restarts(cycles=4, warmup=12)),
        ('cyclic(peak=1.0, up=12, mode="triangular2")', schedules.cyclic(peak=1.0, up=12, mode="triangular2")),
    ]
    for axes, (text, schedule) in zip(grid.flat, panels, strict=True):
        draw(axes, values(schedule, base=0.1 if text.startswith("cyclic") else 1.0))
        frame(axes)
        code(axes, text)
    grid[1, 1].set_yticks([0, 0.1, 1], ["0", "lr", "peak"])
    return figure


def stable() -> Figure:
    """Hold, then fall; and what that is good for."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.0))
    for shape, colour, place in (
        ("1-sqrt", BLUE, (50, 0.38)),
        ("linear", GREY, (88, 0.62)),
        ("cosine", ORANGE, (72, 0.94)),
    ):
        draw(left, values(schedules.wsd(warmup=10, decay=40, shape=shape)), colour)  # type: ignore[arg-type]
        say(left, *place, f'"{shape}"', colour)
    frame(left)
    code(left, "wsd(warmup=10, decay=40, shape=...)")
    plan = schedules.wsd(warmup=10, decay=30)
    for run, colour in ((200, GREY), (150, ORANGE), (100, BLUE)):
        draw(right, values(plan, run + 1, run=run), colour)
        say(right, run - 19, 0.5, f"{run} steps", colour)
    frame(right, end=200)
    right.set_xlim(0, 216)
    code(right, "wsd(warmup=10, decay=30), three runs")
    return figure


# -- runs -----------------------------------------------------------------------------------------------------


class Run:
    """A run of one weight that notes the rate of every step; *state* is that of an earlier one."""

    def __init__(self, *, state: Any = None, on_change: Any = "error") -> None:
        weight = torch.nn.Parameter(torch.ones(()))
        sgd = torch.optim.SGD([weight], lr=1.0)
        self.optimizer = ice.Optimizer(sgd, processors=[schedules.cosine()], on_change=on_change)
        self.trainer = Engine(lambda _, batch: self.optimizer.backward(weight * batch))
        self.trainer.logger.setLevel(logging.CRITICAL)  # one of these runs is to fail
        self.optimizer.attach(self.trainer)
        self.lr: list[float] = []
        self.trainer.add_event_handler(
            ice.OptimizerEvents.OPTIMIZER_STEP_COMPLETED,
            lambda: self.lr.append(self.optimizer.param_groups[0]["lr"]),
        )
        if state is not None:
            self.trainer.load_state_dict(state["trainer"])
            self.optimizer.load_state_dict(state["optimizer"])

    def train(self, epochs: int, stop: int | None = None) -> None:
        """Train for *epochs* epochs of 10 steps, or stop after some."""
        if stop is not None:
            self.trainer.add_event_handler(Events.EPOCH_COMPLETED(once=stop), self.trainer.terminate)
        self.trainer.run([0.0] * 10, max_epochs=epochs)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return {"trainer": self.trainer.state_dict(), "optimizer": self.optimizer.state_dict()}


def on_change() -> Figure:
    """A run of 10 epochs, stopped after 6 and resumed with 20."""
    logging.getLogger("ice_engine.horizon").setLevel(logging.ERROR)  # that it changes is the subject here
    first = Run()
    first.train(10, stop=6)
    figure, axes = plt.subplots(figsize=(7.2, 3.2))
    places = {"replan": (106, 0.56), "stretch": (79, 0.31), "keep": (101, 0.045)}
    for policy, colour in (("keep", GREEN), ("stretch", ORANGE), ("replan", BLUE)):
        resumed = Run(state=first.state(), on_change=policy)
        resumed.train(20)
        axes.plot(range(60, 200), resumed.lr, color=colour)
        say(axes, *places[policy], f'"{policy}"', colour, fontfamily=MONO)
    try:
        Run(state=first.state(), on_change="error").train(20)
    except ScheduleChangedError:
        axes.plot(60, first.lr[-1], "o", color=DARK, markersize=6, zorder=3)
        say(axes, 57, 0.23, '"error"', fontfamily=MONO, ha="right")
        say(axes, 57, 0.15, "stops here", ha="right")
    axes.plot(range(60), first.lr, color=DARK)
    say(axes, 3, 0.47, "10 epochs planned,\nstopped after 6")
    axes.axvline(60, color=GREY, linewidth=0.8, linestyle=":")
    say(axes, 62, 1.04, "resumed with 20 epochs")
    frame(axes, end=200, top=1.1)
    axes.set_xticks([0, 60, 100, 200])
    return figure


def tutorial() -> Figure:
    """The run of tutorial.md: its code is run, and its ledger drawn."""
    page = (Path(__file__).parent / "tutorial.md").read_text().split("## Stopped, and resumed")[0]
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        exec(code.replace('"runs/digits"', repr(folder)), {})  # noqa: S102 - our own page
        lines = read(Path(folder) / "ledger.jsonl")
    figure, (rate, loss, accuracy) = plt.subplots(3, sharex=True, figsize=(7.2, 4.6), height_ratios=[2, 3, 2])
    panels = (
        (rate, "optimizer/lr/default", "learning rate", {"color": ORANGE}),
        (loss, "training/loss", "loss", {"color": BLUE}),
        (accuracy, "validation/accuracy", "accuracy", {"color": GREEN, "marker": "o"}),
    )
    for axes, key, name, line in panels:
        found = [(row["step"], row[key]) for row in lines if key in row]
        axes.plot(*zip(*found, strict=True), **line)
        axes.set(title=name, xlim=(0, 67))
    rate.set_ylim(0, 0.0042)
    loss.set_ylim(0, None)
    accuracy.set(ylim=(0.5, 1), xlabel="step", title="held-out accuracy, after each epoch", xticks=range(0, 67, 11))
    return figure


# -- one window -----------------------------------------------------------------------------------------------

EVENTS = ("GRADIENTS_READY", "STEP_STARTED", "STEP_COMPLETED")
WORK = ("reduce, unscale,\ndivide by its weight", "clip, then the\nprocessors", "the optimizer's\nown step")


def window() -> Figure:
    """Six micro-batches, windows of four, and what happens where a window closes."""
    figure, axes = plt.subplots(figsize=(8.6, 3.5))
    axes.set(xlim=(-0.1, 6.3), ylim=(-2.5, 1.75))
    axes.axis("off")
    for i, colour in enumerate([BLUE] * 4 + [ORANGE] * 2):
        axes.add_patch(plt.Rectangle((i, 0), 0.9, 0.5, color=colour, alpha=0.85, linewidth=0))
        say(axes, i + 0.45, 0.25, f"backward()\niteration {i + 1}", "white", ha="center", fontsize=7.5)
    brackets = ((0, 3.9, "window: attempt 1, step 1, divided by 4", BLUE), (4, 5.9, "attempt 2, step 2, by 2", ORANGE))
    for start, end, text, colour in brackets:
        axes.plot([start, start, end, end], [0.62, 0.74, 0.74, 0.62], color=colour, linewidth=1.2)
        say(axes, (start + end) / 2, 0.93, text, colour, ha="center")
    axes.plot([-0.05, 5.98], [1.25, 1.25], color=GREY, linewidth=1.2)
    say(axes, 2.95, 1.45, "an epoch of six micro-batches", ha="center")
    say(axes, 6.0, 0.25, "EPOCH_\nCOMPLETED", fontsize=7, fontfamily=MONO)
    axes.plot([3.9, 0.2], [-0.1, -0.75], color=GREY, linewidth=0.8, linestyle=":")
    axes.plot([3.9, 6.1], [-0.1, -0.75], color=GREY, linewidth=0.8, linestyle=":")
    for i, (event, work) in enumerate(zip(EVENTS, WORK, strict=True)):
        x = 0.2 + 2 * i
        axes.add_patch(plt.Rectangle((x, -1.45), 1.25, 0.62, facecolor="#eeeeee", edgecolor=GREY, linewidth=0.8))
        say(axes, x + 0.625, -1.14, work, ha="center", fontsize=7.5)
        axes.annotate("", (x + 1.95, -1.14), (x + 1.3, -1.14), arrowprops={"arrowstyle": "->", "color": DARK})
        say(axes, x + 1.62, -1.62, event, ha="center", fontfamily=MONO, fontsize=7)
    say(axes, 1.82, -2.0, "infinite or NaN?\nSTEP_SKIPPED instead", "#b2182b", ha="center", fontsize=7.5)
    axes.set_title("where a window closes, the optimizer steps")
    return figure


FIGURES: tuple[Callable[[], Figure], ...] = (
    overview,
    units,
    warmups,
    composition,
    restarts,
    stable,
    on_change,
    tutorial,
    window,
)


def main(folder: Path) -> None:
    """Draw every picture into *folder*."""
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for figure in FIGURES:
            made = figure()
            # Without matplotlib's version in it, the file depends on the picture alone.
            made.savefig(folder / f"{figure.__name__}.png", metadata={"Software": None})
            plt.close(made)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "figures")
    main(parser.parse_args().folder)
