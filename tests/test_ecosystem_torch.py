"""The wrapper among torch's own classes: the same thing is done with the bare optimizer, and nothing may differ."""

import copy
import functools
import io
import pickle
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ignite.engine import Engine
from torch import nn, optim
from torch.distributed.checkpoint import state_dict as dcp
from torch.nn.functional import mse_loss
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import ice_engine as ice
from ice_engine.errors import ClosureError

INPUTS = torch.randn(12, 4, 3, generator=torch.Generator().manual_seed(1))
TARGETS = torch.randn(12, 4, 2, generator=torch.Generator().manual_seed(2))

OptimizerFactory = Callable[..., optim.Optimizer]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "lr": 0.05}]


def bare_step(model: nn.Module, optimizer: optim.Optimizer, index: int) -> None:
    optimizer.zero_grad()
    mse_loss(model(INPUTS[index]), TARGETS[index]).backward()
    optimizer.step()


def ice_step(model: nn.Module, optimizer: ice.Optimizer, index: int) -> None:
    optimizer.backward(mse_loss(model(INPUTS[index]), TARGETS[index]))
    assert optimizer.update()


def train(model: nn.Module, optimizer: optim.Optimizer, indices: range = range(6)) -> None:
    step = ice_step if isinstance(optimizer, ice.Optimizer) else bare_step
    for index in indices:
        step(model, optimizer, index)


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


def assert_same_state(optimizer: optim.Optimizer, other: optim.Optimizer) -> None:
    ours, theirs = (o.state_dict() for o in (optimizer, other))
    assert ours["state"].keys() == theirs["state"].keys()
    for index, state in theirs["state"].items():
        torch.testing.assert_close(ours["state"][index], state, rtol=0, atol=0)


def bare_and_wrapped(factory: OptimizerFactory) -> tuple[tuple[nn.Module, optim.Optimizer], tuple[nn.Module, Any]]:
    bare_model, model = make_model(), make_model()
    return (bare_model, factory(bare_model.parameters())), (model, ice.Optimizer(factory(model.parameters())))


def differs_from_start(model: nn.Module) -> bool:
    return any(not torch.equal(p, q) for p, q in zip(model.parameters(), make_model().parameters(), strict=True))


# -- every optimizer --------------------------------------------------------------------------------------

