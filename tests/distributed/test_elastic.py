"""Ranks that come and go: torchrun starts them anew, and the run goes on as if nothing had been."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import torchrun
from tests.distributed.launch import launch
from tests.distributed.restarted import EPOCHS, ITEMS, MICRO_BATCH, Training

pytestmark = pytest.mark.distributed

SCRIPT = "tests/distributed/restarted.py"
STEPS = 18
# Of torch: without it, a restarted rank may read where a rank of the start before was, https://pytorch.org/...
STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def _undisturbed(folder: Path) -> None:
    for noise in (False, True):
        Training(folder / ("noise" if noise else "plain"), noise=noise).run()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of three ranks that nobody disturbed, ``plain`` and ``noise``."""
    folder = tmp_path_factory.mktemp("undisturbed")
    launch(_undisturbed, 3, folder)
    return folder


def curve(folder: Path) -> dict[int, float]:
    """Return the loss by step; steps that were taken twice have the same one, to the last bit."""
    lines = [json.loads(line) for line in (folder / "curve").read_text().splitlines()]
    found = {line["step"]: line["loss"] for line in lines}
    assert all(found[line["step"]] == line["loss"] for line in lines), lines
    return found


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(folder / "parameters.pt", weights_only=True)
    return found


def assert_same_bits(folder: Path, whole: Path) -> None:
    assert curve(folder) == curve(whole)
    assert list(curve(folder)) == list(range(1, STEPS + 1))
    for name, value in parameters(whole).items():
        assert torch.equal(parameters(folder)[name], value), name


def test_a_killed_worker_changes_no_bit_of_a_run_that_torchrun_restarts(tmp_path, undisturbed):
    seed = random.SystemRandom().randrange(10**6)
    chance = random.Random(seed)  # noqa: S311
    kill = f"{chance.randrange(3)}:{chance.randint(1, EPOCHS * ITEMS // (3 * MICRO_BATCH))}:{chance.uniform(0, 0.02):.4f}"
    print(f"seed {seed}: KILL={kill} (rank:iteration:seconds)")  # noqa: T201 - shown if it fails

    options = ["--standalone", "--nproc-per-node", "3", "--max-restarts", "2"]
    agent = torchrun.start(options, SCRIPT, str(tmp_path), KILL=kill, NOISE="1", **STORE)
    code, said = agent.wait()

    assert code == 0, said
    assert "exitcode: -9" in said
    assert_same_bits(tmp_path, undisturbed / "noise")


def _stopped(folder: Path, step: int) -> None:
    training = Training(folder)
    stop = training.optimizer.event("STEP_COMPLETED")(once=step)
    training.trainer.add_event_handler(stop, training.trainer.terminate)
    training.run()


def _go_on(folder: Path) -> tuple[int, list[Any]]:
    training = Training(folder)
    training.run()
    return training.optimizer.accumulation_steps, [training.trainer.state.epoch_length, training.trainer.state.iteration]


@pytest.mark.parametrize("ranks", [(3, 2), (2, 3)], ids=str)
@pytest.mark.parametrize("step", [8, 12], ids=["in an epoch", "between epochs"])
def test_other_ranks_go_on_with_the_same_batches(tmp_path, undisturbed, ranks, step):
    before, after = ranks
    launch(_stopped, before, tmp_path, step)
    for size, (length, iteration) in launch(_go_on, after, tmp_path):
        assert size * after * MICRO_BATCH == 12
        assert (length, iteration) == (ITEMS // (after * MICRO_BATCH), EPOCHS * ITEMS // (after * MICRO_BATCH))
    torch.testing.assert_close(curve(tmp_path), curve(undisturbed / "plain"), rtol=1e-5, atol=0)
    torch.testing.assert_close(parameters(tmp_path), parameters(undisturbed / "plain"), rtol=1e-4, atol=1e-6)
