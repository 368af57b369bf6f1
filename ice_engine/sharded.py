"""Checkpoints of many ranks: each writes its part, and any number of ranks reads them."""

from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch

from ice_engine.distributed import world
from ice_engine.distributed.parts import Parts, write
from ice_engine.distributed.plain import plain
from ice_engine.distributed.shards import empty_state, is_sharded, shard_of
from ice_engine.distributed.together import agree, together
from ice_engine.errors import ArgumentTypeError, ArgumentValueError, CheckpointError, StateDictError
from ice_engine.matching import fit, shapes
from ice_engine.names import PLACE, few, unwrapped
from ice_engine.optimizer import Optimizer
from ice_engine.state import pack, unpack
from ice_engine.wrappers import bare


def save_sharded(folder: str | Path, objects: Mapping[str, Any]) -> None:
    """Save *objects* into a new folder: each rank writes what it holds, and nothing is gathered.

    Call it on every rank, between two windows. Models and optimizers go by the names of parameters. What ranks hold
    alike is written once; buffers and plain data are those of rank 0. At return the checkpoint is whole and on the
    disk. The folder is one of ``torch.distributed.checkpoint``, with a manifest of digests and a ``COMMIT`` marker.

    Args:
        folder: One that all ranks share. A finished checkpoint is never overwritten, an unfinished one is.
        objects: By name: modules (as they are, or wrapped in DistributedDataParallel, ``fully_shard``,
            ``torch.compile``), optimizers of ours (plain, over a ``ZeroRedundancyOptimizer``, or over sharded
            parameters), and whatever else has a ``state_dict``, such as an Ignite engine.

    Raises:
        ArgumentTypeError: If an object has no ``state_dict``, or is a torch optimizer.
        ArgumentValueError: If a name cannot be one.
        CheckpointError: On every rank, if the folder is not new, parameters of a model differ between ranks by name or
            shape, or any rank cannot save its part or is gone.

    Examples:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = Optimizer(torch.optim.Adam(model.named_parameters()))
        >>> save_sharded("step_1000", {"model": model, "optimizer": optimizer})
        >>> sorted(file.name for file in Path("step_1000").iterdir())
        ['.metadata', 'COMMIT', '__0_0.distcp', 'manifest.json']

    .. versionadded:: 0.1.0
    """
    parts = _parts(objects)

    def collect() -> dict[str, Any]:
        return {key: value for part in parts for key, value in part.entries()}

    shapes = {key: shape for part in parts if isinstance(part, _Model) for key, shape in part.shapes()}
    write(_absolute(folder), list(objects), shapes, collect)


def load_sharded(folder: str | Path, objects: Mapping[str, Any]) -> None:
    """Load what :func:`save_sharded` saved, on any number of ranks, sharded in any way or not at all.

    Call it on every rank. All files are compared with their digests, and all that is read is compared with the
    objects, before anything changes. Nothing in the folder is unpickled that is not plain data.

    Args:
        folder: One that :func:`save_sharded` wrote.
        objects: By name, as they were saved; those that are left out are not read.

    Raises:
        ArgumentTypeError: If an object has no ``load_state_dict``, or is a torch optimizer.
        ArgumentValueError: If a name cannot be one.
        CheckpointError: On every rank, if a file is missing or damaged, the ``COMMIT`` marker is not there, or what
            was saved does not fit; nothing has changed then. Also if ``load_state_dict`` of an object that is
            neither a module nor an optimizer refuses; others may have been loaded then.

    Examples:
        >>> model = torch.nn.Linear(2, 1)
        >>> save_sharded("step_2000", {"model": model})
        >>> restored = torch.nn.Linear(2, 1)
        >>> load_sharded("step_2000", {"model": restored})
        >>> torch.equal(restored.weight, model.weight)
        True

    .. versionadded:: 0.1.0
    """
    parts, folder = _parts(objects), _absolute(folder)
    doing = f"loading {folder}"
    agree("load_sharded()", f"{folder} into {', '.join(objects)}")
    saved = Parts(folder)
    loads = together(doing, lambda: [part.read(saved) for part in parts])

    for name, load in zip(objects, loads, strict=True):
        together(f"{doing} into {name}", load)


def _absolute(folder: str | Path) -> Path:
    return Path(folder).expanduser().absolute()


