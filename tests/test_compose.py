"""``Compose`` and ``Collect``."""

import copy
import pickle
from collections.abc import Callable, MutableMapping
from typing import Any

import pytest
import torch

import ice_engine as ice
from ice_engine.errors import ArgumentTypeError, MissingKeyError, ProcessorReturnError, ProcessorValueError
from ice_engine.processors import Collect, Compose, Processor, dictprocess, schedules


@dictprocess
def add(x: int, y: int) -> int:
    return x + y


@dictprocess
def power(x: Any, n: int) -> Any:
    return x**n


def plain(mapping: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return {**mapping, "plain": True}


def forgetful(mapping: dict[str, Any]) -> None:
    mapping["seen"] = True


class Halve(Processor):
    def __call__(self, mapping: Any, /) -> Any:
        mapping["lr"] /= 2
        return mapping


PIPELINE = (add(x="a", y="b", dst="c"), power(x="c", n=2, dst="c"))


@pytest.mark.parametrize("compose", [Compose(*PIPELINE), Compose(list(PIPELINE)), Compose(PIPELINE)])
def test_processors_run_in_order_given_one_by_one_or_as_a_list(compose: Compose) -> None:
    mapping: dict[str, Any] = {"a": 1, "b": 2}

    assert compose(mapping) is mapping
    assert mapping == {"a": 1, "b": 2, "c": 9}


def test_each_gets_what_the_one_before_returned() -> None:
    mapping = {"a": 1, "b": 2, "z": 0}
    result = Compose(plain, Collect("a", "b", "plain"), PIPELINE[0])(mapping)

    assert result == {"a": 1, "b": 2, "plain": True, "c": 3}
    assert mapping == {"a": 1, "b": 2, "z": 0}


def test_composes_nest() -> None:
    assert Compose(Compose(*PIPELINE), Compose([Compose(plain)]))({"a": 1, "b": 1}) == {
        "a": 1,
        "b": 1,
        "c": 4,
        "plain": True,
    }


def test_left_out_mapping_is_a_new_dict_each_time() -> None:
    compose = Compose(add(x=1, y=2, dst="c"))

    assert compose() == {"c": 3}
    assert compose() is not compose()


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (forgetful, r"processor 1 of Compose, forgetful, returned None \(NoneType\)"),
        (add(x=1, y=1), r"processor 1 of Compose, add\(x=1, y=1\), returned 2 \(int\).*its dst="),
    ],
)
@pytest.mark.parametrize("last", [True, False])
def test_one_that_returns_no_mapping_is_named(processor: Any, message: str, last: bool) -> None:
    with pytest.raises(ProcessorReturnError, match=message):
        Compose(plain, processor, *(() if last else (plain,)))({})


@pytest.mark.parametrize("wrong", [(3,), (None,), (plain, "lr"), ([plain], plain), ([[plain]],)])
def test_what_cannot_be_called_is_refused_when_composed(wrong: tuple[Any, ...]) -> None:
    with pytest.raises(ArgumentTypeError, match=r"processor \d of Compose is .*which cannot be called"):
        Compose(*wrong)


def test_compose_knows_what_its_processors_write() -> None:
    assert Compose(plain, *PIPELINE, schedules.constant(dst="lr")).writes == ("c", "lr")


def test_collect_keeps_just_these_keys_in_a_new_dict() -> None:
    mapping = {"a": 1, "b": 2, "c": 3}

    assert list(Collect("c", "a")(mapping).items()) == [("c", 3), ("a", 1)]
    assert mapping == {"a": 1, "b": 2, "c": 3}


def test_collect_names_a_missing_key_and_those_there_are() -> None:
    with pytest.raises(MissingKeyError, match="'Collect' needs 'lr', which the mapping lacks; it has: a, b"):
        Collect("a", "lr")({"a": 1, "b": 2})


@pytest.mark.parametrize("wrong", [["a", "b"], 1, None])
def test_collect_takes_strings_only(wrong: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=r"keys one by one, as Collect\('lr', 'step'\)"):
        Collect("a", wrong)


@pytest.mark.parametrize("processor", [Compose(plain), Collect("a"), Compose()])
@pytest.mark.parametrize("wrong", [None, 3])
def test_what_is_not_a_mapping_is_refused(processor: Processor, wrong: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=f"'{type(processor).__name__}' was called with an? .* instead of a"):
        processor(wrong)


@pytest.mark.parametrize(
    "expression",
    [
        "Compose()",
        "Compose(add(x='a', y='b', dst='c'), plain, add)",
        "Compose(Compose(plain), Collect('a', 'b'))",
        "Collect()",
        "Collect('lr', 'step')",
    ],
)
@pytest.mark.parametrize("clone", [lambda p: p, lambda p: pickle.loads(pickle.dumps(p)), copy.deepcopy])  # noqa: S301
def test_repr_is_the_expression_that_builds_it_and_copies_keep_it(
    expression: str, clone: Callable[[Processor], Processor]
) -> None:
    assert repr(clone(eval(expression))) == expression  # noqa: S307 - our own text


def test_a_processor_of_ones_own_has_its_class_for_a_name() -> None:
    halve = Halve()

    assert (halve.name, halve.writes) == ("Halve", ())
    assert Compose(halve, halve)({"lr": 1.0}) == {"lr": 0.25}


def test_a_processor_without_a_call_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Processor()  # type: ignore[abstract]


def test_what_is_only_passed_on_inside_is_not_written():
    pipeline = Compose(Collect("a", "b"), add(x="a", y="b", dst="part"), add(x="part", y=1, dst="a"), Collect("a"))

    assert pipeline.writes == ("a",)
    assert Compose(add(x="a", y=1, dst="a"), Collect("b"), add(x="b", y=1, dst="c"), Collect("b")).writes == ("a",)
    assert Compose(add(x="a", y=1, dst="a"), Collect("a"), add(x="a", y=1, dst="c")).writes == ("a", "c")
    assert pipeline({"a": 1, "b": 2}) == {"a": 4}


WRAPPED = pytest.mark.parametrize(
    "wrapped", [lambda schedule: schedule, Compose, lambda schedule: Compose(halve_lr, Compose(schedule))]
)


def halve_lr(mapping: dict[str, Any]) -> dict[str, Any]:
    mapping["lr"] /= 2
    return mapping


@WRAPPED
def test_a_schedule_of_one_group_needs_no_entry_in_the_others_in_a_compose_either(wrapped: Callable[..., Any]) -> None:
    weights = [torch.nn.Parameter(torch.ones(())) for _ in range(2)]
    groups = [{"params": [weights[0]], "name": "head", "temperature": 1.0}, {"params": [weights[1]], "name": "body"}]
    schedule = schedules.linear(total=4, dst="temperature").only("head")
    optimizer = ice.Optimizer(torch.optim.SGD(groups, lr=0.1), processors=[wrapped(schedule)])
    for _ in range(2):
        optimizer.backward(weights[0] + weights[1])
        optimizer.update()
    assert [group.get("temperature") for group in optimizer.param_groups] == [0.75, None]


@WRAPPED
def test_a_schedule_of_no_number_is_refused_before_the_run_in_a_compose_too(
    wrapped: Callable[..., Any],
) -> None:
    inner = torch.optim.Adam([torch.nn.Parameter(torch.ones(()))])
    with pytest.raises(
        ProcessorValueError, match=r"'betas' of .* has 2 elements; schedule one, such as dst='betas\.0'"
    ):
        ice.Optimizer(inner, processors=[wrapped(schedules.linear(dst="betas"))])
