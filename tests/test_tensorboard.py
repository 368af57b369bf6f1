"""Runs in TensorBoard: real event files, read back."""

import gc
import re
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import TensorboardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from torch.utils.tensorboard import SummaryWriter

import ice_engine as ice
from ice_engine.errors import ArgumentTypeError, ArgumentValueError, AttachError, HookError
from tests.single_weight import parts, parts_of_two


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
    assert {tag: values for tag, values in scalars.items() if tag not in MEASURED and not tag.startswith("plan/")} == {
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


def test_in_the_same_process_nothing_is_lost_after_an_exception_either(tmp_path):
    def output(batch):
        if batch == 4.0:
            message = "the data are bad"
            raise ValueError(message)
        return batch

    engine, optimizer = parts(output)
    board = ice.TensorBoard(tmp_path).attach(engine, optimizer)
    with pytest.raises(ValueError, match="the data are bad"):
        engine.run([1.0, 2.0, 3.0, 4.0, 5.0])
    board.flush()
    assert read(tmp_path)["training/loss"] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_attached_in_a_run_it_writes_from_then_on(tmp_path):
    engine, optimizer = parts()
    engine.add_event_handler(
        Events.ITERATION_COMPLETED(once=2), lambda: ice.TensorBoard(tmp_path).attach(engine, optimizer)
    )
    engine.run([1.0, 2.0, 3.0, 4.0])
    assert read(tmp_path)["training/loss"] == [(3, 3.0), (4, 4.0)]


def test_it_ends_with_its_engine_on_whatever_thread_that_is_collected(tmp_path):
    engine, optimizer = parts()
    board = ice.TensorBoard(tmp_path).attach(engine, optimizer)
    engine.run([1.0, 2.0])
    background, thread = board._background, board._background._thread
    gone = weakref.ref(board)
    gc.disable()  # so that it is this one thread, the one that writes, which finds them
    try:
        del engine, optimizer, board
        assert gone() is not None
        background.put((gc.collect,))
        thread.join(30)
    finally:
        gc.enable()
    assert gone() is None
    assert not thread.is_alive()
    assert read(tmp_path)["training/loss"] == [(1, 1.0), (2, 2.0)]


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
    with pytest.raises(AttachError, match="is not attached to this engine"):
        board.attach(other, optimizer)
    with pytest.raises(AttachError, match=r"got SGD; wrap it, .*: ice\.Optimizer\(optimizer\)\.attach\(engine\)$"):
        board.attach(other, optimizer.inner)


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
    with pytest.raises(AttachError, match="this engine has a TensorBoard already"):
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


# -- beside the curves ----------------------------------------------------------------------------------------------


def accumulated(folder):
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "histograms": 0}).Reload()


def texts(folder, tag):
    """The texts of one tag, as (step, text)."""
    events = accumulated(folder).Tensors(f"{tag}/text_summary")
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events]


def charts(folder):
    """What Custom Scalars shows: the tags of each chart, by category and title, found as its plugin finds them."""
    events = accumulated(folder)
    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    return {
        category.title: {
            chart.title: sorted(
                tag for tag in events.Tags()["scalars"] if any(re.match(regex, tag) for regex in chart.multiline.tag)
            )
            for chart in category.chart
        }
        for category in layout.category
    }


def whole_run(folder, **settings):
    """A run with everything that can be shown."""
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    groups = [{"params": weights[:1], "name": "body"}, {"params": weights[1:], "name": "head", "lr": 0.25}]
    optimizer = ice.Optimizer(
        torch.optim.AdamW(groups, lr=0.5, betas=(0.75, 0.9)),
        accumulation_steps=2,
        clip=ice.clip_norm(1.0),
        grad_scaler=torch.amp.GradScaler("cpu", init_scale=8.0),
        processors=[ice.schedules.cosine(), ice.schedules.linear(dst="betas.0")],
    )
    optimizer.measure("update_ratio")

    def train_step(engine, batch):
        optimizer.backward(sum(weight.sum() for weight in weights) * batch, weight=4)
        return {"loss": batch, "accuracy": 0.5}

    engine = Engine(train_step)
    optimizer.attach(engine)
    evaluator = Engine(lambda engine, batch: None)

    @evaluator.on(Events.COMPLETED)
    def measure(evaluator):
        evaluator.state.metrics = {"loss": 0.25, "accuracy": 0.75}

    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run([0]))
    ice.TensorBoard(folder).attach(engine, optimizer, evaluators={"validation": evaluator}, **settings)
    engine.run([1.0, 2.0, 3.0], max_epochs=2)
    return engine, optimizer


