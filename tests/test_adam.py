"""Adam's fused kernel without torch's ``step()`` around it: the same bits, and torch's own step for what is unusual."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ice_engine as ice
from ice_engine import adam

ADAM, ADAMW = torch.optim.Adam, torch.optim.AdamW
SHAPES = [(3, 4), (4,), (), (2, 1, 3), (0,), (130,)]


def tensors(seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(each) for each in tensors(0, dtype)]


def groups(own: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": own[:2]},
        {"params": own[2:5], "lr": 0.3, "betas": (0.5, 0.9), "weight_decay": 0.2},
        {"params": own[5:], "eps": 1e-3, "maximize": True},
    ]


def give(own: list[torch.nn.Parameter], step: int, missing: Callable[[int, int], bool]) -> None:
    """Let *own* have the gradients of *step*, all but those that are *missing*."""
    for i, (p, gradient) in enumerate(zip(own, tensors(step, own[0].dtype), strict=True)):
        p.grad = None if missing(step, i) else gradient


def everything(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    own = [p for group in optimizer.param_groups for p in group["params"]]
    state = [value for p in own for _, value in sorted(optimizer.state[p].items())]
    return [p.detach() for p in own] + state


def assert_same_bits(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    mine, torchs = everything(one), everything(other)
    assert len(mine) == len(torchs)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(mine, torchs, strict=True))


def never(*_: int) -> bool:
    return False


MISSING = {
    "never": never,
    "one, then and again": lambda step, i: i == step % 5,
    "some are late": lambda step, i: step < i,
    "a group": lambda step, i: step > 3 and i < 2,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("missing", MISSING.values(), ids=MISSING)
@pytest.mark.parametrize("kind", [ADAM, ADAMW])
def test_the_bits_are_those_of_torchs_step(kind, missing, dtype):
    mine, torchs = (kind(groups(parameters(dtype)), lr=0.1, fused=True) for _ in range(2))
    wrapped = ice.Optimizer(mine)
    for step in range(1, 9):
        for optimizer in (mine, torchs):
            give([p for group in optimizer.param_groups for p in group["params"]], step, missing)
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
        wrapped.update()
        torchs.step()
        assert_same_bits(mine, torchs)


@pytest.mark.parametrize("kind", [ADAM, ADAMW])
def test_a_factor_that_rides_in_the_kernel_gives_the_bits_of_torchs_grad_scale(kind):
    mine, torchs = (kind(parameters(), lr=0.1, weight_decay=0, fused=True) for _ in range(2))
    wrapped = ice.Optimizer(mine, clip=ice.clip_norm(0.5))
    for step in range(1, 6):
        for optimizer in (mine, torchs):
            give(optimizer.param_groups[0]["params"], step, never)
        factor = ice.clip_norm(0.5).factor(torch.nn.utils.get_total_norm(tensors(step, torch.float32)))
        torchs.grad_scale = factor.reciprocal()
        wrapped.update()
        torchs.step()
        assert_same_bits(mine, torchs)


def test_state_that_is_loaded_and_groups_that_are_added_are_stepped():
    wrapped, torchs = ice.Optimizer(ADAMW(parameters(), lr=0.1, fused=True)), ADAMW(parameters(), lr=0.1, fused=True)
    source = ADAMW(parameters(), lr=0.2)
    for step in range(1, 4):
        give(source.param_groups[0]["params"], step, never)
        source.step()
    for optimizer in (wrapped, torchs):
        give(optimizer.param_groups[0]["params"], 1, never)
        optimizer.step()
        optimizer.load_state_dict(copy.deepcopy(source.state_dict()))
        for group in optimizer.param_groups:
            group["fused"] = True
        added = [torch.nn.Parameter(torch.ones(3))]
        optimizer.add_param_group({"params": added, "lr": 0.5})
        for step in range(4, 8):
            give(optimizer.param_groups[0]["params"], step, never)
            added[0].grad = torch.full((3,), float(step))
            (wrapped.update if optimizer is wrapped else optimizer.step)()
    assert_same_bits(wrapped, torchs)


UNUSUAL: dict[str, dict[str, Any]] = {
    "amsgrad": {"amsgrad": True},
    "a tensor for lr": {"lr": torch.tensor(0.1)},
    "tensors for betas": {"betas": (torch.tensor(0.9), torch.tensor(0.999))},
    "a loop": {"fused": False, "foreach": False},
    "several kernels": {"fused": False, "foreach": True},
}


@pytest.mark.parametrize("settings", UNUSUAL.values(), ids=UNUSUAL)
def test_what_is_not_usual_is_stepped_by_torch(settings):
    mine, torchs = (ADAMW(parameters(), **({"lr": 0.1, "fused": True} | settings)) for _ in range(2))
    wrapped = ice.Optimizer(mine)
    for step in range(1, 5):
        for optimizer in (mine, torchs):
            give(optimizer.param_groups[0]["params"], step, never)
        wrapped.update()
        torchs.step()
        assert_same_bits(mine, torchs)


def test_a_step_that_found_inf_skips_is_skipped():
    optimizer = ADAMW(parameters(), lr=0.1, fused=True)
    wrapped = ice.Optimizer(optimizer)
    for step in (1, 2):
        give(optimizer.param_groups[0]["params"], step, never)
        wrapped.update()
    before = copy.deepcopy(everything(optimizer))
    optimizer.found_inf = torch.ones(())
    give(optimizer.param_groups[0]["params"], 3, never)
    wrapped.update()

    assert all(map(torch.equal, everything(optimizer), before))


def test_sparse_gradients_are_refused_by_torch():
    table = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = ice.Optimizer(ADAM(table.parameters(), fused=True))
    optimizer.backward(table(torch.tensor([1])).sum())
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.update()


def test_torchs_step_is_not_called_where_the_kernel_is_all_of_it(monkeypatch):
    optimizer = ice.Optimizer(functools.partial(ADAMW, lr=0.1), parameters())
    asked: list[int] = []
    inits = ADAMW._init_group
    monkeypatch.setattr(ADAMW, "_init_group", lambda *args: (asked.append(1), inits(*args))[1])
    for step in range(1, 4):
        give(optimizer.param_groups[0]["params"], step, never)
        optimizer.update()
    assert asked == [1]  # the first step's, which makes the state


class Own(ADAMW):
    """A class of the user's."""


@pytest.mark.parametrize("make", [Own, torch.optim.NAdam])
def test_other_classes_are_left_to_themselves(make):
    optimizer = make(parameters(), lr=0.1)
    give(optimizer.param_groups[0]["params"], 1, never)
    optimizer.step()
    assert not adam.step(optimizer)
