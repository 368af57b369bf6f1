"""The peak memory of a step is that of the loop by hand: no copy of a gradient is ever made."""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ice_engine as ice
from tests.two_ways import FORMS, by_hand, wrapped

WIDTH = 256
LAYER = 4 * WIDTH * WIDTH  # bytes of a weight, and of its gradient


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(*[torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(8)])


class Allocations(TorchDispatchMode):
    """Adds up the bytes of new storages as big as a weight: results that share no memory with what went in."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs or {}))}
        out = func(*args, **(kwargs or {}))
        new = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(out)}
        self.made += [func.__name__ for at, size in new.items() if at not in given and size >= LAYER]
        return out


def tensors(found):
    if isinstance(found, torch.Tensor):
        return [found]
    if isinstance(found, dict):
        found = list(found.values())
    return [t for each in found for t in tensors(each)] if isinstance(found, list | tuple) else []


def peak(step):
    """Return by how many bytes memory grew at most during *step*, of what torch's allocator hands out."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    now = most = 0
    memory = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(memory, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def ours(layers, factory, k, *, scaled):
    optimizer = wrapped(layers, factory, k, scaled=scaled)

    def window(batch):
        for _ in range(k):
            optimizer.backward(layers(batch).square().mean(), weight=len(batch))
            optimizer.update()

    return window


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("factory", FORMS.values(), ids=FORMS)
def test_the_peak_of_a_step_is_that_of_the_loop_by_hand(factory, k, scaled):
    batch = torch.randn(4, WIDTH)
    grown = []
    for make in (by_hand, ours):
        window = make(model(), factory, k, scaled=scaled)
        window(batch)  # makes the state
        grown.append(peak(functools.partial(window, batch)))

    hand, own = grown
    assert hand >= 8 * LAYER  # the gradients at least: the profiler has seen memory
    assert own <= hand + 4096  # numbers of shape (), and no tensor of a layer


def update(optimizer, layers, batch):
    optimizer.backward(layers(batch).square().mean())
    seen = Allocations()
    with seen:
        optimizer.update()
    return seen.made


@pytest.mark.parametrize("watched", [False, True])
def test_a_window_closes_without_a_single_allocation_as_big_as_a_weight(watched):
    layers, batch = model(), torch.randn(4, WIDTH)
    optimizer = ice.Optimizer(
        FORMS["fused"](layers.parameters()), clip=ice.clip_norm(1.0), grad_scaler=torch.amp.GradScaler("cpu")
    )
    update(optimizer, layers, batch)
    if watched:  # then the gradients are multiplied before the kernel: in place
        optimizer.register_step_pre_hook(lambda *_: None)

    assert update(optimizer, layers, batch) == []


def test_the_count_sees_a_copy():
    """What measures is measured: the update ratio needs a copy of the parameters, and says so."""
    layers, batch = model(), torch.randn(4, WIDTH)
    optimizer = ice.Optimizer(FORMS["fused"](layers.parameters())).measure("update_ratio")
    update(optimizer, layers, batch)

    assert len(update(optimizer, layers, batch)) >= 8
