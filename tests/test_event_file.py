"""Files of TensorBoard's that we write ourselves, checked by TensorBoard's own code."""

import math

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.tensorflow_stub import pywrap_tensorflow

from ice_engine.crc32c import masked_crc32c
from ice_engine.event_file import EventFile
from ice_engine.histograms import histogram


@pytest.mark.parametrize(
    "length", [0, 1, 2, 3, 4, 5, 7, 8, 9, 100, 1023, 1024, 1025, 1026, 1027, 1028, 2047, 2048, 2049, 2051, 5000]
)
def test_checksums_are_tensorboards(length):
    data = np.random.default_rng(length).bytes(length)
    assert masked_crc32c([data]) == [pywrap_tensorflow.masked_crc32c(data)]


def test_checksums_of_many_records_are_in_their_order():
    random = np.random.default_rng(0)
    records = [random.bytes(length) for length in random.choice([0, 2, 300, 301, 1500], 5000)]
    assert masked_crc32c(records) == [pywrap_tensorflow.masked_crc32c(record) for record in records]


def test_the_reader_finds_every_event_as_it_was_written(tmp_path):
    file = EventFile(tmp_path / "new" / "folder")
    for step in range(300):
        file.scalars({f"a/{i}": step + i / 2 for i in range(step % 50)}, step, 100.0 + step)
    file.sync()
    (path,) = (tmp_path / "new" / "folder").iterdir()
    head, *events = EventFileLoader(str(path)).Load()
    assert head.file_version == "brain.Event:2"
    assert [(event.step, event.wall_time, len(event.summary.value)) for event in events] == [
        (step, 100.0 + step, step % 50) for step in range(300)
    ]
    file.close()


def test_values_without_a_number_are_kept(tmp_path):
    file = EventFile(tmp_path)
    file.scalars({"nan": math.nan, "inf": math.inf, "large": 1e300}, 1, 0.0)
    file.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert math.isnan(events.Scalars("nan")[0].value)
    assert events.Scalars("inf")[0].value == math.inf
    assert events.Scalars("large")[0].value == math.inf  # TensorBoard's numbers have 32 bits


def test_files_of_one_folder_are_read_in_the_order_they_were_made(tmp_path):
    for i in range(20):
        file = EventFile(tmp_path)
        file.scalars({"a": i}, i, 0.0)
        file.close()
    assert [event.value for event in EventAccumulator(str(tmp_path)).Reload().Scalars("a")] == list(range(20))


# -- histograms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensor",
    [
        torch.linspace(-3, 5, 1001),
        torch.randn(40, 50),
        torch.ones(7),
        torch.arange(10),
        torch.randn(5, dtype=torch.bfloat16),
        torch.randn(3, 3, requires_grad=True),
    ],
    ids=["linspace", "matrix", "constant", "whole numbers", "bfloat16", "parameter"],
)
def test_a_histogram_counts_every_value_once_and_where_it_is(tensor):
    found = histogram(tensor)
    values = tensor.detach().double().flatten()
    assert found.number == sum(found.counts) == len(values)
    assert (found.smallest, found.largest) == (values.min(), values.max())
    assert found.total == pytest.approx(float(values.sum()), abs=1e-6)
    assert found.squares == pytest.approx(float(values.square().sum()))
    assert list(found.limits) == sorted(found.limits)
    width = found.limits[1] - found.limits[0]
    for limit in found.limits[8::8]:
        below = sum(n for end, n in zip(found.limits, found.counts, strict=True) if end <= limit)
        assert (values < limit - width / 100).sum() <= below <= (values <= limit + width / 100).sum()


def test_what_is_not_finite_is_left_out_and_nothing_has_no_histogram():
    found = histogram(torch.tensor([1.0, math.nan, 3.0, math.inf]))
    assert (found.number, found.smallest, found.largest) == (2, 1.0, 3.0)
    for nothing in (None, torch.tensor([math.nan]), torch.empty(0)):
        assert histogram(nothing) is None


def test_of_sparse_and_complex_tensors_it_is_of_what_they_hold():
    sparse = torch.eye(40)[:2].to_sparse()
    assert histogram(sparse).number == 2
    assert histogram(torch.tensor([1 + 2j])).largest == 2.0
