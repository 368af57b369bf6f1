"""Checkpoints of many ranks: one file, at a window's edge, from which all of them go on bit by bit."""

import functools
import itertools
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import ice_engine as ice
from ice_engine.errors import CheckpointError
from ice_engine.norms import local_part
from tests.distributed.launch import launch, watch
from tests.test_resume import Noisy
from tests.unsized import Unsized

pytestmark = pytest.mark.distributed

STEP = ice.OptimizerEvents.OPTIMIZER_STEP_COMPLETED


class Training:
    """Every rank with data, generators and dropout of its own."""

    def __init__(self, folder: str, **settings: Any) -> None:
        sharding = settings.pop("sharding", None)
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 3))
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(dist.get_rank())
        ddp = DistributedDataParallel(model)
        self.optimizer = ice.Optimizer(
            functools.partial(torch.optim.AdamW, lr=0.05),
            ddp.parameters(),
            accumulation_steps=3,
            clip=ice.clip_norm(1.0),
            sharding=sharding,
        )
        self.losses: list[float] = []

        def step(_: Engine, batch: Any) -> None:
            loss = torch.nn.functional.cross_entropy(ddp(batch[0]), batch[1])
            self.optimizer.backward(loss, weight=len(batch[1]))
            self.losses.append(loss.item())

        self.trainer = Engine(step)
        self.optimizer.attach(self.trainer, model=ddp)
        self.sampler = DistributedSampler(Noisy(), shuffle=True)
        self.data = DataLoader(Noisy(), 2, sampler=self.sampler)  # 7 micro-batches a rank with two, 5 with three
        self.trainer.add_event_handler(Events.EPOCH_STARTED, lambda engine: self.sampler.set_epoch(engine.state.epoch))
        self.model = model
        to_save = {"trainer": self.trainer, "model": ddp, "optimizer": self.optimizer}
        self.checkpoint = ice.Checkpoint(to_save, folder, n_saved=None, **settings)

    def run(self) -> list[Any]:
        self.trainer.run(self.data, max_epochs=3)
        return [self.losses, [p.flatten().tolist() for p in self.model.parameters()], self.optimizer.clocks["step"]]


def _only(name: str, _: Path) -> list[Any]:
    return [ice.Checkpoint.Item(0, name)]


def _resumed(folder: str, sharding: str | None) -> Any:
    whole = Training(f"{folder}/whole", sharding=sharding).run()
    first = Training(f"{folder}/run", sharding=sharding)
    first.checkpoint.attach(first.trainer, Events.ITERATION_COMPLETED(every=4))
    first.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=11), lambda: first.trainer.terminate())
    first.run()
    dist.barrier()
    found = []
    for name in sorted(path.name for path in Path(folder, "run").iterdir()):
        second = Training(f"{folder}/run", sharding=sharding)
        second.checkpoint._find = functools.partial(_only, name)
        second.checkpoint.resume(second.trainer)
        began = second.trainer.state.iteration
        losses, parameters, steps = second.run()
        found.append((name, began, losses == whole[0][began:], parameters == whole[1], steps == whole[2]))
        dist.barrier()
    return found


@pytest.mark.parametrize("sharding", [None, "zero1"])
def test_two_ranks_go_on_bit_by_bit(tmp_path, sharding):
    first, second = launch(_resumed, 2, str(tmp_path), sharding)
    assert first == second
    # Asked for at iterations 4 and 8, inside of windows: saved where these close.
    assert [found[:2] for found in first] == [("checkpoint_10.pt", 10), ("checkpoint_6.pt", 6)]
    assert all(all(found[2:]) for found in first), first


