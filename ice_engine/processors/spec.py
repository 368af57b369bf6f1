"""Schedules from plain data."""

import functools
import operator
from collections.abc import Mapping
from typing import Any

from ice_engine.errors import ArgumentTypeError, ArgumentValueError
from ice_engine.processors.schedule import Schedule

# What combines schedules, and what each takes besides them.
_COMBINED: dict[str, set[str]] = {
    "product": set(),
    "then": {"at", "rebase"},
    "clamp": {"min", "max"},
    "scale": {"by"},
    "only": {"names"},
}


def from_spec(spec: Mapping[str, Any]) -> Schedule:
    """Make a schedule from plain data: the inverse of ``schedule.spec``, for configuration files and checkpoints.

    Args:
        spec: ``{"schedule": "cosine", "total": 10}`` for ``cosine(total=10)``; ``{"product": [...]}``;
            ``{"then": [first, second], "at": 5}``; ``{"clamp": ..., "min": 0.1}``, ``{"scale": ..., "by": 2}`` and
            ``{"only": ..., "names": [...]}`` around another.

    Returns:
        The schedule.

    Raises:
        ArgumentTypeError: If *spec* is no such dict, or an argument has the wrong type or an unknown name.
        ArgumentValueError: If it names no schedule of the catalogue, or an argument has an impossible value.

    Examples:
        >>> import ice_engine as ice
        >>> ice.schedules.from_spec({"schedule": "cosine", "total": 10, "floor": 0.001})
        cosine(total=10, floor=0.001)
        >>> plan = ice.schedules.warmup(steps=4) * ice.schedules.cosine()
        >>> ice.schedules.from_spec(plan.spec) == plan
        True

    .. versionadded:: 0.1.0
    """
    if not isinstance(spec, Mapping):
        message = f"a schedule's spec is a dict such as {{'schedule': 'cosine'}}, got {spec!r} ({type(spec).__name__})"
        raise ArgumentTypeError(message)
    settings = dict(spec)
    kind = next((key for key in (*_COMBINED, "schedule") if key in settings), None)
    if kind is None:
        message = f"a schedule's spec has 'schedule' or one of {', '.join(map(repr, _COMBINED))}, got {dict(spec)!r}"
        raise ArgumentValueError(message)
    value = settings.pop(kind)
    if kind != "schedule":
        unknown = sorted(settings.keys() - _COMBINED[kind])
        if unknown:
            message = f"{kind!r} of a schedule's spec does not take {', '.join(map(repr, unknown))}, got {dict(spec)!r}"
            raise ArgumentTypeError(message)
        return _combine(kind, value, settings)
    from ice_engine.processors import schedules  # which offers this function

    names = [name for name in schedules.__all__ if name not in {"Schedule", "from_spec"}]
    if value not in names:
        message = f"there is no schedule {value!r}; there are: {', '.join(names)}"
        raise ArgumentValueError(message)
    try:
        made: Schedule = getattr(schedules, value)(**settings)
    except TypeError as error:
        message = f"schedule {value!r} cannot be made of {settings!r}: {error}"
        raise ArgumentTypeError(message) from error
    return made


def _combine(kind: str, parts: Any, settings: dict[str, Any]) -> Schedule:
    try:
        if kind == "product":
            return functools.reduce(operator.mul, map(from_spec, parts))
        if kind == "then":
            first, second = map(from_spec, parts)
            return first.then(second, **settings)
        schedule = from_spec(parts)
        if kind == "scale":
            return schedule.scale(settings["by"])
        if isinstance(settings.get("names"), str):
            message = f"'only' of a schedule's spec needs a list of names, got {settings['names']!r}"
            raise ArgumentTypeError(message)
        return schedule.only(*settings["names"]) if kind == "only" else schedule.clamp(**settings)
    except (TypeError, ValueError, KeyError) as error:
        message = f"{kind!r} of a schedule's spec cannot be made of {parts!r} and {settings!r}: {error}"
        raise ArgumentTypeError(message) from error
