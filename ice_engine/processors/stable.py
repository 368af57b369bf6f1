"""Schedules that hold the value for most of the run, and let it fall at the end."""

from typing import Literal

from ice_engine import arguments
from ice_engine.errors import ArgumentValueError
from ice_engine.processors.clocks import Unit
from ice_engine.processors.curve import Formula, build, by_clock, progress
from ice_engine.processors.ramps import check_ramp, ramp
from ice_engine.processors.schedule import Schedule
from ice_engine.processors.shapes import FALLS, above, check_floor, half_cosine, times


@by_clock
def _flat_cosine(t: float, *, flat: float, floor: float, floor_ratio: float | None, total: int) -> Formula:
    change = round(total * flat)
    if t < change:
        return times(1.0)
    return above(floor, floor_ratio, half_cosine(progress(t - change, total - change)))


def flat_cosine(
    *,
    flat: float = 0.75,
    floor: float = 0.0,
    floor_ratio: float | None = None,
    total: int | None = None,
    unit: Unit = "step",
    dst: str = "lr",
) -> Schedule:
    r"""Hold ``dst``, then decay it along half a cosine.

    .. math::

        \eta_t = \begin{cases}
            \eta_0 & t < S \\
            f + (\eta_0 - f)\,\tfrac12\Bigl(1 + \cos\bigl(\pi\,\min(\tfrac{t - S}{T - S}, 1)\bigr)\Bigr) & t \ge S
        \end{cases}

    where :math:`\eta_0` is the group's ``initial_<dst>``, :math:`t` its clock, :math:`T` is *total*, :math:`S` is
    *flat* times *total*, rounded, and :math:`f` is *floor* (or *floor_ratio* times :math:`\eta_0`).

    Args:
        flat: Part of *total* to hold the value for; from 0 to 1.
        floor: Value at the end, and ever after, in the unit of ``dst``; finite.
        floor_ratio: The same as a multiple of the initial value; finite; instead of *floor*.
        total: Length, in *unit*; at least 1; None for the whole run.
        unit: The clock: steps applied, iterations (micro-batches) or epochs.
        dst: The entry to schedule.

    Returns:
        A processor. Reads ``initial_<dst>`` and the clock; writes ``dst``; leaves other keys alone.

    Raises:
        ArgumentTypeError: If an argument has the wrong type.
        ArgumentValueError: If *total* is below 1, *flat* not from 0 to 1, both *floor* and *floor_ratio* given, a
            number infinite or NaN, or *unit* unknown.

    Examples:
        >>> import ice_engine as ice
        >>> hold = ice.schedules.flat_cosine(flat=0.5, total=4)
        >>> [round(hold({"step": t, "initial_lr": 1.0})["lr"], 3) for t in range(6)]
        [1.0, 1.0, 1.0, 0.5, 0.0, 0.0]

    References:
        fastai's ``fit_flat_cos``; mmcv's ``FlatCosineAnnealingLrUpdaterHook``.

    .. versionadded:: 0.1.0
    """
    flat = arguments.within("flat_cosine(flat=...)", flat, 0, 1)
    floor, floor_ratio = check_floor("flat_cosine", floor, floor_ratio)
    return build(
        flat_cosine, _flat_cosine, unit=unit, dst=dst, flat=flat, floor=floor, floor_ratio=floor_ratio, total=total
    )


@by_clock
def _wsd(
    t: float,
    *,
    decay: int,
    warmup: int,
    start: float | None,
    shape: str,
    floor: float,
    floor_ratio: float | None,
    total: int,
) -> Formula:
    if t < warmup:
        return times(ramp(t, warmup, start))
    if t < total - decay:
        return times(1.0)
    return above(floor, floor_ratio, FALLS[shape](progress(t - (total - decay), decay)))


