"""Schedules that go from the initial value to another one, and stay there."""

import math

from ice_engine import arguments
from ice_engine.errors import ArgumentValueError
from ice_engine.processors.clocks import Unit
from ice_engine.processors.curve import Formula, build, by_clock, progress
from ice_engine.processors.ramps import check_ramp, ramp
from ice_engine.processors.schedule import Schedule
from ice_engine.processors.shapes import above, check_floor, times


@by_clock
def _linear(t: float, *, start: float | None, end: float, total: int, warmup: int) -> Formula:
    if t < warmup:
        return times(ramp(t, warmup, start))
    first = 1.0 if warmup or start is None else start
    return times(first + (end - first) * progress(t - warmup, total - warmup))


def linear(
    *,
    start: float | None = None,
    end: float = 0.0,
    total: int | None = None,
    warmup: int = 0,
    unit: Unit = "step",
    dst: str = "lr",
) -> Schedule:
    r"""Move ``dst`` along a line to a multiple of its initial value, after an optional warmup.

    .. math::

        \eta_t = \eta_0\,\bigl(s + (e - s)\,\min(t / T, 1)\bigr)
        \quad\text{or, with a warmup,}\quad
        \eta_t = \eta_0 \begin{cases}
            s + (1 - s)\,t / W & t < W \\
            1 + (e - 1)\,\min\bigl(\tfrac{t - W}{T - W}, 1\bigr) & t \ge W
        \end{cases}

    where :math:`\eta_0` is the group's ``initial_<dst>``, :math:`t` its clock, :math:`s` and :math:`e` are *start*
    and *end*, :math:`T` is *total* and :math:`W` is *warmup*.

    Args:
        start: Factor at the beginning; finite. None for 1, or with a *warmup* ``1 / (warmup + 1)``, so that no step
            is wasted at 0.
        end: Factor at the end, and ever after; finite.
        total: Length, warmup included, in *unit*; at least 1; None for the whole run.
        warmup: Length of the ramp from *start* to 1, in *unit*; at least 0 and below *total*.
        unit: The clock: steps applied, iterations (micro-batches) or epochs.
        dst: The entry to schedule.

    Returns:
        A processor. Reads ``initial_<dst>`` and the clock; writes ``dst``; leaves other keys alone.

    Raises:
        ArgumentTypeError: If an argument has the wrong type.
        ArgumentValueError: If *total* is below 1, *warmup* negative or not below *total*, a factor infinite or NaN,
            or *unit* unknown.

    Examples:
        >>> import ice_engine as ice
        >>> line = ice.schedules.linear(total=4)
        >>> [line({"step": t, "initial_lr": 1.0})["lr"] for t in range(6)]
        [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
        >>> bert = ice.schedules.linear(warmup=2, start=0.0, total=4)
        >>> [bert({"step": t, "initial_lr": 1.0})["lr"] for t in range(6)]
        [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]

    References:
        Devlin et al., `BERT <https://arxiv.org/abs/1810.04805>`_, 2018.

    .. versionadded:: 0.1.0
    """
    start = None if start is None else arguments.number("linear(start=...)", start)
    end = arguments.number("linear(end=...)", end)
    warmup, _ = check_ramp("linear", warmup, start if warmup else None, total)
    if start == end == 0.0 and not warmup:
        message = (
            "linear(start=0.0, end=0.0) without a warmup is 0 from beginning to end; start= is where the warm-up "
            "starts, so leave it out where there is none"
        )
        raise ArgumentValueError(message)
    if not warmup and start == 1.0:
        start = None  # what None stands for: equal schedules are to be equal
    return build(linear, _linear, unit=unit, dst=dst, start=start, end=end, total=total, warmup=warmup)


@by_clock
def _cosine(
    t: float,
    *,
    total: int,
    warmup: int,
    start: float | None,
    floor: float,
    floor_ratio: float | None,
    cycles: float,
    rebound: bool,
) -> Formula:
    if t < warmup:
        return times(ramp(t, warmup, start))
    length = total - warmup
    part = (t - warmup) / length if rebound and length > 0 else progress(t - warmup, length)
    return above(floor, floor_ratio, 1 + math.cos(2 * math.pi * cycles * part), of=2)


