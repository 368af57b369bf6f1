"""Checkpoints where a disk is full, a folder may not be written to, or is gone: the run stops, or goes on, as asked."""

import contextlib
import os
import shutil
import subprocess

import pytest
from ignite.engine import Events

from ice_engine.errors import CheckpointError, IceEngineWarning
from tests.test_checkpoint import Run, assert_equal, names

NOBODY = 65534


@pytest.fixture
def small_disk(tmp_path):
    """A file system of half a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = [shutil.which("mount") or "mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs to mount a file system: {getattr(error, 'stderr', error)}")
    yield folder
    subprocess.run([shutil.which("umount") or "umount", "--lazy", str(folder)], check=True)


def fill(folder):
    with (folder / "other").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    os.truncate(folder / "other", (folder / "other").stat().st_size - 8192)  # a beginning is written


def trouble(folder, make, mend, **settings):
    """Let a run meet with *make* after its second epoch, and with *mend* before its fourth."""
    run = Run(folder, **settings)
    run.trainer.logger.disabled = True
    run.checkpoint.attach(run.trainer)
    run.trainer.add_event_handler(Events.EPOCH_STARTED(once=3), lambda: run.checkpoint.last_checkpoint and make())
    run.trainer.add_event_handler(Events.EPOCH_STARTED(once=4), lambda: run.checkpoint.last_checkpoint and mend())
    return run


def resumed_at(folder, epoch):
    whole = Run(folder.parent / "whole").train(max_epochs=6)
    run = Run(folder)
    run.checkpoint.resume(run.trainer)
    assert run.trainer.state.epoch == epoch
    run.train(max_epochs=6)
    assert_equal(run.everything(), whole.everything())


@pytest.mark.parametrize("background", [True, False])
def test_on_a_full_disk_the_run_stops_with_the_reason_and_the_last_file_loads(small_disk, background):
    run = trouble(small_disk, lambda: fill(small_disk), lambda: None, background=background)
    with pytest.raises(CheckpointError, match=r"checkpoint_15\.pt cannot be written: .* bytes are free there"):
        run.train(max_epochs=6)
    assert names(small_disk) == ["checkpoint_10.pt", "other"]
    resumed_at(small_disk, 2)


@pytest.mark.parametrize("background", [True, False])
def test_or_goes_on_and_saves_when_there_is_room_again(small_disk, background):
    run = trouble(
        small_disk,
        lambda: fill(small_disk),
        lambda: (small_disk / "other").unlink(),
        background=background,
        on_failure="warn",
    )
    with pytest.warns(IceEngineWarning, match=r"checkpoint_15\.pt cannot be written"):
        run.train(max_epochs=5)
    assert names(small_disk) == ["checkpoint_25.pt"]
    resumed_at(small_disk, 5)


@pytest.mark.parametrize("background", [True, False])
def test_without_permission_likewise(tmp_path, background):
    folder, root = tmp_path / "run", os.geteuid()

    def forbid():
        folder.chmod(0o500)
        if not root:
            os.seteuid(NOBODY)

    run = trouble(folder, forbid, lambda: None, background=background)
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint_15\.pt cannot be written: .*Permission denied"):
            run.train(max_epochs=6)
    finally:
        os.seteuid(root)
        folder.chmod(0o700)
    assert names(folder) == ["checkpoint_10.pt"]
    resumed_at(folder, 2)


@pytest.mark.parametrize("background", [True, False])
def test_where_the_folder_is_gone_likewise(tmp_path, background):
    folder = tmp_path / "run"
    run = trouble(folder, lambda: folder.rename(tmp_path / "moved"), lambda: None, background=background)
    with pytest.raises(CheckpointError, match=r"checkpoint_15\.pt cannot be written: .*No such file or directory"):
        run.train(max_epochs=6)
    assert names(tmp_path / "moved") == ["checkpoint_10.pt"]
    resumed_at(tmp_path / "moved", 2)


def test_a_run_whose_folder_is_gone_goes_on_and_saves_when_it_is_back(tmp_path):
    folder = tmp_path / "run"
    run = trouble(folder, lambda: shutil.rmtree(folder), folder.mkdir, on_failure="warn")
    with pytest.warns(IceEngineWarning, match=r"checkpoint_15\.pt cannot be written"):
        run.train(max_epochs=5)
    assert names(folder) == ["checkpoint_25.pt"]
    resumed_at(folder, 5)
