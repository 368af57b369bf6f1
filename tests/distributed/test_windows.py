"""Windows over many ranks: the mean is over the items of all, whatever each rank has; the oracle is one big batch.

Real gloo ranks train a DDP model, or one that is ``fully_shard``'ed, on data that differs from rank to rank in every
way it can: sizes of micro-batches, their number, ranks without any, epochs whose length nobody knows.
"""

import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import ice_engine as ice
from ice_engine.distributed.rounds import WIDTH, Kind, rounds
from ice_engine.errors import NonFiniteGradientError, RankError
from tests.distributed.launch import launch
from tests.unsized import Unsized

pytestmark = pytest.mark.distributed

Batch = tuple[torch.Tensor, torch.Tensor]

# Sizes of micro-batches by rank; a rank beyond the last has those of the one before.
EVEN = [[4] * 12]
RAGGED = [[7, 3, 11, 2, 5, 6, 1, 9], [2, 13, 5, 8, 6, 3, 3, 1]]
SHORT = [[7, 3, 11, 2, 5, 6, 1, 9, 4, 4], [2, 13, 5, 8, 6]]
NONE = [[7, 3, 11, 2, 5], []]
EPOCHS = 2
WORLDS = [2, *(pytest.param(world, marks=pytest.mark.soak) for world in (3, 4))]


def batches(rank: int, sizes: list[list[int]], dtype: torch.dtype = torch.float64) -> list[Batch]:
    generator = torch.Generator().manual_seed(rank)
    own = sizes[min(rank, len(sizes) - 1)]
    return [
        (torch.randn(n, 4, generator=generator, dtype=dtype), torch.randn(n, 1, generator=generator, dtype=dtype))
        for n in own
    ]


def flat(parameters: list[list[float]]) -> torch.Tensor:
    return torch.tensor(list(itertools.chain(*parameters)), dtype=torch.float64)


def network(dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).to(dtype)


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def plain_loop(
    windows: Iterable[Sequence[Batch]], rate: Callable[[int], float] = lambda step: 0.1
) -> list[list[float]]:
    """The parameters after a plain loop, whose step is of one big batch per window, with a *rate* of its own."""
    model = network()
    optimizer = sgd(model)
    for step, window in enumerate(windows):
        optimizer.param_groups[0]["lr"] = rate(step)
        x, y = (torch.cat([batch[i] for batch in window]) for i in (0, 1))
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return [p.flatten().tolist() for p in model.parameters()]


def oracle(
    world: int, sizes: list[list[int]], k: int, tail: str = "step", rate: Callable[[int], float] = lambda step: 0.1
) -> list[list[float]]:
    """A plain loop over windows of the items of all ranks."""
    windows: list[list[Batch]] = []
    data = [batches(rank, sizes) for rank in range(world)]
    carried: list[list[Batch]] = [[] for _ in data]
    for epoch in range(EPOCHS):
        data = [[*over, *own] for over, own in zip(carried, (batches(r, sizes) for r in range(world)), strict=True)]
        carried = [[] for _ in data]
        longest = max(map(len, data))
        for begin in range(0, longest, k):
            window = [own[begin : begin + k] for own in data]
            short = begin + k > longest
            if short and tail == "drop":
                continue
            if short and tail == "carry" and epoch + 1 < EPOCHS:
                carried = window
                continue
            windows.append([batch for own in window for batch in own])
    return plain_loop(windows, rate)


def trained(
    sizes: list[list[int]],
    k: int,
    *,
    tail: Any = "step",
    unknown: bool = False,
    reduction: Any = "mean",
    zeroed: bool = False,
    settings: dict[str, Any] | None = None,
    **ddp: Any,
) -> dict[str, Any]:
    calls = [0]

    def counted(state, bucket):
        calls[0] += 1
        return allreduce_hook(state, bucket)

    model = DistributedDataParallel(network(), **ddp)
    model.register_comm_hook(None, counted)
    optimizer = ice.Optimizer(sgd(model), accumulation_steps=k, tail=tail, loss_reduction=reduction, **(settings or {}))

    def step(engine: Engine, batch: Batch) -> None:
        x, y = batch
        loss = torch.nn.functional.mse_loss(model(x), y, reduction=reduction)
        if zeroed:  # a micro-batch over nothing beside each real one, and first on rank 1
            optimizer.backward(loss * float("nan"), weight=0)
        optimizer.backward(loss, weight=len(x))

    trainer = Engine(step)
    optimizer.attach(trainer, model=model)
    data = batches(dist.get_rank(), sizes)
    trainer.run(Unsized(data) if unknown else data, max_epochs=EPOCHS)
    assert all(p.grad is None for p in model.parameters())
    return {
        "parameters": [p.flatten().tolist() for p in model.module.parameters()],
        "calls": calls[0],
        "step": optimizer.clocks["step"],
        "weight": optimizer.record.weight if optimizer.record else None,
    }


