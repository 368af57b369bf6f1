r"""What a record can say besides, on request: how noisy the gradient is, how far a step goes, where the time goes.

The noise scale of a gradient is the batch size from which on a larger batch brings little. It follows from the norms of
two batches of different size, and a window has both: its first micro-batch and all of it.

.. math::

    |G|^2 = \frac{B\,|g_B|^2 - b\,|g_b|^2}{B - b}, \qquad
    S = \frac{|g_b|^2 - |g_B|^2}{1/b - 1/B}, \qquad
    B_{noise} = \frac{S}{|G|^2}

where :math:`g_b` is the mean gradient over the :math:`b` items of the first micro-batch and :math:`g_B` that over the
:math:`B` items of the window. Each is without bias and varies wildly; so both are averaged over steps, then divided.

References:
    McCandlish et al., `An Empirical Model of Large-Batch Training <https://arxiv.org/abs/1812.06162>`_, 2018.
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

MEASURES = ("grad_norm", "noise_scale", "update_ratio", "times")
_KEEP = 0.99  # of the running means: about the last hundred steps


class NoiseScale:
    """Running means of the gradient's squared length and of its variance, per window.

    Attributes:
        signal: Of :math:`|G|^2`, weighted.
        variance: Of :math:`S`, weighted.
        weight: Sum of the weights; below 1 at the beginning, which cancels in the quotient.
    """

    def __init__(self) -> None:
        self.signal: float = 0.0
        self.variance: float = 0.0
        self.weight: float = 0.0

    def add(self, small: float, small_items: float, big: float, big_items: float) -> None:
        """Add a window: the squared norms of its first micro-batch and of all of it, and the items of both.

        One that is not finite adds nothing.
        """
        signal = (big_items * big - small_items * small) / (big_items - small_items)
        variance = (small - big) / (1 / small_items - 1 / big_items)
        if not (math.isfinite(signal) and math.isfinite(variance)):
            return  # a mean with it would stay NaN
        self.signal = _KEEP * self.signal + (1 - _KEEP) * signal
        self.variance = _KEEP * self.variance + (1 - _KEEP) * variance
        self.weight = _KEEP * self.weight + (1 - _KEEP)

    @property
    def value(self) -> float | None:
        """The noise scale, in items; None before the first window, and while the means say it is negative."""
        return self.variance / self.signal if self.signal > 0 and self.variance > 0 else None

    def state_dict(self) -> list[float]:
        """Return the running means as plain data."""
        return [self.signal, self.variance, self.weight]

    def load_state_dict(self, state: Sequence[float]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self.signal, self.variance, self.weight = map(float, state)


class Stopwatch:
    """Splits the time of a window into what is spent on data, on forward and backward, and on the step.

    Attributes:
        total: Seconds by part, of all windows since :meth:`restart`.
        spent: Those of the window under way, in a dict of its own.
    """

    def __init__(self) -> None:
        self._last: float | None = None
        self.total: dict[str, float] = {}
        self.spent = {"data": 0.0, "compute": 0.0, "step": 0.0}

    def lap(self, part: str) -> None:
        """Book the time since the last lap on *part*; the first lap only starts the watch."""
        now = time.perf_counter()
        if self._last is not None:
            self.spent[part] += now - self._last
        self._last = now

    def stop(self) -> None:
        """Let what comes until the next lap count for nothing, such as the time between two runs."""
        self._last = None

    def split(self) -> None:
        """Go on with another window."""
        for part, seconds in self.spent.items():
            self.total[part] = self.total.get(part, 0.0) + seconds
        self.spent = dict.fromkeys(self.spent, 0.0)

    def restart(self) -> None:
        """Begin anew, as a run does."""
        self.stop()
        self.total = {}
        self.spent = dict.fromkeys(self.spent, 0.0)


class Strides:
    """How far a step moves each param group, as a part of the length of its weights.

    Takes a copy of all parameters: memory and two more passes over them.

    Args:
        groups: By name, the parameters before the step.
    """

    def __init__(self, groups: Mapping[str, Sequence[torch.Tensor]]) -> None:
        self._groups = groups
        self._before = {name: [p.detach().clone() for p in params] for name, params in groups.items()}

    def ratios(self) -> dict[str, Any]:
        r"""Return :math:`\lVert\Delta w\rVert / \lVert w\rVert` of each group, shape (); of weights 0, infinity."""
        found = {}
        for name, before in self._before.items():
            steps = [p.detach() - old for p, old in zip(self._groups[name], before, strict=True)]
            found[name] = torch.nn.utils.get_total_norm(steps) / torch.nn.utils.get_total_norm(before)
        return found


class Measures:
    """What is measured of each window, and what was found.

    Attributes:
        wanted: The measures asked for, of ``MEASURES``.
        noise: The noise scale so far.
        watch: Where the time of the window goes.
    """

    def __init__(self) -> None:
        self.wanted: frozenset[str] = frozenset()
        self.noise = NoiseScale()
        self.watch = Stopwatch()
        self._strides: Strides | None = None
        self.forget()

    def forget(self) -> None:
        """Drop what was found of the window under way."""
        self._first: tuple[torch.Tensor, float] | None = None
        self._length: torch.Tensor | None = None

    @property
    def wants_norm(self) -> bool:
        """Whether the gradient's length is needed, whoever else computes a norm."""
        return bool(self.wanted & {"grad_norm", "noise_scale"})

    @property
    def wants_length(self) -> bool:
        """Whether the length of this window's gradient goes with that of its first micro-batch."""
        return self._first is not None

    def first(self, norm: torch.Tensor, weight: float) -> None:
        """Keep the norm of the first micro-batch's mean gradient, and its weight."""
        self._first = norm.square(), weight

    @property
    def of_first(self) -> tuple[float, float] | None:
        """What :meth:`first` kept of the window under way, as plain data: the squared norm and the weight."""
        return None if self._first is None else (float(self._first[0]), self._first[1])

    @of_first.setter
    def of_first(self, value: tuple[float, float] | None) -> None:
        self._first = None if value is None else (torch.tensor(value[0], device="cpu"), value[1])

    def whole(self, norm: torch.Tensor | None) -> None:
        """Keep the norm of the window's gradient, before clipping."""
        self._length = norm

    @property
    def times(self) -> dict[str, float] | None:
        """Where the time of the window under way goes, filled in until :meth:`after_step`; None unless it is wanted."""
        return self.watch.spent if "times" in self.wanted else None

    @property
    def wants_strides(self) -> bool:
        """Whether it is to see the parameters before a step."""
        return "update_ratio" in self.wanted

    def before_step(self, groups: Mapping[str, Sequence[torch.Tensor]]) -> None:
        """Look at the parameters, by group name, as they are before the step."""
        self._strides = Strides(groups)

    def after_step(self, weight: float) -> dict[str, Any]:
        """Return what the record of a window of *weight* says besides, as far as it is wanted."""
        if self._first is not None and self._length is not None and weight > self._first[1]:
            square, items = self._first
            self.noise.add(float(square), items, float(self._length) ** 2, weight)
        if "times" in self.wanted:
            self.watch.lap("step")
            self.watch.split()
        found: dict[str, Any] = {"noise_scale": self.noise.value} if "noise_scale" in self.wanted else {}
        if self._strides is not None:
            found["update_ratio"] = self._strides.ratios()
            self._strides = None
        return found