def test_the_dashboard_has_every_curve_once_and_the_plan_beside_what_it_planned(tmp_path):
    whole_run(tmp_path)
    found = charts(tmp_path)
    assert found == {
        "run": {
            "loss": ["training/loss", "validation/loss"],
            "accuracy": ["training/accuracy", "validation/accuracy"],
        },
        "optimizer": {
            "lr": ["optimizer/lr/body", "optimizer/lr/head", "plan/optimizer/lr/body", "plan/optimizer/lr/head"],
            "betas": [
                *(f"optimizer/betas/{group}.{i}" for group in ("body", "head") for i in range(2)),
                *(f"plan/optimizer/betas.0/{group}" for group in ("body", "head")),
            ],
            "gradient norm, before and after clipping": ["optimizer/clipped_norm", "optimizer/grad_norm"],
            "step, as a part of the weights": ["optimizer/update_ratio/body", "optimizer/update_ratio/head"],
            "skipped steps": ["optimizer/skipped"],
            "loss scale": ["optimizer/loss_scale"],
            "items per second": ["optimizer/items_per_second"],
            "seconds of a window": [f"optimizer/time/{part}" for part in ("compute", "data", "step")],
            "items behind a step": ["optimizer/weight"],
        },
        "machine": {"memory in MiB": ["memory/host"]},
    }
    # What a reader looks for first stands first, whatever came first: how it goes, then what it costs.
    assert list(found) == ["run", "optimizer", "machine"]
    assert list(found["run"]) == ["loss", "accuracy"]
    assert list(found["optimizer"]) == [
        "lr",
        "betas",
        "gradient norm, before and after clipping",
        "step, as a part of the weights",
        "skipped steps",
        "loss scale",
        "items behind a step",
        "items per second",
        "seconds of a window",
    ]
    shown = [tag for category in found.values() for tags in category.values() for tag in tags]
    assert sorted(shown) == sorted(read(tmp_path))


def test_each_metric_has_a_chart_of_its_own_in_which_all_that_measured_it_stand(tmp_path):
    engine, optimizer = parts(output=lambda batch: {"accuracy": 0.5, "loss": batch})
    names = ("validation", "test")
    evaluators = {name: Engine(lambda engine, batch: None) for name in names}
    for evaluator in evaluators.values():
        metrics = {"perplexity": 80.0, "accuracy": 0.75, "recall": [0.5, 1.0], "f1.macro": 0.9, "val_loss": 2.0}
        evaluator.add_event_handler(Events.COMPLETED, lambda engine, found=metrics: engine.state.metrics.update(found))
        engine.add_event_handler(Events.STARTED, lambda _, evaluator=evaluator: evaluator.run([0]))
    ice.TensorBoard(tmp_path).attach(engine, optimizer, evaluators=evaluators)
    engine.run([1.0])
    assert charts(tmp_path)["run"] == {
        "loss": ["test/val_loss", "training/loss", "validation/val_loss"],
        "perplexity": ["test/perplexity", "validation/perplexity"],
        "accuracy": ["test/accuracy", "training/accuracy", "validation/accuracy"],
        "recall": [f"{name}/recall.{i}" for name in ("test", "validation") for i in (0, 1)],
        "f1.macro": [f"{name}/f1.macro" for name in ("test", "validation")],
    }
    assert next(iter(charts(tmp_path)["run"])) == "loss"


def test_a_norm_that_nobody_clips_is_not_said_to_be_clipped(tmp_path):
    engine, optimizer = parts()
    ice.TensorBoard(tmp_path).attach(engine, optimizer)
    engine.run([1.0])
    assert charts(tmp_path)["optimizer"]["gradient norm"] == ["optimizer/grad_norm"]


def test_a_chart_that_would_stay_empty_is_left_out(tmp_path):
    engine, optimizer = parts()
    ice.TensorBoard(tmp_path).attach(engine, optimizer)
    engine.run([1.0])
    assert list(charts(tmp_path)["run"]) == ["loss"]
    assert all(tags for category in charts(tmp_path).values() for tags in category.values())


