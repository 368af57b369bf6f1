"""check_accumulation, on models that people train: what is equal, what is named, and that nothing is left behind."""

import copy
import dataclasses
import functools
import math
import random
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import ice_engine as ice
from ice_engine.errors import ArgumentTypeError, ArgumentValueError, BackwardError, NoGradientsError

EXACT = 1e-12


def regression(n=12, width=4, **kwargs):
    return torch.randn(n, width, **kwargs), torch.randn(n, 1, **kwargs)


def mlp(*extra, width=4):
    return nn.Sequential(nn.Linear(width, 8), *extra, nn.Tanh(), nn.Linear(8, 1))


def check(model, batch=None, loss_fn=F.mse_loss, k=3, **kwargs):
    return ice.check_accumulation(model, loss_fn, regression() if batch is None else batch, k, **kwargs)


def culprits(report):
    return [finding.module for finding in report.culprits]


def exact(report):
    assert report, str(report)
    assert report.culprits == ()
    assert report.ragged < EXACT
    assert report.even is None or report.even < EXACT


def state_of(model):
    """Everything that must not change, as plain data or tensors, and by identity where it matters."""
    modules = dict(model.named_modules())
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "gradients": {n: None if p.grad is None else (id(p.grad), p.grad.clone()) for n, p in model.named_parameters()},
        "versions": {name: p._version for name, p in model.named_parameters()},
        "modes": {name: module.training for name, module in modules.items()},
        "hooks": {name: [list(m._forward_hooks), list(m._forward_pre_hooks)] for name, m in modules.items()},
        "dtypes": {name: p.dtype for name, p in model.named_parameters()},
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1:3],  # noqa: NPY002
    }


def assert_untouched(model, before):
    after = state_of(model)
    assert all(torch.equal(v, after["values"][n]) for n, v in before["values"].items())
    for name, gradient in before["gradients"].items():
        found = after["gradients"][name]
        assert (found is None) == (gradient is None)
        assert gradient is None or (found[0] == gradient[0] and torch.equal(found[1], gradient[1]))
    for key in ("versions", "modes", "hooks", "dtypes", "python"):
        assert after[key] == before[key]
    assert torch.equal(before["torch"], after["torch"])
    assert np.array_equal(before["numpy"][0], after["numpy"][0])
    assert before["numpy"][1] == after["numpy"][1]


# -- equal ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 3, 4, 5, 12])
def test_an_mlp_is_exact_for_even_and_ragged_splits(k):
    report = check(mlp(), k=k)
    exact(report)
    assert (report.even is None) == (12 % k != 0)
    assert sum(report.ragged_sizes) == 12
    assert len(set(report.ragged_sizes)) > 1
    assert report.dtype == torch.float64
    assert report.tolerance == 1e-9
    assert report.notes == ()


def test_two_samples_have_no_ragged_split():
    report = check(mlp(), regression(2), k=2)
    assert report
    assert (report.even_sizes, report.ragged_sizes, report.ragged) == ((1, 1), (), None)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.norm(self.embedding(x)))


def tokens(n=8, length=5, vocabulary=11):
    return torch.randint(0, vocabulary, (n, length)), torch.randint(0, vocabulary, (n, length))


def flat_cross_entropy(y_pred, y, **kwargs):
    return F.cross_entropy(y_pred.flatten(0, 1), y.flatten(), **kwargs)


def test_tied_weights_are_exact():
    exact(check(Tied(), tokens(), flat_cross_entropy, 4))


def test_sparse_gradients_are_exact():
    model = nn.Sequential(nn.EmbeddingBag(11, 6, sparse=True, mode="mean"), nn.Linear(6, 1))
    exact(check(model, (torch.randint(0, 11, (8, 5)), torch.randn(8, 1)), k=4))


def test_frozen_parameters_are_left_out():
    model = mlp(nn.Linear(8, 8))
    model[1].requires_grad_(False)
    exact(check(model))


def test_unused_parameters_are_no_difference():
    model = mlp()
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    exact(check(model))


def test_a_bias_whose_gradient_is_rounding_only_is_no_difference():
    model = nn.Sequential(
        nn.Conv1d(3, 8, 3), nn.InstanceNorm1d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(56, 1)
    )
    assert check(model, (torch.randn(12, 3, 9), torch.randn(12, 1)))


def test_activation_checkpointing_is_exact():
    class Checkpointed(nn.Module):
        def __init__(self, *, reentrant):
            super().__init__()
            self.body, self.head, self.reentrant = (
                nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5)),
                nn.Linear(8, 1),
                reentrant,
            )

        def forward(self, x):
            return self.head(checkpoint(self.body, x.requires_grad_(), use_reentrant=self.reentrant))

    for reentrant in (True, False):
        report = check(Checkpointed(reentrant=reentrant))
        exact(report)
        assert [note.module for note in report.notes] == ["body.1"]


