"""A checkpoint of any sharding and world size loads into any other, bit for bit, and training goes on the same.

Gradients are the same on all ranks, so the trajectories are compared to the last bit; where they are reduced over
another number of ranks, they differ by the rounding of that sum. With FSDP2, a fused kernel rounds otherwise as well.
"""

import copy
import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import ice_engine as ice
from ice_engine.errors import StateDictError
from tests.distributed.launch import launch

pytestmark = [pytest.mark.distributed, pytest.mark.soak, pytest.mark.timeout(600)]

KINDS = ("plain", "zero1", "fsdp2")
FACTORIES = {
    "AdamW": functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    "fused": functools.partial(torch.optim.AdamW, lr=1e-2, fused=True),
    "momentum": functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
    "NAdam": functools.partial(torch.optim.NAdam, lr=1e-2),
}


def build(kind, factory, reverse=False):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 7), torch.nn.Linear(7, 1))
    if kind == "fsdp2":
        for layer in model:
            fully_shard(layer)
    named = list(model.named_parameters())
    named = named[::-1] if reverse else named
    if kind == "zero1":
        return model, ice.Optimizer(factory, named, sharding="zero1")
    return model, ice.Optimizer(factory(named))


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            whole = torch.randn(p.shape, generator=generator)
            is_piece = isinstance(p, DTensor)
            p.grad = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None) if is_piece else whole
        optimizer.step()
        optimizer.zero_grad()


def whole(p):
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()


def weights(model):
    return {name: whole(p) for name, p in model.named_parameters()}


@torch.no_grad()
def set_weights(model, saved):
    for name, p in model.named_parameters():
        value = saved[name]
        is_piece = isinstance(p, DTensor)
        p.copy_(distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None) if is_piece else value)


def save(folder):
    """Save each kind after 3 steps, and where 2 more steps lead."""
    for name, factory in FACTORIES.items():
        for kind in KINDS:
            model, optimizer = build(kind, factory)
            train(model, optimizer, 3)
            state, saved = copy.deepcopy(optimizer.state_dict()), weights(model)  # a plain one's tensors are live
            train(model, optimizer, 2, first=3)
            if dist.get_rank() == 0:
                torch.save((state, saved), f"{folder}/{name}-{kind}-{dist.get_world_size()}")
            if kind == "plain" and dist.get_rank() == 0:
                torch.save((optimizer.state_dict()["state"], weights(model)), f"{folder}/{name}-end")
    dist.barrier()


def load(folder, worlds):
    """Load each of what was saved into each kind, and go on."""
    wrong = []
    for name, factory in FACTORIES.items():
        end_state, end = torch.load(f"{folder}/{name}-end", weights_only=True)
        for source in [f"{kind}-{size}" for kind in KINDS for size in worlds]:
            for kind in KINDS:
                state, saved = torch.load(f"{folder}/{name}-{source}", weights_only=True)
                model, optimizer = build(kind, factory, reverse=kind == "zero1")
                set_weights(model, saved)
                before = {k: v.clone() for k, v in state["state"][0].items()}
                optimizer.load_state_dict(state)
                ok = all(torch.equal(v, before[k]) for k, v in state["state"][0].items())  # the file's stay as they are
                again = optimizer.state_dict()
                ok &= dist.get_rank() > 0 or equal(by_name(again), by_name(state))
                train(model, optimizer, 2, first=3)
                # Torch's fused kernel rounds an entry by where it lies in memory, and pieces lie elsewhere.
                exact = name != "fused" or "fsdp2" not in kind + source
                ok &= all(close(v, end[n], exact) for n, v in weights(model).items())
                last = optimizer.state_dict()
                ok &= dist.get_rank() > 0 or equal(
                    by_name(last), dict(zip(end, end_state.values(), strict=True)), exact
                )
                if not ok:
                    wrong.append((name, source, kind))
    return wrong


def by_name(state):
    return {
        n: state["state"][i] for g in state["param_groups"] for i, n in zip(g["params"], g["param_names"], strict=True)
    }


def close(a, b, exact):
    return a.dtype == b.dtype and (torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-5, atol=1e-7))


def equal(a, b, exact=True):
    return a.keys() == b.keys() and all(
        a[n].keys() == b[n].keys() and all(close(a[n][k], v, exact) for k, v in b[n].items()) for n in b
    )


def test_any_checkpoint_goes_on_anywhere(tmp_path: Path):
    """2 and 3 ranks write; 2, 3 and 4 read, and one process."""
    for size in (2, 3):
        launch(save, size, str(tmp_path), timeout=200)

    for size in (1, 2, 3, 4):
        assert launch(load, size, str(tmp_path), (2, 3), timeout=250) == [[]] * size, size


def misfits():
    found = {}
    for kind in KINDS:
        model, optimizer = build(kind, FACTORIES["AdamW"])
        train(model, optimizer, 1)
        other = torch.optim.AdamW(torch.nn.Linear(3, 2).parameters())
        before = optimizer.state_dict()
        try:
            optimizer.load_state_dict(other.state_dict())
        except StateDictError:
            after = optimizer.state_dict()
            same = dist.get_rank() > 0 or equal(by_name(before), by_name(after))
            found[kind] = same and before.get("param_groups") == after.get("param_groups")
    return found


def test_what_does_not_fit_changes_nothing_on_any_rank():
    assert launch(misfits, 2) == [dict.fromkeys(KINDS, True)] * 2


def outer_and_inner():
    """After loading, one copy of the state, and the names of this process."""
    model, optimizer = build("zero1", FACTORIES["fused"])
    train(model, optimizer, 1)
    plain_model, plain = build("plain", FACTORIES["fused"])
    train(plain_model, plain, 1)
    state = plain.state_dict()
    for group in state["param_groups"]:
        group.update(param_names=[f"module.{n}" for n in group["param_names"]], lr=0.5)
    optimizer.load_state_dict(state)
    train(model, optimizer, 1)
    zero = optimizer.inner
    return (
        zero.state is zero.optim.state,
        [g["param_names"] == [n for n, _ in model.named_parameters()] for g in zero.param_groups],
        zero.optim.param_groups[0]["lr"],
    )


def test_zero_keeps_one_copy_of_what_was_loaded_and_its_own_names():
    assert launch(outer_and_inner, 2) == [(True, [True], 0.5)] * 2
