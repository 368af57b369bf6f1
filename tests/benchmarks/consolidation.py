"""How long the state of a ZeRO optimizer takes to one rank, and what memory the sender needs: torch's way and ours.

    python tests/benchmarks/consolidation.py [--parameters 30000000] [--ranks 2 4]

In one run, side by side, on the same AdamW state, in real gloo ranks on this machine; the best of three for ours, one
for torch's. The memory is what the process's peak grows by. No NCCL: there, state goes through the CPU.
"""

import argparse
import functools
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

import ice_engine as ice
from tests.distributed.launch import launch

_WIDTH = 1024  # of a layer: a million parameters


def resident() -> float:
    """Return the MB of memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def measured(call: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds that *call* takes, and by how many MB memory grew at most meanwhile."""
    dist.barrier()
    before = peak = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    kept = call()
    dist.barrier()
    seconds = time.perf_counter() - began
    peak = max(peak, resident())
    done.set()
    watcher.join()
    del kept
    return seconds, peak - before


def wrapped(parameters: int) -> tuple[ice.Optimizer, torch.nn.ParameterList]:
    """Return an AdamW under ZeRO-1 that has stepped once, and what it optimizes."""
    layers = max(1, round(parameters / (_WIDTH * _WIDTH)))
    width = _WIDTH if parameters >= _WIDTH * _WIDTH else int(parameters**0.5)
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(width, width)) for _ in range(layers)])
    optimizer = ice.Optimizer(functools.partial(torch.optim.AdamW, lr=1e-3), model.parameters(), sharding="zero1")
    for p in model:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer, model


def work(parameters: int) -> dict[str, tuple[float, float]]:
    """Measure both on this rank."""
    optimizer, _ = wrapped(parameters)
    optimizer.state_dict()  # connections are made at the first message
    ours = [measured(optimizer.state_dict) for _ in range(3)]
    theirs = measured(optimizer.inner.consolidate_state_dict)
    return {"ours": (min(s for s, _ in ours), max(m for _, m in ours)), "theirs": theirs}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, default=30_000_000)
    parser.add_argument("--quick", action="store_true", help="a third of the parameters")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    asked = parser.parse_args()
    asked.parameters //= 3 if asked.quick else 1
    print(f"AdamW, {asked.parameters:,} parameters, {asked.parameters * 8 / 2**20:,.0f} MB of state")
    print(f"{'ranks':>5}  {'torch':>9}  {'ours':>9}  {'ratio':>6}  {'sender: torch':>13}  {'ours':>8}")
    for ranks in asked.ranks:
        found = launch(work, ranks, asked.parameters, timeout=500.0)
        (theirs, _), (ours, _) = found[0]["theirs"], found[0]["ours"]
        memory = {who: max(rank[who][1] for rank in found[1:]) for who in ("theirs", "ours")}
        print(
            f"{ranks:>5}  {theirs:>7.2f} s  {ours:>7.3f} s  {theirs / ours:>5.0f}x  "
            f"{memory['theirs']:>10,.0f} MB  {memory['ours']:>5,.1f} MB",
            flush=True,
        )


if __name__ == "__main__":
    main()
