"""A user's model and loss, run as they are trained but on copies: the gradient of any window of a batch."""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ice_engine.batches import copied, cut, tensors
from ice_engine.diagnostics.randomness import Still, closed_over, drawn_outside, seed
from ice_engine.diagnostics.tracing import Watch, record
from ice_engine.errors import ArgumentValueError, IceEngineError, NoGradientsError, NonFiniteGradientError
from ice_engine.optimizer import Optimizer
from ice_engine.window import Reduction

Span = tuple[int, int]
Gradients = dict[str, torch.Tensor]


@dataclasses.dataclass
class Trial:
    """Runs copies of model and loss on parts of the batch.

    Args:
        model: Copied for every run.
        loss_fn: Copied with it.
        x: Of all samples.
        y: Of all samples.
        total: Number of samples.
        weight: ``(x, y) ->`` items behind a loss.
        reduction: What a loss is over its items.

    Attributes:
        dtype: Type that model, loss and batch are cast to; None for the types they have.
        narrowed: Types that were cast down to inside.
        drawing: By path of the module that drew at random: the operation.
        drawn_outside: Whether it was Python's or numpy's generator that was drawn from.
    """

    model: torch.nn.Module
    loss_fn: Any
    x: Any
    y: Any
    total: int
    weight: Callable[[Any, Any], float]
    reduction: Reduction
    dtype: torch.dtype | None = torch.float64
    narrowed: set[torch.dtype] = dataclasses.field(default_factory=set)
    drawing: dict[str, str] = dataclasses.field(default_factory=dict)
    drawn_outside: bool = False

    def fresh(self) -> tuple[torch.nn.Module, Any]:
        """Return copies of model and loss, as the user's are now, in training mode."""
        try:
            model, loss_fn = copy.deepcopy((self.model, self.loss_fn))
        except Exception as err:
            message = (
                f"a copy of {type(self.model).__name__} is what is checked, and it cannot be copied: {err}; "
                "give a newly made model, before its first forward, and before fully_shard"
            )
            raise ArgumentValueError(message) from err
        for part in (model, loss_fn):
            if isinstance(part, torch.nn.Module):
                if self.dtype is not None:
                    part.double()
                if not part.training:
                    part.train()
        return model, loss_fn

    def piece(self, start: int, stop: int) -> tuple[Any, Any]:
        """Return copies of samples *start* to *stop*."""
        x, y = (copied(cut(part, start, stop, self.total), self.dtype) for part in (self.x, self.y))
        return x, y

    def gradients(self, spans: Sequence[Span], weight: Callable[[Any, Any], float] | None = None) -> Gradients:
        """Return the gradient of one window with these micro-batches.

        Raises:
            Exception: What model or loss raise.
        """
        weight = weight or self.weight
        model, loss_fn = self.fresh()
        named = _trainable(model, loss_fn)
        named += _reached(self.model, self.loss_fn, named)
        found: Gradients = {}

        def capture(_: Any) -> torch.Tensor:
            for name, p in named:
                if p.grad is not None:
                    gradient = p.grad.to_dense().clone() if p.grad.is_sparse else p.grad.clone()
                    found[name] = found[name] + gradient if name in found else gradient
            return torch.zeros(())

        for _, p in named:
            p.grad = None  # of an attempt that failed
        optimizer = Optimizer(
            _Idle([p for _, p in named]),
            accumulation_steps=len(spans),
            clip=capture,
            nonfinite="off",
            loss_reduction=self.reduction,
        )
        with Watch(model) as watch, Still(lambda: watch.current) as still:
            for start, stop in spans:
                seed()
                x, y = self.piece(start, stop)
                watch.outside = "loss_fn"
                loss = loss_fn(model(x), y)
                self.drawn_outside = drawn_outside() or self.drawn_outside
                watch.outside = None  # backward may run parts of the forward again
                items = weight(x, y)
                # A loss may be of another type than its outputs, such as that of its targets.
                still.narrowed |= {t.dtype for t in (loss, items) if isinstance(t, torch.Tensor)}
                optimizer.backward(loss, weight=items)
                optimizer.update()
        self.narrowed |= still.narrowed
        self.drawing = {**still.drawing, **self.drawing}
        return found

    def whole(self) -> Gradients:
        """Return the gradient of the big batch, in float64 or else in the model's own type."""
        try:
            found = self.gradients([(0, self.total)])
        except IceEngineError:
            raise
        except Exception:  # noqa: BLE001 - what does not work in float64 may work in its own type
            self.dtype = None
            found = self.gradients([(0, self.total)])
        bad = [name for name, gradient in found.items() if not bool(gradient.isfinite().all())]
        if bad:
            message = f"the gradient of the whole batch is not finite, first in {bad[0]!r}; {self.first_nonfinite()}"
            raise NonFiniteGradientError(message)
        if not any(bool(gradient.any()) for gradient in found.values()):
            message = (
                "the gradient of the whole batch is 0 in every parameter, so nothing can be compared; "
                "is weight(x, y) above 0, and does the loss depend on the model's outputs?"
            )
            raise NoGradientsError(message)
        return found

    def first_nonfinite(self) -> str:
        """Say where the big batch stops being finite."""
        model, loss_fn = self.fresh()
        seed()
        x, y = self.piece(0, self.total)
        with Still(lambda: None):
            outputs, recorded = record(model, x)
            loss = float(loss_fn(outputs, y).detach())
        for (name, _, side), value in recorded.items():
            if not all(bool(t.isfinite().all()) for _, t in tensors(value)):
                kind = type(model.get_submodule(name)).__name__
                where = f"the first {side} that are not finite are those of {name or 'the model'!r} ({kind})"
                break
        else:
            where = "all modules' outputs are finite"
        return f"the loss is {loss:g} and {where}"


