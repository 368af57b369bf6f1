"""The optimizer itself: what it refuses, how it attaches, and what it saves."""

import copy
import functools
import inspect
import io
import math

import pytest
import torch
from ignite.engine import Engine, Events, State
from ignite.handlers import TerminateOnNan

import ice_engine as ice
from ice_engine.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    AttachError,
    BackwardError,
    ClosureError,
    HookError,
    IceEngineWarning,
    NoGradientsError,
    NotConsolidatedError,
    StateDictError,
)
from ice_engine.of_engine import optimizers_of


def parameter(value=0.0):
    return torch.nn.Parameter(torch.tensor(value))


def sgd(*parameters, **settings):
    return ice.Optimizer(torch.optim.SGD(parameters or [parameter()], lr=1.0, momentum=0.5), **settings)


def trainer_of(optimizer, loss):
    return Engine(lambda engine, batch: optimizer.backward(loss(batch)))


# -- made ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        lambda m: m.parameters(),
        lambda m: m.named_parameters(),
        lambda m: [{"params": [m.weight], "lr": 0.5}, {"params": [m.bias]}],
    ],
)
def test_a_factory_takes_parameters_pairs_or_groups(params):
    model = torch.nn.Linear(2, 1)

    optimizer = ice.Optimizer(functools.partial(torch.optim.AdamW, lr=0.1), params(model))

    assert isinstance(optimizer, torch.optim.Optimizer)
    assert isinstance(optimizer.inner, torch.optim.AdamW)
    assert optimizer.param_groups is optimizer.inner.param_groups


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ice.Optimizer("adam"), ArgumentTypeError, "a torch.optim.Optimizer or a factory of one, got str"),
        (
            lambda: ice.Optimizer(torch.optim.Adam),
            ArgumentValueError,
            r"needs params: Optimizer\(factory, model.parameters",
        ),
        (lambda: ice.Optimizer(lambda p: 3, [parameter()]), ArgumentTypeError, "returned int; it must return a torch"),
        (lambda: ice.Optimizer(torch.optim.Adam([parameter()]), [parameter()]), ArgumentValueError, "Leave params out"),
        (lambda: ice.Optimizer(sgd()), ArgumentTypeError, "wrapped already"),
        (lambda: sgd(accumulation_steps=0), ArgumentValueError, "accumulation_steps must be at least 1, got 0"),
        (lambda: sgd(accumulation_steps=-2), ArgumentValueError, "at least 1, got -2"),
        (
            lambda: sgd(accumulation_steps=2.0),
            ArgumentTypeError,
            r"accumulation_steps must be an int, got 2.0 \(float\)",
        ),
        (lambda: sgd(accumulation_steps=True), ArgumentTypeError, "got True"),
        (lambda: sgd(tail="keep"), ArgumentValueError, "tail must be one of 'step', 'carry', 'drop'; got 'keep'"),
        (lambda: sgd(loss_reduction="max"), ArgumentValueError, "loss_reduction must be one of"),
        (
            lambda: sgd(clip=1.0),
            ArgumentTypeError,
            r"clip must be callable, got 1.0; such as clip=ice.clip_norm\(1.0\)",
        ),
        (
            lambda: sgd(clip=torch.nn.utils.clip_grad_norm_),
            ArgumentTypeError,
            r"clip_grad_norm_ cannot be: missing a required argument: 'max_norm'; write clip=ice.clip_norm\(1.0\)",
        ),
        (lambda: sgd(processors=lambda d: d), ArgumentTypeError, r"processors must be a list"),
        (lambda: sgd(processors=[None]), ArgumentTypeError, r"processors\[0\] must be callable, got None"),
        (
            lambda: sgd(processors=[ice.schedules.cosine]),
            ArgumentTypeError,
            r"if it makes a processor, call it: cosine\(...\)",
        ),
        (
            lambda: ice.Optimizer(torch.optim.SGD, torch.nn.Linear(1, 1)),
            ArgumentTypeError,
            r"pass model.parameters\(\)",
        ),
        (lambda: sgd(name="my opt"), ArgumentValueError, "name must be an identifier, got 'my opt'"),
        (lambda: sgd(name=3), ArgumentTypeError, "name must be a string, got 3"),
        (lambda: sgd(sharding="zero3"), ArgumentValueError, "sharding must be one of None, 'zero1'; got 'zero3'"),
        (lambda: sgd(sharding="zero1"), ArgumentValueError, "needs a factory"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_made(make, error, message):
    with pytest.raises(error, match=message) as caught:
        make()

    assert isinstance(caught.value, ice.IceEngineError)


def test_zero1_in_one_process_is_the_plain_optimizer():
    weight = parameter()
    optimizer = ice.Optimizer(functools.partial(torch.optim.SGD, lr=1.0), [weight], sharding="zero1")
    optimizer.backward(weight * 2.0)

    assert optimizer.update()
    assert type(optimizer.inner) is torch.optim.SGD
    assert weight.item() == -2.0


def test_a_processor_of_a_key_that_no_group_has_is_refused_when_it_is_made():
    with pytest.raises(
        ice.IceEngineError, match=r"'cosine' writes 'momemtum', which param group 0 .* lacks; it has: lr"
    ):
        sgd(processors=[ice.schedules.cosine(total=3, dst="momemtum")])


# -- attached -----------------------------------------------------------------------------------------------


def test_it_attaches_once():
    optimizer = sgd()
    engine = Engine(lambda e, b: None)

    assert optimizer.attach(engine) is optimizer
    with pytest.raises(AttachError, match=r"attached to this engine already; call optimizer.detach\(\) first"):
        optimizer.attach(engine)
    with pytest.raises(AttachError, match="attached to another engine already"):
        optimizer.attach(Engine(lambda e, b: None))


@pytest.mark.parametrize("name", ["optimizer", "OPTIMIZER"])
def test_two_optimizers_of_one_name_do_not_attach(name):
    engine = Engine(lambda e, b: None)
    sgd().attach(engine)

    with pytest.raises(AttachError, match=r"named 'optimizer' is attached.*name='generator'"):
        sgd(name=name).attach(engine)

    assert len(optimizers_of(engine)) == 1


@pytest.mark.parametrize(("one", "other"), [("ß", "ss"), ("ss", "ß")])
def test_two_names_that_make_the_same_events_do_not_attach(one, other):
    engine = Engine(lambda e, b: None)
    sgd(name=one).attach(engine)

    with pytest.raises(AttachError, match=f"named '{one}' is attached"):
        sgd(name=other).attach(engine)


def test_a_parameter_in_two_optimizers_does_not_attach():
    engine, shared = Engine(lambda e, b: None), parameter()
    sgd(shared).attach(engine)

    with pytest.raises(AttachError, match=r"share 1 parameters \('param_groups.0.params.0'...\)"):
        sgd(parameter(), shared, name="other").attach(engine)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("engine",), "engine must be an ignite.engine.Engine, got str"),
        ((None, "model"), "model must be a torch.nn.Module"),
    ],
)
def test_it_attaches_to_engines_only(arguments, message):
    engine, *model = arguments
    with pytest.raises(ArgumentTypeError, match=message):
        sgd().attach(engine or Engine(lambda e, b: None), *model)


