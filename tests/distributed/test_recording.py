"""Runs of many ranks, recorded: rank 0 writes, and what it cannot write stops all."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine
from torch.nn.parallel import DistributedDataParallel

import ice_engine as ice
from ice_engine.ledger import read
from tests.distributed.launch import launch, watch

pytestmark = pytest.mark.distributed


def train(folder, rank_0_writes_to="ledger.jsonl"):
    """Train with weights that differ by rank, recorded into *folder* from every rank's point of view."""
    model = DistributedDataParallel(torch.nn.Linear(1, 1, bias=False))
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=0.5), accumulation_steps=2)
    engine = Engine(lambda _, batch: optimizer.backward(model(torch.ones(1, 1)).mean(), weight=batch))
    optimizer.attach(engine, model=model)
    path = Path(folder, rank_0_writes_to if dist.get_rank() == 0 else f"rank{dist.get_rank()}.jsonl")
    ice.Ledger(path).attach(engine, optimizer)
    ice.TensorBoard(Path(folder, f"board{dist.get_rank()}")).attach(engine, optimizer)
    engine.run([1.0 + dist.get_rank()] * 6)
    return float(optimizer.record.grad_norm)


def test_rank_0_alone_writes_and_its_weights_are_those_of_all(tmp_path):
    norms = launch(train, 2, str(tmp_path))
    assert norms[0] == norms[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["board0", "ledger.jsonl"]
    assert [row["optimizer/weight"] for row in read(tmp_path / "ledger.jsonl")] == [6.0, 6.0, 6.0]


@pytest.mark.soak
def test_what_rank_0_cannot_write_stops_all_ranks(tmp_path):
    (tmp_path / "file").touch()
    outcomes = watch(train, 2, str(tmp_path), "file/ledger.jsonl")
    assert "WriteError: the ledger" in outcomes[0].error
    assert "RankError" in outcomes[1].error
    assert "rank 0" in outcomes[1].error