# In epochs of 10 and of 5 micro-batches, windows of 4 close after 4, 8, 10, 14, 18 and 20 of the longer ones.
RATES: dict[str, tuple[Any, Callable[[int], float]]] = {
    "over the run": (ice.schedules.cosine(), lambda step: 0.05 * (1 + math.cos(math.pi * step / 6))),
    "by iteration": (
        ice.schedules.linear(total=40, unit="iteration"),
        lambda step: 0.1 * (1 - ([4, 8, 10, 14, 18, 20][step] - 1) / 40),
    ),
    "by epoch": (ice.schedules.step(step_size=1, unit="epoch"), lambda step: 0.1 if step < 3 else 0.01),
}


def _scheduled(name: str) -> list[list[float]]:
    return trained(SHORT, 4, settings={"processors": [RATES[name][0]]})["parameters"]


@pytest.mark.parametrize("name", RATES)
def test_schedules_go_by_the_longest_epoch(name):
    first, second = launch(_scheduled, 2, name)
    assert first == second
    torch.testing.assert_close(flat(first), flat(oracle(2, SHORT, 4, rate=RATES[name][1])), rtol=1e-12, atol=1e-12)


CASES: dict[str, dict[str, Any]] = {
    "even, k=1": {"sizes": EVEN, "k": 1},
    "even, k=4": {"sizes": EVEN, "k": 4},
    "even, k=5, a tail": {"sizes": EVEN, "k": 5},
    "ragged": {"sizes": RAGGED, "k": 4},
    "ragged, a tail": {"sizes": RAGGED, "k": 3},
    "ragged, summed losses": {"sizes": RAGGED, "k": 3, "reduction": "sum"},
    "unknown length": {"sizes": RAGGED, "k": 3, "unknown": True},
    "a short rank": {"sizes": SHORT, "k": 4},
    "a short rank, k=1": {"sizes": SHORT, "k": 1},
    "a short rank, unknown length": {"sizes": SHORT, "k": 4, "unknown": True},
    "carried": {"sizes": RAGGED, "k": 3, "tail": "carry"},
    "dropped": {"sizes": RAGGED, "k": 3, "tail": "drop"},
    "dropped, a short rank": {"sizes": SHORT, "k": 4, "tail": "drop"},
    "windows longer than the epoch": {"sizes": SHORT, "k": 50},
    "weights of 0": {"sizes": RAGGED, "k": 3, "zeroed": True},
    "gradients as bucket views": {"sizes": SHORT, "k": 4, "gradient_as_bucket_view": True},
    "unused parameters looked for": {"sizes": SHORT, "k": 4, "find_unused_parameters": True},
    "many buckets": {"sizes": SHORT, "k": 3, "bucket_cap_mb": 1e-4},
    "a scaler": {"sizes": SHORT, "k": 4, "settings": {"grad_scaler": "cpu"}},
}


def _all() -> dict[str, dict[str, Any]]:
    found = {}
    for name, case in CASES.items():
        settings = dict(case.get("settings", {}))
        if "grad_scaler" in settings:
            settings["grad_scaler"] = torch.amp.GradScaler("cpu", init_scale=1024.0)
        found[name] = trained(**{**case, "settings": settings})
    return found


@functools.cache
def results(world: int) -> list[dict[str, dict[str, Any]]]:
    try:
        return launch(_all, world)
    except AssertionError as error:
        return [{name: {"failed": str(error)} for name in CASES}]  # once, not once a test


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", CASES)
def test_a_window_is_the_mean_over_the_items_of_all_ranks(name, world):
    case = CASES[name]
    expected = flat(oracle(world, case["sizes"], case["k"], case.get("tail", "step")))
    for rank in results(world):
        found = flat(rank[name]["parameters"])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_agree_bit_for_bit(world):
    for name in CASES:
        assert len({str((rank[name]["parameters"], rank[name]["step"])) for rank in results(world)}) == 1, name


@pytest.mark.parametrize(
    ("name", "calls"),
    [("even, k=1", 12), ("even, k=4", 3), ("even, k=5, a tail", 3), ("ragged, a tail", 3)],
)
def test_gradients_are_reduced_once_a_window_the_tail_included(name, calls):
    assert [rank[name]["calls"] for rank in results(2)] == [EPOCHS * calls] * 2


def test_the_record_weighs_the_window_of_all_ranks():
    assert [rank["even, k=4"]["weight"] for rank in results(2)] == [4 * 4 * 2] * 2


@pytest.mark.soak
def test_a_rank_without_any_data_trains_along():
    for rank in launch(_without_data, 2):
        torch.testing.assert_close(flat(rank), flat(oracle(1, NONE, 2)), rtol=1e-12, atol=1e-12)


def _without_data() -> list[list[float]]:
    return trained(NONE, 2, unknown=True)["parameters"]


