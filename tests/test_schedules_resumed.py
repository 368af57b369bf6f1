"""Every schedule, stopped after any epoch and resumed from a file: the rest is the same, bit by bit."""

import io
import timeit
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ignite.engine import Engine, Events

import ice_engine as ice
from ice_engine.errors import ArgumentValueError
from tests.test_schedules import EVERY, make

EPOCHS, LENGTH, WINDOW = 4, 10, 3  # the last window of an epoch has one micro-batch


class Run:
    """A run of 16 steps that notes the scheduled entry of each; a tuple entry by its first element."""

    def __init__(self, schedule: Any) -> None:
        self.key = schedule.dst.partition(".")[0]
        self.weight = torch.nn.Parameter(torch.ones(()))
        cls = torch.optim.AdamW if self.key == "betas" else torch.optim.SGD
        group = {"params": [self.weight], "depth": 2, "weight_decay": 0.01}
        self.optimizer = ice.Optimizer(cls([group], lr=0.5), processors=[schedule], accumulation_steps=WINDOW)
        self.values: list[Any] = []
        self.trainer = Engine(lambda engine, batch: self.optimizer.backward(self.weight * batch))
        self.optimizer.attach(self.trainer)
        completed = ice.OptimizerEvents.OPTIMIZER_STEP_COMPLETED
        self.trainer.add_event_handler(completed, lambda: self.values.append(self.optimizer.param_groups[0][self.key]))
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, self.measure)

    def measure(self, engine: Engine) -> None:
        """What a schedule that follows a metric sees: it never improves."""
        self.optimizer.report(loss=1.0, accuracy=0.5)

    def __call__(self) -> list[Any]:
        self.trainer.run([0.01] * LENGTH, max_epochs=EPOCHS)
        return self.values


@pytest.mark.parametrize("expression", [row.expression for row in EVERY])
@settings(max_examples=3)
@given(epochs=st.integers(1, EPOCHS - 1))
def test_it_goes_on_as_if_it_had_never_stopped(expression: str, epochs: int) -> None:
    schedule = make(expression)
    whole = Run(schedule)()
    first, second = Run(schedule), Run(make(expression))
    first.trainer.add_event_handler(Events.EPOCH_COMPLETED(once=epochs), lambda: first.trainer.terminate())
    first()
    file = io.BytesIO()
    torch.save({"trainer": first.trainer.state_dict(), "optimizer": first.optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second.trainer.load_state_dict(saved["trainer"])
    second.optimizer.load_state_dict(saved["optimizer"])
    second.weight.data.copy_(first.weight.data)

    assert first.values + second() == whole
    assert len(whole) == 16


@pytest.mark.parametrize(
    ("cls", "dst", "initial"),
    [
        (torch.optim.SGD, "lr", 0.1),
        (torch.optim.SGD, "momentum", 0.9),
        (torch.optim.SGD, "weight_decay", 0.01),
        (torch.optim.AdamW, "betas.0", 0.9),
        (torch.optim.AdamW, "betas.1", 0.999),
        (torch.optim.AdamW, "eps", 1e-8),
        (torch.optim.RMSprop, "alpha", 0.99),
        (torch.optim.SGD, "of_my_own", 3.0),
    ],
)
def test_any_entry_of_a_group_is_scheduled_in_a_run(cls: Any, dst: str, initial: float) -> None:
    settings = {"momentum": 0.9} if cls is torch.optim.SGD else {}
    group = {"params": [torch.nn.Parameter(torch.ones(()))], "weight_decay": 0.01, "of_my_own": 3.0}
    optimizer = ice.Optimizer(cls([group], lr=0.1, **settings), processors=[ice.schedules.linear(total=4, dst=dst)])
    key, _, index = dst.partition(".")
    seen = []
    for _ in range(4):
        optimizer.backward(group["params"][0] * 1.0)  # type: ignore[index]
        optimizer.update()
        value = optimizer.param_groups[0][key]
        seen.append(value[int(index)] if index else value)

    assert seen == pytest.approx([initial * (1 - t / 4) for t in range(4)], rel=1e-12)


def test_a_step_after_many_measurements_costs_what_one_after_few_does() -> None:
    def seconds(measured: int) -> float:
        weight = torch.nn.Parameter(torch.ones(()))
        schedule = ice.schedules.plateau(metric="loss")
        optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=0.5), processors=[schedule])
        state = optimizer.state_dict()
        state["ice_engine"]["measurements"] = {"loss": [1.0] * measured}
        optimizer.load_state_dict(state)

        def step() -> None:
            optimizer.report(loss=1.0)
            optimizer.backward(weight * 0.0)
            optimizer.update()

        return min(timeit.repeat(step, number=1, repeat=20))

    assert seconds(200_000) < 10 * seconds(1)


FOLLOWER = ice.schedules.plateau(metric="loss")


@pytest.mark.parametrize("processor", [FOLLOWER, FOLLOWER * ice.schedules.constant(), ice.Compose(FOLLOWER)])
def test_a_misspelt_metric_is_refused_however_deep_the_schedule_that_follows_it(processor: ice.Processor) -> None:
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=0.5), processors=[processor])

    with pytest.raises(ArgumentValueError, match=r"report\(los=...\): .* did you mean 'loss'\?"):
        optimizer.report(los=1.0)
    optimizer.report(accuracy=1.0)  # perhaps for a processor that reads its measurements


def test_groups_and_schedules_that_follow_one_metric_count_for_themselves() -> None:
    weights = [torch.nn.Parameter(torch.ones(())) for _ in range(2)]
    groups = [{"params": [w], "lr": lr, "weight_decay": 1.0} for w, lr in zip(weights, (1.0, 2.0), strict=True)]
    hasty = ice.schedules.plateau(metric="loss", factor=0.5, patience=0)
    patient = ice.schedules.plateau(metric="loss", factor=0.5, patience=1, dst="weight_decay")
    optimizer = ice.Optimizer(torch.optim.SGD(groups), processors=[hasty, patient])
    seen = []
    for _ in range(5):
        optimizer.report(loss=1.0)
        optimizer.backward(weights[0] * 0.0 + weights[1] * 0.0)
        optimizer.update()
        seen.append([(group["lr"], group["weight_decay"]) for group in optimizer.param_groups])

    steps = [(1.0, 1.0), (0.5, 1.0), (0.25, 0.5), (0.125, 0.5), (0.0625, 0.25)]
    assert seen == [[(lr, decay), (2 * lr, decay)] for lr, decay in steps]