SGD = functools.partial(optim.SGD, lr=0.1, momentum=0.9)
OPTIMIZERS = {
    "SGD": SGD,
    "Adam": functools.partial(optim.Adam, lr=0.01),
    "AdamW": functools.partial(optim.AdamW, lr=0.01, weight_decay=0.1),
    "Adagrad": functools.partial(optim.Adagrad, lr=0.1),
    "Adadelta": functools.partial(optim.Adadelta, lr=1.0),
    "Adamax": functools.partial(optim.Adamax, lr=0.01),
    "NAdam": functools.partial(optim.NAdam, lr=0.01),
    "RAdam": functools.partial(optim.RAdam, lr=0.01),
    "RMSprop": functools.partial(optim.RMSprop, lr=0.01, momentum=0.5, centered=True),
    "Rprop": functools.partial(optim.Rprop, lr=0.01),
    "ASGD": functools.partial(optim.ASGD, lr=0.1),
    "Adafactor": functools.partial(optim.Adafactor, lr=0.01),
    "SGD-foreach": functools.partial(optim.SGD, lr=0.1, momentum=0.9, foreach=True),
    "SGD-fused": functools.partial(optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "AdamW-foreach": functools.partial(optim.AdamW, lr=0.01, foreach=True, amsgrad=True),
    "AdamW-fused": functools.partial(optim.AdamW, lr=0.01, fused=True),
    "Adagrad-fused": functools.partial(optim.Adagrad, lr=0.1, fused=True),
    "RMSprop-foreach": functools.partial(optim.RMSprop, lr=0.01, foreach=True),
    "Adam-tensor-lr": lambda params: optim.Adam(params, lr=torch.tensor(0.01)),
    "AdamW-fused-tensor-lr": lambda params: optim.AdamW(params, lr=torch.tensor(0.01), fused=True),
    "SGD-maximize-nesterov": functools.partial(optim.SGD, lr=0.01, momentum=0.9, nesterov=True, maximize=True),
}


@pytest.mark.parametrize("factory", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_torch_optimizer_steps_to_the_same_bits(factory: OptimizerFactory) -> None:
    (bare_model, bare), (model, optimizer) = bare_and_wrapped(factory)
    train(bare_model, bare)
    train(model, optimizer)
    assert differs_from_start(model)
    assert_same(model, bare_model)
    assert_same_state(optimizer, bare)


@pytest.mark.parametrize("factory", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_its_state_goes_into_the_plain_optimizer_and_back(factory: OptimizerFactory) -> None:
    (bare_model, bare), (model, optimizer) = bare_and_wrapped(factory)
    train(bare_model, bare, range(6))
    train(model, optimizer, range(3))

    # ours -> file -> plain torch
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    plain_model = make_model()
    plain = factory(plain_model.parameters())
    plain_model.load_state_dict(saved["model"])
    plain.load_state_dict(saved["optimizer"])
    train(plain_model, plain, range(3, 5))

    # plain torch -> ours
    again_model = make_model()
    again = ice.Optimizer(factory(again_model.parameters()))
    again_model.load_state_dict(plain_model.state_dict())
    again.load_state_dict(plain.state_dict())
    train(again_model, again, range(5, 6))
    assert_same(again_model, bare_model)
    assert_same_state(again, bare)


@pytest.mark.parametrize("factory", [optim.Adam, optim.AdamW, optim.NAdam, optim.RMSprop])
def test_capturable_is_refused_on_the_cpu_as_by_the_bare_optimizer(factory: OptimizerFactory) -> None:
    (bare_model, bare), (model, optimizer) = bare_and_wrapped(functools.partial(factory, capturable=True))
    with pytest.raises(AssertionError) as expected:
        train(bare_model, bare)
    with pytest.raises(AssertionError) as found:
        train(model, optimizer)
    assert str(found.value) == str(expected.value)
    assert not differs_from_start(model)
    assert optimizer.clocks["step"] == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch steps capturable optimizers on accelerators only")
def test_capturable_steps_on_cuda_to_the_same_bits() -> None:
    bare_model, model = make_model().cuda(), make_model().cuda()
    bare = optim.AdamW(bare_model.parameters(), lr=torch.tensor(0.01, device="cuda"), capturable=True)
    inner = optim.AdamW(model.parameters(), lr=torch.tensor(0.01, device="cuda"), capturable=True)
    optimizer = ice.Optimizer(inner)
    for index in range(3):
        for net, opt in ((bare_model, bare), (model, optimizer)):
            opt.zero_grad()
            mse_loss(net(INPUTS[index].cuda()), TARGETS[index].cuda()).backward()
            opt.step()
    assert_same(model, bare_model)


# -- every scheduler --------------------------------------------------------------------------------------


def chained(optimizer: optim.Optimizer) -> Any:
    parts = [lr_scheduler.ConstantLR(optimizer, 0.1, 3), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.ChainedScheduler(parts, optimizer)


def sequential(optimizer: optim.Optimizer) -> Any:
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(optimizer, 8)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[4])


SCHEDULERS: dict[str, Callable[[optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda t: 0.9**t, lambda t: 1 / (1 + t)]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.3, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 10, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 7, 0.001),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, 2, mode="exp_range", gamma=0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.1, 0.2], total_steps=12),
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "SWALR": lambda o: optim.swa_utils.SWALR(o, swa_lr=[0.01, 0.02], anneal_epochs=4),
}


def test_the_table_of_schedulers_is_complete() -> None:
    classes = {name for name in lr_scheduler.__all__ if name != "LRScheduler"}
    assert classes <= SCHEDULERS.keys()


def scheduled_values(
    model: nn.Module, optimizer: optim.Optimizer, scheduler: Any, indices: range = range(10)
) -> list[Any]:
    seen = []
    for index in indices:
        train(model, optimizer, range(index, index + 1))
        seen.append([(float(g["lr"]), g["momentum"]) for g in optimizer.param_groups])
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()
    return seen


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_every_torch_scheduler_drives_it_as_it_drives_the_bare_optimizer(make: Callable[..., Any]) -> None:
    bare_model, model = make_model(), make_model()
    bare, optimizer = SGD(two_groups(bare_model)), ice.Optimizer(SGD(two_groups(model)))
    expected = scheduled_values(bare_model, bare, make(bare))
    assert scheduled_values(model, optimizer, make(optimizer)) == expected
    assert len({values[0][0] for values in expected}) > 1
    assert_same(model, bare_model)


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_torch_scheduler_goes_on_after_both_are_saved_and_loaded(make: Callable[..., Any]) -> None:
    bare_model = make_model()
    bare = SGD(two_groups(bare_model))
    expected = scheduled_values(bare_model, bare, make(bare))

    model = make_model()
    optimizer = ice.Optimizer(SGD(two_groups(model)))
    scheduler = make(optimizer)
    seen = scheduled_values(model, optimizer, scheduler, range(4))
    saved = copy.deepcopy([o.state_dict() for o in (model, optimizer, scheduler)])

    model = make_model()
    optimizer = ice.Optimizer(SGD(two_groups(model)))
    scheduler = make(optimizer)
    for target, state in zip((model, scheduler, optimizer), (saved[0], saved[2], saved[1]), strict=True):
        target.load_state_dict(state)
    assert seen + scheduled_values(model, optimizer, scheduler, range(4, 10)) == expected
    assert_same(model, bare_model)


def test_a_scheduler_steps_once_per_window_with_accumulation() -> None:
    model = make_model()
    optimizer = ice.Optimizer(SGD(model.parameters()), accumulation_steps=3)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    seen = []
    for index in range(9):
        optimizer.backward(mse_loss(model(INPUTS[index]), TARGETS[index]))
        if optimizer.update():
            scheduler.step()
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen == [0.1, 0.1, 0.05, 0.05, 0.05, 0.025, 0.025, 0.025, 0.0125]


@pytest.mark.parametrize(("key", "expected"), [("weight_decay", [1.0, 0.5, 0.25, 0.125]), ("lr", [1.0, 0.5] * 2)])
def test_a_second_run_begins_anew_with_what_processors_wrote_and_nothing_else(key: str, expected: list[float]) -> None:
    def halve(group: Any) -> Any:
        group[key] *= 0.5 if group["step"] else 1.0
        return group

    weight = nn.Parameter(torch.ones(()))
    optimizer = ice.Optimizer(optim.SGD([weight], lr=1.0, weight_decay=0.1), processors=[halve])
    trainer = Engine(lambda _, batch: optimizer.backward(weight * batch))
    optimizer.attach(trainer)
    found: list[float] = []
    trainer.add_event_handler(
        ice.OptimizerEvents.OPTIMIZER_STEP_COMPLETED, lambda: found.append(optimizer.param_groups[0]["lr"])
    )
    if key == "weight_decay":
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
        trainer.add_event_handler(ice.OptimizerEvents.OPTIMIZER_STEP_COMPLETED, lambda: scheduler.step())
    for _ in range(2):
        trainer.run([0.0, 0.0])
        trainer.state.max_epochs = None

    assert found == expected


def test_a_scheduler_fills_a_tensor_lr_in_place() -> None:
    model, lr = make_model(), torch.tensor(0.1)
    optimizer = ice.Optimizer(optim.AdamW(model.parameters(), lr=lr))
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    train(model, optimizer, range(1))
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(0.05)


def test_averaged_weights_follow_its_steps() -> None:
    (bare_model, bare), (model, optimizer) = bare_and_wrapped(SGD)
    averaged = []
    for net, opt in ((bare_model, bare), (model, optimizer)):
        swa = optim.swa_utils.AveragedModel(net)
        schedule = optim.swa_utils.SWALR(opt, swa_lr=0.02, anneal_epochs=2)
        for index in range(4):
            train(net, opt, range(index, index + 1))
            swa.update_parameters(net)
            schedule.step()
        averaged.append(swa)
    assert_same(averaged[1], averaged[0])
    assert differs_from_start(averaged[1].module)


# -- copies -----------------------------------------------------------------------------------------------


def copied(objects: Any) -> Any:
    return copy.deepcopy(objects)


def pickled(objects: Any) -> Any:
    return pickle.loads(pickle.dumps(objects))  # noqa: S301 - our own bytes


@pytest.mark.parametrize("scheduled", [False, True], ids=["plain", "after a scheduler patched step"])
@pytest.mark.parametrize("duplicate", [copied, pickled])
def test_a_copy_trains_on_by_itself_and_identically(duplicate: Callable[[Any], Any], scheduled: bool) -> None:
    (bare_model, bare), (model, optimizer) = bare_and_wrapped(OPTIMIZERS["AdamW"])
    train(bare_model, bare)
    if scheduled:
        lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)
    train(model, optimizer, range(3))

    other_model, other = duplicate((model, optimizer))
    before = copy.deepcopy(model.state_dict())
    train(other_model, other, range(3, 6))
    assert_same(other_model, bare_model)
    assert_same_state(other, bare)
    assert other.clocks["step"] == 6
    # The original has not moved, and goes on to the same place.
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert optimizer.clocks["step"] == 3
    train(model, optimizer, range(3, 6))
    assert_same(model, bare_model)


