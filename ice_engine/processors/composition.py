"""Schedules made of schedules: products, sequences, and one schedule within limits.

Each is built by an operator or a method of :class:`ice_engine.processors.schedule.Schedule`, where it is documented.
"""

import functools
import operator
from abc import abstractmethod
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ice_engine import arguments
from ice_engine.errors import ArgumentTypeError
from ice_engine.processors.clocks import at_clock, elapsed
from ice_engine.processors.curve import Curve
from ice_engine.processors.processor import belongs, name_of, require_key
from ice_engine.processors.schedule import Groups, Schedule, plain_numbers


@dataclass(frozen=True, repr=False)
class Product(Schedule):
    """``a * b``: the left one applied to what the right one gives."""

    factors: tuple[Schedule, ...]

    @classmethod
    def of(cls, left: Schedule, right: Schedule) -> "Product":
        """Return ``left * right``; applying schedules is associative, so a product of products is one product."""
        factors = (part.parts if isinstance(part, Product) else (part,) for part in (left, right))
        return cls(left.dst, tuple(factor for part in factors for factor in part))

    @property
    def parts(self) -> tuple[Schedule, ...]:
        return self.factors

    @functools.cached_property
    def name(self) -> str:  # joined once: errors alone show it, and every step passes it on
        return " * ".join(factor.name for factor in self.factors)

    @property
    def spec(self) -> dict[str, Any]:
        return {"product": [factor.spec for factor in self.factors]}

    def values(
        self, bases: Iterable[float], groups: Groups, mapping: Mapping[str, Any], *, start: int = 0
    ) -> Iterable[float] | None:
        found: Iterable[float] | None = bases
        for factor in reversed(self.factors):
            found = None if found is None else factor.values(found, groups, mapping, start=start)
        return found

    def value(self, base: float, mapping: Mapping[str, Any], *, start: int = 0) -> float:
        for factor in reversed(self.factors):
            if not factor.conditional or factor.applies(mapping, start=start):
                base = factor.value(base, mapping, start=start)
        return base

    def __repr__(self) -> str:
        return " * ".join(map(repr, self.factors))


