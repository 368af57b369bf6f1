"""Several optimizers on one engine: each as if it were alone, bit for bit as in a loop written by hand."""

import copy
import functools
import io
import math
import pickle

import pytest
import torch
from ignite.engine import Engine, Events
from torch.nn import functional

import ice_engine as ice
from ice_engine.errors import ArgumentTypeError, AttachError, BackwardError, IceEngineWarning
from tests.unsized import Unsized

Adam, SGD = torch.optim.Adam, torch.optim.SGD


def net(inputs, outputs, seed):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(inputs, 8), torch.nn.Tanh(), torch.nn.Linear(8, outputs))


def batches(n=7):
    return list(torch.randn(n, 6, 3, generator=torch.Generator().manual_seed(1)))


def scaler(**settings):
    return torch.amp.GradScaler("cpu", **{"init_scale": 16.0, "growth_interval": 3, **settings})


def as_bytes(*modules):
    return [p.detach().numpy().tobytes() for module in modules for p in module.parameters()]


def judged(d, g, real):
    return functional.softplus(-d(real)).mean() + functional.softplus(d(g(real[:, :2]).detach())).mean()


def drawn(d, g, real):
    return functional.softplus(-d(g(real[:, :2]))).mean()


def gradients(loss, module):
    return torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)


class ByHand:
    """What a careful author writes: sums of gradients, divided by the micro-batches there are, then clipped."""

    def __init__(self, module, optimizer, clip=None):
        self.parameters, self.optimizer, self.clip = list(module.parameters()), optimizer, clip
        self.sums, self.n = None, 0

    def add(self, gradients):
        self.sums = gradients if self.sums is None else [a + b for a, b in zip(self.sums, gradients, strict=True)]
        self.n += 1

    def step(self, lr=None):
        if self.n == 0:
            return
        for p, gradient in zip(self.parameters, self.sums, strict=True):
            p.grad = gradient * (1 / self.n)
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        if lr is not None:
            self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.sums, self.n = None, 0


# -- each as if it were alone --------------------------------------------------------------------------------


def test_a_gan_with_windows_tails_clipping_and_schedules_of_their_own_equals_a_plain_loop():
    data = batches(7)
    g, d = net(2, 3, 0), net(3, 1, 1)
    plain_g, plain_d = copy.deepcopy(g), copy.deepcopy(d)

    generator = ice.Optimizer(Adam(g.parameters(), lr=0.02), name="generator", accumulation_steps=4, tail="carry")
    critic = ice.Optimizer(
        SGD(d.parameters(), lr=0.2, momentum=0.9),
        name="critic",
        accumulation_steps=2,
        clip=ice.clip_norm(0.1),
        processors=[ice.schedules.linear()],
    )

    def train_step(engine, real):
        critic.backward(judged(d, g, real))
        with generator.toggle(d):
            generator.backward(drawn(d, g, real))

    trainer = Engine(train_step)
    critic.attach(trainer)
    generator.attach(trainer)
    trainer.run(data, max_epochs=2)

    by_critic = ByHand(plain_d, SGD(plain_d.parameters(), lr=0.2, momentum=0.9), clip=0.1)
    by_generator = ByHand(plain_g, Adam(plain_g.parameters(), lr=0.02))
    steps = 0
    for iteration, real in enumerate(data * 2, start=1):
        of_d = gradients(judged(plain_d, plain_g, real), plain_d)
        by_generator.add(gradients(drawn(plain_d, plain_g, real), plain_g))
        by_critic.add(of_d)
        if by_critic.n == 2 or iteration % 7 == 0:  # the epoch's last window has one micro-batch
            by_critic.step(lr=0.2 * (1 - steps / 8))
            steps += 1
        if by_generator.n == 4:
            by_generator.step()
    by_generator.step()  # the run's end

    assert as_bytes(g, d) == as_bytes(plain_g, plain_d)
    assert critic.clocks == {"step": 8, "attempt": 8, "skipped": 0, "iteration": 14}
    assert generator.clocks == {"step": 4, "attempt": 4, "skipped": 0, "iteration": 14}
    assert critic.record.micro_batches == 1
    assert generator.record.micro_batches == 2


