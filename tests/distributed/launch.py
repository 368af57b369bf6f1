"""Run a function in real processes that talk through gloo, and bring back what each returned, or why it did not.

    def work(factor):                      # of a module's top level: every rank imports it
        return dist.get_rank() * factor

    assert launch(work, 3, 10) == [0, 10, 20]

The ranks are forked from a server that has imported torch once for all of them.
Nothing waits longer than *timeout*: a rank that hangs prints where each of its threads stands, and dies. ``watch``
is for ranks that are meant to fail or to be killed: it raises nothing.
"""

import datetime
import faulthandler
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.forked import CONTEXT, run_exit_functions, start_as_always

PATIENCE = 100.0  # seconds, of which a busy machine takes some to import torch for the first ranks
_GRACE = 5.0  # for the others to say why, once one rank has failed
_COLLECTIVE = datetime.timedelta(seconds=60)


class RanksFailed(AssertionError):  # noqa: N818 - read in a test's report, where it is no error of the test
    """What at least one rank said instead of returning."""


@dataclass
class Outcome:
    """What one rank came to: a *value*, or the text of an *error*; neither, if it was killed."""

    rank: int
    value: Any = None
    error: str | None = None
    exitcode: int | None = None


def launch(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = PATIENCE) -> list[Any]:
    """Return what ``function(*args)`` returned on each rank.

    Raises:
        RanksFailed: If any rank raised, died or hung; with the traceback of each.
    """
    outcomes = watch(function, world_size, *args, timeout=timeout)
    failed = [o for o in outcomes if o.error is not None or o.exitcode != 0]
    if failed:
        raise RanksFailed(
            "\n".join(f"\n--- rank {o.rank}, exit code {o.exitcode}\n{o.error or 'nothing was said'}" for o in failed)
        )
    return [o.value for o in outcomes]


def watch(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = PATIENCE) -> list[Outcome]:
    """Return what each rank came to, whatever it was."""
    with tempfile.TemporaryDirectory() as folder:
        pipes = [CONTEXT.Pipe(duplex=False) for _ in range(world_size)]
        ranks = [
            CONTEXT.Process(target=_rank, args=(r, world_size, folder, pipes[r][1], timeout, function, args))
            for r in range(world_size)
        ]
        for process in ranks:
            process.start()
        for _, sender in pipes:
            sender.close()  # of this process; so that the end of a rank is the end of its pipe
        outcomes = [Outcome(r) for r in range(world_size)]
        try:
            _listen({pipes[r][0]: outcomes[r] for r in range(world_size)}, time.monotonic() + timeout + _GRACE)
            for process in ranks:
                process.join(4 * _GRACE)  # a busy machine takes its time to end one
        finally:
            for process in ranks:
                process.kill()
                process.join()
        for outcome, process in zip(outcomes, ranks, strict=True):
            outcome.exitcode = process.exitcode
            stacks = Path(folder, f"stacks-{outcome.rank}")
            if outcome.exitcode and outcome.error is None and stacks.exists() and stacks.stat().st_size:
                outcome.error = f"crashed, or hung for {timeout:.0f} s, here:\n{stacks.read_text()}"
        return outcomes


def _listen(pipes: dict[Connection, Outcome], deadline: float) -> None:
    while pipes and (left := deadline - time.monotonic()) > 0:
        for pipe in wait(list(pipes), timeout=left):
            assert isinstance(pipe, Connection)
            outcome = pipes.pop(pipe)
            try:
                outcome.value, outcome.error = pickle.loads(pipe.recv_bytes())  # noqa: S301 - our own rank's
            except EOFError:
                outcome.error = None  # killed, or exited by itself
            if outcome.error is not None:
                deadline = min(deadline, time.monotonic() + _GRACE)


def _rank(
    rank: int,
    world_size: int,
    folder: str,
    pipe: Connection,
    timeout: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    stacks = Path(folder, f"stacks-{rank}").open("w")  # noqa: SIM115 - as long as the process
    faulthandler.enable(stacks)
    faulthandler.dump_traceback_later(timeout, exit=True, file=stacks)
    torch.set_num_threads(1)
    start_as_always()
    # What torchrun sets, for code that asks the environment.
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=_COLLECTIVE
        )
        dist.barrier()  # one that ends at once would leave others that are still connecting
        said, failed = (function(*args), None), False
    except BaseException:  # noqa: BLE001 - the other side raises it
        said, failed = (None, traceback.format_exc()), True
    # Not through torch's own pickler, whose tensors stay in this process, which ends.
    pipe.send_bytes(pickle.dumps(said))
    pipe.close()
    if failed:
        # Not through the group's destructor, which would wait for the others.
        sys.stderr.flush()
        os._exit(1)
    dist.destroy_process_group()
    run_exit_functions()
