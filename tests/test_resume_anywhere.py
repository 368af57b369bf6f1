"""Saved on any event, with whatever runs beside training: what is resumed is the run that was never stopped."""

import math
import random

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import EarlyStopping, EMAHandler, PiecewiseLinear
from ignite.metrics import Accuracy, ConfusionMatrix, EpochMetric, Fbeta, Precision, RunningAverage
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, WeightedRandomSampler

import ice_engine as ice
from ice_engine import checkpoint_file
from tests.test_checkpoint import assert_equal
from tests.test_resume import LENGTH, Noisy, Stops, Training, assert_same_run, resumed
from tests.unsized import Unsized

EVENTS = [
    Events.STARTED,
    Events.EPOCH_STARTED,
    Events.GET_BATCH_STARTED,
    Events.GET_BATCH_COMPLETED,
    Events.ITERATION_STARTED,
    Events.ITERATION_COMPLETED,
    Events.EPOCH_COMPLETED,
    Events.EPOCH_STARTED | Events.ITERATION_COMPLETED(every=3),
    Events.DATALOADER_STOP_ITERATION,
    *ice.OptimizerEvents,
]


@pytest.mark.parametrize("at", [5, 9, 12])
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: getattr(event, "name", "several"))
def test_on_whatever_event_it_is_saved(tmp_path, event, at):
    whole = Training(tmp_path / "whole", event=event).train(max_epochs=3)
    if event in {Events.EPOCH_COMPLETED, Events.DATALOADER_STOP_ITERATION, ice.OptimizerEvents.OPTIMIZER_STEP_SKIPPED}:
        at = 16  # there has been one by then
    _, second, began = resumed(tmp_path, at, event=event, run={"max_epochs": 3})
    assert_same_run(whole, second, began)


@pytest.mark.parametrize("at", [5, 12])
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: getattr(event, "name", "several"))
def test_on_whatever_event_it_is_saved_by_score(tmp_path, event, at):
    settings = {"event": event, "score_function": lambda engine: engine.state.iteration, "run": {"max_epochs": 3}}
    if event in {Events.EPOCH_COMPLETED, Events.DATALOADER_STOP_ITERATION, ice.OptimizerEvents.OPTIMIZER_STEP_SKIPPED}:
        at = 16  # there has been one by then
    whole = Training(tmp_path / "whole", event=event).train(max_epochs=3)
    assert_same_run(whole, *resumed(tmp_path, at, **settings)[1:])


def with_generators(kind):
    own = torch.Generator().manual_seed(3)
    if kind == "loader":
        return DataLoader(Noisy(), 4, shuffle=True, generator=own)
    if kind == "workers":
        return DataLoader(Noisy(), 4, shuffle=True, generator=own, num_workers=1)
    if kind == "sampler":
        return DataLoader(Noisy(), 4, sampler=WeightedRandomSampler([1.0] * 26, 26, generator=own))
    return DataLoader(Noisy(), batch_sampler=BatchSampler(RandomSampler(Noisy(), generator=own), 4, drop_last=False))


@pytest.mark.parametrize("at", [3, 8, 16])
@pytest.mark.parametrize("kind", ["loader", "workers", "sampler", "batch sampler"])
def test_data_with_a_generator_of_its_own(tmp_path, kind, at):
    run = {"max_epochs": 3}
    whole = Training(tmp_path / "whole", data=with_generators(kind)).train(**run)
    first = Training(tmp_path / "run", data=with_generators(kind))
    with pytest.raises(Stops):
        first.train(until=at, **run)
    second = Training(tmp_path / "run", data=with_generators(kind))
    second.checkpoint.resume(second.trainer)
    second.train(**run)
    assert_same_run(whole, second, at)