def test_a_generator_trained_every_fourth_iteration_equals_a_plain_loop():
    data = batches(10)
    g, d = net(2, 3, 0), net(3, 1, 1)
    plain_g, plain_d = copy.deepcopy(g), copy.deepcopy(d)
    generator = ice.Optimizer(Adam(g.parameters(), lr=0.02), name="generator", accumulation_steps=2, tail="drop")
    critic = ice.Optimizer(Adam(d.parameters(), lr=0.01), name="critic", clip=ice.clip_norm(0.2))

    def train_step(engine, real):
        critic.backward(judged(d, g, real))
        if engine.state.iteration % 4 == 0:
            with generator.toggle():
                generator.backward(drawn(d, g, real))

    trainer = Engine(train_step)
    generator.attach(trainer)
    critic.attach(trainer)
    trainer.run(data, max_epochs=3)

    by_critic = ByHand(plain_d, Adam(plain_d.parameters(), lr=0.01), clip=0.2)
    by_generator = ByHand(plain_g, Adam(plain_g.parameters(), lr=0.02))
    for iteration, real in enumerate(data * 3, start=1):
        by_critic.add(gradients(judged(plain_d, plain_g, real), plain_d))
        if iteration % 4 == 0:
            by_generator.add(gradients(drawn(plain_d, plain_g, real), plain_g))
        by_critic.step()
        if by_generator.n == 2:
            by_generator.step()
        elif iteration % 10 == 0:
            by_generator.sums, by_generator.n = None, 0

    assert as_bytes(g, d) == as_bytes(plain_g, plain_d)
    assert critic.clocks["step"] == 30
    assert generator.clocks["step"] == 3  # of iterations 4 and 8, 12 and 16, 24 and 28; that of 20 is dropped


def test_an_encoder_and_two_heads_with_windows_of_their_own_learn_from_one_loss():
    data = batches(6)
    encoder, left, right = net(3, 4, 0), net(4, 1, 1), net(4, 1, 2)
    plain = [copy.deepcopy(module) for module in (encoder, left, right)]

    def loss_of(encoder, left, right, x):
        features = encoder(x)
        return (left(features) - x[:, :1]).square().mean() + (right(features) - x[:, 1:2]).square().mean()

    settings = {"encoder": (4, 0.5), "left": (1, None), "right": (2, 0.05)}
    optimizers = [
        ice.Optimizer(
            Adam(module.parameters(), lr=0.01),
            name=name,
            accumulation_steps=k,
            clip=clip and ice.clip_norm(clip),
        )
        for (name, (k, clip)), module in zip(settings.items(), (encoder, left, right), strict=True)
    ]

    def train_step(engine, x):
        loss = loss_of(encoder, left, right, x)
        for optimizer in optimizers:
            optimizer.backward(loss, retain_graph=optimizer is not optimizers[-1])

    trainer = Engine(train_step)
    for optimizer in optimizers:
        optimizer.attach(trainer)
    trainer.run(data, max_epochs=2)

    by_hand = [
        (k, ByHand(module, Adam(module.parameters(), lr=0.01), clip))
        for (k, clip), module in zip(settings.values(), plain, strict=True)
    ]
    for iteration, x in enumerate(data * 2, start=1):
        loss = loss_of(*plain, x)
        for module, (_, by) in zip(plain, by_hand, strict=True):
            by.add(gradients(loss, module))
        for k, by in by_hand:
            if by.n == k or iteration % 6 == 0:
                by.step()

    assert as_bytes(encoder, left, right) == as_bytes(*plain)
    assert [optimizer.clocks["step"] for optimizer in optimizers] == [4, 12, 6]


def test_update_in_train_step_lets_one_step_before_the_other_computes_its_loss():
    data = batches(5)
    g, d = net(2, 3, 0), net(3, 1, 1)
    plain_g, plain_d = copy.deepcopy(g), copy.deepcopy(d)
    generator = ice.Optimizer(SGD(g.parameters(), lr=0.1), name="generator")
    critic = ice.Optimizer(SGD(d.parameters(), lr=0.1), name="critic")

    def train_step(engine, real):
        for _ in range(3):
            critic.backward(judged(d, g, real))
            critic.update()
        generator.backward(drawn(d, g, real))

    trainer = Engine(train_step)
    critic.attach(trainer)
    generator.attach(trainer)
    trainer.run(data)

    by_critic, by_generator = (ByHand(m, SGD(m.parameters(), lr=0.1)) for m in (plain_d, plain_g))
    for real in data:
        for _ in range(3):
            by_critic.add(gradients(judged(plain_d, plain_g, real), plain_d))
            by_critic.step()
        by_generator.add(gradients(drawn(plain_d, plain_g, real), plain_g))
        by_generator.step()

    assert as_bytes(g, d) == as_bytes(plain_g, plain_d)
    assert (critic.clocks["step"], generator.clocks["step"]) == (15, 5)


