"""Loss scale, skipped steps and non-finite policies: nothing moves on a skip."""

import math

import pytest
import torch
from ignite.engine import Engine, Events

import ice_engine as ice
from ice_engine.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    BackwardError,
    NoGradientsError,
    NonFiniteGradientError,
)


def make(slopes, **settings):
    """One weight, trained with momentum on losses whose gradients are *slopes*."""
    weight = torch.nn.Parameter(torch.zeros(()))
    inner = torch.optim.SGD([("layer.weight", weight)], lr=1.0, momentum=0.5)
    optimizer = ice.Optimizer(inner, **settings)
    trainer = Engine(lambda _, slope: optimizer.backward(weight * slope))
    optimizer.attach(trainer)
    return weight, optimizer, lambda: trainer.run(slopes, max_epochs=1)


def test_nothing_moves_on_a_skipped_step():
    weight, optimizer, run = make(
        [1.0, math.inf, math.nan, 2.0],
        grad_scaler=torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1),
        processors=[ice.schedules.linear(total=4)],
    )
    seen = []
    engine = optimizer.engine

    def note(kind):
        def handler(engine):
            state = optimizer.state[weight].get("momentum_buffer")
            seen.append(
                (
                    kind,
                    engine.state.optimizer_step,
                    optimizer.param_groups[0]["lr"],
                    None if state is None else state.item(),
                )
            )

        return handler

    for kind in ("STEP_STARTED", "STEP_COMPLETED", "STEP_SKIPPED"):
        engine.add_event_handler(optimizer.event(kind), note(kind))
    run()

    assert seen == [
        ("STEP_STARTED", 1, 1.0, None),
        ("STEP_COMPLETED", 1, 1.0, 1.0),
        ("STEP_SKIPPED", 1, 1.0, 1.0),
        ("STEP_SKIPPED", 1, 1.0, 1.0),
        ("STEP_STARTED", 2, 0.75, 1.0),
        ("STEP_COMPLETED", 2, 0.75, 2.5),
    ]
    assert weight.item() == -1.0 - 0.75 * 2.5
    assert engine.state.optimizer_step == 2
    assert engine.state.optimizer_skipped == 2
    assert engine.state.optimizer_attempt == 4
    assert optimizer.grad_scaler.get_scale() == 4.0 * 2 / 2 / 2 * 2


def test_the_scale_is_updated_once_per_window_and_at_its_edge():
    weight, optimizer, run = make(
        [1.0] * 8, accumulation_steps=2, grad_scaler=torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=1)
    )
    applied = []
    optimizer.engine.add_event_handler(
        optimizer.event("STEP_STARTED"), lambda: applied.append((weight.grad.item(), optimizer.record.loss_scale))
    )
    run()

    assert applied == [(1.0, 2.0), (1.0, 4.0), (1.0, 8.0), (1.0, 16.0)]


@pytest.mark.parametrize("fused", [False, True])
def test_fused_optimizers_with_scaler_and_clipping_skip_and_step_like_the_others(fused):
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = ice.Optimizer(
        torch.optim.SGD([weight], lr=1.0, fused=fused),
        clip=ice.clip_norm(1.0),
        grad_scaler=torch.amp.GradScaler("cpu", init_scale=1024.0),
    )
    for slope in (0.5, math.inf, 3.0):
        optimizer.backward(weight * slope)
        optimizer.update()

    assert weight.item() == pytest.approx(-1.5, abs=1e-5)
    assert optimizer.clocks["skipped"] == 1


def test_a_nan_that_a_handler_put_in_is_caught():
    weight, optimizer, run = make([1.0], clip=ice.clip_norm(1.0))
    optimizer.engine.add_event_handler(optimizer.event("GRADIENTS_READY"), lambda: weight.grad.fill_(math.nan))
    run()

    assert weight.item() == 0.0
    assert optimizer.clocks["skipped"] == 1


def test_a_gradient_that_a_handler_repaired_is_used_and_the_scale_backs_off():
    weight, optimizer, run = make([math.inf], grad_scaler=torch.amp.GradScaler("cpu", init_scale=4.0))
    optimizer.engine.add_event_handler(optimizer.event("GRADIENTS_READY"), lambda: weight.grad.fill_(1.0))
    run()

    assert weight.item() == -1.0
    assert optimizer.grad_scaler.get_scale() == 2.0


def test_the_skip_event_says_which_parameter_and_micro_batch_were_not_finite():
    _, optimizer, run = make([1.0, math.nan], accumulation_steps=2, clip=ice.clip_norm(1.0))
    reasons = []
    optimizer.engine.add_event_handler(
        optimizer.event("STEP_SKIPPED"), lambda engine: reasons.append(engine.state.optimizer_record.skipped)
    )
    run()

    reason = "gradient norm is nan, first in 'layer.weight', shape (); the loss of micro-batch 2 of its window was not"
    assert reasons == [f"{reason} finite"]


