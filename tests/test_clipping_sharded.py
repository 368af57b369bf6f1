"""Gradients sharded over ranks are clipped as the whole ones: fully_shard'ed models and other layouts, on two ranks.

The oracle is the unsharded model on the same rank, clipped by torch's own functions and a hand-written AGC.
"""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import ice_engine as ice
from ice_engine.errors import NonFiniteGradientError
from ice_engine.norms import total_norm
from tests.distributed.launch import launch

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}

Parameters = list[torch.nn.Parameter]


def agc(parameters: Parameters) -> torch.Tensor:
    """Clip as the paper says, one unit after the other, by 0.05 with weights of at least 1e-3."""
    norm = math.hypot(*(float(p.grad.norm()) for p in parameters))
    for p in parameters:
        for unit in range(len(p)) if p.ndim > 1 else [...]:
            own, limit = float(p.grad[unit].norm()), 0.05 * max(float(p.detach()[unit].norm()), 1e-3)
            if own > limit:
                p.grad[unit] *= limit / own
    return torch.tensor(norm, dtype=torch.float64)


def by_value(parameters: Parameters) -> torch.Tensor:
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    torch.nn.utils.clip_grad_value_(parameters, 0.05)
    return norm


def by_group(parameters: Parameters) -> torch.Tensor:
    norms = [torch.nn.utils.clip_grad_norm_(part, 0.3) for part in (parameters[:3], parameters[3:])]
    return torch.stack(norms).norm()


CLIPS: dict[str, tuple[Callable[..., Any], Callable[[Parameters], torch.Tensor]]] = {
    **{
        f"norm, p={p}": (
            ice.clip_norm(0.1, norm_type=p),
            lambda parameters, p=p: torch.nn.utils.clip_grad_norm_(parameters, 0.1, p),
        )
        for p in (1.0, 2.0, 3.5, math.inf)
    },
    "norm, all let through": (ice.clip_norm(1e6), lambda ps: torch.nn.utils.clip_grad_norm_(ps, 1e6)),
    "norm per group": (
        lambda parameters: ice.clip_norm(0.3, per_group=True).by_group([parameters[:3], parameters[3:]]),
        by_group,
    ),
    "value": (ice.clip_value(0.05), by_value),
    "adaptive": (ice.clip_adaptive(0.05), agc),
}
BAD = {
    "norm": ice.clip_norm(0.1),
    "largest entry": ice.clip_norm(0.1, norm_type=math.inf),
    "value": ice.clip_value(0.05),
    "adaptive": ice.clip_adaptive(0.05),
}


def network(dtype: torch.dtype) -> torch.nn.Sequential:
    """Shapes that two ranks cannot halve, a layer of zeros, and tensors of one row, which leave rank 1 with nothing."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv1d(2, 3, 2),
        torch.nn.Flatten(),
        torch.nn.Linear(9, 5),
        torch.nn.Linear(5, 4),
        torch.nn.Linear(4, 1),
    ).to(dtype)
    torch.nn.init.zeros_(model[3].weight)
    return model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest entry."""
    if expected.numel() == 0 or not expected.any():
        return float(actual.abs().sum())
    return float((actual.double() - expected.double()).abs().max() / expected.abs().max().double())


def compare(
    clip: Callable[..., Any], oracle: Callable[[Parameters], torch.Tensor], sharded: Parameters, plain: Parameters
) -> float:
    """Clip both, put their gradients back, and return the largest relative error of norm and gradients."""
    before = [(p, p.grad.clone()) for p in (*sharded, *plain)]
    norm, expected = clip(sharded), oracle(plain)
    found = type(norm) is torch.Tensor and norm.shape == ()
    errors = [error(norm, expected)] if found else [math.inf]
    errors += [error(whole(p.grad), q.grad) for p, q in zip(sharded, plain, strict=True)]
    moved = any(not torch.equal(q.grad, g) for q, g in before[len(sharded) :])
    for p, gradient in before:
        p.grad = gradient
    return max(errors) if moved or oracle is CLIPS["norm, all let through"][1] else math.inf