def test_events_clocks_and_records_are_separate():
    g, d = net(2, 3, 0), net(3, 1, 1)
    generator = ice.Optimizer(SGD(g.parameters(), lr=0.1), name="generator", accumulation_steps=3)
    critic = ice.Optimizer(SGD(d.parameters(), lr=0.3), name="critic", clip=ice.clip_norm(1.0))

    def train_step(engine, real):
        slope = math.nan if engine.state.iteration == 2 else 1.0
        critic.backward(judged(d, g, real) * slope)
        generator.backward(drawn(d, g, real))

    trainer = Engine(train_step)
    critic.attach(trainer)
    generator.attach(trainer)
    seen = []
    for optimizer in (critic, generator):
        for kind in ("GRADIENTS_READY", "STEP_STARTED", "STEP_COMPLETED", "STEP_SKIPPED"):
            note = f"{optimizer.name} {kind}"
            trainer.add_event_handler(
                optimizer.event(kind), lambda engine, note=note: seen.append((engine.state.iteration, note))
            )
    trainer.run(batches(3))

    step = ["GRADIENTS_READY", "STEP_STARTED", "STEP_COMPLETED"]
    assert seen == [
        *((1, f"critic {kind}") for kind in step),
        (2, "critic GRADIENTS_READY"),
        (2, "critic STEP_SKIPPED"),
        *((3, f"critic {kind}") for kind in step),
        *((3, f"generator {kind}") for kind in step),
    ]
    state = trainer.state
    assert (state.critic_step, state.critic_attempt, state.critic_skipped) == (2, 3, 1)
    assert (state.generator_step, state.generator_attempt, state.generator_skipped) == (1, 1, 0)
    assert state.critic_record.micro_batches == 1
    assert state.generator_record.micro_batches == 3
    assert state.critic_record.values == {"group_0": {"lr": 0.3}}
    assert state.generator_record.values == {"group_0": {"lr": 0.1}}
    assert state.critic_record.grad_norm is not None
    assert state.generator_record.grad_norm is None


# -- one loss scale for all ----------------------------------------------------------------------------------


def pair(data, generator_scaler, critic_scaler, *, k=(1, 1), bad=(), hook=lambda *_: None):
    """A trainer of two weights' worth of networks; the critic's loss is infinite at iterations *bad*."""
    g, d = net(2, 3, 0), net(3, 1, 1)
    generator = ice.Optimizer(
        Adam(g.parameters(), lr=0.02), name="generator", grad_scaler=generator_scaler, accumulation_steps=k[0]
    )
    critic = ice.Optimizer(
        Adam(d.parameters(), lr=0.02), name="critic", grad_scaler=critic_scaler, accumulation_steps=k[1]
    )

    def train_step(engine, real):
        hook(critic)
        critic.backward(judged(d, g, real) * (math.inf if engine.state.iteration in bad else 1.0))
        hook(generator)
        generator.backward(drawn(d, g, real))

    trainer = Engine(train_step)
    critic.attach(trainer)
    generator.attach(trainer)
    return trainer, generator, critic, (g, d)


@pytest.mark.parametrize("bad", [(), (2,), (1, 2, 6), (3, 4, 9)])
def test_a_shared_scaler_is_what_torch_makes_of_it_in_a_plain_loop(bad):
    data, ours, theirs = batches(10), scaler(), scaler()
    scales, expected = [], []
    trainer, generator, critic, modules = pair(
        data, ours, ours, bad=bad, hook=lambda o: scales.append((ours.get_scale(), ours._get_growth_tracker()))
    )
    g, d = copy.deepcopy(modules[0]), copy.deepcopy(modules[1])
    trainer.run(data)

    of_g, of_d = Adam(g.parameters(), lr=0.02), Adam(d.parameters(), lr=0.02)
    for iteration, real in enumerate(data, start=1):
        expected += [(theirs.get_scale(), theirs._get_growth_tracker())] * 2
        theirs.scale(judged(d, g, real) * (math.inf if iteration in bad else 1.0)).backward()
        of_g.zero_grad()
        kept = [p.grad for p in d.parameters()]
        theirs.scale(drawn(d, g, real)).backward(inputs=list(g.parameters()))
        assert all(p.grad is gradient for p, gradient in zip(d.parameters(), kept, strict=True))
        theirs.step(of_d)
        theirs.step(of_g)
        theirs.update()  # once for both
        of_d.zero_grad()

    assert scales == expected
    assert ours.state_dict() == theirs.state_dict()
    assert as_bytes(*modules) == as_bytes(g, d)
    assert critic.clocks["skipped"] == len(bad)
    assert generator.clocks["skipped"] == 0  # the other's overflow costs it nothing


