"""The same step by others; each is imported where it runs, and left out where it is not installed.

``pip install --group peers`` installs them. All clip and schedule; none checks for what is not finite but by the norm.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from ignite.engine import Engine, Events, create_supervised_trainer
from trainers import lightning_trainer, mmengine_runner
from work import Work


def bare_ignite(work: Work, batches: Iterator[Any]) -> None:
    model, optimizer, scheduler = work.by_hand()
    write = work.write()

    def step(engine: Engine, batch: Any) -> None:
        x, y = batch
        loss = work.loss(model(x), y)
        (loss / work.k).backward()
        if engine.state.iteration % work.k == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            write(engine.state.iteration, loss, optimizer)

    Engine(step).run(batches, max_epochs=1)


def supervised_trainer(work: Work, batches: Iterator[Any]) -> None:
    model, optimizer, scheduler = work.by_hand()
    write = work.write()
    # The trainer has no place between backward and step: clipping is the optimizer's own hook.
    optimizer.register_step_pre_hook(lambda *_: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) and None)
    trainer = create_supervised_trainer(
        model,
        optimizer,
        work.loss,
        gradient_accumulation_steps=work.k,
        output_transform=lambda x, y, y_pred, loss: loss,
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=work.k), lambda: scheduler.step())
    if work.folder:
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED(every=work.k),
            lambda engine: write(engine.state.iteration, engine.state.output, optimizer),
        )
    trainer.run(batches, max_epochs=1)


def mmengine(work: Work, batches: Iterator[Any]) -> None:
    from mmengine.optim import OptimWrapper

    model, optimizer, scheduler = work.by_hand()
    write = work.write()
    wrapper = OptimWrapper(optimizer, accumulative_counts=work.k, clip_grad={"max_norm": 1.0})
    for i, (x, y) in enumerate(batches, start=1):
        with wrapper.optim_context(model):
            loss = work.loss(model(x), y)
        wrapper.update_params(loss)
        if i % work.k == 0:
            scheduler.step()
            write(i, loss, optimizer)


def fabric(work: Work, batches: Iterator[Any], **where: Any) -> None:
    """Train by Lightning's ``Fabric``; *where* says on which ranks."""
    from lightning.fabric import Fabric

    model, optimizer, scheduler = work.by_hand()
    write = work.write()
    runs = Fabric(**{"accelerator": "cpu", "devices": 1, **where})
    runs.launch()
    model, optimizer = runs.setup(model, optimizer)
    for i, (x, y) in enumerate(batches, start=1):
        with runs.no_backward_sync(model) if where and i % work.k else contextlib.nullcontext():
            loss = work.loss(model(x), y)
            runs.backward(loss / work.k)
        if i % work.k == 0:
            runs.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            write(i, loss, optimizer)


def accelerate(work: Work, batches: Iterator[Any]) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=work.k)
    write = work.write()
    model, optimizer, scheduler = accelerator.prepare(*work.by_hand())
    for i, (x, y) in enumerate(batches, start=1):
        with accelerator.accumulate(model):
            loss = work.loss(model(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if i % work.k == 0:
            write(i, loss, optimizer)


_OPTIONAL: dict[str, tuple[str, Callable[..., None]]] = {
    "mmengine OptimWrapper": ("mmengine", mmengine),
    "mmengine Runner": ("mmengine", mmengine_runner),
    "Lightning Fabric": ("lightning", fabric),
    "Lightning Trainer": ("lightning", lightning_trainer),
    "Accelerate": ("accelerate", accelerate),
}


def has(package: str) -> bool:
    """Whether it can be imported here."""
    return importlib.util.find_spec(package) is not None


def installed() -> dict[str, Callable[..., None]]:
    """Return the loops that can run here; say which cannot."""
    loops = {"bare Ignite Engine": bare_ignite, "create_supervised_trainer": supervised_trainer}
    for name, (package, loop) in _OPTIONAL.items():
        if not has(package):
            print(f"{name}: left out, {package} is not installed")
        else:
            loops[name] = loop
    return loops
