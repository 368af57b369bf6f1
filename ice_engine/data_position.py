"""Where a run is in its data, and how another process gets there.

An iterator over data is what the random generators were when it was made and when its first batch was asked for, which
is when samplers draw, and how many batches were taken from it since. So all are kept, and a resumed run makes the
iterator anew under the same generators and passes over as many.
Where a batch costs nothing to pass over, because it is drawn by a sampler and loaded in this process, it is not loaded.
With worker processes, whose own generators move with what they load, all are: the workers are ahead of training anyway.
"""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset
from torch.utils.data.dataloader import _SingleProcessDataLoaderIter

from ice_engine import random_state
from ice_engine.errors import CheckpointError

logger = logging.getLogger(__name__)


class TrackedData:
    """A run's data that knows how far it was read. Has the attributes of what it wraps.

    Args:
        data: What ``engine.run()`` was given. If it has ``state_dict`` and ``load_state_dict``, such as torchdata's
            ``StatefulDataLoader``, its own state is its position.

    Attributes:
        data: What it wraps.
        taken: Batches taken from the present iterator.
        over: Whether that has said that there are no more.
    """

    def __init__(self, data: Iterable[Any]) -> None:
        self.data: Any = data
        self.taken = 0
        self.over = False
        self._began: dict[str, Any] | None = None  # the moment when the iterator was made
        self._first: dict[str, Any] | None = None  # that of its first batch, if anything was drawn in between
        self._go_on: tuple[dict[str, Any], Callable[[], None]] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "data"), name)

    def __len__(self) -> int:
        return len(self.data)

    def position(self) -> dict[str, Any]:
        """Return where it is, as plain data."""
        whole = length(self.data)
        position = {"taken": self.taken, "length": whole, "over": self.over or self.taken == whole, "loader": None}
        if _has_state(self.data) and self._began is not None:
            return {**position, "loader": self.data.state_dict(), "random": None}
        began = self._began or {"random": None}
        return {**position, **began, "first": self._first, "own_now": _own_states(self.data)}

    def go_on(self, position: dict[str, Any], then: Callable[[], None]) -> None:
        """Let the next iterator begin at *position*, and call *then* when it is there; generators stay as they are."""
        self._go_on = position, then

    def __iter__(self) -> Iterator[Any]:
        if self._go_on is None:
            return self._begin()
        (position, then), self._go_on = self._go_on, None
        now = random_state.capture()
        iterator = self._begin_at(position)
        random_state.restore(now)
        then()
        return iterator

    def _begin(self) -> Iterator[Any]:
        self._began, self._first = _moment(self.data), None
        # A generator goes on where it was, whoever asks for its iterator.
        self.taken, self.over = self.taken if isinstance(self.data, Iterator) else 0, False
        return _Counting(self, iter(self.data), _moment(self.data))

    def begin_first(self, made: dict[str, Any]) -> None:
        """Note what was drawn since the iterator was *made*, as its first batch is asked for."""
        now = _moment(self.data)
        self._first = None if _is_same(made, now) else now

    def _begin_at(self, position: dict[str, Any]) -> Iterator[Any]:
        if position["loader"] is not None:
            if not _has_state(self.data):
                message = (
                    "the checkpoint holds the state of a loader that has state_dict() and load_state_dict(), and "
                    f"run() was given {type(self.data).__name__}, which has not; give the same kind of loader"
                )
                raise CheckpointError(message)
            self.data.load_state_dict(position["loader"])
            iterator: Iterator[Any] = self._begin()
        elif position["over"] and not isinstance(self.data, Iterator):
            _restore_own(self.data, position.get("own_now", ()))
            return iter(())  # what asks for more makes a new iterator, as it would have done
        else:
            epochs = _epochs(self.data)
            _restore(self.data, position)
            iterator = self._begin()
            _restore(self.data, position.get("first") or {})
            _pass_over(self.data, iterator, position["taken"])
            _restore(self.data, {"own": position.get("own_now", ()), "epochs": epochs})
        self.taken = position["taken"]
        return iterator


class _Counting:
    """An iterator that tells how far it got."""

    def __init__(self, owner: TrackedData, batches: Iterator[Any], made: dict[str, Any]) -> None:
        self._owner = owner
        self._made: dict[str, Any] | None = made
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.begin()
        try:
            batch = next(self.batches)
        except StopIteration:
            self._owner.over = True
            raise
        self._owner.taken += 1
        return batch

    def begin(self) -> None:
        """Let the owner know that a batch is asked for, if it is the first one."""
        if self._made is not None:
            self._owner.begin_first(self._made)
            self._made = None


