"""The optimizer that steps itself: composes window, precision, clipping, processors and events."""

import contextlib
import copy
import dataclasses
import difflib
import logging
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from types import MappingProxyType
from typing import Any, cast

import torch
from ignite.engine import Engine, Events

from ice_engine import sharding as ranks
from ice_engine.arguments import choice, count
from ice_engine.clipping import ClipNorm
from ice_engine.clocks import Clocks
from ice_engine.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    AttachError,
    BackwardError,
    ClosureError,
    IceEngineWarning,
    NoGradientsError,
)
from ice_engine.events import StepRecord, check_name, fire, has_listeners, optimizer_events, register
from ice_engine.facade import OptimizerFacade
from ice_engine.gradients import Gradient
from ice_engine.hooks import HookRegistry
from ice_engine.horizon import Course, OnChange, Terms
from ice_engine.matching import LoadReport, fit, shapes
from ice_engine.measures import MEASURES, NoiseScale, Stopwatch, Strides
from ice_engine.plan import Plan
from ice_engine.precision import Policy, Precision, describe_nonfinite
from ice_engine.processors.group import (
    check_names,
    check_processors,
    followed_metrics,
    frozen,
    rewind,
    run_processors,
    set_initial_values,
    written_keys,
)
from ice_engine.processors.group_mapping import group_name
from ice_engine.state import pack, unpack
from ice_engine.typing import Clip, DictProcessor, GroupClip, OptimizerFactory
from ice_engine.window import Reduction, Tail, Window

logger = logging.getLogger(__name__)

_FORGOTTEN = 32  # losses in one micro-batch, without any update() before, from which on attach() was forgotten
_FIRST = -100  # order of our handlers: validation and checkpoints on the same event see the step already taken


