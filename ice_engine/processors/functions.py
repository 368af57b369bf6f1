"""Schedules made of a function of one's own."""

import math
import threading
from array import array
from collections.abc import Callable
from typing import Any, SupportsFloat

from ice_engine.errors import ArgumentTypeError, ProcessorValueError
from ice_engine.processors.clocks import Unit
from ice_engine.processors.curve import Formula, build, by_clock
from ice_engine.processors.processor import name_of
from ice_engine.processors.schedule import Schedule


@by_clock
def _function(t: float, *, f: Callable[[Any], Any]) -> Formula:
    factor = _factor("function", f, t)
    return lambda base: _finite(base * factor)


def function(f: Callable[[Any], SupportsFloat], *, unit: Unit = "step", dst: str = "lr") -> Schedule:
    r"""Multiply the initial value of ``dst`` by a function of time.

    .. math:: \eta_t = \eta_0\,f(t)

    where :math:`\eta_0` is the group's ``initial_<dst>`` and :math:`t` its clock.

    Args:
        f: Takes how many of *unit* lie behind (an int, or a float where a resumed run stretches its clock) and returns
            a finite number. A function of a module, if the schedule is to be pickled; it must depend on nothing else.
        unit: The clock: steps applied, iterations (micro-batches) or epochs.
        dst: The entry to schedule.

    Returns:
        A processor. Reads ``initial_<dst>`` and the clock; writes ``dst``; leaves other keys alone.

    Raises:
        ArgumentTypeError: If *f* cannot be called, or *unit* or *dst* is not a string.
        ArgumentValueError: If *unit* is unknown.

    Examples:
        >>> import ice_engine as ice
        >>> def every_other(t):
        ...     return 1 if t % 2 == 0 else 0.5
        >>> toggle = ice.schedules.function(every_other)
        >>> toggle, [toggle({"step": t, "initial_lr": 0.2})["lr"] for t in range(3)]
        (function(f=every_other), [0.2, 0.1, 0.2])

    .. versionadded:: 0.1.0
    """
    return build(function, _function, unit=unit, dst=dst, f=_check_callable("function", f))


class Products:
    """``f(1) * ... * f(t)`` as a function of ``t``, which remembers what it has multiplied.

    Equal to another one of the same *f*, and pickled as *f* alone: what it remembers is no part of its value.
    """

    def __init__(self, f: Callable[[Any], Any]) -> None:
        self.f = f
        self.__name__ = name_of(f)
        self._products = array("d", [1.0])
        self._lock = threading.Lock()

    def __call__(self, t: int) -> float:
        """Return the product of the first *t*."""
        products = self._products
        with self._lock:
            for i in range(len(products), t + 1):
                products.append(_finite(products[-1] * _factor("multiplicative", self.f, i)))
        return products[t]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Products) and self.f == other.f

    def __hash__(self) -> int:
        return hash(self.f)

    def __reduce__(self) -> tuple[Any, ...]:
        return Products, (self.f,)


@by_clock
def _multiplicative(t: float, *, f: Products) -> Formula:
    factor = f(int(t))
    return lambda base: _finite(base * factor)


def multiplicative(f: Callable[[int], SupportsFloat], *, unit: Unit = "step", dst: str = "lr") -> Schedule:
    r"""Multiply ``dst`` by a function of time, each time.

    .. math:: \eta_t = \eta_0 \prod_{i=1}^{t} f(i)

    where :math:`\eta_0` is the group's ``initial_<dst>`` and :math:`t` its clock. The products are remembered, 8 bytes
    each, so that a step costs one call of *f*; they are no part of the schedule's value, and not pickled.

    Args:
        f: Takes an int, at least 1, and returns a finite number. A function of a module, if the schedule is to be
            pickled; it must depend on nothing else.
        unit: The clock: steps applied, iterations (micro-batches) or epochs.
        dst: The entry to schedule.

    Returns:
        A processor. Reads ``initial_<dst>`` and the clock; writes ``dst``; leaves other keys alone.

    Raises:
        ArgumentTypeError: If *f* cannot be called, or *unit* or *dst* is not a string.
        ArgumentValueError: If *unit* is unknown.

    Examples:
        >>> import ice_engine as ice
        >>> def ratio(i):
        ...     return i / (i + 1)
        >>> harmonic = ice.schedules.multiplicative(ratio)
        >>> [harmonic({"step": t, "initial_lr": 1.0})["lr"] for t in (0, 1, 3)]
        [1.0, 0.5, 0.25]

    .. versionadded:: 0.1.0
    """
    return build(multiplicative, _multiplicative, unit=unit, dst=dst, f=Products(_check_callable("multiplicative", f)))


def _check_callable(name: str, f: Any) -> Callable[[Any], Any]:
    if not callable(f):
        message = f"{name}() wants a function of time, got {f!r} ({type(f).__name__})"
        raise ArgumentTypeError(message)
    return f  # type: ignore[no-any-return] # callable() says so


def _factor(name: str, f: Callable[[Any], Any], t: float) -> float:
    found = f(t)
    try:
        factor = float(found) if hasattr(found, "__float__") else math.nan  # "1" has none, and float("1") would do
    except (TypeError, ValueError, RuntimeError):  # an array or tensor of several
        factor = math.nan
    if not math.isfinite(factor):
        message = (
            f"processor {name!r}: {name_of(f)}({t}) returned {found!r} ({type(found).__name__}); "
            "it must return a finite number"
        )
        raise ProcessorValueError(message)
    return factor


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise OverflowError  # as a power would; the curve says which schedule, and when
    return value
