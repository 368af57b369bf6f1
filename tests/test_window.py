"""Windows: when a step is due, what becomes of tails, and what the gradient is."""

import logging
import math

import pytest
import torch
from ignite.engine import Engine, Events

import ice_engine as ice
from ice_engine.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    BackwardError,
    IceEngineWarning,
    ScheduleChangedError,
)


def run(slopes, k, *, epochs=1, setup=None, run_kwargs=None, **settings):
    """Train one weight at lr 1 on losses whose gradients are *slopes*; return the gradients that were applied."""
    weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0), accumulation_steps=k, **settings)
    trainer = Engine(lambda _, slope: optimizer.backward(weight * slope))
    optimizer.attach(trainer)
    applied = []
    trainer.add_event_handler(optimizer.event("STEP_COMPLETED"), lambda: applied.append(weight.grad.item()))
    if setup:
        setup(trainer, optimizer)
    trainer.run(slopes, **(run_kwargs or {"max_epochs": epochs}))
    assert weight.grad is None, "a stale gradient is left"
    assert weight.item() == pytest.approx(-sum(applied))
    return applied, optimizer


def test_a_short_last_window_steps_with_its_own_mean_each_epoch():
    applied, optimizer = run([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 4, epochs=2)

    assert applied == [2.5, 5.5, 2.5, 5.5]
    assert optimizer.clocks == {"step": 4, "attempt": 4, "skipped": 0, "iteration": 12}


def test_carry_lets_windows_cross_epochs_and_loses_nothing_at_the_end():
    applied, _ = run([1.0, 2.0, 3.0], 4, epochs=2, tail="carry")

    assert applied == [(1 + 2 + 3 + 1) / 4, 2.5]


def test_drop_leaves_the_tail_out_and_says_how_much(caplog):
    with caplog.at_level(logging.INFO, logger="ice_engine.stepping"):
        applied, _ = run([1.0, 2.0, 3.0], 2, epochs=2, tail="drop")

    assert applied == [1.5, 1.5]
    assert [r.getMessage() for r in caplog.records] == [
        "optimizer 'optimizer': dropped 1 micro-batches at the epoch's end"
    ] * 2
    assert [r.levelname for r in caplog.records] == ["WARNING", "INFO"]


def test_unknown_epoch_length_flushes_at_the_epochs_end():
    applied, _ = run(iter([1.0, 2.0, 6.0]), 2)

    assert applied == [1.5, 6.0]


@pytest.mark.parametrize("stop", ["terminate", "terminate_epoch"])
def test_stopping_inside_a_window_steps_with_what_is_there(stop):
    def setup(trainer, _):
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda engine: getattr(engine, stop)())

    applied, _ = run([1.0, 2.0, 6.0, 8.0], 2, setup=setup)

    assert applied == [1.5, 6.0]


def test_max_iters_inside_a_window_steps_with_what_is_there():
    applied, _ = run([1.0, 2.0, 6.0, 8.0], 2, run_kwargs={"max_iters": 3})

    assert applied == [1.5, 6.0]


def test_terminated_epoch_does_not_leak_into_the_next():
    def setup(trainer, _):
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda engine: engine.terminate_epoch())

    applied, _ = run([1.0, 2.0, 6.0, 8.0], 2, epochs=2, setup=setup)

    assert applied == [1.5, 6.0, 1.5, 7.0]


def test_interrupt_and_run_again_continue_the_window():
    def setup(trainer, _):
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda engine: engine.interrupt())

    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0), accumulation_steps=2)
    trainer = Engine(lambda _, slope: optimizer.backward(weight * slope))
    optimizer.attach(trainer)
    setup(trainer, optimizer)
    trainer.run([1.0, 3.0], max_epochs=1)
    assert weight.grad.item() == 1.0

    trainer.run([1.0, 3.0], max_epochs=1)

    assert weight.item() == -2.0


def test_the_window_of_a_run_that_raised_is_dropped_with_a_warning():
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0), accumulation_steps=4)

    def train_step(engine, slope):
        if math.isnan(slope):
            raise ZeroDivisionError
        optimizer.backward(weight * slope)

    trainer = Engine(train_step)
    optimizer.attach(trainer)
    with pytest.raises(ZeroDivisionError):
        trainer.run([1.0, math.nan])
    assert weight.item() == 0.0
    trainer.state.iteration = trainer.state.epoch = 0
    trainer._internal_run_generator = None  # Ignite: the run after an exception would do nothing

    with pytest.warns(IceEngineWarning, match="dropped the 1 micro-batches of a window that an exception left open"):
        trainer.run([5.0, 7.0], max_epochs=1)

    assert weight.item() == -6.0


