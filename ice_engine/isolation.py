"""Parameters that a loss must not reach: what it would leave in them, another optimizer would step on."""

import contextlib
from collections.abc import Iterable, Iterator

import torch


@contextlib.contextmanager
def gradients_aside(parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    """Let *parameters* have the gradients at the end that they had at the beginning, whatever comes between."""
    before = [(parameter, parameter.grad) for parameter in parameters]
    try:
        for parameter, _ in before:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


@contextlib.contextmanager
def grad_off(parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    """Let *parameters* require no grad inside; at the end every flag is as it was at the beginning."""
    before = [(parameter, parameter.requires_grad) for parameter in parameters]
    try:
        for parameter, _ in before:
            parameter.requires_grad = False
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad = required
