"""What a processor sees of one param group, and how what it writes reaches the group."""

import difflib
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch

from ice_engine.errors import (
    ArgumentTypeError,
    MissingKeyError,
    ProcessorDivergenceError,
    ProcessorReturnError,
    ProcessorValueError,
    UnknownKeyError,
)
from ice_engine.processors.processor import Processor, name_of
from ice_engine.processors.schedule import Schedule
from ice_engine.typing import DictProcessor


class GroupMapping(MutableMapping[str, Any]):
    """A param group's own entries over a read-only context.

    Writes are staged and reach the group on :meth:`commit`, so a processor that fails leaves the
    group as it was. ``"betas.0"`` reads and writes one element of a tuple entry. ``x`` and
    ``param_group`` are this mapping itself, for processors written for ice-learn.

    Args:
        group: The param group; never changed before :meth:`commit`.
        context: Clocks and owners, such as ``step`` and ``optimizer``.
    """

    def __init__(self, group: dict[str, Any], context: Mapping[str, Any]) -> None:
        self._group = group
        self._context = context
        self._staged: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key in self._staged:
            return self._staged[key]
        if key in self._group:
            value = self._group[key]
            # A copy: `group["lr"] *= 0.5` would change a tensor at once, whatever happens after.
            return value.detach().clone() if isinstance(value, torch.Tensor) else value
        if key in ("x", "param_group"):
            return self
        if key in self._context:
            return self._context[key]
        entry, index = self._element(key)
        if entry is not None:
            return self[entry][index]
        raise KeyError(key)

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self._group and key != "params":
            self._staged[key] = value
            return
        entry, index = self._element(key)
        if entry is not None:
            elements = list(self[entry])
            elements[index] = value
            self._staged[entry] = type(self._group[entry])(elements)
            return
        if key in self._context or key in ("params", "x", "param_group"):
            message = f"{key!r} is read-only; writable are: {self._writable()}"
            raise UnknownKeyError(message)
        close = difflib.get_close_matches(str(key), self._group, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"add it to the group first: param_group[{key!r}] = ..."
        message = f"{key!r} is not an entry of {self.label}; it has: {self._writable()}; {hint}"
        raise UnknownKeyError(message)

    def __delitem__(self, key: str) -> None:
        message = f"{key!r} cannot be deleted: a torch optimizer needs all its entries"
        raise UnknownKeyError(message)

    def __iter__(self) -> Iterator[str]:
        yield from self._group
        yield from (key for key in (*self._context, "x", "param_group") if key not in self._group)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, key: object) -> bool:
        if key in self._group or key in self._context or key in ("x", "param_group"):
            return True
        return isinstance(key, str) and self._element(key)[0] is not None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.label}: {self._writable()})"

    def _element(self, key: str) -> tuple[str | None, int]:
        entry, dot, index = key.rpartition(".")
        value = self._group.get(entry) if dot and index.isdigit() else None
        if isinstance(value, tuple | list) and int(index) < len(value):
            return entry, int(index)
        return None, 0

    @property
    def staged(self) -> Mapping[str, Any]:
        """What was written and not yet committed."""
        return self._staged

    @property
    def label(self) -> str:
        """What errors call the group."""
        return f"param group {self._context.get('group_index', '?')} ({self._context.get('group_name', '?')!r})"

    def _writable(self) -> str:
        return ", ".join(key for key in self._group if key != "params")

    def absorb(self, processor: Callable[..., Any], returned: Any) -> None:
        """Stage what *processor* returned, if it is a mapping of its own.

        Raises:
            ProcessorReturnError: If it is not a mapping.
            UnknownKeyError: If it has a key that the group does not.
        """
        if returned is self:
            return
        if not isinstance(returned, Mapping):
            message = (
                f"processor {name_of(processor)!r} returned {type(returned).__name__} for {self.label}; "
                "a processor returns a mapping: add `return group`, or give a decorated one its dst="
            )
            raise ProcessorReturnError(message)
        for key, value in returned.items():
            if key not in self or self[key] is not value:
                self[key] = value

    def require(self, key: str, processor: Callable[..., Any]) -> None:
        """Check that *key*, which *processor* writes, is an entry of the group.

        Raises:
            MissingKeyError: If it is not.
        """
        if key not in self:
            name, close = name_of(processor), difflib.get_close_matches(key, self._group, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            message = f"processor {name!r} writes {key!r}, which {self.label} lacks; it has: {self._writable()}{hint}"
            raise MissingKeyError(message)

    def commit(self) -> None:
        """Write what was staged to the group, tensors in place."""
        for key, value in self._staged.items():
            current = self._group[key]
            if isinstance(current, torch.Tensor):
                # In place, so that a compiled or capturable step keeps its tensor and does not recompile.
                current.fill_(float(value))
            else:
                self._group[key] = value

    def check(self) -> None:
        """Make staged values plain and usable, before any group is changed.

        Raises:
            ProcessorValueError: If a number is replaced by something else, or by infinity or NaN.
        """
        for key, value in self._staged.items():
            self._staged[key] = self._plain(key, value, self._group[key])

    def _plain(self, key: str, value: Any, current: Any) -> Any:
        if isinstance(current, tuple | list):
            if not isinstance(value, tuple | list) or len(value) != len(current):
                message = f"{key!r} of {self.label} would become {value!r}; it must have {len(current)} elements"
                raise ProcessorValueError(message)
            pairs = zip(value, current, strict=True)
            return type(current)(self._plain(f"{key}.{i}", v, c) for i, (v, c) in enumerate(pairs))
        if isinstance(current, bool) or not isinstance(current, int | float | torch.Tensor):
            return value
        # A numpy scalar in a param group would make the checkpoint unreadable for weights_only=True.
        number = value.item() if hasattr(value, "item") and _is_one(value) else value
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            found = f"{number!r} ({type(number).__name__})"
            message = f"{key!r} of {self.label} would become {found}; it must be a finite number"
            raise ProcessorValueError(message)
        if key == "lr" and number < 0:
            message = f"'lr' of {self.label} would become {number!r}; it must be at least 0, or the loss is climbed"
            raise ProcessorValueError(message)
        return number


def run_processors(
    processors: Sequence[Callable[..., Any]],
    groups: Sequence[dict[str, Any]],
    context: Mapping[str, Any],
    gather: Callable[[str], list[str]] | None = None,
) -> None:
    """Run every processor on every group, then commit; if any fails, no group has changed.

    Args:
        processors: In the order they run.
        groups: The param groups.
        context: Clocks and owners.
        gather: Gives every rank's text to every rank; None with one process. What is written must be the same on
            all of them, or the ranks' parameters would part.

    Raises:
        ProcessorError: If a processor returns or writes something impossible; names processor and group.
        ProcessorDivergenceError: If one writes other values on other ranks; names processor, group, key and ranks.
    """
    staged = []
    for index, group in enumerate(groups):
        mapping = GroupMapping(group, {**context, "group_index": index, "group_name": group_name(group, index)})
        for processor in processors:
            mapping.absorb(processor, processor(mapping))
        mapping.check()
        staged.append(mapping)
    if gather is not None:
        _require_agreement(processors, groups, context, staged, gather)
    for mapping in staged:
        mapping.commit()


def _require_agreement(
    processors: Sequence[Callable[..., Any]],
    groups: Sequence[dict[str, Any]],
    context: Mapping[str, Any],
    staged: Sequence[GroupMapping],
    gather: Callable[[str], list[str]],
) -> None:
    digest = hashlib.sha256(repr([mapping.staged for mapping in staged]).encode()).hexdigest()
    if len(set(gather(digest))) == 1:
        return
    # They differ, and every rank knows it: run them again, one at a time, to find the first that does.
    steps = []
    for index, group in enumerate(groups):
        mapping = GroupMapping(group, {**context, "group_index": index, "group_name": group_name(group, index)})
        for processor in processors:
            mapping.absorb(processor, processor(mapping))
            mapping.check()
            written = {key: repr(value) for key, value in mapping.staged.items()}
            steps.append([name_of(processor), mapping.label, written])
    ranks = [json.loads(text) for text in gather(json.dumps(steps))]
    for place, (name, label, _) in enumerate(steps):
        values = [rank[place][2] if place < len(rank) else {} for rank in ranks]
        for key in sorted({key for written in values for key in written}):
            found = [written.get(key, "left as it is") for written in values]
            if len(set(found)) > 1:
                listed = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(found))
                message = (
                    f"processor {name!r} differs between ranks in {key!r} of {label}: {listed}. Compute it from the "
                    "clocks, or from values that were reduced over all ranks; no param group has changed"
                )
                raise ProcessorDivergenceError(message)
    message = (
        "processors write different values on different ranks, and the same ones when run again: one of them keeps "
        f"a state of its own or draws random numbers; they are: {', '.join(map(name_of, processors))}"
    )
    raise ProcessorDivergenceError(message)


