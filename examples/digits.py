"""Train a small CNN on scikit-learn's 1,797 handwritten digits, with everything that belongs to a real run.

Ignite runs the loop and the validation; the optimizer steps itself, once per window of micro-batches. All of it is
here: accumulation with a short last window, a loss scale, autocast, clipping, a schedule, a processor on an event,
an average of the weights, early stopping, checkpoints, TensorBoard, and a picture at the end.
"""

import functools
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
import tyro
from ignite.engine import Engine, Events, create_supervised_evaluator
from ignite.handlers import EarlyStopping, EMAHandler, ProgressBar, global_step_from_engine
from ignite.metrics import Accuracy, Loss
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional
from torch.utils.data import DataLoader, Subset, TensorDataset

import ice_engine as ice

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Config:
    """What a run is made of."""

    epochs: int = 20
    """Epochs of the whole run; the schedule spans them all, also when a resumed run gets more of them."""
    batch_size: int = 32
    """Digits in a micro-batch."""
    accumulation_steps: int = 4
    """Micro-batches in a window; the last window of an epoch is shorter."""
    lr: float = 4e-3
    """Learning rate at the top of the schedule."""
    weight_decay: float = 0.05
    """AdamW's weight decay."""
    warmup: int = 24
    """Steps until the learning rate is at its top."""
    clip: float = 1.0
    """Largest gradient norm."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Type that autocast computes in; on a CPU, fp16 is about ten times slower."""
    patience: int = 6
    """Epochs without a better validation loss after which training stops."""
    seed: int = 0
    """Seed of the weights, the split and the order of the digits."""
    out: Path = Path("runs/digits")
    """Folder for checkpoints, TensorBoard's files and the picture; a fresh run replaces the one that is there."""
    resume: bool = False
    """Go on from the last checkpoint in that folder."""


@ice.dictprocess
def smooth(loss, smoothed=None, keep=0.9):
    """Return the running mean of the loss."""
    return loss if smoothed is None else keep * smoothed + (1 - keep) * loss


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
        torch.nn.Dropout(0.4),
        torch.nn.Linear(32 * 4 * 4, 10),
    )


def digits(config: Config) -> tuple[DataLoader, DataLoader]:
    """Return the training digits in micro-batches, and the 360 held-out ones."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    train, held_out = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=config.seed)
    dataset = TensorDataset(images, torch.tensor(labels))
    return (
        DataLoader(Subset(dataset, train), config.batch_size, shuffle=True),
        DataLoader(Subset(dataset, held_out), len(held_out)),
    )


def loss_fn(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy, in full precision whatever autocast made of the logits."""
    return functional.cross_entropy(logits.float(), labels)


