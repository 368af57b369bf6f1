"""What a training step costs beside the loop one would write: ``python tests/benchmarks/step.py --check``.

Every feature is on in ours: clip, schedule, finite check, record, events. The loop by hand clips, steps and schedules.
Where TensorBoard is on, all write loss and lr of each step; ours writes what else its record has, too.
"""

import functools
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from ignite.engine import Engine
from measure import Case, Loop, run
from peers import installed
from work import PICTURES, TEXT, TINY, TOTAL, Work

import ice_engine as ice


def by_hand(work: Work, batches: Iterator[Any]) -> None:
    model, optimizer, scheduler = work.by_hand()
    write = work.write()
    for i, (x, y) in enumerate(batches, start=1):
        loss = work.loss(model(x), y)
        (loss / work.k).backward()
        if i % work.k == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            write(i, loss, optimizer)


def wrapped(work: Work) -> tuple[torch.nn.Module, ice.Optimizer]:
    model = work.model()
    optimizer = ice.Optimizer(
        work.optimizer,
        model.parameters(),
        processors=[ice.schedules.cosine(total=TOTAL, warmup=50)],
        accumulation_steps=work.k,
        clip=ice.clip_norm(1.0),
    )
    return model, optimizer


def ours(work: Work, batches: Iterator[Any]) -> None:
    model, optimizer = wrapped(work)
    trainer = ice.create_trainer(model, optimizer, work.loss)
    train(work, trainer, optimizer, batches)


def ours_on_an_engine(work: Work, batches: Iterator[Any]) -> None:
    model, optimizer = wrapped(work)

    def step(_: Engine, batch: Any) -> Any:
        x, y = batch
        loss = work.loss(model(x), y)
        optimizer.backward(loss, weight=len(y))
        return loss.item() if work.folder else None

    engine = Engine(step)
    optimizer.attach(engine, model=model)
    train(work, engine, optimizer, batches)


def train(work: Work, engine: Engine, optimizer: ice.Optimizer, batches: Iterator[Any]) -> None:
    if work.folder:
        ice.TensorBoard(work.log_dir()).attach(engine, optimizer)
    engine.run(batches, max_epochs=1)


def ours_without_an_engine(work: Work, batches: Iterator[Any]) -> None:
    model, optimizer = wrapped(work)
    for x, y in batches:
        optimizer.backward(work.loss(model(x), y), weight=len(y))
        optimizer.update()


LOOPS = {
    "by hand": by_hand,
    "ours, create_trainer": ours,
    "ours, a plain Engine": ours_on_an_engine,
    "ours, no Engine": ours_without_an_engine,
}


def cases(folder: str) -> list[Case]:
    """Return them; files for TensorBoard go to *folder*."""
    torch.manual_seed(0)
    others = installed()

    def case(name: str, work: Work, batch: Any, size: int, bound: float | None) -> Case:
        chosen = {**LOOPS, **others}
        if work.folder:
            del chosen["ours, no Engine"]  # what records hangs on an engine
        loops: dict[str, Loop] = {loop: functools.partial(function, work) for loop, function in chosen.items()}
        bounds = {"ours, create_trainer": bound, "ours, a plain Engine": bound + 0.08} if bound else {}
        return Case(name, loops, batch, size, bounds)

    small = torch.randn(8, 16), torch.randn(8, 1)
    pictures = torch.randn(8, 3, 16, 16), torch.randint(10, (8,))
    text = torch.randint(64, (4, 64)), torch.randint(64, (4, 64))
    return [
        case("tiny k=1", TINY(k=1), small, 100, 0.80),
        case("tiny k=4", TINY(k=4), small, 100, 0.95),
        case("tiny k=1, TensorBoard", TINY(k=1, folder=folder), small, 50, 0.55),
        case("conv net k=1", PICTURES, pictures, 5, None),  # nobody stated a bound
        case("characters k=1", TEXT, text, 1, 0.92),
    ]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        run(cases(directory))
