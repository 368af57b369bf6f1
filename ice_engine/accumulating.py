"""How a loss gets into the open window: differentiated into gradients that nobody else touches meanwhile."""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ice_engine import differentiate
from ice_engine.distributed.world import require_one_process
from ice_engine.errors import ArgumentTypeError, BackwardError, ClosureError, warn
from ice_engine.events import is_running
from ice_engine.gradients import Gradient
from ice_engine.isolation import gradients_aside
from ice_engine.left import Left
from ice_engine.measures import Measures
from ice_engine.member import syncs_of
from ice_engine.nonfinite import nonfinite_loss
from ice_engine.precision import Precision
from ice_engine.scheduling import Scheduling

_FORGOTTEN = 32  # losses in one micro-batch, without any update() before, from which on attach() was forgotten


class Accumulating(Scheduling):
    """Adds the losses of a window up in the gradients of its parameters, scaled and weighted.

    Args:
        inner: The wrapped optimizer.
        precision: Scales losses, and judges gradients.
        **scheduled: Name, processors, window and ``on_change``.
    """

    def __init__(self, inner: torch.optim.Optimizer, precision: Precision, **scheduled: Any) -> None:
        super().__init__(inner, **scheduled)
        self._precision = precision
        self._overflowed: bool | None = None
        self._measures = Measures()
        self._left = Left()
        self._in_close: bool = False
        self._model: torch.nn.Module | None = None  # that was attached last
        self._parameter_names: dict[torch.Tensor, str] = {}
        self._beside: list[Any] = []  # all that are attached to its engine, this one included; kept on that
        _ALL.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _ALL.add(self)

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
            AttachError: In many processes, if it is attached to no engine.
            BackwardError: If *loss* is no scalar or requires no gradient, if it is to be reduced over many ranks and
                was computed past the ``DistributedDataParallel``, if only some losses of the window have a weight, if
                somebody else put, changed or cleared a gradient since the window opened, in a handler of this
                optimizer's events, or if the engine that this is attached to is not running.
        """
        # Once per micro-batch: here, and in what is called from here, the usual is found out by cheap questions, and
        # what is wrong by the functions that say so.
        window, engine = self._window, self._engine
        if type(loss) is not torch.Tensor or not loss.requires_grad or loss.numel() != 1:
            self._check_loss(loss, weight)
        if self._in_close or engine is None or not is_running(engine) or self.needs_closure:
            self._check_time("backward()")
        parameters = self._parameters()
        self._require_own_gradients(parameters)
        if self._precision.scaler is not None:
            self._precision.require_unscaled(loss)
            self._precision.require_one_owner(self, self._inner)
        first = window.first
        begins = window.size != 1 and not window.is_open
        part = window.enter(loss, weight, spread=begins and self._spreads(weighted=weight is not None))
        if window.first != first:
            self._say_size()
        if engine is None and len(window.losses) == _FORGOTTEN and not self._clocks.counts["iteration"]:
            warn(
                f"backward() was called {_FORGOTTEN} times and update() never: optimizer {self._name!r} does not "
                "step; call optimizer.attach(engine) before the run, or optimizer.update() after each micro-batch"
            )
        if part is None:
            self._pass_over(loss, retain_graph=retain_graph)
            return
        if window.shrink != 1.0:
            Gradient([p for p in parameters if p.grad is not None], window.shrink).multiply()
        self._differentiate(part, retain_graph=retain_graph)
        self._left.note(parameters)

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

    def _check_time(self, what: str) -> None:
        self._require_window()
        if self._engine is None:
            require_one_process(what, attached=False)
        self._refuse_inside_close(what)
        if self._engine is not None and not self._running:
            message = (
                f"{what} outside a run: optimizer {self._name!r} is attached to an engine that is not running, "
                "so nobody would step; call it in train_step, or optimizer.detach() for a loop of your own"
            )
            raise BackwardError(message)

    def _spreads(self, *, weighted: bool) -> bool:  # noqa: ARG002 - of those that step
        """Whether the losses of a window are divided by its size: gradients in half precision hold no sum of many."""
        return any(p.dtype == torch.float16 for p in self._parameters())

    def _differentiate(self, part: torch.Tensor, *, retain_graph: bool) -> None:
        member = self._member
        if member is not None:
            if member.sync.reduces and member.sync.is_bypassed:
                self._refuse_bypassing()
            member.meet()
        try:
            if self._precision.scaler is not None:
                part = self._precision.scale(part)
            if len(self._beside) != 1 and (foreign := self._foreign_parameters()):
                # Beside another optimizer, such as a discriminator's beside a generator's, a loss reaches parameters
                # that it must not train: what it leaves there would enter the other's step.
                with self._aside(foreign) as reached:
                    self._run_backward(part, retain_graph=retain_graph)
                    if self._engine is None and reached():
                        self._refuse_reaching()
            else:
                self._run_backward(part, retain_graph=retain_graph)
            if member is not None:
                member.sync.after_backward()
                member.differentiated += 1
        except BaseException as error:
            if member is not None:
                member.broken = True
            _note_retain_graph(error)
            # Part of the gradients may be there and part not; the caller may catch this and go on.
            self._discard("a backward() that failed")
            raise

    def _run_backward(self, part: torch.Tensor, *, retain_graph: bool) -> None:
        if self._member is not None:
            self._member.sync.before_backward(part)
        differentiate.backward(part, retain_graph=retain_graph)

    @contextlib.contextmanager
    def _aside(self, foreign: Sequence[torch.Tensor]) -> Iterator[Callable[[], bool]]:
        """Let *foreign* parameters, and what their model keeps of them to be reduced, have the gradients of before.

        Yields:
            Whether any of them has got one meanwhile.
        """
        beside = [other._member for other in self._beside]  # noqa: SLF001 - own class
        with contextlib.ExitStack() as stack:
            reached = stack.enter_context(gradients_aside(foreign))
            for sync in syncs_of(member for member in beside if member is not None):
                stack.enter_context(sync.aside(foreign))
            yield reached

    def _refuse_bypassing(self) -> None:
        message = (
            f"the loss of optimizer {self._name!r} does not come through the DistributedDataParallel that attach() was "
            "given, so its gradients would be those of this rank alone; compute it with the wrapped module: "
            "loss_fn(ddp(x), y)"
        )
        raise BackwardError(message)

    def _pass_over(self, loss: torch.Tensor, *, retain_graph: bool) -> None:
        """Let a loss that weighs nothing reach no gradient, and still be one of the backward passes of all ranks."""
        member = self._member
        if member is None or not (member.sync.reduces or member.sync.together):
            return
        if not (loss.requires_grad or member.sync.follows):
            return  # none, to a model that is known only to take part with a loss that came through it
        member.meet()
        with self._aside(self._foreign_parameters()):
            member.sync.take_part(loss, retain_graph=retain_graph)
        member.differentiated += 1
        self._note_gradients()

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

    def _foreign_parameters(self) -> list[torch.Tensor]:
        if self._engine is not None:
            others = self._beside
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

    def _refuse_inside_close(self, what: str) -> None:
        if self._in_close:
            message = (
                f"{what} of optimizer {self._name!r} in a handler of its own events, while its window is closed: its "
                "gradients would enter this step or be cleared after it; call it in train_step, or in a handler of "
                "ITERATION_COMPLETED, with update() after a backward()"
            )
            raise BackwardError(message)

    def _note_gradients(self) -> None:
        self._left.note(self._parameters())

    def _require_own_gradients(self, parameters: Sequence[torch.Tensor]) -> None:
        """Refuse gradients that backward() did not leave as they are: in the window's mean they would be wrong."""
        change = self._left.change(parameters)
        if change is None:
            return
        if change == "foreign":
            message = (
                f"parameters of optimizer {self._name!r} have gradients that did not come from its backward(); "
                f"{_OWN_GRADIENTS}; optimizer.zero_grad() clears what is left from before"
            )
            raise BackwardError(message)
        cleared = change == "cleared"
        self._discard("model.zero_grad()" if cleared else "changed gradients")
        message = (
            f"gradients of optimizer {self._name!r} were cleared inside its window, by model.zero_grad()? Take "
            "that out of train_step, gradients are cleared after every step"
            if cleared
            else f"gradients of optimizer {self._name!r} were changed inside its window, not by its backward(); "
            f"{_OWN_GRADIENTS}; clip with Optimizer(..., clip=); a handler of {self._name.upper()}_GRADIENTS_READY may "
            "change the window's"
        )
        raise BackwardError(message)

    def _require_own_sum(self) -> None:
        # What is still to be divided is not what somebody meant who clipped it in train_step.
        if self._precision.enabled or not self._window.is_mean:
            self._require_own_gradients(self._parameters())

    def _require_window(self) -> None:
        if self.needs_closure:
            message = (
                f"{type(self._inner).__name__} evaluates the loss in a closure; "
                "call optimizer.step(closure) in train_step, without backward() and update()"
            )
            raise ClosureError(message)

    def _clear(self) -> None:
        # Whatever was raised: the loss scale must not stay in the middle of a window.
        self._precision.close(overflowed=self._overflowed)
        self._overflowed = None
        if self._window.is_open:
            self._window.reset()
        self._let_go()

    def _let_go(self) -> None:
        """Clear what is left of a window that is empty: gradients, and what is known of them."""
        self._measures.forget()
        self._left.forget()
        if self._member is not None:
            self._member.sync.forget(self._parameters())
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

    def _is_spoiled(self) -> bool:
        """Whether a loss of the open window was not finite, which nobody would find out when it steps."""
        return self._precision.policy == "off" and bool(nonfinite_loss(self._window.losses))

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
            or [self._parameter_names.get(p, f"param_groups.{i}.params.{j}") for j, p in enumerate(group["params"])]
            for i, group in enumerate(self.param_groups)
        ]


_ALL: weakref.WeakSet[Accumulating] = weakref.WeakSet()

_OWN_GRADIENTS = (
    "call optimizer.backward(loss) instead of loss.backward() (ice.create_trainer(model, optimizer, loss_fn) does, "
    "create_supervised_trainer does not), and keep another optimizer's loss from them: write with "
    "other.toggle(module): around it, of the module that has them, or detach()"
)


def _note_retain_graph(error: BaseException) -> None:
    if "backward through the graph a second time" in str(error) and hasattr(error, "add_note"):  # from Python 3.11 on
        error.add_note(
            "For optimizers that share a loss: optimizer.backward(loss, retain_graph=True) in all but the last"
        )
