"""The gradient of one window, made final in as few passes over memory as can be.

What is accumulated is a weighted sum of scaled gradients. What a step needs is their mean, unscaled and clipped. That
is one factor for all of them, so it is kept aside until somebody has to see the result, and applied once: the norm is
read from the gradients as they are and multiplied itself.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from ice_engine.norms import ROUNDED, Part, gradients_of, norm_of_norms, norm_of_parts, over_ranks, part

Multiplier = float | torch.Tensor


class Gradient:
    """The gradients of a window and the factor that is still to be applied to them.

    Args:
        parameters: Those that have a gradient, which is changed in place.
        multiplier: What makes the mean of them, unscaled; a number or a tensor of shape ().

    Attributes:
        pending: The factor.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], multiplier: Multiplier) -> None:
        self.pending: Multiplier = multiplier
        found: list[Any] = [parameter.grad for parameter in parameters]
        # Nearly always they are plain tensors of one kind, for which a list is all that the kernels need.
        kinds = {(type(g), g.layout, g.requires_grad, g.dtype, g.device) for g in found}
        self._plain: list[torch.Tensor] = found if len(kinds) == 1 and next(iter(kinds))[:3] == _PLAIN else []
        if isinstance(multiplier, torch.Tensor) and self._plain and self._plain[0].dtype in ROUNDED:
            # In the precision of the gradients, so that a loss scale, which is a power of two, changes no bit.
            self.pending = multiplier.to(self._plain[0].dtype)
        # Else those of this rank, where a gradient is spread over many: a factor is the same for every part.
        self._parts: list[Part] = [] if self._plain else [part(gradient) for gradient in gradients_of(parameters)]

    @property
    def plain(self) -> Sequence[torch.Tensor]:
        """The gradients, if they are dense tensors of one dtype on one device; else nothing."""
        return self._plain

    @property
    def device(self) -> torch.device:
        """Where the first of them is."""
        return (self._plain[0] if self._plain else self._parts[0].local).device

    def norm(self, norm_type: float = 2.0) -> torch.Tensor:
        """Return the norm of the final gradient, shape (); reads every gradient once."""
        if self._plain and norm_type != math.inf:  # an empty tensor has no largest entry
            norm = norm_of_norms(torch._foreach_norm(self._plain, norm_type), norm_type)  # noqa: SLF001 - one kernel
        else:
            norm = norm_of_parts(self._parts or [Part(gradient) for gradient in self._plain], norm_type)
        if is_one(self.pending):
            return norm
        return norm.mul_(self._factor(norm.device))  # in place: in the precision that torch's clipping has it in

    def is_finite(self) -> bool:
        """Whether the norm is, and so every entry; reads every gradient once, where a check of each takes twice that.

        A norm beyond its type is not, though every entry may be.
        """
        return math.isfinite(float(self.norm()))

    def final(self, factor: Multiplier) -> Multiplier:
        """Return what is left to be applied, *factor* included."""
        if is_one(self.pending):
            return factor
        if isinstance(factor, float) and isinstance(self.pending, float) and self._plain:
            rounded = ROUNDED.get(self._plain[0].dtype, float)
            return rounded(rounded(self.pending) * factor)
        return self.pending * factor

    def multiply(self, factor: Multiplier = 1.0) -> None:
        """Apply *factor*, and what was kept aside, in one pass; in none if that is 1."""
        by = self.final(factor)
        self.pending = 1.0
        if not is_one(by):
            for device, tensors in self._by_kind():
                torch._foreach_mul_(tensors, _on(device, by))

    def multiply_and_check(self) -> torch.Tensor:
        """Apply what was kept aside and look for infinite and NaN in the same pass.

        Returns:
            Shape (); above 0 if there is any.
        """
        found = []
        for device, tensors in self._by_kind():
            by = self._factor(device)
            if tensors[0].dtype in _CHECKED:
                found_inf = torch.zeros((), dtype=torch.float32, device=device)
                factor = torch.as_tensor(by, dtype=torch.float32, device=device)
                torch._amp_foreach_non_finite_check_and_unscale_(tensors, found_inf, factor)
            else:
                # That kernel takes its factor in single precision, which is not enough for gradients in double.
                torch._foreach_mul_(tensors, by)
                found_inf = (~torch.stack([t.isfinite().all() for t in tensors]).all()).float()
            found.append(found_inf)
        self.pending = 1.0
        return self._over_ranks(torch.stack([each.to(found[0].device) for each in found]).amax())

    def _over_ranks(self, found: torch.Tensor) -> torch.Tensor:
        for mesh, across in {(each.mesh, each.across): None for each in self._parts if each.mesh is not None}:
            found = over_ranks(found, mesh, across, math.inf)
        return found

    def _by_kind(self) -> list[tuple[torch.device, list[torch.Tensor]]]:
        if self._plain:
            return [(self._plain[0].device, self._plain)]
        kinds: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = defaultdict(list)
        for each in self._parts:
            kinds[each.local.device, each.local.dtype].append(each.local)
        return [(device, same) for (device, _), same in kinds.items()]

    def _factor(self, device: torch.device) -> Multiplier:
        return _on(device, self.pending)


_PLAIN = (torch.Tensor, torch.strided, False)  # type, layout, requires_grad
_CHECKED = (torch.float32, torch.float16, torch.bfloat16)


def is_one(factor: Multiplier) -> bool:
    """Whether *factor* is known to change nothing; of a tensor that would have to be waited for."""
    return isinstance(factor, float) and factor == 1.0


def _on(device: torch.device, factor: Multiplier) -> Multiplier:
    return factor.to(device) if isinstance(factor, torch.Tensor) else factor
