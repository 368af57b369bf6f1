"""The bugs of ice-learn's optimizer, each pinned by the right behaviour."""

import io
import math

import pytest
import torch
from ignite.engine import Engine, Events

import ice_engine as ice
from ice_engine.errors import AttachError, IceEngineWarning, StateDictError
from tests.distributed.launch import launch


def weight_of(value=0.0):
    return torch.nn.Parameter(torch.tensor(value))


def applied_gradients(slopes, **settings):
    weight = weight_of()
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0), **settings)
    engine = Engine(lambda _, slope: optimizer.backward(weight * slope))
    optimizer.attach(engine)
    applied = []
    engine.add_event_handler(optimizer.event("STEP_STARTED"), lambda: applied.append(weight.grad.item()))
    engine.run(slopes)
    return applied


def test_01_the_first_step_comes_after_a_whole_window():
    assert applied_gradients([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], accumulation_steps=4) == [2.5, 6.5]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_02_the_gradient_does_not_depend_on_the_number_of_processors(count):
    processors = [lambda group: group] * count

    assert applied_gradients([2.0, 5.0], accumulation_steps=2, processors=processors) == [3.5]


@pytest.mark.parametrize("k", [2, 3])
def test_03_two_optimizers_count_for_themselves(k):
    weights = [weight_of(), weight_of()]
    optimizers = [
        ice.Optimizer(torch.optim.SGD([w], lr=1.0), name=f"o{i}", accumulation_steps=k) for i, w in enumerate(weights)
    ]
    engine = Engine(lambda _, slope: [o.backward(w * slope) for o, w in zip(optimizers, weights, strict=True)])
    for optimizer in optimizers:
        optimizer.attach(engine)
    engine.run([1.0] * 6)

    assert [o.clocks["step"] for o in optimizers] == [6 // k] * 2
    assert [w.item() for w in weights] == [-6.0 / k] * 2


def test_04_the_scale_does_not_change_inside_a_window():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=1)

    assert applied_gradients([1.0] * 6, accumulation_steps=2, grad_scaler=scaler) == [1.0, 1.0, 1.0]


def test_04_frozen_parameters_beside_trainable_ones_do_not_stop_the_scaler():
    weight, frozen = weight_of(), weight_of().requires_grad_(False)
    optimizer = ice.Optimizer(
        torch.optim.SGD([frozen, weight], lr=1.0), grad_scaler=torch.amp.GradScaler("cpu", init_scale=4.0)
    )
    optimizer.backward(weight * 2.0 + frozen)

    assert optimizer.update()
    assert (weight.item(), frozen.item()) == (-2.0, 0.0)


def test_05_processors_do_not_run_on_a_skipped_step():
    calls = []
    applied_gradients(
        [1.0, math.inf, 2.0], clip=ice.clip_norm(9.0), processors=[lambda group: calls.append(group["step"]) or group]
    )

    assert calls == [0, 1]


def test_06_a_parameter_without_a_gradient_is_passed_over_and_grad_is_not_rebound():
    used, unused = weight_of(), weight_of()
    optimizer = ice.Optimizer(torch.optim.SGD([unused, used], lr=1.0), accumulation_steps=2)
    engine = Engine(lambda _, slope: optimizer.backward(used * slope))
    optimizer.attach(engine)
    places = []
    engine.add_event_handler(Events.ITERATION_STARTED(once=2), lambda: places.append(used.grad.data_ptr()))
    engine.add_event_handler(optimizer.event("STEP_STARTED"), lambda: places.append(used.grad.data_ptr()))
    engine.run([1.0, 3.0])

    assert used.item() == -2.0
    assert unused.item() == 0.0
    assert places[0] == places[1]


def test_08_validation_between_micro_batches_loses_none():
    weight = weight_of()
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0), accumulation_steps=4)
    engine = Engine(lambda _, slope: optimizer.backward(weight * slope))
    optimizer.attach(engine)
    evaluator = Engine(lambda _, batch: weight.detach() * batch)
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=3), lambda: evaluator.run([1.0]))
    engine.run([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], max_epochs=1)

    assert weight.item() == -2.5 - 5.5


