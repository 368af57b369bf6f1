"""Runs in TensorBoard: real event files, read back."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import TensorboardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import ice_engine as ice
from ice_engine.errors import ArgumentTypeError, ArgumentValueError, AttachError, HookError


def read(folder):
    """Scalars as {tag: [(step, value), ...]}."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def numbers(folder, tag):
    """The values of one curve."""
    return [event.value for event in EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload().Scalars(tag)]


MEASURED = {
    "memory/host",
    "optimizer/items_per_second",
    "optimizer/time/compute",
    "optimizer/time/data",
    "optimizer/time/step",
}


def parts(output=lambda batch: batch, name="optimizer", **settings):
    """A trainer whose batch is the gradient of a single weight, and its optimizer."""
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=0.5), name=name, **settings)

    def train_step(engine, batch):
        optimizer.backward(weight * batch)
        return output(batch)

    engine = Engine(train_step)
    return engine, optimizer.attach(engine)


def test_a_run_writes_these_tags_steps_and_values(tmp_path):
    engine, optimizer = parts(accumulation_steps=2, clip=ice.clip_norm(1.0), processors=[ice.schedules.cosine(total=4)])
    rates = []
    engine.add_event_handler(
        optimizer.events.OPTIMIZER_STEP_COMPLETED, lambda: rates.append(optimizer.param_groups[0]["lr"])
    )
    board = ice.TensorBoard(tmp_path)
    assert board.attach(engine, optimizer) is board
    engine.run([1.0, 3.0, 2.0, 4.0, 7.0])
    board.flush()
    assert len(set(rates)) == 3
    scalars = read(tmp_path)
    assert {
        tag: values for tag, values in scalars.items() if tag not in MEASURED and not tag.startswith("plan/")
    } == {
        # The last window is short: its step comes at the epoch's end.
        "training/loss": [(1, 3.0), (2, 4.0), (3, 7.0)],
        "optimizer/lr/group_0": list(zip((1, 2, 3), rates, strict=True)),
        "optimizer/grad_norm": [(1, 2.0), (2, 3.0), (3, 7.0)],
        "optimizer/clipped_norm": [(1, pytest.approx(1.0)), (2, pytest.approx(1.0)), (3, pytest.approx(1.0))],
        "optimizer/weight": [(1, 2.0), (2, 2.0), (3, 1.0)],
        "optimizer/skipped": [(1, 0.0), (2, 0.0), (3, 0.0)],
    }
    for tag in MEASURED:
        assert [step for step, _ in scalars[tag]] == [1, 2, 3]
        assert all(number > 0 for number in numbers(tmp_path, tag)), tag


def test_every_key_that_a_processor_writes_is_written_for_every_group(tmp_path):
    @ice.dictprocess
    def momentum(betas, step):
        return (betas[0] / 2, betas[1])

    groups = [
        {"params": [torch.nn.Parameter(torch.ones(()))], "name": "body", "lr": 0.25},
        {"params": [torch.nn.Parameter(torch.ones(()))], "lr": 0.125},
    ]
    adam = torch.optim.Adam(groups, betas=(0.5, 0.75))
    optimizer = ice.Optimizer(adam, processors=[momentum(dst="betas")])
    weights = [group["params"][0] for group in adam.param_groups]
    engine = Engine(lambda engine, batch: optimizer.backward(sum(weights) * batch))
    ice.TensorBoard(tmp_path).attach(engine, optimizer.attach(engine))
    engine.run([1.0])
    scalars = {tag: values for tag, values in read(tmp_path).items() if "lr" in tag or "betas" in tag}
    assert scalars == {
        "optimizer/lr/body": [(1, 0.25)],
        "optimizer/lr/group_1": [(1, 0.125)],
        **{f"optimizer/betas/{group}.0": [(1, 0.25)] for group in ("body", "group_1")},
        **{f"optimizer/betas/{group}.1": [(1, 0.75)] for group in ("body", "group_1")},
    }


def test_every_writes_every_so_many_steps(tmp_path):
    engine, optimizer = parts(accumulation_steps=2)
    ice.TensorBoard(tmp_path).attach(engine, optimizer, every=3)
    engine.run([float(i) for i in range(1, 15)])
    scalars = read(tmp_path)
    assert scalars["training/loss"] == [(3, 6.0), (6, 12.0)]
    assert scalars["optimizer/lr/group_0"] == [(3, 0.5), (6, 0.5)]