def _sharded(folder: str) -> list[Any]:
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 3)
    fully_shard(model)
    optimizer = ice.Optimizer(functools.partial(torch.optim.AdamW, lr=0.05), model.named_parameters())
    trainer = ice.create_trainer(model, optimizer, torch.nn.functional.cross_entropy)
    checkpoint = ice.Checkpoint({"trainer": trainer, "model": model, "optimizer": optimizer}, folder)
    checkpoint.attach(trainer, Events.ITERATION_COMPLETED(every=2))
    trainer.run([(torch.ones(4, 6), torch.tensor([0, 1, 2, 0]))] * 3, max_epochs=1)
    saved = torch.load(checkpoint.last_checkpoint, weights_only=True) if dist.get_rank() == 0 else {}
    before = [p.full_tensor().tolist() for p in model.parameters()]
    if saved:
        assert [list(value.shape) for value in saved["model"].values()] == [[3, 6], [3]]
    again = ice.Checkpoint({"trainer": trainer, "model": model, "optimizer": optimizer}, folder)
    dist.barrier()
    again.resume(trainer)
    trainer.run([(torch.ones(4, 6), torch.tensor([0, 1, 2, 0]))] * 3, max_epochs=1)
    return [before, [p.full_tensor().tolist() for p in model.parameters()]]


def test_a_sharded_model_is_saved_whole_beside_training_and_goes_on(tmp_path):
    first, second = launch(_sharded, 2, str(tmp_path))
    assert first == second
    assert first[0] == first[1]  # the third step once more, from the checkpoint of the second


def _validated_before(folder: str, how: str, layers: bool) -> list[list[float]]:
    data = [(torch.full((4, 6), i / 5), torch.tensor([0, 1, 2, 0])) for i in range(4)]
    found = []
    for run in ("whole", "first", "second"):
        torch.manual_seed(["whole", "first", "second"].index(run) // 2)
        model: Any = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
        if layers:
            fully_shard(model[0])
        fully_shard(model)
        optimizer = ice.Optimizer(torch.optim.AdamW(model.named_parameters(), lr=0.05))
        trainer = ice.create_trainer(model, optimizer, torch.nn.functional.cross_entropy)
        objects = {"trainer": trainer, "model": model, "optimizer": optimizer}
        with torch.no_grad():
            model(data[0][0])
        if run == "second" and how == "resume":
            ice.Checkpoint(objects, folder).resume(trainer)
        elif run == "second":
            ice.load_sharded(f"{folder}/sharded", objects)
        elif run == "first":
            ice.Checkpoint(objects, folder).attach(trainer, Events.EPOCH_COMPLETED)
        trainer.run(data, max_epochs=1 if run == "first" else 2)
        if run == "first":
            ice.save_sharded(f"{folder}/sharded", objects)
        found.append(torch.cat([p.full_tensor().flatten() for p in model.parameters()]).tolist())
    return found


@pytest.mark.parametrize("layers", [False, True])
@pytest.mark.parametrize("how", ["resume", "load_sharded"])
def test_a_sharded_model_that_was_validated_before_loads_what_was_saved(tmp_path, how, layers):
    """A forward without a backward leaves it with whole parameters, and the optimizer has the shards."""
    for whole, _, again in launch(_validated_before, 2, str(tmp_path), how, layers):
        assert again == whole


def _alone_inside_a_window(folder: str) -> list[Any]:
    data = [(torch.full((4, 6), i / 5), torch.tensor([0, 1, 2, 0])) for i in range(5)]
    found: list[Any] = []
    for name in ("whole", "again"):
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 3)
        fully_shard(model)
        make = functools.partial(torch.optim.AdamW, lr=0.05)
        optimizer = ice.Optimizer(make, model.named_parameters(), accumulation_steps=2, clip=ice.clip_norm(0.1))
        trainer = ice.create_trainer(model, optimizer, torch.nn.functional.cross_entropy)
        to_save = {"trainer": trainer, "model": model, "optimizer": optimizer}
        checkpoint = ice.Checkpoint(to_save, folder).attach(trainer, Events.ITERATION_COMPLETED(once=3))
        if name == "again":
            checkpoint.resume(trainer)
        found.append(trainer.state.iteration)
        trainer.run(data, max_epochs=1)
        found.append([local_part(p).tolist() for p in model.parameters()])
    return found


def test_one_process_with_a_sharded_model_goes_on_inside_of_a_window(tmp_path):
    (found,) = launch(_alone_inside_a_window, 1, str(tmp_path))
    began, whole, began_again, again = found
    assert (began, began_again) == (0, 3)
    assert again == whole


