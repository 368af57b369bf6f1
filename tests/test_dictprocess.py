"""``dictprocess``: where parameters come from, where results go, and what is said when they cannot."""

import copy
import pickle
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator, MutableMapping
from functools import partial
from typing import Any

import pytest
from ignite.engine import Engine, Events

from ice_engine.errors import ArgumentTypeError, ArgumentValueError, MissingKeyError, ProcessorReturnError
from ice_engine.processors import Processor, dictprocess


@dictprocess
def scale(value: float, by: float = 0.5) -> float:
    """Multiply a value."""
    return value * by


@dictprocess
def give(result: Any) -> Any:
    return result


Pair = namedtuple("Pair", ["first", "second"])

# -- the original's own asserts -------------------------------------------------------------------------------


@dictprocess
def sub1(x: int, y: int) -> dict[str, int]:
    return {"z": x - y}


@dictprocess
def sub2(x: int, y: int) -> None:
    return


@dictprocess
def sub3(x: int, y: int) -> int:
    return x - y


@dictprocess
def sub4(x: int, y: int) -> dict[str, int]:
    return {"z": x - y, "w": x + y}


@dictprocess
def sub5(x: int, y: int) -> tuple[int, int]:
    return x - y, x + y


def test_every_assert_of_ice_learn_holds() -> None:
    assert sub1(x=2, y=1)({"any": 0}) == {"any": 0, "z": 1}
    assert sub2(x=2, y=1)({"any": 0}) == {"any": 0}
    assert sub3(x=2, y=1)({"any": 0}) == 1
    assert sub1(x=2, y=1, dst="z")({}) == {"z": 1}
    assert sub3(x=2, y=1, dst="z1")({}) == {"z1": 1}
    assert sub4(x=2, y=1, dst="z1")() == {"z1": {"z": 1, "w": 3}}
    assert sub4(x=2, y=1, dst=["w"])() == {"w": 3}
    assert sub5(dst=["z", "w"])({"x": 2, "y": 1}) == {"x": 2, "y": 1, "z": 1, "w": 3}
    assert sub4(dst={"z1": "z", "w1": "w"})({"x": 2, "y": 1}) == {"x": 2, "y": 1, "z1": 1, "w1": 3}
    assert sub1(x=2, y=1, dst="z1")() == {"z1": 1}


# -- where parameters come from -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "mapping", "expected"),
    [
        ({"value": "lr", "by": 2}, {"lr": 3.0, "value": 100.0, "by": 100.0}, 6.0),  # a key, a value; names lose
        ({"by": 2}, {"value": 3.0, "by": 100.0}, 6.0),  # one given, one by name
        ({}, {"value": 3.0, "by": 4.0}, 12.0),  # both by name, before the default
        ({}, {"value": 3.0}, 1.5),  # the default
        ({"value": "text", "by": 2}, {}, "texttext"),  # a string that is no key is itself
        ({"value": "lr", "by": "factor"}, {"lr": 3.0, "factor": 4.0}, 12.0),
    ],
)
def test_parameter_takes_key_then_value_then_own_name_then_default(
    arguments: dict[str, Any], mapping: dict[str, Any], expected: Any
) -> None:
    assert scale(**arguments)(mapping) == expected


def test_none_given_by_keyword_wins_over_the_mapping() -> None:
    assert give(result=None, dst="k")({"result": 5}) == {"result": 5, "k": None}


def test_called_at_once_with_a_mapping_it_runs_with_defaults() -> None:
    assert scale({"value": 4.0}) == 2.0
    mapping: dict[str, Any] = {"x": 2, "y": 1}
    assert sub1(mapping) is mapping
    assert mapping == {"x": 2, "y": 1, "z": 1}


def test_further_keywords_reach_a_function_with_rest() -> None:
    @dictprocess
    def total(x: int, **rest: int) -> int:
        return x + sum(rest.values())

    assert total(a="lr", b=10)({"x": 1, "lr": 5, "unused": 1000}) == 16


def test_parameters_may_be_called_self_or_mapping() -> None:
    @dictprocess
    def join(self: str, mapping: str, function: str) -> str:
        return self + mapping + function

    assert join(self="a", mapping="b", function="c")({}) == "abc"


