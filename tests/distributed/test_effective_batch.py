"""``effective_batch_size`` on many ranks: they decide the size of windows once, and together."""

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import ice_engine as ice
from tests.distributed.launch import launch
from tests.distributed.test_windows import EVEN, NONE, RAGGED, SHORT, batches, flat, network, oracle, sgd, trained

pytestmark = [pytest.mark.distributed, pytest.mark.soak]

# Sizes of micro-batches by rank, the items wanted, and the size of windows: by the largest first weight of all.
CASES: dict[str, tuple[list[list[int]], int, int]] = {
    "even": (EVEN, 32, 4),
    "even, one micro-batch is more": (EVEN, 6, 1),
    "ragged, which doesn't divide": (RAGGED, 44, 3),
    "a short rank": (SHORT, 56, 4),
    "a rank without data": (NONE, 28, 2),
    "a rank without data, one micro-batch is more": (NONE, 5, 1),
    "a first weight of 0": ([[7, 3, 11, 2], [0, 13, 5, 8]], 14, 1),
    "first weights of 0": ([[0, 3, 11, 2], [0, 13, 5, 8]], 52, 2),
}


def _all() -> dict[str, dict[str, Any]]:
    return {n: trained(s, 1, unknown=s is NONE, settings={"effective_batch_size": b}) for n, (s, b, _) in CASES.items()}


@functools.cache
def results() -> list[dict[str, dict[str, Any]]]:
    return launch(_all, 2)


@pytest.mark.parametrize("name", CASES)
def test_windows_are_those_of_the_size_that_comes_nearest(name):
    sizes, _, k = CASES[name]
    for rank in results():
        torch.testing.assert_close(flat(rank[name]["parameters"]), flat(oracle(2, sizes, k)), rtol=1e-10, atol=1e-12)


def test_ranks_talk_as_often_as_with_accumulation_steps_but_for_the_first_micro_batch():
    assert [rank["even"]["calls"] for rank in results()] == [2 * 3 + 1] * 2


def _sharded() -> list[Any]:
    model = network()
    fully_shard(model)
    optimizer = ice.Optimizer(sgd(model), effective_batch_size=24)

    def step(_: Engine, batch: Any) -> None:
        optimizer.backward(torch.nn.functional.mse_loss(model(batch[0]), batch[1]), weight=len(batch[0]))

    trainer = Engine(step)
    optimizer.attach(trainer, model=model)
    trainer.run(batches(dist.get_rank(), EVEN), max_epochs=2)
    return [optimizer.accumulation_steps, [p.full_tensor().flatten().tolist() for p in model.parameters()]]


def test_a_fully_sharded_model_has_the_same_windows():
    for k, parameters in launch(_sharded, 2):
        assert k == 3
        torch.testing.assert_close(flat(parameters), flat(oracle(2, EVEN, 3)), rtol=1e-10, atol=1e-12)


def _zero_at_first() -> str:
    """Only rank 0 has anything in the first micro-batch of a window of one."""
    model = DistributedDataParallel(torch.nn.Linear(1, 1))
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    trainer = Engine(lambda engine, n: optimizer.backward(model(torch.ones(1, 1)).sum(), weight=n))
    optimizer.attach(trainer, model=model)
    trainer.run([5 * (1 - dist.get_rank()), 3])
    return f"{optimizer.clocks['step']} steps, the last of {optimizer.record.weight} items"


def test_a_first_loss_that_weighs_nothing_leaves_nobody_waiting():
    assert launch(_zero_at_first, 2) == ["2 steps, the last of 6.0 items"] * 2
