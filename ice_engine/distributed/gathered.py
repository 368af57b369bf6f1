"""Whole parameters that FSDP2 has gathered, and what it has noted of them: taken anew where they have changed.

The root of a ``fully_shard``'ed model keeps what its forward has gathered until a backward comes back to it. Where none
does, as after ``detach()`` or ``no_grad()``, its next forward would compute with what they were before a step, and let
require grad what did then.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from ice_engine.distributed.shards import is_sharded
from ice_engine.errors import AttachError


def fully_sharded(*models: torch.nn.Module) -> list[FSDPModule]:
    """Return the modules of *models* that ``fully_shard`` was applied to."""
    return [module for model in models for module in model.modules() if isinstance(module, FSDPModule)]


def require_unsharded(parameters: Iterable[torch.Tensor]) -> None:
    """Refuse *parameters* of a model that is not known, and so would not gather them anew.

    Raises:
        AttachError: If one is sharded, be it over one process.
    """
    if any(is_sharded(parameter) for parameter in parameters):
        message = (
            "attach() was given no model, and the optimizer has parameters that are sharded (DTensor): after a step, "
            "fully_shard may go on with those of before that it has gathered. Pass the module, as in many processes: "
            "optimizer.attach(engine, model=model)"
        )
        raise AttachError(message)


def param_groups(modules: Iterable[FSDPModule]) -> Iterator[Any]:
    """Yield what FSDP2 gathers at once of *modules*."""
    for module in modules:
        state: Any = module._get_fsdp_state()  # noqa: SLF001 - no public way there
        several = getattr(state, "_fsdp_param_groups", None)  # before torch 2.12 each has one
        groups = [state._fsdp_param_group] if several is None else several  # noqa: SLF001 - no public way there
        yield from (group for group in groups if group)


def keep_flags(modules: Iterable[FSDPModule]) -> None:
    """Let require grad what does of *modules* as they are: FSDP2 forgets it of whole parameters when these go."""
    for group in param_groups(modules):
        for held in () if group.is_sharded else group.fsdp_params:
            info = held._module_info  # noqa: SLF001 - no public way to the parameter that the module has now
            held.sharded_param.requires_grad_(getattr(info.module, info.param_name).requires_grad)


def gather_anew(modules: Sequence[FSDPModule]) -> None:
    """Let the next forward of *modules* take their parameters as they are now: values, and what requires grad."""
    if modules:  # mostly there are none, in every step
        keep_flags(modules)
    for module in modules:
        module.reshard()
        for group in param_groups([module]):
            # The type of its gradients, which the first forward looks up; None if nothing required any then.
            if getattr(group, "_orig_dtype", False) is None:
                group._init_mp_dtypes()  # noqa: SLF001 - no public way to look them up again
