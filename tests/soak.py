"""Kill a training process at random moments, resume it, again and again; then compare with a run that was never killed.

    python -m tests.soak --minutes 60

One process, and two ranks of DDP or ZeRO, of which one is killed and the others are told, as torchrun does it. Data is
shuffled, draws from all generators, is loaded with and without workers; there are dropout, windows, fp16 with a loss
scale, an average, metrics, and evaluations in between. At the end the states of all objects, the generators and the
ledger must be those of the run that was never killed, bit for bit; every line that was ever printed must be a line of
that run; each start must go on from the newest file, and none may be lost or damaged.

Torch is imported once: each process is a fork of this one, which starts no thread.
"""

import argparse
import contextlib
import faulthandler
import functools
import itertools
import logging
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # the first optimizer of a process would import it, for seconds
import torch.distributed as dist
from ignite.engine import Engine, Events
from ignite.metrics import Accuracy, RunningAverage
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import ConcatDataset, DataLoader, DistributedSampler

import ice_engine as ice
from ice_engine import random_state
from ice_engine.checkpoint_file import damage
from ice_engine.comparison import compare
from tests.test_resume import Noisy

EPOCHS = 6
PATIENCE = 30.0  # seconds in which a process that was told to end must have


@dataclass(frozen=True)
class Plan:
    """One run.

    Attributes:
        ranks: Processes.
        every: Micro-batches between two checkpoints.
        event: On which it is saved.
        workers: Of the data, for each rank.
        tail: Of an epoch.
        sharding: Of the optimizer.
        background: Whether checkpoints are written beside training.
        n_saved: Checkpoints that are kept.
    """

    ranks: int
    every: int
    event: str
    workers: int
    tail: str
    sharding: str | None
    background: bool
    n_saved: int

    @classmethod
    def drawn(cls, ranks: int, draw: random.Random) -> "Plan":
        return cls(
            ranks=ranks,
            every=draw.choice((1, 2, 5, 9)),
            event=draw.choice(("iteration", "step", "epoch")) if ranks == 1 else "iteration",
            workers=draw.choice((0, 0, 2)) if ranks == 1 else 0,
            tail=draw.choice(("step", "carry", "drop")),
            sharding=draw.choice((None, "zero1")) if ranks > 1 else None,
            background=draw.random() < 0.75,
            n_saved=draw.choice((1, 2)),
        )