def _stopped_by_one(folder: str) -> list[Any]:
    found: list[Any] = [Training(f"{folder}/whole").run()[1]]
    step = ice.OptimizerEvents.OPTIMIZER_STEP_COMPLETED
    events = {"step": step, "epoch": Events.EPOCH_COMPLETED, "iteration": Events.ITERATION_COMPLETED(every=2)}
    # An epoch has 7 micro-batches: windows of 3, 3 and 1.
    for (name, event), at, who, known in itertools.product(events.items(), (5, 7, 13, 14, 21), (0, 1), (True, False)):
        case = f"{name}, {at}, {who}, {known}"
        first = Training(f"{folder}/{case}")
        first.checkpoint.attach(first.trainer, event)
        ended: list[int] = []
        first.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda e, ended=ended: ended.append(e.state.epoch))
        if dist.get_rank() == who:
            first.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=at), first.trainer.terminate)
        if not known:
            first.data = Unsized(first.data)
        steps = first.run()[2]
        dist.barrier()
        files = sorted(int(path.stem.split("_")[1]) for path in Path(folder, case).glob("*.pt"))
        second = Training(f"{folder}/{case}")
        second.checkpoint.resume(second.trainer)
        began = second.optimizer.clocks["step"]
        parameters = second.run()[1]
        found.append((case, steps, ended, files, began, parameters))
        dist.barrier()
    return found


def test_a_rank_that_stops_anywhere_stops_all_and_the_last_save_is_taken(tmp_path):
    (whole, *found), (_, *others) = launch(_stopped_by_one, 2, str(tmp_path))
    for first, second in zip(found, others, strict=True):
        case, steps, ended, files, began, parameters = first
        name, at, _, known = case.split(", ")
        assert second[:2] == (case, steps)
        assert steps == {"5": 2, "7": 3, "13": 5, "14": 6, "21": 9}[at], case
        if known == "True":
            assert ended == second[2] == [*range(1, 1 + (int(at) - 1) // 7)], case
        if name == "step":
            assert files == [*range(1, steps + 1)], case
            assert began == steps, case
        assert parameters == second[-1], case
        if name != "epoch" and known == "True" and at in {"7", "14"}:
            assert parameters == whole, case  # to the bit, as if it had never stopped


def _stopped_where_it_is_due(folder: str) -> list[Any]:
    first = Training(folder)
    first.checkpoint.attach(first.trainer, Events.ITERATION_COMPLETED(every=3))
    if dist.get_rank() == 1:
        first.trainer.add_event_handler(Events.ITERATION_STARTED(once=3), first.trainer.terminate)
    steps = first.run()[2]
    dist.barrier()
    second = Training(folder)
    second.checkpoint.resume(second.trainer)
    began = second.optimizer.clocks["step"]
    return [steps, began, second.run()[1:]]


def test_who_stops_in_the_micro_batch_of_a_save_keeps_nobody_waiting_for_it(tmp_path):
    first, second = launch(_stopped_where_it_is_due, 2, str(tmp_path), timeout=60)
    assert first == second
    assert first[:2] == [2, 2]  # its window, and what others had of the next one; saved where the run ended


def _uneven(folder: str, how: str, by_step: bool) -> list[Any]:
    def made(name: str) -> Training:
        training = Training(f"{folder}/{name}")
        sizes = (2, 1, 2, 2, 1, 2, 1)[: 7 if dist.get_rank() == 0 or how == "terminate_epoch()" else 5]
        torch.manual_seed(7 + dist.get_rank())
        data = [(torch.randn(size, 6), torch.randint(3, (size,))) for size in sizes]
        training.data = Unsized(data) if how == "unknown" else data

        def stop(engine: Engine) -> None:
            if engine.state.batch is data[4]:
                engine.terminate_epoch()

        if how == "terminate_epoch()" and dist.get_rank() == 1:
            training.trainer.add_event_handler(Events.ITERATION_COMPLETED, stop)
        return training

    first = made("run")
    event = STEP if by_step else Events.ITERATION_COMPLETED(every=2)
    first.checkpoint.attach(first.trainer, event)
    whole = [*first.run(), first.trainer.state.epoch, first.trainer.state.iteration]
    dist.barrier()
    found = []
    for file in sorted(Path(folder, "run").iterdir()):
        second = made("run")
        second.checkpoint._find = functools.partial(_only, file.name)
        second.checkpoint.resume(second.trainer)
        began, at = second.optimizer.clocks["step"], second.trainer.state.iteration
        if began < whole[2]:  # else it starts over
            losses, *rest = [*second.run(), second.trainer.state.epoch, second.trainer.state.iteration]
            found.append((began, rest == whole[1:] and losses == whole[0][at:]))
        else:
            found.append((began, True))
        dist.barrier()
    return found


@pytest.mark.parametrize("by_step", [True, False])
@pytest.mark.parametrize("how", ["known", "unknown", "terminate_epoch()"])
def test_a_run_whose_ranks_have_different_numbers_of_micro_batches_goes_on_from_each_save(tmp_path, how, by_step):
    first, second = launch(_uneven, 2, str(tmp_path), how, by_step)
    assert first == second
    assert all(same for _, same in first), first
    began = {step for step, _ in first}
    # Asked for in every second micro-batch, they are taken where the next window closes of which all have heard.
    assert began == {*range(1, 10)} if by_step else len(began) >= 6, first


def _cut_short(folder: str, at: int, every: int, batches: int, **settings: Any) -> list[Any]:
    """Rank 1 ends an epoch after iteration *at*."""
    model = DistributedDataParallel(torch.nn.Linear(1, 1))
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1), **settings)
    trainer = Engine(lambda _, batch: optimizer.backward(model(batch).sum()))
    optimizer.attach(trainer, model=model)
    if dist.get_rank() == 1:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=at), lambda engine: engine.terminate_epoch())
    checkpoint = ice.Checkpoint({"trainer": trainer, "model": model, "optimizer": optimizer}, folder, n_saved=None)
    checkpoint.attach(trainer, Events.ITERATION_COMPLETED(every=every))
    trainer.run([torch.ones(1, 1)] * batches, max_epochs=3)
    dist.barrier()
    saved = sorted(int(file.stem.removeprefix("checkpoint_")) for file in Path(folder).iterdir())
    return [saved, trainer.state.iteration, optimizer.clocks["step"]]


