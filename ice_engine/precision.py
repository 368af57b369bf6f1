"""Loss scale and non-finite gradients: alone decides whether a gradient is finite enough to step on.

The GradScaler scales, unscales and adapts its scale. Whether to step is decided here, from the
gradient as the handlers of ``GRADIENTS_READY`` left it: a NaN that one of them put in is caught as
well, and a gradient that one repaired is used. What comes later is not looked at again: of a clip of
the user's own the norm that it returns is judged, not what it left, and a handler of ``STEP_STARTED``
has the last word.
"""

from collections.abc import Callable
from typing import Any, Literal, cast

import torch

from ice_engine.arguments import choice, count
from ice_engine.errors import ArgumentValueError, AttachError, BackwardError, NonFiniteGradientError
from ice_engine.shared_scale import check_scaler, scale_tensor, shared, version

Policy = Literal["skip", "raise", "off"]


class Precision:
    """Drives one GradScaler, or none, and counts skipped steps.

    Args:
        scaler: A ``torch.amp.GradScaler`` for any device, or None.
        policy: What a non-finite gradient means: ``"skip"``, ``"raise"`` or ``"off"``; None for
            ``"skip"`` where a norm or a scaler is at hand, else ``"off"``.
        max_consecutive_skips: Skips in a row after which training stops; at least 1.
        has_norm: Whether clipping computes the norm anyway.

    Attributes:
        scaler: The scaler in use.
        goes_on: Whether somebody will close the open window; not if the run that it belongs to has failed.
        elsewhere: Whether, when its window was last closed, another one with the scaler was open on another rank.
        consecutive_skips: Skips in a row.
        last_finite_norm: The last norm that was neither infinite nor NaN; None if nobody computed one.
    """

    def __init__(
        self, scaler: torch.amp.GradScaler | None, policy: Policy | None, max_consecutive_skips: int, *, has_norm: bool
    ) -> None:
        choice("nonfinite", policy, (None, "skip", "raise", "off"))
        self.max_consecutive_skips = count("max_consecutive_skips", max_consecutive_skips, 1)
        self.scaler: torch.amp.GradScaler | None = None
        self.goes_on: Callable[[], bool] = always
        self.elsewhere: bool = False
        self._entered: tuple[torch.Tensor, int] | None = None
        self._use(check_scaler(scaler))
        self.start_afresh()
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
        return shared(cast("torch.amp.GradScaler", self.scaler)).scale() if self.enabled else None

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
        self._use(scaler)

    def _use(self, scaler: torch.amp.GradScaler | None) -> None:
        self.scaler = scaler
        if scaler is not None:
            shared(scaler).users.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "goes_on": always, "elsewhere": False, "_entered": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._use(self.scaler)

    def start_afresh(self) -> None:
        """Forget the skips and norms of the run before."""
        self.consecutive_skips: int = 0
        self.last_finite_norm: float | None = None

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """Multiply *loss* with the loss scale, which stays until every window that it entered is closed."""
        if self.scaler is None:
            return loss
        scaled = self.scaler.scale(loss)
        self.enter()
        return scaled

    def enter_by_caller(self) -> None:
        """Note a loss that the caller multiplied with the loss scale.

        Raises:
            ArgumentValueError: If other optimizers use the scaler, too.
        """
        if not self.enabled:
            return
        if len(shared(cast("torch.amp.GradScaler", self.scaler)).users) > 1:
            # Only of losses that it scales itself is it known here when they were scaled: before or after it adapted.
            message = (
                "update() without backward(), with a GradScaler that several optimizers share: the scale may have "
                "changed since the loss was scaled; call optimizer.backward(loss), which scales it, instead of "
                "scaler.scale(loss).backward(), or give each optimizer a GradScaler of its own"
            )
            raise ArgumentValueError(message)
        self.enter()

    def enter(self) -> None:
        """Note that losses of the present scale are in the window."""
        scaler = self.scaler
        if scaler is None:
            return
        shared(scaler).windows.add(self)
        scale = scale_tensor(scaler)
        if self._entered is None and scale is not None:
            self._entered = scale, version(scale)

    def require_one_scale(self) -> None:
        """Refuse a window in which the loss scale was changed.

        Raises:
            BackwardError: If it was.
        """
        if self._entered is None or self.scaler is None:
            return
        scale, before = self._entered
        if scale_tensor(self.scaler) is scale and version(scale) == before:
            return
        message = (
            "the loss scale was changed inside a window, whose gradients are of two scales now; take "
            "scaler.update() and scaler.load_state_dict() out of train_step, the optimizer adapts its scale itself"
        )
        raise BackwardError(message)

    def require_unscaled(self, loss: torch.Tensor) -> None:
        """Refuse a loss that ``scaler.scale()`` has just given: it would be scaled twice.

        Raises:
            BackwardError: If it is one.
        """
        scale = scale_tensor(self.scaler) if self.scaler is not None else None
        if scale is not None and getattr(loss.grad_fn, "_saved_other", None) is scale:
            message = f"backward() was given a loss that the GradScaler has scaled already; {_ONE_OWNER}"
            raise BackwardError(message)

    def require_one_owner(self, *optimizers: torch.optim.Optimizer) -> None:
        """Refuse gradients that the caller unscaled or stepped on, with any of *optimizers*, which stand for one.

        Raises:
            BackwardError: If it did.
        """
        states = getattr(self.scaler, "_per_optimizer_states", {})
        touched = [states.pop(id(optimizer), None) for optimizer in optimizers]  # so that the next window starts anew
        if any(touched):
            message = f"the GradScaler's unscale_() or step() was called inside a window; {_ONE_OWNER}"
            raise BackwardError(message)

    @property
    def open_beside(self) -> bool:
        """Whether another optimizer, which shares the scaler, has an open window."""
        return self.enabled and shared(cast("torch.amp.GradScaler", self.scaler)).open_beside(self)

    def require_loadable(self) -> None:
        """Refuse to load a loss scale into the open windows of others.

        Raises:
            AttachError: If there is one.
        """
        if self.open_beside:
            message = (
                "load_state_dict() would change the loss scale inside an open window of another optimizer, which "
                "shares the GradScaler; load before the run, or where all their windows are closed"
            )
            raise AttachError(message)

    def multiplier(self, factor: float, device: torch.device) -> float | torch.Tensor:
        """Return what makes the window's mean of what was accumulated: *factor* over the loss scale."""
        if not self.enabled:
            return factor
        scaler = cast("torch.amp.GradScaler", self.scaler)
        known = scale_tensor(scaler)
        # There is none before the first loss, which only another rank may have had.
        if (device if known is None else known.device).type == "cpu":
            return factor / shared(scaler).scale()  # numbers cost less than tensors of shape ()
        # scale() is the public way to the scale that does not make the host wait for it.
        scale = scaler.scale(torch.ones((), dtype=torch.float32, device=device))
        return scale.double().reciprocal() * factor

    def close(self, *, overflowed: bool | None = None) -> None:
        """Tell the loss scale that the window is closed; it adapts when no window that it entered is open.

        Args:
            overflowed: Whether a gradient was infinite or NaN; None if nobody looked.
        """
        self._entered = None
        if self.enabled:
            shared(cast("torch.amp.GradScaler", self.scaler)).close(self, overflowed)

    def judge(self, norm: float | None, found_inf: torch.Tensor | None = None) -> str | None:
        """Return why a gradient must not be applied, or None.

        Args:
            norm: The gradient's norm; None if nobody computed it.
            found_inf: Without a norm: above 0 if an entry is infinite or NaN, shape ().
        """
        measured = norm if norm is not None else found_inf
        if measured is None or self.policy == "off":
            return None
        value = float(measured)
        if norm is None:
            return "a gradient is infinite or NaN" if value else None
        if value - value == 0.0:  # neither infinite nor NaN
            self.last_finite_norm = value
            return None
        return f"gradient norm is {value}"

    def count(self, reason: str | None) -> None:
        """Count skips in a row; a *reason* of None ends the row."""
        self.consecutive_skips = 0 if reason is None else self.consecutive_skips + 1

    def stop_if_exhausted(self, report: str) -> None:
        """Raise if the policy, or the number of skips in a row, says stop.

        Raises:
            NonFiniteGradientError: With *report* in its message.
        """
        if self.last_finite_norm is not None:
            facts = f", last finite norm {self.last_finite_norm:.4g}"
        else:
            facts = ", last finite norm unknown (optimizer.measure('grad_norm') computes it)"
        if self.loss_scale is not None:
            facts = f", loss scale {self.loss_scale:g}{facts}"
        if self.policy == "raise":
            message = f"{report}{facts}. nonfinite='skip' would leave this step out and go on"
            raise NonFiniteGradientError(message)
        if self.consecutive_skips >= self.max_consecutive_skips:
            message = (
                f"{self.consecutive_skips} steps in a row were skipped{facts}: {report}. "
                "Lower the learning rate, clip, or use bfloat16; max_consecutive_skips= allows more"
            )
            raise NonFiniteGradientError(message)

    def state_dict(self) -> dict[str, Any]:
        """Return the scaler's state and the skips in a row as plain data."""
        scaler = self.scaler.state_dict() if self.scaler is not None and self.scaler.is_enabled() else None
        overflowed = None if scaler is None else shared(cast("torch.amp.GradScaler", self.scaler)).overflowed
        return {"grad_scaler": scaler, "overflowed": overflowed, "consecutive_skips": self.consecutive_skips}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned; without a scaler its state is left out."""
        if self.scaler is not None and self.scaler.is_enabled() and state_dict["grad_scaler"]:
            self.scaler.load_state_dict(state_dict["grad_scaler"])
        self.consecutive_skips = int(state_dict["consecutive_skips"])

    def load_round(self, overflowed: bool | None) -> None:
        """Take back whether windows that are closed overflowed, while others are open; None where there are none."""
        if self.enabled:
            shared(cast("torch.amp.GradScaler", self.scaler)).overflowed = overflowed


_ONE_OWNER = (
    "take scale(), unscale_(), step() and update() of the GradScaler out of train_step, the optimizer that was given "
    "it calls them"
)


def always() -> bool:
    """Return True: without an engine nobody knows that a window was given up."""
    return True