class Training:
    """All that a real run has; made anew in every process."""

    def __init__(self, plan: Plan, rank: int, folder: Path) -> None:
        self.folder, self.rank = folder, rank
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(0)
        # The buffers of an average are each rank's own, and what is saved is that of one.
        norm = torch.nn.BatchNorm1d(8) if plan.ranks == 1 else torch.nn.LayerNorm(8)
        layers = torch.nn.Linear(6, 8), norm, torch.nn.Dropout(0.5), torch.nn.Linear(8, 3)
        self.model = torch.nn.Sequential(*layers)
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(rank)
        module = DistributedDataParallel(self.model) if plan.ranks > 1 else self.model
        self.optimizer = ice.Optimizer(
            functools.partial(torch.optim.AdamW, lr=0.02),
            module.named_parameters(),
            accumulation_steps=3,
            tail=plan.tail,
            clip=ice.clip_norm(1.0),
            grad_scaler=torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=4),
            processors=[ice.schedules.cosine(total=200)],
            sharding=plan.sharding,
        )
        self.trainer = ice.create_trainer(
            module,
            self.optimizer,
            torch.nn.functional.cross_entropy,
            autocast=torch.float16,
            output_transform=lambda x, y, out, loss: {"out": out.detach(), "y": y, "loss": loss.item()},
        )
        data = ConcatDataset([Noisy()] * 6)
        sampler = DistributedSampler(data) if plan.ranks > 1 else None
        self.data = DataLoader(data, 4, shuffle=sampler is None, sampler=sampler, num_workers=plan.workers)
        if sampler is not None:
            self.trainer.add_event_handler(Events.EPOCH_STARTED, lambda engine: sampler.set_epoch(engine.state.epoch))
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
        self.trainer.add_event_handler(
            self.optimizer.events.OPTIMIZER_STEP_COMPLETED, lambda: self.average.update_parameters(self.model)
        )
        accuracy = Accuracy(output_transform=lambda out: (out["out"].float(), out["y"]))
        accuracy.attach(self.trainer, "accuracy")
        smooth = RunningAverage(output_transform=lambda out: out["loss"])
        smooth.attach(self.trainer, "smooth")
        self.evaluator = Engine(self.evaluate)
        Accuracy().attach(self.evaluator, "accuracy")
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED(every=11), self.evaluated)
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, self.note)
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, self.note)
        self.to_save = {
            "trainer": self.trainer,
            "model": self.model,
            "optimizer": self.optimizer,
            "average": self.average,
            "accuracy": accuracy,
            "smooth": smooth,
        }
        ice.Ledger(folder / "ledger.jsonl").attach(
            self.trainer, self.optimizer, evaluators={"held out": self.evaluator}
        )

    @torch.no_grad()
    def evaluate(self, _: Engine, batch: Any) -> Any:
        self.average.eval()
        return self.average(batch[0]), batch[1]

    def evaluated(self) -> None:
        metrics = self.evaluator.run(DataLoader(Noisy(), 13, shuffle=True)).metrics
        self.write(f"{self.rank} evaluated {self.trainer.state.iteration} {metrics}\n")

    def note(self, engine: Engine) -> None:
        state = engine.state
        metrics = {name: value for name, value in state.metrics.items() if name == "smooth" or not self.inside}
        line = (
            f"{self.rank} {engine.last_event_name} {state.epoch} {state.iteration} {state.optimizer_step} "
            f"{state.output['loss']!r} {metrics} "
            f"{self.optimizer.param_groups[0]['lr']!r} {self.optimizer.grad_scaler.get_scale()}\n"
        )
        self.write(line)

    def write(self, line: str) -> None:
        with (self.folder / f"log-{self.rank}").open("a") as file:
            file.write(line)

    @property
    def inside(self) -> bool:
        return self.trainer.last_event_name != Events.EPOCH_COMPLETED

    def resume(self, plan: Plan) -> None:
        checkpoint = ice.Checkpoint(
            self.to_save, self.folder / "checkpoints", n_saved=plan.n_saved, background=plan.background
        )
        events = {
            "iteration": Events.ITERATION_COMPLETED(every=plan.every),
            "step": self.optimizer.events.OPTIMIZER_STEP_COMPLETED(every=plan.every),
            "epoch": Events.ITERATION_COMPLETED(every=plan.every) | Events.EPOCH_COMPLETED,
        }
        checkpoint.attach(self.trainer, events[plan.event])
        if self.rank == 0:
            (self.folder / "from").write_text(str(checkpoint.resume(self.trainer)))
        else:
            checkpoint.resume(self.trainer)

    def run(self) -> None:
        at_end = self.trainer.state.epoch == EPOCHS  # killed after its last checkpoint, it would start over
        if not at_end:
            self.trainer.run(self.data, max_epochs=EPOCHS)
        states = {name: saved.state_dict() for name, saved in self.to_save.items()}
        end = {**states, "clocks": self.optimizer.clocks, "random": None if at_end else random_state.capture()}
        torch.save(end, self.folder / f"end-{self.rank}")


def work(plan: Plan, rank: int, folder: Path, store: str, *, whole: bool) -> None:
    """Be one process of a run."""
    if plan.ranks > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(plan.ranks))
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=plan.ranks)
    training = Training(plan, rank, folder)
    if not whole:
        training.resume(plan)
    training.run()
    if plan.ranks > 1:
        dist.barrier()  # what the other one still has to be told


