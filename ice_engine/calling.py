"""How a hook is called: with the engine, with nothing, or, a processor, with the engine's state as its mapping."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ignite.engine import Engine, Events

from ice_engine.engine_state import StateMapping, check_writable
from ice_engine.errors import (
    ArgumentTypeError,
    HookSignatureError,
    ProcessorReturnError,
    UnknownKeyError,
)
from ice_engine.processors import Processor

Caller = Callable[..., Any]
"""Calls a hook with what its event gives: the engine, and on one event ``iter_counter`` by keyword."""


def check_hook(hook: Any) -> None:
    """Check that *hook* is something to call, and not something that only looks like it.

    Raises:
        ArgumentTypeError: If it is not.
        UnknownKeyError: If it is a processor that would write what the run counts with.
    """
    if isinstance(hook, type):
        message = f"hook is the class {hook.__name__}; its instances may be hooks: {hook.__name__}(...)"
        raise ArgumentTypeError(message)
    if not callable(hook):
        message = f"hook must be callable, got {type(hook).__name__}; pass the function itself: report, not report()"
        raise ArgumentTypeError(message)
    if isinstance(hook, Processor):
        for key in hook.writes:
            check_writable(key)


def caller(hook: Callable[..., Any], event: Any, name: str) -> Caller:
    """Return how to call *hook*, which is called *name*, when *event* fires.

    Raises:
        HookSignatureError: If it cannot be called so, or would do nothing or the wrong thing.
    """
    if isinstance(hook, Processor):
        return lambda engine, **_: _process(hook, engine)
    signature = _signature(hook)
    # On this one event, Ignite's own check of a handler does not match its call.
    counted = event == Events.TERMINATE_SINGLE_EPOCH
    called = "(engine, iter_counter=...), (iter_counter=...), (engine) or ()" if counted else "(engine) or ()"
    where = f"hook {name!r} is {own_name(hook)}{signature or '(...)'}; {getattr(event, 'name', event)} calls it with"
    if signature is not None:
        _refuse_deferred(hook, f"{where} {called}, ")
        if counted and _binds(signature, None, iter_counter=0):
            return hook
        if counted and _binds(signature, iter_counter=0) and "iter_counter" in signature.parameters:
            return lambda _, **given: hook(**given)
        if _binds(signature, None):
            _refuse_overwritten(signature, where)
            return (lambda engine, **_: hook(engine)) if counted else hook
        if _binds(signature):
            return lambda *_, **__: hook()
    message = f"{where} {called}. Bind other parameters with functools.partial, or read engine.state"
    raise HookSignatureError(message)


def own_name(hook: Any) -> str:
    """Return what *hook* calls itself: a function's name, a method's with its object's class, or a class's."""
    if isinstance(hook, Processor):
        return hook.name
    if isinstance(hook, functools.partial):
        return own_name(hook.func)
    name = getattr(hook, "__name__", type(hook).__name__)
    owner = hook.__self__ if inspect.ismethod(hook) else None
    return name if owner is None or isinstance(owner, type) else f"{type(owner).__name__}.{name}"


def _refuse_deferred(hook: Callable[..., Any], where: str) -> None:
    function = hook if inspect.isroutine(hook) or isinstance(hook, functools.partial) else type(hook).__call__
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        message = f"{where}which runs nothing of an async function, as nobody awaits it; make it a plain def"
        raise HookSignatureError(message)
    if inspect.isgeneratorfunction(function):
        message = f"{where}which runs nothing of a function with yield, as nobody iterates over it; take the yield out"
        raise HookSignatureError(message)


def _refuse_overwritten(signature: inspect.Signature, where: str) -> None:
    """Refuse ``lambda i=i: ...``, and methods such as ``engine.terminate``: their default means no engine."""
    first = next(iter(signature.parameters.values()))
    if first.default is not first.empty and first.default is not None:
        message = (
            f"{where} (engine), which would take the place of the default of {first.name!r}; make it keyword-only, as "
            f"in lambda *, {first.name}={first.default!r}: ..., or wrap it: lambda: f()"
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
        mapping.update(returned)
    undeclared = [key for key in mapping.written if key not in processor.writes]
    if undeclared:
        declared = ", ".join(map(repr, processor.writes)) or "nothing"
        message = (
            f"processor {processor.name!r} wrote {undeclared[0]!r} to engine.state and declares {declared}; declare "
            f"it: dst={undeclared[0]!r}, or writes = ({undeclared[0]!r},) in the class"
        )
        raise UnknownKeyError(message)
    mapping.commit()


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
