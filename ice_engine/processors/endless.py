"""Schedules that fall and fall, with no end to reach."""

import bisect
import math
from collections.abc import Sequence

from ice_engine import arguments
from ice_engine.errors import ArgumentTypeError, ArgumentValueError
from ice_engine.processors.clocks import Unit
from ice_engine.processors.curve import Formula, build, by_clock
from ice_engine.processors.ramps import check_ramp, ramp
from ice_engine.processors.schedule import Schedule
from ice_engine.processors.shapes import times


@by_clock
def _exponential(t: float, *, gamma: float) -> Formula:
    return times(math.pow(gamma, t))


def exponential(*, gamma: float, unit: Unit = "step", dst: str = "lr") -> Schedule:
    r"""Multiply ``dst`` by a constant each time.

    .. math:: \eta_t = \eta_0\,\gamma^t

    where :math:`\eta_0` is the group's ``initial_<dst>`` and :math:`t` its clock. It has no end; to hold it at a
    least value, use ``.clamp(min=...)``.

    Args:
        gamma: Factor of one *unit*; above 0.
        unit: The clock: steps applied, iterations (micro-batches) or epochs.
        dst: The entry to schedule.

    Returns:
        A processor. Reads ``initial_<dst>`` and the clock; writes ``dst``; leaves other keys alone.

    Raises:
        ArgumentTypeError: If an argument has the wrong type.
        ArgumentValueError: If *gamma* is not above 0, infinite or NaN, or *unit* unknown.

    Examples:
        >>> import ice_engine as ice
        >>> halve = ice.schedules.exponential(gamma=0.5, unit="epoch")
        >>> halve({"epoch": 3, "initial_lr": 1.0})["lr"]
        0.25

    .. versionadded:: 0.1.0
    """
    gamma = arguments.positive("exponential(gamma=...)", gamma)
    return build(exponential, _exponential, unit=unit, dst=dst, gamma=gamma)