def wsd(
    *,
    decay: int,
    warmup: int = 0,
    start: float | None = None,
    shape: Literal["1-sqrt", "linear", "cosine"] = "1-sqrt",
    floor: float = 0.0,
    floor_ratio: float | None = None,
    total: int | None = None,
    unit: Unit = "step",
    dst: str = "lr",
) -> Schedule:
    r"""Warm ``dst`` up, hold it, and let it fall at the end (warmup, stable, decay).

    .. math::

        \eta_t = \begin{cases}
            \eta_0\,\bigl(s + (1 - s)\,t / W\bigr) & t < W \\
            \eta_0 & W \le t < T - D \\
            f + (\eta_0 - f)\,g\bigl(\min(\tfrac{t - T + D}{D}, 1)\bigr) & t \ge T - D
        \end{cases}

    where :math:`\eta_0` is the group's ``initial_<dst>``, :math:`t` its clock, :math:`T` is *total*, :math:`W`
    *warmup*, :math:`s` *start*, :math:`D` *decay*, :math:`f` *floor* (or *floor_ratio* times :math:`\eta_0`), and
    :math:`g(p)` by *shape* :math:`1 - \sqrt p`, :math:`1 - p` or :math:`\tfrac12(1 + \cos \pi p)`.

    What comes before the decay does not depend on *total*: one long run can be continued from where it was stable.

    Args:
        decay: Length of the fall at the end, in *unit*; at least 1.
        warmup: Length of the ramp at the beginning, in *unit*; at least 0; with *decay* at most *total*.
        start: Factor at the beginning of the ramp; None for ``1 / (warmup + 1)``, so that no step is wasted at 0.
        shape: The way down: "1-sqrt", "linear" or "cosine".
        floor: Value at the end, and ever after, in the unit of ``dst``; finite.
        floor_ratio: The same as a multiple of the initial value; finite; instead of *floor*.
        total: Length, warmup and decay included, in *unit*; at least 1; None for the whole run.
        unit: The clock: steps applied, iterations (micro-batches) or epochs.
        dst: The entry to schedule.

    Returns:
        A processor. Reads ``initial_<dst>`` and the clock; writes ``dst``; leaves other keys alone.

    Raises:
        ArgumentTypeError: If an argument has the wrong type.
        ArgumentValueError: If *total* is below 1 or below *warmup* and *decay* together, *decay* below 1, *warmup*
            negative, *start* given without a *warmup*, both *floor* and *floor_ratio* given, a number infinite or
            NaN, or *shape* or *unit* unknown.

    Examples:
        >>> import ice_engine as ice
        >>> plan = ice.schedules.wsd(warmup=1, decay=4, total=8)
        >>> [round(plan({"step": t, "initial_lr": 1.0})["lr"], 3) for t in range(10)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 0.5, 0.293, 0.134, 0.0, 0.0]

    References:
        Hu et al., `MiniCPM <https://arxiv.org/abs/2404.06395>`_, 2024; Hägele et al., `Scaling Laws and
        Compute-Optimal Training Beyond Fixed Training Durations <https://arxiv.org/abs/2405.18392>`_, 2024.

    .. versionadded:: 0.1.0
    """
    warmup, start, decay = _check_phases("wsd", warmup, start, decay, total)
    arguments.choice("wsd(shape=...)", shape, tuple(FALLS))
    floor, floor_ratio = check_floor("wsd", floor, floor_ratio)
    return build(
        wsd,
        _wsd,
        unit=unit,
        dst=dst,
        decay=decay,
        warmup=warmup,
        start=start,
        shape=shape,
        floor=floor,
        floor_ratio=floor_ratio,
        total=total,
    )


@by_clock
def _trapezoid(t: float, *, warmup: int, decay: int, start: float | None, total: int) -> Formula:
    return _wsd.at_clock(
        t,
        decay=decay,
        warmup=warmup,
        start=start,
        shape="linear",
        floor=0.0,
        floor_ratio=None,
        total=total,
    )


def trapezoid(
    *,
    warmup: int,
    decay: int,
    start: float | None = None,
    total: int | None = None,
    unit: Unit = "step",
    dst: str = "lr",
) -> Schedule:
    r"""Raise ``dst`` along a line, hold it, and lower it along a line to 0.

    .. math::

        \eta_t = \eta_0 \begin{cases}
            s + (1 - s)\,t / W & t < W \\
            1 & W \le t < T - D \\
            \max\bigl(\tfrac{T - t}{D}, 0\bigr) & t \ge T - D
        \end{cases}

    where :math:`\eta_0` is the group's ``initial_<dst>``, :math:`t` its clock, :math:`T` is *total*, :math:`W`
    *warmup*, :math:`s` *start* and :math:`D` *decay*. It is ``wsd(shape="linear")`` by its older name.

    Args:
        warmup: Length of the ramp at the beginning, in *unit*; at least 0; with *decay* at most *total*.
        decay: Length of the fall at the end, in *unit*; at least 1.
        start: Factor at the beginning of the ramp; None for ``1 / (warmup + 1)``, so that no step is wasted at 0.
        total: Length, warmup and decay included, in *unit*; at least 1; None for the whole run.
        unit: The clock: steps applied, iterations (micro-batches) or epochs.
        dst: The entry to schedule.

    Returns:
        A processor. Reads ``initial_<dst>`` and the clock; writes ``dst``; leaves other keys alone.

    Raises:
        ArgumentTypeError: If an argument has the wrong type.
        ArgumentValueError: If *total* is below 1 or below *warmup* and *decay* together, *decay* below 1, *warmup*
            negative, *start* infinite, NaN or given without a *warmup*, or *unit* unknown.

    Examples:
        >>> import ice_engine as ice
        >>> plan = ice.schedules.trapezoid(warmup=2, decay=4, start=0.0, total=8)
        >>> [plan({"step": t, "initial_lr": 1.0})["lr"] for t in range(10)]
        [0.0, 0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]

    References:
        Xing et al., `A Walk with SGD <https://arxiv.org/abs/1802.08770>`_, 2018.

    .. versionadded:: 0.1.0
    """
    warmup, start, decay = _check_phases("trapezoid", warmup, start, decay, total)
    return build(trapezoid, _trapezoid, unit=unit, dst=dst, warmup=warmup, decay=decay, start=start, total=total)


def _check_phases(
    name: str, warmup: int, start: float | None, decay: int, total: int | None
) -> tuple[int, float | None, int]:
    warmup, start = check_ramp(name, warmup, start)
    decay = arguments.count(f"{name}(decay=...)", decay, 1)
    if total is not None and warmup + decay > arguments.count(f"{name}(total=...)", total, 1):
        message = (
            f"{name}(warmup=..., decay=...) must fit into total={total}, which includes both, got {warmup} + {decay}"
        )
        raise ArgumentValueError(message)
    return warmup, start, decay
