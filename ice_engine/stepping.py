"""An optimizer that steps once per window, whoever says that a micro-batch has ended."""

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ice_engine.arguments import count
from ice_engine.closing import Closing
from ice_engine.distributed.build import Sharding, build
from ice_engine.distributed.gathered import gather_anew
from ice_engine.distributed.world import require_one_process
from ice_engine.errors import ArgumentTypeError, ArgumentValueError, AttachError, ClosureError, warn
from ice_engine.events import check_name
from ice_engine.facade import OptimizerFacade
from ice_engine.gradients import Gradient
from ice_engine.horizon import OnChange
from ice_engine.member import Member
from ice_engine.optimizer_arguments import as_optimizer, check_clip
from ice_engine.precision import Policy, Precision
from ice_engine.processors.group import check_entries, check_processors, set_initial_values
from ice_engine.typing import Clip, DictProcessor, OptimizerFactory
from ice_engine.window import Reduction, Tail, Window

logger = logging.getLogger(__name__)


class Stepping(Closing):
    """Steps a torch optimizer once per window; see :class:`ice_engine.optimizer.Optimizer` for the arguments.

    Fires the events of the engine that it is attached to, if there is one. Who calls ``update()``, what is saved
    and what is planned is the subclass's.
    """

    @as_optimizer
    def __init__(
        self,
        optimizer: torch.optim.Optimizer | OptimizerFactory,
        params: Any = None,
        *,
        name: str = "optimizer",
        processors: Sequence[DictProcessor] = (),
        accumulation_steps: int = 1,
        effective_batch_size: int | None = None,
        tail: Tail = "step",
        loss_reduction: Reduction = "mean",
        clip: Clip | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        nonfinite: Policy | None = None,
        max_consecutive_skips: int = 100,
        sharding: Sharding | None = None,
        on_change: OnChange = "error",
    ) -> None:
        check_name(name)
        given = check_processors(processors)
        window = Window(accumulation_steps, tail, loss_reduction, effective_batch_size)
        check_clip(clip)
        precision = Precision(grad_scaler, nonfinite, max_consecutive_skips, has_norm=clip is not None)
        if isinstance(optimizer, OptimizerFacade):
            message = (
                "optimizer is wrapped already; use it as it is or, for other settings, wrap a new torch optimizer: "
                "Optimizer(torch.optim.AdamW(model.parameters(), lr=3e-3), ...)"
            )
            raise ArgumentTypeError(message)
        inner = build(optimizer, params, sharding)
        check_entries(inner.param_groups, inner.defaults)
        owner = vars(inner).get("_ice_owner", lambda: None)()
        if owner is not None:
            message = (
                f"this {type(inner).__name__} is wrapped already, by optimizer {owner.name!r}; use that one or, for "
                f"other settings, make a new {type(inner).__name__}"
            )
            raise ArgumentTypeError(message)
        super().__init__(
            inner, clip, precision=precision, name=name, processors=given, window=window, on_change=on_change
        )
        vars(inner)["_ice_owner"] = weakref.ref(self)
        asked = {
            "accumulation_steps": accumulation_steps > 1,
            "effective_batch_size": effective_batch_size is not None,
            "tail": tail != "step",
            "clip": clip is not None,
            "grad_scaler": grad_scaler is not None,
            "nonfinite": nonfinite is not None,
            "processors": bool(self._processors),
        }
        self._of_windows = [argument for argument, given in asked.items() if given]
        if self.needs_closure and self._of_windows:
            message = (
                f"{type(self._inner).__name__} evaluates the loss in a closure, several times a step, so it cannot "
                f"accumulate, clip, scale, skip or schedule; leave out {', '.join(self._of_windows)}, and call "
                "optimizer.step(closure) in train_step"
            )
            raise ClosureError(message)
        if self._precision.enabled and any(p.dtype == torch.float16 for p in self._parameters()):
            message = (
                "a GradScaler cannot unscale the gradients of float16 parameters, which have no range to spare; "
                "keep them in float32 and run the model under torch.autocast, or use bfloat16 without a scaler"
            )
            raise ArgumentValueError(message)
        set_initial_values(given, self.param_groups if given else ())
        self._loaded: bool = False
        self._loaded_plain: bool = False  # a state without clocks
        self._said_drop: bool = False
        self._epoch_began: int = 0
        self._in_iteration: bool = False

    @property
    def grad_scaler(self) -> torch.amp.GradScaler | None:
        """The GradScaler it drives, or None."""
        return self._precision.scaler

    @property
    def short_windows(self) -> int:
        """Steps of this run whose window had fewer micro-batches than others, as the last of an epoch may have."""
        return self._short_windows

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of this run's windows by ``data``, ``compute`` and ``step``; empty unless ``times`` are measured."""
        return dict(self._measures.watch.total)

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Step the wrapped optimizer, always; by hand in an attached run with a warning.

        Args:
            closure: Re-evaluates the model and returns the loss, for optimizers such as LBFGS.
            **kwargs: Whatever else the wrapped optimizer's ``step`` takes.

        Returns:
            What the wrapped optimizer returns.
        """
        if self._running and not (self._stepping or self.needs_closure):
            warn(
                f"step() by hand in a run whose engine steps optimizer {self._name!r}: gradients are applied past its "
                "window, clipping and clocks. Take step() out of train_step, or do not attach"
            )
        elif self._of_windows and self._engine is None and not (self._stepping or self._clocks.counts["iteration"]):
            left_out, self._of_windows = self._of_windows, []
            warn(
                f"step() of optimizer {self._name!r} steps at once, without what it was given: {', '.join(left_out)}. "
                "Call optimizer.backward(loss) and optimizer.update() in the loop, or attach it to an engine"
            )
        for wait in self._waits:
            wait()
        found = super().step(closure, **kwargs)
        gather_anew(self._gathering)
        return found

    # Hooks run once, around the inner step: torch must not wrap this method as well.
    step.hooked = True  # type: ignore[attr-defined]

    def wait_before_steps(self, wait: Callable[[], object]) -> None:
        """Call *wait* before every step; it sees no gradients, and so changes nothing in how they are computed.

        torch's own ``register_step_pre_hook`` may look at gradients: where there is one, they are made final before.
        """
        self._waits.append(wait)

    def update(
        self,
        grad_scaler: torch.amp.GradScaler | None = None,
        grad_acc_steps: int | None = None,
        *,
        current_epoch: int | None = None,
        epoch_steps: int | None = None,
        global_steps: int | None = None,
        epoch_size: int | None = None,
    ) -> bool:
        """End a micro-batch, and step if that fills the window.

        The attached handler ends one per iteration; loops without an engine call it themselves, and so does a
        ``train_step`` that steps before its end, or several times: in many processes without arguments, and on all
        ranks as often. A micro-batch without :meth:`backward` counts as one that the caller differentiated; in many
        processes as none.

        Args:
            grad_scaler: The scaler that the caller scaled its loss with; kept from then on.
            grad_acc_steps: Micro-batches per window, instead of ``accumulation_steps``.
            current_epoch: Epoch, from 1, for processors.
            epoch_steps: Micro-batches of this epoch, this one included; at *epoch_size* a short window closes.
            global_steps: Micro-batches of the run, this one included; counted here if left out.
            epoch_size: Micro-batches per epoch.

        Returns:
            True if a step was applied; False inside a window and for a skipped step.

        Raises:
            AttachError: In many processes, with arguments, or where it is attached to no engine.
            RankError: If other ranks do something else.
            NoGradientsError: If the window closes and no parameter has a gradient.
            NonFiniteGradientError: By the ``nonfinite`` policy.
            ProcessorError: If a processor returns or writes something impossible; no param group has changed.
            BackwardError: If the loss scale was changed inside the window, or in a handler of this optimizer's events.
        """
        given = (grad_scaler, grad_acc_steps, current_epoch, epoch_steps, global_steps, epoch_size)
        if self._member is not None:
            if any(argument is not None for argument in given):
                message = (
                    "update() takes no arguments in many processes, where all must count alike; give "
                    "accumulation_steps= and grad_scaler= to Optimizer(...), its engine knows the rest"
                )
                raise AttachError(message)
            return self._update_on_all_ranks(self._member)
        require_one_process("update()", attached=False)
        size = self._window.size if grad_acc_steps is None else count("grad_acc_steps", grad_acc_steps, 1)
        self._end_micro_batch(
            grad_scaler,
            size,
            current_epoch=current_epoch,
            epoch_steps=epoch_steps,
            global_steps=global_steps,
            epoch_size=epoch_size,
        )
        if 0 < size <= self._window.micro_batches:
            return self._close(size)
        if self._clocks.epoch_ends and self._window.tail == "step":
            return self._close(size)
        if self._clocks.epoch_ends:
            self._drop_tail()
        return False

    def _update_on_all_ranks(self, member: Member) -> bool:
        self._check_time("update()")
        if self._window.pending:
            self._end_micro_batch(size=self._window.size)
        else:  # other ranks may have had a loss
            self._require_own_gradients(self._parameters())
        return member.end_micro_batch()

    def _end_micro_batch(
        self, grad_scaler: torch.amp.GradScaler | None = None, size: int = 1, **given: int | None
    ) -> None:
        if self.needs_closure or self._in_close:
            self._require_window()
            self._refuse_inside_close("update()")
        by_caller = not self._window.pending
        if self._member is not None:
            self._require_own_sum()  # before other ranks' gradients come to these
        if by_caller:
            self._window.require_weight()  # before anything is counted: a refused call changes nothing
        if grad_scaler is not None:
            self._precision.adopt(grad_scaler, unscaled_losses=bool(self._window.losses))
        if by_caller:
            self._precision.enter_by_caller()
        self._clocks.micro_batch(**given)
        self._window.end_micro_batch()
        measures_first = size > 1 and "noise_scale" in self._measures.wanted
        if measures_first:
            self._note_first()
        if by_caller or measures_first:
            self._note_gradients()

    def _note_first(self) -> None:
        """Keep the squared norm of the first micro-batch's mean gradient; the window's comes at its end."""
        parameters = [p for p in self._parameters() if p.grad is not None]
        if self._window.micro_batches == 1 and self._window.weight and parameters:
            multiplier = self._precision.multiplier(self._window.scale, parameters[0].device)
            self._measures.first(Gradient(parameters, multiplier).norm(), self._window.weight)

    def flush(self) -> bool:
        """Step now with the micro-batches at hand, if there are any.

        For loops without an engine whose epoch length is unknown; an attached engine does it itself. It steps whatever
        the ``tail``, which is heeded where ``update(epoch_steps=..., epoch_size=...)`` says that an epoch ends.

        Returns:
            True if a step was applied.

        Raises:
            AttachError: In many processes, where this rank would step alone.
            BackwardError: In a handler of this optimizer's events.
            NoGradientsError: As :meth:`update`, and so for the others that it raises.
        """
        require_one_process("flush()", attached=self._engine is not None)
        self._refuse_inside_close("flush()")
        if self._window.pending:
            self._end_micro_batch(size=self._window.size)
        return self._close(self._window.size) if self._window.micro_batches else False

    def _drop_tail(self) -> None:
        if self._window.tail == "drop" and self._window.is_open:
            level, self._said_drop = (logging.INFO if self._said_drop else logging.WARNING), True
            dropped = self._window.micro_batches
            logger.log(level, "optimizer %r: dropped %d micro-batches at the epoch's end", self._name, dropped)
            self._clear()