def test_recurrent_networks_with_time_first_are_exact():
    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 8, num_layers=2, dropout=0.5)
            self.head = nn.Linear(8, 1)

        def forward(self, x):
            return self.head(self.lstm(x.transpose(0, 1))[0][-1])

    report = check(TimeFirst(), (torch.randn(12, 5, 4), torch.randn(12, 1)))
    exact(report)
    assert [note.module for note in report.notes] == ["lstm"]


def test_wrapped_models_are_unwrapped():
    model = mlp(nn.BatchNorm1d(8))
    assert culprits(check(nn.DataParallel(model))) == ["1"]
    assert culprits(check(torch.compile(model))) == ["1"]


# -- nested batches ---------------------------------------------------------------------------------------


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


@dataclasses.dataclass
class Features:
    pair: Pair
    extra: list
    names: list
    scale: float = 2.0


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, x):
        features = x["features"]
        assert len(features.names) == len(features.pair.left)
        hidden = self.left(features.pair.left) + self.right(features.pair.right) + features.extra[0] * features.scale
        return {"out": (hidden.sum(1), hidden * x["temperature"])}


def test_nested_containers_are_cut_along_their_samples():
    n = 6
    x = {
        "features": Features(Pair(torch.randn(n, 3), torch.randn(n, 2)), [torch.randn(n, 4)], list("abcdef")),
        "temperature": torch.tensor(0.5),
        "nothing": None,
    }
    y = [{"target": torch.randn(n)}, torch.randn(n, 4)]

    def loss_fn(y_pred, y):
        return F.mse_loss(y_pred["out"][0], y[0]["target"]) + F.l1_loss(y_pred["out"][1], y[1])

    def prepare_batch(batch, device, non_blocking):
        return batch

    exact(check(Nested(), (x, y), loss_fn, 3, prepare_batch=prepare_batch, weight=lambda x, y: len(y[1])))


def test_prepare_batch_makes_any_batch_a_pair():
    batch = {"input": torch.randn(6, 4), "label": torch.randn(6, 1)}
    calls = []

    def prepare_batch(batch, device, non_blocking):
        calls.append((device, non_blocking))
        return batch["input"].to(device), batch["label"].to(device)

    exact(check(mlp(), batch, prepare_batch=prepare_batch))
    assert calls == [(torch.device("cpu"), False)]


def test_the_batch_is_not_changed_by_a_model_that_works_in_place():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 1)

        def forward(self, x):
            return self.head(x.mul_(2))

    x, y = regression(dtype=torch.float64)
    before = x.clone()
    exact(check(InPlace(), (x, y)))
    assert torch.equal(x, before)


# -- modules that break it --------------------------------------------------------------------------------


class Convolutional(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), norm(), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), norm())
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def images(n=8):
    return torch.randn(n, 3, 8, 8), torch.randint(0, 5, (n,))


def test_every_batch_norm_of_a_convolutional_network_is_named():
    report = check(Convolutional(lambda: nn.BatchNorm2d(8)), images(), F.cross_entropy, 4)
    assert not report
    assert culprits(report) == ["features.1", "features.4"]
    assert {finding.kind for finding in report.culprits} == {"BatchNorm2d"}
    assert "'features.1' (BatchNorm2d), 'features.4' (BatchNorm2d)" in str(report)
    assert "GroupNorm" in str(report)
    assert report.even > 1e-3
    assert report.ragged > 1e-3


def test_a_printed_report_lists_few_of_many():
    report = check(mlp(*[nn.BatchNorm1d(8) for _ in range(6)]))
    assert len(report.culprits) == 6
    assert "'4' (BatchNorm1d) and 2 more" in str(report)


def test_the_same_network_with_group_norm_is_exact():
    exact(check(Convolutional(lambda: nn.GroupNorm(2, 8)), images(), F.cross_entropy, 4))


def test_batch_norm_left_in_evaluation_mode_is_exact_and_noted():
    model = Convolutional(lambda: nn.BatchNorm2d(8))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    report = check(model, images(), F.cross_entropy, 4)
    exact(report)
    (note,) = report.notes
    assert note.module == "features.1"
    assert "create_trainer calls model.train()" in note.why


def test_a_model_in_evaluation_mode_is_checked_in_training_mode():
    model = mlp(nn.BatchNorm1d(8)).eval()
    assert culprits(check(model)) == ["1"]
    assert not any(module.training for module in model.modules())


