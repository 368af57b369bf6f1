"""What DDP leaves to its user, and would hang on, part the ranks or refuse: two ranks, beside one big batch."""

import contextlib
import functools
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import ice_engine as ice
from ice_engine.errors import BackwardError
from tests.distributed.launch import launch, watch
from tests.distributed.test_windows import RAGGED, batches, flat, network, plain_loop, sgd
from tests.unsized import Unsized

pytestmark = pytest.mark.distributed


def trained(
    passes: int = 1,
    *,
    absent: int = 0,
    more: int = 0,
    sync: Any = "communication",
    frozen: bool = False,
    stop: str = "",
    **ddp: Any,
) -> Any:
    """Train on ragged data by windows of two; rank 1 has no backward in iteration *absent*, two in iteration *more*."""
    net = network()
    net[0].requires_grad_(not frozen)
    model = DistributedDataParallel(net, **ddp)
    optimizer = ice.Optimizer(sgd(model), accumulation_steps=2)

    def step(engine: Engine, batch: Any) -> None:
        own = {absent: 0, more: 2}.get(engine.state.iteration, passes) if dist.get_rank() == 1 else passes
        for _ in range(own):
            optimizer.backward(torch.nn.functional.mse_loss(model(batch[0]), batch[1]), weight=len(batch[0]))

    engine = Engine(step)
    optimizer.attach(engine, model=model, sync=sync)
    if frozen:
        engine.add_event_handler(Events.ITERATION_STARTED(once=1), lambda: net[0].requires_grad_() and None)
    if stop and dist.get_rank() == 1:
        engine.add_event_handler(Events.ITERATION_STARTED(once=4), lambda: getattr(engine, stop)())
    engine.run(batches(dist.get_rank(), RAGGED), max_epochs=1)
    return [[p.flatten().tolist() for p in net.parameters()], optimizer.clocks["step"]]


CASES: dict[str, dict[str, Any]] = {
    "two backward passes": {"passes": 2},
    "two, and unused parameters are looked for": {"passes": 2, "find_unused_parameters": True},
    "none on one rank, and unused parameters are looked for": {"absent": 4, "find_unused_parameters": True},
    "none on one rank": {"absent": 4},
    "none on one rank before the last, to save memory": {"absent": 3, "sync": "memory"},
    "one more on one rank before the last, to save memory": {"more": 3, "sync": "memory"},
    "one more on one rank in the last, to save memory": {"more": 4, "sync": "memory"},
    "a static graph": {"static_graph": True},
    "unfrozen after DDP was made": {"frozen": True},
    "terminate() after the gate": {"stop": "terminate"},
    "terminate_epoch() after the gate": {"stop": "terminate_epoch"},
}


def _all() -> dict[str, Any]:
    return {name: trained(**case) for name, case in CASES.items()}


def expected(name: str) -> torch.Tensor:
    """A plain loop; each window has the micro-batches, from 0, of rank 0 and of rank 1."""
    windows = [([0, 1], [0, 1]), ([2, 3], [2, 3]), ([4, 5], [4, 5]), ([6, 7], [6, 7])]
    if CASES[name].get("absent") == 4:  # at the gate of iteration 4 it had said that it would have one
        windows[1] = ([2, 3], [2])
    if CASES[name].get("absent") == 3:  # a window closes where the first rank's is full
        windows[1] = ([2, 3], [3])
    if iteration := CASES[name].get("more"):
        windows[1] = ([2, 3], [2, 3, iteration - 1])
    if name == "terminate() after the gate":
        windows = [windows[0], ([2, 3], [2]), ([4], [])]  # rank 0 hears of it at its next gate
    if name == "terminate_epoch() after the gate":
        windows = [windows[0], ([2, 3], [2]), ([4, 5], []), ([6, 7], [])]
    data = [batches(rank, RAGGED) for rank in range(2)]
    return flat(plain_loop([data[rank][i] for rank in range(2) for i in window[rank]] for window in windows))