def group_name(group: Mapping[str, Any], index: int) -> str:
    """Return the group's ``name`` entry, or ``group_<index>`` as Ignite's loggers call it."""
    return str(group.get("name", f"group_{index}"))


def set_initial_values(processors: Sequence[Callable[..., Any]], groups: Sequence[dict[str, Any]]) -> None:
    """Remember, as ``initial_<key>``, what the processors will change, where nothing is remembered yet.

    Raises:
        MissingKeyError: If a processor is known to write a key that a group does not have.
    """
    for index, group in enumerate(groups):
        mapping = GroupMapping(group, {"group_index": index, "group_name": group_name(group, index)})
        for key, value in group.items():
            # torch gives all groups the very tensor it was given; written in place, it would be one lr for all.
            if isinstance(value, torch.Tensor) and any(other.get(key) is value for other in groups[:index]):
                group[key] = value.detach().clone()
        if "lr" in group:
            group.setdefault("initial_lr", float(group["lr"]))
        for processor, key in written_keys(processors):
            limit = processor.only_groups if isinstance(processor, Schedule) else None
            if limit is not None and group_name(group, index) not in limit:
                continue
            mapping.require(key, processor)
            value = mapping[key]
            if isinstance(value, int | float | torch.Tensor):
                group.setdefault(f"initial_{key}", float(value))


def check_names(processors: Sequence[Callable[..., Any]], groups: Sequence[dict[str, Any]]) -> None:
    """Check that every name given to ``.only()`` is a group's.

    Raises:
        MissingKeyError: If one is not.
    """
    names = [group_name(group, index) for index, group in enumerate(groups)]
    for processor in processors:
        for missing in sorted(((isinstance(processor, Schedule) and processor.only_groups) or frozenset()) - {*names}):
            close = difflib.get_close_matches(missing, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "ice.param_groups() gives groups their names"
            message = (
                f"{processor!r} is limited to a param group {missing!r}, which there is not; there are: "
                f"{', '.join(map(repr, names))}; {hint}"
            )
            raise MissingKeyError(message)


def written_keys(processors: Sequence[Callable[..., Any]]) -> list[tuple[Callable[..., Any], str]]:
    """Return each processor with each key that it is known to write."""
    return [(p, key) for p in processors if isinstance(p, Processor) for key in p.writes]


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


def _is_one(value: Any) -> bool:
    return bool(value.numel() == 1 if isinstance(value, torch.Tensor) else value.size == 1)