def train(config: Config) -> None:
    """Train until the last epoch or until validation gets no better."""
    torch.set_num_threads(1)  # for so small a network, a second thread costs more than it brings
    torch.manual_seed(config.seed)
    model = cnn()
    train_loader, held_out_loader = digits(config)

    optimizer = ice.Optimizer(
        functools.partial(torch.optim.AdamW, lr=config.lr, weight_decay=config.weight_decay),
        model.named_parameters(),
        accumulation_steps=config.accumulation_steps,
        clip=ice.clip_norm(config.clip),
        grad_scaler=torch.amp.GradScaler("cpu"),
        processors=[ice.schedules.warmup(steps=config.warmup) * ice.schedules.cosine()],
        on_change="replan",  # more --epochs for a resumed run: the cosine spans them all
    )
    trainer = ice.create_trainer(model, optimizer, loss_fn, autocast=AUTOCAST[config.precision])

    # The average moves when the weights do: once per step, not once per micro-batch, and not on a skipped step.
    average = EMAHandler(model, momentum=0.1)
    average.attach(trainer, event=ice.OptimizerEvents.OPTIMIZER_STEP_COMPLETED)
    # On an event, a processor reads and writes engine.state.
    optimizer.hooks.add(Events.ITERATION_COMPLETED, smooth(loss="output", dst="smoothed"))
    trainer.state_dict_user_keys.append("smoothed")  # so that it is saved and resumed
    progress = ProgressBar(disable=None)  # None: only on a terminal
    progress.attach(trainer, state_attributes=["smoothed"])

    metrics = {"accuracy": Accuracy(), "loss": Loss(functional.cross_entropy)}
    evaluator = create_supervised_evaluator(average.ema_model, metrics)
    stopping = EarlyStopping(config.patience, lambda engine: -engine.state.metrics["loss"], trainer)
    evaluator.add_event_handler(Events.COMPLETED, stopping)

    @trainer.on(Events.EPOCH_STARTED)
    def seed(engine: Engine) -> None:
        # So a resumed run shuffles and drops out as it would have done, and gives the same numbers.
        torch.manual_seed(config.seed + engine.state.epoch)

    @trainer.on(Events.EPOCH_COMPLETED)
    def validate(engine: Engine) -> None:
        measured = evaluator.run(held_out_loader).metrics
        progress.log_message(
            f"epoch {engine.state.epoch:3}   step {engine.state.optimizer_step:4}   loss {engine.state.smoothed:.4f}   "
            f"held-out loss {measured['loss']:.4f}   accuracy {measured['accuracy']:.4f}"
        )

    ice.TensorBoard(config.out / "tensorboard").attach(trainer, optimizer, evaluators={"validation": evaluator})
    saved = {"trainer": trainer, "model": model, "optimizer": optimizer, "average": average.ema_model, "stop": stopping}
    by_epoch = global_step_from_engine(trainer)
    checkpoint = ice.Checkpoint(
        saved, config.out / "checkpoints", "digits", n_saved=2, global_step_transform=by_epoch
    ).attach(trainer)

    if not config.resume:
        for file in [*config.out.glob("checkpoints/digits_*.pt"), *config.out.glob("tensorboard/events.out.*")]:
            file.unlink()
    elif file := checkpoint.resume(trainer):
        print(f"resumed from {file}: epoch {trainer.state.epoch}, step {optimizer.clocks['step']}")
        if trainer.state.epoch >= config.epochs or stopping.counter >= config.patience:
            print("this run was complete; --epochs or --patience let it go on")
            return
    else:
        print(f"no checkpoint in {config.out / 'checkpoints'}: starting at epoch 1")

    started = time.perf_counter()
    trainer.run(train_loader, max_epochs=config.epochs)
    print(f"trained {trainer.state.epoch} of {config.epochs} epochs; this took {time.perf_counter() - started:.1f} s")


def read_scalars(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Return the steps and values of every tag in TensorBoard's files."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    series = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    return {tag: ([e.step for e in scalars], [e.value for e in scalars]) for tag, scalars in series.items()}


def draw(scalars: dict[str, tuple[list[int], list[float]]], file: Path) -> None:
    """Draw the learning rate above the losses, over the optimizer's steps."""
    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
    with mpl.rc_context({**style, "font.size": 9, "axes.axisbelow": True}):
        figure, (above, below) = plt.subplots(
            2, sharex=True, figsize=(7, 4.2), height_ratios=[1, 2], layout="constrained"
        )
        above.plot(*scalars["optimizer/lr/group_0"], color="tab:orange", linewidth=2)
        above.set(ylabel="learning rate", ylim=(0, None))
        steps, losses = scalars["training/loss"]
        mean = list(itertools.accumulate(losses, lambda mean, loss: smooth.function(loss, mean)))
        below.plot(steps, losses, color="tab:blue", linewidth=0.6, alpha=0.35)
        below.plot(steps, mean, color="tab:blue", linewidth=2, label="training, running mean")
        below.plot(*scalars["validation/loss"], "o-", color="black", markersize=3, label="held out, averaged weights")
        below.set(xlabel="optimizer step", ylabel="cross entropy", yscale="log")
        below.margins(x=0.01)
        below.legend(frameon=False)
        accuracy = scalars["validation/accuracy"][1][-1]
        above.set_title(f"1,797 digits: held-out accuracy {accuracy:.4f}", loc="left", fontsize=10)
        figure.savefig(file, dpi=120)
        plt.close(figure)


def main() -> None:
    """Train, then show what TensorBoard shows."""
    mpl.use("Agg")  # a file, never a window
    config = tyro.cli(Config, description=__doc__)
    train(config)
    scalars = read_scalars(config.out / "tensorboard")
    picture = config.out / "digits.png"
    draw(scalars, picture)
    step = scalars["validation/accuracy"][0][-1]
    print(f"""
held-out accuracy  {scalars["validation/accuracy"][1][-1]:.4f} of 360 digits, after {step} steps
skipped steps      {scalars["optimizer/skipped"][1][-1]:.0f}
picture            {picture}
curves             tensorboard --logdir {config.out / "tensorboard"}""")


if __name__ == "__main__":
    main()