@pytest.mark.parametrize("duplicate", [copied, pickled])
def test_a_copy_keeps_the_settings(duplicate: Callable[[Any], Any]) -> None:
    model = make_model()
    optimizer = ice.Optimizer(
        SGD(model.parameters()),
        name="generator",
        accumulation_steps=2,
        clip=ice.clip_norm(0.01),
        processors=[ice.schedules.cosine(total=10)],
        grad_scaler=torch.amp.GradScaler("cpu", init_scale=256.0),
    )
    other_model, other = duplicate((model, optimizer))
    for net, opt in ((model, optimizer), (other_model, other)):
        for index in range(6):
            opt.backward(mse_loss(net(INPUTS[index]), TARGETS[index]))
            opt.update()
    assert repr(other) == repr(optimizer)
    assert other.state_dict()["ice_engine"] == optimizer.state_dict()["ice_engine"]
    assert other.clocks["step"] == 3
    assert_same(other_model, model)


@pytest.mark.parametrize("duplicate", [copied, pickled])
def test_a_copied_scheduler_drives_the_copied_optimizer(duplicate: Callable[[Any], Any]) -> None:
    bare_model, model = make_model(), make_model()
    bare, optimizer = SGD(bare_model.parameters()), ice.Optimizer(SGD(model.parameters()))
    expected = scheduled_values(bare_model, bare, lr_scheduler.CosineAnnealingLR(bare, 8))
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 8)
    seen = scheduled_values(model, optimizer, scheduler, range(4))
    model, optimizer, scheduler = duplicate((model, optimizer, scheduler))
    assert scheduler.optimizer is optimizer
    assert seen + scheduled_values(model, optimizer, scheduler, range(4, 10)) == expected
    assert_same(model, bare_model)


