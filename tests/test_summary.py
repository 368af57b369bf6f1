"""One line in the log at the end of a run."""

import logging
import re

import pytest
import torch
from ignite.engine import Engine, Events

import ice_engine as ice
from tests.single_weight import parts, parts_of_two


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="ice_engine.summary")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "ice_engine.summary"]


def test_a_run_ends_with_one_line_that_counts_steps_short_windows_and_skips(lines):
    engine, _ = parts(accumulation_steps=2, nonfinite="skip")
    engine.run([1.0, float("inf"), 2.0, 3.0, 4.0], max_epochs=2)
    (line,) = lines()
    assert re.fullmatch(
        r"run ended in epoch 2, after 10 iterations and \d+\.\d s; optimizer: 4 steps, 2 of short windows, 2 skipped",
        line,
    )


def test_every_run_has_its_own_line_and_a_resumed_one_says_which_steps_are_its(lines):
    engine, _ = parts(accumulation_steps=2)
    engine.run([1.0] * 3, max_epochs=1)
    engine.run([1.0] * 3, max_epochs=3)
    assert "optimizer: 2 steps, 1 of short windows, 0 skipped" in lines()[0]
    assert "optimizer: 6 steps, the last 4 of them now, 2 of short windows, 0 skipped" in lines()[1]
    assert len(lines()) == 2


def test_a_run_that_is_terminated_has_its_line_and_one_that_raises_has_none(lines):
    engine, _ = parts()
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.terminate)
    engine.run([1.0] * 5)
    assert len(lines()) == 1
    assert "optimizer: 2 steps" in lines()[0]
    engine, _ = parts()
    with pytest.raises(TypeError):
        engine.run([1.0, "2.0"])
    assert len(lines()) == 1


def test_it_names_the_best_metrics_where_the_time_went_and_where_things_are(lines, tmp_path):
    engine, optimizer = parts()
    evaluator = Engine(lambda engine, batch: None)
    found = iter([(float("nan"), 0.7), (0.25, 0.9), (0.75, 0.8)])

    @evaluator.on(Events.COMPLETED)
    def measure(evaluator):
        loss, accuracy = next(found)
        evaluator.state.metrics = {"loss": loss, "accuracy": accuracy, "confusion": torch.ones(2, 2)}

    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run([0]))
    for recording in (ice.TensorBoard(tmp_path / "board"), ice.Ledger(tmp_path / "ledger.jsonl")):
        recording.attach(engine, optimizer, evaluators={"validation": evaluator})
    ice.Checkpoint({"trainer": engine, "optimizer": optimizer}, tmp_path / "checkpoints").attach(engine)
    engine.run([1.0, 1.0], max_epochs=3)
    (line,) = lines()
    assert "; lowest validation/loss 0.25, at step 4; " in line
    assert "; highest validation/accuracy 0.9, at step 4; " in line
    assert line.endswith(f"written to {tmp_path / 'board'}, {tmp_path / 'ledger.jsonl'}, {tmp_path / 'checkpoints'}")
    shares = re.search(r"; time: data (\d+) %, compute (\d+) %, step (\d+) %, other (\d+) %; ", line)
    assert 98 <= sum(map(int, shares.groups())) <= 102


@pytest.mark.parametrize(
    ("metric", "best"),
    [
        *(
            (metric, "lowest")
            for metric in ("val_loss", "ValLoss", "RMSE", "word_error_rate", "WER", "nll", "mae_2", "err")
        ),
        *(
            (metric, "highest")
            for metric in ("answer_accuracy", "power", "certainty", "soccer", "recall_lower", "terrain")
        ),
    ],
)
def test_the_best_value_is_the_lowest_of_an_error_alone(lines, tmp_path, metric, best):
    engine, optimizer = parts()
    evaluator = Engine(lambda engine, batch: None)
    values = iter([1.0, 2.0])

    @evaluator.on(Events.COMPLETED)
    def measure(evaluator):
        evaluator.state.metrics = {metric: next(values)}

    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run([0]))
    ice.Ledger(tmp_path / "ledger.jsonl").attach(engine, optimizer, evaluators={"answers": evaluator})
    engine.run([1.0], max_epochs=2)
    (line,) = lines()
    assert f"; {best} answers/{metric} {1 if best == 'lowest' else 2}, at step " in line


def test_several_optimizers_stand_in_the_same_line(lines):
    engine, _ = parts_of_two("generator", "critic")
    engine.run([1.0] * 4)
    (line,) = lines()
    assert "; generator: 2 steps, 0 of short windows, 0 skipped; critic: 4 steps, 0 of short windows" in line


def test_hooks_of_the_users_may_have_the_names_of_the_summary(lines):
    weight, called = torch.nn.Parameter(torch.ones(())), []
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=0.5))
    engine = Engine(lambda engine, batch: optimizer.backward(weight * batch))
    hooks = ice.HookRegistry(engine)
    for name in ("summary", "summary.start"):
        hooks.add(Events.COMPLETED, lambda: called.append(1), name=name)
    optimizer.attach(engine)
    engine.run([1.0])
    assert (len(called), len(lines())) == (2, 1)
    optimizer.detach()
    assert sorted(hook.name for hook in hooks) == ["summary", "summary.start"]
