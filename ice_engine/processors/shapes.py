"""Shapes: the ways from one value to another, and the value they end at."""

import math
from collections.abc import Callable

from ice_engine import arguments
from ice_engine.errors import ArgumentValueError

ANNEALS = ("cos", "linear")


def between(kind: str, part: float) -> Callable[[float, float], float]:
    """Return what gives the value at *part* (0 to 1) of the way from one value to another; *kind* is of ``ANNEALS``."""
    left = half_cosine(part) if kind == "cos" else 1 - part
    right = 1 - left
    # Exact at both ends, however far apart they are.
    return lambda start, end: end if start == end else start * left + end * right


def half_cosine(part: float) -> float:
    """Return half a cosine, from 1 at a *part* of 0 to 0 at 1."""
    return (1 + math.cos(math.pi * part)) / 2


FALLS: dict[str, Callable[[float], float]] = {
    "1-sqrt": lambda part: 1 - math.sqrt(part),
    "linear": lambda part: 1 - part,
    "cosine": half_cosine,
}
"""Ways from 1 to 0, by the names that ``wsd(shape=...)`` gives them."""


def lowest(base: float, floor: float, floor_ratio: float | None) -> float:
    """Return the value to end at: *floor*, or *floor_ratio* times *base* where that is given."""
    return floor if floor_ratio is None else base * floor_ratio


def above(floor: float, floor_ratio: float | None, part: float, of: float = 1.0) -> Callable[[float], float]:
    """Return what gives the value at *part* (0 to *of*) of the way up to a base from the :func:`lowest`."""
    if floor_ratio is None:
        return lambda base: floor + (base - floor) * part / of

    def value(base: float) -> float:
        end = base * floor_ratio
        return end + (base - end) * part / of

    return value


def times(factor: float) -> Callable[[float], float]:
    """Return what gives *factor* times a base."""
    return lambda base: base * factor


def check_floor(name: str, floor: float, floor_ratio: float | None) -> tuple[float, float | None]:
    """Return both, checked; *name* is the factory's.

    Raises:
        ArgumentTypeError: If one is not a number.
        ArgumentValueError: If one is infinite or NaN, or both are given.
    """
    floor = arguments.number(f"{name}(floor=...)", floor)
    if floor_ratio is None:
        return floor, None
    floor_ratio = arguments.number(f"{name}(floor_ratio=...)", floor_ratio)
    if floor:
        message = (
            f"{name}(floor=..., floor_ratio=...) are two ways to say where it ends, a value and a multiple of the "
            f"initial value; give one, got {floor!r} and {floor_ratio!r}"
        )
        raise ArgumentValueError(message)
    return floor, floor_ratio
