"""How long the plan of a long run takes: ``python tests/benchmarks/plan.py --check``.

Every value of every scheduled key at every step, by the processors themselves: 1e6 steps, with ``--quick`` 1e5;
of many groups a tenth of that.
"""

import argparse
import time

import torch
from measure import machine

import ice_engine as ice

EPOCH = 10_000  # iterations
BOUND = 10.0  # us a step with one group and one schedule: a plan of 1e6 steps in 10 s
SCHEDULES = {
    "cosine(total=, warmup=)": lambda total: [ice.schedules.cosine(total=total, warmup=2000)],
    "warmup(steps=2000) * cosine()": lambda total: [ice.schedules.warmup(steps=2000) * ice.schedules.cosine()],
}


def seconds(processors: list[ice.schedules.Schedule], groups: int, steps: int) -> float:
    own = [{"params": [torch.nn.Parameter(torch.ones(()))]} for _ in range(groups)]
    optimizer = ice.Optimizer(torch.optim.AdamW(own), processors=processors)
    begin = time.perf_counter()
    plan = optimizer.plan(EPOCH, steps // EPOCH)
    taken = time.perf_counter() - begin
    assert len(plan) == steps
    return taken


def main() -> None:
    """Plan, print a table, and with ``--check`` fail where the bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")
    parser.add_argument("--check", action="store_true", help="fail beyond the bound")
    asked = parser.parse_args()
    steps = 100_000 if asked.quick else 1_000_000
    torch.set_num_threads(1)
    print(machine())
    print("\n| plan | groups | steps | s | us a step |\n|---|---|---|---|---|")
    worst = 0.0
    for name, make in SCHEDULES.items():
        for groups, length in ((1, steps), (24, steps // 10)):
            taken = seconds(make(length), groups, length)
            if groups == 1:
                worst = max(worst, 1e6 * taken / length)
            print(f"| {name} | {groups} | {length:.0e} | {taken:.2f} | {1e6 * taken / length:.1f} |", flush=True)
    print(f"\none group: {worst:.1f} us a step, at most {BOUND:.0f}")
    if asked.check and worst > BOUND:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
