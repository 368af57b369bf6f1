"""Schedules that rise and fall, again and again."""

from collections.abc import Sequence
from typing import Literal

from ice_engine import arguments
from ice_engine.errors import ArgumentTypeError, ArgumentValueError, ProcessorValueError
from ice_engine.processors.clocks import Unit
from ice_engine.processors.curve import Formula, build, by_clock
from ice_engine.processors.schedule import Schedule
from ice_engine.processors.shapes import ANNEALS, between

MODES = ("triangular", "triangular2", "exp_range")


@by_clock
def _cyclic(t: float, *, peak: float, up: int, down: int | None, mode: str, gamma: float) -> Formula:
    period = up + (up if down is None else down)
    cycle, since = divmod(t, period)
    height = since / up if since <= up else (period - since) / (period - up)
    if mode == "triangular2":
        height *= 2.0**-cycle
    elif mode == "exp_range":
        height *= gamma**t
    return lambda base: base + (peak - base) * height


def cyclic(
    *,
    peak: float,
    up: int,
    down: int | None = None,
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular",
    gamma: float = 1.0,
    unit: Unit = "step",
    dst: str = "lr",
) -> Schedule:
    r"""Move ``dst`` along a line between its initial value and another one, to and fro.

    .. math:: \eta_t = \eta_0 + (\eta_{peak} - \eta_0)\,h_t\,a_t

    where :math:`\eta_0` is the group's ``initial_<dst>``, :math:`\eta_{peak}` is *peak*, :math:`h_t` goes from 0 to 1
    in *up* and back in *down*, and :math:`a_t` by *mode* is 1, :math:`2^{-i}` in the cycle :math:`i = 0, 1, \dots`, or
    :math:`\gamma^t` with :math:`t` the group's clock. It has no end.

    To cycle momentum the other way, as torch's ``CyclicLR`` does: ``cyclic(peak=0.8, up=2000, dst="momentum")`` with
    0.9 as the optimizer's own.

    Args:
        peak: The other value, in the unit of ``dst``; finite; may be below the initial value.
        up: Length of the way to *peak*, in *unit*; at least 1.
        down: Length of the way back, in *unit*; at least 1; None for *up*.
        mode: How the height of the cycles changes: "triangular" (not), "triangular2" (halves) or "exp_range".
        gamma: Factor of the height in one *unit*; above 0. With mode="exp_range" only.
        unit: The clock: steps applied, iterations (micro-batches) or epochs.
        dst: The entry to schedule.

    Returns:
        A processor. Reads ``initial_<dst>`` and the clock; writes ``dst``; leaves other keys alone.

    Raises:
        ArgumentTypeError: If an argument has the wrong type.
        ArgumentValueError: If *up* or *down* is below 1, *gamma* not above 0 or given with another *mode*, a number
            infinite or NaN, or *mode* or *unit* unknown.

    Examples:
        >>> import ice_engine as ice
        >>> waves = ice.schedules.cyclic(peak=5.0, up=2, mode="triangular2")
        >>> [waves({"step": t, "initial_lr": 1.0})["lr"] for t in range(9)]
        [1.0, 3.0, 5.0, 3.0, 1.0, 2.0, 3.0, 2.0, 1.0]

    References:
        Smith, `Cyclical Learning Rates for Training Neural Networks <https://arxiv.org/abs/1506.01186>`_, 2017.

    .. versionadded:: 0.1.0
    """
    peak = arguments.number("cyclic(peak=...)", peak)
    up = arguments.count("cyclic(up=...)", up, 1)
    down = None if down is None else arguments.count("cyclic(down=...)", down, 1)
    arguments.choice("cyclic(mode=...)", mode, MODES)
    gamma = arguments.positive("cyclic(gamma=...)", gamma)
    if gamma != 1 and mode != "exp_range":
        message = f'cyclic(gamma={gamma}) would do nothing with mode={mode!r}; write mode="exp_range", or leave it out'
        raise ArgumentValueError(message)
    return build(cyclic, _cyclic, unit=unit, dst=dst, peak=peak, up=up, down=down, mode=mode, gamma=gamma)


