"""The wrapper among Ignite's own handlers, against Ignite's supervised trainer and the bare optimizer."""

import copy
import io
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.contrib.engines.common import setup_tb_logging
from ignite.engine import Engine, Events, create_supervised_trainer
from ignite.handlers import (
    Checkpoint,
    DiskSaver,
    EMAHandler,
    FastaiLRFinder,
    ProgressBar,
    TensorboardLogger,
)
from ignite.handlers.param_scheduler import (
    ConcatScheduler,
    CosineAnnealingScheduler,
    LinearCyclicalScheduler,
    LRScheduler,
    ParamGroupScheduler,
    PiecewiseLinear,
    ReduceLROnPlateauScheduler,
    create_lr_scheduler_with_warmup,
)
from ignite.handlers.tensorboard_logger import GradsScalarHandler, OptimizerParamsHandler, WeightsScalarHandler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn, optim
from torch.nn.functional import mse_loss
from torch.optim import lr_scheduler

import ice_engine as ice

STEP_STARTED = ice.OptimizerEvents.OPTIMIZER_STEP_STARTED
STEP_COMPLETED = ice.OptimizerEvents.OPTIMIZER_STEP_COMPLETED
GRADIENTS_READY = ice.OptimizerEvents.OPTIMIZER_GRADIENTS_READY

DATA = list(
    zip(
        torch.randn(12, 4, 3, generator=torch.Generator().manual_seed(1)),
        torch.randn(12, 4, 2, generator=torch.Generator().manual_seed(2)),
        strict=True,
    )
)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def make_inner(model: nn.Module) -> optim.Optimizer:
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "lr": 0.05}]
    return optim.AdamW(groups, lr=0.1)


def bare_trainer() -> tuple[Engine, nn.Module, optim.Optimizer]:
    model = make_model()
    optimizer = make_inner(model)
    return create_supervised_trainer(model, optimizer, mse_loss), model, optimizer


def ice_trainer(**settings: Any) -> tuple[Engine, nn.Module, ice.Optimizer]:
    model = make_model()
    optimizer = ice.Optimizer(make_inner(model), **settings)
    return ice.create_trainer(model, optimizer, mse_loss), model, optimizer


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


def differs_from_start(model: nn.Module) -> bool:
    return any(not torch.equal(p, q) for p, q in zip(model.parameters(), make_model().parameters(), strict=True))


