"""Every clip against its definition in float64 and torch's own; none hides a non-finite gradient."""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ignite.engine import Engine

import ice_engine as ice
from ice_engine.errors import ArgumentTypeError, ArgumentValueError, NonFiniteGradientError

ORDERS = [1.0, 2.0, 3.5, math.inf]
CLIPS = {
    "norm": ice.clip_norm(0.5),
    "norm, p=1": ice.clip_norm(0.5, norm_type=1.0),
    "norm, p=3.5": ice.clip_norm(0.5, norm_type=3.5),
    "norm, p=inf": ice.clip_norm(0.5, norm_type=math.inf),
    "norm per group": ice.clip_norm(0.5, per_group=True),
    "value": ice.clip_value(0.4),
    "adaptive": ice.clip_adaptive(0.1),
}
every_clip = pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS.keys())


def parameters(*gradients, weights=None):
    made = []
    for gradient, weight in itertools.zip_longest(gradients, weights or ()):
        made.append(torch.nn.Parameter(torch.zeros_like(gradient) if weight is None else weight.clone()))
        made[-1].grad = gradient.clone()
    return made


# -- the definitions, in numpy and float64 --------------------------------------------------------------------


def defined_norm(gradients, p=2.0):
    entries = np.concatenate([np.abs(array(g)).ravel() for g in gradients] + [np.zeros(1)])
    return float(entries.max() if p == math.inf else (entries**p).sum() ** (1 / p))


def defined_agc(gradient, weight, clip_factor, eps):
    gradient, weight = array(gradient), array(weight)
    clipped = gradient.copy()
    for unit in range(len(weight)) if weight.ndim > 1 else [...]:
        norm, limit = defined_norm([gradient[unit]]), clip_factor * max(defined_norm([weight[unit]]), eps)
        if norm > limit:
            clipped[unit] = gradient[unit] * (limit / norm)
    return clipped


def defined_clip(clip, groups, weights):
    """Return the clipped gradients and the norm before, group by group."""
    everything = [g for group in groups for g in group]
    if isinstance(clip, type(ice.clip_value(1.0))):
        return [[array(g).clip(-clip.max_value, clip.max_value) for g in group] for group in groups], 2.0
    if isinstance(clip, type(ice.clip_adaptive())):
        settings = (clip.clip_factor, clip.eps)
        pairs = [zip(group, own, strict=True) for group, own in zip(groups, weights, strict=True)]
        return [[defined_agc(g, w, *settings) for g, w in pair] for pair in pairs], 2.0
    clipped = []
    for group in groups:
        norm = defined_norm(group if clip.per_group else everything, clip.norm_type)
        clipped.append([array(g) * min(1.0, clip.max_norm / (norm + 1e-6)) for g in group])
    return clipped, clip.norm_type


def array(values):
    values = values.detach() if isinstance(values, torch.Tensor) else torch.as_tensor(values)
    return values.to(torch.complex128 if values.is_complex() else torch.float64).numpy()


shapes = st.lists(st.lists(st.integers(0, 4), max_size=4).map(tuple), min_size=1, max_size=4)
seeds = st.integers(0, 2**31)
magnitudes = st.sampled_from([0.0, 1e-9, 0.03, 1.0, 1e4])


def drawn(shapes, seed, magnitude):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) * magnitude for shape in shapes]
    for tensor in made:
        if tensor.ndim > 1 and len(tensor):
            tensor[0] = 0.0  # a unit of zeros among the others
    return made


@given(shapes, seeds, magnitudes, st.sampled_from([1e-3, 1.0, 50.0]), st.sampled_from([*ORDERS, 0.5]))
def test_clip_norm_is_its_definition(shapes, seed, magnitude, max_norm, p):
    gradients = drawn(shapes, seed, magnitude)
    clipped = parameters(*gradients)
    clip = ice.clip_norm(max_norm, norm_type=p)

    norm = clip(clipped)

    (expected,), _ = defined_clip(clip, [gradients], None)
    assert norm.shape == ()
    assert float(norm) == pytest.approx(defined_norm(gradients, p), rel=1e-12)
    assert float(clip.after(norm)) == pytest.approx(defined_norm(expected, p), rel=1e-12)
    for parameter, values in zip(clipped, expected, strict=True):
        np.testing.assert_allclose(parameter.grad.numpy(), values, rtol=1e-12)


