"""What hangs on an engine's events, in the order in which it fires, read from Ignite's own lists."""

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from ignite.engine import Engine, Events

from ice_engine.calling import own_name
from ice_engine.processors import Processor
from ice_engine.processors.dictprocess import Configured

Entry = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
"""One of Ignite's handlers: function, arguments, keywords."""

_BEFORE_OTHERS = (
    Events.STARTED,
    Events.EPOCH_STARTED,
    Events.GET_BATCH_STARTED,
    Events.GET_BATCH_COMPLETED,
    Events.ITERATION_STARTED,
    Events.ITERATION_COMPLETED,
)
_AFTER_OTHERS = (
    Events.DATALOADER_STOP_ITERATION,
    Events.TERMINATE_SINGLE_EPOCH,
    Events.EPOCH_COMPLETED,
    Events.INTERRUPT,
    Events.TERMINATE,
    Events.COMPLETED,
    Events.EXCEPTION_RAISED,
)


def entries(engine: Engine) -> dict[Any, list[Entry]]:
    """Return Ignite's lists of handlers themselves, by event.

    Ignite can neither list nor order handlers publicly. Never read them with ``[event]`` unless a handler is there or
    comes there: the dict is a defaultdict, and with the mere key EXCEPTION_RAISED Ignite swallows exceptions.
    """
    return engine._event_handlers  # noqa: SLF001


def in_firing_order(engine: Engine) -> Iterator[tuple[Any, Entry]]:
    """Yield every handler with its event, as they fire in an epoch that nothing cuts short."""
    others = [e for e in engine._allowed_events if e not in _BEFORE_OTHERS + _AFTER_OTHERS]  # noqa: SLF001
    for event in (*_BEFORE_OTHERS, *others, *_AFTER_OTHERS):
        for entry in entries(engine).get(event, ()):
            yield event, entry


def table(rows: Sequence[tuple[str, str, str, str]]) -> str:
    """Return *rows* under a head; the second column is of numbers."""
    rows = [("event", "order", "name", "defined at"), *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for event, order, name, place in rows:
        cells = (event.ljust(widths[0]), order.rjust(widths[1]), name.ljust(widths[2]), place)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


class Filtered(NamedTuple):
    """What Ignite puts around a handler whose event has a filter."""

    event: Any
    passes: Callable[[Engine, int], bool]
    handler: Callable[..., Any]


def filtered(function: Callable[..., Any]) -> Filtered | None:
    """Return what *function* has around a handler; None if there is no filter. Ignite keeps it in a closure only."""
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    cells = dict(zip(names, getattr(function, "__closure__", None) or (), strict=False))
    wanted = ("event_name", "event_filter", "handler")
    return Filtered(*(cells[name].cell_contents for name in wanted)) if set(wanted) <= cells.keys() else None


def labelled(event: Any, function: Callable[..., Any]) -> str:
    """Return the name of *event* with the filter, if any, under which Ignite calls *function*."""
    name = event_name(event)
    inner: Any = function
    while inner is not None:  # profilers wrap it once more
        around = filtered(inner)
        if around is not None:
            return f"{name}({_settings(around.passes)})"
        inner = getattr(inner, "__wrapped__", None)
    return name


def event_name(event: Any) -> str:
    """Return the name of an event, which may be a string."""
    return str(getattr(event, "name", event))


def handler_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what the user added, of which Ignite calls *function*."""
    return cast("Callable[..., Any]", inspect.unwrap(function, stop=inspect.ismethod))


def defined_at(hook: Any) -> str:
    """Return the file and line of *hook*'s code, or what it is if that is not in Python."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    if isinstance(hook, Configured):
        hook = hook.decorated
    if isinstance(hook, Processor):
        hook = getattr(hook, "function", type(hook).__call__)
    if not inspect.isroutine(hook):
        hook = type(hook).__call__
    code = getattr(inspect.unwrap(hook), "__code__", None)
    return "built in" if code is None else f"{_short(code.co_filename)}:{code.co_firstlineno}"


def _settings(event_filter: Callable[..., Any]) -> str:
    """Return how an event was called to get *event_filter*: ``every=3``, ``once=[1, 5]``, ``event_filter=name``."""
    if not getattr(event_filter, "__qualname__", "").startswith("CallableEventWithFilter."):
        return f"event_filter={own_name(event_filter)}"
    given = {name.strip("_"): value for name, value in inspect.getclosurevars(event_filter).nonlocals.items()}
    if given.get("before") == math.inf:
        del given["before"]
    if given.get("after") == 0:
        del given["after"]
    if len(given.get("once", ())) == 1:
        given["once"] = given["once"][0]
    return ", ".join(f"{name}={given[name]}" for name in ("every", "once", "before", "after") if name in given)


def _short(file: str) -> str:
    """Return *file* as it is imported or, below the working directory, as an editor opens it."""
    path = Path(file)
    for folder in ("site-packages", "dist-packages"):
        if folder in path.parts:
            return "/".join(path.parts[path.parts.index(folder) + 1 :])
    if path.is_relative_to(Path.cwd()):
        return path.relative_to(Path.cwd()).as_posix()
    return "/".join(path.parts[-2:])
