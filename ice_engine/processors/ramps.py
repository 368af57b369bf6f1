"""Schedules that hold the value or lead up to it."""

import math
from collections.abc import Callable
from typing import Literal

from ice_engine import arguments
from ice_engine.errors import ArgumentTypeError, ArgumentValueError, MissingKeyError
from ice_engine.processors.clocks import Unit
from ice_engine.processors.curve import Formula, build, by_clock
from ice_engine.processors.schedule import Schedule
from ice_engine.processors.shapes import half_cosine, times


@by_clock
def _constant(_: float, *, factor: float) -> Formula:
    return times(factor)


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


RISES: dict[str, Callable[[float, float], float]] = {
    "linear": lambda start, part: start + (1 - start) * part,
    "constant": lambda start, _: start,
    "exponential": lambda start, part: math.pow(start, 1 - part),
    "harmonic": lambda start, part: 1 / (1 / start + (1 - 1 / start) * part),
    "cosine": lambda start, part: start + (1 - start) * (1 - half_cosine(part)),
    "1-sqrt": lambda start, part: start + (1 - start) * (1 - math.sqrt(1 - part)),
}
"""Ways from *start* up to 1, by the names that ``warmup(shape=...)`` gives them."""


def ramp(t: float, steps: float, start: float | None, shape: str = "linear") -> float:
    """Return the factor of a ramp to 1 over *steps*; a *start* of None is ``1 / (steps + 1)``, along a line."""
    if t >= steps:
        return 1.0
    # (t + 1) / (steps + 1): the first step already moves, and the first one after the ramp continues its line.
    return (t + 1) / (steps + 1) if start is None else RISES[shape](start, t / steps)


def check_ramp(name: str, warmup: int, start: float | None, total: int | None = None) -> tuple[int, float | None]:
    """Return *warmup* and *start*, checked, of a schedule that begins with a ramp; *name* is the factory's.

    Raises:
        ArgumentTypeError: If one has the wrong type.
        ArgumentValueError: If *warmup* is negative or not below *total*, or *start* is infinite, NaN, or without a
            *warmup*.
    """
    warmup = arguments.count(f"{name}(warmup=...)", warmup, 0)
    start = None if start is None else arguments.number(f"{name}(start=...)", start)
    if total is not None and warmup >= arguments.count(f"{name}(total=...)", total, 1):
        message = f"{name}(warmup=...) must be below total={total}, which includes it, got {warmup}"
        raise ArgumentValueError(message)
    if start is not None and not warmup:
        message = f"{name}(start={start}) is where the warmup starts, and there is none; give warmup= too"
        raise ArgumentValueError(message)
    return warmup, start


@by_clock
def _warmup(
    t: float,
    *,
    steps: int | None,
    epochs: float | None,
    start: float | None,
    shape: str,
    epoch_length: int | None = None,
) -> Formula:
    if steps is not None:
        return times(ramp(t, steps, start, shape))
    if epoch_length is None:
        message = (
            "processor 'warmup' lasts a number of epochs, whose length is unknown: 'epoch_length' of the mapping is "
            "None. Pass warmup(steps=...) instead of epochs="
        )
        raise MissingKeyError(message)
    return times(ramp(t, (epochs or 0) * epoch_length, start, shape))


