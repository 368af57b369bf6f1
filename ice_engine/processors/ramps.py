"""Schedules that hold the value or lead up to it."""

from ice_engine import arguments
from ice_engine.processors.clocks import Unit
from ice_engine.processors.curve import build
from ice_engine.processors.schedule import Schedule


def _constant(base: float, _: int, *, factor: float) -> float:
    return base * factor


def constant(factor: float = 1.0, *, unit: Unit = "step", dst: str = "lr") -> Schedule:
    r"""Hold ``dst`` at a multiple of its initial value.

    .. math:: \eta_t = c\,\eta_0

    where :math:`\eta_0` is the group's ``initial_<dst>`` and :math:`c` is *factor*.

    Args:
        factor: Multiple of the initial value; finite.
        unit: The clock that ``then(..., at=)`` counts; the value does not depend on it.
        dst: The entry to schedule.

    Returns:
        A processor. Reads ``initial_<dst>`` and the clock; writes ``dst``; leaves other keys alone.

    Raises:
        ArgumentTypeError: If an argument has the wrong type.
        ArgumentValueError: If *factor* is infinite or NaN, or *unit* unknown.

    Examples:
        >>> import ice_engine as ice
        >>> ice.schedules.constant(0.5)({"step": 9, "initial_lr": 0.2})["lr"]
        0.1

    .. versionadded:: 0.1.0
    """
    return build(constant, _constant, unit=unit, dst=dst, factor=arguments.number("constant(factor=...)", factor))


def ramp(t: int, steps: int, start: float | None) -> float:
    """Return the factor of a linear ramp to 1 over *steps*; a *start* of None is ``1 / (steps + 1)``."""
    if t >= steps:
        return 1.0
    # (t + 1) / (steps + 1): the first step already moves, and the first one after the ramp continues its line.
    return (t + 1) / (steps + 1) if start is None else start + (1 - start) * t / steps


def _warmup(base: float, t: int, *, steps: int, start: float | None) -> float:
    return base * ramp(t, steps, start)


def warmup(*, steps: int, start: float | None = None, unit: Unit = "step", dst: str = "lr") -> Schedule:
    r"""Raise ``dst`` along a line to its initial value, and hold it there.

    .. math:: \eta_t = \eta_0\,\bigl(s + (1 - s)\,\min(t / W, 1)\bigr)

    where :math:`\eta_0` is the group's ``initial_<dst>``, :math:`t` its clock, :math:`W` is *steps* and :math:`s`
    is *start*. To warm up another schedule, multiply: ``warmup(steps=50) * cosine(total=1000)``.

    Args:
        steps: Length of the ramp, in *unit*; at least 1.
        start: Factor at the beginning; None for ``1 / (steps + 1)``, so that no step is wasted at 0.
        unit: The clock: steps applied, iterations (micro-batches) or epochs.
        dst: The entry to schedule.

    Returns:
        A processor. Reads ``initial_<dst>`` and the clock; writes ``dst``; leaves other keys alone.

    Raises:
        ArgumentTypeError: If an argument has the wrong type.
        ArgumentValueError: If *steps* is below 1, *start* infinite or NaN, or *unit* unknown.

    Examples:
        >>> import ice_engine as ice
        >>> rise = ice.schedules.warmup(steps=3)
        >>> [rise({"step": t, "initial_lr": 1.0})["lr"] for t in range(5)]
        [0.25, 0.5, 0.75, 1.0, 1.0]

    References:
        Goyal et al., `Accurate, Large Minibatch SGD <https://arxiv.org/abs/1706.02677>`_, 2017.

    .. versionadded:: 0.1.0
    """
    steps = arguments.count("warmup(steps=...)", steps, 1)
    start = None if start is None else arguments.number("warmup(start=...)", start)
    return build(warmup, _warmup, unit=unit, dst=dst, steps=steps, start=start)