def test_a_second_fresh_run_starts_its_clocks_anew_as_ignite_does():
    _, optimizer = run([1.0, 2.0], 1)

    optimizer.engine.run([1.0], max_epochs=1)

    assert optimizer.clocks["step"] == 1
    assert optimizer.engine.state.optimizer_step == 1


def test_the_flush_comes_before_the_users_epoch_handlers():
    seen = []

    def setup(trainer, _):
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: seen.append(engine.state.optimizer_step))

    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0), accumulation_steps=2)
    trainer = Engine(lambda _, slope: optimizer.backward(weight * slope))
    setup(trainer, optimizer)  # before attach()
    optimizer.attach(trainer)
    trainer.run([1.0, 2.0, 3.0], max_epochs=1)

    assert seen == [2]


def loop(losses, **settings):
    weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0), accumulation_steps=len(losses), **settings)
    for loss, kwargs in losses:
        optimizer.backward(loss(weight), **kwargs)
        stepped = optimizer.update()
    return stepped, -weight.item()


def test_weights_make_the_mean_over_items():
    stepped, gradient = loop([(lambda w: w * 1.0, {"weight": 3}), (lambda w: w * 5.0, {"weight": torch.tensor(1)})])

    assert stepped
    assert gradient == 2.0


@pytest.mark.parametrize("kind", ["int64", "float32"])
def test_weights_may_be_numpy_numbers(kind):
    numpy = pytest.importorskip("numpy")
    three = getattr(numpy, kind)(3)

    _, gradient = loop([(lambda w: w * 1.0, {"weight": three}), (lambda w: w * 5.0, {"weight": 1})])

    assert gradient == 2.0


def test_a_micro_batch_of_weight_0_contributes_nothing_even_if_nan():
    stepped, gradient = loop([(lambda w: w * math.nan, {"weight": 0}), (lambda w: w * 5.0, {"weight": 2})])

    assert stepped
    assert gradient == 5.0


def test_a_constant_of_weight_0_contributes_nothing_as_well():
    stepped, gradient = loop([(lambda w: torch.tensor(math.nan), {"weight": 0}), (lambda w: w * 5.0, {"weight": 2})])

    assert stepped
    assert gradient == 5.0


def test_a_window_of_weight_0_is_skipped_with_the_reason():
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0))

    optimizer.backward(weight * math.nan, weight=0)

    assert optimizer.update() is False
    assert optimizer.record.skipped == "the window's weight is 0"
    assert optimizer.clocks == {"step": 0, "attempt": 1, "skipped": 1, "iteration": 1}


def test_unweighted_losses_of_one_micro_batch_add_up_as_in_torch():
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0), accumulation_steps=2)
    for _ in range(2):
        optimizer.backward(weight * 1.0)
        optimizer.backward(weight * 3.0)
        optimizer.update()

    assert weight.item() == -4.0


def test_fp16_gradients_stay_in_range_over_a_long_window():
    weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float16))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0), accumulation_steps=4)
    for _ in range(4):
        optimizer.backward(weight * 10000.0, weight=1000)
        optimizer.update()

    assert weight.item() == -10000.0


