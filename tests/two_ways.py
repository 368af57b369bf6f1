"""One window two ways: as one writes it by hand, and ours, with everything on that a step has."""

import functools
from collections.abc import Callable
from typing import Any

import torch

import ice_engine as ice

FORMS: dict[str, Any] = {
    "fused": functools.partial(torch.optim.AdamW, fused=True),
    "foreach": functools.partial(torch.optim.AdamW, foreach=True),
    "for-loop": functools.partial(torch.optim.AdamW, foreach=False),
}


def by_hand(layers: torch.nn.Module, factory: Any, k: int, *, scaled: bool) -> Callable[[torch.Tensor], None]:
    """Return what trains *layers* for a window of *k* times one batch, clipped, with a ``GradScaler`` if *scaled*."""
    optimizer = factory(layers.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)

    def window(batch: torch.Tensor) -> None:
        for _ in range(k):
            scaler.scale(layers(batch).square().mean() / k).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(layers.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return window


def wrapped(layers: torch.nn.Module, factory: Any, k: int, *, scaled: bool) -> ice.Optimizer:
    """Return the optimizer that does the same."""
    return ice.Optimizer(
        factory(layers.parameters()),
        accumulation_steps=k,
        clip=ice.clip_norm(1.0),
        grad_scaler=torch.amp.GradScaler("cpu") if scaled else None,
        processors=[ice.schedules.cosine(total=100)],
    )
