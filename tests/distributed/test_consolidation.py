"""``state_dict(rank)`` of sharded optimizers: the plain optimizer's own, a snapshot, on one rank; and never a hang."""

import contextlib
import functools
import io
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import ice_engine as ice
from ice_engine.distributed import wire
from ice_engine.errors import CheckpointError, NotConsolidatedError, RankError
from tests.distributed.launch import launch, watch

pytestmark = [pytest.mark.distributed, pytest.mark.soak, pytest.mark.timeout(300)]

FACTORIES = {
    "AdamW": functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "fused": functools.partial(torch.optim.AdamW, lr=1e-2, fused=True),
    "NAdam": functools.partial(torch.optim.NAdam, lr=1e-2),
    "Adafactor": functools.partial(torch.optim.Adafactor, lr=1e-2),
    "SGD": functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
    "no state": functools.partial(torch.optim.SGD, lr=1e-2),
}


class Odd(torch.optim.SGD):
    """Keeps more than tensors."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].update(
                    exact=0.1 + 0.2, nan=float("nan"), count=2**70, flag=True, none=None, text="é",
                    nested=[(p.detach()[:1] * 2, 1.5), {"a": torch.tensor(p.numel())}],
                )  # fmt: skip


class Alien(torch.optim.SGD):
    """Keeps what cannot be sent, on rank 1."""

    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p]["history"] = {1, 2} if dist.get_rank() == 1 else 0


def network(memory_format: torch.memory_format = torch.channels_last) -> torch.nn.Sequential:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 2),
        torch.nn.Flatten(),
        torch.nn.Linear(12, 5),
        torch.nn.Linear(5, 7),
        torch.nn.Linear(7, 1),
    )
    return model.to(memory_format=memory_format)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2, first: int = 0) -> None:
    """Step on gradients that are the same on every rank, laid out as the parameters are."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            whole = torch.randn(p.shape, generator=generator)
            if isinstance(p, DTensor):
                p.grad = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)
            else:
                p.grad = torch.empty_like(p, requires_grad=False).copy_(whole)  # in the memory format of p
        optimizer.step()
        optimizer.zero_grad()


