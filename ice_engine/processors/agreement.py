"""Ranks that agree on what their processors write: found out with one small text each, and named if they do not."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ice_engine.errors import ProcessorDivergenceError
from ice_engine.processors.group_mapping import GroupMapping
from ice_engine.processors.processor import name_of

Gather = Callable[[str], list[str]]
"""Gives every rank's text to every rank, in the order of ranks."""


def require_agreement(
    staged: Sequence[GroupMapping],
    gather: Gather,
    processors: Sequence[Callable[..., Any]],
    groups: Sequence[dict[str, Any]],
    context: Mapping[str, Any],
) -> None:
    """Check that every rank is about to write the same.

    Raises:
        ProcessorDivergenceError: On every rank, if not; names processor, group, key and the ranks' values.
    """
    written = [{key: exact(value) for key, value in sorted(mapping.staged.items())} for mapping in staged]
    digest = hashlib.sha256(repr(written).encode()).hexdigest()
    if len(set(gather(digest))) == 1:
        return
    # They differ, and every rank knows it: run them again, one at a time, to find the first that does.
    steps = []
    for index, group in enumerate(groups):
        mapping = GroupMapping(group, context, index)
        for processor in processors:
            mapping.absorb(processor, processor(mapping))
            mapping.check()
            steps.append([name_of(processor), mapping.label, {k: exact(v) for k, v in mapping.staged.items()}])
    ranks = [json.loads(text) for text in gather(json.dumps(steps))]
    for place, (name, label, _) in enumerate(steps):
        values = [rank[place][2] if place < len(rank) else {} for rank in ranks]
        for key in sorted({key for written in values for key in written}):
            found = [written.get(key, "left as it is") for written in values]
            if len(set(found)) > 1:
                listed = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(found))
                message = (
                    f"processor {name!r} differs between ranks in {key!r} of {label}: {listed}. Compute it from the "
                    "clocks, or from values that were reduced over all ranks; no param group has changed"
                )
                raise ProcessorDivergenceError(message)
    message = (
        "processors write different values on different ranks, and the same ones when run again: one of them keeps "
        f"a state of its own or draws random numbers; they are: {', '.join(map(name_of, processors))}"
    )
    raise ProcessorDivergenceError(message)


def exact(value: Any) -> str:
    """Return a text that is the same for the same value, and another one for another; its type, if it has no value."""
    # The repr of a tensor rounds.
    text = repr(value.tolist() if isinstance(value, torch.Tensor) else value)
    # An address is another one in every process, and says nothing about the value.
    return type(value).__qualname__ if " at 0x" in text else text
