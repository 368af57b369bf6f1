"""How long the state of a ZeRO optimizer takes to one rank, and what memory the sender needs: torch's way and ours.

    python tests/benchmarks/consolidation.py [--parameters 30000000] [--ranks 2 4]

In one run, side by side, on the same AdamW state, in real gloo ranks on this machine. All sizes come in turns, as
new memory is dear while the host looks for it; ours is the best of nine in each, torch's is called once. The memory is
what the process's peak grows by, in a call that is not timed. No NCCL: there, state goes through the CPU. Ours grows
linearly with the state, so a quarter of it is measured, too, and hardly with the ranks.
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

from measure import machine

import ice_engine as ice
from tests.distributed.launch import launch

_WIDTH = 1024  # of a layer: a million parameters
_FASTER = 50.0  # than torch's, at least
_MEMORY = 32.0  # MB of a sender, less than that
_LINEAR = 5.0  # times the seconds of a quarter of the state, at most
_FLAT = 1.5  # times the seconds of the fewest ranks, at most: of two, half of the state travels; of many, all of it


def resident() -> float:
    """Return the MB of memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def timed(call: Callable[[], Any]) -> float:
    """Return the seconds that *call* takes."""
    dist.barrier()
    began = time.perf_counter()
    call()
    dist.barrier()
    return time.perf_counter() - began


def grown(call: Callable[[], Any]) -> float:
    """Return by how many MB memory grows at most in *call*."""
    dist.barrier()
    before = peak = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    peak = max(peak, resident())
    done.set()
    watcher.join()
    dist.barrier()
    return peak - before


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


def work(parameters: int, turn: int) -> dict[str, tuple[float, float]]:
    """Measure seconds and MB on this rank, torch's in the first turn only."""
    optimizer, _ = wrapped(parameters)
    optimizer.state_dict()  # connections are made at the first message
    ours, theirs = optimizer.state_dict, optimizer.inner.consolidate_state_dict
    found = {"ours": (min(timed(ours) for _ in range(9)), grown(ours))}
    return found if turn else {**found, "theirs": (timed(theirs), grown(theirs))}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, default=30_000_000)
    parser.add_argument("--quick", action="store_true", help="two turns")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--check", action="store_true", help="fail where a bound is broken")
    asked = parser.parse_args()
    print(f"{machine()}\nAdamW, 8 bytes of state for each parameter\n")
    print("| ranks | parameters | torch, s | ours, s | times faster | sender's memory, torch, MB | ours, MB |")
    print("|---" * 7 + "|")
    broken: list[str] = []
    few, whole, quarter = min(asked.ranks), asked.parameters, asked.parameters // 4
    sizes = [(few, quarter), *((ranks, whole) for ranks in asked.ranks)]
    every = range(2 if asked.quick else 3)
    turns = [{size: launch(work, *size, turn, timeout=500.0) for size in sizes} for turn in every]
    seconds: dict[tuple[int, int], float] = {}
    for ranks, parameters in sizes:
        found = [each[ranks, parameters] for each in turns]
        theirs, their_memory = found[0][0]["theirs"][0], max(rank["theirs"][1] for rank in found[0][1:])
        ours, memory = min(t[0]["ours"][0] for t in found), max(rank["ours"][1] for t in found for rank in t[1:])
        seconds[ranks, parameters] = ours
        print(
            f"| {ranks} | {parameters / 1e6:.1f}M | {theirs:.2f} | {ours:.3f} | {theirs / ours:.0f} | "
            f"{their_memory:,.0f} | {memory:.1f} |",
        )
        slow = parameters == whole and theirs < _FASTER * ours  # of little state, ours is mostly its rounds
        broken += [f"{ranks} ranks: {theirs / ours:.0f} times, at least 50"] if slow else []
        broken += [f"{ranks} ranks: {memory:.1f} MB, less than 32"] if memory >= _MEMORY else []
    by_size = seconds[few, whole] / seconds[few, quarter]
    by_ranks = max(seconds[ranks, whole] for ranks in asked.ranks) / seconds[few, whole]
    print(f"\nfour times the state takes {by_size:.1f} times as long, more ranks {by_ranks:.1f} times")
    broken += [f"four times the state: {by_size:.1f} times, at most {_LINEAR}"] if by_size > _LINEAR else []
    broken += [f"more ranks: {by_ranks:.1f} times, at most {_FLAT}"] if by_ranks > _FLAT else []
    print("\n" + ("\n".join(broken) if broken else "every bound is kept"))
    if asked.check and broken:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
