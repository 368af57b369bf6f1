"""A checkpoint is looked into without being loaded, and compared with another."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ignite.engine import Events

import ice_engine as ice
from ice_engine.__main__ import main
from ice_engine.errors import CheckpointError
from ice_engine.inspection import difference, inspect


def trained(folder: Path, lr: float = 0.1) -> tuple[Path, torch.nn.Module, ice.Optimizer]:
    """Train for 2 steps of 2 micro-batches and one more micro-batch, and save."""
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    optimizer = ice.Optimizer(torch.optim.AdamW(model.named_parameters(), lr=lr), accumulation_steps=2)
    trainer = ice.create_trainer(model, optimizer, torch.nn.functional.mse_loss)
    checkpoint = ice.Checkpoint({"trainer": trainer, "model": model, "optimizer": optimizer}, folder)
    checkpoint.attach(trainer, Events.ITERATION_COMPLETED(once=5))
    trainer.run([(torch.ones(3, 2), torch.zeros(3, 1))] * 6, max_epochs=1)
    return folder / "checkpoint_5.pt", model, optimizer


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main(["inspect", *map(str, arguments)])
    return code, capsys.readouterr().out


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_what_is_in_a_checkpoint_at_which_step_and_that_it_is_whole(tmp_path, capsys):
    path, *_ = trained(tmp_path)
    code, text = said(capsys, path)
    assert code == 0
    lines = text.splitlines()
    assert lines[:4] == [
        f"{path}: {path.stat().st_size:,} bytes, whole by its sha256, format 1",
        "  optimizer: step 2, attempt 2, skipped 0, iteration 5",
        "  trainer: epoch_length 6, iteration 5, max_epochs 1",
        "  run: inside epoch 1, on 1 rank",
    ]
    table = {line.split()[0]: line.split()[1:4] for line in lines[6:10]}
    assert table["model"] == ["2", "3", "12"]
    assert table["trainer"] == ["0", "0", "0"]
    assert table["optimizer"] == ["8", "11", "44"]  # step, exp_avg and exp_avg_sq, and the open window's gradients
    assert "  optimizer.param_groups.0: lr 0.1, betas (0.9, 0.999), eps 1e-08, weight_decay 0.01, " in text
    assert text.endswith("; 2 parameters\n")


def test_every_bit_counts(tmp_path, capsys):
    path, *_ = trained(tmp_path)
    whole = path.read_bytes()
    for at in range(0, len(whole), 1999):
        flip(path, at)
        code, text = said(capsys, path)
        assert code == 1, at
        assert text.startswith(f"{path}: ")
        path.write_bytes(whole)
    path.write_bytes(whole[:-100])
    code, text = said(capsys, path)
    assert code == 1
    assert "truncated, or no checkpoint" in text


def test_two_runs_with_another_rate(tmp_path, capsys):
    one, model, _ = trained(tmp_path / "one")
    other, changed, _ = trained(tmp_path / "other", lr=0.2)
    same, _, _ = trained(tmp_path / "same")
    code, text = said(capsys, one, other)
    assert code == 1
    assert "  optimizer.param_groups.0.lr" in text
    assert "0.1 -> 0.2" in text
    a, b = (torch.load(path, weights_only=True)["model"]["weight"] for path in (one, other))
    assert f"2 of 2 elements, by at most {float((a.double() - b.double()).abs().max()):.3g}\n" in text
    assert "model.bias" in difference(inspect(one), inspect(other)).changed
    assert not torch.equal(model.weight, changed.weight)
    code, text = said(capsys, one, same)
    assert code == 0
    assert "hold the same" in text


def test_values_are_compared_to_the_bit_and_nan_is_nan(tmp_path):
    def contents(name, **values):
        torch.save(values, tmp_path / name)
        return inspect(tmp_path / name)

    nan = float("nan")
    long = torch.zeros(3_000_000)
    late = long.clone()
    late[-1] = 0.25
    first = {"nan": nan, "tensor": torch.tensor([nan, 1.0]), "flag": torch.tensor([True]), "long": long}
    a = contents("a.pt", **first, z=torch.tensor([1j]), shape=torch.ones(2), kind=1, none=torch.ones(0), mine=1)
    b = contents(
        "b.pt",
        **{**first, "long": late, "flag": torch.tensor([False])},
        z=torch.tensor([1j + 2]),
        shape=torch.ones(3),
        kind=torch.ones(1),
        none=torch.ones(0),
        yours={"deep": [1, 2]},
    )
    found = difference(a, b)
    assert found.changed == {
        "long": "1 of 3,000,000 elements, by at most 0.25",
        "flag": "1 of 1 elements, by at most 0",
        "z": "1 of 1 elements, by at most 2",
        "shape": "float32 (2,) -> float32 (3,)",
        "kind": "a value -> float32 (1,)",
    }
    assert found.same == 3
    assert found.only == (["mine"], ["yours.deep.0", "yours.deep.1"])
    assert difference(a, a).is_none


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_tensors_are_compared_by_what_is_stored_of_them(tmp_path, capsys):
    coo = torch.eye(4).to_sparse()
    twice = torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 1.0], (4, 4), check_invariants=True)
    layouts = {name: torch.eye(4).to_sparse(layout=getattr(torch, f"sparse_{name}")) for name in ("csr", "csc")}
    blocks = {name: getattr(torch.eye(4), f"to_sparse_{name}")((2, 2)) for name in ("bsr", "bsc")}
    a, b = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save({"same": coo, "twice": twice, "layout": coo, "values": coo, "places": coo, **layouts, **blocks}, a)
    less = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0]))
    others = {"layout": layouts["csr"], "values": coo * 3, "places": torch.eye(4).flip(0).to_sparse()}
    torch.save({"same": coo, "twice": twice, **others, **layouts, "csr": less.to_sparse_csr(), **blocks}, b)
    code, text = said(capsys, a, b)
    assert code == 1
    assert difference(inspect(a), inspect(b)).changed == {
        "layout": "float32 sparse_coo (4, 4) -> float32 sparse_csr (4, 4)",
        "values": "4 of 4 elements, by at most 2",
        "places": "entries in other places",
        "csr": "4 -> 3 entries",
    }
    assert "  csr     4 -> 3 entries" in text
    code, text = said(capsys, a, a)
    assert code == 0
    assert "hold the same, 9 values, to the bit" in text
    code, text = said(capsys, a)
    assert text.splitlines()[3].split() == ["same", "1", "4", "80", "0"]  # 4 entries of 4 bytes, 8 indices of 8


def test_a_sharded_checkpoint_holds_what_the_file_holds(tmp_path, capsys):
    path, model, optimizer = trained(tmp_path)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "plain.pt")
    ice.save_sharded(tmp_path / "sharded", {"model": model, "optimizer": optimizer})
    code, text = said(capsys, tmp_path / "sharded")
    assert code == 0
    assert "whole by its manifest's sha256s, in 2 files" in text
    assert "  optimizer: step 3, attempt 3, skipped 0, iteration 6" in text
    found = difference(inspect(tmp_path / "plain.pt"), inspect(tmp_path / "sharded"))
    assert not found.changed
    assert found.same >= 20
    assert all(".params." in key for key in found.only[0])
    flip(tmp_path / "sharded" / "__0_0.distcp", 100)
    code, text = said(capsys, tmp_path / "sharded")
    assert code == 1
    assert "__0_0.distcp" in text
    (tmp_path / "sharded" / "COMMIT").unlink()
    assert said(capsys, tmp_path / "sharded", path)[0] == 1


def test_of_a_folder_the_newest_whole_file_is_shown(tmp_path, capsys):
    path, *_ = trained(tmp_path)
    for number, name in enumerate(("checkpoint_6.pt", "checkpoint_7.pt")):
        (tmp_path / name).write_bytes(path.read_bytes()[: 50 + number])
        os.utime(tmp_path / name, (path.stat().st_atime, path.stat().st_mtime + 1 + number))
    code, text = said(capsys, tmp_path)
    assert code == 0
    lines = text.splitlines()
    assert lines[0].startswith("checkpoint_7.pt: truncated")
    assert lines[1].startswith("checkpoint_6.pt: truncated")
    assert lines[2:4] == ["checkpoint_5.pt: whole", ""]
    assert lines[4].startswith(f"{path}: ")
    path.unlink()
    code, text = said(capsys, tmp_path)
    assert code == 1
    assert "no checkpoint is whole" in text


def test_files_of_others_are_read_and_nothing_in_them_is_run(tmp_path, capsys):
    torch.save(torch.nn.Linear(2, 1).state_dict(), tmp_path / "plain.pt")
    code, text = said(capsys, tmp_path / "plain.pt")
    assert code == 0
    assert "whole by its entries' CRC, not ice_engine's" in text

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"model": Hostile()}, tmp_path / "hostile.pt")
    code, text = said(capsys, tmp_path / "hostile.pt")
    assert code == 1
    assert "system" in text
    assert not (tmp_path / "ran").exists()

    circle: list[object] = []
    circle.append(circle)
    torch.save(circle, tmp_path / "circle.pt")
    code, text = said(capsys, tmp_path / "circle.pt")
    assert code == 1
    assert "nested too deeply" in text


def test_what_is_not_there_is_misuse(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["inspect", str(tmp_path / "none.pt")])
    assert caught.value.code == 2
    assert "none.pt is not there" in capsys.readouterr().err
    (tmp_path / "text.pt").write_text("no archive")
    with pytest.raises(CheckpointError, match=r"text\.pt: truncated, or no checkpoint"):
        inspect(tmp_path / "text.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="COMMIT"):
        inspect(tmp_path / "empty")


MEASURE = """
import json, sys, threading
import torch
from ice_engine.__main__ import main

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def watch():
    while not done.wait(0.0005):
        seen.append(anonymous())

done, seen = threading.Event(), [anonymous()]
before = seen[0]
thread = threading.Thread(target=watch)
thread.start()
code = main(["inspect", *sys.argv[1:]])
done.set()
thread.join()
print(json.dumps([code, (max(seen) - before) // 1024, len(seen)]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize("files", [["a.pt"], ["a.pt", "b.pt"]], ids=["one", "two"])
def test_tensors_are_not_loaded(tmp_path, files):
    state = {f"{i}": torch.zeros(5_000_000) for i in range(5)}  # 100 MB
    for name in files:
        state["4"][-1] = len(name)
        torch.save(state, tmp_path / name)
        state["4"][0] += 1
    paths = [str(tmp_path / name) for name in files]
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True, check=True, timeout=90
    )
    code, megabytes, samples = json.loads(ran.stdout.splitlines()[-1])
    assert code == len(files) - 1
    assert samples > 10
    assert megabytes < 30, f"{megabytes} MB for files of 100 MB"