def test_batch_norm_that_cannot_take_one_sample_is_named():
    report = check(mlp(nn.BatchNorm1d(8)), regression(2), k=2)
    assert report.even == math.inf
    assert culprits(report) == ["1"]
    assert "Expected more than 1 value per channel" in str(report)
    assert "no finite gradient" in str(report)


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class CentredInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x):
        hidden = self.first(x)
        return self.second(hidden - hidden.mean(0))


def test_a_module_that_mixes_samples_is_named():
    report = check(mlp(nn.Linear(8, 8), Centred()))
    assert culprits(report) == ["2"]
    assert "depends on the other samples" in report.culprits[0].why


def test_a_forward_that_mixes_samples_between_its_modules_is_named():
    report = check(nn.Sequential(nn.Linear(4, 4), CentredInside()))
    assert culprits(report) == ["1"]
    assert report.culprits[0].kind == "CentredInside"
    assert "before it calls '1.second'" in report.culprits[0].why


def test_the_model_itself_is_named_if_it_mixes_samples_at_its_end():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, x):
            y = self.body(x)
            return y / y.norm()

    report = check(Model())
    assert culprits(report) == [""]
    assert "the model itself (Model)" in str(report)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = 1.0

    def forward(self, x):
        self.scale += 1.0
        return x * self.scale


@pytest.mark.parametrize("kind", [Counting, Remembering])
def test_a_module_with_state_is_named_as_such(kind):
    report = check(mlp(kind()))
    assert culprits(report) == ["1"]
    assert "state" in report.culprits[0].why
    assert "once per step" in report.culprits[0].mend


def test_a_module_that_catches_the_failure_of_another_is_followed():
    class Fails(nn.Module):
        def forward(self, x):
            raise ValueError

    class Catches(nn.Module):
        def __init__(self):
            super().__init__()
            self.fails, self.norm = Fails(), nn.BatchNorm1d(8)

        def forward(self, x):
            try:
                return self.fails(x)
            except ValueError:
                return self.norm(x)

    assert culprits(check(mlp(Catches()))) == ["1.norm"]


def test_spectral_norm_is_named():
    model = mlp()
    model[0] = nn.utils.parametrizations.spectral_norm(model[0])
    report = check(model)
    assert not report
    assert culprits(report) == ["0.parametrizations.weight.0"]
    assert "state" in report.culprits[0].why


def test_a_module_called_twice_is_followed_call_by_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.norm, self.head = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)

        def forward(self, x):
            return self.head(self.norm(self.body(self.body(x))))

    assert culprits(check(Twice())) == ["norm"]


def test_a_gradient_hook_that_depends_on_the_batch_is_unexplained_not_blamed_on_a_module():
    class Clipped(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient / gradient.norm()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, x):
            return Clipped.apply(self.body(x))

    report = check(Model())
    assert not report
    assert "the gradient does not" in report.culprits[0].why


# -- dropout ----------------------------------------------------------------------------------------------


def test_dropout_is_held_still_and_noted():
    report = check(mlp(nn.Dropout(0.5), nn.AlphaDropout(0.2), nn.Dropout(0.9)))
    exact(report)
    assert [(note.module, note.kind) for note in report.notes] == [
        ("1", "Dropout"),
        ("2", "AlphaDropout"),
        ("3", "Dropout"),
    ]
    assert "in expectation" in str(report)


def test_dropout_does_not_hide_what_else_is_wrong():
    report = check(mlp(nn.Dropout(0.5), nn.BatchNorm1d(8)))
    assert culprits(report) == ["2"]
    assert [note.module for note in report.notes] == ["1"]


def test_functional_dropout_is_noted_with_its_module():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return F.dropout(self.linear(x), 0.3, training=self.training)

    report = check(mlp(Functional()))
    exact(report)
    assert [(note.module, note.kind) for note in report.notes] == [("1", "Functional")]


@pytest.mark.parametrize(
    "noise",
    [
        lambda x: x + torch.randn_like(x),
        lambda x: x * torch.rand(len(x), 1),
        lambda x: x + torch.empty_like(x).uniform_(-1, 1),
        lambda x: x + torch.empty_like(x).normal_(),
        lambda x: x + torch.normal(0.0, 1.0, x.shape),
        lambda x: x * torch.bernoulli(torch.full_like(x, 0.7)),
        lambda x: x * torch.empty_like(x).bernoulli_(),
        lambda x: x * torch.empty_like(x).bernoulli_(torch.full_like(x, 0.7)),
        lambda x: x * torch.randint(1, 5, x.shape),
        lambda x: F.gumbel_softmax(x),
        lambda x: F.rrelu(x, training=True),
        lambda x: x + torch.multinomial(x.detach().softmax(1), 1),
        lambda x: x + torch.empty_like(x).exponential_(),
        lambda x: F.dropout1d(x.unsqueeze(2), 0.5).squeeze(2),
        lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], dropout_p=0.5)[:, 0],
    ],
)
def test_whatever_torch_draws_is_held_still_and_noted(noise):
    class Noisy(nn.Module):
        def forward(self, x):
            return noise(x)

    report = check(mlp(Noisy()))
    exact(report)
    assert [note.module for note in report.notes] == ["1"]


