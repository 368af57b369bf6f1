"""The optimizer's events: which fire when, what they count, and what they leave alone."""

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import (
    BasicTimeProfiler,
    EMAHandler,
    HandlersTimeProfiler,
    LRScheduler,
    ModelCheckpoint,
    Timer,
    global_step_from_engine,
)

import ice_engine as ice
from ice_engine.errors import ArgumentTypeError, ArgumentValueError
from ice_engine.events import fire, register

KINDS = ("GRADIENTS_READY", "STEP_STARTED", "STEP_COMPLETED", "STEP_SKIPPED")


def parts(name="optimizer", **settings):
    """An engine whose batch is the gradient of a single weight, and the optimizer attached to it."""
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=0.1), name=name, **settings)
    engine = Engine(lambda engine, batch: optimizer.backward(weight * batch))
    return engine, optimizer.attach(engine)


# -- names ----------------------------------------------------------------------------------------------------------


def test_the_events_of_the_default_name_are_optimizer_events():
    assert ice.optimizer_events() is ice.optimizer_events("optimizer") is ice.OptimizerEvents
    assert [event.name for event in ice.OptimizerEvents] == [f"OPTIMIZER_{kind}" for kind in KINDS]


def test_another_name_has_its_own_events_always_the_same():
    events = ice.optimizer_events("generator")
    assert ice.optimizer_events("generator") is events
    assert [(event.name, event.value) for event in events] == [
        (f"GENERATOR_{kind}", f"generator_{kind.lower()}") for kind in KINDS
    ]
    assert parts("generator")[1].events is events


def test_an_event_that_is_not_there_says_which_are():
    assert not hasattr(ice.OptimizerEvents, "OPTIMIZER_STEPPED")
    with pytest.raises(AttributeError, match="GeneratorEvents has no OPTIMIZER_STEP_COMPLETED, only GENERATOR_GRADIE"):
        ice.optimizer_events("generator").OPTIMIZER_STEP_COMPLETED  # noqa: B018 - asked for, not used


def test_no_event_of_ours_equals_one_of_ignite_or_of_another_name():
    names = [event.name for name in ("optimizer", "generator", "critic") for event in ice.optimizer_events(name)]
    names += [event.name for event in Events]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["", "two words", "1st", "a.b", "a-b"])
def test_a_name_that_is_no_identifier_is_refused(name):
    with pytest.raises(ArgumentValueError, match="name must be an identifier, got"):
        ice.optimizer_events(name)


@pytest.mark.parametrize("name", [None, 3, b"optimizer", ["generator"]])
def test_a_name_that_is_no_string_is_refused(name):
    with pytest.raises(ArgumentTypeError, match="name must be a string, got"):
        ice.optimizer_events(name)


# -- when -----------------------------------------------------------------------------------------------------------


def test_the_events_of_a_window_fire_in_order_and_a_skip_instead_of_a_step():
    engine, optimizer = parts(accumulation_steps=2, clip=ice.clip_norm(1.0))
    seen = []
    for kind in KINDS:
        engine.add_event_handler(
            optimizer.event(kind),
            lambda engine, kind=kind: seen.append((engine.state.iteration, engine.state.epoch, kind)),
        )
    engine.run([1.0, 2.0, float("nan"), 1.0, 3.0])
    step = ("GRADIENTS_READY", "STEP_STARTED", "STEP_COMPLETED")
    assert seen == [
        *((2, 1, kind) for kind in step),
        (4, 1, "GRADIENTS_READY"),
        (4, 1, "STEP_SKIPPED"),
        *((5, 1, kind) for kind in step),
    ]


def test_handlers_on_ignites_events_see_the_step_already_taken():
    engine, _ = parts(accumulation_steps=2)
    steps = []
    engine.add_event_handler(
        Events.ITERATION_COMPLETED | Events.EPOCH_COMPLETED, lambda engine: steps.append(engine.state.optimizer_step)
    )
    engine.run([1.0, 2.0, 3.0])
    assert steps == [0, 1, 1, 2]


# -- counted filters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"every": 3}, [3, 6]),
        ({"every": 1}, [1, 2, 3, 4, 5, 6, 7]),
        ({"once": 4}, [4]),
        ({"once": [2, 7]}, [2, 7]),
        ({"before": 3}, [1, 2]),
        ({"after": 5}, [6, 7]),
        ({"after": 2, "before": 6}, [3, 4, 5]),
        pytest.param({"event_filter": lambda engine, step: step % 4 == 1}, [1, 5], id="event_filter"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["STEP_STARTED", "STEP_COMPLETED"])