@by_clock
def _step(t: float, *, step_size: int | tuple[int, ...], gamma: float) -> Formula:
    drops = int(t // step_size) if isinstance(step_size, int) else bisect.bisect_right(step_size, t)
    return times(math.pow(gamma, drops))


def step(*, step_size: int | Sequence[int], gamma: float = 0.1, unit: Unit = "step", dst: str = "lr") -> Schedule:
    r"""Multiply ``dst`` by a constant every so often, or at given times.

    .. math:: \eta_t = \eta_0\,\gamma^{n}, \quad n = \lfloor t / k \rfloor \text{ or } |\{m \in M : m \le t\}|

    where :math:`\eta_0` is the group's ``initial_<dst>``, :math:`t` its clock, and *step_size* is the period
    :math:`k` or the list :math:`M`.

    Args:
        step_size: A period, or the times of the drops in rising order, in *unit*; each at least 1.
        gamma: Factor of one drop; above 0.
        unit: The clock: steps applied, iterations (micro-batches) or epochs.
        dst: The entry to schedule.

    Returns:
        A processor. Reads ``initial_<dst>`` and the clock; writes ``dst``; leaves other keys alone.

    Raises:
        ArgumentTypeError: If an argument has the wrong type.
        ArgumentValueError: If *step_size* is below 1, empty or not rising, *gamma* not above 0, infinite or NaN, or
            *unit* unknown.

    Examples:
        >>> import ice_engine as ice
        >>> drops = ice.schedules.step(step_size=[2, 3], gamma=0.5)
        >>> [drops({"step": t, "initial_lr": 1.0})["lr"] for t in range(5)]
        [1.0, 1.0, 0.5, 0.25, 0.25]

    .. versionadded:: 0.1.0
    """
    times = _milestones(step_size) if isinstance(step_size, Sequence) else _period(step_size)
    gamma = arguments.positive("step(gamma=...)", gamma)
    return build(step, _step, unit=unit, dst=dst, step_size=times, gamma=gamma)


def _period(step_size: int) -> int:
    return arguments.count("step(step_size=...)", step_size, 1)


def _milestones(step_size: Sequence[int]) -> tuple[int, ...]:
    if isinstance(step_size, str):
        message = f"step(step_size=...) must be an int or a list of ints, got {step_size!r} (str)"
        raise ArgumentTypeError(message)
    times = tuple(arguments.count("each of step(step_size=[...])", time, 1) for time in step_size)
    if not times or list(times) != sorted(set(times)):
        message = f"step(step_size=[...]) must list rising times, each once and at least one, got {list(step_size)!r}"
        raise ArgumentValueError(message)
    return times


@by_clock
def _inverse(t: float, *, gamma: float, power: float) -> Formula:
    return times(math.pow(1 + gamma * t, -power))


def inverse(*, gamma: float, power: float = 1.0, unit: Unit = "step", dst: str = "lr") -> Schedule:
    r"""Decay ``dst`` as a power of the inverse of time.

    .. math:: \eta_t = \eta_0\,(1 + \gamma t)^{-p}

    where :math:`\eta_0` is the group's ``initial_<dst>``, :math:`t` its clock, :math:`\gamma` is *gamma* and :math:`p`
    *power*. It has no end; to hold it at a least value, use ``.clamp(min=...)``.

    Args:
        gamma: How fast, per *unit*; above 0. At :math:`t = 1 / \gamma` and a *power* of 1 half is left.
        power: Exponent; above 0.
        unit: The clock: steps applied, iterations (micro-batches) or epochs.
        dst: The entry to schedule.

    Returns:
        A processor. Reads ``initial_<dst>`` and the clock; writes ``dst``; leaves other keys alone.

    Raises:
        ArgumentTypeError: If an argument has the wrong type.
        ArgumentValueError: If *gamma* or *power* is not above 0, infinite or NaN, or *unit* unknown.

    Examples:
        >>> import ice_engine as ice
        >>> decay = ice.schedules.inverse(gamma=0.5)
        >>> [decay({"step": t, "initial_lr": 1.0})["lr"] for t in (0, 2, 6)]
        [1.0, 0.5, 0.25]

    References:
        Robbins and Monro, `A Stochastic Approximation Method <https://doi.org/10.1214/aoms/1177729586>`_, 1951; mmcv
        and Caffe call it "inv".

    .. versionadded:: 0.1.0
    """
    gamma = arguments.positive("inverse(gamma=...)", gamma)
    power = arguments.positive("inverse(power=...)", power)
    return build(inverse, _inverse, unit=unit, dst=dst, gamma=gamma, power=power)


@by_clock
def _inverse_sqrt(t: float, *, warmup: int, start: float | None, timescale: float | None) -> Formula:
    if t < warmup:
        return times(ramp(t, warmup, start))
    scale = timescale or warmup or 10_000
    divisor = math.sqrt((t - warmup + scale) / scale)
    return lambda base: base / divisor


def inverse_sqrt(
    *,
    warmup: int = 0,
    start: float | None = None,
    timescale: float | None = None,
    unit: Unit = "step",
    dst: str = "lr",
) -> Schedule:
    r"""Decay ``dst`` as the inverse square root of time, after an optional warmup.

    .. math::

        \eta_t = \eta_0 \begin{cases}
            s + (1 - s)\,t / W & t < W \\
            \sqrt{\tau / (t - W + \tau)} & t \ge W
        \end{cases}

    where :math:`\eta_0` is the group's ``initial_<dst>``, :math:`t` its clock, :math:`W` is *warmup*, :math:`s` *start*
    and :math:`\tau` *timescale*; with :math:`\tau = W` this is :math:`\sqrt{W / t}`. It has no end; to hold it at a
    least value, use ``.clamp(min=...)``.

    Args:
        warmup: Length of the ramp at the beginning, in *unit*; at least 0.
        start: Factor at the beginning of the ramp; None for ``1 / (warmup + 1)``, so that no step is wasted at 0.
        timescale: How slowly it decays, in *unit*; above 0; None for *warmup*, or 10000 without one.
        unit: The clock: steps applied, iterations (micro-batches) or epochs.
        dst: The entry to schedule.

    Returns:
        A processor. Reads ``initial_<dst>`` and the clock; writes ``dst``; leaves other keys alone.

    Raises:
        ArgumentTypeError: If an argument has the wrong type.
        ArgumentValueError: If *warmup* is negative, *start* given without a *warmup*, *timescale* not above 0, a
            number infinite or NaN, or *unit* unknown.

    Examples:
        >>> import ice_engine as ice
        >>> noam = ice.schedules.inverse_sqrt(warmup=4, start=0.0)
        >>> [noam({"step": t, "initial_lr": 1.0})["lr"] for t in (0, 2, 4, 16)]
        [0.0, 0.5, 1.0, 0.5]

    References:
        Vaswani et al., `Attention Is All You Need <https://arxiv.org/abs/1706.03762>`_, 2017; Zhai et al., `Scaling
        Vision Transformers <https://arxiv.org/abs/2106.04560>`_, 2021.

    .. versionadded:: 0.1.0
    """
    warmup, start = check_ramp("inverse_sqrt", warmup, start)
    timescale = None if timescale is None else arguments.positive("inverse_sqrt(timescale=...)", timescale)
    return build(inverse_sqrt, _inverse_sqrt, unit=unit, dst=dst, warmup=warmup, start=start, timescale=timescale)
