"""What becomes of one window: losses go in, one step or one skip comes out, and a record of it."""

import dataclasses
import difflib
import inspect
import logging
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Real
from types import MappingProxyType
from typing import Any, Self, cast

import torch
from ignite.engine import Engine

from ice_engine import differentiate, fused
from ice_engine.arguments import choice, count
from ice_engine.clipping import ClipNorm
from ice_engine.clocks import Clocks, count_steps
from ice_engine.distributed import world
from ice_engine.distributed.build import Sharding, build
from ice_engine.distributed.rounds import gatherer, rounds
from ice_engine.distributed.world import require_one_process
from ice_engine.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    AttachError,
    BackwardError,
    ClosureError,
    NoGradientsError,
    warn,
)
from ice_engine.events import StepRecord, by_kind, check_name, fire, has_listeners, is_running, optimizer_events
from ice_engine.facade import OptimizerFacade
from ice_engine.gradients import Gradient, Multiplier
from ice_engine.horizon import Course, OnChange, Terms
from ice_engine.isolation import gradients_aside
from ice_engine.measures import MEASURES, Measures
from ice_engine.norms import entries
from ice_engine.peers import Member
from ice_engine.precision import Policy, Precision, first_nonfinite, nonfinite_loss
from ice_engine.processors.binding import Binding
from ice_engine.processors.group import (
    check_processors,
    followed_metrics,
    frozen,
    run_processors,
    set_initial_values,
)
from ice_engine.processors.group_mapping import group_name
from ice_engine.typing import Clip, DictProcessor, GroupClip, OptimizerFactory
from ice_engine.window import Reduction, Tail, Window

logger = logging.getLogger(__name__)

_FORGOTTEN = 32  # losses in one micro-batch, without any update() before, from which on attach() was forgotten


