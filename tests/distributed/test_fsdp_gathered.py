"""What FSDP2 gathers in a forward, and keeps of a root until its backward, is of the parameters that there are.

The oracle is a float64 loop with plain models, on the data of all ranks.
"""

import contextlib
import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import softplus

import ice_engine as ice
from ice_engine.errors import AttachError
from tests.distributed.launch import launch
from tests.distributed.test_fsdp_windows import LENGTH, batches, network, sgd, whole

pytestmark = pytest.mark.distributed

Step = Callable[[Any, Any, torch.nn.Module, torch.nn.Module, torch.Tensor], None]


def critics_loss(critic: torch.nn.Module, generator: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return softplus(-critic(batch)).mean() + softplus(critic(generator(batch[:, :2]))).mean()


def generators_loss(critic: torch.nn.Module, generator: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return softplus(-critic(generator(batch[:, :2]))).mean()


def critic_last(judge: Any, draw: Any, critic: torch.nn.Module, generator: torch.nn.Module, x: torch.Tensor) -> None:
    draw.backward(generators_loss(critic, generator, x))
    fake = generator(x[:, :2]).detach()  # no backward comes back to this forward
    judge.backward(softplus(-critic(x)).mean() + softplus(critic(fake)).mean())


def toggled(judge: Any, draw: Any, critic: torch.nn.Module, generator: torch.nn.Module, x: torch.Tensor) -> None:
    with judge.toggle(generator):
        judge.backward(critics_loss(critic, generator, x))  # nor to the generator's here
    with draw.toggle(critic):
        draw.backward(generators_loss(critic, generator, x))


def toggled_both(judge: Any, draw: Any, critic: torch.nn.Module, generator: torch.nn.Module, x: torch.Tensor) -> None:
    both = torch.nn.ModuleList([critic, generator])
    generator(x[:, :2])  # so that the module has its whole parameters when toggle() looks for the optimizer's own
    with draw.toggle(both):
        draw.backward(generators_loss(critic, generator, x))
    critic(x)
    with judge.toggle():
        judge.backward(critics_loss(critic, generator, x))


def drawn_before(judge: Any, draw: Any, critic: torch.nn.Module, generator: torch.nn.Module, x: torch.Tensor) -> None:
    fake = generator(x[:, :2])
    with judge.toggle(generator):  # between the generator's forward and its backward
        judge.backward(softplus(-critic(x)).mean() + softplus(critic(fake.detach())).mean())
    with draw.toggle(critic):
        draw.backward(softplus(-critic(fake)).mean())


class Plain:
    """An optimizer that adds up the gradients of one model over all ranks."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.parameters, self.inner = list(model.parameters()), sgd(model)
        self.gradients: list[torch.Tensor] = []
        self.losses = 0

    def toggle(self, *_: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        found = torch.autograd.grad(loss, self.parameters)
        sums = zip(self.gradients or [0.0] * len(found), found, strict=True)
        self.gradients = [a + b for a, b in sums]
        self.losses += 1

    def step(self) -> None:
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient / self.losses
        self.inner.step()
        self.gradients, self.losses = [], 0


def _expected(step: Step, windows: Sequence[int], ranks: int) -> torch.Tensor:
    critic, generator = network(3, 1), network(2, 3)
    judge, draw = Plain(critic), Plain(generator)
    data, begin = [batches(rank) for rank in range(ranks)], 0
    for size in windows:
        for i in range(begin, begin + size):
            for rank in range(ranks):
                step(judge, draw, critic, generator, data[rank][i])
        judge.step()
        draw.step()
        begin += size
    return torch.cat([p.detach().flatten() for model in (critic, generator) for p in model.parameters()])


def _trained(step: Step, size: int, sync: Any) -> list[float]:
    critic, generator = network(3, 1), network(2, 3)
    fully_shard(critic)
    fully_shard(generator)
    judge = ice.Optimizer(sgd(critic), name="critic", accumulation_steps=size)
    draw = ice.Optimizer(sgd(generator), name="generator", accumulation_steps=size)
    trainer = Engine(lambda _, batch: step(judge, draw, critic, generator, batch))
    judge.attach(trainer, model=critic, sync=sync)
    draw.attach(trainer, model=generator, sync=sync)
    trainer.run(batches(dist.get_rank()))
    return whole(critic, generator)


@pytest.mark.parametrize(
    ("ranks", "size", "sync"),
    [(1, 2, "communication"), (2, 1, "communication"), (2, 2, "communication"), (2, 2, "memory")],
)
@pytest.mark.parametrize("step", [critic_last, toggled, toggled_both, drawn_before])
def test_a_forward_without_a_backward_leaves_nothing_behind(step, ranks, size, sync):
    expected = _expected(step, {1: [1] * 5, 2: [2, 2, 1]}[size], ranks)
    for parameters in launch(_trained, ranks, step, size, sync):
        torch.testing.assert_close(torch.tensor(parameters, dtype=torch.float64), expected, rtol=1e-12, atol=1e-12)


def _validated() -> list[float]:
    """Validate in a handler of each step, by a forward without a backward, and once more before attach()."""
    model = network(3, 1)
    fully_shard(model)
    inner = sgd(model)
    with torch.no_grad():
        model(batches(0)[0])
    optimizer = ice.Optimizer(inner)
    trainer = Engine(lambda _, batch: optimizer.backward(model(batch).square().mean()))
    optimizer.attach(trainer, model=model)
    losses: list[float] = []

    @trainer.on(Events.ITERATION_STARTED | optimizer.event("STEP_COMPLETED"))
    def validate() -> None:
        with torch.no_grad():
            losses.append(model(batches(0)[0]).square().mean().item())

    trainer.run(batches(dist.get_rank()))
    return losses


@pytest.mark.parametrize("ranks", [1, 2])
def test_validation_sees_the_parameters_that_were_stepped(ranks):
    model = network(3, 1)
    optimizer = sgd(model)
    expected = []
    for i in range(LENGTH):
        for _ in range(2):
            expected.append(model(batches(0)[0]).square().mean().item())
            if len(expected) % 2:
                optimizer.zero_grad()
                model(torch.cat([batches(rank)[i] for rank in range(ranks)])).square().mean().backward()
                optimizer.step()
    for losses in launch(_validated, ranks):
        assert losses == pytest.approx(expected, rel=1e-12)


def _unfrozen(reshards: bool | None) -> list[float]:
    """Train the last layer only, and from the second epoch on all; validate after each."""
    model = network(3, 1)
    model[0].requires_grad_(False)
    fully_shard(model, reshard_after_forward=reshards)
    optimizer = ice.Optimizer(sgd(model), accumulation_steps=2)
    trainer = Engine(lambda _, batch: optimizer.backward(model(batch).square().mean()))
    optimizer.attach(trainer, model=model)

    @trainer.on(Events.EPOCH_COMPLETED)
    def validate() -> None:
        with torch.no_grad():
            model(batches(0)[0])

    trainer.add_event_handler(Events.EPOCH_STARTED(once=2), lambda: model[0].requires_grad_(True))
    trainer.run(batches(dist.get_rank()), max_epochs=2)
    return whole(model)


@pytest.mark.parametrize("reshards", [None, False, True])
def test_what_is_unfrozen_after_a_validation_trains_from_then_on(reshards):
    """The flags are then those of whole parameters, which are gone after the next backward."""
    model = network(3, 1)
    optimizer = sgd(model)
    for epoch in range(2):
        model[0].requires_grad_(epoch == 1)
        for begin in (0, 2, 4):
            window = [batch for rank in range(2) for batch in batches(rank)[begin : begin + 2]]
            optimizer.zero_grad()
            model(torch.cat(window)).square().mean().backward()
            optimizer.step()
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    for parameters in launch(_unfrozen, 2, reshards):
        torch.testing.assert_close(torch.tensor(parameters, dtype=torch.float64), expected, rtol=1e-12, atol=1e-12)


def _in_half_precision(first: bool) -> list[float]:
    critic, generator = network(3, 1).float(), network(2, 3).float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(critic, mp_policy=policy)
    fully_shard(generator, mp_policy=policy)
    judge = ice.Optimizer(sgd(critic), name="critic")
    draw = ice.Optimizer(sgd(generator), name="generator")

    def step(_: Engine, batch: torch.Tensor) -> None:
        batch = batch.float()
        with judge.toggle() if first else contextlib.nullcontext():
            judge.backward(critics_loss(critic, generator, batch))
        draw.backward(generators_loss(critic, generator, batch))

    trainer = Engine(step)
    judge.attach(trainer, model=critic)
    draw.attach(trainer, model=generator)
    trainer.run(batches(dist.get_rank()))
    return whole(critic, generator)


def test_a_first_forward_in_a_toggle_leaves_gradients_the_type_that_they_have():
    """FSDP2 looks in its first forward of which type the gradients are to be, and then only at what requires them."""
    assert launch(_in_half_precision, 2, True) == launch(_in_half_precision, 2, False)


def _toggled_part(validates: bool) -> list[float]:
    model = network(3, 1)
    fully_shard(model)
    optimizer = ice.Optimizer(sgd(model))

    def train_step(_: Engine, batch: torch.Tensor) -> None:
        if validates:
            with torch.no_grad():
                model(batch)
        with optimizer.toggle(model[2]):
            optimizer.backward(model(batch).square().mean())

    trainer = Engine(train_step)
    optimizer.attach(trainer, model=model)
    trainer.run(batches(dist.get_rank()))
    return whole(model)


def test_a_toggle_of_a_part_that_is_gathered_with_the_whole_leaves_the_optimizers_own_parameters_their_flags():
    """That part is no module that ``fully_shard`` was applied to: its parameters are those of the root around it."""
    assert launch(_toggled_part, 2, True) == launch(_toggled_part, 2, False)


def _without_its_model() -> str:
    model = network(3, 1)
    fully_shard(model)
    optimizer = ice.Optimizer(sgd(model))
    trainer = Engine(lambda _, batch: optimizer.backward(model(batch).square().mean()))
    with pytest.raises(AttachError) as refused:
        optimizer.attach(trainer)
    optimizer.attach(trainer, model=model)
    trainer.run(batches(0))
    return str(refused.value)


def test_in_one_process_too_a_fully_sharded_model_is_given_to_attach():
    """Else a forward without a backward, such as one of a metric in train_step, would leave it as it was at a step."""
    (said,) = launch(_without_its_model, 1)
    assert "DTensor" in said
    assert "optimizer.attach(engine, model=model)" in said


def _copied() -> list[Any]:
    model = network(3, 1)
    fully_shard(model)
    optimizer = ice.Optimizer(sgd(model), name="sharded")
    trainer = Engine(lambda _, batch: optimizer.backward(model(batch).square().mean()))
    optimizer.attach(trainer, model=model)
    trainer.run(batches(0))
    copied = copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))  # noqa: S301 - our own data
    return [(found.clocks["step"], found.name) for found in copied]


def test_an_attached_optimizer_is_copied_and_pickled_without_the_model_that_it_lets_gather():
    assert launch(_copied, 1) == [[(LENGTH, "sharded")] * 2]
