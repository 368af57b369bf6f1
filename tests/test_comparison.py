"""Where two runs part: real runs, and the command."""

import json
import math
import subprocess
import sys

import pytest
import torch
from ignite.engine import Engine, Events

import ice_engine as ice
from ice_engine.__main__ import main
from ice_engine.comparison import compare
from ice_engine.errors import ArgumentValueError, LedgerError


def run(path, batches, *, lr=0.5, evaluate=True, every=1, nudge=None, **settings):
    """Train on two weights; at iteration *nudge* the batch is a little larger."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), **settings)

    def train_step(engine, batch):
        batch = batch + (1e-3 if engine.state.iteration == nudge else 0.0)
        loss = model(torch.full((1, 3), batch)).square().mean()
        optimizer.backward(loss)
        return loss.item()

    engine = Engine(train_step)
    optimizer.attach(engine)
    evaluator = Engine(lambda engine, batch: None)

    @evaluator.on(Events.COMPLETED)
    def measure(evaluator):
        evaluator.state.metrics = {"size": model.weight.detach().norm().item()}

    if evaluate:
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run([0]))
    ice.Ledger(path).attach(engine, optimizer, every=every, evaluators={"validation": evaluator})
    engine.run(batches, max_epochs=2)
    return path


BATCHES = [0.1, 0.2, 0.3, 0.4]


@pytest.fixture
def paths(tmp_path):
    return tmp_path / "a.jsonl", tmp_path / "b.jsonl"


def test_two_runs_alike_are_the_same_whatever_the_clock_says(paths):
    a, b = (run(path, BATCHES) for path in paths)
    found = compare(a, b)
    assert found.is_same
    assert (found.same, found.row, found.differences) == (10, None, {})
    assert str(found) == f"{a} and {b} are the same in 10 lines, all that both have"


def test_the_first_step_in_which_they_part_is_found_and_what_differs(paths):
    a, b = run(paths[0], BATCHES), run(paths[1], BATCHES, nudge=6)
    found = compare(a, b)
    assert not found.is_same
    assert (found.row["source"], found.row["step"], found.row["epoch"]) == ("optimizer", 6, 2)
    assert found.same == 6  # five steps and an evaluation
    assert list(found.differences) == ["training/loss", "optimizer/grad_norm"]
    loss, other = found.differences["training/loss"]
    assert 0 < abs(loss - other) < 1e-2
    lines = str(found).splitlines()
    assert lines[0] == (
        f"{a} and {b} part at step 6 of 'optimizer' (attempt 6, iteration 6, epoch 2), after 6 lines in common"
    )
    assert [line.split()[0] for line in lines[2:5]] == [str(a), "training/loss", "optimizer/grad_norm"]


def test_numbers_that_differ_in_their_last_digits_are_shown_in_full(paths):
    for path, loss in zip(paths, (0.1 + 0.2, 0.3), strict=True):
        row = {"source": "optimizer", "step": 1, "training/loss": loss, "training/size": loss * 2 + (path == paths[0])}
        path.write_text(json.dumps(row) + "\n")
    loss, size = str(compare(*paths)).splitlines()[3:]
    assert loss.split()[:3] == ["training/loss", "0.30000000000000004", "0.3"]
    assert size.split()[:3] == ["training/size", "1.6", "0.6"]


def test_within_the_tolerances_numbers_are_the_same(paths):
    a, b = run(paths[0], BATCHES), run(paths[1], BATCHES, nudge=6)
    largest = max(abs(x - y) / abs(y) for x, y in compare(a, b).differences.values())
    assert compare(a, b, rtol=largest / 2).row["step"] == 6
    later = compare(a, b, rtol=largest * 1.001)
    assert later.row is None or later.row["step"] > 6
    assert compare(a, b, rtol=1.0).is_same
    assert compare(a, b, atol=1.0).is_same


def test_an_evaluation_can_be_where_they_part(paths):
    a, b = (run(path, BATCHES) for path in paths)
    rows = [json.loads(line) for line in b.read_text().splitlines()]
    rows[4]["validation/size"] += 1.0
    b.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = compare(a, b)
    assert (found.row["source"], found.row["step"], found.same) == ("validation", 4, 9 - 5)
    assert "part at step 4 of 'validation' (iteration 4), after 4 lines" in str(found)


def test_a_skip_on_one_side_is_where_they_part(paths):
    a = run(paths[0], BATCHES, nonfinite="skip", evaluate=False)
    b = run(paths[1], [0.1, math.inf, 0.3, 0.4], nonfinite="skip", evaluate=False)
    found = compare(a, b)
    assert (found.row["attempt"], found.same) == (2, 1)
    assert found.differences["step"] == (2, 1)
    assert found.differences["optimizer/skip"][0] is None


def test_of_a_run_that_writes_less_often_what_both_have_is_compared(paths):
    a, b = run(paths[0], BATCHES), run(paths[1], BATCHES, every=2)
    found = compare(a, b)
    assert (found.row, found.same, found.is_same) == (None, 6, False)
    assert found.only[0].number == 4
    assert str(found).splitlines()[1] == (
        f"only {a} has 4 lines more, the first at step 1 of 'optimizer' (attempt 1, iteration 1, epoch 1)"
    )


def test_a_run_that_ended_earlier_is_not_the_same(paths):
    a, b = (run(path, BATCHES) for path in paths)
    b.write_text("".join(line for line in b.read_text().splitlines(keepends=True)[:-2]))
    found = compare(b, a)
    assert (found.row, found.same, found.is_same, found.only[1].number) == (None, 8, False, 2)


def test_nan_is_the_same_as_nan_and_as_no_number(paths):
    row = {"time": 1.0, "source": "optimizer", "step": 1, "attempt": 1}
    paths[0].write_text(json.dumps({**row, "training/loss": "NaN", "training/size": "Infinity"}) + "\n")
    paths[1].write_text(json.dumps({**row, "training/loss": "NaN", "training/size": "Infinity"}) + "\n")
    assert compare(*paths).is_same
    paths[1].write_text(json.dumps({**row, "training/loss": 1.0, "training/size": 1.0}) + "\n")
    assert list(compare(*paths, rtol=10.0, atol=10.0).differences) == ["training/loss", "training/size"]
    assert "nan" in str(compare(*paths))


def test_bad_input_is_refused(paths):
    a = run(paths[0], BATCHES)
    paths[1].write_text("my notes\n")
    with pytest.raises(LedgerError, match=r"line 1 of .*b\.jsonl is no line of a ledger"):
        compare(*paths)
    with pytest.raises(FileNotFoundError):
        compare(a, a.with_name("none.jsonl"))
    for name in ("rtol", "atol"):
        with pytest.raises(ArgumentValueError, match=f"{name} must be at least 0, got -1"):
            compare(a, a, **{name: -1.0})


# -- the command ----------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_found_and_exits_accordingly(paths, capsys):
    a, b = run(paths[0], BATCHES), run(paths[1], BATCHES, nudge=6)
    assert main(["diff", str(a), str(a)]) == 0
    assert "the same in 10 lines" in capsys.readouterr().out
    assert main(["diff", str(a), str(b)]) == 1
    assert "part at step 6" in capsys.readouterr().out
    assert main(["diff", str(a), str(b), "--rtol", "1", "--atol", "1"]) == 0
    for wrong in (["none.jsonl"], [str(b), "--rtol=-1"], [str(b), "--rtol", "much"], []):
        with pytest.raises(SystemExit, match="2"):
            main(["diff", str(a), *wrong])
        assert "error: " in capsys.readouterr().err


def test_it_is_a_command_of_the_package(paths):
    a = run(paths[0], BATCHES)
    command = [sys.executable, "-m", "ice_engine", "diff", str(a), str(a)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"{a} and {a} are the same in 10 lines, all that both have\n")
