"""The one-cycle policy: one rise, one fall, and momentum the other way."""

from collections.abc import Callable
from typing import Literal

from ice_engine import arguments
from ice_engine.errors import ArgumentValueError
from ice_engine.processors.clocks import Unit
from ice_engine.processors.curve import Formula, build, by_clock
from ice_engine.processors.schedule import Schedule
from ice_engine.processors.shapes import ANNEALS, between


def _along(ends: tuple[float, ...], t: float, anneal: str) -> Callable[[tuple[float, ...]], float]:
    """Return what gives the value at *t* of phases that end at *ends* and lead from each of some values to the next."""
    phase = next((phase for phase, end in enumerate(ends) if t <= end), len(ends) - 1)
    start, end = (0.0, *ends)[phase], ends[phase]
    # A phase without length is at its end at once.
    part = (t - start) / (end - start) if end > start else 1.0
    way = between(anneal, part)
    return lambda values: way(values[phase], values[phase + 1])


def _phases(total: int, pct_start: float, three_phase: bool) -> tuple[float, ...]:
    rise = pct_start * total - 1
    return (rise, 2 * rise, total - 1) if three_phase else (rise, total - 1)


@by_clock
def _one_cycle(
    t: float,
    *,
    total: int,
    pct_start: float,
    anneal: str,
    div_factor: float,
    final_div_factor: float,
    three_phase: bool,
) -> Formula:
    along = _along(_phases(total, pct_start, three_phase), max(min(t, total - 1), 0), anneal)

    def value(base: float) -> float:
        low = base / div_factor
        return along((low, base, low, low / final_div_factor) if three_phase else (low, base, low / final_div_factor))

    return value


def one_cycle(
    *,
    total: int | None = None,
    pct_start: float = 0.3,
    anneal: Literal["cos", "linear"] = "cos",
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    three_phase: bool = False,
    unit: Unit = "step",
    dst: str = "lr",
) -> Schedule:
    r"""Raise ``dst`` from a part of its initial value to all of it, and lower it to nearly nothing.

    .. math::

        \eta_t = \begin{cases}
            A\bigl(\eta_0 / d,\; \eta_0,\; t / R\bigr) & t \le R \\
            A\bigl(\eta_0,\; \eta_0 / (d e),\; \tfrac{t - R}{T - 1 - R}\bigr) & R < t \le T - 1
        \end{cases}
        \qquad R = q T - 1

    where :math:`\eta_0` is the group's ``initial_<dst>`` (what torch calls ``max_lr``), :math:`t` its clock,
    :math:`A(a, b, x)` goes from :math:`a` to :math:`b` along half a cosine or a line, :math:`T` is *total*, :math:`q`
    *pct_start*, :math:`d` *div_factor* and :math:`e` *final_div_factor*. With *three_phase* it is back at
    :math:`\eta_0 / d` at :math:`2 R` and goes on from there. Past :math:`T - 1` the value stays.

    Args:
        total: Length, in *unit*; at least 1; None for the whole run. The last value is that of ``total - 1``.
        pct_start: Part of *total* that rises; from 0 to 1. With *three_phase*, above 0.5 leaves no third phase.
        anneal: The ways up and down: "cos" or "linear".
        div_factor: How many times lower it starts; above 0.
        final_div_factor: How many times lower than it started it ends; above 0.
        three_phase: Come down to the start first, in the time of the rise, and from there to the end.
        unit: The clock: steps applied, iterations (micro-batches) or epochs.
        dst: The entry to schedule.

    Returns:
        A processor. Reads ``initial_<dst>`` and the clock; writes ``dst``; leaves other keys alone.

    Raises:
        ArgumentTypeError: If an argument has the wrong type.
        ArgumentValueError: If *total* is below 1, *pct_start* out of range, a factor not above 0, a number infinite
            or NaN, or *anneal* or *unit* unknown.

    Examples:
        >>> import ice_engine as ice
        >>> cycle = ice.schedules.one_cycle(total=5, pct_start=0.6, anneal="linear", div_factor=4, final_div_factor=2)
        >>> [cycle({"step": t, "initial_lr": 1.0})["lr"] for t in range(7)]
        [0.25, 0.625, 1.0, 0.5625, 0.125, 0.125, 0.125]

    References:
        Smith and Topin, `Super-Convergence <https://arxiv.org/abs/1708.07120>`_, 2018.

    .. versionadded:: 0.1.0
    """
    _check("one_cycle", pct_start, anneal, three_phase)
    return build(
        one_cycle,
        _one_cycle,
        unit=unit,
        dst=dst,
        total=total,
        pct_start=float(pct_start),
        anneal=anneal,
        div_factor=arguments.positive("one_cycle(div_factor=...)", div_factor),
        final_div_factor=arguments.positive("one_cycle(final_div_factor=...)", final_div_factor),
        three_phase=three_phase,
    )