def same(a, b) -> bool:
    """To the last bit, types and memory formats included."""
    if isinstance(a, torch.Tensor):
        bits = (a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        return type(a) is type(b) and a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(*bits)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


def on_cpu(state_dict):
    return torch.load(_saved(state_dict), weights_only=True)


def _saved(state_dict) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return file


def against_torch(to):
    """ZeRO's state beside that of torch's own consolidation, and of the plain optimizer."""
    found = {}
    for name, factory in {**FACTORIES, "odd": functools.partial(Odd, lr=1e-2, momentum=0.9)}.items():
        models = network(), network(), network()
        plain = factory(models[0].parameters())
        theirs = ZeroRedundancyOptimizer(models[1].parameters(), factory.func, **factory.keywords)
        ours = ice.Optimizer(factory, models[2].parameters(), sharding="zero1")
        for model, optimizer in zip(models, (plain, theirs, ours), strict=True):
            train(model, optimizer)
        theirs.consolidate_state_dict(to=to)
        state = ours.state_dict(to)
        snapshot = on_cpu(state)
        train(models[2], ours, 1)  # what was saved does not see what comes
        if dist.get_rank() != to:
            found[name] = (list(state), snapshot == state)
            continue
        expected = theirs.state_dict()
        groups = [{k: v for k, v in g.items() if k != "param_names"} for g in state["param_groups"]]
        equal = same(state["state"], expected["state"]), same(groups, expected["param_groups"])
        equal += (same(state["state"], plain.state_dict()["state"]), groups == plain.state_dict()["param_groups"])
        found[name] = (*equal, same(snapshot["state"], state["state"]))
    return found


@pytest.mark.parametrize(("world_size", "to"), [(2, 0), (3, 2), (4, 1)])
def test_zero_gives_bit_for_bit_what_torch_would_have_and_keeps_it(world_size, to):
    ranks = launch(against_torch, world_size, to)

    for rank, found in enumerate(ranks):
        for name, outcome in found.items():
            expected = (True,) * 5 if rank == to else (["ice_engine"], True)
            assert outcome == expected, (rank, name)


def fully_sharded():
    found = {}
    for name, factory in FACTORIES.items():
        if name == "Adafactor":
            continue  # torch's own does not run on DTensors
        models = [network(torch.contiguous_format) for _ in range(2)]  # FSDP2 takes no other
        for layer in models[1]:
            if list(layer.parameters()):
                fully_shard(layer)
        plain, ours = factory(models[0].parameters()), ice.Optimizer(factory(models[1].parameters()))
        train(models[0], plain)
        train(models[1], ours)
        state = ours.state_dict(1)
        torchs = {
            i: {k: v.full_tensor() if isinstance(v, DTensor) else v.clone() for k, v in entry.items()}
            for i, entry in ours.inner.state_dict()["state"].items()
        }
        # Torch's fused kernel rounds an entry by where it lies in memory, and pieces lie elsewhere.
        expected = torchs if name == "fused" else plain.state_dict()["state"]
        snapshot = on_cpu(state)
        train(models[1], ours, 1)
        if dist.get_rank() == 1:
            found[name] = (
                equal_values(state["state"], torchs),
                equal_values(state["state"], expected),
                same(snapshot["state"], state["state"]),
            )
    return found


def equal_values(a, b) -> bool:
    """To the last bit of plain tensors; in which order they lie in memory may differ."""
    return a.keys() == b.keys() and all(
        a[n].keys() == s.keys()
        and all(
            type(a[n][k]) is torch.Tensor and a[n][k].dtype == v.dtype and torch.equal(a[n][k], v) for k, v in s.items()
        )
        for n, s in b.items()
    )


@pytest.mark.parametrize("world_size", [2, 3])
def test_pieces_of_fsdp2_are_put_together_as_the_plain_optimizer_had_them(world_size):
    found = launch(fully_sharded, world_size)[1]

    assert found == dict.fromkeys([n for n in FACTORIES if n != "Adafactor"], (True,) * 3)


def laid_out():
    """Other layouts, alone and side by side, on meshes of one and of two dimensions."""
    line, grid = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    layouts = {
        "columns": (line, [Shard(1)]),
        "whole": (line, [Replicate()]),
        "replicated shards": (grid, [Replicate(), Shard(0)]),
        "shards replicated": (grid, [Shard(0), Replicate()]),
        "rows and columns": (grid, [Shard(1), Shard(0)]),
        "rows twice": (grid, [Shard(0), Shard(0)]),
    }
    found = {}
    for name, (mesh, placements) in layouts.items():
        values = [torch.randn(s, generator=torch.Generator().manual_seed(1)) for s in ((7, 5), (1, 3), (2, 3))]
        plain = torch.nn.ParameterList([torch.nn.Parameter(v.clone()) for v in values])
        spread = [torch.nn.Parameter(distribute_tensor(v.clone(), mesh, placements)) for v in values[:2]]
        sharded = torch.nn.ParameterList([*spread, torch.nn.Parameter(values[2].clone())])
        reference = torch.optim.Adam(plain.parameters())
        optimizer = ice.Optimizer(torch.optim.Adam(sharded.parameters(), foreach=False))
        train(plain, reference)
        train(sharded, optimizer)
        state = optimizer.state_dict(3)
        if dist.get_rank() == 3:
            found[name] = equal_values(state["state"], reference.state_dict()["state"])
    return found


def test_any_layout_of_dtensors_is_put_together():
    found = launch(laid_out, 4)[3]

    assert len(found) == 6
    assert all(found.values()), found


def refusals(folder):
    adam = FACTORIES["AdamW"]
    model = network()
    optimizer = ice.Optimizer(adam, model.parameters(), sharding="zero1", name="generator")
    train(model, optimizer, 1)
    said = []
    try:
        optimizer.load_state_dict(ice_stub := optimizer.state_dict(0))
    except NotConsolidatedError as error:
        said.append(str(error))
        assert ice_stub
    try:
        optimizer.state_dict(dist.get_rank())
    except RankError as error:
        said.append(str(error))
    alien = ice.Optimizer(functools.partial(Alien, lr=0.1), network().parameters(), sharding="zero1")
    for group in alien.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    alien.step()
    try:
        alien.state_dict()
    except RankError as error:
        said.append(str(error))
    try:
        optimizer.state_dict() if dist.get_rank() == 0 else ice.save_sharded(folder, {"optimizer": optimizer})
    except (RankError, CheckpointError) as error:
        said.append(str(error))
    said.append("state" in optimizer.state_dict(1))  # afterwards it works
    return said


def test_ranks_that_ask_for_something_else_are_named_on_all(tmp_path):
    for rank, said in enumerate(launch(refusals, 3, str(tmp_path))):
        if rank > 0:
            assert "this is a stub: the whole state is on rank 0" in said.pop(0)
        other, alien, saves, whole = said
        assert "rank 0 state_dict(rank=0) of optimizer 'generator', rank 1 state_dict(rank=1)" in other
        assert "failed on rank 1: state[" in alien
        assert "['history'] is set" in alien
        assert "rank 0 state_dict(rank=0) of optimizer 'generator', rank 1 save_sharded(). Let all ranks" in saves
        assert whole is (rank == 1)


def alone():
    model = network()
    optimizer = ice.Optimizer(FACTORIES["AdamW"], model.parameters(), sharding="zero1", name="generator")
    train(model, optimizer, 1)
    said = []
    for _ in range(2):
        try:
            if dist.get_rank() == 1:  # rank 0 and 2 do not come
                optimizer.state_dict()
        except RankError as error:
            said.append(str(error))
    dist.barrier()  # no rank has died of it
    return said


def test_a_rank_that_comes_alone_is_told_where_the_others_are():
    first, (waited, again), third = launch(alone, 3)
    assert first == third == []
    for other in (0, 2):
        assert f"rank {other} waits in barrier(), called at test_consolidation.py:" in waited
    assert "the others are at state_dict(rank=0) of optimizer 'generator'" in waited
    assert "is a round ahead of them" in again


def killed():
    optimizer = ice.Optimizer(FACTORIES["AdamW"], (model := network()).parameters(), sharding="zero1", name="generator")
    train(model, optimizer, 1)
    if dist.get_rank() == 2:
        wire.send = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    optimizer.state_dict()


def test_a_rank_that_is_killed_while_it_sends_is_named_by_who_waits():
    receiver, sender, gone = watch(killed, 3, timeout=45)
    assert gone.exitcode == -signal.SIGKILL
    assert "RankError: lost the connection at state_dict(rank=0) of optimizer 'generator'" in receiver.error
    assert "rank 2 does not answer any more: killed?" in receiver.error
    assert "ranks 0, 2 do not answer any more: killed?" in sender.error  # the receiver has ended as well


def _leave(free):
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + free, resource.RLIM_INFINITY))