class Optimizer(OptimizerFacade):
    """Wraps a torch optimizer and steps it, exactly once per window of micro-batches.

    It *is* a ``torch.optim.Optimizer``: schedulers, loggers and checkpoints take it unchanged, and
    ``step()`` always steps. Windows, the loss scale, clipping and processors live in
    :meth:`backward` and :meth:`update`; :meth:`attach` lets an Ignite engine call the latter.

    Args:
        optimizer: A torch optimizer, or a factory of one such as ``functools.partial(AdamW, lr=3e-3)``.
        params: With a factory: parameters, ``(name, parameter)`` pairs or param groups.
        name: Identifier that prefixes events, ``engine.state`` attributes and tags; unique per engine.
        processors: Functions from dict to dict, run in this order once per step and param group. A schedule over the
            whole run takes every iteration for a micro-batch; for an optimizer that gets a loss in some of them only,
            give it ``unit="iteration"`` or a ``total=`` of its own.
        accumulation_steps: Micro-batches per window, at least 1.
        tail: What becomes of a short last window of an epoch: ``"step"`` with its own mean,
            ``"carry"`` into the next epoch (and step at the run's end), or ``"drop"``.
        loss_reduction: What ``backward(loss, weight=n)`` is given: a ``"mean"`` over n items or their ``"sum"``.
        clip: Called with the parameters; limits their gradients and returns the norm before.
        grad_scaler: A ``torch.amp.GradScaler`` for any device. Optimizers may share one: its scale adapts once, when
            none of their windows is open that it entered.
        nonfinite: What an infinite or NaN gradient means: ``"skip"`` the step, ``"raise"``, or ``"off"``;
            None for ``"skip"`` where a norm or a scaler is at hand, else ``"off"``.
        max_consecutive_skips: Skips in a row after which training stops with an error; at least 1.
        sharding: ``"zero1"`` shards optimizer state over ranks (needs a factory); in one process nothing changes.
        on_change: What holds when a run is resumed and its schedules would give other values, because the horizon,
            the window, a schedule or an initial value changed: ``"error"`` stops, ``"replan"`` takes the new values,
            ``"keep"`` stays with the saved ones, ``"stretch"`` stretches what is left of the saved schedules over
            what is left of the run. All but the first say in one line what the next value becomes.

    Raises:
        ArgumentTypeError: If an argument has the wrong type, or *optimizer* is wrapped already.
        ArgumentValueError: If an argument has an impossible value.
        ClosureError: If the wrapped optimizer needs a closure, and windows or a scaler are asked for.

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor(1.0))
        >>> optimizer = Optimizer(torch.optim.SGD([weight], lr=0.1), accumulation_steps=2)
        >>> for target in (1.0, 3.0):
        ...     optimizer.backward(weight * target)
        ...     stepped = optimizer.update()
        >>> stepped, round(weight.item(), 4)  # 1 - 0.1 * (1 + 3) / 2
        (True, 0.8)

    Checkpoint:
        :meth:`state_dict` is torch's own with one key more, ``ice_engine``: clocks, loss scale and
        skips in a row. Schedules are functions of the clocks and need no state of their own.

    .. versionadded:: 0.1.0
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | OptimizerFactory,
        params: Any = None,
        *,
        name: str = "optimizer",
        processors: Sequence[DictProcessor] = (),
        accumulation_steps: int = 1,
        tail: Tail = "step",
        loss_reduction: Reduction = "mean",
        clip: Clip | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        nonfinite: Policy | None = None,
        max_consecutive_skips: int = 100,
        sharding: ranks.Sharding | None = None,
        on_change: OnChange = "error",
    ) -> None:
        self._name = check_name(name)
        self._given = self._processors = check_processors(processors)
        self._window = Window(accumulation_steps, tail, loss_reduction)
        if clip is not None and not callable(clip):
            message = f"clip must be callable, got {clip!r}; such as clip=ice.clip_norm({clip!r})"
            raise ArgumentTypeError(message)
        self._clip = clip
        self._precision = Precision(grad_scaler, nonfinite, max_consecutive_skips, has_norm=clip is not None)
        if isinstance(optimizer, OptimizerFacade):
            message = (
                "optimizer is wrapped already; wrap a torch optimizer once: pass optimizer.inner, or use it as it is"
            )
            raise ArgumentTypeError(message)
        super().__init__(ranks.build(optimizer, params, sharding))
        owner = vars(self._inner).get("_ice_owner", lambda: None)()
        if owner is not None:
            message = f"this {type(self._inner).__name__} is wrapped already, by optimizer {owner.name!r}; use that one"
            raise ArgumentTypeError(message)
        vars(self._inner)["_ice_owner"] = weakref.ref(self)
        if self.needs_closure and (accumulation_steps > 1 or grad_scaler is not None or clip is not None):
            message = (
                f"{type(self._inner).__name__} evaluates the loss in a closure, several times a step, so it cannot "
                "accumulate, clip or scale; leave out accumulation_steps, clip and grad_scaler, and call "
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
        self._stepping: bool = False
        self._closing: bool = False
        self._counts_before: dict[str, int] = {}
        self._overflowed: bool | None = None
        self._measured: frozenset[str] = frozenset()
        self._noise = NoiseScale()
        self._watch = Stopwatch()
        self._first: tuple[torch.Tensor, float] | None = None
        self._length: torch.Tensor | None = None
        self._size: int = accumulation_steps
        self._epoch_began: int = 0
        self._parameter_names: dict[int, str] = {}
        self._engine: Engine | None = None
        self._last_record: StepRecord | None = None
        set_initial_values(self._processors, self.param_groups if self._processors else ())

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

    def event(self, kind: str) -> Any:
        """Return its event of a kind, such as ``optimizer.event("STEP_COMPLETED")``, whatever its name."""
        return self.events[f"{self._name}_{kind}".upper()]

    @property
    def hooks(self) -> HookRegistry:
        """The hooks of the engine it is attached to."""
        if self._engine is None:
            message = f"optimizer {self._name!r} is not attached to an engine; call optimizer.attach(engine) first"
            raise AttachError(message)
        return HookRegistry(self._engine)

    @property
    def grad_scaler(self) -> torch.amp.GradScaler | None:
        """The GradScaler it drives, or None."""
        return self._precision.scaler

    @property
    def record(self) -> StepRecord | None:
        """What happened in the last closed window; None before the first."""
        return self._last_record

    def measure(self, *what: str) -> "Optimizer":
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
            >>> weight = torch.nn.Parameter(torch.tensor(2.0))
            >>> optimizer = Optimizer(torch.optim.SGD([weight], lr=0.1)).measure("grad_norm", "update_ratio")
            >>> optimizer.backward(weight * 3.0)
            >>> stepped = optimizer.update()
            >>> float(optimizer.record.grad_norm), round(float(optimizer.record.update_ratio["group_0"]), 4)
            (3.0, 0.15)
        """
        for measure in what:
            choice("measure()", measure, MEASURES)
        timed = "times" in self._measured
        self._measured |= {*what}
        if self._engine is not None and "times" in self._measured and not timed:
            self._start_watch(self._engine)
        return self

    def _start_watch(self, engine: Engine) -> None:
        name = f"{self._name}.iteration_started"
        HookRegistry(engine).add(Events.ITERATION_STARTED, self._on_iteration_started, name=name, order=_FIRST)

    # -- engine -------------------------------------------------------------------------------------------

    def attach(self, engine: Engine, model: torch.nn.Module | None = None) -> "Optimizer":
        """Let *engine* step this optimizer: after each iteration, and at an epoch's end if a window is open.

        Args:
            engine: The engine whose ``train_step`` calls :meth:`backward`.
            model: The module being trained; gives parameters their names in errors and checkpoints.

        Returns:
            This optimizer.

        Raises:
            AttachError: If it is attached, or another optimizer of the engine has its name or one of its
                parameters.
        """
        registry = HookRegistry(engine)
        if model is not None and not isinstance(model, torch.nn.Module):
            message = f"model must be a torch.nn.Module, got {type(model).__name__}"
            raise ArgumentTypeError(message)
        ranks.require_one_process("attach()")
        self._check_attachable(engine)
        if self._processors:
            check_names(self._processors, self.param_groups)
            set_initial_values(self._processors, self.param_groups)
        if model is not None:
            self._parameter_names = {id(p): n for n, p in model.named_parameters()}
        self._engine = engine
        register(engine, self._name)
        self._clocks.run = engine.state
        self._publish()
        for event, handler in (
            (Events.STARTED, self._on_started),
            (Events.ITERATION_COMPLETED, self._on_iteration_completed),
            (Events.EPOCH_COMPLETED | Events.TERMINATE_SINGLE_EPOCH, self._on_epoch_ended),
            (Events.EPOCH_COMPLETED, self._on_epoch_completed),
            (Events.TERMINATE | Events.COMPLETED, self._on_run_ended),
        ):
            registry.add(event, handler, name=f"{self._name}.{handler.__name__.removeprefix('_on_')}", order=_FIRST)
        if "times" in self._measured:
            self._start_watch(engine)
        vars(engine).setdefault("_ice_optimizers", []).append(self)
        return self

    def detach(self) -> None:
        """Undo :meth:`attach`; an open window is dropped with a warning.

        Raises:
            AttachError: If it is not attached.
        """
        registry = self.hooks
        self._refuse_while_closing("detach()")
        for hook in registry:
            if getattr(hook.hook, "__self__", None) is self:
                hook.remove()
        self._discard("detach()")
        self._clocks.leave()
        vars(self._engine)["_ice_optimizers"].remove(self)
        self._engine = None

    def _check_attachable(self, engine: Engine) -> None:
        if self._engine is not None:
            this = "this" if self._engine is engine else "another"
            message = f"optimizer {self._name!r} is attached to {this} engine already; call optimizer.detach() first"
            raise AttachError(message)
        mine = {id(p) for p in self._parameters()}
        for other in vars(engine).get("_ice_optimizers", ()):
            if other.name.lower() == self._name.lower():
                message = (
                    f"an optimizer named {other.name!r} is attached to this engine already; give each its own: "
                    "Optimizer(..., name='generator')"
                )
                raise AttachError(message)
            shared = [n for n, p in other.named_parameters() if id(p) in mine]
            if shared:
                message = (
                    f"optimizers {other.name!r} and {self._name!r} share {len(shared)} parameters ({shared[0]!r}...); "
                    "each would step on the other's gradients; give every parameter to one optimizer"
                )
                raise AttachError(message)

    def _on_started(self, engine: Engine) -> None:
        if self._window.is_open:
            self._discard("an exception")
        # As Ignite does with its own counters: a fresh run starts from 0, a resumed or loaded one does not.
        if engine.state.iteration == 0 and not self._loaded:
            self._clocks.counts = dict.fromkeys(self._clocks.counts, 0)
            self._clocks.plan = {}
            self._course.start_afresh()
            self._processors = self._given
            rewind(self._processors, self.param_groups if self._processors else ())
            self._measurements.clear()
        elif engine.state.iteration == 0 and self._clocks.counts["step"]:
            step = self._clocks.counts["step"]
            warnings.warn(
                f"optimizer {self._name!r} goes on at step {step}, as it was loaded, but its engine "
                "starts at iteration 0. To go on where the run was, load the engine's state too and, after a complete "
                "run, raise max_epochs",
                IceEngineWarning,
                stacklevel=2,
            )
        elif engine.state.iteration > 0 and not self._loaded and not self._clocks.counts["iteration"]:
            warnings.warn(
                f"the engine goes on at iteration {engine.state.iteration}, optimizer {self._name!r} starts at step 0, "
                "and so do its schedules; load its state too: optimizer.load_state_dict(...)",
                IceEngineWarning,
                stacklevel=2,
            )
        self._settle()
        self._loaded = False
        self._epoch_began = engine.state.iteration
        self.zero_grad()
        self._publish()

    def _on_iteration_started(self, _: Engine) -> None:
        self._watch.lap("data")

    def _on_iteration_completed(self, _: Engine) -> None:
        if "times" in self._measured:
            self._watch.lap("compute")
        if self._window.pending:
            self.update()
        elif not (self._window.is_open or self.needs_closure) and any(p.grad is not None for p in self._parameters()):
            message = (
                f"parameters of optimizer {self._name!r} have gradients that did not come from its backward(); call "
                "optimizer.backward(loss) instead of loss.backward(), and detach() what another optimizer's loss "
                "should not reach"
            )
            raise BackwardError(message)

    def _on_epoch_completed(self, engine: Engine) -> None:
        if self._clocks.counts["iteration"] <= self._epoch_began and not self.needs_closure:
            warnings.warn(
                f"optimizer {self._name!r} got no loss in epoch {engine.state.epoch}: its backward() was not called",
                IceEngineWarning,
                stacklevel=2,
            )
        self._epoch_began = engine.state.iteration
        self._watch.stop()  # what comes now, such as validation, is none of a window's

    def _on_epoch_ended(self, *_: Any, **__: Any) -> None:
        if self._window.tail == "step":
            self.flush()
        elif self._window.tail == "drop" and self._window.is_open:
            logger.info(
                "optimizer %r: dropped %d micro-batches at the epoch's end", self._name, self._window.micro_batches
            )
            self._clear()

    def _on_run_ended(self, *_: Any) -> None:
        self._loaded = False  # what was loaded in the middle of this run says nothing about the next
        self._on_epoch_ended()
        self.flush()

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
                have a weight, or if the engine that this is attached to is not running.
        """
        if not isinstance(loss, torch.Tensor):
            message = f"loss must be a tensor, got {type(loss).__name__}; pass the loss itself, not loss.item()"
            raise ArgumentTypeError(message)
        if loss.numel() != 1:
            message = f"loss must be a scalar, got shape {tuple(loss.shape)}; reduce it first: loss.mean()"
            raise BackwardError(message)
        if not loss.requires_grad:
            message = (
                "loss requires no grad: no trainable parameter is behind it; "
                "look for detach(), torch.no_grad() or frozen parameters between the model and the loss"
            )
            raise BackwardError(message)
        self._require_window()
        if self._engine is not None and self._engine._dataloader_iter is None:  # noqa: SLF001 - set while run() iterates
            message = (
                f"backward() outside a run: optimizer {self._name!r} is attached to an engine that is not running, "
                "so nobody would step; call it in train_step, or optimizer.detach() for a loop of your own"
            )
            raise BackwardError(message)
        if self._window.weight and all(p.grad is None for p in self._parameters()):
            self._discard("model.zero_grad()")
            message = (
                f"the gradients of optimizer {self._name!r} were cleared inside its window, by model.zero_grad()? "
                "Take that out of train_step, gradients are cleared after every step"
            )
            raise BackwardError(message)
        part = self._window.enter(loss, weight)
        if self._engine is None and not self._clocks.counts["iteration"] and len(self._window.losses) == _FORGOTTEN:
            warnings.warn(
                f"backward() was called {_FORGOTTEN} times and update() never: optimizer {self._name!r} does not "
                "step; call optimizer.attach(engine) before the run, or optimizer.update() after each micro-batch",
                IceEngineWarning,
                stacklevel=2,
            )
        if part is None:
            return
        others = [(p, p.grad) for other in self._others() for p in other._parameters()]  # noqa: SLF001 - own class
        try:
            # Beside another optimizer, such as a discriminator's beside a generator's, a loss reaches parameters that
            # it must not train: what it leaves there would enter the other's step.
            for parameter, _ in others:
                parameter.grad = None
            torch.autograd.backward(self._precision.scale(part), retain_graph=retain_graph)
        except BaseException:
            # Part of the gradients may be there and part not; the caller may catch this and go on.
            self._discard("a backward() that failed")
            raise
        finally:
            for parameter, gradient in others:
                parameter.grad = gradient

    def toggle(self, *modules: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
        """Return a context in which parameters that other optimizers train require no grad.

        A loss that passes through them leaves no gradient there, and no time is spent on it; gradients of this
        optimizer's own parameters are the same. Compute the loss and call :meth:`backward` inside. At its end, also on
        an exception, every flag is as it was at its beginning. What an outer context turned off stays off.

        Args:
            *modules: Modules of which only the parameters that belong to this optimizer keep their flags, such as the
                discriminator in a generator's step. Without any: the parameters of all other optimizers of the engine.

        Returns:
            A context manager, for one ``with``.

        Raises:
            ArgumentTypeError: If one of *modules* is not a module.
            AttachError: If there are none, and this is not attached to an engine.

        Examples:
            >>> generator, discriminator = torch.nn.Linear(2, 4), torch.nn.Linear(4, 1)
            >>> optimizer = Optimizer(torch.optim.Adam(generator.parameters()), name="generator")
            >>> with optimizer.toggle(discriminator):
            ...     optimizer.backward(-discriminator(generator(torch.randn(8, 2))).mean())
            >>> discriminator.weight.grad is None, generator.weight.grad is None
            (True, False)
            >>> discriminator.weight.requires_grad
            True

        .. versionadded:: 0.1.0
        """
        for module in modules:
            if not isinstance(module, torch.nn.Module):
                message = (
                    f"toggle() takes modules, got {type(module).__name__}; such as generator.toggle(discriminator), or "
                    "generator.toggle() for all that the other optimizers of its engine train"
                )
                raise ArgumentTypeError(message)
        if not modules and self._engine is None:
            message = (
                f"toggle() without modules means those of the other optimizers of the engine, but optimizer "
                f"{self._name!r} is attached to none; write {self._name}.toggle(module), or attach it"
            )
            raise AttachError(message)
        return self._toggled(modules)

    @contextlib.contextmanager
    def _toggled(self, modules: Sequence[torch.nn.Module]) -> Iterator[None]:
        mine = {id(p) for p in self._parameters()}
        reached = (
            [p for module in modules for p in module.parameters()]
            if modules
            else [p for other in self._others() for p in other._parameters()]  # noqa: SLF001 - own class
        )
        before = [(p, p.requires_grad) for p in reached if id(p) not in mine]
        try:
            for parameter, _ in before:
                parameter.requires_grad = False
            yield
        finally:
            for parameter, required in before:
                parameter.requires_grad = required

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Step the wrapped optimizer, always; by hand in an attached run with a warning.

        Args:
            closure: Re-evaluates the model and returns the loss, for optimizers such as LBFGS.
            **kwargs: Whatever else the wrapped optimizer's ``step`` takes.

        Returns:
            What the wrapped optimizer returns.
        """
        by_hand = self._engine is not None and not (self._stepping or self.needs_closure)
        if by_hand and self._engine._dataloader_iter is not None:  # type: ignore[union-attr] # noqa: SLF001 - as in backward()
            warnings.warn(
                f"step() by hand in a run whose engine steps optimizer {self._name!r}: gradients are applied past its "
                "window, clipping and clocks. Take step() out of train_step, or do not attach",
                IceEngineWarning,
                stacklevel=2,
            )
        return super().step(closure, **kwargs)

    # Hooks run once, around the inner step: torch must not wrap this method as well.
    step.hooked = True  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters; the window does it after every step.

        Args:
            set_to_none: Set them to None rather than to zeros.

        Raises:
            BackwardError: Inside an open window, whose gradients would be lost.
        """
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
        """
        ranks.require_one_process("update()")
        size = self._window.size if grad_acc_steps is None else count("grad_acc_steps", grad_acc_steps, 1)
        self._require_window()
        self._window.require_weight()  # before the iteration is counted: a refused call changes nothing
        self._precision.adopt(grad_scaler, unscaled_losses=bool(self._window.losses))
        self._clocks.micro_batch(
            current_epoch=current_epoch, epoch_steps=epoch_steps, global_steps=global_steps, epoch_size=epoch_size
        )
        self._window.end_micro_batch()
        if "noise_scale" in self._measured and size > 1:
            self._note_first()
        if self._window.micro_batches >= size:
            return self._close(size)
        if self._clocks.epoch_ends:
            if self._window.tail == "step":
                return self._close(size)
            self._on_epoch_ended()
        return False

    def flush(self) -> bool:
        """Step now with the micro-batches at hand, if there are any.

        For loops without an engine whose epoch length is unknown; an attached engine does it itself.

        Returns:
            True if a step was applied.
        """
        if self._window.pending:
            self._window.end_micro_batch()
        return self._close(self._window.size) if self._window.micro_batches else False

    def report(self, **metrics: float) -> None:
        """Tell schedules that follow a metric, such as ``schedules.plateau(metric="loss")``, what was measured.

        Args:
            metrics: One new value of each; a number or a tensor with one element, the same on every rank.

        Raises:
            ArgumentTypeError: If a value is not a number.
            ArgumentValueError: If no schedule follows it, and one follows a metric of almost this name.

        Examples:
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

    # -- before the run -----------------------------------------------------------------------------------

    def plan(
        self, epoch_length: int | None = None, max_epochs: int | None = None, *, max_iters: int | None = None
    ) -> Plan:
        """Compute every scheduled key at every step of a whole run, from its beginning; change nothing.

        Copies of the processors run on copies of the param groups, which start from their initial values. What is left
        out is taken from the engine that this is attached to, if it is known there.

        Args:
            epoch_length: Micro-batches per epoch, at least 1, such as ``len(loader)``.
            max_epochs: Epochs of the run, at least 1.
            max_iters: Micro-batches of the run, at least 1, instead of *max_epochs*; it may end inside an epoch.

        Returns:
            What is planned; ``print(plan)`` shows a table, ``plan.problems`` lists what looks wrong, ``plan.plot()``
            is a figure.

        Raises:
            ArgumentTypeError: If an argument is no int, or a processor cannot be copied.
            ArgumentValueError: If the length of the run is not known, given twice, or below 1.
            ClosureError: If the wrapped optimizer needs a closure: it steps without windows and processors.
            ProcessorError: If a processor does something impossible; a note says at which step.

        Examples:
            >>> weight = torch.nn.Parameter(torch.tensor(1.0))
            >>> from ice_engine.processors.schedules import step
            >>> drops = Optimizer(torch.optim.SGD([weight], lr=0.1), processors=[step(step_size=2, gamma=0.5)])
            >>> list(drops.plan(epoch_length=3, max_epochs=2).series["lr/group_0"])
            [0.1, 0.1, 0.05, 0.05, 0.025, 0.025]

        .. versionadded:: 0.1.0
        """
        if self.needs_closure:
            message = (
                f"{type(self._inner).__name__} evaluates the loss in a closure and steps without windows and "
                "processors, so there is nothing to plan"
            )
            raise ClosureError(message)
        run = None if self._engine is None else self._engine.state
        if epoch_length is None:
            epoch_length = getattr(run, "epoch_length", None)
        if max_epochs is None and max_iters is None:
            max_iters = getattr(run, "max_iters", None)
            max_epochs = getattr(run, "max_epochs", None) if max_iters is None else None
        unknown = ["epoch_length"] if epoch_length is None else []
        unknown += ["max_epochs (or max_iters)"] if max_epochs is None and max_iters is None else []
        if epoch_length is None or unknown:
            why = "is attached to no engine" if run is None else "is attached to an engine that does not know it yet"
            message = (
                f"plan() needs {' and '.join(unknown)}: optimizer {self._name!r} {why}; "
                "write optimizer.plan(epoch_length=len(loader), max_epochs=...)"
            )
            raise ArgumentValueError(message)
        asked = {"epoch_length": epoch_length, "max_epochs": max_epochs, "max_iters": max_iters}
        return Plan(
            self.param_groups,
            self._processors,
            epoch_length=epoch_length,
            max_epochs=max_epochs,
            max_iters=max_iters,
            accumulation_steps=self._window.size,
            tail=self._window.tail,
            name=self._name,
            optimizer=self._stand_in,
            # The plan that on_change keeps or stretches, if it is this run that is asked for.
            resumed=self._clocks.plan if asked == self._clocks.run_lengths() else None,
        )

    def _stand_in(self, groups: list[dict[str, Any]], clocks: Clocks, engine: Any) -> tuple[Any, dict[int, Any]]:
        # Processors may look at their optimizer; what they see there must be the planned run, not this one's.
        inner = object.__new__(type(self._inner))
        vars(inner).update({**vars(self._inner), "param_groups": groups})
        stand_in = object.__new__(type(self))
        vars(stand_in).update({**vars(self), "_inner": inner, "_clocks": clocks, "_engine": engine})
        known = {id(self): stand_in, id(self._inner): inner}
        return stand_in, known if self._engine is None else {**known, id(self._engine): engine}

    def _others(self) -> list["Optimizer"]:
        attached = vars(self._engine)["_ice_optimizers"] if self._engine is not None else ()
        return [other for other in attached if other is not self]

    def _refuse_while_closing(self, what: str) -> None:
        if self._closing:
            message = (
                f"{what} of optimizer {self._name!r} in a handler of GRADIENTS_READY or STEP_STARTED, while its "
                f"window is being stepped; do it on {self._name.upper()}_STEP_COMPLETED"
            )
            raise AttachError(message)

    def _require_window(self) -> None:
        if self.needs_closure:
            message = (
                f"{type(self._inner).__name__} evaluates the loss in a closure; "
                "call optimizer.step(closure) in train_step, without backward() and update()"
            )
            raise ClosureError(message)

    # -- one window ---------------------------------------------------------------------------------------

    def _close(self, size: int) -> bool:
        self._closing, self._size = True, size
        self._counts_before = dict(self._clocks.counts)
        try:
            return self._attempt()
        except BaseException:
            # Of what raised before it was a step or a skip nothing is left: attempt = step + skipped stays true.
            if self._closing:
                self._count("attempt", -1)
            raise
        finally:
            self._closing = False
            self._clear()

    def _attempt(self) -> bool:
        window = self._window
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
        return self._decide(Gradient(parameters, 1.0), parameters)

    def _decide(self, gradient: Gradient, parameters: list[torch.Tensor]) -> bool:
        precision, clip = self._precision, self._folded_clip
        norm, found_inf = self._measure(gradient, parameters)
        if self._first is not None:
            # A clip's norm may be another one than the length.
            self._length = norm if clip is None or clip.norm_type == 2.0 else gradient.norm()  # noqa: PLR2004
        reason = precision.judge(norm, found_inf)
        if reason is not None:
            # Perhaps only the norm of the scaled sum was beyond its type, and that of the mean is not.
            gradient.multiply()
            norm = gradient.norm(2.0 if clip is None else clip.norm_type)
            reason = precision.judge(norm)
        precision.count(reason)
        self._overflowed = bool(self._overflowed) or reason is not None
        if reason is None:
            gradient.multiply(1.0 if clip is None or norm is None else clip.coefficient(norm))
            return self._step(norm)
        reason = f"{reason}, {describe_nonfinite(self.named_parameters(), self._window.losses)}"
        self._skip(reason, norm)
        attempt = self._clocks.counts["attempt"]
        precision.stop_if_exhausted(f"{reason} (optimizer {self._name!r}, attempt {attempt}, rank {ranks.rank()})")
        return False

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
        if clip is not None or (self._clip is None and self._measured & {"grad_norm", "noise_scale"}):
            return gradient.norm(2.0 if clip is None else clip.norm_type), None
        if self._clip is not None:
            gradient.multiply()
            if isinstance(self._clip, GroupClip) and self._clip.per_group:
                norm = self._clip.by_group([group["params"] for group in self.param_groups])
            else:
                norm = self._clip(parameters)
            if not isinstance(norm, torch.Tensor | float | int):
                message = f"clip returned {type(norm).__name__}; wanted the norm before clipping, as from ice.clip_norm"
                raise ArgumentTypeError(message)
            return torch.as_tensor(norm), None
        return None, None if self._precision.policy == "off" else gradient.multiply_and_check()

    def _step(self, norm: torch.Tensor | None) -> bool:
        if self._processors:
            set_initial_values(self._processors, self.param_groups)
            # Loaded in a loop without an engine, or in the middle of a run; or the run's length was changed.
            if self._course.configured is not None or self._course.outdated(self._clocks):
                self._settle(self._window.micro_batches)
            context = {**self._clocks.context(self._size, self._window.tail), **self._owners()}
            run_processors(self._processors, self.param_groups, context, ranks.gatherer())
        self._count("step")
        try:
            self._note(norm, None)
            if self._fire("STEP_STARTED"):
                self._note(norm, None)  # again: torch's and Ignite's schedulers sit there
            self._stepping = True
            strides = self._strides()
            self.step()
        except BaseException:
            self._count("step", -1)
            raise
        finally:
            self._stepping = False
        if self._measured:
            self._add_measures(strides)
        self._end_window("STEP_COMPLETED")
        return True

    def _strides(self) -> Strides | None:
        if "update_ratio" not in self._measured:
            return None
        return Strides({group_name(group, i): group["params"] for i, group in enumerate(self.param_groups)})

    def _add_measures(self, strides: Strides | None) -> None:
        if self._first is not None and self._length is not None and self._window.weight > self._first[1]:
            square, items = self._first
            self._noise.add(float(square), items, float(self._length) ** 2, self._window.weight)
        record = cast("StepRecord", self._last_record)
        self._watch.lap("step")
        self._publish_record(
            dataclasses.replace(
                record,
                noise_scale=self._noise.value if "noise_scale" in self._measured else None,
                update_ratio=None if strides is None else strides.ratios(),
                times=self._watch.split() if "times" in self._measured else None,
            )
        )

    def _note_first(self) -> None:
        """Keep the squared norm of the first micro-batch's mean gradient; the window's comes at its end."""
        parameters = [p for p in self._parameters() if p.grad is not None]
        if self._window.micro_batches == 1 and self._window.weight and parameters:
            multiplier = self._precision.multiplier(self._window.scale, parameters[0].device)
            self._first = (Gradient(parameters, multiplier).norm().square(), self._window.weight)

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
        return Terms.of(self._clocks, self._size, self._window.tail, self._processors)

    def _settle(self, pending: int = 0) -> None:
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
        return self._engine is not None and fire(self._engine, self.event(kind))

    def _listens(self, kind: str) -> bool:
        return self._engine is not None and has_listeners(self._engine, self.event(kind))

    def _whole_counts(self) -> dict[str, int]:
        # What is saved or copied while a window is being stepped is without that window, so without its counts.
        return dict(self._counts_before if self._closing else self._clocks.counts)

    def _publish(self) -> None:
        if self._engine is not None:
            for clock in ("step", "attempt", "skipped"):
                self._count(clock, 0)
            setattr(self._engine.state, f"{self._name}_record", self._last_record)

    def _note(self, norm: torch.Tensor | None, reason: str | None) -> None:
        keys = dict.fromkeys(["lr", *(key.partition(".")[0] for _, key in written_keys(self._processors))])
        record = StepRecord(
            step=self._clocks.counts["step"],
            attempt=self._clocks.counts["attempt"],
            iteration=self._clocks.counts["iteration"],
            epoch=self._clocks.epoch,
            micro_batches=self._window.micro_batches,
            weight=self._window.weight,
            grad_norm=norm,
            clipped_norm=self._clip.after(norm) if isinstance(self._clip, ClipNorm) and norm is not None else None,
            loss_scale=self._precision.loss_scale,
            values={
                group_name(group, i): {key: frozen(group[key]) for key in keys if key in group}
                for i, group in enumerate(self.param_groups)
            },
            skipped=reason,
        )
        self._publish_record(record)

    def _publish_record(self, record: StepRecord) -> None:
        self._last_record = record
        if self._engine is not None:
            setattr(self._engine.state, f"{self._name}_record", record)

    def _clear(self) -> None:
        # Whatever was raised: the loss scale must not stay in the middle of a window.
        self._precision.close(overflowed=self._overflowed)
        self._overflowed = None
        self._first = self._length = None
        self._window.reset()
        self.zero_grad()

    def _discard(self, cause: str) -> None:
        if self._window.is_open:
            dropped = self._window.micro_batches + self._window.pending
            self._clear()
            warnings.warn(
                f"optimizer {self._name!r} dropped the {dropped} micro-batches of a window that {cause} left open",
                IceEngineWarning,
                stacklevel=3,
            )

    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

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

    # -- state --------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group; processors change it from the next step on.

        Args:
            param_group: ``params`` and the entries that differ from the defaults.
        """
        super().add_param_group(param_group)
        if self._processors:
            try:
                set_initial_values(self._processors, self.param_groups)
            except BaseException:
                self.param_groups.pop()
                raise

    def state_dict(self, rank: int = 0) -> dict[str, Any]:
        """Return torch's own state dict with parameter names and one key more, ``ice_engine``.

        A plain torch optimizer of the same class loads it as it is. Call on every rank.

        Args:
            rank: The rank that gets the whole state.

        Returns:
            ``state``, ``param_groups`` (each with ``param_names``) and ``ice_engine``: plain data that
            loads with ``weights_only=True``. Tensors are the live ones, as in torch.
        """
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < ranks.world_size():
            message = f"rank must be an integer from 0 to {ranks.world_size() - 1}, got {rank!r}"
            raise ArgumentValueError(message)
        extra = {
            "name": self._name,
            "class": type(self._inner).__name__,
            "clocks": self._whole_counts(),
            "horizon": self._course.state_dict(self._terms()),
            "measurements": {metric: list(values) for metric, values in self._measurements.items()},
            "noise": self._noise.state_dict(),
            "window": {"micro_batches": self._window.micro_batches, "weight": self._window.weight},
            **self._precision.state_dict(),
        }
        extra["shapes"] = shapes(self.named_parameters())
        return pack(dict(self._inner.state_dict()), self._names(), extra)

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> LoadReport:  # type: ignore[override]
        """Load a state dict of ours or of the wrapped optimizer's class; nothing of the argument is kept.

        State goes to the parameter of the same name, however parameters are grouped and ordered now, if all of
        them have names of their own here and there (from ``model.named_parameters()``, :func:`ice.param_groups
        <ice_engine.param_groups.param_groups>` or ``attach(engine, model=model)``); else by position, as in torch.
        Group entries such as ``lr`` are the saved ones where the groups are; of other groups, one takes those of
        the saved group that has its ``name``, or else of the one that all its parameters come from and no other
        group's do, and keeps its own if there is none.

        Args:
            state_dict: From :meth:`state_dict`, or from a plain torch optimizer (clocks then stay as they are).
            strict: Refuse parameters that are new here, no longer here, or of another shape; else new ones start
                without state, and state of the others is left out.

        Returns:
            Which parameters matched, which are new and which were dropped, and which groups kept their own entries.

        Raises:
            NotConsolidatedError: If it is the stub of a rank that does not hold the whole state.
            StateDictError: If it is of a newer version or does not fit; nothing has changed then.
        """
        self._refuse_while_closing("load_state_dict()")
        # Copied, because torch would keep the caller's tensors as live state.
        plain, extra = unpack(copy.deepcopy(state_dict))
        plain, report = fit(self._inner, self._names(), plain, extra, strict=strict)
        # What processors start from; without them it is a scheduler's own, and goes as in a plain optimizer.
        kept = "initial_" if self._processors else ()
        before = [{k: v for k, v in g.items() if k.startswith(kept)} for g in self.param_groups]
        # Loaded twice before the run: what the script asked for is what it had before the first time.
        configured = before if self._course.configured is None else self._course.configured
        names = [group.get("param_names") for group in self.param_groups]
        self._inner.load_state_dict(plain)
        for group, initial, own in zip(self.param_groups, before, names, strict=True):
            for key, value in initial.items():
                group.setdefault(key, value)
            # The names of this process's parameters, not those of the one that saved.
            group.pop("param_names", None)
            if own is not None:
                group["param_names"] = own
        if extra is not None:
            self._clocks.counts.update({clock: int(value) for clock, value in extra["clocks"].items()})
            self._course.load_state_dict(extra.get("horizon"), configured)
            self._measurements = {metric: tuple(values) for metric, values in extra.get("measurements", {}).items()}
            self._precision.load_state_dict(extra)
            self._noise.load_state_dict(extra.get("noise", (0.0, 0.0, 0.0)))
            self._loaded = True
            self._publish()
            if extra["window"]["micro_batches"]:
                warnings.warn(
                    f"the state of optimizer {self._name!r} was saved inside a window; its "
                    f"{extra['window']['micro_batches']} micro-batches are not in it and the window starts anew. "
                    f"Save on {self._name.upper()}_STEP_COMPLETED or EPOCH_COMPLETED to lose none",
                    IceEngineWarning,
                    stacklevel=2,
                )
        self._clear()
        return report

    def __getstate__(self) -> dict[str, Any]:
        kept = dict(vars(self))
        kept.pop("step", None)  # patched in by torch's schedulers
        kept.pop("_opt_called", None)
        if self._closing:
            kept["_clocks"] = copy.copy(self._clocks)
            kept["_clocks"].counts = self._whole_counts()
        return {**kept, "_engine": None, "_parameter_names": {}, "_last_record": None, "_closing": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._discard("copying")  # torch copies and pickles parameters without their gradients

    def __copy__(self) -> "Optimizer":
        message = "a shallow copy would share parameters and window with its original; use copy.deepcopy(optimizer)"
        raise ArgumentTypeError(message)

    def __repr__(self) -> str:
        parts = [f"name={self._name!r}", f"accumulation_steps={self._window.size}"]
        parts += [f"clip={self._clip!r}"] if self._clip is not None else []
        parts += [f"processors={list(self._processors)!r}"] if self._processors else []
        return f"Optimizer({', '.join(parts)}) of {self._inner!r}"