def test_09_and_10_the_state_is_whole_holds_the_scaler_and_loads_safely():
    weight = weight_of()
    optimizer = ice.Optimizer(
        torch.optim.SGD([weight], lr=1.0, momentum=0.9), grad_scaler=torch.amp.GradScaler("cpu", init_scale=16.0)
    )
    optimizer.backward(weight * 3.0)
    optimizer.update()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(0), file)
    file.seek(0)

    state = torch.load(file, weights_only=True)

    assert state["state"][0]["momentum_buffer"] == 3.0
    assert state["ice_engine"]["grad_scaler"]["scale"] == 16.0
    assert state["ice_engine"]["clocks"]["step"] == 1


def test_11_and_14_optimizers_share_nothing():
    first, second = weight_of(), weight_of()
    one = ice.Optimizer(torch.optim.SGD([first], lr=1.0))
    other = ice.Optimizer(torch.optim.SGD([second], lr=1.0))
    one.backward(first * 1.0)
    one.update()

    assert other.clocks == {"step": 0, "attempt": 0, "skipped": 0, "iteration": 0}
    assert one.processors == other.processors == ()


def test_12_a_state_of_other_groups_is_refused_and_loading_twice_works():
    optimizer = ice.Optimizer(torch.optim.SGD([weight_of(), weight_of()], lr=1.0))
    other = ice.Optimizer(torch.optim.SGD([weight_of()], lr=1.0))

    with pytest.raises(StateDictError):
        other.load_state_dict(optimizer.state_dict())
    for _ in range(2):
        other.load_state_dict(other.state_dict())


def test_13_a_resumed_schedule_goes_on_from_the_step_it_was_at():
    def make():
        weight = weight_of()
        schedule = ice.schedules.linear(total=8)
        return weight, ice.Optimizer(torch.optim.SGD([weight], lr=1.0), processors=[schedule], accumulation_steps=2)

    weight, first = make()
    rates = []
    for slope in range(1, 9):
        first.backward(weight * slope)
        if first.update():
            rates.append(first.param_groups[0]["lr"])
        if slope == 4:
            saved = first.state_dict()
    weight, resumed = make()
    resumed.load_state_dict(saved)
    resumed_rates = []
    for slope in range(5, 9):
        resumed.backward(weight * slope)
        if resumed.update():
            resumed_rates.append(resumed.param_groups[0]["lr"])

    assert rates == [1.0, 0.875, 0.75, 0.625]
    assert resumed_rates == rates[2:]


def test_14_what_a_processor_returns_is_used():
    weight = weight_of()
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0), processors=[lambda group: {**group, "lr": 0.25}])
    optimizer.backward(weight * 1.0)
    optimizer.update()

    assert weight.item() == -0.25


def _refused_on_a_rank():
    messages = []
    optimizer = ice.Optimizer(torch.optim.SGD([weight_of()], lr=1.0))
    for refused in (
        lambda: optimizer.attach(Engine(lambda e, b: None)),
        lambda: optimizer.update(),
    ):
        try:
            refused()
        except AttachError as err:
            messages.append(str(err))
    return messages


@pytest.mark.distributed
def test_07_and_15_many_processes_are_refused_until_windows_are_exact_over_them():
    for rank, messages in enumerate(launch(_refused_on_a_rank, 2)):
        assert len(messages) == 2
        assert all(f"this is rank {rank} of 2" in message for message in messages)


def test_an_open_window_does_not_vanish_silently():
    weight = weight_of()
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0), accumulation_steps=4)
    engine = Engine(lambda _, slope: optimizer.backward(weight * slope))
    optimizer.attach(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: optimizer.detach())

    with pytest.warns(IceEngineWarning, match="dropped the 2 micro-batches"):
        engine.run([1.0, 1.0])