def test_where_it_cannot_attach_it_is_as_before_and_can_attach_later():
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0))
    engine = Engine(lambda _, batch: optimizer.backward(weight * batch))
    hooks = ice.HookRegistry(engine)
    own = hooks.add(Events.COMPLETED, lambda: None, name="optimizer.run_ended")
    with pytest.raises(HookError, match=r"a hook named 'optimizer\.run_ended' is on this engine already"):
        optimizer.attach(engine)
    assert optimizer.engine is None
    assert [*hooks] == [own]

    own.remove()
    optimizer.attach(engine)
    engine.run([1.0, 2.0])
    assert (optimizer.clocks["step"], weight.item()) == (2, -3.0)


def test_detached_it_leaves_nothing_and_can_attach_again():
    weight = parameter()
    optimizer = sgd(weight)
    engine = trainer_of(optimizer, lambda slope: weight * slope)
    optimizer.attach(engine)
    optimizer.detach()

    assert not any(engine._event_handlers.values())
    assert optimizer.engine is None
    with pytest.raises(AttachError, match=r"call optimizer.attach\(engine\) first"):
        _ = optimizer.hooks
    with pytest.raises(AttachError):
        optimizer.detach()
    optimizer.attach(engine)
    engine.run([1.0])
    assert weight.item() == -1.0


def test_detach_inside_a_window_drops_it_with_a_warning():
    weight = parameter()
    optimizer = sgd(weight, accumulation_steps=4)
    engine = trainer_of(optimizer, lambda slope: weight * slope)
    optimizer.attach(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: optimizer.detach())

    with pytest.warns(ice.IceEngineWarning, match=r"dropped the 2 micro-batches of a window that detach\(\) left open"):
        engine.run([1.0, 1.0])

    assert weight.grad is None


def test_each_optimizer_of_an_engine_has_its_own_window_events_and_clocks():
    a, b = parameter(), parameter()
    first, second = sgd(a, name="first", accumulation_steps=2), sgd(b, name="second", accumulation_steps=3)

    def train_step(engine, slope):
        first.backward(a * slope)
        second.backward(b * slope)

    engine = Engine(train_step)
    first.attach(engine)
    second.attach(engine)
    fired = []
    engine.add_event_handler(first.events.FIRST_STEP_COMPLETED, lambda e: fired.append(("first", e.state.first_step)))
    engine.add_event_handler(
        ice.optimizer_events("second").SECOND_STEP_COMPLETED(every=2),
        lambda e: fired.append(("second", e.state.second_step)),
    )
    engine.run([1.0] * 6)

    assert fired == [("first", 1), ("first", 2), ("first", 3), ("second", 2)]
    assert (engine.state.first_attempt, engine.state.second_attempt) == (3, 2)


def test_a_generators_loss_leaves_no_gradient_in_the_discriminator():
    generator_weight, discriminator_weight = parameter(1.0), parameter(1.0)
    generator = sgd(generator_weight, name="generator")
    discriminator = sgd(discriminator_weight, name="discriminator")

    def train_step(engine, batch):
        fake = generator_weight * 3.0
        discriminator.backward(discriminator_weight * fake.detach())
        generator.backward(-discriminator_weight * fake)

    engine = Engine(train_step)
    generator.attach(engine)
    discriminator.attach(engine)
    engine.run([0])

    assert discriminator_weight.item() == 1.0 - 3.0
    assert generator_weight.item() == 1.0 + 3.0


# -- backward -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (
            lambda w: 3.0,
            ArgumentTypeError,
            r"loss must be a tensor, got float; pass the loss itself, not loss.item\(\)",
        ),
        (lambda w: w * torch.ones(2), BackwardError, r"scalar, got shape \(2,\); reduce it first: loss.mean\(\)"),
        (lambda w: (w * 2).detach(), BackwardError, "requires no grad"),
    ],
)
def test_losses_that_cannot_be_differentiated_are_refused(loss, error, message):
    weight = parameter()

    with pytest.raises(error, match=message):
        sgd(weight).backward(loss(weight))


@pytest.mark.parametrize("when", ["before", "after", "after an exception"])
def test_backward_outside_the_attached_run_is_refused(when):
    weight = parameter()
    optimizer = sgd(weight)
    engine = trainer_of(optimizer, lambda slope: weight / slope if slope else 1 / 0)
    optimizer.attach(engine)
    if when == "after":
        engine.run([1.0])
    if when == "after an exception":
        with pytest.raises(ZeroDivisionError):
            engine.run([1.0, 0.0])

    with pytest.raises(BackwardError, match="attached to an engine that is not running"):
        optimizer.backward(weight * 1.0)


def test_plain_loss_backward_in_an_attached_run_is_found():
    weight = parameter()
    optimizer = sgd(weight)
    engine = Engine(lambda e, b: (weight * 1.0).backward())
    optimizer.attach(engine)

    with pytest.raises(BackwardError, match=r"call optimizer.backward\(loss\) instead of loss.backward\(\)"):
        engine.run([0])


def test_gradients_from_before_the_run_do_not_enter_it():
    weight = parameter()
    optimizer = sgd(weight)
    (weight * 100.0).backward()
    engine = trainer_of(optimizer, lambda slope: weight * slope)
    optimizer.attach(engine)
    engine.run([1.0])

    assert weight.item() == -1.0


def test_a_window_without_any_gradient_is_an_error():
    mine, other = parameter(), parameter()
    optimizer = sgd(mine)
    optimizer.backward(other * 1.0)

    with pytest.raises(
        NoGradientsError, match="no parameter of optimizer 'optimizer' has a gradient after 1 micro-batches"
    ):
        optimizer.update()


def test_step_always_steps_and_counts_nothing():
    weight = parameter()
    optimizer = sgd(weight, accumulation_steps=4)
    weight.grad = torch.tensor(1.0)
    with pytest.warns(IceEngineWarning, match="accumulation_steps"):
        optimizer.step()

    assert weight.item() == -1.0
    assert optimizer.clocks["step"] == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulation_steps": 2},
        {"grad_scaler": torch.amp.GradScaler("cpu")},
        {"clip": ice.clip_norm(1.0)},
        {"processors": [ice.schedules.constant(0.1)]},
        {"nonfinite": "raise"},
        {"tail": "drop"},
    ],
)
def test_lbfgs_does_not_go_with_windows(settings):
    given = next(iter(settings))
    with pytest.raises(
        ClosureError, match=rf"LBFGS evaluates the loss in a closure.* {given}, .*optimizer.step\(closure\)"
    ):
        ice.Optimizer(torch.optim.LBFGS([parameter()]), **settings)


def test_lbfgs_does_not_go_with_backward_and_update():
    weight = parameter()
    optimizer = ice.Optimizer(torch.optim.LBFGS([weight]))

    with pytest.raises(ClosureError, match=r"call optimizer.step\(closure\)"):
        optimizer.backward(weight * 1.0)
    with pytest.raises(ClosureError):
        optimizer.update()


def test_step_by_hand_in_an_attached_run_is_said():
    weight = parameter()
    optimizer = sgd(weight)

    def train_step(engine, slope):
        optimizer.backward(weight * slope)
        optimizer.step()

    engine = Engine(train_step)
    optimizer.attach(engine)
    with pytest.warns(
        ice.IceEngineWarning, match=r"applied past its window, clipping and clocks. Take step\(\) out of train_step"
    ):
        engine.run([1.0])