def test_ranks_that_count_iterations_apart_save_together(tmp_path):
    first, second = launch(functools.partial(_cut_short, at=4, every=3, batches=6), 2, str(tmp_path), timeout=60)
    # From the second epoch on, rank 1 asks a micro-batch before rank 0: saved where both have heard, once.
    assert (first, second) == ([[3, 6, 9, 12, 15, 18], 18, 18], [[3, 6, 9, 12, 15, 18], 16, 18])


def test_a_save_that_an_epochs_last_micro_batch_asks_for_waits_for_a_rank_that_is_through(tmp_path):
    cut = functools.partial(_cut_short, at=20, every=7, batches=7, accumulation_steps=2, tail="drop")
    assert launch(cut, 2, str(tmp_path), timeout=60) == [[[7, 14, 21], 21, 9], [[7, 14, 21], 20, 9]]


def _stopped_before_its_data(folder: str) -> list[Any]:
    training = Training(folder)
    training.checkpoint.attach(training.trainer, training.optimizer.event("STEP_COMPLETED"))
    if dist.get_rank() == 1:
        training.trainer.add_event_handler(Events.EPOCH_STARTED, lambda engine: engine.terminate())
    training.run()
    return [training.optimizer.clocks["step"], [file.name for file in Path(folder).iterdir()]]


def test_a_rank_that_stops_before_its_first_micro_batch_saves_with_the_others(tmp_path):
    assert launch(_stopped_before_its_data, 2, str(tmp_path), timeout=60) == [[1, ["checkpoint_1.pt"]]] * 2


