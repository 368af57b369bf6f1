"""The schedule that is one curve: what a factory of the catalogue returns."""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast

from ice_engine import arguments
from ice_engine.errors import ArgumentTypeError, ArgumentValueError, ProcessorValueError
from ice_engine.processors.clocks import UNITS, Unit, elapsed, run_length
from ice_engine.processors.processor import name_of, require_key
from ice_engine.processors.schedule import Groups, Schedule, plain_numbers

Formula: TypeAlias = Callable[[float], float]
"""Gives a value, of a base."""


class ByClock(Protocol):
    """The function of a curve whose expensive part is of the clock alone; made by :func:`by_clock`.

    Attributes:
        at_clock: Gives the value at a time as a function of the base.
    """

    at_clock: Callable[..., Formula]

    def __call__(self, base: float, t: float, **settings: Any) -> float:
        """Return the value."""


def by_clock(at_clock: Callable[..., Formula]) -> ByClock:
    """Make ``function(base, t, **settings)`` of ``at_clock(t, **settings)``, which returns a function of the base.

    What follows from the clock is then computed once a step for all param groups.
    """

    @functools.wraps(at_clock)
    def function(base: float, t: float, **settings: Any) -> float:
        return at_clock(t, **settings)(base)

    made = cast("ByClock", function)
    made.at_clock = at_clock
    return made


@dataclass(frozen=True, repr=False)
class Curve(Schedule):
    """A function of a base value and one clock, with its settings; made by :func:`build`.

    Attributes:
        unit: The clock it follows.
        factory: The public function that makes it, and names it.
        function: ``function(base, t, **settings)`` gives the value.
        settings: The settings, as the factory was given them.
        reads: Further keys of the mapping that *function* takes by name.
    """

    unit: Unit
    factory: Callable[..., Schedule]
    function: Callable[..., float]
    settings: tuple[tuple[str, Any], ...]
    reads: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[Schedule, ...]:
        return ()

    @functools.cached_property
    def name(self) -> str:
        return self.factory.__name__

    @property
    def units(self) -> frozenset[str]:
        return frozenset((self.unit,))

    @property
    def only_groups(self) -> None:
        return None

    @property
    def spec(self) -> dict[str, Any]:
        for key, setting in self.settings:
            if callable(setting):
                message = f"{self!r} holds a function, {key}, which cannot be written down as plain data"
                raise ArgumentTypeError(message)
        settings = {key: list(value) if isinstance(value, tuple) else value for key, value in self.settings}
        return {"schedule": self.name, **settings, "unit": self.unit, "dst": self.dst}

    def curves(self, start: int = 0) -> Iterator[tuple["Curve", int]]:
        yield self, start

    def applies(self, mapping: Mapping[str, Any], *, start: int = 0) -> bool:  # noqa: ARG002 - always
        return True

    @functools.cached_property
    def _fixed(self) -> dict[str, Any]:
        """The settings that do not depend on the run."""
        return {key: value for key, value in self.settings if (key, value) != ("total", None)}

    @functools.cached_property
    def _lasts_the_run(self) -> bool:
        return ("total", None) in self.settings

    def values(
        self, bases: Iterable[float], groups: Groups, mapping: Mapping[str, Any], *, start: int = 0
    ) -> Iterable[float] | None:
        function, t, settings = self.function, elapsed(mapping, self.unit, self.name) - start, self._fixed
        if self._lasts_the_run:
            settings = {**settings, "total": run_length(mapping, self.unit, self.name) - start}
        own = []
        for key in self.reads:
            if key in mapping and not any(key in group for group in groups):
                settings = {**settings, key: mapping[key]}
            elif (numbers := plain_numbers(key, groups)) is not None:
                own.append([(key, number) for number in numbers])
            else:
                return None
        if own:
            rows = zip(bases, zip(*own, strict=True), strict=True)
            return (function(base, t, **settings, **dict(row)) for base, row in rows)
        at_clock = getattr(function, "at_clock", None)
        return map(functools.partial(function, t=t, **settings) if at_clock is None else at_clock(t, **settings), bases)

    def value(self, base: float, mapping: Mapping[str, Any], *, start: int = 0) -> float:
        t = elapsed(mapping, self.unit, self.name) - start
        found = {}
        if self._lasts_the_run:
            found["total"] = run_length(mapping, self.unit, self.name) - start
        for key in self.reads:
            mend = "Give the schedule to Optimizer(processors=[...]), or set it yourself."
            found[key] = require_key(mapping, key, self.name, mend)
        try:
            return self.function(base, t, **self._fixed, **found)
        except OverflowError as error:
            message = f"processor {self.name!r} is beyond every float at {self.unit} {t}: {self!r} grows without end"
            raise ProcessorValueError(message) from error

    def __repr__(self) -> str:
        defaults = inspect.signature(self.factory).parameters
        given = (*self.settings, ("unit", self.unit), ("dst", self.dst))
        written = ", ".join(
            f"{key}={name_of(value) if callable(value) else repr(value)}"
            for key, value in given
            if value != defaults[key].default
        )
        return f"{self.name}({written})"


def build(
    factory: Callable[..., Schedule],
    function: Callable[..., float],
    *,
    unit: Unit,
    dst: str,
    reads: tuple[str, ...] = (),
    **settings: Any,
) -> Curve:
    """Return the schedule that *factory* stands for; the one way to make a new kind.

    Args:
        factory: The public function, with a parameter for each of the settings, ``unit`` and ``dst``.
        function: ``function(base, t, **settings)`` gives the value, *t* being how many of *unit* lie behind: an int,
            or a float where a resumed run stretches its clock. Both are functions of a module, so that the schedule
            pickles. Made by :func:`by_clock` it costs least with many param groups.
        unit: The clock to follow.
        dst: The entry to write.
        reads: Keys of the mapping that *function* takes by name besides its settings.
        settings: Checked and hashable. A ``total`` of None becomes the length of the run.

    Raises:
        ArgumentTypeError: If *unit* or *dst* is not a string, or ``total`` not an int.
        ArgumentValueError: If *unit* is unknown, *dst* empty, or ``total`` below 1.
    """
    name = factory.__name__
    for argument, text in (("unit", unit), ("dst", dst)):
        if not isinstance(text, str):
            message = f"{name}({argument}=...) must be a string, got {text!r} ({type(text).__name__})"
            raise ArgumentTypeError(message)
    if unit not in UNITS:
        message = f"{name}(unit=...) must be one of {', '.join(map(repr, UNITS))}, got {unit!r}"
        raise ArgumentValueError(message)
    if not dst:
        message = f"{name}(dst=...) must be the key of an entry, such as 'lr' or 'betas.0', got ''"
        raise ArgumentValueError(message)
    if settings.get("total") is not None:
        settings["total"] = arguments.count(f"{name}(total=...)", settings["total"], 1)
    return Curve(dst, unit, factory, function, tuple(settings.items()), reads)


def progress(t: float, total: float) -> float:
    """Return which part of *total* lies behind at *t*: from 0 to 1, and 1 past the end."""
    # A run shorter than its own warmup leaves nothing for what follows: total <= 0 is at its end.
    return 1.0 if t >= total else t / total
