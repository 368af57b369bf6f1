"""What a step and a checkpoint cost at any size, by arithmetic: ``python tests/benchmarks/scale.py``.

From constants that were measured on this machine; then the same arithmetic beside real ranks, 1, 2 and 4 of them, for
which it stands or falls. fp32 parameters with AdamW under ZeRO-1: 4 bytes of a parameter, 8 of its state. Each rank is
taken to have a disk of its own; real ranks here share one, and two cores.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from consolidation import wrapped
from measure import machine

import ice_engine as ice
from ice_engine.distributed.rounds import Kind, rounds
from tests.distributed.launch import launch

RANKS, SIZES = (1, 8, 64, 1024), (1e8, 1e9, 1e10, 1e11)
GB = 1e9
PARAMETER, STATE = 4, 8  # bytes


@dataclass(frozen=True)
class Constants:
    """Measured here, but for the network; of other machines, give your own.

    Attributes:
        agreement: Seconds of one round between two ranks (gloo).
        gather: Bytes a second from one rank to another (gloo, send and receive).
        write: Bytes a second to a disk, with fsync.
        copy: Bytes a second of memcpy.
        network: Bytes a second of an all-reduce or broadcast, through each rank's link. A parameter, not measured.
        disks: How many there are; None for one a rank.
    """

    agreement: float = 0.46e-3
    gather: float = 3.5 * GB
    write: float = 1.0 * GB
    copy: float = 12.0 * GB
    network: float = 10.0 * GB
    disks: int | None = None


def agreement(given: Constants, ranks: int) -> float:
    """Return the seconds of a window's two rounds; a round has as many hops as a tree of the ranks has levels."""
    return 2 * given.agreement * math.ceil(math.log2(ranks))


def step(given: Constants, ranks: int, parameters: float) -> dict[str, float]:
    """Return the seconds that a window costs besides forward and backward."""
    others = (ranks - 1) / ranks
    return {
        "agreement": agreement(given, ranks),
        "all-reduce": 2 * others * PARAMETER * parameters / given.network,
        "broadcast": others * PARAMETER * parameters / given.network,
    }


def consolidated(given: Constants, ranks: int, parameters: float) -> dict[str, float]:
    """Return the seconds of one file: all state goes to one rank, which writes it and the parameters."""
    return {
        "gather": (ranks - 1) / ranks * STATE * parameters / given.gather,
        "write": (PARAMETER + STATE) * parameters / given.write,
    }


def sharded(given: Constants, ranks: int, parameters: float) -> float:
    """Return the seconds of ``save_sharded``: each rank writes its part."""
    return (PARAMETER + STATE) * parameters / given.write / (given.disks or ranks)


def table(given: Constants) -> None:
    print(
        "| parameters | ranks | agreement, ms | all-reduce and broadcast, s | one file: gather + write, s | "
        "the saver's memory, GB | `save_sharded`, s | copied in the background, s |\n" + "|---" * 8 + "|"
    )
    for parameters in SIZES:
        for ranks in RANKS:
            window, file = step(given, ranks, parameters), consolidated(given, ranks, parameters)
            whole = (PARAMETER + STATE) * parameters
            print(
                f"| {parameters:.0e} | {ranks} | {1e3 * window['agreement']:.1f} | "
                f"{window['all-reduce'] + window['broadcast']:.3g} | "
                f"{file['gather']:.3g} + {file['write']:.3g} | {STATE * parameters / GB:.3g} | "
                f"{sharded(given, ranks, parameters):.3g} | {whole / ranks / given.copy:.2g} |"
            )


def takes_over(given: Constants, interval: float, share: float) -> float:
    """Return the parameters from which on one file every *interval* seconds costs more than *share* of the time."""
    many = consolidated(given, 1024, 1.0)
    return share * interval / sum(many.values())


def best(call: Callable[[], Any], times: int = 5) -> float:
    """Return the seconds of the fastest of some calls, all ranks at once."""
    taken = []
    for _ in range(times):
        dist.barrier()
        begin = time.perf_counter()
        call()
        dist.barrier()
        taken.append(time.perf_counter() - begin)
    return min(taken)


def work(parameters: int, folder: str) -> dict[str, float]:
    """Measure on this rank what the arithmetic says."""
    torch.set_num_threads(1)
    optimizer, model = wrapped(parameters)
    found = {"agreement, two rounds": 0.0}
    if dist.get_world_size() > 1:
        once = [_timed(lambda: rounds().exchange(Kind.GATE)) for _ in range(300)]
        found["agreement, two rounds"] = 2 * sorted(once)[len(once) // 2]
    optimizer.state_dict()  # connections are made at the first message
    found["gather"] = best(optimizer.state_dict, 3)
    names = iter(range(10))
    found["save_sharded"] = best(
        lambda: ice.save_sharded(f"{folder}/{next(names)}", {"model": model, "optimizer": optimizer}), 2
    )
    return found


def _timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def check(given: Constants, parameters: int) -> None:
    """Print the arithmetic beside what real ranks take."""
    print(f"\n| {parameters / 1e6:.0f}M parameters, s | ranks | computed | measured | measured / computed |")
    print("|---|---|---|---|---|")
    for ranks in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            found = launch(work, ranks, parameters, folder, timeout=300.0)[0]
        computed = {
            "agreement, two rounds": agreement(given, ranks),
            "gather": consolidated(given, ranks, parameters)["gather"],
            "save_sharded": sharded(given, ranks, parameters),
        }
        for name, seconds in found.items():
            ratio = f"{seconds / computed[name]:.1f}" if computed[name] else ""
            print(f"| {name} | {ranks} | {computed[name]:.4f} | {seconds:.4f} | {ratio} |", flush=True)


def main() -> None:
    """Compute, print, and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, default=30_000_000, help="of the real ranks")
    parser.add_argument("--network", type=float, default=10.0, help="GB a second of a rank's link")
    parser.add_argument("--write", type=float, default=1.0, help="GB a second of a rank's disk")
    parser.add_argument("--quick", action="store_true", help="a third of the parameters")
    asked = parser.parse_args()
    given = Constants(network=asked.network * GB, write=asked.write * GB)
    print(machine())
    print(given)
    table(given)
    print(f"\none file every 30 minutes costs 1 % of the time from {takes_over(given, 1800, 0.01):.1e} parameters on")
    here = Constants(network=given.network, write=given.write, disks=1)
    check(here, asked.parameters // 3 if asked.quick else asked.parameters)


if __name__ == "__main__":
    main()
