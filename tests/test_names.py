"""What names tell, where param groups and state dicts do not show it."""

import pytest

from ice_engine.names import bare_name, depths, few, likely, unwrapped


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("module.w", "w"),
        ("_orig_mod.module.w", "w"),
        ("module._orig_mod.w", "w"),
        ("a._orig_mod.w", "a.w"),
        ("a.module.w", "a.module.w"),
        ("module.module.w", "module.w"),
    ],
)
def test_one_wrapper_of_a_kind_is_taken_off(name, expected):
    assert bare_name(name) == expected
    assert unwrapped([name, name]) == [expected, expected]


def test_a_module_among_others_is_no_wrapper():
    assert unwrapped(["module.w", "head._orig_mod.w"]) == ["module.w", "head.w"]


def test_errors_list_few_names():
    assert few("abc") == "'a', 'b', 'c'"
    assert few("abcdefg") == "'a', 'b', 'c', 'd', 'e' and 2 more"
    assert few("abcd", most=1) == "'a' and 3 more"


@pytest.mark.parametrize("pattern", [r"^backbon\.", r"^backbone2\.", r"bakbone\.\d+", "backbone.0.wieght"])
def test_a_typo_is_told_the_name(pattern):
    assert likely(pattern, ["head.weight", "backbone.0.weight"]) == "did you mean 'backbone.0.weight'?"


def test_depths_follow_the_numbers_not_their_gaps():
    names = ["embed", "b.3.w", "b.3.v", "b.10.w", "head"]

    assert depths(names, r"b\.(\d+)") == {"embed": 3, "b.3.w": 2, "b.3.v": 2, "b.10.w": 1, "head": 0}
