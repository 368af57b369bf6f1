"""Nested batches: found, replaced, compared, and cut along the samples."""

import collections
import math
import types

import pytest
import torch

from ice_engine.batches import cut, difference, replaced, rows, samples, tensors


def test_every_tensor_is_found_with_the_expression_that_leads_to_it():
    y = {"a": [torch.zeros(2)], "b": (torch.ones(2), "text", None)}
    found = dict(tensors(y, "y"))
    assert list(found) == ["y['a'][0]", "y['b'][0]"]
    assert all(eval(path, {"y": y}) is tensor for path, tensor in found.items())  # noqa: S307 - what it is for


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict, collections.UserDict])
def test_mappings_keep_their_type_and_the_original_its_tensors(kind):
    batch = kind(a=torch.arange(4), b="text")
    part = cut(batch, 1, 3, 4)
    assert type(part) is kind
    assert part["a"].tolist() == [1, 2]
    assert part["b"] == "text"
    assert batch["a"].tolist() == [0, 1, 2, 3]


def test_a_mapping_that_cannot_be_written_becomes_a_dict():
    part = cut(types.MappingProxyType({"a": torch.arange(4)}), 0, 2, 4)
    assert part["a"].tolist() == [0, 1]


def test_lists_of_strings_are_cut_if_there_is_one_for_each_sample():
    assert cut([list("abcd"), list("xy"), 3], 1, 3, 4) == [["b", "c"], ["x", "y"], 3]


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ([[1], [2, 3], [], [4]], [[2, 3], []]),
        ((1, 2, 3, 4), (2, 3)),
        ([{"id": 1}, {"id": 2}, {"id": 3}, {"id": 4}], [{"id": 2}, {"id": 3}]),
        ([(1, 2), (3, 4)], [(1, 2), (3, 4)]),
        ([list("abcd"), [1, 2, 3, 4], list("abcd"), (0, 0, 0, 0)], [["b", "c"], [2, 3], ["b", "c"], (0, 0)]),
        ("abcd", "abcd"),
        ({"lengths": [4, 3, 2, 1]}, {"lengths": [3, 2]}),
    ],
)
def test_lists_are_cut_if_they_have_an_entry_for_each_sample(value, part):
    assert cut(value, 1, 3, 4) == part


def test_arrays_are_cut_like_tensors():
    numpy = pytest.importorskip("numpy")
    ids, shared = numpy.arange(4), numpy.arange(3)
    part = cut([ids, shared, [numpy.zeros(1), numpy.zeros(2), numpy.zeros(3), numpy.zeros(5)]], 1, 3, 4)
    assert part[0].tolist() == [1, 2]
    assert part[1] is shared
    assert [len(each) for each in part[2]] == [2, 3]


def test_lists_of_tensors_are_looked_into_whatever_their_length():
    part = cut([torch.arange(2), torch.arange(2)], 0, 1, 2)
    assert [each.tolist() for each in part] == [[0], [0]]


def test_tensors_without_dimensions_are_shared_by_all_samples():
    assert samples({"a": torch.zeros(5, 2), "t": torch.tensor(1.0)}, None) == 5
    assert replaced(cut(torch.tensor(1.0), 0, 2, 5), lambda t, _: t + 1) == 2.0


WHOLE = torch.arange(12)


@pytest.mark.parametrize(
    ("whole", "shape", "expected"),
    [
        (WHOLE.view(4, 3), (2, 3), [WHOLE.view(4, 3)[1:3]]),
        (WHOLE.view(3, 4), (3, 2), [WHOLE.view(3, 4)[:, 1:3]]),  # time first
        (WHOLE, (6,), [WHOLE[3:9], WHOLE.view(3, 4)[:, 1:3].flatten()]),  # samples times heads, in either order
        (WHOLE[:4, None] * WHOLE[:4], (2, 2), [(WHOLE[:4, None] * WHOLE[:4])[1:3, 1:3]]),  # all pairs
        (WHOLE, (12,), [WHOLE]),  # the same for every batch
        (WHOLE, (5,), []),
        (WHOLE.view(4, 3), (6,), []),
    ],
)
def test_rows_of_a_big_batch_that_a_micro_batch_corresponds_to(whole, shape, expected):
    found = rows(whole, torch.Size(shape), 1, 3, 4)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, 4.0], [1.0, 3.0], 0.25),
        ([math.nan, 1.0], [math.nan, 1.0], 0.0),
        ([-math.inf, 2.0], [-math.inf, 1.0], 0.5),
        ([math.inf, 1.0], [1.0, 1.0], math.inf),
        ([math.nan], [math.inf], math.inf),
    ],
)
def test_differences_are_relative_to_the_largest_entry(a, b, expected):
    assert difference(torch.tensor(a), torch.tensor(b)) == expected


def test_whole_numbers_are_equal_or_not():
    assert difference(torch.tensor([1, 2]), torch.tensor([1, 2])) == 0.0
    assert difference(torch.tensor([True]), torch.tensor([False])) == math.inf
