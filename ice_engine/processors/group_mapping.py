"""What a processor sees of one param group, and how what it writes reaches the group."""

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch

from ice_engine.errors import MissingKeyError, ProcessorReturnError, ProcessorValueError, UnknownKeyError
from ice_engine.processors.processor import name_of

Written = tuple[dict[str, Any], str, Any]
"""A param group, one of its entries, and what that was before it was written."""

_ABSENT: Any = object()
_OWN = ("group_index", "group_name", "x", "param_group")  # what the mapping itself says; no entry of the context
_OTHER_NAMES = {"learning_rate": "lr", "beta1": "betas", "beta2": "betas", "wd": "weight_decay"}


class GroupMapping(MutableMapping[str, Any]):
    """A param group's own entries over a read-only context.

    Writes are staged and reach the group on :meth:`commit`, so a processor that fails leaves the
    group as it was. ``"betas.0"`` reads and writes one element of a tuple entry. ``x`` and
    ``param_group`` are this mapping itself, for processors written for ice-learn.

    Made once per step and param group, and read several times: what is common comes first in every method.

    Args:
        group: The param group; never changed before :meth:`commit`.
        context: Clocks and owners, such as ``step`` and ``optimizer``; shared by all groups.
        index: The group's place, shown as ``group_index``, and in errors.
    """

    __slots__ = ("_context", "_group", "_index", "_name", "_staged")

    def __init__(self, group: dict[str, Any], context: Mapping[str, Any], index: int) -> None:
        self._group = group
        self._context = context
        self._index = index
        self._name: str | None = None
        self._staged: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """The group's name, see :func:`group_name`."""
        if self._name is None:
            self._name = group_name(self._group, self._index)
        return self._name

    @property
    def staged(self) -> Mapping[str, Any]:
        """What will be written, by entry of the group."""
        return self._staged

    def __getitem__(self, key: str) -> Any:
        if key not in self._staged and type(self._group.get(key)) is float:
            return self._group[key]
        found = self._find(key)
        if found is _ABSENT:
            raise KeyError(key)
        return found

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of *key*, or *default* where there is none."""
        # The inherited one raises and catches KeyError, at half the price of a whole schedule.
        found = self._find(key)
        return default if found is _ABSENT else found

    def _find(self, key: str) -> Any:
        if key in self._staged:
            return self._staged[key]
        value = self._group.get(key, _ABSENT)
        if value is not _ABSENT:
            # A copy: `group["lr"] *= 0.5` would change a tensor at once, whatever happens after.
            return value.detach().clone() if isinstance(value, torch.Tensor) else value
        if key in _OWN:
            return self._own(key)
        value = self._context.get(key, _ABSENT)
        if value is not _ABSENT:
            return value
        entry, index = self._element(key)
        return _ABSENT if entry is None else self._find(entry)[index]

    def _own(self, key: str) -> Any:
        if key == "group_index":
            return self._index
        return self.name if key == "group_name" else self

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self._group and key != "params":
            self._staged[key] = value
            return
        entry, index = self._element(key)
        if entry is not None:
            elements = list(self._find(entry))
            elements[index] = value
            self._staged[entry] = type(self._group[entry])(elements)
            return
        if key in self._context or key == "params" or key in _OWN:
            message = f"{key!r} is read-only; writable are: {self._writable()}"
            raise UnknownKeyError(message)
        hint = self._meant(str(key)) or f"add it to the group first: param_group[{key!r}] = ..."
        message = f"{key!r} is not an entry of {self.label}; it has: {self._writable()}; {hint}"
        raise UnknownKeyError(message)

    def __delitem__(self, key: str) -> None:
        message = f"{key!r} cannot be deleted: a torch optimizer needs all its entries"
        raise UnknownKeyError(message)

    def __iter__(self) -> Iterator[str]:
        yield from self._group
        yield from (key for key in dict.fromkeys((*self._context, *_OWN)) if key not in self._group)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, key: object) -> bool:
        if key in self._group or key in self._context or key in _OWN:
            return True
        return isinstance(key, str) and self._element(key)[0] is not None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.label}: {self._writable()})"

    def _element(self, key: str) -> tuple[str | None, int]:
        if "." not in key:
            return None, 0
        entry, _, index = key.rpartition(".")
        value = self._group.get(entry) if index.isdecimal() else None
        if isinstance(value, tuple | list) and int(index) < len(value):
            return entry, int(index)
        return None, 0

    @property
    def label(self) -> str:
        """What errors call the group."""
        return f"param group {self._index} ({self.name!r})"

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
            name, meant = name_of(processor), self._meant(key)
            hint = f"; {meant}" if meant else ""
            message = f"processor {name!r} writes {key!r}, which {self.label} lacks; it has: {self._writable()}{hint}"
            raise MissingKeyError(message)

    def _meant(self, key: str) -> str:
        """Return what an error says of the entry that a *key* which is none may have meant."""
        meant = likely_entry(key, (entry for entry in self._group if entry != "params"))
        value = self._group[meant] if meant else None
        if isinstance(value, tuple | list):
            places = ", ".join(repr(f"{meant}.{i}") for i in range(len(value)))
            return f"{meant!r} has {len(value)} elements: {places}"
        return f"did you mean {meant!r}?" if meant else ""

    def commit(self) -> list[Written]:
        """Write what was staged to the group, tensors in place, and return what was there."""
        written: list[Written] = []
        for key, value in self._staged.items():
            current = self._group[key]
            if isinstance(current, torch.Tensor):
                written.append((self._group, key, current.detach().clone()))
                # In place, so that a compiled or capturable step keeps its tensor and does not recompile.
                current.fill_(float(value))
            else:
                written.append((self._group, key, current))
                self._group[key] = value
        return written

    def check(self) -> None:
        """Make staged values plain and usable, before any group is changed.

        Raises:
            ProcessorValueError: If a number is replaced by something else, or by infinity or NaN.
        """
        for key, value in self._staged.items():
            if type(value) is float and type(self._group[key]) is float and 0.0 <= value < math.inf:
                continue  # what every schedule writes
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


def likely_entry(key: str, entries: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return which of *entries* a *key* that is none may have meant: one like it, or torch's name for it."""
    close = difflib.get_close_matches(_OTHER_NAMES.get(key, key), list(entries), n=1, cutoff=cutoff)
    return close[0] if close else None


def group_name(group: Mapping[str, Any], index: int) -> str:
    """Return the group's ``name`` entry, or ``group_<index>`` as Ignite's loggers call it."""
    return str(group.get("name", f"group_{index}"))


def _is_one(value: Any) -> bool:
    return bool(value.numel() == 1 if isinstance(value, torch.Tensor) else value.size == 1)
