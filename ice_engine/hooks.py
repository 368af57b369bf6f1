"""Named, ordered, removable hooks on Ignite's events."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ignite.engine import Engine, Events, State
from ignite.engine.events import EventsList

from ice_engine.engine_state import StateMapping, check_writable
from ice_engine.errors import (
    ArgumentTypeError,
    HookError,
    HookSignatureError,
    ProcessorReturnError,
)
from ice_engine.processors import Processor

_REGISTRATIONS = "_ice_hooks"
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


@dataclass(frozen=True, eq=False)
class Hook:
    """A handler or processor that the registry knows by name.

    Attributes:
        name: Unique on its engine.
        event: Where it fires: an event, with or without a filter, or several joined by ``|``.
        hook: What was given to :meth:`HookRegistry.add`.
        order: Below 0 before Ignite's plain handlers, 0 among them as added, above 0 after those
            that were there.
    """

    name: str
    event: Any
    hook: Callable[..., Any]
    order: int
    _registry: "HookRegistry" = field(repr=False)

    def remove(self) -> None:
        """Take the hook off its engine.

        Raises:
            HookError: If it has been taken off already, even if another hook has its name now.
        """
        if self.name not in self._registry or self._registry[self.name] is not self:
            message = f"hook {self.name!r} is not on its engine any more"
            raise HookError(message)
        self._registry.remove(self.name)


@dataclass(eq=False)
class _Registration:
    """A hook and its places in the engine's lists of handlers."""

    hook: Hook
    # An entry of Ignite's list is (function, args, kwargs). Its kwargs are a dict of its own that stays when a
    # profiler puts another function in, so its identity is the entry's.
    entries: list[dict[str, Any]] = field(default_factory=list)
    active: bool = True