def test_plain_torch_calls_in_an_attached_run_are_said():
    weight = parameter()
    optimizer = sgd(weight, accumulation_steps=4)

    def train_step(engine, slope):
        (weight * slope).backward()
        optimizer.step()
        optimizer.zero_grad()

    engine = Engine(train_step)
    optimizer.attach(engine)
    with pytest.warns(ice.IceEngineWarning) as said:
        engine.run([1.0])

    texts = [str(warning.message) for warning in said]
    assert any("step() by hand" in text for text in texts)
    assert any("got no loss in epoch 1" in text for text in texts)


def test_gradients_that_the_model_cleared_inside_a_window_are_missed():
    model = torch.nn.Linear(1, 1)
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1), accumulation_steps=2)

    def train_step(engine, batch):
        model.zero_grad()
        optimizer.backward(model(torch.ones(1, 1)).sum())

    engine = Engine(train_step)
    optimizer.attach(engine)
    with (
        pytest.warns(ice.IceEngineWarning, match="dropped"),
        pytest.raises(BackwardError, match="cleared inside its window"),
    ):
        engine.run([0, 0])


def stepped_gradients(optimizer, *weights):
    """A list to which every step adds the gradients that it is taken with."""
    seen = []
    optimizer.inner.register_step_pre_hook(lambda *_: seen.append(tuple(w.grad and w.grad.item() for w in weights)))
    return seen


def test_what_a_handler_left_between_windows_is_cleared_as_by_a_plain_loop():
    weight = parameter()
    optimizer = sgd(weight)
    engine = trainer_of(optimizer, lambda slope: weight * slope)
    optimizer.attach(engine)
    seen = stepped_gradients(optimizer, weight)
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: (weight * 100.0).backward())  # such as saliency
    engine.run([1.0, 2.0], max_epochs=2)

    assert seen == [(1.0,), (2.0,), (1.0,), (2.0,)]


def test_a_plain_backward_before_ours_in_the_same_iteration_is_found():
    weight = parameter()
    optimizer = sgd(weight)

    def train_step(engine, slope):
        (weight * 100.0).backward()
        optimizer.backward(weight * slope)

    engine = Engine(train_step)
    optimizer.attach(engine)
    with pytest.raises(BackwardError, match=r"call optimizer.backward\(loss\) instead of loss.backward\(\)"):
        engine.run([1.0])


def test_what_was_there_before_the_first_backward_of_a_loop_is_found():
    weight = parameter()
    optimizer = sgd(weight)
    (weight * 100.0).backward()

    with pytest.raises(BackwardError, match=r"optimizer.zero_grad\(\) clears what is left from before"):
        optimizer.backward(weight * 1.0)
    optimizer.zero_grad()
    optimizer.backward(weight * 1.0)
    assert optimizer.update()
    assert weight.item() == -1.0


@pytest.mark.parametrize("then", ["ours", "nothing"])
def test_a_plain_backward_inside_an_open_window_is_found(then):
    weight = parameter()
    optimizer = sgd(weight, accumulation_steps=3)

    def train_step(engine, slope):
        if engine.state.iteration == 2:
            (weight * slope).backward()
        if engine.state.iteration != 2 or then == "ours":
            optimizer.backward(weight * slope)

    engine = Engine(train_step)
    optimizer.attach(engine)
    with (
        pytest.warns(ice.IceEngineWarning, match="dropped the 1 micro-batches of a window that changed gradients"),
        pytest.raises(BackwardError, match="were changed inside its window, not by its backward"),
    ):
        engine.run([1.0, 10.0, 1.0])
    assert weight.grad is None


def test_a_plain_backward_while_the_run_is_interrupted_is_found():
    weight = parameter()
    optimizer = sgd(weight, accumulation_steps=4)
    engine = trainer_of(optimizer, lambda slope: weight * slope)
    optimizer.attach(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda e: e.interrupt())
    engine.run([1.0] * 4)
    (weight * 100.0).backward()

    with pytest.warns(ice.IceEngineWarning, match="dropped"), pytest.raises(BackwardError, match="were changed"):
        engine.run()


@pytest.mark.parametrize("event", ["ITERATION_STARTED", "ITERATION_COMPLETED", "EPOCH_STARTED"])
def test_attached_in_the_middle_of_a_run_it_starts_without_gradients(event):
    weight = parameter()
    optimizer = sgd(weight)
    seen = stepped_gradients(optimizer, weight)

    def train_step(engine, slope):
        if optimizer.engine is not None:
            optimizer.backward(weight * slope)
        else:
            (weight * 100.0).backward()

    engine = Engine(train_step)
    engine.add_event_handler(getattr(Events, event)(once=2), lambda: optimizer.attach(engine))
    engine.run([1.0, 1.0, 1.0], max_epochs=2)

    assert set(seen) == {(1.0,)}


def test_the_callers_own_micro_batches_go_with_ours_in_one_window():
    weight = parameter()
    optimizer = sgd(weight, accumulation_steps=4)
    for slope in (1.0, 2.0, 3.0, 6.0):
        if slope in (2.0, 3.0):
            (weight * slope).backward()
        else:
            optimizer.backward(weight * slope)
        optimizer.update()

    assert weight.item() == -3.0


def test_a_window_may_begin_with_losses_that_do_not_reach_its_parameters():
    weight, other = parameter(), parameter()
    optimizer = sgd(weight, accumulation_steps=2)

    def train_step(engine, slope):
        optimizer.backward((other if engine.state.iteration % 2 else weight) * slope)

    engine = Engine(train_step)
    optimizer.attach(engine)
    seen = stepped_gradients(optimizer, weight)
    engine.run([1.0, 3.0, 1.0, 5.0])

    assert seen == [(1.5,), (2.5,)]


@pytest.mark.parametrize("how", ["one of two", "to zero"])
def test_clearing_a_part_of_a_window_is_found(how):
    a, b = parameter(), parameter()
    optimizer = ice.Optimizer(torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=1.0), accumulation_steps=2)

    def train_step(engine, slope):
        if how == "one of two":
            a.grad = None
        elif a.grad is not None:
            a.grad.zero_()
        optimizer.backward((a + b) * slope)

    engine = Engine(train_step)
    optimizer.attach(engine)
    with (
        pytest.warns(ice.IceEngineWarning, match="dropped"),
        pytest.raises(BackwardError, match="cleared inside its window"),
    ):
        engine.run([1.0, 1.0])


@pytest.mark.parametrize("event", ["EPOCH_COMPLETED", "ITERATION_COMPLETED"])
def test_parameters_added_in_a_run_start_without_gradients(event):
    a, b = parameter(), parameter()
    optimizer = sgd(a, accumulation_steps=2)
    engine = trainer_of(optimizer, lambda slope: (a + b) * slope)
    optimizer.attach(engine)
    seen = stepped_gradients(optimizer, b)
    engine.add_event_handler(getattr(Events, event)(once=1), lambda: optimizer.add_param_group({"params": [b]}))
    engine.run([2.0, 2.0, 2.0, 2.0], max_epochs=2)

    assert seen[2:] == [(2.0,), (2.0,)]
    assert event == "EPOCH_COMPLETED" or seen[:2] == [(1.0,), (2.0,)]  # first of the second micro-batch alone


