"""How schedules combine, beyond the products, sequences and limits of the table in tests/test_schedules.py."""

import json
from typing import Any

import pytest
import torch
from ignite.engine import Engine

import ice_engine as ice
from ice_engine.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    MissingKeyError,
    ProcessorValueError,
    UnknownKeyError,
)
from ice_engine.processors.group import run_processors
from ice_engine.processors.schedules import (
    constant,
    cosine,
    exponential,
    from_spec,
    linear,
    polynomial,
    step,  # noqa: F401 - in EXPRESSIONS
    warmup,
)


def at(t: int, **entries: Any) -> dict[str, Any]:
    clocks = {"step": t, "iteration": t + 1, "epoch": t + 1, "total_steps": 40, "epoch_length": 1, "max_epochs": 40}
    return {"initial_lr": 1.0, "lr": -1.0, **clocks, **entries}


def is_late(group: Any) -> bool:
    return bool(group["step"] >= 5)


# -- scale ----------------------------------------------------------------------------------------------------


def test_scale_multiplies_by_a_number_or_by_an_entry_of_the_group() -> None:
    assert linear(total=4).scale(3)(at(1))["lr"] == 3 * 0.75
    assert linear(total=4).scale("mine")(at(1, mine=0.5))["lr"] == 0.5 * 0.75
    assert linear(total=4).scale(torch.tensor(2.0).item())(at(0))["lr"] == 2.0


def test_scale_by_an_entry_that_is_not_there_or_no_number_is_named() -> None:
    with pytest.raises(MissingKeyError, match=r"needs 'mine', which the mapping lacks.*Add it to every param group"):
        linear(total=4).scale("mine")(at(1))
    with pytest.raises(ArgumentTypeError, match="'mine' of the mapping must be a number, got 'x'"):
        linear(total=4).scale("mine")(at(1, mine="x"))


# -- only -----------------------------------------------------------------------------------------------------


def test_only_leaves_other_groups_as_they_are() -> None:
    schedule = constant(0.5).only("head", "neck")

    assert schedule(at(0, group_name="neck"))["lr"] == 0.5
    assert schedule(at(0, group_name="body"))["lr"] == -1.0


def test_only_is_one_as_a_factor() -> None:
    schedule = constant(0.5).only("head") * linear(total=4)

    assert [schedule(at(1, group_name=name))["lr"] for name in ("head", "body")] == [0.375, 0.75]


def test_a_product_of_limited_factors_leaves_the_rest_alone() -> None:
    schedule = constant(0.5).only("head") * constant(3.0).only("neck")

    assert [schedule(at(1, group_name=name))["lr"] for name in ("head", "neck", "body")] == [0.5, 3.0, -1.0]
    assert schedule.only_groups == {"head", "neck"}
    assert (schedule * constant()).only_groups is None
    assert constant().only("head", "neck").only("neck", "body").only_groups == {"neck"}


def test_a_sequence_applies_as_its_part_does() -> None:
    schedule = constant(0.5).only("head").then(constant(0.1), at=2)

    assert [schedule(at(t, group_name="body"))["lr"] for t in (0, 1, 2)] == [-1.0, -1.0, 0.1]


