"""Curves for the eye: as a line of text, as a figure, and thinned out to what a picture can show."""

import heapq
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ice_engine.errors import ArgumentValueError

if TYPE_CHECKING:
    import matplotlib.figure

_BLOCKS = "▁▂▃▄▅▆▇█"
_COLOURS = ("#2f6db3", "#d9702b", "#3d8f5f", "#a8428b", "#8a6d3b", "#5a5a5a")
_MOST_POINTS = 2000  # more than the pixels a panel is wide
_MOST_MARKS = 25


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Return *values* as blocks, one character for the mean of each of *width* stretches.

    The lowest block is 0 for values that come near it, else the least value.

    Examples:
        >>> sparkline([0, 1, 2, 3, 4, 5, 6, 7])
        '▁▂▃▄▅▆▇█'
    """
    count = len(values)
    if not count:
        return ""
    width = min(width, count)
    edges = [i * count // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    means = [mean if mean == mean else 0.0 for mean in means]  # noqa: PLR0124 - NaN: no number there
    least, most = min(means), max(means)
    low = 0.0 if 0.0 <= least <= most / 2 else least
    if most == low:
        return ("▁" if most == 0.0 else "▅") * width
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[round((mean - low) / (most - low) * top)] for mean in means)


def corners(values: Sequence[float], most: int) -> list[int]:
    """Return at most *most* places of *values* that keep the shape of its curve, in order.

    Half of them are evenly spaced, the first and the last value among them; the others are where the curve bends
    most: both sides of a jump, the tip of a ramp, the steps of a staircase.

    Args:
        values: The curve.
        most: At least 4.

    Examples:
        >>> corners([1.0] * 500 + [0.1] * 500, most=8)
        [0, 333, 499, 500, 666, 999]
    """
    count = len(values)
    if count <= most:
        return list(range(count))
    half = most // 2
    kept = {i * (count - 1) // (half - 1) for i in range(half)}
    # Below a billionth of the largest value, a bend is the rounding of a straight line.
    least = 1e-9 * max(map(abs, (max(values), min(values))))
    bends = (
        (abs(after - 2 * here + before), i)
        for i, (before, here, after) in enumerate(zip(values, values[1:], values[2:], strict=False), start=1)
    )
    kept.update(i for _, i in heapq.nlargest(most - half, (bend for bend in bends if bend[0] > least)))
    return sorted(kept)


def require_pyplot(what: str) -> Any:
    """Return ``matplotlib.pyplot``, or say how to install it.

    Raises:
        ModuleNotFoundError: If it is not there.
    """
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        message = f"{what} draws with matplotlib, which is not installed; pip install matplotlib"
        raise ModuleNotFoundError(message, name=error.name) from error
    return plt


def figure(
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    what: str,
    label: str,
    first: int = 1,
    marks: Sequence[int] = (),
    ax: Any = None,
) -> "matplotlib.figure.Figure":
    """Draw one panel per key of *panels*, in it one line per name.

    Args:
        panels: Curves by name, by the title of their panel.
        what: Who draws, for the error without matplotlib.
        label: What the horizontal axis counts.
        first: What it says at the first value.
        marks: Where thin lines stand, such as at the end of epochs.
        ax: Axes to draw in, instead of a new figure; for one panel.

    Raises:
        ArgumentValueError: If *ax* is given for several panels.
        ModuleNotFoundError: Without matplotlib.
    """
    plt = require_pyplot(what)
    if ax is not None and len(panels) != 1:
        message = (
            f"ax= is one panel, and {what} would draw {len(panels)}: {', '.join(panels)}; name the one to draw, "
            f"such as {what.removesuffix('()')}({next(iter(panels), 'lr')!r}, ax=ax)"
        )
        raise ArgumentValueError(message)
    if ax is None:
        drawn, grid = plt.subplots(
            len(panels),
            1,
            sharex=True,
            squeeze=False,
            figsize=(8.0, 1.2 + 2.2 * len(panels)),
            layout="constrained",
        )
        axes = list(grid[:, 0])
    else:
        drawn, axes = ax.figure, [ax]
    for panel, (title, lines) in zip(axes, panels.items(), strict=True):
        _draw(panel, title, lines, first, marks)
    axes[-1].set_xlabel(label)
    result: matplotlib.figure.Figure = drawn
    return result


def _draw(ax: Any, title: str, lines: Mapping[str, Sequence[float]], first: int, marks: Sequence[int]) -> None:
    for mark in marks[:: -(-len(marks) // _MOST_MARKS) or 1]:
        ax.axvline(mark, color="0.9", linewidth=0.8, zorder=0)
    for i, (name, values) in enumerate(lines.items()):
        shown = corners(values, _MOST_POINTS)
        # Groups that go together lie on each other: the later ones are thinner, so that all can be seen.
        ax.plot(
            [first + j for j in shown],
            [values[j] for j in shown],
            label=name,
            color=_COLOURS[i % len(_COLOURS)],
            linewidth=max(2.4 - 0.5 * i, 1.2),
            linestyle=("-", "--", ":", "-.")[i // len(_COLOURS) % 4],
            marker="o" if len(values) == 1 else "",
        )
    ax.set_title(title, loc="left", fontsize=10, fontweight="bold", color="0.25")
    ax.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useMathText=True)
    ax.tick_params(colors="0.35", labelsize=9)
    ax.grid(axis="y", color="0.93", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.margins(x=0.01)
    if 0 <= min(map(min, lines.values())) <= max(map(max, lines.values())) / 2:
        ax.set_ylim(bottom=0)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color("0.7")
    if len(lines) > 1:
        # Above the panel, beside its title: inside, it would lie on some line or other.
        place = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.2}
        ax.legend(frameon=False, fontsize=9, ncols=min(len(lines), 4), **place)
