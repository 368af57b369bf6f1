"""Clipping: a clip takes parameters, limits their gradients in place and returns the norm before."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ice_engine.arguments import positive


@dataclass(frozen=True)
class ClipNorm:
    """Scales gradients so that their norm over all parameters is at most ``max_norm``."""

    max_norm: float
    norm_type: float = 2.0

    def __call__(self, parameters: Iterable[torch.Tensor]) -> torch.Tensor:
        """Clip in place and return the norm before, shape (); a gradient without a finite norm is left as it is."""
        parameters = [p for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], self.norm_type)
        # With a NaN norm every gradient would become NaN, and nobody could tell which was to blame. Norm 0
        # leaves all as they are, without asking the device.
        torch.nn.utils.clip_grads_with_norm_(parameters, self.max_norm, torch.where(norm.isfinite(), norm, 0.0))
        return norm

    def coefficient(self, norm: torch.Tensor) -> torch.Tensor:
        """Return what the gradient is multiplied with, shape (): 1 where it is small enough."""
        return (self.max_norm / (norm + 1e-6)).clamp(max=1.0)

    def after(self, norm: torch.Tensor) -> torch.Tensor:
        """Return what *norm* became by clipping, shape ()."""
        return norm * self.coefficient(norm)

    def __repr__(self) -> str:
        return f"clip_norm({self.max_norm:g}, norm_type={self.norm_type:g})"


def clip_norm(max_norm: float, *, norm_type: float = 2.0) -> ClipNorm:
    r"""Limit the norm of the gradient over all parameters.

    .. math:: g \leftarrow g \cdot \min\left(1, \frac{c}{\lVert g \rVert_p + 10^{-6}}\right)

    where :math:`c` is *max_norm* and :math:`p` is *norm_type*. As a clip of an optimizer it sees the
    unscaled gradient, divided by the window's weight.

    Args:
        max_norm: Largest norm let through, above 0, in the unit of the gradient.
        norm_type: Order of the norm, above 0; ``float("inf")`` for the largest entry.

    Returns:
        A clip, from parameters to their norm before clipping, shape ().

    Raises:
        ArgumentTypeError: If an argument is not a number.
        ArgumentValueError: If an argument is not above 0, or *max_norm* is infinite.

    Examples:
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_norm(1.0)([weight])
        tensor(5.)
        >>> weight.grad
        tensor([0.6000, 0.8000])

    References:
        Pascanu et al., `On the difficulty of training RNNs <https://arxiv.org/abs/1211.5063>`_, 2013;
        ``torch.nn.utils.clip_grad_norm_``, whose two halves do the work.

    .. versionadded:: 0.1.0
    """
    if norm_type != math.inf:
        positive("norm_type", norm_type)
    return ClipNorm(positive("max_norm", max_norm), float(norm_type))
