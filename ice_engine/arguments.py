"""Checks of what users pass in: each names the argument, what was found and what is wanted.

Numbers come back plain, so that ``repr`` and checkpoints are free of numpy types.
"""

import math
from collections.abc import Sized
from numbers import Integral, Real
from typing import Any

from ice_engine.errors import ArgumentTypeError, ArgumentValueError


def count(argument: str, value: Any, minimum: int) -> int:
    """Return *value* as an int of at least *minimum*; *argument* is what errors call it.

    Raises:
        ArgumentTypeError: If it is not a whole number.
        ArgumentValueError: If it is below *minimum*.
    """
    if isinstance(value, Sized) and not isinstance(value, str):
        message = f"{argument} must be an int, got {type(value).__name__}; if its length is meant: {argument}=len(...)"
        raise ArgumentTypeError(message)
    if isinstance(value, bool) or not isinstance(value, Integral):
        message = f"{argument} must be an int, got {value!r} ({type(value).__name__})"
        raise ArgumentTypeError(message)
    if value < minimum:
        message = f"{argument} must be at least {minimum}, got {value!r}"
        raise ArgumentValueError(message)
    return int(value)


def number(argument: str, value: Any) -> float:
    """Return *value* as a finite float; *argument* is what errors call it.

    Raises:
        ArgumentTypeError: If it is not a real number.
        ArgumentValueError: If it is infinite or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        message = f"{argument} must be a number, got {value!r} ({type(value).__name__})"
        raise ArgumentTypeError(message)
    try:
        plain = float(value)
    except OverflowError:  # an int beyond every float
        plain = math.inf
    if not math.isfinite(plain):
        message = f"{argument} must be finite, got {plain if isinstance(value, int) else value!r}"
        raise ArgumentValueError(message)
    return plain


def positive(argument: str, value: Any) -> float:
    """Return *value* as a finite float above 0; *argument* is what errors call it.

    Raises:
        ArgumentTypeError: If it is not a real number.
        ArgumentValueError: If it is 0, negative, infinite or NaN.
    """
    if number(argument, value) <= 0:
        message = f"{argument} must be above 0, got {value!r}"
        raise ArgumentValueError(message)
    return float(value)


def within(argument: str, value: Any, least: float, most: float) -> float:
    """Return *value* as a float from *least* to *most*; *argument* is what errors call it.

    Raises:
        ArgumentTypeError: If it is not a real number.
        ArgumentValueError: If it is outside, infinite or NaN.
    """
    if not least <= number(argument, value) <= most:
        message = f"{argument} must be from {least:g} to {most:g}, got {value!r}"
        raise ArgumentValueError(message)
    return float(value)


def at_least(argument: str, value: Any, least: float) -> float:
    """Return *value* as a finite float of at least *least*; *argument* is what errors call it.

    Raises:
        ArgumentTypeError: If it is not a real number.
        ArgumentValueError: If it is below, infinite or NaN.
    """
    if number(argument, value) < least:
        message = f"{argument} must be at least {least:g}, got {value!r}"
        raise ArgumentValueError(message)
    return float(value)


def flag(argument: str, value: Any) -> bool:
    """Return *value*, which must be True or False; *argument* is what errors call it.

    Raises:
        ArgumentTypeError: If it is something else.
    """
    if not isinstance(value, bool):
        message = f"{argument} must be True or False, got {value!r} ({type(value).__name__})"
        raise ArgumentTypeError(message)
    return value


def choice(argument: str, value: Any, choices: tuple[str | None, ...]) -> None:
    """Check that *value* is one of *choices*; *argument* is what errors call it.

    Raises:
        ArgumentValueError: If it is not.
    """
    if value not in choices:
        message = f"{argument} must be one of {', '.join(map(repr, choices))}; got {value!r}"
        raise ArgumentValueError(message)