def _pass_over(data: Any, iterator: Any, count: int) -> None:
    batches = iterator.batches
    if count:
        iterator.begin()
    logger.info("passing over the %d batches that were trained on already", count)
    # Of a loader, which data may be or wrap: its sampler draws them; loading them changes no generator that matters.
    if isinstance(batches, _SingleProcessDataLoaderIter) and not isinstance(batches._dataset, IterableDataset):  # noqa: SLF001 - not public
        batches = batches._sampler_iter  # noqa: SLF001 - likewise
    done = sum(1 for _ in itertools.islice(batches, count))
    if done < count:
        message = (
            f"the data ends after {done} batches; when the checkpoint was made, {count} had been taken from it. "
            "Resume with the same data and batch size"
        )
        raise CheckpointError(message)
    if getattr(data, "persistent_workers", False):
        logger.warning(
            "persistent_workers=True: workers go on from epoch to epoch, and begin anew in a resumed run; what they "
            "draw at random will differ. Use persistent_workers=False for a run that resumes bit by bit"
        )


def _moment(data: Any) -> dict[str, Any]:
    """Return all that decides what an iterator over *data* draws now."""
    return {"random": random_state.capture(), "own": _own_states(data), "epochs": _epochs(data)}


def _restore(data: Any, moment: Mapping[str, Any]) -> None:
    if moment.get("random") is not None:
        random_state.restore(moment["random"])
    _restore_own(data, moment.get("own", ()))
    for owner, epoch in zip(_counting_epochs(data), moment.get("epochs", ()), strict=False):
        owner.set_epoch(epoch)


def _is_same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return all(_is_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return all(map(_is_same, one, other))
    return bool(one == other)


def _owners(data: Any) -> list[Any]:
    """Return a loader and its samplers."""
    batch_sampler = getattr(data, "batch_sampler", None)
    return [data, getattr(data, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]


def _counting_epochs(data: Any) -> list[Any]:
    """Return what is told its epoch, such as a ``DistributedSampler``; an iterator may be of an earlier one."""
    found = {id(owner): owner for owner in (*_owners(data), getattr(data, "dataset", None))}.values()
    return [o for o in found if callable(getattr(o, "set_epoch", None)) and isinstance(getattr(o, "epoch", None), int)]


def _epochs(data: Any) -> list[int]:
    return [owner.epoch for owner in _counting_epochs(data)]


def _own_generators(data: Any) -> list[torch.Generator]:
    """Return the generators that a loader and its samplers were given, in place of torch's global one."""
    found = (getattr(owner, "generator", None) for owner in _owners(data))
    return list({id(generator): generator for generator in found if isinstance(generator, torch.Generator)}.values())


def _own_states(data: Any) -> list[torch.Tensor]:
    return [generator.get_state() for generator in _own_generators(data)]


def _restore_own(data: Any, states: Iterable[torch.Tensor]) -> None:
    for generator, state in zip(_own_generators(data), states, strict=False):
        generator.set_state(state)


def shared_out(
    positions: Sequence[dict[str, Any]], ranks: int, mine: dict[str, Any], *, before: int, now: int
) -> dict[str, Any]:
    """Return *mine*, one of all ranks' *positions*, as one of *ranks*, which are others than then.

    Args:
        positions: Of every rank.
        ranks: How many there are now.
        mine: The one to change.
        before: How many of *positions* are of data of their own, as many ranks having the same.
        now: How many of *ranks* have data of their own.

    Raises:
        CheckpointError: If it is the state of a loader, which nobody else can share out.
    """
    taken = sum(position["taken"] for position in positions) * before // len(positions)
    if mine["loader"] is not None and not mine["over"]:
        message = (
            f"it holds where the loaders of {len(positions)} ranks{of_whose_data(len(positions), before)} were in "
            f"their data, and now there are {ranks}{of_whose_data(ranks, now)}. "
            "Resume with as many, or with a loader without state_dict(), such as torch's own DataLoader"
        )
        raise CheckpointError(message)
    if (rest := taken % now) and not mine["over"]:
        logger.warning("%d of the %d micro-batches that the epoch has had are trained once more", rest, taken)
    over = all(position["over"] for position in positions)
    return {**mine, "taken": taken // now, "over": over, "loader": None}


def of_whose_data(ranks: int, own: int) -> str:
    """Return what to say after a number of *ranks* of which only *own* have data of their own."""
    return f" with the data of {own}" if own != ranks else ""


def _has_state(data: Any) -> bool:
    return callable(getattr(data, "state_dict", None)) and callable(getattr(data, "load_state_dict", None))


def length(data: Any) -> int | None:
    """Return the batches that *data* has; None if nobody knows."""
    try:
        return len(data)
    except TypeError:  # unknown
        return None
