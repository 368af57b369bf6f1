"""Everything at once, on two ranks: ZeRO-1 or DDP, clip, scaler, schedule, checkpoints, the trainer in one call."""

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Events
from ignite.handlers import Checkpoint as IgniteCheckpoint
from ignite.handlers import DiskSaver
from torch.nn.parallel import DistributedDataParallel

import ice_engine as ice
from tests.distributed.launch import launch, watch
from tests.distributed.test_windows import RAGGED, batches, network

pytestmark = pytest.mark.distributed

ADAMW = functools.partial(torch.optim.AdamW, lr=0.01)


def trainer(sharding: Any, max_epochs: int, folder: Path | None = None, *, resume: bool = False) -> dict[str, Any]:
    model = network()
    if dist.is_initialized():
        model = DistributedDataParallel(model)
    bare = getattr(model, "module", model)
    optimizer = ice.Optimizer(
        ADAMW,
        bare.named_parameters(),
        accumulation_steps=3,
        clip=ice.clip_norm(0.5),
        grad_scaler=torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2),
        processors=[ice.schedules.cosine(total=12)],
        sharding=sharding,
    )
    engine = ice.create_trainer(model, optimizer, torch.nn.functional.mse_loss)
    if folder is not None:
        kept = {"model": bare, "optimizer": optimizer, "trainer": engine}
        checkpoint = ice.Checkpoint(kept, folder)
        checkpoint.attach(engine, Events.EPOCH_COMPLETED)
        if resume:
            assert checkpoint.resume(engine) is not None
    engine.run(batches(dist.get_rank() if dist.is_initialized() else 0, RAGGED), max_epochs=max_epochs)
    state = optimizer.state_dict()
    return {
        "parameters": [p.detach().flatten().tolist() for p in bare.parameters()],
        "state": {k: {n: torch.as_tensor(v).tolist() for n, v in e.items()} for k, e in state["state"].items()}
        if "state" in state
        else None,
        "local": sum(torch.as_tensor(v).numel() for e in optimizer.state.values() for v in e.values()),
        "clocks": optimizer.clocks,
        "scale": optimizer.record.loss_scale,
        "lr": optimizer.param_groups[0]["lr"],
    }


def _both() -> list[dict[str, Any]]:
    return [trainer(sharding, 2) for sharding in (None, "zero1")]


def test_zero_trains_as_ddp_does_bit_for_bit_with_a_part_of_the_state_each():
    (plain, zero), (other, second) = launch(_both, 2)
    for key in ("parameters", "clocks", "scale", "lr"):
        assert plain[key] == zero[key] == other[key] == second[key], key
    assert plain["state"] == zero["state"] == other["state"]
    assert second["state"] is None  # rank 0 has it
    assert zero["local"] + second["local"] == plain["local"]
    assert max(zero["local"], second["local"]) < 0.7 * plain["local"]


def _resumed(folder: Path) -> list[dict[str, Any]]:
    whole = trainer("zero1", 3)
    trainer("zero1", 2, folder)
    return [whole, trainer("zero1", 3, folder, resume=True)]


def test_a_run_resumes_bit_for_bit_from_a_checkpoint_attached_on_every_rank(tmp_path):
    for whole, resumed in launch(_resumed, 2, tmp_path):
        assert resumed["parameters"] == whole["parameters"]
        assert resumed["clocks"] == whole["clocks"]
        assert resumed["scale"] == whole["scale"]
    # And in one process goes on what two have saved.
    alone = trainer(None, 4, tmp_path, resume=True)
    assert alone["clocks"]["step"] == whole["clocks"]["step"] + 3


def _ignites_own(folder: Path) -> list[str]:
    model = DistributedDataParallel(network())
    optimizer = ice.Optimizer(ADAMW, model.module.named_parameters(), sharding="zero1")
    engine = ice.create_trainer(model, optimizer, torch.nn.functional.mse_loss)
    kept = {"model": model, "optimizer": optimizer, "trainer": engine}
    saver = DiskSaver(str(folder), create_dir=True, require_empty=False)
    engine.add_event_handler(Events.EPOCH_COMPLETED, IgniteCheckpoint(kept, saver, n_saved=None))
    engine.run(batches(dist.get_rank(), RAGGED), max_epochs=2)
    return [str(optimizer.clocks["step"])]