def test_the_first_bad_parameter_is_named_even_though_clipping_saw_it():
    good, bad = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    optimizer = ice.Optimizer(torch.optim.SGD([("good", good), ("bad", bad)], lr=1.0), clip=ice.clip_norm(1.0))
    optimizer.backward(good.sum() + (bad * math.nan).sum())
    optimizer.update()

    assert "first in 'bad', shape (3,)" in optimizer.record.skipped


def test_raise_stops_at_the_first_and_leaves_everything_as_it_was():
    weight, optimizer, run = make([1.0, math.inf], nonfinite="raise")

    with pytest.raises(
        NonFiniteGradientError,
        match=r"gradient norm is inf, first in 'layer.weight'.*attempt 2, iteration 2, epoch 1, rank 0",
    ):
        run()

    assert weight.item() == -1.0
    assert weight.grad is None
    assert optimizer.clocks["step"] == 1


def test_too_many_skips_in_a_row_stop_the_run_with_a_report():
    _, optimizer, run = make([2.0, *[math.nan] * 5], clip=ice.clip_norm(9.0), max_consecutive_skips=3)

    with pytest.raises(
        NonFiniteGradientError, match="3 steps in a row were skipped, last finite norm 2: gradient norm is nan"
    ):
        run()

    assert optimizer.clocks["skipped"] == 3


@pytest.mark.parametrize(
    ("settings", "measured", "told"),
    [
        ({"nonfinite": "raise", "clip": ice.clip_norm(9.0)}, (), "last finite norm 2"),
        ({"nonfinite": "raise"}, ("grad_norm",), "last finite norm 2"),
        ({"nonfinite": "raise"}, (), r"last finite norm unknown \(optimizer.measure\('grad_norm'\) computes it\)"),
        ({"nonfinite": "skip"}, (), "last finite norm unknown"),
        ({"grad_scaler": True}, (), "loss scale 2, last finite norm unknown"),
        ({"grad_scaler": True, "clip": ice.clip_norm(9.0)}, (), "loss scale 2, last finite norm 2"),
    ],
)
def test_the_report_tells_the_last_finite_norm_or_that_nobody_computed_it(settings, measured, told):
    if settings.get("grad_scaler"):
        settings = {**settings, "grad_scaler": torch.amp.GradScaler("cpu", init_scale=4.0)}
    _, optimizer, run = make([2.0, math.inf], max_consecutive_skips=1, **settings)
    optimizer.measure(*measured)

    with pytest.raises(NonFiniteGradientError, match=told):
        run()


def test_the_report_says_that_the_micro_batch_is_unknown_if_all_losses_were_finite():
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0), accumulation_steps=2, nonfinite="raise")
    optimizer.backward(weight.square().sqrt())  # 0, with a gradient of 0/0
    optimizer.update()
    optimizer.backward(weight * 1.0)

    with pytest.raises(NonFiniteGradientError, match="micro-batch unknown: all losses were finite"):
        optimizer.update()


def test_a_fresh_run_counts_its_own_skips_in_a_row():
    _, optimizer, _ = make([], nonfinite="skip", max_consecutive_skips=3, clip=ice.clip_norm(9.0))
    optimizer.engine.run([2.0, math.inf, math.inf], max_epochs=1)
    optimizer.engine.run([math.inf, math.inf, 1.0], max_epochs=1)

    assert optimizer.clocks == {"step": 1, "attempt": 3, "skipped": 2, "iteration": 3}


@pytest.mark.parametrize("settings", [{"clip": ice.clip_norm(1.0)}, {"grad_scaler": True}, {"nonfinite": "skip"}])
def test_sparse_gradients_that_are_not_finite_are_skipped(settings):
    if "grad_scaler" in settings:
        settings = {"grad_scaler": torch.amp.GradScaler("cpu")}
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = ice.Optimizer(torch.optim.SparseAdam(embedding.parameters()), **settings)
    optimizer.backward(embedding(torch.tensor([1, 1, 2])).sum() * math.nan)

    assert not optimizer.update()
    assert "first in 'param_groups.0.params.0', shape (5, 3)" in optimizer.record.skipped


def test_gradients_in_double_precision_whose_norm_overflows_are_not_taken_for_infinite():
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1e-200), nonfinite="skip")
    optimizer.backward((weight * 1e200).sum())

    assert optimizer.update()
    assert weight.tolist() == pytest.approx([-1.0, -1.0])


