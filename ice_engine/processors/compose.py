"""Processors made of processors, and the one that keeps only some keys."""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

from ice_engine.errors import ArgumentTypeError, ProcessorReturnError
from ice_engine.processors.processor import FRESH, Processor, require_key, require_mapping
from ice_engine.typing import DictProcessor


class Compose(Processor):
    """Run several processors in order, each on what the one before returned.

    ``Compose(f, g, h)(mapping)`` is ``h(g(f(mapping)))``.

    Args:
        processors: Processors or plain functions from dict to dict; or one list of them.

    Raises:
        ArgumentTypeError: If one of them cannot be called.

    Examples:
        >>> import ice_engine as ice
        >>> @ice.dictprocess
        ... def add(x, y):
        ...     return x + y
        >>> @ice.dictprocess
        ... def power(x, n):
        ...     return x**n
        >>> pipeline = ice.Compose(add(x="a", y="b", dst="c"), power(x="c", n=2, dst="c"))
        >>> pipeline({"a": 1, "b": 2})
        {'a': 1, 'b': 2, 'c': 9}

    .. versionadded:: 0.1.0
    """

    def __init__(self, *processors: DictProcessor | Sequence[DictProcessor]) -> None:
        only = processors[0] if len(processors) == 1 else None
        chain: Any = only if isinstance(only, list | tuple) else processors
        for index, processor in enumerate(chain):
            if not callable(processor):
                message = (
                    f"processor {index} of Compose is {processor!r} ({type(processor).__name__}), which cannot be "
                    "called; give processors one by one, or one list of them"
                )
                raise ArgumentTypeError(message)
        self.processors: tuple[DictProcessor, ...] = tuple(chain)

    @property
    def writes(self) -> tuple[str, ...]:
        """What its processors are known to write, in order; after a Collect, only what reaches the end."""
        kept: list[str] = []
        written = kept
        for processor in self.processors:
            if isinstance(processor, Collect):
                # From here on it is a dict of its own, of which the next Collect may leave something out.
                written = [] if written is kept else [key for key in written if key in processor.keys]
            elif isinstance(processor, Processor):
                written += processor.writes
        return tuple(dict.fromkeys([*kept, *(() if written is kept else written)]))

    def __call__(self, mapping: MutableMapping[str, Any] = FRESH, /) -> MutableMapping[str, Any]:
        """Pass *mapping*, or a new dict if left out, through all of them.

        Raises:
            ProcessorReturnError: If one returns something that is not a mapping.
        """
        mapping = {} if mapping is FRESH else require_mapping(mapping, self.name)
        for index, processor in enumerate(self.processors):
            mapping = processor(mapping)
            if not isinstance(mapping, Mapping):
                message = (
                    f"processor {index} of Compose, {_expression(processor)}, returned {mapping!r} "
                    f"({type(mapping).__name__}); a processor returns a mapping: add `return group`, or give a "
                    "decorated one its dst="
                )
                raise ProcessorReturnError(message)
        return mapping

    def __repr__(self) -> str:
        return f"Compose({', '.join(map(_expression, self.processors))})"


class Collect(Processor):
    """Keep only some keys: return a new dict with just these.

    Args:
        keys: The keys to keep, each a string of its own.

    Raises:
        ArgumentTypeError: If a key is not a string.

    Examples:
        >>> import ice_engine as ice
        >>> ice.Collect("lr", "step")({"step": 3, "lr": 0.1, "engine": ...})
        {'lr': 0.1, 'step': 3}

    .. versionadded:: 0.1.0
    """

    def __init__(self, *keys: str) -> None:
        for key in keys:
            if not isinstance(key, str):
                message = f"Collect takes keys one by one, as Collect('lr', 'step'); got {key!r} ({type(key).__name__})"
                raise ArgumentTypeError(message)
        self.keys: tuple[str, ...] = keys

    def __call__(self, mapping: MutableMapping[str, Any], /) -> MutableMapping[str, Any]:
        """Return a new dict with the chosen entries of *mapping*, in the order they were chosen.

        Raises:
            MissingKeyError: If one is not there.
        """
        mapping = require_mapping(mapping, self.name)
        return {key: require_key(mapping, key, self.name, "Let an earlier processor write it.") for key in self.keys}

    def __repr__(self) -> str:
        return f"Collect({', '.join(map(repr, self.keys))})"


def _expression(processor: Callable[..., Any]) -> str:
    # A function's repr is an address; its name is what one would write.
    return repr(processor) if isinstance(processor, Processor) else getattr(processor, "__name__", repr(processor))