def test_a_skipped_step_writes_its_count_and_the_loss_scale_alone(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    engine, optimizer = parts(grad_scaler=scaler)
    ice.TensorBoard(tmp_path).attach(engine, optimizer, every=2)
    engine.run([1.0, float("inf"), 2.0])
    scalars = read(tmp_path)
    assert scalars["optimizer/skipped"] == [(1, 1.0), (2, 1.0)]
    assert scalars["optimizer/loss_scale"] == [(1, 8.0), (2, 4.0)]
    assert scalars["optimizer/lr/group_0"] == [(2, 0.5)]
    assert scalars["training/loss"] == [(2, 2.0)]


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (lambda batch: batch, {"training/loss": [(1, 3.0)]}),
        (lambda batch: int(batch), {"training/loss": [(1, 3.0)]}),
        (lambda batch: torch.tensor(batch), {"training/loss": [(1, 3.0)]}),
        (lambda batch: torch.tensor([batch], dtype=torch.bfloat16), {"training/loss": [(1, 3.0)]}),
        (
            lambda batch: {"loss": torch.tensor(batch), "accuracy": 0.5, "y_pred": torch.ones(4), "note": "fine"},
            {"training/loss": [(1, 3.0)], "training/accuracy": [(1, 0.5)]},
        ),
        (lambda batch: None, {}),
        (lambda batch: (torch.ones(2), torch.ones(2)), {}),
        (lambda batch: (1.0, 2.0), {}),
        (lambda batch: torch.ones(4), {}),
        (lambda batch: "3.0", {}),
    ],
    ids=["float", "int", "scalar", "one element", "dict", "none", "tensors", "tuple", "vector", "string"],
)
def test_what_of_an_output_is_a_scalar_is_written(tmp_path, output, expected):
    engine, optimizer = parts(output)
    ice.TensorBoard(tmp_path).attach(engine, optimizer)
    engine.run([3.0])
    scalars = read(tmp_path)
    assert {tag: values for tag, values in scalars.items() if tag.startswith("training/")} == expected
    assert scalars["optimizer/lr/group_0"] == [(1, 0.5)]


def test_metrics_of_evaluators_stand_at_the_step_they_were_measured_after(tmp_path):
    engine, optimizer = parts(accumulation_steps=2)
    evaluator = Engine(lambda engine, batch: None)

    @evaluator.on(Events.COMPLETED)
    def measure(evaluator):
        evaluator.state.metrics = {
            "accuracy": optimizer.clocks["step"] / 8,
            "recall": [0.25, 0.5],
            "confusion": torch.ones(3, 3),
        }

    ice.TensorBoard(tmp_path).attach(engine, optimizer, evaluators={"validation": evaluator})
    evaluator.run([0])  # before training, when no file is open yet
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run([0]))
    engine.run([1.0] * 3, max_epochs=2)
    scalars = {tag: values for tag, values in read(tmp_path).items() if tag.startswith("validation")}
    assert scalars == {
        "validation/accuracy": [(0, 0.0), (2, 0.25), (4, 0.5)],
        "validation/recall.0": [(0, 0.25), (2, 0.25), (4, 0.25)],
        "validation/recall.1": [(0, 0.5), (2, 0.5), (4, 0.5)],
    }


def test_two_optimizers_write_under_their_names_each_at_its_own_step(tmp_path):
    weights = [torch.nn.Parameter(torch.ones(())) for _ in range(2)]
    first, second = (
        ice.Optimizer(torch.optim.SGD([weight], lr=lr), name=name, accumulation_steps=k)
        for weight, lr, name, k in zip(weights, (0.5, 0.25), ("generator", "critic"), (1, 2), strict=True)
    )

    def train_step(engine, batch):
        first.backward(weights[0] * batch)
        second.backward(weights[1] * batch)
        return batch

    engine = Engine(train_step)
    ice.TensorBoard(tmp_path).attach(engine, first.attach(engine), second.attach(engine))
    engine.run([1.0, 2.0])
    scalars = read(tmp_path)
    assert scalars["training/loss"] == [(1, 1.0), (2, 2.0)]
    assert scalars["generator/lr/group_0"] == [(1, 0.5), (2, 0.5)]
    assert scalars["critic/lr/group_0"] == [(1, 0.25)]


def test_what_was_written_after_the_checkpoint_is_taken_back_by_the_resumed_run(tmp_path):
    engine, optimizer = parts()
    ice.TensorBoard(tmp_path).attach(engine, optimizer)
    states = {}
    engine.add_event_handler(
        Events.ITERATION_COMPLETED(once=3),
        lambda: states.update(optimizer=optimizer.state_dict(), trainer=dict(engine.state_dict())),
    )
    engine.run([1.0, 2.0, 3.0, 4.0, 5.0])
    assert [step for step, _ in read(tmp_path)["training/loss"]] == [1, 2, 3, 4, 5]

    engine, optimizer = parts()
    optimizer.load_state_dict(states["optimizer"])
    engine.load_state_dict(states["trainer"])
    ice.TensorBoard(tmp_path).attach(engine, optimizer)
    engine.run([40.0, 50.0, 60.0, 70.0, 80.0])  # the two iterations that are left
    assert read(tmp_path)["training/loss"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0)]


def test_a_given_summary_writer_is_used_and_left_open(tmp_path):
    engine, optimizer = parts()
    with SummaryWriter(str(tmp_path)) as writer:
        ice.TensorBoard(writer).attach(engine, optimizer)
        engine.run([3.0])
        writer.add_scalar("mine", 1.0, 1)
    scalars = read(tmp_path)
    assert scalars["training/loss"] == [(1, 3.0)]
    assert scalars["mine"] == [(1, 1.0)]


