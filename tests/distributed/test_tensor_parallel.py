"""Tensor parallelism, alone and beside data parallelism, and replicated shards: the steps are those of a plain loop."""

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Events
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import ice_engine as ice
from tests.distributed.launch import launch

pytestmark = pytest.mark.distributed

CLIP, EPOCHS, K = 0.5, 2, 2
SIZES = [[5, 3, 4, 6, 2], [2, 4, 3, 1, 5], [3, 3, 1, 4, 2], [1, 2, 6, 2, 4]]  # of micro-batches, by place in the data
PLACES = {"tensor": 1, "tensor and data": 2, "replicated shards": 4, "data in subgroups": 2}
KINDS = {2: ["tensor"], 4: ["tensor", "tensor and data", "replicated shards", "data in subgroups"]}
ITEMS = 20  # of a step, where they are what is asked for
SIZE = {1: 4, 2: 2, 4: 1}  # micro-batches of 5 items, by places of data: 5 is the largest of the first ones


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()


def batches(place: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(place)
    wide = [torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in SIZES[place]]
    return [(each[:, :4], each[:, 4:]) for each in wide]


def split(model: torch.nn.Module, mesh: DeviceMesh) -> None:
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def spread(kind: str) -> tuple[torch.nn.Module, int]:
    """Return the network, on all ranks, and this one's place in the data."""
    model = network()
    if kind == "tensor":
        split(model, init_device_mesh("cpu", (dist.get_world_size(),)))
        return model, 0
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    if kind == "replicated shards":
        fully_shard(model, mesh=mesh)
        return model, dist.get_rank()
    if kind == "data in subgroups":  # as beside parallelism of the model that is the user's own
        model = DistributedDataParallel(model, process_group=mesh["data"].get_group())
    else:
        split(model, mesh["tensor"])
        fully_shard(model, mesh=mesh["data"])
    return model, mesh["data"].get_local_rank()


def whole(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


def trained(kind: str) -> Any:
    model, place = spread(kind)
    optimizer = ice.Optimizer(
        torch.optim.AdamW(model.parameters(), lr=0.1), accumulation_steps=K, clip=ice.clip_norm(CLIP)
    )
    ice.create_trainer(model, optimizer, mse_loss).run(batches(place), max_epochs=EPOCHS)
    state = optimizer.state_dict(rank=0).get("state", {})
    return whole(model), [each["exp_avg"] for each in state.values()]


def note(optimizer: ice.Optimizer, said: list[Any], _: Any) -> None:
    said.append((optimizer.record.micro_batches, optimizer.record.weight, optimizer.param_groups[0]["lr"]))


def resumed(kind: str, attached: bool) -> Any:
    """Train an epoch, and one more in which the first micro-batch has another size; loaded before attach(), or after.

    Returns what each step was of, and what was trained.
    """
    model, place = spread(kind)
    said: list[Any] = []
    states: list[Any] = []
    for epochs in (1, EPOCHS):
        optimizer = ice.Optimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            effective_batch_size=ITEMS,
            processors=[ice.schedules.cosine()],
            on_change="replan",
        )
        if states and not attached:
            optimizer.load_state_dict(states[0]["optimizer"])
        trainer = ice.create_trainer(model, optimizer, mse_loss)
        if states:
            trainer.load_state_dict(states[0]["trainer"])
            if attached:
                optimizer.load_state_dict(states[0]["optimizer"])
        trainer.add_event_handler(optimizer.event("STEP_COMPLETED"), functools.partial(note, optimizer, said))
        own = batches(place)
        trainer.run(own if epochs == 1 else [*own[1:], own[0]], max_epochs=epochs)
        states = [{"optimizer": optimizer.state_dict(rank=0), "trainer": trainer.state_dict()}]
        dist.broadcast_object_list(states)
    return said, whole(model)


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


def steps(places: int) -> tuple[list[tuple[int, float, float]], list[torch.Tensor]]:
    """What :func:`resumed` is to return, by a loop over the micro-batches of all places."""
    model, size, length, said = network(), SIZE[places], len(SIZES[0]), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    each = math.ceil(length / size)  # steps of an epoch
    for epoch in range(EPOCHS):
        data = [own if epoch == 0 else [*own[1:], own[0]] for own in map(batches, range(places))]
        for step, first in enumerate(range(0, length, size)):
            window = [batch for own in data for batch in own[first : first + size]]
            x, y = (torch.cat([batch[i] for batch in window]) for i in (0, 1))
            # The first run is of one epoch; the second plans anew what is left of both.
            done, total = step + epoch * each, each * (epoch + 1)
            optimizer.param_groups[0]["lr"] = rate = 0.1 * (1 + math.cos(math.pi * done / total)) / 2
            said.append((len(data[0][first : first + size]), float(len(x)), rate))
            optimizer.zero_grad()
            mse_loss(model(x), y).backward()
            optimizer.step()
    return said, [p.detach() for p in model.parameters()]


def _all(kinds: list[str]) -> dict[str, Any]:
    return {kind: (trained(kind), resumed(kind, attached=True), resumed(kind, attached=False)) for kind in kinds}


@functools.cache
def results(ranks: int) -> list[dict[str, Any]]:
    return launch(_all, ranks, KINDS[ranks])


@pytest.mark.parametrize("ranks", KINDS)
def test_the_steps_and_the_state_are_those_of_a_plain_loop(ranks):
    for kind in KINDS[ranks]:
        parameters, moments = plain_loop(PLACES[kind])
        for rank, each in enumerate(results(ranks)):
            found = each[kind][0]
            torch.testing.assert_close(found[0], parameters, rtol=1e-12, atol=1e-12)
            if kind != "data in subgroups":  # whose state is whole on every rank
                torch.testing.assert_close(found[1], [] if rank else moments, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("ranks", KINDS)
def test_ranks_of_the_same_data_count_its_items_once(ranks, attached):
    """Windows of an ``effective_batch_size``, records and schedules go by the items that there are, also resumed."""
    for kind in KINDS[ranks]:
        said, parameters = steps(PLACES[kind])
        for each in results(ranks):
            found = each[kind][1 if attached else 2]
            assert [step[:2] for step in found[0]] == [step[:2] for step in said], kind
            assert [step[2] for step in found[0]] == pytest.approx([step[2] for step in said]), kind
            torch.testing.assert_close(found[1], parameters, rtol=1e-12, atol=1e-12)


SHARED = 12  # micro-batches of an epoch, dealt out to the places of data
WINDOW = 4  # of them in a step


def in_turn() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    wide = torch.randn(SHARED, 2, 5, generator=generator, dtype=torch.float64)
    return [(each[:, :4], each[:, 4:]) for each in wide]


def dealt_out(folder: Path, kind: str, stop: int | None) -> Any:
    """Train one epoch on from where *folder* is, up to step *stop*; return its iterations, and the model."""
    places = {"one": 1, "data": dist.get_world_size(), **PLACES}[kind]
    model, place = (network(), dist.get_rank()) if kind in {"one", "data"} else spread(kind)
    if kind == "data":
        model = DistributedDataParallel(model)
    optimizer = ice.Optimizer(torch.optim.AdamW(model.parameters(), lr=0.1), accumulation_steps=WINDOW // places)
    trainer = ice.create_trainer(model, optimizer, mse_loss)
    checkpoint = ice.Checkpoint({"trainer": trainer, "model": model, "optimizer": optimizer}, folder)
    checkpoint.attach(trainer, optimizer.event("STEP_COMPLETED"))
    checkpoint.resume(trainer)
    if stop is not None:
        trainer.add_event_handler(optimizer.event("STEP_COMPLETED")(once=stop), trainer.terminate)
    said: list[int] = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: said.append(trainer.state.iteration))
    trainer.run(in_turn()[place::places], max_epochs=1)
    return said, whole(model)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("tensor", 2), ("data", 2)),  # as many ranks, and twice the places
        (("tensor", 2), ("one", 1)),
        (("data", 2), ("tensor", 2)),
        (("tensor and data", 4), ("data", 2)),
        (("one", 1), ("tensor and data", 4)),
    ],
)
def test_a_run_goes_on_in_its_epoch_with_another_number_of_places(tmp_path, before, after):
    launch(dealt_out, before[1], tmp_path, before[0], 2)
    places = {"one": 1, "data": after[1], **PLACES}[after[0]]

    runs = launch(dealt_out, after[1], tmp_path, after[0], None)

    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    data = in_turn()
    for first in range(0, SHARED, WINDOW):
        x, y = (torch.cat([batch[i] for batch in data[first : first + WINDOW]]) for i in (0, 1))
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
    for said, found in runs:
        assert said == list(range(2 * WINDOW // places + 1, SHARED // places + 1))
        torch.testing.assert_close(found, [p.detach() for p in model.parameters()], rtol=1e-10, atol=1e-10)