def lrs(optimizer: optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


# -- schedulers -------------------------------------------------------------------------------------------


def cosine(optimizer: optim.Optimizer) -> Any:
    return CosineAnnealingScheduler(optimizer, "lr", 0.1, 0.01, cycle_size=8)


def by_group(optimizer: optim.Optimizer) -> Any:
    return ParamGroupScheduler(
        [
            LinearCyclicalScheduler(optimizer, "lr", 0.2, 0.1, cycle_size=6, param_group_index=0),
            PiecewiseLinear(optimizer, "lr", [(1, 0.01), (7, 0.3)], param_group_index=1),
        ]
    )


def concatenated(optimizer: optim.Optimizer) -> Any:
    parts = [LinearCyclicalScheduler(optimizer, "lr", 0.0, 0.2, cycle_size=8), cosine(optimizer)]
    return ConcatScheduler(parts, durations=[4])


def warm_up_over_torch(optimizer: optim.Optimizer) -> Any:
    return create_lr_scheduler_with_warmup(
        lr_scheduler.ExponentialLR(optimizer, 0.9), warmup_start_value=0.0, warmup_duration=4
    )


def warm_up_over_ignite(optimizer: optim.Optimizer) -> Any:
    return create_lr_scheduler_with_warmup(
        cosine(optimizer), warmup_start_value=0.0, warmup_end_value=0.1, warmup_duration=4
    )


SCHEDULERS: dict[str, Callable[[optim.Optimizer], Any]] = {
    "LRScheduler": lambda o: LRScheduler(lr_scheduler.CosineAnnealingLR(o, 7)),
    "LRScheduler-OneCycleLR": lambda o: LRScheduler(lr_scheduler.OneCycleLR(o, 0.2, 30, cycle_momentum=False)),
    "PiecewiseLinear": lambda o: PiecewiseLinear(o, "lr", [(0, 0.1), (3, 0.2), (9, 0.0)]),
    "PiecewiseLinear-weight_decay": lambda o: PiecewiseLinear(o, "weight_decay", [(0, 0.0), (9, 0.5)]),
    "CosineAnnealingScheduler": cosine,
    "ParamGroupScheduler": by_group,
    "ConcatScheduler": concatenated,
    "create_lr_scheduler_with_warmup-torch": warm_up_over_torch,
    "create_lr_scheduler_with_warmup-ignite": warm_up_over_ignite,
    "ReduceLROnPlateauScheduler": lambda o: ReduceLROnPlateauScheduler(o, metric_name="loss", patience=1, factor=0.5),
}


def values_per_step(trainer: Engine, optimizer: optim.Optimizer, event: Any) -> list[Any]:
    seen: list[Any] = []
    trainer.add_event_handler(
        event, lambda: seen.append([(g["lr"], g["weight_decay"]) for g in optimizer.param_groups])
    )
    return seen


def report_a_plateau(engine: Engine) -> None:
    engine.state.metrics["loss"] = 1.0


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_every_ignite_scheduler_drives_it_as_it_drives_the_bare_optimizer(make: Callable[..., Any]) -> None:
    runs = []
    for trainer, model, optimizer in (bare_trainer(), ice_trainer()):
        trainer.add_event_handler(Events.ITERATION_STARTED, report_a_plateau)
        trainer.add_event_handler(Events.ITERATION_STARTED, make(optimizer))
        seen = values_per_step(trainer, optimizer, Events.ITERATION_STARTED)
        trainer.run(DATA, max_epochs=2)
        runs.append((seen, model))
    (expected, bare_model), (seen, model) = runs
    assert seen == expected
    assert len({str(values) for values in expected}) > 1
    assert_same(model, bare_model)


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_on_step_started_a_scheduler_moves_once_per_step_under_accumulation(make: Callable[..., Any]) -> None:
    trainer, _, bare = bare_trainer()
    trainer.add_event_handler(Events.ITERATION_STARTED, report_a_plateau)
    trainer.add_event_handler(Events.ITERATION_STARTED, make(bare))
    expected = values_per_step(trainer, bare, Events.ITERATION_STARTED)
    trainer.run(DATA[:4], max_epochs=2)

    trainer, _, optimizer = ice_trainer(accumulation_steps=3)
    trainer.add_event_handler(Events.STARTED, report_a_plateau)
    trainer.add_event_handler(STEP_STARTED, make(optimizer))
    seen = values_per_step(trainer, optimizer, STEP_STARTED)
    trainer.run(DATA[:10], max_epochs=2)  # windows of 3, 3, 3 and 1
    assert trainer.state.optimizer_step == 8
    assert seen == expected


def test_a_skipped_step_moves_no_scheduler_on_step_started() -> None:
    trainer, _, optimizer = ice_trainer(nonfinite="skip")
    trainer.add_event_handler(STEP_STARTED, LRScheduler(lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)))
    data = DATA[:4]
    data[1] = (data[1][0] * math.nan, data[1][1])
    trainer.run(data)
    assert trainer.state.optimizer_skipped == 1
    assert trainer.state.optimizer_step == 3
    assert lrs(optimizer) == [0.1 * 0.25, 0.05 * 0.25]


def _with_torch(optimizer: torch.optim.Optimizer, trainer: Engine) -> None:
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: scheduler.step())


BESIDE: dict[str, tuple[Callable[[Any, Engine], Any], str | None]] = {
    "Ignite's": (
        lambda o, t: t.add_event_handler(Events.ITERATION_STARTED, CosineAnnealingScheduler(o, "lr", 0.1, 0.0, 9)),
        "CosineAnnealingScheduler of 'lr' on ITERATION_STARTED",
    ),
    "Ignite's, filtered": (
        lambda o, t: t.add_event_handler(
            Events.ITERATION_COMPLETED(every=2), LRScheduler(lr_scheduler.ExponentialLR(o, 0.5))
        ),
        "LRScheduler of 'lr' on ITERATION_COMPLETED",
    ),
    "Ignite's, of each group": (
        lambda o, t: t.add_event_handler(
            Events.ITERATION_STARTED,
            ParamGroupScheduler(
                [LinearCyclicalScheduler(o, "lr", 0.1, 0.2, 4, param_group_index=group) for group in (0, 1)]
            ),
        ),
        "LinearCyclicalScheduler of 'lr' on ITERATION_STARTED and LinearCyclicalScheduler of 'lr' on",
    ),
    "torch's": (_with_torch, "what one of torch.optim.lr_scheduler writes"),
    "on STEP_STARTED": (
        lambda o, t: t.add_event_handler(STEP_STARTED, LRScheduler(lr_scheduler.ExponentialLR(o, 0.5))),
        None,
    ),
    "of another entry": (
        lambda o, t: t.add_event_handler(Events.ITERATION_STARTED, LinearCyclicalScheduler(o, "weight_decay", 0, 1, 4)),
        None,
    ),
    "of another optimizer": (
        lambda _, t: t.add_event_handler(
            Events.ITERATION_STARTED, LinearCyclicalScheduler(make_inner(make_model()), "lr", 0, 1, 4)
        ),
        None,
    ),
}


