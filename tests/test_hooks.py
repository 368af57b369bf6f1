"""The registry of hooks: names, order, signatures, removal, and processors on events."""

import functools

import pytest
import torch
from ignite.engine import Engine, EventEnum, Events
from ignite.handlers import BasicTimeProfiler, HandlersTimeProfiler

import ice_engine as ice
from ice_engine.engine_state import StateMapping
from ice_engine.errors import (
    ArgumentTypeError,
    HookError,
    HookSignatureError,
    MissingKeyError,
    ProcessorReturnError,
    UnknownKeyError,
)
from ice_engine.hooks import HookRegistry


@pytest.fixture
def engine():
    return Engine(lambda engine, batch: batch)


@pytest.fixture
def hooks(engine):
    return HookRegistry(engine)


def noting(calls, note):
    return lambda: calls.append(note)


# -- order and names ----------------------------------------------------------------------------------------------


def test_lower_orders_fire_first_and_equal_ones_as_added(engine, hooks):
    calls = []
    for note, order in (("late", 10), ("a", 0), ("first", -10), ("b", 0), ("later", 20), ("before", -1)):
        hooks.add(Events.COMPLETED, noting(calls, note), name=note, order=order)
    engine.run([1])
    assert calls == ["first", "before", "a", "b", "late", "later"]


def test_handlers_of_ignite_count_as_order_0(engine, hooks):
    calls = []
    engine.add_event_handler(Events.COMPLETED, noting(calls, "plain 1"))
    hooks.add(Events.COMPLETED, noting(calls, "after"), name="after", order=1)
    engine.add_event_handler(Events.COMPLETED, noting(calls, "plain 2"))
    hooks.add(Events.COMPLETED, noting(calls, "after, too"), name="after, too", order=1)
    hooks.add(Events.COMPLETED, noting(calls, "among"), name="among")
    hooks.add(Events.COMPLETED, noting(calls, "before"), name="before", order=-1)
    engine.run([1])
    assert calls == ["before", "plain 1", "plain 2", "among", "after", "after, too"]


def test_a_hook_is_called_with_the_engine_or_with_nothing(engine, hooks):
    calls = []
    hooks.add(Events.COMPLETED, lambda: calls.append("nothing"), name="nothing")
    hooks.add(Events.COMPLETED, lambda engine: calls.append(engine), name="engine")
    hooks.add(Events.COMPLETED, functools.partial(lambda kind, engine: calls.append(kind), "bound"), name="partial")
    engine.run([1])
    assert calls == ["nothing", engine, "bound"]


def test_a_hook_without_a_name_gets_a_free_one(engine, hooks):
    def report():
        """Do nothing."""

    names = [hooks.add(Events.COMPLETED, hook).name for hook in (report, report, functools.partial(report), report)]
    assert names == ["report", "report#2", "report#3", "report#4"]


def test_a_method_is_called_after_its_object(hooks):
    assert hooks.add(Events.COMPLETED, [].append).name == "append"
    assert hooks.add(Events.COMPLETED, HandlersTimeProfiler().attach).name == "HandlersTimeProfiler.attach"
    assert hooks.add(Events.COMPLETED, functools.partial(HandlersTimeProfiler.attach, None)).name == "attach"


@pytest.mark.parametrize("order", [-1, 0, 1])
def test_hooks_fire_on_every_event_there_is_until_they_are_removed(order):
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=0.1), nonfinite="skip")

    def train_step(engine, batch):
        optimizer.backward(weight * batch)
        if engine.state.iteration == 4:
            engine.terminate_epoch()

    engine = Engine(train_step)
    optimizer.attach(engine)
    hooks, fired = optimizer.hooks, set()
    events = [event for event in engine._allowed_events if event != Events.EXCEPTION_RAISED]
    for event in events:
        hooks.add(event, functools.partial(lambda name: fired.add(name), event.name), name=event.name, order=order)

    def run():
        once = hooks.add(Events.ITERATION_COMPLETED(once=1), lambda engine: engine.interrupt())
        last = hooks.add(Events.EPOCH_STARTED(once=3), lambda engine: engine.terminate())
        for _ in "12":  # the first is interrupted
            engine.run([1.0, float("inf")] + [3.0] * (engine.state.epoch == 2), max_epochs=3, epoch_length=3)
        once.remove()
        last.remove()

    run()
    assert fired == {event.name for event in events}
    fired.clear()
    for event in events:
        hooks.remove(event.name)
    run()
    assert fired == set()


