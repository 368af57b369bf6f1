"""How long the state of a ZeRO optimizer takes to one rank, and what memory the sender needs: torch's way and ours.

    python tests/benchmarks/consolidation.py [--parameters 30000000] [--ranks 2 4]

In one run, side by side, on the same AdamW state, in real gloo ranks on this machine; the best of nine for ours, one
for torch's. The memory is what the process's peak grows by. No NCCL: there, state goes through the CPU. Ours grows
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
    ours = [measured(optimizer.state_dict) for _ in range(9)]
    theirs = measured(optimizer.inner.consolidate_state_dict)
    return {"ours": (min(s for s, _ in ours), max(m for _, m in ours)), "theirs": theirs}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, default=30_000_000)
    parser.add_argument("--quick", action="store_true", help="a third of the parameters")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--check", action="store_true", help="fail where a bound is broken")
    asked = parser.parse_args()
    asked.parameters //= 3 if asked.quick else 1
    print(f"{machine()}\nAdamW, 8 bytes of state for each parameter\n")
    print("| ranks | parameters | torch, s | ours, s | times faster | sender's memory, torch, MB | ours, MB |")
    print("|---" * 7 + "|")
    seconds: dict[tuple[int, int], float] = {}
    broken = []
    few, whole, quarter = min(asked.ranks), asked.parameters, asked.parameters // 4
    for ranks, parameters in [(few, quarter), *((ranks, whole) for ranks in asked.ranks)]:
        found = launch(work, ranks, parameters, timeout=500.0)
        (theirs, _), (ours, _) = found[0]["theirs"], found[0]["ours"]
        memory = {who: max(rank[who][1] for rank in found[1:]) for who in ("theirs", "ours")}
        print(
            f"| {ranks} | {parameters / 1e6:.1f}M | {theirs:.2f} | {ours:.3f} | {theirs / ours:.0f} | "
            f"{memory['theirs']:,.0f} | {memory['ours']:.1f} |",
            flush=True,
        )
        seconds[ranks, parameters] = ours
        slow = parameters == whole and theirs < _FASTER * ours  # of little state, ours is mostly its rounds
        broken += [f"{ranks} ranks: {theirs / ours:.0f} times, at least 50"] if slow else []
        broken += [f"{ranks} ranks: {memory['ours']:.1f} MB, less than 32"] if memory["ours"] >= _MEMORY else []
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
