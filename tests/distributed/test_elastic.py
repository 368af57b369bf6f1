"""Ranks that come and go: torchrun starts them anew, and the run goes on as if nothing had been."""

import json
import math
import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine
from torch.nn.parallel import DistributedDataParallel

import ice_engine as ice
from ice_engine.data_position import shared_out
from ice_engine.distributed.ddp import DDPSync
from ice_engine.errors import CheckpointError
from tests.distributed import torchrun
from tests.distributed.launch import launch
from tests.distributed.restarted import BATCH, EPOCHS, ITEMS, MICRO_BATCH, Network, Training

pytestmark = pytest.mark.distributed

SCRIPT = "tests/distributed/restarted.py"
STEPS = 18
# Else a rank may read where one of the start before was: github.com/pytorch/pytorch/issues/135712.
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


def curve(folder: Path, rounding: float = 0.0) -> dict[int, float]:
    """Return the loss by step; steps that were taken twice, by as many ranks, have the same one to the last bit."""
    lines = [json.loads(line) for line in (folder / "curve").read_text().splitlines()]
    found = {line["step"]: line["loss"] for line in lines}
    assert all(math.isclose(found[line["step"]], line["loss"], rel_tol=rounding) for line in lines), lines
    return found


def end(folder: Path) -> dict[Any, Any]:
    found: dict[Any, Any] = torch.load(folder / "end.pt", weights_only=True)
    return found


def assert_same_bits(folder: Path, whole: Path) -> None:
    assert curve(folder) == curve(whole)
    assert list(curve(folder)) == list(range(1, STEPS + 1))
    torch.testing.assert_close(end(folder), end(whole), rtol=0, atol=0)


def assert_same_but_for_rounding(folder: Path, whole: Path) -> None:
    torch.testing.assert_close(curve(folder, rounding=1e-5), curve(whole), rtol=1e-5, atol=0)
    torch.testing.assert_close(end(folder), end(whole), rtol=1e-3, atol=1e-6)


def test_a_killed_worker_changes_no_bit_of_a_run_that_torchrun_restarts(tmp_path, undisturbed):
    seed = random.SystemRandom().randrange(10**6)
    chance = random.Random(seed)  # noqa: S311
    kill = (
        f"{chance.randrange(3)}:{chance.randint(1, EPOCHS * ITEMS // (3 * MICRO_BATCH))}:{chance.uniform(0, 0.02):.4f}"
    )
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


def _go_on(folder: Path) -> tuple[int, int, int]:
    training = Training(folder)
    training.run()
    return training.optimizer.accumulation_steps, training.trainer.state.epoch_length, training.trainer.state.iteration


def test_three_ranks_go_on_bit_by_bit(tmp_path, undisturbed):
    launch(_stopped, 3, tmp_path, 8)
    launch(_go_on, 3, tmp_path)
    assert_same_bits(tmp_path, undisturbed / "plain")


def _laid_out() -> list[Any]:
    model = DistributedDataParallel(Network(noise=True), bucket_cap_mb=0.1)
    for parameter in [*model.parameters()][1:]:
        parameter.grad = torch.randn_like(parameter)
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    buffers, drawn = [b.clone() for b in model.buffers()], torch.get_rng_state()
    sync = DDPSync(model)
    none = sync.layout()
    sync.lay_out([4, 1, 0, 7, 6, 5, 3, 2])
    torch.testing.assert_close([p.grad for p in model.parameters()], before, rtol=0, atol=0)
    torch.testing.assert_close([*model.buffers()], buffers, rtol=0, atol=0)
    same = torch.equal(torch.get_rng_state(), drawn)
    model(torch.ones(2, 6)).sum().backward()  # DDP tells of its buckets once it has had a forward
    return [none, sync.layout(), same]


def test_buckets_are_made_without_a_trace():
    assert launch(_laid_out, 2) == [[[], [4, 1, 0, 7, 6, 5, 3, 2], True]] * 2


@pytest.mark.parametrize(
    ("over", "said"), [(False, "1 of the 15 micro-batches that the epoch has had are"), (True, "")]
)
def test_what_cannot_be_shared_out_is_trained_once_more(caplog, over, said):
    position = {"taken": 5, "length": 8, "over": over, "loader": None, "random": None}
    shared = shared_out([position] * 3, 2, position, before=3, now=2)
    assert shared == {**position, "taken": 7}
    assert said in caplog.text
    assert bool(caplog.text) is bool(said)


def test_the_place_of_a_loader_that_keeps_it_is_of_as_many_ranks():
    position = {"taken": 5, "length": 8, "over": False, "loader": {"at": 5}, "random": None}
    with pytest.raises(CheckpointError, match=r"where the loaders of 3 ranks were in their data, and now there are 2"):
        shared_out([position] * 3, 2, position, before=3, now=2)
    over = {**position, "over": True}
    assert shared_out([over] * 3, 2, over, before=3, now=2)["loader"] is None


