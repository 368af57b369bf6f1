"""A run in another thread than the main one, as under a GUI or a server: the others are told where that thread is."""

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch.nn.parallel import DistributedDataParallel

import ice_engine as ice
from tests.distributed.launch import watch

pytestmark = pytest.mark.distributed


def _alone_in_a_collective(where: str) -> None:
    of_its_own = dist.new_group([0, 1])
    model = DistributedDataParallel(torch.nn.Linear(4, 1))
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1))

    def wait(engine: Engine) -> None:
        if dist.get_rank() == 1 and engine.state.iteration == 3:
            dist.all_reduce(torch.ones(1), group=of_its_own)

    def step(engine: Engine, batch: torch.Tensor) -> None:
        loss = model(batch).square().mean()
        if where == "before a reduction":
            wait(engine)
        optimizer.backward(loss)

    trainer = Engine(step)
    optimizer.attach(trainer, model=model)
    if where == "before a round":
        trainer.add_event_handler(Events.ITERATION_COMPLETED, wait)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(trainer.run, [torch.ones(2, 4)] * 4).result()


@pytest.mark.parametrize("where", ["before a round", pytest.param("before a reduction", marks=pytest.mark.soak)])
def test_a_collective_on_one_rank_is_found_where_another_thread_trains(where):
    for outcome in watch(_alone_in_a_collective, 2, where, timeout=45):
        assert outcome.exitcode == 1
        # In a reduction nothing but the end of the process ends the wait, and the log says why.
        ended = where == "before a reduction" and outcome.rank == 0
        assert ended or "rank 1 waits in all_reduce(), called at test_training_thread.py" in outcome.error


def _sharded_on_one() -> None:
    model = torch.nn.Linear(4, 1)
    factory = functools.partial(torch.optim.SGD, lr=0.1)
    ice.Optimizer(factory, model.parameters(), sharding="zero1" if dist.get_rank() else None)
    DistributedDataParallel(model)


def _before_all_meet() -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(_sharded_on_one).result()


def test_a_wait_before_all_have_met_is_found_where_another_thread_trains():
    _, second = watch(_before_all_meet, 2, timeout=45)
    expected = "rank 0 waits in _verify_param_shape_across_processes(), called at test_training_thread.py"
    assert expected in second.error
    assert "in _sharded_on_one, where all ranks meet for the first time" in second.error
