"""How the gradients of one model get from rank to rank: DDP and FSDP2 by their own reduction, see ddp.py and fsdp.py.

Both average over ranks. While a window accumulates, their reduction is off; at its last micro-batch it is on, so that
one backward reduces the whole window, while it still computes. Where a window closes without such a backward, as at the
end of data whose length nobody knew, what it would have done is done after it.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch

from ice_engine.distributed.world import rank

Sync = Literal["communication", "memory"]
"""What accumulation saves: ``"communication"`` reduces once a window, ``"memory"`` every micro-batch of shards."""


def sparse_tables(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield, by module, the parameters of *model* whose gradients are sparse, found as DDP itself finds them."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag) and module.sparse:
            yield name, module.weight


class Synchroniser:
    """Reduces nothing: with tensor parallelism alone every rank has the gradients of its shards, of the same data.

    Args:
        model: The module.

    Attributes:
        model: The module.
        ranks: Those it averages over, this one among them, each with data of its own. Others split the model with one
            of them, and have the same data as that one, or train a model of theirs.
        together: Whether even a forward needs all ranks, so that none may have a micro-batch more than the others.
        follows: Whether a rank without a loss can take part in what the others reduce.
        reduces: Whether a backward reduces now.
        always: Whether every micro-batch does, and not only the last of a window.
    """

    together = follows = True

    def __init__(self, model: torch.nn.Module) -> None:
        self.model: Any = model
        self.ranks = [rank()]
        self.reduces = self.always = False

    @property
    def is_bypassed(self) -> bool:
        """Whether no forward has gone through the model since a backward is to reduce, which then cannot."""
        return False

    def on(self, last: bool) -> None:
        """Let the next forward and backward reduce if it is the *last* of a window."""

    def leave(self) -> None:
        """Let the model be as it was, outside of a run."""
        self.on(last=True)

    def before_backward(self, loss: torch.Tensor) -> None:
        """Get ready for one more backward of a micro-batch, that of *loss*."""

    def after_backward(self) -> None:
        """Do, where all ranks are, what would need them all at the next forward."""

    def send_buffers(self) -> None:
        """Let the model's buffers be the same on all ranks, if it does so at all."""

    def take_part(self, loss: torch.Tensor | None = None, *, retain_graph: bool = False) -> None:
        """Take part with zeros in the reduction that the other ranks' backward makes, by one of *loss* if need be."""

    def reduce(self, parameters: Sequence[torch.Tensor]) -> None:
        """Average gradients that no backward has reduced."""

    def forget(self, parameters: Iterable[torch.Tensor]) -> None:
        """Drop what backward passes have left of *parameters*, besides their gradients, to be reduced later."""

    def aside(self, parameters: Iterable[torch.Tensor]) -> contextlib.AbstractContextManager[None]:  # noqa: ARG002 - nothing is kept
        """Let what :meth:`forget` drops be the same at the end as at the beginning, whatever comes between."""
        return contextlib.nullcontext()

    def complete(self, parameters: Sequence[torch.Tensor]) -> None:
        """Average what a backward that reduced has left out."""

    def samples(self) -> dict[str, list[float]]:
        """Return, by name, some entries of each parameter that all ranks have a copy of."""
        return {}

    def layout(self) -> list[int]:
        """Return the order of parameters in what is reduced at once, if that is not the same from the beginning on."""
        return []

    def lay_out(self, order: Sequence[int]) -> None:
        """Reduce from the beginning on in *order*, from :meth:`layout` in another process; needs all ranks."""
