"""What a record says on request, against the definitions."""

import math
import time

import pytest
import torch
from ignite.engine import Engine

import ice_engine as ice
from ice_engine.errors import ArgumentValueError, StateDictError


def run(batches, *measures, k=4, weights=None, dtype=torch.float64, scaler=None, clip=None, size=3):
    weight = torch.nn.Parameter(torch.ones(size, dtype=dtype))
    optimizer = ice.Optimizer(
        torch.optim.SGD([weight], lr=1e-9), accumulation_steps=k, grad_scaler=scaler, clip=clip
    ).measure(*measures)
    records = []

    def train_step(engine, batch):
        optimizer.backward((batch @ weight).mean(), weight=len(batch) if weights else None)

    trainer = Engine(train_step)
    optimizer.attach(trainer)
    trainer.add_event_handler(optimizer.event("STEP_COMPLETED"), lambda: records.append(optimizer.record))
    trainer.run(batches)
    return records, optimizer


NONE = -1.0  # for None, which cannot be compared approximately


def noise(windows):
    """The definition, window by window, in double."""
    signal = variance = 0.0
    found = []
    for window in windows:
        first, every = window[0], torch.cat(window)
        small, big = first.mean(0).square().sum().item(), every.mean(0).square().sum().item()
        b, n = len(first), len(every)
        signal = 0.99 * signal + 0.01 * (n * big - b * small) / (n - b)
        variance = 0.99 * variance + 0.01 * (small - big) / (1 / b - 1 / n)
        found.append(variance / signal if signal > 0 and variance > 0 else NONE)
    return found


@pytest.mark.parametrize(
    "clip", [None, ice.clip_norm(1e-3), ice.clip_norm(1e-3, norm_type=math.inf), ice.clip_value(1)], ids=repr
)
@pytest.mark.parametrize("scaled", [False, True])
def test_the_noise_scale_is_that_of_the_definition_for_ragged_windows(clip, scaled):
    batches = [2 * torch.randn(n, 3, dtype=torch.float64) + 1.5 for n in (2, 5, 1, 3, 4, 4, 4, 4, 1, 7)]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
    records, _ = run(batches, "noise_scale", weights=True, clip=clip, scaler=scaler)

    windows = [batches[:4], batches[4:8], batches[8:]]
    found = [NONE if record.noise_scale is None else record.noise_scale for record in records]
    assert found == pytest.approx(noise(windows), rel=1e-9)
    assert max(found) > 0


def test_the_noise_scale_finds_the_noise_that_was_put_in():
    generator = torch.Generator().manual_seed(0)
    sigma, size = 4.0, 50
    batches = [1.0 + sigma * torch.randn(8, size, generator=generator, dtype=torch.float64) for _ in range(4000)]
    records, _ = run(batches, "noise_scale", weights=True, size=size)

    # trace of the covariance over the squared length of the mean: 50 * 16 / 50
    assert records[-1].noise_scale == pytest.approx(16.0, rel=0.15)


def test_a_window_of_one_micro_batch_has_no_noise_scale():
    records, _ = run([torch.ones(2, 3, dtype=torch.float64)] * 3, "noise_scale", k=1)

    assert [record.noise_scale for record in records] == [None] * 3


def test_the_running_means_are_saved_and_go_on():
    batches = [torch.randn(3, 3, dtype=torch.float64) + 1.0 for _ in range(16)]
    whole, _ = run(batches, "noise_scale")
    _, first = run(batches[:8], "noise_scale")
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    second = ice.Optimizer(torch.optim.SGD([weight], lr=1e-9), accumulation_steps=4).measure("noise_scale")
    second.load_state_dict(first.state_dict())
    for batch in batches[8:]:
        second.backward((batch @ weight).mean())
        second.update()

    assert second.record.noise_scale == whole[-1].noise_scale


