"""Windows of ``fully_shard``'ed models: whole gradients that FSDP2 keeps until it reduces belong to one window.

The oracle is a float64 loop with one big batch per window.
"""

import functools
import math
import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import softplus

import ice_engine as ice
from ice_engine.errors import AttachError, RankError
from tests.distributed.launch import launch
from tests.unsized import Unsized

pytestmark = pytest.mark.distributed

LENGTH, EPOCHS, RANKS = 5, 2, 2


def network(inputs: int, outputs: int) -> torch.nn.Module:
    torch.manual_seed(inputs)
    layers = torch.nn.Linear(inputs, 4), torch.nn.Tanh(), torch.nn.Linear(4, outputs)
    return torch.nn.Sequential(*layers).double()


def batches(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(LENGTH)]


def whole(*models: Any) -> list[float]:
    for model in models:
        model.reshard()  # after a forward without a backward
    return torch.cat([p.full_tensor().flatten() for model in models for p in model.parameters()]).tolist()


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5)


def by_hand(windows: Iterable[list[torch.Tensor]]) -> torch.Tensor:
    """Return the parameters after a loop with one big batch per window."""
    model = network(3, 1)
    optimizer = sgd(model)
    for window in windows:
        optimizer.zero_grad()
        model(torch.cat(window)).square().mean().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _trained(tail: Any, sync: Any, unknown: bool) -> tuple[list[float], list[int], bool]:
    model = network(3, 1)
    fully_shard(model)
    optimizer = ice.Optimizer(sgd(model), accumulation_steps=3, tail=tail)
    trainer = Engine(lambda engine, batch: optimizer.backward(model(batch).square().mean()))
    optimizer.attach(trainer, model=model, sync=sync)
    sizes: list[int] = []
    trainer.add_event_handler(optimizer.event("STEP_COMPLETED"), lambda: sizes.append(optimizer.record.micro_batches))
    reduced: list[bool] = []  # inside of windows

    @trainer.on(Events.ITERATION_COMPLETED)
    def look() -> None:
        if optimizer.in_window:
            reduced.append(any(p.grad is not None for p in model.parameters()))

    data = batches(dist.get_rank())
    trainer.run(Unsized(data) if unknown else data, max_epochs=EPOCHS)
    return whole(model), sizes, any(reduced)


@pytest.mark.parametrize("unknown", [False, True])
@pytest.mark.parametrize("sync", ["communication", "memory"])
@pytest.mark.parametrize(("tail", "sizes"), [("step", [3, 2, 3, 2]), ("drop", [3, 3]), ("carry", [3, 3, 3, 1])])
def test_windows_of_every_tail(tail, sizes, sync, unknown):
    # Of each window the micro-batches, counted over both epochs.
    begins = {"step": [0, 3, 5, 8], "drop": [0, 5], "carry": [0, 3, 6, 9]}[tail]
    expected = by_hand(
        [batches(rank)[i % LENGTH] for rank in range(RANKS) for i in range(begin, begin + size)]
        for begin, size in zip(begins, sizes, strict=True)
    )
    for parameters, found, reduced in launch(_trained, RANKS, tail, sync, unknown):
        assert found == sizes
        assert reduced == (sync == "memory")
        torch.testing.assert_close(torch.tensor(parameters, dtype=torch.float64), expected, rtol=1e-12, atol=1e-12)


def _told_by_the_script(turn: int, sync: Any) -> list[float]:
    model = network(3, 1)
    fully_shard(model)
    optimizer = ice.Optimizer(sgd(model), accumulation_steps=2)

    def train_step(engine: Engine, batch: torch.Tensor) -> None:
        model.set_requires_gradient_sync(engine.state.iteration % 2 == turn)
        optimizer.backward(model(batch).square().mean())

    trainer = Engine(train_step)
    optimizer.attach(trainer, model=model, sync=sync)
    trainer.run(batches(dist.get_rank()))
    return whole(model)


