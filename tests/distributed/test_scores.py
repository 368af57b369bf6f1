"""Checkpoints by a score, where every rank has measured another one."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint as IgniteCheckpoint
from ignite.handlers import DiskSaver
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import ice_engine as ice
from ice_engine.errors import NotConsolidatedError
from tests.distributed.launch import launch

pytestmark = pytest.mark.distributed

DATA = [(torch.ones(4, 6), torch.tensor([0, 1, 2, 0]))] * 2


def _trainer(sharding: str | None = None) -> tuple[torch.nn.Module, ice.Optimizer, Engine]:
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(6, 3))

    adam = functools.partial(torch.optim.Adam, lr=0.1)
    optimizer = ice.Optimizer(adam, model.named_parameters(), sharding=sharding)
    return model, optimizer, ice.create_trainer(model, optimizer, torch.nn.functional.cross_entropy)


def _scored(folder: str, own: list[list[float]], *, resumes: bool) -> list[str]:
    model, optimizer, trainer = _trainer()
    scores = iter(own[dist.get_rank()])
    to_save = {"trainer": trainer, "model": model, "optimizer": optimizer}
    checkpoint = ice.Checkpoint(to_save, folder, score_function=lambda _: next(scores), score_name="f1", n_saved=1)
    checkpoint.attach(trainer)
    if resumes:
        checkpoint.resume(trainer)
    trainer.run(DATA, max_epochs=trainer.state.epoch + len(own[0]))
    dist.barrier()
    return sorted(path.name for path in Path(folder).iterdir())


def test_the_score_of_the_rank_that_saves_decides_for_all(tmp_path):
    own = [[0.1, 0.9, 0.2], [0.8, 0.3, float("nan")]]
    assert launch(_first, 2, str(tmp_path), own) == [["checkpoint_f1=0.9000.pt"]] * 2


def _again(folder: str, own: list[list[float]]) -> list[str]:
    return _scored(folder, own, resumes=True)


def test_ranks_that_see_no_folder_know_the_best_score_of_it_after_a_resume(tmp_path):
    launch(_first, 2, str(tmp_path), [[0.9], [0.1]])
    # On rank 0 neither is better than what is there; a rank that did not know would want to save the first.
    assert launch(_again, 2, str(tmp_path), [[0.5, 0.6], [0.5, 0.6]]) == [["checkpoint_f1=0.9000.pt"]] * 2
    assert launch(_again, 2, str(tmp_path), [[0.95], [0.2]]) == [["checkpoint_f1=0.9500.pt"]] * 2


def _first(folder: str, own: list[list[float]]) -> list[str]:
    return _scored(folder, own, resumes=False)


def _by_ignite(folder: str, save_on_rank: int) -> tuple[Any, Path]:
    """Train with ZeRO, and save by Ignite's own Checkpoint, on every rank."""
    model, optimizer, trainer = _trainer("zero1")
    saver = DiskSaver(folder, require_empty=False, save_on_rank=save_on_rank)
    checkpoint = IgniteCheckpoint({"model": model, "optimizer": optimizer}, saver, save_on_rank=save_on_rank)
    trainer.run(DATA, max_epochs=1)
    checkpoint(trainer)
    dist.barrier()
    return (model, optimizer, trainer), Path(folder, str(checkpoint.last_checkpoint))


def _goes_on(folder: str) -> list[Any]:
    (model, optimizer, trainer), file = _by_ignite(folder, save_on_rank=0)
    saved = torch.load(file, weights_only=True)

    # The oracle: torch's own consolidation of the very same optimizer.
    assert isinstance(optimizer.inner, ZeroRedundancyOptimizer)
    optimizer.inner.consolidate_state_dict(to=0)
    whole = optimizer.inner.state_dict()["state"] if dist.get_rank() == 0 else saved["optimizer"]["state"]
    same = [torch.equal(whole[i][key], saved["optimizer"]["state"][i][key]) for i in whole for key in whole[i]]

    # Every rank loads the one file, into ranks that share the state and into a plain optimizer.
    trainer.run(DATA, max_epochs=2)
    goes_on = []
    for sharding in ("zero1", None):
        other, loaded, again = _trainer(sharding)
        IgniteCheckpoint.load_objects({"model": other, "optimizer": loaded}, file)
        again.run(DATA, max_epochs=1)
        goes_on += map(torch.equal, model.parameters(), other.parameters())
    return [len(same), all(same), goes_on]


def test_ignites_own_checkpoint_saves_the_whole_state_of_zero_and_every_rank_goes_on_from_it(tmp_path):
    assert launch(_goes_on, 2, str(tmp_path)) == [[6, True, [True] * 4]] * 2


def _stub(folder: str) -> str:
    (_, optimizer, _), file = _by_ignite(folder, save_on_rank=1)
    try:
        IgniteCheckpoint.load_objects({"optimizer": optimizer}, file)
    except NotConsolidatedError as error:
        return str(error)
    return "loaded"


