"""A rank that raises, stops, dies or goes its own way: every other rank learns it in seconds, and which one it was."""

import ctypes
import functools
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from ignite.handlers import EarlyStopping, TerminateOnNan, TimeLimit
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import ice_engine as ice
from ice_engine.distributed import arrival, suspects
from ice_engine.distributed import watch as watch_module
from ice_engine.distributed.process import Process
from ice_engine.errors import RankError
from tests.distributed.launch import launch, watch

pytestmark = pytest.mark.distributed

SOAK = pytest.mark.soak
AT = 6  # the iteration in which it happens: with k=4 inside a window, with k=1 where one closes
Work = Callable[[Engine], None]


def trainer(
    k: int,
    before: Work = lambda _: None,
    between: Work = lambda _: None,
    after: Work = lambda _: None,
    forward: Callable[[Any], Any] = lambda model: model,
    **settings: Any,
) -> tuple[Engine, ice.Optimizer]:
    """An engine whose micro-batches do something before the forward, before the backward, and at their end."""
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(4, 1))
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1), accumulation_steps=k, **settings)

    def step(engine: Engine, batch: torch.Tensor) -> float:
        before(engine)
        loss = forward(model)(batch).square().mean()
        between(engine)
        optimizer.backward(loss, weight=len(batch))
        after(engine)
        return loss.item()

    engine = Engine(step)
    optimizer.attach(engine, model=model)
    return engine, optimizer


def data(n: int = 12) -> list[torch.Tensor]:
    return [torch.ones(2 + dist.get_rank(), 4)] * n


def _steps(k: int, **work: Work) -> int:
    """The steps of a run over data in which this is done."""
    engine, optimizer = trainer(k, **work)
    engine.run(data())
    return optimizer.clocks["step"]


def on_last_rank(error: Exception) -> Work:
    def work(engine: Engine) -> None:
        if engine.state.iteration == AT and dist.get_rank() == dist.get_world_size() - 1:
            raise error

    return work


class Broken:
    """A loader that fails on the last rank."""

    def __iter__(self) -> Any:
        for i, batch in enumerate(data()):
            if i + 1 == AT and dist.get_rank() == dist.get_world_size() - 1:
                raise OSError(i)
            yield batch


def _raising() -> list[tuple[str, str, float]]:
    logging.getLogger("ignite").setLevel(logging.CRITICAL)
    said = []
    boom = ValueError("boom")
    for k in (1, 4):
        engines = {
            "before the forward": trainer(k, before=on_last_rank(boom)),
            "before the backward": trainer(k, between=on_last_rank(boom)),
            "after the backward": trainer(k, after=on_last_rank(boom)),
            "in a handler": trainer(k),
            "in the loader": trainer(k),
            "in a processor": trainer(k, processors=[_processor]),
            "on Ctrl-C": trainer(k, before=on_last_rank(KeyboardInterrupt())),  # type: ignore[arg-type]
        }
        engines["in a handler"][0].add_event_handler(Events.ITERATION_COMPLETED, on_last_rank(boom))
        for name, (engine, _) in engines.items():
            begin = time.monotonic()
            try:
                engine.run(Broken() if name == "in the loader" else data())  # type: ignore[arg-type]
            except BaseException as error:  # noqa: BLE001 - whatever it is, it is looked at
                said.append((f"{name}, k={k}", f"{type(error).__name__}: {error}", time.monotonic() - begin))
    # And after all that, another run, as if nothing had been.
    engine, optimizer = trainer(4)
    engine.run(data())
    said.append(("another run", str(optimizer.clocks["step"]), 0.0))
    return said


def _processor(group: Any) -> Any:
    if group["step"] == 1 and dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError(group["step"])
    return group


def _slow_in_a_group_of_its_own() -> int:
    of_two = dist.new_group([1, 2])

    def after(engine: Engine) -> None:
        if engine.state.iteration == AT and dist.get_rank() in {1, 2}:
            time.sleep(14 if dist.get_rank() == 2 else 0)  # three looks of who waits for it
            dist.all_reduce(torch.ones(1), group=of_two)

    return _steps(1, after=after)


