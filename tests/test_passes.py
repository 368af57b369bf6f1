"""How often a step goes over the gradients, and how often the host waits for a number: counted by torch itself."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ice_engine as ice

MANY = 64  # entries; everything smaller is a scalar of ours


class Passes(TorchDispatchMode):
    """Counts the operations that read or write the gradients, and the numbers that the host waits for."""

    def __init__(self, gradients):
        super().__init__()
        self.data = {gradient.data_ptr() for gradient in gradients}
        self.passes, self.waits = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name == "_local_scalar_dense":
            self.waits += 1
        flat = [t for arg in args for t in (arg if isinstance(arg, list | tuple) else [arg])]
        touched = [t for t in flat if isinstance(t, torch.Tensor) and t.data_ptr() in self.data and t.numel() == MANY]
        if len(touched) > 0 and name != "detach":
            self.passes[name] += len(touched)
        return func(*args, **(kwargs or {}))


def one_step(*, clip=None, scaled=False, weights=(3, 5), listen=False, nonfinite=None, scale=1.0):
    parameters = [torch.nn.Parameter(torch.ones(MANY)) for _ in range(3)]
    optimizer = ice.Optimizer(
        torch.optim.SGD(parameters, lr=0.1),
        accumulation_steps=len(weights),
        clip=clip,
        nonfinite=nonfinite,
        grad_scaler=torch.amp.GradScaler("cpu", init_scale=4.0) if scaled else None,
    )
    stepped = []
    optimizer.register_step_pre_hook(lambda *_: stepped.append(True))
    for weight in weights:  # a run's first window, in which the loss scale is read
        optimizer.backward(sum(p.sum() for p in parameters), weight=weight)
        optimizer.update()
    for weight in weights[:-1]:
        optimizer.backward(scale * sum(p.sum() for p in parameters), weight=weight)
        optimizer.update()
    optimizer.backward(scale * sum(p.sum() for p in parameters), weight=weights[-1])
    passes = Passes([p.grad for p in parameters])
    optimizer.inner.step = lambda *args, **kwargs: None  # what the optimizer itself does is not counted
    with passes:
        assert optimizer.update() or nonfinite == "skip" or scale != 1.0
    return {name: count / 3 for name, count in passes.passes.items()}, passes.waits, optimizer


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("max_norm", [1e-3, 1e9])
def test_with_a_norm_clip_one_pass_reads_and_one_writes(scaled, max_norm):
    passes, waits, _ = one_step(clip=ice.clip_norm(max_norm), scaled=scaled)

    assert passes == {"_foreach_norm": 1, "_foreach_mul_": 1}
    assert waits == 1  # the norm, by which a skip is told from a step; the loss scale in the record is known


def test_with_a_scaler_alone_one_pass_unscales_normalises_and_looks_for_infinities():
    passes, waits, _ = one_step(scaled=True)

    assert passes == {"_amp_foreach_non_finite_check_and_unscale_": 1}
    assert waits == 1


def test_a_policy_alone_takes_one_pass():
    passes, waits, _ = one_step(nonfinite="skip")

    assert passes == {"_amp_foreach_non_finite_check_and_unscale_": 1}
    assert waits == 1


def test_the_mean_alone_takes_one_pass_and_a_window_of_one_micro_batch_none():
    assert one_step()[:2] == ({"_foreach_mul_": 1}, 0)
    assert one_step(weights=(1,))[:2] == ({}, 0)


def test_the_mean_of_equal_weights_takes_none_as_each_loss_is_divided():
    assert one_step(weights=(4, 4, 4))[:2] == ({}, 0)

    values = []
    for ours in (True, False):
        parameter = torch.nn.Parameter(torch.linspace(0.1, 1.0, MANY))
        inner = torch.optim.SGD([parameter], lr=0.1)
        optimizer = ice.Optimizer(inner, accumulation_steps=3)
        for power in (1, 2, 3):
            loss = (parameter**power).sum()
            if ours:
                optimizer.backward(loss, weight=4)
                optimizer.update()
            else:
                (loss / 3).backward()
        if not ours:
            inner.step()
        values.append(parameter.detach())
    assert torch.equal(*values)


def test_a_skip_shows_the_mean_and_names_the_culprit():
    passes, _, optimizer = one_step(clip=ice.clip_norm(1.0), scale=float("inf"))

    assert passes["_foreach_mul_"] == 1  # for whoever looks at the gradients of a skipped step
    assert optimizer.clocks["skipped"] == 1
    assert "first in 'param_groups.0.params.0'" in optimizer.record.skipped


def test_a_norm_beyond_its_type_is_not_taken_for_an_infinite_gradient():
    """The scaled sum's norm overflows single precision, that of the mean does not."""
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = ice.Optimizer(
        torch.optim.SGD([parameter], lr=0.0),
        clip=ice.clip_norm(1.0),
        grad_scaler=torch.amp.GradScaler("cpu", init_scale=2.0**60),
    )
    optimizer.backward((parameter * 1e3).sum())

    assert optimizer.update()
    assert float(optimizer.record.grad_norm) == pytest.approx(2e3)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [None, ice.clip_norm(1.0)])
def test_the_host_waits_once_a_window_and_for_the_scale_only_where_it_may_have_changed(clip, fused):
    """And the record tells the scale that the losses were multiplied with, each time."""
    parameter = torch.nn.Parameter(torch.ones(MANY))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
    inner = torch.optim.SGD([parameter], lr=0.0, fused=fused)
    optimizer = ice.Optimizer(inner, clip=clip, grad_scaler=scaler)
    waits, scales, truth = [], [], []
    for step in range(12):
        optimizer.backward(parameter.sum() * (float("inf") if step in {5, 6} else 1.0))
        truth.append(scaler._scale.item())
        with Passes([parameter.grad]) as passes:
            optimizer.update()
        waits.append(passes.waits)
        scales.append(optimizer.record.loss_scale)

    assert scales == truth == [64, 64, 64, 128, 128, 128, 64, 32, 32, 32, 64, 64]
    # Steps 5 and 6 say what is not finite; 0, 3, 6, 7 and 10 are the first with another scale.
    assert [n for step, n in enumerate(waits) if step not in {0, 3, 5, 6, 7, 10}] == [1] * 6


def test_without_a_policy_the_host_waits_for_nothing():
    assert one_step(clip=ice.clip_norm(1.0), nonfinite="off")[1] == 0


@pytest.mark.parametrize("how", ["update", "load_state_dict", "growth"])
def test_a_scale_that_the_user_sets_between_windows_is_seen(how):
    parameter = torch.nn.Parameter(torch.ones(MANY))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=100)
    optimizer = ice.Optimizer(torch.optim.SGD([parameter], lr=0.0), grad_scaler=scaler)

    def step():
        optimizer.backward(parameter.sum())
        optimizer.update()
        return optimizer.record.loss_scale

    assert [step(), step()] == [64, 64]
    if how == "update":
        scaler.update(16.0)
    elif how == "load_state_dict":
        scaler.load_state_dict({**scaler.state_dict(), "scale": 16.0})
    else:
        scaler.set_growth_interval(3)
        assert [step(), step()] == [64, 128]
        return
    assert [step(), step()] == [16, 16]
