"""Processes that end for real, as scripts do: each names the rank that was the first, and none waits at its end."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.distributed

# Ranks forked from one process that has imported torch, anew for each case; what one raises goes through to its end.
PROGRAM = """
import datetime, functools, gc, json, os, signal, socket, sys, time
from pathlib import Path
import torch
import torch._dynamo
import torch.distributed as dist
import torch.distributed.optim
from ignite.engine import Engine, Events
from ignite.metrics import Average
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
import ice_engine as ice
from ice_engine.distributed import parts, wire

torch.set_num_threads(1)
gc.freeze()
folder, world = Path(sys.argv[1]), int(sys.argv[2])


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def boom():
    raise ValueError("boom")


def stop():
    if not os.fork():
        time.sleep(12)
        os.kill(os.getppid(), signal.SIGCONT)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGSTOP)


def evaluate(evaluator):
    evaluator.run([torch.ones(2, 4)] * 2)


def again(engine, error):
    raise KeyError("second")


def train(case, me, sharding):
    model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1)))
    factory = functools.partial(torch.optim.AdamW, lr=0.1)
    optimizer = ice.Optimizer(factory, model.named_parameters(), accumulation_steps=2, sharding=sharding)
    engine = Engine(lambda _, batch: optimizer.backward(model(batch).square().mean(), weight=len(batch)))
    failing = lambda do: lambda: do() if me else None
    if case == "before all have met":
        failing(boom)()
    optimizer.attach(engine, model=model)
    to_save = {"trainer": engine, "model": model, "optimizer": optimizer}
    checkpoint = ice.Checkpoint(to_save, folder / case, n_saved=None)
    checkpoint.attach(engine, optimizer.event("STEP_COMPLETED"))
    in_iteration = Events.ITERATION_COMPLETED(once=3)
    if case == "a step":
        engine.add_event_handler(optimizer.event("STEP_COMPLETED")(once=2), failing(boom))
    elif case == "a score":
        best = ice.Checkpoint(to_save, folder / case / "best", score_function=lambda _: boom() if me else 1.0)
        best.attach(engine, Events.EPOCH_COMPLETED)
    elif case == "the end of the run":
        engine.add_event_handler(Events.COMPLETED, failing(boom))
    elif case == "a handler of errors":
        engine.add_event_handler(in_iteration, failing(boom))
        engine.add_event_handler(Events.EXCEPTION_RAISED, again)
    elif case == "an error that is swallowed":
        engine.add_event_handler(Events.EPOCH_COMPLETED, failing(boom))
        engine.add_event_handler(Events.EXCEPTION_RAISED, lambda *_: None)
    elif case.startswith("a metric"):
        evaluator = Engine(lambda _, batch: batch.sum().item())
        Average().attach(evaluator, "mean")
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, failing(boom))
        engine.add_event_handler(Events.EPOCH_COMPLETED, functools.partial(evaluate, evaluator))
    elif case == "before the run":
        failing(boom)()
    elif case == "a collective on one rank":
        engine.add_event_handler(in_iteration, failing(lambda: dist.all_reduce(torch.ones(1))))
    elif case == "a rank that is stopped":
        engine.add_event_handler(Events.EPOCH_COMPLETED(once=1), failing(stop))
    elif case == "stopped in a step of ZeRO":
        engine.add_event_handler(optimizer.event("STEP_STARTED")(once=2), failing(stop))
    elif case == "stopped in a consolidation of ZeRO" and me:
        send = wire.send
        wire.send = lambda *args: (stop(), send(*args))
    elif case == "stopped in a sharded save":
        if me:
            save = parts.save
            parts.save = lambda *args, **kwargs: (stop(), save(*args, **kwargs))
        engine.add_event_handler(in_iteration, lambda: ice.save_sharded(folder / case / "parts", to_save))
    elif case == "stopped, with the store":
        engine.add_event_handler(in_iteration, failing(stop))
    elif case == "killed, without the store":
        engine.add_event_handler(in_iteration, failing(lambda: os.kill(os.getpid(), signal.SIGKILL)))
    elif case == "a validation that is longer on one rank":
        spread = fully_shard(torch.nn.Linear(4, 4), reshard_after_forward=True)

        def validate():
            for _ in range(1 + me):
                spread(torch.ones(2, 4))
            dist.all_reduce(torch.ones(1))

        engine.add_event_handler(Events.EPOCH_COMPLETED, validate)
    # After the gate: the others are in the reduction.
    elif case == "stopped in the reduction":
        engine.add_event_handler(Events.ITERATION_STARTED(once=4), failing(stop))
    elif case == "another collective in the reduction":
        other = 1 - dist.get_rank()
        engine.add_event_handler(Events.ITERATION_STARTED(once=4), failing(lambda: dist.recv(torch.ones(1), other)))
    data = [torch.ones(2 + dist.get_rank(), 4)] * 4
    # Of an unknown length: the second step is after the last micro-batch, where nobody promised one.
    engine.run(iter(data[:3]) if case == "stopped in a step of ZeRO" else data, max_epochs=2)