@pytest.mark.parametrize("k", [(1, 3), (3, 1), (2, 3), (4, 2), (2, 2)])
@pytest.mark.parametrize("bad", [(), (2,), (5, 8)])
def test_a_shared_scale_changes_inside_no_window_whatever_their_sizes(k, bad):
    data, shared = batches(11), scaler(growth_interval=1)
    windows = {}
    trainer, *_ = pair(
        data,
        shared,
        shared,
        k=k,
        bad=bad,
        hook=lambda o: windows.setdefault((o.name, o.clocks["attempt"]), set()).add(shared.get_scale()),
    )
    trainer.run(data, max_epochs=2)

    assert all(len(scales) == 1 for scales in windows.values())
    assert len({scale for scales in windows.values() for scale in scales}) > 2  # and it does change


def test_a_shared_scale_adapts_once_where_all_windows_end():
    data, shared = batches(8), scaler(growth_interval=1)
    scales = []
    trainer, *_ = pair(data, shared, shared, k=(3, 1), hook=lambda _: scales.append(shared.get_scale()))
    trainer.run(data)

    assert scales[::2] == [16.0] * 3 + [32.0] * 3 + [64.0] * 2
    assert shared.get_scale() == 128.0  # the tail of two micro-batches closed both


def test_an_overflow_in_one_window_backs_off_once_and_the_others_step_is_not_lost():
    data, shared = batches(4), scaler(growth_interval=100)
    trainer, generator, critic, (g, _) = pair(data, shared, shared, k=(4, 1), bad=(1, 2))
    before = as_bytes(g)
    trainer.run(data)

    assert shared.get_scale() == 8.0  # two skips, but one round
    assert (critic.clocks["skipped"], critic.clocks["step"]) == (2, 2)
    assert (generator.clocks["skipped"], generator.clocks["step"]) == (0, 1)
    assert as_bytes(g) != before


def test_both_are_saved_and_restored_with_their_scaler():
    data, shared = batches(5), scaler()
    trainer, generator, critic, modules = pair(data, shared, shared, k=(2, 1), bad=(2,))
    trainer.run(data, max_epochs=1)
    file = io.BytesIO()
    torch.save([o.state_dict() for o in (trainer, generator, critic, *modules)], file)
    trainer.run(data, max_epochs=3)

    file.seek(0)
    states = torch.load(file, weights_only=True)
    again = scaler(init_scale=2.0)
    resumed = pair(data, again, again, k=(2, 1), bad=(2,))
    for target, state in zip((*resumed[:3], *resumed[3]), states, strict=True):
        target.load_state_dict(state)
    assert again.state_dict() == states[1]["ice_engine"]["grad_scaler"] == states[2]["ice_engine"]["grad_scaler"]
    assert again.get_scale() == 8.0
    resumed[0].run(data, max_epochs=3)

    assert again.state_dict() == shared.state_dict()
    assert as_bytes(*resumed[3]) == as_bytes(*modules)
    assert resumed[1].clocks == generator.clocks


def test_no_scale_is_loaded_into_the_open_window_of_another():
    a, b = torch.nn.Parameter(torch.zeros(())), torch.nn.Parameter(torch.zeros(()))
    shared = scaler()
    first = ice.Optimizer(SGD([a], lr=1.0), name="first", grad_scaler=shared)
    second = ice.Optimizer(SGD([b], lr=1.0), name="second", grad_scaler=shared, accumulation_steps=2)
    state = copy.deepcopy(first.state_dict())
    state["ice_engine"]["grad_scaler"] = scaler(init_scale=64.0).state_dict()
    second.backward(b * 1.0)
    second.update()

    with pytest.raises(AttachError, match="inside an open window of another optimizer, which shares the GradScaler"):
        first.load_state_dict(state)
    assert shared.get_scale() == 16.0
    second.backward(b * 1.0)
    second.update()
    first.load_state_dict(state)
    assert (b.item(), shared.get_scale()) == (-1.0, 64.0)


def test_a_run_that_failed_does_not_hold_the_scale_of_another_engine():
    a, b = torch.nn.Parameter(torch.zeros(())), torch.nn.Parameter(torch.zeros(()))
    shared = scaler(init_scale=4.0, growth_interval=1)
    first = ice.Optimizer(SGD([a], lr=1.0), name="first", grad_scaler=shared, accumulation_steps=2)
    second = ice.Optimizer(SGD([b], lr=1.0), name="second", grad_scaler=shared)

    def fail(engine, batch):
        first.backward(a * batch)
        raise ZeroDivisionError

    failing, other = Engine(fail), Engine(lambda _, batch: second.backward(b * batch))
    first.attach(failing)
    second.attach(other)
    with pytest.raises(ZeroDivisionError):
        failing.run([1.0])
    other.run([1.0] * 4)

    assert shared.get_scale() == 64.0
    second.load_state_dict(second.state_dict())  # nor does it forbid to load


