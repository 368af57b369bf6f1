"""The trace of one real iteration: what fired, in which order, inside of what, and that nothing else changed."""

import itertools

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import BasicTimeProfiler, HandlersTimeProfiler

import ice_engine as ice
from ice_engine.hooks import HookRegistry


def training(accumulation_steps=2, **settings):
    """Return an engine, its optimizer, and the weight that it trains."""
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = ice.Optimizer(
        torch.optim.SGD([weight], lr=0.1, momentum=0.9), accumulation_steps=accumulation_steps, **settings
    )

    def train_step(engine, batch):
        loss = weight * batch
        optimizer.backward(loss)
        return loss.item()

    engine = Engine(train_step)
    optimizer.attach(engine)
    return engine, optimizer, weight


def outline(trace):
    """Return the names of its spans, indented as they are printed."""
    return [f"{'  ' * depth}{span.name}" for depth, span in trace.iteration.flat()]


def report(engine):
    """Stand in the timeline."""


STEP = [
    "iteration 2, epoch 1",
    "  GET_BATCH_STARTED",
    "  next(data)",
    "  GET_BATCH_COMPLETED",
    "  ITERATION_STARTED",
    "    optimizer.iteration_started",
    "  train_step",
    "  ITERATION_COMPLETED",
    "    optimizer.iteration_completed",
    "      optimizer: gradients, clip, processors",
    "      OPTIMIZER_STEP_STARTED",
    "      optimizer: step()",
    "      OPTIMIZER_STEP_COMPLETED",
]


def test_it_shows_the_next_iteration_with_a_step():
    engine, optimizer, _ = training()
    trace = optimizer.hooks.trace()
    engine.run([1.0, 2.0, 3.0])
    assert trace.done
    assert outline(trace) == STEP


def test_handlers_stand_under_their_events_by_name_and_only_if_their_filter_let_them():
    engine, optimizer, _ = training()
    hooks = optimizer.hooks
    hooks.add(Events.ITERATION_COMPLETED, report, name="known")
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=2), report)
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=3), report)
    hooks.add(Events.ITERATION_COMPLETED(once=1), report, name="never here")
    hooks.add(optimizer.event("STEP_COMPLETED"), lambda: engine.fire_event("nested"), name="firing")
    engine.register_events("nested")
    hooks.add("nested", report, name="innermost")
    trace = hooks.trace()
    engine.run([1.0, 2.0, 3.0])
    inner = ["        firing", "          nested", "            innermost"]
    assert outline(trace) == [*STEP, *inner, "    known", "    (report)"]


def test_printed_every_line_has_its_start_and_its_duration_and_lies_inside_of_the_one_above():
    engine, optimizer, _ = training()
    trace = optimizer.hooks.trace()
    engine.run([1.0, 2.0])
    head, *lines = str(trace).splitlines()
    assert head.split() == ["at", "ms", "took", "ms"]
    for line, (depth, span) in zip(lines, trace.iteration.flat(), strict=True):
        began, seconds, name = line.split(maxsplit=2)
        assert (float(began), float(seconds), name) == (
            pytest.approx(1e3 * span.began, abs=1e-3),
            pytest.approx(1e3 * span.seconds, abs=1e-3),
            span.name,
        )
        assert line.startswith(f"{began:>10}{seconds:>10}  {'  ' * depth}{name}")
        rounding = 1e-9
        for inner in span.inside:
            assert span.began <= inner.began + rounding
            assert inner.began + inner.seconds <= span.began + span.seconds + rounding
        for before, after in itertools.pairwise(span.inside):
            assert before.began + before.seconds <= after.began + rounding


def test_nothing_is_printed_by_itself(capfd):
    engine, optimizer, _ = training()
    optimizer.hooks.trace()
    engine.run([1.0, 2.0])
    assert capfd.readouterr() == ("", "")


def test_before_an_iteration_it_says_so():
    engine, optimizer, _ = training()
    trace = optimizer.hooks.trace()
    assert not trace.done
    assert str(trace) == "no iteration was recorded yet; run the engine"
    assert repr(trace) == "<Trace of no iteration>"
    engine.run([1.0])
    assert repr(trace) == "<Trace of iteration 1, epoch 1>"