def test_a_name_is_given_once(hooks):
    hooks.add(Events.COMPLETED, print, name="report")
    with pytest.raises(HookError, match=r"'report' is on this engine already; remove\('report'\) first"):
        hooks.add(Events.STARTED, print, name="report")
    assert len(hooks) == 1


def test_every_registry_of_an_engine_shows_the_same_hooks(engine, hooks):
    other = HookRegistry(engine)
    added = other.add(Events.COMPLETED, print, name="report")
    assert list(hooks) == [added]
    assert "report" in hooks
    assert hooks["report"] is added
    hooks.remove("report")
    assert len(other) == 0
    assert len(HookRegistry(Engine(lambda engine, batch: None))) == 0


def test_an_optimizer_shows_the_hooks_of_its_engine(engine):
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=0.1)).attach(engine)
    assert [hook.name for hook in optimizer.hooks] == [hook.name for hook in HookRegistry(engine)]
    assert len(optimizer.hooks) > 0


# -- events ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "iterations"),
    [
        (Events.ITERATION_COMPLETED(every=3), [3, 6]),
        (Events.ITERATION_COMPLETED(once=2), [2]),
        (Events.ITERATION_COMPLETED(before=3), [1, 2]),
        (Events.ITERATION_COMPLETED(after=4), [5, 6]),
        (Events.ITERATION_COMPLETED(event_filter=lambda engine, n: n % 4 == 1), [1, 5]),
        (Events.ITERATION_COMPLETED(once=2) | Events.ITERATION_STARTED(once=5), [2, 5]),
        (Events.ITERATION_COMPLETED(every=2) | Events.ITERATION_COMPLETED(every=3), [2, 3, 4, 6, 6]),
        (Events.EPOCH_COMPLETED | Events.COMPLETED, [3, 6, 6]),
    ],
)
def test_filtered_and_joined_events_fire_when_they_say_and_stop_on_removal(engine, hooks, event, iterations):
    seen = []
    hooks.add(event, lambda engine: seen.append(engine.state.iteration), name="see")
    engine.run([1, 2, 3], max_epochs=2)
    assert seen == iterations
    hooks.remove("see")
    engine.run([1, 2, 3], max_epochs=2)
    assert seen == iterations


def test_an_unknown_event_is_refused(engine, hooks):
    with pytest.raises(HookError, match="'step': OPTIMIZER_STEP_COMPLETED is not an event of this engine; attach the"):
        hooks.add(ice.OptimizerEvents.OPTIMIZER_STEP_COMPLETED, print, name="step")
    for event in ("no such event", None, [Events.STARTED]):
        with pytest.raises(HookError, match="is not an event of this engine"):
            hooks.add(event, print)


def test_one_unknown_event_of_several_leaves_nothing_behind(engine, hooks):
    calls = []
    with pytest.raises(HookError, match="OPTIMIZER_STEP_COMPLETED"):
        hooks.add(Events.COMPLETED | ice.OptimizerEvents.OPTIMIZER_STEP_COMPLETED, noting(calls, 1), name="both")
    engine.run([1])
    assert calls == []
    assert "both" not in hooks


