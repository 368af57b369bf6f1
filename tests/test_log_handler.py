"""Ignite's own loggers get the rows that TensorBoard gets."""

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import TensorboardLogger
from ignite.handlers.base_logger import BaseLogger, BaseOutputHandler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ice_engine as ice
from ice_engine.errors import ArgumentTypeError, AttachError
from tests.single_weight import parts


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_ignites_logger_writes_the_curves_that_tensorboard_writes(tmp_path):
    engine, optimizer = parts(accumulation_steps=2, clip=ice.clip_norm(1.0))
    ice.TensorBoard(tmp_path / "ours").attach(engine, optimizer)
    with TensorboardLogger(log_dir=str(tmp_path / "theirs")) as logger:
        logger.attach(
            engine,
            log_handler=ice.RecordHandler(optimizer),
            event_name=optimizer.events.OPTIMIZER_STEP_COMPLETED,
        )
        engine.run([1.0, 2.0, 3.0, 4.0, 5.0])
    ours, theirs = read(tmp_path / "ours"), read(tmp_path / "theirs")
    assert {tag for tag in ours if not tag.startswith("plan/")} == theirs.keys()
    for tag, points in theirs.items():
        assert points == ours[tag] or tag.startswith("memory/"), tag


class ListLogger(BaseLogger):
    """A logger of Ignite's kind that keeps what it is given, in the form that MLflow's and W&B's have."""

    def __init__(self):
        self.written = []

    def _create_output_handler(self, *args, **kwargs):
        return ListOutputHandler(*args, **kwargs)

    def _create_opt_params_handler(self, *args, **kwargs):
        raise NotImplementedError


class ListOutputHandler(BaseOutputHandler):
    def __call__(self, engine, logger, event_name):
        rows = self._setup_output_metrics_state_attrs(engine, log_text=True, key_tuple=False)
        logger.written.append((self.global_step_transform(engine, event_name), rows))


def test_a_filtered_event_and_a_skip_are_written_at_the_optimizers_step():
    engine, optimizer = parts(nonfinite="skip")
    logger, handler = ListLogger(), ice.RecordHandler(optimizer)
    completed, skipped = (optimizer.event(kind) for kind in ("STEP_COMPLETED", "STEP_SKIPPED"))
    logger.attach(engine, log_handler=handler, event_name=completed(every=2))
    logger.attach(engine, log_handler=handler, event_name=skipped)
    engine.run([1.0, 2.0, float("inf"), 3.0, 4.0])
    by_step = {}
    for step, rows in logger.written:
        by_step.setdefault(step, {}).update(rows)
    assert by_step.keys() == {2, 4}
    assert by_step[4]["training/loss"] == 4.0
    assert by_step[4]["optimizer/lr/group_0"] == 0.5
    assert by_step[4]["optimizer/skipped"] == 1
    assert [rows for step, rows in logger.written if rows.keys() == {"optimizer/skipped"}] == [{"optimizer/skipped": 1}]


def test_of_two_optimizers_the_first_has_the_output():
    weights = [torch.nn.Parameter(torch.ones(())) for _ in range(2)]
    optimizers = [
        ice.Optimizer(torch.optim.SGD([weight], lr=0.5), name=name)
        for weight, name in zip(weights, ("generator", "critic"), strict=True)
    ]

    def train_step(engine, batch):
        for optimizer, weight in zip(optimizers, weights, strict=True):
            optimizer.backward(weight * batch)
        return batch

    engine = Engine(train_step)
    logger = ListLogger()
    for optimizer in optimizers:
        optimizer.attach(engine)
        logger.attach(engine, log_handler=ice.RecordHandler(optimizer), event_name=optimizer.event("STEP_COMPLETED"))
    engine.run([1.0])
    tags = [tag for _, rows in logger.written for tag in rows]
    assert tags.count("training/loss") == 1
    assert {"generator/lr/group_0", "critic/lr/group_0"} < set(tags)


@pytest.mark.parametrize("stepped", [False, True])
def test_an_engine_that_the_optimizer_is_not_attached_to_is_refused_at_its_first_event(stepped):
    engine, optimizer = parts()
    if stepped:
        engine.run([1.0])
    other = Engine(lambda engine, batch: None)
    ListLogger().attach(other, log_handler=ice.RecordHandler(optimizer), event_name=Events.ITERATION_COMPLETED)

    with pytest.raises(AttachError, match=r"'optimizer' is not attached to this engine; call optimizer\.attach"):
        other.run([1.0])


def test_anything_else_is_refused():
    with pytest.raises(ArgumentTypeError, match=r"optimizer must be an ice_engine.Optimizer, got SGD"):
        ice.RecordHandler(torch.optim.SGD([torch.nn.Parameter(torch.ones(()))], lr=0.1))
