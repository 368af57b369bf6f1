"""Make a processor from any function, by the names of its parameters."""

import difflib
import functools
import inspect
import reprlib
import sys
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, overload

from ice_engine.errors import ArgumentTypeError, MissingKeyError
from ice_engine.processors.destination import Destination, check_destination, updates
from ice_engine.processors.processor import FRESH, Processor, list_keys, require_mapping

_CONFIGURE: Any = object()


def dictprocess(function: Callable[..., Any]) -> "Decorated":
    """Turn *function* into a maker of processors: its parameters are read from a mapping by name.

    Call what you get with keywords, and it returns a processor. When that is called with a mapping, each parameter
    takes, in this order:

    1. a string given by keyword that is a key of the mapping: the mapping's value;
    2. any other value given by keyword: that value itself;
    3. the mapping's entry of the parameter's own name;
    4. the function's default.

    ``dst``, one more keyword, says where the result goes:

    ==================  ==============================  ================  =======================================
    ``dst``             the function returns a dict     ... None          ... anything else
    ==================  ==============================  ================  =======================================
    not given           the mapping is updated with it  nothing changes   it is handed back, not the mapping
    ``"k"``             its entry ``k``; or its only    ``k`` becomes     ``k`` becomes it
                        value; or the dict under ``k``  None
    ``["a", "b"]``      those entries                   ``a`` becomes     a list or tuple is paired in order, and
                                                        None              must fit; a single value goes to ``a``
    ``{"to": "from"}``  each ``to`` gets its ``from``   an error          an error
    ==================  ==============================  ================  =======================================

    Nothing is written until the whole result fits. Called with a mapping at once, it runs with nothing configured;
    so it is itself a processor. Processors pickle if the function can be imported.

    Args:
        function: Any function whose parameters can be given by keyword. With ``**rest``, further keywords are
            passed on by rules 1 and 2.

    Returns:
        The maker, named and documented as the function is.

    Raises:
        ArgumentTypeError: If *function* is not a function, or has ``*args``, a positional-only parameter or one
            called ``dst``.

    Examples:
        >>> import ice_engine as ice
        >>> @ice.dictprocess
        ... def scale(value, by=0.5):
        ...     return value * by
        >>> halve = scale(value="lr", dst="lr")
        >>> halve({"lr": 0.5})
        {'lr': 0.25}
        >>> scale(value="lr", by="factor", dst="lr")({"lr": 0.5, "factor": 3})
        {'lr': 1.5, 'factor': 3}
        >>> halve
        scale(value='lr', dst='lr')

    .. versionadded:: 0.1.0
    """
    if not inspect.isroutine(function):
        message = f"dictprocess decorates a function, got {function!r}; write `@dictprocess` above a `def`"
        raise ArgumentTypeError(message)
    return Decorated(function)


