"""Several optimizers and losses in one micro-batch, not the same on each rank; by definition, each mean is over all.

Each program says which losses a rank has in an iteration. Real gloo ranks differentiate them with the optimizers; one
process does so without any, by ``torch.autograd.grad`` of each loss for the parameters of its optimizer alone.
"""

import abc
import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch import nn
from torch.nn.functional import mse_loss, softplus
from torch.nn.parallel import DistributedDataParallel

import ice_engine as ice
from tests.distributed.launch import launch, watch

pytestmark = pytest.mark.distributed

EVEN = [[3, 2, 4, 5], [6, 5, 2, 3]]
RAGGED = [[7, 5, 2], [3, 2, 4, 2, 6]]
SETTINGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}

Models = dict[str, Any]
Losses = Iterable[tuple[str, torch.Tensor, int]]


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.one, self.two = nn.Linear(6, 4), nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        body = self.body(x).tanh()
        return self.one(body), self.two(body)


class Branches(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(inputs, outputs) for _ in range(2))

    def forward(self, x: torch.Tensor, branch: int) -> torch.Tensor:
        return self.branches[branch](x)


class Program(abc.ABC):
    """Models, the parts of them that each optimizer has, and the losses of a rank in an iteration, from 1."""

    windows: ClassVar[dict[str, int]] = {"all": 1}
    tail: Any = "step"

    def models(self) -> Models:
        return {"all": Branches(6, 2)}

    def parts(self, models: Models) -> dict[str, tuple[str, nn.Module]]:
        return {name: (name, model) for name, model in models.items()}

    @abc.abstractmethod
    def losses(self, models: Models, x: torch.Tensor, rank: int, iteration: int) -> Losses:
        """Yield each with its optimizer and its weight."""

    def trained(self, sizes: list[list[int]], **ddp: Any) -> dict[str, list[float]]:
        """Train on this rank, wrapped."""
        plain = _made(self)
        models = {name: DistributedDataParallel(model, **ddp) for name, model in plain.items()}
        optimizers = {
            name: ice.Optimizer(
                torch.optim.SGD(part.parameters(), **SETTINGS),
                name=name,
                accumulation_steps=self.windows[name],
                tail=self.tail,
            )
            for name, (_, part) in self.parts(plain).items()
        }

        def step(engine: Engine, x: torch.Tensor) -> None:
            for name, loss, n in self.losses(models, x, dist.get_rank(), engine.state.iteration):
                optimizers[name].backward(loss, weight=n, retain_graph=True)

        engine = Engine(step)
        for name, (model, _) in self.parts(plain).items():
            optimizers[name].attach(engine, model=models[model])
        engine.run(_batches(dist.get_rank(), sizes), max_epochs=2)
        return _numbers(plain)

    def expected(self, sizes: list[list[int]]) -> dict[str, list[float]]:
        """Train in one process on the data of all ranks, each with a copy of the models."""
        first = _made(self)
        copies = [first, *(copy.deepcopy(first) for _ in sizes[1:])]
        parts = [self.parts(models) for models in copies]
        steps = {name: _by_hand([p[name][1] for p in parts], k) for name, k in self.windows.items()}
        data = [_batches(rank, sizes) for rank in range(len(sizes))]
        iterations = [0] * len(sizes)
        for _ in range(2):
            for i in range(max(map(len, data))):
                found: dict[str, list[list[Any]]] = {name: [[] for _ in sizes] for name in steps}
                for rank, own in enumerate(data):
                    if i < len(own):
                        iterations[rank] += 1
                        for name, loss, n in self.losses(copies[rank], own[i], rank, iterations[rank]):
                            found[name][rank].append((loss, n))
                for name, step in steps.items():
                    step(found[name], "losses")
                for step in steps.values():
                    step([], "micro-batch")
            for step in steps.values():
                step([], self.tail)
        return _numbers(first)


def _made(program: Program) -> Models:
    torch.manual_seed(0)
    return {name: model.double() for name, model in program.models().items()}


