"""Train a conditional GAN on scikit-learn's 1,797 handwritten digits: two optimizers on one engine.

Each has its own name, and so its own clocks, events, schedule, clipping and records; both share one loss scale. A
classifier that was trained on the real digits then says how many of the drawn ones it reads as what they are to be.
"""

import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler, ProgressBar, global_step_from_engine
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch.nn import functional
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import ice_engine as ice

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Config:
    """What a run is made of."""

    epochs: int = 100
    """Epochs of the whole run, of 28 iterations each."""
    batch_size: int = 64
    """Real digits, and drawn ones, in an iteration."""
    lr: float = 1e-3
    """Learning rate of both optimizers at the top of their schedules."""
    clip: float = 1.0
    """Largest gradient norm of the generator."""
    flatness: float = 1.0
    """Weight of the penalty on the slope of the discriminator's score (R1)."""
    average: float = 0.005
    """Share of the newest weights in the generator's running average, which draws the picture."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """Type that autocast computes in."""
    seed: int = 0
    """Seed of the weights, the noise and the order of the digits."""
    out: Path = Path("runs/gan")
    """Folder for checkpoints, TensorBoard's files and the picture; a run replaces the one that is there."""
    resume: bool = False
    """Go on from the last checkpoint in that folder."""


class Generator(torch.nn.Module):
    """Draws images of shape (1, 8, 8), from 0 to 1, out of noise and a label."""

    noise = 24

    def __init__(self) -> None:
        super().__init__()
        self.label = torch.nn.Embedding(10, 24)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(self.noise + 24, 256),
            torch.nn.LeakyReLU(0.2),
            torch.nn.Linear(256, 256),
            torch.nn.LeakyReLU(0.2),
            torch.nn.Linear(256, 64),
        )

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        """Draw an image for each label."""
        noise = torch.randn(len(labels), self.noise)
        return self.layers(torch.cat([noise, self.label(labels)], 1)).float().sigmoid().view(-1, 1, 8, 8)


class Discriminator(torch.nn.Module):
    """Says how real an image is as one of its label; above 0 if it thinks so."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Flatten(),
            torch.nn.Linear(64, 256),
            torch.nn.LeakyReLU(0.2),
            torch.nn.Linear(256, 256),
            torch.nn.LeakyReLU(0.2),
            torch.nn.Linear(256, 10),
        )

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Score each image."""
        return self.layers(2 * images - 1).float().gather(1, labels[:, None])[:, 0]


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the real images, of shape (1, 8, 8), and their labels."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