def test_every_way_to_reduce_is_the_mean_over_all_items():
    first, second = launch(_all, 2)
    assert first == second
    for name, (parameters, _) in first.items():
        torch.testing.assert_close(
            flat(parameters), expected(name), rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


def _differing_sync() -> None:
    model = fully_shard(network())
    optimizer = ice.Optimizer(sgd(model))
    engine = Engine(lambda *_: None)
    optimizer.attach(engine, model=model, sync="memory" if dist.get_rank() else "communication")
    engine.run(batches(dist.get_rank(), RAGGED))


def test_ranks_that_would_reduce_at_different_times_are_refused():
    for outcome in watch(_differing_sync, 2, timeout=60):
        assert "sync of optimizer 'optimizer' differs between ranks: False on rank 0, True on rank 1" in outcome.error


def _begun_with(scale: float) -> int:
    net = network()
    model = DistributedDataParallel(net)
    optimizer = ice.Optimizer(sgd(model))
    engine = ice.create_trainer(model, optimizer, torch.nn.functional.mse_loss)
    if dist.get_rank() == 1:  # as by a state that is loaded after DDP has sent rank 0's
        with torch.no_grad():
            net[2].bias.mul_(scale)
    engine.run(batches(dist.get_rank(), RAGGED))
    return optimizer.clocks["step"]


def test_ranks_that_begin_with_different_parameters_are_refused():
    for outcome in watch(_begun_with, 2, 2.0, timeout=60):
        assert "parameter '2.bias' of the model of optimizer 'optimizer' differs between ranks: " in outcome.error
        assert "load a state on every rank, or before DistributedDataParallel is made" in outcome.error


def _two_begin_one_model() -> None:
    model = DistributedDataParallel(net := network())
    engine = Engine(lambda *_: None)
    for name, part in (("body", net[0]), ("head", net[2])):
        ice.Optimizer(sgd(part), name=name).attach(engine, model=model)
    if dist.get_rank() == 1:
        with torch.no_grad():
            net[2].bias.mul_(2.0)
    engine.run(batches(dist.get_rank(), RAGGED))


def test_a_different_parameter_of_a_model_of_two_optimizers_is_said_to_be_of_neither_alone():
    for outcome in watch(_two_begin_one_model, 2, timeout=60):
        expected = "parameter '2.bias' of the model of optimizers 'body', 'head' differs between ranks: "
        assert expected in outcome.error


def test_ranks_whose_parameters_were_rounded_otherwise_may_begin():
    first, second = launch(_begun_with, 2, 1 + 1e-6)
    assert first == second > 0


def _shared_views() -> str:
    model = DistributedDataParallel(network(), gradient_as_bucket_view=True)
    engine = Engine(lambda *_: None)
    layers = model.module
    ice.Optimizer(sgd(layers[0]), name="a").attach(engine, model=model)
    with pytest.raises(ice.IceEngineError, match="views of its buckets") as refused:
        ice.Optimizer(sgd(layers[2]), name="b").attach(engine, model=model)
    return str(refused.value)


def test_two_optimizers_of_one_ddp_do_not_go_with_bucket_views():
    assert "make it without gradient_as_bucket_view" in launch(_shared_views, 2)[0]


def _nothing_to_learn_at_the_end(steps: int) -> list[list[float]]:
    """Rank 1 has half of the data; in the last window of an epoch all losses of rank 0 weigh nothing."""
    model = DistributedDataParallel(network(), find_unused_parameters=True)
    optimizer = ice.Optimizer(sgd(model), accumulation_steps=steps)

    def step(engine: Engine, batch: Any) -> None:
        ends = len(RAGGED[0]) - (engine.state.iteration - 1) % len(RAGGED[0]) <= steps
        loss = torch.nn.functional.mse_loss(model(batch[0]), batch[1])
        optimizer.backward(loss, weight=0 if ends and dist.get_rank() == 0 else len(batch[0]))

    engine = Engine(step)
    optimizer.attach(engine, model=model)
    engine.run(batches(dist.get_rank(), RAGGED)[: 4 if dist.get_rank() else None], max_epochs=2)
    return [p.flatten().tolist() for p in model.parameters()]


@pytest.mark.parametrize("steps", [1, 2])
def test_a_window_without_any_gradient_leaves_ddp_ready_for_the_next(steps):
    data = [batches(rank, RAGGED) for rank in range(2)]
    trained_on = len(RAGGED[0]) - steps
    windows = [
        [data[rank][i] for rank in range(2) for i in range(begin, begin + steps) if not rank or i < 4]
        for begin in range(0, trained_on, steps)
    ]
    for found in launch(_nothing_to_learn_at_the_end, 2, steps, timeout=40):
        torch.testing.assert_close(flat(found), flat(plain_loop([*windows, *windows])), rtol=1e-12, atol=1e-12)


def _attached_again(again: bool) -> Any:
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(3, 1))
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1), accumulation_steps=2)
    trainer = Engine(lambda _, batch: optimizer.backward(model(batch).square().mean()))
    optimizer.attach(trainer, model=model)
    for epochs in (1, 2):
        if again:
            optimizer.detach()
            optimizer.attach(trainer, model=model)
        trainer.run([torch.ones(2, 3) + dist.get_rank()] * 3, max_epochs=epochs)
    return optimizer.clocks["step"], [p.tolist() for p in model.parameters()]


def test_an_optimizer_that_was_detached_is_attached_to_its_engine_again():
    expected = launch(_attached_again, 2, False)
    assert expected[0][0] == 4
    assert launch(_attached_again, 2, True) == expected


def _sparse_data(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randint(7, (2 + (i + rank) % 3, 2), generator=generator) for i in range((5, 2, 4)[rank])]


