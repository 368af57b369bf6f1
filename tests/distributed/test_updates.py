"""``update()`` on many ranks: a window that closes in the middle of a micro-batch closes on all of them."""

import functools
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import softplus
from torch.nn.parallel import DistributedDataParallel

import ice_engine as ice
from tests.distributed.launch import launch, watch
from tests.unsized import Unsized

pytestmark = pytest.mark.distributed

EVEN = [[3, 2, 4], [1, 5, 2]]
RAGGED = [[3, 2, 4, 2, 1], [1, 5, 2]]


def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(0)
    return torch.nn.Linear(2, 3, dtype=torch.float64), torch.nn.Linear(3, 1, dtype=torch.float64)


def batches(rank: int, sizes: list[list[int]]) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(rank)
    return [torch.randn(n, 5, dtype=torch.float64, generator=draw) for n in sizes[rank]]


def critics(critic: Any, generator: Any, batch: torch.Tensor) -> torch.Tensor:
    noise, real = batch.split([2, 3], dim=1)
    return softplus(-critic(real)).mean() + softplus(critic(generator(noise).detach())).mean()


def generators(critic: Any, generator: Any, batch: torch.Tensor) -> torch.Tensor:
    return softplus(-critic(generator(batch[:, :2]))).mean()


def plain_loop(sizes: list[list[int]], times: int, k: int) -> torch.Tensor:
    """Train both in one process on the data of all ranks: the critic *times* in an iteration, then the generator."""
    generator, critic = models()
    data = [batches(rank, sizes) for rank in range(len(sizes))]
    step_critic = _by_hand(critic, k)
    step_generator = _by_hand(generator, 1)
    for i in range(max(map(len, sizes))):
        now = [each[i] for each in data if i < len(each)]
        for _ in range(times):
            step_critic([(critics(critic, generator, batch), len(batch)) for batch in now])
        step_generator([(generators(critic, generator, batch), len(batch)) for batch in now])
    step_critic(None)
    return flat(generator, critic)


def _by_hand(model: torch.nn.Module, k: int) -> Callable[[list[tuple[torch.Tensor, int]] | None], None]:
    sums = [torch.zeros_like(p) for p in model.parameters()]
    items = parts = 0

    def step(losses: list[tuple[torch.Tensor, int]] | None) -> None:
        """Add a micro-batch of all ranks, or end an epoch."""
        nonlocal items, parts
        for loss, n in losses or ():
            for total, gradient in zip(sums, torch.autograd.grad(loss, [*model.parameters()]), strict=True):
                total.add_(gradient, alpha=n)
            items += n
        parts += losses is not None
        if items and (parts == k or losses is None):
            with torch.no_grad():
                for p, total in zip(model.parameters(), sums, strict=True):
                    p.sub_(total / items, alpha=0.3)
                    total.zero_()
            items = parts = 0

    return step


def flat(*several: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for model in several for p in model.parameters()])


def _gan(sizes: list[list[int]], times: int, k: int, toggled: bool) -> tuple[list[float], list[int], int]:
    generator, critic = (DistributedDataParallel(model) for model in models())
    draw = ice.Optimizer(torch.optim.SGD(generator.parameters(), lr=0.3), name="generator")
    judge = ice.Optimizer(torch.optim.SGD(critic.parameters(), lr=0.3), name="critic", accumulation_steps=k)
    stepped: list[bool] = []

    def train_step(_: Engine, batch: torch.Tensor) -> None:
        for _ in range(times):
            judge.backward(critics(critic, generator, batch), weight=len(batch))
            stepped.append(judge.update())
        if toggled:
            with draw.toggle(critic):
                draw.backward(generators(critic, generator, batch), weight=len(batch))
        else:
            draw.backward(generators(critic, generator, batch), weight=len(batch))

    engine = Engine(train_step)
    draw.attach(engine, model=generator)
    judge.attach(engine, model=critic)
    engine.run(batches(dist.get_rank(), sizes))
    return flat(generator, critic).tolist(), [judge.clocks["step"], draw.clocks["step"]], sum(stepped)


