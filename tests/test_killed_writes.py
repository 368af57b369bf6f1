"""A process is killed at a hundred random moments while it writes checkpoints: the last whole one is there."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers.checkpoint import CheckpointEvents

import ice_engine as ice
from tests.soak import fork

KILLS = 100
SIZE = 100_000


def train(folder: Path, pipe: int, *, background: bool) -> None:
    """Write a checkpoint after every step; tell which one this process began at, and which were written."""
    weight = torch.nn.Parameter(torch.zeros(SIZE))
    model = torch.nn.ParameterDict({"weight": weight})
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0))
    trainer = Engine(lambda engine, batch: optimizer.backward(-weight.sum()))  # every step adds 1
    optimizer.attach(trainer)
    to_save = {"trainer": trainer, "model": model, "optimizer": optimizer}
    checkpoint = ice.Checkpoint(to_save, folder, background=background, signals=())
    checkpoint.attach(trainer, Events.ITERATION_COMPLETED)
    checkpoint.resume(trainer)
    assert torch.equal(weight, torch.full((SIZE,), float(trainer.state.iteration)))
    os.write(pipe, f"{trainer.state.iteration}\n".encode())

    def tell() -> None:
        newest = max(int(file.stem.split("_")[1]) for file in folder.glob("*.pt"))
        os.write(pipe, f"{newest}\n".encode())

    trainer.add_event_handler(CheckpointEvents.SAVED_CHECKPOINT, tell)
    trainer.run([None] * 1_000_000, max_epochs=1)


def kill(folder: Path, *, background: bool, draw: random.Random) -> tuple[int, int, bool]:
    """Kill one process; return where it began, the last file it spoke of, and whether one was half written."""
    reader, writer = os.pipe()
    pid = fork(folder.parent, train, folder, writer, background=background)
    os.close(writer)
    with os.fdopen(reader) as told:
        numbers, times = [], []
        while len(numbers) < 3 and (line := told.readline()):
            numbers.append(int(line))
            times.append(time.monotonic())
        time.sleep(draw.uniform(0, 2 * (times[-1] - times[-2]) if len(times) > 1 else 0))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL, "it ended by itself"
        rest = told.read().splitlines()
    return numbers[0], int(rest[-1]) if rest else numbers[-1], any(folder.glob("*.part"))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    draw = random.Random(0)  # noqa: S311
    told, torn, moments = 0, 0, []
    for number in range(KILLS + 1):
        began, last, in_a_write = kill(folder, background=bool(number % 2), draw=draw)
        assert began >= told, f"kill {number} lost checkpoint {told}: it went on from {began}"
        told, torn = last, torn + in_a_write
        moments.append(began)
    os.write(1, json.dumps({"torn": torn, "began": moments, "left": len(list(folder.glob("*.pt")))}).encode())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, for many kills a second")
def test_after_each_kill_the_last_whole_checkpoint_loads(tmp_path):
    command = [sys.executable, "-m", "tests.test_killed_writes", str(tmp_path / "run")]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=100, check=False)
    said = "\n".join(file.read_text() for file in tmp_path.glob("stderr-*"))
    assert done.returncode == 0, done.stderr + said
    found = json.loads(done.stdout)
    assert found["began"] == sorted(set(found["began"]))  # each one came further than the one before
    assert found["torn"] > KILLS // 5  # most of the time goes into writing
    assert found["left"] <= 2  # a file that was written, and the one before, which it had not yet removed


if __name__ == "__main__":
    main(Path(sys.argv[1]))