@given(shapes, seeds, magnitudes, st.sampled_from([1e-3, 1.0, 50.0]))
def test_clip_value_is_its_definition(shapes, seed, magnitude, max_value):
    gradients = drawn(shapes, seed, magnitude)
    clipped = parameters(*gradients)

    norm = ice.clip_value(max_value)(clipped)

    assert float(norm) == pytest.approx(defined_norm(gradients), rel=1e-12)
    for parameter, gradient in zip(clipped, gradients, strict=True):
        np.testing.assert_array_equal(parameter.grad.numpy(), gradient.numpy().clip(-max_value, max_value))


@given(shapes, seeds, magnitudes, magnitudes, st.sampled_from([1e-4, 0.01, 2.0]), st.sampled_from([1e-6, 1e-3, 1.0]))
def test_clip_adaptive_is_its_definition(shapes, seed, magnitude, weight_magnitude, clip_factor, eps):
    gradients, weights = drawn(shapes, seed, magnitude), drawn(shapes, seed + 1, weight_magnitude)
    clipped = parameters(*gradients, weights=weights)

    norm = ice.clip_adaptive(clip_factor, eps=eps)(clipped)

    assert float(norm) == pytest.approx(defined_norm(gradients), rel=1e-12)
    for parameter, gradient, weight in zip(clipped, gradients, weights, strict=True):
        np.testing.assert_allclose(
            parameter.grad.numpy(), defined_agc(gradient, weight, clip_factor, eps), rtol=1e-12, atol=0
        )


@given(st.lists(shapes, min_size=1, max_size=3), seeds, magnitudes, st.sampled_from(ORDERS))
def test_each_group_is_clipped_by_its_own_norm(groups, seed, magnitude, p):
    gradients = [drawn(shapes, seed + i, magnitude * 10**i) for i, shapes in enumerate(groups)]
    clipped = [parameters(*group) for group in gradients]
    clip = ice.clip_norm(0.5, norm_type=p, per_group=True)

    norm = clip.by_group(clipped)

    expected, _ = defined_clip(clip, gradients, None)
    assert float(norm) == pytest.approx(defined_norm([g for group in gradients for g in group], p), rel=1e-12)
    assert clip.after(norm) is None
    for group, values in zip(clipped, expected, strict=True):
        for parameter, value in zip(group, values, strict=True):
            np.testing.assert_allclose(parameter.grad.numpy(), value, rtol=1e-12)


