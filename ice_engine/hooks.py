"""Named, ordered, removable hooks on Ignite's events."""

import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from ignite.engine import Engine, Events, State
from ignite.engine.events import EventsList

from ice_engine.errors import (
    ArgumentTypeError,
    HookError,
    HookSignatureError,
    ProcessorReturnError,
    UnknownKeyError,
)
from ice_engine.processors import Processor

_REGISTRY = "_ice_hooks"
_IGNITE_OWN = frozenset(
    {"iteration", "epoch", "epoch_length", "max_epochs", "max_iters", "metrics", "dataloader", "times", "seed"}
)


@dataclass(frozen=True, eq=False)
class Hook:
    """A handler or processor that the registry knows by name.

    Attributes:
        name: Unique on its engine.
        event: Where it fires: an event, with or without a filter, or several joined by ``|``.
        hook: What was given to :meth:`HookRegistry.add`.
        order: Below 0 before Ignite's plain handlers, 0 among them as added, above 0 after those that are there.
    """

    name: str
    event: Any
    hook: Callable[..., Any]
    order: int
    _registry: "HookRegistry" = field(repr=False)
    _entries: list[tuple[Any, tuple[Any, ...]]] = field(default_factory=list, repr=False)

    def remove(self) -> None:
        """Take the hook off its engine."""
        self._registry.remove(self.name)