def test_parameters_of_another_optimizer_of_the_engine_cannot_be_added():
    a, b = parameter(), parameter()
    first, second = sgd(a, name="first"), sgd(b, name="second")
    engine = Engine(lambda *_: None)
    first.attach(engine)
    second.attach(engine)

    with pytest.raises(AttachError, match="share 1 parameters"):
        second.add_param_group({"params": [a]})
    assert len(second.param_groups) == 1


@pytest.mark.parametrize("call", ["backward", "update", "flush"])
@pytest.mark.parametrize("kind", ["GRADIENTS_READY", "STEP_STARTED", "STEP_COMPLETED", "STEP_SKIPPED"])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_window_takes_nothing_while_it_closes(kind, call, scaled):
    weight = parameter()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if scaled else None
    optimizer = sgd(weight, grad_scaler=scaler, nonfinite="skip")
    engine = trainer_of(optimizer, lambda slope: weight * slope)
    optimizer.attach(engine)
    calls = {"backward": lambda: optimizer.backward(weight * 3.0), "update": optimizer.update, "flush": optimizer.flush}
    engine.add_event_handler(optimizer.event(kind), lambda: calls[call]())

    with pytest.raises(BackwardError, match=rf"{call}\(\) of optimizer 'optimizer' in a handler of its own events"):
        engine.run([math.inf if kind == "STEP_SKIPPED" else 1.0])
    assert weight.grad is None
    assert optimizer.clocks["attempt"] == optimizer.clocks["step"] + optimizer.clocks["skipped"]


@pytest.mark.parametrize("tail", ["step", "carry", "drop"])
def test_a_micro_batch_whose_exception_was_swallowed_enters_no_step(tail):
    weight = parameter()
    optimizer = sgd(weight, accumulation_steps=2, tail=tail)

    def train_step(engine, slope):
        optimizer.backward(weight * slope)
        if engine.state.iteration == 2:
            raise ZeroDivisionError

    engine = Engine(train_step)
    optimizer.attach(engine)
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda *_: None)
    seen = stepped_gradients(optimizer, weight)
    with pytest.warns(ice.IceEngineWarning, match="dropped the 2 micro-batches of a window that an exception"):
        engine.run([1.0, 10.0, 100.0, 1000.0], max_epochs=2)

    assert seen == [(550.0,), (5.5,)]  # Ignite goes on in the data