def test_the_writer_of_ignites_logger_is_shared(tmp_path):
    engine, optimizer = parts()
    with TensorboardLogger(log_dir=str(tmp_path)) as logger:
        ice.TensorBoard(logger).attach(engine, optimizer)
        logger.attach_opt_params_handler(
            engine, event_name=optimizer.events.OPTIMIZER_STEP_COMPLETED, optimizer=optimizer, tag="ignite"
        )
        engine.run([3.0])
    scalars = read(tmp_path)
    assert scalars["optimizer/lr/group_0"] == [(1, 0.5)]
    assert scalars["ignite/lr/group_0"] == [(1, 0.5)]


def test_a_folder_is_not_created_before_the_run(tmp_path):
    engine, optimizer = parts()
    board = ice.TensorBoard(tmp_path / "run").attach(engine, optimizer)
    board.flush()
    assert not (tmp_path / "run").exists()
    engine.run([1.0])
    assert (tmp_path / "run").is_dir()


def test_nothing_is_lost_when_the_train_step_raises(tmp_path):
    program = f"""
        import torch
        from ignite.engine import Engine
        import ice_engine as ice

        weight = torch.nn.Parameter(torch.ones(()))
        optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=0.5))

        def train_step(engine, batch):
            if batch == 4.0:
                raise ValueError("the data are bad")
            optimizer.backward(weight * batch)
            return batch

        engine = Engine(train_step)
        optimizer.attach(engine)
        ice.TensorBoard({str(tmp_path)!r}).attach(engine, optimizer)
        engine.run([1.0, 2.0, 3.0, 4.0, 5.0])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert "ValueError: the data are bad" in done.stderr
    assert read(tmp_path)["training/loss"] == [(1, 1.0), (2, 2.0), (3, 3.0)]


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_dir", [None, 3, print])
def test_what_cannot_be_written_to_is_refused(log_dir):
    with pytest.raises(
        ArgumentTypeError, match="log_dir must be a path, a SummaryWriter or an Ignite TensorboardLogger"
    ):
        ice.TensorBoard(log_dir)


def test_without_an_optimizer_there_is_no_axis(tmp_path):
    with pytest.raises(
        AttachError, match=r"needs an optimizer, whose steps are the time axis: attach\(engine, optimizer"
    ):
        ice.TensorBoard(tmp_path).attach(parts()[0])


def test_an_optimizer_of_another_engine_is_refused(tmp_path):
    _, optimizer = parts()
    other, _ = parts()
    board = ice.TensorBoard(tmp_path)
    for wrong in (optimizer, optimizer.inner):
        with pytest.raises(AttachError, match="is not attached to this engine"):
            board.attach(other, wrong)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"every": 0}, ArgumentValueError, "every must be at least 1, got 0"),
        ({"every": 1.5}, ArgumentTypeError, r"every must be an int, got 1\.5"),
        ({"evaluators": [1]}, ArgumentTypeError, r"evaluators must be a dict of engines by name, got \[1\]"),
        ({"evaluators": {"validation": None}}, ArgumentTypeError, "such as evaluators={'validation': evaluator}"),
    ],
)
def test_wrong_settings_are_refused_and_leave_no_hook(tmp_path, settings, error, match):
    engine, optimizer = parts()
    hooks = [hook.name for hook in optimizer.hooks]
    with pytest.raises(error, match=match):
        ice.TensorBoard(tmp_path).attach(engine, optimizer, **settings)
    assert [hook.name for hook in optimizer.hooks] == hooks


def test_a_second_one_on_the_same_engine_is_refused(tmp_path):
    engine, optimizer = parts()
    ice.TensorBoard(tmp_path).attach(engine, optimizer)
    with pytest.raises(HookError, match=r"'tensorboard\.open' is on this engine already"):
        ice.TensorBoard(Path(tmp_path, "other")).attach(engine, optimizer)


def test_what_was_measured_is_written_too(tmp_path):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=0.1), accumulation_steps=2)
    optimizer.measure("noise_scale", "update_ratio", "times")
    trainer = Engine(lambda engine, batch: optimizer.backward((weight * batch).sum()))
    optimizer.attach(trainer)
    board = ice.TensorBoard(tmp_path).attach(trainer, optimizer)
    trainer.run([2.0, 1.0, 3.0, 1.0])
    board.flush()

    events = EventAccumulator(str(tmp_path)).Reload()
    first = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    assert first["optimizer/update_ratio/group_0"] == pytest.approx(0.15)
    assert first["optimizer/grad_norm"] == pytest.approx(1.5 * 3**0.5)
    assert first["optimizer/noise_scale"] == pytest.approx((12 - 6.75) / (1 - 1 / 2) / (2 * 6.75 - 12))
    assert {"optimizer/time/data", "optimizer/time/compute", "optimizer/time/step"} <= first.keys()