def test_a_run_that_is_interrupted_holds_the_scale():
    a, b = torch.nn.Parameter(torch.zeros(())), torch.nn.Parameter(torch.zeros(()))
    shared = scaler(init_scale=4.0, growth_interval=1)
    first = ice.Optimizer(SGD([a], lr=1.0), name="first", grad_scaler=shared, accumulation_steps=2)
    second = ice.Optimizer(SGD([b], lr=1.0), name="second", grad_scaler=shared)
    paused, other = (Engine(lambda _, x, o=o, w=w: o.backward(w * x)) for o, w in ((first, a), (second, b)))
    first.attach(paused)
    second.attach(other)
    paused.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda e: e.interrupt())
    paused.run([1.0, 3.0])
    other.run([1.0] * 4)
    assert shared.get_scale() == 4.0
    paused.run([1.0, 3.0])

    assert shared.get_scale() == 8.0
    assert (a.item(), b.item()) == (-2.0, -4.0)


def test_one_scaler_each_adapts_alone():
    data, of_generator, of_critic = batches(6), scaler(growth_interval=2), scaler(growth_interval=100)
    trainer, *_ = pair(data, of_generator, of_critic, k=(3, 1), bad=(4,))
    trainer.run(data)

    assert of_generator.get_scale() == 32.0  # two windows
    assert of_critic.get_scale() == 8.0


# -- without an engine ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("critic_first", [True, False])
def test_without_an_engine_a_loss_that_reaches_the_others_parameters_is_refused(critic_first, k):
    g, d = net(2, 3, 0), net(3, 1, 1)
    generator = ice.Optimizer(SGD(g.parameters(), lr=0.1), name="generator", accumulation_steps=k)
    critic = ice.Optimizer(SGD(d.parameters(), lr=0.1), name="critic", accumulation_steps=k)
    real = batches(1)[0]
    if critic_first:
        critic.backward(judged(d, g, real))
        expected = [p.grad.clone() for p in d.parameters()]
        with (
            pytest.warns(ice.IceEngineWarning, match="'generator' dropped the 1 micro-batches"),
            pytest.raises(BackwardError, match=r"write with generator.toggle\(module\): around it"),
        ):
            generator.backward(drawn(d, g, real))
        assert all(map(torch.equal, expected, [p.grad for p in d.parameters()]))
        assert all(p.grad is None for p in g.parameters())
    else:
        generator.backward(drawn(d, g, real))
        with pytest.raises(BackwardError, match=r"of optimizer 'critic'.*with other.toggle\(module\): around it"):
            critic.backward(judged(d, g, real))
        critic.zero_grad()
        critic.backward(judged(d, g, real))
        expected = [p.grad.clone() for p in d.parameters()]
    with generator.toggle(d):
        generator.backward(drawn(d, g, real))
    assert all(map(torch.equal, expected, [p.grad for p in d.parameters()]))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])  # noqa: S301 - our own
def test_a_copy_is_kept_from_the_others_losses_too(copied):
    g, first = net(2, 3, 0), net(3, 1, 1)
    generator = ice.Optimizer(SGD(g.parameters(), lr=0.1), name="generator", accumulation_steps=2)
    d, critic = copied((first, ice.Optimizer(SGD(first.parameters(), lr=0.1), name="critic", accumulation_steps=2)))
    critic.backward(judged(d, g, batches(1)[0]))
    with (
        pytest.warns(ice.IceEngineWarning, match="'generator' dropped the 1 micro-batches"),
        pytest.raises(BackwardError, match=r"write with generator.toggle\(module\): around it"),
    ):
        generator.backward(drawn(d, g, batches(1)[0]))
    critic.update()
    critic.backward(judged(d, g, batches(1)[0]))
    assert critic.update()


def test_without_an_engine_a_window_that_the_caller_differentiates_takes_what_the_others_loss_leaves():
    a, b = torch.nn.Parameter(torch.ones(())), torch.nn.Parameter(torch.ones(()))
    first, second = (ice.Optimizer(SGD([p], lr=1.0), accumulation_steps=2) for p in (a, b))
    for slope in (1.0, 3.0):
        first.backward((a + b) * slope)
        first.update()
        second.update()
    assert (a.item(), b.item()) == (-1.0, -1.0)