def test_a_filter_on_an_event_that_nothing_counts_is_refused_when_added(engine, hooks):
    class Own(EventEnum):
        UNCOUNTED_BY_ANYONE = "uncounted"

    engine.register_events(*Own)
    hooks.add(Own.UNCOUNTED_BY_ANYONE, print, name="plain")
    with pytest.raises(HookError, match="UNCOUNTED_BY_ANYONE has a filter, but nothing counts this event"):
        hooks.add(Own.UNCOUNTED_BY_ANYONE(every=2), print, name="filtered")
    with pytest.raises(HookError, match="TERMINATE has a filter"):
        hooks.add(Events.TERMINATE(every=2), print, name="filtered")


def test_exception_raised_is_refused_and_exceptions_still_propagate():
    def train_step(engine, batch):
        message = "the data are bad"
        raise ValueError(message)

    engine = Engine(train_step)
    engine.logger.disabled = True
    hooks = HookRegistry(engine)
    for event in (Events.EXCEPTION_RAISED, Events.STARTED | Events.EXCEPTION_RAISED):
        with pytest.raises(HookError, match="cannot go on EXCEPTION_RAISED: with any handler there Ignite swallows"):
            hooks.add(event, print, name="rescue")
    hooks.add(Events.COMPLETED, print, name="report").remove()
    hooks.add(Events.EPOCH_COMPLETED, print, name="report")
    assert "report" in str(hooks)
    with pytest.raises(ValueError, match="the data are bad"):
        engine.run([1], max_epochs=2)
    assert engine.state.epoch == 1


# -- signatures -----------------------------------------------------------------------------------------------------


def test_a_signature_that_does_not_fit_is_refused_and_both_sides_are_printed(engine, hooks):
    def log_norm(engine, norms):
        """Take one too many."""

    with pytest.raises(HookSignatureError) as caught:
        hooks.add(Events.COMPLETED, log_norm)
    message = str(caught.value)
    assert "hook 'log_norm' is log_norm(engine, norms)" in message
    assert "COMPLETED calls it with (engine) or ()" in message
    assert "functools.partial" in message
    assert len(hooks) == 0
    assert not engine.has_event_handler(log_norm)


def test_a_callable_without_a_readable_signature_is_refused(hooks):
    with pytest.raises(HookSignatureError, match=r"'max' is max\(\.\.\.\)"):
        hooks.add(Events.COMPLETED, max)


async def later(engine):
    """Be awaited by nobody."""


async def later_ones(engine):
    yield engine


def one_by_one():
    yield 1


class CalledLater:
    async def __call__(self, engine):
        """Be awaited by nobody."""


@pytest.mark.parametrize(
    ("hook", "what", "mend"),
    [
        (later, r"later\(engine\)", "nothing of an async function, as nobody awaits it; make it a plain def"),
        (later_ones, r"later_ones\(engine\)", "nothing of an async function"),
        (functools.partial(later, None), r"later\(\)", "nothing of an async function"),
        (CalledLater(), r"CalledLater\(engine\)", "nothing of an async function"),
        (one_by_one, r"one_by_one\(\)", "nothing of a function with yield, as nobody iterates over it; take the yield"),
    ],
)
def test_what_would_run_nothing_is_refused(hooks, hook, what, mend):
    with pytest.raises(HookSignatureError, match=rf"is {what}; COMPLETED calls it with \(engine\) or \(\), .* {mend}"):
        hooks.add(Events.COMPLETED, hook, name="lost")