def _odd(work: Callable[[DistributedDataParallel, ice.Optimizer, Engine, Batch], None], k: int = 2) -> list[Any]:
    model = DistributedDataParallel(network())
    optimizer = ice.Optimizer(sgd(model), accumulation_steps=k)
    trainer = Engine(lambda engine, batch: work(model, optimizer, engine, batch))
    optimizer.attach(trainer, model=model)
    trainer.run(batches(dist.get_rank(), RAGGED), max_epochs=1)
    return [[p.flatten().tolist() for p in model.module.parameters()], optimizer.clocks]


def learn(model: Any, optimizer: ice.Optimizer, batch: Batch) -> None:
    loss = torch.nn.functional.mse_loss(model(batch[0]), batch[1])
    optimizer.backward(loss, weight=len(batch[0]))


def _passing_over(passed_over: list[set[int]], k: int) -> list[Any]:
    def work(model: Any, optimizer: ice.Optimizer, engine: Engine, batch: Batch) -> None:
        if engine.state.iteration not in passed_over[dist.get_rank()]:  # else one that turned out to be unusable
            learn(model, optimizer, batch)

    return _odd(work, k)


@pytest.mark.parametrize(
    ("passed_over", "k", "windows"),
    [
        # Rank 1 has nothing at 2, 4 and 5: windows close all the same, where the first rank's is full.
        ([set(), {2, 4, 5}], 2, [([0, 1], [0]), ([2, 3], [2]), ([4, 5], [5]), ([6, 7], [6, 7])]),
        # At 3, where the first may close, both have nothing, and rank 0 has had nothing before.
        ([{1, 2, 3}, {3}], 3, [([3], [0, 1, 3]), ([4, 5, 6], [4, 5, 6]), ([7], [7])]),
        ([{1, 4}, {1, 4}], 1, [([i], [i]) for i in (1, 2, 4, 5, 6, 7)]),
    ],
)
def test_a_rank_may_pass_over_a_micro_batch(passed_over, k, windows):
    (first, clocks), (second, _) = launch(_passing_over, 2, passed_over, k)
    data = [batches(rank, RAGGED) for rank in range(2)]
    expected = plain_loop([data[rank][i] for rank in range(2) for i in window[rank]] for window in windows)
    assert first == second
    assert clocks["step"] == len(windows)
    torch.testing.assert_close(flat(first), flat(expected), rtol=1e-12, atol=1e-12)


def _one_loss_more(view: bool) -> list[list[float]]:
    model = DistributedDataParallel(network(), gradient_as_bucket_view=view)
    optimizer = ice.Optimizer(sgd(model))

    def step(engine: Engine, batch: Batch) -> None:
        for _ in range(1 + dist.get_rank()):  # each with a forward of its own
            optimizer.backward(torch.nn.functional.mse_loss(model(batch[0]), batch[1]))

    trainer = Engine(step)
    optimizer.attach(trainer, model=model)
    trainer.run(batches(dist.get_rank(), EVEN)[:3])
    return [p.flatten().tolist() for p in model.module.parameters()]


@pytest.mark.parametrize("view", [False, True])
def test_a_rank_may_have_one_loss_more_with_a_forward_of_its_own(view):
    model = network()
    optimizer = sgd(model)
    for i in range(3):
        optimizer.zero_grad()
        for rank in range(2):
            x, y = batches(rank, EVEN)[i]
            ((1 + rank) * torch.nn.functional.mse_loss(model(x), y) / 2).backward()
        optimizer.step()
    expected = flat([p.flatten().tolist() for p in model.parameters()])
    for found in launch(_one_loss_more, 2, view):
        torch.testing.assert_close(flat(found), expected, rtol=1e-12, atol=1e-12)


def _two_models(orders: list[list[str]]) -> list[list[float]]:
    """In each micro-batch a rank has the losses that *orders* name, by number of the micro-batch and rank, in order."""
    models = {name: DistributedDataParallel(network()) for name in "ab"}
    optimizers = {name: ice.Optimizer(sgd(model), name=name) for name, model in models.items()}

    def step(engine: Engine, batch: Batch) -> None:
        for name in orders[engine.state.iteration - 1][dist.get_rank()]:
            loss = torch.nn.functional.mse_loss(models[name](batch[0]), batch[1])
            optimizers[name].backward(loss * (1.0 if name == "a" else 10.0), weight=len(batch[0]))

    trainer = Engine(step)
    for name, model in models.items():
        optimizers[name].attach(trainer, model=model)
    trainer.run(batches(dist.get_rank(), EVEN)[: len(orders)])
    return [p.flatten().tolist() for model in models.values() for p in model.parameters()]


