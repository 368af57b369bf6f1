"""The progress bar on a real run, as the real tqdm writes it."""

import io
import re

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar as IgnitesProgressBar

import ice_engine as ice
from ice_engine.errors import ArgumentValueError

SHOWN = re.compile(r"(\w+)(?: \[\d+/\d+\])?: \[(\d+)/(\d+|\?)\]")


def training(**settings):
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=0.1), **settings)

    def train_step(engine, batch):
        loss = weight * batch
        optimizer.backward(loss, weight=1)
        return loss.item()

    engine = Engine(train_step)
    optimizer.attach(engine)
    return engine, optimizer


def shown(terminal):
    """Return what stood before, how many were done and of how many, without repetitions."""
    return list(dict.fromkeys(SHOWN.findall(terminal.getvalue())))


@pytest.fixture
def terminal():
    return io.StringIO()


@pytest.fixture
def bar(terminal):
    return ice.ProgressBar(persist=True, file=terminal, mininterval=0, miniters=1)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, 15),
        ({"accumulation_steps": 2}, 9),
        ({"accumulation_steps": 2, "tail": "drop"}, 6),
        ({"accumulation_steps": 2, "tail": "carry"}, 8),
        ({"effective_batch_size": 3}, 6),
    ],
)
def test_on_the_step_event_it_counts_steps_of_the_whole_run(terminal, bar, settings, steps):
    engine, optimizer = training(**settings)
    bar.attach(engine, event_name=optimizer.event("STEP_COMPLETED"))
    engine.run([1.0] * 5, max_epochs=3)
    assert optimizer.clocks["step"] == steps
    assert shown(terminal) == [("Step", str(step), str(steps)) for step in range(1, steps + 1)]


def test_a_run_of_max_iters_has_its_total(terminal, bar):
    engine, optimizer = training(accumulation_steps=2)
    bar.attach(engine, event_name=optimizer.event("STEP_COMPLETED"))
    engine.run([1.0] * 5, max_iters=7)
    assert shown(terminal)[-1] == ("Step", "4", "4")


def test_data_of_unknown_length_has_a_bar_without_an_end(terminal, bar):
    engine, optimizer = training(accumulation_steps=2)
    bar.attach(engine, event_name=optimizer.event("STEP_COMPLETED"))
    engine.run(iter([1.0] * 5), max_epochs=1)
    assert shown(terminal) == [("Step", str(step), "?") for step in (1, 2, 3)]


def test_a_filter_and_a_description_are_as_in_ignite(terminal):
    engine, optimizer = training()
    bar = ice.ProgressBar(persist=True, file=terminal, mininterval=0, desc="updates")
    bar.attach(
        engine, event_name=optimizer.event("STEP_COMPLETED")(every=2), output_transform=lambda loss: {"loss": 0.5}
    )
    engine.run([1.0] * 6)
    assert shown(terminal)[-3:] == [("updates", str(step), "6") for step in (2, 4, 6)]
    assert "loss=0.5" in terminal.getvalue()


def test_a_skipped_step_moves_nothing_and_the_end_is_full(terminal, bar):
    engine, optimizer = training(nonfinite="skip")
    bar.attach(engine, event_name=optimizer.event("STEP_COMPLETED"))
    engine.run([1.0, float("nan"), 1.0])
    assert shown(terminal) == [("Step", step, "3") for step in ("1", "2", "3")]


def test_a_resumed_run_goes_on_where_it_was(terminal, bar):
    engine, optimizer = training(accumulation_steps=2)
    engine.run([1.0] * 4, max_epochs=2)
    states = engine.state_dict(), optimizer.state_dict()
    engine, optimizer = training(accumulation_steps=2)
    engine.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    bar.attach(engine, event_name=optimizer.event("STEP_COMPLETED"))
    engine.run([1.0] * 4, max_epochs=4)
    assert shown(terminal) == [("Step", str(step), "8") for step in (5, 6, 7, 8)]


def test_of_two_optimizers_each_has_a_bar(terminal, bar):
    first, second = torch.nn.Parameter(torch.ones(())), torch.nn.Parameter(torch.ones(()))
    actor = ice.Optimizer(torch.optim.SGD([first], lr=0.1), name="actor")
    critic = ice.Optimizer(torch.optim.SGD([second], lr=0.1), name="critic", accumulation_steps=3)

    def train_step(engine, batch):
        actor.backward(first * batch)
        critic.backward(second * batch)

    engine = Engine(train_step)
    actor.attach(engine)
    critic.attach(engine)
    bar.attach(engine, event_name=critic.event("STEP_COMPLETED"), state_attributes=["actor_step"])
    engine.run([1.0] * 6)
    assert shown(terminal) == [("Step", "1", "2"), ("Step", "2", "2")]
    assert "actor_step=6" in terminal.getvalue()


@pytest.mark.parametrize("kind", [ice.ProgressBar, IgnitesProgressBar])
def test_on_iterations_it_is_ignites_and_may_show_the_step(terminal, kind):
    engine, _ = training(accumulation_steps=2)
    kind(persist=True, file=terminal, mininterval=0).attach(engine, state_attributes=["optimizer_step"])
    engine.run([1.0] * 4, max_epochs=2)
    text = terminal.getvalue()
    assert shown(terminal) == [("Epoch", str(n), "4") for n in (1, 2, 3, 4)]
    assert "Epoch [2/2]: [4/4]" in text
    assert "optimizer_step=4" in text


def test_what_it_cannot_count_is_refused_when_attached(bar):
    engine, optimizer = training()
    with pytest.raises(
        ArgumentValueError, match=r"spans the run, .*=EPOCH_COMPLETED: .* state_attributes=\['optimizer_s"
    ):
        bar.attach(engine, event_name=optimizer.event("STEP_COMPLETED"), closing_event_name=Events.EPOCH_COMPLETED)
    with pytest.raises(
        ArgumentValueError, match="counts OPTIMIZER_STEP_COMPLETED, got event_name=OPTIMIZER_STEP_SKIPPED"
    ):
        bar.attach(engine, event_name=optimizer.event("STEP_SKIPPED"))
    with pytest.raises(ValueError, match="not in allowed events"):
        bar.attach(Engine(lambda engine, batch: None), event_name=optimizer.event("STEP_COMPLETED"))
    assert not bar.pbar
