"""Which way the gradients of a model take from rank to rank."""

import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ice_engine.arguments import choice
from ice_engine.distributed.ddp import DDPSync
from ice_engine.distributed.fsdp import FSDPSync
from ice_engine.distributed.synchroniser import Sync, Synchroniser
from ice_engine.distributed.world import rank, world_size
from ice_engine.errors import AttachError


def synchroniser(model: torch.nn.Module | None, parameters: Iterable[torch.Tensor], sync: Sync) -> Synchroniser:
    """Return what drives the gradient reduction of *model*.

    Raises:
        ArgumentValueError: If *sync* is none of the two.
        AttachError: If nothing reduces the gradients, so that every rank would train a model of its own, or *model*
            has none of *parameters*.
    """
    choice("sync", sync, ("communication", "memory"))
    inner: Any = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    if isinstance(inner, DistributedDataParallel | FSDPModule):
        _require_its_own(inner, parameters)
    if isinstance(inner, DistributedDataParallel):
        _require_no_other(inner, parameters)
        return DDPSync(inner)
    if isinstance(inner, FSDPModule):
        return FSDPSync(inner, sync)
    if model is not None and any(isinstance(p, DTensor) for p in parameters):
        if any(isinstance(module, FSDPModule) for module in model.modules()):
            message = (
                "only parts of the model are fully_shard'ed, not the module itself; call fully_shard(model) on it as "
                "well, after its parts"
            )
            raise AttachError(message)
        return Synchroniser(inner)
    given = "no model" if model is None else f"a {type(model).__name__}, whose gradients nobody reduces"
    message = (
        f"this is rank {rank()} of {world_size()} and attach() was given {given}: every rank would train a model of "
        "its own. Pass the wrapped module: optimizer.attach(engine, model=DistributedDataParallel(model)), or "
        "idist.auto_model(model), or one that fully_shard was applied to"
    )
    raise AttachError(message)


def _require_its_own(model: Any, parameters: Iterable[torch.Tensor]) -> None:
    if not _ids(model.parameters()) & _ids(parameters):
        message = (
            f"attach() was given a {type(model).__name__} that has none of the optimizer's parameters, and so reduces "
            "no gradient of theirs: give it the module that is trained, and make the optimizer of that module's "
            "parameters, after fully_shard if that is applied"
        )
        raise AttachError(message)


def _require_no_other(model: DistributedDataParallel, parameters: Iterable[torch.Tensor]) -> None:
    """Refuse parameters that another DistributedDataParallel reduces, whenever it has a forward and a backward."""
    beside = _ids(parameters) - _ids(model.parameters())
    if not beside:
        return
    # Nobody keeps a list of them. By type(), as asking some objects for their class imports what they stand for.
    wrapped = [each for each in gc.get_objects() if issubclass(type(each), DistributedDataParallel)]
    if any(beside & _ids(each.parameters()) for each in wrapped if each is not model):
        message = (
            "the optimizer has parameters of several DistributedDataParallel modules, and attach() drives one: the "
            "others would reduce in every backward, and wait for ranks without data. Give each an optimizer of its own "
            "(for a loss of both, a.backward(loss, retain_graph=True), then b.backward(loss)), or wrap one module that "
            "has them all, and whose forward calls them"
        )
        raise AttachError(message)


def _ids(parameters: Iterable[torch.Tensor]) -> set[int]:
    return {id(parameter) for parameter in parameters}
