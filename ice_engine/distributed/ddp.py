"""DDP's reduction, driven by windows: what DDP does by itself in a forward or a backward, where all ranks are."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ice_engine.distributed.averaging import average
from ice_engine.distributed.synchroniser import Synchroniser, sparse_tables
from ice_engine.distributed.world import world_size
from ice_engine.errors import AttachError, BackwardError

_SENDS = "_ice_sends_buffers"


class DDPSync(Synchroniser):
    """Drives a ``DistributedDataParallel``.

    Args:
        model: The module.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        super().__init__(model)
        self.ranks, self.reduces = dist.get_process_group_ranks(self.model.process_group), True
        # A static graph is the one that DDP sees reduced first, and stays so: every backward needs all ranks. To save
        # memory there is nothing to reduce for in between: gradients are whole on every rank, and those of a rank with
        # fewer losses would be waited for.
        self.always = self.together = bool(self.model.static_graph)
        # Of these two, which have no public names, a forward notes nothing.
        self._notes = not (self.model._use_python_reducer or self.model._delay_all_reduce_all_params)  # noqa: SLF001 - as said
        self._looks = self.model.find_unused_parameters and not self.always
        self._used = self._settled = False
        self._learned = _has_learned(self.model)
        # Inside of a run of another engine that trains the same module it is off, and what it was is noted there.
        self._sends = bool(vars(self.model).get(_SENDS, self.model.broadcast_buffers))
        self._reduced = {id(p) for p in model.parameters() if p.requires_grad}
        self._sparse = {id(table) for _, table in sparse_tables(model)}
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
        self.reduces = last or self.always
        # Else its forward would let the next backward reduce whatever that reaches: also of another model's loss, or in
        # a later micro-batch, where no backward follows.
        # The first one through a static graph has to: whatever backward comes next makes it reduce.
        prepares = not self._notes or (self.always and not self._learned)
        self.model.require_backward_grad_sync = self.reduces and prepares
        self._used = False
        # DDP sends buffers in each forward that follows one which is to be reduced; not every rank may have it.
        vars(self.model)[_SENDS] = self._sends
        self.model.broadcast_buffers = False
        if self.model.require_forward_param_sync is True:  # from before the run, in which its forward puts False
            self.model.require_forward_param_sync = 0

    def leave(self) -> None:
        """Let DDP reduce and send buffers by itself again."""
        super().leave()
        self.model.require_forward_param_sync = 0  # or the next forward would send buffers, perhaps on one rank only
        self.model.require_backward_grad_sync = True
        self.model.broadcast_buffers = vars(self.model).pop(_SENDS)

    @property
    def is_bypassed(self) -> bool:
        """Whether no forward has gone through DDP in this run."""
        return self._notes and not self._used and not isinstance(self.model.require_forward_param_sync, bool)

    def before_backward(self, loss: torch.Tensor) -> None:
        """Get ready for one more backward of a micro-batch; DDP itself would reduce the first one only."""
        if self.always and not self._learned and _has_learned(self.model):
            message = (
                "DistributedDataParallel(static_graph=True) learns from the first backward through it what to reduce, "
                "and that was not the one of this optimizer's loss: torch.autograd.grad() or another loss came before. "
                "Make it without static_graph"
            )
            raise BackwardError(message)
        if self.reduces and (self._notes or self._used):
            self.model.require_backward_grad_sync = not self._notes
            self._prepare([loss])
        self._used = self._learned = True

    def take_part(self, loss: torch.Tensor | None = None, *, retain_graph: bool = False) -> None:  # noqa: ARG002 - needs none
        """Take part with zeros in the reduction that the other ranks' backward makes."""
        self._differentiate_zeros([p for p in self.model.module.parameters() if p.requires_grad])
        self.after_backward()
        self._used = True

    def send_buffers(self) -> None:
        """Let buffers be those of rank 0, as they are to DDP."""
        if self._sends and self.model.modules_buffers:
            self.model._sync_buffers()  # noqa: SLF001 - no public way to it

    def reduce(self, parameters: Sequence[torch.Tensor]) -> None:
        """Average gradients that no backward has reduced."""
        average(parameters, self.model.process_group)

    def complete(self, parameters: Sequence[torch.Tensor]) -> None:
        """Average the gradients that DDP does not know of: of *parameters* that required none when it was made."""
        late = [p for p in parameters if p.requires_grad and id(p) not in self._reduced]
        if late:
            average(late, self.model.process_group)

    def after_backward(self) -> None:
        """Let DDP agree on its buckets now; it would in the next forward, where a rank may be missing."""
        if not self.reduces:
            return
        # Or else the step would come before the error, and an error of the last one never.
        self.model.reducer._check_reducer_finalized()  # noqa: SLF001 - no public way to it
        if not self._settled:
            # Not before it has reduced, which may be late, if the first windows were reduced here.
            self._settled = self.model.reducer._rebuild_buckets()  # noqa: SLF001 - likewise

    def samples(self) -> dict[str, list[float]]:
        """Return, by name, the first, a middle and the last entry of each parameter, where DDP spans all ranks."""
        ignored = self.model.parameters_to_ignore
        spans_all = self.model.process_group.size() == world_size()
        named = self.model.module.named_parameters() if spans_all else ()
        return {name: _entries(p.detach()) for name, p in named if p.numel() and name not in ignored}

    def layout(self) -> list[int]:
        """Return the parameters, by number, in the order of the buckets that DDP made of its first reduction.

        Which numbers are added up in which order depends on where in a bucket they are: from three ranks on, buckets of
        another layout give another rounding.
        """
        if not self._settled:
            return []
        # Else it says so only from the next forward on that prepares a reduction.
        self.model.reducer.prepare_for_forward()
        self.model.logger.set_runtime_stats_and_log()
        buckets = self.model._get_ddp_logging_data().get("rebuilt_per_bucket_param_indices", "")  # noqa: SLF001 - likewise
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
        self.after_backward()
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient

    def _differentiate_zeros(self, parameters: Sequence[torch.Tensor]) -> None:
        # A graph, for DDP to see that all of them are used; where it expects a sparse gradient, of no rows. If it looks
        # for those that no rank has used, it takes a gradient of zeros for a use.
        reach = _reach if self._looks else _view
        reached = [_no_rows(p) if id(p) in self._sparse else reach(p) for p in parameters]
        self._prepare(reached)  # as the forward does that this rank may not have had
        torch.autograd.backward(reached, [torch.zeros_like(each) for each in reached])

    def _prepare(self, outputs: Sequence[torch.Tensor]) -> None:
        """Let the backward of *outputs* reduce."""
        if self._looks:
            # It notes what any backward reaches, until it reduces: also one of another optimizer's loss, whose
            # gradients are not there now, or of a window that was dropped. Used is what has a gradient.
            self.model.reducer._reset_state()  # noqa: SLF001 - no public way to it
            used = [_reach(p) for p in self.model.module.parameters() if p.requires_grad and p.grad is not None]
            if used:
                torch.autograd.backward(used, [torch.zeros_like(each) for each in used])
        if self.always and self._learned:
            self.model.reducer.prepare_for_forward()  # counts: after the first one, as no forward does it
        self.model.reducer.prepare_for_backward(outputs if self._looks else [])


def _has_learned(model: Any) -> bool:
    """Whether a backward has gone through a static graph."""
    return bool(getattr(model, "_static_graph_delay_allreduce_enqueued", False))  # which no other model has


class _Nothing(torch.autograd.Function):
    """Reaches a parameter in a backward, and leaves no gradient there."""

    @staticmethod
    def forward(_: Any, parameter: torch.Tensor) -> torch.Tensor:
        return parameter.new_zeros(())

    @staticmethod
    def backward(_: Any, *__: Any) -> None:
        return None


_reach: Callable[[torch.Tensor], torch.Tensor] = _Nothing.apply


def _view(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.view_as(parameter)


def _entries(parameter: torch.Tensor) -> list[float]:
    # By index, as flattening copies what is not contiguous.
    places = [tuple(int(at * (size - 1)) for size in parameter.shape) for at in (0.0, 0.5, 1.0)]
    entries = torch.stack([parameter[place] for place in places])
    numbers: list[float] = (
        (torch.view_as_real(entries) if entries.is_complex() else entries).double().flatten().tolist()
    )
    return numbers


def _no_rows(table: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.embedding(torch.empty(0, dtype=torch.int64, device=table.device), table, sparse=True)
