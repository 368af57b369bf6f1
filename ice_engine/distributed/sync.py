"""Where the gradients of all ranks become one: DDP's and FSDP2's own reduction, switched on where a window closes.

Both average over ranks. While a window accumulates, their reduction is off; at its last micro-batch it is on, so that
one backward reduces the whole window, while it still computes. Where a window closes without such a backward, as at the
end of data whose length nobody knew, what DDP would have done is done here.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ice_engine.arguments import choice
from ice_engine.distributed.world import own_group, rank, world_size
from ice_engine.errors import AttachError, BackwardError

Sync = Literal["communication", "memory"]
"""What accumulation saves: ``"communication"`` reduces once a window, ``"memory"`` every micro-batch of shards."""

_BUCKET = 8 * 1024 * 1024  # elements that are reduced at once


class Synchroniser(Protocol):
    """How the gradients of one model get from rank to rank."""

    model: Any
    """The module."""

    together: bool
    """Whether even a forward needs all ranks, so that none may have a micro-batch more than the others."""

    reduces: bool
    """Whether a backward reduces now."""

    always: bool
    """Whether every micro-batch does, and not only the last of a window."""

    again: Callable[[], object]
    """Called before one more backward reduces in a micro-batch that has had one: other ranks may have fewer losses."""

    @property
    def is_bypassed(self) -> bool:
        """Whether no forward has gone through the model since a backward is to reduce, which then cannot."""

    def on(self, last: bool) -> None:
        """Let the next forward and backward reduce if it is the *last* of a window."""

    def before_backward(self, loss: torch.Tensor) -> None:
        """Get ready for one more backward of a micro-batch, that of *loss*."""

    def follow_forward(self) -> None:
        """Take part in what the other ranks' forward sends, if none of this rank has."""

    def take_part(self, loss: torch.Tensor | None = None) -> None:
        """Take part with zeros in the reduction that the other ranks' backward makes."""

    def reduce(self, parameters: Sequence[torch.Tensor]) -> bool:
        """Average gradients that no backward has reduced; return whether that could be done."""

    def complete(self, parameters: Sequence[torch.Tensor]) -> None:
        """Average what a backward that reduced has left out."""

    def settle(self) -> None:
        """Do, where all ranks are, what would need them all at the next forward."""

    def layout(self) -> list[int]:
        """Return the order of parameters in what is reduced at once, if that is not the same from the beginning on."""

    def lay_out(self, order: Sequence[int]) -> None:
        """Reduce from the beginning on in *order*, from :meth:`layout` in another process; needs all ranks."""