def test_a_handler_that_takes_all_gradients_away_is_told():
    weight, optimizer, run = make([1.0], grad_scaler=torch.amp.GradScaler("cpu"))
    optimizer.engine.add_event_handler(optimizer.event("GRADIENTS_READY"), lambda: setattr(weight, "grad", None))

    with pytest.raises(NoGradientsError, match="has a gradient after the handlers of GRADIENTS_READY"):
        run()


def test_skips_that_are_not_in_a_row_do_not_stop_the_run():
    _, optimizer, run = make([math.nan, 1.0] * 4, clip=ice.clip_norm(9.0), max_consecutive_skips=2)
    run()

    assert optimizer.clocks["skipped"] == 4


@pytest.mark.parametrize(
    ("settings", "levels"),
    [
        ({"nonfinite": "skip"}, ["WARNING", "INFO", "WARNING"]),
        ({"grad_scaler": torch.amp.GradScaler("cpu", init_scale=4.0)}, ["INFO"] * 3),
    ],
)
def test_the_log_says_where_a_row_of_skips_begins(caplog, settings, levels):
    caplog.set_level("INFO", logger="ice_engine.closing")
    _, _, run = make([math.nan, math.nan, 1.0, math.nan], **settings)
    run()

    assert [record.levelname for record in caplog.records if record.name == "ice_engine.closing"] == levels
    assert caplog.messages[0].startswith("skipped a step: ")
    assert "first in 'layer.weight'" in caplog.messages[0]
    assert "attempt 1, iteration 1, epoch 1, rank 0" in caplog.messages[0]


def test_off_steps_on_whatever_comes():
    weight, optimizer, run = make([math.nan], nonfinite="off", clip=ice.clip_norm(1.0))
    run()

    assert math.isnan(weight.item())
    assert optimizer.clocks["skipped"] == 0


@pytest.mark.parametrize(
    ("settings", "policy_skips"),
    [({}, 0), ({"clip": ice.clip_norm(1.0)}, 1), ({"nonfinite": "skip"}, 1)],
)
def test_without_a_policy_it_skips_where_a_norm_is_at_hand(settings, policy_skips):
    _, optimizer, run = make([math.nan], **settings)
    run()

    assert optimizer.clocks["skipped"] == policy_skips


def test_a_disabled_scaler_is_none():
    weight, optimizer, run = make([2.0], grad_scaler=torch.amp.GradScaler("cpu", enabled=False))
    run()

    assert weight.item() == -2.0
    assert optimizer.record.loss_scale is None


def test_an_exception_in_a_handler_leaves_the_scaler_usable():
    weight, optimizer, run = make([1.0, 1.0], grad_scaler=torch.amp.GradScaler("cpu", init_scale=4.0))
    failing = optimizer.hooks.add(optimizer.event("GRADIENTS_READY"), lambda: 1 / 0, name="failing")
    with pytest.raises(ZeroDivisionError):
        run()
    failing.remove()
    optimizer.engine._internal_run_generator = None  # Ignite: the run after an exception would do nothing
    optimizer.engine.state.iteration = optimizer.engine.state.epoch = 0
    run()

    assert weight.item() == -1.0 - 1.5


def test_update_takes_the_scaler_that_the_caller_scaled_with():
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for slope in (1.0, 3.0):
        scaler.scale(weight * slope).backward()
        optimizer.update(scaler, 2, current_epoch=1, epoch_steps=1, global_steps=1, epoch_size=10)

    assert weight.item() == -2.0


def test_the_callers_own_micro_batches_hold_the_scale_until_their_window_closes():
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    scales = []
    for slope in (1.0, 3.0, 2.0, 4.0):
        scales.append(scaler.get_scale())
        scaler.scale(weight * slope).backward()
        optimizer.update(scaler, 2)

    assert scales == [8.0, 8.0, 16.0, 16.0]
    assert weight.item() == -2.0 - 3.0


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("adopted", [True, False])
def test_one_scaler_for_several_optimizers_does_not_go_with_the_callers_own_backward(k, adopted):
    a, b = torch.nn.Parameter(torch.zeros(())), torch.nn.Parameter(torch.zeros(()))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    given = {} if adopted else {"grad_scaler": scaler}
    first = ice.Optimizer(torch.optim.SGD([a], lr=1.0), name="first", **given)
    second = ice.Optimizer(torch.optim.SGD([b], lr=1.0), name="second", accumulation_steps=k, **given)
    scaler.scale(a * 1.0).backward()
    scaler.scale(b * 1.0).backward()

    if adopted:
        assert first.update(scaler)  # nobody knows of the other yet
    with pytest.raises(ArgumentValueError, match="a GradScaler that several optimizers share"):
        second.update(scaler)
    assert b.item() == 0.0