def cosine(
    *,
    total: int | None = None,
    warmup: int = 0,
    start: float | None = None,
    floor: float = 0.0,
    floor_ratio: float | None = None,
    cycles: float = 0.5,
    rebound: bool = False,
    unit: Unit = "step",
    dst: str = "lr",
) -> Schedule:
    r"""Decay ``dst`` along half a cosine, after an optional warmup.

    .. math::

        \eta_t = \begin{cases}
            \eta_0\,\bigl(s + (1 - s)\,t / W\bigr) & t < W \\
            f + (\eta_0 - f)\,\tfrac12\Bigl(1 + \cos\bigl(2 \pi c\,\tfrac{t - W}{T - W}\bigr)\Bigr) & W \le t < T \\
            \eta_T & t \ge T
        \end{cases}

    where :math:`\eta_0` is the group's ``initial_<dst>``, :math:`t` its clock, :math:`T` is *total*, :math:`W`
    *warmup*, :math:`s` *start*, :math:`f` *floor* (or *floor_ratio* times :math:`\eta_0`) and :math:`c` *cycles*.

    Args:
        total: Length, warmup included, in *unit*; at least 1; None for the whole run.
        warmup: Length of the ramp at the beginning, in *unit*; at least 0 and below *total*.
        start: Factor at the beginning of the ramp; None for ``1 / (warmup + 1)``, so that no step is wasted at 0.
        floor: Least value, which half a cosine ends at, in the unit of ``dst``; finite.
        floor_ratio: The same as a multiple of the initial value; finite; instead of *floor*.
        cycles: How many waves; above 0. 0.5 is one way down, 1 down and up again.
        rebound: Go on along the cosine past *total*, up again, as torch and transformers do; else the value stays.
        unit: The clock: steps applied, iterations (micro-batches) or epochs.
        dst: The entry to schedule.

    Returns:
        A processor. Reads ``initial_<dst>`` and the clock; writes ``dst``; leaves other keys alone.

    Raises:
        ArgumentTypeError: If an argument has the wrong type.
        ArgumentValueError: If *total* is below 1, *warmup* negative or not below *total*, *start* given without a
            *warmup*, both *floor* and *floor_ratio* given, *cycles* not above 0, a number infinite or NaN, or *unit*
            unknown.

    Examples:
        >>> import ice_engine as ice
        >>> decay = ice.schedules.cosine(total=10)
        >>> decay({"step": 5, "initial_lr": 0.2})["lr"]
        0.1
        >>> decay({"step": 99, "initial_lr": 0.2})["lr"]
        0.0

    References:
        Loshchilov and Hutter, `SGDR <https://arxiv.org/abs/1608.03983>`_, 2017.

    .. versionadded:: 0.1.0
    """
    warmup, start = check_ramp("cosine", warmup, start, total)
    floor, floor_ratio = check_floor("cosine", floor, floor_ratio)
    cycles = arguments.positive("cosine(cycles=...)", cycles)
    rebound = arguments.flag("cosine(rebound=...)", rebound)
    return build(
        cosine,
        _cosine,
        unit=unit,
        dst=dst,
        total=total,
        warmup=warmup,
        start=start,
        floor=floor,
        floor_ratio=floor_ratio,
        cycles=cycles,
        rebound=rebound,
    )


@by_clock
def _polynomial(
    t: float,
    *,
    power: float,
    floor: float,
    floor_ratio: float | None,
    total: int,
    warmup: int,
    start: float | None,
) -> Formula:
    if t < warmup:
        return times(ramp(t, warmup, start))
    return above(floor, floor_ratio, math.pow(1 - progress(t - warmup, total - warmup), power))


def polynomial(
    *,
    power: float = 1.0,
    floor: float = 0.0,
    floor_ratio: float | None = None,
    total: int | None = None,
    warmup: int = 0,
    start: float | None = None,
    unit: Unit = "step",
    dst: str = "lr",
) -> Schedule:
    r"""Decay ``dst`` along a power of the part of the run that is left, after an optional warmup.

    .. math::

        \eta_t = \begin{cases}
            \eta_0\,\bigl(s + (1 - s)\,t / W\bigr) & t < W \\
            f + (\eta_0 - f)\,\Bigl(1 - \min\bigl(\tfrac{t - W}{T - W}, 1\bigr)\Bigr)^p & t \ge W
        \end{cases}

    where :math:`\eta_0` is the group's ``initial_<dst>``, :math:`t` its clock, :math:`T` is *total*, :math:`W`
    *warmup*, :math:`s` *start*, :math:`p` *power* and :math:`f` *floor* (or *floor_ratio* times :math:`\eta_0`).

    Args:
        power: Exponent; above 0. 1 is a line.
        floor: Value at the end, and ever after, in the unit of ``dst``; finite.
        floor_ratio: The same as a multiple of the initial value; finite; instead of *floor*.
        total: Length, warmup included, in *unit*; at least 1; None for the whole run.
        warmup: Length of the ramp at the beginning, in *unit*; at least 0 and below *total*.
        start: Factor at the beginning of the ramp; None for ``1 / (warmup + 1)``, so that no step is wasted at 0.
        unit: The clock: steps applied, iterations (micro-batches) or epochs.
        dst: The entry to schedule.

    Returns:
        A processor. Reads ``initial_<dst>`` and the clock; writes ``dst``; leaves other keys alone.

    Raises:
        ArgumentTypeError: If an argument has the wrong type.
        ArgumentValueError: If *total* is below 1, *warmup* negative or not below *total*, *start* given without a
            *warmup*, both *floor* and *floor_ratio* given, *power* not above 0, a number infinite or NaN, or *unit*
            unknown.

    Examples:
        >>> import ice_engine as ice
        >>> ice.schedules.polynomial(power=2, total=10)({"step": 5, "initial_lr": 1.0})["lr"]
        0.25

    References:
        Chen et al., `DeepLab <https://arxiv.org/abs/1606.00915>`_, 2016.

    .. versionadded:: 0.1.0
    """
    power = arguments.positive("polynomial(power=...)", power)
    floor, floor_ratio = check_floor("polynomial", floor, floor_ratio)
    warmup, start = check_ramp("polynomial", warmup, start, total)
    return build(
        polynomial,
        _polynomial,
        unit=unit,
        dst=dst,
        power=power,
        floor=floor,
        floor_ratio=floor_ratio,
        total=total,
        warmup=warmup,
        start=start,
    )
