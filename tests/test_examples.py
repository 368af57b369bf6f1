"""The examples, run as a user runs them: in a process and a folder of their own."""

import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

DIGITS = Path(__file__).resolve().parents[1] / "examples" / "digits.py"
EPOCH = re.compile(r"^epoch +(\d+) +step +(\d+) ", re.MULTILINE)
ACCURACY = re.compile(r"^held-out accuracy +(\d\.\d+) of 360 digits", re.MULTILINE)


def digits(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(DIGITS), *arguments],
        cwd=folder,
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 10  # no progress bar where nobody watches
    return done.stdout


def epochs(output: str) -> list[tuple[int, int]]:
    return [(int(epoch), int(step)) for epoch, step in EPOCH.findall(output)]


@pytest.fixture(scope="module")
def three_epochs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    return folder, digits(folder, "--epochs", "3")


def test_digits_prints_a_summary(three_epochs):
    folder, output = three_epochs
    assert epochs(output) == [(1, 12), (2, 24), (3, 36)]  # 45 micro-batches: 11 windows of 4, and one of 1
    assert ACCURACY.search(output)
    assert f"tensorboard --logdir {Path('runs/digits/tensorboard')}" in output
    assert len(output.splitlines()) < 15
    assert (folder / "runs/digits/digits.png").read_bytes().startswith(b"\x89PNG")


def test_digits_writes_what_tensorboard_reads(three_epochs):
    folder, _ = three_epochs
    events = EventAccumulator(str(folder / "runs/digits/tensorboard")).Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {
        "training/loss",
        "optimizer/lr/group_0",
        "optimizer/grad_norm",
        "optimizer/loss_scale",
        "optimizer/skipped",
        "validation/accuracy",
        "validation/loss",
    }
    assert [event.step for event in events.Scalars("optimizer/lr/group_0")] == list(range(1, 37))
    assert [event.step for event in events.Scalars("validation/accuracy")] == [12, 24, 36]


def test_digits_resumes_after_the_last_epoch(three_epochs, tmp_path):
    folder = tmp_path / "copy"  # the other tests look at the run of three epochs
    shutil.copytree(three_epochs[0], folder)
    output = digits(folder, "--resume", "--epochs", "4")
    assert "digits_checkpoint_3.pt: epoch 3, step 36" in output
    assert epochs(output) == [(4, 48)]
    again = digits(folder, "--resume", "--epochs", "4")
    assert epochs(again) == []
    assert "this run was complete" in again


def test_interrupted_digits_gives_the_same_numbers(tmp_path):
    whole = digits(tmp_path, "--epochs", "3", "--out", "here")
    (tmp_path / "here/checkpoints/digits_checkpoint_3.pt").unlink()
    resumed = digits(tmp_path, "--epochs", "3", "--out", "here", "--resume")
    assert epochs(resumed) == [(3, 36)]
    assert ACCURACY.search(resumed)[1] == ACCURACY.search(whole)[1]
    last = [line for line in whole.splitlines() if line.startswith("epoch   3")]
    assert [line for line in resumed.splitlines() if line.startswith("epoch")] == last
    events = EventAccumulator(str(tmp_path / "here/tensorboard")).Reload()
    assert [event.step for event in events.Scalars("optimizer/lr/group_0")] == list(range(1, 37))  # none twice


def test_digits_resumes_from_nothing(tmp_path):
    output = digits(tmp_path, "--resume", "--epochs", "1", "--warmup", "4")
    assert "no checkpoint in" in output
    assert epochs(output) == [(1, 12)]


def test_digits_explains_every_option(tmp_path):
    spec = importlib.util.spec_from_file_location("digits", DIGITS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shown = digits(tmp_path, "--help")
    options = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(module.Config)]
    assert [option for option in options if option not in shown] == []


def test_digits_learns(tmp_path):
    output = digits(tmp_path)
    assert float(ACCURACY.search(output)[1]) >= 0.97