class Dotted(MutableMapping[str, Any]):
    """Knows "betas.0" without listing it, as an optimizer's view of a group does."""

    def __init__(self) -> None:
        self.betas = [0.9, 0.99]

    def __contains__(self, key: object) -> bool:
        return key in ("betas.0", "betas.1")

    def __getitem__(self, key: str) -> float:
        return self.betas[int(key[-1])]

    def __setitem__(self, key: str, value: float) -> None:
        self.betas[int(key[-1])] = value

    def __delitem__(self, key: str) -> None:
        raise NotImplementedError

    def __iter__(self) -> Iterator[str]:
        return iter(["betas"])

    def __len__(self) -> int:
        return 1


def test_mapping_decides_itself_which_keys_it_has() -> None:
    group = Dotted()

    assert scale(value="betas.0", dst="betas.0")(group) is group
    assert group.betas == [0.45, 0.99]


def test_parameter_that_nothing_gives_is_named_with_the_keys_there_are() -> None:
    with pytest.raises(MissingKeyError, match=r"'scale' needs parameter 'value'.*the mapping has: lr, by\. Write"):
        scale()({"lr": 1.0, "by": 2.0})
    with pytest.raises(KeyError, match="the mapping has: nothing"):
        scale()()


# -- where results go: the whole table ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dst", "result", "expected"),
    [
        (None, {"a": 1, "lr": 2}, {"lr": 2, "a": 1}),
        (None, {}, {"lr": 0}),
        (None, None, {"lr": 0}),
        ("k", {"k": 1, "other": 2}, {"lr": 0, "k": 1}),
        ("k", {"k": None}, {"lr": 0, "k": None}),
        ("k", {"only": 1}, {"lr": 0, "k": 1}),
        ("k", {"a": 1, "b": 2}, {"lr": 0, "k": {"a": 1, "b": 2}}),
        ("k", {}, {"lr": 0, "k": {}}),
        ("k", None, {"lr": 0, "k": None}),
        ("k", 3, {"lr": 0, "k": 3}),
        ("k", [1, 2], {"lr": 0, "k": [1, 2]}),
        (["a", "b"], {"b": 2, "a": 1, "c": 3}, {"lr": 0, "a": 1, "b": 2}),
        (["a", "b"], None, {"lr": 0, "a": None}),
        (["a", "b"], (1, 2), {"lr": 0, "a": 1, "b": 2}),
        (("a", "b"), [1, 2], {"lr": 0, "a": 1, "b": 2}),
        (["a"], [1], {"lr": 0, "a": 1}),
        (["a", "b"], 5, {"lr": 0, "a": 5}),
        (["a", "b"], "xy", {"lr": 0, "a": "xy"}),
        (["a", "b"], Pair(1, 2), {"lr": 0, "a": 1, "b": 2}),
        (Pair("a", "b"), [1, 2], {"lr": 0, "a": 1, "b": 2}),
        ({"to": "from", "lr": "rate"}, {"from": 1, "rate": 2, "c": 3}, {"lr": 2, "to": 1}),
    ],
)
def test_result_goes_where_dst_says_and_the_same_mapping_comes_back(dst: Any, result: Any, expected: Any) -> None:
    mapping: dict[str, Any] = {"lr": 0}

    assert give(result=result, dst=dst)(mapping) is mapping
    assert mapping == expected


@pytest.mark.parametrize("result", [3, 0, "text", [1, 2], (), False])
def test_without_dst_any_other_result_is_handed_back_and_the_mapping_left_alone(result: Any) -> None:
    mapping = {"lr": 0}

    assert give(result=result)(mapping) is result
    assert mapping == {"lr": 0}