def test_a_file_of_ignites_own_checkpoint_on_another_rank_than_0_does_not_load_as_if_it_were_whole(tmp_path):
    first, second = launch(_stub, 2, str(tmp_path))
    assert first == second
    assert "the whole state is on rank 0" in first


class _Pair:
    """Two optimizers with windows of 1 and 3, saved by the score of the first one's weights at each of its steps."""

    def __init__(self, folder: str, attached: str, event: str, lengths: list[int]) -> None:
        torch.manual_seed(0)
        self.models = {name: DistributedDataParallel(torch.nn.Linear(6, 1)) for name in ("one", "three")}
        self.optimizers = {
            name: ice.Optimizer(
                torch.optim.AdamW(model.named_parameters(), lr=0.05),
                name=name,
                accumulation_steps=1 if name == "one" else 3,
                processors=[ice.schedules.cosine(total=20, warmup=2)],
            )
            for name, model in self.models.items()
        }

        def train_step(_: Engine, batch: torch.Tensor) -> None:
            for name, model in self.models.items():
                self.optimizers[name].backward((model(batch) - 1.0).square().mean(), weight=len(batch))

        self.trainer = Engine(train_step)
        for name in attached.split():
            self.optimizers[name].attach(self.trainer, model=self.models[name])
        torch.manual_seed(7 + dist.get_rank())
        self.data = [torch.randn(2, 6) for _ in range(lengths[dist.get_rank()])]
        states = {f"{name} optimizer": optimizer for name, optimizer in self.optimizers.items()}
        self.checkpoint = ice.Checkpoint(
            {"trainer": self.trainer, **self.models, **states}, folder, n_saved=None, score_function=self.score
        )
        self.checkpoint.attach(self.trainer, self.optimizers[event].event("STEP_COMPLETED"))

    def score(self, _: Engine) -> float:
        return sum(p.detach().abs().sum().item() for p in self.models["one"].parameters())

    def run(self) -> list[Any]:
        self.trainer.run(self.data, max_epochs=2)
        clocks = [(o.clocks["step"], o.clocks["attempt"]) for o in self.optimizers.values()]
        return [[p.tolist() for model in self.models.values() for p in model.parameters()], clocks]


def _beside(folder: str, attached: str, event: str, lengths: list[int]) -> Any:
    first = _Pair(folder, attached, event, lengths)
    whole = first.run()
    dist.barrier()
    found = []
    for file in sorted(Path(folder).iterdir()):
        second = _Pair(folder, attached, event, lengths)
        second.checkpoint._find = functools.partial(_only, file.name)
        second.checkpoint.resume(second.trainer)
        clocks = [o.clocks["step"] for o in second.optimizers.values()]
        found.append((clocks, clocks == [steps for steps, _ in whole[1]] or second.run() == whole))
        dist.barrier()
    return found


def _only(name: str, _: Path) -> list[Any]:
    return [ice.Checkpoint.Item(0, name)]


@pytest.mark.parametrize("lengths", [[7, 7], [7, 4], [3, 7]])
@pytest.mark.parametrize("event", ["one", "three"])
@pytest.mark.parametrize("attached", ["one three", "three one"])
def test_a_save_by_score_at_a_step_of_one_optimizer_waits_for_the_others_window(tmp_path, attached, event, lengths):
    first, second = launch(_beside, 2, str(tmp_path), attached, event, lengths, timeout=60)
    assert first == second
    assert all(same for _, same in first), first
    # Windows of 3, 3 and 1: what a rank has gathered in an open one is in no file.
    assert sorted(clocks for clocks, _ in first) == [[3, 1], [6, 2], [7, 3], [10, 4], [13, 5], [14, 6]]


def _apart(folder: str) -> list[str]:
    """Rank 1 ends an epoch early, so that the ranks ask for the later saves in different micro-batches."""
    model, optimizer, trainer = _trainer()

    def of_all_ranks(engine: Engine) -> float:
        iteration = torch.tensor(float(engine.state.iteration))
        dist.all_reduce(iteration, dist.ReduceOp.MAX)
        return iteration.item()

    if dist.get_rank() == 1:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=4), lambda engine: engine.terminate_epoch())
    to_save = {"trainer": trainer, "model": model, "optimizer": optimizer}
    checkpoint = ice.Checkpoint(to_save, folder, score_function=of_all_ranks, n_saved=None)
    checkpoint.attach(trainer, Events.ITERATION_COMPLETED(every=3))
    trainer.run(DATA * 3, max_epochs=3)
    dist.barrier()
    return sorted(path.name for path in Path(folder).iterdir())


def test_a_score_over_all_ranks_is_measured_where_all_save_if_they_ask_in_different_micro_batches(tmp_path):
    saved = [f"checkpoint_{iteration:.4f}.pt" for iteration in (12.0, 15.0, 18.0, 3.0, 6.0, 9.0)]
    assert launch(_apart, 2, str(tmp_path), timeout=60) == [saved] * 2