@pytest.mark.parametrize(
    ("sizes", "times", "k", "toggled"),
    [(EVEN, 1, 1, True), (EVEN, 3, 1, False), (EVEN, 2, 4, True), (RAGGED, 1, 1, True), (RAGGED, 2, 3, False)],
)
def test_a_critic_may_step_before_the_generators_loss(sizes, times, k, toggled):
    (first, counts, stepped), (second, others, _) = launch(_gan, 2, sizes, times, k, toggled)

    longest = max(map(len, sizes))
    assert first == second
    assert counts == others == [-(-times * longest // k), longest]
    assert stepped == times * longest // k  # an update() each; what is left over is stepped at the epoch's end
    torch.testing.assert_close(
        torch.tensor(first, dtype=torch.float64), plain_loop(sizes, times, k), rtol=1e-12, atol=1e-14
    )


def _several_steps_a_batch(wrap: Callable[[torch.nn.Module], Any], k: int, passing: bool) -> tuple[list[float], int]:
    model = wrap(models()[1])
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=0.3), accumulation_steps=k)

    def train_step(engine: Engine, batch: torch.Tensor) -> None:
        for i in range(3):
            if not (passing and engine.state.iteration == 2 and i == dist.get_rank()):
                optimizer.backward(softplus(model(batch[:, i : i + 3])).mean(), weight=len(batch))
            optimizer.update()

    engine = Engine(train_step)
    optimizer.attach(engine, model=model)
    engine.run(batches(dist.get_rank(), EVEN), max_epochs=2)
    parameters = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [number for p in parameters for number in p.detach().flatten().tolist()], optimizer.clocks["step"]


@pytest.mark.parametrize(
    ("wrap", "k", "passing"),
    [
        (DistributedDataParallel, 1, False),
        (DistributedDataParallel, 1, True),
        (DistributedDataParallel, 2, True),
        (functools.partial(DistributedDataParallel, gradient_as_bucket_view=True), 2, False),
        (fully_shard, 1, False),
        (fully_shard, 2, False),
    ],
)
def test_one_batch_may_be_several_steps(wrap, k, passing):
    model = models()[1]
    step = _by_hand(model, k)
    data = [batches(rank, EVEN) for rank in range(2)]
    for epoch in range(2):
        for iteration, now in enumerate(zip(*data, strict=True), start=1 + 3 * epoch):
            for i in range(3):
                having = [b for r, b in enumerate(now) if not (passing and iteration == 2 and i == r)]
                step([(softplus(model(batch[:, i : i + 3])).mean(), len(batch)) for batch in having])
        step(None)

    (first, steps), second = launch(_several_steps_a_batch, 2, wrap, k, passing)

    assert (first, steps) == second
    assert steps == 2 * -(-9 // k)
    torch.testing.assert_close(torch.tensor(first, dtype=torch.float64), flat(model), rtol=1e-12, atol=1e-14)


def _at_the_epochs_end(sizes: list[list[int]]) -> tuple[list[float], int]:
    model = DistributedDataParallel(models()[1])
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=0.3))
    engine = Engine(lambda _, batch: batch)
    optimizer.attach(engine, model=model)
    seen: list[torch.Tensor] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: seen.append(engine.state.output))

    @engine.on(Events.EPOCH_COMPLETED)
    def learn() -> None:
        episode = torch.cat(seen)
        seen.clear()
        optimizer.backward(softplus(model(episode[:, :3])).mean(), weight=len(episode))
        assert optimizer.update()

    engine.run(batches(dist.get_rank(), sizes), max_epochs=2)
    return flat(model).tolist(), optimizer.clocks["step"]


@pytest.mark.parametrize("sizes", [EVEN, RAGGED])
def test_an_episode_may_be_learned_where_an_epoch_ends(sizes):
    model = models()[1]
    step = _by_hand(model, 1)
    for _ in range(2):
        episodes = [torch.cat(batches(rank, sizes)) for rank in range(2)]
        step([(softplus(model(episode[:, :3])).mean(), len(episode)) for episode in episodes])

    first, second = launch(_at_the_epochs_end, 2, sizes)

    assert first == second
    assert first[1] == 2
    torch.testing.assert_close(torch.tensor(first[0], dtype=torch.float64), flat(model), rtol=1e-12, atol=1e-14)


