"""What a schedule is: a pure function of a base value and a clock, and how schedules combine.

A schedule holds no state. It reads what the entry was at the start (``initial_lr``) and a clock from the mapping, and
writes the entry; so a run can be resumed, extended or replayed from its clocks alone. A new one is a curve and a
factory, see :func:`ice_engine.processors.curve.build`; what combines them is in
:mod:`ice_engine.processors.composition`.
"""

import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from ice_engine import arguments, pictures
from ice_engine.errors import ArgumentTypeError, ArgumentValueError
from ice_engine.processors.clocks import at_clock
from ice_engine.processors.processor import Processor, require_key, require_mapping

if TYPE_CHECKING:
    import matplotlib.figure

    from ice_engine.processors.curve import Curve

Groups: TypeAlias = Sequence[Mapping[str, Any]]
"""Param groups, only read."""


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
    def parts(self) -> tuple["Schedule", ...]:
        """The schedules it is made of, from left to right; empty for a curve of the catalogue."""

    @property
    def units(self) -> frozenset[str]:
        """The clocks it follows; one, unless schedules of different units were multiplied."""
        return frozenset().union(*(part.units for part in self.parts))

    @property
    def only_groups(self) -> frozenset[str] | None:
        """Names of the param groups it is limited to; None for all."""
        limits = [part.only_groups for part in self.parts]
        found = [limit for limit in limits if limit is not None]
        return frozenset().union(*found) if found and len(found) == len(limits) else None

    @functools.cached_property
    def conditional(self) -> bool:
        """Whether there are groups or steps in which it may have nothing to say."""
        return any(part.conditional for part in self.parts)

    def curves(self, start: int = 0) -> Iterator[tuple["Curve", int]]:
        """Yield every curve in it, each with the time at which its own clock starts, in its unit."""
        for part in self.parts:
            yield from part.curves(start)

    @abstractmethod
    def value(self, base: float, mapping: Mapping[str, Any], *, start: int = 0) -> float:
        """Return the value at the clocks in *mapping*.

        Args:
            base: What to schedule, in the unit of ``dst``.
            mapping: Has the clocks; only read.
            start: When the schedule's own clock starts, in its unit.
        """

    def values(
        self, bases: Iterable[float], groups: Groups, mapping: Mapping[str, Any], *, start: int = 0
    ) -> Iterable[float] | None:
        """Return the value of each of *groups* at the clocks in *mapping*, with what is common computed once.

        None, as here, if that takes a mapping of each group, or might; then :meth:`value` says.
        """

    def applies(self, mapping: Mapping[str, Any], *, start: int = 0) -> bool:
        """Whether it has something to say in this group, now; if not, the entry stays as it is."""
        return not self.conditional or any(part.applies(mapping, start=start) for part in self.parts)

    @property
    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """Plain data that ``ice.schedules.from_spec`` makes the same schedule of: strings, numbers, lists, dicts.

        Raises:
            ArgumentTypeError: If it holds a function, which is no data.
        """

    def __call__(self, mapping: MutableMapping[str, Any], /) -> MutableMapping[str, Any]:
        """Write the scheduled value to the mapping's ``dst`` and return the mapping.

        Raises:
            MissingKeyError: If the mapping lacks the initial value, the clock, or the length of the run.
        """
        mapping = require_mapping(mapping, self.name)
        if not self.conditional or self.applies(mapping):
            initial = f"initial_{self.dst}"
            base = require_key(mapping, initial, self.name, f"Attach the optimizer first, or set {initial} yourself.")
            mapping[self.dst] = self.value(base, mapping)
        return mapping

    def __mul__(self, other: "Schedule") -> "Schedule":
        """Apply this schedule to what *other* gives; for pure factors, their product."""
        from ice_engine.processors.composition import Product  # made of schedules itself; so below, too

        if not isinstance(other, Schedule):
            return NotImplemented
        _check_same_dst(self, other)
        return Product.of(self, other)

    def then(self, schedule: "Schedule", /, *, at: int, rebase: bool = False) -> "Schedule":
        """Follow this schedule until *at*, then *schedule*.

        Args:
            schedule: Its clock starts at *at*; with ``total=None`` it lasts the rest of the run.
            at: When to change over, in the unit of both; at least 1.
            rebase: Let *schedule* start from what this one gives at *at*, instead of from the initial value.

        Raises:
            ArgumentTypeError: If *schedule* is not a schedule, *at* not an int or *rebase* not a bool.
            ArgumentValueError: If they differ in ``dst`` or ``unit``, or *at* is below 1.

        Examples:
            >>> import ice_engine as ice
            >>> flat = ice.schedules.constant().then(ice.schedules.linear(total=4), at=2)
            >>> [flat({"step": t, "initial_lr": 1.0})["lr"] for t in range(7)]
            [1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
        """
        from ice_engine.processors.composition import Sequence

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
        if not isinstance(rebase, bool):
            message = f"then(rebase=...) must be True or False, got {rebase!r} ({type(rebase).__name__})"
            raise ArgumentTypeError(message)
        return Sequence(self.dst, self, schedule, arguments.count("then(at=...)", at, 1), rebase)

    def plot(self, total: int, *, base: float = 1.0, ax: Any = None, **entries: Any) -> "matplotlib.figure.Figure":
        """Draw the value against its clock; one that lasts the whole run lasts *total*.

        For a whole run, with windows and epochs and every param group, see ``optimizer.plan(...).plot()``.

        Args:
            total: How much to draw, in the schedule's unit; at least 1.
            base: The initial value, in the unit of ``dst``.
            ax: Matplotlib axes to draw in, instead of a new figure.
            entries: What else it reads, such as ``epoch_length=50``, or ``depth=2`` of the param group.

        Returns:
            The figure.

        Raises:
            ArgumentTypeError: If *total* is not an int, or *base* not a number.
            ArgumentValueError: If *total* is below 1, *base* not finite, or it follows two clocks.
            MissingKeyError: If it reads what is not given.
            ModuleNotFoundError: Without matplotlib.

        Examples:
            >>> import ice_engine as ice
            >>> figure = ice.schedules.cosine(total=100, warmup=10).plot(120, base=3e-3)
            >>> figure.axes[0].get_xlabel()
            'step'
        """
        total, base = arguments.count("plot(total)", total, 1), arguments.number("plot(base=...)", base)
        if len(self.units) > 1:
            message = (
                f"{self!r} follows {' and '.join(sorted(self.units))}, whose relation only a run knows; "
                "draw it with optimizer.plan(epoch_length=..., max_epochs=...).plot()"
            )
            raise ArgumentValueError(message)
        (unit,) = self.units
        lengths = {"total_steps": total, "max_iters": total, "max_epochs": total}
        names = {"group_name": next(iter(sorted(self.only_groups or ())), "group_0")}
        start = {f"initial_{self.dst}": base, self.dst: base, "measurements": {}, **names, **lengths, **entries}
        values = [self({**start, **at_clock(unit, t)})[self.dst] for t in range(total)]  # type: ignore[arg-type]
        return pictures.figure(
            {self.dst: {repr(self): values}},
            what="Schedule.plot()",
            label=unit,
            first=0 if unit == "step" else 1,
            ax=ax,
        )

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
        from ice_engine.processors.composition import Clamp

        if min is None and max is None:
            message = "clamp() wants min=, max= or both, got neither"
            raise ArgumentTypeError(message)
        least = None if min is None else arguments.number("clamp(min=...)", min)
        most = None if max is None else arguments.number("clamp(max=...)", max)
        if least is not None and most is not None and least > most:
            message = f"clamp(min=..., max=...) must have min <= max, got {least!r} and {most!r}"
            raise ArgumentValueError(message)
        return Clamp(self.dst, self, least, most)

    def scale(self, by: float | str, /) -> "Schedule":
        """Multiply the value by a number, or by an entry of the param group.

        Args:
            by: A finite number; or the key of an entry that holds one, such as ``"lr_scale"``.

        Raises:
            ArgumentTypeError: If it is neither a number nor a string.
            ArgumentValueError: If it is not finite, or empty.

        Examples:
            >>> import ice_engine as ice
            >>> ice.schedules.constant().scale("lr_scale")({"step": 0, "initial_lr": 1.0, "lr_scale": 0.25})["lr"]
            0.25
        """
        from ice_engine.processors.composition import Scale

        if isinstance(by, str):
            if not by:
                message = "scale() wants a number or the key of an entry of the param group, got ''"
                raise ArgumentValueError(message)
            return Scale(self.dst, self, by)
        return Scale(self.dst, self, arguments.number("scale(...)", by))

    def only(self, *names: str) -> "Schedule":
        """Limit it to the param groups of these names; in the others the entry stays as it is.

        As a factor of a product it is 1 there.

        Args:
            names: Names of groups (their ``name`` entry, or ``group_<index>``); at least one. ``"head"`` is also
                ``"head.no_weight_decay"`` and whatever else ``ice.param_groups`` split from it. A name that no group
                has is an error when the optimizer is attached.

        Raises:
            ArgumentTypeError: If none is given, or one is not a string.

        Examples:
            >>> import ice_engine as ice
            >>> head = ice.schedules.constant(0.5).only("head")
            >>> [head({"step": 0, "initial_lr": 1.0, "lr": 1.0, "group_name": g})["lr"] for g in ("head", "body")]
            [0.5, 1.0]
        """
        from ice_engine.processors.composition import Only

        if not names or not all(isinstance(name, str) for name in names):
            message = f"only() wants names of param groups, such as only('head'), got {names!r}"
            raise ArgumentTypeError(message)
        return Only(self.dst, self, names)

    def when(self, predicate: Callable[[Mapping[str, Any]], bool], /) -> "Schedule":
        """Limit it to the steps and groups for which *predicate* is true; else the entry stays as it is.

        As a factor of a product it is 1 then.

        Args:
            predicate: Called with the mapping, which it only reads. A function of a module, if the schedule is to be
                pickled.

        Raises:
            ArgumentTypeError: If it cannot be called.

        Examples:
            >>> import ice_engine as ice
            >>> def late(group):
            ...     return group["epoch"] > 2
            >>> drop = ice.schedules.constant(0.1).when(late)
            >>> drop, [drop({"step": 0, "epoch": e, "initial_lr": 1.0, "lr": 1.0})["lr"] for e in (2, 3)]
            (constant(factor=0.1).when(late), [1.0, 0.1])
        """
        from ice_engine.processors.composition import When

        if not callable(predicate):
            message = f"when() wants a function of the mapping, got {predicate!r} ({type(predicate).__name__})"
            raise ArgumentTypeError(message)
        return When(self.dst, self, predicate)


def plain_numbers(key: str, groups: Groups) -> list[float] | None:
    """Return what each of *groups* has for *key*; None unless it is a finite int or float in all of them."""
    found: list[Any] = [group.get(key) for group in groups]
    return found if {*map(type, found)} <= {int, float} and all(map(math.isfinite, found)) else None


def _check_same_dst(first: Schedule, second: Schedule) -> None:
    if first.dst != second.dst:
        message = f"{first!r} writes {first.dst!r} and {second!r} writes {second.dst!r}; give both the same dst="
        raise ArgumentValueError(message)
