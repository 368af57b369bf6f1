"""Schedules that fall along a cosine and start again at the top."""

import bisect
import itertools
import math
from collections.abc import Sequence

from ice_engine import arguments
from ice_engine.errors import ArgumentTypeError, ArgumentValueError
from ice_engine.processors.clocks import Unit
from ice_engine.processors.curve import Formula, build, by_clock
from ice_engine.processors.ramps import check_ramp, ramp
from ice_engine.processors.schedule import Schedule
from ice_engine.processors.shapes import above, check_floor, half_cosine, lowest, times


@by_clock
def _cosine_restarts(
    t: float,
    *,
    periods: int | tuple[int, ...],
    growth: int,
    weights: tuple[float, ...] | None,
    floor: float,
    floor_ratio: float | None,
) -> Formula:
    if isinstance(periods, int):
        since, period = _growing_period(t, periods, growth)
        return above(floor, floor_ratio, half_cosine(since / period))
    ends = list(itertools.accumulate(periods))
    index = bisect.bisect_right(ends, t)
    if index == len(periods):
        return lambda base: lowest(base, floor, floor_ratio)
    since = t - (ends[index] - periods[index])
    weight, part = 1.0 if weights is None else weights[index], half_cosine(since / periods[index])

    def value(base: float) -> float:
        end = lowest(base, floor, floor_ratio)
        return end + weight * (base - end) * part

    return value


def _growing_period(t: float, first: int, growth: int) -> tuple[float, int]:
    # Whole numbers throughout: a float logarithm, as in torch, is off by one at some restarts.
    if growth == 1:
        return t % first, first
    period = first
    while t >= period:
        t -= period
        period *= growth
    return t, period


def cosine_restarts(
    *,
    periods: int | Sequence[int],
    growth: int = 1,
    weights: Sequence[float] | None = None,
    floor: float = 0.0,
    floor_ratio: float | None = None,
    unit: Unit = "step",
    dst: str = "lr",
) -> Schedule:
    r"""Decay ``dst`` along half a cosine, again and again from the top (warm restarts).

    .. math:: \eta_t = f + w_i\,(\eta_0 - f)\,\tfrac12\Bigl(1 + \cos\bigl(\pi\,\tfrac{t - t_i}{T_i}\bigr)\Bigr)

    where :math:`\eta_0` is the group's ``initial_<dst>``, :math:`t` its clock, :math:`t_i` the time of the last
    restart, :math:`T_i` the period that began there, :math:`w_i` its weight and :math:`f` is *floor* (or *floor_ratio*
    times :math:`\eta_0`).

    Args:
        periods: Length of the first period, in *unit*, at least 1, with no end to the periods; or the lengths of all
            of them, and past the last one the value stays at the floor.
        growth: How many times longer each period is than the one before; at least 1. With one period only.
        weights: Height of each period, as a multiple of the first way down; finite. With a list of periods only; None
            for 1 each.
        floor: Value that each period ends at, in the unit of ``dst``; finite.
        floor_ratio: The same as a multiple of the initial value; finite; instead of *floor*.
        unit: The clock: steps applied, iterations (micro-batches) or epochs.
        dst: The entry to schedule.

    Returns:
        A processor. Reads ``initial_<dst>`` and the clock; writes ``dst``; leaves other keys alone.

    Raises:
        ArgumentTypeError: If an argument has the wrong type.
        ArgumentValueError: If a period or *growth* is below 1, *growth* given with a list of periods, *weights*
            without one or of another length, both *floor* and *floor_ratio* given, a number infinite or NaN, or
            *unit* unknown.

    Examples:
        >>> import ice_engine as ice
        >>> sgdr = ice.schedules.cosine_restarts(periods=2, growth=2)
        >>> [round(sgdr({"step": t, "initial_lr": 1.0})["lr"], 3) for t in range(7)]
        [1.0, 0.5, 1.0, 0.854, 0.5, 0.146, 1.0]
        >>> twice = ice.schedules.cosine_restarts(periods=[2, 2], weights=[1, 0.5])
        >>> [round(twice({"step": t, "initial_lr": 1.0})["lr"], 3) for t in range(6)]
        [1.0, 0.5, 0.5, 0.25, 0.0, 0.0]

    References:
        Loshchilov and Hutter, `SGDR <https://arxiv.org/abs/1608.03983>`_, 2017.

    .. versionadded:: 0.1.0
    """
    growth = arguments.count("cosine_restarts(growth=...)", growth, 1)
    floor, floor_ratio = check_floor("cosine_restarts", floor, floor_ratio)
    if isinstance(periods, Sequence):
        if growth != 1:
            message = f"cosine_restarts(growth={growth}) is for one period; the list periods={periods!r} says them all"
            raise ArgumentValueError(message)
        periods, weights = _check_list(periods, weights)
    else:
        periods = arguments.count("cosine_restarts(periods=...)", periods, 1)
        if weights is not None:
            message = f"cosine_restarts(weights={weights!r}) weighs a list of periods, got periods={periods}"
            raise ArgumentValueError(message)
    return build(
        cosine_restarts,
        _cosine_restarts,
        unit=unit,
        dst=dst,
        periods=periods,
        growth=growth,
        weights=weights,
        floor=floor,
        floor_ratio=floor_ratio,
    )