@pytest.mark.parametrize("kinds", [(), ("GRADIENTS_READY", "STEP_STARTED", "STEP_COMPLETED", "STEP_SKIPPED")])
def test_a_traced_run_gives_the_same_numbers_calls_the_same_handlers_and_leaves_nothing(kinds):
    results = []
    for traced in (False, True):
        engine, optimizer, weight = training(clip=ice.clip_norm(1.0), processors=[ice.schedules.cosine()])
        calls = []

        def note(engine, calls=calls):
            calls.append((engine.last_event_name, engine.state.iteration, engine.state.optimizer_step))

        for event in (Events.ITERATION_COMPLETED(every=2), Events.GET_BATCH_STARTED, Events.COMPLETED):
            engine.add_event_handler(event, note)
        for kind in kinds:
            optimizer.hooks.add(optimizer.event(kind), note)
        before = {event: list(handlers) for event, handlers in engine._event_handlers.items() if handlers}
        attributes = set(vars(engine))
        if traced:
            trace = optimizer.hooks.trace()
        engine.run([1.0, float("nan"), 3.0, 4.0, 5.0], max_epochs=2)
        assert {event: list(handlers) for event, handlers in engine._event_handlers.items() if handlers} == before
        assert set(vars(engine)) == attributes
        results.append((weight.item(), optimizer.record, calls))
    assert trace.done
    assert results[0] == results[1]
    assert results[0][1].step == 4  # of 6 windows, two had a NaN


def test_a_skipped_step_is_what_it_waits_for_too():
    engine, optimizer, _ = training(nonfinite="skip")
    trace = optimizer.hooks.trace()
    engine.run([1.0, float("inf"), 1.0, 1.0])
    inner = ["      optimizer: gradients", "      OPTIMIZER_STEP_SKIPPED"]
    assert outline(trace) == [*STEP[: STEP.index("    optimizer.iteration_completed") + 1], *inner]


def test_two_optimizers_both_stand_in_it():
    first, second = torch.nn.Parameter(torch.ones(())), torch.nn.Parameter(torch.ones(()))
    a = ice.Optimizer(torch.optim.SGD([first], lr=0.1), name="actor")
    b = ice.Optimizer(torch.optim.SGD([second], lr=0.1), name="critic")

    def play(engine, batch):
        a.backward(first * batch)
        b.backward(second * batch)

    engine = Engine(play)
    a.attach(engine)
    b.attach(engine)
    trace = a.hooks.trace()
    engine.run([1.0, 2.0])
    expected = [
        *(part.replace("2,", "1,") for part in STEP[:5]),
        "    actor.iteration_started",
        "    critic.iteration_started",
        "  play",
        "  ITERATION_COMPLETED",
    ]
    for name in ("actor", "critic"):
        own = STEP[STEP.index("    optimizer.iteration_completed") :]
        expected += [line.replace("optimizer", name).replace("OPTIMIZER", name.upper()) for line in own]
    assert outline(trace) == expected


def test_without_an_optimizer_it_shows_the_next_iteration():
    engine = Engine(lambda engine, batch: batch)
    trace = HookRegistry(engine).trace()
    engine.run([1, 2])
    assert outline(trace) == [
        "iteration 1, epoch 1",
        "  GET_BATCH_STARTED",
        "  next(data)",
        "  GET_BATCH_COMPLETED",
        "  ITERATION_STARTED",
        "  <lambda>",
        "  ITERATION_COMPLETED",
    ]


def test_a_step_at_the_end_of_an_epoch_is_shown_with_its_last_iteration():
    engine, optimizer, _ = training(accumulation_steps=8)
    trace = optimizer.hooks.trace()
    engine.add_event_handler(Events.EPOCH_COMPLETED, report)
    engine.run([1.0, 2.0, 3.0], max_epochs=2)
    assert trace.done
    assert outline(trace)[0] == "iteration 3, epoch 1"
    assert outline(trace)[9:] == [
        "  EPOCH_COMPLETED",
        "    optimizer.epoch_ended",
        "      optimizer: gradients, clip, processors",
        "      OPTIMIZER_STEP_STARTED",
        "      optimizer: step()",
        "      OPTIMIZER_STEP_COMPLETED",
        "    (report)",
        "    optimizer.epoch_over",
    ]