IN_AN_EPOCH, BETWEEN_EPOCHS = 8, 12


@pytest.mark.parametrize(
    ("before", "after", "step"),
    [
        (3, 2, IN_AN_EPOCH),
        pytest.param(2, 3, IN_AN_EPOCH, marks=pytest.mark.soak),
        pytest.param(3, 2, BETWEEN_EPOCHS, marks=pytest.mark.soak),
        pytest.param(2, 3, BETWEEN_EPOCHS, marks=pytest.mark.soak),
    ],
)
def test_other_ranks_go_on_with_the_same_batches(tmp_path, undisturbed, before, after, step):
    launch(_stopped, before, tmp_path, step)
    length = ITEMS // (after * MICRO_BATCH)
    assert launch(_go_on, after, tmp_path) == [(BATCH // (after * MICRO_BATCH), length, EPOCHS * length)] * after
    assert_same_but_for_rounding(tmp_path, undisturbed / "plain")


@pytest.fixture
def two_hosts() -> Iterator[list[list[str]]]:
    """The commands that run a program on each of two hosts: network namespaces with one cable."""
    names = [f"ice-{os.getpid()}-{i}" for i in range(2)]
    cable = [f"v{os.getpid()}x{i}" for i in range(2)]
    wiring = [f"link add {cable[0]} type veth peer name {cable[1]}"]
    for i, (name, link) in enumerate(zip(names, cable, strict=True)):
        wiring += [f"netns add {name}", f"link set {link} netns {name}", f"-n {name} link set lo up"]
        wiring += [f"-n {name} addr add 10.77.0.{i + 1}/24 dev {link}", f"-n {name} link set {link} up"]
    try:
        for command in wiring:
            try:
                subprocess.run(["ip", *command.split()], check=True, capture_output=True, text=True)  # noqa: S607
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no two hosts here: ip {command}: {getattr(error, 'stderr', None) or error}")
        yield [
            ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={link}"]
            for name, link in zip(names, cable, strict=True)
        ]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)  # noqa: S607


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_a_host_that_is_lost_leaves_the_run_to_the_other(tmp_path, undisturbed, two_hosts):
    rendezvous = "--nnodes 1:2 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint 10.77.0.1:29400 --rdzv-conf "
    rendezvous += "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"
    hosts = []
    for i, prefix in enumerate(two_hosts):
        options = f"{rendezvous},is_host={1 - i} --local-addr 10.77.0.{i + 1} --nproc-per-node {2 - i}".split()
        hosts.append(torchrun.start(options, SCRIPT, str(tmp_path), prefix=prefix, SLOW="0.2", **STORE))
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "curve").exists() or len(curve(tmp_path)) < IN_AN_EPOCH:
            assert time.monotonic() < deadline, [host.kill() or host.wait() for host in hosts]
            time.sleep(0.05)
        hosts[1].kill()
        hosts[1].wait()
        code, said = hosts[0].wait(200)
    finally:
        for host in hosts:
            host.kill()

    assert code == 0, said
    assert said.count("the run of 3 ranks goes on with 2") == 1
    assert_same_but_for_rounding(tmp_path, undisturbed / "plain")


def _replanned(folder: str, resumed: bool) -> list[float]:
    """Windows of 2 in two epochs, of 24 micro-batches for one process and 12 for each of two; stopped after 4 steps."""
    world = dist.get_world_size()
    model = torch.nn.Linear(1, 1)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    processors = [ice.schedules.linear()]
    sgd = torch.optim.SGD(wrapped.parameters(), lr=1.0)
    optimizer = ice.Optimizer(sgd, accumulation_steps=2, processors=processors, on_change="replan")
    trainer = Engine(lambda _, batch: optimizer.backward(wrapped(batch).sum()))
    optimizer.attach(trainer, model=wrapped)
    checkpoint = ice.Checkpoint({"trainer": trainer, "model": wrapped, "optimizer": optimizer}, folder).attach(trainer)
    step, rates = optimizer.event("STEP_COMPLETED"), []
    if resumed:
        checkpoint.resume(trainer)
    else:
        checkpoint.attach(trainer, step(once=4))
        trainer.add_event_handler(step(once=4), trainer.terminate)
    trainer.add_event_handler(step, lambda: rates.append(optimizer.param_groups[0]["lr"]))
    trainer.run([torch.ones(1, 1)] * (24 // world), max_epochs=2)
    return rates


@pytest.mark.parametrize(("before", "after", "left"), [(1, 2, 10), (2, 1, 16)])
def test_a_schedule_replanned_for_other_ranks_ends_with_the_run(tmp_path, before, after, left):
    launch(_replanned, before, str(tmp_path), False)
    expected = [1 - step / (4 + left) for step in range(4, 4 + left)]
    for rates in launch(_replanned, after, str(tmp_path), True):
        assert rates == pytest.approx(expected)
