"""What a step and a checkpoint cost at any size, by arithmetic: ``python tests/benchmarks/scale.py``.

Its constants are measured on this machine, by one process and by two ranks, in turn with what real ranks take, 1 to 4
of them, which share cores and a disk. First the arithmetic stands beside these; then it is done for many ranks, each
with cores and a disk of its own. fp32 parameters with AdamW under ZeRO-1: 4 bytes of a parameter, 8 of its state.
docs/scale.md explains it.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from consolidation import wrapped
from constants import Constants, constants, median, middle, one_round, save_sharded
from measure import EXACT_HEAP, machine

from ice_engine import checkpoint_file
from ice_engine.snapshot import Snapshots, changed_by_steps
from tests.distributed.launch import launch

RANKS, SIZES = (1, 8, 64, 1024), (1e8, 1e9, 1e10, 1e11)
GB = 1e9
PARAMETER, STATE = 4, 8  # bytes
WHOLE = PARAMETER + STATE
WITHIN = 2.0  # the factor by which the arithmetic is to be right


# -- the arithmetic -------------------------------------------------------------------------------------------


def costs(given: Constants, ranks: int, parameters: float) -> dict[str, float]:
    """Return the seconds of everything that ranks do together."""
    others, crowd, whole = (ranks - 1) / ranks, given.crowd(ranks), WHOLE * parameters
    many, both_ways = ranks > 1, given.crowd(2 * ranks)  # who sends, and who receives
    return {
        "agreement, two rounds": 2 * given.round(ranks) * many,
        "all-reduce": 2 * others * PARAMETER * parameters / given.reduce * crowd,
        "ZeRO's broadcast": others * PARAMETER * parameters / given.link * both_ways,
        "gather": (
            given.gather_rounds * given.round(ranks)
            + STATE * parameters / given.fresh
            + others * STATE * parameters / given.send
        )
        * many,
        "one file": whole * (1 / given.write + 1 / given.sha + 2 / given.crc + 2 / given.copy),  # read back twice
        "its copy in the background": whole / given.copy,
        "`save_sharded`": (
            given.file
            + given.file_rounds * given.round(ranks) * many
            + whole / given.write / min(ranks, given.disks or ranks)
            + whole / ranks * (1 / given.sha + 1 / given.crc + 1 / given.copy) * crowd
        ),
    }


def takes_over(given: Constants, interval: float, share: float, ranks: int = 64) -> float:
    """Return the parameters from which on one file every *interval* seconds costs more than *share* of the time."""
    fixed, each = (sum(costs(given, ranks, p)[name] for name in ("gather", "one file")) for p in (0.0, 1.0))
    return (share * interval - fixed) / (each - fixed)


# -- real ranks -----------------------------------------------------------------------------------------------


def work(parameters: int, folder: str) -> dict[str, float]:
    """Measure on this rank what the arithmetic says."""
    optimizer, model = wrapped(parameters)
    gradients, snapshots = torch.ones(parameters), Snapshots()
    whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    held = list(changed_by_steps(optimizer))

    def on_one(call: Callable[[], Any]) -> Callable[[], Any]:
        return call if dist.get_rank() == 0 else lambda: None

    found = {}
    if dist.get_world_size() > 1:
        found["agreement, two rounds"] = 2 * one_round()
        found["all-reduce"] = median(lambda: dist.all_reduce(gradients))
        found["ZeRO's broadcast"] = median(optimizer.inner._sync_params)
        found["gather"] = median(optimizer.state_dict)
    found["one file"] = median(on_one(lambda: checkpoint_file.write(Path(folder, "file.pt"), whole)), 5)
    found["its copy in the background"] = median(on_one(lambda: snapshots.take(whole, held).complete()))
    found["`save_sharded`"] = save_sharded(folder, model, optimizer, 5)
    return found


def check(given: Constants, parameters: int, measured: dict[int, dict[str, float]]) -> bool:
    """Print the arithmetic beside what real ranks took; return whether it is right within the factor."""
    here = dataclasses.replace(given, cores=os.cpu_count(), disks=1)
    print(f"\n| {parameters / 1e6:.0f}M parameters | ranks | computed, ms | measured, ms | measured / computed |")
    print("|---|---|---|---|---|")
    worst = 1.0
    for ranks, found in measured.items():
        computed = costs(here, ranks, parameters)
        for name, seconds in found.items():
            ratio = seconds / computed[name]
            worst = max(worst, ratio, 1 / ratio)
            print(f"| {name} | {ranks} | {1e3 * computed[name]:.1f} | {1e3 * seconds:.1f} | {ratio:.2f} |")
    print(f"\nthe arithmetic is right within a factor of {worst:.1f}, {WITHIN:.0f} is wanted")
    return worst <= WITHIN


def table(given: Constants) -> None:
    names = list(costs(given, 1, 1.0))
    print(f"\n| s | ranks | {' | '.join(names)} |\n|---|---|{'---|' * len(names)}")
    for parameters in SIZES:
        for ranks in RANKS:
            found = costs(given, ranks, parameters)
            row = [f"{s:.3g}" if s < 1000 else f"{s:,.0f}" for s in found.values()]
            print(f"| {parameters:.0e} | {ranks} | {' | '.join(row)} |")


def main() -> None:
    """Measure, compute, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, default=30_000_000, help="of the real ranks")
    parser.add_argument("--network", type=float, default=10.0, help="GB a second of a rank's link, in the large table")
    parser.add_argument("--write", type=float, default=1.0, help="GB a second of a rank's disk, in the large table")
    parser.add_argument("--quick", action="store_true", help="a third of the parameters, and not three ranks")
    parser.add_argument("--check", action="store_true", help=f"fail where it is wrong by more than {WITHIN}")
    asked = parser.parse_args()
    os.environ.update(EXACT_HEAP)
    print(f"{machine()}; load {os.getloadavg()[0]:.1f}")
    parameters, every = (asked.parameters // 3, [1, 2, 4]) if asked.quick else (asked.parameters, [1, 2, 3, 4])
    sets, measured = [], {}
    for ranks in every:  # in turn, so that all meet the same machine
        sets.append(constants())
        with tempfile.TemporaryDirectory() as folder:
            measured[ranks] = launch(work, ranks, parameters, folder, timeout=500.0)[0]
    given = middle(sets)
    print(f"\n{given}")
    right = check(given, parameters, measured)
    there = dataclasses.replace(given, reduce=asked.network * GB, link=asked.network * GB, write=asked.write * GB)
    table(there)
    print(f"\none file every 30 minutes costs 1 % of the time from {takes_over(there, 1800, 0.01):.1e} parameters on")
    if asked.check and not right:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
