"""Tensor parallelism, alone and beside data parallelism, and replicated shards: the steps are those of a plain loop."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import mse_loss

import ice_engine as ice
from tests.distributed.launch import launch

pytestmark = pytest.mark.distributed

CLIP, EPOCHS, K = 0.5, 2, 2
SIZES = [[5, 3, 4, 6, 2], [2, 4, 3, 1, 5], [3, 3, 1, 4, 2], [1, 2, 6, 2, 4]]  # of micro-batches, by place in the data
PLACES = {"tensor": 1, "tensor and data": 2, "replicated shards": 4}


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()


def batches(place: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(place)
    wide = [torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in SIZES[place]]
    return [(each[:, :4], each[:, 4:]) for each in wide]


def split(model: torch.nn.Module, mesh: DeviceMesh) -> None:
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def trained(kind: str) -> Any:
    model, place = network(), 0
    if kind == "tensor":
        split(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        if kind == "tensor and data":
            split(model, mesh["tensor"])
            fully_shard(model, mesh=mesh["data"])
            place = mesh["data"].get_local_rank()
        else:
            fully_shard(model, mesh=mesh)
            place = dist.get_rank()
    optimizer = ice.Optimizer(
        torch.optim.AdamW(model.parameters(), lr=0.1), accumulation_steps=K, clip=ice.clip_norm(CLIP)
    )
    ice.create_trainer(model, optimizer, mse_loss).run(batches(place), max_epochs=EPOCHS)
    state = optimizer.state_dict(rank=0).get("state", {})
    return [p.full_tensor() for p in model.parameters()], [each["exp_avg"] for each in state.values()]


def plain_loop(places: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    data = [batches(place) for place in range(places)]
    for first in [*range(0, len(SIZES[0]), K)] * EPOCHS:
        window = [batch for own in data for batch in own[first : first + K]]
        x, y = (torch.cat([batch[i] for batch in window]) for i in (0, 1))
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return [p.detach() for p in model.parameters()], [each["exp_avg"] for each in optimizer.state.values()]


def _all(kinds: list[str]) -> dict[str, Any]:
    return {kind: trained(kind) for kind in kinds}


@pytest.mark.parametrize(("ranks", "kinds"), [(2, ["tensor"]), (4, ["tensor", "tensor and data", "replicated shards"])])
def test_the_steps_and_the_state_are_those_of_a_plain_loop(ranks, kinds):
    found = launch(_all, ranks, kinds)
    for kind in kinds:
        parameters, moments = plain_loop(PLACES[kind])
        for rank, each in enumerate(found):
            torch.testing.assert_close(each[kind][0], parameters, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(each[kind][1], [] if rank else moments, rtol=1e-12, atol=1e-12)
