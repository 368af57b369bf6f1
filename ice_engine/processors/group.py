"""How an optimizer's processors change its param groups."""

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ice_engine.errors import ArgumentTypeError, ArgumentValueError, MissingKeyError, ProcessorValueError
from ice_engine.processors.agreement import Gather, require_agreement
from ice_engine.processors.compose import Collect, Compose
from ice_engine.processors.composition import Only
from ice_engine.processors.description import schedules_in
from ice_engine.processors.group_mapping import GroupMapping, Written, group_name, likely_entry
from ice_engine.processors.processor import Processor, belongs, name_of
from ice_engine.processors.schedule import Schedule
from ice_engine.typing import DictProcessor

_SCHEDULERS = {"LRScheduler", "ReduceLROnPlateau", "BaseParamScheduler"}  # torch's and Ignite's, neither imported here


def run_processors(
    processors: Sequence[Callable[..., Any]],
    groups: Sequence[dict[str, Any]],
    context: Mapping[str, Any],
    gather: Gather | None = None,
    view: type[GroupMapping] = GroupMapping,
) -> tuple[list[GroupMapping], list[Written]]:
    """Run every processor on every group, then commit; if any fails, no group has changed.

    Args:
        processors: In the order they run.
        groups: The param groups.
        context: What processors may read besides: clocks and owners.
        gather: Gives every rank's text to every rank; None with one process. What is written must be the same on
            all of them, or the ranks' parameters would part.
        view: What shows them a group; one of a plan's own also records who reads and writes what.

    Returns:
        What the processors of each group saw and wrote, and what was there before, for :func:`take_back`.

    Raises:
        ProcessorError: If a processor returns or writes something impossible; names processor and group.
        ProcessorDivergenceError: If one writes other values on other ranks; names processor, group, key and ranks.
    """
    staged = []
    for index, group in enumerate(groups):
        mapping = view(group, context, index)
        for processor in processors:
            mapping.absorb(processor, processor(mapping))
        mapping.check()
        staged.append(mapping)
    if gather is not None:
        require_agreement(staged, gather, processors, groups, context)
    return staged, [each for mapping in staged for each in mapping.commit()]


def take_back(written: Sequence[Written]) -> None:
    """Give groups the entries that they had before something was *written*, some of them perhaps twice."""
    for group, key, before in reversed(written):
        if isinstance(before, torch.Tensor):
            group[key].copy_(before)
        else:
            group[key] = before


def set_initial_values(processors: Sequence[Callable[..., Any]], groups: Sequence[dict[str, Any]]) -> None:
    """Remember, as ``initial_<key>``, what the processors will change, where nothing is remembered yet.

    Raises:
        MissingKeyError: If a processor is known to write a key that a group does not have.
    """
    for index, group in enumerate(groups):
        mapping = GroupMapping(group, {}, index)
        for key, value in group.items():
            # torch gives all groups the very tensor it was given; written in place, it would be one lr for all.
            if isinstance(value, torch.Tensor) and any(other.get(key) is value for other in groups[:index]):
                group[key] = value.detach().clone()
        if "lr" in group:
            group.setdefault("initial_lr", float(group["lr"]))
        for processor, key in written_keys(processors):
            limit = processor.only_groups if isinstance(processor, Schedule) else None
            if limit is not None and not belongs(group_name(group, index), limit):
                continue
            mapping.require(key, processor)
            value = mapping[key]
            if isinstance(processor, Schedule):
                _check_number(processor, key, value, mapping.label)
            if isinstance(value, int | float) or (isinstance(value, torch.Tensor) and value.numel() == 1):
                group.setdefault(f"initial_{key}", float(value))


def _check_number(schedule: Schedule, key: str, value: Any, label: str) -> None:
    if isinstance(value, tuple | list):
        message = f"{schedule!r}: {key!r} of {label} has {len(value)} elements; schedule one, such as dst='{key}.0'"
        raise ProcessorValueError(message)
    whole = isinstance(value, torch.Tensor) and not value.is_floating_point()
    if isinstance(value, bool) or whole or not isinstance(value, int | float | torch.Tensor):
        found = f"of {value.dtype}" if isinstance(value, torch.Tensor) else repr(value)
        message = f"{schedule!r}: {key!r} of {label} is a {type(value).__name__} {found}; a schedule needs a float"
        raise ProcessorValueError(message)


def rewind(
    processors: Sequence[Callable[..., Any]],
    groups: Sequence[dict[str, Any]],
    changed: Collection[str] | None = None,
) -> None:
    """Set what *processors* changed back to its initial value, for a run that starts afresh.

    Args:
        processors: That are to begin again.
        groups: The param groups.
        changed: Entries that were seen to be written; None if nobody has looked.
    """
    written = {*(key for _, key in written_keys(processors)), *(changed or ())}
    # Only a schedule says all that it writes.
    all_known = changed is not None or all(isinstance(processor, Schedule) for processor in processors)
    for index, group in enumerate(groups):
        mapping = GroupMapping(group, {}, index)
        for key, value in group.items():
            entry = key.removeprefix("initial_")
            # What no processor changes stays as it is now.
            if entry != key and entry in mapping and (entry in written or not all_known):
                mapping[entry] = value
        mapping.commit()


