"""The optimizer's state dict: torch's own layout, names of parameters, and one key of ours."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NoReturn

import torch

from ice_engine.errors import NotConsolidatedError, StateDictError

VERSION = 1


def pack(state: dict[str, Any], names: list[list[str]], extra: dict[str, Any]) -> dict[str, Any]:
    """Return torch's *state* with ``param_names`` in every group and *extra* under ``ice_engine``."""
    groups = [{**group, "param_names": list(own)} for group, own in zip(state["param_groups"], names, strict=True)]
    return {**state, "param_groups": groups, "ice_engine": {"version": VERSION, **extra}}


def stub(rank: int) -> dict[str, Any]:
    """Return what stands for the state on ranks that do not hold it; :func:`unpack` refuses it."""
    return _Stub(ice_engine={"version": VERSION, "consolidated_on": rank})


class _Stub(dict[str, Any]):
    """Says who has the state to whoever takes it for one, such as torch's own functions."""

    def __missing__(self, key: str) -> NoReturn:
        message = (
            f"this rank has no {key!r} of the optimizer: its whole state is on rank "
            f"{self['ice_engine']['consolidated_on']}. torch's get_state_dict() and set_state_dict() go by what each "
            "rank holds of a fully_shard'ed model: give them optimizer.inner, on all ranks"
        )
        raise NotConsolidatedError(message)

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), None, None, iter(self.items())  # for what loads with weights_only=True


def unpack(state: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Split *state* into torch's part and ours, None where a plain optimizer saved it.

    Raises:
        NotConsolidatedError: If it is the stub of a rank that does not hold the whole state.
        StateDictError: If it is no optimizer's, or of another version.
    """
    if not isinstance(state, Mapping):
        message = f"state_dict must be a dict, got {type(state).__name__}"
        raise StateDictError(message)
    plain = {key: value for key, value in state.items() if key != "ice_engine"}
    extra = state.get("ice_engine")
    if extra is not None:
        _check_extra(extra)
    missing = [key for key in ("state", "param_groups") if key not in plain]
    if missing:
        message = (
            f"not an optimizer's state dict: {' and '.join(missing)} missing; it has {', '.join(map(str, plain))}. "
            "Of a checkpoint, give it the optimizer's part: optimizer.load_state_dict(checkpoint['optimizer'])"
        )
        raise StateDictError(message)
    try:
        whole = all(isinstance(group, Mapping) and len(group["params"]) >= 0 for group in plain["param_groups"])
    except (TypeError, KeyError):
        whole = False
    if not whole:
        message = (
            f"not an optimizer's state dict: its param_groups are {type(plain['param_groups']).__name__}, not groups"
        )
        raise StateDictError(message)
    return plain, extra


def keep_precision_of_counts(
    state: Mapping[torch.Tensor, dict[str, Any]], groups: list[dict[str, Any]], plain: dict[str, Any]
) -> None:
    """Give what an optimizer counts per parameter, such as NAdam's ``mu_product``, the type it was saved with.

    Torch casts it to the parameter's, ``step`` alone excepted: in bfloat16 it would be another number, and in float64
    the next one.

    Args:
        state: Of the optimizer that has loaded *plain*.
        groups: Its param groups.
        plain: Torch's part of a state dict.
    """
    for saved, group in zip(plain["param_groups"], groups, strict=True):
        for number, parameter in zip(saved["params"], group["params"], strict=True):
            loaded, counts = state.get(parameter, {}), _counts(plain["state"].get(number, {}), parameter)
            for key in counts.keys() & loaded.keys():
                if loaded[key].dtype != counts[key].dtype:
                    loaded[key] = counts[key].to(loaded[key].device)


def _counts(saved: Mapping[str, Any], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    numbers = {k: v for k, v in saved.items() if isinstance(v, torch.Tensor) and not v.ndim and k != "step"}
    if parameter.ndim:
        return numbers
    # Its moments are numbers as well, of its type; counts are in single precision.
    if parameter.dtype not in {number.dtype for number in numbers.values()}:
        return {}  # saved with another type, that torch has cast
    return {key: number for key, number in numbers.items() if number.dtype == torch.float32}


def gradients_in(extra: Mapping[str, Any] | None) -> Mapping[int, Any]:
    """Return the gradients of the open window that *extra* was saved in, by the place of their parameter."""
    found: Mapping[int, Any] = {} if extra is None else extra["window"].get("gradients", {})
    return found


def _check_extra(extra: Any) -> None:
    if not isinstance(extra, Mapping):
        message = f"the state dict's 'ice_engine' must be a dict, got {type(extra).__name__}"
        raise StateDictError(message)
    if "consolidated_on" in extra:
        message = f"this is a stub: the whole state is on rank {extra['consolidated_on']}; load what was saved there"
        raise NotConsolidatedError(message)
    if extra.get("version") != VERSION:
        message = (
            f"state dict of version {extra.get('version')!r}, this ice_engine reads {VERSION}; install a newer one"
        )
        raise StateDictError(message)
    try:
        whole = set(extra["clocks"]) == {"step", "attempt", "skipped", "iteration"}
        whole = whole and all(isinstance(count, int) and count >= 0 for count in extra["clocks"].values())
        whole = whole and (extra["grad_scaler"] is None or {"scale", "_growth_tracker"} <= set(extra["grad_scaler"]))
        whole = whole and isinstance(extra["window"]["micro_batches"], int) and _is_window(extra["window"])
        whole = whole and isinstance(extra["consecutive_skips"], int) and "grad_scaler" in extra
        whole = whole and all(isinstance(shape, list | tuple) for shape in extra.get("shapes", {}).values())
        noise = extra.get("noise", (0.0, 0.0, 0.0))
        whole = whole and [isinstance(value, int | float) for value in noise] == [True] * 3
        measured = [value for values in extra.get("measurements", {}).values() for value in values]
        whole = whole and all(isinstance(value, int | float) for value in measured)
        whole = whole and ("horizon" not in extra or _is_horizon(extra["horizon"]))
    except (TypeError, KeyError, AttributeError):
        whole = False
    if not whole:
        brief = {key: value for key, value in extra.items() if key not in {"shapes", "window"}}  # which fill pages
        message = f"the state dict's 'ice_engine' is damaged: {brief!r}; load another checkpoint"
        raise StateDictError(message)


def _is_window(window: Any) -> bool:
    gradients = window.get("gradients", {})
    whole = all(isinstance(i, int) and isinstance(gradient, torch.Tensor) for i, gradient in gradients.items())
    return whole and ("gradients" not in window or {"unit", "spread", "weighted", "losses", "first"} <= set(window))


def _is_horizon(horizon: Any) -> bool:
    run, plan = set(horizon["run"]), set(horizon["plan"])
    lengths = {"epoch_length", "max_epochs", "max_iters"}
    shown = lengths | {"epoch_size", "total_steps"}
    whole = lengths | {"accumulation_steps", "tail"} <= run and shown <= plan
    whole = whole and isinstance(horizon["processors"], list)
    counts = [part[key] for part in (horizon["run"], horizon["plan"]) for key in shown if key in part]
    # 0 steps: windows longer than the epoch, with tail="drop".
    return whole and all(count is None or (isinstance(count, int) and count >= 0) for count in counts)