class DDPSync:
    """Drives a ``DistributedDataParallel``.

    Args:
        model: The module.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        self.model: Any = model
        self.again: Callable[[], object] = bool
        self.reduces = True
        # A static graph is the one that DDP sees reduced first, and stays so: every backward needs all ranks. To save
        # memory there is nothing to reduce for in between: gradients are whole on every rank, and those of a rank with
        # fewer losses would be waited for.
        self.always = self.together = bool(self.model.static_graph)
        self._used = self._settled = False
        self._unsent: object = None
        self._reduced = {id(p) for p in model.parameters() if p.requires_grad}
        logged: Any = self.model._get_ddp_logging_data  # noqa: SLF001 - no public way to it
        known = logged().get("num_parameter_tensors")
        if known is not None and known != len(self._reduced):
            message = (
                f"DistributedDataParallel reduces the {known} parameters that required grad when it was made; now "
                f"{len(self._reduced)} do. Freeze and unfreeze before, or wrap the module again"
            )
            raise AttachError(message)

    def on(self, last: bool) -> None:
        """Let the next forward and backward reduce if it is the *last* of a window."""
        self.model.require_backward_grad_sync = self.reduces = last or self.always
        self._used, self._unsent = False, self.model.modules_buffers
        # DDP sends buffers in the first forward after a reduction, when perhaps not every rank has data: here it is in
        # the forward of the reduction itself.
        # 1 is True to DDP, whose forward puts True.
        self.model.require_forward_param_sync = int(last)

    @property
    def is_bypassed(self) -> bool:
        """Whether no forward that is to be differentiated has gone through DDP since it is to reduce."""
        model = self.model
        # Of these two, which have no public names, its forward notes nothing.
        if self._used or model._use_python_reducer or model._delay_all_reduce_all_params:  # noqa: SLF001 - as said
            return False
        return self.model.require_forward_param_sync is not True

    def before_backward(self, loss: torch.Tensor) -> None:
        """Get ready for one more backward of a micro-batch; DDP itself would reduce the first one only."""
        if self.reduces and self._used:
            self.again()
            self.settle()  # what DDP notes of its first backward for its buckets must be of one
            self.model.reducer.prepare_for_backward([loss] if self.model.find_unused_parameters else [])
        self._used = True

    def follow_forward(self) -> None:
        """Take part in sending buffers, which DDP's forward does first, if this rank has come to none."""
        # It makes this list anew when it sends, and says so nowhere else if the module's own forward raises.
        if self.model.modules_buffers is self._unsent and self.model.will_sync_module_buffers():
            self.model._sync_buffers()  # noqa: SLF001 - no public way to it

    def take_part(self, loss: torch.Tensor | None = None) -> None:  # noqa: ARG002 - needs none
        """Take part with zeros in the reduction that the other ranks' backward makes."""
        self._differentiate_zeros([p for p in self.model.module.parameters() if p.requires_grad])

    def reduce(self, parameters: Sequence[torch.Tensor]) -> bool:
        """Average gradients that no backward has reduced."""
        if self.model.find_unused_parameters:
            # It has noted what was used since it reduced, and must be through with that.
            own = [p for p in parameters if p.requires_grad and id(p) in self._reduced]
            self._differentiate_zeros([p for p, here in zip(own, present(own), strict=True) if here])
            self.complete(parameters)
        else:
            average(parameters, self.model.process_group)
        return True

    def complete(self, parameters: Sequence[torch.Tensor]) -> None:
        """Average the gradients that DDP does not know of: of *parameters* that required none when it was made."""
        late = [p for p in parameters if p.requires_grad and id(p) not in self._reduced]
        if late:
            average(late, self.model.process_group)

    def settle(self) -> None:
        """Let DDP agree on its buckets now; it would in the next forward, where a rank may be missing."""
        if not self._settled:
            # Not before it has reduced, which may be late, if the first windows were reduced here.
            self._settled = self.model.reducer._rebuild_buckets()  # noqa: SLF001 - no public way to it

    def layout(self) -> list[int]:
        """Return the parameters, by number, in the order of the buckets that DDP made of its first reduction.

        Which numbers are added up in which order depends on where in a bucket they are: from three ranks on, buckets of
        another layout give another rounding.
        """
        if not self._settled:
            return []
        self.model.logger.set_runtime_stats_and_log()  # else it says so only from the next forward on
        buckets = self.model._get_ddp_logging_data().get("rebuilt_per_bucket_param_indices", "")  # noqa: SLF001
        return [int(index) for index in buckets.replace(",", " ").split()]

    def lay_out(self, order: Sequence[int]) -> None:
        """Let DDP make its buckets, as it would after a first reduction in which gradients came in *order*.

        One of zeros is made: no forward runs, nothing is drawn at random, and gradients stay what they are.
        """
        parameters = [p for p in self.model.module.parameters() if p.requires_grad]
        if self._settled or self.model.static_graph or sorted(order) != list(range(len(parameters))):
            return
        before = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        self.on(last=True)
        # Of several gradients that are at hand, autograd takes the one whose graph was made last.
        self._differentiate_zeros([parameters[index] for index in reversed(order)])
        self.settle()
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient

    def _differentiate_zeros(self, parameters: Sequence[torch.Tensor]) -> None:
        reached = [p.view_as(p) for p in parameters]  # a graph, for DDP to see that all of them are used
        # As the forward does that this rank may not have had.
        self.model.reducer.prepare_for_backward(reached if self.model.find_unused_parameters else [])
        torch.autograd.backward(reached, [torch.zeros_like(p) for p in parameters])