@by_clock
def _cyclic_anneal(
    t: float,
    *,
    target_ratio: tuple[float, float],
    times: int,
    up: float,
    anneal: str,
    gamma: float,
    total: int,
) -> Formula:
    if 0 < total < times:  # 0 or less: it began after the end of the run
        message = f"processor 'cyclic_anneal' is to fit times={times} cycles into {total}; each needs one at least"
        raise ProcessorValueError(message)
    period = max(total // times, 1)
    rise = min(int(up * period), period - 1)
    cycle, since = divmod(t, period)
    highest, least = target_ratio
    scale = gamma**cycle
    peak = 1 - scale + highest * scale
    if since < rise:
        way = between(anneal, since / rise)
        return lambda base: way(base, base * peak)
    way = between(anneal, (since - rise) / (period - rise))
    return lambda base: way(base * peak, base * least)


def cyclic_anneal(
    *,
    target_ratio: float | Sequence[float] = (10.0, 1e-4),
    times: int = 1,
    up: float = 0.4,
    anneal: Literal["cos", "linear"] = "cos",
    gamma: float = 1.0,
    total: int | None = None,
    unit: Unit = "step",
    dst: str = "lr",
) -> Schedule:
    r"""Raise ``dst`` to a multiple of its initial value and lower it to another one, a number of times.

    .. math::

        \eta_t = \begin{cases}
            A\bigl(\eta_0,\; p_i,\; c / U\bigr) & c < U \\
            A\bigl(p_i,\; r_1\,\eta_0,\; \tfrac{c - U}{L - U}\bigr) & c \ge U
        \end{cases}
        \qquad p_i = \eta_0\,\bigl(1 + (r_0 - 1)\,\gamma^i\bigr)

    where :math:`\eta_0` is the group's ``initial_<dst>``, :math:`A(a, b, x)` goes from :math:`a` to :math:`b` along
    half a cosine or a line, :math:`L = \lfloor T / n \rfloor` is the length of a cycle, :math:`T` being *total* and
    :math:`n` *times*, :math:`U = \lfloor u L \rfloor` that of its rise, :math:`u` being *up*, :math:`i` and :math:`c`
    are the cycle and the time in it, and :math:`r_0, r_1` is *target_ratio*. It has no end: past *total*, the cycles
    go on.

    Args:
        target_ratio: Multiples of the initial value: the highest and the last of a cycle; a single number r is
            ``(r, r / 1e5)``.
        times: How many cycles fit into *total*; at least 1.
        up: Part of a cycle that rises; at least 0 and below 1. Without a rise, a cycle begins at its peak.
        anneal: The ways up and down: "cos" or "linear".
        gamma: Factor of the height of the peak over the initial value, from cycle to cycle; above 0, at most 1.
        total: Length of all cycles, in *unit*; at least *times*; None for the whole run.
        unit: The clock: steps applied, iterations (micro-batches) or epochs.
        dst: The entry to schedule.

    Returns:
        A processor. Reads ``initial_<dst>`` and the clock; writes ``dst``; leaves other keys alone.

    Raises:
        ArgumentTypeError: If an argument has the wrong type.
        ArgumentValueError: If *total* is below *times*, *times* below 1, *target_ratio* not one or two numbers, *up*
            or *gamma* out of range, a number infinite or NaN, or *anneal* or *unit* unknown.

    Examples:
        >>> import ice_engine as ice
        >>> waves = ice.schedules.cyclic_anneal(target_ratio=(3, 0), times=2, up=0.5, anneal="linear", total=8)
        >>> [waves({"step": t, "initial_lr": 1.0})["lr"] for t in range(8)]
        [1.0, 2.0, 3.0, 1.5, 1.0, 2.0, 3.0, 1.5]

    References:
        Smith, `Cyclical Learning Rates for Training Neural Networks <https://arxiv.org/abs/1506.01186>`_, 2017;
        mmcv's ``CyclicLrUpdaterHook``.

    .. versionadded:: 0.1.0
    """
    ratios = _check_ratios(target_ratio)
    times = arguments.count("cyclic_anneal(times=...)", times, 1)
    if not arguments.number("cyclic_anneal(up=...)", up) < 1 or up < 0:
        message = f"cyclic_anneal(up=...) must be at least 0 and below 1, got {up!r}"
        raise ArgumentValueError(message)
    arguments.choice("cyclic_anneal(anneal=...)", anneal, ANNEALS)
    if arguments.positive("cyclic_anneal(gamma=...)", gamma) > 1:
        message = f"cyclic_anneal(gamma=...) must be above 0 and at most 1, got {gamma!r}"
        raise ArgumentValueError(message)
    if total is not None and arguments.count("cyclic_anneal(total=...)", total, 1) < times:
        message = f"cyclic_anneal(total=...) must be at least times={times}, a step for each cycle, got {total}"
        raise ArgumentValueError(message)
    return build(
        cyclic_anneal,
        _cyclic_anneal,
        unit=unit,
        dst=dst,
        target_ratio=ratios,
        times=times,
        up=float(up),
        anneal=anneal,
        gamma=float(gamma),
        total=total,
    )


def _check_ratios(target_ratio: float | Sequence[float]) -> tuple[float, float]:
    if not isinstance(target_ratio, Sequence):
        ratio = arguments.number("cyclic_anneal(target_ratio=...)", target_ratio)
        return ratio, ratio / 1e5
    if isinstance(target_ratio, str):
        message = f"cyclic_anneal(target_ratio=...) must be one or two numbers, got {target_ratio!r} (str)"
        raise ArgumentTypeError(message)
    if len(target_ratio) != 2:  # noqa: PLR2004 - the highest and the last
        message = f"cyclic_anneal(target_ratio=...) must be one number or two, got {target_ratio!r}"
        raise ArgumentValueError(message)
    highest, last = (arguments.number("each of cyclic_anneal(target_ratio=(...))", ratio) for ratio in target_ratio)
    return highest, last