def test_the_plan_is_what_the_schedules_then_do(tmp_path):
    whole_run(tmp_path)
    scalars = read(tmp_path)
    for group in ("body", "head"):
        assert scalars[f"plan/optimizer/lr/{group}"] == scalars[f"optimizer/lr/{group}"]
        assert len(scalars[f"plan/optimizer/lr/{group}"]) == 4


@pytest.mark.parametrize("why", ["length", "processor", "long"])
def test_without_a_plan_the_run_is_written_all_the_same(tmp_path, caplog, why):
    calls = []

    @ice.dictprocess
    def impure(lr):
        calls.append(lr)
        return lr / 2

    processors = [impure(dst="lr")] if why == "processor" else [ice.schedules.cosine(total=100)]
    engine, optimizer = parts(processors=processors)
    ice.TensorBoard(tmp_path).attach(engine, optimizer)
    if why == "long":
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.terminate)
    with caplog.at_level("INFO"):
        if why == "length":
            engine.run(iter([1.0, 2.0]), max_epochs=1)
        else:
            engine.run([1.0, 2.0], max_epochs=100_000 if why == "long" else 1)
    assert len(read(tmp_path)["optimizer/lr/group_0"]) == 2
    assert not any(tag.startswith("plan/") for tag in read(tmp_path))
    assert len(calls) == (2 if why == "processor" else 0)
    assert any("no plan of 200000 steps" in text for text in caplog.messages) == (why == "long")


def hparams(folder, tag):
    """What the plugin HParams reads of a folder."""
    content = accumulated(folder).PluginTagToContent("hparams")[tag]
    data = plugin_data_pb2.HParamsPluginData.FromString(content)
    return getattr(data, data.WhichOneof("data"))


def test_the_hparams_tab_has_the_run_in_its_own_folder(tmp_path):
    whole_run(tmp_path, hparams={"width": 64, "name": "small", "path": Path("data"), "deep": True})
    start = hparams(tmp_path, metadata.SESSION_START_INFO_TAG)
    found = {key: getattr(value, value.WhichOneof("kind")) for key, value in start.hparams.items()}
    assert found == {
        "class": "AdamW",
        "accumulation_steps": 2.0,
        "processors": found["processors"],
        "lr/body": 0.5,
        "lr/head": 0.25,
        "betas": "(0.75, 0.9)",
        "eps": pytest.approx(1e-8),
        "weight_decay": pytest.approx(0.01),
        "width": 64.0,
        "name": "small",
        "path": "data",
        "deep": "True",
    }
    assert "cosine" in found["processors"]
    experiment = hparams(tmp_path, metadata.EXPERIMENT_TAG)
    assert sorted(metric.name.tag for metric in experiment.metric_infos) == ["validation/accuracy", "validation/loss"]
    assert {info.name for info in experiment.hparam_infos} == set(found)
    assert hparams(tmp_path, metadata.SESSION_END_INFO_TAG).status == api_pb2.STATUS_SUCCESS
    assert all(path.is_file() for path in tmp_path.iterdir())  # no folder beside the run's


def test_hparams_may_have_any_keys_and_numbers_of_any_size(tmp_path):
    engine, optimizer = parts()
    ice.TensorBoard(tmp_path).attach(engine, optimizer, hparams={5: 2, "huge": 10**400, "limit": float("inf")})
    engine.run([1.0])
    found = hparams(tmp_path, metadata.SESSION_START_INFO_TAG).hparams
    assert (found["5"].number_value, found["limit"].number_value) == (2.0, float("inf"))
    assert found["huge"].string_value == str(10**400)


def test_the_configuration_is_a_text(tmp_path):
    whole_run(tmp_path, hparams={"width": 64})
    ((step, text),) = texts(tmp_path, "configuration")
    assert step == 0
    for part in ("| epochs | 2 |", "| iterations per epoch | 3 |", "| width | 64 |", f"torch {torch.__version__}"):
        assert part in text
    assert "    Optimizer(name='optimizer', accumulation_steps=2, clip=" in text


def test_why_steps_were_skipped_is_a_text_of_which_none_is_lost(tmp_path):
    engine, optimizer = parts(nonfinite="skip")
    ice.TensorBoard(tmp_path).attach(engine, optimizer)
    engine.run([1.0, float("inf"), float("nan"), 2.0, float("inf")])
    found = texts(tmp_path, "optimizer/skip")
    assert [step for step, _ in found] == [1, 1, 2]
    assert found[1][1].count("param_groups.0.params.0") == 2  # the second at this step has the first's, too
    assert "attempt 2, iteration 2: " in found[1][1]
    assert "attempt 3, iteration 3: " in found[1][1]
    assert found[2][1].count("attempt") == 1