@pytest.mark.parametrize(
    "orders",
    [
        [["ba", "ba"], ["ba", ""], ["ba", "ba"]],  # attached in another order than trained
        [["ab", "ab"], ["ab", "b"], ["ab", "ab"]],
        [["ab", "ab"], ["b", "ab"], ["ba", "ab"], ["", "b"], ["ab", "ba"]],
        [["ab", "b"], ["ab", "ab"]],  # with the first losses of all
        [["ab", "aab"], ["abb", "ba"], ["ab", "baa"]],
    ],
)
def test_ranks_may_have_losses_of_different_models(orders):
    expected = []
    for name, factor in (("a", 1.0), ("b", 10.0)):
        model = network()
        optimizer = sgd(model)
        for i, of_ranks in enumerate(orders):
            having = [rank for rank in range(2) for each in of_ranks[rank] if each == name]
            if not having:
                continue
            x, y = (torch.cat([batches(rank, EVEN)[i][j] for rank in having]) for j in (0, 1))
            optimizer.zero_grad()
            (factor * torch.nn.functional.mse_loss(model(x), y)).backward()
            optimizer.step()
        expected += [p.flatten().tolist() for p in model.parameters()]
    first, second = launch(_two_models, 2, orders)
    assert first == second
    torch.testing.assert_close(flat(first), flat(expected), rtol=1e-12, atol=1e-12)


def _one_scaler_for_two(tail: Any) -> tuple[float, list[list[float]]]:
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2)
    models = [DistributedDataParallel(network()) for _ in range(2)]
    first, second = (
        ice.Optimizer(sgd(model), name=name, accumulation_steps=k, grad_scaler=scaler, tail=tail)
        for model, name, k in zip(models, ("first", "second"), (4, 1), strict=True)
    )

    def step(engine: Engine, batch: Batch) -> None:
        learn(models[0], first, batch)
        learn(models[1], second, batch)

    trainer = Engine(step)
    first.attach(trainer, model=models[0])
    second.attach(trainer, model=models[1])
    trainer.run(batches(dist.get_rank(), [[4] * 6, [4] * 2]), max_epochs=4)
    return scaler.get_scale(), [p.flatten().tolist() for model in models for p in model.parameters()]


@pytest.mark.parametrize("tail", ["step", "drop"])
def test_a_shared_scaler_adapts_where_no_window_is_open_on_any_rank(tail):
    found = launch(_one_scaler_for_two, 2, tail)
    assert found[0] == found[1]
    # After 4 and 6 of each epoch's 6 micro-batches no window is open: 8 rounds, and each second one doubles the scale.
    assert found[0][0] == 16.0 * 2**4


def _with_default_device() -> int:
    model = DistributedDataParallel(network())
    data = batches(dist.get_rank(), SHORT)
    optimizer = ice.Optimizer(sgd(model), accumulation_steps=4)
    trainer = Engine(lambda engine, batch: learn(model, optimizer, batch))
    with torch.device("meta"):  # stands for a GPU, which gloo cannot send from
        rounds()
    optimizer.attach(trainer, model=model)  # where Ignite asks what meta cannot answer
    with torch.device("meta"):
        trainer.run(data, max_epochs=1)
        optimizer.state_dict()
    return optimizer.clocks["step"]


def test_ranks_talk_on_the_cpu_whatever_the_default_device():
    assert launch(_with_default_device, 2) == [3, 3]