def test_a_random_order_of_the_samples_mixes_them():
    class Mixup(nn.Module):
        def forward(self, x):
            return 0.7 * x + 0.3 * x[torch.randperm(len(x))]

    assert culprits(check(mlp(Mixup()))) == ["1"]


def test_a_draw_of_python_is_repeated_and_noted():
    class LayerDrop(nn.Module):
        def forward(self, x):
            return x if random.random() < 0.5 else -x  # noqa: S311

    report = check(mlp(LayerDrop()))
    exact(report)
    assert "Python's or numpy's generator" in report.notes[0].why


def test_draws_of_numpy_in_the_batchs_shape_are_named_and_not_said_to_be_held_still():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.from_numpy(np.random.randn(*x.shape)).to(x)  # noqa: NPY002

    report = check(mlp(Noisy()))
    assert culprits(report) == ["1"]
    assert "draws random numbers in the shape of its batch from Python's or numpy's" in report.culprits[0].why
    assert "torch.randn_like(x)" in report.culprits[0].mend
    assert not any("held still here" in note.why for note in report.notes)


def test_a_split_into_fewer_micro_batches_is_told():
    report = check(mlp(), regression(5), k=4)
    assert (report.ragged_sizes, report.accumulation_steps) == ((3, 2), 4)
    assert "3 + 2 (2 micro-batches, not 4): gradients differ" in str(report)
    assert "micro-batches, not" not in str(check(mlp(), regression(16), k=4))


# -- a part of the loss that does not come from y_pred ----------------------------------------------------


def penalised(how, reduction, model, times=lambda y: 1):
    def loss_fn(model, y_pred, y):
        return F.mse_loss(y_pred, y, reduction=reduction) + 5 * times(y) * model[0].weight.square().sum()

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, y_pred, y):
            return loss_fn(self.model, y_pred, y)

    closure = lambda y_pred, y: loss_fn(model, y_pred, y)  # noqa: E731
    return {"closure": closure, "partial": functools.partial(loss_fn, model), "module": Loss()}[how]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", ["closure", "partial", "module"])
def test_a_penalty_on_the_weights_is_compared_too(how, dtype):
    model, batch = mlp().to(dtype), regression(dtype=dtype)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = state_of(model)
    assert check(model, batch, penalised(how, "mean", model))
    assert check(model, batch, penalised(how, "sum", model, times=len), loss_reduction="sum")
    report = check(model, batch, penalised(how, "sum", model), loss_reduction="sum")
    assert not report
    assert report.parameter == "0.weight"
    assert culprits(report) == ["loss_fn"]
    assert "such as a penalty on the weights" in report.culprits[0].why
    assert_untouched(model, before)


def test_a_module_that_the_loss_closes_over_is_compared_too():
    torch.manual_seed(0)
    head, model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)).double(), mlp().double()
    report = check(model, loss_fn=lambda y_pred, y: F.mse_loss(y_pred, y) + head(y.double()).square().sum())
    assert not report
    assert report.parameter.startswith("loss_fn.")


def test_the_models_own_generator_is_not_moved():
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()

    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.rand(x.shape, generator=generator) + torch.empty_like(x).normal_(generator=generator)

    exact(check(mlp(Noisy())))
    assert torch.equal(generator.get_state(), before)


# -- losses -----------------------------------------------------------------------------------------------


class LanguageModel(nn.Module):
    def __init__(self, vocabulary=11):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 16, padding_idx=0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, vocabulary)

    def forward(self, x):
        return self.head(self.encoder(self.embedding(x["ids"]), src_key_padding_mask=~x["mask"]))


def padded(n=8, length=7, padding=-100):
    lengths = torch.tensor([7, 2, 5, 3, 6, 1, 4, 7])[:n]
    mask = torch.arange(length)[None] < lengths[:, None]
    ids = torch.randint(1, 11, (n, length)) * mask
    return {"ids": ids, "mask": mask}, torch.where(mask, torch.randint(1, 11, (n, length)), padding)


