"""The table of ``dst``: where the result of a decorated function goes."""

import reprlib
from collections.abc import Mapping
from typing import Any, TypeAlias

from ice_engine.errors import ArgumentTypeError, ArgumentValueError, MissingKeyError, ProcessorReturnError
from ice_engine.processors.processor import list_keys

Destination: TypeAlias = str | list[str] | tuple[str, ...] | dict[str, str] | None
"""Where a function's result goes: one key, several, ``{key to write: key of the result}``, or by itself."""


def check_destination(dst: Any, processor: str) -> Destination:
    """Return a copy of *dst*, so that nobody changes it under the processor.

    Raises:
        ArgumentTypeError: If it, or one of its keys, has the wrong type.
        ArgumentValueError: If it is empty.
    """
    wanted = "it must be a key, a list of keys, or a dict {key to write: key of the result}"
    if dst is None:
        return None
    if not isinstance(dst, str | list | tuple | dict):
        message = f"dst of processor {processor!r} is {dst!r} ({type(dst).__name__}); {wanted}"
        raise ArgumentTypeError(message)
    if not dst:
        message = f"dst of processor {processor!r} is empty ({dst!r}); {wanted}. Leave dst out to write nothing"
        raise ArgumentValueError(message)
    if isinstance(dst, str):
        return dst
    for key in [*dst, *(dst.values() if isinstance(dst, dict) else ())]:
        if not isinstance(key, str):
            message = f"dst of processor {processor!r} has {key!r} ({type(key).__name__}) for a key; {wanted}"
            raise ArgumentTypeError(message)
    if isinstance(dst, dict):
        return dict(dst)
    return list(dst) if isinstance(dst, list) else tuple(dst)


def updates(dst: Destination, returned: Any, processor: str) -> Mapping[str, Any]:
    """Return what the mapping is to be updated with: the table of :func:`dictprocess`, row by row.

    Without *dst*, *returned* is a mapping or None; anything else is not an update.

    Raises:
        MissingKeyError: If *returned* is a mapping without an entry that *dst* names.
        ProcessorReturnError: If *returned* does not fit *dst*.
    """
    if dst is None:
        return {} if returned is None else returned
    if isinstance(dst, str):
        return {dst: _one(dst, returned)}
    if isinstance(dst, dict):
        if not isinstance(returned, Mapping):
            message = (
                f"processor {processor!r} has dst={dst!r} and returned {reprlib.repr(returned)} "
                f"({type(returned).__name__}); with such a dst its function must return a dict"
            )
            raise ProcessorReturnError(message)
        return {to: _entry(returned, source, processor) for to, source in dst.items()}
    if isinstance(returned, Mapping):
        return {key: _entry(returned, key, processor) for key in dst}
    if isinstance(returned, list | tuple):
        if len(returned) != len(dst):
            message = (
                f"processor {processor!r} returned {len(returned)} values, and dst={dst!r} names {len(dst)}; "
                "return one value for each, in this order"
            )
            raise ProcessorReturnError(message)
        return dict(zip(dst, returned, strict=True))
    return {dst[0]: returned}


def _one(key: str, returned: Any) -> Any:
    if isinstance(returned, Mapping) and key in returned:
        return returned[key]
    if isinstance(returned, Mapping) and len(returned) == 1:
        return next(iter(returned.values()))
    return returned


def _entry(returned: Mapping[str, Any], key: str, processor: str) -> Any:
    if key in returned:
        return returned[key]
    message = (
        f"processor {processor!r} is to write {key!r} of what its function returns, which lacks it; the returned "
        f"dict has: {list_keys(returned)}. Return it, or change dst"
    )
    raise MissingKeyError(message)
