"""The smallest trainers there are: a batch is the gradient of a single weight."""

import torch
from ignite.engine import Engine

import ice_engine as ice


def parts(output=lambda batch: batch, name="optimizer", **settings):
    """A trainer and its optimizer."""
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=0.5), name=name, **settings)

    def train_step(engine, batch):
        optimizer.backward(weight * batch)
        return output(batch)

    engine = Engine(train_step)
    return engine, optimizer.attach(engine)


def parts_of_two(slow, fast):
    """A trainer and its two optimizers, of these names: one steps every second time, one every time."""
    weights = [torch.nn.Parameter(torch.ones(())) for _ in range(2)]
    optimizers = [
        ice.Optimizer(torch.optim.SGD([weight], lr=0.5), name=name, accumulation_steps=k)
        for weight, name, k in zip(weights, (slow, fast), (2, 1), strict=True)
    ]

    def train_step(engine, batch):
        for optimizer, weight in zip(optimizers, weights, strict=True):
            optimizer.backward(weight * batch)

    engine = Engine(train_step)
    for optimizer in optimizers:
        optimizer.attach(engine)
    return engine, optimizers