@pytest.mark.parametrize(("k", "weight"), [(8, None), (8, 32), (6, 1000)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_fp16_gradients_stay_in_range_where_their_sum_does_not(k, weight, reduction):
    if reduction == "sum" and weight is None:
        return
    parameter = torch.nn.Parameter(torch.zeros((), dtype=torch.float16))
    optimizer = ice.Optimizer(
        torch.optim.SGD([parameter], lr=1.0), accumulation_steps=k, loss_reduction=reduction, nonfinite="skip"
    )
    for _ in range(k):
        total = (parameter * 10000.0).float() * (weight if reduction == "sum" else 1.0)
        optimizer.backward(total, weight=weight)
        stepped = optimizer.update()

    assert stepped
    assert parameter.item() == pytest.approx(-10000.0, rel=2e-3)


def test_fp16_gradients_of_a_short_last_window_are_divided_by_its_own_size():
    parameter = torch.nn.Parameter(torch.zeros((), dtype=torch.float16))
    optimizer = ice.Optimizer(torch.optim.SGD([parameter], lr=1.0), accumulation_steps=8)
    for slope in (1.0, 2.0, 6.0):
        optimizer.backward(parameter * slope)
        optimizer.update()
    optimizer.flush()

    assert parameter.item() == -3.0


def test_the_callers_own_micro_batch_is_refused_after_one_that_entered_divided():
    parameter = torch.nn.Parameter(torch.zeros((), dtype=torch.float16))
    optimizer = ice.Optimizer(torch.optim.SGD([parameter], lr=1.0), accumulation_steps=2)
    optimizer.backward(parameter * 1.0)
    optimizer.update()
    (parameter * 3.0).backward()

    with pytest.raises(BackwardError, match=r"call optimizer.backward\(loss, weight=n\) instead of loss.backward"):
        optimizer.update()


@pytest.mark.parametrize(
    "weights", [(1, 4096), (4096, 1), (1, 20, 5, 4096, 1e5, 3), (1, 3, 9, 27, 81, 243), (1, 8, 64)]
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_whatever_the_first_weight_no_loss_is_multiplied_much(weights, reduction):
    parameter = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = ice.Optimizer(
        torch.optim.SGD([parameter], lr=1.0), accumulation_steps=len(weights), loss_reduction=reduction
    )
    slopes = [float(i) for i in range(1, len(weights) + 1)]
    for weight, slope in zip(weights, slopes, strict=True):
        entered = []
        loss = parameter * slope
        loss.register_hook(entered.append)
        optimizer.backward(loss * (weight if reduction == "sum" else 1.0), weight=weight)
        optimizer.update()
        assert float(entered[0]) <= 8.0

    mean = math.fsum(w * s for w, s in zip(weights, slopes, strict=True)) / math.fsum(weights)
    assert parameter.item() == pytest.approx(-mean, rel=1e-12)


def test_autocast_fp16_steps_though_the_first_weight_is_small():
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    optimizer = ice.Optimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        accumulation_steps=2,
        grad_scaler=torch.amp.GradScaler("cpu", init_scale=1024.0),
    )
    for weight in (1, 4096):
        with torch.autocast("cpu", torch.float16):
            loss = (model(torch.randn(16, 8)) - 3.0).square().mean()
        optimizer.backward(loss, weight=weight)
        stepped = optimizer.update()

    assert stepped


def test_losses_with_and_without_weight_do_not_mix():
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0), accumulation_steps=2)
    optimizer.backward(weight * 1.0, weight=3)

    with pytest.raises(BackwardError, match="earlier losses of this window came with a weight, this one with none"):
        optimizer.backward(weight * 1.0)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (-1, ArgumentValueError, "weight must be finite and at least 0, got -1.0"),
        (math.nan, ArgumentValueError, "finite"),
        (math.inf, ArgumentValueError, "finite"),
        ("3", ArgumentTypeError, "weight must be a number, got str"),
        (True, ArgumentTypeError, "got bool"),
        (torch.ones(2), ArgumentTypeError, r"got Tensor of shape \(2,\)"),
        (torch.tensor(True), ArgumentTypeError, "got Tensor"),
        (torch.tensor(1j), ArgumentTypeError, "got Tensor"),
        (10**400, ArgumentValueError, "finite"),
    ],
)
def test_impossible_weights_are_refused(weight, error, message):
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = ice.Optimizer(torch.optim.SGD([parameter], lr=1.0))

    with pytest.raises(error, match=message):
        optimizer.backward(parameter * 1.0, weight=weight)

    assert parameter.grad is None


def test_weights_that_add_up_to_infinity_are_refused():
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = ice.Optimizer(torch.optim.SGD([parameter], lr=1.0), accumulation_steps=2)
    optimizer.backward(parameter * 1.0, weight=1e308)

    with pytest.raises(ArgumentValueError, match="add up to more than a float can hold"):
        optimizer.backward(parameter * 1.0, weight=1e308)


def test_summed_losses_need_their_number_of_items():
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = ice.Optimizer(torch.optim.SGD([parameter], lr=1.0), loss_reduction="sum")

    with pytest.raises(ArgumentValueError, match=r"optimizer.backward\(loss, weight=n\)"):
        optimizer.backward(parameter * 1.0)


def test_update_without_backward_counts_the_callers_own_backward():
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0))
    for slope in (1.0, 3.0):
        (weight * slope).backward()
        stepped = optimizer.update(None, 2)

    assert stepped
    assert weight.item() == -2.0


def test_update_closes_a_short_window_where_the_caller_says_the_epoch_ends():
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0), accumulation_steps=2)
    stepped = []
    for i, slope in enumerate((1.0, 3.0, 5.0), 1):
        optimizer.backward(weight * slope)
        stepped.append(optimizer.update(current_epoch=1, epoch_steps=i, global_steps=i, epoch_size=3))

    assert stepped == [False, True, True]
    assert weight.item() == -7.0


