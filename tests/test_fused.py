"""What takes the mean of a window, the loss scale and the clip along as one factor: fused forms, and plain SGD's lr."""

import contextlib
import functools
import importlib
from collections import Counter

import pytest
import torch
from ignite.engine import Engine, Events
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

import ice_engine as ice

ADAMW = functools.partial(torch.optim.AdamW, lr=0.05)
PLAIN = functools.partial(torch.optim.SGD, lr=0.05)
FORMS = {
    "plain SGD": PLAIN,
    "SGD": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, fused=True),
    "AdamW": functools.partial(torch.optim.AdamW, lr=0.05, fused=True),
    "Adagrad": functools.partial(torch.optim.Adagrad, lr=0.05, fused=True),
}


def tiny(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Linear(16, 1).to(dtype)


def batches(count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 16, generator=generator).to(dtype), torch.full((n, 1), 3.0, dtype=dtype)) for n in count]


def ours(factory, data, *, clip=None, scaler=None, k=3, watch=lambda *_: None, processors=(), dtype=torch.float32):
    model = tiny(dtype)
    optimizer = ice.Optimizer(
        factory(model.parameters()), accumulation_steps=k, clip=clip, grad_scaler=scaler, processors=processors
    )
    engine = Engine(lambda _, b: optimizer.backward(torch.nn.functional.mse_loss(model(b[0]), b[1]), weight=len(b[0])))
    optimizer.attach(engine)
    watch(engine, optimizer)
    engine.run(data)
    return model, optimizer


def by_hand(factory, data, *, clip=None, k=3, dtype=torch.float32):
    """Divide, clip, step: each a pass of its own, as torch has them."""
    model = tiny(dtype)
    optimizer = factory(model.parameters())
    for first in range(0, len(data), k):
        window = data[first : first + k]
        for x, y in window:
            torch.nn.functional.mse_loss(model(x), y, reduction="sum").backward()
        for p in model.parameters():
            p.grad /= sum(len(x) for x, _ in window)
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return model


