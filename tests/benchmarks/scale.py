"""What a step and a checkpoint cost at any size, by arithmetic: ``python tests/benchmarks/scale.py``.

Its constants are measured on this machine first, by one process and by two ranks. Then the arithmetic stands beside
real ranks, 1 to 4 of them, which share cores and a disk; and then it is done for many, each with cores and a disk of
its own. fp32 parameters with AdamW under ZeRO-1: 4 bytes of a parameter, 8 of its state. docs/scale.md explains it.
"""

import argparse
import dataclasses
import hashlib
import os
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from consolidation import wrapped
from measure import EXACT_HEAP, machine

import ice_engine as ice
from ice_engine import checkpoint_file
from ice_engine.distributed.rounds import Kind, rounds
from ice_engine.distributed.world import own_group
from ice_engine.snapshot import Snapshots, changed_by_steps
from tests.distributed.launch import launch

RANKS, SIZES = (1, 8, 64, 1024), (1e8, 1e9, 1e10, 1e11)
GB = 1e9
PARAMETER, STATE = 4, 8  # bytes
WHOLE = PARAMETER + STATE
WARM_UP = 3  # calls that are not counted: the first ones allocate and connect
WITHIN = 2.0  # the factor by which the arithmetic is to be right
SECONDS = ("entry", "hop", "file")


@dataclass(frozen=True)
class Constants:
    """Bytes a second, or seconds.

    Attributes:
        entry: Seconds of a round with nobody else: what Python does.
        hop: Seconds that a row takes from one rank to the next.
        send: From one rank to another (gloo), in messages of 16 MB.
        reduce: Of an all-reduce, through each rank's link.
        link: Of a broadcast, through each rank's link: here that of ``send``.
        fresh: Into memory that is new, which the system must find first.
        copy: Into memory that is there, also out of the system's cache of a file.
        write: To a disk, with fsync.
        sha: Of sha256.
        crc: Of crc32.
        file: Seconds of ``save_sharded`` of nearly nothing, with one rank: names, manifest, marker, each with fsync.
        gather_rounds: Rounds' worth of time in ``state_dict`` of nearly nothing.
        file_rounds: The same in ``save_sharded``, torch's planning included.
        cores: That all ranks share; None where each has its own.
        disks: The same of disks.
    """

    entry: float
    hop: float
    send: float
    reduce: float
    link: float
    fresh: float
    copy: float
    write: float
    sha: float
    crc: float
    file: float
    gather_rounds: float
    file_rounds: float
    cores: int | None = None
    disks: int | None = None

    def crowd(self, ranks: int) -> float:
        """Return how many ranks share a core, where all compute."""
        return max(1.0, ranks / self.cores) if self.cores else 1.0

    def round(self, ranks: int) -> float:
        """Return the seconds of a round: gloo's all-gather is a ring, in which each row visits rank after rank."""
        return (self.entry + (ranks - 1) * self.hop) * self.crowd(ranks)


# -- the arithmetic -------------------------------------------------------------------------------------------


def costs(given: Constants, ranks: int, parameters: float) -> dict[str, float]:
    """Return the seconds of everything that ranks do together."""
    others, crowd, whole = (ranks - 1) / ranks, given.crowd(ranks), WHOLE * parameters
    many = ranks > 1
    return {
        "agreement, two rounds": 2 * given.round(ranks) * many,
        "all-reduce": 2 * others * PARAMETER * parameters / given.reduce * crowd,
        "ZeRO's broadcast": others
        * PARAMETER
        * parameters
        / given.link
        * given.crowd(2 * ranks),  # who sends, receives
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


# -- its constants --------------------------------------------------------------------------------------------


def median(call: Callable[[], Any], times: int = 9) -> float:
    """Return the median seconds of a call, all ranks at once."""
    taken = []
    for _ in range(times + WARM_UP):
        dist.barrier()
        begin = time.perf_counter()
        call()
        dist.barrier()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[WARM_UP:])


def one_round() -> float:
    """Return the median seconds of a round, over two seconds: others' work comes in bursts, longer than many rounds."""
    taken = []
    for _ in range(20):
        time.sleep(0.1)
        for number in range(25):
            begin = time.perf_counter()
            rounds().exchange(Kind.GATE)
            if number >= WARM_UP:  # nobody waits for who sleeps longest
                taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def save(folder: str, model: Any, optimizer: Any) -> Callable[[], None]:
    names = (f"{folder}/{dist.get_world_size()}-{number}" for number in range(1000))
    return lambda: ice.save_sharded(next(names), {"model": model, "optimizer": optimizer})


