"""Schedules bound to param groups once: the values are those of the whole way through a mapping."""

import pytest
import torch

import ice_engine as ice
from ice_engine.processors.binding import Binding
from ice_engine.processors.group import run_processors, set_initial_values, take_back

S = ice.schedules
SCHEDULES = {
    "cosine": S.cosine(total=40, warmup=5),
    "whole run": S.linear(),
    "product": S.constant(0.5) * S.cosine(total=30),
    "then": S.constant().then(S.linear(total=10), at=12),
    "rebased": S.linear(total=20, end=0.5).then(S.cosine(total=10), at=12, rebase=True),
    "clamped": S.exponential(gamma=0.9).clamp(min=0.03, max=0.08),
    "scaled": S.polynomial(total=40).scale(0.25),
    "scaled by the group": S.polynomial(total=40).scale("lr_scale"),
    "in one group": S.cosine(total=40).only("head"),
    "sometimes": S.constant(0.5).when(lambda group: group["step"] % 3 == 0),
    "by epoch": S.step(step_size=2, gamma=0.5, unit="epoch"),
    "by depth": S.layer_decay(0.9) * S.cosine(total=40),
    "for epochs": S.warmup(epochs=1.5, unit="iteration") * S.linear(total=40),
    "of one's own": S.function(lambda t: 1 / (t + 1)) * S.multiplicative(lambda t: t / (t + 1)),
    "weight decay": S.linear(total=40, dst="weight_decay"),
    "an element": S.linear(total=40, end=2.0, dst="betas.1").clamp(max=0.9999),
}


def groups():
    return [
        {"name": "body", "lr": 0.1, "weight_decay": 0.3, "betas": (0.9, 0.99), "lr_scale": 0.5, "depth": 2},
        {"name": "head", "lr": 0.1, "weight_decay": 0.0, "betas": (0.9, 0.99), "lr_scale": 1.0, "depth": 0},
        {"name": "tail", "lr": 0.02, "weight_decay": 0.3, "betas": (0.8, 0.95), "lr_scale": 2, "depth": 0.5},
    ]


def context(step):
    lengths = {"total_steps": 40, "epoch_length": 20, "max_epochs": 4}
    return {"step": step, "iteration": 2 * step + 1, "epoch": step // 10 + 1, **lengths}


def whole_way(processors, at):
    found = groups()
    set_initial_values(processors, found)
    for step in at:
        run_processors(processors, found, context(step))
    return found


def bound(processors, at):
    found = groups()
    binding = Binding(processors, found)
    simple = []
    for step in at:
        simple.append(binding.run(context(step)) is not None)
        if not simple[-1]:
            run_processors(processors, found, context(step))
    return found, simple


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_values_are_those_of_the_whole_way(schedule):
    for step in range(45):
        assert bound([schedule], [step])[0] == whole_way([schedule], [step])


def test_several_write_in_their_order():
    processors = [SCHEDULES["cosine"], SCHEDULES["weight decay"], SCHEDULES["clamped"]]

    assert bound(processors, range(40)) == (whole_way(processors, range(40)), [True] * 40)


def test_what_needs_a_mapping_of_the_group_goes_the_whole_way():
    ways = {name: bound([schedule], [3, 13])[1] for name, schedule in SCHEDULES.items()}

    assert {name for name, simple in ways.items() if simple != [True, True]} == {
        "in one group",
        "sometimes",
        "an element",
    }


def test_what_follows_from_the_clock_is_computed_once_for_all_groups():
    asked = []
    found = [{"lr": 0.1 * (1 + i)} for i in range(100)]
    binding = Binding([S.function(lambda t: asked.append(t) or 0.5)], found)
    for step in range(3):
        binding.run(context(step))

    assert asked == [0, 1, 2]
    assert [group["lr"] for group in found] == [0.1 * (1 + i) * 0.5 for i in range(100)]


def test_a_schedule_reads_what_the_one_before_it_has_just_written():
    processors = [S.linear(total=40, dst="lr_scale"), S.constant().scale("lr_scale"), SCHEDULES["scaled by the group"]]

    # An int becomes a float in the first step.
    assert bound(processors, range(9)) == (whole_way(processors, range(9)), [False] + [True] * 8)


@pytest.mark.parametrize("own", [{"depth": torch.tensor(1.0)}, {"depth": True}, {"depth": float("inf")}, {}])
def test_an_entry_that_is_no_number_goes_the_whole_way(own):
    found = groups()
    del found[1]["depth"]
    found[1].update(own)
    before = [dict(group) for group in found]
    binding = Binding([SCHEDULES["by depth"]], found)

    assert binding.run(context(3)) is None
    assert [{key: group[key] for key in old} for group, old in zip(found, before, strict=True)] == before


def test_what_was_written_twice_is_taken_back_to_what_it_was_first():
    found = groups()
    binding = Binding([SCHEDULES["cosine"], SCHEDULES["clamped"]], found)
    before = [dict(group) for group in found]
    written = binding.run(context(3))
    assert found != before

    take_back(written)

    assert found == before


def test_nothing_is_left_written_where_a_function_of_the_users_raises():
    found = groups()
    binding = Binding([SCHEDULES["cosine"], S.function(lambda t: {}[t], dst="weight_decay")], found)
    before = [dict(group) for group in found]

    with pytest.raises(KeyError):
        binding.run(context(3))
    assert found == before


@pytest.mark.parametrize("broken", [{"lr": torch.tensor(0.1)}, {"initial_lr": 1}, {"initial_lr": -1.0}])
def test_nothing_is_written_where_the_whole_way_is_needed(broken):
    found = groups()
    binding = Binding([SCHEDULES["weight decay"], SCHEDULES["cosine"]], found)
    found[1].update(broken)
    before = [dict(group) for group in found]

    assert binding.run(context(3)) is None
    assert found == before


def test_processors_and_groups_that_came_later_are_not_bound():
    processors, found = [SCHEDULES["cosine"]], groups()
    binding = Binding(processors, found)

    assert binding.holds(processors, found)
    assert not binding.holds([*processors], found)
    assert not binding.holds(processors, found[:2])
    assert not binding.holds(processors, [*found[:2], dict(found[2])])


def test_a_group_that_is_added_in_a_run_is_scheduled_from_the_next_step_on():
    weights = [torch.nn.Parameter(torch.ones(())) for _ in range(2)]
    optimizer = ice.Optimizer(torch.optim.SGD(weights[:1], lr=0.1), processors=[S.linear(total=4)])
    for step in range(3):
        optimizer.backward(weights[0] * 2.0)
        optimizer.update()
        if step == 0:
            optimizer.add_param_group({"params": weights[1:], "lr": 0.4})

    assert optimizer.record.values == {"group_0": {"lr": 0.05}, "group_1": {"lr": 0.2}}


def test_a_group_that_is_renamed_in_a_run_has_its_new_name_from_the_next_step_on():
    weights = [torch.nn.Parameter(torch.ones(())) for _ in range(2)]
    groups = [{"params": weights[:1], "name": "body"}, {"params": weights[1:], "name": "new", "momentum": 0.5}]
    # It has no initial momentum while the schedule is none of its own.
    halved = S.constant(0.5, dst="momentum").only("head")
    optimizer = ice.Optimizer(torch.optim.SGD(groups, lr=0.1), processors=[halved])
    for name in ("new", "head"):
        optimizer.param_groups[1]["name"] = name
        optimizer.backward(sum(weights))
        optimizer.update()

    assert optimizer.record.values == {"body": {"lr": 0.1, "momentum": 0.0}, "head": {"lr": 0.1, "momentum": 0.25}}
