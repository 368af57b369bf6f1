"""Schedulers of torch's and Ignite's beside processors that write the same entries of an optimizer's param groups."""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from ignite.engine import Engine
from ignite.handlers.param_scheduler import BaseParamScheduler, ParamGroupScheduler

from ice_engine.hook_table import event_name, handler_of, in_firing_order


def overwritten(engine: Engine, optimizer: torch.optim.Optimizer, written: Collection[str], late: str) -> list[str]:
    """Return the schedulers whose entries are *written* by processors before each step, whatever they put there.

    Args:
        engine: Whose handlers they may be.
        optimizer: The one they schedule.
        written: Entries that processors write.
        late: Name of the event after which no processor writes: schedulers on it have the last word.
    """
    handlers = [(event_name(event), handler_of(entry[0])) for event, entry in in_firing_order(engine)]
    found = [
        f"{type(scheduler).__name__} of {scheduler.param_name!r} on {event}"
        for event, handler in handlers
        for scheduler in _schedulers(handler)
        if event != late and scheduler.param_name in written and _is_of(scheduler, optimizer)
    ]
    # torch's are stepped by whoever made them; one is known by what it puts around step().
    by_torch = getattr(vars(optimizer).get("step"), "_wrapped_by_lr_sched", False)
    if by_torch and not found and "lr" in written and all(event != late for event, _ in handlers):
        found.append("one of torch.optim.lr_scheduler")
    return found


def _schedulers(handler: Any) -> Iterator[Any]:
    if isinstance(handler, ParamGroupScheduler):
        for scheduler in handler.schedulers:
            yield from _schedulers(scheduler)
    elif isinstance(handler, BaseParamScheduler):
        yield handler


def _is_of(scheduler: Any, optimizer: torch.optim.Optimizer) -> bool:
    own = {id(group) for group in optimizer.param_groups}
    return any(id(group) in own for group in getattr(scheduler, "optimizer_param_groups", ()))