def test_filters_count_steps_not_iterations(settings, expected, kind):
    engine, optimizer = parts(accumulation_steps=2)
    steps = []
    engine.add_event_handler(
        optimizer.event(kind)(**settings), lambda engine: steps.append(engine.state.optimizer_step)
    )
    engine.run([1.0] * 14)
    assert steps == expected


def test_skips_count_their_own_event_and_attempts_count_gradients_ready():
    engine, optimizer = parts(clip=ice.clip_norm(1.0))
    seen = {"GRADIENTS_READY": [], "STEP_COMPLETED": [], "STEP_SKIPPED": []}
    for kind, iterations in seen.items():
        engine.add_event_handler(
            optimizer.event(kind)(every=2), lambda engine, i=iterations: i.append(engine.state.iteration)
        )
    nan = float("nan")
    engine.run([1.0, nan, nan, 1.0, nan, nan])
    assert seen == {"GRADIENTS_READY": [2, 4, 6], "STEP_COMPLETED": [4], "STEP_SKIPPED": [3, 6]}
    assert (engine.state.optimizer_attempt, engine.state.optimizer_step, engine.state.optimizer_skipped) == (6, 2, 4)


def test_events_are_joined_with_each_other_and_with_ignites():
    engine, optimizer = parts(accumulation_steps=2)
    seen = []
    engine.add_event_handler(
        optimizer.events.OPTIMIZER_STEP_COMPLETED(every=2) | Events.EPOCH_COMPLETED,
        lambda engine: seen.append(engine.last_event_name.name),
    )
    engine.run([1.0] * 5)
    assert seen == ["OPTIMIZER_STEP_COMPLETED", "EPOCH_COMPLETED"]


def test_a_filter_on_one_engine_reads_the_counter_of_that_engine():
    first, first_optimizer = parts()
    second, second_optimizer = parts()
    steps = []
    for engine, optimizer in ((first, first_optimizer), (second, second_optimizer)):
        engine.add_event_handler(
            optimizer.events.OPTIMIZER_STEP_COMPLETED(every=2), lambda e: steps.append(e.state.optimizer_step)
        )
    first.run([1.0] * 3)
    assert steps == [2]
    second.run([1.0] * 5)
    assert steps == [2, 2, 4]
    assert (first.state.optimizer_step, second.state.optimizer_step) == (3, 5)


def test_two_optimizers_of_one_engine_count_apart():
    weights = {name: torch.nn.Parameter(torch.ones(())) for name in ("generator", "critic")}
    optimizers = {
        name: ice.Optimizer(torch.optim.SGD([weight], lr=0.1), name=name, accumulation_steps=k)
        for (name, weight), k in zip(weights.items(), (3, 1), strict=True)
    }

    def train_step(engine, batch):
        for name, optimizer in optimizers.items():
            optimizer.backward(weights[name] * batch)

    engine, seen = Engine(train_step), []
    for name, optimizer in optimizers.items():
        optimizer.attach(engine)
        engine.add_event_handler(
            optimizer.event("STEP_COMPLETED")(every=2), lambda e, name=name: seen.append((name, e.state.iteration))
        )
    engine.run([1.0] * 6)
    assert seen == [("critic", 2), ("critic", 4), ("generator", 6), ("critic", 6)]
    assert (engine.state.generator_step, engine.state.critic_step) == (2, 6)


# -- registration, and what is left alone ---------------------------------------------------------------------------


def test_registering_twice_registers_once():
    engine = Engine(lambda engine, batch: None)
    before = len(engine._allowed_events)
    first, again = register(engine, "optimizer"), register(engine, "optimizer")
    assert first == again
    assert list(first) == list(KINDS)
    assert len(engine._allowed_events) == before + 4


def test_attaching_again_after_detach_registers_no_event_twice():
    engine, optimizer = parts()
    before = list(engine._allowed_events)
    optimizer.detach()
    optimizer.attach(engine)
    assert engine._allowed_events == before


def test_an_event_without_listeners_is_not_fired():
    engine = Engine(lambda engine, batch: None)
    event = register(engine, "optimizer")["STEP_COMPLETED"]
    engine.last_event_name = Events.EPOCH_COMPLETED
    fire(engine, event)
    assert event not in engine._event_handlers
    assert engine.last_event_name == Events.EPOCH_COMPLETED


def test_the_name_of_the_last_event_is_restored_even_if_a_handler_fails():
    engine = Engine(lambda engine, batch: None)
    event, seen = register(engine, "optimizer")["STEP_COMPLETED"], []

    def fail(engine):
        seen.append(engine.last_event_name)
        message = "handler failed"
        raise ValueError(message)

    engine.add_event_handler(event, fail)
    engine.last_event_name = Events.ITERATION_COMPLETED
    with pytest.raises(ValueError, match="handler failed"):
        fire(engine, event)
    assert seen == [event]
    assert engine.last_event_name == Events.ITERATION_COMPLETED


