"""What a schedule is: a pure function of a base value and a clock, and how schedules combine.

A schedule holds no state. It reads what the entry was at the start (``initial_lr``) and a clock from the mapping, and
writes the entry; so a run can be resumed, extended or replayed from its clocks alone. A new one is a curve and a
factory, see :func:`build`.
"""

import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from ice_engine import arguments
from ice_engine.errors import ArgumentTypeError, ArgumentValueError, ProcessorValueError
from ice_engine.processors.clocks import UNITS, Unit, elapsed, run_length
from ice_engine.processors.processor import Processor, require_key, require_mapping


@dataclass(frozen=True)
class Schedule(Processor):
    """A processor that is a pure function of a clock: what every factory of ``ice.schedules`` returns.

    Equal to another one by value, hashable, picklable; its ``repr`` is the expression that builds it.

    *Reads* ``initial_<dst>`` and its clock. *Writes* ``dst``.

    .. versionadded:: 0.1.0
    """

    dst: str

    @property
    def writes(self) -> tuple[str, ...]:
        """The entry it writes, alone."""
        return (self.dst,)

    @property
    @abstractmethod
    def units(self) -> frozenset[str]:
        """The clocks it follows; one, unless schedules of different units were multiplied."""

    @abstractmethod
    def value(self, base: float, mapping: Mapping[str, Any], *, start: int = 0) -> float:
        """Return the value at the clocks in *mapping*.

        Args:
            base: What to schedule, in the unit of ``dst``.
            mapping: Has the clocks; only read.
            start: When the schedule's own clock starts, in its unit.
        """

    def __call__(self, mapping: MutableMapping[str, Any], /) -> MutableMapping[str, Any]:
        """Write the scheduled value to the mapping's ``dst`` and return the mapping.

        Raises:
            MissingKeyError: If the mapping lacks the initial value, the clock, or the length of the run.
        """
        mapping = require_mapping(mapping, self.name)
        initial = f"initial_{self.dst}"
        base = require_key(mapping, initial, self.name, f"Attach the optimizer first, or set {initial} yourself.")
        mapping[self.dst] = self.value(base, mapping)
        return mapping

    def __mul__(self, other: "Schedule") -> "Schedule":
        """Apply this schedule to what *other* gives; for pure factors, their product."""
        if not isinstance(other, Schedule):
            return NotImplemented
        _check_same_dst(self, other)
        return _Product(self.dst, (*_factors(self), *_factors(other)))

    def then(self, schedule: "Schedule", /, *, at: int) -> "Schedule":
        """Follow this schedule until *at*, then *schedule*, from the same initial value.

        Args:
            schedule: Its clock starts at *at*; with ``total=None`` it lasts the rest of the run.
            at: When to change over, in the unit of both; at least 1.

        Raises:
            ArgumentTypeError: If *schedule* is not a schedule or *at* not an int.
            ArgumentValueError: If they differ in ``dst`` or ``unit``, or *at* is below 1.

        Examples:
            >>> import ice_engine as ice
            >>> flat = ice.schedules.constant().then(ice.schedules.linear(total=4), at=2)
            >>> [flat({"step": t, "initial_lr": 1.0})["lr"] for t in range(7)]
            [1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
        """
        if not isinstance(schedule, Schedule):
            message = f"then() wants a schedule, got {schedule!r} ({type(schedule).__name__})"
            raise ArgumentTypeError(message)
        _check_same_dst(self, schedule)
        units = self.units | schedule.units
        if len(units) > 1:
            message = (
                f"{self!r}.then({schedule!r}, at={at!r}) would count in {' and '.join(sorted(units))}; "
                "give both the same unit="
            )
            raise ArgumentValueError(message)
        return _Sequence(self.dst, self, schedule, arguments.count("then(at=...)", at, 1))

    def clamp(self, *, min: float | None = None, max: float | None = None) -> "Schedule":  # noqa: A002 - as torch.clamp
        """Keep the value between *min* and *max*.

        Args:
            min: Least value, in the unit of ``dst``.
            max: Greatest value, in the unit of ``dst``.

        Raises:
            ArgumentTypeError: If neither is given, or one is not a number.
            ArgumentValueError: If one is not finite, or *min* is above *max*.

        Examples:
            >>> import ice_engine as ice
            >>> ice.schedules.exponential(gamma=0.1).clamp(min=0.05)({"step": 9, "initial_lr": 1.0})["lr"]
            0.05
        """
        if min is None and max is None:
            message = "clamp() wants min=, max= or both, got neither"
            raise ArgumentTypeError(message)
        least = None if min is None else arguments.number("clamp(min=...)", min)
        most = None if max is None else arguments.number("clamp(max=...)", max)
        if least is not None and most is not None and least > most:
            message = f"clamp(min=..., max=...) must have min <= max, got {least!r} and {most!r}"
            raise ArgumentValueError(message)
        return _Clamped(self.dst, self, least, most)