@pytest.mark.parametrize("beside", BESIDE)
def test_a_scheduler_that_a_processor_writes_over_is_said_to_have_no_effect(beside: str) -> None:
    add, said = BESIDE[beside]
    trainer, _, optimizer = ice_trainer(processors=[ice.schedules.cosine(total=20)])
    add(optimizer, trainer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ice.IceEngineWarning)
        trainer.run(DATA[:4], max_epochs=2)
    texts = [str(each.message) for each in caught if issubclass(each.category, ice.IceEngineWarning)]
    assert len(texts) == (said is not None), texts
    assert not said or said in texts[0]


# The state of Ignite's ReduceLROnPlateauScheduler holds a bound method, and so loads from no file.
RESUMABLE = {name: make for name, make in SCHEDULERS.items() if name != "ReduceLROnPlateauScheduler"}


@pytest.mark.parametrize("make", RESUMABLE.values(), ids=RESUMABLE)
def test_an_ignite_scheduler_goes_on_after_both_are_saved_and_loaded(make: Callable[..., Any]) -> None:
    trainer, bare_model, bare = bare_trainer()
    trainer.add_event_handler(Events.ITERATION_STARTED, report_a_plateau)
    trainer.add_event_handler(Events.ITERATION_STARTED, make(bare))
    trainer.run(DATA, max_epochs=2)

    def half() -> tuple[Engine, nn.Module, ice.Optimizer, Any]:
        trainer, model, optimizer = ice_trainer()
        scheduler = make(optimizer)
        trainer.add_event_handler(Events.ITERATION_STARTED, report_a_plateau)
        trainer.add_event_handler(Events.ITERATION_STARTED, scheduler)
        return trainer, model, optimizer, scheduler

    first = half()
    first[0].run(DATA, max_epochs=1)
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in first], buffer)
    buffer.seek(0)
    second = half()
    states = torch.load(buffer, weights_only=True)
    for index in (0, 1, 3, 2):  # the optimizer last, as torch's documentation says
        second[index].load_state_dict(states[index])
    second[0].run(DATA, max_epochs=2)
    assert second[0].state.optimizer_step == 24
    assert_same(second[1], bare_model)
    assert lrs(second[2]) == lrs(bare)


def test_simulating_a_schedule_leaves_it_alone() -> None:
    simulated = []
    for optimizer in (bare_trainer()[2], ice_trainer()[2]):
        torch_scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 7)
        before = copy.deepcopy(optimizer.state_dict())
        simulated.append(
            [
                LRScheduler.simulate_values(8, torch_scheduler),
                ParamGroupScheduler.simulate_values(8, by_group(optimizer).schedulers),
            ]
        )
        assert optimizer.state_dict() == before
    assert simulated[1] == simulated[0]


# -- the learning rate finder -----------------------------------------------------------------------------


def find_lr(trainer: Engine, model: nn.Module, optimizer: optim.Optimizer, **settings: Any) -> FastaiLRFinder:
    finder = FastaiLRFinder()
    arguments = {"num_iter": 40, "start_lr": 1e-4, "end_lr": 1e3, "diverge_th": 1.5, **settings}
    with finder.attach(trainer, to_save={"model": model, "optimizer": optimizer}, **arguments) as finding:
        finding.run(DATA, max_epochs=1)
    return finder


@pytest.mark.parametrize("step_mode", ["exp", "linear"])
def test_the_lr_finder_finds_what_it_finds_for_the_bare_optimizer(step_mode: str) -> None:
    bare, ours = bare_trainer(), ice_trainer()
    expected, finder = (find_lr(*run, step_mode=step_mode) for run in (bare, ours))
    assert finder.get_results() == expected.get_results()
    assert len(finder.get_results()["lr"]) > 2