def test_the_record_is_of_the_last_window_if_a_handler_of_step_started_raises():
    weight = parameter()
    optimizer = sgd(weight)
    engine = trainer_of(optimizer, lambda slope: weight * slope)
    optimizer.attach(engine)
    engine.add_event_handler(optimizer.event("STEP_STARTED")(once=2), lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.run([1.0, 1.0])

    assert optimizer.record.step == engine.state.optimizer_record.step == optimizer.clocks["step"] == 1


def test_loading_inside_its_own_open_window_drops_it_with_a_warning():
    weight = parameter()
    optimizer = sgd(weight, accumulation_steps=2)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.backward(weight * 1.0)
    optimizer.update()

    with pytest.warns(ice.IceEngineWarning, match=r"dropped the 1 micro-batches of a window that load_state_dict\(\)"):
        optimizer.load_state_dict(state)
    assert weight.grad is None


def test_gradients_of_a_failed_run_may_be_cleared_by_hand():
    weight = parameter()
    optimizer = sgd(weight, accumulation_steps=2)
    engine = trainer_of(optimizer, lambda slope: weight / slope if slope else 1 / 0)
    optimizer.attach(engine)
    with pytest.raises(ZeroDivisionError):
        engine.run([1.0, 0.0])
    optimizer.zero_grad()

    assert weight.grad is None


class _OutOfMemory(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise MemoryError


def test_a_backward_that_failed_leaves_no_half_window():
    weight = parameter()
    optimizer = sgd(weight, accumulation_steps=2)
    optimizer.backward(weight * 5.0)
    optimizer.update()
    with (
        pytest.warns(ice.IceEngineWarning, match=r"dropped the 2 micro-batches"),
        pytest.raises(MemoryError),
    ):
        optimizer.backward(_OutOfMemory.apply(weight * 9.0))
    for slope in (1.0, 3.0):
        optimizer.backward(weight * slope)
        optimizer.update()

    assert weight.item() == -2.0


def test_one_loss_trains_two_optimizers():
    a, b = parameter(2.0), parameter(3.0)
    first, second = sgd(a, name="first"), sgd(b, name="second")

    def train_step(engine, batch):
        loss = a * b * batch.requires_grad_()
        first.backward(loss, retain_graph=True)
        second.backward(loss)

    engine, batch = Engine(train_step), torch.ones(())
    first.attach(engine)
    second.attach(engine)
    engine.run([batch])

    assert (a.item(), b.item()) == (2.0 - 3.0, 3.0 - 2.0)
    assert batch.grad.item() == 12.0, "what no optimizer owns is reached as in torch"


def test_an_optimizer_that_gets_no_loss_for_an_epoch_is_named():
    a, b = parameter(2.0), parameter(3.0)
    first, second = sgd(a, name="first"), sgd(b, name="second")
    engine = Engine(lambda e, batch: first.backward(a * b))
    first.attach(engine)
    second.attach(engine)

    with pytest.warns(ice.IceEngineWarning, match="optimizer 'second' got no loss in epoch 1"):
        engine.run([0])


@pytest.mark.parametrize("what", ["detach", "load"])
@pytest.mark.parametrize("kind", ["GRADIENTS_READY", "STEP_STARTED"])
def test_a_window_is_not_taken_apart_while_it_closes(kind, what):
    weight = parameter()
    optimizer = sgd(weight)
    engine = trainer_of(optimizer, lambda slope: weight * slope)
    optimizer.attach(engine)
    act = optimizer.detach if what == "detach" else lambda: optimizer.load_state_dict(optimizer.state_dict())
    engine.add_event_handler(optimizer.event(kind), lambda: act())

    with pytest.raises(AttachError, match="while its window is being stepped; do it on OPTIMIZER_STEP_COMPLETED"):
        engine.run([1.0])


def test_an_engine_that_goes_on_under_a_new_optimizer_is_said():
    weight = parameter()
    optimizer = sgd(weight)
    engine = trainer_of(optimizer, lambda slope: weight * slope)
    optimizer.attach(engine)
    engine.load_state_dict({"iteration": 2, "epoch_length": 2, "max_epochs": 2})

    with pytest.warns(ice.IceEngineWarning, match="goes on at iteration 2, optimizer 'optimizer' starts at step 0"):
        engine.run([1.0] * 2, max_epochs=2)


@pytest.mark.parametrize("unit", [None, "iteration", "step"])
def test_an_optimizer_that_got_a_plain_ones_state_is_told_how_its_schedules_go_on(unit, recwarn):
    weight, plain = parameter(), torch.optim.SGD([parameter()], lr=1.0, momentum=0.9)
    optimizer = sgd(weight, processors=[] if unit is None else [ice.schedules.linear(unit=unit)])
    engine = trainer_of(optimizer, lambda slope: weight * slope)
    optimizer.attach(engine)
    optimizer.load_state_dict(plain.state_dict())
    engine.load_state_dict({"iteration": 2, "epoch_length": 2, "max_epochs": 2})

    engine.run([1.0] * 2, max_epochs=2)

    behind = (
        "the engine goes on at iteration 2, optimizer 'optimizer' was given a plain optimizer's state, without "
        "clocks: it starts at step 0, and so do its schedules; those with unit='iteration', such as "
        "ice.schedules.cosine(unit='iteration'), go on too"
    )
    assert [str(warning.message) for warning in recwarn] == ([behind] if unit == "step" else [])
    assert optimizer.param_groups[0]["lr"] == {None: 1.0, "iteration": 0.25, "step": 0.75}[unit]


def test_help_and_type_checkers_see_the_arguments():
    parameters = inspect.signature(ice.Optimizer).parameters

    assert list(parameters)[:3] == ["optimizer", "params", "name"]
    assert all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values())


def test_a_torch_optimizer_is_wrapped_once():
    inner = torch.optim.SGD([parameter()], lr=1.0)
    kept = ice.Optimizer(inner, name="kept")

    with pytest.raises(ArgumentTypeError, match="wrapped already, by optimizer 'kept'"):
        ice.Optimizer(inner)

    assert kept.inner is inner


def test_a_shallow_copy_is_refused():
    with pytest.raises(ArgumentTypeError, match=r"use copy.deepcopy\(optimizer\)"):
        copy.copy(sgd())


@pytest.mark.parametrize("attached", [True, False])
def test_zero_grad_inside_a_window_is_refused(attached):
    weight = parameter()
    optimizer = sgd(weight, accumulation_steps=2)

    def train_step(engine, slope):
        optimizer.zero_grad()
        optimizer.backward(weight * slope)
        if not attached:
            optimizer.update()

    engine = Engine(train_step)
    if attached:
        optimizer.attach(engine)
    with pytest.raises(BackwardError, match=r"zero_grad\(\) inside an open window .* the gradients of 1 micro-batches"):
        engine.run([1.0, 1.0])


def test_a_forgotten_attach_is_said():
    weight = parameter()
    optimizer = sgd(weight)

    with pytest.warns(ice.IceEngineWarning, match=r"update\(\) never.*call optimizer.attach\(engine\)"):
        trainer_of(optimizer, lambda slope: weight * slope).run([1.0] * 40)


# -- processors ---------------------------------------------------------------------------------------------


def stepped(*processors, groups=None, **settings):
    weight = parameter()
    groups = groups or [{"params": [weight]}]
    optimizer = ice.Optimizer(torch.optim.AdamW(groups, lr=0.5), processors=list(processors), **settings)
    optimizer.backward(sum(p for group in optimizer.param_groups for p in group["params"]))
    optimizer.update()
    return optimizer


def test_processors_run_in_order_once_per_step_and_group():
    calls = []

    def note(group):
        calls.append((group["step"], group["group_index"], group["group_name"], group["lr"]))
        group["lr"] *= 2
        return group

    groups = [{"params": [parameter()], "name": "body"}, {"params": [parameter()], "lr": 0.1}]
    optimizer = stepped(note, note, groups=groups)

    assert calls == [(0, 0, "body", 0.5), (0, 0, "body", 1.0), (0, 1, "group_1", 0.1), (0, 1, "group_1", 0.2)]
    assert [group["lr"] for group in optimizer.param_groups] == [2.0, 0.4]
    assert optimizer.record.values == {"body": {"lr": 2.0}, "group_1": {"lr": 0.4}}


def test_a_pure_processor_may_return_a_dict_of_its_own():
    assert stepped(lambda group: {**group, "weight_decay": 0.25}).param_groups[0]["weight_decay"] == 0.25
    assert stepped(lambda group: {"lr": 0.25}).param_groups[0]["lr"] == 0.25


def test_one_element_of_a_tuple_can_be_scheduled():
    optimizer = stepped(ice.schedules.constant(0.5, dst="betas.0"))

    assert optimizer.param_groups[0]["betas"] == (0.45, 0.999)
    assert optimizer.record.values["group_0"]["betas"] == (0.45, 0.999)


def test_tensor_lr_is_written_in_place():
    lr = torch.tensor(0.5)
    optimizer = ice.Optimizer(
        torch.optim.AdamW([parameter()], lr=lr, foreach=False), processors=[ice.schedules.constant(0.5)]
    )
    optimizer.backward(optimizer.param_groups[0]["params"][0] * 1.0)
    optimizer.update()

    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == 0.25


def test_a_tensor_lr_is_each_groups_own_and_changes_only_when_all_processors_returned():
    first, second = parameter(), parameter()

    def halve(group):
        group["lr"] *= 0.5 * (group["group_index"] + 1)
        return group

    calls = []

    def fail_once(group):
        calls.append(group["lr"])
        if len(calls) == 2:
            raise ZeroDivisionError
        return group

    inner = torch.optim.SGD([{"params": [first]}, {"params": [second]}], lr=torch.tensor(0.5))
    optimizer = ice.Optimizer(inner, processors=[halve, fail_once])
    optimizer.backward(first + second)
    with pytest.raises(ZeroDivisionError):
        optimizer.update()
    assert [group["lr"].item() for group in optimizer.param_groups] == [0.5, 0.5]

    optimizer.backward(first + second)
    optimizer.update()
    assert [group["lr"].item() for group in optimizer.param_groups] == [0.25, 0.5]


def test_total_steps_follows_the_window_size_that_update_was_given():
    totals, weight = set(), parameter()
    optimizer = sgd(weight, processors=[lambda g: totals.add(g["total_steps"]) or g])

    def train_step(engine, slope):
        optimizer.backward(weight * slope)
        optimizer.update(grad_acc_steps=4)

    engine = Engine(train_step)
    optimizer.attach(engine)
    engine.run([1.0] * 16)

    assert totals == {4}


def test_numpy_numbers_become_plain_so_that_the_checkpoint_loads():
    numpy = pytest.importorskip("numpy")
    optimizer = stepped(lambda group: {"lr": numpy.float64(0.25)})

    assert type(optimizer.param_groups[0]["lr"]) is float


def test_the_context_has_our_names_and_ice_learns():
    seen = {}
    weight = parameter()
    optimizer = sgd(weight, accumulation_steps=2, processors=[lambda group: seen.update(group) or group])
    engine = trainer_of(optimizer, lambda slope: weight * slope)
    optimizer.attach(engine)
    engine.run([1.0, 1.0, 1.0], max_epochs=2)

    ours = {"step": 3, "attempt": 4, "iteration": 6, "epoch": 2, "epoch_length": 3, "max_epochs": 2, "total_steps": 4}
    ice_learns = {"current_epoch": 2, "epoch_steps": 3, "global_steps": 6, "epoch_size": 3}
    assert {key: seen[key] for key in ours} == ours
    assert {key: seen[key] for key in ice_learns} == ice_learns
    assert seen["optimizer"] is seen["n"] is seen["module_node"] is optimizer
    assert seen["engine"] is engine
    assert seen["x"] is seen["param_group"]
    assert seen["x"]["lr"] == 1.0


def test_a_schedule_of_iterations_lasts_as_long_as_max_iters():
    rates, weight = [], parameter()
    optimizer = sgd(weight, processors=[ice.schedules.linear(unit="iteration"), lambda g: rates.append(g["lr"]) or g])
    engine = trainer_of(optimizer, lambda slope: weight * slope)
    optimizer.attach(engine)
    engine.run([1.0] * 3, max_iters=4)

    assert rates == [1.0, 0.75, 0.5, 0.25]


def test_a_run_goes_by_the_state_that_its_engine_has_now():
    rates, weight = [], parameter()
    optimizer = sgd(weight, processors=[ice.schedules.linear(), lambda g: rates.append(g["lr"]) or g])
    engine = trainer_of(optimizer, lambda slope: weight * slope)
    optimizer.attach(engine)
    engine.run([1.0] * 4)
    engine.state = State()
    engine.run([1.0] * 2)

    assert rates == [1.0, 0.75, 0.5, 0.25, 1.0, 0.5]
    assert (optimizer.clocks["iteration"], engine.state.optimizer_step) == (2, 2)


@pytest.mark.parametrize(
    ("k", "tail", "run", "total"),
    [
        (4, "step", {"max_epochs": 3}, 9),
        (4, "drop", {"max_epochs": 3}, 6),
        (4, "carry", {"max_epochs": 3}, 8),
        (4, "step", {"max_iters": 13}, 4),
        (3, "drop", {"max_iters": 14}, 4),
        (4, "carry", {"max_iters": 13}, 4),
    ],
)
def test_total_steps_is_the_number_of_steps_the_run_takes(k, tail, run, total):
    totals, weight = set(), parameter()
    optimizer = sgd(weight, accumulation_steps=k, tail=tail, processors=[lambda g: totals.add(g["total_steps"]) or g])
    engine = trainer_of(optimizer, lambda slope: weight * slope)
    optimizer.attach(engine)
    engine.run([1.0] * 10, **run)

    assert totals == {total}
    assert optimizer.clocks["step"] == total


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (lambda g: None, "processor '<lambda>' returned NoneType for param group 0 .*add `return group`"),
        (ice.dictprocess(lambda lr: lr * 2), "returned float for param group 0"),
        (lambda g: {"learning_rate": 1.0}, "'learning_rate' is not an entry of param group 0"),
        (lambda g: {"weight_dcay": 1.0}, "did you mean 'weight_decay'"),
        (lambda g: {"step": 3}, "'step' is read-only; writable are: lr"),
        (lambda g: {"params": []}, "'params' is read-only"),
        (
            lambda g: {"lr": math.nan},
            r"'lr' of param group 0 .* would become nan \(float\); it must be a finite number",
        ),
        (lambda g: {"lr": None}, r"would become None \(NoneType\)"),
        (lambda g: {"lr": -1.0}, "'lr' of param group 0 .* would become -1.0; it must be at least 0"),
        (lambda g: {"lr": torch.ones(2)}, "must be a finite number"),
        (lambda g: {"betas": 0.9}, "'betas' of param group 0 .* would become 0.9; it must have 2 elements"),
        (lambda g: {"betas": (0.9,)}, "it must have 2 elements"),
        (lambda g: {"lr": 1j}, r"would become 1j \(complex\)"),
        (lambda g: {"betas": (0.9, math.inf)}, r"'betas.1' of param group 0 .* would become inf"),
        (lambda g: g.pop("lr") and g, "'lr' cannot be deleted"),
    ],
)
def test_what_a_processor_must_not_do_is_an_error_and_changes_no_group(processor, message):
    first, second = parameter(), parameter()
    fail_in_second = lambda g: processor(g) if g["group_index"] == 0 else g  # noqa: E731
    inner = torch.optim.AdamW([{"params": [second], "lr": 0.1}, {"params": [first]}], lr=0.5)
    before = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in inner.param_groups])
    optimizer = ice.Optimizer(inner, processors=[lambda g: {"lr": 0.7}, fail_in_second])
    optimizer.backward(first + second)

    with pytest.raises(ice.IceEngineError, match=message):
        optimizer.update()

    after = [{k: v for k, v in g.items() if k not in ("params", "initial_lr")} for g in inner.param_groups]
    assert after == before
    assert optimizer.clocks["step"] == 0
    assert (first.item(), second.item()) == (0.0, 0.0)


