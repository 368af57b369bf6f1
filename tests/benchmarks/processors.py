"""What schedules cost by the number of param groups: ``python tests/benchmarks/processors.py --check``.

A window is closed by ``update()``: three keys of each group follow a schedule, and the record is made. The optimizer
that is wrapped does nothing, so that what is left is ours. A window costs what it says; schedules the difference to
the same groups without any.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import machine

import ice_engine as ice

GROUPS = (1, 3, 10, 30, 100)
BOUND = 250.0  # us for 100 groups
KEYS = ("lr", "weight_decay", "momentum")


class Still(torch.optim.SGD):
    """Does not step."""

    def step(self, closure: Any = None) -> None:
        pass


def window(groups: int, *, scheduled: bool, distinct: bool) -> Callable[[], float]:
    """Return what closes a window and says how many seconds that took."""
    parameters = [torch.nn.Parameter(torch.ones(())) for _ in range(groups)]
    own = [1.0 + i * distinct for i in range(groups)]
    optimizer = ice.Optimizer(
        Still(
            [{"params": [p], "lr": n, "weight_decay": n, "momentum": n} for p, n in zip(parameters, own, strict=True)]
        ),
        processors=[ice.schedules.cosine(total=10**9, warmup=50, dst=key) for key in KEYS] if scheduled else (),
    )
    gradient = torch.ones(())

    def close() -> float:
        parameters[0].grad = gradient
        begin = time.perf_counter()
        optimizer.update()
        return time.perf_counter() - begin

    return close


def measured(groups: int, rounds: int) -> dict[str, tuple[float, float, float]]:
    """Return the quartiles of us of a window, of each kind."""
    kinds = {
        "none": window(groups, scheduled=False, distinct=False),
        "three keys": window(groups, scheduled=True, distinct=False),
        "three keys, each group from its own value": window(groups, scheduled=True, distinct=True),
    }
    taken: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(-20, rounds):
        for name, close in kinds.items():
            seconds = close()
            if turn >= 0:
                taken[name].append(1e6 * seconds)
    more = {name: [a - b for a, b in zip(own, taken["none"], strict=True)] for name, own in taken.items()}
    found = {f"window, {name}": own for name, own in taken.items()}
    found |= {f"schedules, {name}": own for name, own in more.items() if name != "none"}
    return {name: tuple(statistics.quantiles(own, n=4)) for name, own in found.items()}  # type: ignore[misc]


def main(argv: Any = None) -> None:
    """Measure, print a table, and with ``--check`` fail where the bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--check", action="store_true", help="fail beyond the bound")
    parser.add_argument("--json", type=Path, help="where the numbers go")
    settings = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(machine())
    found = {groups: measured(groups, 200 if settings.quick else settings.rounds) for groups in GROUPS}
    print(f"\n| us a window, by groups | {' | '.join(map(str, GROUPS))} |\n|---|{'---|' * len(GROUPS)}")
    for name in found[1]:
        cells = (f"{middle:.0f} ({low:.0f}-{high:.0f})" for low, middle, high in (found[g][name] for g in GROUPS))
        print(f"| {name} | {' | '.join(cells)} |")
    worst = max(found[100][name][1] for name in found[100] if name.startswith("schedules"))
    print(f"\nschedules of 100 groups: {worst:.0f} us, at most {BOUND:.0f}")
    if settings.json:
        settings.json.write_text(json.dumps({"machine": machine(), "microseconds": found}, indent=1))
    if settings.check and worst > BOUND:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
