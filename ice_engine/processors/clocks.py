"""The clocks a schedule can follow: how much of the run lies behind, and how long the run is."""

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

from ice_engine.errors import MissingKeyError
from ice_engine.processors.processor import require_key

Unit: TypeAlias = Literal["step", "iteration", "epoch"]
"""What a schedule counts: updates applied, micro-batches, or epochs."""

UNITS: tuple[Unit, ...] = get_args(Unit)

_LENGTHS = {
    "step": ("total_steps",),
    "iteration": ("epoch_length", "max_epochs"),
    "epoch": ("max_epochs",),
}


def elapsed(mapping: Mapping[str, Any], unit: Unit, processor: str) -> float:
    """Return how many of *unit* lie behind: 0 during the first one.

    A whole number, unless the run was resumed with ``on_change="stretch"``: then the mapping's ``stretch`` says, for
    each unit, from when on, from which time, and how fast the clock runs.

    Raises:
        MissingKeyError: If the mapping has no such clock, or has None for it.
    """
    count: int | None = mapping.get(unit)
    if count is None:
        require_key(mapping, unit, processor, "Give it to Optimizer(processors=[...]), or set it yourself.")
        message = f"processor {processor!r} follows {unit!r}, which is None: nothing here counts it. Use another unit="
        raise MissingKeyError(message)
    # Ignite counts iterations and epochs from 1, and shows 0 before the run; steps count what was applied.
    t = count if unit == "step" else max(count - 1, 0)
    stretch = mapping.get("stretch")
    if stretch and unit in stretch:
        since, begin, speed = stretch[unit]
        return t if t < since else float(begin + (t - since) * speed)
    return t


def at_clock(unit: Unit, t: int) -> dict[str, Any]:
    """Return the entries of a mapping at which *t* of *unit* lie behind."""
    return {unit: t if unit == "step" else t + 1, "stretch": None}


def run_length(mapping: Mapping[str, Any], unit: Unit, processor: str) -> int:
    """Return how many of *unit* the whole run has.

    Raises:
        MissingKeyError: If the run has no known end.
    """
    if unit == "iteration" and mapping.get("max_iters") is not None:
        return int(mapping["max_iters"])  # Engine.run(max_iters=) ends inside an epoch
    if unit == "step" and (total := mapping.get("total_steps")) is not None:
        return int(total)
    keys = _LENGTHS[unit]
    unknown = [key for key in keys if key not in mapping or mapping[key] is None]
    if unknown:
        message = (
            f"processor {processor!r} is to last the whole run, whose length in {unit}s is unknown: "
            f"{' and '.join(map(repr, unknown))} of the mapping is absent or None. Pass {processor}(total=...)"
        )
        raise MissingKeyError(message)
    return math.prod(mapping[key] for key in keys)
