"""Factors that do not change along the run: for the size of a batch, and for the depth of a layer."""

import math
from typing import Any, Literal

from ice_engine import arguments
from ice_engine.errors import ProcessorValueError
from ice_engine.processors.clocks import Unit
from ice_engine.processors.curve import Formula, build, by_clock
from ice_engine.processors.schedule import Schedule
from ice_engine.processors.shapes import times

RULES = ("linear", "sqrt")


@by_clock
def _batch_scaling(_: float, *, batch_size: int, reference: int, rule: str) -> Formula:
    ratio = batch_size / reference
    return times(math.sqrt(ratio) if rule == "sqrt" else ratio)


def batch_scaling(
    batch_size: int,
    reference: int = 256,
    *,
    rule: Literal["linear", "sqrt"] = "linear",
    unit: Unit = "step",
    dst: str = "lr",
) -> Schedule:
    r"""Scale ``dst`` with the size of the batch, from the one it was tuned for.

    .. math:: \eta_t = \eta_0\,B / B_0 \quad\text{or}\quad \eta_t = \eta_0 \sqrt{B / B_0}

    where :math:`\eta_0` is the group's ``initial_<dst>``, :math:`B` is *batch_size* and :math:`B_0` *reference*. The
    linear rule is SGD's, the square root Adam's.

    Args:
        batch_size: Samples (or tokens) of one step, over all ranks and micro-batches; at least 1.
        reference: The same for which the initial value was chosen; at least 1.
        rule: "linear" or "sqrt".
        unit: The clock that ``then(..., at=)`` counts; the value does not depend on it.
        dst: The entry to schedule.

    Returns:
        A processor. Reads ``initial_<dst>`` and the clock; writes ``dst``; leaves other keys alone.

    Raises:
        ArgumentTypeError: If an argument has the wrong type.
        ArgumentValueError: If a size is below 1, or *rule* or *unit* unknown.

    Examples:
        >>> import ice_engine as ice
        >>> plan = ice.schedules.batch_scaling(1024) * ice.schedules.cosine(total=10)
        >>> plan({"step": 5, "initial_lr": 0.1})["lr"]
        0.2

    References:
        Goyal et al., `Accurate, Large Minibatch SGD <https://arxiv.org/abs/1706.02677>`_, 2017 (linear); Krizhevsky,
        `One weird trick <https://arxiv.org/abs/1404.5997>`_, 2014, and Malladi et al., `On the SDEs and Scaling Rules
        for Adaptive Gradient Algorithms <https://arxiv.org/abs/2205.10287>`_, 2022 (square root).

    .. versionadded:: 0.1.0
    """
    arguments.choice("batch_scaling(rule=...)", rule, RULES)
    return build(
        batch_scaling,
        _batch_scaling,
        unit=unit,
        dst=dst,
        batch_size=arguments.count("batch_scaling(batch_size=...)", batch_size, 1),
        reference=arguments.count("batch_scaling(reference=...)", reference, 1),
        rule=rule,
    )


def _layer_decay(base: float, _: float, *, decay: float, depth: Any) -> float:
    if isinstance(depth, bool) or not isinstance(depth, int | float) or not 0 <= depth < math.inf:
        message = (
            f"processor 'layer_decay' found 'depth' to be {depth!r} ({type(depth).__name__}); it must be the number of "
            "layers above the group's own, at least 0"
        )
        raise ProcessorValueError(message)
    return base * math.pow(decay, float(depth))


def layer_decay(decay: float, *, unit: Unit = "step", dst: str = "lr") -> Schedule:
    r"""Lower ``dst`` with the depth of the layer, so that those far from the output learn more slowly.

    .. math:: \eta_t = \eta_0\,\lambda^{d}

    where :math:`\eta_0` is the group's ``initial_<dst>``, :math:`\lambda` is *decay* and :math:`d` the group's own
    entry ``depth``: 0 at the top layer, 1 below it, and so on; a whole number or not. Without that entry it is an
    error: let ``ice.param_groups(..., layers=...)`` write it, or add it to every group yourself, as
    ``{"params": ..., "depth": 3}``.

    Args:
        decay: Factor from one layer to the one below it; above 0.
        unit: The clock that ``then(..., at=)`` counts; the value does not depend on it.
        dst: The entry to schedule.

    Returns:
        A processor. Reads ``initial_<dst>``, ``depth`` and the clock; writes ``dst``; leaves other keys alone.

    Raises:
        ArgumentTypeError: If an argument has the wrong type.
        ArgumentValueError: If *decay* is not above 0, infinite or NaN, or *unit* unknown.

    Examples:
        >>> import ice_engine as ice
        >>> plan = ice.schedules.layer_decay(0.5)
        >>> [plan({"step": 0, "initial_lr": 1.0, "depth": depth})["lr"] for depth in range(3)]
        [1.0, 0.5, 0.25]

    References:
        Clark et al., `ELECTRA <https://arxiv.org/abs/2003.10555>`_, 2020; Bao et al., `BEiT
        <https://arxiv.org/abs/2106.08254>`_, 2021.

    .. versionadded:: 0.1.0
    """
    decay = arguments.positive("layer_decay(decay=...)", decay)
    return build(layer_decay, _layer_decay, unit=unit, dst=dst, reads=("depth",), decay=decay)