def test_a_schedule_of_the_whole_run_without_its_length_says_what_to_pass():
    weight = parameter()
    optimizer = sgd(weight, processors=[ice.schedules.cosine()])
    optimizer.backward(weight * 1.0)

    with pytest.raises(ice.IceEngineError, match="total="):
        optimizer.update()


def test_an_added_group_is_processed_too():
    first, second = parameter(), parameter()
    optimizer = sgd(first, processors=[ice.schedules.constant(0.5)])
    optimizer.add_param_group({"params": [second], "lr": 0.2})
    optimizer.backward(first + second)
    optimizer.update()

    assert second.item() == pytest.approx(-0.1)


# -- saved --------------------------------------------------------------------------------------------------


def train(optimizer, weight, slopes):
    for slope in slopes:
        optimizer.backward(weight * slope)
        optimizer.update()


def make(k=1):
    weight = parameter()
    optimizer = ice.Optimizer(
        torch.optim.AdamW([("w", weight)], lr=0.1),
        accumulation_steps=k,
        grad_scaler=torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2),
        processors=[ice.schedules.cosine(total=10)],
    )
    return weight, optimizer


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_loaded_optimizer_goes_on_bit_for_bit():
    slopes = [1.0, 2.0, math.inf, 4.0, 5.0, 6.0]
    whole_weight, whole = make()
    train(whole, whole_weight, slopes)

    weight, first = make()
    train(first, weight, slopes[:4])
    resumed_weight, resumed = make()
    resumed_weight.data.copy_(weight.data)
    resumed.load_state_dict(through_a_file(first.state_dict()))
    train(resumed, resumed_weight, slopes[4:])

    assert torch.equal(whole_weight, resumed_weight)
    assert resumed.clocks == whole.clocks
    assert resumed.grad_scaler.state_dict() == whole.grad_scaler.state_dict()
    assert resumed.param_groups[0]["lr"] == whole.param_groups[0]["lr"]


def test_the_state_dict_is_torchs_own_with_names_and_one_key_more():
    weight, optimizer = make()
    train(optimizer, weight, [1.0])

    state = optimizer.state_dict(rank=0)
    plain = optimizer.inner.state_dict()

    assert set(state) == {"state", "param_groups", "ice_engine"}
    assert state["state"] == plain["state"]
    assert state["param_groups"] == plain["param_groups"]
    assert state["param_groups"][0]["param_names"] == ["w"]


@pytest.mark.parametrize("named", [True, False])
def test_names_come_from_the_parameters_the_model_or_their_place(named):
    model = torch.nn.Linear(2, 1)
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    if named:
        optimizer.attach(Engine(lambda e, b: None), model=model)

    names = optimizer.state_dict()["param_groups"][0]["param_names"]

    assert names == (["weight", "bias"] if named else ["param_groups.0.params.0", "param_groups.0.params.1"])
    assert "param_names" not in optimizer.param_groups[0]


def test_a_plain_torch_optimizer_and_ours_load_each_others_state():
    weight, optimizer = make()
    train(optimizer, weight, [1.0, 2.0])
    plain = torch.optim.AdamW([parameter()], lr=9.0)

    plain.load_state_dict(through_a_file(optimizer.state_dict()))
    other_weight, other = make()
    other.load_state_dict(plain.state_dict())

    assert torch.equal(other.state[other_weight]["exp_avg"], optimizer.state[weight]["exp_avg"])
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert other.param_groups[0]["initial_lr"] == 0.1
    assert other.clocks["step"] == 0


