"""The examples, run as a user runs them: in a process and a folder of their own."""

import dataclasses
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ice_engine.comparison import compare
from ice_engine.ledger import read
from tests.forked import python

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DIGITS, GAN, DISTRIBUTED = EXAMPLES / "digits.py", EXAMPLES / "gan.py", EXAMPLES / "distributed.py"
LANGUAGE_MODEL = EXAMPLES / "language_model.py"
EPOCH = re.compile(r"^epoch +(\d+) +step +(\d+) ", re.MULTILINE)
GAN_STEPS = re.compile(
    r"^(\d+) epochs in .* s: (\d+) generator steps, (\d+) discriminator steps, loss scale 65536$", re.MULTILINE
)
DRAWN = re.compile(r"^drawn digits +(\d\.\d+) of 1000 read as their labels; by digit \[(.*)\]", re.MULTILINE)
VARIETY = re.compile(r"^their variety +(\d\.\d+) of the real digits'; by digit \[(.*)\]", re.MULTILINE)
TRAINED_ON = re.compile(r"^trained for .* s, on ([\d,]+) bytes$", re.MULTILINE)
BITS = re.compile(r"^bits per byte +(\d\.\d+) of [\d,]+ held-out bytes$", re.MULTILINE)
BASELINES = re.compile(r"^gzip -9 +(\d\.\d+)\nbytes one by one +(\d\.\d+)$", re.MULTILINE)
ACCURACY = re.compile(r"^held-out accuracy +(\d\.\d+) of 360 digits", re.MULTILINE)


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]  # as `torchrun` is
PROCESSES = re.compile(r"^processes +(\d+),", re.MULTILINE)
KEPT = re.compile(r"^optimizer state +([\d,]+) numbers in process 0$", re.MULTILINE)