@dataclass(frozen=True, repr=False)
class _Curve(Schedule):
    unit: Unit
    factory: Callable[..., Schedule]
    curve: Callable[..., float]
    settings: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return self.factory.__name__

    @property
    def units(self) -> frozenset[str]:
        return frozenset((self.unit,))

    def value(self, base: float, mapping: Mapping[str, Any], *, start: int = 0) -> float:
        t = elapsed(mapping, self.unit, self.name) - start
        settings = dict(self.settings)
        if "total" in settings and settings["total"] is None:
            settings["total"] = run_length(mapping, self.unit, self.name) - start
        try:
            return self.curve(base, t, **settings)
        except OverflowError as error:
            message = f"processor {self.name!r} is beyond every float at {self.unit} {t}: {self!r} grows without end"
            raise ProcessorValueError(message) from error

    def __repr__(self) -> str:
        defaults = inspect.signature(self.factory).parameters
        given = (*self.settings, ("unit", self.unit), ("dst", self.dst))
        written = ", ".join(f"{key}={value!r}" for key, value in given if value != defaults[key].default)
        return f"{self.name}({written})"


@dataclass(frozen=True, repr=False)
class _Product(Schedule):
    factors: tuple[Schedule, ...]

    @property
    def name(self) -> str:
        return " * ".join(factor.name for factor in self.factors)

    @property
    def units(self) -> frozenset[str]:
        return frozenset().union(*(factor.units for factor in self.factors))

    def value(self, base: float, mapping: Mapping[str, Any], *, start: int = 0) -> float:
        for factor in reversed(self.factors):
            base = factor.value(base, mapping, start=start)
        return base

    def __repr__(self) -> str:
        return " * ".join(map(repr, self.factors))


@dataclass(frozen=True, repr=False)
class _Sequence(Schedule):
    first: Schedule
    second: Schedule
    at: int

    @property
    def name(self) -> str:
        return f"{_atom(self.first, self.first.name)}.then({self.second.name})"

    @property
    def units(self) -> frozenset[str]:
        return self.first.units

    def value(self, base: float, mapping: Mapping[str, Any], *, start: int = 0) -> float:
        (unit,) = self.units
        change = start + self.at
        if elapsed(mapping, unit, self.name) < change:  # type: ignore[arg-type]
            return self.first.value(base, mapping, start=start)
        return self.second.value(base, mapping, start=change)

    def __repr__(self) -> str:
        return f"{_atom(self.first, repr(self.first))}.then({self.second!r}, at={self.at})"


@dataclass(frozen=True, repr=False)
class _Clamped(Schedule):
    schedule: Schedule
    least: float | None
    most: float | None

    @property
    def name(self) -> str:
        return f"{_atom(self.schedule, self.schedule.name)}.clamp()"

    @property
    def units(self) -> frozenset[str]:
        return self.schedule.units

    def value(self, base: float, mapping: Mapping[str, Any], *, start: int = 0) -> float:
        value = self.schedule.value(base, mapping, start=start)
        if self.least is not None:
            value = max(value, self.least)
        return value if self.most is None else min(value, self.most)

    def __repr__(self) -> str:
        limits = [f"{key}={limit}" for key, limit in (("min", self.least), ("max", self.most)) if limit is not None]
        return f"{_atom(self.schedule, repr(self.schedule))}.clamp({', '.join(limits)})"


def build(
    factory: Callable[..., Schedule], curve: Callable[..., float], *, unit: Unit, dst: str, **settings: Any
) -> Schedule:
    """Return the schedule that *factory* stands for; the one way to make a new kind.

    Args:
        factory: The public function, with a parameter for each of the settings, ``unit`` and ``dst``.
        curve: ``curve(base, t, **settings)`` gives the value, *t* being how many of *unit* lie behind. Both are
            functions of a module, so that the schedule pickles.
        unit: The clock to follow.
        dst: The entry to write.
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
    return _Curve(dst, unit, factory, curve, tuple(settings.items()))


def progress(t: int, total: int) -> float:
    """Return which part of *total* lies behind at *t*: from 0 to 1, and 1 past the end."""
    # A run shorter than its own warmup leaves nothing for what follows: total <= 0 is at its end.
    return 1.0 if t >= total else t / total


def _factors(schedule: Schedule) -> tuple[Schedule, ...]:
    # Applying schedules is associative, so a product of products is one product.
    return schedule.factors if isinstance(schedule, _Product) else (schedule,)


def _atom(schedule: Schedule, text: str) -> str:
    return f"({text})" if isinstance(schedule, _Product) else text


def _check_same_dst(first: Schedule, second: Schedule) -> None:
    if first.dst != second.dst:
        message = f"{first!r} writes {first.dst!r} and {second!r} writes {second.dst!r}; give both the same dst="
        raise ArgumentValueError(message)