def test_padding_makes_the_loss_a_mean_over_a_ragged_dimension_and_the_weight_is_told():
    model, batch = LanguageModel(), padded()
    report = check(model, batch, flat_cross_entropy, 4)
    assert not report
    (finding,) = report.culprits
    assert (finding.module, finding.kind) == ("loss_fn", "flat_cross_entropy")
    assert "the entries of y that are not -100" in finding.why
    assert "weight=lambda x, y: (y != -100).sum()" in finding.mend

    exact(check(model, batch, flat_cross_entropy, 4, weight=lambda x, y: (y != -100).sum()))


def test_an_ignored_index_of_the_loss_is_found():
    report = check(LanguageModel(), padded(padding=0), functools.partial(flat_cross_entropy, ignore_index=0), 4)
    assert "(y != 0).sum()" in report.culprits[0].mend


def test_a_mask_of_the_inputs_is_found():
    x, y = padded(padding=3)

    def loss_fn(y_pred, y):
        losses = F.cross_entropy(y_pred.transpose(1, 2), y["ids"], reduction="none")
        return (losses * y["mask"]).sum() / y["mask"].sum()

    report = check(LanguageModel(), (x, {"ids": y, "mask": x["mask"]}), loss_fn, 4, weight=lambda x, y: len(y["ids"]))
    assert "y['mask'].sum()" in report.culprits[0].mend


def test_shifted_labels_are_found():
    def loss_fn(y_pred, y):
        return flat_cross_entropy(y_pred[:, :-1], y[:, 1:])

    report = check(LanguageModel(), padded(), loss_fn, 4)
    assert "(y[:, 1:] != -100).sum()" in report.culprits[0].mend
    exact(check(LanguageModel(), padded(), loss_fn, 4, weight=lambda x, y: (y[:, 1:] != -100).sum()))


def test_class_weights_are_found():
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([0.1, 0.5, 1.0, 2.0, 4.0]))
    model = nn.Linear(4, 5)
    batch = (torch.randn(12, 4), torch.arange(12) % 5)
    report = check(model, batch, loss_fn)
    assert "class_weights[y].sum()" in report.culprits[0].mend
    report = check(model, batch, loss_fn, weight=lambda x, y: loss_fn.weight[y].sum())
    assert report
    assert report.tolerance == 1e-4  # what float32 weights allow


def test_a_micro_batch_without_any_valid_target_counts_nothing_once_the_weight_is_right():
    x, y = padded()
    y[:2] = -100
    report = check(LanguageModel(), (x, y), flat_cross_entropy, 4)
    assert culprits(report) == ["loss_fn"]
    assert "(y != -100).sum()" in report.culprits[0].mend
    exact(check(LanguageModel(), (x, y), flat_cross_entropy, 4, weight=lambda x, y: (y != -100).sum()))


def test_shares_that_nothing_in_the_batch_counts_are_told_as_numbers():
    def loss_fn(y_pred, y):
        importance = (3 * y).exp()
        return (importance * (y_pred - y) ** 2).sum() / importance.sum()

    report = check(mlp(), loss_fn=loss_fn)
    assert "a mean over something" in report.culprits[0].why


def test_a_sum_is_told_and_checked_as_such():
    report = check(mlp(), loss_fn=functools.partial(F.mse_loss, reduction="sum"))
    assert culprits(report) == ["loss_fn"]
    assert report.culprits[0].kind == "mse_loss"
    assert "a sum over the batch" in report.culprits[0].why
    exact(check(mlp(), loss_fn=functools.partial(F.mse_loss, reduction="sum"), loss_reduction="sum"))


def test_a_mean_that_is_said_to_be_a_sum_is_told():
    report = check(mlp(), loss_reduction="sum")
    assert "take out loss_reduction='sum'" in report.culprits[0].mend


def test_wrong_weights_are_told():
    report = check(mlp(), weight=lambda x, y: 1)
    assert report.even < EXACT
    assert report.ragged > 1e-3
    assert report.culprits[0].mend == "leave out weight=: it is the samples"


def contrastive(y_pred, y):
    return F.cross_entropy(F.normalize(y_pred) @ F.normalize(y).T, torch.arange(len(y)))


def test_a_contrastive_loss_is_told_that_no_weights_mend_it():
    report = check(nn.Linear(4, 6), (torch.randn(12, 4), torch.randn(12, 6)), contrastive)
    assert culprits(report) == ["loss_fn"]
    assert "the other samples" in report.culprits[0].why
    assert "no weights mend this" in report.culprits[0].mend