def test_a_forgotten_retain_graph_is_told_by_our_own_name():
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = ice.Optimizer(SGD([weight], lr=1.0))
    loss = weight.square()
    optimizer.backward(loss)
    with (
        pytest.warns(ice.IceEngineWarning, match="dropped"),
        pytest.raises(RuntimeError, match="second time") as caught,
    ):
        optimizer.backward(loss)
    notes = getattr(caught.value, "__notes__", None)  # Python 3.10 has none
    assert notes is None or "optimizer.backward(loss, retain_graph=True) in all but the last" in notes[0]


# -- toggle --------------------------------------------------------------------------------------------------


def flags(*modules):
    return [p.requires_grad for module in modules for p in module.parameters()]


def test_toggle_leaves_no_gradient_in_the_discriminator_and_the_same_in_the_generator():
    real = batches(1)[0]
    g, d = net(2, 3, 0), net(3, 1, 1)
    untoggled = copy.deepcopy(g)
    ice.Optimizer(SGD(untoggled.parameters(), lr=0.1)).backward(drawn(d, untoggled, real))
    assert all(p.grad is not None for p in d.parameters())  # on no engine, nobody knows whose they are
    d.zero_grad()

    generator = ice.Optimizer(SGD(g.parameters(), lr=0.1), name="generator")
    with generator.toggle(d):
        generator.backward(drawn(d, g, real))

    assert all(p.grad is None for p in d.parameters())
    assert [p.grad.tolist() for p in g.parameters()] == [p.grad.tolist() for p in untoggled.parameters()]


def test_toggle_keeps_what_the_other_has_accumulated():
    data = batches(4)
    g, d = net(2, 3, 0), net(3, 1, 1)
    generator = ice.Optimizer(SGD(g.parameters(), lr=0.1), name="generator")
    critic = ice.Optimizer(SGD(d.parameters(), lr=0.1), name="critic", accumulation_steps=4)

    def train_step(engine, real):
        critic.backward(judged(d, g, real))
        before = [p.grad.clone() for p in d.parameters()]
        with generator.toggle():
            assert flags(d) == [False] * 4
            assert flags(g) == [True] * 4
            generator.backward(drawn(d, g, real))
        assert all(torch.equal(p.grad, b) for p, b in zip(d.parameters(), before, strict=True))

    trainer = Engine(train_step)
    generator.attach(trainer)
    critic.attach(trainer)
    trainer.run(data)

    assert (generator.clocks["step"], critic.clocks["step"]) == (4, 1)


def test_toggle_of_a_module_that_holds_both_turns_off_only_what_is_not_its_own():
    g, d = net(2, 3, 0), net(3, 1, 1)
    generator = ice.Optimizer(SGD(g.parameters(), lr=0.1), name="generator")
    with generator.toggle(torch.nn.ModuleDict({"generator": g, "discriminator": d}), d):
        assert (flags(g), flags(d)) == ([True] * 4, [False] * 4)
    assert flags(g, d) == [True] * 8


def test_toggle_gives_frozen_parameters_back_frozen():
    g, d = net(2, 3, 0), net(3, 1, 1)
    d[0].weight.requires_grad_(False)
    g[0].weight.requires_grad_(False)
    before = flags(g, d)
    generator = ice.Optimizer(SGD(g.parameters(), lr=0.1), name="generator")
    with generator.toggle(d):
        assert flags(g) == before[:4]
        assert not any(flags(d))
    assert flags(g, d) == before


def test_toggle_inside_toggle():
    g, d, encoder = net(2, 3, 0), net(3, 1, 1), net(3, 3, 2)
    generator = ice.Optimizer(SGD(g.parameters(), lr=0.1), name="generator")
    critic = ice.Optimizer(SGD(d.parameters(), lr=0.1), name="critic")
    with generator.toggle(d):
        with critic.toggle(g, d, encoder):
            assert not any(flags(g, d, encoder))  # what the outer one turned off stays off
        assert (flags(g), flags(d), flags(encoder)) == ([True] * 4, [False] * 4, [True] * 4)
        with generator.toggle(d):
            pass
        assert not any(flags(d))
    assert all(flags(g, d, encoder))


def test_toggle_is_for_one_with():
    g, d = net(2, 3, 0), net(3, 1, 1)
    toggled = ice.Optimizer(SGD(g.parameters(), lr=0.1), name="generator").toggle(d)
    with toggled:
        pass

    with pytest.raises(AttachError, match=r"is for one with; write with optimizer.toggle\(...\): anew"), toggled:
        pass
    assert all(flags(g, d))


