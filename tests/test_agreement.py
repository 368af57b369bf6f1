"""Ranks whose processors write different values: found and named on every rank, and obeyed on none.

Two and three real processes on gloo run the processors as an optimizer's step does.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

import ice_engine as ice
from ice_engine.distributed import rounds
from ice_engine.errors import ProcessorDivergenceError
from ice_engine.processors.group import run_processors, set_initial_values
from ice_engine.processors.schedules import cosine, linear
from tests.distributed.launch import launch


@ice.dictprocess
def by_rank(lr: float) -> float:
    return lr * (1 + dist.get_rank())


def extra_key_on_rank_1(group: Any) -> Any:
    if dist.get_rank() == 1:
        group["momentum"] = 0.5
    return group


def noise(group: Any) -> Any:
    group["lr"] = random.Random().random()  # noqa: S311 - differs on every call and rank
    return group


def counts(group: Any, calls: list[int] = []) -> Any:  # noqa: B006 - keeps a state of its own, on purpose
    calls.append(1)
    group["lr"] = 1.0 + dist.get_rank() if len(calls) <= 2 else 1.0
    return group


CASES: dict[str, tuple[list[Callable[..., Any]], str | None]] = {
    "same": ([cosine(total=10), linear(total=10, dst="momentum")], None),
    "differs": (
        [linear(total=10), by_rank(dst="lr")],
        "'by_rank' differs between ranks in 'lr' of param group 0 ('a'): 0.5 on rank 0, 1.0 on rank 1",
    ),
    "one rank only": (
        [linear(total=10), extra_key_on_rank_1],
        "'extra_key_on_rank_1' differs between ranks in 'momentum' of param group 0 ('a'): left as it is on rank 0",
    ),
    "random": ([noise], "processor 'noise' differs between ranks in 'lr' of param group 0 ('a'): 0."),
    "only the first time": ([counts], "one of them keeps a state of its own or draws random numbers; they are: counts"),
}


def _outcome() -> dict[str, Any]:
    outcome: dict[str, Any] = {}
    for case, (processors, _) in CASES.items():
        parameters = [torch.nn.Parameter(torch.ones(2)) for _ in "ab"]
        groups = [{"params": [p], "name": name} for p, name in zip(parameters, "ab", strict=True)]
        sgd = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
        set_initial_values(processors, sgd.param_groups)
        before = [{k: v for k, v in group.items() if k != "params"} for group in sgd.param_groups]
        try:
            run_processors(processors, sgd.param_groups, {"step": 5}, rounds.gatherer())
            outcome[case] = [(group["lr"], group["momentum"]) for group in sgd.param_groups]
        except ProcessorDivergenceError as error:
            after = [{k: v for k, v in group.items() if k != "params"} for group in sgd.param_groups]
            outcome[case] = str(error) if before == after else "a group has changed"
    return outcome


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3])
def test_processors_that_differ_between_ranks_are_named_on_all_of_them(world_size: int) -> None:
    outcomes = launch(_outcome, world_size)

    for rank, outcome in enumerate(outcomes):
        assert outcome["same"] == [(0.5, 0.45)] * 2
        for case, (_, message) in CASES.items():
            assert message is None or message in outcome[case], (rank, case)
    assert len({str(outcome) for outcome in outcomes}) == 1


def renew(group: Any) -> Any:
    group["hook"] = lambda: None
    return group


def _entries_without_a_value() -> tuple[int, float]:
    kept = [lambda: None for _ in range(1000 * dist.get_rank())]  # so that addresses differ
    model = DistributedDataParallel(torch.nn.Linear(2, 1))
    groups = [{"params": list(model.parameters()), "hook": lambda: kept, "owner": object()}]
    optimizer = ice.Optimizer(torch.optim.SGD(groups, lr=1.0), processors=[linear(total=2), renew])
    trainer = Engine(lambda engine, batch: optimizer.backward(model(batch).square().mean()))
    optimizer.attach(trainer, model=model)
    trainer.run(list(torch.ones(2, 3, 2)))
    return trainer.state.optimizer_step, optimizer.param_groups[0]["lr"]


@pytest.mark.distributed
def test_an_entry_of_ones_own_that_has_no_value_is_not_compared() -> None:
    assert launch(_entries_without_a_value, 2) == [(2, 0.5)] * 2


def test_one_process_has_nobody_to_agree_with() -> None:
    assert rounds.gatherer() is None


def test_an_optimizer_is_built_over_a_store_that_keeps_nothing() -> None:
    """Torch's "fake" backend lets one process take itself for one of many, as to see what memory they would need."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        parameter = torch.nn.Parameter(torch.ones(2))
        optimizer = ice.Optimizer(torch.optim.SGD([parameter], lr=1.0))
        parameter.grad = torch.ones(2)
        optimizer.step()
    finally:
        dist.destroy_process_group()
    assert parameter.tolist() == [0.0, 0.0]


def _alone() -> tuple[int, list[str], bool]:
    model = DistributedDataParallel(torch.nn.Linear(2, 1))
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=1.0), accumulation_steps=2, clip=ice.clip_norm(1))
    trainer = Engine(lambda engine, batch: optimizer.backward(model(batch).square().mean()))
    optimizer.attach(trainer, model=model)
    handlers = [hook.name for hook in ice.HookRegistry(trainer)]
    trainer.run(list(torch.ones(5, 3, 2)), max_epochs=2)
    return trainer.state.optimizer_step, handlers, rounds._current.made is None


@pytest.mark.distributed
def test_the_only_rank_of_a_process_group_agrees_with_nobody_at_no_cost() -> None:
    ((steps, handlers, alone),) = launch(_alone, 1)

    assert steps == 6
    assert not any(name.startswith("peers.") for name in handlers), handlers
    assert alone, "a round was begun"