@pytest.mark.parametrize(
    ("dst", "result", "error", "message"),
    [
        (["a", "b"], {"a": 1, "c": 3}, MissingKeyError, r"'give' is to write 'b'.*lacks it.*dict has: a, c\."),
        (["a", "b"], [1], ProcessorReturnError, r"returned 1 values, and dst=\['a', 'b'\] names 2"),
        (["a", "b"], (), ProcessorReturnError, r"returned 0 values, and dst=\['a', 'b'\] names 2"),
        (["a", "b"], [1, 2, 3], ProcessorReturnError, r"returned 3 values, and dst=\['a', 'b'\] names 2"),
        ({"a": "x"}, {"y": 1}, MissingKeyError, r"'give' is to write 'x'.*lacks it.*dict has: y\."),
        ({"a": "x"}, None, ProcessorReturnError, r"returned None \(NoneType\).*must return a dict"),
        ({"a": "x"}, 3, ProcessorReturnError, r"returned 3 \(int\).*must return a dict"),
        ({"a": "x"}, [1], TypeError, r"returned \[1\] \(list\).*must return a dict"),
    ],
)
def test_result_that_does_not_fit_dst_is_an_error_and_nothing_is_written(
    dst: Any, result: Any, error: type[Exception], message: str
) -> None:
    mapping = {"lr": 0}

    with pytest.raises(error, match=message):
        give(result=result, dst=dst)(mapping)
    assert mapping == {"lr": 0}


def test_function_may_change_and_return_the_mapping_it_runs_on() -> None:
    @dictprocess
    def halve(x: dict[str, Any]) -> dict[str, Any]:
        x["lr"] /= 2
        return x

    class Group(dict[str, Any]):
        def __setitem__(self, key: str, value: Any) -> None:
            assert key == "lr"
            super().__setitem__(key, value)

    group = Group(lr=1.0, params=[])
    group.update(x=group)
    assert halve()(group) is group
    assert group["lr"] == 0.5


def test_left_out_mapping_is_a_new_dict_each_time() -> None:
    first = give(result=1, dst="a")()
    second = give(result=2, dst="b")()

    assert (first, second) == ({"a": 1}, {"b": 2})


# -- errors when decorated or configured ----------------------------------------------------------------------