def _sparse_loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch).sum(1) - batch.sum(1, keepdim=True)).square().mean()


def _sparse(folder: str) -> list[Any]:
    """Train an embedding with sparse gradients by windows of two; stopped after its second step, and resumed."""
    found = []
    for sized, unused, sharding in itertools.product((True, False), (True, False), (None, "zero1")):
        for stop in (2, 0):
            torch.manual_seed(0)
            table = torch.nn.Embedding(7, 3, sparse=True, dtype=torch.float64)
            model = DistributedDataParallel(table, find_unused_parameters=unused)
            factory = functools.partial(torch.optim.SparseAdam, lr=0.1)
            optimizer = ice.Optimizer(factory, model.parameters(), accumulation_steps=2, sharding=sharding)
            engine = Engine(lambda _, batch, o=optimizer, m=model: o.backward(_sparse_loss(m, batch), len(batch)))
            optimizer.attach(engine, model=model)
            at_step = optimizer.event("STEP_COMPLETED")
            engine.add_event_handler(at_step(once=stop or 100), engine.terminate)
            to_save = {"engine": engine, "model": model, "optimizer": optimizer}
            checkpoint = ice.Checkpoint(to_save, f"{folder}/{sized}-{unused}-{sharding}")
            checkpoint.attach(engine, at_step)
            checkpoint.resume(engine)
            data = _sparse_data(dist.get_rank())
            engine.run(data if sized else Unsized(data), max_epochs=2)
            dist.barrier()
        found.append([sized, unused, sharding, optimizer.clocks["step"], table.weight.tolist()])
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_sparse_gradients_stay_sparse_on_ranks_without_data_and_resumed(tmp_path, world):
    torch.manual_seed(0)
    table = torch.nn.Embedding(7, 3, sparse=True, dtype=torch.float64)
    optimizer = torch.optim.SparseAdam(table.parameters(), lr=0.1)
    for begin in (0, 2, 4) * 2:
        optimizer.zero_grad()
        window = [batch for rank in range(world) for batch in _sparse_data(rank)[begin : begin + 2]]
        _sparse_loss(table, torch.cat(window)).backward()
        optimizer.step()
    for found in launch(_sparse, world, str(tmp_path), timeout=60):
        for *case, steps, weight in found:
            torch.testing.assert_close(
                torch.tensor(weight, dtype=torch.float64), table.weight.detach(), rtol=0, atol=1e-12, msg=f"{case}"
            )
            assert steps == 6


def _clipped_by_hand(size: int) -> str:
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(2, 1))
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1), accumulation_steps=size)

    def train_step(engine: Engine, batch: torch.Tensor) -> None:
        optimizer.backward(model(batch).square().mean())
        if engine.state.iteration % size == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)

    trainer = Engine(train_step)
    optimizer.attach(trainer, model=model)
    try:
        trainer.run([torch.ones(3, 2)] * 4)
    except BackwardError as error:
        return str(error)
    return f"{optimizer.clocks['step']} steps"


def test_a_clip_by_hand_in_a_windows_last_micro_batch_is_refused_as_in_one_process():
    """It would clip the sum, not the mean; in a window of one they are the same."""
    assert launch(_clipped_by_hand, 2, 1) == ["4 steps"] * 2
    for said in launch(_clipped_by_hand, 2, 2):
        assert "were changed inside its window, not by its backward()" in said
        assert "clip with Optimizer(..., clip=)" in said