def test_a_default_that_the_engine_would_replace_is_refused(engine, hooks):
    calls = []
    for i in range(2):
        with pytest.raises(
            HookSignatureError, match=r"take the place of the default of 'i'; .* lambda \*, i=\d: \.\.\."
        ):
            hooks.add(Events.COMPLETED, lambda i=i: calls.append(i))
        hooks.add(Events.COMPLETED, lambda *, i=i: calls.append(i))
        hooks.add(Events.COMPLETED, lambda engine=None, i=i: calls.append((type(engine), i)))
    engine.run([1])
    assert calls == [0, (Engine, 0), 1, (Engine, 1)]
    with pytest.raises(HookSignatureError, match=r"Engine.terminate\(skip_completed: .* default of 'skip_completed'"):
        hooks.add(Events.COMPLETED, engine.terminate)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda calls: lambda: calls.append(()), [()]),
        (lambda calls: lambda engine: calls.append(type(engine)), [Engine]),
        (lambda calls: lambda iter_counter: calls.append(iter_counter), [2]),
        (lambda calls: lambda engine, iter_counter: calls.append((type(engine), iter_counter)), [(Engine, 2)]),
        (lambda calls: lambda *args, **kwargs: calls.append((len(args), kwargs)), [(1, {"iter_counter": 2})]),
    ],
    ids=["nothing", "engine", "counter", "both", "anything"],
)
def test_on_terminate_single_epoch_a_hook_takes_the_counter_or_not(make, expected):
    def train_step(engine, batch):
        if batch == 2:
            engine.terminate_epoch()

    engine, calls = Engine(train_step), []
    HookRegistry(engine).add(Events.TERMINATE_SINGLE_EPOCH, make(calls), name="cut")
    engine.run([1, 2, 3])
    assert calls == expected


def test_on_terminate_single_epoch_other_signatures_are_refused_when_added(hooks):
    with pytest.raises(HookSignatureError, match=r"calls it with \(engine, iter_counter=...\), \(iter_counter=...\)"):
        hooks.add(Events.TERMINATE_SINGLE_EPOCH, lambda engine, counter: None)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"hook": 3}, "hook must be callable, got int"),
        ({"hook": None}, r"hook must be callable, got NoneType; pass the function itself: report, not report\(\)"),
        ({"hook": HandlersTimeProfiler}, r"is the class HandlersTimeProfiler; its instances may be hooks: Handlers"),
        ({"name": 3}, "name must be a string, got 3"),
        ({"order": "first"}, "order must be an int, got 'first'"),
        ({"order": True}, "order must be an int, got True"),
    ],
)
def test_wrong_types_are_refused(hooks, arguments, match):
    with pytest.raises(ArgumentTypeError, match=match):
        hooks.add(**{"event": Events.COMPLETED, "hook": print, **arguments})


def test_only_an_engine_has_hooks():
    with pytest.raises(ArgumentTypeError, match=r"engine must be an ignite\.engine\.Engine, got NoneType"):
        HookRegistry(None)


# -- removal, and change while firing -------------------------------------------------------------------------------


def test_removing_what_is_not_there_names_what_is(hooks):
    with pytest.raises(HookError, match="no hook is named 'a'; there are: none"):
        hooks.remove("a")
    hook = hooks.add(Events.COMPLETED, print, name="b")
    with pytest.raises(HookError, match="no hook is named 'a'; there are: b"):
        hooks["a"]
    hook.remove()
    again = hooks.add(Events.COMPLETED, print, name="b")
    with pytest.raises(HookError, match="'b' is not on its engine any more"):
        hook.remove()
    assert list(hooks) == [again]


def test_the_same_function_may_be_several_hooks_and_each_is_removed_alone(engine, hooks):
    calls = []
    count = noting(calls, 1)
    engine.add_event_handler(Events.COMPLETED, count)
    hooks.add(Events.COMPLETED, count, name="a")
    hooks.add(Events.COMPLETED, count, name="b")
    hooks.remove("a")
    engine.run([1])
    assert len(calls) == 2


def test_a_hook_removed_while_its_event_fires_is_not_called_any_more(engine, hooks):
    calls = []

    def remove_others():
        hooks.remove("after")
        hooks.remove("filtered")
        hooks.remove("self")

    hooks.add(Events.ITERATION_COMPLETED, remove_others, name="self")
    hooks.add(Events.ITERATION_COMPLETED, noting(calls, "after"), name="after")
    hooks.add(Events.ITERATION_COMPLETED(every=1), noting(calls, "filtered"), name="filtered")
    hooks.add(Events.ITERATION_COMPLETED, noting(calls, "last"), name="last")
    engine.run([1, 2])
    assert calls == ["last", "last"]