class _Part(Protocol):
    """What one of the objects puts into a checkpoint, and takes out of it."""

    def entries(self) -> Iterator[tuple[str, Any]]:
        """Yield what this rank saves: tensors, and plain data, by key."""

    def read(self, saved: Parts) -> Callable[[], Any]:
        """Read and check it all, and return what then changes the object."""


def _parts(objects: Mapping[str, Any]) -> list[_Part]:
    if not isinstance(objects, Mapping):
        message = f"objects must be a dict of objects by name, got {type(objects).__name__}"
        raise ArgumentTypeError(message)
    parts: list[_Part] = []
    for name, value in objects.items():
        # A dot ends an object's name in the keys.
        if not isinstance(name, str) or not name or "." in name:
            message = f"{name!r} cannot be an object's name; take a word without a dot, such as 'model'"
            raise ArgumentValueError(message)
        if isinstance(value, torch.nn.Module):
            parts.append(_Model(name, value))
        elif isinstance(value, Optimizer):
            parts.append(_Optimizer(name, value))
        elif isinstance(value, torch.optim.Optimizer):
            message = f"{name!r} is {type(value).__name__}; wrap it: ice.Optimizer(...)"
            raise ArgumentTypeError(message)
        elif not (hasattr(value, "state_dict") and hasattr(value, "load_state_dict")):
            message = f"{name!r} must have state_dict and load_state_dict, {type(value).__name__} has not"
            raise ArgumentTypeError(message)
        else:
            parts.append(_Other(name, value))
    return parts


class _Model:
    """A module: ``model.0.weight`` and so on, without what wrappers put before it."""

    def __init__(self, name: str, model: torch.nn.Module) -> None:
        self._name, self._model = name, bare(model)

    def _key(self, name: str) -> str:
        return f"{self._name}.{name.replace('_orig_mod.', '')}"

    def shapes(self) -> Iterator[tuple[str, list[int]]]:
        """Yield keys and whole shapes of the parameters."""
        for name, parameter in self._model.named_parameters():
            yield self._key(name), [*parameter.shape]

    def _state(self) -> dict[str, tuple[str, Any]]:
        """Return names in the module, and values, by key."""
        return {self._key(name): (name, value) for name, value in self._model.state_dict().items()}

    def entries(self) -> Iterator[tuple[str, Any]]:
        # Buffers may differ between ranks, and DistributedDataParallel has those of rank 0 hold.
        alike = {name for name, _ in self._model.named_parameters(remove_duplicate=False)}
        for key, (name, value) in self._state().items():
            if world.rank() == 0 or name in alike or is_sharded(value):
                yield key, value if isinstance(value, torch.Tensor) else plain(key, value)

    def read(self, saved: Parts) -> Callable[[], Any]:
        own = self._state()
        there = [key for key in saved.keys if key.startswith(f"{self._name}.")]
        new, dropped = ([key for key in a if key not in b] for a, b in ((own, there), (there, own)))
        problems = [f"only the model has {few(new)}"] if new else []
        problems += [f"only the checkpoint has {few(dropped)}"] if dropped else []
        wanted = {}
        for key, (_, value) in own.items():
            found = saved.tensor(key)
            if found is not None and isinstance(value, torch.Tensor) and found[0] != value.shape:
                problems.append(f"{key!r} had shape {(*found[0],)}, now {(*value.shape,)}")
            wanted[key] = torch.empty_like(value) if found is not None and isinstance(value, torch.Tensor) else None
        if problems:
            message = f"the checkpoint does not fit {self._name!r}: {'; '.join(problems)}"
            raise StateDictError(message)
        values = saved.read(wanted)
        state = {name: values[key] for key, (name, _) in own.items()}
        return lambda: self._model.load_state_dict(state)


