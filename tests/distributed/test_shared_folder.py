"""Ignite's checkpoint in one file, written by one of many ranks into a folder that all share."""

from pathlib import Path

import pytest
import torch.distributed as dist
from ignite.engine import Engine

import ice_engine as ice
from tests.distributed.launch import launch

pytestmark = [pytest.mark.distributed, pytest.mark.soak]


def _fast_rank(folder: str) -> list[list[str]]:
    engine = Engine(lambda *_: None)
    checkpoint = ice.Checkpoint({"engine": engine}, folder, n_saved=1)
    there = []
    for iteration in (1, 2):
        engine.state.iteration = iteration
        if dist.get_rank() == 1 or iteration == 1:
            checkpoint(engine)
        dist.barrier()
        there.append(sorted(file.name for file in Path(folder).iterdir()))
        dist.barrier()
    if dist.get_rank() == 0:
        checkpoint(engine)
    dist.barrier()
    return [*there, sorted(file.name for file in Path(folder).iterdir())]


def test_a_rank_that_is_ahead_removes_no_file_before_the_new_one_is_written(tmp_path):
    old, new = ["engine_1.pt"], ["engine_2.pt"]
    assert launch(_fast_rank, 2, str(tmp_path)) == [[old, old, new]] * 2