def test_a_contrastive_model_whose_outputs_are_all_pairs_blames_the_loss():
    class Clip(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(3, 6)

        def forward(self, x):
            return self.a(x[0]) @ self.b(x[1]).T

    batch = ((torch.randn(12, 4), torch.randn(12, 3)), torch.zeros(12))
    report = check(Clip(), batch, lambda y_pred, _: F.cross_entropy(y_pred, torch.arange(len(y_pred))))
    assert culprits(report) == ["loss_fn"]


def test_batch_norm_and_a_ragged_loss_are_both_named():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.norm, self.head = nn.Embedding(11, 6), nn.BatchNorm1d(6), nn.Linear(6, 11)

        def forward(self, x):
            return self.head(self.norm(self.embedding(x["ids"]).transpose(1, 2)).transpose(1, 2))

    report = check(Model(), padded(), flat_cross_entropy, 4)
    assert culprits(report) == ["norm", "loss_fn"]
    assert "(y != -100).sum()" in report.culprits[1].mend


def test_a_loss_inside_the_model_is_judged_by_the_parameters_gradient():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = LanguageModel()

        def forward(self, x):
            return flat_cross_entropy(self.body(x), x["labels"])

    x, y = padded()
    batch = ({**x, "labels": y}, torch.zeros(8))
    report = check(Model(), batch, lambda y_pred, _: y_pred, 4)
    assert culprits(report) == ["loss_fn"]
    assert "(x['labels'] != -100).sum()" in report.culprits[0].mend


def test_a_loss_with_parameters_is_checked_with_them():
    class Temperature(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, y_pred, y):
            return F.mse_loss(y_pred * self.scale, y)

    loss_fn = Temperature()
    exact(check(mlp(), loss_fn=loss_fn))
    assert loss_fn.scale.grad is None
    assert loss_fn.scale.dtype == torch.float32


def test_a_loss_that_is_a_method_of_the_model_is_copied_with_it():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, x):
            return self.body(x)

        def loss(self, y_pred, y):
            return F.mse_loss(y_pred, y) + sum(p.square().sum() for p in self.parameters())

    model = Model()
    report = check(model, loss_fn=model.loss)
    exact(report)
    assert report.notes == ()


def test_a_loss_that_reaches_the_model_by_itself_leaves_no_gradient_and_is_compared():
    model, batch = mlp(nn.BatchNorm1d(8)), regression()
    model[1].eval()
    before = state_of(model)

    def loss_fn(y_pred, y):
        model[1].running_mean.add_(1.0)
        return F.mse_loss(y_pred, y) + model[0].weight.square().sum()

    report = check(model, batch, loss_fn)
    assert not any("not compared" in note.why for note in report.notes)
    assert_untouched(model, before)


# -- precision --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_is_checked_in_float64(dtype):
    x, y = regression()
    model = mlp().to(dtype)
    report = check(model, (x.to(dtype), y.to(dtype)))
    exact(report)
    assert report.dtype == torch.float64
    assert all(p.dtype == dtype for p in model.parameters())


def test_what_refuses_float64_is_checked_in_its_own_type():
    target = torch.randn(8, 1)

    def loss_fn(y_pred, y):
        return F.mse_loss(y_pred @ target.T, y @ target.T)

    report = check(mlp(), loss_fn=loss_fn)
    assert report, str(report)
    assert (report.dtype, report.tolerance) == (torch.float32, 1e-4)
    assert 0 < report.ragged < 1e-5

    assert culprits(check(mlp(nn.BatchNorm1d(8)), loss_fn=loss_fn)) == ["1"]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_a_model_that_casts_down_is_judged_by_the_lower_precision(dtype, tolerance):
    class Narrow(nn.Module):
        def forward(self, x):
            return x.to(dtype).exp().to(x.dtype)

    report = check(mlp(Narrow()))
    assert report, str(report)
    assert report.tolerance == tolerance
    assert not check(mlp(Narrow(), nn.BatchNorm1d(8)))


def test_a_loss_that_torch_gives_in_the_type_of_its_targets_is_judged_by_that():
    """binary_cross_entropy of double outputs and single targets is single."""

    def by_positives(y_pred, y):
        positive = (y > 0).float()
        summed = nn.functional.binary_cross_entropy_with_logits(y_pred, positive, reduction="sum")
        return summed / positive.sum()

    batch = (torch.randn(16, 8), torch.randint(0, 3, (16,)))
    model = nn.Sequential(nn.Linear(8, 1), nn.Flatten(0))

    report = ice.check_accumulation(model, by_positives, batch, 4, weight=lambda x, y: (y > 0).sum())

    assert report.equal, report
    assert report.tolerance == 1e-4
    assert not ice.check_accumulation(model, by_positives, batch, 4)