def _batches(rank: int, sizes: list[list[int]]) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(rank)
    return [torch.randn(n, 6, dtype=torch.float64, generator=draw) for n in sizes[rank]]


def _numbers(models: Models) -> dict[str, list[float]]:
    return {f"{name}.{n}": p.flatten().tolist() for name, model in models.items() for n, p in model.named_parameters()}


def _by_hand(copies: list[nn.Module], k: int) -> Callable[[list[list[Any]], str], None]:
    of_ranks = [[*model.parameters()] for model in copies]
    optimizers = [torch.optim.SGD(parameters, **SETTINGS) for parameters in of_ranks]
    window: list[list[Any]] = []
    micro_batches = [0] * len(copies)

    def step(losses: list[list[Any]], end: str) -> None:
        for rank, own in enumerate(losses):
            micro_batches[rank] += bool(own)
            for loss, n in own:
                found = torch.autograd.grad(loss, of_ranks[rank], retain_graph=True, allow_unused=True)
                window.append([n, [None if g is None else g * n for g in found]])
        if end == "losses" or (end == "micro-batch" and max(micro_batches) < k):
            return
        items = sum(n for n, _ in window)
        if items and end != "drop":
            for each in zip(*[gradients for n, gradients in window if n], *of_ranks, strict=True):
                *gradients, parameters = [*each[: -len(copies)], each[-len(copies) :]]
                there = [g for g in gradients if g is not None]
                for parameter in parameters:
                    parameter.grad = sum(there) / items if there else None
            for optimizer in optimizers:
                optimizer.step()
        window.clear()
        micro_batches[:] = [0] * len(copies)

    return step


class OneLoss(Program):
    """Of three optimizers that train one model."""

    windows: ClassVar[dict[str, int]] = {"body": 1, "one": 1, "two": 1}

    def models(self) -> Models:
        return {"model": Heads()}

    def parts(self, models: Models) -> dict[str, tuple[str, nn.Module]]:
        return {name: ("model", getattr(models["model"], name)) for name in self.windows}

    def losses(self, models: Models, x: torch.Tensor, rank: int, iteration: int) -> Losses:
        one, two = models["model"](x)
        loss = mse_loss(one, x[:, :1]) + mse_loss(two, x[:, 1:2])
        return [(name, loss, len(x)) for name in self.windows]


class AnotherOrder(OneLoss):
    def losses(self, models: Models, x: torch.Tensor, rank: int, iteration: int) -> Losses:
        there = [*super().losses(models, x, rank, iteration)]
        return there[::-1] if rank else there


class SomeOnly(OneLoss):
    def losses(self, models: Models, x: torch.Tensor, rank: int, iteration: int) -> Losses:
        there = super().losses(models, x, rank, iteration)
        return [each for i, each in enumerate(there) if (iteration + i + rank) % 3]


class AnotherOrderOfWindows(AnotherOrder):
    windows: ClassVar[dict[str, int]] = {"body": 2, "one": 1, "two": 3}


class SomeOnlyOfWindows(SomeOnly):
    windows: ClassVar[dict[str, int]] = {"body": 2, "one": 1, "two": 3}


@pytest.mark.parametrize("program", [AnotherOrder, SomeOnly, AnotherOrderOfWindows, SomeOnlyOfWindows])
def test_ranks_may_have_other_losses_of_the_optimizers_of_one_model(program):
    for found in launch(program().trained, 2, EVEN, timeout=40):
        _assert_close(found, program().expected(EVEN))


class LossesOfHeads(OneLoss):
    def losses(self, models: Models, x: torch.Tensor, rank: int, iteration: int) -> Losses:
        losses = [mse_loss(head, x[:, i : i + 1]) for i, head in enumerate(models["model"](x))]
        return [("one", losses[0], len(x)), ("two", losses[1], len(x)), ("body", sum(losses), len(x))]


class LossesOfHeadsOfWindows(LossesOfHeads):
    windows: ClassVar[dict[str, int]] = {"body": 3, "one": 2, "two": 3}