@pytest.mark.parametrize("order", [-1, 0, 1])
def test_a_hook_added_while_its_event_fires_takes_part_from_the_next_firing(engine, hooks, order):
    calls = []

    def add_once(engine):
        calls.append("old")
        if "new" not in hooks:
            hooks.add(Events.ITERATION_COMPLETED, noting(calls, "new"), name="new", order=order)

    hooks.add(Events.ITERATION_COMPLETED, add_once, name="adder")
    engine.run([1, 2])
    assert calls == (["old", "new", "old"] if order < 0 else ["old", "old", "new"])


@pytest.mark.parametrize("order", [-1, 0, 1])
def test_a_hook_that_takes_itself_off_and_back_on_fires_once_each_time(engine, hooks, order):
    calls = []

    def again():
        calls.append("again")
        hooks.remove("again")
        hooks.add(Events.ITERATION_COMPLETED(every=1), again, name="again", order=order)

    def swap():
        calls.append("swap")
        hooks["other"].remove()
        hooks.add(Events.ITERATION_COMPLETED, noting(calls, "other"), name="other", order=5)

    hooks.add(Events.ITERATION_COMPLETED, again, name="again")
    hooks.add(Events.ITERATION_COMPLETED(event_filter=lambda *_: True), swap, name="swap")
    hooks.add(Events.ITERATION_COMPLETED, noting(calls, "other"), name="other")
    for _ in range(3):
        calls.clear()
        engine.run([1])
        assert sorted(calls) == ["again", "swap"]  # the other one is always off when its turn comes, and on again
    assert len(hooks) == 3


@pytest.mark.parametrize("profiler", [HandlersTimeProfiler, BasicTimeProfiler])
def test_hooks_can_be_removed_during_and_after_a_profiled_run(engine, hooks, profiler):
    profiler().attach(engine)
    calls = []
    hooks.add(Events.ITERATION_COMPLETED, noting(calls, "kept"), name="kept")
    hooks.add(Events.ITERATION_COMPLETED, noting(calls, "removed"), name="removed", order=5)
    hooks.add(Events.ITERATION_COMPLETED(once=2), lambda: hooks.remove("removed"), name="remover")
    engine.run([1, 2, 3])
    assert calls == ["kept", "removed", "kept", "kept"]
    hooks.remove("kept")
    hooks.remove("remover")
    engine.run([1, 2, 3])
    assert calls == ["kept", "removed", "kept", "kept"]


def test_a_profile_calls_hooks_by_their_names(engine, hooks):
    profiler = HandlersTimeProfiler()
    profiler.attach(engine)
    hooks.add(Events.ITERATION_COMPLETED, lambda: None, name="first lambda")
    hooks.add(Events.ITERATION_COMPLETED, lambda: None, name="second lambda")
    engine.run([1, 2])
    rows = [row[:2] for row in profiler.get_results()]
    assert ["first lambda", "ITERATION_COMPLETED"] in rows
    assert ["second lambda", "ITERATION_COMPLETED"] in rows


# -- the table ------------------------------------------------------------------------------------------------------


def report(engine):
    """Stand in the table."""


class Watcher:
    def __call__(self, engine):
        """Stand in the table."""

    @torch.no_grad()
    def watch(self, engine):
        """Stand in the table."""


def test_an_event_that_fires_while_another_thread_adds_a_hook_calls_all_that_were_there(engine, hooks):
    calls = []
    engine.add_event_handler(Events.STARTED, lambda: calls.append("plain"))
    hooks.add(Events.STARTED, lambda: calls.append("first"), name="first", order=-1)

    class Order(int):
        """Compared while the hooks are put in order: then, on another thread, the event fires."""

        def __lt__(self, other):
            engine.fire_event(Events.STARTED)
            return int(self) < other

    hooks.add(Events.STARTED, lambda: calls.append("last"), name="last", order=Order(1))
    firings = calls.count("first")
    assert firings
    assert [call for call in calls if call != "last"] == ["first", "plain"] * firings


