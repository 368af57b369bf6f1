"""Clipping: a clip takes parameters, limits their gradients in place and returns the norm before.

As the clip of an optimizer it sees the unscaled gradient, divided by the window's weight. A gradient without a finite
norm is left as it is, by every clip, and the optimizer's ``nonfinite`` policy says what becomes of the step. All of
them give the same on one rank and on gradients that are sharded over many (DTensors, as of FSDP2); call them on every
rank then.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ice_engine.arguments import flag, positive
from ice_engine.errors import ArgumentTypeError, NonFiniteGradientError
from ice_engine.norms import (
    ROUNDED,
    Part,
    gradients_of,
    norm_of_norms,
    norm_of_parts,
    on_one_device,
    over_ranks,
    part,
    total_norm,
)


@dataclass(frozen=True, repr=False)
class ClipNorm:
    """Scales gradients so that their norm, over all parameters or of each param group, is at most ``max_norm``."""

    max_norm: float
    norm_type: float = 2.0
    error_if_nonfinite: bool = False
    per_group: bool = False

    def __call__(self, parameters: Iterable[torch.Tensor]) -> torch.Tensor:
        """Clip in place, all *parameters* together, and return the norm before, shape ()."""
        return self.by_group([parameters])

    @torch.no_grad()
    def by_group(self, groups: Iterable[Iterable[torch.Tensor]]) -> torch.Tensor:
        """Clip in place, each group by its own norm, and return the norm over all groups before, shape ().

        Raises:
            NonFiniteGradientError: If that is infinite or NaN and *error_if_nonfinite* is set; nothing has changed.
        """
        gradients = [found for found in map(gradients_of, groups) if found]
        norms = [self.norm(found) for found in gradients]
        norm = norm_of_norms(on_one_device(norms), self.norm_type)
        if self.error_if_nonfinite and not bool(norm.isfinite()):
            message = (
                f"{self!r}: the gradient norm is {float(norm)}. Without error_if_nonfinite the optimizer decides: "
                "Optimizer(..., nonfinite='skip') leaves the step out, nonfinite='raise' also names the parameter"
            )
            raise NonFiniteGradientError(message)
        for found, own in zip(gradients, norms, strict=True):
            # With a NaN norm every gradient would become NaN, and nobody could tell which was to blame.
            coefficient = torch.where(norm.isfinite().to(own.device), self.coefficient(own), 1.0)
            parts = [part(gradient).local for gradient in found]
            for device in {local.device for local in parts}:
                here = [local for local in parts if local.device == device]
                torch._foreach_mul_(here, coefficient.to(device))  # as torch.nn.utils does: few kernels
        return norm

    def norm(self, gradients: Iterable[torch.Tensor]) -> torch.Tensor:
        """Return the norm that is limited, over all *gradients*, shape ()."""
        return total_norm(gradients, self.norm_type)

    def coefficient(self, norm: torch.Tensor) -> torch.Tensor:
        """Return what gradients of this *norm* are multiplied with, shape (); 1 if it is not finite.

        It stays on the device of *norm*, which is not waited for.
        """
        return torch.where(norm.isfinite(), (self.max_norm / (norm + 1e-6)).clamp(max=1.0), 1.0)

    def factor(self, norm: torch.Tensor, known: float | None = None) -> float | torch.Tensor:
        """Return :meth:`coefficient`, as a number where the host knows that *norm* is *known*: at a tenth of its price.

        It is rounded as torch rounds it, so that gradients are the same to the last bit.
        """
        rounded = ROUNDED.get(norm.dtype)
        if known is None or rounded is None:
            return self.coefficient(norm)
        if not math.isfinite(known):
            return 1.0
        reciprocal = rounded(1.0 / rounded(known + rounded(1e-6)))
        return min(rounded(reciprocal * rounded(self.max_norm)), 1.0)

    def after(self, norm: torch.Tensor, factor: float | torch.Tensor | None = None) -> torch.Tensor | None:
        """Return what *norm* became by clipping, shape (); None with *per_group*, where it does not follow from it.

        Args:
            norm: The norm before, shape ().
            factor: What :meth:`factor` returned for it, if it is at hand.
        """
        if self.per_group:
            return None
        factor = self.coefficient(norm) if factor is None else factor
        return norm if isinstance(factor, float) and factor == 1.0 else norm * factor

    def __repr__(self) -> str:
        return _call(
            "clip_norm",
            self.max_norm,
            norm_type=(self.norm_type, 2.0),
            error_if_nonfinite=(self.error_if_nonfinite, False),
            per_group=(self.per_group, False),
        )


@dataclass(frozen=True, repr=False)
class ClipValue:
    """Limits every entry of the gradients to the range from ``-max_value`` to ``max_value``."""

    max_value: float

    @torch.no_grad()
    def __call__(self, parameters: Iterable[torch.Tensor]) -> torch.Tensor:
        """Clip in place and return the 2-norm before, over all *parameters*, shape ()."""
        gradients = gradients_of(parameters)
        norm = total_norm(gradients)
        for gradient in gradients:
            local = part(gradient).local
            if local.is_complex():
                local = torch.view_as_real(local)
            # Clamped to the largest value, an infinite gradient would pass for a good one.
            most = torch.full((), self.max_value, dtype=local.dtype, device=local.device)
            most = torch.where(norm.isfinite().to(local.device), most, math.inf)
            local.clamp_(-most, most)
        return norm

    def __repr__(self) -> str:
        return _call("clip_value", self.max_value)


@dataclass(frozen=True, repr=False)
class ClipAdaptive:
    """Scales the gradient of every unit so that its norm is at most ``clip_factor`` times that of its weights."""

    clip_factor: float = 0.01
    eps: float = 1e-3

    @torch.no_grad()
    def __call__(self, parameters: Iterable[torch.Tensor]) -> torch.Tensor:
        """Clip in place and return the 2-norm before, over all *parameters*, shape ().

        Raises:
            ArgumentTypeError: If a gradient is sparse in more than its rows.
        """
        parameters = list(parameters)
        gradients = [part(gradient) for gradient in gradients_of(parameters)]
        weights = [_weights(parameter) for parameter in parameters if parameter.grad is not None]
        norms = [_unit_norms(gradient.local) for gradient in gradients]
        norm = norm_of_parts(g._replace(local=own) for g, own in zip(gradients, norms, strict=True))
        weight_norms = [_unit_norms(weight) for weight in weights]
        _complete(gradients, norms, weight_norms)
        for gradient, own, weight_norm in zip(gradients, norms, weight_norms, strict=True):
            coefficient = (self.clip_factor * weight_norm.clamp(min=self.eps) / own).clamp(max=1.0)
            gradient.local.mul_(torch.where(norm.isfinite().to(own.device), coefficient, 1.0))
        return norm

    def __repr__(self) -> str:
        return _call("clip_adaptive", self.clip_factor, eps=(self.eps, 1e-3))


def clip_norm(
    max_norm: float, *, norm_type: float = 2.0, error_if_nonfinite: bool = False, per_group: bool = False
) -> ClipNorm:
    r"""Limit the norm of the gradient, over all parameters or of each param group.

    .. math:: g \leftarrow g \cdot \min\left(1, \frac{c}{\lVert g \rVert_p + 10^{-6}}\right)

    where :math:`c` is *max_norm* and :math:`p` is *norm_type*. As a clip of an optimizer it sees the
    unscaled gradient, divided by the window's weight.

    Args:
        max_norm: Largest norm let through, above 0, in the unit of the gradient.
        norm_type: Order of the norm, above 0; ``float("inf")`` for the largest entry.
        error_if_nonfinite: Raise for an infinite or NaN norm, whatever the optimizer's ``nonfinite`` policy says; it
            waits for the device. A GradScaler finds its scale by such gradients, so leave it out with one.
        per_group: Limit the norm of each param group by itself, all to *max_norm*.

    Returns:
        A clip, from parameters to their norm before clipping, shape (); also with *per_group* that over all groups.

    Raises:
        ArgumentTypeError: If an argument is not a number, or not True or False.
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
        ``torch.nn.utils.clip_grad_norm_``, which it equals.

    .. versionadded:: 0.1.0
    """
    if norm_type != math.inf:
        positive("norm_type", norm_type)
    return ClipNorm(
        positive("max_norm", max_norm),
        float(norm_type),
        flag("error_if_nonfinite", error_if_nonfinite),
        flag("per_group", per_group),
    )


def clip_value(max_value: float) -> ClipValue:
    r"""Limit every entry of the gradient.

    .. math:: g_i \leftarrow \min(\max(g_i, -c), c)

    where :math:`c` is *max_value*. Of complex gradients it limits the real and the imaginary parts. Unlike
    ``torch.nn.utils.clip_grad_value_`` it does not turn an infinite entry into :math:`c`: the step is then skipped.
    Each entry is limited by itself, so over all parameters and per param group are the same here.

    Args:
        max_value: Largest absolute value let through, above 0, in the unit of the gradient.

    Returns:
        A clip, from parameters to their 2-norm before clipping, shape ().

    Raises:
        ArgumentTypeError: If *max_value* is not a number.
        ArgumentValueError: If it is not above 0, or infinite.

    Examples:
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> weight.grad = torch.tensor([3.0, -4.0])
        >>> clip_value(3.5)([weight])
        tensor(5.)
        >>> weight.grad
        tensor([ 3.0000, -3.5000])

    .. versionadded:: 0.1.0
    """
    return ClipValue(positive("max_value", max_value))


def clip_adaptive(clip_factor: float = 0.01, *, eps: float = 1e-3) -> ClipAdaptive:
    r"""Limit the gradient of every unit in proportion to the unit's weights (AGC).

    .. math::
        g_u \leftarrow g_u \cdot \min\left(1,
        \frac{\lambda \max(\lVert w_u \rVert_2, \epsilon)}{\lVert g_u \rVert_2}\right)

    where :math:`\lambda` is *clip_factor* and :math:`\epsilon` is *eps*. A unit :math:`u` is one output of a linear
    layer or a convolution, an index of the weight's dimension 0; a bias, like any parameter with fewer than two
    dimensions, is one unit. Over all parameters and per param group are the same here. The paper leaves the last linear
    layer unclipped: give it to an optimizer of its own.

    Args:
        clip_factor: Largest norm of a unit's gradient over that of its weights, above 0; from 0.01 to 0.16 in the
            paper, smaller for larger batches.
        eps: Least norm that weights count with, above 0, so that those initialised with zeros can train.

    Returns:
        A clip, from parameters to the 2-norm of their gradients before clipping, shape ().

    Raises:
        ArgumentTypeError: If an argument is not a number.
        ArgumentValueError: If it is not above 0, or infinite.

    Examples:
        >>> weight = torch.tensor([[6.0, 8.0], [0.0, 0.0]], requires_grad=True)
        >>> weight.grad = torch.tensor([[0.3, 0.4], [3.0, 4.0]])
        >>> clip_adaptive(0.01)([weight])
        tensor(5.0249)
        >>> weight.grad  # norms: 0.01 * 10, and 0.01 * eps
        tensor([[6.0000e-02, 8.0000e-02],
                [6.0000e-06, 8.0000e-06]])

    References:
        Brock et al., `High-Performance Large-Scale Image Recognition Without Normalization
        <https://arxiv.org/abs/2102.06171>`_, 2021.

    .. versionadded:: 0.1.0
    """
    return ClipAdaptive(positive("clip_factor", clip_factor), positive("eps", eps))


def _weights(parameter: torch.Tensor) -> torch.Tensor:
    # The local weights of the units that the gradient has; a sparse one has few.
    weight, gradient = part(parameter).local, parameter.grad
    if gradient is None or not gradient.is_sparse or weight.ndim <= 1:
        return weight
    if gradient.sparse_dim() != 1:
        message = (
            f"clip_adaptive needs whole rows, and the gradient of a parameter of shape {tuple(weight.shape)} is sparse "
            f"in {gradient.sparse_dim()} dimensions; use clip_norm, or a dense gradient"
        )
        raise ArgumentTypeError(message)
    return weight.index_select(0, gradient.indices()[0])


def _unit_norms(tensor: torch.Tensor) -> torch.Tensor:
    # In at least float32, so that a half-precision norm is not rounded twice.
    units = tuple(range(1, tensor.ndim)) or None
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    norms: torch.Tensor = torch.linalg.vector_norm(tensor, dim=units, keepdim=units is not None, dtype=dtype)
    return norms


def _complete(gradients: Sequence[Part], *unit_norms: Sequence[torch.Tensor]) -> None:
    # Norms of units that are spread over ranks become those over all of them, in place; one exchange for all.
    spread: dict[Any, list[torch.Tensor]] = {}
    for gradient, *own in zip(gradients, *unit_norms, strict=True):
        if gradient.within:
            spread.setdefault((gradient.mesh, gradient.within), []).extend(own)
    for (mesh, within), norms in spread.items():
        whole = over_ranks(torch.cat([norm.flatten() for norm in norms]), mesh, within)
        for norm, value in zip(norms, torch.split(whole, [norm.numel() for norm in norms]), strict=True):
            norm.copy_(value.view_as(norm))


def _call(function: str, first: float, **settings: tuple[Any, Any]) -> str:
    # The call that makes the clip; settings are (value, default).
    def show(value: Any) -> str:
        return "float('inf')" if value == math.inf else repr(value)

    given = [f"{name}={show(value)}" for name, (value, default) in settings.items() if value != default]
    return f"{function}({', '.join([show(first), *given])})"