def _wherever(
    sizes: list[list[int]], known: bool, k: int, updates: int, losses: int, tail: Any, passed: tuple[int, int]
) -> tuple[list[float], int]:
    model = DistributedDataParallel(models()[1])
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=0.3), accumulation_steps=k, tail=tail)

    def train_step(engine: Engine, batch: torch.Tensor) -> None:
        for i in range(losses):
            if not (dist.get_rank() and (engine.state.iteration, i) == passed):
                optimizer.backward(softplus(model(batch[:, i : i + 3])).mean(), weight=len(batch))
            if i < updates:
                optimizer.update()

    engine = Engine(train_step)
    optimizer.attach(engine, model=model)
    data = batches(dist.get_rank(), sizes)
    engine.run(data if known else Unsized(data), max_epochs=2)
    return flat(model).tolist(), optimizer.clocks["step"]


@pytest.mark.parametrize(
    ("sizes", "known", "k", "updates", "losses", "tail", "passed"),
    [
        (EVEN, False, 3, 1, 1, "step", (1, 0)),
        (EVEN, True, 3, 2, 3, "carry", (1, 0)),
        (EVEN, True, 5, 2, 2, "drop", (3, 1)),
        (RAGGED, True, 3, 1, 2, "carry", (1, 0)),
        (RAGGED, False, 3, 1, 2, "step", (1, 0)),
    ],
)
def test_a_window_closes_where_the_first_rank_has_filled_it(sizes, known, k, updates, losses, tail, passed):
    model = models()[1]
    step = _by_hand(model, k)
    data = [batches(rank, sizes) for rank in range(2)]
    for epoch in range(2):
        for at in range(max(map(len, sizes))):
            for i in range(losses):
                having = [
                    b[at] for r, b in enumerate(data) if at < len(b) and not (r > epoch and (at + 1, i) == passed)
                ]
                step([(softplus(model(batch[:, i : i + 3])).mean(), len(batch)) for batch in having])
        if tail == "drop":
            step = _by_hand(model, k)
        elif tail == "step" or epoch:
            step(None)

    first, second = launch(_wherever, 2, sizes, known, k, updates, losses, tail, passed)

    assert first == second
    torch.testing.assert_close(torch.tensor(first[0], dtype=torch.float64), flat(model), rtol=1e-12, atol=1e-14)


def _scaled_on_one_rank() -> list[float]:
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(20, 20, dtype=torch.float64))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=0.3), clip=ice.clip_norm(0.1), grad_scaler=scaler)

    def train_step(_: Engine, batch: torch.Tensor) -> None:
        if dist.get_rank():
            optimizer.backward(softplus(model(batch)).mean())

    engine = Engine(train_step)
    optimizer.attach(engine, model=model)
    engine.run([torch.randn(4, 20, dtype=torch.float64)])
    return flat(model).tolist()


@pytest.mark.filterwarnings("ignore:.*got no loss")
def test_a_rank_whose_scaler_has_scaled_nothing_yet_steps_as_the_others_to_the_last_bit():
    first, second = launch(_scaled_on_one_rank, 2)
    assert first == second


def _two_updates() -> tuple[Any, ice.Optimizer, Engine]:
    model = DistributedDataParallel(models()[1])
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=0.3), accumulation_steps=2)

    def train_step(_: Engine, batch: torch.Tensor) -> None:
        for _ in range(2):
            optimizer.backward(model(batch).mean())
            optimizer.update()

    engine = Engine(train_step)
    optimizer.attach(engine, model=model)
    return model, optimizer, engine


def _stopped_on_one_rank() -> int:
    engine = _two_updates()[2]
    if dist.get_rank():
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), Engine.terminate)
    engine.run([torch.ones(2, 3, dtype=torch.float64)] * 50)
    return engine.state.iteration


def test_who_stops_among_updates_stops_all_at_the_next_micro_batchs_end():
    assert launch(_stopped_on_one_rank, 2) == [3, 2]


