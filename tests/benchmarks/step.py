"""What a training step costs beside the loop one would write: ``python tests/benchmarks/step.py --check``.

Every feature is on in ours: clip, schedule, finite check, record, events. The loop by hand clips, steps and schedules.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from ignite.engine import Engine
from measure import Case, Loop, run

import ice_engine as ice

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


@dataclass(frozen=True)
class Work:
    """What is trained: made anew in each process."""

    model: Callable[[], torch.nn.Module]
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    optimizer: Callable[..., torch.optim.Optimizer]
    k: int = 1

    def ours(self) -> tuple[torch.nn.Module, ice.Optimizer]:
        model = self.model()
        optimizer = ice.Optimizer(
            self.optimizer,
            model.parameters(),
            processors=[ice.schedules.cosine(total=TOTAL, warmup=50)],
            accumulation_steps=self.k,
            clip=ice.clip_norm(1.0),
        )
        return model, optimizer


def by_hand(work: Work, batches: Iterator[Any]) -> None:
    model = work.model()
    optimizer = work.optimizer(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / TOTAL)
    for i, (x, y) in enumerate(batches, start=1):
        (work.loss(model(x), y) / work.k).backward()
        if i % work.k == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def bare_ignite(work: Work, batches: Iterator[Any]) -> None:
    model = work.model()
    optimizer = work.optimizer(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / TOTAL)

    def step(engine: Engine, batch: Any) -> None:
        x, y = batch
        (work.loss(model(x), y) / work.k).backward()
        if engine.state.iteration % work.k == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    Engine(step).run(batches, max_epochs=1)


def ours(work: Work, batches: Iterator[Any]) -> None:
    model, optimizer = work.ours()
    ice.create_trainer(model, optimizer, work.loss).run(batches, max_epochs=1)


def ours_on_an_engine(work: Work, batches: Iterator[Any]) -> None:
    model, optimizer = work.ours()

    def step(_: Engine, batch: Any) -> None:
        x, y = batch
        optimizer.backward(work.loss(model(x), y), weight=len(y))

    engine = Engine(step)
    optimizer.attach(engine, model=model)
    engine.run(batches, max_epochs=1)


def ours_without_an_engine(work: Work, batches: Iterator[Any]) -> None:
    model, optimizer = work.ours()
    for x, y in batches:
        optimizer.backward(work.loss(model(x), y), weight=len(y))
        optimizer.update()


LOOPS = {
    "by hand": by_hand,
    "ours, create_trainer": ours,
    "ours, a plain Engine": ours_on_an_engine,
    "ours, no Engine": ours_without_an_engine,
    "bare Ignite Engine": bare_ignite,
}


def case(name: str, work: Work, batch: Any, size: int, bound: float) -> Case:
    loops: dict[str, Loop] = {loop: functools.partial(function, work) for loop, function in LOOPS.items()}
    bounds = {"ours, create_trainer": bound, "ours, a plain Engine": bound + 0.08}
    return Case(name, loops, batch, size, bounds)


def cases() -> list[Case]:
    torch.manual_seed(0)
    linear = functools.partial(torch.nn.Linear, 16, 1)
    tiny = functools.partial(Work, linear, torch.nn.functional.mse_loss, functools.partial(torch.optim.SGD, lr=1e-3))
    small = torch.randn(8, 16), torch.randn(8, 1)
    characters = Work(Characters, characters_loss, functools.partial(torch.optim.AdamW, lr=3e-4))
    text = torch.randint(64, (4, 64)), torch.randint(64, (4, 64))
    return [
        case("tiny k=1", tiny(k=1), small, 100, 0.80),
        case("tiny k=4", tiny(k=4), small, 100, 0.95),
        case("characters k=1", characters, text, 1, 0.92),
    ]


if __name__ == "__main__":
    run(cases())
