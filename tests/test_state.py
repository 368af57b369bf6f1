"""Optimizer state goes by parameter name: through regrouping, freezing, unfreezing and other heads."""

import copy
import functools
import io

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

import ice_engine as ice
from ice_engine.errors import StateDictError

FACTORIES = {
    # Not left open, because ours would then take another implementation than torch.
    "AdamW": functools.partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1, foreach=False),
    "AMSGrad": functools.partial(torch.optim.Adam, lr=0.05, amsgrad=True, foreach=False),
    "SGD": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "Adafactor": functools.partial(torch.optim.Adafactor, lr=0.05),
    "Adagrad": functools.partial(torch.optim.Adagrad, lr=0.05),
}
every = pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)


class Net(nn.Module):
    def __init__(self, *heads, width=2):
        super().__init__()
        torch.manual_seed(0)  # the same body whatever the heads
        self.body = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4))
        self.heads = nn.ModuleDict({head: nn.Linear(4, width) for head in heads or ("a",)})

    def forward(self, x):
        x = self.body(x).tanh()
        return sum(head(x).square().mean() for head in self.heads.values())


def batches(start, stop):
    return [torch.randn(5, 3, generator=torch.Generator().manual_seed(i)) for i in range(start, stop)]


def plain(model, optimizer, start, stop):
    """The oracle: nothing but torch."""
    for batch in batches(start, stop):
        model(batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def train(model, optimizer, start, stop):
    for batch in batches(start, stop):
        optimizer.backward(model(batch))
        optimizer.update()


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(model, expected):
    ours, theirs = dict(model.named_parameters()), dict(expected.named_parameters())
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def adopt(model, other):
    """Give *model* the values of *other* where both have them."""
    own = model.state_dict()
    model.load_state_dict({k: v for k, v in other.state_dict().items() if k in own and v.shape == own[k].shape}, False)


def flat(value):
    """All of a state dict, for comparison to the bit."""
    if isinstance(value, dict):
        return {key: flat(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [flat(entry) for entry in value]
    return (value.dtype, value.tolist()) if isinstance(value, torch.Tensor) else value


def names_of(model):
    return [name for name, _ in model.named_parameters()]


# -- regrouped ----------------------------------------------------------------------------------------------


def one_group(model):
    return list(model.named_parameters())


def turned(model):
    return list(model.named_parameters())[::-1]


def by_rule(model):
    return ice.param_groups(model, {"bias": {}, r"^heads\.": {"name": "head"}}, default={})


def per_parameter(model):
    return [{"params": [pair]} for pair in turned(model)]


LAYOUTS = [one_group, turned, by_rule, per_parameter]


@every
@pytest.mark.parametrize("before", LAYOUTS)
@pytest.mark.parametrize("after", LAYOUTS)
def test_regrouped_it_goes_on_bit_for_bit(factory, before, after):
    oracle, first, second = Net(), Net(), Net()
    plain(oracle, factory(oracle.parameters()), 0, 7)

    saved = ice.Optimizer(factory, before(first))
    train(first, saved, 0, 4)
    adopt(second, first)
    optimizer = ice.Optimizer(factory, after(second))
    report = optimizer.load_state_dict(through_a_file(saved.state_dict()))
    train(second, optimizer, 4, 7)

    assert same(second, oracle)
    assert report.new == report.dropped == ()
    assert list(report.matched) == [name for name, _ in optimizer.named_parameters()]
    assert optimizer.clocks["step"] == 7


def test_a_plain_optimizers_named_state_goes_by_name_too():
    oracle, model = Net(), Net()
    factory = FACTORIES["AdamW"]
    source = factory(oracle.named_parameters())
    plain(oracle, source, 0, 4)
    adopt(model, oracle)
    optimizer = ice.Optimizer(factory, by_rule(model))

    optimizer.load_state_dict(through_a_file(source.state_dict()))
    plain(oracle, source, 4, 7)
    train(model, optimizer, 4, 7)

    assert same(model, oracle)


def test_names_may_come_from_the_attached_model():
    first, second = Net(), Net()
    saved = ice.Optimizer(FACTORIES["SGD"], first.parameters()).attach(Engine(lambda e, b: None), model=first)
    optimizer = ice.Optimizer(FACTORIES["SGD"], list(second.parameters())[::-1])
    optimizer.attach(Engine(lambda e, b: None), model=second)
    saved.detach()
    train(first, saved, 0, 2)
    saved.attach(Engine(lambda e, b: None), model=first)

    optimizer.load_state_dict(saved.state_dict())

    for (name, ours), theirs in zip(second.named_parameters(), first.parameters(), strict=True):
        assert torch.equal(optimizer.state[ours]["momentum_buffer"], saved.state[theirs]["momentum_buffer"]), name


def test_a_parameter_does_not_get_the_name_of_one_that_is_gone():
    found = set()
    for _ in range(20):  # nearly every time, the new ones are where the old ones were
        model = torch.nn.ModuleDict({"body": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 2)})
        optimizer = ice.Optimizer(FACTORIES["SGD"], list(model["body"].parameters()))
        optimizer.attach(Engine(lambda e, b: None), model=model)
        del model["head"]
        model["tail"] = torch.nn.Linear(2, 2)
        optimizer.add_param_group({"params": list(model["tail"].parameters())})
        found |= {name for name, _ in optimizer.named_parameters()}

    assert found == {"body.weight", "body.bias", "tail.weight", "tail.bias"}


def test_parameters_that_were_added_with_their_module_are_found_by_name():
    grown = nn.ModuleDict({"body": nn.Linear(2, 2)})
    saved = ice.Optimizer(FACTORIES["SGD"], grown.parameters()).attach(Engine(lambda e, b: None), model=grown)
    grown["head"] = nn.Linear(2, 2)
    saved.add_param_group({"params": list(grown["head"].parameters())})
    for i, parameter in enumerate(grown.parameters()):
        parameter.grad = torch.full_like(parameter, i)
    saved.step()
    whole = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    optimizer = ice.Optimizer(FACTORIES["SGD"], list(whole.parameters())[::-1])  # one group, in another order
    optimizer.attach(Engine(lambda e, b: None), model=whole)

    optimizer.load_state_dict(saved.state_dict())

    assert [optimizer.state[p]["momentum_buffer"].mean().item() for p in whole.parameters()] == [0.0, 1.0, 2.0, 3.0]


def test_an_attached_model_may_be_converted_by_swapping_its_parameters():
    model = Net()
    optimizer = ice.Optimizer(FACTORIES["SGD"], model.parameters()).attach(Engine(lambda e, b: None), model=model)
    torch.__future__.set_swap_module_params_on_conversion(True)  # as always with fully_shard
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)

    assert list(optimizer.named_parameters()) == list(model.named_parameters())


def test_without_names_on_one_side_it_goes_by_position():
    first, second = Net(), Net()
    saved, optimizer = (
        ice.Optimizer(FACTORIES["SGD"], params) for params in (first.named_parameters(), second.parameters())
    )
    train(first, saved, 0, 2)

    report = optimizer.load_state_dict(saved.state_dict())

    assert report.matched == tuple(f"param_groups.0.params.{i}" for i in range(8))
    assert torch.equal(
        optimizer.state[second.heads["a"].bias]["momentum_buffer"],
        saved.state[first.heads["a"].bias]["momentum_buffer"],
    )
    other = ice.Optimizer(FACTORIES["SGD"], [{"params": [p]} for p in Net().parameters()])
    with pytest.raises(
        StateDictError, match=r"have \[8\] parameters, the optimizer's \[1, .*by name, from model.named_"
    ):
        other.load_state_dict(saved.state_dict(), strict=False)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("here", [True, False])
def test_the_prefixes_of_wrappers_do_not_matter(prefix, here):
    first, second = Net(), Net()
    wrapped = [(prefix + name, p) for name, p in turned(second if here else first)]
    saved = ice.Optimizer(FACTORIES["SGD"], one_group(first) if here else wrapped)
    optimizer = ice.Optimizer(FACTORIES["SGD"], wrapped if here else one_group(second))
    train(first, saved, 0, 2)

    report = optimizer.load_state_dict(saved.state_dict())

    assert report.matched == tuple(name for name, _ in optimizer.named_parameters())
    for ours, theirs in zip(second.parameters(), first.parameters(), strict=True):
        assert torch.equal(optimizer.state[ours]["momentum_buffer"], saved.state[theirs]["momentum_buffer"])


def numbered(*names):
    parameters = {name: nn.Parameter(torch.zeros(())) for name in dict.fromkeys(names)}
    pairs = [(name, parameters.pop(name, nn.Parameter(torch.zeros(())))) for name in names]
    optimizer = ice.Optimizer(torch.optim.SGD(pairs, lr=1.0, momentum=0.5))
    for slope, (_, p) in enumerate(pairs, 1):
        p.grad = torch.tensor(float(slope))
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def momenta(optimizer):
    return [(name, optimizer.state[p]["momentum_buffer"].item()) for name, p in optimizer.named_parameters()]


def test_a_model_with_a_module_among_others_keeps_them_apart():
    optimizer = numbered("w", "module.w")
    optimizer.load_state_dict(numbered("module.w", "w").state_dict())

    assert momenta(optimizer) == [("w", 2.0), ("module.w", 1.0)]


def test_names_that_are_given_twice_decide_nothing():
    optimizer = numbered("w", "w", "b")
    report = optimizer.load_state_dict(numbered("w", "w", "b").state_dict())

    assert report.matched == ("w", "w", "b")
    with pytest.raises(StateDictError, match="not all parameters have names of their own"):
        optimizer.load_state_dict(numbered("b", "w", "w").state_dict())


def test_tied_weights_have_one_state():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
            self.out.weight = self.embed.weight

        def forward(self, x):
            return self.out(self.embed(x)).square().mean()

    first, second = Tied(), Tied()
    saved = ice.Optimizer(FACTORIES["AdamW"], first.named_parameters())
    train(first, saved, 0, 2)
    groups = ice.param_groups(second, {"embed|out.weight": {"name": "words"}}, default={})
    optimizer = ice.Optimizer(FACTORIES["AdamW"], groups)

    report = optimizer.load_state_dict(saved.state_dict())

    assert report.matched == ("embed.weight", "out.bias")
    assert torch.equal(optimizer.state[second.out.weight]["exp_avg"], saved.state[first.embed.weight]["exp_avg"])


# -- frozen, unfrozen, other heads --------------------------------------------------------------------------


@every
def test_frozen_parameters_leave_and_the_others_go_on(factory):
    oracle, first, second = Net(), Net(), Net()
    reference, saved = factory(oracle.parameters()), ice.Optimizer(factory, one_group(first))
    plain(oracle, reference, 0, 4)
    oracle.body.requires_grad_(False)
    plain(oracle, reference, 4, 7)
    train(first, saved, 0, 4)
    adopt(second, first)
    second.body.requires_grad_(False)
    optimizer = ice.Optimizer(factory, ice.param_groups(second, default={}, frozen="drop"))

    with pytest.raises(
        StateDictError, match=r"only the state dict has 'body.0.weight', .* and 1 more\. To load what fits"
    ):
        optimizer.load_state_dict(saved.state_dict())
    report = optimizer.load_state_dict(saved.state_dict(), strict=False)
    train(second, optimizer, 4, 7)

    assert same(second, oracle)
    assert report.matched == ("heads.a.weight", "heads.a.bias")
    assert report.dropped == tuple(n for n in names_of(first) if n.startswith("body"))
    assert (report.new, report.kept) == ((), ())
    assert set(optimizer.state_dict()["state"]) == {0, 1}


@every
def test_unfrozen_parameters_start_afresh_and_the_others_go_on(factory):
    oracle, first, second = Net(), Net(), Net()
    reference = factory(oracle.parameters())
    for model in (oracle, first):
        model.body.requires_grad_(False)
    plain(oracle, reference, 0, 4)
    oracle.body.requires_grad_(True)
    plain(oracle, reference, 4, 7)
    saved = ice.Optimizer(factory, ice.param_groups(first, default={}, frozen="drop"))
    train(first, saved, 0, 4)
    adopt(second, first)
    optimizer = ice.Optimizer(factory, one_group(second))

    with pytest.raises(StateDictError, match=r"only the optimizer has 'body.0.weight', .* strict=False\)"):
        optimizer.load_state_dict(saved.state_dict())
    report = optimizer.load_state_dict(saved.state_dict(), strict=False)
    train(second, optimizer, 4, 7)

    assert same(second, oracle)
    assert report.new == tuple(n for n in names_of(first) if n.startswith("body"))
    assert report.matched == ("heads.a.weight", "heads.a.bias")


@every
def test_frozen_and_kept_needs_nothing_and_unfreezing_in_place_works(factory):
    oracle, first, second = Net(), Net(), Net()
    reference, saved = factory(oracle.parameters()), ice.Optimizer(factory, by_rule(first))
    for model, optimizer, run in ((oracle, reference, plain), (first, saved, train)):
        run(model, optimizer, 0, 2)
        model.body.requires_grad_(False)
        run(model, optimizer, 2, 4)
    adopt(second, first)
    optimizer = ice.Optimizer(factory, by_rule(second))
    optimizer.load_state_dict(saved.state_dict())
    oracle.body.requires_grad_(True)
    plain(oracle, reference, 4, 6)
    train(second, optimizer, 4, 6)

    assert same(second, oracle)


@every
def test_torchs_state_goes_by_name_into_other_groups_as_the_error_says(factory):
    oracle, model = Net(), Net()
    reference = factory(oracle.parameters())
    plain(oracle, reference, 0, 2)
    adopt(model, oracle)
    state = copy.deepcopy(reference.state_dict())
    optimizer = ice.Optimizer(factory, by_rule(model))
    with pytest.raises(StateDictError, match=r"the names that it lacks: .*load_state_dict\(plain\.state_dict\(\)\)"):
        optimizer.load_state_dict(state)

    ungrouped = ice.Optimizer(factory, model.named_parameters())
    ungrouped.load_state_dict(state)
    optimizer.load_state_dict(ungrouped.state_dict())
    plain(oracle, reference, 2, 4)
    train(model, optimizer, 2, 4)

    assert same(model, oracle)


@every
def test_an_added_head_starts_afresh(factory):
    first, second, oracle = Net("a"), Net("b", "a"), Net("b", "a")
    saved = ice.Optimizer(factory, first.named_parameters())
    train(first, saved, 0, 4)
    adopt(second, first)
    oracle.load_state_dict(second.state_dict())
    reference = factory([*oracle.body.parameters(), *oracle.heads["a"].parameters(), *oracle.heads["b"].parameters()])
    state = factory(first.parameters()).state_dict()  # torch's own way: positions, and the new ones at the end
    state = {"state": saved.state_dict()["state"], "param_groups": state["param_groups"]}
    state["param_groups"][0]["params"] = list(range(10))
    state["state"].update({i: s for i, s in reference.state_dict()["state"].items() if i >= 8})
    reference.load_state_dict(copy.deepcopy(state))

    optimizer = ice.Optimizer(factory, second.named_parameters())
    report = optimizer.load_state_dict(saved.state_dict(), strict=False)
    train(second, optimizer, 4, 7)
    plain(oracle, reference, 4, 7)

    assert same(second, oracle)
    assert report.new == ("heads.b.weight", "heads.b.bias")
    assert str(report) == "8 matched; 2 new: 'heads.b.weight', 'heads.b.bias'"


@every
def test_a_removed_head_leaves_the_others_going_on(factory):
    first, second, oracle = Net("a", "b"), Net("b"), Net("a", "b")
    reference = factory(oracle.parameters())
    plain(oracle, reference, 0, 4)
    del oracle.heads["a"]
    plain(oracle, reference, 4, 7)
    saved = ice.Optimizer(factory, first.named_parameters())
    train(first, saved, 0, 4)
    adopt(second, first)

    optimizer = ice.Optimizer(factory, second.named_parameters())
    report = optimizer.load_state_dict(saved.state_dict(), strict=False)
    train(second, optimizer, 4, 7)

    assert same(second, oracle)
    assert (report.new, report.dropped) == ((), ("heads.a.weight", "heads.a.bias"))


@every
def test_a_resized_head_is_new_and_its_old_state_dropped(factory):
    first, second, oracle = Net(), Net(width=5), Net(width=5)
    saved = ice.Optimizer(factory, first.named_parameters())
    train(first, saved, 0, 4)
    adopt(second, first)
    oracle.load_state_dict(second.state_dict())
    reference = factory(oracle.parameters())
    state = saved.state_dict()
    own = reference.state_dict()
    own["state"] = {**own["state"], **{i: copy.deepcopy(s) for i, s in state["state"].items() if i < 6}}
    reference.load_state_dict(own)

    optimizer = ice.Optimizer(factory, second.named_parameters())
    with pytest.raises(
        StateDictError, match=r"fit: 'heads.a.weight' had shape \(2, 4\), now \(5, 4\); 'heads.a.bias' had"
    ):
        optimizer.load_state_dict(state)
    report = optimizer.load_state_dict(state, strict=False)
    train(second, optimizer, 4, 7)
    plain(oracle, reference, 4, 7)

    assert same(second, oracle)
    assert report.new == report.dropped == ("heads.a.weight", "heads.a.bias")
    assert len(report.matched) == 6


def test_by_position_too_another_shape_is_refused():
    saved, optimizer = (ice.Optimizer(FACTORIES["SGD"], Net(width=width).parameters()) for width in (2, 5))

    with pytest.raises(StateDictError, match=r"'param_groups.0.params.6' had shape \(2, 4\), now \(5, 4\)"):
        optimizer.load_state_dict(saved.state_dict())
    assert optimizer.load_state_dict(saved.state_dict(), strict=False).new == (
        "param_groups.0.params.6",
        "param_groups.0.params.7",
    )


def test_many_other_shapes_are_counted():
    saved, optimizer = (
        ice.Optimizer(torch.optim.SGD([(f"p{i}", torch.zeros(n, requires_grad=True)) for i in range(9)]))
        for n in (2, 3)
    )

    with pytest.raises(StateDictError, match=r"'p4' had shape \(2,\), now \(3,\); and 4 more have another shape"):
        optimizer.load_state_dict(saved.state_dict())


def test_new_parameters_lose_the_state_they_had():
    first, second = Net("a"), Net("a", "b")
    saved, optimizer = (ice.Optimizer(FACTORIES["AdamW"], m.named_parameters()) for m in (first, second))
    train(first, saved, 0, 1)
    train(second, optimizer, 0, 3)

    optimizer.load_state_dict(saved.state_dict(), strict=False)

    assert second.heads["b"].weight not in optimizer.state
    assert optimizer.state[second.heads["a"].weight]["step"] == 1


class Eager(torch.optim.Optimizer):
    """Makes its state when it is built, and cannot step without, as Adagrad in older torch."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"step": torch.tensor(0.0), "sum": torch.full_like(p, 0.5)}

    @torch.no_grad()
    def step(self):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            self.state[p]["step"] += 1
            self.state[p]["sum"] += p.grad.square()
            p.sub_(0.1 * p.grad / self.state[p]["sum"].sqrt())


def test_a_new_parameter_keeps_the_state_it_was_built_with():
    first, second = Net("a"), Net("b", "a")
    saved = ice.Optimizer(Eager, first.named_parameters())
    train(first, saved, 0, 2)
    optimizer = ice.Optimizer(Eager, second.named_parameters())

    optimizer.load_state_dict(saved.state_dict(), strict=False)

    assert optimizer.state[second.heads["b"].bias]["sum"].tolist() == [0.5, 0.5]
    assert optimizer.state[second.heads["a"].bias]["step"] == 2
    train(second, optimizer, 2, 3)
    assert optimizer.state[second.heads["b"].bias]["step"] == 1


# -- what a load leaves alone -------------------------------------------------------------------------------


@every
@pytest.mark.parametrize(
    "other",
    [
        lambda: Net("a", "b").named_parameters(),
        lambda: Net("b").named_parameters(),
        lambda: Net(width=3).named_parameters(),
        lambda: per_parameter(Net("a", "b")),
        lambda: Net("a", "b").parameters(),
    ],
)
def test_what_is_refused_changes_nothing(factory, other):
    model = Net()
    optimizer = ice.Optimizer(factory, by_rule(model), processors=[ice.schedules.constant(0.5)])
    train(model, optimizer, 0, 3)
    before = flat(optimizer.state_dict())
    state = ice.Optimizer(factory, other()).state_dict()
    state["ice_engine"]["clocks"]["step"] = 99

    with pytest.raises(StateDictError):
        optimizer.load_state_dict(state)

    assert flat(optimizer.state_dict()) == before


@every
def test_training_on_leaves_the_loaded_dict_alone(factory):
    first, second = Net("a"), Net("b", "a")
    saved = ice.Optimizer(factory, first.named_parameters())
    train(first, saved, 0, 3)
    state = saved.state_dict()
    before = flat(state)
    optimizer = ice.Optimizer(factory, per_parameter(second))

    optimizer.load_state_dict(state, strict=False)
    mine = {id(t) for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)}
    train(second, optimizer, 3, 6)

    assert flat(state) == before
    assert not mine & {id(t) for s in state["state"].values() for t in s.values() if isinstance(t, torch.Tensor)}


# -- group entries ------------------------------------------------------------------------------------------


def sgd(groups, **settings):
    return ice.Optimizer(torch.optim.SGD(groups, lr=9.0, momentum=0.5), **settings)


def lrs(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


class Scaled(Net):
    """Has a parameter of shape ()."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return super().forward(x) * self.scale


class Alone(nn.Module):
    """Has nothing else."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return (x * self.scale - 1).square().mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("made", [torch.optim.NAdam, torch.optim.ASGD])
@pytest.mark.parametrize("make", [Net, Scaled, Alone])
def test_what_an_optimizer_counts_keeps_its_precision_whatever_the_parameters_have(make, made, dtype):
    """Which torch casts to their type, so that a run which is resumed comes to something else."""
    model, resumed = make().to(dtype), make().to(dtype)
    optimizer, other = (ice.Optimizer(made(m.named_parameters(), lr=0.05)) for m in (model, resumed))
    data = [batch.to(dtype) for batch in batches(0, 6)]

    def run(net, stepped, some):
        for batch in some:
            stepped.backward(net(batch))
            stepped.update()

    run(model, optimizer, data[:3])
    saved = through_a_file(optimizer.state_dict())
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(saved)

    torch.testing.assert_close(other.state_dict()["state"], saved["state"], rtol=0, atol=0)
    run(model, optimizer, data[3:])
    run(resumed, other, data[3:])
    torch.testing.assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_of_the_same_groups_in_another_order_the_saved_entries_win():
    first, second = Net(), Net()
    saved = sgd(ice.param_groups(first, {"bias": {"lr": 1.0}, "weight": {"lr": 2.0, "weight_decay": 0.5, "mine": 3}}))
    optimizer = sgd(ice.param_groups(second, {"weight": {"lr": 7.0, "name": "w"}, "bias": {"lr": 8.0}}))

    report = optimizer.load_state_dict(saved.state_dict())

    assert lrs(optimizer) == [2.0, 1.0]
    assert optimizer.param_groups[0]["mine"] == 3
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    assert report.kept == ()
    assert all(n.endswith("weight") for n in optimizer.param_groups[0]["param_names"])


def test_of_the_same_groups_names_decide_nothing():
    saved = sgd(ice.param_groups(Net(), {"bias": {"name": "a", "lr": 1.0}, "weight": {"name": "b", "lr": 2.0}}))
    optimizer = sgd(ice.param_groups(Net(), {"weight": {"name": "a"}, "bias": {"name": "b"}}))

    optimizer.load_state_dict(saved.state_dict())

    assert [(group["name"], group["lr"]) for group in optimizer.param_groups] == [("b", 2.0), ("a", 1.0)]


def test_a_start_value_does_not_outlive_the_lr_that_was_replaced():
    saved = sgd(ice.param_groups(Net("a"), default={"lr": 1.0}))
    optimizer = sgd(ice.param_groups(Net("a", "b"), default={"lr": 3.0}))
    torch.optim.lr_scheduler.StepLR(optimizer, 5)
    assert optimizer.param_groups[0]["initial_lr"] == 3.0

    optimizer.load_state_dict(saved.state_dict(), strict=False)

    assert lrs(optimizer) == [1.0]
    assert "initial_lr" not in optimizer.param_groups[0], "as torch does"


def test_regrouped_a_group_goes_on_from_the_one_of_its_name_and_others_keep_their_entries():
    first, second = Net(), Net()
    saved = sgd(ice.param_groups(first, {r"^heads": {"name": "head", "lr": 1.0}}, default={"lr": 2.0}))
    groups = ice.param_groups(
        second,
        {r"^heads.*bias": {"lr": 3.0, "name": "b"}, "^heads": {"name": "head", "lr": 4.0}},
        default={"lr": 5.0, "mine": 1},
    )
    optimizer = sgd(groups)

    report = optimizer.load_state_dict(saved.state_dict())

    assert [(g["name"], g["lr"]) for g in optimizer.param_groups] == [("b", 3.0), ("head", 1.0), ("default", 2.0)]
    assert optimizer.param_groups[2]["mine"] == 1
    assert report.kept == ("b",)
    assert str(report) == "8 matched; kept their own entries: 'b'"


def test_a_group_that_is_all_of_one_saved_group_goes_on_from_it():
    saved = sgd(ice.param_groups(Net("a"), {"^body": {"lr": 1.0}, "^heads": {"lr": 2.0}}))
    optimizer = sgd(
        ice.param_groups(Net("a", "b"), {"^body": {"name": "trunk", "lr": 3.0}, r"heads\.": {"name": "top", "lr": 4.0}})
    )

    report = optimizer.load_state_dict(saved.state_dict(), strict=False)

    assert [(g["name"], g["lr"]) for g in optimizer.param_groups] == [("trunk", 1.0), ("top", 2.0)]
    assert report.kept == ()


def test_halves_of_a_group_and_groups_of_two_keep_their_entries():
    whole = sgd(ice.param_groups(Net(), default={"lr": 1.0, "name": "all"}))
    halves = sgd(ice.param_groups(Net(), {"bias": {"lr": 2.0}}, default={"lr": 3.0}))

    assert halves.load_state_dict(whole.state_dict()).kept == ("bias", "default")
    assert lrs(halves) == [2.0, 3.0]

    halves = sgd(ice.param_groups(Net(), {"bias": {"lr": 2.0}}, default={"lr": 3.0}))
    assert whole.load_state_dict(halves.state_dict()).kept == ("all",)
    assert lrs(whole) == [1.0]

    unnamed = sgd([{"params": list(Net().named_parameters()), "lr": 4.0}])
    assert unnamed.load_state_dict(halves.state_dict()).kept == ("group_0",)


def test_a_name_that_two_groups_have_claims_none():
    pairs = one_group(Net())
    saved = sgd([{"params": pairs[:4], "lr": 1.0, "name": "x"}, {"params": pairs[4:], "lr": 2.0, "name": "x"}])
    optimizer = sgd([{"params": pairs[:6], "lr": 3.0, "name": "x"}, {"params": pairs[6:], "lr": 4.0, "name": "y"}])
    seen = []
    optimizer.register_load_state_dict_post_hook(lambda o: seen.extend(len(g["param_names"]) for g in o.param_groups))

    assert optimizer.load_state_dict(saved.state_dict()).kept == ("x",)
    assert lrs(optimizer) == [3.0, 2.0]
    assert seen == [6, 2], "hooks see the names of this process"


def test_a_group_of_new_parameters_keeps_its_entries():
    saved = sgd(ice.param_groups(Net("a"), default={"lr": 1.0}))
    optimizer = sgd(ice.param_groups(Net("a", "b"), {r"heads\.b": {"name": "b", "lr": 2.0}}, default={"lr": 3.0}))

    report = optimizer.load_state_dict(saved.state_dict(), strict=False)

    assert report.kept == ("b",)
    assert lrs(optimizer) == [2.0, 1.0]


def test_a_schedule_goes_on_in_its_group_and_starts_from_its_own_lr_in_a_new_one():
    settings = {"processors": [ice.schedules.linear(total=10)]}
    first, second = Net("a"), Net("a", "b")
    saved = sgd(ice.param_groups(first, default={"lr": 1.0}), **settings)
    train(first, saved, 0, 4)
    groups = ice.param_groups(second, {r"heads\.b": {"name": "b", "lr": 2.0}}, default={"lr": 3.0})
    optimizer = sgd(groups, **settings, on_change="keep")  # not the 3.0 of this script

    optimizer.load_state_dict(saved.state_dict(), strict=False)
    train(second, optimizer, 4, 5)

    assert [group["initial_lr"] for group in optimizer.param_groups] == [2.0, 1.0]
    assert lrs(optimizer) == pytest.approx([2.0 * 0.6, 1.0 * 0.6])


# -- what is saved ------------------------------------------------------------------------------------------


def test_shapes_are_saved_as_plain_data_and_older_dicts_without_load():
    model = Net()
    optimizer = ice.Optimizer(FACTORIES["AdamW"], by_rule(model))
    train(model, optimizer, 0, 1)
    state = through_a_file(optimizer.state_dict())

    assert state["ice_engine"]["shapes"] == {name: list(p.shape) for name, p in optimizer.named_parameters()}
    assert state["ice_engine"]["version"] == 1
    del state["ice_engine"]["shapes"]
    assert len(optimizer.load_state_dict(state).matched) == 8


@pytest.mark.parametrize("shapes", [3, {"w": 3}, None])
def test_damaged_shapes_are_refused(shapes):
    optimizer = numbered("w")
    state = optimizer.state_dict()
    state["ice_engine"]["shapes"] = shapes

    with pytest.raises(StateDictError, match="'ice_engine' is damaged"):
        optimizer.load_state_dict(state)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_parameter_without_a_shape_has_none_saved():
    optimizer = ice.Optimizer(torch.optim.SGD(nn.LazyLinear(2).named_parameters(), lr=0.1))

    assert optimizer.state_dict()["ice_engine"]["shapes"] == {}


def test_state_of_no_parameter_stays_and_stray_numbers_do_not_reach_one():
    saved = numbered("w", "b", "c")
    state = saved.state_dict()
    state["state"]["mine"] = {"x": 1}
    state["state"][7] = {"momentum_buffer": torch.tensor(99.0)}
    optimizer = ice.Optimizer(torch.optim.SGD([(f"{n}", nn.Parameter(torch.zeros(()))) for n in "cbw"], lr=1.0))

    optimizer.load_state_dict(state)

    assert momenta(optimizer) == [("c", 3.0), ("b", 2.0), ("w", 1.0)]
    assert optimizer.state["mine"] == {"x": 1}
    assert 7 not in optimizer.state


def test_loading_through_ignite_still_works():
    from ignite.handlers import Checkpoint

    first, second = Net(), Net()
    saved = ice.Optimizer(FACTORIES["SGD"], one_group(first))
    train(first, saved, 0, 2)
    optimizer = ice.Optimizer(FACTORIES["SGD"], turned(second))

    Checkpoint.load_objects({"optimizer": optimizer}, {"optimizer": saved.state_dict()})

    assert optimizer.clocks["step"] == 2
    assert torch.equal(
        optimizer.state[second.body[0].weight]["momentum_buffer"], saved.state[first.body[0].weight]["momentum_buffer"]
    )


def test_a_window_that_is_loaded_in_a_handler_of_a_step_goes_on():
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=0.1), accumulation_steps=3)
    trainer = Engine(lambda engine, batch: optimizer.backward(weight * batch))
    optimizer.attach(trainer)
    saved = {}

    @trainer.on(Events.ITERATION_COMPLETED(once=2))
    def save():
        saved.update(copy.deepcopy(optimizer.state_dict()))

    @trainer.on(optimizer.event("STEP_COMPLETED"))
    def roll_back():
        if trainer.state.iteration > 3:
            return
        with torch.no_grad():
            weight.fill_(1.0)
        optimizer.load_state_dict(saved)

    trainer.run([1.0, 2.0, 3.0, 4.0])
    assert optimizer.record.micro_batches == 3
    assert weight.item() == pytest.approx(1.0 - 0.1 * (1.0 + 2.0 + 4.0) / 3)
