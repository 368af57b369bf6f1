"""Threads that read what a stream still computes; on the CPU there is nothing to wait for."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ice_engine.snapshot import Snapshots
from ice_engine.streams import mark, streamed


def test_the_cpu_has_no_streams():
    assert streamed([torch.ones(1), torch.nn.Parameter(torch.ones(1)), torch.ones(1, device="meta")]) == set()
    assert mark(set()) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the CPU has no streams")
def test_a_snapshot_waits_for_the_stream_that_training_is_on():
    weight = torch.zeros(4, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10**9)
        weight.fill_(1.0)
        snapshot = Snapshots().take({"weight": weight}, [weight])
    with ThreadPoolExecutor(1) as thread:
        state = thread.submit(snapshot.complete).result()
    assert state["weight"].tolist() == [1.0] * 4
