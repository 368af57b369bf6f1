"""What a checkpoint of 353 MB costs training: ``python tests/benchmarks/checkpoint.py``.

A model of 29 million parameters trains with AdamW, eight steps at a time, and saves in the first of them. Each way of
saving has a process of its own, and only one of them is awake: eight steps of one way, eight of the next, and round
again. The stall is what the training thread waits: in the save, and before the step after it. What is lost in all is
how much longer eight steps take, until the file is written, than without a save. Memory is the peak of the process,
less that of the one that does not save.
"""

import argparse
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from ignite.engine import Engine, Events

import ice_engine as ice

STEPS, LAYERS, WIDTH, BATCH = 8, 28, 1024, 16
BOUND = 0.1  # of the time of a warm copy
LAST = 10**6  # where saves are taken, after all other handlers
Save = Callable[[], object]


def nothing(trainer: Engine, to_save: dict[str, Any], folder: str) -> Save:
    """Save nothing."""
    return lambda: None


def warm_copy(trainer: Engine, to_save: dict[str, Any], folder: str) -> Save:
    """Copy into memory that is there: the least that anybody can do who stops training for it."""
    model, optimizer = to_save["model"], to_save["optimizer"]
    buffers: dict[int, torch.Tensor] = {}

    def copy() -> None:
        tensors = [p.detach() for p in model.parameters()]
        tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        for index, tensor in enumerate(tensors):
            buffers.setdefault(index, torch.empty_like(tensor)).copy_(tensor)

    return copy


def torch_save(trainer: Engine, to_save: dict[str, Any], folder: str) -> Save:
    return lambda: torch.save({name: saved.state_dict() for name, saved in to_save.items()}, f"{folder}/file.pt")


def torch_async(trainer: Engine, to_save: dict[str, Any], folder: str) -> Save:
    model, optimizer = to_save["model"], to_save["optimizer"]
    written: list[Any] = []

    def save() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.inner.state_dict()}
        written.append(dcp.async_save(state, checkpoint_id=f"{folder}/async", no_dist=True))

    trainer.add_event_handler(Events.COMPLETED, lambda: written.pop().result())
    return save


def ours(trainer: Engine, to_save: dict[str, Any], folder: str, *, background: bool = True) -> Save:
    """Attach ours; it is called by itself."""
    checkpoint = ice.Checkpoint(to_save, folder, background=background)
    checkpoint.attach(trainer, Events.ITERATION_COMPLETED(event_filter=lambda _, iteration: iteration == 1))
    return lambda: None


def ours_at_once(trainer: Engine, to_save: dict[str, Any], folder: str) -> Save:
    return ours(trainer, to_save, folder, background=False)


Way = Callable[[Engine, dict[str, Any], str], Save]
WAYS: dict[str, Way] = {
    "no save": nothing,
    "warm copy, no file": warm_copy,
    "torch.save": torch_save,
    "torch's async_save": torch_async,
    "ours": ours,
    "ours, background=False": ours_at_once,
}


def work(way: Way, threads: int, baton: Connection) -> None:
    """Train, eight steps whenever the baton comes; hand back stall and time of all, in seconds, and memory in MB."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    optimizer = ice.Optimizer(torch.optim.AdamW(model.parameters()))
    trainer = ice.create_trainer(model, optimizer, torch.nn.functional.mse_loss)
    stalls: list[float] = []
    began = [0.0]
    with tempfile.TemporaryDirectory() as folder:
        save = way(trainer, {"trainer": trainer, "model": model, "optimizer": optimizer}, folder)

        def before() -> None:
            began[0] = time.perf_counter()
            save()

        first = Events.ITERATION_COMPLETED(once=1)
        optimizer.hooks.add(first, before, order=LAST - 1)
        optimizer.hooks.add(first, lambda: stalls.append(time.perf_counter() - began[0]), order=LAST + 1)
        optimizer.wait_before_steps(lambda: began.__setitem__(0, time.perf_counter()))
        batches = [(torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH))] * STEPS
        trainer.run(batches[:1])  # the optimizer's state is made
        while baton.recv():
            stalls.clear()
            start = time.perf_counter()
            trainer.run(batches, max_epochs=1)
            baton.send((sum(stalls), time.perf_counter() - start, peak()))


def peak() -> float:
    """Return the MB of memory that this process had at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def measured(ways: dict[str, Way], rounds: int, threads: int) -> dict[str, list[tuple[float, float, float]]]:
    """Take eight steps of each in turn."""
    context = multiprocessing.get_context("spawn")
    batons = {}
    for name, way in ways.items():
        batons[name], theirs = context.Pipe()
        context.Process(target=work, args=(way, threads, theirs), daemon=True).start()
    taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for number in range(-2, rounds):  # the first ones allocate
        for name, baton in batons.items():
            baton.send(True)
            found = baton.recv()
            if number >= 0:
                taken[name].append(found)
    for baton in batons.values():
        baton.send(False)
    return taken


def main(argv: Any = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="of eight steps of each way")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in training")
    parser.add_argument("--check", action="store_true", help=f"fail where ours stalls for more than {BOUND} of a copy")
    parser.add_argument("--quick", action="store_true", help="a third of the rounds")
    asked = parser.parse_args(argv)
    asked.rounds //= 3 if asked.quick else 1
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    taken = measured(WAYS, asked.rounds, asked.threads)
    without = taken["no save"]
    copy = statistics.median(stall for stall, _, _ in taken["warm copy, no file"])
    print(f"\n{'':24}{'stall, ms':>10}{'of a copy':>11}{'  quartiles, ms':22}{'lost in all, ms':>16}{'memory, MB':>12}")
    ratios = {}
    for name, found in taken.items():
        low, middle, high = statistics.quantiles([1e3 * stall for stall, _, _ in found], n=4)
        lost = statistics.median(1e3 * (mine[1] - theirs[1]) for mine, theirs in zip(found, without, strict=True))
        ratios[name] = middle / 1e3 / copy
        quartiles, memory = f"  {low:.1f} to {high:.1f}", found[-1][2] - without[-1][2]
        print(f"{name:24}{middle:10.1f}{ratios[name]:11.3f}{quartiles:22}{lost:16.0f}{memory:12.0f}")
    broken = ratios["ours"] > BOUND
    print(f"\nours stalls for {ratios['ours']:.3f} of a warm copy, at most {BOUND} is wanted")
    if asked.check and broken:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
