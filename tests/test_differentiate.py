"""A loss differentiated past torch's own preparations: what it leaves is the same."""

import logging

import pytest
import torch

from ice_engine.differentiate import backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_gradients_are_those_of_torch(dtype, shape):
    found = []
    for how in (backward, torch.autograd.backward):
        weight = torch.full((3,), 2.0, dtype=dtype, requires_grad=True)
        how((weight**3).sum().reshape(shape))
        how((weight**2).sum().reshape(shape))
        found.append(weight.grad)

    assert torch.equal(*found)


def test_a_hook_that_writes_to_the_first_gradient_spoils_no_later_one():
    weight = torch.ones((), requires_grad=True)
    loss = weight * 2.0
    loss.register_hook(lambda gradient: gradient.mul_(5.0))
    backward(loss)
    weight.grad = None

    backward(weight * 2.0)

    assert weight.grad == 2.0


def test_a_parameter_that_is_its_own_loss_has_a_gradient_of_its_own():
    first, second = (torch.ones((), requires_grad=True) for _ in range(2))
    backward(first)
    backward(second)

    first.grad.mul_(3.0)

    assert (first.grad, second.grad) == (3.0, 1.0)


def test_a_graph_is_kept_if_asked_for_and_freed_else():
    weight = torch.ones((), requires_grad=True)
    loss = weight.exp()
    backward(loss, retain_graph=True)
    backward(loss)

    with pytest.raises(RuntimeError, match="second time"):
        backward(loss)


def test_autograds_debug_log_is_written(caplog):
    weight = torch.ones((), requires_grad=True)

    with caplog.at_level(logging.DEBUG, logger="torch.autograd.graph"):
        backward(weight.exp())

    assert any("Executing" in message for message in caplog.messages)
