"""Checkpoints under attack: content that somebody made, folders that others meddle with, clocks that go backwards."""

import math
import os
import shutil
import time

import numpy as np
import pytest
import torch
from ignite.engine import Events

from ice_engine import checkpoint_file
from ice_engine.errors import ArgumentTypeError, ArgumentValueError, CheckpointError
from tests.test_checkpoint import Run, assert_equal, names


def attached(folder, **settings):
    run = Run(folder, **settings)
    run.checkpoint.attach(run.trainer)
    return run


def rewritten(folder, change):
    """Train into *folder*, and let *change* have the content of its file, whose digest is right afterwards."""
    run = Run(folder, include_self=True)
    run.checkpoint.attach(run.trainer, Events.ITERATION_COMPLETED(once=3))
    run.train(1)
    (name,) = names(folder)
    content = checkpoint_file.read(folder / name)
    change(content)
    checkpoint_file.write(folder / name, content)


def resume(run):
    return run.checkpoint.resume(run.trainer)


@pytest.mark.parametrize("listed", ["../precious.txt", "{}/precious.txt", "checkpoint_3.pt/../../precious.txt"])
def test_what_a_file_says_was_saved_removes_nothing_but_checkpoints_of_the_folder(tmp_path, listed):
    victim = tmp_path / "precious.txt"
    victim.write_text("data")
    rewritten(
        tmp_path / "run", lambda content: content["checkpointer"]["_saved"].insert(0, (1, listed.format(tmp_path)))
    )
    run = attached(tmp_path / "run", include_self=True)
    resume(run)
    run.train(2)
    assert victim.read_text() == "data"
    assert names(tmp_path / "run") == ["checkpoint_10.pt"]


@pytest.mark.parametrize("listed", [3, {}, {"_saved": 3}, {"_saved": [3]}, {"_saved": [("1", "checkpoint_3.pt")]}])
def test_a_list_of_what_was_saved_that_is_none_is_refused_and_nothing_is_loaded(tmp_path, listed):
    rewritten(tmp_path, lambda content: content.update(checkpointer=listed))
    run = Run(tmp_path, include_self=True)
    before = run.everything()
    with pytest.raises(CheckpointError, match=r"checkpoint_3\.pt cannot be loaded: its list of files saved is damaged"):
        resume(run)
    assert_equal(run.everything(), before)


def position(**entries):
    return lambda content: content["ice_engine"]["positions"][0].update(entries)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(ice_engine=3),
        lambda content: content["ice_engine"].update(positions=[]),
        lambda content: content["ice_engine"].update(positions=[None]),
        lambda content: content["ice_engine"].update(positions=[{}]),
        position(epoch="2"),
        position(in_epoch=2),
        position(began=None),
        position(began=10**9),  # no run would ever get there
        position(began=-1),
        position(data=3),
        position(random=None),
        position(places=2),  # of one rank
        position(places="1"),
        position(metrics=3),
    ],
)
def test_a_position_that_is_none_is_refused_and_nothing_is_loaded(tmp_path, change):
    rewritten(tmp_path, change)
    run = Run(tmp_path, include_self=True)
    before = run.everything()
    with pytest.raises(CheckpointError, match=r"checkpoint_3\.pt cannot be loaded: its place in the run is damaged"):
        resume(run)
    assert_equal(run.everything(), before)


@pytest.mark.parametrize("content", [[1, 2], 3, "text", torch.ones(3)])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    checkpoint_file.write(tmp_path / "checkpoint_3.pt", content)
    with pytest.raises(CheckpointError, match=f"it holds {type(content).__name__}, wanted is a dict"):
        resume(Run(tmp_path))


def test_a_digest_of_a_part_of_the_file_is_none(tmp_path):
    attached(tmp_path).train(1)
    file = tmp_path / "checkpoint_5.pt"
    raw = file.read_bytes()
    begin = raw.rindex(b'{"ice_engine"')
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    comment = f'{{"ice_engine": 1, "size": 0, "sha256": "{empty}"}}'.encode()
    file.write_bytes(raw[: begin - 2] + len(comment).to_bytes(2, "little") + comment)
    assert "size" in checkpoint_file.damage(file)


def dangles(path):
    path.symlink_to(path.parent / "nowhere")


def loops(path):
    path.symlink_to(path)


@pytest.mark.parametrize("meddle", [dangles, loops, os.mkfifo, os.mkdir])
def test_what_is_named_as_a_checkpoint_and_is_none_is_passed_over(tmp_path, meddle, caplog):
    attached(tmp_path).train(1)
    meddle(tmp_path / "checkpoint_99.pt")
    assert resume(Run(tmp_path)) == tmp_path / "checkpoint_5.pt"
    assert "checkpoint_99.pt is damaged" in caplog.text