def _models_of_their_own(kind: str) -> list[list[float]]:
    """Ranks 0 and 1 train one model, 2 and 3 another, on micro-batches of 1 to 4 items; and a plain loop over both."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("model", "data"))
    pair = dist.get_rank() // 2
    nets = []
    for _ in range(2):
        torch.manual_seed(pair)
        nets.append(torch.nn.Linear(3, 2).double())
    data = [
        [torch.randn(1 + r, 3, generator=torch.Generator().manual_seed(10 * i + r)).double() for r in range(4)]
        for i in range(6)
    ]
    if kind == "fully_shard":
        model: Any = fully_shard(nets[0], mesh=mesh["data"])
    else:
        model = DistributedDataParallel(nets[0], process_group=mesh["data"].get_group())
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1), accumulation_steps=2)

    def step(_: Engine, batch: Any) -> None:
        optimizer.backward(model(batch).square().mean(), weight=len(batch))

    optimizer.attach(engine := Engine(step), model=model)
    engine.run([batches[dist.get_rank()] for batches in data])
    plain = torch.optim.SGD(nets[1].parameters(), lr=0.1)
    own = slice(2 * pair, 2 * pair + 2)
    for first, second in zip(data[::2], data[1::2], strict=True):
        nets[1](torch.cat([*first[own], *second[own]])).square().mean().backward()
        plain.step()
        plain.zero_grad()
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in nets[0].parameters()]
    return [torch.cat([p.detach().flatten() for p in each]).tolist() for each in (whole, nets[1].parameters())]


@pytest.mark.parametrize("kind", ["DDP", "fully_shard"])
def test_a_model_on_some_ranks_is_averaged_over_these(kind):
    for ours, plain in launch(_models_of_their_own, 4, kind):
        assert ours == pytest.approx(plain, rel=1e-12)


def normed() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 1)).double()


def validated(model: torch.nn.Module) -> list[float]:
    model.eval()
    with torch.no_grad():
        outputs = model(torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).view(3, 4))
    model.train()
    return outputs.flatten().tolist()


def _validated_by_hand(size: int) -> list[list[float]]:
    model, told = DistributedDataParallel(normed()), []
    inner = sgd(model)
    for i, (x, y) in enumerate(batches(dist.get_rank(), [[4] * 8])):
        with contextlib.nullcontext() if i % size == size - 1 else model.no_sync():
            (torch.nn.functional.mse_loss(model(x), y) / size).backward()
        if i % size == size - 1:
            inner.step()
            inner.zero_grad()
        if i % 4 == 3:
            told.append(validated(model))
    return told


def _validated(size: int) -> list[list[float]]:
    model, told = DistributedDataParallel(normed()), []
    optimizer = ice.Optimizer(sgd(model), accumulation_steps=size)
    engine = ice.create_trainer(model, optimizer, torch.nn.functional.mse_loss)
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: told.append(validated(model)))
    data = batches(dist.get_rank(), [[4] * 8])
    engine.run(itertools.chain(data), max_epochs=2, epoch_length=4)
    return told


def test_validation_has_the_batch_statistics_of_rank_0_as_under_plain_ddp():
    # What is saved, and by DDP's own forward what each rank would evaluate with.
    for size in (1, 2):
        by_hand, found = launch(_validated_by_hand, 2, size), launch(_validated, 2, size)
        torch.testing.assert_close(torch.tensor(found), torch.tensor(by_hand), rtol=1e-12, atol=1e-12)
        assert found[0] == found[1]


def _validated_on_one_rank() -> int:
    model = DistributedDataParallel(normed())
    optimizer = ice.Optimizer(sgd(model))
    engine = ice.create_trainer(model, optimizer, torch.nn.functional.mse_loss)
    if dist.get_rank() == 0:
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: validated(model) and None)
    engine.run(batches(dist.get_rank(), [[4] * 8]))
    if dist.get_rank() == 0:
        validated(model)
    return optimizer.clocks["step"]


def test_one_rank_may_validate_alone():
    assert launch(_validated_on_one_rank, 2, timeout=30) == [8, 8]


def _seen_twice() -> list[Any]:
    model = DistributedDataParallel(normed())
    optimizer = ice.Optimizer(sgd(model), accumulation_steps=2)

    def step(engine: Engine, batch: Any) -> None:
        if not (dist.get_rank() == 1 and engine.state.iteration == 4):
            optimizer.backward((model(batch[0]) - model(-batch[0])).square().mean())

    engine = Engine(step)
    optimizer.attach(engine, model=model)
    engine.run(batches(dist.get_rank(), [[4] * 8]))
    kept = [t.flatten().tolist() for t in model.module.state_dict().values()]
    return [optimizer.clocks["step"], model.broadcast_buffers, kept]


def test_a_rank_without_a_forward_holds_up_nobody_who_has_two_with_buffers():
    first, second = launch(_seen_twice, 2, timeout=30)
    assert first == second
    assert first[:2] == [4, True]


def _looked_at(**ddp: Any) -> list[list[float]]:
    net = network()
    model = DistributedDataParallel(net, **ddp)
    optimizer = ice.Optimizer(sgd(model), accumulation_steps=2)

    def step(_: Engine, batch: Any) -> None:
        loss = torch.nn.functional.mse_loss(model(batch[0]), batch[1])
        with torch.no_grad():
            model(batch[0])
        optimizer.backward(loss, weight=len(batch[0]))

    engine = Engine(step)
    optimizer.attach(engine, model=model)
    engine.run(batches(dist.get_rank(), RAGGED), max_epochs=1)
    return [p.flatten().tolist() for p in net.parameters()]


@pytest.mark.parametrize("ddp", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
def test_a_forward_without_grad_may_come_between_a_loss_and_its_backward(ddp):
    first, second = launch(functools.partial(_looked_at, **ddp), 2)
    assert first == second
    windows = [[batches(rank, RAGGED)[i + j] for rank in range(2) for j in range(2)] for i in range(0, 8, 2)]
    torch.testing.assert_close(flat(first), flat(plain_loop(windows)), rtol=1e-12, atol=1e-12)
