"""Clipping equals torch's own, and leaves a non-finite gradient for the report."""

import math

import pytest
import torch

import ice_engine as ice
from ice_engine.errors import ArgumentTypeError, ArgumentValueError


def parameters(*gradients):
    made = []
    for gradient in gradients:
        made.append(torch.nn.Parameter(torch.zeros_like(gradient)))
        made[-1].grad = gradient.clone()
    return made


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_it_equals_torchs_clip_grad_norm(norm_type, max_norm):
    gradients = [torch.randn(3, 4), torch.randn(5)]
    expected, actual = parameters(*gradients), parameters(*gradients)

    norm = torch.nn.utils.clip_grad_norm_(expected, max_norm, norm_type)

    assert torch.equal(norm, ice.clip_norm(max_norm, norm_type=norm_type)(iter(actual)))
    for p, q in zip(expected, actual, strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_without_a_finite_norm_is_left_as_it_is(value):
    good, bad = parameters(torch.ones(2), torch.tensor([value]))

    norm = ice.clip_norm(0.1)([good, bad])

    assert not math.isfinite(norm)
    assert torch.equal(good.grad, torch.ones(2))


def test_parameters_without_a_gradient_are_passed_over():
    (with_gradient,) = parameters(torch.full((1,), 2.0))

    assert ice.clip_norm(1.0)([torch.nn.Parameter(torch.ones(1)), with_gradient]) == 2.0


def test_the_norm_in_the_record_is_of_the_unscaled_mean_before_clipping():
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = ice.Optimizer(
        torch.optim.SGD([weight], lr=1.0),
        accumulation_steps=2,
        clip=ice.clip_norm(0.5),
        grad_scaler=torch.amp.GradScaler("cpu", init_scale=1024.0),
    )
    for slope in (3.0, 5.0):
        optimizer.backward(weight * slope)
        optimizer.update()

    assert optimizer.record.grad_norm == 4.0
    assert optimizer.record.clipped_norm.item() == pytest.approx(0.5, abs=1e-6)
    assert weight.item() == pytest.approx(-0.5, abs=1e-6)


def test_any_function_of_the_parameters_may_clip():
    def halve(params):
        params = list(params)
        for p in params:
            p.grad.mul_(0.5)
        return 7.0

    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0), clip=halve)
    optimizer.backward(weight * 4.0)
    optimizer.update()

    assert weight.item() == -2.0
    assert optimizer.record.grad_norm == 7.0


def test_a_clip_that_returns_nothing_is_refused():
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0), clip=lambda p: torch.nn.utils.clip_grad_value_(p, 1.0))
    optimizer.backward(weight * 4.0)

    with pytest.raises(ArgumentTypeError, match="clip returned NoneType; wanted the norm before clipping"):
        optimizer.update()

    assert weight.item() == 0.0


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"max_norm": 0.0}, ArgumentValueError),
        ({"max_norm": math.nan}, ArgumentValueError),
        ({"max_norm": "1"}, ArgumentTypeError),
        ({"max_norm": 1.0, "norm_type": 0}, ArgumentValueError),
        ({"max_norm": 1.0, "norm_type": None}, ArgumentTypeError),
    ],
)
def test_impossible_arguments_are_refused(arguments, error):
    with pytest.raises(error, match=r"max_norm|norm_type"):
        ice.clip_norm(**arguments)


def test_it_prints_as_the_call_that_makes_it():
    assert repr(ice.clip_norm(0.5)) == "clip_norm(0.5)"