class Stepping(OptimizerFacade):
    """Steps a torch optimizer once per window; see :class:`ice_engine.optimizer.Optimizer` for the arguments.

    Fires the events of the engine that it is attached to, if there is one. Who calls ``update()``, what is saved
    and what is planned is the subclass's.
    """

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
        self._name = check_name(name)
        self._given = self._processors = check_processors(processors)
        self._window = Window(accumulation_steps, tail, loss_reduction, effective_batch_size)
        self._clip = _check_clip(clip)
        self._precision = Precision(grad_scaler, nonfinite, max_consecutive_skips, has_norm=clip is not None)
        if isinstance(optimizer, OptimizerFacade):
            message = (
                "optimizer is wrapped already; wrap a torch optimizer once: pass optimizer.inner, or use it as it is"
            )
            raise ArgumentTypeError(message)
        super().__init__(build(optimizer, params, sharding))
        owner = vars(self._inner).get("_ice_owner", lambda: None)()
        if owner is not None:
            message = f"this {type(self._inner).__name__} is wrapped already, by optimizer {owner.name!r}; use that one"
            raise ArgumentTypeError(message)
        vars(self._inner)["_ice_owner"] = weakref.ref(self)
        of_windows = {
            "accumulation_steps": accumulation_steps > 1,
            "effective_batch_size": effective_batch_size is not None,
            "tail": tail != "step",
            "clip": clip is not None,
            "grad_scaler": grad_scaler is not None,
            "nonfinite": nonfinite is not None,
            "processors": bool(self._processors),
        }
        if self.needs_closure and any(of_windows.values()):
            message = (
                f"{type(self._inner).__name__} evaluates the loss in a closure, several times a step, so it cannot "
                "accumulate, clip, scale, skip or schedule; leave out "
                f"{', '.join(name for name, given in of_windows.items() if given)}, and call "
                "optimizer.step(closure) in train_step"
            )
            raise ClosureError(message)
        if self._precision.enabled and any(p.dtype == torch.float16 for p in self._parameters()):
            message = (
                "a GradScaler cannot unscale the gradients of float16 parameters, which have no range to spare; "
                "keep them in float32 and run the model under torch.autocast, or use bfloat16 without a scaler"
            )
            raise ArgumentValueError(message)
        self._clocks = Clocks()
        self._course = Course(on_change)
        self._measurements: dict[str, tuple[float, ...]] = {}
        self._loaded: bool = False
        self._said_drop: bool = False
        self._stepping: bool = False
        self._closing: bool = False
        self._in_close: bool = False
        # The gradients that backward() left its parameters, and the version of each.
        self._left: tuple[list[torch.Tensor | None], list[int]] | None = None
        self._counts_before: dict[str, int] = {}
        self._overflowed: bool | None = None
        self._measures = Measures()
        self._size: int = self._window.size
        self._short_windows: int = 0
        self._epoch_began: int = 0
        self._parameter_names: dict[int, str] = {}
        self._engine: Engine | None = None
        self._member: Member | None = None
        self._last_record: StepRecord | None = None
        self._waits: list[Callable[[], object]] = []
        self._bound: Binding | None = None
        set_initial_values(self._processors, self.param_groups if self._processors else ())
        _ALL.add(self)

    # -- what is asked for --------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The prefix of its events and state attributes."""
        return self._name

    @property
    def events(self) -> Any:
        """Its events, ``ice_engine.optimizer_events(name)``."""
        return optimizer_events(self._name)

    @property
    def accumulation_steps(self) -> int | None:
        """Micro-batches per window; None until the first loss has decided, with ``effective_batch_size``."""
        return self._window.size or None

    @property
    def in_window(self) -> bool:
        """Whether losses have entered since the last step or skip, which a step is still to come for."""
        return self._window.is_open

    @property
    def processors(self) -> tuple[DictProcessor, ...]:
        """Its processors, in the order they run."""
        return self._processors

    @property
    def engine(self) -> Engine | None:
        """The engine it is attached to, or None."""
        return self._engine

    @property
    def clocks(self) -> dict[str, int]:
        """A copy of its counts so far, by the names ``step``, ``attempt``, ``skipped`` and ``iteration``."""
        return dict(self._clocks.counts)

    @property
    def steps_left(self) -> int | None:
        """Steps of this run still to come, if none is skipped, outside of a step; None while that is unknown."""
        since = self._clocks.counts["iteration"] - self._window.micro_batches
        return count_steps(**self._clocks.run_lengths(), window_size=self._size, tail=self._window.tail, since=since)

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run it is attached to; None while its length or that of a window is unknown."""
        return self._clocks.total_steps(self._window.size, self._window.tail)

    @property
    def short_windows(self) -> int:
        """Steps of this run whose window had fewer micro-batches than others, as the last of an epoch may have."""
        return self._short_windows

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of this run's windows by ``data``, ``compute`` and ``step``; empty unless ``times`` are measured."""
        return dict(self._measures.watch.total)

    def event(self, kind: str) -> Any:
        """Return its event of a kind, such as ``optimizer.event("STEP_COMPLETED")``, whatever its name."""
        return self.events[f"{self._name}_{kind}".upper()]

    @property
    def grad_scaler(self) -> torch.amp.GradScaler | None:
        """The GradScaler it drives, or None."""
        return self._precision.scaler

    @property
    def record(self) -> StepRecord | None:
        """What happened in the last closed window; None before the first."""
        return self._last_record

    def measure(self, *what: str) -> Self:
        """Let the record of every step say more.

        Args:
            what: ``"grad_norm"``, if nothing else computes it (one more pass over the gradients); ``"noise_scale"``,
                the batch size, in items, from which on a larger one brings little (one more pass over the gradients
                of the first micro-batch); ``"update_ratio"``, how far the step moves each param group, as a part of
                its length (a copy of the parameters); ``"times"``, the seconds of the window spent on data, on
                forward and backward, and on the step (on a GPU, of the host; in an attached run).

        Returns:
            This optimizer.

        Raises:
            ArgumentValueError: If there is no such measure.

        Examples:
            >>> from ice_engine import Optimizer
            >>> weight = torch.nn.Parameter(torch.tensor(2.0))
            >>> optimizer = Optimizer(torch.optim.SGD([weight], lr=0.1)).measure("grad_norm", "update_ratio")
            >>> optimizer.backward(weight * 3.0)
            >>> stepped = optimizer.update()
            >>> float(optimizer.record.grad_norm), round(float(optimizer.record.update_ratio["group_0"]), 4)
            (3.0, 0.15)
        """
        for measure in what:
            choice("measure()", measure, MEASURES)
        self._measures.wanted |= {*what}
        return self

    # -- one micro-batch ----------------------------------------------------------------------------------

    def backward(self, loss: torch.Tensor, weight: float | None = None, *, retain_graph: bool = False) -> None:
        r"""Differentiate *loss* into the open window.

        The step's gradient becomes the mean over all items of the window,
        :math:`\sum_m w_m \nabla L_m / \sum_m w_m`, whatever the sizes of its micro-batches.

        Args:
            loss: A mean over its items (or their sum, with ``loss_reduction="sum"``), shape ().
            weight: Number of items behind the loss, at least 0; one with weight 0 contributes nothing, even
                if it is NaN. Left out in all calls: every micro-batch weighs the same, and several
                losses in one micro-batch add up.
            retain_graph: Keep the graph for another ``backward()``, such as that of a second optimizer with
                the same loss.

        Raises:
            ArgumentTypeError: If *loss* is not a tensor or *weight* not a number.
            ArgumentValueError: If *weight* is negative or not finite.
            BackwardError: If *loss* is no scalar or requires no gradient, if only some losses of the window
                have a weight, if somebody else put, changed or cleared a gradient since the window opened, in a
                handler of this optimizer's events, or if the engine that this is attached to is not running.
        """
        # Once per micro-batch: here, and in what is called from here, the usual is found out by cheap questions, and
        # what is wrong by the functions that say so.
        window, engine = self._window, self._engine
        if type(loss) is not torch.Tensor or not loss.requires_grad or loss.numel() != 1:
            self._check_loss(loss, weight)
        if self._in_close or engine is None or not is_running(engine) or self.needs_closure:
            self._check_time()
        parameters = self._parameters()
        self._require_own_gradients(parameters)
        if self._precision.scaler is not None:
            self._precision.require_unscaled(loss)
            self._precision.require_one_owner(self, self._inner)
        first = window.first
        # In a window of one micro-batch, half precision makes no difference.
        part = window.enter(loss, weight, half=window.size != 1 and self._begins_in_half)
        if window.first != first:
            self._say_size()
        if len(window.losses) == _FORGOTTEN and engine is None and not self._clocks.counts["iteration"]:
            warn(
                f"backward() was called {_FORGOTTEN} times and update() never: optimizer {self._name!r} does not "
                "step; call optimizer.attach(engine) before the run, or optimizer.update() after each micro-batch"
            )
        if part is None:
            self._pass_over(loss)
            return
        if window.shrink != 1.0:
            Gradient([p for p in parameters if p.grad is not None], window.shrink).multiply()
        self._differentiate(part, retain_graph=retain_graph)
        self._left = _gradients_and_versions(parameters)

    def _check_loss(self, loss: Any, weight: float | None) -> None:
        if not isinstance(loss, torch.Tensor):
            message = f"loss must be a tensor, got {type(loss).__name__}; pass the loss itself, not loss.item()"
            raise ArgumentTypeError(message)
        if loss.numel() != 1:
            message = f"loss must be a scalar, got shape {tuple(loss.shape)}; reduce it first: loss.mean()"
            raise BackwardError(message)
        if not loss.requires_grad and self._window.items(weight) != 0.0:
            message = (
                "loss requires no grad: no trainable parameter is behind it; "
                "look for detach(), torch.no_grad() or frozen parameters between the model and the loss"
            )
            raise BackwardError(message)

    def _check_time(self) -> None:
        self._require_window()
        self._refuse_inside_close("backward()")
        if self._engine is not None and not self._running:
            message = (
                f"backward() outside a run: optimizer {self._name!r} is attached to an engine that is not running, "
                "so nobody would step; call it in train_step, or optimizer.detach() for a loop of your own"
            )
            raise BackwardError(message)

    @property
    def _begins_in_half(self) -> bool:
        return not self._window.is_open and any(p.dtype == torch.float16 for p in self._parameters())

    def _differentiate(self, part: torch.Tensor, *, retain_graph: bool) -> None:
        member = self._member
        if member is not None:
            member.sync.before_backward(part)
        try:
            if self._precision.scaler is not None:
                part = self._precision.scale(part)
            alone = self._engine is not None and len(vars(self._engine)["_ice_optimizers"]) == 1
            if not alone and (foreign := self._foreign_parameters()):
                # Beside another optimizer, such as a discriminator's beside a generator's, a loss reaches parameters
                # that it must not train: what it leaves there would enter the other's step.
                with gradients_aside(foreign) as reached:
                    differentiate.backward(part, retain_graph=retain_graph)
                    if self._engine is None and reached():
                        self._refuse_reaching()
            else:
                differentiate.backward(part, retain_graph=retain_graph)
            if member is not None:
                member.differentiated += 1
        except BaseException as error:
            if member is not None:
                member.broken = True
            _note_retain_graph(error)
            # Part of the gradients may be there and part not; the caller may catch this and go on.
            self._discard("a backward() that failed")
            raise

    def _say_size(self) -> None:
        """Tell what was decided; loudly, if a resumed run's windows no longer hold what they should."""
        window = self._window
        items = window.size * window.ranks * window.first
        other = window.batch is not None and window.size > 1 and not 0.5 < items / window.batch < 2.0  # noqa: PLR2004
        logger.log(
            logging.WARNING if other else logging.INFO,
            "optimizer %r, effective_batch_size=%s: windows of %d micro-batches, of %g items, in %d processes: %g",
            self._name,
            window.batch,
            window.size,
            window.first,
            window.ranks,
            items,
        )

    def _pass_over(self, loss: torch.Tensor) -> None:
        """Let a loss that weighs nothing reach no gradient, and still be one of the backward passes of all ranks."""
        if self._member is not None and self._member.sync.reduces:
            self._member.sync.before_backward(loss)
            with gradients_aside(self._foreign_parameters()):
                self._member.sync.take_part(loss)
            self._member.differentiated += 1
            self._note_gradients()

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
        for wait in self._waits:
            wait()
        return super().step(closure, **kwargs)

    # Hooks run once, around the inner step: torch must not wrap this method as well.
    step.hooked = True  # type: ignore[attr-defined]

    def wait_before_steps(self, wait: Callable[[], object]) -> None:
        """Call *wait* before every step; it sees no gradients, and so changes nothing in how they are computed.

        torch's own ``register_step_pre_hook`` may look at gradients: where there is one, they are made final before.
        """
        self._waits.append(wait)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters; the window does it after every step.

        Args:
            set_to_none: Set them to None rather than to zeros.

        Raises:
            BackwardError: Inside an open window, whose gradients would be lost; one that a failed run left open is
                dropped.
        """
        if self._window.is_open and self._engine is not None and not self._running:
            self._clear()
        if self._window.is_open:
            done = self._window.micro_batches + self._window.pending
            message = (
                f"zero_grad() inside an open window of optimizer {self._name!r} would lose the gradients of {done} "
                "micro-batches; take it out of train_step, gradients are cleared after every step"
            )
            raise BackwardError(message)
        super().zero_grad(set_to_none)

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

        The attached handler calls it once per iteration; loops without an engine call it themselves. A
        micro-batch without :meth:`backward` counts as one that the caller differentiated.

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
            NoGradientsError: If the window closes and no parameter has a gradient.
            NonFiniteGradientError: By the ``nonfinite`` policy.
            ProcessorError: If a processor returns or writes something impossible; no param group has changed.
            BackwardError: If the loss scale was changed inside the window, or in a handler of this optimizer's events.
        """
        require_one_process("update()")
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

    def _end_micro_batch(
        self, grad_scaler: torch.amp.GradScaler | None = None, size: int = 1, **given: int | None
    ) -> None:
        if self.needs_closure or self._in_close:
            self._require_window()
            self._refuse_inside_close("update()")
        by_caller = not self._window.pending
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

    def flush(self) -> bool:
        """Step now with the micro-batches at hand, if there are any.

        For loops without an engine whose epoch length is unknown; an attached engine does it itself. It steps whatever
        the ``tail``, which is heeded where ``update(epoch_steps=..., epoch_size=...)`` says that an epoch ends.

        Returns:
            True if a step was applied.
        """
        self._refuse_inside_close("flush()")
        if self._window.pending:
            self._window.end_micro_batch()
        return self._close(self._window.size) if self._window.micro_batches else False

    def _drop_tail(self) -> None:
        if self._window.tail == "drop" and self._window.is_open:
            level, self._said_drop = (logging.INFO if self._said_drop else logging.WARNING), True
            dropped = self._window.micro_batches
            logger.log(level, "optimizer %r: dropped %d micro-batches at the epoch's end", self._name, dropped)
            self._clear()

    def report(self, **metrics: float) -> None:
        """Tell schedules that follow a metric, such as ``schedules.plateau(metric="loss")``, what was measured.

        Args:
            metrics: One new value of each; a number or a tensor with one element, the same on every rank.

        Raises:
            ArgumentTypeError: If a value is not a number.
            ArgumentValueError: If no schedule follows it, and one follows a metric of almost this name.

        Examples:
            >>> from ice_engine import Optimizer
            >>> optimizer = Optimizer(torch.optim.SGD([torch.nn.Parameter(torch.ones(()))], lr=0.1))
            >>> optimizer.report(loss=0.25)  # such as evaluator.state.metrics["loss"], in a handler of EPOCH_COMPLETED

        Checkpoint:
            All values of the run are in :meth:`state_dict`, as lists of numbers.
        """
        for metric, value in metrics.items():
            plain = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
            if isinstance(plain, bool) or not isinstance(plain, Real):
                message = f"report({metric}=...) must be a number, got {value!r} ({type(value).__name__})"
                raise ArgumentTypeError(message)
            followed = followed_metrics(self._processors)
            if metric not in followed and (close := difflib.get_close_matches(metric, followed, n=1)):
                message = f"report({metric}=...): no schedule follows {metric!r}; did you mean {close[0]!r}?"
                raise ArgumentValueError(message)
            self._measurements[metric] = (*self._measurements.get(metric, ()), float(plain))

    def _foreign_parameters(self) -> list[torch.Tensor]:
        if self._engine is not None:
            others = vars(self._engine)["_ice_optimizers"]
        else:
            # Those that a loss of this one would spoil; not windows whose losses the caller differentiates itself.
            others = [other for other in [*_ALL] if other._engine is None and other._window.losses]  # noqa: SLF001
        mine = {id(p) for p in self._parameters()} if others else ()
        of_others = (p for other in others if other is not self for p in other._parameters())  # noqa: SLF001 - own class
        return [p for p in of_others if id(p) not in mine]

    def _refuse_reaching(self) -> None:
        message = (
            f"a loss of optimizer {self._name!r} reaches parameters of another one, whose window is open; write "
            f"with {self._name}.toggle(module): around it, with the module that it only passes through, or attach both "
            "to one engine, which keeps them apart"
        )
        raise BackwardError(message)

    def _refuse_while_closing(self, what: str) -> None:
        if self._closing:
            message = (
                f"{what} of optimizer {self._name!r} in a handler of GRADIENTS_READY or STEP_STARTED, while its "
                f"window is being stepped; do it on {self._name.upper()}_STEP_COMPLETED"
            )
            raise AttachError(message)

    def _refuse_inside_close(self, what: str) -> None:
        if self._in_close:
            message = (
                f"{what} of optimizer {self._name!r} in a handler of its own events, while its window is closed: its "
                "gradients would enter this step or be cleared after it; call it in train_step, or in a handler of "
                "ITERATION_COMPLETED"
            )
            raise BackwardError(message)

    def _note_gradients(self) -> None:
        self._left = _gradients_and_versions(self._parameters())

    def _require_own_gradients(self, parameters: Sequence[torch.Tensor]) -> None:
        """Refuse gradients that backward() did not leave as they are: in the window's mean they would be wrong."""
        if self._left is None:
            if has_gradient(parameters):
                message = (
                    f"parameters of optimizer {self._name!r} have gradients that did not come from its backward(); "
                    f"{_OWN_GRADIENTS}; optimizer.zero_grad() clears what is left from before"
                )
                raise BackwardError(message)
            return
        gradients, versions = _gradients_and_versions(parameters)
        if versions == self._left[1] and all(map(operator.is_, gradients, self._left[0])):
            return  # as every time; what follows looks for the one that differs
        for now, gradient, is_now, version in zip(gradients, self._left[0], versions, self._left[1], strict=False):
            if now is gradient and is_now == version:
                continue
            cleared = gradient is not None and (now is None or not bool(entries(now).any()))
            self._discard("model.zero_grad()" if cleared else "changed gradients")
            message = (
                f"gradients of optimizer {self._name!r} were cleared inside its window, by model.zero_grad()? Take "
                "that out of train_step, gradients are cleared after every step"
                if cleared
                else f"gradients of optimizer {self._name!r} were changed inside its window, not by its backward(); "
                f"{_OWN_GRADIENTS}; a handler of {self._name.upper()}_GRADIENTS_READY may change the window's"
            )
            raise BackwardError(message)

    @property
    def _running(self) -> bool:
        return self._engine is not None and is_running(self._engine)

    def _require_window(self) -> None:
        if self.needs_closure:
            message = (
                f"{type(self._inner).__name__} evaluates the loss in a closure; "
                "call optimizer.step(closure) in train_step, without backward() and update()"
            )
            raise ClosureError(message)

    # -- one window ---------------------------------------------------------------------------------------

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
            self._closing = False
            self._clear()
            self._in_close = False

    def _attempt(self) -> bool:
        window = self._window
        if self._precision.scaler is not None:
            self._precision.require_one_scale()
            self._precision.require_one_owner(self, self._inner)
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
        norm, found_inf = self._measure(gradient, parameters)
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
        reason = f"{reason}, {first_nonfinite(self.named_parameters())}; {self._nonfinite_losses()}"
        self._skip(reason, norm)
        counts, epoch = self._clocks.counts, self._clocks.epoch
        place = f"attempt {counts['attempt']}, iteration {counts['iteration']}"
        place += "" if epoch is None else f", epoch {epoch}"
        precision.stop_if_exhausted(f"{reason} (optimizer {self._name!r}, {place}, rank {world.rank()})")
        return False

    def _nonfinite_losses(self) -> str:
        bad = nonfinite_loss(self._window.losses)
        if self._member is not None:
            told = rounds().texts(bad, "the report on a gradient that is not finite")
            bad = ", ".join(f"rank {r}: {text}" for r, text in enumerate(told) if text)
        return bad or "micro-batch unknown: all losses were finite"

    @property
    def _folded_clip(self) -> ClipNorm | None:
        """The clip, if it is one factor for all gradients, so that it takes no pass of its own."""
        clip = self._clip
        return clip if isinstance(clip, ClipNorm) and not (clip.per_group or clip.error_if_nonfinite) else None

    def _measure(
        self, gradient: Gradient, parameters: list[torch.Tensor]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the norm before clipping and, without a norm, whether an entry is infinite or NaN."""
        clip = self._folded_clip
        if clip is not None or (self._clip is None and self._measures.wants_norm):
            return gradient.norm(2.0 if clip is None else clip.norm_type), None
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
        if self._precision.policy == "off" or (self._takes_factor(gradient) and gradient.is_finite()):
            return None, None
        return None, gradient.multiply_and_check()

    def _takes_factor(self, gradient: Gradient) -> bool:
        """Whether the optimizer multiplies the gradients itself: it can, and nobody looks at them before."""
        return (
            bool(gradient.plain)
            and fused.takes_factor(self._inner, gradient.plain)
            and "step" not in vars(self)
            and not self._listens("STEP_STARTED")
            and self._binding.blind
        )

    def _step(self, gradient: Gradient, norm: torch.Tensor | None, factor: Multiplier) -> None:
        left: Multiplier = 1.0
        if self._takes_factor(gradient):
            left = gradient.final(factor)
        else:
            gradient.multiply(factor)
        if self._processors:
            self._run_processors()
        elif self._window.batch is not None and self._engine is not None and self._course.unsettled:
            self._settle(self._window.micro_batches)  # the first loss has told how long windows are
        self._count("step")
        record_before = self._last_record
        try:
            self._note(norm, None, factor)
            if self._fire("STEP_STARTED"):
                self._note(norm, None, factor)  # again: torch's and Ignite's schedulers sit there
            self._stepping = True
            if self._measures.wanted:
                self._measures.before_step(
                    {group_name(group, i): group["params"] for i, group in enumerate(self.param_groups)}
                )
            if "step" in vars(self):  # patched in by torch's schedulers
                self.step()
            else:
                for wait in self._waits:
                    wait()
                fused.step_with(self._inner, left, gradient.device)
        except BaseException:
            self._count("step", -1)
            self._publish_record(record_before)
            raise
        finally:
            self._stepping = False
        self._short_windows += self._window.micro_batches < self._size
        if self._measures.wanted:
            found = self._measures.after_step(self._window.weight)
            self._publish_record(dataclasses.replace(cast("StepRecord", self._last_record), **found))
        self._end_window("STEP_COMPLETED")

    def _run_processors(self) -> None:
        binding = self._binding
        # Loaded in a loop without an engine, or in the middle of a run; or the run's length was changed.
        if self._course.configured is not None or self._course.outdated(self._clocks):
            self._settle(self._window.micro_batches)
        if self._window.batch is not None and self._engine is not None and self._course.unsettled:
            self._settle(self._window.micro_batches)  # the first loss has told how long windows are
            binding = self._binding
        context = self._clocks.context(self._size, self._window.tail)
        if not binding.run(context):
            # What the clocks alone decide is the same on every rank, as they are; anything else has to be compared.
            gather = gatherer() if self._member is not None and not binding.clocks_alone else None
            run_processors(self._processors, self.param_groups, {**context, **self._owners()}, gather)

    @property
    def _binding(self) -> Binding:
        groups = self._inner.param_groups
        if self._bound is None or not self._bound.holds(self._processors, groups):
            self._bound = Binding(self._processors, groups)
        return self._bound

    def _note_first(self) -> None:
        """Keep the squared norm of the first micro-batch's mean gradient; the window's comes at its end."""
        parameters = [p for p in self._parameters() if p.grad is not None]
        if self._window.micro_batches == 1 and self._window.weight and parameters:
            multiplier = self._precision.multiplier(self._window.scale, parameters[0].device)
            self._measures.first(Gradient(parameters, multiplier).norm(), self._window.weight)

    def _owners(self) -> dict[str, Any]:
        measurements = MappingProxyType(self._measurements)
        return {
            "optimizer": self,
            "engine": self._engine,
            "n": self,
            "module_node": self,
            "measurements": measurements,
        }

    def _terms(self) -> Terms:
        window = self._window.terms()
        return Terms.of(self._clocks, {**window, "accumulation_steps": self._size or None}, self._processors)

    def _settle(self, pending: int = 0) -> None:
        if not self._size:
            return  # nobody knows yet how many steps the run has; the first one settles it
        self._processors = self._course.settle(
            self._name,
            self._terms(),
            processors=self._processors,
            groups=self.param_groups,
            clocks=self._clocks,
            owners=self._owners(),
            pending=pending,
        )

    def _skip(self, reason: str, norm: torch.Tensor | None = None) -> bool:
        self._count("skipped")
        self._note(norm, reason)
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

    def _count(self, clock: str, by: int = 1) -> None:
        self._clocks.counts[clock] += by
        if self._engine is not None:
            setattr(self._engine.state, f"{self._name}_{clock}", self._clocks.counts[clock])

    def _fire(self, kind: str) -> bool:
        return self._engine is not None and fire(self._engine, by_kind(self._name)[kind])

    def _listens(self, kind: str) -> bool:
        return self._engine is not None and has_listeners(self._engine, by_kind(self._name)[kind])

    def _publish(self) -> None:
        if self._engine is not None:
            for clock in ("step", "attempt", "skipped"):
                self._count(clock, 0)
            setattr(self._engine.state, f"{self._name}_record", self._last_record)

    def _note(self, norm: torch.Tensor | None, reason: str | None, factor: Multiplier | None = None) -> None:
        binding, clip = self._binding, self._clip
        record = StepRecord(
            step=self._clocks.counts["step"],
            attempt=self._clocks.counts["attempt"],
            iteration=self._clocks.counts["iteration"],
            epoch=self._clocks.epoch,
            micro_batches=self._window.micro_batches,
            weight=self._window.weight,
            grad_norm=norm,
            clipped_norm=clip.after(norm, factor) if isinstance(clip, ClipNorm) and norm is not None else None,
            loss_scale=self._precision.loss_scale,
            values={
                name: {key: frozen(group[key]) for key in binding.keys if key in group}
                for name, group in zip(binding.names, self._inner.param_groups, strict=True)
            },
            skipped=reason,
        )
        self._publish_record(record)

    def _publish_record(self, record: StepRecord | None) -> None:
        self._last_record = record
        if self._engine is not None:
            setattr(self._engine.state, f"{self._name}_record", record)

    def _clear(self) -> None:
        # Whatever was raised: the loss scale must not stay in the middle of a window.
        self._precision.close(overflowed=self._overflowed)
        self._overflowed = None
        self._measures.forget()
        if self._window.is_open:
            self._window.reset()
        self._left = None
        self._release()

    def _release(self) -> None:
        # torch's zero_grad() opens a range for the profiler and sorts the gradients, for 7 us; there may be another.
        if "zero_grad" in vars(self._inner) or type(self._inner).zero_grad is not torch.optim.Optimizer.zero_grad:
            self.zero_grad()
            return
        for parameter in self._parameters():
            parameter.grad = None

    def _discard(self, cause: str) -> None:
        if self._window.is_open:
            dropped = self._window.micro_batches + self._window.pending
            self._clear()
            warn(f"optimizer {self._name!r} dropped the {dropped} micro-batches of a window that {cause} left open")

    def _parameters(self) -> list[torch.Tensor]:
        groups = self._inner.param_groups
        return groups[0]["params"] if len(groups) == 1 else [p for group in groups for p in group["params"]]

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield its parameters with their names: given ones, the attached model's, or their places in the groups."""
        for names, group in zip(self._names(), self.param_groups, strict=True):
            yield from zip(names, group["params"], strict=True)

    def _names(self) -> list[list[str]]:
        return [
            group.get("param_names")
            or [self._parameter_names.get(id(p), f"param_groups.{i}.params.{j}") for j, p in enumerate(group["params"])]
            for i, group in enumerate(self.param_groups)
        ]


_ALL: weakref.WeakSet[Stepping] = weakref.WeakSet()

_OWN_GRADIENTS = (
    "call optimizer.backward(loss) instead of loss.backward(), and keep another optimizer's loss from them: "
    "write with other.toggle(module): around it, of the module that has them, or detach()"
)


def has_gradient(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether one of *parameters* has a gradient."""
    for parameter in parameters:  # noqa: SIM110 - any() takes twice the time, in every iteration
        if parameter.grad is not None:
            return True
    return False


def _gradients_and_versions(parameters: Iterable[torch.Tensor]) -> tuple[list[torch.Tensor | None], list[int]]:
    gradients = [parameter.grad for parameter in parameters]
    return gradients, [-1 if g is None else g._version for g in gradients]  # noqa: SLF001 - has no public name


def _note_retain_graph(error: BaseException) -> None:
    if "backward through the graph a second time" in str(error) and hasattr(error, "add_note"):  # from Python 3.11 on
        error.add_note(
            "For optimizers that share a loss: optimizer.backward(loss, retain_graph=True) in all but the last"
        )


def _check_clip(clip: Clip | None) -> Clip | None:
    if clip is not None and not callable(clip):
        message = f"clip must be callable, got {clip!r}; such as clip=ice.clip_norm({clip!r})"
        raise ArgumentTypeError(message)
    try:
        signature = inspect.signature(clip) if clip is not None else None
    except (TypeError, ValueError):  # of compiled code
        return clip
    try:
        if signature is not None:
            signature.bind(())
    except TypeError as err:
        message = (
            f"clip is called with the parameters alone, and {getattr(clip, '__name__', clip)} cannot be: {err}; "
            "write clip=ice.clip_norm(1.0), or bind the rest with functools.partial"
        )
        raise ArgumentTypeError(message) from err
    return clip
