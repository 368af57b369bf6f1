"""create_trainer: the loop one would have written by hand."""

import copy

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from torch.nn.functional import cross_entropy, mse_loss

import ice_engine as ice
from ice_engine.batches import batch_size
from ice_engine.errors import ArgumentTypeError, ArgumentValueError, AttachError
from ice_engine.trainer import create_trainer


def network(dtype=torch.float32):
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).to(dtype)


def batches(sizes, dtype=torch.float32):
    return [(torch.randn(n, 6, dtype=dtype), torch.randn(n, 3, dtype=dtype)) for n in sizes]


def adamw(model, **settings):
    return ice.Optimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), **settings)


@pytest.mark.parametrize("size", [1, 3, 4, 7, 100])
def test_it_equals_a_hand_written_ignite_loop_bit_for_bit(size):
    model, data = network(), batches([size] * 7)
    twin = copy.deepcopy(model)
    plain = torch.optim.AdamW(twin.parameters(), lr=1e-2)

    def by_hand(engine, batch):
        twin.train()
        x, y = batch
        plain.zero_grad()
        loss = mse_loss(twin(x), y)
        loss.backward()
        plain.step()
        return loss.item()

    reference, losses, theirs = Engine(by_hand), [], []
    trainer = create_trainer(model, adamw(model), mse_loss)
    for engine, seen in ((trainer, losses), (reference, theirs)):
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e, seen=seen: seen.append(e.state.output))
        engine.run(data, max_epochs=3)
    assert losses == theirs
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_window_equals_a_hand_written_one_bit_for_bit():
    model, data = network(), batches([3] * 6)
    twin = copy.deepcopy(model)
    plain = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    for first in range(0, 6, 2):
        plain.zero_grad()
        for x, y in data[first : first + 2]:
            mse_loss(twin(x), y).backward()
        for parameter in twin.parameters():
            parameter.grad.mul_(1 / 2)
        plain.step()
    create_trainer(model, adamw(model, accumulation_steps=2), mse_loss).run(data)
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ragged_micro_batches_equal_one_big_batch(reduction):
    model, data = network(torch.float64), batches([5, 2, 1, 7], torch.float64)
    twin = copy.deepcopy(model)
    plain = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    mse_loss(twin(x), y).backward()
    plain.step()

    def loss_fn(y_pred, y):
        loss = mse_loss(y_pred, y)
        return loss if reduction == "mean" else loss * len(y)

    trainer = create_trainer(model, adamw(model, accumulation_steps=4, loss_reduction=reduction), loss_fn)
    assert trainer.run(data).optimizer_step == 1
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_weight_counts_what_the_loss_averages_over():
    ignored = -100
    model = torch.nn.Linear(6, 3).double()
    twin = copy.deepcopy(model)
    data = [
        (torch.randn(4, 6, dtype=torch.float64), torch.tensor(labels))
        for labels in ([0, 1, 2, 1], [2, -100, -100, -100])
    ]
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    cross_entropy(twin(x), y, ignore_index=ignored).backward()
    plain.step()
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1), accumulation_steps=2)
    create_trainer(model, optimizer, cross_entropy, weight=lambda x, y: int((y != ignored).sum())).run(data)
    assert optimizer.record.weight == 5
    torch.testing.assert_close(model.weight, twin.weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_model_and_loss_in_its_dtype_and_keeps_the_parameters(dtype):
    model, seen = network(), []

    def loss_fn(y_pred, y):
        seen.append((y_pred.dtype, torch.is_autocast_enabled("cpu")))
        return mse_loss(y_pred.float(), y)

    create_trainer(model, adamw(model), loss_fn, autocast=dtype).run(batches([4]))
    assert seen == [(dtype, True)]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_is_for_the_device_that_the_model_has_been_moved_to():
    model, seen = network().to("meta"), []

    def loss_fn(y_pred, y):
        seen.append(y_pred.dtype)
        return mse_loss(y_pred.float(), y)

    trainer = create_trainer(model, adamw(model), loss_fn, autocast=torch.bfloat16)
    torch.__future__.set_swap_module_params_on_conversion(True)  # so that the optimizer's parameters stay the model's
    try:
        model.to_empty(device="cpu")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    trainer.run(batches([4]))

    assert seen == [torch.bfloat16]
    assert trainer.state.optimizer_step == 1


def test_without_autocast_there_is_none():
    model, seen = network(), []
    create_trainer(model, adamw(model), lambda p, y: (seen.append(p.dtype), mse_loss(p, y))[1]).run(batches([4]))
    assert seen == [torch.float32]


def test_the_output_is_the_loss_or_what_output_transform_makes_of_it():
    model, data = network(), batches([4])
    expected = mse_loss(model(data[0][0]), data[0][1]).item()
    assert create_trainer(model, adamw(model), mse_loss).run(data).output == expected
    trainer = create_trainer(
        model,
        adamw(model),
        mse_loss,
        output_transform=lambda x, y, y_pred, loss: {"x": x, "y": y, "shape": y_pred.shape, "loss": loss.item()},
    )
    output = trainer.run(data).output
    assert output["x"] is data[0][0]
    assert output["y"] is data[0][1]
    assert output["shape"] == (4, 3)


def test_batches_are_prepared_and_moved_and_the_model_trains():
    model = network().eval()
    seen = []

    def prepare_batch(batch, device, non_blocking):
        seen.append((device, non_blocking, model.training))
        return batch["x"], batch["y"]

    x, y = batches([4])[0]
    create_trainer(model, adamw(model), mse_loss, device="cpu", prepare_batch=prepare_batch).run([{"x": x, "y": y}])
    assert seen == [(torch.device("cpu"), False, True)]


def test_a_device_moves_the_batch():
    model = torch.nn.Linear(6, 3, device="meta")
    seen = []

    def loss_fn(y_pred, y):
        seen.append((y_pred.device.type, y.device.type))
        return mse_loss(y_pred, y)

    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    create_trainer(
        model, optimizer, loss_fn, device=torch.device("meta"), output_transform=lambda x, y, y_pred, loss: None
    ).run(batches([4]))
    assert seen == [("meta", "meta")]


def test_errors_of_a_step_name_the_parameters_of_the_model():
    model, data = network(), batches([4])
    data[0][1][:] = float("inf")
    trainer = create_trainer(model, adamw(model, clip=ice.clip_norm(1.0), max_consecutive_skips=1), mse_loss)
    trainer.logger.disabled = True
    with pytest.raises(ice.NonFiniteGradientError, match=r"0\.weight"):
        trainer.run(data)


# -- the number of samples ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.ones(5, 2), torch.ones(5)),
        (torch.ones(2, 5), torch.ones(5, 1)),
        ({"tokens": torch.ones(7)}, torch.ones(5)),
        (torch.ones(5, 2), torch.ones(())),
        (torch.ones(5, 2), {"boxes": torch.ones(9)}),
        (torch.ones(5, 2), (torch.ones(5), torch.ones(5))),
        (torch.ones(5, 2), None),
        (None, np.ones((5, 2))),
    ],
)
def test_samples_are_the_first_dimension_of_y_or_else_of_x(x, y):
    assert batch_size(x, y) == 5