class Slow:
    """Takes its time when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[float]]:
        return time.sleep, (14.0,)


def _given_what_is_slow() -> int:
    def after(engine: Engine) -> None:
        if engine.state.iteration == AT:
            dist.broadcast_object_list([Slow()], src=0)

    return _steps(1, after=after)


def _slow_among_some() -> int:
    suspects._STUCK = 6.0  # seconds instead of 15
    of_two = dist.new_group([1, 2])

    def after(engine: Engine) -> None:
        if dist.get_rank() == 0:
            return
        if engine.state.iteration == AT:  # one call, for which gigabytes are moved by gloo's own threads
            numbers = torch.ones(250_000_000)
            queued = [dist.all_reduce(numbers, group=of_two, async_op=True) for _ in range(20)]
            dist.all_reduce(numbers, group=of_two)
            assert all(each.is_completed() for each in queued)
        if engine.state.iteration == AT + 1:  # many, in one line
            for turn in range(220):
                time.sleep(0.06 if turn % 2 == dist.get_rank() - 1 else 0)
                dist.all_reduce(torch.ones(1), group=of_two)

    return _steps(1, after=after)


@SOAK
def test_ranks_that_get_on_in_a_group_of_their_own_are_not_said_to_wait():
    assert launch(_slow_among_some, 3) == [12] * 3


def _slow_after_an_error() -> int:
    def after(engine: Engine) -> None:
        if engine.state.iteration == AT and dist.get_rank() == 1:
            sys.last_value = ValueError("of a cell of a notebook, or of a test before")
            time.sleep(10)

    return _steps(1, after=after)


@SOAK
def test_an_error_that_a_program_went_on_after_is_not_told_to_the_others():
    assert launch(_slow_after_an_error, 2) == [12] * 2


def _silent_for_a_moment() -> int:
    suspects._SILENT = 6.0  # seconds instead of two minutes
    if dist.get_rank() == 1:  # of whose process the others know nothing, as if it were on another host
        watch_module.this_process = lambda: Process("elsewhere", 1, "1")

    def between(engine: Engine) -> None:
        if engine.state.iteration == AT and dist.get_rank() == 1:
            time.sleep(9)
            ctypes.PyDLL(None).sleep(8)  # keeps the interpreter, as to sort or to unpickle does: no thread answers

    # With k=4 the others wait in a round.
    return _steps(4, between=between)


@SOAK
def test_a_slow_rank_on_another_host_that_is_silent_for_a_moment_is_waited_for():
    assert launch(_silent_for_a_moment, 2) == [3] * 2


def _slow_to_attach() -> int:
    arrival._ABSENT = 1.0  # seconds instead of five minutes
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(4, 1))
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    dist.barrier()
    time.sleep(7 * dist.get_rank())
    optimizer.attach(Engine(lambda *_: None), model=model)
    return dist.get_rank()


def test_a_rank_that_has_made_its_optimizer_and_computes_is_waited_for():
    assert launch(_slow_to_attach, 2) == [0, 1]


@SOAK
def test_a_rank_that_unpickles_what_all_were_sent_is_not_said_to_wait():
    assert launch(_given_what_is_slow, 2) == [12] * 2


@SOAK
def test_who_waits_for_a_slow_rank_in_a_group_of_theirs_is_not_blamed_by_the_others():
    assert launch(_slow_in_a_group_of_its_own, 3) == [12] * 3


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.soak)])
def test_what_one_rank_raises_stops_all_and_is_named(world):
    *others, last = launch(_raising, world)
    assert len(last) == 15
    for said in others:
        for (name, told, took), (same, own, _) in zip(said[:-1], last[:-1], strict=True):
            assert name == same
            assert not own.startswith("RankError")  # the rank itself keeps its own error
            expected = own.replace("KeyboardInterrupt: ", "KeyboardInterrupt: no message")
            assert told == f"RankError: rank {world - 1} raised {expected}", name
            assert took < 10
        assert said[-1][1] == "3"


def _dying(how: int, k: int) -> str:
    def die(engine: Engine) -> None:
        if engine.state.iteration == AT and dist.get_rank() == 1:
            os.kill(os.getpid(), how)
            time.sleep(30)

    engine, _ = trainer(k, between=die)
    begin = time.monotonic()
    try:
        engine.run(data())
    except RankError as error:
        assert time.monotonic() - begin < 10
        return str(error)
    return "ended"


@pytest.mark.parametrize("k", [1, pytest.param(4, marks=SOAK)])
@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.soak)])
def test_a_rank_that_is_killed_is_named_by_all_others(how, k):
    first, dead, third = watch(_dying, 3, how, k)
    assert dead.exitcode == -how
    for alive in (first, third):
        assert "rank 1 does not answer any more" in alive.value, alive.error
        assert "at iteration" in alive.value


def _dying_in_fsdp() -> str:
    model = torch.nn.Linear(4, 4)
    fully_shard(model)
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1), accumulation_steps=2)

    def step(engine: Engine, batch: torch.Tensor) -> None:
        if engine.state.iteration == AT - 1 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if engine.state.iteration == AT - 1 and dist.get_rank() == 0:
            time.sleep(2)  # until rank 2 has said what it raised
        optimizer.backward(model(batch).square().mean(), weight=len(batch))

    engine = Engine(step)
    optimizer.attach(engine, model=model)
    try:
        engine.run(data())
    except RankError as error:
        return str(error)
    return "ended"


def test_who_only_lost_a_connection_of_the_models_own_is_not_blamed():
    """The others are in an all-gather of FSDP2, where gloo tells each of them that another one is gone."""
    first, _, third = watch(_dying_in_fsdp, 3)

    for alive in (first, third):
        assert "rank 1 does not answer any more: killed?" in alive.value, alive.error
        assert "raised" not in alive.value


def _stopping(which: str) -> list[Any]:
    last = dist.get_rank() == dist.get_world_size() - 1

    def slow(engine: Engine) -> None:
        if which == "TimeLimit":
            time.sleep(0.1)

    engine, optimizer = trainer(4, before=slow)
    if which == "EarlyStopping":
        score = (lambda e: -e.state.epoch) if last else (lambda e: e.state.epoch)
        handler = EarlyStopping(patience=1, score_function=score, trainer=engine)
        engine.add_event_handler(Events.EPOCH_COMPLETED, handler)
    elif which == "TerminateOnNan" and last:
        engine.add_event_handler(
            Events.ITERATION_COMPLETED(once=AT), lambda e: TerminateOnNan(lambda _: float("nan"))(e)
        )
    elif which == "TimeLimit" and last:
        engine.add_event_handler(Events.ITERATION_COMPLETED, TimeLimit(1))
    engine.run(data(), max_epochs=5)
    return [engine.state.epoch, optimizer.clocks["step"], optimizer.param_groups[0]["params"][0].tolist()]


@pytest.mark.parametrize(
    ("which", "epoch"),
    [("EarlyStopping", 2), pytest.param("TerminateOnNan", 1, marks=SOAK), pytest.param("TimeLimit", 1, marks=SOAK)],
)
def test_a_handler_of_ignite_that_stops_one_rank_stops_all(which, epoch):
    outcomes = launch(_stopping, 2, which)
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0] == epoch


def _diverging(what: str) -> None:
    processors = [_by_rank] if what == "a processor" else []
    clip = ice.clip_norm(1.0 + dist.get_rank()) if what == "a clip" else None
    steps = 2 if what != "accumulation_steps" else 2 + dist.get_rank()
    engine, optimizer = trainer(steps, processors=processors, clip=clip)
    if dist.get_rank() == 0:
        if what == "a handler that changes the rate":
            engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), _raise_rate(optimizer))
        if what == "a handler that communicates":
            engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), _alone)
        if what == "a handler of the first step that communicates":
            engine.add_event_handler(optimizer.event("STEP_COMPLETED"), _alone)
    engine.run(data(), max_epochs=1 + (dist.get_rank() if what == "max_epochs" else 0))


def _alone() -> None:
    dist.all_reduce(torch.ones(1))


@ice.dictprocess
def _by_rank(lr: float) -> float:
    return lr * (1 + dist.get_rank())


_by_rank = _by_rank(dst="lr")


def _raise_rate(optimizer: ice.Optimizer) -> Callable[[], None]:
    def handler() -> None:
        optimizer.param_groups[0]["lr"] = 0.5

    return handler


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("a processor", "differs between ranks in 'lr' of param group 0 ('group_0'): 0.1 on rank 0, 0.2 on rank 1"),
        ("a handler that changes the rate", "lr of group_0 differs between ranks: 0.5 on rank 0, 0.1 on rank 1"),
        pytest.param(
            "accumulation_steps",
            "accumulation_steps of optimizer 'optimizer' differs between ranks: 2 on rank 0, 3 on",
            marks=SOAK,
        ),
        (
            "a clip",
            "clip of optimizer 'optimizer' differs between ranks: clip_norm(1.0) on rank 0, clip_norm(2.0) on rank 1",
        ),
        pytest.param("max_epochs", "max_epochs differs between ranks: 1 on rank 0, 2 on rank 1", marks=SOAK),
        # Where DDP would agree on its buckets: after the first step, before the next forward.
        ("a handler of the first step that communicates", "rank 0 waits in all_reduce(), called at test_failures.py"),
        pytest.param(
            "a handler that communicates", "rank 0 waits in all_reduce(), called at test_failures.py", marks=SOAK
        ),
    ],
)
def test_a_rank_that_goes_its_own_way_is_found_on_all(what, expected):
    for outcome in watch(_diverging, 2, what, timeout=45):  # below the group's own timeout
        assert outcome.exitcode == 1
        assert expected in outcome.error


def _met_by_one(why: str) -> None:
    model: Any = torch.nn.Linear(4, 1)
    if why != "sharded on one":
        model = DistributedDataParallel(model)
    late, sharding = dist.get_rank() == 1, None
    if why == "none made":
        arrival._ABSENT = 1.0  # seconds instead of five minutes
        time.sleep(7 if late else 0)
    if why == "sharded on one" and late:
        sharding = "zero1"
    factory = functools.partial(torch.optim.SGD, lr=0.1)
    optimizer = ice.Optimizer(factory, model.parameters(), sharding=sharding)
    if why == "killed" and late:
        os.kill(os.getpid(), signal.SIGKILL)
    if why == "sharded on one":
        model = DistributedDataParallel(model)
    optimizer.attach(Engine(lambda *_: None), model=model)


@pytest.mark.parametrize(
    ("why", "first", "expected"),
    [
        ("killed", 0, "rank 1 is gone, it does not answer any more: killed? The others wait for it at test_failures"),
        ("none made", 0, "rank 1 did not come to test_failures.py"),
        ("sharded on one", 1, "rank 0 waits in _verify_param_shape_across_processes(), called at test_failures.py"),
    ],
)
def test_a_rank_that_does_not_come_to_where_all_meet_is_named(why, first, expected):
    outcomes = watch(_met_by_one, 2, why, timeout=45)

    assert expected in outcomes[first].error
    if why == "none made":  # it comes, but too late
        assert "rank 0 raised RankError: rank 1 did not come to " in outcomes[1].error


def _evaluated(model: DistributedDataParallel) -> DistributedDataParallel:
    with torch.no_grad():
        model(torch.ones(1, 4))
    return model


FORWARDS: dict[str, Callable[[Any], Any]] = {
    "past DDP": lambda ddp: ddp.module,
    "DDP.forward": lambda ddp: ddp.forward,
    "after an evaluation": _evaluated,
    "past DDP, after an evaluation": lambda ddp: _evaluated(ddp).module,
}


def _forward(how: str) -> list[float] | str:
    engine, optimizer = trainer(2, forward=FORWARDS[how])
    try:
        engine.run(data())
    except ice.IceEngineError as error:
        return str(error)
    return optimizer.param_groups[0]["params"][0].flatten().tolist()


@pytest.mark.parametrize("how", FORWARDS)
def test_a_loss_past_ddp_is_refused_and_each_way_through_it_reduced(how):
    said = launch(_forward, 2, how)

    if how == "past DDP":
        assert all("does not come through the DistributedDataParallel that attach() was given" in text for text in said)
    else:
        assert said[0] == said[1]


def _unreduced() -> str:
    model = torch.nn.Linear(2, 1)
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    said = []
    for given in (None, model, DistributedDataParallel(torch.nn.Linear(2, 1))):
        try:
            optimizer.attach(Engine(lambda *_: None), model=given)
        except ice.IceEngineError as error:
            said.append(str(error))
    return "\n".join(said)


def test_gradients_that_nobody_reduces_are_refused():
    said = launch(_unreduced, 2)[1]
    assert "this is rank 1 of 2 and attach() was given no model" in said
    assert "given a Linear, whose gradients nobody reduces" in said
    assert "given a DistributedDataParallel that has none of the optimizer's parameters" in said
