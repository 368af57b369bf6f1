"""A forward through a model that no backward of its own follows: it must not reduce in whatever comes next."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine
from torch.nn.functional import mse_loss, softplus
from torch.nn.parallel import DistributedDataParallel

import ice_engine as ice
from tests.distributed.launch import launch
from tests.distributed.test_windows import EVEN, Batch, batches, flat, network, oracle, sgd

pytestmark = pytest.mark.distributed

UNEVEN = [[7, 3, 11, 2, 5, 6], [2, 13, 5, 8]]


def adversaries() -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3, dtype=torch.float64), torch.nn.Linear(3, 1, dtype=torch.float64)


def of_the_same_fake(generator: Any, critic: Any, x: torch.Tensor) -> list[torch.Tensor]:
    fake = generator(x)
    return [softplus(-critic(x[:, :3])).mean() + softplus(critic(fake)).mean(), softplus(-critic(fake)).mean()]


def _adversarial(missing: set[tuple[int, int, str]]) -> list[list[float]]:
    generator, critic = (DistributedDataParallel(model) for model in adversaries())
    draw = ice.Optimizer(torch.optim.SGD(generator.parameters(), lr=0.3), name="generator")
    judge = ice.Optimizer(torch.optim.SGD(critic.parameters(), lr=0.3), name="critic")

    def step(engine: Engine, batch: Batch) -> None:
        place = engine.state.iteration, dist.get_rank()
        of_judge, of_draw = of_the_same_fake(generator, critic, batch[0])
        if (*place, "critic") not in missing:
            judge.backward(of_judge, weight=len(batch[0]), retain_graph=True)
        if (*place, "generator") not in missing:
            draw.backward(of_draw, weight=len(batch[0]))

    trainer = Engine(step)
    judge.attach(trainer, model=critic)
    draw.attach(trainer, model=generator)
    trainer.run(batches(dist.get_rank(), EVEN))
    return [p.flatten().tolist() for model in (generator, critic) for p in model.parameters()]


@pytest.mark.parametrize("missing", [set(), {(2, 1, "generator")}, {(1, 0, "critic"), (3, 1, "generator")}])
def test_a_loss_reduces_no_other_model_that_it_goes_through(missing):
    generator, critic = adversaries()
    data = [batches(rank, EVEN) for rank in range(2)]
    for i in range(len(data[0])):
        grads: dict[str, list[Any]] = {}
        items = {"critic": 0, "generator": 0}
        for rank in range(2):
            x = data[rank][i][0]
            losses = of_the_same_fake(generator, critic, x)
            for name, model, loss in zip(items, (critic, generator), losses, strict=True):
                if (i + 1, rank, name) not in missing:
                    items[name] += len(x)
                    grads.setdefault(name, []).append(
                        [len(x) * g for g in torch.autograd.grad(loss, [*model.parameters()], retain_graph=True)]
                    )
        with torch.no_grad():
            for name, model in (("critic", critic), ("generator", generator)):
                for p, *parts in zip(model.parameters(), *grads[name], strict=True):
                    p.sub_(sum(parts) / items[name], alpha=0.3)
    expected = [p.flatten().tolist() for model in (generator, critic) for p in model.parameters()]

    first, second = launch(_adversarial, 2, missing)

    assert first == second
    torch.testing.assert_close(flat(first), flat(expected), rtol=1e-12, atol=1e-12)


def _looks_again(sizes: list[list[int]], k: int) -> list[list[float]]:
    model = DistributedDataParallel(network())
    optimizer = ice.Optimizer(sgd(model), accumulation_steps=k)

    def step(_: Engine, batch: Batch) -> float:
        optimizer.backward(mse_loss(model(batch[0]), batch[1]), weight=len(batch[0]))
        return mse_loss(model(batch[0]), batch[1]).item()  # with grad, and no backward

    trainer = Engine(step)
    optimizer.attach(trainer, model=model)
    trainer.run(batches(dist.get_rank(), sizes), max_epochs=2)
    return [p.flatten().tolist() for p in model.parameters()]


@pytest.mark.parametrize("k", [1, 2])
def test_a_forward_for_a_metric_reduces_nothing(k):
    first, second = launch(_looks_again, 2, UNEVEN, k)

    assert first == second
    torch.testing.assert_close(flat(first), flat(oracle(2, UNEVEN, k)), rtol=1e-12, atol=1e-12)
