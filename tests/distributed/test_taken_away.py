"""torchrun is told to end: it tells its ranks, which all save the same step, and end with our code."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.distributed

PROGRAM = """
import json, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from ignite.engine import Events
import ice_engine as ice
from tests.distributed.test_checkpoints import Training

torch.set_num_threads(1)
dist.init_process_group("gloo")
folder = Path(sys.argv[1])
training = Training(str(folder / "checkpoints"))
training.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: time.sleep(0.02))
ready = folder / f"ready-{dist.get_rank()}"
training.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: ready.touch())
try:
    training.trainer.run(training.data, max_epochs=10_000)
except ice.Preempted as preempted:
    found = [preempted.code, training.trainer.state.iteration, training.optimizer.clocks["step"]]
    (folder / f"ended-{dist.get_rank()}").write_text(json.dumps(found))
    raise
"""


def test_sigterm_to_torchrun(tmp_path):
    root = Path(__file__).parents[2]
    program = tmp_path / "train.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    agent = subprocess.Popen(
        [*command, str(program), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        until = time.monotonic() + 60
        while len(list(tmp_path.glob("ready-*"))) < 2:
            assert agent.poll() is None, agent.communicate()[0]
            assert time.monotonic() < until
            time.sleep(0.05)
        agent.send_signal(signal.SIGTERM)
        said = agent.communicate(timeout=30)[0]
    finally:
        agent.kill()
    assert agent.returncode == 1, said  # torchrun's own, whatever its ranks return
    first, second = (json.loads((tmp_path / f"ended-{rank}").read_text()) for rank in range(2))
    assert first == second
    assert first[0] == 75
    (file,) = (tmp_path / "checkpoints").iterdir()
    assert file.name == f"checkpoint_{first[1]}.pt"
    saved = torch.load(file, weights_only=True)
    assert saved["optimizer"]["ice_engine"]["clocks"]["step"] == first[2]
    assert saved["optimizer"]["ice_engine"]["window"]["micro_batches"] == 0