@pytest.mark.parametrize("step_mode", ["exp", "linear"])
@pytest.mark.parametrize("k", [1, 5])
def test_the_lr_finder_leaves_model_state_and_clocks_as_they_were(k: int, step_mode: str) -> None:
    trainer, model, optimizer = ice_trainer(accumulation_steps=k)
    trainer.run(DATA, max_epochs=1)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    clocks = optimizer.clocks
    trainer_state = trainer.state_dict()
    steps: list[int] = []
    trainer.add_event_handler(STEP_COMPLETED, lambda engine: steps.append(engine.state.optimizer_step))
    find_lr(trainer, model, optimizer, step_mode=step_mode)
    assert steps
    torch.testing.assert_close(model.state_dict(), before[0], rtol=0, atol=0)
    after = optimizer.state_dict()
    torch.testing.assert_close(after["state"], before[1]["state"], rtol=0, atol=0)
    assert after["param_groups"] == before[1]["param_groups"]
    assert after["ice_engine"] == before[1]["ice_engine"]
    assert optimizer.clocks == clocks
    assert trainer.state_dict() == trainer_state
    assert trainer.state.optimizer_step == clocks["step"]


@pytest.mark.parametrize("step_mode", ["exp", "linear"])
def test_training_after_the_lr_finder_is_training_without_it(step_mode: str) -> None:
    trainer, bare_model, _ = bare_trainer()
    trainer.run(DATA, max_epochs=2)
    trainer, model, optimizer = ice_trainer()
    find_lr(trainer, model, optimizer, step_mode=step_mode)
    trainer.run(DATA, max_epochs=2)
    assert trainer.state.optimizer_step == 24
    assert_same(model, bare_model)


def test_a_scheduler_built_after_the_lr_finder_starts_from_the_suggestion() -> None:
    runs = []
    for trainer, model, optimizer in (bare_trainer(), ice_trainer()):
        finder = find_lr(trainer, model, optimizer)
        finder.apply_suggested_lr(optimizer)
        suggested = lrs(optimizer)
        scheduler = LRScheduler(lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t))
        trainer.add_event_handler(Events.ITERATION_STARTED, scheduler)
        seen = values_per_step(trainer, optimizer, Events.ITERATION_STARTED)
        trainer.run(DATA, max_epochs=1)
        runs.append((suggested, seen, model))
    assert runs[1][:2] == runs[0][:2]
    assert [lr for lr, _ in runs[1][1][0]] == runs[1][0]
    assert_same(runs[1][2], runs[0][2])


# -- averages, checkpoints --------------------------------------------------------------------------------


def test_the_moving_average_is_updated_once_per_step_under_accumulation() -> None:
    trainer, model, _ = ice_trainer(accumulation_steps=4)
    handler = EMAHandler(model, momentum=0.2)
    handler.attach(trainer, name="ema_momentum", event=STEP_COMPLETED)
    by_hand = copy.deepcopy(model)
    updates: list[int] = []

    @trainer.on(STEP_COMPLETED)
    def average(engine: Engine) -> None:
        updates.append(engine.state.optimizer_step)
        with torch.no_grad():
            for mean, p in zip(by_hand.parameters(), model.parameters(), strict=True):
                mean.mul_(1.0 - 0.2).add_(p, alpha=0.2)

    trainer.run(DATA[:10], max_epochs=2)  # windows of 4, 4 and 2
    assert updates == [1, 2, 3, 4, 5, 6]
    assert differs_from_start(handler.ema_model)
    assert_same(handler.ema_model, by_hand)


def test_ignites_checkpoint_loads_safely_into_ours_and_into_a_plain_optimizer(tmp_path: Path) -> None:
    trainer, bare_model, _ = bare_trainer()
    trainer.run(DATA, max_epochs=3)

    trainer, model, optimizer = ice_trainer()
    to_save = {"model": model, "optimizer": optimizer, "trainer": trainer}
    handler = Checkpoint(to_save, DiskSaver(str(tmp_path), require_empty=True), n_saved=None)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)
    trainer.run(DATA, max_epochs=2)
    files = sorted(tmp_path.glob("*.pt"))
    assert [file.name for file in files] == ["checkpoint_12.pt", "checkpoint_24.pt"]

    for file, done in zip(files, (1, 2), strict=True):
        saved = torch.load(file, weights_only=True)
        assert saved["optimizer"]["ice_engine"]["clocks"]["step"] == 12 * done
        for make in (ice_trainer, bare_trainer):
            trainer, model, optimizer = make()
            Checkpoint.load_objects({"model": model, "optimizer": optimizer, "trainer": trainer}, checkpoint=file)
            trainer.run(DATA, max_epochs=3)
            assert trainer.state.iteration == 36
            assert_same(model, bare_model)