def run(example: Path, folder: Path, *arguments: str, processes: int = 0, timeout: float = 100) -> str:
    if not processes:
        done = python(str(example), *arguments, cwd=folder, timeout=timeout, COLUMNS="100")
    else:
        done = subprocess.run(
            [sys.executable, *TORCHRUN, str(processes), str(example), *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 10  # no progress bar where nobody watches
    return done.stdout


def digits(folder: Path, *arguments: str) -> str:
    return run(DIGITS, folder, *arguments)


def epochs(output: str) -> list[tuple[int, int]]:
    return [(int(epoch), int(step)) for epoch, step in EPOCH.findall(output)]


@pytest.fixture(scope="module")
def three_epochs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    return folder, digits(folder, "--epochs", "3")


def test_digits_prints_a_summary(three_epochs):
    folder, output = three_epochs
    assert epochs(output) == [(1, 12), (2, 24), (3, 36)]  # 45 micro-batches: 11 windows of 4, and one of 1
    assert ACCURACY.search(output)
    assert f"tensorboard --logdir {Path('runs/digits/tensorboard')}" in output
    assert len(output.splitlines()) < 15
    assert (folder / "runs/digits/digits.png").read_bytes().startswith(b"\x89PNG")


def test_digits_writes_what_tensorboard_reads(three_epochs):
    folder, _ = three_epochs
    events = EventAccumulator(str(folder / "runs/digits/tensorboard")).Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {
        "training/loss",
        "optimizer/lr/group_0",
        "optimizer/grad_norm",
        "optimizer/loss_scale",
        "optimizer/skipped",
        "validation/accuracy",
        "validation/loss",
    }
    assert [event.step for event in events.Scalars("optimizer/lr/group_0")] == list(range(1, 37))
    assert [event.step for event in events.Scalars("validation/accuracy")] == [12, 24, 36]


def test_digits_resumes_after_the_last_epoch(three_epochs, tmp_path):
    folder = tmp_path / "copy"  # the other tests look at the run of three epochs
    shutil.copytree(three_epochs[0], folder)
    output = digits(folder, "--resume", "--epochs", "4")
    assert "digits_checkpoint_3.pt: epoch 3, step 36" in output
    assert epochs(output) == [(4, 48)]
    again = digits(folder, "--resume", "--epochs", "4")
    assert epochs(again) == []
    assert "this run was complete" in again


def test_interrupted_digits_gives_the_same_numbers(three_epochs, tmp_path):
    folder, whole = three_epochs
    shutil.copytree(folder / "runs/digits", tmp_path / "here")
    (tmp_path / "here/checkpoints/digits_checkpoint_3.pt").unlink()
    resumed = digits(tmp_path, "--epochs", "3", "--out", "here", "--resume")
    assert epochs(resumed) == [(3, 36)]
    assert ACCURACY.search(resumed)[1] == ACCURACY.search(whole)[1]
    last = [line for line in whole.splitlines() if line.startswith("epoch   3")]
    assert [line for line in resumed.splitlines() if line.startswith("epoch")] == last
    events = EventAccumulator(str(tmp_path / "here/tensorboard")).Reload()
    assert [event.step for event in events.Scalars("optimizer/lr/group_0")] == list(range(1, 37))  # none twice


def test_digits_resumes_from_nothing(tmp_path):
    output = digits(tmp_path, "--resume", "--epochs", "1", "--warmup", "4")
    assert "no checkpoint in" in output
    assert epochs(output) == [(1, 12)]


@pytest.mark.parametrize("example", [DIGITS, GAN, DISTRIBUTED, LANGUAGE_MODEL], ids=lambda example: example.stem)
def test_an_example_explains_every_option(example, tmp_path):
    spec = importlib.util.spec_from_file_location(example.stem, example)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shown = run(example, tmp_path, "--help")
    options = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(module.Config)]
    assert [option for option in options if option not in shown] == []


def test_digits_learns(tmp_path):
    output = digits(tmp_path)
    assert float(ACCURACY.search(output)[1]) >= 0.97


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gan")
    return folder, run(GAN, folder, "--epochs", "2")


def test_gan_writes_its_files_and_prints_a_summary(two_epochs):
    folder, output = two_epochs
    assert GAN_STEPS.search(output).groups() == ("2", "56", "56")
    assert DRAWN.search(output)
    assert VARIETY.search(output)
    assert len(output.splitlines()) < 10
    out = folder / "runs/gan"
    assert (out / "gan.png").read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in out.glob("checkpoints/*")} == {"gan_checkpoint_1.pt", "gan_checkpoint_2.pt"}
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    tags = set(events.Tags()["scalars"])
    names = ("generator", "discriminator")
    assert tags >= {f"{name}/{key}" for name in names for key in ("lr/group_0", "loss_scale", "skipped", "weight")}
    assert tags >= {"training/generator", "training/discriminator", "generator/grad_norm", "generator/clipped_norm"}
    assert [event.step for event in events.Scalars("discriminator/lr/group_0")] == [10, 20, 30, 40, 50]