def train(config: Config) -> torch.nn.Module:
    """Train both networks and return the average of the generator's weights."""
    torch.set_num_threads(1)  # for so small a network, a second thread costs more than it brings
    torch.manual_seed(config.seed)
    generator, discriminator = Generator(), Discriminator()
    dataset = TensorDataset(*digits())
    batches = BatchSampler(RandomSampler(dataset), config.batch_size, drop_last=True)
    loader = DataLoader(dataset, sampler=batches, batch_size=None)  # a batch at once: the digits are in memory anyway

    adam = functools.partial(torch.optim.Adam, lr=config.lr, betas=(0.5, 0.99), fused=True)
    scaler = torch.amp.GradScaler("cpu")  # one loss scale: it adapts once an iteration, after both have stepped
    draw = ice.Optimizer(
        adam,
        generator.named_parameters(),
        name="generator",
        clip=ice.clip_norm(config.clip),
        grad_scaler=scaler,
        processors=[ice.schedules.linear()],
        on_change="replan",  # more --epochs for a resumed run: the learning rate falls to 0 at its new end
    )
    judge = ice.Optimizer(
        adam,
        discriminator.named_parameters(),
        name="discriminator",
        grad_scaler=scaler,
        processors=[ice.schedules.linear()],
        on_change="replan",
    )

    def train_step(engine: Engine, batch: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
        real, labels = batch
        with torch.autocast("cpu", AUTOCAST[config.precision], enabled=config.precision != "fp32"):
            with judge.toggle(generator):
                real.requires_grad_()
                scores = discriminator(torch.cat([real, generator(labels)]), labels.repeat(2))
                of_real, of_drawn = scores.chunk(2)
                (slope,) = torch.autograd.grad(of_real.sum(), real, create_graph=True)
                steep = slope.square().sum((1, 2, 3)).mean()  # near the real digits, its score is to be flat
                judged = (functional.softplus(-of_real) + functional.softplus(of_drawn)).mean()
                judge.backward(judged + config.flatness / 2 * steep)
            with draw.toggle(discriminator):
                drawn = functional.softplus(-discriminator(generator(labels), labels)).mean()
                draw.backward(drawn)
        return {"discriminator": judged.item(), "generator": drawn.item()}

    trainer = Engine(train_step)
    judge.attach(trainer, discriminator)
    draw.attach(trainer, generator)

    # The average moves when the generator does, and not on a step that was skipped.
    average = EMAHandler(generator, momentum=config.average)
    average.attach(trainer, event=draw.events.GENERATOR_STEP_COMPLETED)
    ProgressBar(disable=None).attach(trainer, output_transform=lambda output: output)  # None: only on a terminal
    ice.TensorBoard(config.out / "tensorboard").attach(trainer, draw, judge, every=10)
    saved = {"trainer": trainer, "generator": generator, "discriminator": discriminator, "average": average.ema_model}
    checkpoint = ice.Checkpoint(
        {**saved, "draw": draw, "judge": judge},
        config.out / "checkpoints",
        "gan",
        n_saved=2,
        global_step_transform=global_step_from_engine(trainer),
    ).attach(trainer)

    @trainer.on(Events.EPOCH_STARTED)
    def seed(engine: Engine) -> None:
        torch.manual_seed(config.seed + engine.state.epoch)  # so a resumed run gives the same numbers

    if not config.resume:
        for file in [*config.out.glob("checkpoints/gan_*.pt"), *config.out.glob("tensorboard/events.out.*")]:
            file.unlink()
    elif file := checkpoint.resume(trainer):
        print(f"resumed from {file}: epoch {trainer.state.epoch}")

    started = time.perf_counter()
    if trainer.state.epoch < config.epochs:
        trainer.run(loader, max_epochs=config.epochs)
    print(
        f"{trainer.state.epoch} epochs in {time.perf_counter() - started:.1f} s: "
        f"{trainer.state.generator_step} generator steps, {trainer.state.discriminator_step} discriminator steps, "
        f"loss scale {scaler.get_scale():g}"
    )
    return average.ema_model.eval()


def judge_digits(drawn: torch.Tensor, labels: torch.Tensor) -> None:
    """Print how many of the drawn digits a classifier of real ones reads as their labels, and how they vary."""
    real, truth = (tensor.flatten(1).numpy() if tensor.ndim > 1 else tensor.numpy() for tensor in digits())
    x, held_out, y, y_held_out = train_test_split(real, truth, test_size=0.2, stratify=truth, random_state=0)
    classifier = SVC(gamma=0.02 * 16, C=10).fit(x, y)
    images, wanted = drawn.flatten(1).numpy(), labels.numpy()
    right = classifier.predict(images) == wanted
    shares = [right[wanted == digit].mean() for digit in range(10)]
    spread = [images[wanted == d].std(0).mean() / real[truth == d].std(0).mean() for d in range(10)]
    print(f"classifier      {classifier.score(held_out, y_held_out):.4f} of 360 held-out real digits")
    print(f"drawn digits    {right.mean():.4f} of {len(images)} read as their labels; by digit {np.round(shares, 2)}")
    print(f"their variety   {np.mean(spread):.2f} of the real digits'; by digit {np.round(spread, 2)}")


def draw_grid(drawn: torch.Tensor, file: Path) -> None:
    """Draw ten of each digit, a row for each."""
    grid = drawn.view(10, -1, 8, 8)[:, :10]
    canvas = functional.pad(grid, (1, 1, 1, 1)).permute(0, 2, 1, 3).reshape(100, 100).repeat_interleave(6, 0)
    plt.imsave(file, canvas.repeat_interleave(6, 1).numpy(), cmap="gray_r", vmin=0, vmax=1)


def main() -> None:
    """Train, then draw and judge a thousand digits."""
    mpl.use("Agg")  # a file, never a window
    config = tyro.cli(Config, description=__doc__)
    generator = train(config)
    torch.manual_seed(config.seed)
    labels = torch.arange(10).repeat_interleave(100)
    with torch.no_grad():
        drawn = generator(labels)
    judge_digits(drawn, labels)
    draw_grid(drawn, config.out / "gan.png")
    print(f"picture         {config.out / 'gan.png'}")
    print(f"curves          tensorboard --logdir {config.out / 'tensorboard'}")


if __name__ == "__main__":
    main()