def apart(a, b):
    return max(float((p - q).detach().abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


class Passes(TorchDispatchMode):
    """Counts what goes over more than a number."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name.startswith(("_foreach", "_fused", "_amp_foreach")):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


# -- what is computed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("factory", FORMS.values(), ids=FORMS)
def test_one_factor_inside_of_the_kernel_differs_by_rounding(factory, clip, scaled):
    data = batches([3, 5, 2, 4, 1, 6, 7, 2])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None

    model, _ = ours(factory, data, clip=ice.clip_norm(clip) if clip else None, scaler=scaler)

    assert apart(model, by_hand(factory, data, clip=clip)) < 2e-7  # of parameters up to 0.8: the last bits
    if clip and factory is not FORMS["AdamW"]:
        assert apart(model, by_hand(factory, data)) > 1e-3  # what leaving the clip out does


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_on_a_tiny_model_the_folded_factor_stays_within_1e_8(fused, scaled):
    """The issue's bound, at its step sizes: a window's mean, a loss scale and a clip, inside of the kernel or of lr."""
    data = batches([3, 5, 2, 4, 1, 6, 7, 2] * 3)
    factory = functools.partial(torch.optim.SGD, lr=1e-3, fused=fused)

    model, optimizer = ours(
        factory, data, clip=ice.clip_norm(1.0), scaler=torch.amp.GradScaler("cpu") if scaled else None
    )

    assert optimizer.record.clipped_norm < optimizer.record.grad_norm  # the clip has bitten
    assert apart(model, by_hand(factory, data, clip=1.0)) <= 1e-8
    assert apart(model, by_hand(factory, data)) > 1e-4


@pytest.mark.parametrize("factory", [FORMS["SGD"], PLAIN], ids=["fused", "plain"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_in_other_precisions_are_multiplied_before(dtype, factory):
    """A factor in single precision is too coarse for double; for halves torch's kernel takes it for a part of them."""
    data = batches([3, 5, 2, 4], dtype)

    model, _ = ours(factory, data, clip=ice.clip_norm(0.3), dtype=dtype)

    expected = by_hand(factory, data, clip=0.3, dtype=dtype)
    assert apart(model, expected) < (1e-15 if dtype == torch.float64 else 2e-2)


# -- how often the gradients are gone over --------------------------------------------------------------------


def passes(factory, **settings):
    model = tiny()
    optimizer = ice.Optimizer(factory, model.parameters(), accumulation_steps=2, **settings)
    for x, y in batches([3, 5, 3, 5]):
        optimizer.backward(torch.nn.functional.mse_loss(model(x), y), weight=len(x))
        seen = Passes()
        with seen:
            optimizer.update()
    return dict(seen.seen)


def test_clip_mean_and_step_take_one_pass_that_reads_and_the_kernel():
    assert passes(ADAMW, clip=ice.clip_norm(0.1)) == {"_foreach_norm": 1, "_foreach_add_": 1, "_fused_adamw_": 1}
    assert passes(ADAMW, nonfinite="skip") == {"_foreach_norm": 1, "_foreach_add_": 1, "_fused_adamw_": 1}
    assert passes(ADAMW) == {"_foreach_add_": 1, "_fused_adamw_": 1}


def test_with_a_scaler_as_well():
    seen = passes(ADAMW, grad_scaler=torch.amp.GradScaler("cpu"), clip=ice.clip_norm(0.1))

    assert seen == {"_foreach_norm": 1, "_foreach_add_": 1, "_fused_adamw_": 1}


def test_plain_sgd_takes_the_factor_in_its_lr():
    asked = [{"clip": ice.clip_norm(0.1)}, {"nonfinite": "skip"}, {"grad_scaler": torch.amp.GradScaler("cpu")}]
    assert [passes(PLAIN, **each) for each in asked] == [{"_foreach_norm": 1}] * 3
    assert passes(functools.partial(PLAIN, foreach=True)) == {"_foreach_add_": 1}


@pytest.mark.parametrize("more", [{"momentum": 0.5}, {"weight_decay": 0.1}, {"lr": torch.tensor(0.05)}])
def test_an_sgd_that_is_not_linear_in_a_number_has_its_gradients_multiplied(more):
    factory = functools.partial(PLAIN, **more)
    data = batches([3, 5, 2, 4, 1, 6, 7, 2])

    model, _ = ours(factory, data, clip=ice.clip_norm(0.3))

    assert passes(factory, clip=ice.clip_norm(0.1)) == {"_foreach_norm": 1, "_foreach_mul_": 1}
    assert apart(model, by_hand(factory, data, clip=0.3)) < 2e-7


def test_a_weight_decay_that_comes_with_this_step_is_not_multiplied():
    """It was 0 at the step before, when the step was linear."""
    data = batches([3, 5, 2, 4, 1, 6, 7, 2])
    decay = ice.schedules.warmup(steps=3, start=0.0, dst="weight_decay")
    decays = []

    def watch(engine, optimizer):
        engine.add_event_handler("ITERATION_COMPLETED", lambda: decays.append(optimizer.record.values["group_0"]))

    factory = functools.partial(PLAIN, weight_decay=0.5)
    model, _ = ours(factory, data, clip=ice.clip_norm(0.3), k=1, watch=watch, processors=[decay])

    expected = tiny()
    optimizer = factory(expected.parameters())
    for (x, y), values in zip(data, decays, strict=True):
        optimizer.param_groups[0].update(values)
        torch.nn.functional.mse_loss(expected(x), y).backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
    assert [values["weight_decay"] for values in decays[:2]] == [0.0, pytest.approx(0.5 / 3)]
    assert apart(model, expected) < 2e-7


# -- who looks at the gradients sees the final ones -----------------------------------------------------------

GLOBAL_HOOKS = {
    "global_pre_hook": register_optimizer_step_pre_hook,
    "global_post_hook": register_optimizer_step_post_hook,
}


def listening(where):
    """Return what a watcher at *where* sees of the gradients, one by one, and what it is."""
    seen = []

    def watch(engine, optimizer):
        def look(*_):
            seen.append(torch.cat([p.grad.flatten() for p in optimizer.param_groups[0]["params"]]).clone())

        if where == "pre_hook":
            optimizer.register_step_pre_hook(lambda *_: look())
        elif where == "post_hook":
            optimizer.register_step_post_hook(lambda *_: look())
        elif where in GLOBAL_HOOKS:
            handle = GLOBAL_HOOKS[where](lambda *_: look())
            engine.add_event_handler("COMPLETED", handle.remove)
        elif where != "processor":
            engine.add_event_handler(optimizer.event(where), look)

    def processor(group):
        seen.append(torch.cat([p.grad.flatten() for p in group["params"]]).clone())
        return group

    return seen, watch, [processor] if where == "processor" else []


@pytest.mark.parametrize("factory", [FORMS["AdamW"], PLAIN], ids=["AdamW", "plain SGD"])
@pytest.mark.parametrize(
    "where",
    ["GRADIENTS_READY", "STEP_STARTED", "STEP_COMPLETED", "pre_hook", "post_hook", *GLOBAL_HOOKS, "processor"],
)
def test_whoever_looks_sees_the_mean(where, factory):
    seen, watch, processors = listening(where)
    clip = None if where == "GRADIENTS_READY" else ice.clip_norm(0.3)

    ours(factory, batches([3, 5, 2]), clip=clip, watch=watch, processors=processors)

    model = tiny()
    x, y = (torch.cat(parts) for parts in zip(*batches([3, 5, 2]), strict=True))
    torch.nn.functional.mse_loss(model(x), y).backward()
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
    torch.testing.assert_close(seen, [torch.cat([p.grad.flatten() for p in model.parameters()])])


def test_a_step_that_somebody_replaced_sees_the_mean_as_well():
    norms = []

    def watch(_, optimizer):
        optimizer.inner.step = lambda: norms.append(float(optimizer.param_groups[0]["params"][0].grad.norm()))

    ours(FORMS["AdamW"], batches([3, 5, 2]), clip=ice.clip_norm(1e-3), watch=watch)

    assert norms[0] <= 1e-3


def test_the_hooks_and_the_profilers_range_of_a_step_are_there():
    calls = []

    def watch(_, optimizer):
        optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    ours(FORMS["AdamW"], batches([1, 1, 1]), watch=watch)
    with torch.profiler.profile() as profile:
        ours(FORMS["AdamW"], batches([1, 1, 1]))

    assert calls == ["post"]
    assert "Optimizer.step#AdamW.step" in {event.name for event in profile.events()}


def test_the_factor_is_gone_after_the_step_even_if_it_raised():
    def watch(_, optimizer):
        optimizer.param_groups[0]["betas"] = None

    with pytest.raises(TypeError):
        ours(FORMS["AdamW"], batches([1, 2, 3]), clip=ice.clip_norm(0.1), watch=watch)
    _, optimizer = ours(FORMS["AdamW"], batches([1, 2, 3]), clip=ice.clip_norm(0.1))

    assert "grad_scale" not in vars(optimizer.inner)


def test_lr_is_what_it_was_after_the_step_even_if_it_raised():
    model = tiny()
    optimizer = ice.Optimizer(PLAIN(model.parameters()), clip=ice.clip_norm(0.1))
    lrs = []
    for broken in (False, True):
        optimizer.backward(model(torch.full((2, 16), 9.0)).sum())
        if broken:
            model.weight.data = torch.zeros(2, 2)
        with pytest.raises(RuntimeError) if broken else contextlib.nullcontext():
            optimizer.update()
        lrs.append(optimizer.param_groups[0]["lr"])

    assert lrs == [0.05, 0.05]


# -- which form runs ------------------------------------------------------------------------------------------


def form(optimizer):
    return [(group["fused"], group["foreach"]) for group in optimizer.param_groups]


def test_a_factory_that_leaves_it_open_gets_the_fused_form_and_says_so():
    optimizer = ice.Optimizer(ADAMW, tiny().parameters())

    assert form(optimizer) == [(True, None)]
    assert "fused: True" in repr(optimizer)


@pytest.mark.parametrize("asked", [{"foreach": True}, {"foreach": False}, {"fused": False}, {"differentiable": True}])
def test_a_factory_that_says_which_gets_that(asked):
    plain = functools.partial(ADAMW, **asked)(tiny().parameters())

    assert form(ice.Optimizer(functools.partial(ADAMW, **asked), tiny().parameters())) == form(plain)


@pytest.mark.parametrize(
    ("asked", "told"), [({}, "fused"), ({"foreach": True}, "foreach"), ({"foreach": False}, "for-loop")]
)
def test_the_record_says_which_form_stepped(asked, told):
    _, optimizer = ours(functools.partial(ADAMW, **asked), batches([1, 1, 1]))  # an instance

    assert optimizer.record.form == ("for-loop" if not asked else told)  # torch's choice on the CPU
    optimizer = ice.Optimizer(functools.partial(ADAMW, **asked), tiny().parameters())
    optimizer.backward(sum(p.sum() for p in optimizer.param_groups[0]["params"]))
    optimizer.update()
    assert optimizer.record.form == told


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factory", [FORMS["SGD"], FORMS["AdamW"], PLAIN], ids=["SGD", "AdamW", "plain SGD"])
@pytest.mark.parametrize("then", ["fused", "foreach", "for-loop"])
@pytest.mark.parametrize("first", ["fused", "foreach", "for-loop"])
def test_a_form_that_is_set_by_hand_in_a_run_steps_from_then_on(first, then, factory, dtype):
    def choose(optimizer, form):
        optimizer.param_groups[0].update(fused=form == "fused", foreach=form == "foreach")

    def watch(engine, optimizer):
        choose(optimizer, first)
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda: choose(optimizer, then))

    data = batches([3, 5, 2, 4, 1, 6, 7, 2], dtype)

    model, optimizer = ours(factory, data, clip=ice.clip_norm(0.3), watch=watch, dtype=dtype)

    assert apart(model, by_hand(factory, data, clip=0.3, dtype=dtype)) < (2e-7 if dtype == torch.float32 else 1e-15)
    assert optimizer.record.form == then


def test_the_record_says_nothing_where_there_is_no_choice():
    table = torch.nn.Embedding(3, 2, sparse=True)
    optimizer = ice.Optimizer(torch.optim.SparseAdam(table.parameters()))
    optimizer.backward(table(torch.tensor([1])).sum())
    optimizer.update()

    assert optimizer.record.form is None


def test_torch_is_not_asked_again_at_each_step_which_form_was_left_open(monkeypatch):
    """Of a tiny model's iteration, what it answers takes 3 to 4 %."""
    asked = []
    module = importlib.import_module("torch.optim.sgd")
    torchs = module._default_to_fused_or_foreach
    monkeypatch.setattr(module, "_default_to_fused_or_foreach", lambda *a, **k: asked.append(1) or torchs(*a, **k))
    factory = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    data = batches([3, 5, 2, 4])

    model, optimizer = ours(factory, data, k=1)

    assert not asked
    expected = tiny()
    plain = factory(expected.parameters())
    for x, y in data:
        torch.nn.functional.mse_loss(expected(x), y).backward()
        plain.step()
        plain.zero_grad()
    assert len(asked) == len(data)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters(), strict=True))
    assert form(optimizer) == [(None, None)]