def _nan_on_one_rank() -> list[Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    skipped: list[str] = []
    model = DistributedDataParallel(network())
    optimizer = ice.Optimizer(sgd(model), accumulation_steps=2, grad_scaler=scaler, clip=ice.clip_norm(1.0))

    def step(engine: Engine, batch: Batch) -> None:
        loss = torch.nn.functional.mse_loss(model(batch[0]), batch[1])
        bad = dist.get_rank() == 1 and engine.state.iteration == 3
        optimizer.backward(loss * float("nan") if bad else loss, weight=len(batch[0]))

    trainer = Engine(step)
    optimizer.attach(trainer, model=model)
    trainer.add_event_handler(optimizer.event("STEP_SKIPPED"), lambda: skipped.append(optimizer.record.skipped))
    trainer.run(batches(dist.get_rank(), RAGGED), max_epochs=1)
    return [optimizer.clocks, scaler.get_scale(), skipped, [p.flatten().tolist() for p in model.parameters()]]


def test_a_nan_on_one_rank_is_skipped_on_all_and_names_the_rank():
    found = launch(_nan_on_one_rank, 2)
    assert found[0] == found[1]
    clocks, scale, (reason,), _ = found[0]
    assert (clocks["step"], clocks["skipped"], scale) == (3, 1, 512.0)
    assert "rank 1: the loss of micro-batch 1 of its window was not finite" in reason


def _nan_that_raises() -> str:
    model, factor = DistributedDataParallel(network()), math.nan if dist.get_rank() else 1.0
    optimizer = ice.Optimizer(sgd(model), nonfinite="raise", clip=ice.clip_norm(1.0))
    trainer = Engine(lambda _, batch: optimizer.backward(model(batch[0]).sum() * factor))
    optimizer.attach(trainer, model=model)
    with pytest.raises(NonFiniteGradientError) as caught:
        trainer.run(batches(dist.get_rank(), RAGGED), max_epochs=1)
    return str(caught.value)


def test_the_rank_that_reports_a_nan_is_not_taken_for_the_one_that_had_it():
    for rank, said in enumerate(launch(_nan_that_raises, 2)):
        assert "; rank 1: the loss of micro-batch 1 of its window was not finite (optimizer" in said
        assert f", reported by rank {rank})" in said


def bad(*_: Any) -> None:
    message = "a bad batch"
    raise ValueError(message)


def _buffers(without: str) -> Any:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    model = DistributedDataParallel(layers)
    optimizer = ice.Optimizer(sgd(model), accumulation_steps=2)
    alone = dist.get_rank() == 1

    def step(engine: Engine, batch: Batch) -> None:
        if alone and engine.state.iteration == 4 and without == "passes over":
            return
        if alone and engine.state.iteration == 4 and without == "raises before it":
            bad()
        if alone and engine.state.iteration == 4 and without == "raises in it":
            layers.register_forward_pre_hook(bad)
        optimizer.backward(model(batch[0]).square().mean() + model.module[0].weight.sum(), weight=len(batch[0]))

    trainer = Engine(step)
    optimizer.attach(trainer, model=model)
    if alone and without == "stops":
        trainer.add_event_handler(Events.ITERATION_STARTED(once=4), trainer.terminate)
    sizes = [[4, 5, 6, 7, 8, 9], [3, 4, 5] if without == "has less" else [3, 4, 5, 6, 7, 8]]
    try:
        trainer.run(batches(dist.get_rank(), sizes, torch.float32), max_epochs=EPOCHS)
    except (ValueError, RankError) as error:
        return str(error)
    return [[t.flatten().tolist() for t in [*model.parameters(), *model.buffers()]], optimizer.clocks["step"]]


@pytest.mark.parametrize(
    ("without", "steps"), [pytest.param("has less", 6, marks=pytest.mark.soak), ("passes over", 6), ("stops", 3)]
)
def test_buffers_are_no_reason_to_hang_where_a_rank_has_no_forward(without, steps):
    # Rank 0 has a fifth micro-batch before it hears of the stop, which the end of the run steps.
    first, second = launch(_buffers, 2, without, timeout=30)
    assert first[1] == second[1] == steps
    assert first[0] == second[0]


@pytest.mark.parametrize("without", ["raises before it", "raises in it"])
def test_who_raises_with_or_without_a_forward_of_buffers_is_named(without):
    assert launch(_buffers, 2, without, timeout=30) == ["rank 1 raised ValueError: a bad batch", "a bad batch"]


def _first_loss(without: str, weighted: bool) -> Any:
    model = DistributedDataParallel(network())
    optimizer = ice.Optimizer(sgd(model))

    def step(engine: Engine, batch: Batch) -> None:
        if dist.get_rank() == 1 and engine.state.iteration == 1:
            if without == "raises":
                bad()
            return
        loss = torch.nn.functional.mse_loss(model(batch[0]), batch[1])
        optimizer.backward(loss, weight=len(batch[0]) if weighted else None)

    trainer = Engine(step)
    optimizer.attach(trainer, model=model)
    try:
        trainer.run(batches(dist.get_rank(), EVEN), max_epochs=1)
    except (ValueError, RankError) as error:
        return str(error)
    return [[p.flatten().tolist() for p in model.parameters()], optimizer.clocks["step"]]


@pytest.mark.parametrize("weighted", [True, False])
def test_a_rank_may_lack_the_first_loss_of_a_run(weighted):
    # The others tell in it how losses are weighed, before they reduce.
    first, second = launch(_first_loss, 2, "passes over", weighted, timeout=30)
    assert first == second
    assert first[1] == len(EVEN[0])
    told = launch(_first_loss, 2, "raises", weighted, timeout=30)
    assert told == ["rank 1 raised ValueError: a bad batch", "a bad batch"]


def _two_optimizers() -> list[Any]:
    """Each on a model of its own, stepped at its own pace; the second in every other iteration only."""
    models = [DistributedDataParallel(network()) for _ in "ab"]
    a, b = (ice.Optimizer(sgd(m), name=n, accumulation_steps=k) for m, n, k in zip(models, "ab", (1, 2), strict=True))

    def step(engine: Engine, batch: Batch) -> None:
        learn(models[0], a, batch)
        if engine.state.iteration % 2 == 0:
            learn(models[1], b, batch)

    trainer = Engine(step)
    a.attach(trainer, model=models[0])
    b.attach(trainer, model=models[1])
    trainer.run(batches(dist.get_rank(), RAGGED), max_epochs=1)
    return [[p.flatten().tolist() for p in m.module.parameters()] for m in models]


@pytest.mark.soak
def test_two_optimizers_each_have_windows_of_their_own():
    first, second = launch(_two_optimizers, 2)
    assert first == second
    data = [batches(rank, RAGGED) for rank in range(2)]
    for found, windows in zip(first, ([[i] for i in range(8)], [[1, 3], [5, 7]]), strict=True):
        expected = plain_loop([own[i] for own in data for i in window] for window in windows)
        torch.testing.assert_close(flat(found), flat(expected), rtol=1e-12, atol=1e-12)


UNWEIGHTED = {"SGD": sgd, "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)}


def _unweighted() -> list[Any]:
    found = []
    for (name, made), k, clipped, unknown in itertools.product(
        UNWEIGHTED.items(), (1, 3), (False, True), (False, True)
    ):
        model = DistributedDataParallel(network())
        clip = ice.clip_norm(0.1) if clipped else None
        optimizer = ice.Optimizer(made(model), accumulation_steps=k, clip=clip)

        def step(_: Engine, batch: Batch, model: Any = model, optimizer: ice.Optimizer = optimizer) -> None:
            optimizer.backward(torch.nn.functional.mse_loss(model(batch[0]), batch[1]))

        trainer = Engine(step)
        optimizer.attach(trainer, model=model)
        data = batches(dist.get_rank(), SHORT)
        trainer.run(Unsized(data) if unknown else data, max_epochs=EPOCHS)
        found.append((name, k, clipped, [p.flatten().tolist() for p in model.module.parameters()]))
    return found


def test_without_weights_every_micro_batch_weighs_the_same_also_where_ranks_have_different_numbers_of_them():
    first, second = launch(_unweighted, 2)
    assert first == second
    data = [batches(rank, SHORT) for rank in range(2)]
    for name, k, clipped, parameters in first:
        model = network()
        optimizer = UNWEIGHTED[name](model)
        for begin in [*range(0, 10, k)] * EPOCHS:
            window = [batch for own in data for batch in own[begin : begin + k]]
            optimizer.zero_grad()
            (sum(torch.nn.functional.mse_loss(model(x), y) for x, y in window) / len(window)).backward()
            if clipped:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        expected = torch.cat([p.detach().flatten() for p in model.parameters()])
        torch.testing.assert_close(flat(parameters), expected, rtol=1e-10, atol=1e-10)


def _first_reduced_late() -> int:
    model = DistributedDataParallel(network())
    optimizer = ice.Optimizer(sgd(model), accumulation_steps=2)
    trainer = Engine(lambda _, batch: learn(model, optimizer, batch))
    optimizer.attach(trainer, model=model)
    if dist.get_rank() == 1:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda: trainer.terminate_epoch())
    trainer.run(batches(dist.get_rank(), [[4] * 6, [4] * 2]), max_epochs=2)
    return optimizer.clocks["step"]


def test_buckets_are_made_where_all_ranks_are_when_the_first_windows_were_not_reduced_by_ddp():
    # In the first epoch, rank 1 has one micro-batch: DDP reduces for the first time in the second one.
    assert launch(_first_reduced_late, 2, timeout=30) == [6, 6]


def _stopped(how: str) -> Any:
    said: list[str] = []
    logging.getLogger("ice_engine.peers").addFilter(lambda record: said.append(record.getMessage()) or True)
    model = DistributedDataParallel(network())
    optimizer = ice.Optimizer(sgd(model), accumulation_steps=3)
    trainer = Engine(lambda _, batch: learn(model, optimizer, batch))
    optimizer.attach(trainer, model=model)
    if dist.get_rank() == 1:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=4), lambda: getattr(trainer, how)())
    trainer.run(batches(dist.get_rank(), RAGGED), max_epochs=EPOCHS)
    parameters = [p.flatten().tolist() for p in model.module.parameters()]
    return [parameters, said, optimizer.clocks["step"], trainer.state.epoch]


