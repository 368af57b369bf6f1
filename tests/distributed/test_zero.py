"""``sharding="zero1"`` in real ranks: the plain optimizer's trajectory, with 1/N of its state on each rank."""

import copy
import functools
import pickle

import pytest
import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer

import ice_engine as ice
from ice_engine.distributed import rounds
from ice_engine.errors import ArgumentTypeError, ArgumentValueError, ClosureError, RankError
from ice_engine.processors.group import run_processors
from tests.distributed.launch import launch

pytestmark = [pytest.mark.distributed, pytest.mark.soak, pytest.mark.timeout(300)]

FACTORIES = {
    "AdamW": functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    "fused": functools.partial(torch.optim.AdamW, lr=1e-2, fused=True),
    "foreach": functools.partial(torch.optim.Adam, lr=1e-2, foreach=True),
    "momentum": functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
    "NAdam": functools.partial(torch.optim.NAdam, lr=1e-2),
    "a class": torch.optim.RMSprop,
}


def network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 5), torch.nn.Linear(5, 3))


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    """Step on gradients that are the same on every rank, as they are once they are reduced."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def refused(call) -> str:
    try:
        call()
    except (ArgumentTypeError, ArgumentValueError, ClosureError, RankError) as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def trajectories():
    found = {}
    for name, factory in FACTORIES.items():
        plain, sharded = network(), network()
        reference = factory(plain.parameters())
        optimizer = ice.Optimizer(factory, sharded.named_parameters(), sharding="zero1")
        for lr in (1e-2, 3e-3):
            # Written outside, as processors and schedulers do; it holds at that very step.
            for group in (*reference.param_groups, *optimizer.param_groups):
                group["lr"] = lr
            train(plain, reference, 2)
            train(sharded, optimizer, 2)
        found[name] = (
            all(map(torch.equal, weights(plain), weights(sharded))),
            sum(t.numel() for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t) and t.ndim),
            sum(t.numel() for s in reference.state.values() for t in s.values() if torch.is_tensor(t) and t.ndim),
            optimizer.param_groups[0]["param_names"] == [n for n, _ in plain.named_parameters()],
        )
    return found


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_trajectory_is_the_plain_optimizers_and_each_rank_holds_its_part_of_the_state(world_size):
    ranks = launch(trajectories, world_size)

    for name in FACTORIES:
        equal, local, whole, named = zip(*[found[name] for found in ranks], strict=True)
        assert all(equal), name
        assert all(named), name
        assert sum(local) == whole[0] > 0, name
        largest = 30 if name in ("momentum", "a class") else 60  # a whole layer's weights stay on one rank
        assert max(local) <= whole[0] / world_size + largest, name


def groups_and_processors():
    model, plain = network(), network()
    halved = [ice.schedules.step(step_size=1, gamma=0.5)]
    adam = functools.partial(torch.optim.AdamW, lr=0.1)
    split = {r"^[01]\.": {"lr": 0.05, "name": "body"}}
    optimizer = ice.Optimizer(
        adam, ice.param_groups(model, split, default={"name": "head"}), processors=halved, sharding="zero1"
    )
    reference = adam(ice.param_groups(plain, split, default={"name": "head"}))
    train(model, optimizer, 1)
    train(plain, reference, 1)
    run_processors(halved, optimizer.param_groups, {"step": 1}, rounds.gatherer())
    for group in reference.param_groups:
        group["lr"] *= 0.5
    # A key that goes, and one that changes.
    del optimizer.param_groups[0]["name"]
    for groups in (optimizer.param_groups, reference.param_groups):
        groups[1]["betas"] = (0.5, 0.9)
    train(model, optimizer, 1, first=1)
    train(plain, reference, 1, first=1)
    same = all(map(torch.equal, weights(plain), weights(model)))
    inner = optimizer.inner.optim.param_groups
    return same, "name" in optimizer.param_groups[0], [g["lr"] for g in inner], inner[1]["betas"]


def test_entries_of_groups_reach_the_inner_optimizer_at_that_very_step_and_deleted_ones_stay_deleted():
    assert launch(groups_and_processors, 2) == [(True, False, [0.025, 0.05], (0.5, 0.9))] * 2


def tensor_lr():
    model, plain = network(), network()
    optimizer = ice.Optimizer(
        functools.partial(torch.optim.Adam, lr=torch.tensor(0.1)), model.parameters(), sharding="zero1"
    )
    reference = torch.optim.Adam(plain.parameters(), lr=torch.tensor(0.1))
    train(model, optimizer, 1)
    train(plain, reference, 1)
    for groups in (optimizer.param_groups, reference.param_groups):
        groups[0]["lr"].fill_(0.01)
    train(model, optimizer, 1)
    train(plain, reference, 1)
    whole = optimizer.state_dict(1)
    optimizer.param_groups[0]["lr"].fill_(0.5)
    saved = whole["param_groups"][0]["lr"].item() if dist.get_rank() == 1 else None
    return all(map(torch.equal, weights(plain), weights(model))), saved


def test_a_tensor_lr_is_one_and_is_saved_as_a_copy():
    assert launch(tensor_lr, 2) == [(True, None), (True, pytest.approx(0.01))]


def added_group():
    model, plain = network(), network()
    extra, plain_extra = (torch.nn.Parameter(torch.linspace(0, 1, 7)) for _ in range(2))
    model.register_parameter("extra", None)
    factory = FACTORIES["AdamW"]
    optimizer = ice.Optimizer(factory, model.named_parameters(), sharding="zero1")
    reference = factory(plain.named_parameters())
    train(model, optimizer, 1)
    train(plain, reference, 1)
    optimizer.add_param_group({"params": [("extra", extra)], "lr": 0.5})
    reference.add_param_group({"params": [("extra", plain_extra)], "lr": 0.5})
    model.extra, plain.extra = extra, plain_extra
    train(model, optimizer, 2)
    train(plain, reference, 2)
    whole, expected = optimizer.state_dict(), reference.state_dict()
    bad = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    message = refused(lambda: optimizer.add_param_group({"params": [("bad", bad)]}))
    same = all(map(torch.equal, weights(model), weights(plain)))
    # Torch forgets to watch the new parameters.
    noticed = optimizer.inner._is_trainable_mask
    extra.requires_grad_(False)
    train(model, optimizer, 1)
    noticed = noticed != optimizer.inner._is_trainable_mask
    saved = dist.get_rank() > 0 or (
        whole["param_groups"] == expected["param_groups"]
        and all(torch.equal(whole["state"][6][k], v) for k, v in expected["state"][6].items())
    )
    return same, len(optimizer.param_groups), saved, noticed, message


def test_a_group_that_is_added_later_is_sharded_too():
    for same, groups, saved, noticed, message in launch(added_group, 2):
        assert same
        assert noticed
        assert groups == 2
        assert saved
        assert "needs parameters of one dtype" in message
        assert "'bad' torch.BFloat16Tensor" in message


def a_failed_addition_leaves_nothing():
    model = network()
    optimizer = ice.Optimizer(
        FACTORIES["momentum"], model.parameters(), processors=[ice.schedules.cosine(total=5)], sharding="zero1"
    )
    inner = optimizer.inner
    before = [len(inner.param_groups), len(inner.optim.param_groups), len(inner._all_params)]
    added = torch.nn.Parameter(torch.ones(2))
    try:
        optimizer.add_param_group({"params": [added], "lr": "fast"})
    except Exception as error:  # noqa: BLE001 - whatever it is
        return (
            type(error).__name__,
            before,
            [len(inner.param_groups), len(inner.optim.param_groups), len(inner._all_params)],
        )
    return "accepted", before, []


def test_a_group_that_processors_refuse_is_taken_out_again():
    for error, before, after in launch(a_failed_addition_leaves_nothing, 2):
        assert error != "accepted"
        assert before == after


def refusals():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    adam = FACTORIES["AdamW"]
    model = network()
    sharded = torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (2,)), [Shard(0)]))
    mixed = [("a", torch.nn.Parameter(torch.ones(2))), ("b", torch.nn.Parameter(torch.ones(2).bfloat16()))]
    optimizer = ice.Optimizer(adam, model.parameters(), sharding="zero1")

    def zero(factory, params=None):
        return lambda: ice.Optimizer(factory, model.parameters() if params is None else params, sharding="zero1")

    mine = torch.ones(2 + dist.get_rank())
    return {
        "dtensor": refused(zero(adam, [sharded])),
        "mixed": refused(zero(adam, mixed)),
        "lbfgs": refused(zero(torch.optim.LBFGS)),
        "lambda": refused(zero(lambda params: torch.optim.SGD(params, lr=0.1))),
        "overlap": refused(zero(functools.partial(torch.optim.SGD, overlap_with_ddp=True))),
        "raw": refused(lambda: ice.Optimizer(ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1))),
        "raw class": refused(zero(functools.partial(ZeroRedundancyOptimizer, optimizer_class=torch.optim.SGD))),
        "deepcopy": refused(lambda: copy.deepcopy(optimizer)),
        "pickle": refused(lambda: pickle.dumps(optimizer)),
        "other shapes": refused(zero(adam, [torch.nn.Parameter(mine)])),
        "none": refused(zero(adam, [])),
        "half named": refused(zero(adam, [("a", torch.nn.Parameter(torch.ones(1))), torch.nn.Parameter(mine)])),
    }


def test_what_cannot_be_sharded_is_refused_with_a_reason():
    expected = {
        "dtensor": "ArgumentValueError: 'param_groups.0.params.0' is a DTensor",
        "mixed": "ArgumentValueError: sharding='zero1' needs parameters of one dtype and device: 'a' is torch.FloatT",
        "lbfgs": "ClosureError: LBFGS evaluates the loss in a closure",
        "lambda": "ArgumentTypeError: sharding='zero1' must know the optimizer's class and settings",
        "overlap": "ArgumentValueError: 'overlap_with_ddp' is no setting of SGD",
        "raw": "ArgumentTypeError: a ZeroRedundancyOptimizer cannot be wrapped as it is",
        "raw class": "ArgumentTypeError: a ZeroRedundancyOptimizer cannot be wrapped as it is",
        "deepcopy": "ArgumentTypeError: an optimizer that is sharded over ranks (AdamW, sharding='zero1') cannot be",
        "pickle": "ArgumentTypeError: an optimizer that is sharded over ranks (AdamW, sharding='zero1') cannot be",
        "other shapes": "RankError: ranks do different things at the same time: rank 0 sharding='zero1' of 1 ",
        "none": "ArgumentValueError: params is empty; model.parameters()",
        "half named": "ArgumentValueError: of the 2 parameters of param group 0 1 have a name",
    }
    for messages in launch(refusals, 2):
        assert {k: m[: len(expected[k])] for k, m in messages.items()} == expected