@pytest.mark.parametrize("sync", ["communication", "memory"])
@pytest.mark.parametrize("turn", [0, 1])
def test_a_script_that_still_says_when_to_reduce_changes_no_step(turn, sync):
    """As its plain loop did: at every second micro-batch, and so not in a last window of one, or never where due."""
    expected = by_hand([b for r in range(RANKS) for b in batches(r)[begin : begin + 2]] for begin in (0, 2, 4))
    for parameters in launch(_told_by_the_script, RANKS, turn, sync):
        torch.testing.assert_close(torch.tensor(parameters, dtype=torch.float64), expected, rtol=1e-12, atol=1e-12)


def critics_loss(critic: torch.nn.Module, generator: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return softplus(-critic(batch)).mean() + softplus(critic(generator(batch[:, :2]).detach())).mean()


def generators_loss(critic: torch.nn.Module, generator: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return softplus(-critic(generator(batch[:, :2]))).mean()


def _gan(steps: tuple[int, int], every: int, sync: Any) -> list[float]:
    critic, generator = network(3, 1), network(2, 3)
    fully_shard(critic)
    fully_shard(generator)
    judge = ice.Optimizer(sgd(critic), name="critic", accumulation_steps=steps[0])
    draw = ice.Optimizer(sgd(generator), name="generator", accumulation_steps=steps[1])

    def train_step(engine: Engine, batch: torch.Tensor) -> None:
        judge.backward(critics_loss(critic, generator, batch))
        if engine.state.iteration % every == 0:
            draw.backward(
                generators_loss(critic, generator, batch)
            )  # which goes through the critic, without a toggle()

    trainer = Engine(train_step)
    judge.attach(trainer, model=critic, sync=sync)
    draw.attach(trainer, model=generator, sync=sync)
    trainer.run(batches(dist.get_rank()))
    return whole(critic, generator)


@pytest.mark.parametrize("sync", ["communication", "memory"])
@pytest.mark.parametrize(("steps", "every"), [((2, 2), 1), ((2, 3), 1), ((3, 1), 1), ((1, 1), 3), ((3, 2), 2)])
def test_a_loss_through_another_optimizers_model_stays_out_of_its_window(steps, every, sync):
    """Also where the generator has its loss in every n-th micro-batch only, so that nothing of it is reduced in one."""
    models = network(3, 1), network(2, 3)
    losses = critics_loss, generators_loss
    optimizers = [sgd(model) for model in models]
    sums = [[torch.zeros_like(p) for p in model.parameters()] for model in models]
    begun = [0, 0]
    for i in range(LENGTH):
        for which, (model, loss) in enumerate(zip(models, losses, strict=True)):
            if which == 1 and (i + 1) % every:
                continue
            for rank in range(RANKS):
                found = torch.autograd.grad(loss(*models, batches(rank)[i]), list(model.parameters()))
                sums[which] = [a + b for a, b in zip(sums[which], found, strict=True)]
            begun[which] += 1
        for which, model in enumerate(models):
            if begun[which] == steps[which] or (i == LENGTH - 1 and begun[which]):
                for parameter, total in zip(model.parameters(), sums[which], strict=True):
                    parameter.grad = total / (begun[which] * RANKS)
                optimizers[which].step()
                sums[which], begun[which] = [torch.zeros_like(p) for p in model.parameters()], 0
    expected = torch.cat([p.detach().flatten() for model in models for p in model.parameters()])
    for parameters in launch(_gan, RANKS, steps, every, sync):
        torch.testing.assert_close(torch.tensor(parameters, dtype=torch.float64), expected, rtol=1e-12, atol=1e-12)


def _passed_over() -> list[float]:
    critic, generator = network(3, 1), network(2, 3)
    fully_shard(critic)
    fully_shard(generator)
    judge = ice.Optimizer(sgd(critic), name="critic", accumulation_steps=2)
    draw = ice.Optimizer(sgd(generator), name="generator", accumulation_steps=2)

    def train_step(engine: Engine, batch: torch.Tensor) -> None:
        weight = 0 if dist.get_rank() == 1 and engine.state.iteration == 2 else len(batch)
        draw.backward(generators_loss(critic, generator, batch), weight=weight)  # where the critic is to reduce, too
        judge.backward(critics_loss(critic, generator, batch), weight=len(batch))

    trainer = Engine(train_step)
    judge.attach(trainer, model=critic)
    draw.attach(trainer, model=generator)
    trainer.run(batches(dist.get_rank())[:2])
    return whole(critic, generator)


def test_a_loss_that_weighs_nothing_leaves_another_optimizers_window_alone():
    critic, generator = models = network(3, 1), network(2, 3)
    full = [batches(rank)[i] for rank in range(RANKS) for i in range(2)]
    for model, loss, window in ((critic, critics_loss, full), (generator, generators_loss, full[:3])):
        gradients = torch.autograd.grad(loss(*models, torch.cat(window)), list(model.parameters()))
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
    for model in models:
        sgd(model).step()
    expected = torch.cat([p.detach().flatten() for model in models for p in model.parameters()])
    for parameters in launch(_passed_over, RANKS):
        torch.testing.assert_close(torch.tensor(parameters, dtype=torch.float64), expected, rtol=1e-12, atol=1e-12)


def _weighs_nothing(sync: Any, empty: float | None) -> list[float]:
    model = network(3, 1)
    for layer in (model[0], model[2]):
        fully_shard(layer)  # gathers its parameters in the backward pass once more
    fully_shard(model)
    optimizer = ice.Optimizer(sgd(model), accumulation_steps=2)

    def train_step(engine: Engine, batch: torch.Tensor) -> None:
        if dist.get_rank() == 1 and engine.state.iteration == 1:
            optimizer.backward(model(batch if empty is None else batch * empty).square().mean(), weight=0)
        elif engine.state.iteration == 3:
            optimizer.backward(torch.zeros(()), weight=0)  # on all ranks, past the model
        elif engine.state.iteration == 4 and dist.get_rank() == 0:
            optimizer.backward(model(batch).square().mean() * (1.0 if empty is None else empty), weight=0)
        else:
            optimizer.backward(model(batch).square().mean(), weight=len(batch))

    trainer = Engine(train_step)
    optimizer.attach(trainer, model=model, sync=sync)
    trainer.run(batches(dist.get_rank())[:4])
    return whole(model)


@pytest.mark.parametrize("sync", ["communication", "memory"])
@pytest.mark.parametrize("empty", [None, math.nan, math.inf])
def test_a_rank_may_weigh_a_loss_with_nothing_inside_a_window(empty, sync):
    """Whatever its gradient, which is NaN where the loss is; and where the window is reduced."""
    expected = by_hand([[batches(0)[0], batches(0)[1], batches(1)[1]], [batches(1)[3]]])
    for parameters in launch(_weighs_nothing, RANKS, sync, empty):
        torch.testing.assert_close(torch.tensor(parameters, dtype=torch.float64), expected, rtol=1e-12, atol=1e-12)


def _left_open(how: str, layers: bool) -> tuple[list[float], list[str]]:
    """End each epoch without the backward that would reduce what the window has accumulated."""
    model = network(3, 1)
    for layer in (model[0], model[2]) if layers else ():
        fully_shard(layer)
    fully_shard(model)
    optimizer = ice.Optimizer(sgd(model), accumulation_steps=3)

    def train_step(engine: Engine, batch: torch.Tensor) -> None:
        if engine.state.iteration % LENGTH or how == "epoch ended":
            optimizer.backward(model(batch).square().mean(), weight=len(batch))
        elif how == "past the model":
            optimizer.backward(torch.zeros((), requires_grad=True), weight=0)

    trainer = Engine(train_step)
    optimizer.attach(trainer, model=model)
    if how == "epoch ended":
        trainer.add_event_handler(Events.ITERATION_COMPLETED(every=LENGTH - 1), trainer.terminate_epoch)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.run(batches(dist.get_rank()), max_epochs=EPOCHS)
    return whole(model), [str(warning.message) for warning in said]


def _left_open_of_two() -> list[float]:
    """As if passed over, with an optimizer for each layer of one model, of which one carries its window on."""
    model = network(3, 1)
    fully_shard(model)
    optimizers = [
        ice.Optimizer(torch.optim.SGD(layer.parameters(), lr=0.5), name=name, accumulation_steps=3, tail=tail)
        for name, layer, tail in (("first", model[0], "step"), ("second", model[2], "carry"))
    ]

    def train_step(engine: Engine, batch: torch.Tensor) -> None:
        if engine.state.iteration % LENGTH:
            loss = model(batch).square().mean()
            for optimizer in optimizers:
                optimizer.backward(loss, retain_graph=optimizer is optimizers[0])

    trainer = Engine(train_step)
    for optimizer in optimizers:
        optimizer.attach(trainer, model=model)
    trainer.run(batches(dist.get_rank()), max_epochs=EPOCHS)
    return whole(model)


def _all_left_open() -> tuple[dict[Any, tuple[list[float], list[str]]], list[float]]:
    ways = [(how, layers) for how in ("passed over", "past the model", "epoch ended") for layers in (False, True)]
    return {way: _left_open(*way) for way in ways}, _left_open_of_two()


@functools.cache
def left_open() -> list[tuple[dict[Any, tuple[list[float], list[str]]], list[float]]]:
    return launch(_all_left_open, RANKS)


def test_a_window_that_no_backward_has_reduced_steps_at_the_epochs_end():
    model = network(3, 1)
    optimizer = sgd(model)
    for _ in range(EPOCHS):
        for micro_batches in (range(3), [3]):
            optimizer.zero_grad()
            model(torch.cat([batches(r)[i] for r in range(RANKS) for i in micro_batches])).square().mean().backward()
            optimizer.step()
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    for ways, _ in left_open():
        for way, (parameters, said) in ways.items():
            assert said == [], way
            found = torch.tensor(parameters, dtype=torch.float64)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, msg=f"{way}")


def test_what_one_optimizer_of_a_model_reduces_at_the_epochs_end_leaves_the_window_of_another_as_it_is():
    model = network(3, 1)
    layers = [list(model[i].parameters()) for i in (0, 2)]
    optimizers = [torch.optim.SGD(parameters, lr=0.5) for parameters in layers]
    # Micro-batches of both epochs, after which the window of each closes.
    ends = [2, 3, 6, 7], [2, 5, 7]
    begun = [0, 0]
    for i in range(EPOCHS * (LENGTH - 1)):
        for rank in range(RANKS):
            (model(batches(rank)[i % (LENGTH - 1)]).square().mean() / RANKS).backward()
        for which, optimizer in enumerate(optimizers):
            if i in ends[which]:
                for parameter in layers[which]:
                    parameter.grad /= i + 1 - begun[which]
                optimizer.step()
                optimizer.zero_grad()
                begun[which] = i + 1
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    for _, parameters in left_open():
        found = torch.tensor(parameters, dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def _stopped_before(sync: Any, unknown: bool) -> list[float]:
    model = network(3, 1)
    fully_shard(model)
    optimizer = ice.Optimizer(sgd(model), accumulation_steps=3)
    trainer = Engine(lambda engine, batch: optimizer.backward(model(batch).square().mean()))
    optimizer.attach(trainer, model=model, sync=sync)
    trainer.add_event_handler(Events.ITERATION_STARTED(once=LENGTH), trainer.terminate)
    data = batches(dist.get_rank())
    trainer.run(Unsized(data) if unknown else data, max_epochs=EPOCHS)
    return whole(model)


@pytest.mark.parametrize(("sync", "unknown"), [("memory", False), ("communication", True), ("communication", False)])
def test_a_stop_of_all_ranks_before_a_micro_batch_that_reduces_steps_with_what_there_is(sync, unknown):
    model = network(3, 1)
    optimizer = sgd(model)
    for micro_batches in (range(3), [3]):
        optimizer.zero_grad()
        model(torch.cat([batches(r)[i] for r in range(RANKS) for i in micro_batches])).square().mean().backward()
        optimizer.step()
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    for parameters in launch(_stopped_before, RANKS, sync, unknown):
        torch.testing.assert_close(torch.tensor(parameters, dtype=torch.float64), expected, rtol=1e-12, atol=1e-12)


def _alone_without(how: str) -> str:
    model = network(3, 1)
    fully_shard(model)
    optimizer = ice.Optimizer(sgd(model), accumulation_steps=2)

    def train_step(engine: Engine, batch: torch.Tensor) -> None:
        if engine.state.iteration != 2 or dist.get_rank() != 1:
            optimizer.backward(model(batch).square().mean(), weight=len(batch))
        elif how == "none":
            model(batch)
        else:
            optimizer.backward(torch.zeros(()), weight=0)

    trainer = Engine(train_step)
    optimizer.attach(trainer, model=model)
    with pytest.raises(RankError) as refused:
        trainer.run(batches(dist.get_rank()))
    return str(refused.value)


@pytest.mark.parametrize(("how", "waits"), [("none", "reduce_scatter"), ("past the model", "all_gather")])
def test_a_rank_that_alone_has_no_loss_is_told_so(how, waits):
    for said in launch(_alone_without, RANKS, how):
        assert f"rank 0 waits in {waits}" in said
        assert (
            "the others are at the end of iteration 2 (epoch 1), without a backward() through the model of opt" in said
        )
        assert "on all ranks or on none, with weight=0 where there is nothing to learn" in said


def _shared() -> list[float]:
    first, second = network(3, 1), network(3, 1)
    fully_shard(first)
    fully_shard(second)
    one, two = ice.Optimizer(sgd(first), name="one"), ice.Optimizer(sgd(second), name="two")

    def train_step(engine: Engine, batch: torch.Tensor) -> None:
        loss = (first(batch) + second(batch)).square().mean()
        one.backward(loss, weight=engine.state.iteration % 2, retain_graph=True)
        two.backward(loss, weight=1)

    trainer = Engine(train_step)
    one.attach(trainer, model=first)
    two.attach(trainer, model=second)
    trainer.run(batches(dist.get_rank()))
    return whole(first, second)


def test_a_shared_loss_that_weighs_nothing_to_the_first_optimizer_keeps_its_graph_for_the_second():
    models = network(3, 1), network(3, 1)
    optimizers = [sgd(model) for model in models]
    for i in range(LENGTH):
        batch = torch.cat([batches(rank)[i] for rank in range(RANKS)])
        for optimizer in optimizers:
            optimizer.zero_grad()
        sum(model(batch) for model in models).square().mean().backward()
        for optimizer in optimizers[i % 2 :]:  # the first one's losses weigh 1, 0, 1, ...
            optimizer.step()
    expected = torch.cat([p.detach().flatten() for model in models for p in model.parameters()])
    for parameters in launch(_shared, RANKS):
        torch.testing.assert_close(torch.tensor(parameters, dtype=torch.float64), expected, rtol=1e-12, atol=1e-12)


def _sparse() -> str:
    model = torch.nn.Sequential(torch.nn.Embedding(7, 3, sparse=True), torch.nn.Linear(3, 1))
    fully_shard(model)
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(AttachError) as refused:
        optimizer.attach(Engine(lambda *_: None), model=model)
    model[0].requires_grad_(False)
    optimizer.attach(Engine(lambda *_: None), model=model)
    return str(refused.value)


def test_sparse_gradients_are_refused_where_torch_could_not_reduce_them():
    """Torch's own error, in the first backward: Could not run 'fsdp::chunk_cat' with ... the 'SparseCPU' backend."""
    assert (
        launch(_sparse, 2) == ["'0' has sparse gradients, which fully_shard cannot reduce; leave out sparse=True"] * 2
    )