def rank_of(case, rank, who, sharding, port):
    sys.stderr = (folder / f"{case}.{rank}.log").open("w")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    store = f"tcp://127.0.0.1:{port}" if "store" in case else f"file://{folder / case}.store"  # the former in rank 0
    patience = datetime.timedelta(seconds=60)  # torch's own, which must end nothing
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=patience)
    error = None
    try:
        train(case, rank == who, "zero1" if "ZeRO" in case else sharding)
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}"
        raise
    finally:
        (folder / f"{case}.{rank}").write_text(json.dumps(error))
        if "destroyed" in case:  # as idist.Parallel does
            dist.destroy_process_group()


began, started = time.monotonic(), []
for i, case in enumerate(sys.argv[3:]):
    # Which it is, and whether state is sharded, goes by turns.
    who, sharding, port, ranks = (world - 1) * (i % 2), [None, "zero1"][i // 2 % 2], free_port(), []
    for rank in range(world):
        if not (pid := os.fork()):
            rank_of(case, rank, who, sharding, port)
            sys.exit()
        ranks.append(pid)
    started.append((case, who, ranks))
for case, who, ranks in started:
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
    print(json.dumps([case, who, codes, time.monotonic() - began]), flush=True)
"""

# By case: what the others are told of rank {who}.
CASES = {
    "a step": "rank {who} raised ValueError: boom",
    "a score": "rank {who} raised ValueError: boom",
    "the end of the run": "rank {who} raised ValueError: boom",
    "a handler of errors": "KeyError: 'second'",
    "an error that is swallowed": "rank {who} has left its run",
    "before the run": "rank {who} raised ValueError: boom",
    "before all have met": "rank {who} raised ValueError: boom",
    # Of three ranks only, as these take their time:
    "a metric": "rank {who} raised ValueError: boom",
    "a collective on one rank": "rank {who} waits in all_reduce()",
    "a rank that is stopped": "rank {who} is stopped",
}


def run(folder: Path, world: int, cases: list[str]) -> list[Any]:
    """Return, by case, its name, the rank that it is about, the exit codes, and the seconds that it took, at most.

    They run side by side, as most of their time is waiting.
    """
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), str(world), *cases],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [case for case, *_ in found] == cases, done.stderr
    return found


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (2, [*CASES][:-3]),
        pytest.param(3, [*CASES][:-3], marks=pytest.mark.soak),
        pytest.param(3, [*CASES][-3:], marks=pytest.mark.soak),
    ],
    ids=["2", "3", "3, slow"],
)
def test_every_rank_ends_and_says_which_was_the_first(tmp_path, world, cases):
    found = run(tmp_path, world, cases)
    for case, who, codes, took in found:
        said = [json.loads((tmp_path / f"{case}.{rank}").read_text()) for rank in range(world)]
        assert all(codes), (case, codes, said)
        assert took < 45, (case, took)  # below torch's own timeout, which would have ended a hang
        for rank in set(range(world)) - {who}:
            assert CASES[case].format(who=who) in said[rank], (case, rank, said)
        for file in (tmp_path / case).rglob("*.pt"):
            torch.load(file, weights_only=True)


# Where the wait is in C, no error can be raised: the process ends, and its log says why. Ranks 0 and 1 by turns.
REDUCTIONS = {
    "stopped in the reduction": "rank {who} is stopped",
    "another collective in the reduction": "rank {who} waits in recv(), called at <string>:",
    "stopped in a step of ZeRO": "rank {who} is stopped",
    "stopped in a consolidation of ZeRO": "rank {who} is stopped",
    "stopped in a sharded save": "rank {who} is stopped",
    "stopped, with the store": "rank {who} is stopped",
    "a validation that is longer on one rank": "rank {who} waits in all_gather_single(), called at <string>:",
}


@pytest.mark.soak
def test_who_waits_in_a_reduction_for_a_rank_that_does_not_come_ends(tmp_path):
    for case, who, codes, took in run(tmp_path, 2, [*REDUCTIONS]):
        logs = [(tmp_path / f"{case}.{rank}.log").read_text() for rank in range(2)]
        assert all(codes), (case, logs)
        assert took < 45, (case, took, logs)  # as above
        assert REDUCTIONS[case].format(who=who) in logs[1 - who], (case, logs)


@pytest.mark.soak
def test_who_keeps_the_store_is_not_blamed_for_having_ended(tmp_path):
    _, (case, who, codes, _) = run(tmp_path, 3, ["a step", "killed, without the store"])
    assert all(codes)
    assert who == 2  # rank 0 keeps it
    for rank in (0, 1):
        assert "rank 2 does not answer any more" in json.loads((tmp_path / f"{case}.{rank}").read_text())


@pytest.mark.soak
def test_a_rank_that_has_destroyed_its_process_group_is_not_taken_for_rank_0(tmp_path):
    # In turn it is rank 0 that raises, and the last one.
    cases = ["a metric, and groups are destroyed", "a metric, and groups are destroyed again"]
    for case, who, codes, _ in run(tmp_path, 3, cases):
        assert all(codes), case
        for rank in {0, 1, 2} - {who}:
            said = json.loads((tmp_path / f"{case}.{rank}").read_text())
            assert f": rank {who} raised ValueError: boom. Look" in said, (case, rank, said)
