"""The commands, as they are typed: ``python -m ice_engine ...``."""

import csv
import os
import subprocess
import sys

import pytest

from ice_engine.__main__ import main

TRAIN = """
import torch
import ice_engine as ice

weight = torch.nn.Parameter(torch.ones(()))


def sgd():
    return torch.optim.SGD([weight], lr=0.1)


def make():
    return ice.Optimizer(sgd(), accumulation_steps=4, processors=[ice.schedules.cosine(warmup=2)])


optimizer = make()
plan = optimizer.plan(epoch_length=10, max_epochs=3)
by_items = ice.Optimizer(sgd(), effective_batch_size=64)


class Runs:
    second = optimizer.plan(epoch_length=2, max_epochs=2)


@ice.dictprocess
def spike(step):
    return float("inf") if step == 3 else 0.1


spiky = ice.Optimizer(sgd(), processors=[spike(dst="lr")])


def fails():
    return 1 / 0


def asks(config):
    return optimizer


def counts():
    return 3
"""
LENGTHS = ("--epoch-length", "10", "--max-epochs", "3")


@pytest.fixture(autouse=True)
def script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "train_script", raising=False)
    (tmp_path / "train_script.py").write_text(TRAIN)
    yield
    sys.modules.pop("train_script", None)


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    printed = capsys.readouterr()
    assert caught.value.code == 2
    assert printed.out == ""
    assert "Traceback" not in printed.err
    return printed.err


@pytest.mark.parametrize("path", ["train_script:optimizer", "train_script:make"])
def test_plan_prints_the_plan_of_an_optimizer_or_of_what_a_function_returns(capsys, path):
    assert main(["plan", path, *LENGTHS]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(
        "9 steps in 3 epochs of 10 iterations; 4 micro-batches a step, fewer in 3 short windows\n"
    )
    assert "lr/group_0" in printed
    assert "short tail: " in printed


def test_plan_prints_a_plan_with_the_lengths_it_has(capsys):
    assert main(["plan", "train_script:plan"]) == 0
    assert capsys.readouterr().out.startswith("9 steps in 3 epochs")
    assert main(["plan", "train_script:Runs.second"]) == 0
    assert capsys.readouterr().out.startswith("2 steps in 2 epochs")


def test_plan_takes_every_length_that_a_plan_has(capsys):
    options = ("--epoch-length", "10", "--max-iters", "12", "--accumulation-steps", "6")
    assert main(["plan", "train_script:by_items", *options]) == 0
    assert capsys.readouterr().out.startswith("3 steps in 1 epoch of 10 iterations and 2 iterations; 6 micro-batches")


def test_plan_writes_a_table_and_a_picture(capsys, tmp_path):
    assert main(["plan", "train_script:make", *LENGTHS, "--csv", "plan.csv", "--plot", "plan.png"]) == 0
    assert capsys.readouterr().out.endswith("wrote plan.csv\nwrote plan.png\n")
    rows = list(csv.DictReader((tmp_path / "plan.csv").read_text().splitlines()))
    assert [int(row["iteration"]) for row in rows] == [4, 8, 10, 14, 18, 20, 24, 28, 30]
    assert float(rows[1]["lr/group_0"]) == pytest.approx(0.1 * 2 / 3)
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train_script"], ["'train_script' is no module:object", "such as train:optimizer"]),
        (["./runs/train.py:make"], ["'./runs/train.py' is a file", "as import does: runs.train:make"]),
        (["no_such:make"], ["cannot import 'no_such': ModuleNotFoundError: No module named 'no_such'"]),
        (["train_script:optimzer"], ["has no 'optimzer'", "weight, sgd, make, optimizer, plan, by_items, Runs, spike"]),
        (["train_script:Runs"], ["is the class Runs", "wanted is an Optimizer, a Plan, or a function without"]),
        (["train_script:counts"], ["train_script:counts() is of type int", "wanted is an Optimizer, a Plan"]),
        (["train_script:asks"], ["raised TypeError: asks() missing 1 required", "called without arguments"]),
        (["train_script:fails"], ["raised ZeroDivisionError: division by zero", "train_script.py:"]),
        (
            ["train_script:optimizer"],
            ["plan() needs epoch_length and max_epochs", "--epoch-length 100 --max-epochs 20"],
        ),
        (["train_script:optimizer", "--epoch-length", "0"], ["needs max_epochs (or max_iters)"]),
        (["train_script:optimizer", "--epoch-length", "0", "--max-epochs", "1"], ["epoch_length must be at least 1"]),
        (["train_script:by_items", *LENGTHS], ["plan() needs accumulation_steps", "n = 64 / (items of a micro-batch"]),
        (["train_script:plan", "--max-epochs", "3"], ["is a Plan, which has its lengths already", "out --max-epochs"]),
        (["train_script:plan", "--csv", "none/plan.csv"], ["No such file or directory: 'none/plan.csv'"]),
        (["train_script:plan", "--plot", "plan.xyz"], ["--plot plan.xyz: Format 'xyz' is not supported", "png"]),
        (["train_script:spiky", *LENGTHS], ["'lr' of param group 0 ('group_0') would become inf"]),
        ([], ["usage: python -m ice_engine plan", "required: module:object"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and len(value) < 2 else "",
)
def test_what_cannot_be_planned_is_said_with_exit_code_2(capsys, arguments, parts):
    said = refused(capsys, "plan", *arguments)
    for part in parts:
        assert part in said


def test_a_module_that_fails_tells_where(capsys, tmp_path):
    (tmp_path / "broken_script.py").write_text("import sys\n\nsys.exit('give --data')\n")
    assert "cannot import 'broken_script': SystemExit: give --data" in refused(capsys, "plan", "broken_script:make")
    (tmp_path / "broken_script.py").write_text("rate = 1\nrate / 0  # longer than before\n")
    assert "ZeroDivisionError: division by zero (" in refused(capsys, "plan", "broken_script:make")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="3.10 has no notes")
def test_a_processor_that_fails_is_told_with_its_step(capsys):
    assert "\nraised while planning step 4 of 30: " in refused(
        capsys, "plan", "train_script:spiky", "--epoch-length", "30", "--max-epochs", "1"
    )


def test_typed_in_a_terminal_that_knows_only_ascii(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "ice_engine", "plan", "train_script:plan"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("9 steps in 3 epochs")
    assert "?????????" in done.stdout  # blocks
