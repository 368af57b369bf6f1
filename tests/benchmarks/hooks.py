"""What hooks cost that do not fire: ``python tests/benchmarks/hooks.py --check``.

A tiny model trains with none, 10 and 100 of them on events that do not come, and with as many that Ignite asks at each
step whether they want it, as ``every=`` makes them. The former must not cost anything; the latter cost a question each.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from ignite.engine import Events
from measure import Case, Loop, run
from step import wrapped
from work import TINY

import ice_engine as ice

NEVER = 10**9
BOUND = 1.05  # what two equal loops differ by


def train(hooks: int, batches: Iterator[Any], *, filtered: bool = False) -> None:
    model, optimizer = wrapped(TINY())
    trainer = ice.create_trainer(model, optimizer, torch.nn.functional.mse_loss)
    steps = optimizer.event("STEP_COMPLETED")(every=NEVER)
    for i in range(hooks):
        event = steps if filtered else (Events.EPOCH_COMPLETED, optimizer.event("STEP_SKIPPED"))[i % 2]
        optimizer.hooks.add(event, lambda: None, name=f"hook_{i}")
    trainer.run(batches, max_epochs=1)


def cases() -> list[Case]:
    loops: dict[str, Loop] = {f"{n} hooks on other events": functools.partial(train, n) for n in (0, 10, 100)}
    loops |= {f"{n} hooks, every={NEVER:.0e}": functools.partial(train, n, filtered=True) for n in (10, 100)}
    batch = torch.randn(8, 16), torch.randn(8, 1)
    bounds = {f"{n} hooks on other events": BOUND for n in (10, 100)}
    return [Case("tiny k=1", loops, batch, 100, bounds)]


if __name__ == "__main__":
    run(cases())
