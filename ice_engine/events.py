"""The optimizer step as Ignite events, and where each of them fires.

.. code-block:: text

    for epoch in epochs:                                          # Ignite's Engine.run
        for batch in data:
            ITERATION_STARTED
            output = train_step(engine, batch)                    # calls optimizer.backward(loss)
            ITERATION_COMPLETED                                   # optimizer.update(), before your handlers
              if the window is full:
                unscale, divide by the window's weight
                # <OPTIMIZER_GRADIENTS_READY>     attempt n       gradients are final, not yet clipped
                clip, look for infinite and NaN
                if finite:
                  processors: dict -> dict, per param group
                  # <OPTIMIZER_STEP_STARTED>      step n          this step will happen
                  optimizer.step(), update the loss scale
                  # <OPTIMIZER_STEP_COMPLETED>    step n          gradients are still there
                else:
                  update the loss scale
                  # <OPTIMIZER_STEP_SKIPPED>      skip n          engine.state.optimizer_record.skipped says why
                clear the gradients
        a short last window closes here in the same way           # before your handlers
        EPOCH_COMPLETED

Three clocks, never mixed: *iteration* counts micro-batches (Ignite's own), *attempt* counts closed
windows, *step* counts applied updates. ``(every=100)``, ``once=``, ``before=``, ``after=`` and ``|``
on these events count steps (attempts for ``GRADIENTS_READY``, skips for ``STEP_SKIPPED``).
"""

import functools
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import EnumMeta
from types import FunctionType
from typing import Any, cast

from ignite.engine import Engine, State
from ignite.engine.events import CallableEventWithFilter, EventEnum, EventsList

from ice_engine.errors import ArgumentTypeError, ArgumentValueError

_KINDS = {
    "GRADIENTS_READY": "attempt",
    "STEP_STARTED": "step",
    "STEP_COMPLETED": "step",
    "STEP_SKIPPED": "skipped",
}


_IGNITES = Engine._fire_event  # noqa: SLF001
# What Ignite puts around a handler whose event has a filter, and the filters that it makes itself: known by their code,
# for which one of each is made here and never called. Ignite has no public way to them.
_FILTERED: Any = Engine._handler_wrapper(cast("Any", None), print, None, print).__code__  # noqa: SLF001
_FILTER = _SELF = 0
try:
    _FILTER, _SELF = map(_FILTERED.co_freevars.index, ("event_filter", "self"))
except ValueError:  # another Ignite: what it puts around is then called as any handler
    _FILTERED = None
_OF_COUNT = tuple(
    made.__code__
    for made in (
        CallableEventWithFilter.every_event_filter(1),
        CallableEventWithFilter.once_event_filter([1]),
        CallableEventWithFilter.before_and_after_event_filter(1),
        CallableEventWithFilter.every_before_and_after_event_filter(1),
    )
)


class _Named(EnumMeta):
    def __getattr__(cls, name: str) -> Any:
        members = vars(cls).get("_member_map_", {})
        if name in members:  # before Python 3.12 this is how enums find them
            return members[name]
        message = f"{cls.__name__} has no {name}, only {', '.join(members)}"
        raise AttributeError(message)


class _Events(EventEnum, metaclass=_Named):
    """Says which events there are, if asked for another one."""


class OptimizerEvents(_Events):
    """The events of the optimizer named ``optimizer``, which is the default name."""

    OPTIMIZER_GRADIENTS_READY = "optimizer_gradients_ready"
    OPTIMIZER_STEP_STARTED = "optimizer_step_started"
    OPTIMIZER_STEP_COMPLETED = "optimizer_step_completed"
    OPTIMIZER_STEP_SKIPPED = "optimizer_step_skipped"


def check_name(name: str) -> str:
    """Return *name* if it can prefix events and state attributes.

    Raises:
        ArgumentTypeError: If it is not a string.
        ArgumentValueError: If it is not a Python identifier.
    """
    if not isinstance(name, str):
        message = f"name must be a string, got {name!r}"
        raise ArgumentTypeError(message)
    if not name.isidentifier():
        message = (
            f"name must be an identifier, got {name!r}; it prefixes events and engine.state attributes, "
            "such as name='generator' for GENERATOR_STEP_COMPLETED and engine.state.generator_step"
        )
        raise ArgumentValueError(message)
    return name


