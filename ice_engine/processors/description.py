"""What a processor is, as plain data: whether the one of another process is the same, and how to make it again."""

import contextlib
import functools
import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ice_engine.errors import ArgumentTypeError, ArgumentValueError
from ice_engine.processors.compose import Compose
from ice_engine.processors.dictprocess import Configured, Decorated
from ice_engine.processors.functions import Products
from ice_engine.processors.processor import name_of
from ice_engine.processors.schedule import Schedule
from ice_engine.processors.spec import from_spec

LENGTHS = frozenset({"epoch_length", "max_epochs", "max_iters", "total_steps", "epoch_size"})
"""Keys of the mapping that say how long a run is."""

_PLAIN = (str, int, float, bool, type(None))
_ADDRESS = re.compile(r" at 0x[0-9A-Fa-f]+")
_KIND = "b"  # of print; another letter when what is printed changes, so that old files can still be resumed


def describe(processor: Callable[..., Any]) -> Any:
    """Return *processor* as plain data: a schedule's ``spec``; of anything else its expression and a print of its code.

    The code's print is of the Python version that made it, and is compared only with one of the same. What the
    processor keeps on itself is in the expression; so it is to be described before it runs.
    """
    if isinstance(processor, Schedule):
        try:
            return processor.spec
        except ArgumentTypeError:  # it holds a function
            pass
    codes = sorted(_prints(processor))
    text = _ADDRESS.sub("", _expression(processor))  # another one in every process
    if not codes:
        return text
    digest = hashlib.sha256("".join(codes).encode()).hexdigest()[:8]
    return f"{text} @{sys.version_info[0]}.{sys.version_info[1]}{_KIND}:{digest}"


def same(first: Any, second: Any) -> bool:
    """Whether two descriptions are of the same processor, as far as can be told."""
    if isinstance(first, str) and isinstance(second, str):
        (text, _, code), (other, _, another) = first.rpartition(" @"), second.rpartition(" @")
        versions = code.partition(":")[0], another.partition(":")[0]
        return (text or first) == (other or second) and (code == another or versions[0] != versions[1])
    return bool(first == second)


def made(description: Any) -> Schedule | None:
    """Return the schedule that *description* is the spec of; None if it is none of the catalogue."""
    try:
        return from_spec(description)
    except (ArgumentTypeError, ArgumentValueError):
        return None


def as_text(description: Any) -> str:
    """Return *description* as an error shows it."""
    return description.partition(" @")[0] if isinstance(description, str) else str(made(description) or description)


def reads_lengths(processor: Callable[..., Any]) -> bool:
    """Whether something that is no schedule is seen to read how long the run is: by its parameters or its code."""
    if isinstance(processor, Schedule):
        return False
    if isinstance(processor, Compose):
        return any(map(reads_lengths, processor.processors))
    keys: set[Any] = set()
    if isinstance(processor, Configured):
        keys = {value for value in processor.arguments.values() if isinstance(value, str)}
        keys |= {name for name in processor.decorated.parameters if name not in processor.arguments}
    elif isinstance(processor, Decorated):
        keys = {*processor.parameters}
    return not LENGTHS.isdisjoint(keys | {text for code in _codes(processor) for text in _texts(code)})


def schedules_in(processors: Iterable[Callable[..., Any] | None]) -> Iterator[Schedule]:
    """Yield the schedules among *processors*, those in a Compose included."""
    for processor in processors:
        if isinstance(processor, Schedule):
            yield processor
        elif isinstance(processor, Compose):
            yield from schedules_in(processor.processors)


def _expression(processor: Callable[..., Any]) -> str:
    kind: Any = type(processor)
    if isinstance(processor, Compose):
        return f"Compose({', '.join(map(_expression, processor.processors))})"
    if isinstance(processor, Configured):
        settings = [f"{key}={_setting(value)}" for key, value in processor.arguments.items()]
        return f"{processor.name}({', '.join([*settings, f'dst={processor.dst!r}'])})"
    if isinstance(processor, functools.partial):
        given = [_setting(value) for value in processor.args if _is_plain(value)]
        given += [f"{key}={_setting(value)}" for key, value in processor.keywords.items() if _is_plain(value)]
        return f"partial({', '.join([_expression(processor.func), *given])})"
    if kind.__repr__ is not object.__repr__ and not hasattr(processor, "__code__"):
        return repr(processor)
    if hasattr(processor, "__code__"):
        return name_of(processor)
    # The inherited repr is an address, another one in every process.
    own = (f"{key}={_setting(value)}" for key, value in getattr(processor, "__dict__", {}).items())
    return f"{kind.__qualname__}({', '.join(own)})"


def _setting(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {_setting(entry)}' for key, entry in value.items())}}}"
    if isinstance(value, set | frozenset):
        return f"[{', '.join(sorted(map(_setting, value)))}]"  # its own order is another one in every process
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_setting, value))}]"
    return repr(value) if isinstance(value, _PLAIN) else type(value).__qualname__


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, (*value, *value.values())))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _functions(processor: Any) -> Iterator[Any]:
    """Yield every function in *processor* that was not written by us."""
    if isinstance(processor, Schedule):
        for factor in processor.parts:
            yield from _functions(factor)
        held = [*dict(getattr(processor, "settings", ())).values(), getattr(processor, "predicate", None)]
        yield from (
            function.f if isinstance(function, Products) else function for function in held if callable(function)
        )
    elif isinstance(processor, Compose):
        for part in processor.processors:
            yield from _functions(part)
    elif isinstance(processor, Configured | Decorated):
        yield processor.decorated.function if isinstance(processor, Configured) else processor.function
    else:
        yield processor


def _codes(processor: Any) -> Iterator[Any]:
    for function in _functions(processor):
        found = getattr(_innermost(function), "__code__", None)
        if found is not None:
            yield found


def _innermost(function: Any) -> Any:
    """Return what has the code: inside of a partial, and the ``__call__`` of an instance."""
    while isinstance(function, functools.partial):
        function = function.func
    return function if hasattr(function, "__code__") else type(function).__call__


def _prints(processor: Any) -> Iterator[str]:
    for function in _functions(processor):
        inner = _innermost(function)
        code = getattr(inner, "__code__", None)
        if code is not None:
            no_code = None, inner.__doc__  # None is there in place of a docstring
            constants = [c for c in code.co_consts if isinstance(c, _PLAIN) and c not in no_code]
            yield repr((code.co_code, code.co_names, [t for t in _texts(code) if t not in no_code], constants))
        # What is not plain has no value to compare: its repr may be an address.
        yield repr([_setting(value) for value in _bound(function) if _is_plain(value)])


def _bound(function: Any) -> Iterator[Any]:
    """Yield what *function* computes with besides its arguments: given to a partial, by default, or by a closure."""
    if isinstance(function, functools.partial):
        yield from (*function.args, *function.keywords.items())
    inner = _innermost(function)
    yield from getattr(inner, "__defaults__", None) or ()
    yield from (getattr(inner, "__kwdefaults__", None) or {}).items()
    for cell in getattr(inner, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # it is filled later
            yield cell.cell_contents


def _texts(code: Any) -> list[str]:
    inner = [text for constant in code.co_consts if hasattr(constant, "co_consts") for text in _texts(constant)]
    return [constant for constant in code.co_consts if isinstance(constant, str)] + inner