def _check_list(
    periods: Sequence[int], weights: Sequence[float] | None
) -> tuple[tuple[int, ...], tuple[float, ...] | None]:
    if isinstance(periods, str):
        message = f"cosine_restarts(periods=...) must be an int or a list of ints, got {periods!r} (str)"
        raise ArgumentTypeError(message)
    lengths = tuple(arguments.count("each of cosine_restarts(periods=[...])", period, 1) for period in periods)
    if not lengths:
        message = "cosine_restarts(periods=[...]) must have at least one period, got []"
        raise ArgumentValueError(message)
    if weights is None:
        return lengths, None
    if not isinstance(weights, Sequence) or isinstance(weights, str):
        message = f"cosine_restarts(weights=...) must be a list, got {weights!r} ({type(weights).__name__})"
        raise ArgumentTypeError(message)
    if len(weights) != len(lengths):
        message = (
            f"cosine_restarts(weights=[...]) must have one for each of the {len(lengths)} periods, got {len(weights)}"
        )
        raise ArgumentValueError(message)
    return lengths, tuple(arguments.number("each of cosine_restarts(weights=[...])", weight) for weight in weights)


@by_clock
def _hard_restarts(t: float, *, cycles: float, total: int, warmup: int, start: float | None) -> Formula:
    if t < warmup:
        return times(ramp(t, warmup, start))
    length = total - warmup
    if t >= total:
        return lambda _: 0.0
    # The remainder of whole numbers: that of a fraction, as in transformers, misses some restarts.
    return times(half_cosine(math.fmod(cycles * (t - warmup), length) / length))


def hard_restarts(
    *,
    cycles: float = 1.0,
    total: int | None = None,
    warmup: int = 0,
    start: float | None = None,
    unit: Unit = "step",
    dst: str = "lr",
) -> Schedule:
    r"""Decay ``dst`` to 0 along half a cosine a number of times, after an optional warmup.

    .. math::

        \eta_t = \eta_0 \begin{cases}
            s + (1 - s)\,t / W & t < W \\
            \tfrac12\Bigl(1 + \cos\bigl(\pi\,(c\,\tfrac{t - W}{T - W} \bmod 1)\bigr)\Bigr) & W \le t < T \\
            0 & t \ge T
        \end{cases}

    where :math:`\eta_0` is the group's ``initial_<dst>``, :math:`t` its clock, :math:`T` is *total*, :math:`W`
    *warmup*, :math:`s` *start* and :math:`c` *cycles*.

    Args:
        cycles: How many times to start at the top; above 0. With a fraction, the last time breaks off on its way.
        total: Length, warmup included, in *unit*; at least 1; None for the whole run.
        warmup: Length of the ramp at the beginning, in *unit*; at least 0 and below *total*.
        start: Factor at the beginning of the ramp; None for ``1 / (warmup + 1)``, so that no step is wasted at 0.
        unit: The clock: steps applied, iterations (micro-batches) or epochs.
        dst: The entry to schedule.

    Returns:
        A processor. Reads ``initial_<dst>`` and the clock; writes ``dst``; leaves other keys alone.

    Raises:
        ArgumentTypeError: If an argument has the wrong type.
        ArgumentValueError: If *total* is below 1, *cycles* not above 0, *warmup* negative or not below *total*,
            *start* given without a *warmup*, a number infinite or NaN, or *unit* unknown.

    Examples:
        >>> import ice_engine as ice
        >>> twice = ice.schedules.hard_restarts(cycles=2, total=4)
        >>> [round(twice({"step": t, "initial_lr": 1.0})["lr"], 3) for t in range(6)]
        [1.0, 0.5, 1.0, 0.5, 0.0, 0.0]

    References:
        Loshchilov and Hutter, `SGDR <https://arxiv.org/abs/1608.03983>`_, 2017; transformers'
        ``get_cosine_with_hard_restarts_schedule_with_warmup``.

    .. versionadded:: 0.1.0
    """
    cycles = arguments.positive("hard_restarts(cycles=...)", cycles)
    warmup, start = check_ramp("hard_restarts", warmup, start, total)
    return build(
        hard_restarts, _hard_restarts, unit=unit, dst=dst, cycles=cycles, total=total, warmup=warmup, start=start
    )
