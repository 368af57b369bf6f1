"""Runs as JSON lines: real runs, real files, pandas."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from fractions import Fraction

import pandas as pd
import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers.checkpoint import CheckpointEvents

import ice_engine as ice
from ice_engine.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    AttachError,
    IceEngineWarning,
    LedgerError,
    WriteError,
)
from ice_engine.ledger import read
from tests.single_weight import parts
from tests.unsized import Unsized


def test_a_step_is_a_line_with_its_clocks_and_rows(tmp_path):
    engine, optimizer = parts(accumulation_steps=2, clip=ice.clip_norm(1.0))
    path = tmp_path / "new" / "ledger.jsonl"
    ledger = ice.Ledger(path)
    assert ledger.attach(engine, optimizer) is ledger
    before = time.time()
    engine.run([1.0, 3.0, 2.0])
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    measured = {key: first.pop(key) for key in list(first) if "time" in key or "memory" in key or "second" in key}
    assert first == {
        "source": "optimizer",
        "step": 1,
        "attempt": 1,
        "iteration": 2,
        "epoch": 1,
        "micro_batches": 2,
        "training/loss": 3.0,
        "optimizer/lr/group_0": 0.5,
        "optimizer/grad_norm": 2.0,
        "optimizer/clipped_norm": pytest.approx(1.0),
        "optimizer/weight": 2.0,
        "optimizer/skipped": 0,
    }
    assert before <= measured["time"] <= time.time()
    assert {"optimizer/time/data", "optimizer/time/compute", "optimizer/time/step", "memory/host"} < measured.keys()
    assert (second["step"], second["iteration"], second["micro_batches"]) == (2, 3, 1)


def test_pandas_reads_it_in_one_line(tmp_path):
    engine, optimizer = parts(output=lambda batch: {"loss": batch if batch < 3 else math.nan, "size": math.inf})
    ice.Ledger(tmp_path / "ledger.jsonl").attach(engine, optimizer)
    engine.run([1.0, 2.0, 3.0])
    table = pd.read_json(tmp_path / "ledger.jsonl", lines=True)
    assert list(table["step"]) == [1, 2, 3]
    assert list(table["optimizer/grad_norm"]) == [1.0, 2.0, 3.0]
    assert table["training/loss"].dtype == float
    assert list(table["training/loss"][:2]) == [1.0, 2.0]
    assert math.isnan(table["training/loss"][2])
    assert list(table["training/size"]) == [math.inf] * 3


def test_what_is_not_finite_is_valid_json_and_read_back_as_it_was(tmp_path):
    path = tmp_path / "ledger.jsonl"
    engine, optimizer = parts(output=lambda batch: {"a": math.nan, "b": math.inf, "c": -math.inf})
    ice.Ledger(path).attach(engine, optimizer)
    engine.run([1.0])

    def refuse(constant):
        raise AssertionError(constant)

    json.loads(path.read_text(), parse_constant=refuse)
    (row,) = read(path)
    assert math.isnan(row["training/a"])
    assert (row["training/b"], row["training/c"]) == (math.inf, -math.inf)


def test_what_no_float_can_hold_is_infinite_and_stops_nothing(tmp_path):
    engine, optimizer = parts(output=lambda batch: {"a": 10**400, "b": -(10**400), "c": Fraction(10**400)})
    ice.Ledger(tmp_path / "ledger.jsonl").attach(engine, optimizer)
    engine.run([1.0])
    (row,) = read(tmp_path / "ledger.jsonl")
    assert [row[f"training/{key}"] for key in "abc"] == [math.inf, -math.inf, math.inf]


def test_a_skipped_step_is_a_line_that_says_why(tmp_path):
    engine, optimizer = parts(nonfinite="skip")
    ice.Ledger(tmp_path / "ledger.jsonl").attach(engine, optimizer, every=2)
    engine.run([1.0, math.inf, 2.0])
    skipped, step = read(tmp_path / "ledger.jsonl")
    assert (skipped["step"], skipped["attempt"], skipped["optimizer/skipped"]) == (1, 2, 1)
    assert "param_groups.0.params.0" in skipped["optimizer/skip"]
    assert "training/loss" not in skipped
    assert (step["step"], step["attempt"], step["training/loss"]) == (2, 3, 2.0)


def test_an_evaluation_is_a_line_too(tmp_path):
    engine, optimizer = parts()
    evaluator = Engine(lambda engine, batch: None)

    @evaluator.on(Events.COMPLETED)
    def measure(evaluator):
        evaluator.state.metrics = {"accuracy": torch.tensor(0.5), "recall": [0.25, 0.5], "confusion": torch.ones(2, 2)}

    ice.Ledger(tmp_path / "ledger.jsonl").attach(engine, optimizer, evaluators={"validation": evaluator})
    evaluator.run([0])  # before training, when no file is open yet
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run([0]))
    engine.run([1.0] * 2, max_epochs=2)
    evaluator.run([0])  # and after it
    engine.run([1.0] * 2, max_epochs=3)
    found = [(row["source"], row["step"]) for row in read(tmp_path / "ledger.jsonl")]
    assert found == [
        ("validation", 0),
        ("optimizer", 1),
        ("optimizer", 2),
        ("validation", 2),
        ("optimizer", 3),
        ("optimizer", 4),
        ("validation", 4),
        ("validation", 4),
        ("optimizer", 5),
        ("optimizer", 6),
        ("validation", 6),
    ]
    metrics = read(tmp_path / "ledger.jsonl")[0]
    metrics.pop("time")
    assert metrics == {
        "source": "validation",
        "step": 0,
        "iteration": 0,
        "evaluation": 1,
        "validation/accuracy": 0.5,
        "validation/recall.0": 0.25,
        "validation/recall.1": 0.5,
    }


def test_two_optimizers_have_a_line_each_and_the_first_has_the_output(tmp_path):
    weights = [torch.nn.Parameter(torch.ones(())) for _ in range(2)]
    first, second = (
        ice.Optimizer(torch.optim.SGD([weight], lr=0.5), name=name)
        for weight, name in zip(weights, ("generator", "critic"), strict=True)
    )

    def train_step(engine, batch):
        first.backward(weights[0] * batch)
        second.backward(weights[1] * batch)
        return batch

    engine = Engine(train_step)
    ice.Ledger(tmp_path / "ledger.jsonl").attach(engine, first.attach(engine), second.attach(engine))
    engine.run([1.0])
    one, other = read(tmp_path / "ledger.jsonl")
    assert (one["source"], one["training/loss"], one["generator/lr/group_0"]) == ("generator", 1.0, 0.5)
    assert (other["source"], other["critic/lr/group_0"]) == ("critic", 0.5)
    assert not any(key.startswith(("training/", "memory/", "generator/")) for key in other)


# -- resumed, fresh, torn -------------------------------------------------------------------------------------------


def resumed(path, states, batches, **run):
    engine, optimizer = parts()
    optimizer.load_state_dict(states["optimizer"])
    engine.load_state_dict(states["trainer"])
    ice.Ledger(path).attach(engine, optimizer)
    engine.run(batches, **run)


def interrupted(path, batches, at):
    """A run to its end, and its state after step *at*."""
    engine, optimizer = parts()
    ice.Ledger(path).attach(engine, optimizer)
    states = {}
    engine.add_event_handler(
        Events.ITERATION_COMPLETED(once=at),
        lambda: states.update(optimizer=optimizer.state_dict(), trainer=dict(engine.state_dict())),
    )
    engine.run(batches)
    return states


@pytest.mark.parametrize("tail", ["", '{"time":1.5,"source":"opti', "{"])
def test_a_resumed_run_goes_on_where_its_checkpoint_was(tmp_path, tail):
    path = tmp_path / "ledger.jsonl"
    states = interrupted(path, [1.0, 2.0, 3.0, 4.0, 5.0], at=3)
    with path.open("a") as file:
        file.write(tail)
    assert [row["step"] for row in read(path)] == [1, 2, 3, 4, 5]
    resumed(path, states, [40.0, 50.0, 60.0, 70.0, 80.0])  # the two iterations that are left
    assert [(row["step"], row["training/loss"]) for row in read(path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 40.0),
        (5, 50.0),
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["ledger.jsonl"]


def test_a_run_resumed_inside_of_its_first_window_goes_on_in_its_file(tmp_path):
    def evaluating():
        engine, optimizer = parts(accumulation_steps=3)
        evaluator = Engine(lambda engine, batch: None)
        ice.Ledger(path).attach(engine, optimizer, evaluators={"validation": evaluator})
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: evaluator.run([0]))
        return engine, ice.Checkpoint({"trainer": engine, "optimizer": optimizer}, tmp_path / "saved")

    path = tmp_path / "ledger.jsonl"
    engine, checkpoint = evaluating()
    checkpoint.attach(engine, Events.ITERATION_COMPLETED(once=2))
    engine.run([1.0] * 4)
    whole = [(row["source"], row["iteration"]) for row in read(path)]
    engine, checkpoint = evaluating()
    with pytest.warns(IceEngineWarning, match="not the parameters it trains"):
        checkpoint.resume(engine)
    engine.run([1.0] * 4)
    assert [(row["source"], row["iteration"]) for row in read(path)] == whole
    assert not list(tmp_path.glob("ledger.*.jsonl"))


@pytest.mark.parametrize("event", [Events.EPOCH_COMPLETED, Events.ITERATION_COMPLETED | Events.EPOCH_COMPLETED])
def test_an_evaluation_after_the_checkpoint_of_its_iteration_is_one_line(tmp_path, event):
    def evaluating(folder):
        engine, optimizer = parts()
        evaluator = Engine(lambda engine, batch: None)
        ice.Ledger(folder / "ledger.jsonl").attach(engine, optimizer, evaluators={"validation": evaluator})
        engine.add_event_handler(event, lambda: evaluator.run([0]))
        return engine, ice.Checkpoint({"trainer": engine, "optimizer": optimizer}, folder / "saved")

    def stop():
        raise KeyboardInterrupt

    whole, _ = evaluating(tmp_path / "whole")
    whole.run(Unsized([1.0] * 3), max_epochs=2)
    first, checkpoint = evaluating(tmp_path)
    checkpoint.attach(first, Events.ITERATION_COMPLETED)
    first.add_event_handler(Events.EPOCH_COMPLETED, stop)
    with pytest.raises(KeyboardInterrupt):
        first.run(Unsized([1.0] * 3), max_epochs=2)
    second, checkpoint = evaluating(tmp_path)
    with pytest.warns(IceEngineWarning, match="not the parameters it trains"):
        assert checkpoint.resume(second).name == "checkpoint_3.pt"  # nobody knows yet that the epoch is at its end
    second.run(Unsized([1.0] * 3), max_epochs=2)
    expected, found = (
        [(row["source"], row["iteration"], row.get("evaluation")) for row in read(folder / "ledger.jsonl")]
        for folder in (tmp_path / "whole", tmp_path)
    )
    assert found == expected


def test_a_run_that_is_made_longer_goes_on_in_its_file(tmp_path):
    path = tmp_path / "ledger.jsonl"
    engine, optimizer = parts()
    ice.Ledger(path).attach(engine, optimizer)
    engine.run([1.0, 2.0], max_epochs=1)
    engine.run([1.0, 2.0], max_epochs=2)
    assert [row["step"] for row in read(path)] == [1, 2, 3, 4]


def test_a_run_that_raised_has_written_everything_when_the_exception_is_caught(tmp_path):
    def output(batch):
        if batch == 4.0:
            message = "the data are bad"
            raise ValueError(message)
        return batch

    engine, optimizer = parts(output)
    ice.Ledger(tmp_path / "a.jsonl").attach(engine, optimizer)
    with pytest.raises(ValueError, match="the data are bad"):
        engine.run([1.0, 2.0, 3.0, 4.0, 5.0])
    # At once: whoever resumes in this process goes on in the same file.
    assert [line["step"] for line in read(tmp_path / "a.jsonl")] == [1, 2, 3]


def test_a_fresh_run_keeps_the_ledger_of_the_one_before(tmp_path):
    path = tmp_path / "ledger.jsonl"
    for losses in ([1.0], [2.0, 2.0], [3.0]):
        engine, optimizer = parts()
        ice.Ledger(path).attach(engine, optimizer)
        engine.run(losses)
    engine.run([4.0])  # fresh again, in the same process
    kept = {file.name: [row["training/loss"] for row in read(file)] for file in tmp_path.iterdir()}
    assert kept == {
        "ledger.jsonl": [4.0],
        "ledger.1.jsonl": [1.0],
        "ledger.2.jsonl": [2.0, 2.0],
        "ledger.3.jsonl": [3.0],
    }


def test_a_line_that_is_torn_is_left_out_and_a_damaged_one_is_an_error(tmp_path):
    path = tmp_path / "ledger.jsonl"
    interrupted(path, [1.0, 2.0], at=1)
    whole = path.read_bytes()
    for cut in (1, 10, len(whole) // 4):
        path.write_bytes(whole[:-cut])
        assert [row["step"] for row in read(path)] == [1]
    path.write_bytes(b"" + whole[:30] + b"\n" + whole)
    with pytest.raises(LedgerError, match=r"line 1 of .*ledger\.jsonl is no line of a ledger: .*what ice\.Ledger wri"):
        read(path)


def test_an_empty_file_is_an_empty_ledger(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.touch()
    assert read(path) == []
    engine, optimizer = parts()
    ice.Ledger(path).attach(engine, optimizer)
    engine.run([1.0])
    assert [row["step"] for row in read(path)] == [1]


@pytest.mark.parametrize("content", ["my notes", "my notes\n", '{"a": 1}\n', "[1]\n", "\n"])
def test_a_file_that_is_no_ledger_is_not_touched(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_text(content)
    engine, optimizer = parts()
    ice.Ledger(path).attach(engine, optimizer)
    with pytest.raises(LedgerError, match=r"notes\.txt.* is no (line of a )?ledger"):
        engine.run([1.0])
    assert path.read_text() == content
    assert optimizer.clocks["step"] == 0


def test_a_killed_process_leaves_whole_lines_and_the_next_one_goes_on(tmp_path):
    program = """
        import sys, time, torch
        from ignite.engine import Engine, Events
        import ice_engine as ice

        weight = torch.nn.Parameter(torch.ones(()))
        optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=0.5))

        def train_step(engine, batch):
            optimizer.backward(weight * batch)
            time.sleep(0.001)
            return batch

        engine = Engine(train_step)
        optimizer.attach(engine)
        ice.Ledger(sys.argv[1]).attach(engine, optimizer)
        checkpoint = ice.Checkpoint({"trainer": engine, "optimizer": optimizer}, sys.argv[2])
        checkpoint.attach(engine, Events.EPOCH_COMPLETED)
        resumed = checkpoint.resume(engine) is not None
        engine.run([1.0] * 100, max_epochs=1000 if not resumed else engine.state.epoch + 1)
    """
    path = tmp_path / "ledger.jsonl"
    command = [sys.executable, "-c", textwrap.dedent(program), str(path), str(tmp_path / "checkpoints")]
    with subprocess.Popen(command) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and (not path.exists() or path.read_bytes().count(b"\n") < 150):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    steps = [row["step"] for row in read(path)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 150
    subprocess.run(command, check=True, timeout=60)
    again = [row["step"] for row in read(path)]
    assert again == list(range(1, len(again) + 1))
    assert len(again) % 100 == 0


# -- bad input ------------------------------------------------------------------------------------------------------


def test_a_path_that_is_none_is_refused(tmp_path):
    with pytest.raises(ArgumentTypeError, match=r"path must be a file's path such as 'runs/ledger.jsonl', got int"):
        ice.Ledger(3)
    with pytest.raises(ArgumentValueError, match=r"path must be a file such as '.*/ledger\.jsonl', got the folder"):
        ice.Ledger(tmp_path)


def test_a_second_one_on_the_same_engine_is_refused(tmp_path):
    engine, optimizer = parts()
    ice.Ledger(tmp_path / "a.jsonl").attach(engine, optimizer)
    with pytest.raises(AttachError, match="this engine has a Ledger already"):
        ice.Ledger(tmp_path / "b.jsonl").attach(engine, optimizer)


def test_a_folder_that_cannot_be_made_stops_the_run_before_its_first_step(tmp_path):
    (tmp_path / "file").touch()
    engine, optimizer = parts()
    ice.Ledger(tmp_path / "file" / "ledger.jsonl").attach(engine, optimizer)
    with pytest.raises(WriteError, match=r"the ledger .*ledger\.jsonl cannot be written: "):
        engine.run([1.0])
    assert optimizer.clocks["step"] == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's device that is always full")  # noqa: PTH110
def test_a_full_disk_stops_the_run_with_an_error_that_says_so(tmp_path):
    (tmp_path / "ledger.jsonl").symlink_to("/dev/full")
    engine, optimizer = parts()
    ice.Ledger(tmp_path / "ledger.jsonl").attach(engine, optimizer)
    with pytest.raises(WriteError, match="No space left on device"):
        engine.run([1.0] * 10, max_epochs=1000)
    assert optimizer.clocks["step"] <= 10  # the end of the first epoch at the latest


@pytest.mark.parametrize("kind", [ice.Ledger, ice.TensorBoard])
def test_a_file_that_is_deleted_meanwhile_stops_the_run_with_an_error_that_says_so(tmp_path, kind):
    """Writing to it would go on without an error, to a file that nobody can read."""
    engine, optimizer = parts()
    recording = kind(tmp_path / "run" / "ledger.jsonl").attach(engine, optimizer)
    engine.add_event_handler(Events.EPOCH_STARTED(once=2), lambda: shutil.rmtree(tmp_path / "run"))
    with pytest.raises(WriteError, match=r"ledger\.jsonl.* cannot be written: .*it was deleted"):
        engine.run([1.0] * 10, max_epochs=1000)
    assert optimizer.clocks["step"] <= 20
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(WriteError, match="it was deleted"):
        recording.flush()


@pytest.mark.parametrize("kind", [ice.Ledger, ice.TensorBoard])
def test_a_relative_path_is_of_the_folder_in_which_it_was_given(tmp_path, monkeypatch, kind):
    (tmp_path / "start").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "start")
    engine, optimizer = parts()
    kind("run").attach(engine, optimizer)
    monkeypatch.chdir(tmp_path / "elsewhere")
    engine.run([1.0])
    assert [path.name for path in (tmp_path / "start").iterdir()] == ["run"]
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_ledger_that_is_not_there_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "ledger.jsonl")


def test_what_a_checkpoint_is_resumed_from_is_in_the_ledger(tmp_path):
    """A process that is killed right after a checkpoint leaves no hole in the ledger of the resumed run."""
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=0.1))
    trainer = Engine(lambda engine, batch: optimizer.backward(weight * batch))
    optimizer.attach(trainer)
    ice.Ledger(tmp_path / "ledger.jsonl").attach(trainer, optimizer)
    saved = {"trainer": trainer, "optimizer": optimizer, "weights": torch.nn.ParameterList([weight])}
    checkpoint = ice.Checkpoint(saved, tmp_path / "checkpoints").attach(trainer, Events.ITERATION_COMPLETED)
    found = []
    trainer.add_event_handler(
        CheckpointEvents.SAVED_CHECKPOINT, lambda: found.append(len(read(tmp_path / "ledger.jsonl")))
    )
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda: checkpoint.last_checkpoint)
    trainer.run([1.0] * 4)
    assert found == [1, 2, 3, 4]


def test_a_name_that_was_an_evaluators_may_be_an_optimizers_in_a_resumed_run(tmp_path):
    """Its lines have no attempt, and go by the step and iteration, as all of evaluators do."""
    path = tmp_path / "ledger.jsonl"
    engine, optimizer = parts()
    evaluator = Engine(lambda engine, batch: None)
    evaluator.add_event_handler(Events.COMPLETED, lambda: evaluator.state.metrics.update(accuracy=0.5))
    ice.Ledger(path).attach(engine, optimizer, evaluators={"critic": evaluator})
    states = {}
    engine.add_event_handler(
        Events.ITERATION_COMPLETED(once=2),
        lambda: states.update(optimizer=optimizer.state_dict(), trainer=dict(engine.state_dict())),
    )
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=2), lambda: evaluator.run([0]))
    engine.run([1.0] * 4)
    engine, optimizer = parts(name="critic")
    optimizer.load_state_dict(states["optimizer"])
    engine.load_state_dict(states["trainer"])
    ice.Ledger(path).attach(engine, optimizer)
    engine.run([1.0] * 4)
    assert [(row["source"], row["step"]) for row in read(path)] == [
        ("optimizer", 1),
        ("optimizer", 2),
        ("critic", 2),
        ("critic", 3),
        ("critic", 4),
    ]
