"""What the README promises about itself."""

from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler

import ice_engine as ice

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "python3 -m venv .venv && .venv/bin/pip install tox && .venv/bin/tox run -e "


def lines(file: str) -> list[str]:
    return (ROOT / file).read_text().splitlines()


@pytest.mark.parametrize("environment", ["demo", "tests"])
def test_readme_has_the_command_on_one_line(environment):
    assert COMMAND + environment in lines("README.md")


def test_ci_runs_the_test_command_of_the_readme():
    assert f"test_command='{COMMAND}tests'" in lines(".ci/run")


def test_readme_has_both_commands_of_the_same_script():
    """As the script itself gives them."""
    commands = [line.strip() for line in lines("examples/distributed.py") if line.startswith("    ")][:2]
    assert [command.split()[0] for command in commands] == ["python", "torchrun"]
    assert " | ".join(["", *(f"`{command}`" for command in commands), ""]).strip() in lines("README.md")


def test_readme_stays_below_120_lines():
    assert len(lines("README.md")) < 120


# The rows of "What a plain loop gets wrong", one test each.


def run(batches, *, weights=None, **settings):
    """Train one weight on ``weight * batch``; return its optimizer, the trainer, and the gradient of each step."""
    parameter, steps = torch.nn.Parameter(torch.zeros(())), []
    optimizer = ice.Optimizer(torch.optim.SGD([parameter], lr=1.0), **settings)

    def train_step(engine, batch):
        i = engine.state.iteration - 1
        optimizer.backward(parameter * batch, weight=None if weights is None else weights[i])

    trainer = Engine(train_step)
    optimizer.attach(trainer)
    started = ice.OptimizerEvents.OPTIMIZER_STEP_STARTED
    trainer.add_event_handler(started, lambda: steps.append(parameter.grad.item()))
    trainer.run(batches)
    return optimizer, trainer, steps


def test_row_short_last_window_is_divided_by_its_own_size():
    _, _, steps = run([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], accumulation_steps=4)
    assert steps == [2.5, 5.5]


def test_row_a_weighted_window_is_the_mean_over_all_samples():
    _, _, steps = run([1.0, 2.0], weights=[32, 29], accumulation_steps=2)
    assert steps == [pytest.approx((32 * 1.0 + 29 * 2.0) / 61)]


def test_row_a_skipped_step_moves_no_schedule_and_is_told():
    halve = ice.schedules.exponential(gamma=0.5)
    optimizer, trainer, steps = run([1.0, float("inf"), 1.0], processors=[halve], nonfinite="skip")
    assert len(steps) == 2
    assert trainer.state.optimizer_skipped == 1
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_row_a_hundred_skips_in_a_row_stop_the_run():
    with pytest.raises(ice.NonFiniteGradientError):
        run([float("inf")] * 101, nonfinite="skip")


@pytest.mark.parametrize(("unit", "lr"), [("step", 0.5), ("iteration", 0.125), ("epoch", 1.0)])
def test_row_a_schedule_counts_in_the_unit_it_was_told(unit, lr):
    halve = ice.schedules.exponential(gamma=0.5, unit=unit)
    optimizer, _, _ = run([1.0] * 4, processors=[halve], accumulation_steps=2)
    assert optimizer.param_groups[0]["lr"] == lr


def test_row_gradients_are_unscaled_before_they_are_clipped():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    _, _, steps = run([0.5], grad_scaler=scaler, clip=ice.clip_norm(1.0))
    assert steps == [0.5]


def test_row_averaged_weights_stay_on_a_skipped_step():
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = ice.Optimizer(torch.optim.SGD(model.parameters(), lr=1.0), nonfinite="skip")
    trainer = Engine(lambda engine, batch: optimizer.backward(model.weight.sum() * batch))
    optimizer.attach(trainer)
    average, moved = EMAHandler(model, momentum=0.5), []
    average.attach(trainer, event=ice.OptimizerEvents.OPTIMIZER_STEP_COMPLETED)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: moved.append(average.ema_model.weight.item()))
    trainer.run([1.0, float("inf"), 1.0])
    assert moved[0] == moved[1] != moved[2]


def test_two_optimizers_train_on_one_engine():
    generator, critic = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
    of_generator = ice.Optimizer(
        torch.optim.SGD(generator.parameters(), lr=0.1), name="generator", accumulation_steps=2
    )
    of_critic = ice.Optimizer(torch.optim.SGD(critic.parameters(), lr=0.1), name="critic")

    def train_step(engine, batch):
        of_critic.backward(critic(generator(batch).detach()).mean())
        critic.requires_grad_(False)
        of_generator.backward(-critic(generator(batch)).mean())
        critic.requires_grad_(True)

    trainer = Engine(train_step)
    of_generator.attach(trainer)
    of_critic.attach(trainer)
    trainer.run([torch.ones(3, 2)] * 4)
    assert (trainer.state.generator_step, trainer.state.critic_step) == (2, 4)
