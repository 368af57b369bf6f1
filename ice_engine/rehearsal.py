"""A run of processors without the rest of it: copies of param groups and processors, with the clocks of a fresh run."""

import copy
import sys
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any, TypeAlias

import torch

from ice_engine.clocks import Clocks
from ice_engine.errors import ArgumentTypeError
from ice_engine.processors.binding import Binding
from ice_engine.processors.group import rewind, run_processors, set_initial_values, written_keys
from ice_engine.processors.group_mapping import GroupMapping, group_name
from ice_engine.processors.processor import name_of
from ice_engine.processors.schedule import Schedule
from ice_engine.typing import DictProcessor
from ice_engine.window import Window

_PROBES = 24  # steps at which it is recorded which processor reads and writes what

StandIn: TypeAlias = Callable[[list[dict[str, Any]], Any, Any], tuple[Any, dict[int, Any]]]
"""Makes, of the rehearsal's param groups, clocks and engine, what its processors see as ``optimizer``; and what else
stands for what, by the id of the real one."""


class Witness(GroupMapping):
    """A group's mapping that remembers which keys each processor read and wrote.

    Attributes:
        accesses: For each processor that has run, the keys it read before it wrote them, and those it wrote.
    """

    __slots__ = ("_read", "_written", "accesses")

    def __init__(self, group: dict[str, Any], context: Mapping[str, Any], index: int) -> None:
        super().__init__(group, context, index)
        self.accesses: list[tuple[frozenset[str], frozenset[str]]] = []
        self._read: set[str] = set()
        self._written: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of *key*, or *default* where there is none."""
        self._note(key)
        return super().get(key, default)

    def __setitem__(self, key: str, value: Any) -> None:
        self._written.add(key)
        super().__setitem__(key, value)

    def absorb(self, processor: Callable[..., Any], returned: Any) -> None:
        """Stage what *processor* returned, and close its account."""
        read = frozenset(self._read)  # before: comparing what was returned is no reading
        super().absorb(processor, returned)
        self.accesses.append((read, frozenset(self._written)))
        self._read.clear()
        self._written.clear()

    def _note(self, key: str) -> None:
        if key not in self._written:
            self._read.add(key)


class Track:
    """One number of a param group along the run: an entry, or an element of one.

    Attributes:
        key: What it is called: ``"lr"``, ``"betas.0"``.
        entry: The entry of the group.
        element: Its place in the entry; None for the whole.
        values: One value per step; NaN where it is no number.
    """

    def __init__(self, entry: str, element: int | None, before: Any, steps: int) -> None:
        self.key = entry if element is None else f"{entry}.{element}"
        self.values = array("d", [_number(before)]) * steps
        self.entry = entry
        self.element = element


class Rehearsal:
    """Runs copies of processors on copies of param groups, step by step.

    Args:
        param_groups: As they are now; the copies start from their ``initial_<key>``, as a fresh run does.
        processors: In the order they run.
        run: Stands for ``engine.state``: ``epoch_length``, ``max_epochs`` and ``max_iters``.
        window: Its size and tail give the length of the run.
        name: The optimizer's name.
        optimizer: Makes what stands for it; None for nothing.
        resumed: What a resumed run shows its processors instead of the run's own lengths.

    Attributes:
        groups: The copies.
        names: A name for each group, different from all others.
        start: The copies as they are before the first step.
        tracks: For each group, what has been followed in it.
        scheduled: For each group, whether a processor wrote anything in it.
        witnesses: What the processors did at some of the steps.

    Raises:
        ArgumentTypeError: If a processor cannot be copied.
        MissingKeyError: If one is known to write an entry that a group does not have.
    """

    def __init__(
        self,
        param_groups: Sequence[Mapping[str, Any]],
        processors: Sequence[DictProcessor],
        *,
        run: SimpleNamespace,
        window: Window,
        name: str,
        optimizer: StandIn | None,
        resumed: Mapping[str, Any],
    ) -> None:
        self.groups = [{key: _copy(value) for key, value in group.items()} for group in param_groups]
        self.names = _different([group_name(group, i) for i, group in enumerate(self.groups)])
        self._written = dict.fromkeys(key for _, key in written_keys(processors))
        # Only a schedule says all that it writes.
        self._all_known = all(isinstance(processor, Schedule) for processor in processors)
        set_initial_values(processors, self.groups)
        rewind(processors, self.groups)
        self._clocks = Clocks()
        self._clocks.run = run
        self._name = name
        engine = SimpleNamespace(state=run)
        stand_in, known = optimizer(self.groups, self._clocks, engine) if optimizer is not None else (None, {})
        # What a processor holds of the real run becomes what stands for it here; parameters are not copied.
        memo = {id(group): ours for group, ours in zip(param_groups, self.groups, strict=True)}
        memo |= {id(p): p for group in param_groups for p in group.get("params", ())} | known
        self._processors = tuple(_copied(processor, memo) for processor in processors)
        self._fixed = {
            **self._clocks.lengths(window.size, window.tail),
            **resumed,
            "optimizer": stand_in,
            "engine": engine,
            "n": stand_in,
            "module_node": stand_in,
            "measurements": MappingProxyType({}),  # nothing is measured before a run
        }
        self.start = [{key: _copy(value) for key, value in group.items()} for group in self.groups]
        self.scheduled = [False] * len(self.groups)
        self.witnesses: list[Witness] = []
        self._followed: list[set[str]] = [set() for _ in self.groups]
        self.tracks: list[list[Track]] = [[] for _ in self.groups]
        self._noted: list[list[tuple[Callable[[float], None], str, int | None]]] = [[] for _ in self.groups]
        for i, group in enumerate(self.groups):
            self._follow(i, [key for key in ("lr",) if key in group], 0)

    def play(self, iterations: Sequence[int], epochs: Sequence[int]) -> None:
        """Take all steps, after these iterations and in these epochs.

        Raises:
            ProcessorError: If a processor does something impossible; like all that it raises, with a note.
        """
        counts, run, total = self._clocks.counts, vars(self._clocks.run), len(iterations)
        probes = {1 + i * (total - 1) // (_PROBES - 1) for i in range(_PROBES)}
        binding = Binding(self._processors, self.groups)
        # With schedules alone, as a run does it; then each writes its entry of every group.
        everything: list[Mapping[str, Any]] = [self._written] * len(self.groups)
        step_key, attempt_key = f"{self._name}_step", f"{self._name}_attempt"
        run[f"{self._name}_skipped"] = 0
        for step, (iteration, epoch) in enumerate(zip(iterations, epochs, strict=True), start=1):
            counts["iteration"] = run["iteration"] = iteration
            run["epoch"] = epoch
            counts["attempt"] = run[attempt_key] = step
            run[step_key] = step - 1
            context = {**self._clocks.position(), **self._fixed}
            try:
                if step in probes or binding.run(context) is None:
                    view = Witness if step in probes else GroupMapping
                    seen, _ = run_processors(self._processors, self.groups, context, view=view)
                    written = [mapping.staged for mapping in seen]
                    self.witnesses += [mapping for mapping in seen if isinstance(mapping, Witness)]
                else:
                    written = everything
            except Exception as error:
                if sys.version_info >= (3, 11):  # pragma: no branch - 3.10 has no notes
                    error.add_note(
                        f"raised while planning step {step} of {total}: a plan has clocks and param groups, "
                        "and nothing else of a run, such as its outputs, metrics or gradients"
                    )
                raise
            counts["step"] = step
            self._record(written, step)

    def _record(self, written: Sequence[Mapping[str, Any]], step: int) -> None:
        for i, staged in enumerate(written):
            if staged:
                self.scheduled[i] = True
                if not self._followed[i].issuperset(staged):
                    self._follow(i, staged, step - 1)
            group = self.groups[i]
            for append, entry, element in self._noted[i]:
                value = group[entry] if element is None else group[entry][element]
                append(value if type(value) is float else _number(value))

    def _follow(self, i: int, entries: Iterable[str], steps: int) -> None:
        for entry in entries:
            if entry not in self._followed[i]:
                self._followed[i].add(entry)
                before = self.start[i][entry]
                if isinstance(before, tuple | list):
                    self.tracks[i] += [Track(entry, j, value, steps) for j, value in enumerate(before)]
                else:
                    self.tracks[i].append(Track(entry, None, before, steps))
        self._noted[i] = [(track.values.append, track.entry, track.element) for track in self.tracks[i]]

    def series(self) -> dict[str, "array[float]"]:
        """Return what was followed, key by key, by ``key/group``.

        What never was a number is left out, and elements beside those that schedules are known to write.
        """
        keys = dict.fromkeys(track.key for tracks in self.tracks for track in tracks)
        return {
            f"{key}/{name}": track.values
            for key in keys
            for name, tracks in zip(self.names, self.tracks, strict=True)
            for track in tracks
            if track.key == key and self._is_shown(track)
        }

    def _is_shown(self, track: Track) -> bool:
        if self._all_known and track.element is not None:
            return track.key in self._written or track.entry in self._written
        return not track.values or any(value == value for value in track.values)  # noqa: PLR0124 - NaN: no number


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.copy(value)


def _copied(processor: DictProcessor, memo: dict[int, Any]) -> DictProcessor:
    try:
        return copy.deepcopy(processor, memo)
    except Exception as error:
        message = (
            f"processor {name_of(processor)!r} cannot be copied ({error}), and a plan must not change the one that "
            "will run; give its class a __deepcopy__, or make it a function of its mapping alone"
        )
        raise ArgumentTypeError(message) from error


def _different(names: Sequence[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name}#{i}" for i, name in enumerate(names)]


def _number(value: Any) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return float(value)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else float("nan")
