"""Train on scikit-learn's 1,797 handwritten digits, in one process or in many: the same script.

    python examples/distributed.py
    torchrun --standalone --nproc-per-node 2 examples/distributed.py

Ignite wraps the model in DistributedDataParallel and gives each process its part of the data, where there is more than
one. The optimizer steps once per window, with the mean over the digits of all processes, and each of them keeps its
part of AdamW's state only (ZeRO-1). A run saved by any number of them goes on with any other: add --resume.
"""

import functools
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from ignite import distributed as idist
from ignite.engine import Engine, Events, create_supervised_evaluator
from ignite.handlers import global_step_from_engine
from ignite.metrics import Accuracy
from sklearn.datasets import load_digits
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

import ice_engine as ice

HELD_OUT = 360  # digits, the last ones


@dataclass(frozen=True)
class Config:
    """What a run is made of."""

    epochs: int = 12
    """Epochs of the whole run; the schedule spans them all, also when a resumed run gets more of them."""
    batch_size: int = 32
    """Digits in a micro-batch of all processes together."""
    accumulation_steps: int = 4
    """Micro-batches in a window; the last window of an epoch is shorter."""
    lr: float = 4e-3
    """Learning rate at the top of the schedule."""
    seed: int = 0
    """Seed of the weights and the order of the digits."""
    out: Path = Path("runs/distributed")
    """Folder for checkpoints, the same for all processes; a fresh run replaces those that are there."""
    resume: bool = False
    """Go on from the last checkpoint in that folder, if there is one."""


def say(line: str) -> None:
    """Print a line once, however many processes there are."""
    if idist.get_rank() == 0:
        print(line, flush=True)


def cnn() -> torch.nn.Module:
    """Return a network of 42,410 parameters for images of shape (1, 8, 8)."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 32, 3, padding=1),
        torch.nn.GELU(),
        torch.nn.Conv2d(32, 64, 3, padding=1, stride=2),
        torch.nn.GELU(),
        torch.nn.Conv2d(64, 32, 3, padding=1),
        torch.nn.GELU(),
        torch.nn.Flatten(),
        torch.nn.Linear(32 * 4 * 4, 10),
    )


def digits(config: Config) -> tuple[DataLoader, DataLoader]:
    """Return this process's part of the training digits, and of the held-out ones."""
    images, labels = load_digits(return_X_y=True)
    dataset = TensorDataset(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels))
    train = Subset(dataset, range(len(dataset) - HELD_OUT))
    # Each held-out digit in exactly one process; a sampler would fill up with some of them twice.
    mine = range(len(train) + idist.get_rank(), len(dataset), idist.get_world_size())
    return (
        idist.auto_dataloader(train, batch_size=config.batch_size, shuffle=True),
        DataLoader(Subset(dataset, mine), HELD_OUT),
    )


def train(_: int, config: Config) -> None:
    """Train until the last epoch; every process runs this."""
    torch.set_num_threads(1)  # for so small a network, a second thread costs more than it brings
    torch.manual_seed(config.seed)
    model = idist.auto_model(cnn())
    train_loader, held_out_loader = digits(config)

    optimizer = ice.Optimizer(
        functools.partial(torch.optim.AdamW, lr=config.lr, weight_decay=0.05),
        model.named_parameters(),
        accumulation_steps=config.accumulation_steps,
        clip=ice.clip_norm(1.0),
        processors=[ice.schedules.cosine(warmup=24)],
        sharding="zero1",
        on_change="replan",  # more --epochs for a resumed run: the cosine spans them all
    )
    trainer = ice.create_trainer(model, optimizer, functional.cross_entropy, device=idist.device())
    evaluator = create_supervised_evaluator(model, {"accuracy": Accuracy()}, device=idist.device())

    @trainer.on(Events.EPOCH_STARTED)
    def shuffle(engine: Engine) -> None:
        # So a resumed run shuffles as it would have done, and gives the same numbers.
        torch.manual_seed(config.seed + engine.state.epoch)
        if isinstance(train_loader.sampler, DistributedSampler):
            train_loader.sampler.set_epoch(config.seed + engine.state.epoch)

    @trainer.on(Events.EPOCH_COMPLETED)
    def validate(engine: Engine) -> None:
        accuracy = evaluator.run(held_out_loader).metrics["accuracy"]
        step, loss = engine.state.optimizer_step, engine.state.output
        say(f"epoch {engine.state.epoch:3}   step {step:4}   loss {loss:.4f}   accuracy {accuracy:.4f}")

    saved = {"trainer": trainer, "model": model, "optimizer": optimizer}
    by_epoch = global_step_from_engine(trainer)
    checkpoint = ice.Checkpoint(saved, config.out, "digits", n_saved=2, global_step_transform=by_epoch).attach(trainer)
    if not config.resume:
        if idist.get_rank() == 0:
            for file in config.out.glob("digits_*.pt"):
                file.unlink()
    elif file := checkpoint.resume(trainer):
        say(f"resumed from {file}: epoch {trainer.state.epoch}, step {optimizer.clocks['step']}")
        if trainer.state.epoch >= config.epochs:
            say("this run was complete; --epochs lets it go on")
            return

    started = time.perf_counter()
    trainer.run(train_loader, max_epochs=config.epochs)
    kept = sum(value.numel() for state in optimizer.state.values() for value in state.values())
    say(
        f"\nprocesses          {idist.get_world_size()}, which trained for {time.perf_counter() - started:.1f} s"
        f"\nheld-out accuracy  {evaluator.state.metrics['accuracy']:.4f} of {HELD_OUT} digits, "
        f"after {trainer.state.optimizer_step} steps"
        f"\noptimizer state    {kept:,} numbers in process 0"
    )


def main() -> None:
    """Join the other processes, if torchrun started some, and train."""
    config = tyro.cli(Config, description=__doc__)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    with idist.Parallel(backend if torch.distributed.is_torchelastic_launched() else None) as parallel:
        parallel.run(train, config)


if __name__ == "__main__":
    main()