def test_printed_it_is_a_table_in_firing_order_with_handlers_added_behind_its_back(engine, hooks):
    engine.add_event_handler(Events.ITERATION_COMPLETED, report)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), Watcher())
    engine.add_event_handler(Events.COMPLETED, (watcher := Watcher()).watch)
    hooks.add(Events.COMPLETED, print, name="end")
    hooks.add(Events.ITERATION_COMPLETED(every=5), report, name="every fifth", order=3)
    hooks.add(Events.EPOCH_COMPLETED | Events.STARTED, functools.partial(report, engine), name="partial", order=-1)
    hooks.add(Events.ITERATION_STARTED, double(value="batch", dst="batch"))
    line = f"test_hooks.py:{report.__code__.co_firstlineno}"
    call = f"test_hooks.py:{Watcher.__call__.__code__.co_firstlineno}"
    watch = f"test_hooks.py:{Watcher.watch.__wrapped__.__code__.co_firstlineno}"
    process = f"test_hooks.py:{double.function.__code__.co_firstlineno}"
    assert str(hooks).replace("tests/", "").splitlines() == [
        "event                         order  name             defined at",
        f"STARTED                          -1  partial          {line}",
        f"ITERATION_STARTED                 0  double           {process}",
        f"ITERATION_COMPLETED               0  (report)         {line}",
        f"ITERATION_COMPLETED(once=2)       0  (Watcher)        {call}",
        f"ITERATION_COMPLETED(every=5)      3  every fifth      {line}",
        f"EPOCH_COMPLETED                  -1  partial          {line}",
        f"COMPLETED                         0  (Watcher.watch)  {watch}",
        "COMPLETED                         0  end              built in",
        "",
        "(...): added with engine.add_event_handler",
    ]
    assert watcher


@pytest.mark.parametrize(
    ("arguments", "label"),
    [
        ({}, "ITERATION_STARTED"),
        ({"every": 1}, "ITERATION_STARTED"),
        ({"every": 3}, "ITERATION_STARTED(every=3)"),
        ({"once": 3}, "ITERATION_STARTED(once=3)"),
        ({"once": [3, 5]}, "ITERATION_STARTED(once=[3, 5])"),
        ({"before": 3}, "ITERATION_STARTED(before=3)"),
        ({"after": 3}, "ITERATION_STARTED(after=3)"),
        ({"before": 5, "after": 3}, "ITERATION_STARTED(before=5, after=3)"),
        ({"every": 2, "before": 5}, "ITERATION_STARTED(every=2, before=5)"),
        ({"every": 2, "before": 9, "after": 3}, "ITERATION_STARTED(every=2, before=9, after=3)"),
        ({"event_filter": lambda engine, count: count == 3}, "ITERATION_STARTED(event_filter=<lambda>)"),
        (
            {"event_filter": functools.partial(lambda n, engine, count: count == n, 3)},
            "ITERATION_STARTED(event_filter=<l",
        ),
    ],
)
@pytest.mark.parametrize("profiled", [False, True])
def test_an_event_stands_in_the_table_with_its_filter(engine, hooks, arguments, label, profiled):
    event = Events.ITERATION_STARTED(**arguments) if arguments else Events.ITERATION_STARTED
    hooks.add(event, report, name="known")
    engine.add_event_handler(event, report)
    if profiled:
        HandlersTimeProfiler().attach(engine)
        engine.run([1])
    rows = [row for row in str(hooks).splitlines() if "known" in row or "(report)" in row]
    assert len(rows) == 2
    assert all(row.startswith(label + ("" if "<" in label else " ")) for row in rows)


def test_events_of_others_stand_in_the_table_and_may_be_strings(engine, hooks):
    engine.register_events("loss_is_high")
    hooks.add("loss_is_high", report)
    assert str(hooks).splitlines()[1].split()[:3] == ["loss_is_high", "0", "report"]


