"""What a processor is, and what every processor says when it is called wrongly."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from types import MappingProxyType
from typing import Any

from ice_engine.errors import ArgumentTypeError, MissingKeyError

FRESH: Any = MappingProxyType({})
"""Stands for a new dict where a mapping may be left out, and cannot be written to by accident."""

_ABSENT: Any = object()


class Processor(ABC):
    """A callable that takes a mapping and returns a mapping, and says what it is and what it writes.

    As an updater of an optimizer it is called once per step and param group; as a hook, on an event, with the
    engine's state. A plain function from dict to dict does for the first; the registry of hooks takes only this.

    Examples:
        >>> import ice_engine as ice
        >>> class Halve(ice.Processor):
        ...     writes = ("lr",)
        ...
        ...     def __call__(self, mapping):
        ...         mapping["lr"] /= 2
        ...         return mapping
        >>> Halve().name, Halve()({"lr": 0.5})
        ('Halve', {'lr': 0.25})

    .. versionadded:: 0.1.0
    """

    @property
    def name(self) -> str:
        """What errors, hooks and plans call it; the class's name unless overridden."""
        return type(self).__name__

    @property
    def writes(self) -> tuple[str, ...]:
        """The keys it is known to write; empty if unknown."""
        return ()

    @abstractmethod
    def __call__(self, mapping: MutableMapping[str, Any], /) -> MutableMapping[str, Any]:
        """Process *mapping* and return it, or another one."""


def name_of(processor: Callable[..., Any]) -> str:
    """Return the name that errors call *processor* by."""
    if isinstance(processor, Processor):
        return processor.name
    return getattr(processor, "__name__", type(processor).__name__)


def require_mapping(mapping: Any, processor: str) -> Any:
    """Return *mapping*, or explain to who called the *processor* of that name without one.

    Raises:
        ArgumentTypeError: If it is not a mapping.
    """
    if isinstance(mapping, Mapping):
        return mapping
    # An Engine is the typical mistake: every Ignite handler is added this way, and gets the engine.
    message = (
        f"processor {processor!r} was called with {_article(type(mapping).__name__)} instead of a mapping such as "
        "a param group. To run it on an event, use optimizer.hooks.add(event, processor), not "
        "engine.add_event_handler(...). Settings are given by keyword, before it is called with a mapping."
    )
    raise ArgumentTypeError(message)


def require_key(mapping: Mapping[str, Any], key: str, processor: str, mend: str) -> Any:
    """Return ``mapping[key]``, or say what there is instead and the *mend*.

    Raises:
        MissingKeyError: If the mapping lacks it.
    """
    found = mapping.get(key, _ABSENT)
    if found is not _ABSENT:
        return found
    message = f"processor {processor!r} needs {key!r}, which the mapping lacks; it has: {list_keys(mapping)}. {mend}"
    raise MissingKeyError(message)


def belongs(group: str, names: Iterable[str]) -> bool:
    """Whether the param group of this name is one of *names*, or one that ``ice.param_groups`` split from it."""
    return any(group == name or group.startswith(f"{name}.") for name in names)


def list_keys(keys: Iterable[Any]) -> str:
    """Return *keys* as an error shows them."""
    return ", ".join(map(str, keys)) or "nothing"


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "AEIOUaeiou" else f"a {noun}"