def test_loading_keeps_nothing_of_its_argument():
    weight, optimizer = make()
    train(optimizer, weight, [1.0])
    state = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(state)
    other_weight, other = make()
    other.load_state_dict(state)
    train(other, other_weight, [3.0, 4.0])

    assert torch.equal(state["state"][0]["exp_avg"], kept["state"][0]["exp_avg"])
    assert state["param_groups"] == kept["param_groups"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: s.pop("state"), StateDictError, "not an optimizer's state dict: state missing; it has param_groups"),
        (
            lambda s: s["param_groups"][0]["params"].append(1),
            StateDictError,
            r"have \[2\] parameters, the optimizer's \[1\]",
        ),
        (lambda s: s["ice_engine"].update(version=99), StateDictError, "of version 99, this ice_engine reads 1"),
        (lambda s: s.update(ice_engine=3), StateDictError, "'ice_engine' must be a dict, got int"),
        (lambda s: s["ice_engine"].pop("clocks"), StateDictError, "'ice_engine' is damaged"),
        (lambda s: s["ice_engine"].update(window=None), StateDictError, "'ice_engine' is damaged"),
        (lambda s: s["ice_engine"]["clocks"].update(step="1"), StateDictError, "load another checkpoint"),
        (lambda s: s.update(param_groups=3), StateDictError, "its param_groups are int, not groups"),
        (lambda s: s["param_groups"][0].pop("params"), StateDictError, "its param_groups are list, not groups"),
        (lambda s: s.update(ice_engine={"consolidated_on": 3}), NotConsolidatedError, "the whole state is on rank 3"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change, error, message):
    weight, optimizer = make()
    train(optimizer, weight, [1.0])
    before = copy.deepcopy(optimizer.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["exp_avg"].fill_(9.0) if "state" in state else None
    change(state)

    with pytest.raises(error, match=message):
        optimizer.load_state_dict(state)

    assert optimizer.state_dict()["ice_engine"] == before["ice_engine"]
    assert torch.equal(optimizer.state[weight]["exp_avg"], before["state"][0]["exp_avg"])


@pytest.mark.parametrize("state", [None, [1], "checkpoint.pt"])
def test_only_a_dict_can_be_loaded(state):
    with pytest.raises(StateDictError, match="state_dict must be a dict, got"):
        sgd().load_state_dict(state)


def test_float16_parameters_with_a_scaler_are_refused_when_it_is_made():
    half = torch.nn.Parameter(torch.zeros((), dtype=torch.float16))

    with pytest.raises(ArgumentValueError, match="cannot unscale the gradients of float16 parameters"):
        sgd(half, grad_scaler=torch.amp.GradScaler("cpu"))


def test_state_does_not_go_to_a_parameter_of_another_name():
    def named(*names):
        return ice.Optimizer(torch.optim.SGD([(name, parameter()) for name in names], lr=0.1))

    with pytest.raises(StateDictError, match="only the optimizer has 'c'; only the state dict has 'b'"):
        named("w", "c").load_state_dict(named("w", "b").state_dict())
    # Where names cannot decide, as two are the same, the order must be the one it was saved with.
    with pytest.raises(StateDictError, match=r"group 0 of the state dict has 'w' where the optimizer has 'b'.*order"):
        named("b", "w", "w").load_state_dict(named("w", "b", "w").state_dict())
    named("module.w", "_orig_mod.b").load_state_dict(named("w", "b").state_dict())
    named("b", "w").load_state_dict(named("w", "b").state_dict())


def test_state_of_another_class_is_refused():
    adam = ice.Optimizer(torch.optim.Adam([parameter()]))

    with pytest.raises(StateDictError, match="the state dict is of Adam, this wraps SGD; param group 0 lacks momentum"):
        sgd().load_state_dict(adam.state_dict())


@pytest.mark.parametrize("rank", [1, -1, "0", True])
def test_only_ranks_that_exist_can_be_asked_for_the_state(rank):
    with pytest.raises(ArgumentValueError, match="rank must be an integer from 0 to 0"):
        sgd().state_dict(rank)


@pytest.mark.parametrize("scaler", [False, True])
@pytest.mark.parametrize("weights", [(None,) * 6, (3.0, 1.0, 40.0, 2.0, 5.0, 0.5)])
def test_a_state_saved_inside_a_window_goes_on_in_it(weights, scaler):
    def made():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        settings = {"grad_scaler": torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)} if scaler else {}
        optimizer = ice.Optimizer(torch.optim.Adam(model.named_parameters()), accumulation_steps=3, **settings)
        return model, optimizer.measure("noise_scale")

    def train(model, optimizer, micro_batches):
        for i in micro_batches:
            x = torch.linspace(-1, i, 12).view(4, 3)
            optimizer.backward(model(x).square().mean(), weight=weights[i])
            optimizer.update()

    whole, optimizer = made()
    train(whole, optimizer, range(6))
    for at in range(1, 6):
        model, first = made()
        train(model, first, range(at))
        state = copy.deepcopy([model.state_dict(), first.state_dict()])
        model, second = made()
        model.load_state_dict(state[0])
        second.load_state_dict(state[1])
        train(model, second, range(at, 6))
        assert all(map(torch.equal, model.parameters(), whole.parameters()))
        assert second.clocks == optimizer.clocks
        assert second.record.noise_scale == optimizer.record.noise_scale
        if scaler:
            assert second.grad_scaler.state_dict() == optimizer.grad_scaler.state_dict()


def test_the_gradients_of_a_saved_window_go_to_their_parameters_by_name():
    weight = parameter()
    bias = torch.nn.Parameter(torch.tensor(0.5))
    first = ice.Optimizer(torch.optim.SGD([("weight", weight), ("bias", bias)], lr=0.1), accumulation_steps=2)
    first.backward(2.0 * weight + 3.0 * bias)
    first.update()
    weight, bias = parameter(), torch.nn.Parameter(torch.tensor(0.5))
    second = ice.Optimizer(torch.optim.SGD([("bias", bias), ("weight", weight)], lr=0.1), accumulation_steps=2)
    second.load_state_dict(first.state_dict())
    assert (weight.grad.item(), bias.grad.item()) == (2.0, 3.0)
    assert not second.state_dict()["state"]


@pytest.mark.parametrize(("tail", "said"), [("step", True), ("drop", True), ("carry", False)])
def test_a_state_without_the_gradients_of_its_window_says_where_none_is_open(tail, said):
    weight = parameter()
    optimizer = sgd(weight, accumulation_steps=2, tail=tail)
    train(optimizer, weight, [1.0])
    state = copy.deepcopy(optimizer.state_dict())
    state["ice_engine"]["window"] = {"micro_batches": 1, "weight": 1.0}  # as 0.1.0 wrote it
    other = sgd(accumulation_steps=2, tail=tail)
    with pytest.warns(ice.IceEngineWarning, match="Save on OPTIMIZER_STEP_COMPLETED to lose none") as told:
        other.load_state_dict(state)

    # With "carry" a window is open where an epoch ends.
    assert ("or on EPOCH_COMPLETED" in str(told[0].message)) is said
    assert "its 1 micro-batches are not in it" in str(told[0].message)


def test_clocks_that_were_loaded_survive_the_start_of_a_run():
    weight, optimizer = make()
    train(optimizer, weight, [1.0, 2.0, 3.0])
    other_weight, other = make()
    other.load_state_dict(optimizer.state_dict())
    engine = trainer_of(other, lambda slope: other_weight * slope)
    other.attach(engine)
    with pytest.warns(
        ice.IceEngineWarning, match="goes on at step 3, as it was loaded, but its engine starts at iteration 0"
    ):
        engine.run([1.0])

    assert engine.state.optimizer_step == 4


