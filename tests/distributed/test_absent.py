"""Ranks without a loss where others have one: of models that need all ranks in every backward, or note what is used."""

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch.nn.parallel import DistributedDataParallel

import ice_engine as ice
from ice_engine.errors import RankError
from tests.distributed.launch import launch
from tests.distributed.test_windows import RAGGED, Batch, batches, flat, learn, network, plain_loop, sgd

pytestmark = pytest.mark.distributed


def _flat(model: torch.nn.Module) -> list[list[float]]:
    return [p.flatten().tolist() for p in model.parameters()]


def _static(how: str) -> Any:
    model = DistributedDataParallel(network(), static_graph=True, gradient_as_bucket_view=how == "with views")
    optimizer = ice.Optimizer(sgd(model), accumulation_steps=4)

    def step(engine: Engine, batch: Batch) -> None:
        if not (how == "passes over" and dist.get_rank() == 1 and engine.state.iteration == 6):
            learn(model, optimizer, batch)

    trainer = Engine(step)
    optimizer.attach(trainer, model=model)
    stops = {"stops": Events.ITERATION_COMPLETED(once=5), "stops before it": Events.ITERATION_STARTED(once=6)}
    if how in stops and dist.get_rank() == 1:
        trainer.add_event_handler(stops[how], trainer.terminate)
    data = batches(dist.get_rank(), RAGGED)
    try:
        trainer.run(data[:5] if how == "has less" and dist.get_rank() else data, max_epochs=1)
    except RankError as error:
        return str(error)
    return [_flat(model), optimizer.clocks["step"]]


@pytest.mark.parametrize("how", ["passes over", "stops", "stops before it", "with views"])
def test_a_static_graph_also_where_a_rank_is_absent_from_a_micro_batch(how):
    first, second = launch(_static, 2, how, timeout=30)
    assert first == second
    own = [batches(rank, RAGGED) for rank in range(2)]
    last = {
        "passes over": [*own[0][4:], own[1][4], *own[1][6:]],
        "with views": [*own[0][4:], *own[1][4:]],
        "stops": [own[0][4], own[1][4]],  # which the run's end steps
        "stops before it": [own[0][4], own[1][4], own[0][5]],  # rank 0 was in it
    }
    expected = plain_loop([[*own[0][:4], *own[1][:4]], last[how]])
    assert first[1] == 2
    torch.testing.assert_close(flat(first[0]), flat(expected), rtol=1e-12, atol=1e-12)


def test_a_static_graph_and_uneven_data_are_refused_on_all_ranks():
    for said in launch(_static, 2, "has less", timeout=30):
        assert "epoch_length differs: 8 on rank 0, 5 on rank 1" in said


class Sometimes(torch.nn.Module):
    """Of two layers, the second one is used for inputs above 0 only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(4, 1).double(), torch.nn.Linear(1, 1).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) if x[0, 0] > 0 else self.first(x)


def _inputs(rank: int) -> list[torch.Tensor]:
    # The one that the second layer is used in is the second, which rank 1 does not have.
    signs = (-1.0, 1.0, -1.0)[: 3 if rank == 0 else 1]
    return [sign * torch.rand(2 + rank + i, 4, dtype=torch.float64) for i, sign in enumerate(signs)]


def _unused() -> Any:
    torch.manual_seed(dist.get_rank())
    data = _inputs(dist.get_rank())
    model = DistributedDataParallel(Sometimes(), find_unused_parameters=True)
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    trainer = Engine(lambda _, x: optimizer.backward(model(x).square().mean(), weight=len(x)))
    optimizer.attach(trainer, model=model)
    trainer.run(data, max_epochs=3)
    return [_flat(model), optimizer.clocks["step"]]


def test_parameters_that_are_used_now_and_then_and_uneven_data():
    first, second = launch(_unused, 2, timeout=30)
    assert first == second
    data = []
    for rank in range(2):
        torch.manual_seed(rank)
        data.append(_inputs(rank))
    model = Sometimes()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        for i in range(3):
            here = [own[i] for own in data if i < len(own)]
            optimizer.zero_grad()
            (sum(model(x).square().sum() for x in here) / sum(len(x) for x in here)).backward()
            optimizer.step()
    assert first[1] == 9
    torch.testing.assert_close(flat(first[0]), flat(_flat(model)), rtol=1e-12, atol=1e-12)


def _carried() -> Any:
    models = [DistributedDataParallel(network()) for _ in "ab"]
    make = functools.partial(ice.Optimizer, tail="carry")
    pairs = [(m, make(sgd(m), name=n, accumulation_steps=k)) for m, n, k in zip(models, "ab", (4, 1), strict=True)]

    def step(_: Engine, batch: Batch) -> None:
        for model, optimizer in pairs:
            learn(model, optimizer, batch)

    trainer = Engine(step)
    for model, optimizer in pairs:
        optimizer.attach(trainer, model=model)
    trainer.run(batches(dist.get_rank(), RAGGED)[: 6 - dist.get_rank()], max_epochs=2)
    return [[_flat(m) for m in models], [optimizer.clocks["step"] for _, optimizer in pairs]]


def test_windows_that_are_carried_over_by_ranks_out_of_step_close_together():
    first, second = launch(_carried, 2, timeout=30)
    assert first == second
    assert first[1] == [3, 12]