@pytest.mark.soak
def test_terminate_on_one_rank_stops_all_and_loses_no_micro_batch():
    (first, said, *rest), (second, quiet, *others) = launch(_stopped, 2, "terminate")
    assert first == second
    assert rest == others == [2, 1]
    assert said == ["rank 1 ended the run in epoch 1, as by terminate(), and so do all"]
    assert quiet == []
    data = [batches(rank, RAGGED) for rank in range(2)]
    windows = [*data[0][:3], *data[1][:3]], [*data[0][3:5], *data[1][3:4]]  # rank 0 was in its window's second
    torch.testing.assert_close(flat(first), flat(plain_loop(windows)), rtol=1e-12, atol=1e-12)


def _stopped_in_the_last() -> list[int]:
    model = DistributedDataParallel(network())
    optimizer = ice.Optimizer(sgd(model))
    trainer = Engine(lambda _, batch: learn(model, optimizer, batch))
    optimizer.attach(trainer, model=model)
    completed: list[int] = []
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: completed.append(engine.state.epoch))
    if dist.get_rank() == 1:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=16), lambda: trainer.terminate())
    trainer.run(batches(dist.get_rank(), RAGGED), max_epochs=3)
    return [*completed, optimizer.clocks["step"]]


def test_a_stop_in_an_epochs_last_micro_batch_completes_the_epoch_on_no_rank():
    # Else a validation on some ranks would wait for the others, by a handler that was added after attach(), too.
    assert launch(_stopped_in_the_last, 2, timeout=30) == [[1, 16], [1, 16]]


