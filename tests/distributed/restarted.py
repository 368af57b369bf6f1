"""A training that may be killed and started again, by any number of ranks: torchrun's part is to do so.

    torchrun --standalone --nproc-per-node 3 --max-restarts 2 tests/distributed/restarted.py FOLDER

Every start notes in ``FOLDER/curve`` the loss over all ranks of each step that it takes, and the last one leaves what
was trained in ``FOLDER/end.pt``. What varies comes from the environment: ``NOISE=1`` for dropout and batch norm, so
that ranks draw and normalise each for itself, ``SLOW=seconds`` for the time that each step takes at least, and
``KILL=rank:iteration:delay`` for a SIGKILL in the first start, so many seconds after that iteration began.
"""

import functools
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import ice_engine as ice

EPOCHS, ITEMS, BATCH = 3, 72, 12  # six steps an epoch
MICRO_BATCH = 2  # so that both two and three ranks make a batch of whole micro-batches


class Network(torch.nn.Module):
    """Its parameters are not in the order in which they get gradients, and fill several of DDP's buckets."""

    def __init__(self, *, noise: bool) -> None:
        super().__init__()
        self.last = torch.nn.Linear(200, 3)
        self.first = torch.nn.Linear(6, 200)
        self.middle = torch.nn.Linear(200, 200)
        self.noise = torch.nn.Sequential(torch.nn.BatchNorm1d(200), torch.nn.Dropout(0.3)) if noise else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.middle(self.first(x).tanh()).tanh()
        return self.last(hidden if self.noise is None else self.noise(hidden))


class Training:
    """One start of it."""

    def __init__(self, folder: Path, *, noise: bool = False) -> None:
        self.folder = folder
        torch.manual_seed(0)
        inputs, labels = torch.randn(ITEMS, 6), torch.randint(3, (ITEMS,))
        self.model = DistributedDataParallel(Network(noise=noise), bucket_cap_mb=0.1)
        torch.manual_seed(dist.get_rank())
        self.optimizer = ice.Optimizer(
            functools.partial(torch.optim.AdamW, lr=0.01),
            self.model.named_parameters(),
            effective_batch_size=BATCH,
            clip=ice.clip_norm(1.0),
            processors=[ice.schedules.cosine(warmup=4)],
        )
        self.loss = torch.zeros(())
        self.trainer = Engine(self._step)
        self.optimizer.attach(self.trainer, model=self.model)
        sampler: DistributedSampler[Any] = DistributedSampler(range(ITEMS))  # type: ignore[arg-type]
        self.loader = DataLoader(TensorDataset(inputs, labels), MICRO_BATCH, sampler=sampler)
        self.trainer.add_event_handler(Events.EPOCH_STARTED, lambda engine: sampler.set_epoch(engine.state.epoch))
        self.trainer.add_event_handler(self.optimizer.event("STEP_COMPLETED"), self._note)
        saved = {"trainer": self.trainer, "model": self.model, "optimizer": self.optimizer}
        self.checkpoint = ice.Checkpoint(saved, folder / "checkpoints", n_saved=None)
        self.checkpoint.attach(self.trainer, self.optimizer.event("STEP_COMPLETED"))

    def _step(self, _: Engine, batch: Any) -> None:
        loss = torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        self.optimizer.backward(loss, weight=len(batch[1]))
        self.loss += loss.detach() * len(batch[1])

    def _note(self) -> None:
        dist.all_reduce(self.loss)
        if dist.get_rank() == 0:
            line = {"step": self.optimizer.clocks["step"], "loss": self.loss.item() / self.optimizer.record.weight}
            with (self.folder / "curve").open("a") as file:
                file.write(json.dumps(line) + "\n")
        self.loss = torch.zeros(())
        time.sleep(float(os.environ.get("SLOW", "0")))

    def run(self) -> None:
        """Go on where the last start was, to the end."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.checkpoint.resume(self.trainer)
        self.trainer.run(self.loader, max_epochs=EPOCHS)
        if dist.get_rank() == 0:
            # Moments, too: they keep a difference that is too small for a parameter to show.
            state = self.optimizer.state_dict()["state"]
            torch.save({**self.model.module.state_dict(), **dict(enumerate(state.values()))}, self.folder / "end.pt")


def _die_later(delay: float) -> None:
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Train until the end or, in the first start, until death."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    training = Training(Path(sys.argv[1]), noise=os.environ.get("NOISE") == "1")
    if (kill := os.environ.get("KILL")) and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        rank, iteration, delay = kill.split(":")
        if int(rank) == dist.get_rank():
            dying = threading.Thread(target=_die_later, args=(float(delay),), daemon=True)
            training.trainer.add_event_handler(Events.ITERATION_STARTED(once=int(iteration)), dying.start)
    training.run()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