@pytest.mark.parametrize("leaf", [nn.Parameter, lambda data: data.requires_grad_()], ids=["parameter", "leaf tensor"])
@pytest.mark.parametrize("duplicate", [copied, pickled])
def test_a_copy_made_inside_a_window_says_so_and_starts_its_own(
    duplicate: Callable[[Any], Any], leaf: Callable[..., torch.Tensor]
) -> None:
    p = leaf(torch.ones(2))
    optimizer = ice.Optimizer(optim.SGD([p], lr=0.5), accumulation_steps=2)
    optimizer.backward(p.sum())
    optimizer.update()
    with pytest.warns(ice.IceEngineWarning, match="dropped the 1 micro-batches of a window that copying left open"):
        other_p, other = duplicate((p, optimizer))
    for q, opt, stepped in ((p, optimizer, [True, False]), (other_p, other, [False, True])):
        seen = []
        for _ in range(2):
            opt.backward(3 * q.sum())
            seen.append(opt.update())
        assert seen == stepped
    assert p.tolist() == [1 - 0.5 * (1 + 3) / 2] * 2
    assert other_p.tolist() == [1 - 0.5 * (3 + 3) / 2] * 2


def test_a_copy_leaves_the_hooks_of_every_other_instance_alone() -> None:
    model = make_model()
    optimizer, calls = ice.Optimizer(SGD(model.parameters())), []
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    copied(optimizer).zero_grad()
    pickled(optimizer).zero_grad()
    train(model, optimizer, range(2))
    assert calls == ["post", "post"]