def test_events_of_the_optimizer_stand_in_the_table_where_they_fire(engine, hooks):
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=0.1)).attach(engine)
    hooks.add(optimizer.events.OPTIMIZER_STEP_COMPLETED, report)
    hooks.add(Events.EPOCH_COMPLETED, report)
    events = [row.split()[0] for row in str(hooks).splitlines()[1:]]
    step = events.index("OPTIMIZER_STEP_COMPLETED")
    assert events.index("ITERATION_COMPLETED") < step < events.index("EPOCH_COMPLETED")


def test_without_hooks_it_prints_its_head_alone(hooks):
    assert str(hooks) == "event  order  name  defined at"


def test_printing_creates_no_key_that_ignite_would_read_as_a_handler(engine, hooks):
    hooks.add(Events.COMPLETED, print)
    before = list(engine._event_handlers)
    assert str(hooks)
    assert list(engine._event_handlers) == before


# -- processors -----------------------------------------------------------------------------------------------------


@ice.dictprocess
def double(value):
    return 2 * value


def test_a_processor_reads_and_writes_the_state_of_the_engine(engine, hooks):
    hook = hooks.add(Events.ITERATION_COMPLETED, double(value="output", dst="doubled"))
    assert hook.name == "double"
    engine.run([1, 5])
    assert engine.state.doubled == 10


def test_a_processor_reads_and_writes_metrics(engine, hooks):
    engine.state.metrics["loss"] = 3.0
    hooks.add(Events.COMPLETED, double(value="metrics.loss", dst="metrics.twice"))
    engine.run([1])
    assert engine.state.metrics == {"loss": 3.0, "twice": 6.0}


def test_a_processor_can_change_the_batch_before_the_step_sees_it(engine, hooks):
    hooks.add(Events.GET_BATCH_COMPLETED, double(value="batch", dst="batch"))
    assert engine.run([1, 5]).output == 10


def test_a_processor_gets_the_engine_and_a_filter_works(engine, hooks):
    seen = []

    @ice.dictprocess
    def see(engine, iteration):
        seen.append((engine, iteration))

    hooks.add(Events.ITERATION_COMPLETED(every=2), see())
    engine.run([1, 2, 3, 4])
    assert seen == [(engine, 2), (engine, 4)]


def test_a_composition_is_one_hook(engine, hooks):
    hooks.add(
        Events.ITERATION_COMPLETED,
        ice.Compose([double(value="output", dst="a"), double(value="a", dst="b")]),
        name="twice",
    )
    assert engine.run([3]).b == 12


@pytest.mark.parametrize(
    "key", ["iteration", "epoch", "max_epochs", "metrics", "engine", "optimizer_step", "optimizer_record"]
)
def test_what_the_run_counts_with_is_refused_when_the_processor_is_added(engine, hooks, key):
    weight = torch.nn.Parameter(torch.ones(()))
    ice.Optimizer(torch.optim.SGD([weight], lr=0.1)).attach(engine)
    with pytest.raises(UnknownKeyError, match=rf"engine\.state\.{key} is read-only for processors"):
        hooks.add(Events.COMPLETED, double(value="output", dst=key))
    with pytest.raises(UnknownKeyError, match=f"{key} is read-only"):
        StateMapping(engine)[key] = 1


def test_names_that_only_look_like_counters_are_free(engine, hooks):
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=0.1)).attach(engine)
    optimizer.detach()
    for key in ("optimizer", "other_record"):
        hooks.add(Events.ITERATION_COMPLETED, double(value="output", dst=key))
    engine.run([4])
    assert (engine.state.optimizer, engine.state.other_record) == (8, 8)


@pytest.mark.parametrize("key", ["get_event_attrib_value", "event_to_attr", "two words", "betas.0"])
def test_what_is_no_attribute_of_a_state_is_refused(hooks, key):
    with pytest.raises(UnknownKeyError, match=r"cannot be written to engine\.state; choose a name such as"):
        hooks.add(Events.COMPLETED, double(value="output", dst=key))