def optimizer_events(name: str = "optimizer") -> type[EventEnum]:
    """Return the four events of the optimizer called *name*, always the same enum for one name.

    Args:
        name: An identifier. Its upper case prefixes the members, because Ignite tells events
            apart by member name alone.

    Returns:
        An ``EventEnum`` with ``<NAME>_GRADIENTS_READY``, ``<NAME>_STEP_STARTED``,
        ``<NAME>_STEP_COMPLETED`` and ``<NAME>_STEP_SKIPPED``.

    Raises:
        ArgumentTypeError: If *name* is not a string.
        ArgumentValueError: If *name* is not an identifier.

    Examples:
        >>> optimizer_events("generator").GENERATOR_STEP_COMPLETED.value
        'generator_step_completed'
        >>> optimizer_events("optimizer") is OptimizerEvents
        True
    """
    return _events_of(check_name(name))


@functools.cache
def _events_of(name: str) -> type[EventEnum]:
    if name == "optimizer":
        return OptimizerEvents
    members = {f"{name}_{kind}".upper(): f"{name}_{kind}".lower() for kind in _KINDS}
    return cast("type[EventEnum]", _Events(f"{name.capitalize()}Events", members))  # type: ignore[call-arg]


@functools.cache
def by_kind(name: str) -> dict[str, EventEnum]:
    """Return the events of *name* by ``GRADIENTS_READY``, ``STEP_STARTED``, ``STEP_COMPLETED``, ``STEP_SKIPPED``."""
    events = optimizer_events(name)
    return {kind: events[f"{name}_{kind}".upper()] for kind in _KINDS}


def register(engine: Engine, name: str) -> dict[str, EventEnum]:
    """Make the events of *name* known to *engine*, once, with their counters, and return them by kind."""
    events = by_kind(name)
    # Registered twice, an event would stand twice in the engine's list, and Ignite's profilers count it twice.
    if not engine.has_registered_events(events["STEP_COMPLETED"]):
        counters = {events[kind]: f"{name}_{counter}" for kind, counter in _KINDS.items()}
        engine.register_events(*events.values(), event_to_attr=counters)
    return events


def clock_of(event: Any) -> str:
    """Return the attribute of ``engine.state`` that counts *event*, one of ours; of Ignite's, ``"iteration"``."""
    counters = {State.event_to_attr.get(one) for one in (event if isinstance(event, EventsList) else [event])}
    counter = counters.pop() if len(counters) == 1 else None
    return "iteration" if counter in {None, "epoch"} else str(counter)


def step_events(engine: Engine) -> list[EventEnum]:
    """Return the events that tell of a step or of a skipped one, of every optimizer that *engine* knows."""
    events = (event for event in engine._allowed_events if isinstance(event, _Events))  # noqa: SLF001 - no public list
    return [event for event in events if not event.name.endswith("_GRADIENTS_READY")]


def instead(engine: Engine, event: Any) -> str:
    """Return, for an error, what *engine* has instead of an optimizer's *event*; empty if that is no optimizer's."""
    kind = next((kind for kind in _KINDS if str(getattr(event, "name", "")).endswith(f"_{kind}")), None)
    if kind is None:
        return ""
    found = [one.name for one in engine._allowed_events if isinstance(one, _Events) and one.name.endswith(f"_{kind}")]  # noqa: SLF001 - no public list
    return (
        f"{', '.join(found) or 'none of that kind'}; write optimizer.event({kind!r}), of an optimizer that is attached"
    )


def is_running(engine: Engine) -> bool:
    """Whether *engine* is inside of its ``run()``, or was interrupted there and will go on."""
    return engine._dataloader_iter is not None  # noqa: SLF001 - set while run() iterates


def has_listeners(engine: Engine, event: EventEnum) -> bool:
    """Whether a handler is attached to *event*, with a filter or without."""
    # Not [event], which would create the key, see docs/design.
    return bool(engine._event_handlers.get(event))  # noqa: SLF001