# -- GradScaler by hand -----------------------------------------------------------------------------------

SCALED = {
    "SGD": functools.partial(optim.SGD, lr=0.1),
    "SGD-fused": functools.partial(optim.SGD, lr=0.1, fused=True),
    "Adam-fused": functools.partial(optim.Adam, lr=0.1, fused=True),
    "AdamW-foreach": functools.partial(optim.AdamW, lr=0.1, foreach=True, weight_decay=0.0),
}


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("factory", SCALED.values(), ids=SCALED)
def test_a_grad_scaler_by_hand_unscales_and_skips_as_with_the_bare_optimizer(
    factory: OptimizerFactory, unscale_first: bool
) -> None:
    seen = []
    for wrap in (lambda o: o, ice.Optimizer):
        p = nn.Parameter(torch.ones(3))
        optimizer = wrap(factory([p]))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        values = []
        for gradient in (1.0, float("inf"), 0.5):
            optimizer.zero_grad()
            scaler.scale((p * gradient).sum()).backward()
            if unscale_first:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            values.append((p.tolist(), scaler.get_scale()))
        assert not hasattr(optimizer, "grad_scale")
        seen.append(values)
    assert seen[1] == seen[0]
    (first, _), (second, _), (third, _) = seen[1]
    assert first == pytest.approx([0.9] * 3)
    assert second == first
    assert third != second