def _star(*values: int) -> None: ...
def _positional(x: int, /) -> None: ...
def _destination(dst: str) -> None: ...


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_star, r"cannot pass '\*values: int' of '_star' by name"),
        (_positional, "cannot pass 'x: int' of '_positional' by name"),
        (_destination, "cannot pass 'dst: str' of '_destination' by name"),
        (min, "cannot see the parameters of <built-in function min>"),
        (3, "decorates a function, got 3"),
        (partial(_star), r"decorates a function, got functools\.partial"),
        (scale, "decorates a function, got scale"),
    ],
)
def test_function_that_cannot_be_called_by_names_is_refused_when_decorated(function: Any, message: str) -> None:
    with pytest.raises(ArgumentTypeError, match=message):
        dictprocess(function)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"vale": 1}, ArgumentTypeError, "has no parameter 'vale'; it has: value, by. Did you mean 'value'"),
        ({"zzz": 1}, ArgumentTypeError, "has no parameter 'zzz'; it has: value, by$"),
        ({"dst": 3}, ArgumentTypeError, r"dst of processor 'scale' is 3 \(int\); it must be a key"),
        ({"dst": {"a"}}, ArgumentTypeError, r"\(set\); it must be a key"),
        ({"dst": []}, ArgumentValueError, r"dst of processor 'scale' is empty \(\[\]\)"),
        ({"dst": {}}, ArgumentValueError, "is empty"),
        ({"dst": ""}, ArgumentValueError, "is empty"),
        ({"dst": ["a", 1]}, ArgumentTypeError, r"has 1 \(int\) for a key"),
        ({"dst": {1: "a"}}, ArgumentTypeError, r"has 1 \(int\) for a key"),
        ({"dst": {"a": None}}, ArgumentTypeError, r"has None \(NoneType\) for a key"),
    ],
)
def test_impossible_settings_are_refused_when_configured(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        scale(**arguments)


def test_keywords_beside_a_mapping_are_refused() -> None:
    with pytest.raises(ArgumentTypeError, match=r"got both. Write scale\(\.\.\.\)\(mapping\)"):
        scale({"value": 1.0}, by=2)  # type: ignore[call-overload]
    with pytest.raises(ArgumentTypeError, match="got both"):
        scale({"value": 1.0}, dst="k")  # type: ignore[call-overload]


@pytest.mark.parametrize("processor", [scale(dst="lr"), scale])
def test_handed_to_ignite_as_a_handler_it_names_the_right_way(processor: Callable[..., Any]) -> None:
    trainer = Engine(lambda engine, batch: None)
    trainer.add_event_handler(Events.STARTED, processor)

    with pytest.raises(ArgumentTypeError, match=r"called with an Engine instead.*optimizer\.hooks\.add\(event, pr"):
        trainer.run([0])


@pytest.mark.parametrize("wrong", [None, 0.5, [("lr", 1)]])
def test_what_is_not_a_mapping_is_refused(wrong: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=f"'scale' was called with a {type(wrong).__name__} instead"):
        scale(dst="lr")(wrong)
    with pytest.raises(ArgumentTypeError, match=f"'scale' was called with a {type(wrong).__name__} instead"):
        scale(wrong)


# -- errors of the function itself ----------------------------------------------------------------------------


class OddError(Exception):
    """Cannot be made again from its message."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(first, second)


def test_error_of_the_function_passes_through_untouched() -> None:
    error = OddError(1, 2)

    @dictprocess
    def fail(x: int) -> None:
        raise error

    with pytest.raises(OddError) as caught:
        fail(x=1)({})
    assert caught.value is error
    assert caught.value.args == (1, 2)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="3.10 has no notes")
def test_error_of_the_function_notes_the_processor_and_its_arguments() -> None:
    with pytest.raises(TypeError) as caught:
        scale(value="l_r", by="factor", dst="lr")({"lr": 1.0, "factor": 2.5})
    (note,) = caught.value.__notes__
    assert note == (
        "raised by processor scale(value='l_r', by='factor', dst='lr'), called with: value='l_r', by=2.5; "
        "no keys of the mapping, so passed as strings: 'l_r'"
    )


@pytest.mark.skipif(sys.version_info < (3, 11), reason="3.10 has no notes")
def test_note_is_short_when_every_string_was_a_key() -> None:
    @dictprocess
    def fail() -> None:
        raise OSError

    with pytest.raises(OSError) as caught:  # noqa: PT011 - the note is what counts
        fail()({})
    assert caught.value.__notes__ == ["raised by processor fail(), called with: nothing"]


# -- what it is -----------------------------------------------------------------------------------------------


def test_maker_and_made_are_processors_with_the_functions_name() -> None:
    assert isinstance(scale, Processor)
    assert isinstance(scale(), Processor)
    assert (scale.name, scale().name) == ("scale", "scale")
    assert scale.__doc__ == "Multiply a value."


@pytest.mark.parametrize(
    ("dst", "writes"),
    [(None, ()), ("lr", ("lr",)), (["a", "b"], ("a", "b")), (("a",), ("a",)), ({"to": "from"}, ("to",))],
)
def test_it_knows_what_it_writes(dst: Any, writes: tuple[str, ...]) -> None:
    assert scale(dst=dst).writes == writes
    assert scale.writes == ()


@pytest.mark.parametrize(
    "expression",
    ["scale", "scale()", "scale(by=0.5, dst='lr')", "scale(dst=['lr'])", "scale(value='x', dst=('a', 'b'))"],
)
def test_repr_is_the_expression_that_builds_it(expression: str) -> None:
    assert repr(eval(expression)) == expression  # noqa: S307 - our own text


@pytest.mark.parametrize("processor", [scale(value="lr", by=3.0, dst="lr"), scale(dst={"a": "b"}), scale])
@pytest.mark.parametrize("clone", [lambda p: pickle.loads(pickle.dumps(p)), copy.deepcopy, copy.copy])  # noqa: S301
def test_copies_do_the_same(processor: Processor, clone: Callable[[Processor], Processor]) -> None:
    assert repr(clone(processor)) == repr(processor)
    mapping = {"lr": 2.0, "value": 7.0}
    if not isinstance(getattr(processor, "dst", None), dict):
        assert clone(processor)(dict(mapping)) == processor(dict(mapping))


def test_maker_copies_and_pickles_as_itself() -> None:
    assert pickle.loads(pickle.dumps(scale)) is scale  # noqa: S301
    assert copy.deepcopy(scale) is scale


def test_changing_a_list_afterwards_changes_no_processor() -> None:
    dst = ["a"]
    processor = give(result={"a": 1, "b": 2}, dst=dst)
    dst.append("b")

    assert processor() == {"a": 1}


def test_makers_can_stand_in_a_list_of_processors() -> None:
    mapping: MutableMapping[str, Any] = {"x": 3, "y": 1}
    for processor in [sub1, scale(value="z", by=10, dst="z")]:
        mapping = processor(mapping)
    assert mapping == {"x": 3, "y": 1, "z": 20}