def fork(folder: Path, function: Callable[..., None], *args: Any, **kwargs: Any) -> int:
    """Return the id of a process, and process group, that calls *function*; what it raises goes into *folder*."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        sink = (folder / f"stderr-{os.getpid()}").open("w")
        os.dup2(sink.fileno(), 2)
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR2, all_threads=True)
        function(*args, **kwargs)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 - this process is nothing but the function
        traceback.print_exc()
    finally:
        os._exit(code)


class Ranks:
    """The processes of one start, each with a process group of its own, in which the workers of its data are."""

    def __init__(self, plan: Plan, folder: Path, *, whole: bool = False) -> None:
        store = tempfile.mktemp(dir=folder, prefix="store-")  # noqa: S306 - torch makes it
        self.pids = [fork(folder, work, plan, rank, folder, store, whole=whole) for rank in range(plan.ranks)]
        self.codes: dict[int, int] = {}

    def wait(self, seconds: float) -> bool:
        """Wait until all have ended, but not longer than *seconds*; return whether they have."""
        until = time.monotonic() + seconds
        while True:
            self._reap()
            if len(self.codes) == len(self.pids):
                return True
            if time.monotonic() > until:
                return False
            time.sleep(0.002)

    def _reap(self) -> None:
        for pid in self.pids:
            if pid not in self.codes and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)  # workers that are left
                self.codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def send(self, number: int, pids: list[int]) -> None:
        for pid in pids:
            if pid not in self.codes:
                os.kill(pid, number)

    def end(self) -> bool:
        """Wait until all have; when one was killed, tell the others, as torchrun does. Return whether they did."""
        until = time.monotonic() + PATIENCE
        told = False
        while not self.wait(0.01):
            if time.monotonic() > until:
                self.send(signal.SIGUSR2, self.pids)  # let them say where they are
                time.sleep(1.0)
                self.send(signal.SIGKILL, self.pids)
                self.wait(PATIENCE)
                return False
            if not told and any(code < 0 for code in self.codes.values()):
                told = True
                self.send(signal.SIGTERM, self.pids)
        return True


class Lost(Exception):  # noqa: N818 - what this program is there to find
    """Something that a resumed run has not, or has otherwise."""


def trained(plan: Plan, folder: Path) -> float:
    """Train without a kill or a checkpoint; return how many seconds that took."""
    folder.mkdir(parents=True)
    began = time.monotonic()
    ranks = Ranks(plan, folder, whole=True)
    if not ranks.wait(10 * PATIENCE) or any(ranks.codes.values()):
        ranks.send(signal.SIGKILL, ranks.pids)
        message = f"a run that nobody killed ended with {ranks.codes}\n{said(folder)}"
        raise Lost(message)
    return time.monotonic() - began


def survived(plan: Plan, folder: Path, draw: random.Random, life: float, deadline: float) -> Counter[str]:
    """Train with kills, until the run is at its end; return how many of which kind there were."""
    folder.mkdir(parents=True)
    kills: Counter[str] = Counter()
    while True:
        newest = newest_in(folder)
        (folder / "from").unlink(missing_ok=True)
        ranks = Ranks(plan, folder)
        if not ranks.wait(draw.uniform(0, life) if time.monotonic() < deadline else 10 * PATIENCE):
            kind = draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
            ranks.send(kind, ranks.pids if draw.random() < 0.5 else [draw.choice(ranks.pids)])
            kills[kind.name] += 1
            kills["in a write"] += any(folder.glob("checkpoints/*.part"))
            if not ranks.end():
                message = f"after {kind.name}, not all had ended in {PATIENCE:.0f} s: {ranks.codes}\n{said(folder)}"
                raise Lost(message)
        check_start(folder, newest)
        codes = set(ranks.codes.values())
        if codes == {0}:
            return kills
        if not codes & {-signal.SIGKILL, -signal.SIGTERM, ice.Preempted().code}:
            message = f"nobody killed it, and it ended with {ranks.codes}\n{said(folder)}"
            raise Lost(message)


def newest_in(folder: Path) -> str:
    """Return the newest checkpoint, by its number."""
    files = sorted((folder / "checkpoints").glob("checkpoint_*.pt"), key=lambda file: int(file.stem.split("_")[1]))
    return str(files[-1]) if files else "None"


def check_start(folder: Path, newest: str) -> None:
    """Check that it went on from the newest file, and that all that are there now are whole."""
    begun = folder / "from"
    if begun.exists() and (found := begun.read_text()) not in {newest, ""}:
        message = f"it went on from {found}, and there was {newest}\n{said(folder)}"
        raise Lost(message)
    if newest != "None" and newest_in(folder) == "None":
        message = f"there was {newest}, and now there is no checkpoint"
        raise Lost(message)
    for file in (folder / "checkpoints").glob("*.pt"):
        if problem := damage(file):
            message = f"{file} is damaged: {problem}"
            raise Lost(message)


def said(folder: Path) -> str:
    """Return what the processes of the last start said."""
    files = sorted(folder.glob("stderr-*"), key=lambda file: file.stat().st_mtime)
    return "\n".join(f"--- {file.name}\n{file.read_text()[-4000:]}" for file in files[-2:])


def check_same(plan: Plan, whole: Path, killed: Path) -> None:
    """Check that all of a run that was killed is as in the one that was not."""
    for rank in range(plan.ranks):
        ends = [torch.load(folder / f"end-{rank}", weights_only=True) for folder in (whole, killed)]
        if ends[1]["random"] is None:
            ends[0]["random"] = None
        if found := list(itertools.islice(differences(*ends), 20)):
            message = f"rank {rank} differs in {', '.join(found)}"
            raise Lost(message)
        lines = [set((folder / f"log-{rank}").read_text().splitlines()) for folder in (whole, killed)]
        torn = {line for line in lines[1] - lines[0] if any(one.startswith(line) for one in lines[0])}
        if apart := lines[0] ^ (lines[1] - torn):
            raise Lost(f"rank {rank} printed otherwise:\n" + "\n".join(sorted(apart)[:10]))
    compared = compare(whole / "ledger.jsonl", killed / "ledger.jsonl")
    if not compared.is_same:
        message = f"ledgers differ:\n{compared}"
        raise Lost(message)


def differences(a: Any, b: Any, path: str = "") -> Any:
    """Yield where two states differ."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            yield from differences(a[key], b[key], f"{path}[{key!r}]")
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for index, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from differences(one, other, f"{path}[{index}]")
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if not torch.equal(a, b):
            yield path
    elif type(a) is not type(b) or a != b:
        yield f"{path} ({a!r}, {b!r})"