class Decorated(Processor):
    """A function under :func:`dictprocess`: makes processors when called with keywords, and is one itself.

    .. versionadded:: 0.1.0
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function: Callable[..., Any] = function
        # Copies __name__, __doc__ and what pickle looks for: __module__ and __qualname__.
        functools.update_wrapper(self, function)
        parameters = _parameters(function)
        self.parameters: tuple[str, ...] = tuple(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)
        self.required: frozenset[str] = frozenset(
            p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD
        )
        self.takes_any: bool = len(self.parameters) < len(parameters)

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.__name__

    @overload
    def __call__(self, mapping: MutableMapping[str, Any], /) -> Any: ...

    @overload
    def __call__(self, /, *, dst: Destination = None, **arguments: Any) -> "Configured": ...

    def __call__(self, mapping: Any = _CONFIGURE, /, *, dst: Destination = None, **arguments: Any) -> Any:
        """Return a processor with these arguments; or, given a mapping, run on it with none."""
        if mapping is _CONFIGURE:
            return Configured(self, arguments, dst)
        if arguments or dst is not None:
            message = (
                f"{self.name!r} takes keywords, which give a processor, or one mapping, on which it runs at once; "
                f"got both. Write {self.name}(...)(mapping)"
            )
            raise ArgumentTypeError(message)
        return Configured(self, {}, None)(require_mapping(mapping, self.name))

    def __reduce__(self) -> str:
        # Under its function's name there is now this object, so pickle must name it, not take it apart.
        return self.function.__qualname__

    def __repr__(self) -> str:
        return self.name


class Configured(Processor):
    """A decorated function with the arguments that were given to it: calls it with a mapping.

    .. versionadded:: 0.1.0
    """

    def __init__(self, decorated: Decorated, arguments: dict[str, Any], dst: Destination) -> None:
        for keyword in arguments:
            _check_keyword(keyword, decorated)
        self.decorated: Decorated = decorated
        self.arguments: dict[str, Any] = arguments
        self.dst: Destination = check_destination(dst, decorated.name)

    @property
    def name(self) -> str:
        """The function's name."""
        return self.decorated.name

    @property
    def writes(self) -> tuple[str, ...]:
        """The keys of ``dst``; empty without it, as only the function knows then."""
        return (self.dst,) if isinstance(self.dst, str) else tuple(self.dst or ())

    def __call__(self, mapping: MutableMapping[str, Any] = FRESH, /) -> Any:
        """Call the function with what *mapping* and the arguments give, and put its result where ``dst`` says.

        Args:
            mapping: Read and updated; a new dict if left out.

        Returns:
            The same mapping; without ``dst``, a result that is neither a dict nor None instead of it.

        Raises:
            MissingKeyError: If nothing gives a parameter, or the result lacks an entry that ``dst`` names.
            ProcessorReturnError: If the result does not fit ``dst``.
        """
        mapping = {} if mapping is FRESH else require_mapping(mapping, self.name)
        arguments = self._resolve(mapping)
        try:
            returned = self.decorated.function(**arguments)
        except Exception as error:
            self._annotate(error, arguments, mapping)
            raise
        if self.dst is None and not isinstance(returned, Mapping) and returned is not None:
            return returned
        if self.dst is None and returned is mapping:
            # An updater may be given the group itself as `x` or `param_group`, change it and return it.
            return mapping
        for key, value in updates(self.dst, returned, self.name).items():
            mapping[key] = value
        return mapping

    def __repr__(self) -> str:
        settings = [f"{name}={value!r}" for name, value in self.arguments.items()]
        if self.dst is not None:
            settings.append(f"dst={self.dst!r}")
        return f"{self.name}({', '.join(settings)})"

    def _resolve(self, mapping: Mapping[str, Any]) -> dict[str, Any]:
        resolved = {
            name: mapping[given] if isinstance(given, str) and given in mapping else given
            for name, given in self.arguments.items()
        }
        for name in self.decorated.parameters:
            if name in resolved:
                continue
            if name in mapping:
                resolved[name] = mapping[name]
            elif name in self.decorated.required:
                message = (
                    f"processor {self.name!r} needs parameter {name!r}, which neither its keywords nor the mapping "
                    f"give; the mapping has: {list_keys(mapping)}. Write {self.name}({name}=...) with a value or "
                    "one of these keys"
                )
                raise MissingKeyError(message)
        return resolved

    def _annotate(self, error: Exception, arguments: dict[str, Any], mapping: Mapping[str, Any]) -> None:
        values = ", ".join(f"{name}={reprlib.repr(value)}" for name, value in arguments.items())
        note = f"raised by processor {self!r}, called with: {values or 'nothing'}"
        plain = [value for value in self.arguments.values() if isinstance(value, str) and value not in mapping]
        if plain:
            # Most often a misspelt key.
            note += f"; no keys of the mapping, so passed as strings: {', '.join(map(repr, plain))}"
        if sys.version_info >= (3, 11):  # pragma: no branch - 3.10 has no notes
            error.add_note(note)


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError as error:
        message = f"dictprocess cannot see the parameters of {function!r}; wrap it in a `def` that names them"
        raise ArgumentTypeError(message) from error
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY) or parameter.name == "dst":
            message = (
                f"dictprocess cannot pass {str(parameter)!r} of {function.__name__!r} by name: parameters are found "
                "by their names, and dst is where the result goes. Rename it, or make it an ordinary parameter"
            )
            raise ArgumentTypeError(message)
    return parameters


def _check_keyword(keyword: str, decorated: Decorated) -> None:
    if keyword in decorated.parameters or decorated.takes_any:
        return
    close = difflib.get_close_matches(keyword, decorated.parameters, n=1)
    message = (
        f"processor {decorated.name!r} has no parameter {keyword!r}; it has: {list_keys(decorated.parameters)}"
        f"{f'. Did you mean {close[0]!r}?' if close else ''}"
    )
    raise ArgumentTypeError(message)
