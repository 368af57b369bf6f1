"""The schedule that follows what was measured, and is a pure function of it."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from ice_engine import arguments
from ice_engine.errors import ArgumentTypeError, ArgumentValueError
from ice_engine.processors.clocks import Unit
from ice_engine.processors.curve import build
from ice_engine.processors.history import History
from ice_engine.processors.schedule import Schedule

MODES = ("min", "max")
THRESHOLD_MODES = ("rel", "abs")


class _Patience:
    """Counts how often the value is to be reduced.

    Attributes:
        reductions: So far.
    """

    def __init__(self, mode: str, patience: int, threshold: float, threshold_mode: str, cooldown: int) -> None:
        self._sign = 1 if mode == "min" else -1
        self._patience, self._threshold, self._cooldown = patience, threshold, cooldown
        self._relative = threshold_mode == "rel"
        self._best, self._bad, self._resting = self._sign * math.inf, 0, 0
        self.reductions = 0

    def add(self, measured: float) -> None:
        sign, best, threshold = self._sign, self._best, self._threshold
        limit = best * (1 - sign * threshold) if self._relative else best - sign * threshold
        if sign * measured < sign * limit:  # false of NaN
            self._best, self._bad = measured, 0
        else:
            self._bad += 1
        if self._resting:
            self._resting, self._bad = self._resting - 1, 0
        if self._bad > self._patience:
            self.reductions, self._resting, self._bad = self.reductions + 1, self._cooldown, 0


def _plateau(
    base: float,
    _: float,
    *,
    metric: str,
    mode: str,
    factor: float,
    patience: int,
    threshold: float,
    threshold_mode: str,
    cooldown: int,
    floor: float,
    eps: float,
    measurements: Mapping[str, Any],
) -> float:
    history = measurements.get(metric, ())
    if not isinstance(history, History):
        history = History(history)
    counted = history.followed_by(_Patience, mode, patience, threshold, threshold_mode, cooldown)
    for _reduction in range(counted.reductions):
        lower = max(base * factor, floor)
        if base - lower <= eps:
            break  # and so would every further one be
        base = lower
    return base


def plateau(
    *,
    metric: str,
    mode: Literal["min", "max"] = "min",
    factor: float = 0.1,
    patience: int = 10,
    threshold: float = 1e-4,
    threshold_mode: Literal["rel", "abs"] = "rel",
    cooldown: int = 0,
    floor: float = 0.0,
    eps: float = 1e-8,
    unit: Unit = "step",
    dst: str = "lr",
) -> Schedule:
    r"""Lower ``dst`` each time a metric has stopped improving.

    .. math:: \eta_t = \eta^{(n)}, \quad \eta^{(0)} = \eta_0, \quad \eta^{(i+1)} = \max(\eta^{(i)} \gamma, f)

    where :math:`\eta_0` is the group's ``initial_<dst>``, :math:`\gamma` is *factor*, :math:`f` *floor* and :math:`n`
    the number of times that more than *patience* measurements in a row were no better than the best before them. It
    is counted from the whole history, so nothing has to be saved besides what was measured.

    Args:
        metric: Name of the metric, as reported with ``optimizer.report(name=value)``. Before its first measurement,
            nothing is reduced.
        mode: Whether "min" or "max" is better.
        factor: Factor of one reduction; above 0 and below 1.
        patience: How many measurements in a row may be no better; at least 0.
        threshold: How much better is better; at least 0. NaN never is.
        threshold_mode: Whether that is a part of the best ("rel") or a difference from it ("abs").
        cooldown: How many measurements after a reduction count for nothing; at least 0.
        floor: Least value, in the unit of ``dst``; finite.
        eps: A reduction by no more than this is left out; at least 0.
        unit: The clock that ``then(..., at=)`` counts; the value does not depend on it.
        dst: The entry to schedule.

    Returns:
        A processor. Reads ``initial_<dst>``, ``measurements`` and the clock; writes ``dst``; leaves other keys alone.

    Raises:
        ArgumentTypeError: If an argument has the wrong type.
        ArgumentValueError: If an argument is out of its range, infinite or NaN, or *mode*, *threshold_mode* or *unit*
            unknown.

    Examples:
        >>> import ice_engine as ice
        >>> patient = ice.schedules.plateau(metric="loss", factor=0.5, patience=1)
        >>> history = (3.0, 2.0, 2.0, 2.0, 1.0)
        >>> [patient({"step": 0, "initial_lr": 1.0, "measurements": {"loss": history[:n]}})["lr"] for n in range(6)]
        [1.0, 1.0, 1.0, 1.0, 0.5, 0.5]

    References:
        PyTorch's ``ReduceLROnPlateau``, of which this is the function.

    .. versionadded:: 0.1.0
    """
    if not isinstance(metric, str):
        message = f"plateau(metric=...) must be the name of a metric, got {metric!r} ({type(metric).__name__})"
        raise ArgumentTypeError(message)
    if not metric:
        message = "plateau(metric=...) must be the name of a metric, such as 'loss', got ''"
        raise ArgumentValueError(message)
    arguments.choice("plateau(mode=...)", mode, MODES)
    arguments.choice("plateau(threshold_mode=...)", threshold_mode, THRESHOLD_MODES)
    if arguments.positive("plateau(factor=...)", factor) >= 1:
        message = f"plateau(factor=...) must be above 0 and below 1, got {factor!r}"
        raise ArgumentValueError(message)
    return build(
        plateau,
        _plateau,
        unit=unit,
        dst=dst,
        reads=("measurements",),
        metric=metric,
        mode=mode,
        factor=float(factor),
        patience=arguments.count("plateau(patience=...)", patience, 0),
        threshold=arguments.at_least("plateau(threshold=...)", threshold, 0),
        threshold_mode=threshold_mode,
        cooldown=arguments.count("plateau(cooldown=...)", cooldown, 0),
        floor=arguments.number("plateau(floor=...)", floor),
        eps=arguments.at_least("plateau(eps=...)", eps, 0),
    )
