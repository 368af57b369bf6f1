"""A process that ends as soon as a round is over: gloo's own thread must not need the interpreter then."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed

# Pairs of ranks, one after the other, forked from one process that has imported torch: each ends like a script.
PROGRAM = """
import os, sys, tempfile
import torch
import torch.distributed as dist
from ice_engine.distributed.rounds import rounds

torch.set_num_threads(1)
aborted = 0
for _ in range(12):
    folder = tempfile.mkdtemp(dir=sys.argv[1])
    ranks = []
    for rank in range(2):
        if not (pid := os.fork()):
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
            together = rounds()
            together.close()  # so that the end of the process waits for no thread of ours
            together.texts("the last word", "the end")
            sys.exit()
        ranks.append(pid)
    aborted += sum(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0 for pid in ranks)
print("aborted", aborted)
"""


def test_a_process_that_ends_right_after_a_round_ends_well(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stdout == "aborted 0\n", done.stderr