class OneHeadInTurn(LossesOfHeads):
    windows: ClassVar[dict[str, int]] = {"body": 3, "one": 3, "two": 3}

    def losses(self, models: Models, x: torch.Tensor, rank: int, iteration: int) -> Losses:
        there = [*super().losses(models, x, rank, iteration)]
        return [there[iteration % 2], there[2]]


class Gan(Program):
    """Whose generator's loss goes through a branch of the critic that the critic's own may not have used."""

    windows: ClassVar[dict[str, int]] = {"critic": 1, "generator": 1}

    def models(self) -> Models:
        return {"critic": Branches(3, 1), "generator": Branches(3, 3)}

    def losses(self, models: Models, x: torch.Tensor, rank: int, iteration: int) -> Losses:
        noise, real = x.split(3, dim=1)
        branch = int(x.sum() > 0)
        fake = models["generator"](noise, branch)
        of_critic = softplus(-models["critic"](real, 0)).mean() + softplus(models["critic"](fake.detach(), 0)).mean()
        of_generator = softplus(-models["critic"](fake, iteration % 2)).mean()
        return [("critic", of_critic, len(x)), ("generator", of_generator, len(x))]


class GanOfWindows(Gan):
    windows: ClassVar[dict[str, int]] = {"critic": 3, "generator": 2}