@pytest.mark.soak
def test_terminate_epoch_on_one_rank_ends_its_data_only():
    (first, said, *rest), (second, quiet, *others) = launch(_stopped, 2, "terminate_epoch")
    assert first == second
    assert said == quiet == []
    assert rest == others == [6, 2]


def _fully_sharded_step(_: Engine, batch: Batch, model: Any, optimizer: ice.Optimizer) -> None:
    learn(model, optimizer, batch)


def _fully_sharded() -> dict[str, Any]:
    cases = {
        "even": (EVEN, 4, False, "communication", False),
        "ragged, a tail": (RAGGED, 3, False, "communication", False),
        "every micro-batch": (RAGGED, 3, False, "memory", False),
        "unknown length": (RAGGED, 3, True, "communication", False),
        "clipped and scaled": (RAGGED, 3, False, "communication", True),
    }
    found: dict[str, Any] = {}
    for name, (sizes, k, unknown, sync, scaled) in cases.items():
        model = network()
        for layer in (model[0], model[2]):
            fully_shard(layer)
        fully_shard(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if scaled else None
        clip = ice.clip_norm(1e9) if scaled else None
        optimizer = ice.Optimizer(sgd(model), accumulation_steps=k, clip=clip, grad_scaler=scaler)
        trainer = Engine(functools.partial(_fully_sharded_step, model=model, optimizer=optimizer))
        optimizer.attach(trainer, model=model, sync=sync)
        data = batches(dist.get_rank(), sizes)
        trainer.run(Unsized(data) if unknown else data, max_epochs=EPOCHS)
        parameters = [p.full_tensor().flatten().tolist() for p in model.parameters()]
        found[name] = (sizes, k, parameters, optimizer.clocks["step"])
    return found


def test_a_fully_sharded_model_takes_the_same_steps():
    for rank in launch(_fully_sharded, 2):
        assert len(rank) == 5
        for name, (sizes, k, parameters, step) in rank.items():
            assert step == EPOCHS * -(-len(sizes[0]) // k), name
            torch.testing.assert_close(flat(parameters), flat(oracle(2, sizes, k)), rtol=1e-12, atol=1e-12)


def _uneven() -> str:
    said = []
    for loader in (list, Unsized):
        model = network()
        fully_shard(model)
        optimizer = ice.Optimizer(sgd(model), accumulation_steps=3)
        trainer = Engine(functools.partial(_fully_sharded_step, model=model, optimizer=optimizer))
        optimizer.attach(trainer, model=model)
        with pytest.raises(RankError) as refused:
            trainer.run(loader(batches(dist.get_rank(), SHORT)), max_epochs=1)
        said.append(str(refused.value))
    return "; ".join(said)


@pytest.mark.soak
def test_a_fully_sharded_model_and_uneven_data_are_refused_on_all_ranks():
    for said in launch(_uneven, 2):
        assert "epoch_length differs: 10 on rank 0, 5 on rank 1" in said
        assert "rank 1 is at the end of its data in epoch 1, others are not" in said


def _fully_sharded_stopped(who: set[int]) -> list[Any]:
    model = network()
    fully_shard(model)
    optimizer = ice.Optimizer(sgd(model), accumulation_steps=3)
    trainer = Engine(lambda _, batch: learn(model, optimizer, batch))
    optimizer.attach(trainer, model=model)
    if dist.get_rank() in who:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=5), trainer.terminate)
    trainer.run(batches(dist.get_rank(), RAGGED))
    return [optimizer.clocks["step"], [p.full_tensor().flatten().tolist() for p in model.parameters()]]


@pytest.mark.parametrize("who", [{1}, pytest.param({0, 1}, marks=pytest.mark.soak)])
def test_a_stop_inside_a_window_of_a_fully_sharded_model_steps_with_what_there_is(who):
    data = [batches(rank, RAGGED) for rank in range(2)]
    expected = plain_loop([[batch for own in data for batch in own[begin:end]] for begin, end in ((0, 3), (3, 5))])
    for step, parameters in launch(_fully_sharded_stopped, 2, who):
        assert step == 2
        torch.testing.assert_close(flat(parameters), flat(expected), rtol=1e-12, atol=1e-12)