def short_of_memory(in_run, folder):
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Sequential(*(torch.nn.Linear(2000, 2000) for _ in range(3))))
    optimizer = ice.Optimizer(FACTORIES["AdamW"], model.parameters(), sharding="zero1")
    trainer = Engine(lambda _, batch: optimizer.backward(model(batch).square().mean()))
    optimizer.attach(trainer, model=model)

    held = []  # what this process has free of its heap, as much as other tests left in it

    def leave_little(_: Engine) -> None:
        if dist.get_rank() == 0:
            _leave(0)
            with contextlib.suppress(RuntimeError):
                while True:
                    held.append(torch.empty(1 << 20))
            _leave(8 << 20)

    trainer.add_event_handler(Events.EPOCH_COMPLETED, leave_little)
    if in_run:
        ice.Checkpoint({"trainer": trainer, "optimizer": optimizer}, folder).attach(trainer)
    trainer.run([torch.ones(2, 2000)] * 2)
    optimizer.state_dict()


@pytest.mark.parametrize("in_run", [False, True])
def test_a_rank_without_memory_for_the_state_is_named_with_its_own_error(in_run, tmp_path):
    short, *others = watch(short_of_memory, 3, in_run, str(tmp_path), timeout=60)
    own = short.error.strip().splitlines()[-1]
    assert own.startswith("RuntimeError: ")
    assert "can't allocate memory" in own
    for other in others:
        said = other.error.strip().splitlines()[-1]
        assert "RankError: lost the connection at state_dict(rank=0) of optimizer 'optimizer': rank 0 raised " in said
        assert "can't allocate memory" in said


def local():
    model = network()
    optimizer = ice.Optimizer(torch.optim.Adam(model.parameters()))
    train(model, optimizer, 1)
    if dist.get_rank() == 0:
        return optimizer.state_dict()["state"][0]["exp_avg"] is optimizer.state[next(model.parameters())]["exp_avg"]
    return None


def test_what_is_not_sharded_is_saved_without_the_others():
    assert launch(local, 2) == [True, None]