@pytest.mark.parametrize("how", ["update", "load", "other"])
def test_a_loss_scale_that_was_changed_inside_a_window_is_found(how):
    weight = torch.nn.Parameter(torch.zeros(()))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0), accumulation_steps=2, grad_scaler=scaler)
    optimizer.backward(weight * 1.0)
    optimizer.update()
    change = {
        "update": lambda: scaler.update(16.0),
        "load": lambda: scaler.load_state_dict({**scaler.state_dict(), "scale": 16.0}),
        "other": lambda: setattr(scaler, "_scale", torch.tensor(16.0)),
    }
    change[how]()
    optimizer.backward(weight * 1.0)

    with pytest.raises(BackwardError, match="the loss scale was changed inside a window"):
        optimizer.update()
    assert (weight.item(), weight.grad) == (0.0, None)
    assert optimizer.clocks == {"step": 0, "attempt": 0, "skipped": 0, "iteration": 2}
    for slope in (1.0, 3.0):
        optimizer.backward(weight * slope)
        optimizer.update()
    assert weight.item() == -2.0


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("owner", ["optimizer", "inner"])
@pytest.mark.parametrize("by_hand", ["scale", "unscale_", "step"])
@pytest.mark.filterwarnings("ignore:step.. by hand:ice_engine.errors.IceEngineWarning")
def test_a_scaler_that_the_caller_drives_as_well_is_refused(by_hand, owner, k):
    weight = torch.nn.Parameter(torch.zeros(()))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0), accumulation_steps=k, grad_scaler=scaler)

    def train_step(engine, slope):
        optimizer.backward(scaler.scale(weight * slope) if by_hand == "scale" else weight * slope)
        if by_hand != "scale":
            getattr(scaler, by_hand)(optimizer if owner == "optimizer" else optimizer.inner)

    trainer = Engine(train_step)
    optimizer.attach(trainer)
    with pytest.raises(
        BackwardError, match=r"take scale\(\), unscale_\(\), step\(\) and update\(\) .* out of train_step"
    ):
        trainer.run([1.0] * 4)
    optimizer.zero_grad()
    optimizer.detach()

    before = weight.item()  # a step by hand was taken already, at its first call
    for slope in [1.0, 3.0][:k]:
        optimizer.backward(weight * slope)
        optimizer.update()
    assert weight.item() == before - (1.0 if k == 1 else 2.0)


def test_a_loss_that_something_else_than_the_scale_multiplied_is_no_scaled_one():
    weight, factor = torch.nn.Parameter(torch.zeros(())), torch.tensor(4.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0), grad_scaler=scaler)
    for _ in range(2):
        optimizer.backward(weight * factor)
        optimizer.update()
    assert weight.item() == -8.0


def test_update_refuses_a_scaler_that_backward_did_not_scale_with():
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0))
    optimizer.backward(weight * 1.0)

    with pytest.raises(ArgumentValueError, match=r"Optimizer\(..., grad_scaler=scaler\)"):
        optimizer.update(torch.amp.GradScaler("cpu"))


def test_update_refuses_a_second_scaler():
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0), grad_scaler=torch.amp.GradScaler("cpu"))
    optimizer.backward(weight * 1.0)

    with pytest.raises(ArgumentValueError, match="another GradScaler"):
        optimizer.update(torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"nonfinite": "ignore"},
            ArgumentValueError,
            "nonfinite must be one of None, 'skip', 'raise', 'off'; got 'ignore'",
        ),
        ({"max_consecutive_skips": 0}, ArgumentValueError, "max_consecutive_skips must be at least 1, got 0"),
        ({"max_consecutive_skips": 2.0}, ArgumentTypeError, "max_consecutive_skips must be an int"),
        ({"grad_scaler": True}, ArgumentTypeError, "torch.amp.GradScaler or None, got bool"),
        ({"grad_scaler": torch.amp.GradScaler("cpu"), "nonfinite": "off"}, ArgumentValueError, "overflowed gradients"),
    ],
)
def test_impossible_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        make([], **settings)


def test_bf16_autocast_trains_with_a_scaler():
    model = torch.nn.Linear(4, 1)
    optimizer = ice.Optimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), grad_scaler=torch.amp.GradScaler("cpu", init_scale=64.0)
    )
    trainer = ice.create_trainer(model, optimizer, torch.nn.functional.mse_loss, autocast=torch.bfloat16)
    x = torch.randn(64, 4)
    y = x @ torch.tensor([[1.0], [-1.0], [0.5], [2.0]])
    losses = []
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: losses.append(engine.state.output))
    trainer.run([(x, y)] * 10, max_epochs=5)

    assert losses[-1] < 0.05 * losses[0]
