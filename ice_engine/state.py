"""The optimizer's state dict: torch's own layout, names of parameters, and one key of ours."""

from typing import Any

from ice_engine.errors import NotConsolidatedError, StateDictError

VERSION = 1


def pack(state: dict[str, Any], names: list[list[str]], extra: dict[str, Any]) -> dict[str, Any]:
    """Return torch's *state* with ``param_names`` in every group and *extra* under ``ice_engine``."""
    groups = [{**group, "param_names": list(own)} for group, own in zip(state["param_groups"], names, strict=True)]
    return {**state, "param_groups": groups, "ice_engine": {"version": VERSION, **extra}}


def unpack(state: dict[str, Any], sizes: list[int]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Split *state* into torch's part and ours, None where a plain optimizer saved it.

    Args:
        state: A state dict.
        sizes: Number of parameters in each group it is meant for.

    Raises:
        NotConsolidatedError: If it is the stub of a rank that does not hold the whole state.
        StateDictError: If it is no optimizer's, of another version, or of other param groups.
    """
    plain = {key: value for key, value in state.items() if key != "ice_engine"}
    extra = state.get("ice_engine")
    if extra is not None and "consolidated_on" in extra:
        message = f"this is a stub: the whole state is on rank {extra['consolidated_on']}; load what was saved there"
        raise NotConsolidatedError(message)
    missing = [key for key in ("state", "param_groups") if key not in plain]
    if missing:
        message = f"not an optimizer's state dict: {' and '.join(missing)} missing; it has {', '.join(map(str, plain))}"
        raise StateDictError(message)
    if extra is not None and extra.get("version") != VERSION:
        message = (
            f"state dict of version {extra.get('version')!r}, this ice_engine reads {VERSION}; install a newer one"
        )
        raise StateDictError(message)
    saved = [len(group["params"]) for group in plain["param_groups"]]
    if saved != sizes:
        message = (
            f"the state dict's param groups have {saved} parameters, the optimizer's {sizes}; "
            "build the optimizer with the groups it was saved with"
        )
        raise StateDictError(message)
    return plain, extra
