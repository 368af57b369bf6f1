"""What the optimizer phase costs, from the last backward to the next forward: ``python tests/benchmarks/phase.py``.

Finite check, unscaling, clip and AdamW: as torch's functions do it one after the other, and as a window closes. With
one thread and a steady heap, and once more as torch comes: with as many threads as there are cores, asleep where they
wait, since those of the other loops would keep the cores busy; and with the heap that glibc has by itself, which takes
each temporary of a megabyte anew.
"""

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from measure import Case, Loop, run

import ice_engine as ice

ADAMW = functools.partial(torch.optim.AdamW, lr=1e-4)


@dataclass(frozen=True)
class Sizes:
    """The shapes of the parameters."""

    shapes: tuple[tuple[int, ...], ...]

    def parameters(self) -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(torch.randn(shape)) for shape in self.shapes]

    def gradients(self) -> list[torch.Tensor]:
        return [torch.full(shape, 1e-3) for shape in self.shapes]


def by_hand(sizes: Sizes, batches: Iterator[Any], *, scaled: bool = True, fused: bool | None = None) -> None:
    parameters, gradients = sizes.parameters(), sizes.gradients()
    optimizer = ADAMW(parameters, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, enabled=scaled)
    scaler.scale(torch.ones(()))
    for _ in batches:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def kernels(sizes: Sizes, batches: Iterator[Any]) -> None:
    """Take what cannot be left out: one reading of the gradients, and torch's fused kernel with the factor."""
    parameters, gradients = sizes.parameters(), sizes.gradients()
    optimizer: Any = ADAMW(parameters, fused=True)
    optimizer.found_inf = torch.zeros(())
    for _ in batches:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        optimizer.grad_scale = norm.clamp(min=1.0)
        optimizer.step()


def ours(sizes: Sizes, batches: Iterator[Any], *, scaled: bool = True) -> None:
    parameters, gradients = sizes.parameters(), sizes.gradients()
    optimizer = ice.Optimizer(
        ADAMW,
        parameters,
        clip=ice.clip_norm(1.0),
        grad_scaler=torch.amp.GradScaler("cpu", init_scale=1.0) if scaled else None,
    )
    if optimizer.grad_scaler is not None:
        optimizer.grad_scaler.scale(torch.ones(()))
    for _ in batches:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.update()


LOOPS: dict[str, Any] = {
    "unscale_, clip_grad_norm_, AdamW": by_hand,
    "the same, fused AdamW": functools.partial(by_hand, fused=True),
    "the norm and fused AdamW, nothing else": kernels,
    "ours": ours,
    "ours, no GradScaler": functools.partial(ours, scaled=False),
    "clip_grad_norm_, AdamW": functools.partial(by_hand, scaled=False),
}


def case(name: str, shapes: list[tuple[int, ...]], size: int, bounds: dict[str, float], **how: Any) -> Case:
    loops: dict[str, Loop] = {
        loop: functools.partial(function, Sizes(tuple(shapes))) for loop, function in LOOPS.items()
    }
    return Case(name, loops, None, size, bounds, **how)


def characters() -> list[tuple[int, ...]]:
    """The parameters of a transformer of 6 layers of 128: 1.2M in 77 tensors."""
    layer = [(384, 128), (384,), (128, 128), (128,), (512, 128), (512,), (128, 512), (128,), *[(128,)] * 4]
    return [(64, 128), *layer * 6, (128,), (128,), (64, 128), (64,)]


def cases() -> list[Case]:
    as_torch_comes = {"threads": os.cpu_count(), "environment": {"OMP_WAIT_POLICY": "PASSIVE"}}
    return [
        case("2 tiny", [(1, 16), (1,)], 50, {}),
        case("200 x 64", [(64,)] * 200, 5, {}),
        case("1.2M in 77", characters(), 2, {"ours": 0.40}),
        case("29M in 28", [(1024, 1024)] * 28, 1, {"ours": 0.25}),
        case("29M, as torch comes", [(1024, 1024)] * 28, 1, {"ours": 0.25}, **as_torch_comes),
    ]


if __name__ == "__main__":
    run(cases())