def call_handlers(engine: Engine, event: Any, *event_args: Any, **event_kwargs: Any) -> None:
    """Do what Ignite's ``_fire_event`` does, but for the line that it formats for its log, half of the cost.

    A handler that ``every=``, ``once=``, ``before=`` or ``after=`` keep silent costs 0.2 us instead of 1.4: that is
    asked here, with the count read once for all.
    """
    engine.last_event_name = event
    count = None
    # Not [event], which would create the key: Ignite swallows exceptions if it finds EXCEPTION_RAISED there.
    for function, args, kwargs in engine._event_handlers.get(event, ()):  # noqa: SLF001
        if event_kwargs:
            kwargs.update(event_kwargs)
        if type(function) is FunctionType and function.__code__ is _FILTERED:
            passes = _filter_of_count(function, engine)
            if passes is not None:
                count = engine.state.get_event_attrib_value(event) if count is None else count
                if not passes(engine, count):
                    continue
        count = None  # who is called may change it
        if args and isinstance(args[0], weakref.ref):
            owner = args[0]()
            if owner is None:
                message = "Engine reference not resolved. Cannot execute event handler."  # as Ignite says it
                raise RuntimeError(message)
            function(owner, *event_args, *args[1:], **kwargs)
        else:  # metrics do not get the engine
            function(*event_args, *args, **kwargs)


def _filter_of_count(function: FunctionType, engine: Engine) -> Callable[[Engine, int], bool] | None:
    """Return what lets *function* be called at some counts; None if it asks more, such as a function of the user's."""
    cells: Any = function.__closure__
    passes = cells[_FILTER].cell_contents
    # A copied engine has the handlers of the first one, which ask that one's state.
    own = type(passes) is FunctionType and passes.__code__ in _OF_COUNT and cells[_SELF].cell_contents is engine
    return passes if own else None


def fire(engine: Engine, event: EventEnum) -> bool:
    """Fire *event* if anybody listens, and leave ``engine.last_event_name`` as it was.

    Ignite's loop and its ``Checkpoint`` read ``last_event_name`` to know which of *their* events
    they are in; an event fired inside a handler must not change the answer.

    Returns:
        True if somebody listened.
    """
    if not has_listeners(engine, event):
        return False
    last = engine.last_event_name
    try:
        # Without fire_event()'s look for the event among those that are registered, which ours is: 4 of 5 us.
        fires: Any = engine._fire_event  # noqa: SLF001 - as the engine fires its own
        if getattr(fires, "__func__", None) is _IGNITES and not engine.logger.isEnabledFor(logging.DEBUG):
            call_handlers(engine, event)
        else:  # it has something to log, or is traced
            fires(event)
    finally:
        engine.last_event_name = last
    return True


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What happened in one window; ``engine.state.optimizer_record`` in handlers of our events.

    Attributes:
        step: Steps applied, counting this one if it is applied.
        attempt: Windows closed, counting this one.
        iteration: Micro-batches of the run so far.
        epoch: Epoch, from 1; None outside an engine that says.
        micro_batches: Micro-batches in this window.
        weight: Total weight of the window: items where weights were given, else micro-batches.
        grad_norm: Norm of the unscaled, normalised gradient before clipping, shape (); None if nothing asked for it.
        clipped_norm: Norm after clipping, shape (); None unless ``clip_norm`` clips over all groups.
        loss_scale: Scale the window's losses were multiplied with; None without a GradScaler.
        values: Per param group name, ``lr`` and every key that a processor writes.
        skipped: Why the step was skipped; None if it was not.
        form: What steps the groups: ``"fused"``, ``"foreach"`` or ``"for-loop"``, all by name if they differ; None
            where the optimizer has no such choice.
        noise_scale: Batch size, in items, from which on a larger one brings little; None unless it is measured.
        update_ratio: Per param group name, how far the step moved it, as a part of its length, shape (); None unless
            it is measured, and before the step.
        times: Seconds of this window by ``data``, ``compute`` (forward and backward) and ``step``, so far; None unless
            they are measured.
    """

    step: int
    attempt: int
    iteration: int
    epoch: int | None
    micro_batches: int
    weight: float
    grad_norm: Any = None
    clipped_norm: Any = None
    loss_scale: float | None = None
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: str | None = None
    form: str | None = None
    noise_scale: float | None = None
    update_ratio: dict[str, Any] | None = None
    times: dict[str, float] | None = None
