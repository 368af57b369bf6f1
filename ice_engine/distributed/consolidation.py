"""The state of a sharded optimizer: whole on the rank that saves, and from there to any other layout.

Tensor by tensor, straight to that rank, as snapshots. What a plain optimizer would save comes out: ZeRO's state is
that of different parameters on each rank, which are put side by side; FSDP2's are pieces of each tensor, which are put
together. CUDA tensors go through the CPU (not run here: there was neither CUDA nor NCCL).
"""

import contextlib
import json
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch.distributed.tensor import DTensor

from ice_engine.distributed import wire, world
from ice_engine.distributed.agreement import announce
from ice_engine.distributed.pieces import box, cut, distribute, is_first_copy
from ice_engine.distributed.rounds import rounds
from ice_engine.distributed.shards import is_sharded, is_zero
from ice_engine.errors import StateDictError

Keys = tuple[Any, ...]
"""The keys that lead to a value of the state: number of the parameter, name, and so on."""


def is_spread(optimizer: torch.optim.Optimizer) -> bool:
    """Whether no rank holds the whole state of *optimizer*."""
    return is_zero(optimizer) or any(is_sharded(p) for group in optimizer.param_groups for p in group["params"])


def consolidate(optimizer: torch.optim.Optimizer, rank: int, name: str = "optimizer") -> dict[str, Any] | None:
    """Gather the whole state of a sharded optimizer on one rank; to be called on all.

    Args:
        optimizer: With its state sharded over ranks.
        rank: Which one gets it.
        name: Of the optimizer, for errors.

    Returns:
        On *rank*, the state dict of the plain optimizer, a copy on the CPU; elsewhere None.

    Raises:
        RankError: If a rank does not call this, or has state that cannot be sent.
    """
    own = _local_state_dict(optimizer)
    # Packed on the rank that saves as well: what cannot be sent is an error wherever it happens to lie.
    try:
        (text, tensors), problem = _parcel(own["state"], whole=is_zero(optimizer)), ""
    except StateDictError as error:
        text, tensors, problem = "", [], str(error)
    announce(f"state_dict(rank={rank}) of optimizer {name!r}{_extent(optimizer, own)}", problem)
    with rounds().transfer() if world.world_size() > 1 else contextlib.nullcontext():
        return _gathered(own, text, tensors, rank)


def _gathered(own: dict[str, Any], text: str, tensors: Sequence[torch.Tensor], rank: int) -> dict[str, Any] | None:
    if world.rank() != rank:
        wire.send(text, tensors, rank)
        return None
    wholes: dict[Keys, torch.Tensor] = {}
    state = {number: _map(value, (number,), _snapshot(wholes)) for number, value in own["state"].items()}
    others = [other for other in range(world.world_size()) if other != rank]
    wire.receive_all([(r, _unpacked(json.loads(wire.receive_text(r)), state, wholes)) for r in others])
    groups = [{k: _map(v, (k,), _snapshot({})) for k, v in group.items()} for group in own["param_groups"]]
    return {**own, "state": _sorted(state), "param_groups": groups}


def resharded(optimizer: torch.optim.Optimizer, plain: dict[str, Any]) -> dict[str, Any]:
    """Lay the tensors of a whole state dict out as the parameters of *optimizer* are; no rank talks to another.

    Args:
        optimizer: That will load it. Parameters that are no DTensors get their state as it is.
        plain: The whole state in the optimizer's groups, the same on all ranks.

    Returns:
        A state dict that *optimizer* can load.
    """
    if not is_spread(optimizer):
        return plain
    state = dict(plain["state"])
    for saved, group in zip(plain["param_groups"], optimizer.param_groups, strict=True):
        for number, p in zip(saved["params"], group["params"], strict=True):
            if isinstance(p, DTensor) and number in state:
                state[number] = _map(state[number], (number,), _laid_out_as(p))
    return {**plain, "state": state}


def _laid_out_as(p: DTensor) -> Callable[[torch.Tensor, Keys], torch.Tensor]:
    def lay_out(tensor: torch.Tensor, keys: Keys) -> torch.Tensor:
        if isinstance(tensor, DTensor):
            return tensor
        if tensor.shape == p.shape and keys[-1] != "step":
            return distribute(tensor, p, sharded=True)
        # Counts are plain on every rank; what is else of another shape, such as Adafactor's rows, is whole on each.
        return distribute(tensor, p, sharded=False) if tensor.ndim else tensor

    return lay_out