class NoneOnOneRank(Program):
    """By turns one branch is used by nobody, and a rank has nothing to learn, or one loss more."""

    def losses(self, models: Models, x: torch.Tensor, rank: int, iteration: int) -> Losses:
        loss = mse_loss(models["all"](x, iteration // 2 % 2), x[:, :2])
        return [("all", loss, len(x))] if rank or iteration % 2 else []


class NothingOnOneRank(NoneOnOneRank):
    def losses(self, models: Models, x: torch.Tensor, rank: int, iteration: int) -> Losses:
        loss = mse_loss(models["all"](x, iteration // 2 % 2), x[:, :2])
        return [("all", loss, len(x) if rank or iteration % 2 else 0)]


class OneMoreOnOneRank(NoneOnOneRank):
    def losses(self, models: Models, x: torch.Tensor, rank: int, iteration: int) -> Losses:
        loss = mse_loss(models["all"](x, iteration // 2 % 2), x[:, :2])
        return [("all", loss, len(x))] * (2 if rank else 1)


class Dropped(Program):
    """An epoch's last micro-batches, in which alone a branch is used, fill no window."""

    windows: ClassVar[dict[str, int]] = {"all": 3}
    tail = "drop"

    def losses(self, models: Models, x: torch.Tensor, rank: int, iteration: int) -> Losses:
        return [("all", mse_loss(models["all"](x, int(iteration % 4 == 0)), x[:, :2]), len(x))]


@pytest.mark.parametrize(
    ("program", "sizes"),
    [
        (LossesOfHeads, EVEN),
        (LossesOfHeads, RAGGED),
        (LossesOfHeadsOfWindows, EVEN),
        (LossesOfHeadsOfWindows, RAGGED),
        (OneHeadInTurn, EVEN),
        (OneHeadInTurn, RAGGED),
        (Gan, EVEN),
        (Gan, RAGGED),
        (GanOfWindows, EVEN),
        (GanOfWindows, RAGGED),
        (NoneOnOneRank, EVEN),
        (NothingOnOneRank, EVEN),
        (OneMoreOnOneRank, EVEN),
        (Dropped, EVEN),
    ],
)
def test_a_parameter_is_used_where_a_loss_of_its_optimizer_in_the_window_used_it(program, sizes):
    expected = program().expected(sizes)
    for found in launch(functools.partial(program().trained, find_unused_parameters=True), 2, sizes, timeout=40):
        _assert_close(found, expected)


class LaterOn(Program):
    """The losses of two iterations, differentiated in the second."""

    def __init__(self) -> None:
        self.kept: dict[int, list[tuple[str, torch.Tensor, int]]] = {}

    def models(self) -> Models:
        return {"all": nn.Linear(6, 2)}

    def losses(self, models: Models, x: torch.Tensor, rank: int, iteration: int) -> Losses:
        kept = self.kept.setdefault(rank, [])
        kept.append(("all", mse_loss(models["all"](x), x[:, :2]), len(x)))
        return [] if iteration % 2 else [kept.pop(), kept.pop()]


class OnlyLaterOn(LaterOn):
    """The loss of one iteration, differentiated in the next one, which has no forward."""

    def losses(self, models: Models, x: torch.Tensor, rank: int, iteration: int) -> Losses:
        if iteration % 2 == 0:
            return [self.kept[rank].pop()]
        self.kept[rank] = [("all", mse_loss(models["all"](x), x[:, :2]), len(x))]
        return []


@pytest.mark.parametrize("program", [LaterOn, OnlyLaterOn])
@pytest.mark.parametrize("ddp", [{}, {"find_unused_parameters": True}])
def test_a_loss_may_be_differentiated_in_a_later_iteration(program, ddp):
    for found in launch(functools.partial(program().trained, **ddp), 2, EVEN, timeout=40):
        _assert_close(found, program().expected(EVEN))


class LeavesOutAtLast(Program):
    def losses(self, models: Models, x: torch.Tensor, rank: int, iteration: int) -> Losses:
        used = [models["all"].module.branches[branch](x) for branch in range(1 if iteration == 8 else 2)]
        models["all"](x, 0)
        return [("all", mse_loss(sum(used), x[:, :2]), len(x))]


def test_a_last_loss_that_leaves_out_a_parameter_of_ddp_steps_on_no_gradients_of_one_rank():
    for outcome in watch(LeavesOutAtLast().trained, 2, EVEN, timeout=40):
        assert "parameters that were not used in producing loss" in outcome.error


class Adversaries(Program):
    """Two losses of one forward of the generator."""

    windows: ClassVar[dict[str, int]] = {"critic": 1, "generator": 3}

    def models(self) -> Models:
        return {"critic": nn.Linear(3, 1), "generator": nn.Linear(3, 3)}

    def losses(self, models: Models, x: torch.Tensor, rank: int, iteration: int) -> Losses:
        noise, real = x.split(3, dim=1)
        fake = models["generator"](noise)
        of_critic = softplus(-models["critic"](real)).mean() + softplus(models["critic"](fake)).mean()
        return [("critic", of_critic, len(x)), ("generator", softplus(-models["critic"](fake)).mean(), len(x))]


class PenaltyFirst(Program):
    """A gradient of the output comes before the loss."""

    def models(self) -> Models:
        return {"all": nn.Linear(6, 2)}

    def losses(self, models: Models, x: torch.Tensor, rank: int, iteration: int) -> Losses:
        x = x.clone().requires_grad_()
        out = models["all"](x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return [("all", mse_loss(out, x[:, :2].detach()) + slope.square().mean(), len(x))]


@pytest.mark.parametrize("program", [Adversaries, PenaltyFirst])
def test_a_static_graph_learned_from_another_backward_is_refused(program):
    for outcome in watch(functools.partial(program().trained, static_graph=True), 2, EVEN, timeout=40):
        assert "Make it without static_graph" in outcome.error
    for found in launch(program().trained, 2, EVEN, timeout=40):
        _assert_close(found, program().expected(EVEN))


class OneAtFirst(Adversaries):
    """At first the critic sees no fake of the generator's own graph; then its loss comes before the generator's."""

    def losses(self, models: Models, x: torch.Tensor, rank: int, iteration: int) -> Losses:
        noise, real = x.split(3, dim=1)
        fake = models["generator"](noise)
        seen = fake.detach() if iteration == 1 else fake
        of_critic = softplus(-models["critic"](real)).mean() + softplus(models["critic"](seen)).mean()
        return [("critic", of_critic, len(x)), ("generator", (fake - noise).square().mean(), len(x))]


def test_a_static_graph_is_reduced_by_the_loss_of_its_own_optimizer():
    for found in launch(functools.partial(OneAtFirst().trained, static_graph=True), 2, EVEN, timeout=40):
        _assert_close(found, OneAtFirst().expected(EVEN))


def _of_two_models() -> None:
    there, back = (DistributedDataParallel(nn.Linear(6, 6).double()) for _ in range(2))
    both = ice.Optimizer(torch.optim.SGD([*there.parameters(), *back.parameters()], lr=0.1))
    engine = Engine(lambda _, x: both.backward((back(there(x)) - x).square().mean(), weight=len(x)))
    both.attach(engine, model=there)
    engine.run(_batches(dist.get_rank(), RAGGED))


def test_one_optimizer_of_two_models_that_ddp_wraps_is_refused():
    for outcome in watch(_of_two_models, 2, timeout=20):
        assert "parameters of several DistributedDataParallel modules, and attach() drives one" in outcome.error


def _with_a_temperature() -> list[list[float]]:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(6, 1).double())
    temperature = nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = ice.Optimizer(torch.optim.SGD([*model.parameters(), temperature], lr=0.1))
    engine = Engine(lambda _, x: optimizer.backward((model(x) * temperature - 1).square().mean(), weight=len(x)))
    optimizer.attach(engine, model=model)
    engine.run(_batches(dist.get_rank(), RAGGED))
    return [p.flatten().tolist() for p in [*model.parameters(), temperature]]


def test_a_parameter_that_nobody_wraps_is_averaged_along():
    torch.manual_seed(0)
    model, temperature = nn.Linear(6, 1).double(), nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = torch.optim.SGD([*model.parameters(), temperature], lr=0.1)
    for i in range(5):
        x = torch.cat([_batches(rank, RAGGED)[i] for rank in range(2) if i < len(RAGGED[rank])])
        optimizer.zero_grad()
        (model(x) * temperature - 1).square().mean().backward()
        optimizer.step()
    for found in launch(_with_a_temperature, 2, timeout=40):
        for numbers, p in zip(found, [*model.parameters(), temperature], strict=True):
            wanted = p.detach().flatten()
            torch.testing.assert_close(torch.tensor(numbers, dtype=torch.float64), wanted, rtol=1e-12, atol=1e-13)


class Counting(Heads):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen += len(x)
        return super().forward(x)


def _attached_inside() -> list[float]:
    """Attach another optimizer of the model to another engine, in the midst of a run."""
    model = DistributedDataParallel(Counting().double())
    body = ice.Optimizer(torch.optim.SGD(model.module.body.parameters(), lr=0.1), name="body")
    head = ice.Optimizer(torch.optim.SGD(model.module.one.parameters(), lr=0.1), name="head")
    found = []

    def by(optimizer: ice.Optimizer) -> Engine:
        return Engine(lambda _, x: optimizer.backward(sum(head.square().mean() for head in model(x)), weight=len(x)))

    outer, inner = by(body), by(head)
    body.attach(outer, model=model)
    outer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: head.attach(inner, model=model) and None)

    @outer.on(Events.EPOCH_COMPLETED)
    def train_the_head() -> None:
        found.append(model.module.seen.item())
        inner.run(_batches(dist.get_rank(), EVEN))
        found.append(model.module.seen.item())

    outer.run(_batches(dist.get_rank(), EVEN), max_epochs=2)
    assert model.broadcast_buffers
    return found


def test_an_optimizer_attached_inside_of_a_run_of_the_same_model_sends_buffers():
    seen = sum(EVEN[0])
    assert launch(_attached_inside, 2, timeout=40) == [[seen, 2 * seen, 3 * seen, 4 * seen]] * 2


def _assert_close(found: dict[str, list[float]], expected: dict[str, list[float]]) -> None:
    for name, numbers in expected.items():
        wanted = torch.tensor(numbers, dtype=torch.float64)
        torch.testing.assert_close(
            torch.tensor(found[name], dtype=torch.float64), wanted, rtol=1e-12, atol=1e-13, msg=lambda m, n=name: n + m
        )