def warmup(
    *,
    steps: int | None = None,
    epochs: float | None = None,
    start: float | None = None,
    shape: Literal["linear", "constant", "exponential", "harmonic", "cosine", "1-sqrt"] = "linear",
    unit: Unit = "step",
    dst: str = "lr",
) -> Schedule:
    r"""Lead ``dst`` up to its initial value, and hold it there.

    .. math:: \eta_t = \eta_0\,r\bigl(\min(t / W, 1)\bigr)

    where :math:`\eta_0` is the group's ``initial_<dst>``, :math:`t` its clock, :math:`W` the length, and with
    :math:`s` for *start* the ramp :math:`r(p)` is, by *shape*,

    .. math::

        \begin{array}{ll}
            \text{linear} & s + (1 - s)\,p \\
            \text{constant} & s \text{ for } p < 1 \\
            \text{exponential} & s^{1 - p} \\
            \text{harmonic} & \bigl(s^{-1} + (1 - s^{-1})\,p\bigr)^{-1} \\
            \text{cosine} & s + (1 - s)\,\tfrac12\bigl(1 - \cos(\pi p)\bigr) \\
            \text{1-sqrt} & s + (1 - s)\bigl(1 - \sqrt{1 - p}\bigr)
        \end{array}

    To warm up another schedule, multiply: ``warmup(steps=50) * cosine(total=1000)``. The ramp then multiplies the
    curve and does not shift it.

    Args:
        steps: Length of the ramp, in *unit*; at least 1. Give this or *epochs*.
        epochs: Length of the ramp in epochs, counted in iterations; above 0. Only with ``unit="iteration"``; reads
            the length of an epoch from the mapping.
        start: Factor at the beginning; None for ``1 / (steps + 1)``, so that no step is wasted at 0. Required by
            every *shape* but "linear"; above 0 for "exponential" and "harmonic".
        shape: The way up: "linear", "constant", "exponential", "harmonic", "cosine" or "1-sqrt".
        unit: The clock: steps applied, iterations (micro-batches) or epochs.
        dst: The entry to schedule.

    Returns:
        A processor. Reads ``initial_<dst>``, the clock and, with *epochs*, ``epoch_length``; writes ``dst``; leaves
        other keys alone.

    Raises:
        ArgumentTypeError: If an argument has the wrong type, or not exactly one of *steps* and *epochs* is given.
        ArgumentValueError: If *steps* is below 1, *epochs* not above 0 or given with another *unit*, *start*
            infinite, NaN or impossible for *shape*, or *shape* or *unit* unknown.

    Examples:
        >>> import ice_engine as ice
        >>> rise = ice.schedules.warmup(steps=3)
        >>> [rise({"step": t, "initial_lr": 1.0})["lr"] for t in range(5)]
        [0.25, 0.5, 0.75, 1.0, 1.0]
        >>> rise = ice.schedules.warmup(epochs=2, start=0.5, unit="iteration")
        >>> [rise({"iteration": i, "epoch_length": 2, "initial_lr": 1.0})["lr"] for i in range(1, 6)]
        [0.5, 0.625, 0.75, 0.875, 1.0]

    References:
        Goyal et al., `Accurate, Large Minibatch SGD <https://arxiv.org/abs/1706.02677>`_, 2017; the shapes "constant",
        "exponential" and (for momentum) "harmonic" are mmcv's, "cosine" and "1-sqrt" those of transformers' WSD.

    .. versionadded:: 0.1.0
    """
    if (steps is None) == (epochs is None):
        found = "neither" if steps is None else f"steps={steps!r} and epochs={epochs!r}"
        message = f"warmup() wants its length as steps= or as epochs=, got {found}"
        raise ArgumentTypeError(message)
    steps = None if steps is None else arguments.count("warmup(steps=...)", steps, 1)
    epochs = None if epochs is None else arguments.positive("warmup(epochs=...)", epochs)
    start = None if start is None else arguments.number("warmup(start=...)", start)
    arguments.choice("warmup(shape=...)", shape, tuple(RISES))
    if start is None and shape != "linear":
        message = f"warmup(shape={shape!r}) needs the factor it starts at; give start= too, such as start=0.1"
        raise ArgumentTypeError(message)
    if shape in ("exponential", "harmonic"):
        arguments.positive(f"warmup(shape={shape!r}, start=...)", start)
    reads = () if epochs is None else ("epoch_length",)
    schedule = build(
        warmup, _warmup, unit=unit, dst=dst, reads=reads, steps=steps, epochs=epochs, start=start, shape=shape
    )
    if epochs is not None and unit != "iteration":
        message = (
            f"warmup(epochs={epochs!r}) is a length in epochs counted in iterations, got unit={unit!r}; write "
            f'unit="iteration", or give the length in {unit}s as steps='
        )
        raise ArgumentValueError(message)
    return schedule