def test_only_a_group_is_also_what_was_split_from_it() -> None:
    schedule = constant(0.5).only("head")

    assert schedule(at(0, group_name="head.depth_0.no_weight_decay"))["lr"] == 0.5
    assert schedule(at(0, group_name="header"))["lr"] == -1.0
    model = torch.nn.ModuleDict({"head": torch.nn.Linear(1, 1), "body": torch.nn.Linear(1, 1)})
    groups = ice.param_groups(model, {"head": {"lr": 1.0}}, default={"lr": 1.0}, no_weight_decay=True)
    optimizer = ice.Optimizer(torch.optim.AdamW(groups), processors=[schedule])
    optimizer.attach(Engine(lambda engine, batch: None))
    row = optimizer.plan(1, 1).rows[0]
    assert [row[f"lr/{group['name']}"] for group in groups] == [0.5, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("limited", [constant(0.5).only("head").scale(0.1), constant(0.5).only("head").clamp(max=0.3)])
def test_what_is_limited_is_one_as_a_factor_whatever_wraps_it(limited: Any) -> None:
    product = limited * constant(1.0)

    assert product(at(0, group_name="body"))["lr"] == 1.0
    assert product(at(0, group_name="head"))["lr"] == limited(at(0, group_name="head"))["lr"]
    rebased = limited.then(constant(), at=1, rebase=True)
    assert rebased(at(1, group_name="body"))["lr"] == 1.0


@pytest.mark.parametrize(
    "processor",
    [
        constant().only("haed") * cosine(),
        ice.Compose(constant().only("haed")),
        constant().only("haed").only("head"),
        constant().then(constant().only("haed"), at=1),
    ],
    ids=repr,
)
def test_a_wrong_name_is_found_however_deep_it_is(processor: Any) -> None:
    optimizer = ice.Optimizer(torch.optim.SGD(groups_of("head", "body"), lr=1.0), processors=[processor])

    with pytest.raises(MissingKeyError, match="a param group 'haed', which there is not"):
        optimizer.attach(Engine(lambda engine, batch: None))


def test_a_schedule_of_a_tuple_or_of_no_number_is_refused_when_made() -> None:
    def make(cls: Any, dst: str, **settings: Any) -> None:
        ice.Optimizer(cls([torch.nn.Parameter(torch.ones(()))], **settings), processors=[linear(dst=dst)])

    with pytest.raises(ProcessorValueError, match=r"'betas' of param group 0 .* has 2 elements; .* dst='betas\.0'"):
        make(torch.optim.AdamW, "betas")
    with pytest.raises(ProcessorValueError, match=r"'amsgrad' of .* is a bool False; a schedule needs a float"):
        make(torch.optim.AdamW, "amsgrad")
    with pytest.raises(ProcessorValueError, match=r"'lr' of .* is a Tensor of torch\.int64; a schedule needs a float"):
        make(torch.optim.SGD, "lr", lr=torch.tensor(1))


@pytest.mark.parametrize("dst", ["betas.5", "betas.x", "beta1"])
def test_an_element_that_is_not_there_is_named_with_those_that_are(dst: str) -> None:
    def write(group: Any) -> Any:
        group[dst] = 0.9
        return group

    parameters = [torch.nn.Parameter(torch.ones(()))]
    message = r"; 'betas' has 2 elements: 'betas\.0', 'betas\.1'$"
    with pytest.raises(MissingKeyError, match=f"{dst!r}.* lacks.*{message}"):
        ice.Optimizer(torch.optim.AdamW(parameters), processors=[linear(dst=dst)])
    with pytest.raises(UnknownKeyError, match=f"{dst!r} is not an entry.*{message}"):
        run_processors([write], torch.optim.AdamW(parameters).param_groups, {})


def test_a_param_group_that_a_schedule_cannot_follow_is_not_added() -> None:
    group = {**groups_of("head")[0], "rate": 1.0}
    optimizer = ice.Optimizer(torch.optim.SGD([group], lr=1.0), processors=[linear(dst="rate")])

    with pytest.raises(MissingKeyError, match="writes 'rate'"):
        optimizer.add_param_group(groups_of("body")[0])
    assert [g["name"] for g in optimizer.param_groups] == ["head"]


def groups_of(*names: str) -> list[dict[str, Any]]:
    return [{"params": [torch.nn.Parameter(torch.ones(2))], "name": name} for name in names]


def test_each_group_follows_its_own_schedule_in_a_run() -> None:
    groups = groups_of("head", "body")
    optimizer = ice.Optimizer(
        torch.optim.SGD(groups, lr=1.0),
        processors=[linear(total=4).only("head"), exponential(gamma=0.5).only("body")],
    )
    trainer = Engine(lambda engine, batch: optimizer.backward(sum(g["params"][0].sum() for g in groups)))
    optimizer.attach(trainer)
    seen = []
    trainer.add_event_handler(
        ice.OptimizerEvents.OPTIMIZER_STEP_COMPLETED, lambda: seen.append([g["lr"] for g in optimizer.param_groups])
    )
    trainer.run(range(3))

    assert seen == [[1.0, 1.0], [0.75, 0.5], [0.5, 0.25]]


def test_a_limited_schedule_asks_nothing_of_other_groups() -> None:
    rate = {"rate": 0.5, **groups_of("head")[0]}
    optimizer = ice.Optimizer(
        torch.optim.SGD([rate, *groups_of("body")], lr=1.0), processors=[linear(dst="rate", total=4).only("head")]
    )

    assert [group.get("initial_rate") for group in optimizer.param_groups] == [0.5, None]


def test_a_name_that_no_group_has_is_refused_when_attached() -> None:
    optimizer = ice.Optimizer(torch.optim.SGD(groups_of("head", "body"), lr=1.0), processors=[constant().only("haed")])

    with pytest.raises(MissingKeyError, match=r"'haed', which there is not; there are: 'head', 'body'; did you mean"):
        optimizer.attach(Engine(lambda engine, batch: None))


# -- when -----------------------------------------------------------------------------------------------------


def test_when_leaves_the_entry_alone_while_it_is_false() -> None:
    schedule = constant(0.5).when(is_late)

    assert [schedule(at(t))["lr"] for t in (4, 5)] == [-1.0, 0.5]
    assert [(schedule * constant(0.5))(at(t))["lr"] for t in (4, 5)] == [0.5, 0.25]


def test_when_sees_what_the_schedule_sees() -> None:
    seen: list[Any] = []
    constant().when(lambda group: seen.append(dict(group)) or True)(at(3, group_name="head"))  # type: ignore[func-returns-value]

    assert seen[0]["group_name"] == "head"
    assert seen[0]["step"] == 3


# -- then, from where the first one ended ---------------------------------------------------------------------


def test_rebase_starts_the_second_from_what_the_first_one_gives_then() -> None:
    schedule = exponential(gamma=0.5).then(linear(total=2), at=2, rebase=True)

    assert [schedule(at(t))["lr"] for t in range(5)] == [1.0, 0.5, 0.25, 0.125, 0.0]


@pytest.mark.parametrize("unit", ["iteration", "epoch"])
def test_rebase_in_other_units(unit: Any) -> None:
    schedule = exponential(gamma=0.5, unit=unit).then(constant(unit=unit), at=3, rebase=True)

    assert [schedule(at(t))["lr"] for t in (2, 3, 9)] == [0.25, 0.125, 0.125]


def test_rebase_nests() -> None:
    inner = exponential(gamma=0.5).then(exponential(gamma=0.1), at=1, rebase=True)
    schedule = constant(8.0).then(inner, at=2, rebase=True)

    assert [schedule(at(t))["lr"] for t in range(5)] == pytest.approx([8, 8, 8, 4, 0.4], rel=1e-12)


# -- as text and as data --------------------------------------------------------------------------------------

EXPRESSIONS = [
    "linear(total=4).scale(3.0)",
    "linear().scale('lr_scale')",
    "constant().only('head', 'neck')",
    "(warmup(steps=5) * cosine()).only('head')",
    "constant(factor=0.5).only('head') * step(step_size=(3, 4)).clamp(min=0.1)",
    "exponential(gamma=0.5).then(linear(total=2), at=2, rebase=True).scale(2.0)",
    "(warmup(steps=5) * polynomial(unit='epoch', dst='lr')).clamp(max=3.0)",
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_it_prints_as_the_expression_that_builds_it(expression: str) -> None:
    schedule = eval(expression)  # noqa: S307 - our own text

    assert repr(schedule) == expression.replace(", dst='lr'", "")


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_its_spec_is_json_and_makes_it_again(expression: str) -> None:
    schedule = eval(expression)  # noqa: S307 - our own text
    spec = json.loads(json.dumps(schedule.spec))

    assert spec == schedule.spec
    assert from_spec(spec) == schedule


def test_a_predicate_prints_by_its_name_and_is_no_data() -> None:
    schedule = warmup(steps=2) * constant().when(is_late)

    assert repr(schedule) == "warmup(steps=2) * constant().when(is_late)"
    with pytest.raises(ArgumentTypeError, match=r"when\(is_late\) holds a function, is_late, which cannot be written"):
        _ = schedule.spec


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("cosine", ArgumentTypeError, "a schedule's spec is a dict such as .*, got 'cosine'"),
        ({}, ArgumentValueError, "has 'schedule' or one of 'product', 'then', 'clamp', 'scale', 'only', got {}"),
        ({"schedule": "cosin"}, ArgumentValueError, "there is no schedule 'cosin'; there are: .*cosine"),
        ({"schedule": "from_spec"}, ArgumentValueError, "there is no schedule 'from_spec'"),
        ({"schedule": "__import__"}, ArgumentValueError, "there is no schedule '__import__'"),
        ({"schedule": "cosine", "totl": 3}, ArgumentTypeError, "cannot be made of .*'totl'"),
        ({"schedule": "cosine", "total": 0}, ArgumentValueError, "must be at least 1, got 0"),
        ({"product": 3}, ArgumentTypeError, "'product' of a schedule's spec cannot be made of 3"),
        ({"then": [{"schedule": "constant"}]}, ArgumentTypeError, "'then' of a schedule's spec cannot be made of"),
        ({"product": [], "dst": "lr"}, ArgumentTypeError, "'product' of a schedule's spec does not take 'dst'"),
        ({"only": {"schedule": "constant"}, "names": "head"}, ArgumentTypeError, "needs a list of names, got 'head'"),
        ({"scale": {"schedule": "constant"}}, ArgumentTypeError, "'scale' of a schedule's spec cannot be made of"),
    ],
)
def test_a_spec_that_is_none_is_explained(spec: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        from_spec(spec)


@pytest.mark.parametrize(
    ("combine", "error", "message"),
    [
        (lambda: cosine().scale(float("nan")), ArgumentValueError, r"scale\(\.\.\.\) must be finite, got nan"),
        (lambda: cosine().scale(None), ArgumentTypeError, r"scale\(\.\.\.\) must be a number, got None"),
        (lambda: cosine().scale(""), ArgumentValueError, r"scale\(\) wants a number or the key of an entry"),
        (lambda: cosine().only(), ArgumentTypeError, r"only\(\) wants names of param groups"),
        (lambda: cosine().only(0), ArgumentTypeError, r"only\(\) wants names of param groups"),
        (lambda: cosine().only(["head"]), ArgumentTypeError, r"only\(\) wants names of param groups"),
        (lambda: cosine().when(True), ArgumentTypeError, r"when\(\) wants a function of the mapping, got True"),
        (lambda: cosine().then(linear(), at=2, rebase=1), ArgumentTypeError, "must be True or False, got 1"),
        (lambda: polynomial().then(linear(), 2), TypeError, "positional"),
    ],
)
def test_impossible_combinations_are_refused_when_combined(combine: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        combine()