def test_flush_steps_with_what_is_there_and_is_idempotent():
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0), accumulation_steps=8)
    optimizer.backward(weight * 3.0)
    optimizer.update()

    assert [optimizer.flush(), optimizer.flush()] == [True, False]
    assert weight.item() == -3.0


def test_a_flushed_micro_batch_is_counted():
    weight = torch.nn.Parameter(torch.zeros(()))
    schedule = ice.schedules.linear(total=4, unit="iteration")
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0), accumulation_steps=4, processors=[schedule])
    rates = []
    for _ in range(4):
        optimizer.backward(weight * 1.0)
        assert optimizer.flush()
        rates.append(optimizer.param_groups[0]["lr"])
    assert (optimizer.clocks["iteration"], optimizer.record.iteration) == (4, 4)
    assert rates == [1.0, 0.75, 0.5, 0.25]


def test_flush_steps_whatever_the_tail_and_update_heeds_it_where_told_of_the_epochs_end():
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0), accumulation_steps=2, tail="drop")
    for i, slope in enumerate((1.0, 3.0, 5.0), 1):
        optimizer.backward(weight * slope)
        optimizer.update(epoch_steps=i, epoch_size=3)
    assert not optimizer.flush()
    assert weight.item() == -2.0
    optimizer.backward(weight * 5.0)
    optimizer.update()

    assert optimizer.flush()
    assert weight.item() == -7.0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"grad_acc_steps": 0}, ArgumentValueError, "grad_acc_steps must be at least 1, got 0"),
        ({"grad_acc_steps": 1.5}, ArgumentTypeError, "grad_acc_steps must be an int"),
        ({"epoch_steps": 3, "epoch_size": 2}, ArgumentValueError, r"epoch_steps \(3\) is beyond epoch_size \(2\)"),
        ({"global_steps": 0}, ArgumentValueError, "global_steps must be at least 1"),
        ({"grad_scaler": "cuda"}, ArgumentTypeError, "grad_scaler must be a torch.amp.GradScaler or None, got str"),
    ],
)
def test_update_refuses_impossible_arguments(arguments, error, message):
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0))
    optimizer.backward(weight * 1.0)

    with pytest.raises(error, match=message):
        optimizer.update(**arguments)

    assert weight.item() == 0.0


# effective_batch_size


def items(weights, batch, *, epochs=1, state=None, **settings):
    """Train on micro-batches of these weights; return the weight of each step, and the optimizer."""
    weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0), effective_batch_size=batch, **settings)
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
    trainer = Engine(lambda _, n: optimizer.backward(weight * n, weight=n))
    optimizer.attach(trainer)
    if state is not None:
        trainer.load_state_dict(state["trainer"])
    steps, rates = [], []

    @trainer.on(optimizer.event("STEP_COMPLETED"))
    def note():
        steps.append(optimizer.record.weight)
        rates.append(optimizer.param_groups[0]["lr"])

    trainer.run(weights, max_epochs=epochs)
    return steps, rates, {"optimizer": optimizer.state_dict(), "trainer": trainer.state_dict()}, optimizer