def test_ignites_checkpoint_on_step_completed_is_named_after_the_step(tmp_path: Path) -> None:
    trainer, model, optimizer = ice_trainer(accumulation_steps=4)
    handler = Checkpoint(
        {"optimizer": optimizer},
        DiskSaver(str(tmp_path)),
        n_saved=None,
        global_step_transform=lambda engine, _: engine.state.optimizer_step,
    )
    trainer.add_event_handler(STEP_COMPLETED(every=2), handler)
    trainer.run(DATA[:10], max_epochs=2)
    assert {file.name for file in tmp_path.iterdir()} == {f"optimizer_{step}.pt" for step in (2, 4, 6)}
    assert differs_from_start(model)


def test_a_state_saved_on_step_completed_is_whole(tmp_path: Path) -> None:
    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)

    trainer, _, optimizer = ice_trainer(accumulation_steps=4, grad_scaler=scaler())
    file = tmp_path / "state.pt"
    trainer.add_event_handler(STEP_COMPLETED(once=2), lambda: torch.save(optimizer.state_dict(), file))
    after: list[Any] = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=8), lambda: after.append(optimizer.state_dict()))
    trainer.run(DATA, max_epochs=1)

    saved = torch.load(file, weights_only=True)
    assert saved["ice_engine"] == after[0]["ice_engine"]  # the loss scale and its growth included
    other = ice_trainer(accumulation_steps=4, grad_scaler=scaler())[2]
    other.load_state_dict(saved)  # a warning would say that micro-batches are lost
    assert other.state_dict()["ice_engine"] == saved["ice_engine"]
    assert other.clocks == {"step": 2, "attempt": 2, "skipped": 0, "iteration": 8}


def test_a_loaded_optimizer_goes_on_counting_steps_on_a_new_engine() -> None:
    trainer, _, optimizer = ice_trainer()
    trainer.run(DATA, max_epochs=1)
    other_trainer, _, other = ice_trainer()
    other.load_state_dict(optimizer.state_dict())
    with pytest.warns(ice.IceEngineWarning, match="goes on at step 12"):
        other_trainer.run(DATA[:4], max_epochs=1)
    assert other_trainer.state.iteration == 4
    assert other_trainer.state.optimizer_step == 16


# -- logs -------------------------------------------------------------------------------------------------


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_ignites_tensorboard_logger_writes_parameters_and_gradients_of_each_step(tmp_path: Path) -> None:
    trainer, model, optimizer = ice_trainer(accumulation_steps=4)
    trainer.add_event_handler(STEP_STARTED, PiecewiseLinear(optimizer, "lr", [(0, 0.1), (6, 0.7)]))
    norms: list[float] = []
    weights: list[float] = []
    trainer.add_event_handler(GRADIENTS_READY, lambda: norms.append(model[0].weight.grad.norm().item()))
    trainer.add_event_handler(STEP_COMPLETED, lambda: weights.append(model[0].weight.norm().item()))
    with TensorboardLogger(log_dir=str(tmp_path)) as logger:
        logger.attach(trainer, OptimizerParamsHandler(optimizer, "lr"), event_name=STEP_COMPLETED)
        logger.attach(trainer, GradsScalarHandler(model), event_name=GRADIENTS_READY)
        logger.attach(trainer, GradsScalarHandler(model, tag="then"), event_name=STEP_COMPLETED)
        logger.attach(trainer, GradsScalarHandler(model, tag="late"), event_name=Events.ITERATION_COMPLETED)
        logger.attach(trainer, WeightsScalarHandler(model), event_name=STEP_COMPLETED)
        logger.attach_opt_params_handler(
            trainer, event_name=STEP_COMPLETED(every=2), optimizer=optimizer, param_name="weight_decay", tag="seldom"
        )
        trainer.run(DATA[:10], max_epochs=2)
    seen = scalars(tmp_path)
    for tag in ("lr/group_0", "lr/group_1"):
        assert seen[tag] == [(step, pytest.approx(0.1 * step)) for step in range(1, 7)]
    assert seen["grads_norm/0/weight"] == [(i, pytest.approx(norm)) for i, norm in enumerate(norms, start=1)]
    assert seen["weights_norm/0/weight"] == [(i, pytest.approx(norm)) for i, norm in enumerate(weights, start=1)]
    assert len(norms) == len(weights) == 6
    assert seen["then/grads_norm/0/weight"] == seen["grads_norm/0/weight"]
    assert len(seen["late/grads_norm/0/weight"]) == 16  # none at the 4 iterations that filled a window
    assert [step for step, _ in seen["seldom/weight_decay/group_0"]] == [2, 4, 6]