# -- torch's own ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", ORDERS)
@pytest.mark.parametrize("max_norm", [0.1, 1e6])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.float64, torch.bfloat16), (torch.complex64,) * 2])
def test_it_equals_torchs_clip_grad_norm(norm_type, max_norm, dtypes):
    gradients = [torch.randn(3, 4, dtype=dtypes[0]), torch.randn(5, dtype=dtypes[1])]
    expected, actual = parameters(*gradients), parameters(*gradients)

    norm = torch.nn.utils.clip_grad_norm_(expected, max_norm, norm_type)

    assert torch.equal(norm, ice.clip_norm(max_norm, norm_type=norm_type)(iter(actual)))
    for p, q in zip(expected, actual, strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_it_equals_torchs_clip_grad_value(dtype):
    gradient = torch.randn(3, 4, dtype=dtype)
    (expected,), (actual,) = parameters(gradient), parameters(gradient)

    torch.nn.utils.clip_grad_value_([expected], 0.3)
    ice.clip_value(0.3)([actual])

    assert torch.equal(expected.grad, actual.grad)


def test_complex_gradients_are_limited_by_part_and_by_unit():
    gradient, weight = torch.tensor([[3 + 4j, 0j], [0.1j, 0j]]), torch.tensor([[0j, 0.6 + 0.8j], [10 + 0j, 0j]])
    (by_value,), (by_unit,) = parameters(gradient), parameters(gradient, weights=[weight])

    ice.clip_value(3.5)([by_value])
    ice.clip_adaptive(0.1)([by_unit])

    torch.testing.assert_close(by_value.grad, torch.tensor([[3 + 3.5j, 0j], [0.1j, 0j]]))
    torch.testing.assert_close(by_unit.grad, torch.tensor([[0.06 + 0.08j, 0j], [0.1j, 0j]]))


@every_clip
def test_sparse_gradients_are_clipped_like_dense_ones(clip):
    """An index that occurs twice has one gradient, the sum of both."""
    dense = torch.nn.Embedding(5, 3)
    sparse = torch.nn.Embedding(5, 3, sparse=True, _weight=dense.weight.detach().clone())
    for embedding in (dense, sparse):
        (embedding(torch.tensor([1, 3, 1])) * torch.tensor([1.0, -2.0, 0.3])).square().sum().backward()

    norms = [clip(embedding.parameters()) for embedding in (dense, sparse)]

    torch.testing.assert_close(*norms)
    torch.testing.assert_close(sparse.weight.grad.to_dense(), dense.weight.grad)


def test_a_gradient_sparse_within_its_rows_is_refused_by_unit():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.eye(2).to_sparse()

    with pytest.raises(ArgumentTypeError, match=r"of shape \(2, 2\) is sparse in 2 dimensions; use clip_norm"):
        ice.clip_adaptive()([weight])


def test_half_precision_units_are_measured_in_float32():
    gradient, weight = torch.full((2, 400), 300.0, dtype=torch.float16), torch.ones(2, 400, dtype=torch.float16)
    (parameter,) = parameters(gradient, weights=[weight])

    norm = ice.clip_adaptive(0.5)([parameter])

    assert float(norm) == pytest.approx(300.0 * 800**0.5)
    torch.testing.assert_close(parameter.grad, torch.full_like(gradient, 0.5))


# -- what no clip may do --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@every_clip
def test_a_gradient_without_a_finite_norm_is_left_as_it_is(clip, value):
    good, bad = parameters(torch.ones(2, 2), torch.tensor([9.0, value]))

    norm = clip.by_group([[good], [bad]]) if hasattr(clip, "by_group") else clip([good, bad])

    assert not math.isfinite(norm)
    assert torch.equal(good.grad, torch.ones(2, 2))
    assert torch.equal(bad.grad.nan_to_num(7.0), torch.tensor([9.0, value]).nan_to_num(7.0))


@every_clip
def test_without_gradients_the_norm_is_0(clip):
    assert clip([]) == 0.0
    assert clip([torch.nn.Parameter(torch.ones(2))]) == 0.0
    assert clip(parameters(torch.zeros(0, 3))) == 0.0


@every_clip
def test_parameters_without_a_gradient_are_passed_over(clip):
    (with_gradient,) = parameters(torch.full((1,), 2.0))

    assert clip(iter([torch.nn.Parameter(torch.ones(1)), with_gradient])) == 2.0
    assert with_gradient.grad < 1.0


@every_clip
def test_zero_gradients_stay_zero(clip):
    (zero,) = parameters(torch.zeros(2, 3))

    assert clip([zero]) == 0.0
    assert torch.equal(zero.grad, torch.zeros(2, 3))


def test_the_coefficient_is_1_where_there_is_nothing_to_clip_by():
    clip = ice.clip_norm(1e-9)

    assert [float(clip.coefficient(torch.tensor(v))) for v in (math.inf, math.nan)] == [1.0, 1.0]
    assert float(ice.clip_norm(2.0).coefficient(torch.tensor(4.0))) == pytest.approx(0.5)
    assert float(clip.after(torch.tensor(math.inf))) == math.inf


def test_error_if_nonfinite_names_the_clip_and_the_policy():
    (good, bad), clip = parameters(torch.ones(2), torch.tensor([math.inf])), ice.clip_norm(1.0, error_if_nonfinite=True)

    with pytest.raises(
        NonFiniteGradientError,
        match=r"clip_norm\(1.0, error_if_nonfinite=True\): the gradient norm is inf.*nonfinite='skip'",
    ):
        clip([good, bad])

    assert torch.equal(good.grad, torch.ones(2))
    assert clip([good]) == pytest.approx(2**0.5)


# -- in a run -------------------------------------------------------------------------------------------------


def run(clip, batches, *, accumulation_steps=2, **settings):
    """Train on losses whose gradients are the batches themselves, with a loss scale."""
    weights = [torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0]])), torch.nn.Parameter(torch.tensor([0.5]))]
    optimizer = ice.Optimizer(
        torch.optim.SGD([{"params": [weight]} for weight in weights], lr=1.0),
        clip=clip,
        accumulation_steps=accumulation_steps,
        **{"grad_scaler": torch.amp.GradScaler("cpu", init_scale=1024.0), **settings},
    )
    trainer = Engine(
        lambda engine, batch: optimizer.backward(sum((w * g).sum() for w, g in zip(weights, batch, strict=True)))
    )
    optimizer.attach(trainer)
    before = [weight.detach().clone() for weight in weights]
    seen = []
    trainer.add_event_handler(
        optimizer.events.OPTIMIZER_STEP_COMPLETED | optimizer.events.OPTIMIZER_STEP_SKIPPED,
        lambda engine: seen.append((engine.state.optimizer_record, [w.grad.clone() for w in weights])),
    )
    trainer.run(batches)
    return before, weights, seen


