"""Schedules that go from the initial value towards another one."""

import bisect
import math
from collections.abc import Sequence

from ice_engine import arguments
from ice_engine.errors import ArgumentTypeError, ArgumentValueError
from ice_engine.processors.clocks import Unit
from ice_engine.processors.curve import build, progress
from ice_engine.processors.ramps import ramp
from ice_engine.processors.schedule import Schedule


def _linear(base: float, t: int, *, start: float, end: float, total: int) -> float:
    return base * (start + (end - start) * progress(t, total))


def linear(
    *, start: float = 1.0, end: float = 0.0, total: int | None = None, unit: Unit = "step", dst: str = "lr"
) -> Schedule:
    r"""Move ``dst`` along a line, from one multiple of its initial value to another.

    .. math:: \eta_t = \eta_0\,\bigl(s + (e - s)\,\min(t / T, 1)\bigr)

    where :math:`\eta_0` is the group's ``initial_<dst>``, :math:`t` its clock, :math:`s` and :math:`e` are *start*
    and *end*, and :math:`T` is *total*.

    Args:
        start: Factor at the beginning; finite.
        end: Factor at the end, and ever after; finite.
        total: Length, in *unit*; at least 1; None for the whole run.
        unit: The clock: steps applied, iterations (micro-batches) or epochs.
        dst: The entry to schedule.

    Returns:
        A processor. Reads ``initial_<dst>`` and the clock; writes ``dst``; leaves other keys alone.

    Raises:
        ArgumentTypeError: If an argument has the wrong type.
        ArgumentValueError: If *total* is below 1, a factor infinite or NaN, or *unit* unknown.

    Examples:
        >>> import ice_engine as ice
        >>> line = ice.schedules.linear(total=4)
        >>> [line({"step": t, "initial_lr": 1.0})["lr"] for t in range(6)]
        [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]

    .. versionadded:: 0.1.0
    """
    start = arguments.number("linear(start=...)", start)
    end = arguments.number("linear(end=...)", end)
    return build(linear, _linear, unit=unit, dst=dst, start=start, end=end, total=total)


def _cosine(base: float, t: int, *, total: int, warmup: int, start: float | None, floor: float) -> float:
    if t < warmup:
        return base * ramp(t, warmup, start)
    return floor + (base - floor) * (1 + math.cos(math.pi * progress(t - warmup, total - warmup))) / 2


def cosine(
    *,
    total: int | None = None,
    warmup: int = 0,
    start: float | None = None,
    floor: float = 0.0,
    unit: Unit = "step",
    dst: str = "lr",
) -> Schedule:
    r"""Decay ``dst`` along half a cosine, after an optional warmup.

    .. math::

        \eta_t = \begin{cases}
            \eta_0\,\bigl(s + (1 - s)\,t / W\bigr) & t < W \\
            f + (\eta_0 - f)\,\tfrac12\Bigl(1 + \cos\bigl(\pi\,\tfrac{t - W}{T - W}\bigr)\Bigr) & W \le t < T \\
            f & t \ge T
        \end{cases}

    where :math:`\eta_0` is the group's ``initial_<dst>``, :math:`t` its clock, :math:`T` is *total*, :math:`W`
    *warmup*, :math:`s` *start* and :math:`f` *floor*.

    Args:
        total: Length, warmup included, in *unit*; at least 1; None for the whole run.
        warmup: Length of the ramp at the beginning, in *unit*; at least 0 and below *total*.
        start: Factor at the beginning of the ramp; None for ``1 / (warmup + 1)``, so that no step is wasted at 0.
        floor: Value at the end, and ever after, in the unit of ``dst``; finite.
        unit: The clock: steps applied, iterations (micro-batches) or epochs.
        dst: The entry to schedule.

    Returns:
        A processor. Reads ``initial_<dst>`` and the clock; writes ``dst``; leaves other keys alone.

    Raises:
        ArgumentTypeError: If an argument has the wrong type.
        ArgumentValueError: If *total* is below 1, *warmup* negative or not below *total*, *start* given without a
            *warmup*, a number infinite or NaN, or *unit* unknown.

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
    warmup = arguments.count("cosine(warmup=...)", warmup, 0)
    start = None if start is None else arguments.number("cosine(start=...)", start)
    floor = arguments.number("cosine(floor=...)", floor)
    schedule = build(cosine, _cosine, unit=unit, dst=dst, total=total, warmup=warmup, start=start, floor=floor)
    if total is not None and warmup >= total:
        message = f"cosine(warmup=...) must be below total={total}, which includes it, got {warmup}"
        raise ArgumentValueError(message)
    if start is not None and not warmup:
        message = f"cosine(start={start}) is where the warmup starts, and there is none; give warmup= too"
        raise ArgumentValueError(message)
    return schedule


def _exponential(base: float, t: int, *, gamma: float) -> float:
    return base * gamma**t


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


def _step(base: float, t: int, *, step_size: int | tuple[int, ...], gamma: float) -> float:
    drops = t // step_size if isinstance(step_size, int) else bisect.bisect_right(step_size, t)
    return base * gamma**drops


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


def _polynomial(base: float, t: int, *, power: float, floor: float, total: int) -> float:
    return floor + (base - floor) * math.pow(1 - progress(t, total), power)


def polynomial(
    *, power: float = 1.0, floor: float = 0.0, total: int | None = None, unit: Unit = "step", dst: str = "lr"
) -> Schedule:
    r"""Decay ``dst`` along a power of the part of the run that is left.

    .. math:: \eta_t = f + (\eta_0 - f)\,\bigl(1 - \min(t / T, 1)\bigr)^p

    where :math:`\eta_0` is the group's ``initial_<dst>``, :math:`t` its clock, :math:`T` is *total*, :math:`p`
    *power* and :math:`f` *floor*.

    Args:
        power: Exponent; above 0. 1 is a line.
        floor: Value at the end, and ever after, in the unit of ``dst``; finite.
        total: Length, in *unit*; at least 1; None for the whole run.
        unit: The clock: steps applied, iterations (micro-batches) or epochs.
        dst: The entry to schedule.

    Returns:
        A processor. Reads ``initial_<dst>`` and the clock; writes ``dst``; leaves other keys alone.

    Raises:
        ArgumentTypeError: If an argument has the wrong type.
        ArgumentValueError: If *total* is below 1, *power* not above 0, a number infinite or NaN, or *unit* unknown.

    Examples:
        >>> import ice_engine as ice
        >>> ice.schedules.polynomial(power=2, total=10)({"step": 5, "initial_lr": 1.0})["lr"]
        0.25

    .. versionadded:: 0.1.0
    """
    power = arguments.positive("polynomial(power=...)", power)
    floor = arguments.number("polynomial(floor=...)", floor)
    return build(polynomial, _polynomial, unit=unit, dst=dst, power=power, floor=floor, total=total)
