"""The constants of ``scale.py``: how long one process and two ranks take for what the arithmetic is made of."""

import dataclasses
import hashlib
import math
import os
import shutil
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

import ice_engine as ice
from ice_engine.distributed.rounds import WIDTH, Kind, rounds
from ice_engine.distributed.world import own_group
from tests.distributed.launch import launch

WARM_UP = 3  # calls that are not counted: the first ones allocate and connect


@dataclass(frozen=True)
class Constants:
    """Bytes a second, or seconds.

    Attributes:
        entry: Seconds of a round with nobody else: what Python does.
        hop: Seconds that a row takes from one rank to the next.
        arrival: Seconds of each row that one rank takes in from many.
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
    arrival: float
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
        """Return the seconds of a round: all rows to one rank, and from there down a tree; of two, one hop each."""
        # Ranks share cores for what Python does; of a row on its way the others wait, asleep.
        entry = self.entry * self.crowd(ranks)
        if ranks <= 2:
            return entry + (ranks - 1) * self.hop
        hops = 1 + math.floor(math.log2(ranks))  # gloo's tree is binomial: rank 5, 0b101, is two hops away
        return entry + hops * self.hop + (ranks - 1) * self.arrival

    def __str__(self) -> str:
        """A Markdown table."""
        rows = []
        for name, value in dataclasses.asdict(self).items():
            if value is not None:
                rate = f"{value / 1e9:.2f} GB/s" if value > 1e6 else f"{value:.0f}"
                rows.append(
                    f"| `{name}` | {f'{1e3 * value:.3f} ms' if name in ('entry', 'hop', 'arrival', 'file') else rate} |"
                )
        return "\n".join(["| constant | median |", "|---|---|", *rows])


def median(call: Callable[[], Any], times: int = 9, before: Callable[[], Any] = lambda: None) -> float:
    """Return the median seconds of a call, all ranks at once, each after what comes *before*."""
    taken = []
    for _ in range(times + WARM_UP):
        before()
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


def save_sharded(folder: str, model: Any, optimizer: Any, times: int) -> float:
    """Return the median seconds of a save to where the last one was, so that the disk's cache grows no further.

    Memory that a virtual machine never had before comes from its host: a file there takes up to six times as long.
    """
    path = Path(folder, f"{dist.get_world_size()}")

    def remove() -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(path, ignore_errors=True)

    return median(lambda: ice.save_sharded(path, {"model": model, "optimizer": optimizer}), times, remove)


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
        "file": save_sharded(folder, model, optimizer, 30),
    }


def pair(folder: str) -> dict[str, float]:
    """Measure the constants of two ranks: rounds, and bytes between them."""
    optimizer, model = wrapped(40)
    message, large = torch.ones(4 * 2**20), torch.ones(8 * 2**20)
    once, many = one_round(), torch.zeros(100, WIDTH, dtype=torch.float64)

    def arrivals() -> None:
        start = dist.irecv if dist.get_rank() == 0 else dist.isend
        for each in [start(row, 1 - dist.get_rank(), group=own_group()) for row in many]:
            each.wait()

    send = dist.recv if dist.get_rank() == 0 else dist.send
    return {
        "round": once,
        "arrival": median(arrivals) / len(many),
        "send": message.nbytes / median(lambda: send(message, 1 - dist.get_rank(), group=own_group())),
        "reduce": large.nbytes / median(lambda: dist.all_reduce(large)),
        "gather_rounds": median(optimizer.state_dict, 100) / once,
        "saved": save_sharded(folder, model, optimizer, 30),
    }


def constants() -> Constants:
    """Measure them."""
    with tempfile.TemporaryDirectory() as folder:
        one, two = launch(alone, 1, folder, timeout=300.0)[0], launch(pair, 2, folder, timeout=300.0)[0]
    once = two.pop("round")
    file_rounds = max(0.0, two.pop("saved") - one["file"]) / once
    two["link"] = two["send"]
    return Constants(hop=once - one["entry"], file_rounds=file_rounds, **one, **two)


def middle(found: list[Constants]) -> Constants:
    """Return the median of each of several."""
    names = [field.name for field in dataclasses.fields(Constants) if getattr(found[0], field.name) is not None]
    return Constants(**{name: statistics.median(getattr(each, name) for each in found) for name in names})
