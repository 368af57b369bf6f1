"""FSDP2's reduction, driven by windows."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ice_engine.distributed.averaging import average
from ice_engine.distributed.gathered import fully_sharded, param_groups
from ice_engine.distributed.shards import is_sharded
from ice_engine.distributed.synchroniser import Sync, Synchroniser, sparse_tables
from ice_engine.distributed.world import rank
from ice_engine.errors import AttachError


class FSDPSync(Synchroniser):
    """Drives a module that ``fully_shard`` was applied to.

    What its forward gathers, only a forward can: a rank that has none cannot take part in it.

    Args:
        model: The module.
        sync: What accumulation saves.

    Raises:
        AttachError: If it has gradients that are sparse.
    """

    follows = False

    def __init__(self, model: Any, sync: Sync) -> None:
        super().__init__(model)
        for name, table in sparse_tables(model):
            if isinstance(table, DTensor) and table.requires_grad:
                message = f"{name!r} has sparse gradients, which fully_shard cannot reduce; leave out sparse=True"
                raise AttachError(message)
        groups = [*self._groups()]
        widest = max((group.mesh_info for group in groups), key=lambda info: len(_ranks(info)), default=None)
        self.ranks = [rank()] if widest is None else _ranks(widest)
        names = ("shard_process_group", "replicate_process_group")
        self._processes = [getattr(widest, name) for name in names if hasattr(widest, name)]
        self.reduces, self.always = True, sync == "memory"
        self._one = groups[:1]  # as good as any: who turns the reduction off turns it off for the whole model
        self._behind = False

    def on(self, last: bool) -> None:
        """Let the next forward and backward reduce if it is the *last* of a window."""
        self.reduces = last or self.always
        self.model.set_requires_gradient_sync(self.reduces)

    def before_backward(self, loss: torch.Tensor) -> None:  # noqa: ARG002 - needs none
        """Note whether this one leaves what is to be reduced later, be it as the script has said so since."""
        self._behind |= not (self.reduces and all(group.reduce_grads for group in self._one))

    def take_part(self, loss: torch.Tensor | None = None, *, retain_graph: bool = False) -> None:
        """Differentiate *loss* into gradients of 0; without one there is nothing to take part with."""
        if loss is None:
            return
        self.before_backward(loss)
        # A gradient of 0 becomes NaN on its way through a loss that is not finite, and would be reduced at once.
        whole = [held.unsharded_param for held in self._all_held()]
        hooks = [parameter.register_hook(torch.zeros_like) for parameter in whole if parameter.requires_grad]
        try:
            torch.autograd.backward(loss, torch.zeros_like(loss), retain_graph=retain_graph)
        finally:
            for hook in hooks:
                hook.remove()

    def reduce(self, parameters: Sequence[torch.Tensor]) -> None:
        """Average gradients that no backward has reduced, as one that does would at its end."""
        self.complete(parameters)

    def complete(self, parameters: Sequence[torch.Tensor]) -> None:
        """Average what a backward has left out that reduced: it did not come there, or FSDP2 does not know of it."""
        if self._behind:
            self._catch_up(parameters)
        late = [p for p in parameters if p.requires_grad and not is_sharded(p)]
        for processes in self._processes if late else ():
            average(late, processes)

    def _catch_up(self, parameters: Sequence[torch.Tensor]) -> None:
        """Reduce the whole gradients of *parameters* that FSDP2 has kept."""
        own = self._held(parameters)
        others = [held for held in self._all_held() if held not in own]
        if any(map(_has_whole_gradient, own)):
            self.on(last=True)
            with self.aside(held.sharded_param for held in others):  # the windows of other optimizers go on
                for group in self._groups():
                    with group.use_training_state(group._training_state):  # noqa: SLF001 - no public name, and post_backward() leaves another
                        group.post_backward()
                    group.finalize_backward()
            self.on(last=False)
        self._behind = any(map(_has_whole_gradient, others))

    def forget(self, parameters: Iterable[torch.Tensor]) -> None:
        """Drop what backward passes have left of *parameters* that did not reduce."""
        if self._behind:
            for held in self._held(parameters):
                _keep(held, None, None)

    @contextlib.contextmanager
    def aside(self, parameters: Iterable[torch.Tensor]) -> Iterator[None]:
        """Let what :meth:`forget` drops be the same at the end as at the beginning, whatever comes between."""
        before = [(held, held.unsharded_param.grad, held.unsharded_accumulated_grad) for held in self._held(parameters)]
        try:
            for held, *_ in before:
                _keep(held, None, None)
            yield
        finally:
            for held, gradient, accumulated in before:
                _keep(held, gradient, accumulated)

    def _held(self, parameters: Iterable[torch.Tensor]) -> list[Any]:
        """Where FSDP2 keeps whole gradients of *parameters* until it reduces them; it has no public way there."""
        wanted = {id(parameter) for parameter in parameters}
        return [held for held in self._all_held() if id(held.sharded_param) in wanted]

    def _groups(self) -> Iterator[Any]:
        return param_groups(fully_sharded(self.model))

    def _all_held(self) -> list[Any]:
        found = {id(held): held for group in self._groups() for held in group.fsdp_params}
        return [held for held in found.values() if hasattr(held, "unsharded_param")]


def _keep(held: Any, gradient: torch.Tensor | None, accumulated: torch.Tensor | None) -> None:
    """Let these be the gradients of a parameter that FSDP2 has not reduced."""
    held.unsharded_param.grad, held.unsharded_accumulated_grad = gradient, accumulated


def _has_whole_gradient(held: Any) -> bool:
    """Whether FSDP2 has accumulated a gradient of a parameter that it has not reduced."""
    return not (held.unsharded_accumulated_grad is None and held.unsharded_param.grad is None)


def _ranks(info: Any) -> list[int]:
    """Return the ranks that FSDP2 averages over: of a whole model's mesh, those of its own dimensions only."""
    own = (info.shard_mesh_dim, info.replicate_mesh_dim)
    place = tuple(slice(None) if i in own else at for i, at in enumerate(info.mesh.get_coordinate()))
    ranks: list[int] = info.mesh.mesh[place].flatten().tolist()
    return ranks
