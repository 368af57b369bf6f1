"""What a checkpoint holds of each object, and how the object gets it back, whatever it is spread over."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Engine
from ignite.metrics import Metric
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from ice_engine.distributed import world
from ice_engine.distributed.gathered import fully_sharded, gather_anew
from ice_engine.distributed.plain import plain
from ice_engine.distributed.shards import is_sharded, is_zero
from ice_engine.errors import CheckpointError
from ice_engine.of_engine import optimizers_of
from ice_engine.optimizer import Optimizer
from ice_engine.run_position import load_engine
from ice_engine.wrappers import bare


def collect(objects: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Return the states of *objects* as plain data: whole on *rank*, which saves. Call on every rank.

    Raises:
        CheckpointError: Naming the first entry that cannot be saved.
    """
    return {name: plain(name, _each(value, lambda saved: _state(saved, rank))) for name, value in objects.items()}


def _each(value: Any, function: Callable[[Any], Any]) -> Any:
    """Return what *function* makes of every object in *value*, as Ignite goes through dicts and lists of them."""
    if isinstance(value, Mapping):
        return {key: _each(item, function) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_each(item, function) for item in value]
    return function(value)


def _state(saved: Any, rank: int) -> Any:
    if isinstance(saved, Optimizer):
        return saved.state_dict(rank)
    if is_zero(saved):
        saved.consolidate_state_dict(to=rank)
        return saved.state_dict() if rank == world.rank() else {}
    if not isinstance(saved, torch.nn.Module):
        return saved.state_dict()
    state = bare(saved).state_dict()
    for key, value in state.items():
        if is_sharded(value):  # all ranks put each one together, one has a use for it
            whole = value.full_tensor()
            state[key] = whole.cpu() if rank == world.rank() else torch.empty(0)
    return state


def load(objects: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Give every one of *objects* its state in *content*.

    Raises:
        CheckpointError: If one is missing there; nothing is loaded then.
    """
    missing = [name for name in objects if name not in content]
    if missing:
        message = f"it lacks {', '.join(missing)} of to_save; it has: {', '.join(map(str, content))}"
        raise CheckpointError(message)
    for name, value in objects.items():
        _load(value, content[name])


def start_over(objects: Mapping[str, Any], trainer: Engine | None) -> None:
    """Let engines inside of the *trainer*'s that were at their end begin anew, as they would, with all they step."""
    found: list[Any] = []
    _each(dict(objects), found.append)
    for engine in (saved for saved in found if isinstance(saved, Engine) and saved is not trainer):
        if engine._is_done(engine.state):  # noqa: SLF001 - no public way to it
            for optimizer in optimizers_of(engine):
                optimizer.start_over()


def without_model(objects: Mapping[str, Any]) -> list[str]:
    """Return the names of the optimizers in *objects* none of whose parameters are of a module there."""
    found: list[Any] = []
    _each(dict(objects), found.append)
    known = {id(p) for module in found if isinstance(module, torch.nn.Module) for p in module.parameters()}
    optimizers = (optimizer for optimizer in found if isinstance(optimizer, Optimizer))
    return [o.name for o in optimizers if known.isdisjoint(id(p) for g in o.param_groups for p in g["params"])]


def _load(value: Any, state: Any) -> None:
    if isinstance(value, torch.nn.Module):
        gather_anew(fully_sharded(value))  # or else it may have whole parameters, such as of a validation, for a while
    if isinstance(value, Mapping):
        for key, item in value.items():
            _load(item, state[key])
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item, each in zip(value, state, strict=True):
            _load(item, each)
    elif isinstance(value, Engine):
        load_engine(value, state)
    elif isinstance(value, torch.nn.Module) and any(is_sharded(p) for p in value.parameters()):
        set_model_state_dict(value, state, options=StateDictOptions(full_state_dict=True))
    elif isinstance(value, torch.nn.Module):
        bare(value).load_state_dict(state)
    else:
        if isinstance(value, Metric):
            _make_room(value, state)
        value.load_state_dict(state)


def _make_room(metric: Metric, state: Any) -> None:
    """Ignite loads a list, such as a metric's predictions, only into one as long, and a new metric's is empty."""
    for of_rank in state.values():  # one entry, under a name of Ignite's own
        for key, value in of_rank[min(world.rank(), len(of_rank) - 1)].items():
            found = getattr(metric, key, None)
            if isinstance(value, list) and isinstance(found, list) and len(found) != len(value):
                setattr(metric, key, [None] * len(value))