def fully_sharded(dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """A model whose gradients come from FSDP2's own backward, against the same model in one piece."""
    plain = network(dtype)
    sharded = copy.deepcopy(plain)
    for layer in sharded:
        if list(layer.parameters()):
            fully_shard(layer)
    fully_shard(sharded)
    inputs = torch.linspace(-1, 2, 5 * 2 * 4).reshape(5, 2, 4).to(dtype)
    for model in (plain, sharded):
        (model(inputs) - 3.0).square().mean().backward()
    for name, (clip, oracle) in CLIPS.items():
        yield name, compare(clip, oracle, list(sharded.parameters()), list(plain.parameters()))


def laid_out() -> Iterator[tuple[str, float]]:
    """The same tensors in other layouts, alone and mixed, in meshes of one and of two dimensions."""
    line, grid = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1))
    layouts: dict[str, list[Any]] = {
        "columns": [(line, [Shard(1)])],
        "whole": [(line, [Replicate()])],
        "sum over ranks": [(line, [Partial()])],
        "rows and columns": [(grid, [Shard(1), Shard(0)])],
        "replicated shards": [(init_device_mesh("cpu", (1, 2)), [Replicate(), Shard(0)])],
        "two meshes": [(line, [Shard(0)]), (grid, [Shard(1), Replicate()])],
        "with plain ones": [(line, [Shard(1)]), None],
    }
    generator = torch.Generator().manual_seed(1)
    shapes = [(5, 3), (4,), (1, 6), (3, 2, 3), (1,), ()]
    weights = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    gradients = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    for layout, choices in layouts.items():
        for name, (clip, oracle) in CLIPS.items():
            sharded, plain = [], []
            for i, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
                plain.append(torch.nn.Parameter(weight.clone()))
                plain[-1].grad = gradient.clone()
                sharded.append(spread(weight, gradient, choices[i % len(choices)]))
            yield f"{layout}: {name}", compare(clip, oracle, sharded, plain)


def spread(weight: torch.Tensor, gradient: torch.Tensor, choice: Any) -> torch.nn.Parameter:
    weight, gradient = weight.clone(), gradient.clone()  # a Replicate would be of the same memory
    if choice is None:
        made = torch.nn.Parameter(weight)
        made.grad = gradient
        return made
    mesh, placements = choice
    # A scalar, and a dimension that is not there, cannot be sharded.
    placements = [Shard(0) if p == Shard(1) and weight.ndim == 1 else p for p in placements]
    placements = [Replicate() if p.is_shard() and weight.ndim == 0 else p for p in placements]
    settled = [Replicate() if p.is_partial() else p for p in placements]
    made = torch.nn.Parameter(distribute_tensor(weight, mesh, settled))
    if any(p.is_partial() for p in placements):
        made.grad = DTensor.from_local(gradient * (0.25 + 0.5 * dist.get_rank()), mesh, placements)
    else:
        made.grad = distribute_tensor(gradient, mesh, placements)
    return made


def non_finite() -> Iterator[tuple[str, float]]:
    """One bad entry, on rank 1 alone: both ranks hear of it, and neither changes a gradient."""
    mesh = init_device_mesh("cpu", (2,))
    for value in (math.nan, math.inf):
        gradient = torch.tensor([[3.0, 4.0], [value, 1.0]])
        for name, clip in BAD.items():
            parameters = [spread(torch.ones(2, 2), g, (mesh, [Shard(0)])) for g in (gradient, torch.ones(2, 2))]
            norm = clip(parameters)
            kept = all(
                torch.equal(whole(p.grad).nan_to_num(), g.nan_to_num())
                for p, g in zip(parameters, (gradient, torch.ones(2, 2)), strict=True)
            )
            yield f"{value}: {name}", 0.0 if kept and not norm.isfinite() else math.inf
        raised = 0.0
        try:
            ice.clip_norm(0.1, error_if_nonfinite=True)([spread(torch.ones(2, 2), gradient, (mesh, [Shard(0)]))])
        except NonFiniteGradientError:
            raised = 1.0
        yield f"{value}: raises", 1.0 - raised
    yield "total_norm", error(total_norm([distribute_tensor(torch.ones(3, 3), mesh, [Shard(0)])]), torch.tensor(3.0))


def _errors() -> dict[str, float]:
    return {
        **{f"fully_shard, {dtype}, {name}": e for dtype in TOLERANCE for name, e in fully_sharded(dtype)},
        **dict(laid_out()),
        **dict(non_finite()),
    }


@pytest.mark.distributed
def test_sharded_gradients_are_clipped_as_whole_ones() -> None:
    for errors in launch(_errors, 2):
        wrong = {n: e for n, e in errors.items() if not e <= TOLERANCE[torch.float32 if "32" in n else torch.float64]}
        assert not wrong
        assert len(errors) == 2 * len(CLIPS) + 7 * len(CLIPS) + 2 * (len(BAD) + 1) + 1