@pytest.mark.soak
def test_ignites_own_checkpoint_saves_the_whole_state_as_well(tmp_path):
    launch(_ignites_own, 2, tmp_path)
    files = sorted(tmp_path.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    assert len(files) == 2
    saved = torch.load(files[-1], weights_only=True)
    model = network()
    plain = ADAMW(model.parameters())
    plain.load_state_dict({k: v for k, v in saved["optimizer"].items() if k != "ice_engine"})
    assert {float(entry["step"]) for entry in plain.state.values()} == {16.0}


def _on_one_rank(folder: Path) -> None:
    model = DistributedDataParallel(network())
    optimizer = ice.Optimizer(ADAMW, model.module.named_parameters(), sharding="zero1")
    engine = ice.create_trainer(model, optimizer, torch.nn.functional.mse_loss)
    if dist.get_rank() == 0:
        ice.Checkpoint({"optimizer": optimizer, "trainer": engine}, folder).attach(
            engine, Events.ITERATION_COMPLETED(once=3)
        )
    engine.run(batches(dist.get_rank(), RAGGED), max_epochs=2)


@pytest.mark.soak
def test_a_checkpoint_on_one_rank_only_is_found_on_both(tmp_path):
    for outcome in watch(_on_one_rank, 2, tmp_path):
        assert outcome.exitcode == 1
        assert "rank 0 needs all ranks, at a checkpoint" in outcome.error
        assert "rank 1 goes on training, at iteration 4 (epoch 1)" in outcome.error


def _by_hand() -> list[str]:
    model = network()
    optimizer = ice.Optimizer(ADAMW, model.named_parameters())
    said = []
    for call in (lambda: optimizer.backward(model(torch.ones(1, 4, dtype=torch.float64)).sum()), optimizer.update):
        with pytest.raises(ice.IceEngineError) as refused:
            call()
        said.append(str(refused.value))
    return said


@pytest.mark.soak
def test_a_loop_of_ones_own_is_for_one_process():
    said = launch(_by_hand, 2)[0]

    assert [text.partition(";")[0] for text in said] == ["backward() is for one process", "update() is for one process"]
    assert all("this is rank 0 of 2" in text for text in said)


def _by_hand_in_a_run() -> str:
    model = DistributedDataParallel(network())
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1), accumulation_steps=4)
    trainer = ice.create_trainer(model, optimizer, torch.nn.functional.mse_loss)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), optimizer.flush)
    with pytest.raises(ice.IceEngineError) as refused:
        trainer.run(batches(dist.get_rank(), RAGGED))
    return str(refused.value)


def test_a_handler_that_would_step_one_rank_alone_is_refused():
    for said in launch(_by_hand_in_a_run, 2):
        assert "flush() is for one process" in said
        assert said.endswith("Take it out: the engine that the optimizer is attached to steps on all ranks at once")


def _attached_too_early() -> str:
    store, rank, size = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    model = network()
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    trainer = ice.create_trainer(model, optimizer, torch.nn.functional.mse_loss)
    dist.init_process_group("gloo", store=dist.PrefixStore("later", store), rank=rank, world_size=size)
    with pytest.raises(ice.IceEngineError) as refused:
        trainer.run(batches(rank, RAGGED))
    return str(refused.value)


@pytest.mark.filterwarnings("ignore:this is process")  # that it is alone, as it is when it attaches
def test_a_run_is_refused_whose_optimizer_was_attached_before_there_was_a_process_group():
    for rank, said in enumerate(launch(_attached_too_early, 2)):
        assert f"attached before there was a process group, so this is rank {rank} of 2" in said


def _copied() -> list[dict[str, Any]]:
    model = DistributedDataParallel(network())
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1), accumulation_steps=3)
    trainer = ice.create_trainer(model, optimizer, torch.nn.functional.mse_loss)
    copies = []

    def keep() -> None:
        copies.extend([copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))])  # noqa: S301 - our own data

    trainer.add_event_handler(optimizer.event("STEP_COMPLETED")(once=2), keep)
    trainer.run(batches(dist.get_rank(), RAGGED))
    return [{"clocks": found.clocks, "open": found.in_window, "engine": found.engine} for found in copies]


def test_an_attached_optimizer_is_copied_and_pickled_without_the_other_ranks():
    clocks = {"step": 2, "attempt": 2, "skipped": 0, "iteration": 6}
    assert launch(_copied, 2) == [[{"clocks": clocks, "open": False, "engine": None}] * 2] * 2