def test_what_was_left_open_still_is_after_a_step_that_raised():
    def watch(_, optimizer):
        optimizer.param_groups[0]["weight_decay"] = "a word"

    factory = functools.partial(torch.optim.SGD, lr=0.05)
    group = {}

    with pytest.raises(TypeError):
        ours(factory, batches([1]), k=1, watch=lambda e, o: (group.update(it=o.param_groups[0]), watch(e, o)))

    assert group["it"]["foreach"] is None
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("factory", FORMS.values(), ids=FORMS)
def test_a_step_records_no_gradient_and_leaves_whether_others_are(factory, enabled):
    model = tiny()
    optimizer = ice.Optimizer(factory, model.parameters())
    x, y = batches([4])[0]
    optimizer.backward(torch.nn.functional.mse_loss(model(x), y))

    with torch.set_grad_enabled(enabled):
        optimizer.update()

        assert torch.is_grad_enabled() is enabled
    assert all(p.is_leaf and p.grad_fn is None for p in model.parameters())
    states = [value for of_one in optimizer.state.values() for value in of_one.values()]
    assert not any(value.requires_grad for value in states if isinstance(value, torch.Tensor))


def test_a_step_that_is_to_be_differentiated_is_torchs_own():
    """It needs torch's wrapper, which leaves gradients on; parameters that are leaves cannot be stepped so."""
    plain = functools.partial(torch.optim.SGD, lr=0.05, differentiable=True)
    stepped = torch.nn.Parameter(torch.ones(2))
    stepped.grad = torch.ones(2)
    with pytest.raises(RuntimeError) as torchs:
        plain([stepped]).step()

    with pytest.raises(RuntimeError) as ours_:
        ours(plain, batches([1]), k=1)

    assert str(ours_.value) == str(torchs.value)