@pytest.mark.parametrize("stop", ["completed", "terminated"])
def test_a_run_in_which_no_iteration_steps_shows_its_last(stop):
    engine, optimizer, _ = training(accumulation_steps=8, tail="drop")
    if stop == "terminated":
        engine.add_event_handler(
            Events.ITERATION_COMPLETED(once=5), lambda engine: engine.terminate(skip_completed=True)
        )
    trace = optimizer.hooks.trace()
    engine.run([1.0, 2.0, 3.0], max_epochs=2)
    assert trace.done
    assert trace.iteration.name == f"iteration {5 if stop == 'terminated' else 6}, epoch 2"


def test_asked_for_in_a_handler_it_shows_a_later_iteration_and_several_may_follow():
    engine, optimizer, _ = training()
    traces = []
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=3), lambda: traces.append(optimizer.hooks.trace()))
    engine.run([1.0] * 9)
    assert [repr(trace) for trace in traces] == [
        "<Trace of iteration 4, epoch 1>",
        "<Trace of iteration 8, epoch 1>",
        "<Trace of no iteration>",  # asked for in the last one
    ]


def test_asked_for_again_it_is_the_same_one_until_it_is_done():
    engine, optimizer, _ = training()
    trace = optimizer.hooks.trace()
    assert HookRegistry(engine).trace() is trace
    engine.run([1.0, 2.0, 3.0])
    assert optimizer.hooks.trace() is not trace


@pytest.mark.parametrize("profiler", [HandlersTimeProfiler, BasicTimeProfiler])
def test_it_goes_together_with_a_profiler(profiler):
    engine, optimizer, _ = training()
    profiler().attach(engine)
    optimizer.hooks.add(Events.ITERATION_COMPLETED(every=2), report, name="known")
    trace = optimizer.hooks.trace()
    engine.run([1.0, 2.0, 3.0, 4.0])
    assert trace.done
    assert "      optimizer: step()" in outline(trace)
    assert "    known" in outline(trace)
    optimizer.hooks.remove("known")
    engine.run([1.0, 2.0])


def test_hooks_added_and_removed_in_the_traced_iteration_are_so_afterwards():
    engine, optimizer, _ = training(accumulation_steps=1)
    hooks, calls = optimizer.hooks, []

    def change():
        if "new" in hooks:
            return
        hooks.remove("old")
        hooks.remove("other")
        hooks.add(Events.ITERATION_COMPLETED, lambda: calls.append("new"), name="new")
        hooks.add(Events.ITERATION_COMPLETED, lambda: calls.append("other"), name="other", order=-1)
        engine.add_event_handler(Events.ITERATION_COMPLETED, plain)

    def plain():
        calls.append("plain")

    hooks.add(Events.ITERATION_COMPLETED, lambda: calls.append("old"), name="old", order=-1)
    hooks.add(Events.ITERATION_COMPLETED, change, name="change")
    hooks.add(Events.ITERATION_COMPLETED, lambda: calls.append("other"), name="other")
    trace = hooks.trace()
    engine.run([1.0])
    assert calls == ["old"]
    assert trace.done
    engine.run([1.0])
    assert calls == ["old", "other", "new", "plain"]


@pytest.mark.parametrize("where", ["train_step", "handler"])
def test_an_exception_passes_and_the_next_run_is_traced(where):
    fails = [True]

    def maybe(engine, *_):
        if fails[0]:
            fails[0] = False
            message = "the data are bad"
            raise ValueError(message)

    engine = Engine(maybe if where == "train_step" else lambda engine, batch: None)
    engine.logger.disabled = True
    if where == "handler":
        engine.add_event_handler(Events.ITERATION_STARTED, maybe)
    trace = HookRegistry(engine).trace()
    with pytest.raises(ValueError, match="the data are bad"):
        engine.run([1, 2])
    assert not trace.done
    assert outline(trace)[-1] == {"train_step": "  ITERATION_STARTED", "handler": "    (maybe)"}[where]
    assert Events.EXCEPTION_RAISED not in engine._event_handlers
    engine._internal_run_generator = None  # Ignite's own next run would do nothing
    engine.run([1, 2])
    assert trace.done
    assert outline(trace)[-1].strip() in ("ITERATION_COMPLETED", "(maybe)")
    assert "_fire_event" not in vars(engine)