@dataclass(frozen=True, repr=False)
class Sequence(Schedule):
    """``a.then(b, at=t)``: one until a time, then the other on a clock of its own."""

    first: Schedule
    second: Schedule
    at: int
    rebase: bool

    @property
    def parts(self) -> tuple[Schedule, ...]:
        return (self.first, self.second)

    @functools.cached_property
    def name(self) -> str:  # joined once: errors alone show it, and every step passes it on
        return f"{_atom(self.first, self.first.name)}.then({self.second.name})"

    @property
    def spec(self) -> dict[str, Any]:
        return {"then": [self.first.spec, self.second.spec], "at": self.at, "rebase": self.rebase}

    def curves(self, start: int = 0) -> Iterator[tuple[Curve, int]]:
        yield from self.first.curves(start)
        yield from self.second.curves(start + self.at)

    def applies(self, mapping: Mapping[str, Any], *, start: int = 0) -> bool:
        change = start + self.at
        if self._elapsed(mapping) < change:
            return self.first.applies(mapping, start=start)
        return self.second.applies(mapping, start=change)

    def values(
        self, bases: Iterable[float], groups: Groups, mapping: Mapping[str, Any], *, start: int = 0
    ) -> Iterable[float] | None:
        change = start + self.at
        if self._elapsed(mapping) < change:
            return self.first.values(bases, groups, mapping, start=start)
        if self.rebase:
            rebased = self.first.values(bases, groups, self._then(change, mapping), start=start)
            return None if rebased is None else self.second.values(rebased, groups, mapping, start=change)
        return self.second.values(bases, groups, mapping, start=change)

    def value(self, base: float, mapping: Mapping[str, Any], *, start: int = 0) -> float:
        change = start + self.at
        if self._elapsed(mapping) < change:
            return self.first.value(base, mapping, start=start)
        if self.rebase:
            then = self._then(change, mapping)
            base = self.first.value(base, then, start=start) if self.first.applies(then, start=start) else base
        return self.second.value(base, mapping, start=change)

    @property
    def _unit(self) -> Any:
        (unit,) = self.units  # then() saw to it
        return unit

    def _elapsed(self, mapping: Mapping[str, Any]) -> float:
        return elapsed(mapping, self._unit, self.name)

    def _then(self, change: int, mapping: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return *mapping* with the clock at the *change*."""
        # ChainMap is typed for mappings that it may write to; this one is only read, and too costly to copy.
        return ChainMap(at_clock(self._unit, change), mapping)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        rebase = ", rebase=True" if self.rebase else ""
        return f"{_atom(self.first, repr(self.first))}.then({self.second!r}, at={self.at}{rebase})"


@dataclass(frozen=True, repr=False)
class _Wrapped(Schedule):
    schedule: Schedule

    @property
    def parts(self) -> tuple[Schedule, ...]:
        return (self.schedule,)

    @functools.cached_property
    def name(self) -> str:  # joined once: errors alone show it, and every step passes it on
        return f"{_atom(self.schedule, self.schedule.name)}.{self.method}()"

    @property
    def method(self) -> str:
        """The method of :class:`Schedule` that makes it."""
        return type(self).__name__.lower()

    @property
    @abstractmethod
    def call(self) -> str:
        """The arguments of that method, as they are written."""

    def __repr__(self) -> str:
        return f"{_atom(self.schedule, repr(self.schedule))}.{self.method}({self.call})"


@dataclass(frozen=True, repr=False)
class Clamp(_Wrapped):
    """``a.clamp(min=..., max=...)``: the value between two limits."""

    least: float | None
    most: float | None

    @property
    def call(self) -> str:
        limits = (("min", self.least), ("max", self.most))
        return ", ".join(f"{key}={limit}" for key, limit in limits if limit is not None)

    @property
    def spec(self) -> dict[str, Any]:
        return {"clamp": self.schedule.spec, "min": self.least, "max": self.most}

    def values(
        self, bases: Iterable[float], groups: Groups, mapping: Mapping[str, Any], *, start: int = 0
    ) -> Iterable[float] | None:
        inner = self.schedule.values(bases, groups, mapping, start=start)
        return None if inner is None else map(self._limited, inner)

    def value(self, base: float, mapping: Mapping[str, Any], *, start: int = 0) -> float:
        return self._limited(self.schedule.value(base, mapping, start=start))

    def _limited(self, value: float) -> float:
        if self.least is not None:
            value = max(value, self.least)
        return value if self.most is None else min(value, self.most)


@dataclass(frozen=True, repr=False)
class Scale(_Wrapped):
    """``a.scale(by)``: the value times a number, or times an entry of the param group."""

    by: float | str

    @property
    def call(self) -> str:
        return repr(self.by)

    @property
    def spec(self) -> dict[str, Any]:
        return {"scale": self.schedule.spec, "by": self.by}

    def values(
        self, bases: Iterable[float], groups: Groups, mapping: Mapping[str, Any], *, start: int = 0
    ) -> Iterable[float] | None:
        inner, by = self.schedule.values(bases, groups, mapping, start=start), self.by
        factors = plain_numbers(by, groups) if isinstance(by, str) else [by] * len(groups)
        return None if inner is None or factors is None else map(operator.mul, inner, factors)

    def value(self, base: float, mapping: Mapping[str, Any], *, start: int = 0) -> float:
        by = self.by
        if isinstance(by, str):
            mend = f"Add it to every param group: {{'params': ..., {by!r}: 0.5}}, or limit the schedule with .only()."
            by = arguments.number(f"{by!r} of the mapping", require_key(mapping, by, self.name, mend))
        return self.schedule.value(base, mapping, start=start) * by


@dataclass(frozen=True, repr=False)
class Only(_Wrapped):
    """``a.only("head")``: in the groups of these names alone."""

    names: tuple[str, ...]
    conditional = True

    @property
    def call(self) -> str:
        return ", ".join(map(repr, self.names))

    @property
    def spec(self) -> dict[str, Any]:
        return {"only": self.schedule.spec, "names": list(self.names)}

    @property
    def only_groups(self) -> frozenset[str]:
        inner = self.schedule.only_groups
        return frozenset(self.names) if inner is None else inner & frozenset(self.names)

    def applies(self, mapping: Mapping[str, Any], *, start: int = 0) -> bool:
        mend = "Give it to Optimizer(processors=[...]), or set it yourself."
        named = belongs(require_key(mapping, "group_name", self.name, mend), self.names)
        return named and self.schedule.applies(mapping, start=start)

    def value(self, base: float, mapping: Mapping[str, Any], *, start: int = 0) -> float:
        return self.schedule.value(base, mapping, start=start) if self.applies(mapping, start=start) else base


@dataclass(frozen=True, repr=False)
class When(_Wrapped):
    """``a.when(predicate)``: in the steps and groups for which a function of the mapping is true."""

    predicate: Callable[[Mapping[str, Any]], bool]
    conditional = True

    @property
    def call(self) -> str:
        return name_of(self.predicate)

    @property
    def spec(self) -> dict[str, Any]:
        message = f"{self!r} holds a function, {self.call}, which cannot be written down as plain data"
        raise ArgumentTypeError(message)

    def applies(self, mapping: Mapping[str, Any], *, start: int = 0) -> bool:
        return bool(self.predicate(mapping)) and self.schedule.applies(mapping, start=start)

    def value(self, base: float, mapping: Mapping[str, Any], *, start: int = 0) -> float:
        return self.schedule.value(base, mapping, start=start) if self.applies(mapping, start=start) else base


def _atom(schedule: Schedule, text: str) -> str:
    return f"({text})" if isinstance(schedule, Product) else text