def test_ignites_checkpoint_still_numbers_its_files_by_iteration(tmp_path):
    engine, optimizer = parts(accumulation_steps=2)
    engine.add_event_handler(optimizer.events.OPTIMIZER_STEP_COMPLETED, lambda: None)
    saver = ModelCheckpoint(
        tmp_path, "m", n_saved=None, global_step_transform=global_step_from_engine(engine), require_empty=False
    )
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=2), saver, {"weights": torch.nn.Linear(1, 1)})
    engine.run([1.0] * 6)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m_weights_2.pt", "m_weights_4.pt", "m_weights_6.pt"]


def test_an_epoch_of_unknown_length_still_ends():
    engine, optimizer = parts(accumulation_steps=2)
    engine.add_event_handler(optimizer.events.OPTIMIZER_STEP_COMPLETED, lambda: None)
    epochs = []
    engine.add_event_handler(
        Events.EPOCH_COMPLETED, lambda e: epochs.append((e.state.iteration, e.state.optimizer_step))
    )
    engine.run(iter([1.0] * 3), max_epochs=1)
    assert epochs == [(3, 2)]


# -- the ecosystem --------------------------------------------------------------------------------------------------


def test_handlers_time_profiler_measures_our_events_once():
    engine, optimizer = parts(accumulation_steps=2)

    def measured(engine):
        sum(range(30000))

    engine.add_event_handler(optimizer.events.OPTIMIZER_STEP_COMPLETED, measured)
    profiler = HandlersTimeProfiler()
    profiler.attach(engine)
    engine.run([1.0] * 6)
    times = profiler.event_handlers_times[optimizer.events.OPTIMIZER_STEP_COMPLETED]
    assert [len(values) for values in times.values()] == [3]
    assert engine.state.optimizer_step == 3
    # It takes its own handlers off at the end, and ours are as before.
    assert not any(hasattr(entry[0], "_profiler_original") for e in engine._event_handlers.values() for entry in e)
    engine.run([1.0] * 4)
    assert engine.state.optimizer_step == 2


def test_basic_time_profiler_runs_along(capsys):
    engine, _ = parts(accumulation_steps=2)
    profiler = BasicTimeProfiler()
    profiler.attach(engine)
    engine.run([1.0] * 5, max_epochs=2)
    profiler.print_results(profiler.get_results())
    assert "Processing function" in capsys.readouterr().out
    assert engine.state.optimizer_step == 6


def test_timer_scheduler_and_moving_average_attach_to_our_events():
    engine, optimizer = parts(accumulation_steps=2)
    events = optimizer.events
    model = torch.nn.Linear(1, 1, bias=False)
    average = EMAHandler(model, momentum=0.5)
    average.attach(engine, event=events.OPTIMIZER_STEP_COMPLETED)
    with torch.no_grad():
        before = model.weight.clone()
        model.weight.add_(1.0)
    timer = Timer(average=True)
    timer.attach(engine, start=Events.STARTED, step=events.OPTIMIZER_STEP_COMPLETED)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    engine.add_event_handler(events.OPTIMIZER_STEP_STARTED, LRScheduler(scheduler))
    engine.run([1.0] * 6)
    assert timer.step_count == 3.0
    torch.testing.assert_close(average.ema_model.weight, before + 1 - 0.5**3)
    assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5**2


@pytest.mark.parametrize("level", ["DEBUG", "INFO"])
def test_our_events_are_in_ignites_log_if_it_is_that_detailed(caplog, level):
    engine, called = Engine(lambda engine, batch: None), []
    event = register(engine, "optimizer")["STEP_COMPLETED"]
    engine.add_event_handler(event, lambda: called.append(engine.last_event_name))
    with caplog.at_level(level, logger=engine.logger.name):
        assert fire(engine, event)
    assert called == [event]
    assert any("Firing handlers for event" in text for text in caplog.messages) == (level == "DEBUG")


def test_an_engine_that_fires_in_its_own_way_fires_ours_so():
    class Counting(Engine):
        fired = 0

        def _fire_event(self, *args, **kwargs):
            self.fired += 1
            super()._fire_event(*args, **kwargs)

    engine = Counting(lambda engine, batch: None)
    event = register(engine, "optimizer")["STEP_COMPLETED"]
    engine.add_event_handler(event, lambda: None)
    assert fire(engine, event)
    assert engine.fired == 1
