"""The likeliest mistakes, each made as a user makes it; the message must be enough to mend it.

A warning is an error here, as in all tests.
"""

import functools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine, Events

import ice_engine as ice
from ice_engine import errors

MISTAKES = []
BATCHES = [torch.ones(4, 2)] * 8


def mistake(error, message):
    """Register a function that makes a mistake with the parts of a trainer; FOLDER stands for that of the test."""

    def add(make):
        MISTAKES.append(pytest.param(make, error, message, id=make.__name__))
        return make

    return add


def loss_of(model, batch):
    return model(batch).square().mean()


def trainer(step=None, *, attach=True, **settings):
    """What a user has: a model, an optimizer and an engine whose step may be wrong."""
    model = torch.nn.Linear(2, 1)
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1), **settings)
    step = step or (lambda its, batch: its.optimizer.backward(loss_of(its.model, batch)))
    its = SimpleNamespace(model=model, optimizer=optimizer, scaler=settings.get("grad_scaler"))
    its.engine = Engine(lambda engine, batch: step(its, batch))
    if attach:
        optimizer.attach(its.engine)
    return its


@pytest.mark.parametrize(("make", "error", "message"), MISTAKES)
def test_the_message_says_what_was_found_and_how_to_mend_it(tmp_path, make, error, message):
    raise AssertionError  # replaced at the end of the module, when all mistakes are there