class FSDPSync:
    """Drives a module that ``fully_shard`` was applied to.

    Args:
        model: The module.
        sync: What accumulation saves.
    """

    together = True
    is_bypassed = False

    def __init__(self, model: FSDPModule, sync: Sync) -> None:
        self.model: Any = model
        self.again: Callable[[], object] = bool
        self.reduces = True
        self.always = sync == "memory"
        self._behind = False

    def on(self, last: bool) -> None:
        """Let the next forward and backward reduce if it is the *last* of a window."""
        self.reduces = last or self.always
        self.model.set_requires_gradient_sync(self.reduces)

    def before_backward(self, loss: torch.Tensor) -> None:  # noqa: ARG002 - needs none
        """Note whether this one reduces what was accumulated, or leaves more."""
        self._behind = not self.reduces

    def follow_forward(self) -> None:
        """Do nothing: what a forward gathers, only one can."""

    def take_part(self, loss: torch.Tensor | None = None) -> None:
        """Differentiate *loss* with gradient 0; without one there is nothing to take part with."""
        if loss is not None:
            torch.autograd.backward(loss, torch.zeros_like(loss))
            return
        message = (
            f"rank {rank()} called no backward() in an iteration in which others did; every forward and backward of a "
            "fully_shard'ed model needs all ranks. Call it on all, with weight=0 where there is nothing to learn"
        )
        raise BackwardError(message)

    def reduce(self, parameters: Sequence[torch.Tensor]) -> bool:  # noqa: ARG002 - reduced already, or out of reach
        """Return whether the last backward has reduced; what was not, nobody can reach."""
        return not self._behind

    def complete(self, parameters: Sequence[torch.Tensor]) -> None:
        """Do nothing: hooks are on all parameters."""

    def settle(self) -> None:
        """Do nothing: nothing is left for the next forward."""

    def layout(self) -> list[int]:
        """Return nothing: what is reduced at once is a matter of the modules."""
        return []

    def lay_out(self, order: Sequence[int]) -> None:
        """Do nothing."""


class NoSync:
    """For tensor parallelism alone: every rank has the gradients of its shards, of the same data."""

    together = True
    reduces = always = is_bypassed = False

    def __init__(self, model: torch.nn.Module) -> None:
        self.model: Any = model
        self.again: Callable[[], object] = bool

    def on(self, last: bool) -> None:
        """Do nothing."""

    def before_backward(self, loss: torch.Tensor) -> None:
        """Do nothing."""

    def complete(self, parameters: Sequence[torch.Tensor]) -> None:
        """Do nothing."""

    def follow_forward(self) -> None:
        """Do nothing."""

    def take_part(self, loss: torch.Tensor | None = None) -> None:
        """Do nothing."""

    def reduce(self, parameters: Sequence[torch.Tensor]) -> bool:  # noqa: ARG002 - nothing to reduce
        """Do nothing."""
        return True

    def settle(self) -> None:
        """Do nothing."""

    def layout(self) -> list[int]:
        """Return nothing."""
        return []

    def lay_out(self, order: Sequence[int]) -> None:
        """Do nothing."""


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
        return NoSync(inner)
    given = "no model" if model is None else f"a {type(model).__name__}, whose gradients nobody reduces"
    message = (
        f"this is rank {rank()} of {world_size()} and attach() was given {given}: every rank would train a model of "
        "its own. Pass the wrapped module: optimizer.attach(engine, model=DistributedDataParallel(model)), or "
        "idist.auto_model(model), or one that fully_shard was applied to"
    )
    raise AttachError(message)


def _require_its_own(model: Any, parameters: Iterable[torch.Tensor]) -> None:
    its_own = {id(p) for p in model.parameters()}
    if not any(id(p) in its_own for p in parameters):
        message = (
            f"attach() was given a {type(model).__name__} that has none of the optimizer's parameters, and so reduces "
            "no gradient of theirs: give it the module that is trained, and make the optimizer of that module's "
            "parameters, after fully_shard if that is applied"
        )
        raise AttachError(message)


@torch.no_grad()
def average(parameters: Sequence[torch.Tensor], group: dist.ProcessGroup) -> None:
    """Average the gradients of *parameters* over the ranks of *group*; one that a rank has none of counts as 0.

    A parameter that no rank has a gradient of keeps None.
    """
    parameters = [p for p in parameters if p.requires_grad]
    for bucket in _buckets([p for p, here in zip(parameters, present(parameters), strict=True) if here]):
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).to_dense().flatten() for p in bucket])
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
        for parameter, part in zip(bucket, torch.split(flat, [p.numel() for p in bucket]), strict=True):
            if parameter.grad is None or parameter.grad.is_sparse:
                parameter.grad = part.view_as(parameter).clone()
            else:
                parameter.grad.copy_(part.view_as(parameter))


def present(parameters: Sequence[torch.Tensor]) -> list[bool]:
    """Return which of *parameters* have a gradient on any rank."""
    found = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=own_group())
    return [bool(here) for here in found.tolist()]


def _buckets(parameters: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    filled: dict[tuple[torch.device, torch.dtype], list[list[torch.Tensor]]] = {}
    for parameter in parameters:
        same = filled.setdefault((parameter.device, parameter.dtype), [[]])
        if same[-1] and sum(p.numel() for p in same[-1]) + parameter.numel() > _BUCKET:
            same.append([])
        same[-1].append(parameter)
    return [bucket for same in filled.values() for bucket in same]
