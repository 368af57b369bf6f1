"""The engine of create_trainer is Ignite's, but for the time that events without a handler take."""

import gc
import logging

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import BasicTimeProfiler, HandlersTimeProfiler
from ignite.metrics import RunningAverage

import ice_engine as ice
from ice_engine.quiet_engine import QuietEngine

BOTH = pytest.mark.parametrize("kind", [Engine, QuietEngine])


def log_of(kind, caplog):
    caplog.clear()
    engine = kind(lambda engine, batch: batch)
    with caplog.at_level(logging.DEBUG, logger="ignite.engine.engine.Engine"):
        engine.run([1, 2], max_epochs=2)
    return [(record.name, record.levelno, record.getMessage().partition("Time taken")[0]) for record in caplog.records]


def test_it_writes_the_log_that_ignite_writes(caplog, monkeypatch):
    # Other tests of this process may have turned it off.
    monkeypatch.setattr(logging.getLogger("ignite.engine.engine.Engine"), "disabled", False)
    plain = log_of(Engine, caplog)

    assert log_of(QuietEngine, caplog) == plain
    assert ("ignite.engine.engine.Engine", logging.DEBUG) in {entry[:2] for entry in plain}


def events_of(kind):
    seen = []
    engine = kind(lambda engine, batch: seen.append(("step", engine.last_event_name)))
    for event in Events:
        if event is not Events.EXCEPTION_RAISED:
            engine.add_event_handler(event, lambda *a, _e=event, **k: seen.append((_e.name, len(a), sorted(k))))
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda: engine.terminate_epoch())
    engine.run(range(2), max_epochs=3, epoch_length=2)
    return seen


@BOTH
def test_every_event_fires_in_its_order_with_its_arguments(kind):
    seen = events_of(kind)
    assert seen == events_of(Engine)
    assert any(name == "TERMINATE_SINGLE_EPOCH" for name, *_ in seen)


def test_an_exception_leaves_it_as_it_leaves_ignites():
    def fail(engine, batch):
        raise ValueError(batch)

    with pytest.raises(ValueError, match="1"):
        QuietEngine(fail).run([1])


def test_profilers_and_metrics_of_ignite_work_on_it():
    engine = QuietEngine(lambda engine, batch: batch)
    basic, of_handlers = BasicTimeProfiler(), HandlersTimeProfiler()
    basic.attach(engine)
    of_handlers.attach(engine)
    RunningAverage(output_transform=float).attach(engine, "mean")
    state = engine.run([torch.tensor(1.0)] * 3)

    assert state.metrics["mean"] == pytest.approx(1.0)
    assert basic.get_results()["event_handlers_stats"]


def test_an_engine_that_is_gone_is_told_as_ignite_tells_it():
    first, second = (QuietEngine(lambda engine, batch: None) for _ in range(2))
    first.add_event_handler(Events.STARTED, lambda engine: None)
    second._event_handlers = first._event_handlers
    del first
    gc.collect()

    with pytest.raises(RuntimeError, match="reference not resolved"):
        second.run([1])


def test_create_trainer_makes_one():
    model = torch.nn.Linear(2, 1)
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1))

    assert type(ice.create_trainer(model, optimizer, torch.nn.functional.mse_loss)) is QuietEngine