@pytest.mark.parametrize(
    ("batch", "first", "k"), [(128, 32, 4), (128, 30, 4), (100, 32, 3), (80, 32, 3), (79, 32, 2), (1, 32, 1)]
)
def test_a_window_has_the_micro_batches_that_come_nearest_to_the_effective_batch(batch, first, k, caplog):
    with caplog.at_level(logging.INFO, logger="ice_engine.scheduling"):
        steps, _, _, optimizer = items([first] * 12, batch)
    assert steps == [k * first] * (12 // k)
    assert optimizer.accumulation_steps == k
    assert f"accumulation_steps={k}, effective_batch_size={batch}" in repr(optimizer)
    said = f"effective_batch_size={batch}: windows of {k} micro-batches, of {first} items, in 1 processes: {k * first}"
    assert [record.message for record in caplog.records] == [f"optimizer 'optimizer', {said}"]


def test_micro_batches_that_vary_leave_the_window_as_it_is_and_the_mean_exact():
    steps, _, _, optimizer = items([0, 4, 1, 7, 2, 9, 3], 12)
    assert optimizer.accumulation_steps == 3  # by the 4: the first that weighs anything
    assert steps == [5, 18, 3]
    means = [(16 + 1) / 5, (49 + 4 + 81) / 18, 9 / 3]
    assert -optimizer.param_groups[0]["params"][0].item() == pytest.approx(sum(means))


def test_the_effective_batch_is_kept_by_a_resume_and_decided_anew_by_a_fresh_run():
    *_, state, optimizer = items([8, 8, 8, 8], 32, epochs=1, processors=[ice.schedules.cosine(total=4)])
    assert optimizer.accumulation_steps == 4
    steps, *_ = items([4, 8, 8, 8], 32, epochs=2, state=state, processors=[ice.schedules.cosine(total=4)])
    assert steps == [28]  # not 8 micro-batches, as for a first weight of 4
    optimizer.engine.state.max_epochs = None
    optimizer.engine.state.iteration = 0
    optimizer.engine.run([16] * 4, max_epochs=1)
    assert optimizer.accumulation_steps == 2


def test_the_effective_batch_is_kept_by_a_resume_from_before_the_first_window_closed():
    *_, state, optimizer = items([8, 8, 8], 32, tail="drop")
    assert (optimizer.accumulation_steps, optimizer.clocks["step"]) == (4, 0)
    state["trainer"] |= {"epoch_length": 4, "iteration": 4}
    steps, *_ = items([2, 8, 8, 8], 32, epochs=2, state=state, tail="drop")
    assert steps == [26]  # not 16 micro-batches, as for a first weight of 2


def test_a_resumed_run_whose_windows_hold_twice_as_much_is_told(caplog):
    *_, state, _ = items([8, 8, 8, 8], 32)
    steps, *_ = items([16] * 4, 32, epochs=2, state=state)
    assert steps == [64]
    assert "windows of 4 micro-batches, of 16 items, in 1 processes: 64" in caplog.text


@pytest.mark.parametrize("on_change", ["error", "replan"])
def test_with_another_world_size_windows_and_schedules_follow_and_on_change_is_not_asked(on_change, caplog):
    cosine = ice.schedules.cosine()
    *_, state, _ = items([8] * 12, 32, epochs=2, processors=[cosine])  # 2 x 3 steps
    state["trainer"]["max_epochs"] = 4
    run = state["optimizer"]["ice_engine"]["horizon"]["run"]
    plan = state["optimizer"]["ice_engine"]["horizon"]["plan"]
    # As three processes would have left it, each with windows of one micro-batch: 4 x 12 steps.
    run |= {"world_size": 3, "accumulation_steps": 1, "max_epochs": 4}
    plan |= {"max_epochs": 4, "total_steps": 48}
    steps, rates, _, optimizer = items([8] * 12, 32, epochs=4, state=state, processors=[cosine], on_change=on_change)
    assert steps == [32] * 6
    assert rates[-1] < rates[0]
    assert rates[0] == pytest.approx((1 + math.cos(math.pi * 6 / 12)) / 2)
    assert "total 48 -> 12" in caplog.text
    assert "on_change='replan'" in caplog.text
    assert optimizer.state_dict()["ice_engine"]["horizon"]["run"]["world_size"] == 1


def test_another_schedule_is_still_an_error_with_another_world_size():
    *_, state, _ = items([8] * 12, 32, epochs=2, processors=[ice.schedules.cosine()])
    state["optimizer"]["ice_engine"]["horizon"]["run"]["world_size"] = 3
    with pytest.raises(ScheduleChangedError):
        items([8] * 12, 32, epochs=4, state=state, processors=[ice.schedules.cosine()])  # more epochs


def test_what_an_effective_batch_cannot_be_is_refused():
    weight = torch.nn.Parameter(torch.zeros(()))
    sgd = torch.optim.SGD([weight], lr=1.0)
    with pytest.raises(ArgumentValueError, match="accumulation_steps=2 and effective_batch_size=8 both say"):
        ice.Optimizer(sgd, accumulation_steps=2, effective_batch_size=8)
    with pytest.raises(ArgumentValueError, match="effective_batch_size must be at least 1, got 0"):
        ice.Optimizer(sgd, effective_batch_size=0)
    optimizer = ice.Optimizer(sgd, effective_batch_size=8)
    with pytest.raises(ArgumentValueError, match=r"came without their number: optimizer.backward\(loss, weight=n\)"):
        optimizer.backward(weight * 1.0)
    weight.grad = torch.ones(())
    with pytest.raises(BackwardError, match="was not told the weight"):
        optimizer.update()
    weight.grad = None
    with pytest.raises(ArgumentValueError, match="needs accumulation_steps"):
        optimizer.plan(4, 1)
    assert optimizer.plan(4, 1, accumulation_steps=2).problems == []