class StateMapping(MutableMapping[str, Any]):
    """An engine's state as the mapping that a processor on an event reads and writes.

    ``output``, ``epoch`` and every other attribute by name, ``"metrics.accuracy"`` for a metric;
    ``engine`` is the engine. Counters that Ignite or an optimizer owns are read-only.

    Args:
        engine: The engine whose ``state`` it shows.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getitem__(self, key: str) -> Any:
        if key == "engine":
            return self._engine
        if key.startswith("metrics."):
            return self._engine.state.metrics[key.removeprefix("metrics.")]
        return vars(self._engine.state)[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key.startswith("metrics."):
            self._engine.state.metrics[key.removeprefix("metrics.")] = value
            return
        if key == "engine" or key in _IGNITE_OWN or key in State.event_to_attr.values():
            raise UnknownKeyError(f"engine.state.{key} is read-only for processors: the run counts with it")
        setattr(self._engine.state, key, value)

    def __delitem__(self, key: str) -> None:
        raise UnknownKeyError(f"engine.state.{key} cannot be deleted by a processor")

    def __iter__(self) -> Iterator[str]:
        yield from vars(self._engine.state)
        yield from (f"metrics.{name}" for name in self._engine.state.metrics)
        yield "engine"

    def __len__(self) -> int:
        return sum(1 for _ in self)


class HookRegistry:
    """The hooks of one engine; every ``HookRegistry(engine)`` of an engine shows the same ones.

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
            raise ArgumentTypeError(f"engine must be an ignite.engine.Engine, got {type(engine).__name__}")
        self._engine = engine
        # Kept on the engine, so that it lives exactly as long and is shared by every registry of it.
        self._hooks: dict[str, Hook] = vars(engine).setdefault(_REGISTRY, {})

    def add(self, event: Any, hook: Callable[..., Any], *, name: str | None = None, order: int = 0) -> Hook:
        """Fire *hook* on *event*.

        Args:
            event: An Ignite event or one of ours, with or without a filter, or several joined by ``|``.
            hook: A handler, called with the engine or with nothing; or a processor, called with the
                engine's state as its mapping.
            name: Unique on the engine; the hook's own name if left out.
            order: Below 0 before Ignite's plain handlers, 0 among them as added, above 0 after those
                that are there; equal orders fire as added.

        Returns:
            The hook, with ``remove()``.

        Raises:
            HookError: If the name is taken, or the event is unknown to the engine or Ignite's exception event.
            HookSignatureError: If the hook cannot be called with the engine or with nothing.
        """
        if not callable(hook):
            raise ArgumentTypeError(f"hook must be callable, got {type(hook).__name__}")
        name = name or self._free_name(hook)
        if name in self._hooks:
            raise HookError(
                f"a hook named {name!r} is on this engine already; remove({name!r}) first, or use another name"
            )
        handler = self._on_state(hook) if isinstance(hook, Processor) else hook
        registered = Hook(name, event, hook, order, self)
        try:
            for one in event if isinstance(event, EventsList) else [event]:
                registered._entries.append(self._insert(one, handler, name, order))  # noqa: SLF001 - same module
        except BaseException:
            self._take_out(registered)
            raise
        self._hooks[name] = registered
        return registered

    def remove(self, name: str) -> None:
        """Take the hook called *name* off the engine.

        Raises:
            HookError: If there is none of that name.
        """
        self._take_out(self[name])
        del self._hooks[name]

    def __getitem__(self, name: str) -> Hook:
        if name not in self._hooks:
            raise HookError(f"no hook is named {name!r}; there are: {', '.join(self._hooks) or 'none'}")
        return self._hooks[name]

    def __iter__(self) -> Iterator[Hook]:
        return iter(tuple(self._hooks.values()))

    def __len__(self) -> int:
        return len(self._hooks)

    def __contains__(self, name: object) -> bool:
        return name in self._hooks

    def __str__(self) -> str:
        owners = {id(entry): hook for hook in self for _, entry in hook._entries}  # noqa: SLF001 - same module
        rows = [("event", "order", "name", "defined at")]
        for event, entries in self._engine._event_handlers.items():  # noqa: SLF001 - Ignite has no public list
            for entry in entries:
                hook = owners.get(id(entry))
                order, name = (str(hook.order), hook.name) if hook else ("0", "(added without the registry)")
                rows.append((_event_name(event), order, name, _defined_at(hook.hook if hook else entry[0])))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    def _free_name(self, hook: Callable[..., Any]) -> str:
        base = hook.name if isinstance(hook, Processor) else getattr(hook, "__name__", type(hook).__name__)
        names = (base, *(f"{base}#{i}" for i in range(2, len(self._hooks) + 3)))
        return next(name for name in names if name not in self._hooks)

    def _insert(self, event: Any, handler: Callable[..., Any], name: str, order: int) -> tuple[Any, tuple[Any, ...]]:
        engine = self._engine
        if event == Events.EXCEPTION_RAISED:
            raise HookError(
                f"hook {name!r} cannot go on EXCEPTION_RAISED: with any handler there Ignite swallows the exception "
                "and goes on with the next epoch; wrap engine.run() in try/except instead"
            )
        if not engine.has_registered_events(event):
            raise HookError(
                f"hook {name!r}: {_event_name(event)} is not an event of this engine; "
                "attach the optimizer of that name first, or engine.register_events(...)"
            )
        try:
            engine.add_event_handler(event, handler)
        except ValueError as err:
            raise HookSignatureError(
                f"hook {name!r} is {getattr(handler, '__name__', handler)}{_signature(handler)}; {_event_name(event)} calls "
                "it with (engine) or with (). Bind other parameters with functools.partial, or read engine.state"
            ) from err
        handlers = engine._event_handlers  # noqa: SLF001 - Ignite has no public way to order handlers
        *others, entry = handlers[event]
        orders = {id(e): hook.order for hook in self for _, e in hook._entries}  # noqa: SLF001 - same module
        after = next((i for i, e in enumerate(others) if orders.get(id(e), 0) > order), len(others))
        # A new list: Ignite may be iterating over the old one right now.
        handlers[event] = [*others[:after], entry, *others[after:]]
        return event, entry

    def _take_out(self, hook: Hook) -> None:
        handlers = self._engine._event_handlers  # noqa: SLF001 - as above; removal by identity, not by equality
        for event, entry in hook._entries:  # noqa: SLF001 - same module
            handlers[event] = [e for e in handlers[event] if e is not entry]

    def _on_state(self, processor: Processor) -> Callable[..., None]:
        def handler(*_: Any, **__: Any) -> None:
            mapping = StateMapping(self._engine)
            returned = processor(mapping)
            if not isinstance(returned, Mapping):
                raise ProcessorReturnError(
                    f"processor {processor.name!r} returned {type(returned).__name__} as a hook; "
                    "say where its result goes: dst='name' writes engine.state.name"
                )
            if returned is not mapping:
                mapping.update(returned)

        handler.__name__ = processor.name
        return handler


def _event_name(event: Any) -> str:
    return str(getattr(event, "name", event))


def _signature(function: Callable[..., Any]) -> str:
    try:
        return str(inspect.signature(function))
    except (TypeError, ValueError):
        return "(...)"


def _defined_at(function: Any) -> str:
    code = getattr(inspect.unwrap(getattr(function, "func", function)), "__code__", None)
    return f"{code.co_filename.rsplit('/', 1)[-1]}:{code.co_firstlineno}" if code else type(function).__name__