def test_a_dict_of_protected_keys_writes_none_of_them(engine, hooks):
    class Other(ice.Processor):
        def __call__(self, mapping, /):
            return {"fine": 1, "iteration": 100}

    hooks.add(Events.COMPLETED, Other())
    engine.logger.disabled = True
    with pytest.raises(UnknownKeyError, match="iteration is read-only"):
        engine.run([1])
    assert not hasattr(engine.state, "fine")
    assert engine.state.iteration == 1


def test_a_dict_that_a_processor_returns_is_written(engine, hooks):
    class Fresh(ice.Processor):
        writes = ("half",)

        def __call__(self, mapping, /):
            return {"half": mapping["output"] / 2}

    hooks.add(Events.ITERATION_COMPLETED, Fresh())
    assert engine.run([3]).half == 1.5


@pytest.mark.parametrize("returns", ["the mapping", "a dict"])
def test_what_a_processor_does_not_declare_it_does_not_write(engine, hooks, returns):
    class Sloppy(ice.Processor):
        writes = ("half",)

        def __call__(self, mapping, /):
            mapping["half"] = mapping["output"] / 2
            mapping["twice"] = mapping["half"] * 4
            return mapping if returns == "the mapping" else {"half": mapping["half"], "twice": mapping["twice"]}

    hooks.add(Events.ITERATION_COMPLETED, Sloppy())
    engine.logger.disabled = True
    with pytest.raises(
        UnknownKeyError, match=r"'Sloppy' wrote 'twice' to engine.state and declares 'half'; .* dst='twice'"
    ):
        engine.run([3])
    assert not hasattr(engine.state, "half")


def test_a_decorated_function_without_dst_declares_nothing(engine, hooks):
    @ice.dictprocess
    def extent(output):
        return {"least": min(output), "most": max(output)}

    engine.logger.disabled = True
    hook = hooks.add(Events.ITERATION_COMPLETED, extent())
    with pytest.raises(
        UnknownKeyError, match=r"'extent' wrote 'least' to engine.state and declares nothing; .* dst='least'"
    ):
        engine.run([[1, 2]])
    hook.remove()
    hooks.add(Events.ITERATION_COMPLETED, extent(dst=["least", "most"]))
    engine = Engine(lambda engine, batch: batch)
    HookRegistry(engine).add(Events.ITERATION_COMPLETED, extent(dst=["least", "most"]))
    assert (engine.run([[1, 2]]).least, engine.state.most) == (1, 2)


def test_what_fails_in_the_middle_of_a_composition_writes_nothing(engine, hooks):
    engine.logger.disabled = True
    hooks.add(
        Events.ITERATION_COMPLETED,
        ice.Compose([double(value="output", dst="metrics.twice"), double(value={}, dst="b")]),
    )
    with pytest.raises(TypeError):
        engine.run([1])
    assert engine.state.metrics == {}


def test_a_processor_that_returns_no_mapping_is_an_error_that_says_what_to_write(engine, hooks):
    engine.logger.disabled = True
    hooks.add(Events.COMPLETED, double(value="output"))
    with pytest.raises(ProcessorReturnError, match="'double' returned int as a hook; say where its result goes: dst="):
        engine.run([1])


def test_a_processor_that_needs_what_the_state_lacks_names_it(engine, hooks):
    engine.logger.disabled = True
    hooks.add(Events.COMPLETED, double())
    with pytest.raises(MissingKeyError, match="'value'"):
        engine.run([1])


def test_the_mapping_of_a_state_is_a_mapping(engine):
    engine.state.metrics["accuracy"] = 0.5
    mapping = StateMapping(engine)
    assert mapping["engine"] is engine
    assert mapping["metrics.accuracy"] == 0.5
    assert mapping.get("metrics.none") is None
    assert set(mapping) >= {"iteration", "output", "batch", "metrics", "metrics.accuracy", "engine"}
    assert len(mapping) == len(list(mapping))
    with pytest.raises(UnknownKeyError, match="output cannot be deleted"):
        del mapping["output"]
