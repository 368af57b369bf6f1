"""What the other ranks of an engine ask of an optimizer."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ice_engine.distributed.synchroniser import Synchroniser
from ice_engine.precision import Precision
from ice_engine.window import Window

SPOILED = "a run that ended after a loss that was not finite"


@dataclass(eq=False)
class Member:
    """An optimizer as its peers on the other ranks see it.

    Attributes:
        name: Its name.
        window: Its window.
        precision: Its loss scale, which it may share.
        sync: What reduces its gradients.
        parameters: Returns them.
        facts: Returns what must be the same on all ranks when a run starts, as plain data.
        values: Returns the entries of its param groups, likewise at every step.
        close: Steps or skips the window.
        drop: Drops it, as its tail says.
        is_spoiled: Returns whether a loss in it was not finite, which nobody would find out when it steps.
        discard: Drops it, with a warning that names a cause.
        let_go: Clears the gradients of a window that is not open on this rank: others' have been averaged into them.
        common: What its clocks are to take for the same on all ranks, see :class:`~ice_engine.clocks.Clocks`.
        touched: Is told that other ranks' gradients have been averaged into this one's.
        differentiated: Backward passes so far.
        broken: Whether the last of them raised.
        begun: Micro-batches since its window opened, on the rank that is ahead; where all are in step.
        unweighted: Whether a first loss has told all ranks that it has no weight.
        updated: Whether ``update()`` has ended micro-batches of it in this iteration.
        meet: Called before a backward: where it reduces, other ranks may have fewer losses, or another optimizer's.
        end_micro_batch: Steps with the other ranks, where ``update()`` ends one that fills a window; returns whether.
    """

    name: str
    window: Window
    precision: Precision
    sync: Synchroniser
    parameters: Callable[[], list[torch.Tensor]]
    facts: Callable[[], dict[str, Any]]
    values: Callable[[], dict[str, dict[str, str]]]
    close: Callable[[], bool]
    drop: Callable[[], Any]
    is_spoiled: Callable[[], bool]
    discard: Callable[[str], Any]
    let_go: Callable[[], Any]
    touched: Callable[[], Any]
    common: dict[str, Any]
    differentiated: int = 0
    broken: bool = False
    begun: int = 0
    unweighted: bool = False
    updated: bool = False
    meet: Callable[[], object] = bool
    end_micro_batch: Callable[[], bool] = bool

    @property
    def met(self) -> bool:
        """Whether a first loss has told all ranks the unit of its weights, or that it has none."""
        return self.unweighted or self.window.common > 0.0


def syncs_of(members: Iterable[Member]) -> list[Synchroniser]:
    """Return what reduces the gradients of *members*, each once: optimizers of one model have the same."""
    return list({id(m.sync): m.sync for m in members}.values())