def _three(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (model(x) - torch.cat([y, -y, 2 * y], 1)).square().mean(0)


def _several_losses() -> list[list[float]]:
    """One rank differentiates three losses, one after the other, where the other has their sum; in turn."""
    model = DistributedDataParallel(network())
    optimizer = ice.Optimizer(sgd(model), accumulation_steps=2)

    def step(engine: Engine, batch: Batch) -> None:
        losses = _three(model, *batch)
        apart = dist.get_rank() == engine.state.iteration // 2 % 2
        for loss in losses if apart else [losses.sum()]:
            optimizer.backward(loss, retain_graph=apart)

    engine = Engine(step)
    optimizer.attach(engine, model=model)
    engine.run(batches(dist.get_rank(), EVEN))
    return [p.flatten().tolist() for p in model.parameters()]


def test_a_rank_may_have_more_losses_than_another_in_the_micro_batch_that_reduces():
    model = network()
    optimizer = sgd(model)
    data = [*zip(batches(0, EVEN), batches(1, EVEN), strict=True)]
    for window in zip(data[::2], data[1::2], strict=True):
        x, y = (torch.cat([rank[i] for both in window for rank in both]) for i in (0, 1))
        optimizer.zero_grad()
        _three(model, x, y).sum().backward()
        optimizer.step()
    expected = flat([p.flatten().tolist() for p in model.parameters()])
    for found in launch(_several_losses, 2, timeout=40):
        torch.testing.assert_close(flat(found), expected, rtol=1e-10, atol=1e-12)


def _gradients_inside_windows(resumed: bool) -> list[Any]:
    """Return the gradient inside of the second window, of a run that goes on or one that was saved before it."""
    state: list[Any] = []
    found: list[Any] = []
    data = [batch for n in (4, 4, 2, 4) for batch in batches(dist.get_rank(), [[n]])]
    for part in (data[:2], data[2:]) if resumed else (data,):
        model = DistributedDataParallel(network())
        optimizer = ice.Optimizer(sgd(model), accumulation_steps=2)
        trainer = ice.create_trainer(model, optimizer, torch.nn.functional.mse_loss)
        if state:
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])

        third = 3 if not resumed else 1 if state else 0

        @trainer.on(Events.ITERATION_COMPLETED(once=third) if third else Events.STARTED)
        def look(engine: Engine, model: Any = model) -> None:
            found.extend(p.grad.tolist() for p in model.parameters() if engine.state.iteration)

        trainer.run(part, max_epochs=1)
        states = [optimizer.state_dict(rank) for rank in range(dist.get_world_size())]
        state = [model.state_dict(), states[dist.get_rank()]]
    return found


def test_a_resumed_run_scales_losses_as_the_one_it_goes_on_from():
    """Else the first loss after it would decide: of an epoch's short last batch, fp16 overflows elsewhere."""
    for whole, resumed in zip(
        launch(_gradients_inside_windows, 2, False), launch(_gradients_inside_windows, 2, True), strict=True
    ):
        assert whole
        assert whole == resumed


def _too_long() -> list[list[float]]:
    with pytest.raises(ValueError, match="lvalue and rvalue"):
        rounds().exchange(Kind.GATE, [1.0] * WIDTH)
    return [row[:3] for row in rounds().exchange(Kind.GATE, [dist.get_rank(), 7.0])]


def test_a_row_that_is_too_long_raises_before_it_is_sent():
    assert launch(_too_long, 2) == [[[Kind.GATE, 0.0, 7.0], [Kind.GATE, 1.0, 7.0]]] * 2


def _nan_and_a_stop() -> tuple[int, list[list[float]]]:
    model = DistributedDataParallel(network())
    optimizer = ice.Optimizer(sgd(model), accumulation_steps=4)

    def step(engine: Engine, batch: Batch) -> None:
        loss = torch.nn.functional.mse_loss(model(batch[0]), batch[1])
        bad = engine.state.iteration == 6 and dist.get_rank() == 1
        optimizer.backward(loss * float("nan") if bad else loss, weight=len(batch[0]))
        if bad:
            engine.terminate()

    trainer = Engine(step)
    optimizer.attach(trainer, model=model)
    trainer.run(batches(dist.get_rank(), EVEN))
    return optimizer.clocks["step"], [p.flatten().tolist() for p in model.module.parameters()]


def test_a_run_that_a_rank_ends_for_a_nan_steps_on_none_with_it():
    expected = plain_loop([[batches(rank, EVEN)[i] for rank in range(2) for i in range(4)]])
    for step, parameters in launch(_nan_and_a_stop, 2):
        assert step == 1
        torch.testing.assert_close(flat(parameters), flat(expected), rtol=1e-12, atol=1e-12)