def test_toggle_gives_back_after_an_exception():
    g, d = net(2, 3, 0), net(3, 1, 1)
    generator = ice.Optimizer(SGD(g.parameters(), lr=0.1), name="generator")
    with pytest.raises(ZeroDivisionError), generator.toggle(d):
        1 / 0  # noqa: B018
    assert all(flags(g, d))


@pytest.mark.parametrize("wrong", ["discriminator", 1, None, [torch.nn.Linear(1, 1)]])
def test_toggle_of_anything_but_modules_is_refused_at_once(wrong):
    generator = ice.Optimizer(SGD(net(2, 3, 0).parameters(), lr=0.1), name="generator")
    with pytest.raises(ArgumentTypeError, match=rf"takes modules, got {type(wrong).__name__}; such as generator"):
        generator.toggle(wrong)


def test_toggle_of_nothing_needs_an_engine():
    generator = ice.Optimizer(SGD(net(2, 3, 0).parameters(), lr=0.1), name="generator")
    with pytest.raises(AttachError, match=r"write generator.toggle\(module\), or attach it"):
        generator.toggle()


# -- schedules of one that is trained now and then ------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        # A whole run is counted as if every iteration were a micro-batch: a quarter of the way is gone.
        (ice.schedules.linear(), [1.0, 15 / 16, 14 / 16, 13 / 16]),
        # The engine's own clock is right, and so is a length that is said. Of 16 iterations, 3 lie behind at the 4th.
        (ice.schedules.linear(unit="iteration"), [13 / 16, 9 / 16, 5 / 16, 1 / 16]),
        (ice.schedules.linear(total=4), [1.0, 0.75, 0.5, 0.25]),
    ],
)
def test_whole_run_schedules_of_a_generator_trained_every_fourth_iteration(schedule, rates):
    g, d = net(2, 3, 0), net(3, 1, 1)
    generator = ice.Optimizer(SGD(g.parameters(), lr=1.0), name="generator", processors=[schedule])
    critic = ice.Optimizer(SGD(d.parameters(), lr=0.1), name="critic")

    def train_step(engine, real):
        critic.backward(judged(d, g, real))
        if engine.state.iteration % 4 == 0:
            generator.backward(drawn(d, g, real))

    trainer = Engine(train_step)
    generator.attach(trainer)
    critic.attach(trainer)
    seen = []
    trainer.add_event_handler(
        generator.event("STEP_COMPLETED"), lambda engine: seen.append(generator.param_groups[0]["lr"])
    )
    trainer.run(batches(8), max_epochs=2)

    assert seen == pytest.approx(rates)


@pytest.mark.parametrize("saved", [2, 3])
def test_an_overflow_beside_an_open_window_is_in_a_checkpoint(tmp_path, saved):
    def trainer_in(folder):
        critic, generator = (torch.nn.Parameter(torch.ones(())) for _ in range(2))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        judge = ice.Optimizer(torch.optim.SGD([critic], lr=0.1), name="critic", grad_scaler=scaler)
        draw = ice.Optimizer(
            torch.optim.SGD([generator], lr=0.1), name="generator", accumulation_steps=4, grad_scaler=scaler
        )

        def train_step(engine, batch):
            judge.backward(critic * batch * (math.inf if engine.state.iteration == 2 else 1.0))
            draw.backward(generator * batch)

        trainer = Engine(train_step)
        judge.attach(trainer)
        draw.attach(trainer)
        to_save = {"trainer": trainer, "judge": judge, "draw": draw}
        checkpoint = ice.Checkpoint(to_save, folder)
        return trainer, checkpoint.attach(trainer, Events.ITERATION_COMPLETED(once=saved)), scaler

    trainer, _, scaler = trainer_in(tmp_path)
    trainer.run([1.0] * 8)
    assert scaler.get_scale() == 512.0
    resumed, checkpoint, again = trainer_in(tmp_path)
    with pytest.warns(IceEngineWarning, match="parameters it trains"):
        checkpoint.resume(resumed)
    resumed.run([1.0] * 8)
    assert again.state_dict() == scaler.state_dict()


