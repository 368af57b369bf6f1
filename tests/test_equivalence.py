"""The same numbers as a hand-written loop, and as one big batch."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ignite.engine import Engine

import ice_engine as ice

OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "adam": functools.partial(torch.optim.Adam, lr=0.01),
    "adamw": functools.partial(torch.optim.AdamW, lr=0.01),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=0.01),
}


def make_model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).to(dtype)


def make_batches(
    count: int, size: int = 3, dtype: torch.dtype = torch.float32
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    shapes = [(size, 4), (size, 1)]
    return [tuple(torch.randn(s, generator=generator, dtype=dtype) for s in shapes) for _ in range(count)]


def cosine_factor(step: int, total: int) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * min(step / total, 1.0)))


def plain_loop(model, optimizer, batches, k, *, epochs, clip, scaler, schedule_total):
    """What a careful engineer writes: sum the losses' gradients, divide by the window's true length."""
    base, step = [group["lr"] for group in optimizer.param_groups], 0
    for _ in range(epochs):
        for first in range(0, len(batches), k):
            window = batches[first : first + k]
            for x, y in window:
                loss = torch.nn.functional.mse_loss(model(x), y)
                (scaler.scale(loss) if scaler else loss).backward()
            if scaler:
                scaler.unscale_(optimizer)
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]) * (1.0 / len(window))
            # The mean and the clip are one factor: where it is not a power of two, two would round twice.
            coefficient = (clip / (norm + 1e-6)).clamp(max=1.0) if clip else 1.0
            for p in model.parameters():
                p.grad.mul_(1.0 / len(window) * coefficient)
            if schedule_total:
                for group, lr in zip(optimizer.param_groups, base, strict=True):
                    group["lr"] = lr * cosine_factor(step, schedule_total)
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            optimizer.zero_grad()
            step += 1


@settings(max_examples=60)
@given(
    kind=st.sampled_from(sorted(OPTIMIZERS)),
    k=st.integers(1, 5),
    count=st.integers(1, 9),
    epochs=st.integers(1, 2),
    clip=st.sampled_from([None, 0.1, 10.0]),
    scaled=st.booleans(),
    implementation=st.sampled_from([{}, {"foreach": True}, {"foreach": False}, {"fused": True}]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    schedule_total=st.sampled_from([None, 4, 50]),
)
def test_parameters_equal_a_plain_loop_bit_for_bit(
    kind, k, count, epochs, clip, scaled, implementation, weight_decay, schedule_total
):
    if kind == "rmsprop" and "fused" in implementation:
        implementation = {"foreach": True}
    factory = functools.partial(OPTIMIZERS[kind], weight_decay=weight_decay, **implementation)
    batches = make_batches(count)

    expected = make_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2) if scaled else None
    reference = factory(expected.parameters())
    plain_loop(expected, reference, batches, k, epochs=epochs, clip=clip, scaler=scaler, schedule_total=schedule_total)

    actual = make_model()
    optimizer = ice.Optimizer(
        factory(actual.parameters()),  # an instance: of a factory, ours might take another implementation than torch
        accumulation_steps=k,
        clip=ice.clip_norm(clip) if clip else None,
        grad_scaler=torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2) if scaled else None,
        processors=[ice.schedules.cosine(total=schedule_total)] if schedule_total else [],
    )
    trainer = Engine(lambda _, b: optimizer.backward(torch.nn.functional.mse_loss(actual(b[0]), b[1])))
    optimizer.attach(trainer)
    trainer.run(batches, max_epochs=epochs)

    for p, q in zip(expected.parameters(), actual.parameters(), strict=True):
        if "fused" in implementation:
            # Its kernel divides by what the loop multiplies with: another rounding, if that is no power of two.
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(p, q)
    assert optimizer.clocks["step"] == epochs * -(-count // k)
    if scaled:
        assert scaler.state_dict() == optimizer.grad_scaler.state_dict()


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    k=st.integers(1, 4),
    reduction=st.sampled_from(["mean", "sum"]),
)
def test_a_weighted_window_equals_one_big_batch_in_float64(sizes, k, reduction):
    batches = [make_batches(1, size, torch.float64)[0] for size in sizes]
    loss_fn = functools.partial(torch.nn.functional.mse_loss, reduction=reduction)

    expected = make_model(torch.float64)
    reference = torch.optim.SGD(expected.parameters(), lr=0.1)
    for first in range(0, len(batches), k):
        window = batches[first : first + k]
        x, y = (torch.cat(part) for part in zip(*window, strict=True))
        torch.nn.functional.mse_loss(expected(x), y).backward()
        reference.step()
        reference.zero_grad()

    actual = make_model(torch.float64)
    optimizer = ice.Optimizer(
        torch.optim.SGD(actual.parameters(), lr=0.1), accumulation_steps=k, loss_reduction=reduction
    )
    trainer = Engine(lambda _, b: optimizer.backward(loss_fn(actual(b[0]), b[1]), weight=len(b[0])))
    optimizer.attach(trainer)
    trainer.run(batches, max_epochs=1)

    for p, q in zip(expected.parameters(), actual.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("k", [1, 3, 4])
def test_equal_micro_batches_equal_one_big_batch_to_1e_6_in_float32(k):
    batches = make_batches(k)
    expected, actual = make_model(), make_model()
    reference = torch.optim.SGD(expected.parameters(), lr=0.1)
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    torch.nn.functional.mse_loss(expected(x), y).backward()
    reference.step()

    optimizer = ice.Optimizer(torch.optim.SGD(actual.parameters(), lr=0.1), accumulation_steps=k)
    for x, y in batches:
        optimizer.backward(torch.nn.functional.mse_loss(actual(x), y))
        stepped = optimizer.update()

    assert stepped
    for p, q in zip(expected.parameters(), actual.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-7)