def test_the_step_of_a_class_of_the_users_own_sees_its_groups_as_they_are():
    seen = []

    class Own(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(self.param_groups[0]["foreach"])
            return super().step(closure)

    ours(functools.partial(Own, lr=0.05), batches([1, 1]), k=1)

    assert seen == [None, None]


def test_an_instance_stays_as_it_is():
    assert form(ice.Optimizer(ADAMW(tiny().parameters()))) == [(None, None)]


def test_other_precisions_groups_that_say_which_and_subclasses_stay_as_they_are():
    class Own(torch.optim.AdamW):
        pass

    said = [{"params": list(tiny().parameters()), "foreach": True}]

    assert form(ice.Optimizer(ADAMW, tiny(torch.float64).parameters())) == [(None, None)]
    assert form(ice.Optimizer(ADAMW, said)) == [(None, True)]
    assert form(ice.Optimizer(Own, tiny().parameters())) == [(None, None)]


def test_a_group_that_is_added_later_has_the_same_form():
    optimizer = ice.Optimizer(ADAMW, tiny().parameters())
    optimizer.add_param_group({"params": list(tiny().parameters())})

    assert form(optimizer) == [(True, None)] * 2


def test_state_of_another_form_loads_and_goes_on():
    data = batches([3, 5, 2, 4, 1, 6])
    plain = by_hand(ADAMW, data, k=1)
    model = tiny()
    half = ADAMW(model.parameters())
    for x, y in data[:3]:
        torch.nn.functional.mse_loss(model(x), y).backward()
        half.step()
        half.zero_grad()
    optimizer = ice.Optimizer(ADAMW, model.parameters())

    optimizer.load_state_dict(half.state_dict())
    for x, y in data[3:]:
        optimizer.backward(torch.nn.functional.mse_loss(model(x), y))
        optimizer.update()

    assert apart(model, plain) < 1e-6
