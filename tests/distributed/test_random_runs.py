"""Runs drawn at random, saved, stopped and resumed: whatever each rank has, what goes on is the run that never stopped.

Each case is a seed, and fails with what was drawn. The oracle of a resumed run is one that was never stopped.
"""

import functools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch.nn.parallel import DistributedDataParallel

import ice_engine as ice
from tests.distributed.launch import launch
from tests.unsized import Unsized

pytestmark = pytest.mark.distributed

STEP = ice.OptimizerEvents.OPTIMIZER_STEP_COMPLETED
PLACES = {
    "iteration started": Events.ITERATION_STARTED,
    "iteration": Events.ITERATION_COMPLETED,
    "step": STEP,
    "epoch": Events.EPOCH_COMPLETED,
}


@dataclass(frozen=True)
class Case:
    """What was drawn from *seed*."""

    seed: int
    lengths: list[int]
    known: bool
    epochs: int
    steps: int
    tail: Any
    weighted: bool
    sharding: Any
    saves: str
    every: int
    stop: str
    where: str
    at: int
    who: set[int]
    buffers: bool
    view: bool
    scaled: bool
    passed_over: list[tuple[int, int]]

    @classmethod
    def of(cls, seed: int, world: int) -> "Case":
        draw = random.Random(seed)  # noqa: S311 - the same for everybody
        known, epochs = draw.random() < 0.5, draw.randint(1, 3)
        lengths = [draw.randint(known, 6) for _ in range(world)]
        lengths = [max(lengths)] * world if draw.random() < 0.3 or not any(lengths) else lengths
        return cls(
            seed=seed,
            lengths=[length or known for length in lengths],
            known=known,
            epochs=epochs,
            steps=draw.randint(1, 4),
            tail=draw.choice(["step", "carry", "drop"]),
            weighted=draw.random() < 0.5,
            sharding=draw.choice([None, "zero1"]),
            saves=draw.choice(["step", "step", "iteration", "epoch"]),
            every=draw.randint(1, 3),
            stop=draw.choice(["terminate", "terminate", "terminate_epoch"]),
            where=draw.choice([*PLACES]),
            at=draw.randint(1, max(lengths) * epochs or 1),
            who=draw.choice([{*range(world)}, {draw.randrange(world)}]),
            buffers=draw.random() < 0.5,
            view=draw.random() < 0.5,
            scaled=draw.random() < 0.3,
            passed_over=[(draw.randrange(world), draw.randint(1, 12)) for _ in range(draw.choice([0, 0, 1, 3]))],
        )


class Training:
    """Dropout that differs between ranks, and micro-batches of two or three samples."""

    def __init__(self, case: Case, folder: Path, *, stops: bool) -> None:
        torch.manual_seed(0)
        # A bias before it has no gradient but what is rounded, which AdamW makes large.
        first = torch.nn.Linear(6, 8, bias=not case.buffers)
        between = [torch.nn.BatchNorm1d(8)] if case.buffers else []
        model = torch.nn.Sequential(first, *between, torch.nn.Dropout(0.5), torch.nn.Linear(8, 3))
        torch.manual_seed(100 + dist.get_rank())
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=case.view)
        factory = functools.partial(torch.optim.AdamW, lr=0.05)
        self.optimizer = ice.Optimizer(
            factory,
            ddp.parameters(),
            accumulation_steps=case.steps,
            tail=case.tail,
            clip=ice.clip_norm(1.0),
            grad_scaler=torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2) if case.scaled else None,
            sharding=case.sharding,
        )

        def step(engine: Engine, batch: Any) -> None:
            if (dist.get_rank(), engine.state.iteration) in case.passed_over:
                return
            loss = torch.nn.functional.cross_entropy(ddp(batch[0]), batch[1])
            self.optimizer.backward(loss, len(batch[1]) if case.weighted else None)

        self.model, self.case, self.trainer = model, case, Engine(step)
        self.optimizer.attach(self.trainer, model=ddp)
        generator = torch.Generator().manual_seed(7 + dist.get_rank())
        length = case.lengths[dist.get_rank()]
        draw = functools.partial(torch.randn, generator=generator)
        data = [(draw(2 + i % 2, 6), torch.arange(i, i + 2 + i % 2) % 3) for i in range(length)]
        self.data = data if case.known else Unsized(data)
        to_save = {"trainer": self.trainer, "model": ddp, "optimizer": self.optimizer}
        self.checkpoint = ice.Checkpoint(to_save, folder, n_saved=None)
        event = Events.ITERATION_COMPLETED(every=case.every) if case.saves == "iteration" else PLACES[case.saves]
        self.checkpoint.attach(self.trainer, event)
        if dist.get_rank() in case.who and (stops or case.stop == "terminate_epoch"):
            self.trainer.add_event_handler(PLACES[case.where], self._stop)

    def _stop(self, engine: Engine) -> None:
        counted = {"step": "optimizer_step", "epoch": "epoch"}.get(self.case.where, "iteration")
        if getattr(engine.state, counted) == self.case.at:
            getattr(engine, self.case.stop)()

    def run(self) -> list[float]:
        self.trainer.run(self.data, max_epochs=self.case.epochs)
        dist.barrier()
        return [number for p in self.model.parameters() for number in p.detach().flatten().tolist()]


def _resumed(case: Case, file: Path) -> list[float] | None:
    """Return what a training comes to that goes on from *file*; None if it was at its end."""
    training = Training(case, file.parent, stops=False)
    number = int(file.stem.split("_")[1])
    training.checkpoint._find = lambda _: [ice.Checkpoint.Item(number, file.name)]
    torch.manual_seed(999)
    training.checkpoint.resume(training.trainer)
    return training.run() if training.trainer.state.epoch < case.epochs else None


def _cases(folder: str, seeds: list[int]) -> dict[str, tuple[list[str], Any]]:
    """Return, for each case, what is wrong on this rank, and what must be the same on all."""
    found = {}
    for seed in seeds:
        case = Case.of(seed, dist.get_world_size())
        wrong, same = [], []
        whole = Training(case, Path(folder, f"whole {seed}"), stops=False).run()
        for file in sorted(Path(folder, f"whole {seed}").iterdir()):
            end = _resumed(case, file)
            if end is not None and not _equal(end, whole):
                wrong.append(f"{file.name} of the run that was never stopped comes to something else")
            same.append(end)
        if case.stop == "terminate":
            training = Training(case, Path(folder, f"stopped {seed}"), stops=True)
            same.append(training.run())
            files = sorted(Path(folder, f"stopped {seed}").iterdir())
            steps = {f"checkpoint_{step}.pt" for step in range(1, training.optimizer.clocks["step"] + 1)}
            if case.saves == "step" and {file.name for file in files} != steps:
                wrong.append(f"of steps {sorted(steps)}, saved are {[file.name for file in files]}")
            same += [_resumed(case, file) for file in files]
        found[str(case)] = wrong, same
    return found


def _equal(one: list[float], other: list[float]) -> bool:
    # From three ranks on, DDP may round its first reduction in another order than those after it.
    tolerance = 0.0 if dist.get_world_size() == 2 else 1e-5
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) <= tolerance


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("world", "seeds"), [(2, [*range(30), 45, 57, 96, 138, 189, 278, 344]), (3, [*range(10), 13])])
def test_whatever_was_drawn_goes_on_from_wherever_it_was_saved(tmp_path, world, seeds):
    first, *others = launch(_cases, world, str(tmp_path), seeds, timeout=280)
    assert {case: wrong for case, (wrong, _) in first.items() if wrong} == {}
    for other in others:
        assert [case for case in first if first[case][1] != other[case][1]] == []
