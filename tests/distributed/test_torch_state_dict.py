"""Beside optimizers of ours: torch's ``get_state_dict`` and ``set_state_dict``, which go by what each rank holds."""

import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import ice_engine as ice
from ice_engine.errors import NotConsolidatedError
from tests.distributed.launch import launch
from tests.distributed.test_fsdp_windows import batches, network, whole

pytestmark = pytest.mark.distributed

HALF = 2  # of the steps


def _made() -> tuple[Any, torch.optim.Optimizer]:
    model = network(3, 1)
    fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def _by_hand(model: torch.nn.Module, inner: torch.optim.Optimizer, data: list[torch.Tensor]) -> None:
    for batch in data:
        inner.zero_grad()
        model(batch).square().mean().backward()
        inner.step()


def _by_ours(model: torch.nn.Module, inner: torch.optim.Optimizer, data: list[torch.Tensor]) -> ice.Optimizer:
    optimizer = ice.Optimizer(inner)
    trainer = Engine(lambda _, batch: optimizer.backward(model(batch).square().mean()))
    optimizer.attach(trainer, model=model)
    trainer.run(data)
    return optimizer


def _taken_over(before: Any, after: Any) -> list[list[float]]:
    data = batches(dist.get_rank())
    model, inner = _made()
    _by_hand(model, inner, data)
    wanted = whole(model)

    model, inner = _made()
    before(model, inner, data[:HALF])
    of_model, of_optimizer = get_state_dict(model, inner)
    model, inner = _made()
    set_state_dict(model, inner, model_state_dict=of_model, optim_state_dict=of_optimizer)
    after(model, inner, data[HALF:])
    return [whole(model), wanted]


@pytest.mark.parametrize(("before", "after"), [(_by_hand, _by_ours), (_by_ours, _by_hand)])
def test_the_inner_optimizer_goes_from_a_plain_loop_to_ours_and_back(before, after):
    for found, wanted in launch(_taken_over, 2, before, after):
        assert found == wanted


def _given_ours() -> list[str]:
    model, inner = _made()
    optimizer = _by_ours(model, inner, batches(dist.get_rank())[:HALF])
    said = []
    try:
        get_state_dict(model, optimizer)
    except NotConsolidatedError as error:
        said.append(str(error))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    try:
        optimizer.load_state_dict(torch.load(file, weights_only=True))
    except NotConsolidatedError as error:
        said.append(str(error))
    return said


def test_a_rank_without_the_state_says_what_torchs_own_functions_are_to_be_given():
    first, (asked, loaded) = launch(_given_ours, 2)
    assert first == []
    assert "'state'" in asked
    assert "give them optimizer.inner" in asked
    assert "this is a stub: the whole state is on rank 0" in loaded
