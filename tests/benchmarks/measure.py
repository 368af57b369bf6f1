"""How the benchmarks measure: loops side by side, slice by slice, as ratios to the one written by hand.

Each loop runs in a process of its own, with a heap of its own, and only one of them is awake: a slice of one loop, a
slice of the next, and round again, so that all meet the same machine. A loop takes its batches from an endless
iterator, which is where a slice begins and ends; the loop knows nothing of it. Ratios are of neighbouring slices, and
what is printed is their median, with quartiles. Two equal loops come out within 5 % of each other on a busy machine, so
nothing smaller is claimed.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import ignite
import torch

Loop = Callable[[Iterator[Any]], None]
"""Takes one batch after the other and trains on it, until there are no more."""

_WARM_UP = 3  # slices that are not counted: the first ones allocate
# Else glibc gives freed memory back and takes it again at every step, or not, by luck of the heap.
STEADY_HEAP = {"MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000"}
# Where memory itself is measured: each large tensor is a mapping of its own, new when made and given back when freed.
EXACT_HEAP = {"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Case:
    """One question: which loops, and how much a slice is.

    Attributes:
        name: The table's column.
        loops: By name; the first is what the others are divided by.
        batch: One batch, given again and again.
        slice: Batches in a slice, of about 10 ms.
        bounds: What the ratio of a loop may be at most, for ``--check``.
        threads: Of torch, in each loop.
        environment: Of each loop's process, beside what it inherits.
    """

    name: str
    loops: Mapping[str, Loop]
    batch: Any
    slice: int
    bounds: Mapping[str, float]
    threads: int = 1
    environment: Mapping[str, str] = dataclasses.field(default_factory=STEADY_HEAP.copy)


@dataclass(frozen=True)
class Ratio:
    """How long a loop takes in comparison, and how long the first one takes.

    Attributes:
        low: First quartile.
        median: The ratio.
        high: Third quartile.
        seconds: Median of a batch.
    """

    low: float
    median: float
    high: float
    seconds: float


def measure(case: Case, slices: int) -> dict[str, Ratio]:
    """Run the loops of *case* in turn and return the ratio of each to the first one."""
    context = multiprocessing.get_context("spawn")
    workers, processes = {}, []
    with mock.patch.dict(os.environ, case.environment):  # read where a process starts, and the next case's is another
        for name, loop in case.loops.items():
            baton, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(loop, case, theirs), daemon=True)
            worker.start()
            theirs.close()  # else a loop that died would be waited for
            workers[name] = baton
            processes.append(worker)
    taken: dict[str, list[float]] = {name: [] for name in workers}
    for number in range(-_WARM_UP, slices):
        for name, baton in workers.items():
            baton.send(True)
            seconds = baton.recv() / case.slice
            if number >= 0:
                taken[name].append(seconds)
    for baton in workers.values():
        baton.send(False)
    for process in processes:
        process.join(60)  # they write to the end into folders that are removed after it
    first = next(iter(taken.values()))
    return {name: _ratio(own, first) for name, own in taken.items()}


def _ratio(own: list[float], first: list[float]) -> Ratio:
    ratios = [mine / theirs for mine, theirs in zip(own, first, strict=True)]
    return Ratio(*statistics.quantiles(ratios, n=4), statistics.median(own))


def _work(loop: Loop, case: Case, baton: Connection) -> None:
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    loop(_slices(case.batch, case.slice, baton))


def _slices(batch: Any, size: int, baton: Connection) -> Iterator[Any]:
    while baton.recv():
        begin = time.perf_counter()
        for _ in range(size):
            yield batch
        baton.send(time.perf_counter() - begin)


def machine() -> str:
    """Return what it was measured on."""
    versions = f"torch {torch.__version__}, ignite {ignite.__version__}, Python {platform.python_version()}"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; {versions}"


def table(results: Mapping[str, Mapping[str, Ratio]]) -> str:
    """Return a Markdown table, with a column for each case and a row for each loop."""
    loops = list(dict.fromkeys(loop for found in results.values() for loop in found))
    rows = [["", *results], ["---", *("---" for _ in results)]]
    rows += [[loop, *(_cell(found.get(loop)) for found in results.values())] for loop in loops]
    first = [next(iter(found.values())) for found in results.values()]
    rows.append(["1.00 is, in us", *(f"{1e6 * ratio.seconds:.0f}" for ratio in first)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)


def _cell(ratio: Ratio | None) -> str:
    return "" if ratio is None else f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"


def run(cases: list[Case], argv: Any = None) -> None:
    """Measure what the command line asks for, print a table, and with ``--check`` fail where a bound is broken."""
    parser = argparse.ArgumentParser(description=(sys.modules["__main__"].__doc__ or "").split("\n")[0])
    parser.add_argument("--slices", type=int, default=100, help="of each loop")
    parser.add_argument("--quick", action="store_true", help="a fifth of them")
    parser.add_argument("--only", nargs="*", default=[], help="cases whose names contain one of these")
    parser.add_argument("--loops", nargs="*", default=[], help="loops whose names contain one of these, and the first")
    parser.add_argument("--check", action="store_true", help="fail where a ratio is beyond its bound")
    parser.add_argument("--json", type=Path, help="where the numbers go")
    settings = parser.parse_args(argv)
    slices = max(2, settings.slices // 5 if settings.quick else settings.slices)
    unknown = [word for word in settings.only if not any(word in case.name for case in cases)]
    unknown += [word for word in settings.loops if not any(word in loop for case in cases for loop in case.loops)]
    if unknown:
        parser.error(f"no case or loop has {unknown} in its name; cases: {[case.name for case in cases]}")
    print(machine())
    results = {}
    for case in cases:
        if settings.only and not any(word in case.name for word in settings.only):
            continue
        first = next(iter(case.loops))
        chosen = {
            name: loop
            for name, loop in case.loops.items()
            if name == first or not settings.loops or any(word in name for word in settings.loops)
        }
        results[case.name] = measure(dataclasses.replace(case, loops=chosen), slices)
    print(table(results))
    if settings.json:
        plain = {case: {loop: vars(ratio) for loop, ratio in found.items()} for case, found in results.items()}
        settings.json.write_text(json.dumps({"machine": machine(), "results": plain}, indent=1))
    broken = [
        f"{loop} in {case.name}: {found[loop].median:.2f}, at most {bound:.2f}"
        for case in cases
        if (found := results.get(case.name))
        for loop, bound in case.bounds.items()
        if loop in found and found[loop].median > bound
    ]
    print("\n".join(broken) if broken else "every ratio is within its bound")
    if settings.check and broken:
        raise SystemExit(1)