@by_clock
def _one_cycle_momentum(
    t: float, *, low: float, high: float, total: int, pct_start: float, anneal: str, three_phase: bool
) -> Formula:
    along = _along(_phases(total, pct_start, three_phase), max(min(t, total - 1), 0), anneal)
    value = along((high, low, high, high) if three_phase else (high, low, high))
    return lambda _: value


def one_cycle_momentum(
    *,
    low: float = 0.85,
    high: float = 0.95,
    total: int | None = None,
    pct_start: float = 0.3,
    anneal: Literal["cos", "linear"] = "cos",
    three_phase: bool = False,
    unit: Unit = "step",
    dst: str = "momentum",
) -> Schedule:
    r"""Lower momentum while :func:`one_cycle` raises the rate, and raise it again while that falls.

    .. math::

        \mu_t = \begin{cases}
            A\bigl(h,\; l,\; t / R\bigr) & t \le R \\
            A\bigl(l,\; h,\; \tfrac{t - R}{T - 1 - R}\bigr) & R < t \le T - 1
        \end{cases}
        \qquad R = q T - 1

    where :math:`t` is the group's clock, :math:`A(a, b, x)` goes from :math:`a` to :math:`b` along half a cosine or a
    line, :math:`l` and :math:`h` are *low* and *high*, :math:`T` is *total* and :math:`q` *pct_start*. With
    *three_phase* it is back at :math:`h` at :math:`2 R` and stays there. The values do not depend on the initial one.

    Args:
        low: Least value, while the rate is at its peak; finite.
        high: Value at the beginning and the end, and ever after; finite, at least *low*.
        total: Length, in *unit*; at least 1; None for the whole run. Give both schedules the same.
        pct_start: Part of *total* that falls; from 0 to 1. With *three_phase*, above 0.5 leaves no third phase.
        anneal: The ways down and up: "cos" or "linear".
        three_phase: Come up in the time of the fall, and stay.
        unit: The clock: steps applied, iterations (micro-batches) or epochs.
        dst: The entry to schedule: "momentum" of SGD, "betas.0" of Adam.

    Returns:
        A processor. Reads ``initial_<dst>`` and the clock; writes ``dst``; leaves other keys alone.

    Raises:
        ArgumentTypeError: If an argument has the wrong type.
        ArgumentValueError: If *total* is below 1, *low* above *high*, *pct_start* out of range, a number infinite or
            NaN, or *anneal* or *unit* unknown.

    Examples:
        >>> import ice_engine as ice
        >>> cycle = ice.schedules.one_cycle_momentum(low=0.5, high=1.0, total=5, pct_start=0.6, anneal="linear")
        >>> [cycle({"step": t, "initial_momentum": 0.9})["momentum"] for t in range(7)]
        [1.0, 0.75, 0.5, 0.75, 1.0, 1.0, 1.0]

    References:
        Smith and Topin, `Super-Convergence <https://arxiv.org/abs/1708.07120>`_, 2018.

    .. versionadded:: 0.1.0
    """
    low = arguments.number("one_cycle_momentum(low=...)", low)
    high = arguments.number("one_cycle_momentum(high=...)", high)
    if low > high:
        message = f"one_cycle_momentum(low=..., high=...) must have low <= high, got {low!r} and {high!r}"
        raise ArgumentValueError(message)
    _check("one_cycle_momentum", pct_start, anneal, three_phase)
    return build(
        one_cycle_momentum,
        _one_cycle_momentum,
        unit=unit,
        dst=dst,
        low=low,
        high=high,
        total=total,
        pct_start=float(pct_start),
        anneal=anneal,
        three_phase=three_phase,
    )


def _check(name: str, pct_start: float, anneal: str, three_phase: bool) -> None:
    arguments.within(f"{name}(pct_start=...)", pct_start, 0, 1)
    arguments.choice(f"{name}(anneal=...)", anneal, ANNEALS)
    arguments.flag(f"{name}(three_phase=...)", three_phase)