def test_histograms_of_parameters_and_gradients_every_so_many_steps(tmp_path):
    weight = torch.nn.Parameter(torch.tensor([0.0, 1.0, 2.0, float("nan")]))
    model = torch.nn.ParameterDict({"weight": weight})
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    engine = Engine(lambda engine, batch: optimizer.backward((weight[:3] * torch.tensor([1.0, 1.0, 4.0])).sum()))
    optimizer.attach(engine, model=model)
    ice.TensorBoard(tmp_path).attach(engine, optimizer, histograms=2)
    engine.run([0] * 5)
    events = accumulated(tmp_path)
    assert sorted(events.Tags()["histograms"]) == ["optimizer/gradients/weight", "optimizer/parameters/weight"]
    parameters = events.Histograms("optimizer/parameters/weight")
    assert [event.step for event in parameters] == [2, 4]
    found = parameters[0].histogram_value
    assert (found.min, found.max, found.num, found.sum, found.sum_squares) == (-6.0, -1.0, 3, -9.0, 41.0)
    buckets = dict(zip(found.bucket_limit, found.bucket, strict=True))
    assert [sum(n for limit, n in buckets.items() if limit <= end) for end in (-5.9, -1.9, -1.0)] == [1, 2, 3]
    gradients = events.Histograms("optimizer/gradients/weight")[0].histogram_value
    assert (gradients.min, gradients.max, gradients.num) == (0.0, 4.0, 4)


@pytest.mark.parametrize("kind", ["path", "writer", "logger"])
def test_whatever_it_writes_to_the_same_is_there(tmp_path, kind):
    if kind == "path":
        whole_run(tmp_path, histograms=1)
    elif kind == "writer":
        with SummaryWriter(str(tmp_path)) as writer:
            whole_run(writer, histograms=1)
    else:
        with TensorboardLogger(log_dir=str(tmp_path)) as logger:
            whole_run(logger, histograms=1)
    assert charts(tmp_path)["optimizer"]["lr"]
    assert texts(tmp_path, "configuration")
    assert hparams(tmp_path, metadata.SESSION_START_INFO_TAG).hparams["class"].string_value == "AdamW"
    assert hparams(tmp_path, metadata.SESSION_END_INFO_TAG).status == api_pb2.STATUS_SUCCESS
    assert len(accumulated(tmp_path).Histograms("optimizer/gradients/param_groups.0.params.0")) == 4
    scalars = read(tmp_path)
    assert scalars["training/loss"] == [(1, 2.0), (2, 3.0), (3, 2.0), (4, 3.0)]
    assert scalars["validation/accuracy"] == [(2, 0.75), (4, 0.75)]


def test_a_fresh_run_in_the_same_folder_takes_the_place_of_the_one_before(tmp_path):
    for losses in ([1.0, 2.0, 3.0], [4.0, 5.0]):
        engine, optimizer = parts()
        ice.TensorBoard(tmp_path).attach(engine, optimizer)
        engine.run(losses)
    assert read(tmp_path)["training/loss"] == [(1, 4.0), (2, 5.0)]