def _taken_away(folder: str) -> tuple[int, list[str]]:
    model, optimizer, engine = _two_updates()
    ice.Checkpoint({"trainer": engine, "model": model, "optimizer": optimizer}, folder).attach(engine)
    data = [torch.ones(2, 3, dtype=torch.float64)] * (3 if dist.get_rank() else 60)
    if not dist.get_rank():
        engine.add_event_handler(Events.ITERATION_STARTED(once=10), lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(ice.Preempted):
        engine.run(data)
    return engine.state.iteration, [file.name for file in Path(folder).iterdir()]


def test_a_signal_saves_and_ends_a_run_that_only_updates_where_its_micro_batch_ends(tmp_path):
    assert launch(_taken_away, 2, str(tmp_path)) == [(10, ["checkpoint_10.pt"]), (3, ["checkpoint_10.pt"])]


def _before_the_first_micro_batch() -> list[float]:
    model = DistributedDataParallel(models()[1])
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=0.3))
    engine = Engine(lambda _, batch: batch)
    optimizer.attach(engine, model=model)

    @engine.on(Events.GET_BATCH_STARTED)
    def learn() -> None:
        if dist.get_rank():
            optimizer.backward(softplus(model(batches(0, EVEN)[0][:, :3])).mean())
        assert optimizer.update()

    with pytest.warns(ice.IceEngineWarning, match="got no loss in epoch 1") if not dist.get_rank() else nullcontext():
        engine.run([0])
    return flat(model).tolist()


def test_before_the_first_micro_batch_one_rank_may_have_a_loss():
    model = models()[1]
    _by_hand(model, 1)([(softplus(model(batches(0, EVEN)[0][:, :3])).mean(), 1)])

    first, second = launch(_before_the_first_micro_batch, 2, timeout=30)

    assert first == second
    torch.testing.assert_close(torch.tensor(first, dtype=torch.float64), flat(model), rtol=1e-12, atol=1e-14)


def _wrongly(how: str) -> None:
    generator, critic = (DistributedDataParallel(model) for model in models())
    draw = ice.Optimizer(torch.optim.SGD(generator.parameters(), lr=0.3), name="generator")
    k = 2 if how == "after a clip by hand" else 1
    judge = ice.Optimizer(torch.optim.SGD(critic.parameters(), lr=0.3), name="critic", accumulation_steps=k)

    def train_step(_: Engine, batch: torch.Tensor) -> None:
        judge.backward(critics(critic, generator, batch), weight=len(batch))
        draw.backward(generators(critic, generator, batch), weight=len(batch))
        if how == "with arguments":
            judge.update(grad_acc_steps=2)
        elif how == "past backward()":
            judge.update()
            softplus(critic(batch[:, :3])).mean().backward()
            judge.update()
        elif how == "after a clip by hand":
            judge.update()
            judge.backward(critics(critic, generator, batch), weight=len(batch))
            torch.nn.utils.clip_grad_norm_(critic.parameters(), 1e-3)
            judge.update()
        elif how == "after detach()":
            judge.update()
            if dist.get_rank():
                judge.detach()
            judge.update()
        elif how == "of different optimizers":
            (judge if dist.get_rank() else draw).update()
        elif dist.get_rank():
            judge.update()

    engine = Engine(train_step)
    judge.attach(engine, model=critic)
    draw.attach(engine, model=generator)
    if how == "outside of a run":
        judge.update()
    engine.run(batches(dist.get_rank(), EVEN))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("with arguments", "update() takes no arguments in many processes"),
        ("past backward()", "gradients that did not come from its backward()"),
        ("after a clip by hand", "gradients of optimizer 'critic' were changed inside its window"),
        ("of different optimizers", "the ranks call update() of different optimizers: 'generator', 'critic'"),
        ("after detach()", "update() is for one process; this is rank 1 of 2"),
        ("on one rank only", "rank 1 calls update(), at iteration 1"),
        ("outside of a run", "update() outside a run"),
    ],
)
def test_an_update_that_is_none_is_refused_on_all_ranks(how, said):
    for outcome in watch(_wrongly, 2, how, timeout=40):
        assert outcome.exitcode == 1
        assert said in outcome.error