@pytest.mark.parametrize("place", [0, 1, 3], ids=["first", "second", "last"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_window_that_is_not_finite_adds_nothing_to_the_noise_scale(bad, place):
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    sgd = torch.optim.SGD([weight], lr=0.0)
    optimizer = ice.Optimizer(sgd, accumulation_steps=4, nonfinite="off").measure("noise_scale")
    windows = [[torch.randn(3, 3, dtype=torch.float64) + 1.0 for _ in range(4)] for _ in range(3)]
    broken = [batch.clone() for batch in windows[1]]
    broken[place] *= bad
    found = []
    for window in (windows[0], broken, windows[1], windows[2]):
        for batch in window:
            optimizer.backward((batch @ weight).mean(), weight=3)
            optimizer.update()
        weight.data.fill_(1.0)  # which the step has made NaN
        found.append(NONE if optimizer.record.noise_scale is None else optimizer.record.noise_scale)

    expected = noise(windows)
    assert found == pytest.approx([expected[0], *expected], rel=1e-9)
    assert all(map(math.isfinite, optimizer.state_dict()["ice_engine"]["noise"]))


def test_the_gradient_norm_is_of_the_mean_without_a_clip():
    records, _ = run([torch.full((2, 3), 2.0, dtype=torch.float64)] * 4, "grad_norm")

    assert [float(record.grad_norm) for record in records] == [pytest.approx(math.sqrt(12), rel=1e-12)]
    assert run([torch.ones(2, 3, dtype=torch.float64)] * 4)[0][0].grad_norm is None


def test_the_update_ratio_is_per_group_and_known_when_the_step_is_done():
    a, b = torch.nn.Parameter(torch.tensor([3.0, 4.0])), torch.nn.Parameter(torch.zeros(1))
    groups = [{"params": [a], "name": "a"}, {"params": [b], "name": "b"}]
    optimizer = ice.Optimizer(torch.optim.SGD(groups, lr=0.1)).measure("update_ratio")
    trainer = Engine(lambda engine, batch: optimizer.backward(a.sum() + b.sum()))
    optimizer.attach(trainer)
    started = []
    trainer.add_event_handler(optimizer.event("STEP_STARTED"), lambda: started.append(optimizer.record.update_ratio))
    trainer.run([0])

    assert started == [None]
    ratios = {name: float(ratio) for name, ratio in optimizer.record.update_ratio.items()}
    assert ratios == {"a": pytest.approx(0.1 * math.sqrt(2) / 5), "b": math.inf}


def test_times_are_where_the_time_went():
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=0.1), accumulation_steps=2).measure("times")

    def slow():
        for _ in range(4):
            time.sleep(0.02)
            yield 1.0

    def train_step(engine, batch):
        time.sleep(0.06)
        optimizer.backward(weight * batch)

    trainer = Engine(train_step)
    optimizer.attach(trainer)
    records = []
    trainer.add_event_handler(optimizer.event("STEP_COMPLETED"), lambda: records.append(optimizer.record.times))
    trainer.run(slow(), epoch_length=4)

    assert len(records) == 2
    for times in records:  # sleeping takes at least as long as it is told
        assert times["compute"] >= 0.12
        assert times["step"] > 0
    assert records[1]["data"] >= 0.04


def test_times_may_be_asked_for_when_the_run_is_attached_already():
    records, optimizer = run([torch.ones(2, 3, dtype=torch.float64)] * 4)
    assert records[0].times is None
    optimizer.measure("times").measure("times")
    optimizer.engine.run([torch.ones(2, 3, dtype=torch.float64)] * 4)
    assert optimizer.record.times["compute"] > 0


def test_an_unknown_measure_is_refused():
    with pytest.raises(ArgumentValueError, match=r"measure\(\) must be one of 'grad_norm', .*; got 'noise'"):
        run([], "noise")


@pytest.mark.parametrize("noise", [5, [1.0], [1.0, 2.0, "x"], None])
def test_damaged_running_means_are_refused_before_anything_is_loaded(noise):
    _, optimizer = run([torch.ones(2, 3, dtype=torch.float64)] * 4, "noise_scale")
    state = optimizer.state_dict()
    state["ice_engine"]["noise"] = noise

    with pytest.raises(StateDictError, match="'ice_engine' is damaged"):
        optimizer.load_state_dict(state)