def test_of_two_optimizers_nothing_is_taken_back_that_was_before_the_checkpoint(tmp_path):
    def make():
        engine, optimizers = parts_of_two("slow", "fast")
        ice.TensorBoard(tmp_path).attach(engine, *optimizers)
        return engine, optimizers

    engine, optimizers = make()
    states = []
    engine.add_event_handler(
        Events.ITERATION_COMPLETED(once=4),
        lambda: states.extend([dict(engine.state_dict()), *(optimizer.state_dict() for optimizer in optimizers)]),
    )
    engine.run([1.0] * 6)
    engine, optimizers = make()
    engine.load_state_dict(states[0])
    for optimizer, state in zip(optimizers, states[1:], strict=True):
        optimizer.load_state_dict(state)
    engine.run([1.0] * 6)
    scalars = read(tmp_path)
    assert [step for step, _ in scalars["fast/grad_norm"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in scalars["slow/grad_norm"]][:2] == [1, 2]


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"histograms": 0}, ArgumentValueError, "histograms must be at least 1, got 0"),
        ({"histograms": True}, ArgumentTypeError, "histograms must be an int, got True"),
        (
            {"hparams": [1]},
            ArgumentTypeError,
            r"hparams must be a dict, got \[1\]; such as hparams={'width': 64}, or v",
        ),
        (
            {"evaluators": {"training": Engine(lambda engine, batch: None)}},
            ArgumentValueError,
            "tags beginning with 'training' are taken",
        ),
        (
            {"evaluators": {"optimizer": Engine(lambda engine, batch: None)}},
            ArgumentValueError,
            "tags beginning with 'optimizer' are taken",
        ),
    ],
)
def test_other_wrong_settings_are_refused_and_leave_no_hook(tmp_path, settings, error, match):
    engine, optimizer = parts()
    hooks = [hook.name for hook in optimizer.hooks]
    with pytest.raises(error, match=match):
        ice.TensorBoard(tmp_path).attach(engine, optimizer, **settings)
    assert [hook.name for hook in optimizer.hooks] == hooks


def test_one_is_for_one_run(tmp_path):
    engine, optimizer = parts()
    board = ice.TensorBoard(tmp_path).attach(engine, optimizer)
    engine, optimizer = parts()
    with pytest.raises(AttachError, match="this TensorBoard is attached already, and writes one run; make another one"):
        board.attach(engine, optimizer)


def test_an_evaluator_that_is_watched_already_leaves_nothing_half_attached(tmp_path):
    evaluator = Engine(lambda engine, batch: None)
    engine, optimizer = parts()
    ice.TensorBoard(tmp_path / "a").attach(engine, optimizer, evaluators={"validation": evaluator})
    engine, optimizer = parts()
    hooks = [hook.name for hook in optimizer.hooks]
    board = ice.TensorBoard(tmp_path / "b")
    with pytest.raises(HookError, match=r"'tensorboard\.validation' is on this engine already"):
        board.attach(engine, optimizer, evaluators={"validation": evaluator})
    assert [hook.name for hook in optimizer.hooks] == hooks
    board.attach(engine, optimizer)


def test_what_a_run_returns_is_read_as_it_was_then(tmp_path):
    """A buffer that every step writes its loss into, as a CUDA graph does."""
    loss = torch.zeros(())
    engine, optimizer = parts(output=lambda batch: loss.fill_(batch))
    ice.TensorBoard(tmp_path).attach(engine, optimizer)
    engine.run([1.0, 2.0, 3.0])
    assert read(tmp_path)["training/loss"] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_loss_that_is_returned_with_its_graph_is_a_number(tmp_path):
    weight = torch.ones((), requires_grad=True)
    losses = []

    def output(batch):
        loss = weight * batch
        losses.append(weakref.ref(loss))
        return loss

    engine, optimizer = parts(output=output)
    ice.TensorBoard(tmp_path).attach(engine, optimizer)
    torch.set_warn_always(True)  # else torch warns once in a process
    try:
        engine.run([1.0, 2.0, 3.0])
    finally:
        torch.set_warn_always(False)
    assert read(tmp_path)["training/loss"] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert [loss() is None for loss in losses] == [True, True, False]  # the last is engine.state.output


def test_a_norm_that_a_clip_keeps_in_one_buffer_is_read_as_it_was_then(tmp_path):
    buffer = torch.zeros(())

    def clip(parameters):
        return buffer.copy_(parameters[0].grad)

    engine, optimizer = parts(clip=clip)
    ice.TensorBoard(tmp_path).attach(engine, optimizer)
    engine.run([1.0, 2.0, 3.0])
    assert read(tmp_path)["optimizer/grad_norm"] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_learning_rate_in_a_tensor_is_read_as_it_was_then(tmp_path):
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = ice.Optimizer(
        torch.optim.AdamW([weight], lr=torch.tensor(1.0), foreach=False, capturable=False),
        processors=[ice.schedules.linear(total=4)],
    )
    engine = Engine(lambda engine, batch: optimizer.backward(weight * batch))
    ice.TensorBoard(tmp_path).attach(engine, optimizer.attach(engine))
    engine.run([1.0] * 4)
    assert read(tmp_path)["optimizer/lr/group_0"] == [(1, 1.0), (2, 0.75), (3, 0.5), (4, 0.25)]