def soak(minutes: float, seed: int, folder: Path) -> Counter[str]:
    """Soak for so long; return how many runs and kills there were."""
    deadline = time.monotonic() + 60 * minutes
    wholes: dict[Any, tuple[Path, float]] = {}
    counted: Counter[str] = Counter()
    for number in itertools.count():
        if time.monotonic() > deadline:
            return counted
        draw = random.Random(f"{seed} {number}")  # noqa: S311
        plan = Plan.drawn(1 + number % 2, draw)
        kind = plan.ranks, plan.workers, plan.tail, plan.sharding
        if kind not in wholes:
            path = folder / f"whole-{len(wholes)}"
            wholes[kind] = path, trained(plan, path)
        whole, seconds = wholes[kind]
        killed = folder / f"killed-{number}"
        began = time.monotonic()
        try:
            kills = survived(plan, killed, draw, seconds / 3, deadline)
            check_same(plan, whole, killed)
        except Lost as error:
            message = f"{error}\nin {plan}, --seed {seed}, run {number}, see {killed} and {whole}"
            raise Lost(message) from None
        print(f"{number}: {dict(kills)} in {time.monotonic() - began:.1f} s, the same: {plan}", flush=True)
        shutil.rmtree(killed)
        counted += kills + Counter({"runs": 1, f"runs of {plan.ranks}": 1})
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.0, help="after which nothing is killed any more")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of plans and moments")  # noqa: S311
    asked = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("ignite").setLevel(logging.ERROR)
    print(f"--seed {asked.seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    counted = soak(asked.minutes, asked.seed, folder)
    shutil.rmtree(folder)
    total = counted["SIGKILL"] + counted["SIGTERM"]
    print(f"{total} kills, {dict(counted)}: every run is bit for bit the one that was never killed")


if __name__ == "__main__":
    main()