def check_names(processors: Sequence[Callable[..., Any]], groups: Sequence[dict[str, Any]]) -> None:
    """Check that every name given to ``.only()`` is a group's.

    Raises:
        MissingKeyError: If one is not.
    """
    names = [group_name(group, index) for index, group in enumerate(groups)]
    for processor in processors:
        for missing in [n for n in _limits(processor) if not any(belongs(group, (n,)) for group in names)]:
            close = difflib.get_close_matches(missing, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "ice.param_groups() gives groups their names"
            message = (
                f"{processor!r} is limited to a param group {missing!r}, which there is not; there are: "
                f"{', '.join(map(repr, names))}; {hint}"
            )
            raise MissingKeyError(message)


def _limits(processor: Callable[..., Any]) -> Iterator[str]:
    """Yield every name that a schedule in *processor* is limited to, however deep in it."""
    if isinstance(processor, Only):
        yield from processor.names
    for part in getattr(processor, "processors" if isinstance(processor, Compose) else "parts", ()):
        yield from _limits(part)


def written_keys(processors: Sequence[Callable[..., Any]]) -> list[tuple[Callable[..., Any], str]]:
    """Return each processor with each key that it is known to write; in place of a Compose, what it is made of."""
    found: list[tuple[Callable[..., Any], str]] = []
    for processor in processors:
        # After a Collect, what is written may not reach the group: only the Compose knows what does.
        if isinstance(processor, Compose) and not any(isinstance(part, Collect) for part in processor.processors):
            found += written_keys(processor.processors)
        elif isinstance(processor, Processor):
            found += [(processor, key) for key in processor.writes]
    return found


def followed_metrics(processors: Sequence[Callable[..., Any]]) -> set[str]:
    """Return the metrics that schedules among *processors* follow."""
    curves = (curve for schedule in schedules_in(processors) for curve, _ in schedule.curves())
    return {str(dict(curve.settings)["metric"]) for curve in curves if "measurements" in curve.reads}


def check_entries(groups: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]) -> None:
    """Check that no param group has an entry that the optimizer does not read, and is all but one that it does.

    Other entries are free: schedulers and users keep some of their own there.

    Raises:
        ArgumentValueError: If one has.
    """
    for i, group in enumerate(groups):
        for key in group.keys() - defaults.keys():
            meant = likely_entry(key, defaults, cutoff=0.85)
            if meant and meant not in key:  # max_momentum is torch's OneCycleLR's
                message = (
                    f"param group {i} ({group_name(group, i)!r}) has {key!r}, which its optimizer does not read; write "
                    f"{meant!r}, or another name if it is an entry of your own"
                )
                raise ArgumentValueError(message)


def check_processors(processors: Iterable[DictProcessor]) -> tuple[DictProcessor, ...]:
    """Return *processors* as a tuple.

    Raises:
        ArgumentTypeError: If it is not a list, or one of them is not callable.
    """
    if callable(processors) or isinstance(processors, str | dict):
        message = f"processors must be a list, got {processors!r}; write processors=[...]"
        raise ArgumentTypeError(message)
    found = tuple(processors)
    for index, processor in enumerate(found):
        if any(kind.__name__ in _SCHEDULERS for kind in type(processor).__mro__):
            message = (
                f"processors[{index}] is the scheduler {type(processor).__name__}, which is no processor; take one of "
                "ours, such as ice.schedules.cosine(), or leave it out and step it at OPTIMIZER_STEP_COMPLETED"
            )
            raise ArgumentTypeError(message)
        if not callable(processor):
            message = f"processors[{index}] must be callable, got {processor!r} ({type(processor).__name__})"
            raise ArgumentTypeError(message)
        if not _takes_a_mapping(processor):
            message = (
                f"processors[{index}] is {name_of(processor)}{inspect.signature(processor)}, which is not called with "
                f"a mapping; if it makes a processor, call it: {name_of(processor)}(...)"
            )
            raise ArgumentTypeError(message)
    return found


def _takes_a_mapping(processor: Callable[..., Any]) -> bool:
    if inspect.isfunction(processor) and (processor.__module__ or "").startswith("ice_engine."):
        return False  # all of ours that are functions make a processor
    try:
        inspect.signature(processor).bind({})
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        return True
    return True


def frozen(value: Any) -> Any:
    """Return *value* as it is now: a copy of a tensor, which the next step would change in place."""
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
