"""What torch is told for the whole process: another dtype or device for new tensors, inference mode at the import."""

import math

import pytest
import torch

import ice_engine as ice
from tests.forked import python

PROGRAM = """
import torch
{before}
import ice_engine as ice
{after}
weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float32, device="cpu"))
scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
optimizer = ice.Optimizer(
    torch.optim.SGD([weight], lr=0.1), accumulation_steps=2, clip=ice.clip_norm(1.0), grad_scaler=scaler
)
for _ in range(2):
    optimizer.backward((weight * 2).sum())
    optimizer.update()
assert optimizer.clocks["step"] == 1
print(weight.tolist())
"""
EXPECTED = 1.0 - 0.1 / math.sqrt(3)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("torch.set_default_dtype(torch.float64)", ""),
        ("", "torch.set_default_dtype(torch.float64)"),
        ("torch.set_default_device('meta')", ""),  # stands for a GPU: on it nothing could be read
        ("", "torch.set_default_device('meta')"),
        ("mode = torch.inference_mode(); mode.__enter__()", "mode.__exit__(None, None, None)"),
    ],
)
def test_a_step_is_the_same_under_other_defaults(before, after):
    done = python("-c", PROGRAM.format(before=before, after=after))
    assert done.returncode == 0, done.stderr
    assert eval(done.stdout) == pytest.approx([EXPECTED] * 3, rel=1e-6)  # noqa: S307 - our own list


@pytest.mark.parametrize("settings", [{"nonfinite": "skip"}, {"grad_scaler": "cpu"}, {"clip": ice.clip_value(1.0)}])
def test_float32_trains_in_float64_defaults(settings):
    if "grad_scaler" in settings:
        settings = {"grad_scaler": torch.amp.GradScaler("cpu", init_scale=4.0)}
    torch.set_default_dtype(torch.float64)
    try:
        weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float32))
        optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=0.1), **settings)
        optimizer.backward(weight.sum())
        assert optimizer.update()
    finally:
        torch.set_default_dtype(torch.float32)
    assert weight.tolist() == pytest.approx([0.9] * 3, rel=1e-6)