class HookRegistry:
    """The hooks of one engine; every ``HookRegistry(engine)`` of an engine shows the same ones.

    Hooks may be added and removed while events fire: one that is added takes part from the event's next firing,
    one that is removed is not called any more.

    Args:
        engine: The engine whose events the hooks fire on.

    Raises:
        ArgumentTypeError: If *engine* is not an Ignite engine.

    Examples:
        >>> from ignite.engine import Engine, Events
        >>> engine = Engine(lambda engine, batch: batch)
        >>> hooks = HookRegistry(engine)
        >>> _ = hooks.add(Events.ITERATION_COMPLETED, lambda engine: print(engine.state.output), name="show")
        >>> _ = engine.run([1, 2])
        1
        2
        >>> hooks.remove("show")

    .. versionadded:: 0.1.0
    """

    def __init__(self, engine: Engine) -> None:
        if not isinstance(engine, Engine):
            message = f"engine must be an ignite.engine.Engine, got {type(engine).__name__}"
            raise ArgumentTypeError(message)
        self._engine = engine
        # Kept on the engine, so that it lives exactly as long and is shared by every registry of it.
        self._registrations: dict[str, _Registration] = vars(engine).setdefault(_REGISTRATIONS, {})

    def add(self, event: Any, hook: Callable[..., Any], *, name: str | None = None, order: int = 0) -> Hook:
        """Fire *hook* on *event*.

        Args:
            event: An Ignite event or one of ours, with or without a filter, or several joined by ``|``.
            hook: A handler, called with the engine or with nothing (on ``TERMINATE_SINGLE_EPOCH`` with
                ``iter_counter`` too if it takes that); or a processor, called with the engine's state as its mapping.
            name: Unique on the engine; the hook's own name if left out.
            order: Below 0 before Ignite's plain handlers, 0 among them as added, above 0 after those
                that are there; equal orders fire as added.

        Returns:
            The hook, with ``remove()``.

        Raises:
            ArgumentTypeError: If an argument has the wrong type.
            HookError: If the name is taken, or the event is unknown to the engine, has a filter but no counter, or is
                Ignite's exception event.
            HookSignatureError: If the hook cannot be called with the engine or with nothing.
            UnknownKeyError: If a processor would write what the run counts with.
        """
        _check_arguments(hook, name, order)
        name = name or self._free_name(hook)
        if name in self._registrations:
            message = f"a hook named {name!r} is on this engine already; remove({name!r}) first, or use another name"
            raise HookError(message)
        events = list(event) if isinstance(event, EventsList) else [event]
        for one in events:
            self._check_event(one, name)
        callers = [_caller(hook, one, name) for one in events]
        registration = _Registration(Hook(name, event, hook, order, self))
        self._registrations[name] = registration
        for one, call in zip(events, callers, strict=True):
            self._insert(one, call, registration)
        return registration.hook

    def remove(self, name: str) -> None:
        """Take the hook called *name* off the engine.

        Raises:
            HookError: If there is none of that name.
        """
        self[name]
        registration = self._registrations.pop(name)
        registration.active = False
        gone = set(map(id, registration.entries))
        handlers = self._handlers
        for event, entries in list(handlers.items()):
            if any(id(entry[2]) in gone for entry in entries):
                # A new list: Ignite may be iterating over the old one right now.
                handlers[event] = [entry for entry in entries if id(entry[2]) not in gone]

    def __getitem__(self, name: str) -> Hook:
        if name not in self._registrations:
            message = f"no hook is named {name!r}; there are: {', '.join(self._registrations) or 'none'}"
            raise HookError(message)
        return self._registrations[name].hook

    def __iter__(self) -> Iterator[Hook]:
        return iter([registration.hook for registration in self._registrations.values()])

    def __len__(self) -> int:
        return len(self._registrations)

    def __contains__(self, name: object) -> bool:
        return name in self._registrations

    def __str__(self) -> str:
        owners = self._owners()
        handlers = self._handlers
        others = [e for e in self._engine._allowed_events if e not in _BEFORE_OTHERS + _AFTER_OTHERS]  # noqa: SLF001
        rows = [("event", "order", "name", "defined at")]
        for event in (*_BEFORE_OTHERS, *others, *_AFTER_OTHERS):
            for function, _, marker in handlers.get(event, ()):
                hook = owners.get(id(marker))
                order, name = (str(hook.order), hook.name) if hook else ("0", "(added without the registry)")
                rows.append((_event_name(event), order, name, _defined_at(hook.hook if hook else function)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    @property
    def _handlers(self) -> dict[Any, list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]]:
        # Ignite can neither list nor order handlers publicly. Never read with [event] unless a handler is there or
        # comes there: the dict is a defaultdict, and with the mere key EXCEPTION_RAISED Ignite swallows exceptions.
        return self._engine._event_handlers  # noqa: SLF001

    def _owners(self) -> dict[int, Hook]:
        return {id(marker): r.hook for r in self._registrations.values() for marker in r.entries}

    def _free_name(self, hook: Callable[..., Any]) -> str:
        base = hook.name if isinstance(hook, Processor) else getattr(hook, "__name__", type(hook).__name__)
        names = (base, *(f"{base}#{i}" for i in range(2, len(self._registrations) + 3)))
        return next(name for name in names if name not in self._registrations)

    def _check_event(self, event: Any, name: str) -> None:
        if event == Events.EXCEPTION_RAISED:
            message = (
                f"hook {name!r} cannot go on EXCEPTION_RAISED: with any handler there Ignite swallows the exception "
                "and goes on with the next epoch; wrap engine.run() in try/except instead"
            )
            raise HookError(message)
        if not self._engine.has_registered_events(event):
            message = (
                f"hook {name!r}: {_event_name(event)} is not an event of this engine; "
                "attach the optimizer of that name first, or engine.register_events(...)"
            )
            raise HookError(message)
        if getattr(event, "filter", None) is not None and event not in State.event_to_attr:
            message = (
                f"hook {name!r}: {_event_name(event)} has a filter, but nothing counts this event; leave the filter "
                "out, or register the event with a counter: engine.register_events(..., event_to_attr={event: 'count'})"
            )
            raise HookError(message)

    def _insert(self, event: Any, call: Callable[..., Any], registration: _Registration) -> None:
        def handler(engine: Engine, *_: Any, **given: Any) -> None:
            if registration.active:
                call(engine, given)

        # What profilers and Ignite's log call it.
        handler.__name__ = handler.__qualname__ = registration.hook.name
        handlers = self._handlers
        # A new list before Ignite appends to it: it may be iterating over the old one right now.
        handlers[event] = list(handlers.get(event, ()))
        self._engine.add_event_handler(event, handler)
        registration.entries.append(handlers[event][-1][2])
        owners = self._owners()
        handlers[event].sort(key=lambda entry: owners[id(entry[2])].order if id(entry[2]) in owners else 0)


def _check_arguments(hook: Any, name: Any, order: Any) -> None:
    if not callable(hook):
        message = f"hook must be callable, got {type(hook).__name__}"
        raise ArgumentTypeError(message)
    if name is not None and not isinstance(name, str):
        message = f"name must be a string, got {name!r} ({type(name).__name__})"
        raise ArgumentTypeError(message)
    if isinstance(order, bool) or not isinstance(order, int):
        message = f"order must be an int, got {order!r} ({type(order).__name__})"
        raise ArgumentTypeError(message)
    if isinstance(hook, Processor):
        for key in hook.writes:
            check_writable(key)


def _caller(hook: Callable[..., Any], event: Any, name: str) -> Callable[[Engine, dict[str, Any]], Any]:
    """Return how to call *hook* with the engine and what the event gives by keyword."""
    if isinstance(hook, Processor):
        return lambda engine, _: _process(hook, engine)
    signature = _signature(hook)
    # On this one event, Ignite's own check of a handler does not match its call.
    counted = event == Events.TERMINATE_SINGLE_EPOCH
    if signature is not None:
        if counted and _binds(signature, None, iter_counter=0):
            return lambda engine, given: hook(engine, **given)
        if counted and _binds(signature, iter_counter=0) and "iter_counter" in signature.parameters:
            return lambda _, given: hook(**given)
        if _binds(signature, None):
            return lambda engine, _: hook(engine)
        if _binds(signature):
            return lambda *_: hook()
    called = "(engine, iter_counter=...), (iter_counter=...), (engine) or ()" if counted else "(engine) or ()"
    message = (
        f"hook {name!r} is {getattr(hook, '__name__', type(hook).__name__)}{signature or '(...)'}; "
        f"{_event_name(event)} calls it with {called}. "
        "Bind other parameters with functools.partial, or read engine.state"
    )
    raise HookSignatureError(message)


def _process(processor: Processor, engine: Engine) -> None:
    mapping = StateMapping(engine)
    returned = processor(mapping)
    if not isinstance(returned, Mapping):
        message = (
            f"processor {processor.name!r} returned {type(returned).__name__} as a hook; "
            "say where its result goes: dst='name' writes engine.state.name"
        )
        raise ProcessorReturnError(message)
    if returned is not mapping:
        for key in returned:
            check_writable(key)
        mapping.update(returned)


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def _binds(signature: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _event_name(event: Any) -> str:
    return str(getattr(event, "name", event))


def _defined_at(function: Any) -> str:
    code = getattr(inspect.unwrap(getattr(function, "func", function)), "__code__", None)
    return f"{code.co_filename.rsplit('/', 1)[-1]}:{code.co_firstlineno}" if code else type(function).__name__