@pytest.mark.parametrize("factory", SCALED.values(), ids=SCALED)
def test_its_own_scaler_gives_what_a_scaler_by_hand_gives(factory: OptimizerFactory) -> None:
    bare_model, model = make_model(), make_model()
    bare, by_hand = factory(bare_model.parameters()), torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = ice.Optimizer(factory(model.parameters()), grad_scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    for index in range(5):
        poison = float("inf") if index == 2 else 1.0
        bare.zero_grad()
        by_hand.scale(mse_loss(bare_model(INPUTS[index]), TARGETS[index]) * poison).backward()
        by_hand.step(bare)
        by_hand.update()
        optimizer.backward(mse_loss(model(INPUTS[index]), TARGETS[index]) * poison)
        assert optimizer.update() is (index != 2)
    assert differs_from_start(model)
    for p, q in zip(model.parameters(), bare_model.parameters(), strict=True):
        torch.testing.assert_close(p, q)  # a fused bare optimizer unscales inside its kernel
    assert optimizer.clocks["skipped"] == 1


# -- hooks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_hand", [False, True])
def test_step_hooks_run_once_per_step(by_hand: bool) -> None:
    model, calls = make_model(), []
    optimizer = ice.Optimizer(SGD(model.parameters()))
    pre = optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    everywhere = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("any pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("any post")),
    ]
    try:
        (bare_step if by_hand else ice_step)(model, optimizer, 0)
    finally:
        for handle in everywhere:
            handle.remove()
    assert calls == ["any pre", "pre", "post", "any post"]
    pre.remove()
    optimizer.zero_grad()  # a step by hand leaves its gradients
    train(model, optimizer, range(1, 2))
    assert calls[4:] == ["post"]


def test_hooks_of_the_wrapped_optimizer_stay_and_see_it() -> None:
    model, seen = make_model(), []
    inner = SGD(model.parameters())
    inner.register_step_post_hook(lambda optimizer, *_: seen.append(optimizer))
    train(model, ice.Optimizer(inner), range(1))
    assert seen == [inner]


def test_state_dict_hooks_run_once() -> None:
    model, calls = make_model(), []
    optimizer = ice.Optimizer(SGD(model.parameters()))
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("save pre"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("save post"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("load pre"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("load post"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["save pre", "save post", "load pre", "load post"]


# -- closures and modes -----------------------------------------------------------------------------------


def test_lbfgs_with_a_closure_steps_to_the_same_bits() -> None:
    (bare_model, bare), (model, optimizer) = bare_and_wrapped(
        functools.partial(optim.LBFGS, lr=0.5, max_iter=4, line_search_fn="strong_wolfe")
    )
    losses: list[list[float]] = [[], []]
    for net, opt, seen in ((bare_model, bare, losses[0]), (model, optimizer, losses[1])):

        def closure(net: nn.Module = net, opt: optim.Optimizer = opt) -> torch.Tensor:
            opt.zero_grad()
            loss = mse_loss(net(INPUTS[0]), TARGETS[0])
            loss.backward()
            return loss

        seen.extend(opt.step(closure).item() for _ in range(4))
    assert losses[1] == losses[0]
    assert losses[1][-1] < losses[1][0]
    assert_same(model, bare_model)


def test_a_closure_reaches_an_optimizer_that_does_not_need_it() -> None:
    model = make_model()
    optimizer = ice.Optimizer(SGD(model.parameters()))
    assert optimizer.step(lambda: 7.0) == 7.0
    assert optimizer.step() is None


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulation_steps": 2},
        {"grad_scaler": torch.amp.GradScaler("cpu")},
        {"clip": ice.clip_norm(1.0)},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_lbfgs_with_a_window_is_refused_when_built(settings: dict[str, Any]) -> None:
    inner = optim.LBFGS(make_model().parameters())
    with pytest.raises(ClosureError, match=r"LBFGS evaluates the loss in a closure.*optimizer\.step\(closure\)"):
        ice.Optimizer(inner, **settings)


def test_lbfgs_with_backward_or_update_is_refused() -> None:
    model = make_model()
    optimizer = ice.Optimizer(optim.LBFGS(model.parameters()))
    with pytest.raises(ClosureError, match=r"optimizer\.step\(closure\) in train_step"):
        optimizer.backward(mse_loss(model(INPUTS[0]), TARGETS[0]))
    with pytest.raises(ClosureError, match=r"optimizer\.step\(closure\) in train_step"):
        optimizer.update()
    assert not differs_from_start(model)


class AveragingSGD(optim.SGD):
    """As schedule-free optimizers do: trains at one point, evaluates at another, and must be told which."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["train_mode"] = True

    def _swap(self, mode: bool) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if group["train_mode"] != mode:
                    p.data.mul_(2.0 if mode else 0.5)
            group["train_mode"] = mode

    def train(self) -> None:
        self._swap(True)

    def eval(self) -> None:
        self._swap(False)

    def step(self, closure: Any = None) -> Any:
        if not self.param_groups[0]["train_mode"]:
            msg = "call optimizer.train() first"
            raise RuntimeError(msg)
        return super().step(closure)


def test_train_and_eval_of_a_schedule_free_optimizer_are_forwarded() -> None:
    (bare_model, bare), (model, optimizer) = bare_and_wrapped(functools.partial(AveragingSGD, lr=0.1))
    for net, opt in ((bare_model, bare), (model, optimizer)):
        opt.train()
        train(net, opt, range(2))
        opt.eval()
    assert_same(model, bare_model)
    assert optimizer.param_groups[0]["train_mode"] is False
    optimizer.backward(mse_loss(model(INPUTS[0]), TARGETS[0]))
    with pytest.raises(RuntimeError, match=r"call optimizer\.train\(\) first"):
        optimizer.update()
    optimizer.train()
    bare.train()
    train(model, optimizer, range(2, 4))
    train(bare_model, bare, range(2, 4))
    assert_same(model, bare_model)


def test_what_the_wrapped_optimizer_lacks_is_missing() -> None:
    optimizer = ice.Optimizer(SGD(make_model().parameters()))
    assert not hasattr(optimizer, "train")
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = optimizer.no_such_thing


# -- torch.compile ----------------------------------------------------------------------------------------


def test_a_compiled_model_trains_to_the_same_bits() -> None:
    (bare_model, bare), (model, optimizer) = bare_and_wrapped(SGD)
    compiled = torch.compile(model, backend="eager")
    train(bare_model, bare)
    train(compiled, optimizer)
    assert_same(model, bare_model)
    assert optimizer.clocks["step"] == 6


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_a_model_compiled_by_inductor_trains_the_same() -> None:
    bare_model, model = nn.Linear(3, 2), nn.Linear(3, 2)
    model.load_state_dict(bare_model.state_dict())
    bare, optimizer = SGD(bare_model.parameters()), ice.Optimizer(SGD(model.parameters()))
    train(torch.compile(bare_model), bare)
    train(torch.compile(model), optimizer)
    assert_same(model, bare_model)
    assert optimizer.clocks["step"] == 6


def test_a_compiled_step_is_that_of_the_bare_optimizer() -> None:
    pairs = bare_and_wrapped(OPTIMIZERS["AdamW"])
    for model, optimizer in pairs:
        step = torch.compile(lambda optimizer=optimizer: optimizer.step(), backend="eager")
        for index in range(3):
            optimizer.zero_grad()
            mse_loss(model(INPUTS[index]), TARGETS[index]).backward()
            step()
    (bare_model, bare), (model, optimizer) = pairs
    assert differs_from_start(model)
    assert_same(model, bare_model)
    assert_same_state(optimizer, bare)


# -- distributed checkpoint, in one process ---------------------------------------------------------------


def test_distributed_checkpoint_sees_what_it_sees_of_the_bare_optimizer() -> None:
    (bare_model, bare), (model, optimizer) = bare_and_wrapped(OPTIMIZERS["AdamW"])
    train(bare_model, bare, range(3))
    train(model, optimizer, range(3))
    expected = dcp.get_optimizer_state_dict(bare_model, bare)
    state = dcp.get_optimizer_state_dict(model, optimizer)
    torch.testing.assert_close(state["state"], expected["state"], rtol=0, atol=0)
    for ours, theirs in zip(state["param_groups"], expected["param_groups"], strict=True):
        assert {key: ours[key] for key in theirs} == theirs


@pytest.mark.parametrize("trained", [False, True])
def test_distributed_checkpoint_restores_it(trained: bool) -> None:
    (bare_model, bare), (model, optimizer) = bare_and_wrapped(OPTIMIZERS["AdamW"])
    train(bare_model, bare)
    train(model, optimizer, range(3))
    state = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer))

    other_model = make_model()
    other = ice.Optimizer(OPTIMIZERS["AdamW"](other_model.parameters()))
    if trained:
        train(other_model, other, range(6, 8))
    other_model.load_state_dict(model.state_dict())
    dcp.set_optimizer_state_dict(other_model, other, state)
    train(other_model, other, range(3, 6))
    assert_same(other_model, bare_model)
    assert_same_state(other, bare)


def test_looking_at_it_through_distributed_checkpoint_changes_nothing() -> None:
    model = make_model()
    optimizer = ice.Optimizer(OPTIMIZERS["AdamW"](model.parameters()))
    dcp.get_optimizer_state_dict(model, optimizer)  # torch takes a step with lr 0 to make the state
    assert not differs_from_start(model)
    assert optimizer.clocks == {"step": 0, "attempt": 0, "skipped": 0, "iteration": 0}


# -- being an optimizer -----------------------------------------------------------------------------------


def test_it_is_an_optimizer_and_shows_the_wrapped_one_live() -> None:
    inner = SGD(make_model().parameters())
    optimizer = ice.Optimizer(inner)
    assert isinstance(optimizer, optim.Optimizer)
    assert optimizer.inner is inner
    inner.load_state_dict(inner.state_dict())  # replaces param_groups and state
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert optimizer.defaults is inner.defaults
    optimizer.param_groups = inner.param_groups[:]
    assert inner.param_groups is optimizer.param_groups


def test_its_repr_contains_that_of_the_wrapped_optimizer() -> None:
    inner = SGD(make_model().parameters())
    text = repr(ice.Optimizer(inner, accumulation_steps=4))
    assert repr(inner) in text
    assert "accumulation_steps=4" in text


@pytest.mark.parametrize("set_to_none", [False, True])
def test_zero_grad_clears_as_the_bare_optimizer_does(set_to_none: bool) -> None:
    model = make_model()
    optimizer = ice.Optimizer(SGD(model.parameters()))
    mse_loss(model(INPUTS[0]), TARGETS[0]).backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    grads = [p.grad for p in model.parameters()]
    if set_to_none:
        assert grads == [None] * 4
    else:
        assert all(g is not None and not g.any() for g in grads)


def test_a_param_group_added_later_trains_as_in_the_bare_optimizer() -> None:
    bare_model, model = make_model(), make_model()
    bare, optimizer = SGD(bare_model[0].parameters()), ice.Optimizer(SGD(model[0].parameters()))
    seen = []
    for net, opt in ((bare_model, bare), (model, optimizer)):
        train(net, opt, range(2))
        net[2].zero_grad()
        opt.add_param_group({"params": list(net[2].parameters()), "lr": 0.02})
        seen.append(scheduled_values(net, opt, lr_scheduler.ExponentialLR(opt, 0.9), range(2, 6)))
    assert seen[1] == seen[0]
    assert len(optimizer.inner.param_groups) == 2
    assert_same(model, bare_model)


def test_named_parameters_keep_their_names() -> None:
    model = make_model()
    optimizer = ice.Optimizer(SGD(model.named_parameters()))
    plain = SGD(make_model().named_parameters())
    names = plain.state_dict()["param_groups"][0]["param_names"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["param_names"] == names


def test_names_of_another_process_do_not_stay_and_forbid_groups_without_names() -> None:
    model, bare_model = make_model(), make_model()
    optimizer = ice.Optimizer(SGD(model[0].parameters()))
    optimizer.load_state_dict(SGD(bare_model[0].named_parameters()).state_dict())
    assert "param_names" not in optimizer.param_groups[0]
    optimizer.add_param_group({"params": list(model[2].parameters())})
    assert len(optimizer.param_groups) == 2


def test_training_on_leaves_the_state_it_was_loaded_from_alone() -> None:
    model = make_model()
    source = ice.Optimizer(SGD(make_model().parameters()))
    optimizer = ice.Optimizer(SGD(model.parameters()))
    train(model, optimizer, range(1))
    state = optimizer.state_dict()
    source.load_state_dict(state)
    before = copy.deepcopy(source.state_dict()["state"])
    train(model, optimizer, range(1, 3))
    torch.testing.assert_close(source.state_dict()["state"], before, rtol=0, atol=0)
    assert not torch.equal(optimizer.state_dict()["state"][0]["momentum_buffer"], before[0]["momentum_buffer"])


def test_an_instance_without_its_inner_optimizer_has_no_attributes() -> None:
    empty = object.__new__(ice.Optimizer)  # what copy and pickle begin with
    assert not hasattr(empty, "_inner")
    assert not hasattr(empty, "anything")


# -- sparse gradients -------------------------------------------------------------------------------------

SPARSE = {
    "SGD": functools.partial(optim.SGD, lr=0.1),
    "SparseAdam": functools.partial(optim.SparseAdam, lr=0.1),
    "Adagrad": functools.partial(optim.Adagrad, lr=0.1),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's own Adagrad
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("factory", SPARSE.values(), ids=SPARSE)
def test_sparse_gradients_accumulate_to_the_same_bits(factory: OptimizerFactory, scaled: bool) -> None:
    bare_model, model = (nn.Embedding(6, 2, sparse=True) for _ in range(2))
    model.load_state_dict(bare_model.state_dict())
    before = model.weight.detach().clone()
    bare = factory(bare_model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if scaled else None
    optimizer = ice.Optimizer(factory(model.parameters()), accumulation_steps=2, grad_scaler=scaler)
    rows = torch.tensor([[0, 1], [1, 2], [2, 2], [4, 0]])
    for index, row in enumerate(rows):
        (bare_model(row).square().sum() / 2).backward()
        if index % 2:
            bare.step()
            bare.zero_grad()
        optimizer.backward(model(row).square().sum())
        if not index % 2:
            assert model.weight.grad.is_sparse
        assert optimizer.update() is bool(index % 2)
    assert_same(model, bare_model)
    assert torch.equal(model.weight[[3, 5]], before[[3, 5]])
    assert not torch.equal(model.weight[[0, 1, 2, 4]], before[[0, 1, 2, 4]])