def _counted(folder: str, resumed: bool) -> list[Any]:
    """Rank 0 has 8 micro-batches an epoch, and rank 1 has 3; windows close at 2, 4, 6, 8, ... of rank 0."""
    model = DistributedDataParallel(torch.nn.Linear(1, 1))
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1), accumulation_steps=2)
    trainer = Engine(lambda _, batch: optimizer.backward(model(batch).sum()))
    optimizer.attach(trainer, model=model)
    to_save = {"trainer": trainer, "model": model, "optimizer": optimizer}
    checkpoint = ice.Checkpoint(to_save, folder).attach(trainer, STEP(once=3))
    if resumed:
        checkpoint.resume(trainer)
    counted: list[Any] = [optimizer.clocks["iteration"]]
    trainer.add_event_handler(STEP, lambda engine: counted.append(engine.state.optimizer_record.iteration))
    trainer.run([torch.ones(1, 1)] * (3 if dist.get_rank() else 8), max_epochs=2)
    return [*counted, optimizer.clocks["iteration"]]


def test_each_rank_goes_on_with_its_own_count_of_iterations(tmp_path):
    first, second = launch(_counted, 2, str(tmp_path), False)
    assert (first, second) == ([0, 2, 4, 6, 8, 10, 12, 14, 16, 16], [0, 2, 3, 3, 3, 5, 6, 6, 6, 6])
    assert launch(_counted, 2, str(tmp_path), True) == [first[3:], second[3:]]


def _preempted(folder: str) -> None:
    training = Training(folder)
    if dist.get_rank() == 1:
        training.trainer.add_event_handler(
            Events.ITERATION_STARTED(once=8), lambda: os.kill(os.getpid(), signal.SIGTERM)
        )
    training.run()


def test_a_signal_to_one_rank_lets_all_save_the_same_step_and_end(tmp_path):
    outcomes = watch(_preempted, 2, str(tmp_path), timeout=60)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_10.pt"]
    assert all("Preempted" in outcome.error for outcome in outcomes)


def _alone(folder: str) -> None:
    training = Training(folder)
    if dist.get_rank() == 1:
        training.checkpoint.attach(training.trainer, Events.ITERATION_COMPLETED(every=3))
    training.run()


def test_a_checkpoint_on_one_rank_only_is_named(tmp_path):
    outcomes = watch(_alone, 2, str(tmp_path), timeout=60)
    assert "rank 0" in outcomes[0].error
    assert any("checkpoint" in outcome.error for outcome in outcomes), outcomes


def _full(folder: str) -> None:
    training = Training(folder)
    training.checkpoint.attach(training.trainer, Events.ITERATION_COMPLETED(every=3))
    if dist.get_rank() == 0:
        Path(folder).rmdir()
    try:
        training.run()
    except CheckpointError as error:
        raise RuntimeError from error


def test_a_folder_that_vanishes_stops_all_ranks(tmp_path):
    outcomes = watch(_full, 2, str(tmp_path / "run"), timeout=60)
    assert "cannot be written" in outcomes[0].error
    assert "rank 0 raised" in outcomes[1].error


def _files_at_the_end(folder: str, saved_on: Events) -> list[bool]:
    training = Training(folder)
    large = torch.nn.Linear(3000, 3000)  # takes its time to be written
    to_save = {"trainer": training.trainer, "model": training.model, "optimizer": training.optimizer, "large": large}
    checkpoint = ice.Checkpoint(to_save, folder, "large")
    checkpoint.attach(training.trainer, saved_on)
    there = []

    def look() -> None:
        there.append(Path(str(checkpoint.last_checkpoint)).exists())

    if saved_on is Events.EPOCH_COMPLETED:
        training.trainer.add_event_handler(Events.COMPLETED, look)
    training.run()
    look()
    return there


@pytest.mark.parametrize("saved_on", [Events.EPOCH_COMPLETED, Events.COMPLETED])
def test_a_file_is_there_for_every_rank_when_the_run_ends(tmp_path, saved_on):
    for there in launch(_files_at_the_end, 2, str(tmp_path), saved_on):
        assert there
        assert all(there)