def test_a_tolerance_of_ones_own_holds():
    model = mlp(nn.BatchNorm1d(8))
    assert check(model, tolerance=100.0)
    assert not check(model, tolerance=1e-3)


# -- nothing is left behind -------------------------------------------------------------------------------


def lived_in():
    model = mlp(nn.BatchNorm1d(8), nn.Dropout(0.5))
    model(torch.randn(5, 4)).sum().backward()
    model[2].eval()
    model.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("k", [3, 5])
def test_the_model_and_all_generators_are_untouched(k):
    model = lived_in()
    batch = regression()
    before = state_of(model)
    assert not check(model, batch, k=k)
    assert_untouched(model, before)


class Reassigning(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen = self.seen + 1
        return self.linear(x.to(self.linear.weight.dtype)).to(x.dtype)


def test_modules_that_a_loss_closes_over_are_untouched():
    projection = nn.Sequential(Reassigning(), nn.BatchNorm1d(1, affine=False))
    buffers = {name: (id(b), b.clone()) for name, b in projection.named_buffers()}

    check(mlp(), loss_fn=lambda y_pred, y: F.mse_loss(projection[0](y_pred), y) + projection[1](y).sum())

    assert all(p.grad is None for p in projection.parameters())
    assert {name: id(b) for name, b in projection.named_buffers()} == {name: i for name, (i, _) in buffers.items()}
    assert all(torch.equal(b, buffers[name][1]) for name, b in projection.named_buffers())


def test_it_works_where_gradients_are_off():
    with torch.no_grad():
        exact(check(mlp()))


@pytest.mark.parametrize("as_array", [False, True])
def test_weights_in_lists_and_arrays_are_cut_with_the_samples(as_array):
    x, y = regression()
    scores = [float(i + 1) for i in range(len(x))]

    def loss_fn(y_pred, y):
        return (F.mse_loss(y_pred, y["y"], reduction="none").mean(1) * torch.as_tensor(y["scores"])).mean()

    batch = x, {"y": y, "scores": np.array(scores) if as_array else scores}
    exact(check(mlp(), batch, loss_fn, prepare_batch=lambda batch, **_: batch))  # Ignite's own refuses numbers


def failing(at):
    calls = []

    def loss_fn(y_pred, y):
        calls.append(1)
        random.random()  # noqa: S311
        torch.rand(1)
        if len(calls) >= at:
            message = "no more"
            raise RuntimeError(message)
        return F.mse_loss(y_pred, y)

    return loss_fn


def test_the_model_is_untouched_if_the_loss_fails():
    model = lived_in()
    batch = regression()
    before = state_of(model)
    with pytest.raises(RuntimeError, match="no more"):
        check(model, batch, loss_fn=failing(1))
    assert_untouched(model, before)


@pytest.mark.parametrize("at", range(2, 12))
def test_a_loss_that_fails_later_is_reported_and_leaves_no_trace(at):
    model = lived_in()
    batch = regression()
    before = state_of(model)
    report = check(model, batch, loss_fn=failing(at))
    assert not report
    assert culprits(report)
    assert_untouched(model, before)


def test_a_module_that_fails_on_a_micro_batch_is_named():
    class Picky(nn.Module):
        def forward(self, x):
            if len(x) < 12:
                message = f"12 samples or nothing, not {len(x)}"
                raise ValueError(message)
            return x

    report = check(mlp(Picky()))
    assert culprits(report) == ["1"]
    assert "12 samples or nothing, not 5" in str(report)


# -- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 0, -2])
def test_one_micro_batch_is_no_accumulation(k):
    with pytest.raises(ArgumentValueError, match="accumulation_steps must be at least 2"):
        check(mlp(), k=k)


def test_a_batch_smaller_than_its_micro_batches_is_refused():
    with pytest.raises(ArgumentValueError, match=r"12 samples, too few for 13 .* accumulation_steps=12"):
        check(mlp(), k=13)


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ArgumentValueError, match="no parameter of Sequential is trainable"):
        check(mlp().requires_grad_(False))
    with pytest.raises(ArgumentValueError, match="no parameter of ReLU is trainable"):
        check(nn.ReLU())


def test_a_model_without_shapes_is_refused():
    with pytest.raises(ArgumentValueError, match=r"'0.weight' has no shape yet; run one batch"):
        check(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1)))


def test_a_loss_that_is_no_scalar_is_refused():
    with pytest.raises(BackwardError, match=r"loss must be a scalar, got shape \(12, 1\)"):
        check(mlp(), loss_fn=functools.partial(F.mse_loss, reduction="none"))
    with pytest.raises(ArgumentTypeError, match="loss must be a tensor, got float"):
        check(mlp(), loss_fn=lambda y_pred, y: F.mse_loss(y_pred, y).item())