class _Idle(torch.optim.Optimizer):
    """Leaves parameters as they are: a loss may reach the user's own."""

    def __init__(self, params: list[torch.Tensor]) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing."""


Named = list[tuple[str, torch.Tensor]]


def _trainable(model: torch.nn.Module, loss_fn: Any) -> Named:
    return _named(model, [loss_fn] if isinstance(loss_fn, torch.nn.Module) else [])


def _reached(model: torch.nn.Module, loss_fn: Any, copies: Named) -> Named:
    """Return the user's own parameters, which a loss that knows them differentiates beside the copies."""
    known = {id(p) for _, p in copies}
    return [(name, p) for name, p in _named(model, closed_over(loss_fn)) if id(p) not in known]


def _named(model: torch.nn.Module, of_loss: Sequence[torch.nn.Module]) -> Named:
    every = [(f"loss_fn.{name}", p) for module in of_loss for name, p in module.named_parameters()]
    by_parameter = {id(p): (name, p) for name, p in (*every, *model.named_parameters()) if p.requires_grad}
    return [*by_parameter.values()]


def gap(whole: Gradients, parts: Gradients, noise: float) -> tuple[float, str]:
    """Return the largest relative difference of a parameter's gradient, and the parameter's name.

    Args:
        whole: Of the big batch.
        parts: Of its micro-batches.
        noise: Fraction of the largest entry of *whole* below which a gradient is taken for rounding.
    """
    floor = noise * max(float(gradient.abs().max()) for gradient in whole.values() if gradient.numel())
    worst = (0.0, "")
    for name in dict.fromkeys([*whole, *parts]):
        a, b = (found.get(name) for found in (whole, parts))
        a, b = (torch.zeros_like(a if a is not None else b) if t is None else t for t in (a, b))  # type: ignore[arg-type]
        if not a.numel():
            continue
        size = max(float(a.abs().max()), float(b.abs().max()), floor)
        apart = float((a - b).abs().max()) / size if size > 0 else 0.0
        apart = apart if math.isfinite(apart) else math.inf
        worst = max(worst, (apart, name), key=lambda found: found[0])
    return worst