def test_it_prints_what_it_does():
    text = repr(sgd(accumulation_steps=4, clip=ice.clip_norm(1.0), processors=[ice.schedules.cosine(total=9)]))

    settings = "accumulation_steps=4, clip=clip_norm(1.0), processors=[cosine(total=9)]"
    assert text.startswith(f"Optimizer(name='optimizer', {settings}) of SGD")


def test_the_record_has_the_lr_that_a_scheduler_on_step_started_left():
    weight = parameter()
    optimizer = sgd(weight)
    engine = trainer_of(optimizer, lambda slope: weight * slope)
    optimizer.attach(engine)

    def halve():
        optimizer.param_groups[0]["lr"] /= 2

    engine.add_event_handler(optimizer.event("STEP_STARTED"), halve)
    rates = []
    engine.add_event_handler(
        optimizer.event("STEP_COMPLETED"), lambda: rates.append(optimizer.record.values["group_0"]["lr"])
    )
    engine.run([1.0, 1.0])

    assert rates == [0.5, 0.25]


@pytest.mark.parametrize("where", ["train_step", "handler"])
@pytest.mark.parametrize("end", ["update", "flush"])
def test_a_loss_of_an_episode_is_stepped_where_it_ends(where, end):
    weight, plain = parameter(), parameter()
    optimizer, inner = sgd(weight), torch.optim.SGD([plain], lr=1.0, momentum=0.5)
    seen, expected = [], []

    def learn():
        optimizer.backward((weight - 1.0).square())
        if where == "handler":
            getattr(optimizer, end)()

    def train_step(engine, batch):
        seen.append(weight.item())
        if engine.state.iteration % 4 == 3:
            engine.terminate_epoch()
            if where == "train_step":
                learn()

    engine = Engine(train_step)
    optimizer.attach(engine)
    if where == "handler":
        engine.add_event_handler(Events.EPOCH_COMPLETED, learn)
    engine.run(range(100), max_epochs=3)

    for iteration in range(1, engine.state.iteration + 1):
        expected.append(plain.item())
        if iteration % 4 == 3:
            inner.zero_grad()
            (plain - 1.0).square().backward()
            inner.step()
    assert (seen, weight.item()) == (expected, plain.item())


def test_hook_names_of_the_optimizer_are_taken():
    optimizer = sgd()
    optimizer.attach(Engine(lambda e, b: None))

    with pytest.raises(HookError, match=r"optimizer\.started"):
        optimizer.hooks.add(Events.STARTED, lambda: None, name="optimizer.started")


def test_a_warning_in_a_handler_of_ours_points_at_the_users_line():
    optimizer = sgd()
    engine = Engine(lambda engine, batch: None)
    optimizer.attach(engine)
    with pytest.warns(ice.IceEngineWarning, match="got no loss in epoch 1") as told:
        engine.run([1.0])
    assert told[0].filename == __file__


def halve(group):
    group["lr"] = group["lr"] * 0.5
    return group


@pytest.mark.parametrize("lr", [0.8, torch.tensor(0.8)], ids=["float", "tensor"])
@pytest.mark.parametrize("processor", [halve, ice.schedules.exponential(gamma=0.5)], ids=["function", "schedule"])
@pytest.mark.parametrize("where", ["STEP_STARTED", "pre-hook"])
def test_what_a_step_wrote_to_its_groups_is_taken_back_if_it_does_not_happen(where, processor, lr):
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=lr), processors=[processor])
    trainer = Engine(lambda engine, batch: optimizer.backward(weight * batch))
    optimizer.attach(trainer)
    trainer.run([1.0, 1.0])
    before = float(optimizer.param_groups[0]["lr"])

    def fail(*_):
        raise ZeroDivisionError

    if where == "pre-hook":
        failing = optimizer.inner.register_step_pre_hook(fail)
    else:
        failing = trainer.add_event_handler(optimizer.event(where), fail)
    with pytest.raises(ZeroDivisionError):
        trainer.run([1.0, 1.0], max_epochs=2)
    assert float(optimizer.param_groups[0]["lr"]) == before
    assert optimizer.clocks["step"] == 2

    failing.remove()
    trainer._internal_run_generator = None  # Ignite: the run after an exception would do nothing
    trainer.run([1.0, 1.0], max_epochs=2)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(before / 2 ** (optimizer.clocks["step"] - 2))


@pytest.mark.parametrize("settings", [{"accumulation_steps": 2}, {"grad_scaler": torch.amp.GradScaler("cpu")}])
@pytest.mark.parametrize("how", ["clip", "foreign loss", "zero_grad"])
def test_gradients_that_are_still_to_be_divided_are_not_changed_before_the_window_closes(settings, how):
    """By hand, such as by clipping in the last micro-batch, it would be the scaled sum that is clipped."""
    weight, other = torch.nn.Parameter(torch.zeros(())), torch.nn.Parameter(torch.zeros(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight, other], lr=1.0), **settings)
    k = settings.get("accumulation_steps", 1)

    def train_step(engine, batch):
        optimizer.backward(weight * batch + other)
        if engine.state.iteration % k == 0:
            if how == "clip":
                torch.nn.utils.clip_grad_norm_([weight, other], 0.1)
            elif how == "zero_grad":
                weight.grad = None
            else:
                (weight * 3.0).backward()

    trainer = Engine(train_step)
    optimizer.attach(trainer)
    with pytest.warns(ice.IceEngineWarning, match="dropped"), pytest.raises(BackwardError, match="inside its window"):
        trainer.run([1.0, 2.0])
    assert weight.item() == 0.0
    assert optimizer.clocks["attempt"] == 0
    assert weight.grad is other.grad is None


def test_a_gradient_that_is_final_already_may_be_changed_in_train_step():
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0))

    def train_step(engine, batch):
        optimizer.backward(weight * batch, weight=7)
        torch.nn.utils.clip_grad_norm_([weight], 1.0)

    trainer = Engine(train_step)
    optimizer.attach(trainer)
    trainer.run([3.0, 0.5])
    assert weight.item() == pytest.approx(-1.5)


def test_step_in_a_plain_loop_says_once_what_it_leaves_out():
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=0.1), clip=ice.clip_norm(1e-3), accumulation_steps=4)
    (weight * 100.0).backward()
    with pytest.warns(IceEngineWarning, match=r"without what it was given: accumulation_steps, clip\."):
        optimizer.step()
    optimizer.step()
    assert weight.item() == pytest.approx(-19.0)


@pytest.mark.parametrize("tail", ["step", "carry"])
def test_a_run_that_ends_for_a_nan_does_not_step_with_it(tail):
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=0.1), accumulation_steps=4, tail=tail)

    def train_step(engine, batch):
        loss = weight * batch
        optimizer.backward(loss)
        return loss.item()

    trainer = Engine(train_step)
    optimizer.attach(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())
    with pytest.warns(IceEngineWarning, match="dropped the 2 micro-batches of a window that a run that ended"):
        trainer.run([1.0] * 5 + [math.nan] + [1.0] * 2)
    assert (optimizer.clocks["step"], weight.item()) == (1, pytest.approx(0.9))
