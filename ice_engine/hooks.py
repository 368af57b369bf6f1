"""Named, ordered, removable hooks on Ignite's events."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ignite.engine import Engine, Events, State
from ignite.engine.events import CallableEventWithFilter, EventsList

from ice_engine.calling import Caller, caller, check_hook, own_name
from ice_engine.errors import ArgumentTypeError, HookError
from ice_engine.hook_table import Entry, defined_at, entries, event_name, handler_of, in_firing_order, labelled, table
from ice_engine.timeline import Trace

_REGISTRATIONS = "_ice_hooks"


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
        if isinstance(hook, CallableEventWithFilter | EventsList):
            message = "event and hook are swapped; the order is hooks.add(event, hook)"
            raise ArgumentTypeError(message)
        check_hook(hook)
        _check_name_and_order(name, order)
        name = name or self.free_name(own_name(hook))
        if name in self._registrations:
            message = f"a hook named {name!r} is on this engine already; remove({name!r}) first, or use another name"
            raise HookError(message)
        events = list(event) if isinstance(event, EventsList) else [event]
        for one in events:
            self._check_event(one, name)
        callers = [caller(hook, one, name) for one in events]
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
        for event, present in list(handlers.items()):
            if any(id(entry[2]) in gone for entry in present):
                # A new list: Ignite may be iterating over the old one right now.
                handlers[event] = [entry for entry in present if id(entry[2]) not in gone]

    def remove_of(self, owner: object) -> None:
        """Take all hooks off the engine that are methods of *owner*."""
        for hook in self:
            if getattr(hook.hook, "__self__", None) is owner:
                hook.remove()

    def put_last(self, least: int) -> None:
        """Let hooks of an order of at least *least* fire after the plain handlers that were added since, too."""
        owners = self._owners()
        for event, present in list(self._handlers.items()):
            # A new list: Ignite may be iterating over the old one right now.
            self._handlers[event] = sorted(
                present, key=lambda entry: id(entry[2]) in owners and owners[id(entry[2])].order >= least
            )

    def free_name(self, base: str, ending: str = "") -> str:
        """Return *base*, or *base* with the first number, under which no hook is named with *ending* behind it."""
        names = (base, *(f"{base}#{i}" for i in range(2, len(self) + 3)))
        return next(name for name in names if name + ending not in self)

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
        """Return a table of all handlers of the engine in firing order, with those added without a registry."""
        owners = self._owners()
        rows = []
        for event, entry in in_firing_order(self._engine):
            hook = owners.get(id(entry[2]))
            place = defined_at(hook.hook if hook else handler_of(entry[0]))
            rows.append((labelled(event, entry[0]), str(hook.order) if hook else "0", self._name(entry), place))
        others = any(name.startswith("(") for _, _, name, _ in rows)
        return table(rows) + ("\n\n(...): added with engine.add_event_handler" if others else "")

    def trace(self) -> Trace:
        """Record one iteration: the next in which an optimizer steps or skips, or else the run's last.

        Ask for it before the run, or in a handler, such as one of ``ITERATION_COMPLETED(once=100)`` to look at a run
        that has warmed up. Nothing is printed.

        Returns:
            The timeline, to be printed when it is ``done``: every event that fires, the handlers that it calls, and
            what the engine and the optimizer do between them, with times.

        Examples:
            >>> from ignite.engine import Engine, Events
            >>> engine = Engine(lambda engine, batch: batch)
            >>> _ = HookRegistry(engine).add(Events.ITERATION_COMPLETED, lambda: None, name="rest")
            >>> trace = HookRegistry(engine).trace()
            >>> _ = engine.run([1, 2])
            >>> print(trace)  # doctest: +SKIP
                 at ms   took ms
                 0.000     0.041  iteration 1, epoch 1
                 0.002     0.003    GET_BATCH_STARTED
                 0.005     0.004    next(data)
                 0.009     0.002    GET_BATCH_COMPLETED
                 0.012     0.002    ITERATION_STARTED
                 0.014     0.004    <lambda>
                 0.018     0.014    ITERATION_COMPLETED
                 0.028     0.002      rest
            >>> [span.name for _, span in trace.iteration.flat()][-2:]
            ['ITERATION_COMPLETED', 'rest']
        """
        return Trace.of(self._engine, self._name)

    @property
    def _handlers(self) -> dict[Any, list[Entry]]:
        return entries(self._engine)

    def _owners(self) -> dict[int, Hook]:
        return {id(marker): r.hook for r in self._registrations.values() for marker in r.entries}

    def _name(self, entry: Entry) -> str:
        hook = self._owners().get(id(entry[2]))
        return hook.name if hook else f"({own_name(handler_of(entry[0]))})"

    def _check_event(self, event: Any, name: str) -> None:
        if event == Events.EXCEPTION_RAISED:
            message = (
                f"hook {name!r} cannot go on EXCEPTION_RAISED: with any handler there Ignite swallows the exception "
                "and goes on with the next epoch; wrap engine.run() in try/except instead"
            )
            raise HookError(message)
        if not self._engine.has_registered_events(event):
            message = (
                f"hook {name!r}: {event_name(event)} is not an event of this engine; "
                "attach the optimizer of that name first, or engine.register_events(...)"
            )
            raise HookError(message)
        if getattr(event, "filter", None) is not None and event not in State.event_to_attr:
            message = (
                f"hook {name!r}: {event_name(event)} has a filter, but nothing counts this event; leave the filter "
                "out, or register the event with a counter: engine.register_events(..., event_to_attr={event: 'count'})"
            )
            raise HookError(message)

    def _insert(self, event: Any, call: Caller, registration: _Registration) -> None:
        def handler(engine: Engine, *_: Any, **given: Any) -> None:
            if registration.active:
                call(engine, **given)

        # What profilers and Ignite's log call it.
        handler.__name__ = handler.__qualname__ = registration.hook.name
        handlers = self._handlers
        # A new list before Ignite appends to it: it may be iterating over the old one right now.
        handlers[event] = list(handlers.get(event, ()))
        self._engine.add_event_handler(event, handler)
        registration.entries.append(handlers[event][-1][2])
        owners = self._owners()
        # A new list again: sort() empties the one it sorts meanwhile, and another thread may be firing the event.
        handlers[event] = sorted(
            handlers[event], key=lambda entry: owners[id(entry[2])].order if id(entry[2]) in owners else 0
        )


def _check_name_and_order(name: Any, order: Any) -> None:
    if name is not None and not isinstance(name, str):
        message = f"name must be a string, got {name!r} ({type(name).__name__})"
        raise ArgumentTypeError(message)
    if isinstance(order, bool) or not isinstance(order, int):
        message = f"order must be an int, got {order!r} ({type(order).__name__})"
        raise ArgumentTypeError(message)
