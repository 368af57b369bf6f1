"""A loss differentiated: as ``torch.autograd.backward`` does it, with less around it."""

import logging

import torch
from torch.autograd import Variable, graph


def _made() -> torch.Tensor:
    with torch.inference_mode(mode=False):
        return torch.ones((), dtype=torch.float32, device="cpu")


_one = _made()


def backward(loss: torch.Tensor, *, retain_graph: bool = False) -> None:
    """Add the gradients of *loss*, of one element, to those that its leaves have.

    Before ``torch.autograd.backward`` calls the engine, it prepares for lists of losses, given gradients, tensors of
    other types, threads of other devices and a debug log: a quarter of the time that a small model's forward and
    backward take. Of a plain number on the CPU none of that is needed.
    """
    plain = type(loss) is torch.Tensor and loss.is_cpu and loss.dtype is torch.float32 and not loss.dim()
    if not plain or graph.log.isEnabledFor(logging.DEBUG):
        torch.autograd.backward(loss, retain_graph=retain_graph)
        return
    # The arguments are those of torch.autograd.backward: create_graph=False and no inputs.
    Variable._execution_engine.run_backward(  # noqa: SLF001 - what torch.autograd.backward calls
        (loss,), (_root(),), retain_graph, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _root() -> torch.Tensor:
    """Return the gradient of a loss by itself, 1; always the same tensor, unless somebody's hook wrote to it."""
    global _one  # noqa: PLW0603 - a constant that has to be guarded
    if _one._version:  # noqa: SLF001 - has no public name
        _one = _made()
    return _one
