"""What becomes of a full window: its gradient made final, one step or one skip, and a record of it."""

import dataclasses
import json
import logging
from collections.abc import Callable
from numbers import Real
from typing import Any, cast

import torch
from torch.distributed.fsdp import FSDPModule

from ice_engine import fused
from ice_engine.accumulating import Accumulating
from ice_engine.clipping import ClipNorm
from ice_engine.distributed import world
from ice_engine.distributed.gathered import gather_anew
from ice_engine.distributed.rounds import rounds
from ice_engine.errors import ArgumentTypeError, AttachError, NoGradientsError
from ice_engine.events import StepRecord
from ice_engine.gradients import Gradient, Multiplier, is_one
from ice_engine.nonfinite import in_words, seen
from ice_engine.processors.binding import Binding
from ice_engine.processors.group import frozen, take_back
from ice_engine.processors.group_mapping import Written, group_name
from ice_engine.typing import Clip, GroupClip

logger = logging.getLogger(__name__)


class Closing(Accumulating):
    """Steps or skips, once per window.

    Args:
        inner: The wrapped optimizer.
        clip: Limits the gradient; None for none.
        **accumulated: What accumulates it.
    """

    def __init__(self, inner: torch.optim.Optimizer, clip: Clip | None, **accumulated: Any) -> None:
        super().__init__(inner, **accumulated)
        self._clip = clip
        self._gathering: list[FSDPModule] = []
        self._stepping: bool = False
        self._closing: bool = False
        self._counts_before: dict[str, int] = {}
        self._short_windows: int = 0
        self._waits: list[Callable[[], object]] = []

    def _spreads(self, *, weighted: bool) -> bool:
        # Or else the mean would take a pass of its own: of a DDP step of 5M parameters on a CPU, 5 %.
        alone = self._clip is None and self._precision.policy == "off" and not self._precision.enabled
        if weighted and alone and not all(group.get("fused") for group in self.param_groups):
            return True
        return super()._spreads(weighted=weighted)

    def _close(self, size: int) -> bool:
        self._closing = self._in_close = True
        self._size = size
        self._counts_before = dict(self._clocks.counts)
        try:
            return self._attempt()
        except BaseException:
            # Of what raised before it was a step or a skip nothing is left: attempt = step + skipped stays true.
            if self._closing:
                self._count("attempt", self._counts_before["attempt"] - self._clocks.counts["attempt"])
            raise
        finally:
            if self._closing:
                self._clear()
            elif self._in_close:
                self._let_go()
            self._closing = self._in_close = False

    def _attempt(self) -> bool:
        window = self._window
        if self._precision.scaler is not None:
            self._precision.require_one_scale()
            self._precision.require_one_owner(self, self._inner)
        if self._member is None:  # else they are also of other ranks by now
            self._require_own_sum()
        self._count("attempt")
        if window.weight == 0.0:
            return self._skip("the window's weight is 0")
        parameters = [p for p in self._parameters() if p.grad is not None]
        if not parameters:
            message = (
                f"no parameter of optimizer {self._name!r} has a gradient after {window.micro_batches} micro-batches; "
                "is the loss computed from the parameters it was given, and are they trainable?"
            )
            raise NoGradientsError(message)
        multiplier = self._precision.multiplier(window.scale, parameters[0].device)
        gradient = Gradient(parameters, multiplier)
        if not self._listens("GRADIENTS_READY"):
            return self._decide(gradient, parameters)
        if self._precision.enabled:
            # Before the handlers, whatever they raise or repair: the loss was too large all the same.
            self._overflowed = bool(gradient.multiply_and_check())
        gradient.multiply()
        self._fire("GRADIENTS_READY")
        parameters = [p for p in self._parameters() if p.grad is not None]
        if not parameters:
            message = (
                f"no parameter of optimizer {self._name!r} has a gradient after the handlers of GRADIENTS_READY; "
                "set gradients to 0 there, not to None"
            )
            raise NoGradientsError(message)
        return self._decide(Gradient(parameters, 1.0), parameters)

    def _decide(self, gradient: Gradient, parameters: list[torch.Tensor]) -> bool:
        precision, clip = self._precision, self._folded_clip
        norm, found_inf = self._measure(gradient, parameters, clip)
        if self._measures.wants_length:
            # A clip's norm may be another one than the length.
            self._measures.whole(norm if clip is None or clip.norm_type == 2.0 else gradient.norm())  # noqa: PLR2004
        # What the host waits for, once a window, to know whether there is a step.
        known = None if norm is None or precision.policy == "off" else float(norm)
        reason = precision.judge(known, found_inf)
        if reason is not None:
            # Perhaps only the norm of the scaled sum was beyond its type, and that of the mean is not.
            gradient.multiply()
            norm = gradient.norm(2.0 if clip is None else clip.norm_type)
            known = float(norm)
            reason = precision.judge(known)
        precision.count(reason)
        self._overflowed = bool(self._overflowed) or reason is not None
        if reason is None:
            factor = 1.0 if clip is None or norm is None else clip.factor(norm, known)
            self._step(gradient, norm, factor)
            return True
        reason = f"{reason}, {self._culprits()}"
        self._skip(reason, norm)
        counts, epoch = self._clocks.counts, self._clocks.epoch
        place = f"attempt {counts['attempt']}, iteration {counts['iteration']}"
        place += "" if epoch is None else f", epoch {epoch}"
        # All have the gradient by now, and say so; whose loss it came from is in the reason.
        place += f", {'rank' if self._member is None else 'reported by rank'} {world.rank()}"
        report = f"{reason} (optimizer {self._name!r}, {place})"
        precision.stop_if_exhausted(report)
        if world.rank() == 0:  # all ranks skip as one
            # By skips a GradScaler finds its scale.
            usual = precision.enabled or precision.consecutive_skips > 1
            logger.log(logging.INFO if usual else logging.WARNING, "skipped a step: %s", report)
        return False

    def _culprits(self) -> str:
        """Say what is not finite; all ranks say the same."""
        own = seen(self.named_parameters(), self._window.losses)
        if self._member is None:
            return in_words([own])
        told = rounds().texts(json.dumps(own), "the report on a gradient that is not finite")
        return in_words([json.loads(text) for text in told])

    @property
    def _folded_clip(self) -> ClipNorm | None:
        """The clip, if it is one factor for all gradients, so that it takes no pass of its own."""
        clip = self._clip
        return clip if isinstance(clip, ClipNorm) and not (clip.per_group or clip.error_if_nonfinite) else None

    def _measure(
        self, gradient: Gradient, parameters: list[torch.Tensor], folded: ClipNorm | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the norm before clipping and, without a norm, whether an entry is infinite or NaN."""
        if folded is not None or (self._clip is None and self._measures.wants_norm):
            return gradient.norm(2.0 if folded is None else folded.norm_type), None
        if self._clip is not None:
            gradient.multiply()
            if isinstance(self._clip, GroupClip) and self._clip.per_group:
                norm = self._clip.by_group([group["params"] for group in self.param_groups])
            else:
                norm = self._clip(parameters)
            whole = isinstance(norm, torch.Tensor) and norm.numel() == 1 and not norm.is_complex()
            if not whole and (isinstance(norm, bool) or not isinstance(norm, Real)):
                shape = f" of shape {tuple(norm.shape)}" if isinstance(norm, torch.Tensor) else ""
                message = (
                    f"clip returned {type(norm).__name__}{shape}; wanted the norm before clipping, one number, as from "
                    "ice.clip_norm"
                )
                raise ArgumentTypeError(message)
            # A copy: the record keeps it, and the clip may have one buffer for all its norms.
            return (
                norm.detach().clone().reshape(()) if isinstance(norm, torch.Tensor) else torch.tensor(float(norm))
            ), None
        if self._precision.policy == "off":
            return None, None
        if self._takes_factor(gradient, gradient.pending, self._binding) and gradient.is_finite():
            return None, None
        return None, gradient.multiply_and_check()

    def _takes_factor(self, gradient: Gradient, factor: Multiplier, binding: Binding) -> bool:
        """Whether the optimizer multiplies the gradients itself: it can, and nobody looks at them before."""
        plain = gradient.plain
        return (
            bool(plain)
            and fused.takes_factor(self._inner, plain, factor, shown=self._listens("STEP_COMPLETED"))
            and "step" not in vars(self)
            and not self._listens("STEP_STARTED")
            and binding.blind
        )

    def _step(self, gradient: Gradient, norm: torch.Tensor | None, factor: Multiplier) -> None:
        left = gradient.final(factor)
        binding = self._binding
        if not binding.blind:
            gradient.multiply(factor)
            left = 1.0
        written: list[Written] = []
        if self._processors:
            written = self._run_processors(binding)
            # It was looked up there; a function of the user's may have added groups since.
            binding = cast("Binding", self._bound) if binding.blind else self._binding
        elif self._window.batch is not None and self._engine is not None and self._course.unsettled:
            self._settle(self._window.micro_batches)  # the first loss has told how long windows are
        # Only now: whether it can, the processors may have changed, such as weight_decay.
        if not is_one(left) and not self._takes_factor(gradient, left, binding):
            gradient.multiply(factor)
            left = 1.0
        self._count("step")
        record_before = self._last_record
        try:
            self._note(binding, norm, None, factor)
            if self._fire("STEP_STARTED"):
                binding = self._binding
                self._note(binding, norm, None, factor)  # again: torch's and Ignite's schedulers sit there
            self._stepping = True
            if self._measures.wants_strides:
                self._measures.before_step(
                    {group_name(group, i): group["params"] for i, group in enumerate(self.param_groups)}
                )
            if "step" in vars(self):  # patched in by torch's schedulers
                self.step()
            else:
                for wait in self._waits:
                    wait()
                fused.step_with(self._inner, binding.form, left, gradient.device, plain=bool(gradient.plain))
                gather_anew(self._gathering)
        except BaseException:
            self._count("step", -1)
            self._publish_record(record_before)
            take_back(written)
            raise
        finally:
            self._stepping = False
        self._short_windows += self._window.micro_batches < self._size
        if found := self._measures.after_step(self._window.weight):
            self._publish_record(dataclasses.replace(cast("StepRecord", self._last_record), **found))
        self._end_window("STEP_COMPLETED")

    def _skip(self, reason: str, norm: torch.Tensor | None = None) -> bool:
        self._count("skipped")
        self._note(self._binding, norm, reason)
        self._end_window("STEP_SKIPPED")
        return False

    def _end_window(self, kind: str) -> None:
        # Before the event, so that a checkpoint saved by its handlers is of a whole step; gradients are
        # cleared after it, for handlers that look at them.
        self._precision.close(overflowed=self._overflowed)
        self._overflowed = None
        self._window.reset()
        self._closing = False
        self._fire(kind)

    def _note(
        self, binding: Binding, norm: torch.Tensor | None, reason: str | None, factor: Multiplier | None = None
    ) -> None:
        clip, window, counts = self._clip, self._window, self._clocks.counts
        record = StepRecord(
            step=counts["step"],
            attempt=counts["attempt"],
            iteration=counts["iteration"],
            epoch=self._clocks.epoch,
            micro_batches=window.micro_batches,
            weight=window.weight,
            grad_norm=norm,
            clipped_norm=clip.after(norm, factor) if isinstance(clip, ClipNorm) and norm is not None else None,
            loss_scale=self._precision.loss_scale,
            values={
                # frozen() is for tensors, and asks every entry of every group.
                name: {
                    key: value if type(value := group[key]) is float else frozen(value)
                    for key in binding.keys
                    if key in group
                }
                for name, group in zip(binding.names, self._inner.param_groups, strict=True)
            },
            skipped=reason,
            form=binding.form,
            times=self._measures.times if reason is None else None,
        )
        self._publish_record(record)

    def _refuse_while_closing(self, what: str) -> None:
        if self._closing:
            message = (
                f"{what} of optimizer {self._name!r} in a handler of GRADIENTS_READY or STEP_STARTED, while its "
                f"window is being stepped; do it on {self._name.upper()}_STEP_COMPLETED"
            )
            raise AttachError(message)
