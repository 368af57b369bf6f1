"""Loss scale and non-finite gradients; alone knows the scale, and whether a gradient is finite.

The GradScaler scales, unscales and adapts its scale. Whether to step is decided here, from the norm
of the gradient as it stands after every handler has seen it: a NaN that a handler put in is caught
as well, and a gradient that a handler repaired is used.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch

from ice_engine.arguments import choice, count
from ice_engine.errors import ArgumentTypeError, ArgumentValueError, NonFiniteGradientError

Policy = Literal["skip", "raise", "off"]


class Precision:
    """Drives one GradScaler, or none, and counts skipped steps.

    Args:
        scaler: A ``torch.amp.GradScaler`` for any device, or None.
        policy: What a non-finite gradient means: ``"skip"``, ``"raise"`` or ``"off"``; None for
            ``"skip"`` where a norm or a scaler is at hand, else ``"off"``.
        max_consecutive_skips: Skips in a row after which training stops; at least 1.
        has_norm: Whether clipping computes the norm anyway.
    """

    def __init__(
        self, scaler: torch.amp.GradScaler | None, policy: Policy | None, max_consecutive_skips: int, *, has_norm: bool
    ) -> None:
        choice("nonfinite", policy, (None, "skip", "raise", "off"))
        self.max_consecutive_skips = count("max_consecutive_skips", max_consecutive_skips, 1)
        self.scaler = check_scaler(scaler)
        self.consecutive_skips = 0
        self.last_finite_norm: float | None = None
        self._unscaled = False
        self._policy = policy
        self._has_norm = has_norm
        if policy == "off" and self.enabled:
            message = (
                "nonfinite='off' with a GradScaler would step on overflowed gradients; "
                "leave nonfinite out, or train without grad_scaler"
            )
            raise ArgumentValueError(message)

    @property
    def enabled(self) -> bool:
        """Whether a scaler is here and switched on."""
        return self.scaler is not None and self.scaler.is_enabled()

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self._policy or ("skip" if self._has_norm or self.enabled else "off")

    @property
    def loss_scale(self) -> float | None:
        """The scale that the next loss is multiplied with."""
        return self.scaler.get_scale() if self.scaler is not None and self.scaler.is_enabled() else None

    def adopt(self, scaler: torch.amp.GradScaler | None, *, unscaled_losses: bool) -> None:
        """Take over the scaler that the caller of ``update()`` scaled its loss with.

        Raises:
            ArgumentTypeError: If it is not a GradScaler.
            ArgumentValueError: If another one is in use, or the window's losses were not scaled with it.
        """
        if scaler is None or scaler is self.scaler:
            return
        if self.scaler is not None:
            message = (
                "update() was given another GradScaler than the one in use; one scaler scales and unscales a window"
            )
            raise ArgumentValueError(message)
        if check_scaler(scaler) and scaler.is_enabled() and unscaled_losses:
            message = (
                "update() was given a GradScaler after backward() without one, so the gradients are not scaled; "
                "pass it where the optimizer is made: Optimizer(..., grad_scaler=scaler)"
            )
            raise ArgumentValueError(message)
        self.scaler = scaler

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """Multiply *loss* with the loss scale."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer, gradients: list[torch.Tensor], factor: float) -> None:
        """Divide the gradients by the loss scale and multiply them with *factor*, in place."""
        if self.scaler is not None:
            self._unscaled = True
            self.scaler.unscale_(optimizer)
        if factor != 1.0:
            for gradient in gradients:
                gradient.mul_(factor)

    def update(self) -> None:
        """Adapt the loss scale, once per window that was unscaled; a second call does nothing."""
        if self.scaler is not None and self._unscaled:
            self._unscaled = False
            self.scaler.update()

    def judge(self, norm: torch.Tensor | None) -> str | None:
        """Return why a gradient of this norm must not be applied, or None; count skips in a row."""
        if norm is None or self.policy == "off":
            return None
        value = float(norm)
        if value - value == 0.0:  # neither infinite nor NaN
            self.consecutive_skips = 0
            self.last_finite_norm = value
            return None
        self.consecutive_skips += 1
        return f"gradient norm is {value}"

    def stop_if_exhausted(self, report: str) -> None:
        """Raise if the policy, or the number of skips in a row, says stop.

        Raises:
            NonFiniteGradientError: With *report* in its message.
        """
        if self.policy == "raise":
            message = f"{report}. nonfinite='skip' would leave this step out and go on"
            raise NonFiniteGradientError(message)
        if self.consecutive_skips >= self.max_consecutive_skips:
            facts = f", loss scale {self.loss_scale:g}" if self.loss_scale is not None else ""
            if self.last_finite_norm is not None:
                facts += f", last finite norm {self.last_finite_norm:.4g}"
            message = (
                f"{self.consecutive_skips} steps in a row were skipped{facts}: {report}. "
                "Lower the learning rate, clip, or use bfloat16; max_consecutive_skips= allows more"
            )
            raise NonFiniteGradientError(message)

    def state_dict(self) -> dict[str, Any]:
        """Return the scaler's state and the skips in a row as plain data."""
        scaler = self.scaler.state_dict() if self.scaler is not None and self.scaler.is_enabled() else None
        return {"grad_scaler": scaler, "consecutive_skips": self.consecutive_skips}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned; without a scaler its state is left out."""
        if self.scaler is not None and self.scaler.is_enabled() and state_dict["grad_scaler"]:
            self.scaler.load_state_dict(state_dict["grad_scaler"])
        self.consecutive_skips = int(state_dict["consecutive_skips"])


def check_scaler(scaler: torch.amp.GradScaler | None) -> torch.amp.GradScaler | None:
    """Return *scaler* if it is a GradScaler or None.

    Raises:
        ArgumentTypeError: If it is anything else.
    """
    if scaler is None or isinstance(scaler, torch.amp.GradScaler):
        return scaler
    message = (
        f"grad_scaler must be a torch.amp.GradScaler or None, got {type(scaler).__name__}; "
        "such as torch.amp.GradScaler('cuda')"
    )
    raise ArgumentTypeError(message)


def describe_nonfinite(
    named_parameters: Iterable[tuple[str, torch.Tensor]], losses: Iterable[tuple[int, torch.Tensor]]
) -> str:
    """Say which parameter is the first without a finite gradient, and which micro-batch's loss was not finite."""
    for name, parameter in named_parameters:
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad.detach()).all()):
            culprit = f"first in {name!r}, shape {tuple(parameter.shape)}"
            break
    else:
        culprit = "every entry is finite, their norm is not"
    bad = [index for index, loss in losses if not bool(torch.isfinite(loss))]
    return f"{culprit}; " + (f"the loss of micro-batch {bad[0]} was not finite" if bad else "all losses were finite")