def alone(folder: str) -> dict[str, float]:
    """Measure the constants of one process."""
    optimizer, model = wrapped(40)  # one layer of 6 x 6
    sources = [torch.ones(1024, 1024) for _ in range(16)]
    rooms = [torch.empty_like(source) for source in sources]
    data = torch.cat(sources).numpy().data.cast("B")

    def write() -> None:
        with Path(folder, "bytes").open("wb", buffering=0) as file:
            file.write(data)
            os.fsync(file.fileno())

    size = len(data)
    return {
        "entry": one_round(),
        "fresh": size / median(lambda: [source.clone() for source in sources]),
        "copy": size / median(lambda: [room.copy_(source) for room, source in zip(rooms, sources, strict=True)]),
        "write": size / median(write),
        "sha": size / median(lambda: hashlib.sha256(data)),
        "crc": size / median(lambda: zlib.crc32(data)),
        "file": median(save(folder, model, optimizer), 30),
    }


def pair(folder: str) -> dict[str, float]:
    """Measure the constants of two ranks: rounds, and bytes between them."""
    optimizer, model = wrapped(40)
    message, large = torch.ones(4 * 2**20), torch.ones(8 * 2**20)
    once = one_round()
    send = dist.recv if dist.get_rank() == 0 else dist.send
    return {
        "round": once,
        "send": message.nbytes / median(lambda: send(message, 1 - dist.get_rank(), group=own_group())),
        "reduce": large.nbytes / median(lambda: dist.all_reduce(large)),
        "gather_rounds": median(optimizer.state_dict, 100) / once,
        "saved": median(save(folder, model, optimizer), 30),
    }


def constants() -> Constants:
    """Measure them."""
    with tempfile.TemporaryDirectory() as folder:
        one, two = launch(alone, 1, folder)[0], launch(pair, 2, folder)[0]
    once = two.pop("round")
    file_rounds = max(0.0, two.pop("saved") - one["file"]) / once
    two["link"] = two["send"]
    return Constants(hop=once - one["entry"], file_rounds=file_rounds, **one, **two)


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
    found["`save_sharded`"] = median(save(folder, model, optimizer), 5)
    return found


def check(given: Constants, parameters: int, every: list[int]) -> bool:
    """Print the arithmetic beside what real ranks take; return whether it is right within the factor."""
    here = dataclasses.replace(given, cores=os.cpu_count(), disks=1)
    print(f"\n| {parameters / 1e6:.0f}M parameters | ranks | computed, ms | measured, ms | measured / computed |")
    print("|---|---|---|---|---|")
    worst = 1.0
    for ranks in every:
        with tempfile.TemporaryDirectory() as folder:
            found = launch(work, ranks, parameters, folder, timeout=500.0)[0]
        computed = costs(here, ranks, parameters)
        for name, seconds in found.items():
            ratio = seconds / computed[name]
            worst = max(worst, ratio, 1 / ratio)
            print(f"| {name} | {ranks} | {1e3 * computed[name]:.1f} | {1e3 * seconds:.1f} | {ratio:.2f} |", flush=True)
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
    given = constants()
    print("\n| constant | measured |\n|---|---|")
    for name, value in dataclasses.asdict(given).items():
        if value is not None:
            unit = (
                f"{1e3 * value:.3f} ms"
                if name in SECONDS
                else f"{value / GB:.2f} GB/s"
                if value > 1e6
                else f"{value:.0f}"
            )
            print(f"| `{name}` | {unit} |")
    sizes, ranks = (asked.parameters // 3, [1, 2, 4]) if asked.quick else (asked.parameters, [1, 2, 3, 4])
    right = check(given, sizes, ranks)
    there = dataclasses.replace(given, reduce=asked.network * GB, link=asked.network * GB, write=asked.write * GB)
    table(there)
    print(f"\none file every 30 minutes costs 1 % of the time from {takes_over(there, 1800, 0.01):.1e} parameters on")
    if asked.check and not right:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