def test_a_loss_without_gradient_is_refused():
    with pytest.raises(BackwardError, match="requires no grad"):
        check(mlp(), loss_fn=lambda y_pred, y: F.mse_loss(y_pred.detach(), y))


def test_a_gradient_of_zero_is_refused():
    with pytest.raises(NoGradientsError, match="is 0 in every parameter"):
        check(mlp(), loss_fn=lambda y_pred, y: 0.0 * F.mse_loss(y_pred, y))
    with pytest.raises(NoGradientsError, match=r"is weight\(x, y\) above 0"):
        check(mlp(), weight=lambda x, y: 0)


def test_a_loss_that_is_not_finite_is_refused_with_its_place():
    class Log(nn.Module):
        def forward(self, x):
            return (x - x).log()

    with pytest.raises(ice.NonFiniteGradientError, match=r"the loss is inf and the first outputs .* '1' \(Log\)"):
        check(mlp(Log()), loss_fn=lambda y_pred, y: -y_pred.mean() + F.mse_loss(y_pred, y) * math.inf)
    with pytest.raises(ice.NonFiniteGradientError, match="all modules' outputs are finite"):
        check(mlp(), loss_fn=lambda y_pred, y: (y_pred - y_pred).sqrt().mean())


def test_a_forward_that_needs_more_is_refused():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, ids, mask):
            return self.body(ids)

    with pytest.raises(ArgumentTypeError, match=r"Two.forward\(ids, mask\) cannot be called as model\(x\).*'mask'"):
        check(Two())


def test_tensors_of_different_lengths_are_refused():
    with pytest.raises(ArgumentValueError, match=r"x\['b'\]\[0\] has 5, y has 6"):
        check(mlp(), ({"a": torch.randn(6, 4), "b": [torch.randn(5)]}, torch.randn(6)))


def test_a_batch_without_tensors_is_refused():
    with pytest.raises(ArgumentTypeError, match="no tensor in a batch of int and str"):
        check(mlp(), (1, "2"), prepare_batch=lambda batch, device, non_blocking: batch)


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (DataLoader(TensorDataset(*regression()), 6), "DataLoader"),
        ((*regression(), torch.ones(12)), "tuple of 3"),
        (torch.ones(2, 4), "Tensor"),
    ],
    ids=["loader", "three", "tensor"],
)
def test_what_is_no_pair_is_refused_with_what_a_batch_is(batch, found):
    match = (
        rf"batch must be a pair \(x, y\), got {found}; of a loader, give one batch: next\(iter\(loader\)\); of another"
    )
    with pytest.raises(ArgumentTypeError, match=match):
        check(mlp(), batch)


def test_a_batch_that_is_no_pair_is_refused():
    with pytest.raises(ArgumentTypeError, match=r"prepare_batch must return \(x, y\), got Tensor"):
        check(mlp(), torch.randn(6, 4), prepare_batch=lambda batch, device, non_blocking: batch)


def test_a_model_that_cannot_be_copied_is_refused():
    model = mlp()
    model.kept = model[0].weight * 2
    with pytest.raises(ArgumentValueError, match="a copy of Sequential is what is checked, and it cannot be copied"):
        check(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_model_is_refused():
    with pytest.raises(ArgumentTypeError, match=r"before torch.jit.script"):
        check(nn.Sequential(torch.jit.script(nn.Linear(4, 1))))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"loss_fn": 3}, "loss_fn must be callable, got 3"),
        ({"weight": 3}, "weight must be callable"),
        ({"prepare_batch": 3}, "prepare_batch must be callable"),
        ({"k": 2.5}, "accumulation_steps must be an int"),
        ({"tolerance": "low"}, "tolerance must be a number"),
    ],
)
def test_arguments_of_the_wrong_type_are_refused(kwargs, message):
    with pytest.raises(ArgumentTypeError, match=message):
        check(mlp(), **kwargs)


def test_other_arguments_are_refused():
    with pytest.raises(ArgumentTypeError, match=r"model must be a torch.nn.Module, got function"):
        check(lambda x: x)
    with pytest.raises(ArgumentValueError, match="tolerance must be above 0"):
        check(mlp(), tolerance=0.0)
    with pytest.raises(ArgumentValueError, match="loss_reduction must be one of"):
        check(mlp(), loss_reduction="none")


def test_a_report_is_plain_and_frozen():
    report = check(mlp(nn.BatchNorm1d(8)))
    assert copy.deepcopy(report) == report
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.equal = True
    assert str(report.culprits[0]).startswith("'1' (BatchNorm1d): in training mode")
