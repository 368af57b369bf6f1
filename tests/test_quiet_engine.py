"""The engine of create_trainer is Ignite's, but for the time that events without a handler take."""

import copy
import gc
import logging

import pytest
import torch
from ignite.engine import Engine, Events, State
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


def filtered(kind):
    """Run handlers with all kinds of filters, some of which change what others go by, and return which were called."""
    seen = []
    engine = kind(lambda engine, batch: batch)
    event, kinds = Events.ITERATION_COMPLETED, {"every": 3, "once": [2, 5, 11], "after": 7}
    asked = iter([True, False, False] * 100)

    def note(_, name):
        seen.append((engine.state.iteration, name))

    for key, value in kinds.items():
        engine.add_event_handler(event(**{key: value}), note, key)
    engine.add_event_handler(event(before=4), note, "before")
    engine.add_event_handler(event(every=2, after=3, before=13), note, "all three")
    engine.add_event_handler(event(event_filter=lambda engine, count: next(asked)), note, "asked")
    engine.add_event_handler(event(every=4) | Events.EPOCH_COMPLETED(every=2), note, "list")
    leaves = engine.add_event_handler(event(every=2), note, "leaves")
    engine.add_event_handler(event(once=8), leaves.remove)
    engine.add_event_handler(event(once=6), lambda: engine.add_event_handler(event(every=2), note, "came"))

    def skip(engine):
        engine.state.iteration += 1  # the handlers behind it see another count

    engine.add_event_handler(event(once=9), skip)
    for key, value in kinds.items():
        engine.add_event_handler(event(**{key: value}), note, f"{key} behind")
    engine.add_event_handler(event(every=5), engine.terminate_epoch)
    engine.run(range(6), max_epochs=4)
    return seen


def test_filters_let_through_what_ignites_let_through():
    seen = filtered(QuietEngine)
    assert seen == filtered(Engine)
    assert {name for _, name in seen} >= {
        "every",
        "once behind",
        "before",
        "all three",
        "asked",
        "list",
        "leaves",
        "came",
    }


def test_filters_of_a_copied_engine_ask_the_state_that_ignites_ask():
    def called(kind):
        seen = []
        engine = kind(lambda engine, batch: batch)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=2), lambda: seen.append(twin.state.iteration))
        twin = copy.deepcopy(engine)
        twin.run(range(4))
        return seen

    assert called(QuietEngine) == called(Engine) == [1, 2, 3, 4]  # the engine that was copied stays at 0


def test_the_count_is_read_once_for_all_handlers_that_stay_silent(monkeypatch):
    engine, reads, read = QuietEngine(lambda engine, batch: batch), [], State.get_event_attrib_value
    for _ in range(100):
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=10), lambda: None)
    monkeypatch.setattr(State, "get_event_attrib_value", lambda *given: reads.append(given) or read(*given))
    engine.run(range(3))

    assert len(reads) == 3


def test_a_profiler_sees_handlers_that_stay_silent_too():
    def rows(kind):
        engine, profiler = kind(lambda engine, batch: batch), HandlersTimeProfiler()
        profiler.EVENT_FILTER_THESHOLD_TIME = 0.0  # it takes what is silent for what is quick: by the machine
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=10), lambda: None)
        profiler.attach(engine)
        engine.run(range(3))
        return [len(times) for times in profiler.event_handlers_times[Events.ITERATION_COMPLETED].values()]

    assert rows(QuietEngine) == rows(Engine) == [3]
