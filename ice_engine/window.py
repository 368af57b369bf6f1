r"""The accumulation window: the micro-batches of one step, and the arithmetic that makes their mean exact.

Losses are accumulated as a weighted sum and divided once, when the window closes, so the step's
gradient is the mean over all items of the window, whatever the micro-batches' sizes and however
many there are:

.. math:: g = \frac{\sum_m w_m \nabla L_m}{\sum_m w_m}

To keep fp16 in range, each loss is multiplied by :math:`w_m / c` and the gradient, at the end, by
:math:`c / \sum_m w_m`, where the unit :math:`c` is the window's first weight: with equal weights every
loss enters as it is. Where a weight is much larger than that, :math:`c` grows by a power of two, and
what was accumulated shrinks by it. Gradients that are fp16 themselves must hold the sum of all losses
as well, so with such parameters the unit is :math:`c` times the size of the window, and also where
nothing else is to be done to the gradients at its end: a full window of equal weights then needs no pass.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from typing import Any, Literal

import torch

from ice_engine.arguments import choice, count
from ice_engine.errors import ArgumentTypeError, ArgumentValueError, BackwardError

Tail = Literal["step", "carry", "drop"]
Reduction = Literal["mean", "sum"]

_EXACT = 2**53  # integers below are floats, too
_MUCH = 8.0  # times the unit, from which on a weight makes it grow


class Window:
    """Counts and weighs the micro-batches of one step; alone knows when a step is due.

    Args:
        size: Micro-batches per step, at least 1.
        tail: What becomes of a short last window of an epoch: ``"step"``, ``"carry"`` or ``"drop"``.
        reduction: What losses are over their items: a ``"mean"`` or a ``"sum"``.
        batch: Items per step that *size* is to follow from, see :meth:`decide`; None where it is given.

    Attributes:
        size: Micro-batches per step; 0 until they are decided.
        first: The weight that they were decided from; 0.0 until then.
        ranks: How many processes fill a window together, each with data of its own.
        micro_batches: Complete micro-batches in the open window.
        weight: Their total weight.
        pending: Whether a loss has entered the micro-batch that is under way.
        losses: The losses that entered, by micro-batch, for the report on a non-finite window.
        weighted: Whether losses come with a weight; None before the first.
        unit_of: Returns the unit that a first loss makes, of its weight, or 1 without; that itself, unless other ranks
            have a say.
        common: The unit of every window, where it is the same on many ranks; 0 where each takes its own.
        shrink: What the gradients accumulated so far are to be multiplied with before the loss that entered last is
            differentiated; 1.0 nearly always.
    """

    def __init__(self, size: int, tail: Tail = "step", reduction: Reduction = "mean", batch: int | None = None) -> None:
        self.size = count("accumulation_steps", size, 1)
        if batch is not None:
            if size != 1:
                message = (
                    f"accumulation_steps={size} and effective_batch_size={batch} both say when to step; leave one "
                    "out: the former counts micro-batches, the latter items over all processes"
                )
                raise ArgumentValueError(message)
            count("effective_batch_size", batch, 1)
            self.size = 0
        self.batch = batch
        self.first: float = 0.0
        self.ranks: int = 1
        choice("tail", tail, ("step", "carry", "drop"))
        choice("loss_reduction", reduction, ("mean", "sum"))
        self.tail: Tail = tail
        self.reduction: Reduction = reduction
        self.unit_of: Callable[[float], float] = float
        self.common: float = 0.0
        self.reset()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "unit_of": float}

    def reset(self) -> None:
        """Empty the window."""
        self.micro_batches: int = 0
        self.weight: float = 0.0
        self.pending: bool = False
        self.losses: list[tuple[int, float | torch.Tensor]] = []
        self.shrink: float = 1.0
        self.unit: float = self.common
        self.weighted: bool | None = None
        self._spread: float = 1.0

    def state_dict(self, *, whole: bool) -> dict[str, Any]:
        """Return what it holds, as plain data; the *whole* of it, or what says how much there is."""
        state = {"micro_batches": self.micro_batches, "weight": self.weight, "common": self.common}
        if not whole:
            return state
        losses = [(micro_batch, float(loss)) for micro_batch, loss in self.losses]
        return {**state, "unit": self.unit, "spread": self._spread, "weighted": self.weighted, "losses": losses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on in the window that :meth:`state_dict` returned the whole of."""
        self.micro_batches, self.weight = state["micro_batches"], state["weight"]
        self.unit, self._spread, self.weighted = state["unit"], state["spread"], state["weighted"]
        self.losses = [(micro_batch, float(loss)) for micro_batch, loss in state["losses"]]

    @property
    def is_open(self) -> bool:
        """Whether any loss has entered since the last step."""
        return self.pending or self.micro_batches > 0

    @property
    def is_full(self) -> bool:
        """Whether it has the micro-batches of a step."""
        return 0 < self.size <= self.micro_batches

    def decide(self, first: float) -> None:
        """Let the windows of a run have the micro-batches whose items come nearest to the wanted ones.

        Args:
            first: Weight of the run's first micro-batch, the largest of all ranks, which decides for all to come: what
                they weigh, nobody knows before, and every rank must close its windows in the same micro-batch.
        """
        if self.batch is None or self.first or not first:
            return
        self.first = first
        self.size = self.size or max(1, math.floor(self.batch / (self.ranks * first) + 0.5))

    def start_afresh(self) -> None:
        """Forget what an earlier run decided."""
        if self.batch is not None:
            self.size, self.first, self.common = 0, 0.0, 0.0
            self.reset()

    def terms(self) -> dict[str, Any]:
        """Return what decides when a step is due, as plain data."""
        terms = {"accumulation_steps": self.size or None, "tail": self.tail}
        if self.batch is None:
            return terms
        return {**terms, "effective_batch_size": self.batch, "world_size": self.ranks}

    def resume(self, terms: Mapping[str, Any]) -> None:
        """Go on with the size that a run of such *terms* had, if it is still due.

        With as many ranks it stays, even where the next micro-batch weighs less than the first did; with others, it
        is decided anew.
        """
        own = self.terms()
        if self.batch is not None:
            same = all(terms.get(key) == own[key] for key in ("effective_batch_size", "world_size"))
            self.size = terms["accumulation_steps"] or 0 if same else 0
            self.first = 0.0

    def closes_next(self, *, last: bool, begun: int | None = None) -> bool:
        """Whether one more micro-batch would or may end the window.

        Args:
            last: Whether it is its epoch's last.
            begun: Micro-batches that the window has on another rank; None for those it has here.
        """
        has = self.micro_batches if begun is None else begun
        return has + 1 >= self.size or (last and self.tail == "step")

    def share(self, weight: float, ranks: int) -> None:
        """Take the window as a part of one of *weight*, whose gradients are averaged over *ranks*."""
        self.weight = weight
        self.unit *= ranks

    @property
    def is_mean(self) -> bool:
        """Whether the accumulated gradients are the window's mean as they are."""
        return self.unit == self.weight

    @property
    def scale(self) -> float:
        """What the accumulated gradients are multiplied with to become the window's mean."""
        return self.unit / self.weight

    def enter(self, loss: torch.Tensor, weight: float | None, *, spread: bool = False) -> torch.Tensor | None:
        """Take a loss into the micro-batch under way and return what to differentiate.

        Args:
            loss: The loss, shape ().
            weight: Items behind it, at least 0. None, in all calls of a window: every micro-batch weighs
                the same, and several losses in one micro-batch add up, as with ``loss.backward()``.
            spread: Whether losses are divided by the window's size; asked of its first one.

        Returns:
            The loss times its factor; None if it weighs nothing and so contributes nothing.

        Raises:
            ArgumentTypeError: If the weight is not a number.
            ArgumentValueError: If the weight is negative, infinite or NaN, or missing for a summed loss.
            BackwardError: If only some losses of the window have a weight.
        """
        if self.weighted is not None and self.weighted != (weight is not None):
            have, this = ("a weight", "none") if self.weighted else ("no weight", "one")
            message = (
                f"earlier losses of this window came with {have}, this one with {this}; "
                "pass weight= to every backward() call or to none"
            )
            raise BackwardError(message)
        items = self.items(weight)
        first_of_micro_batch = not self.pending
        parts = self._spread
        if first_of_micro_batch and not self.micro_batches:
            parts = float(self.size or 1) if spread and math.isfinite(items * self.size) else 1.0
        if not math.isfinite(self.weight + items * parts):
            message = f"the weights of this window add up to more than a float can hold, the last is {items:g}"
            raise ArgumentValueError(message)
        self._spread = parts
        self.weighted = weight is not None
        # On the CPU the number is at hand; elsewhere the host, or every rank, would have to wait for it.
        at_hand = loss.is_cpu and type(loss) is torch.Tensor
        self.losses.append((self.micro_batches + 1, loss.item() if at_hand else loss.detach()))
        self.pending = True
        # Also of one that weighs nothing: other ranks may be asking for their first weight.
        self.unit = self.unit or self.unit_of(items * parts)
        if self.batch is not None:
            self.decide(self.unit / parts)
        if items == 0.0:
            return None
        self.shrink = 1.0
        if items * parts > _MUCH * self.unit and not self.common:
            grown = 2.0 ** math.floor(math.log2(min(items * parts / self.unit, 2.0**1000)))
            self.unit, self.shrink = self.unit * grown, 1.0 / grown
        if weight is not None or first_of_micro_batch:
            self.weight += items
        if self.reduction == "sum":
            return loss / self.unit
        return loss if items == self.unit else loss / (self.unit / items)

    def items(self, weight: float | None) -> float:
        """Return the items that a loss with this *weight* stands for; see :meth:`enter` for what is raised."""
        if type(weight) is int and 0 <= weight < _EXACT:  # as nearly always
            return float(weight)
        if weight is None:
            if self.batch is not None:
                message = (
                    f"effective_batch_size={self.batch} counts items, and this loss came without their number: "
                    "optimizer.backward(loss, weight=n), with n the samples or tokens behind it"
                )
                raise ArgumentValueError(message)
            if self.reduction == "sum":
                message = (
                    "loss_reduction='sum' needs the number of items in every sum: "
                    "optimizer.backward(loss, weight=n), with n the samples or tokens that were summed"
                )
                raise ArgumentValueError(message)
            return 1.0
        if isinstance(weight, torch.Tensor):
            number = weight.numel() == 1 and not (weight.is_complex() or weight.dtype == torch.bool)
        else:
            number = isinstance(weight, Real) and not isinstance(weight, bool)
        if not number:
            shape = (
                f" of shape {tuple(weight.shape)}" if isinstance(weight, torch.Tensor) and weight.numel() != 1 else ""
            )
            message = (
                f"weight must be a number, got {type(weight).__name__}{shape}; "
                "it is the number of items (samples, tokens) behind the loss"
            )
            raise ArgumentTypeError(message)
        try:
            items = float(weight.detach() if isinstance(weight, torch.Tensor) else weight)
        except OverflowError:  # an int beyond every float
            items = math.inf
        if not (math.isfinite(items) and items >= 0.0):
            message = f"weight must be finite and at least 0, got {items}"
            raise ArgumentValueError(message)
        return items

    def require_weight(self) -> None:
        """Refuse to end a micro-batch whose weight nobody told.

        Raises:
            BackwardError: If no loss has entered it and the window is one of weighted or summed losses, or of
                losses that entered divided, because gradients are fp16.
        """
        divided = self.unit not in (0.0, 1.0)
        if not self.pending and (self.weighted or self.reduction == "sum" or divided or self.batch is not None):
            message = (
                "update() was called for a micro-batch of which backward() was not told the weight; "
                "call optimizer.backward(loss, weight=n) instead of loss.backward()"
            )
            raise BackwardError(message)

    def end_micro_batch(self) -> None:
        """Count the micro-batch under way; one that no loss has entered was differentiated by the user."""
        if not self.pending:
            self.require_weight()
            self.weighted = False
            self.unit = 1.0
            self.weight += 1.0
        self.pending = False
        self.micro_batches += 1


def closing_windows(size: int, tail: Tail, epoch_length: int, iterations: int) -> Iterator[tuple[int, int, int]]:
    """Yield the windows that a run without skipped steps steps, before it has happened.

    Args:
        size: Micro-batches per step, at least 1.
        tail: What becomes of a short last window of an epoch.
        epoch_length: Micro-batches per epoch, at least 1.
        iterations: Micro-batches of the whole run; it may end inside an epoch.

    Yields:
        The iteration at which the window closes, the epoch then, both from 1, and its micro-batches.
    """
    if tail == "carry":
        for last in range(size, iterations + 1, size):
            yield last, (last - 1) // epoch_length + 1, size
        if rest := iterations % size:
            yield iterations, (iterations - 1) // epoch_length + 1, rest
        return
    for epoch, begin in enumerate(range(0, iterations, epoch_length), start=1):
        end = min(begin + epoch_length, iterations)
        for last in range(begin + size, end + 1, size):
            yield last, epoch, size
        rest = (end - begin) % size
        if rest and tail == "step":
            yield end, epoch, rest
