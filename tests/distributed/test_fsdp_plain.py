"""Plain parameters of an optimizer whose others are fully_shard'ed: FSDP2 reduces nothing of theirs.

The oracle is a float64 loop with one big batch per window.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss

import ice_engine as ice
from tests.distributed.launch import launch
from tests.distributed.test_fsdp_windows import batches, network

pytestmark = pytest.mark.distributed

SIZE = 2  # micro-batches of a window; an epoch's last one has 1


class Scaled(torch.nn.Module):
    """A network, a parameter of its own, and a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network(3, 1)
        self.bias = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x) + self.bias


def loss_of(model: torch.nn.Module, temperature: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    return mse_loss(model(batch) * temperature, batch.sum(1, keepdim=True))


def ragged(place: int) -> list[torch.Tensor]:
    return [batch[: 1 + (i + place) % 4] for i, batch in enumerate(batches(place))]


def adam(model: Scaled, temperature: torch.Tensor) -> torch.optim.Optimizer:
    groups = [{"params": list(model.network.parameters())}, {"params": [model.bias, temperature]}]
    return torch.optim.Adam(groups, lr=0.1)


def _trained(kind: str, sync: Any) -> list[list[float]]:
    model, temperature = Scaled(), torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    place = dist.get_rank()
    if kind == "replicated":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
        fully_shard(model, mesh=mesh, ignored_params={model.bias})
    elif kind == "half":  # as with tensor parallelism: two ranks have the same data
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "same"))
        fully_shard(model, mesh=mesh["data"], ignored_params={model.bias})
        place = mesh["data"].get_local_rank()
    else:
        fully_shard(model, ignored_params={model.bias})
    optimizer = ice.Optimizer(adam(model, temperature), accumulation_steps=SIZE, clip=ice.clip_norm(1.0))
    trainer = Engine(lambda _, x: optimizer.backward(loss_of(model, temperature, x), weight=len(x)))
    optimizer.attach(trainer, model=model, sync=sync)
    trainer.run(ragged(place))
    sharded = [p.full_tensor() for p in model.network.parameters()]
    return [p.flatten().tolist() for p in (*sharded, model.bias, temperature)]


@pytest.mark.parametrize(
    ("kind", "ranks", "places", "sync"),
    [
        ("sharded", 2, 2, "communication"),
        ("sharded", 2, 2, "memory"),
        ("replicated", 4, 4, "communication"),
        ("half", 4, 2, "communication"),
    ],
)
def test_the_gradient_of_a_plain_parameter_is_the_mean_over_all_ranks_too(kind, ranks, places, sync):
    """Be it one of the model that fully_shard was told to ignore, or one of none, such as a temperature of the loss."""
    model, temperature = Scaled(), torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = adam(model, temperature)
    parameters = [*model.network.parameters(), model.bias, temperature]
    data = [ragged(place) for place in range(places)]
    for first in range(0, len(data[0]), SIZE):
        optimizer.zero_grad()
        loss_of(model, temperature, torch.cat([x for each in data for x in each[first : first + SIZE]])).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    expected = [p.detach().flatten() for p in parameters]
    for found in launch(_trained, ranks, kind, sync):
        for values, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.tensor(values, dtype=torch.float64), wanted, rtol=1e-9, atol=1e-9)
