"""What the loops of ``step.py`` train, and how it goes to TensorBoard where a loop writes that by hand."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

TOTAL = 10**9  # steps of the schedule


class Characters(torch.nn.Module):
    """A transformer over characters: 1.2M parameters in 77 tensors."""

    def __init__(self, vocabulary: int = 64, width: int = 128, layers: int = 6) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, width)
        layer = torch.nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.layers = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = torch.nn.LayerNorm(width)
        self.head = torch.nn.Linear(width, vocabulary)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.layers(self.embedding(x))))


def characters_loss(y_pred: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(y_pred.flatten(0, 1), y.flatten())


def convolutions() -> torch.nn.Module:
    """Return a conv net for pictures of 16 x 16: 24k parameters in 10 tensors."""
    layers: list[torch.nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 64)):
        layers += [torch.nn.Conv2d(before, after, 3, stride=2, padding=1), torch.nn.BatchNorm2d(after), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(64 * 4, 10))


@dataclass(frozen=True)
class Work:
    """What is trained: made anew in each process.

    Attributes:
        k: Micro-batches in a window.
        folder: Loss and lr of each step go to TensorBoard here; "" for nowhere.
    """

    model: Callable[[], torch.nn.Module]
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    optimizer: Callable[..., torch.optim.Optimizer]
    k: int = 1
    folder: str = ""

    def log_dir(self) -> str:
        return f"{self.folder}/{os.getpid()}"

    def by_hand(self) -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        model = self.model()
        optimizer = self.optimizer(model.parameters())
        return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / TOTAL)

    def write(self) -> Callable[[int, torch.Tensor, Any], None]:
        """Return what writes step, loss and the optimizer's lr as one does by hand."""
        if not self.folder:
            return lambda step, loss, optimizer: None
        writer = SummaryWriter(self.log_dir())

        def write(step: int, loss: torch.Tensor, optimizer: Any) -> None:
            writer.add_scalar("loss", loss.item(), step)
            writer.add_scalar("lr", optimizer.param_groups[0]["lr"], step)

        return write


TINY = functools.partial(
    Work,
    functools.partial(torch.nn.Linear, 16, 1),
    torch.nn.functional.mse_loss,
    functools.partial(torch.optim.SGD, lr=1e-3),
)
PICTURES = Work(convolutions, torch.nn.functional.cross_entropy, functools.partial(torch.optim.AdamW, lr=1e-3))
TEXT = Work(Characters, characters_loss, functools.partial(torch.optim.AdamW, lr=3e-4))