FIRST = [torch.tensor([[1.0, -2.0], [0.01, 0.02]]), torch.tensor([3.0])]
SECOND = [torch.tensor([[3.0, 0.2], [0.03, 0.0]]), torch.tensor([0.0])]


@every_clip
def test_the_norm_in_the_record_is_of_the_unscaled_mean_before_clipping(clip):
    before, after, [(record, _)] = run(clip, [FIRST, SECOND])

    mean = [(a + b) / 2 for a, b in zip(FIRST, SECOND, strict=True)]
    expected, order = defined_clip(clip, [[g] for g in mean], [[w] for w in before])
    assert record.loss_scale == 1024.0
    assert float(record.grad_norm) == pytest.approx(defined_norm(mean, order), rel=1e-6)
    for weight, start, [step] in zip(after, before, expected, strict=True):
        torch.testing.assert_close(start - weight, torch.from_numpy(step).float(), rtol=1e-5, atol=1e-7)


def test_the_norm_after_clipping_is_recorded_where_one_limit_holds_for_all():
    clipped = {name: run(clip, [FIRST, SECOND])[2][0][0].clipped_norm for name, clip in CLIPS.items()}

    assert {name for name, norm in clipped.items() if norm is not None} == {name for name in CLIPS if "p=" in name} | {
        "norm"
    }
    assert all(norm is None or float(norm) == pytest.approx(0.5, abs=1e-6) for norm in clipped.values())


@pytest.mark.parametrize("value", [math.inf, math.nan])
@every_clip
def test_an_infinite_entry_skips_the_step(clip, value):
    bad = [FIRST[0], torch.tensor([value])]

    before, after, [(record, gradients)] = run(clip, [bad], accumulation_steps=1)

    assert "gradient norm is" in record.skipped
    assert "shape (1,)" in record.skipped
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(gradients[0], FIRST[0])
    assert not gradients[1].isfinite().all()


def test_error_if_nonfinite_ends_the_run_before_the_step():
    with pytest.raises(NonFiniteGradientError, match="error_if_nonfinite"):
        run(ice.clip_norm(1.0, error_if_nonfinite=True), [[FIRST[0], torch.tensor([math.inf])]], accumulation_steps=1)


def test_weights_of_zeros_train_under_adaptive_clipping():
    layer = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(layer.weight)
    optimizer = ice.Optimizer(torch.optim.SGD(layer.parameters(), lr=0.5), clip=ice.clip_adaptive(0.1))
    inputs = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    lengths = []
    for _ in range(200):
        optimizer.backward((layer(inputs) - torch.tensor([[2.0], [-1.0]])).square().sum())
        optimizer.update()
        lengths.append(float(layer.weight.detach().norm()))

    assert lengths[0] == pytest.approx(0.5 * 0.1 * 1e-3)  # lr * clip_factor * eps
    torch.testing.assert_close(layer.weight.detach(), torch.tensor([[2.0, -1.0]]))


