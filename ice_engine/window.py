r"""The accumulation window: the micro-batches of one step, and the arithmetic that makes their mean exact.

Losses are accumulated as a weighted sum and divided once, when the window closes, so the step's
gradient is the mean over all items of the window, whatever the micro-batches' sizes and however
many there are:

.. math:: g = \frac{\sum_m w_m \nabla L_m}{\sum_m w_m}

To keep fp16 in range, each loss is multiplied by :math:`w_m / c` and the gradient, at the end, by
:math:`c / \sum_m w_m`, where :math:`c` is the window's first weight: with equal weights every
loss enters as it is.
"""

import math
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Literal

import torch

from ice_engine.arguments import choice, count
from ice_engine.errors import ArgumentTypeError, ArgumentValueError, BackwardError

Tail = Literal["step", "carry", "drop"]
Reduction = Literal["mean", "sum"]


class Window:
    """Counts and weighs the micro-batches of one step; alone knows when a step is due.

    Args:
        size: Micro-batches per step, at least 1.
        tail: What becomes of a short last window of an epoch: ``"step"``, ``"carry"`` or ``"drop"``.
        reduction: What losses are over their items: a ``"mean"`` or a ``"sum"``.

    Attributes:
        micro_batches: Complete micro-batches in the open window.
        weight: Their total weight.
        pending: Whether a loss has entered the micro-batch that is under way.
        losses: The losses that entered, detached, by micro-batch, for the report on a non-finite window.
        weighted: Whether losses come with a weight; None before the first.
        unit_of: Returns the unit that a first weight makes; the weight itself, unless other ranks have a say.
        common: The unit of every window, where it is the same on many ranks; 0 where each takes its own.
    """

    def __init__(self, size: int, tail: Tail = "step", reduction: Reduction = "mean") -> None:
        self.size = count("accumulation_steps", size, 1)
        choice("tail", tail, ("step", "carry", "drop"))
        choice("loss_reduction", reduction, ("mean", "sum"))
        self.tail: Tail = tail
        self.reduction: Reduction = reduction
        self.unit_of: Callable[[float], float] = float
        self.common: float = 0.0
        self.reset()

    def reset(self) -> None:
        """Empty the window."""
        self.micro_batches: int = 0
        self.weight: float = 0.0
        self.pending: bool = False
        self.losses: list[tuple[int, torch.Tensor]] = []
        self.unit: float = self.common
        self.weighted: bool | None = None

    @property
    def is_open(self) -> bool:
        """Whether any loss has entered since the last step."""
        return self.pending or self.micro_batches > 0

    def closes_next(self, *, last: bool) -> bool:
        """Whether one more micro-batch would end the window; *last* if it is its epoch's last."""
        return self.micro_batches + 1 >= self.size or (last and self.tail == "step")

    def share(self, weight: float, ranks: int) -> None:
        """Take the window as a part of one of *weight*, whose gradients are averaged over *ranks*."""
        self.weight = weight
        self.unit *= ranks

    @property
    def scale(self) -> float:
        """What the accumulated gradients are multiplied with to become the window's mean."""
        return self.unit / self.weight

    def enter(self, loss: torch.Tensor, weight: float | None) -> torch.Tensor | None:
        """Take a loss into the micro-batch under way and return what to differentiate.

        Args:
            loss: The loss, shape ().
            weight: Items behind it, at least 0. None, in all calls of a window: every micro-batch weighs
                the same, and several losses in one micro-batch add up, as with ``loss.backward()``.

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
        items = self._items(weight)
        self.weighted = weight is not None
        self.losses.append((self.micro_batches + 1, loss.detach()))
        first_of_micro_batch = not self.pending
        self.pending = True
        if items == 0.0:
            return None
        self.unit = self.unit or (1.0 if weight is None else self.unit_of(items))
        if weight is not None or first_of_micro_batch:
            self.weight += items
        if self.reduction == "sum":
            return loss / self.unit
        return loss if items == self.unit else loss * (items / self.unit)

    def _items(self, weight: float | None) -> float:
        if weight is None:
            if self.reduction == "sum":
                message = (
                    "loss_reduction='sum' needs the number of items in every sum: "
                    "optimizer.backward(loss, weight=n), with n the samples or tokens that were summed"
                )
                raise ArgumentValueError(message)
            return 1.0
        if isinstance(weight, bool) or not (
            isinstance(weight, Real) or (isinstance(weight, torch.Tensor) and weight.numel() == 1)
        ):
            message = (
                f"weight must be a number, got {type(weight).__name__}; "
                "it is the number of items (samples, tokens) behind the loss"
            )
            raise ArgumentTypeError(message)
        items = float(weight)
        if not (math.isfinite(items) and items >= 0.0):
            message = f"weight must be finite and at least 0, got {items}"
            raise ArgumentValueError(message)
        return items

    def require_weight(self) -> None:
        """Refuse to end a micro-batch whose weight nobody told.

        Raises:
            BackwardError: If no loss has entered it and the window is one of weighted or summed losses.
        """
        if not self.pending and (self.weighted or self.reduction == "sum"):
            message = (
                "update() was called for a micro-batch of which backward() was not told the weight; "
                "call optimizer.backward(loss, weight=n) instead of loss.backward()"
            )
            raise BackwardError(message)

    def end_micro_batch(self) -> None:
        """Count the micro-batch under way; one that no loss has entered was differentiated by the user."""
        self.require_weight()
        if not self.pending:
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