class Scored:
    """Two optimizers with windows of 1 and 3, and saves by the score of the first one's weights at each step of one."""

    def __init__(self, folder, make, *, attached, backward, event, updates=1):
        self.nets = {"one": net(3, 2, 0), "three": net(2, 1, 1)}
        self.optimizers = {
            name: ice.Optimizer(
                make(self.nets[name].parameters()),
                name=name,
                accumulation_steps=k,
                processors=[ice.schedules.cosine(total=50, warmup=2)],
            )
            for name, k in (("one", 1), ("three", 3))
        }

        def train_step(engine, batch):
            for name in backward:
                self.lose(name, batch)
            for _ in range(updates - 1):  # of which the engine's is the last
                self.optimizers["one"].update()
                self.lose("one", batch)

        self.trainer = Engine(train_step)
        for name in attached:
            self.optimizers[name].attach(self.trainer)
        self.scores = []
        states = {f"{name} optimizer": optimizer for name, optimizer in self.optimizers.items()}
        self.to_save = {"trainer": self.trainer, **self.nets, **states}
        self.checkpoint = ice.Checkpoint(
            self.to_save,
            folder,
            n_saved=None,
            score_function=self.score,
            global_step_transform=lambda engine, _: engine.state.iteration,
        )
        self.checkpoint.attach(self.trainer, self.optimizers[event].event("STEP_COMPLETED"))

    def lose(self, name, batch):
        drawn = self.nets["three"](self.nets["one"](batch))
        self.optimizers[name].backward((drawn - len(name)).square().mean())

    def score(self, _):
        self.scores.append(sum(p.detach().abs().sum().item() for p in self.nets["one"].parameters()))
        return self.scores[-1]

    def train(self):
        self.trainer.run(batches(), max_epochs=2)
        return as_bytes(*self.nets.values()), [optimizer.clocks for optimizer in self.optimizers.values()]


@pytest.mark.parametrize("event", ["one", "three"])
@pytest.mark.parametrize("attached", [("one", "three"), ("three", "one")])
@pytest.mark.parametrize(
    ("make", "backward", "updates"),
    [
        (functools.partial(SGD, lr=0.1, momentum=0.9), ("one", "three"), 1),
        (functools.partial(torch.optim.AdamW, lr=0.05), ("three", "one"), 1),
        (functools.partial(torch.optim.AdamW, lr=0.05), ("one", "three"), 3),
    ],
    ids=["SGD", "AdamW", "several steps in one micro-batch"],
)
def test_a_save_by_score_at_a_step_of_one_loses_nothing_of_the_other(
    tmp_path, make, attached, backward, updates, event
):
    settings = {"make": make, "attached": attached, "backward": backward, "event": event, "updates": updates}
    first = Scored(tmp_path, **settings)
    whole = first.train()
    files = sorted(tmp_path.iterdir())
    # Windows of 3, 3 and 1 in each epoch; of several steps in one micro-batch, the last one's score is what is saved.
    assert len(files) == (14 if event == "one" else 6)
    assert len(first.scores) == (14 * updates if event == "one" else 6)
    last = first.scores[updates - 1 :: updates] if event == "one" else first.scores
    assert {file.stem.split("_")[-1] for file in files} == {f"{score:.4f}" for score in last}
    for file in files:
        second = Scored(tmp_path, **settings)
        second.checkpoint._find = lambda _, name=file.name: [ice.Checkpoint.Item(0, name)]
        second.checkpoint.resume(second.trainer)
        if second.trainer.state.iteration < 14:  # else it would start over
            assert second.train() == whole, file.name


def test_a_scale_adapts_where_a_window_is_dropped_before_anything_was_scaled_in_a_resumed_run(tmp_path):
    def made(folder):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
        modules = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(2))
        each, second = (
            ice.Optimizer(
                torch.optim.SGD(module.parameters(), lr=0.1),
                name=name,
                accumulation_steps=steps,
                tail="drop",
                grad_scaler=scaler,
            )
            for module, name, steps in zip(modules, ("each", "second"), (1, 2), strict=True)
        )

        def step(engine, batch):
            each.backward(modules[0](batch).sum())
            second.backward(modules[1](batch).sum())

        trainer = Engine(step)
        each.attach(trainer)
        second.attach(trainer)
        to_save = {"trainer": trainer, "modules": modules, "each": each, "second": second}
        return trainer, scaler, ice.Checkpoint(to_save, folder)

    data = Unsized([torch.ones(1, 1)] * 3)
    trainer, scaler, checkpoint = made(tmp_path)
    checkpoint.attach(trainer, Events.ITERATION_COMPLETED)
    trainer.run(data)
    resumed, again, checkpoint = made(tmp_path)
    assert checkpoint.resume(resumed) == tmp_path / "checkpoint_3.pt"  # in an epoch that nobody knew was at its end
    resumed.run(data)
    assert again.state_dict() == scaler.state_dict()