def test_any_function_of_the_parameters_may_clip():
    def halve(params):
        params = list(params)
        for p in params:
            p.grad.mul_(0.5)
        return 7.0

    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0), clip=halve)
    optimizer.backward(weight * 4.0)
    optimizer.update()

    assert weight.item() == -2.0
    assert optimizer.record.grad_norm == 7.0


@pytest.mark.parametrize(
    ("returned", "named"),
    [
        (torch.ones(2), r"Tensor of shape \(2,\)"),
        (True, "bool"),
        ("1.0", "str"),
        (1j, "complex"),
        (torch.tensor(1j), "Tensor"),
    ],
)
def test_a_clip_that_returns_no_number_is_refused(returned, named):
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0), clip=lambda _: returned)
    optimizer.backward(weight * 4.0)

    with pytest.raises(
        ArgumentTypeError, match=f"clip returned {named}.*; wanted the norm before clipping, one number"
    ):
        optimizer.update()

    assert weight.item() == 0.0


@pytest.mark.parametrize("kind", ["numpy", "one entry", "with a graph"])
def test_a_clip_may_return_any_number(kind):
    numpy = pytest.importorskip("numpy")
    weight = torch.nn.Parameter(torch.zeros(()))
    returned = {
        "numpy": numpy.float32(7.0),
        "one entry": torch.tensor([7.0]),
        "with a graph": (weight + 7.0),
    }
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0), clip=lambda _: returned[kind])
    optimizer.backward(weight * 4.0)

    assert optimizer.update()
    assert optimizer.record.grad_norm.shape == ()
    assert not optimizer.record.grad_norm.requires_grad
    assert float(optimizer.record.grad_norm) == 7.0


def test_a_clip_that_returns_nothing_is_refused():
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0), clip=lambda p: torch.nn.utils.clip_grad_value_(p, 1.0))
    optimizer.backward(weight * 4.0)

    with pytest.raises(ArgumentTypeError, match="clip returned NoneType; wanted the norm before clipping"):
        optimizer.update()

    assert weight.item() == 0.0


# -- as values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "arguments", "error"),
    [
        (ice.clip_norm, {"max_norm": 0.0}, ArgumentValueError),
        (ice.clip_norm, {"max_norm": math.nan}, ArgumentValueError),
        (ice.clip_norm, {"max_norm": "1"}, ArgumentTypeError),
        (ice.clip_norm, {"max_norm": 1.0, "norm_type": 0}, ArgumentValueError),
        (ice.clip_norm, {"max_norm": 1.0, "norm_type": None}, ArgumentTypeError),
        (ice.clip_norm, {"max_norm": 1.0, "error_if_nonfinite": 1}, ArgumentTypeError),
        (ice.clip_norm, {"max_norm": 1.0, "per_group": "yes"}, ArgumentTypeError),
        (ice.clip_value, {"max_value": -1.0}, ArgumentValueError),
        (ice.clip_value, {"max_value": math.inf}, ArgumentValueError),
        (ice.clip_value, {"max_value": True}, ArgumentTypeError),
        (ice.clip_adaptive, {"clip_factor": 0}, ArgumentValueError),
        (ice.clip_adaptive, {"eps": 0.0}, ArgumentValueError),
        (ice.clip_adaptive, {"eps": None}, ArgumentTypeError),
    ],
)
def test_impossible_arguments_are_refused(make, arguments, error):
    with pytest.raises(error, match=list(arguments)[-1]):
        make(**arguments)


@pytest.mark.parametrize(
    "text",
    [
        "clip_norm(0.123456789)",
        "clip_norm(1.0, norm_type=float('inf'), error_if_nonfinite=True, per_group=True)",
        "clip_value(0.5)",
        "clip_adaptive(0.01)",
        "clip_adaptive(0.1, eps=1e-06)",
    ],
)
def test_it_prints_as_the_call_that_makes_it_and_can_be_copied(text):
    clip = eval(text, vars(ice))  # noqa: S307 - our own text

    assert repr(clip) == text
    assert pickle.loads(pickle.dumps(clip)) == copy.deepcopy(clip) == clip  # noqa: S301 - our own bytes
    assert hash(clip) == hash(copy.deepcopy(clip))