def test_a_link_to_a_checkpoint_is_loaded_and_replaced_but_what_it_leads_to_stays(tmp_path):
    attached(tmp_path / "archive").train(1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint_5.pt").symlink_to(tmp_path / "archive" / "checkpoint_5.pt")
    run = attached(tmp_path / "run")
    assert resume(run) == tmp_path / "run" / "checkpoint_5.pt"
    run.train(2)
    assert names(tmp_path / "run") == ["checkpoint_10.pt"]
    assert checkpoint_file.damage(tmp_path / "archive" / "checkpoint_5.pt") is None


def test_a_clock_that_goes_backwards_does_not_make_an_older_file_the_newest(tmp_path):
    run = attached(tmp_path, n_saved=None)
    tomorrow = time.time() + 86400

    def set_clock_back():
        os.utime(run.checkpoint.last_checkpoint, (tomorrow, tomorrow))

    run.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=7), set_clock_back)
    run.train(3)
    again = Run(tmp_path, n_saved=None)
    assert resume(again) == tmp_path / "checkpoint_15.pt"
    assert again.trainer.state.iteration == 15


def test_an_old_file_that_cannot_be_removed_is_named_and_the_run_goes_on(tmp_path, caplog):
    run = attached(tmp_path)

    def meddle():
        file = run.checkpoint.last_checkpoint
        file.unlink()
        file.mkdir()  # which no unlink() removes, not even root's

    run.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=7), meddle)
    run.train(3)
    assert caplog.text.count("checkpoint_5.pt stays, as it cannot be removed: ") == 1
    assert names(tmp_path) == ["checkpoint_15.pt", "checkpoint_5.pt"]


def test_a_folder_that_became_a_file_is_no_fresh_start(tmp_path):
    run = Run(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        resume(run)


@pytest.mark.parametrize("folder", ["dangling", "file/run"])
def test_a_folder_that_cannot_be_made_says_why(tmp_path, folder):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=f"{folder} cannot be made: "):
        Run(tmp_path / folder)


def test_names_may_hold_whatever_a_file_system_takes(tmp_path):
    folder, prefix = tmp_path / "à l'été ☃ {0} %s [a-z]*\udcff", "é ☃ +("
    attached(folder, filename_prefix=prefix).train(1)
    assert names(folder) == ["é ☃ +(_checkpoint_5.pt"]
    for given in (folder, str(folder)):
        assert resume(Run(given, filename_prefix=prefix)) == folder / "é ☃ +(_checkpoint_5.pt"


@pytest.mark.parametrize(
    ("n_saved", "error", "match"),
    [
        (0, ArgumentValueError, "n_saved must be at least 1, got 0"),
        ("2", ArgumentTypeError, "n_saved must be an int, got '2'"),
        (2.5, ArgumentTypeError, "n_saved must be an int, got 2.5"),
        (True, ArgumentTypeError, "n_saved must be an int, got True"),
    ],
)
def test_a_number_of_files_that_is_none_is_refused(tmp_path, n_saved, error, match):
    with pytest.raises(error, match=match):
        Run(tmp_path, n_saved=n_saved)


@pytest.mark.parametrize("score", [np.float32(1.5), np.float64(1.5), torch.tensor(1.5)])
def test_a_score_is_any_number_as_ignite_has_it(tmp_path, score):
    run = attached(tmp_path, score_function=lambda _: score, score_name="f1")
    run.train(1)
    assert names(tmp_path) == ["checkpoint_f1=1.5000.pt"]


@pytest.mark.parametrize("score", [np.int64(3), 3])
def test_a_whole_score_is_named_whole(tmp_path, score):
    attached(tmp_path, score_function=lambda _: score).train(1)
    assert names(tmp_path) == ["checkpoint_3.pt"]


def test_a_score_that_is_no_number_yet_is_the_worst_and_not_kept_for_a_better_one(tmp_path):
    scores = iter([1.0, math.nan, 0.5, 2.0])
    attached(tmp_path, score_function=lambda _: next(scores), score_name="f1", n_saved=2).train(4)
    assert names(tmp_path) == ["checkpoint_f1=1.0000.pt", "checkpoint_f1=2.0000.pt"]


def test_a_score_that_is_no_number_is_the_worst_in_a_resumed_run_too(tmp_path):
    attached(tmp_path, score_function=lambda _: math.nan, score_name="f1", n_saved=1).train(1)
    assert names(tmp_path) == ["checkpoint_f1=nan.pt"]
    run = attached(tmp_path, score_function=lambda _: -5.0, score_name="f1", n_saved=1)
    resume(run)
    run.train(2)
    assert names(tmp_path) == ["checkpoint_f1=-5.0000.pt"]