@pytest.mark.parametrize(("x", "y"), [({"a": torch.ones(5)}, None), ([torch.ones(5)], (torch.ones(5),)), (None, "abc")])
def test_a_length_that_need_not_be_the_batchs_is_not_guessed(x, y):
    with pytest.raises(ArgumentTypeError, match=r"cannot tell how many samples .* create_trainer\(\.\.\., weight="):
        batch_size(x, y)


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value", "match"),
    [
        ("model", lambda x: x, "model must be a torch.nn.Module, got function"),
        ("loss_fn", None, "loss_fn must be callable, got None"),
        ("prepare_batch", 3, "prepare_batch must be callable, got 3"),
        ("weight", 1.0, r"weight must be callable, got 1\.0"),
        ("output_transform", "loss", "output_transform must be callable, got 'loss'"),
        ("autocast", True, r"autocast must be a torch.dtype or None, got True; such as autocast=torch\.bfloat16"),
        ("autocast", "bf16", "autocast must be a torch.dtype or None, got 'bf16'"),
        ("device", 3.0, r"device must be a torch\.device or a string, got 3\.0"),
    ],
)
def test_wrong_types_are_refused_and_nothing_is_attached(argument, value, match):
    model = network()
    optimizer = adamw(model)
    with pytest.raises(ArgumentTypeError, match=match):
        create_trainer(**{"model": model, "optimizer": optimizer, "loss_fn": mse_loss, argument: value})
    assert optimizer.engine is None


@pytest.mark.parametrize(
    ("argument", "value", "match"),
    [
        ("autocast", torch.float32, r"autocast must be torch\.float16 or torch\.bfloat16, got torch\.float32"),
        ("device", "gpu", "device must be one that torch knows, such as 'cpu' or 'cuda:0', got 'gpu'"),
    ],
)
def test_impossible_values_are_refused(argument, value, match):
    model = network()
    with pytest.raises(ArgumentValueError, match=match):
        create_trainer(model, adamw(model), mse_loss, **{argument: value})


def test_a_plain_optimizer_is_refused_with_the_line_that_wraps_it():
    model = network()
    with pytest.raises(ArgumentTypeError, match=r"got SGD; wrap it: ice\.Optimizer\(optimizer\)"):
        create_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), mse_loss)


def test_an_attached_optimizer_is_refused():
    model = network()
    optimizer = adamw(model)
    create_trainer(model, optimizer, mse_loss)
    with pytest.raises(AttachError, match=r"attached to another engine already; call optimizer\.detach\(\)"):
        create_trainer(model, optimizer, mse_loss)


class Frozen(torch.nn.BatchNorm1d):
    """A layer that never trains, as one writes it."""

    def train(self, mode=True):
        return super().train(mode=False)


def test_every_module_is_in_training_mode_in_every_iteration_as_its_train_has_it():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Dropout(), Frozen(2)), None)
    model[1].extend([torch.nn.Linear(2, 1)])
    patched = torch.nn.Identity()
    patched.train = lambda mode=True: calls.append(mode)
    model.append(patched)
    calls, seen = [], []
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    trainer = ice.create_trainer(model, optimizer, torch.nn.functional.mse_loss)

    @trainer.on(Events.ITERATION_STARTED)
    def meddle():
        model[1][0].eval()  # a part of it alone
        model[1][1].training = True

    @trainer.on(Events.ITERATION_COMPLETED)
    def look():
        seen.append([m.training for m in model.modules() if m is not patched])

    model.forward = lambda x: model[1][2](model[1][1](model[1][0](model[0](x))))
    trainer.run([(torch.ones(4, 2), torch.ones(4, 1))] * 2)

    assert seen == [[True, True, True, True, False, True]] * 2
    assert calls == [True, True]