def test_interrupted_gan_draws_the_same_digits(two_epochs, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(two_epochs[0], folder)
    (folder / "runs/gan/checkpoints/gan_checkpoint_2.pt").unlink()
    output = run(GAN, folder, "--epochs", "2", "--resume")
    assert "gan_checkpoint_1.pt: epoch 1" in output
    for summary in (GAN_STEPS, DRAWN, VARIETY):
        assert summary.search(output).groups() == summary.search(two_epochs[1]).groups()
    assert (folder / "runs/gan/gan.png").read_bytes() == (two_epochs[0] / "runs/gan/gan.png").read_bytes()


def test_gan_resumes_after_the_last_epoch(two_epochs, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(two_epochs[0], folder)
    output = run(GAN, folder, "--epochs", "3", "--resume")
    assert "gan_checkpoint_2.pt: epoch 2" in output
    assert GAN_STEPS.search(output).groups() == ("3", "84", "84")


def test_gan_draws_others_with_another_seed_and_in_bf16(two_epochs, tmp_path):
    output = run(GAN, tmp_path, "--epochs", "1", "--seed", "1", "--precision", "bf16")
    assert GAN_STEPS.search(output).groups() == ("1", "28", "28")
    assert VARIETY.search(output)[0] != VARIETY.search(two_epochs[1])[0]


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_gan_draws_digits_that_a_classifier_reads(tmp_path):
    output = run(GAN, tmp_path, timeout=500)
    share, by_digit = DRAWN.search(output).groups()
    assert float(share) >= 0.97
    assert min(map(float, by_digit.split())) >= 0.85
    share, by_digit = VARIETY.search(output).groups()
    assert float(share) >= 0.8
    assert min(map(float, by_digit.split())) >= 0.6


TINY = ("--share", "0.1", "--width", "64", "--depth", "1", "--lr", "0.01", "--epochs", "2")


@pytest.fixture(scope="module")
def tiny_language_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language_model")
    return folder, run(LANGUAGE_MODEL, folder, *TINY)


def test_language_model_learns_more_than_how_frequent_bytes_are(tiny_language_model):
    _, output = tiny_language_model
    _, one_by_one = map(float, BASELINES.search(output).groups())
    assert float(BITS.search(output)[1]) < one_by_one - 0.3
    assert [line[:6] for line in output.splitlines()].count("    | ") >= 2  # what it wrote


def test_language_model_weighs_every_byte_once_and_names_its_groups(tiny_language_model):
    folder, output = tiny_language_model
    out = folder / "runs/language_model"
    lines = [line for line in read(out / "ledger.jsonl") if line["source"] == "optimizer"]
    steps = epochs(output)[-1][1]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    groups = {key.removeprefix("optimizer/lr/") for key in lines[0] if key.startswith("optimizer/lr/")}
    assert groups == {"embeddings", "default", "default.no_weight_decay"}
    for epoch in (1, 2):  # paragraphs, and so windows, of many sizes: together they are the text
        weights = [line["optimizer/weight"] for line in lines if line["epoch"] == epoch]
        assert len(set(weights)) > 5
        assert sum(weights) == int(TRAINED_ON.search(output)[1].replace(",", ""))
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("validation/loss")] == [steps // 2, steps]


def test_interrupted_language_model_writes_the_same(tiny_language_model, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_language_model[0], folder)
    out = folder / "runs/language_model"
    first, last = sorted(out.glob("checkpoint_*.pt"), key=lambda file: int(file.stem.split("_")[1]))
    last.unlink()
    output = run(LANGUAGE_MODEL, folder, *TINY, "--resume")
    assert f"{first.name}: epoch 1" in output
    whole = tiny_language_model[1]
    assert output[output.index("epoch   2") : output.index("trained for")] in whole
    assert BITS.search(output)[0] == BITS.search(whole)[0]
    ledgers = [run_of / "runs/language_model/ledger.jsonl" for run_of in (folder, tiny_language_model[0])]
    assert compare(*ledgers).is_same, compare(*ledgers)


def test_distributed_runs_in_one_process_and_resumes(tmp_path):
    output = run(DISTRIBUTED, tmp_path, "--epochs", "2", "--resume")  # from nothing
    assert epochs(output) == [(1, 12), (2, 24)]
    assert PROCESSES.search(output)[1] == "1"
    assert ACCURACY.search(output)
    assert "this run was complete" in run(DISTRIBUTED, tmp_path, "--epochs", "2", "--resume")


@pytest.mark.soak
@pytest.mark.distributed
def test_distributed_runs_in_two_processes_and_goes_on_in_one(tmp_path):
    output = run(DISTRIBUTED, tmp_path, "--epochs", "2", processes=2)
    assert epochs(output) == [(1, 12), (2, 24)]  # the windows of one process, and each line once
    assert PROCESSES.search(output)[1] == "2"
    part = int(KEPT.search(output)[1].replace(",", ""))
    output = run(DISTRIBUTED, tmp_path, "--epochs", "3", "--resume")
    assert "digits_checkpoint_2.pt: epoch 2, step 24" in output
    assert epochs(output) == [(3, 36)]
    assert part < 0.6 * int(KEPT.search(output)[1].replace(",", ""))  # ZeRO-1


@pytest.mark.soak
@pytest.mark.distributed
def test_distributed_learns_in_two_processes(tmp_path):
    assert float(ACCURACY.search(run(DISTRIBUTED, tmp_path, processes=2))[1]) >= 0.9
