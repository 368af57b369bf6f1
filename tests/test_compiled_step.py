"""A schedule under a compiled step: a tensor lr is written in place, so nothing is compiled again."""

from typing import Any

import pytest
import torch
from ignite.engine import Engine
from torch._dynamo.testing import CompileCounter

import ice_engine as ice

STEPS = 8


def graphs_after_each_step(lr: Any, **settings: Any) -> tuple[list[int], list[float]]:
    torch._dynamo.reset()
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    adamw = torch.optim.AdamW(weights, lr=lr, **settings)
    counter = CompileCounter()
    adamw.step = torch.compile(adamw.step, backend=counter)  # type: ignore[method-assign]
    optimizer = ice.Optimizer(adamw, processors=[ice.schedules.cosine(warmup=2)])
    trainer = Engine(lambda engine, batch: optimizer.backward(sum(w.square().sum() for w in weights)))
    optimizer.attach(trainer)
    graphs, rates = [], []

    @trainer.on(ice.OptimizerEvents.OPTIMIZER_STEP_COMPLETED)
    def count() -> None:
        graphs.append(counter.frame_count)
        rates.append(float(optimizer.param_groups[0]["lr"]))

    trainer.run(range(STEPS))
    return graphs, rates


@pytest.mark.parametrize("settings", [{}, {"fused": True}], ids=str)
def test_a_changing_tensor_lr_compiles_once(settings: dict[str, Any]) -> None:
    graphs, rates = graphs_after_each_step(torch.tensor(0.5), **settings)

    assert len(set(rates)) == STEPS
    assert graphs[1:] == [graphs[1]] * (STEPS - 1)  # the first step makes the state, the second runs with it


def test_a_changing_float_lr_compiles_again_so_the_count_above_can_fail() -> None:
    tensor, _ = graphs_after_each_step(torch.tensor(0.5))
    number, rates = graphs_after_each_step(0.5)

    assert len(set(rates)) == STEPS
    assert number[-1] > tensor[-1]
