"""The rate for averaging weights: down to one value, and stay."""

from typing import Literal

from ice_engine import arguments
from ice_engine.processors.clocks import Unit
from ice_engine.processors.curve import Formula, build, by_clock, progress
from ice_engine.processors.schedule import Schedule
from ice_engine.processors.shapes import ANNEALS, between


@by_clock
def _swa(t: float, *, target: float, steps: int, anneal: str) -> Formula:
    way = between(anneal, progress(t, steps))
    return lambda base: way(base, target)


def swa(
    *,
    target: float,
    steps: int = 10,
    anneal: Literal["cos", "linear"] = "cos",
    unit: Unit = "step",
    dst: str = "lr",
) -> Schedule:
    r"""Anneal ``dst`` to a given value, and stay there (for stochastic weight averaging).

    .. math:: \eta_t = A\bigl(\eta_0,\; v,\; \min(t / N, 1)\bigr)

    where :math:`\eta_0` is the group's ``initial_<dst>``, :math:`t` its clock, :math:`v` is *target*, :math:`N` is
    *steps*, and :math:`A(a, b, x)` goes from :math:`a` to :math:`b` along half a cosine or a line. To begin late in a
    run, from the rate that there is by then: ``cosine().then(swa(target=0.05), at=750, rebase=True)``.

    Args:
        target: Value at the end, and ever after, in the unit of ``dst``; finite.
        steps: Length of the way, in *unit*; at least 0, which is at once.
        anneal: The way: "cos" or "linear".
        unit: The clock: steps applied, iterations (micro-batches) or epochs.
        dst: The entry to schedule.

    Returns:
        A processor. Reads ``initial_<dst>`` and the clock; writes ``dst``; leaves other keys alone.

    Raises:
        ArgumentTypeError: If an argument has the wrong type.
        ArgumentValueError: If *steps* is negative, *target* infinite or NaN, or *anneal* or *unit* unknown.

    Examples:
        >>> import ice_engine as ice
        >>> anneal = ice.schedules.swa(target=0.5, steps=4, anneal="linear")
        >>> [anneal({"step": t, "initial_lr": 1.0})["lr"] for t in range(6)]
        [1.0, 0.875, 0.75, 0.625, 0.5, 0.5]

    References:
        Izmailov et al., `Averaging Weights Leads to Wider Optima <https://arxiv.org/abs/1803.05407>`_, 2018.

    .. versionadded:: 0.1.0
    """
    arguments.choice("swa(anneal=...)", anneal, ANNEALS)
    return build(
        swa,
        _swa,
        unit=unit,
        dst=dst,
        target=arguments.number("swa(target=...)", target),
        steps=arguments.count("swa(steps=...)", steps, 0),
        anneal=anneal,
    )
