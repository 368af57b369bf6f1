"""A gradient that is not finite on the rank that holds its shard, and finite on all others."""

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine
from torch.distributed.fsdp import fully_shard

import ice_engine as ice
from tests.distributed.launch import launch
from tests.distributed.test_fsdp_windows import batches, network

pytestmark = pytest.mark.distributed


class Rooted(torch.nn.Module):
    """A network, and a parameter whose last entry has an infinite gradient, though the loss is finite."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network(3, 1)
        self.roots = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x) + self.roots.sqrt().sum()


def _skipped(clip: bool) -> tuple[str, list[int]]:
    model = Rooted()
    fully_shard(model)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = ice.Optimizer(inner, clip=ice.clip_norm(1.0) if clip else None, nonfinite="skip")
    trainer = Engine(lambda _, batch: optimizer.backward(model(batch).mean()))
    optimizer.attach(trainer, model=model)
    trainer.run(batches(dist.get_rank())[:1])
    return str(optimizer.record.skipped), [optimizer.clocks["step"], optimizer.clocks["skipped"]]


@pytest.mark.parametrize("clip", [True, False])
def test_every_rank_names_the_parameter_whoever_holds_the_entry(clip):
    expected = "gradient norm is inf, first in 'roots', shape (4,); micro-batch unknown: all losses were finite"
    assert launch(_skipped, 2, clip) == [(expected, [0, 1])] * 2