def test_ignites_logging_in_one_call_takes_it(tmp_path: Path) -> None:
    trainer, _, optimizer = ice_trainer()
    with setup_tb_logging(str(tmp_path), trainer, optimizers=optimizer, log_every_iters=4):
        trainer.run(DATA, max_epochs=1)
    seen = scalars(tmp_path)
    assert seen["lr/group_1"] == [(step, pytest.approx(0.05)) for step in (4, 8, 12)]


def test_the_progress_bar_shows_every_iteration_and_the_clocks() -> None:
    trainer, model, _ = ice_trainer(accumulation_steps=4)
    screen = io.StringIO()
    bar = ProgressBar(file=screen, mininterval=0.0)
    bar.attach(trainer, output_transform=lambda loss: {"loss": loss}, state_attributes=["optimizer_step"])
    trainer.run(DATA[:10], max_epochs=1)
    text = screen.getvalue()
    assert "[10/10] 100%" in text
    assert "loss=" in text
    assert "optimizer_step=2" in text
    assert differs_from_start(model)


# -- the trainer itself -----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 4])
def test_ignites_supervised_trainer_with_accumulation_gives_the_same_bits(k: int) -> None:
    bare_model = make_model()
    trainer = create_supervised_trainer(bare_model, make_inner(bare_model), mse_loss, gradient_accumulation_steps=k)
    trainer.run(DATA, max_epochs=2)
    trainer, model, _ = ice_trainer(accumulation_steps=k)
    trainer.run(DATA, max_epochs=2)
    assert trainer.state.optimizer_step == 24 // k
    assert_same(model, bare_model)  # k is a power of two, so that dividing first or last rounds alike


def test_ignites_supervised_trainer_takes_it_as_a_plain_optimizer() -> None:
    trainer, bare_model, _ = bare_trainer()
    trainer.run(DATA, max_epochs=2)
    model = make_model()
    create_supervised_trainer(model, ice.Optimizer(make_inner(model)), mse_loss).run(DATA, max_epochs=2)
    assert_same(model, bare_model)


def test_lbfgs_in_an_attached_engine_steps_by_its_closure() -> None:
    models = [make_model(), make_model()]
    bare = optim.LBFGS(models[0].parameters(), max_iter=3)
    optimizer = ice.Optimizer(optim.LBFGS(models[1].parameters(), max_iter=3))
    for model, opt in zip(models, (bare, optimizer), strict=True):

        def train_step(engine: Engine, batch: Any, model: nn.Module = model, opt: optim.Optimizer = opt) -> float:
            x, y = batch

            def closure() -> torch.Tensor:
                opt.zero_grad()
                loss = mse_loss(model(x), y)
                loss.backward()
                return loss

            return opt.step(closure).item()

        trainer = Engine(train_step)
        if opt is optimizer:
            optimizer.attach(trainer)
        trainer.run(DATA[:4], max_epochs=2)
    assert differs_from_start(models[1])
    assert_same(models[1], models[0])


@pytest.mark.parametrize("k", [1, 2])
def test_a_deep_copy_of_an_attached_optimizer_attaches_to_an_engine_of_its_own(k: int) -> None:
    trainer, model, optimizer = ice_trainer(accumulation_steps=k)
    trainer.add_event_handler(STEP_STARTED, LRScheduler(lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)))
    trainer.run(DATA, max_epochs=1)
    other_model, other = copy.deepcopy((model, optimizer))
    assert other.engine is None
    assert optimizer.engine is trainer
    other_trainer = ice.create_trainer(other_model, other, mse_loss)
    other_trainer.load_state_dict(trainer.state_dict())
    other_trainer.run(DATA, max_epochs=2)
    trainer.run(DATA, max_epochs=2)
    assert trainer.state.optimizer_step == other_trainer.state.optimizer_step == 24 // k
    assert_same(other_model, model)