@pytest.mark.parametrize("at", [4, 5, 6, 7, 8, 11, 14])
@pytest.mark.parametrize("run", [{"epoch_length": 5, "max_epochs": 4}, {"epoch_length": 10, "max_epochs": 2}])
def test_epochs_that_are_no_passes(tmp_path, run, at):
    whole = Training(tmp_path / "whole").train(**run)
    _, second, began = resumed(tmp_path, at + (at % run["epoch_length"] == 0), run=run)
    assert_same_run(whole, second, began)


class ToldItsEpoch(Sampler):
    """What a ``DistributedSampler`` is to one process."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 26

    def __iter__(self):
        yield from torch.randperm(26, generator=torch.Generator().manual_seed(self.epoch)).tolist()


def told_its_epoch(training):
    sampler = training.data.sampler
    training.trainer.add_event_handler(Events.EPOCH_STARTED, lambda engine: sampler.set_epoch(engine.state.epoch))


@pytest.mark.parametrize("at", [4, 6, 11])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("run", [{"epoch_length": 5, "max_epochs": 4}, {"epoch_length": 10, "max_epochs": 2}])
def test_epochs_that_are_no_passes_of_a_sampler_that_is_told_its_epoch(tmp_path, run, workers, at):
    def made(folder):
        data = DataLoader(Noisy(), 4, sampler=ToldItsEpoch(), num_workers=workers)
        return Training(folder, data=data, also=told_its_epoch)

    whole = made(tmp_path / "whole").train(**run)
    with pytest.raises(Stops):
        made(tmp_path / "run").train(until=at, **run)
    second = made(tmp_path / "run")
    second.checkpoint.resume(second.trainer)
    second.train(**run)
    assert_same_run(whole, second, at)


@pytest.mark.parametrize("at", [3, 6, 9])
@pytest.mark.parametrize("workers", [0, 1])
def test_generators_that_somebody_draws_from_between_an_iterator_and_its_first_batch(tmp_path, workers, at):
    def draws(training):
        # An epoch that is cut has its successor's iterator at once, before the handlers of its end.
        training.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=5), training.trainer.terminate_epoch)
        training.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: torch.rand(()))
        training.trainer.add_event_handler(Events.GET_BATCH_STARTED, lambda: torch.rand(()))

    whole = Training(tmp_path / "whole", also=draws, workers=workers).train()
    assert_same_run(whole, *resumed(tmp_path, at, also=draws, workers=workers)[1:])


@pytest.mark.parametrize("at", [4, 8, 12])
def test_a_number_of_iterations(tmp_path, at):
    whole = Training(tmp_path / "whole").train(max_iters=17)
    _, second, began = resumed(tmp_path, at, run={"max_iters": 17})
    assert_same_run(whole, second, began)


@pytest.mark.parametrize("tail", ["carry", "drop"])
@pytest.mark.parametrize("at", [*range(1, 7), *range(8, 14), *range(15, 21)])
def test_tails(tmp_path, tail, at):
    run = {"max_epochs": 3}
    whole = Training(tmp_path / "whole", tail=tail).train(**run)
    assert_same_run(whole, *resumed(tmp_path, at, tail=tail, run=run)[1:])


def ema(training):
    handler = EMAHandler(training.model, momentum=0.2)
    handler.attach(training.trainer, event=training.optimizer.events.OPTIMIZER_STEP_COMPLETED)
    training.to_save["ema"] = handler.ema_model


def metrics(training):
    def pairs(out):
        return out[0].float(), out[1]

    precision = Precision(output_transform=pairs)
    made = {
        "precision": precision,
        "fbeta": Fbeta(1.0, output_transform=pairs),
        "confusion": ConfusionMatrix(3, output_transform=pairs),
        "epoch": EpochMetric(lambda p, y: float((p.argmax(1) == y).float().mean()), output_transform=pairs),
        "running": RunningAverage(Accuracy(output_transform=pairs)),
    }
    for name, metric in made.items():
        metric.attach(training.trainer, name)
        if name != "running":
            training.trainer.state.metrics.pop(name, None)
    training.to_save |= made


def evaluator(training):
    def step(engine, batch):
        training.model.eval()
        with torch.no_grad():
            return training.model(batch[0]), batch[1]

    engine = Engine(step)
    Accuracy().attach(engine, "accuracy")
    training.trainer.add_event_handler(
        Events.ITERATION_COMPLETED(every=2) | Events.EPOCH_COMPLETED,
        lambda: engine.run(DataLoader(Noisy(), 9, shuffle=True)),
    )
    stopping = EarlyStopping(100, lambda engine: engine.state.metrics["accuracy"], training.trainer)
    engine.add_event_handler(Events.COMPLETED, stopping)
    training.to_save["stopping"] = stopping
    engine.add_event_handler(
        Events.COMPLETED, lambda: training.log.append(f"1 {training.trainer.state.iteration} {engine.state.metrics}")
    )


def ignites_schedule(training):
    schedule = PiecewiseLinear(training.optimizer, "weight_decay", [(0, 0.1), (20, 0.9)])
    training.trainer.add_event_handler(Events.ITERATION_STARTED, schedule)
    training.to_save["schedule"] = schedule


def numbers_of_its_own(training):
    training.trainer.state_dict_user_keys.append("best")
    training.trainer.state.best = 0.0

    def keep(engine):
        engine.state.best += random.random() + np.random.rand()  # noqa: NPY002, S311
        training.log.append(f"1 {engine.state.iteration} {engine.state.best!r}")

    training.trainer.add_event_handler(Events.ITERATION_COMPLETED, keep)


@pytest.mark.parametrize("at", [2, 6, 9, 13])
@pytest.mark.parametrize("also", [ema, metrics, evaluator, ignites_schedule, numbers_of_its_own])
def test_with(tmp_path, also, at):
    whole = Training(tmp_path / "whole", also=also).train(max_epochs=3)
    _, second, began = resumed(tmp_path, at, also=also, run={"max_epochs": 3})
    assert_same_run(whole, second, began)


@pytest.mark.parametrize("at", [2, 6, 9, 13])
def test_what_is_attached_after_the_checkpoint(tmp_path, at):
    class Late(Training):
        def train(self, **settings):
            self.trainer.add_event_handler(Events.STARTED, lambda: random.random())  # noqa: S311
            self.trainer.add_event_handler(Events.EPOCH_STARTED, lambda: random.random())  # noqa: S311
            self.to_save["late"].attach(self.trainer, "late")
            self.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: self.count())
            self.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: self.count())
            return super().train(**settings)

    class Counter:
        value = 0.0

        def state_dict(self):
            return {"value": self.value}

        def load_state_dict(self, state):
            self.value = state["value"]

    def count(self):
        self.counter.value += random.random()  # noqa: S311

    def counter(training):
        training.to_save["counter"] = training.counter = Counter()
        training.to_save["late"] = RunningAverage(output_transform=lambda out: out[2], alpha=0.5)

    Late.count = count
    whole = Late(tmp_path / "whole", also=counter, event=Events.ITERATION_COMPLETED | Events.EPOCH_COMPLETED).train()
    first = Late(tmp_path / "run", also=counter, event=Events.ITERATION_COMPLETED | Events.EPOCH_COMPLETED)
    with pytest.raises(Stops):
        first.train(until=at)
    second = Late(tmp_path / "run", also=counter, event=Events.ITERATION_COMPLETED | Events.EPOCH_COMPLETED)
    second.checkpoint.resume(second.trainer)
    began = second.trainer.state.iteration
    second.train()
    assert_same_run(whole, second, began)


def test_resumed_again_and_again(tmp_path):
    whole = Training(tmp_path / "whole").train(max_epochs=3)
    for at in (3, 4, 4 + 1, 9, 16):
        part = Training(tmp_path / "run", every=2)
        part.checkpoint.resume(part.trainer)
        with pytest.raises(Stops):
            part.train(until=at, max_epochs=3)
    last = Training(tmp_path / "run")
    last.checkpoint.resume(last.trainer)
    began = last.trainer.state.iteration
    last.train(max_epochs=3)
    assert_same_run(whole, last, began)


@pytest.mark.parametrize("at", [3, 9, 14])
def test_resumed_to_more_epochs(tmp_path, at):
    whole = Training(tmp_path / "whole").train(max_epochs=4)
    first = Training(tmp_path / "run", event=Events.ITERATION_COMPLETED | Events.EPOCH_COMPLETED)
    if at == 14:
        first.train(max_epochs=2)
    else:
        with pytest.raises(Stops):
            first.train(until=at, max_epochs=2)
    second = Training(tmp_path / "run")
    second.checkpoint.resume(second.trainer)
    second.train(max_epochs=4)
    whole.to_save["optimizer"], second.to_save["optimizer"] = whole.optimizer.inner, second.optimizer.inner
    assert_same_run(whole, second, at)  # but for what our optimizer notes of its plan, which was another one


@pytest.mark.parametrize("at", [3, 9])
def test_a_run_that_was_terminated_goes_on(tmp_path, at):
    whole = Training(tmp_path / "whole").train(max_epochs=3)
    first = Training(tmp_path / "run")
    first.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=at), lambda: first.trainer.terminate())
    first.train(max_epochs=3)
    second = Training(tmp_path / "run")
    second.checkpoint.resume(second.trainer)
    assert second.trainer.state.iteration == at
    second.train(max_epochs=3)
    assert_same_run(whole, second, at)


@pytest.mark.parametrize("event", [Events.ITERATION_COMPLETED, ice.OptimizerEvents.OPTIMIZER_STEP_COMPLETED])
def test_a_run_terminated_at_an_epochs_last_micro_batch_goes_on_with_the_next_epoch(tmp_path, event):
    whole = Training(tmp_path / "whole").train(max_epochs=3)
    first = Training(tmp_path / "run", event=event)
    first.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=LENGTH), lambda: first.trainer.terminate())
    first.train(max_epochs=3)
    second = Training(tmp_path / "run", event=event)
    Training.scramble(99)
    second.checkpoint.resume(second.trainer)
    assert second.optimizer.clocks == first.optimizer.clocks
    assert second.trainer.state.iteration == LENGTH
    second.train(max_epochs=3)
    assert_equal(second.everything(), whole.everything())


@pytest.mark.parametrize("at", [LENGTH - 2, LENGTH, 2 * LENGTH - 2, 2 * LENGTH])
def test_the_step_that_the_end_of_a_run_takes_is_saved_too(tmp_path, at):
    training = Training(tmp_path / "run", event=ice.OptimizerEvents.OPTIMIZER_STEP_COMPLETED, tail="carry")
    training.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=at), lambda: training.trainer.terminate())
    training.train(max_epochs=2)
    steps = range(1, math.ceil(at / 3) + 1)
    assert training.optimizer.clocks["step"] == steps[-1]
    assert {file.name for file in (tmp_path / "run").iterdir()} == {f"checkpoint_{step}.pt" for step in steps}


@pytest.mark.parametrize("at", [4, 8, 12])
def test_a_run_without_data(tmp_path, at):
    def made(folder):
        training = Training(folder)
        step = training.trainer._process_function
        training.trainer._process_function = lambda engine, _: step(
            engine,
            (torch.rand(4, 6) + random.random(), torch.tensor([0, 1, 2, 0])),  # noqa: S311
        )
        training.data = None
        return training

    run = {"max_epochs": 2, "epoch_length": LENGTH}
    whole = made(tmp_path / "whole").train(**run)
    with pytest.raises(Stops):
        made(tmp_path / "run").train(until=at, **run)
    second = made(tmp_path / "run")
    second.checkpoint.resume(second.trainer)
    began = second.trainer.state.iteration
    second.train(**run)
    assert_same_run(whole, second, began)


@pytest.mark.parametrize("at", [3, 4])
def test_a_training_in_each_iteration_of_another_one_begins_anew(tmp_path, at):
    def made(folder):
        training = Training(folder)
        rates = []
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        inner = ice.Optimizer(sgd, accumulation_steps=2, processors=[ice.schedules.cosine()])
        engine = ice.create_trainer(model, inner, torch.nn.functional.mse_loss)
        engine.add_event_handler(inner.event("STEP_COMPLETED"), lambda: rates.append(inner.param_groups[0]["lr"]))
        data = [(torch.ones(2, 3), torch.ones(2, 1))] * 5
        training.to_save |= {"inner": engine, "inner model": model, "inner optimizer": inner}
        training.checkpoint = ice.Checkpoint(training.to_save, folder, n_saved=None)
        training.checkpoint.attach(training.trainer, Events.ITERATION_COMPLETED)
        training.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: engine.run(data, max_epochs=2))
        return training, rates

    whole, expected = made(tmp_path / "whole")
    whole.train()
    first, _ = made(tmp_path / "run")
    with pytest.raises(Stops):
        first.train(until=at)
    second, rates = made(tmp_path / "run")
    second.checkpoint.resume(second.trainer)
    second.train()
    assert rates == expected[-len(rates) :]
    assert rates[:6] == expected[:6]  # of each, from its own beginning
    assert_same_run(whole, second, at)


@pytest.mark.parametrize("at", [4, 9])
def test_an_iterator_of_a_loader_inside_of_other_data(tmp_path, at):
    def made():
        return Unsized(DataLoader(Noisy(), 4, shuffle=True))

    run = {"max_epochs": 2}
    whole = Training(tmp_path / "whole", data=made()).train(**run)
    with pytest.raises(Stops):
        Training(tmp_path / "run", data=made()).train(until=at, **run)
    second = Training(tmp_path / "run", data=made())
    Training.scramble(99)
    second.checkpoint.resume(second.trainer)
    second.train(**run)
    assert_same_run(whole, second, at)


def of_a_first_loss_only(folder, *, saves):
    """Windows of 2 that a short one ends: the loss is in each 3rd micro-batch, the step at an epoch's end, after 5."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = ice.schedules.cosine(total=20, unit="iteration")
    optimizer = ice.Optimizer(sgd, accumulation_steps=2, processors=[schedule])

    def train_step(engine, batch):
        if (engine.state.iteration - 1) % LENGTH == 2:
            optimizer.backward(model(batch).square().mean())

    trainer = Engine(train_step)
    optimizer.attach(trainer)
    rates = []
    trainer.add_event_handler(optimizer.event("STEP_COMPLETED"), lambda: rates.append(optimizer.param_groups[0]["lr"]))
    checkpoint = ice.Checkpoint({"trainer": trainer, "model": model, "optimizer": optimizer}, folder)
    if saves:
        checkpoint.attach(trainer, Events.ITERATION_COMPLETED(once=4))
    else:
        checkpoint.resume(trainer)
    trainer.run([torch.ones(4, 3)] * LENGTH, max_epochs=2)
    return rates


@pytest.mark.parametrize("counted", [True, False])
def test_an_optimizer_without_a_loss_of_late_goes_on_at_its_last_one(tmp_path, counted):
    """Also from an older file, which says nothing of it beside the run's place; the optimizer's state does."""
    rates = of_a_first_loss_only(tmp_path, saves=True)
    if not counted:
        (file,) = tmp_path.iterdir()
        content = checkpoint_file.read(file)
        for position in content["ice_engine"]["positions"]:
            del position["counted"]
            del position["places"]
        checkpoint_file.write(file, content)
    assert of_a_first_loss_only(tmp_path, saves=False) == rates
    assert len(rates) == 2