def _local_state_dict(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    # A ZeroOptimizer's is the part that is here, numbered as in the whole.
    return dict(cast("Any", optimizer).local_state_dict() if is_zero(optimizer) else optimizer.state_dict())


def _extent(optimizer: torch.optim.Optimizer, own: dict[str, Any]) -> str:
    # Of pieces: those of a parameter must be on all ranks, or there is no whole.
    return "" if is_zero(optimizer) else f", with state of {len(own['state'])} parameters"


def _sorted(state: dict[Any, Any]) -> dict[Any, Any]:
    # In the order of parameters; what belongs to none of them comes last.
    return {
        **{number: state[number] for number in sorted(key for key in state if isinstance(key, int))},
        **{key: value for key, value in state.items() if not isinstance(key, int)},
    }


# -- the rank that saves --------------------------------------------------------------------------------------


def _map(value: Any, keys: Keys, leaf: Callable[[torch.Tensor, Keys], Any]) -> Any:
    """Return *value* with every tensor in it replaced."""
    if isinstance(value, torch.Tensor):
        return leaf(value, keys)
    if isinstance(value, dict):
        return {key: _map(entry, (*keys, key), leaf) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_map(entry, (*keys, i), leaf) for i, entry in enumerate(value))
    return value


def _snapshot(wholes: dict[Keys, torch.Tensor]) -> Callable[[torch.Tensor, Keys], torch.Tensor]:
    def take(tensor: torch.Tensor, keys: Keys) -> torch.Tensor:
        if not isinstance(tensor, DTensor):
            return tensor.detach().to("cpu", copy=True)
        # Room for all; its own piece comes from itself, the others from their ranks.
        wholes[keys] = whole = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        if is_first_copy(tensor):
            cut(whole, box(tensor)).copy_(tensor.to_local())
        return whole

    return take


def _unpacked(parcel: dict[str, Any], state: dict[Any, Any], wholes: dict[Keys, torch.Tensor]) -> list[torch.Tensor]:
    """Make room in *state* for what another rank sends, and return it in the order it comes."""
    rooms: list[torch.Tensor] = []
    for number, tree in parcel["state"]:
        state[number] = _decode(tree, rooms)
    rooms += [cut(wholes[(*keys,)], where) for keys, where in parcel["pieces"]]
    return rooms


def _decode(tree: dict[str, Any], rooms: list[torch.Tensor]) -> Any:
    ((kind, content),) = tree.items()
    match kind:
        case "tensor":
            dtype, shape, order = content
            room = torch.empty([shape[i] for i in order], dtype=getattr(torch, dtype), device="cpu")
            rooms.append(room)
            return room.permute([order.index(i) for i in range(len(order))])
        case "float":
            return float.fromhex(content)
        case "list":
            return [_decode(entry, rooms) for entry in content]
        case "tuple":
            return tuple(_decode(entry, rooms) for entry in content)
        case "dict":
            return {key: _decode(entry, rooms) for key, entry in content}
    return content


# -- the other ranks ------------------------------------------------------------------------------------------


def _parcel(state: dict[Any, Any], *, whole: bool) -> tuple[str, list[torch.Tensor]]:
    """Return what this rank sends: a text that says which tensors follow, and these."""
    tensors: list[torch.Tensor] = []
    if whole:
        trees = [[number, _encode(state[number], (number,), tensors)] for number in state if isinstance(number, int)]
        return json.dumps({"state": trees, "pieces": []}), tensors
    pieces: list[tuple[Keys, Any]] = []

    def collect(tensor: torch.Tensor, keys: Keys) -> None:
        if isinstance(tensor, DTensor):
            local, where = tensor.to_local(), box(tensor)
            _check(local, keys)
            if is_first_copy(tensor) and local.numel():
                pieces.append((keys, where))
                tensors.append(local)

    for number, value in state.items():
        _map(value, (number,), collect)
    return json.dumps({"state": [], "pieces": pieces}), tensors


def _encode(value: Any, keys: Keys, tensors: list[torch.Tensor]) -> dict[str, Any]:
    """Return *value* as JSON; its tensors are put aside as they lie in memory, channels_last and the like."""
    if isinstance(value, torch.Tensor):
        _check(value, keys)
        order = sorted(range(value.ndim), key=value.stride, reverse=True)
        if not value.permute(order).is_contiguous():
            order = list(range(value.ndim))
        tensors.append(value.permute(order))
        return {"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape), order]}
    if type(value) is float:
        return {"float": value.hex()}  # to the last bit, NaN and infinity too
    if value is None or type(value) in (bool, int, str):
        return {"value": value}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_encode(entry, (*keys, i), tensors) for i, entry in enumerate(value)]}
    if isinstance(value, dict) and all(type(key) in (int, str) for key in value):
        return {"dict": [[key, _encode(entry, (*keys, key), tensors)] for key, entry in value.items()]}
    message = (
        f"{_place(keys)} is {type(value).__name__}; only tensors, numbers, text and lists or dicts of them can be sent"
    )
    raise StateDictError(message)


def _check(tensor: torch.Tensor, keys: Keys) -> None:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        message = (
            f"{_place(keys)} is a {type(tensor).__name__} of layout {tensor.layout}; only dense tensors can be sent"
        )
        raise StateDictError(message)


def _place(keys: Keys) -> str:
    return "state" + "".join(f"[{key!r}]" for key in keys)