class _Optimizer:
    """An optimizer: ``optimizer.state.0.weight.exp_avg`` and so on, its groups, and what ours has beyond torch's."""

    def __init__(self, name: str, optimizer: Optimizer) -> None:
        self._name, self._optimizer = name, optimizer
        self._shard = shard_of(optimizer.inner)
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def _names(self) -> list[list[str]]:
        """Return the names of parameters, group by group; their places, where they have none of their own."""
        sizes = [len(group["params"]) for group in self._optimizer.param_groups]
        names = unwrapped([name for name, _ in self._optimizer.named_parameters()])
        if len(set(names)) < len(names):
            names = [f"{PLACE}{i}.params.{j}" for i, size in enumerate(sizes) for j in range(size)]
        ends = [*accumulate(sizes)]
        return [names[end - size : end] for size, end in zip(sizes, ends, strict=True)]

    def entries(self) -> Iterator[tuple[str, Any]]:
        grouped = self._names()
        flat = [name for names in grouped for name in names]
        if world.rank() == 0:
            groups = [{key: v for key, v in g.items() if key != "params"} for g in self._optimizer.param_groups]
            extra = self._optimizer._extra_state()  # noqa: SLF001 - of this package
            extra["class"] = type(self._shard).__name__
            extra["shapes"] = shapes(zip(flat, self._parameters, strict=True))
            packed = pack({"state": {}, "param_groups": groups}, grouped, extra)
            for key in ("param_groups", "ice_engine"):
                yield f"{self._name}.{key}", plain(f"{self._name}.{key}", packed[key])
        strange = [key for key in self._shard.state if not isinstance(key, torch.Tensor)]
        if strange:
            message = (
                f"{self._name} has state of no parameter, under {strange[0]!r}; such state cannot be saved by name"
            )
            raise CheckpointError(message)
        for name, parameter in zip(flat, self._parameters, strict=True):
            for key, value in self._shard.state.get(parameter, {}).items():
                yield self._entry(f"{self._name}.state.{name}.{key}", value, parameter)

    def _entry(self, key: str, value: Any, parameter: torch.Tensor) -> tuple[str, Any]:
        if is_sharded(value) and value.shape != parameter.shape:
            message = f"{key} is sharded and not of its parameter's shape; such state cannot be resharded"
            raise CheckpointError(message)
        return key, value if isinstance(value, torch.Tensor) else plain(key, value)

    def read(self, saved: Parts) -> Callable[[], Any]:
        prefix = f"{self._name}."
        packed = saved.read({f"{prefix}param_groups": None, f"{prefix}ice_engine": None})
        plain, extra = self._fitted(packed[f"{prefix}param_groups"], packed[f"{prefix}ice_engine"])
        keys = _by_parameter(f"{prefix}state.", saved.keys)
        own = {p for group in self._shard.param_groups for p in group["params"]}
        wanted: dict[str, Any] = {}
        places: dict[str, tuple[int, str]] = {}
        for number, parameter in enumerate(self._parameters):
            name = plain["state"][number]
            for key in keys.get(name, ()) if parameter in own else ():
                full = f"{prefix}state.{name}.{key}"
                found = saved.tensor(full)
                wanted[full] = None if found is None else empty_state(parameter, key, *found)
                places[full] = (number, key)
        plain["state"] = {}
        for full, value in saved.read(wanted).items():
            number, key = places[full]
            plain["state"].setdefault(number, {})[key] = value
        return lambda: self._optimizer.load_state_dict({**plain, "ice_engine": extra})

    def _fitted(self, groups: Any, extra: Any) -> tuple[dict[str, Any], Any]:
        """Return a state dict of this optimizer's groups, in which the name of what was saved stands for the state."""
        state: dict[int, str] = {}
        numbered = []
        for group in groups:
            first = len(state)
            state.update(enumerate(group["param_names"], first))
            numbered.append({**group, "params": list(range(first, len(state)))})
        plain, extra = unpack({"state": state, "param_groups": numbered, "ice_engine": extra})
        own = self._names()
        mend = f"To begin it anew, leave {self._name!r} out of what is loaded"
        plain, _ = fit(self._optimizer.inner, own, plain, extra, strict=True, mend=mend)
        named = [{**g, "param_names": names} for g, names in zip(plain["param_groups"], own, strict=True)]
        return {**plain, "param_groups": named}, extra


def _by_parameter(prefix: str, keys: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for full in keys:
        if full.startswith(prefix):
            name, _, key = full.removeprefix(prefix).rpartition(".")
            found.setdefault(name, []).append(key)
    return found


class _Other:
    """Whatever has a ``state_dict`` of plain data; all ranks load that of rank 0."""

    def __init__(self, name: str, value: Any) -> None:
        self._name, self._value = name, value

    def entries(self) -> Iterator[tuple[str, Any]]:
        if world.rank() == 0:
            yield self._name, plain(self._name, self._value.state_dict())

    def read(self, saved: Parts) -> Callable[[], Any]:
        state = saved.read({self._name: None})[self._name]
        return lambda: self._value.load_state_dict(state)
