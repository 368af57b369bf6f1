"""Sharded checkpoints: written by some ranks, read by others, and never half.

The oracle is a plain torch optimizer in one process that was never interrupted. Gradients are given, the same on all
ranks: what is tested is the state.
"""

import functools
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, distribute_tensor

import ice_engine as ice
from ice_engine.distributed import world
from ice_engine.distributed.metadata import read_metadata
from ice_engine.distributed.rounds import Kind, rounds
from ice_engine.errors import ArgumentTypeError, ArgumentValueError, CheckpointError
from tests.distributed.launch import launch, watch
from tests.forked import CONTEXT

SAVED, MORE = 3, 2  # steps before the checkpoint, and after it
CLOCKS = {"step": 3, "attempt": 4, "skipped": 1, "iteration": 9}


class Network(torch.nn.Module):
    """Shapes that two ranks cannot halve, a bias of one entry, and a buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = torch.nn.Linear(3, 5)
        self.head = torch.nn.Linear(5, 1)
        self.register_buffer("seen", torch.tensor([float(seed)]))


def names_of(model: torch.nn.Module) -> list[str]:
    return [name.removeprefix("module.") for name, _ in model.named_parameters()]


def build(kind: str, seed: int) -> tuple[torch.nn.Module, ice.Optimizer]:
    model: torch.nn.Module = Network(seed)
    if kind == "fsdp":
        fully_shard(model.body)
        fully_shard(model)
    if kind == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    named = list(model.named_parameters())
    groups = [{"params": named[:2]}, {"params": named[2:], "lr": 0.02}]
    # Of one form: left open, all but DTensors are stepped by the fused one, which rounds in another way.
    adamw = functools.partial(torch.optim.AdamW, lr=0.01, foreach=False)
    return model, ice.Optimizer(adamw, groups, sharding="zero1" if kind == "zero" else None)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for number, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(100 * step + number)
            gradient = torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        optimizer.step()


def whole(value: Any) -> Any:
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def gathered(model: torch.nn.Module, optimizer: ice.Optimizer) -> dict[str, Any]:
    """Return all state by name, in one piece, on every rank."""
    inner = optimizer.inner.optim if isinstance(optimizer.inner, ZeroRedundancyOptimizer) else optimizer.inner
    state = {
        f"{name}.{key}": whole(value)
        for name, p in zip(names_of(model), model.parameters(), strict=True)
        for key, value in inner.state.get(p, {}).items()
    }
    if isinstance(optimizer.inner, ZeroRedundancyOptimizer):
        shards: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(shards, state)
        state = {key: value for shard in shards for key, value in shard.items()}
    return {
        **{name.removeprefix("module."): whole(value) for name, value in model.state_dict().items()},
        **state,
        **{f"lr {i}": group["lr"] for i, group in enumerate(optimizer.param_groups)},
    }


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    if found.keys() != expected.keys():
        return sorted(found.keys() ^ expected.keys())
    return [
        key for key, value in expected.items() if not torch.equal(torch.as_tensor(found[key]), torch.as_tensor(value))
    ]


def uninterrupted() -> Iterator[dict[str, Any]]:
    """State when it is saved, and MORE steps later, of a run in one process."""
    model, optimizer = build("plain", seed=0)
    for steps in (range(SAVED), range(SAVED, SAVED + MORE)):
        train(model, optimizer.inner, steps)
        yield gathered(model, optimizer)


def save_kinds(folder: Path, kinds: list[str]) -> None:
    for kind in kinds:
        model, optimizer = build(kind, seed=0)
        train(model, optimizer, range(SAVED))
        optimizer._clocks.counts.update(CLOCKS)
        trainer = Engine(lambda engine, batch: None)
        trainer.state.epoch_length, trainer.state.iteration, trainer.state.max_epochs = 7, 9, 3
        if world.rank() > 0:
            model.get_buffer("module.seen" if kind == "ddp" else "seen").fill_(99.0)
        objects = {"model": model, "optimizer": optimizer, "trainer": trainer}
        ice.save_sharded(folder / f"{kind}{world.world_size()}", objects)


def load_kinds(folder: Path, kinds: list[str]) -> dict[str, Any]:
    outcome: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        for kind in kinds:
            model, optimizer = build(kind, seed=1)
            trainer = Engine(lambda engine, batch: None)
            ice.load_sharded(path, {"model": model, "optimizer": optimizer, "trainer": trainer})
            loaded = gathered(model, optimizer)
            train(model, optimizer, range(SAVED, SAVED + MORE))
            clocks = optimizer._clocks.counts
            outcome[f"{path.name} to {kind}"] = (loaded, gathered(model, optimizer), clocks, trainer.state.iteration)
    return outcome


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_kinds(folder, ["plain"])
    launch(save_kinds, 2, folder, ["ddp", "zero", "fsdp"])
    launch(save_kinds, 3, folder, ["zero", "fsdp"])
    return folder


@pytest.mark.soak
@pytest.mark.distributed
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("world_size", "kinds"), [(1, ["plain"]), (2, ["ddp", "zero", "fsdp"]), (3, ["zero", "fsdp"])])
def test_any_world_loads_what_any_other_saved(saved: Path, world_size: int, kinds: list[str]) -> None:
    outcomes = launch(load_kinds, world_size, saved, kinds) if world_size > 1 else [load_kinds(saved, kinds)]

    at_save, later = uninterrupted()
    for outcome in outcomes:
        assert len(outcome) == 6 * len(kinds)
        for case, (loaded, trained, clocks, iteration) in outcome.items():
            assert (case, differences(loaded, at_save)) == (case, [])
            assert (case, differences(trained, later)) == (case, [])
            assert (clocks, iteration) == (CLOCKS, 9)


@pytest.mark.soak
@pytest.mark.distributed
def test_ranks_write_what_they_hold_and_what_all_hold_once(saved: Path) -> None:
    for case, ranks in {"ddp2": 2, "zero2": 2, "zero3": 3, "fsdp3": 3}.items():
        metadata = read_metadata(saved / case / ".metadata")
        writers: dict[str, set[str]] = {}
        for index, info in metadata.storage_data.items():
            assert isinstance(index, MetadataIndex)
            writers.setdefault(index.fqn, set()).add(info.relative_path)
        moments = [key for key in writers if key.endswith("exp_avg")]
        assert len(moments) == 4
        assert set().union(*(writers[key] for key in moments)) == {f"__{rank}_0.distcp" for rank in range(ranks)}
        if "fsdp" not in case:
            assert all(len(files) == 1 for files in writers.values())
        else:
            assert len(writers["optimizer.state.body.weight.exp_avg"]) == ranks
        assert writers["model.seen"] == {"__0_0.distcp"}


# -- damage -----------------------------------------------------------------------------------------------------


def commit_anew(folder: Path) -> None:
    """What somebody who means harm does: make digests and marker fit what he changed."""
    content = json.loads((folder / "manifest.json").read_text())
    for name in content["files"]:
        data = (folder / name).read_bytes()
        content["files"][name] = (len(data), hashlib.sha256(data).hexdigest())
    (folder / "manifest.json").write_text(json.dumps(content))
    (folder / "COMMIT").write_text(hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest())


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


class Bomb:
    def __reduce__(self) -> Any:
        return Path("boom").touch, ()


def bomb_metadata(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Bomb()))
    commit_anew(folder)


def bomb_dotted(folder: Path) -> None:
    # torch.distributed.checkpoint.metadata.os.mkdir("boom"), in a module of which some names are allowed
    module, name, made = (
        b"\x8c" + bytes([len(text)]) + text for text in (b"torch.distributed.checkpoint.metadata", b"os.mkdir", b"boom")
    )
    (folder / ".metadata").write_bytes(b"\x80\x04" + module + name + b"\x93" + made + b"\x85R.")
    commit_anew(folder)


def bomb_object(folder: Path) -> None:
    """Plain data under "trainer" becomes a pickle that runs; the rest of the folder is as it was."""
    metadata = read_metadata(folder / ".metadata")
    info = metadata.storage_data[MetadataIndex("trainer")]
    buffer = io.BytesIO()
    torch.save(Bomb(), buffer)
    part = folder / info.relative_path
    info.offset, info.length = part.stat().st_size, buffer.tell()
    with part.open("ab") as file:
        file.write(buffer.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    commit_anew(folder)


def lead_out(folder: Path) -> None:
    metadata = read_metadata(folder / ".metadata")
    for info in metadata.storage_data.values():
        info.relative_path = "../elsewhere"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    commit_anew(folder)


def list_strange(folder: Path) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    content["files"]["../elsewhere"] = (0, "")
    (folder / "manifest.json").write_text(json.dumps(content))
    (folder / "COMMIT").write_text(hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest())


def newer(folder: Path) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**content, "version": 2}))
    (folder / "COMMIT").write_text(hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest())


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "first bit": (lambda f: flip(f / "__0_0.distcp", 0), "__0_0.distcp is damaged: its sha256 is not the manifest's"),
    "last bit": (lambda f: flip(f / "__0_0.distcp", -1), "__0_0.distcp is damaged: its sha256 is not the manifest's"),
    "bit of metadata": (lambda f: flip(f / ".metadata", 99), ".metadata is damaged: its sha256"),
    "truncated": (
        lambda f: os.truncate(f / "__0_0.distcp", 99),
        "__0_0.distcp is damaged: truncated, 99 bytes instead",
    ),
    "longer": (lambda f: (f / ".metadata").write_bytes(bytes(10**6)), ".metadata is damaged: too long"),
    "missing part": (lambda f: (f / "__0_0.distcp").unlink(), "__0_0.distcp is damaged: missing"),
    "missing metadata": (lambda f: (f / ".metadata").unlink(), ".metadata is damaged: missing"),
    "missing manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json is damaged: missing"),
    "bit of manifest": (lambda f: flip(f / "manifest.json", 30), "manifest.json is damaged: its sha256 is not the one"),
    "bit of marker": (
        lambda f: flip(f / "COMMIT", 30),
        "manifest.json is damaged: its sha256 is not the one in COMMIT",
    ),
    "no marker": (lambda f: (f / "COMMIT").unlink(), "has no COMMIT marker: it was never finished"),
    "nothing": (lambda f: f.rename(f.with_name("gone")), "there is no such folder"),
    "newer": (newer, "checkpoint of version 2, this ice_engine reads 1"),
    "pickle in metadata": (bomb_metadata, ".metadata is refused: it asks for"),
    "dotted name in metadata": (
        bomb_dotted,
        ".metadata is refused: it asks for torch.distributed.checkpoint.metadata.os.mkdir",
    ),
    "pickle in plain data": (bomb_object, "cannot be read: UnpicklingError: Weights only load failed"),
    "way out in metadata": (lead_out, "leads to '../elsewhere', which is no part of it"),
    "way out in manifest": (list_strange, "manifest.json is damaged: it lists '../elsewhere'"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_and_nothing_is_loaded(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_kinds(tmp_path, ["plain"])
    damage, message = DAMAGE[case]
    damage(tmp_path / "plain1")
    model, optimizer = build("plain", seed=1)
    train(model, optimizer, range(1))
    before = gathered(model, optimizer)
    objects = {"model": model, "optimizer": optimizer, "trainer": Engine(lambda engine, batch: None)}

    with pytest.raises(CheckpointError) as caught:
        ice.load_sharded("plain1", objects)

    assert message in str(caught.value)
    assert differences(gathered(model, optimizer), before) == []
    assert objects["trainer"].state.iteration == 0
    assert not Path("boom").exists()


def test_the_bombs_go_off_where_nobody_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_kinds(tmp_path, ["plain"])
    for bomb in (bomb_metadata, bomb_dotted):
        bomb(Path("plain1"))
        pickle.loads(Path("plain1/.metadata").read_bytes())  # noqa: S301 - to show that the bombs are some
        assert Path("boom").exists()
        shutil.rmtree("boom") if Path("boom").is_dir() else Path("boom").unlink()


def load_damaged(folder: Path) -> tuple[str, list[str]]:
    model, optimizer = build("zero", seed=1)
    before = gathered(model, optimizer)
    try:
        ice.load_sharded(folder, {"model": model, "optimizer": optimizer})
    except CheckpointError as error:
        return str(error), differences(gathered(model, optimizer), before)
    return "loaded", []


@pytest.mark.soak
@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_every_rank_hears_of_a_damaged_part(tmp_path: Path) -> None:
    launch(save_kinds, 3, tmp_path, ["zero"])
    flip(tmp_path / "zero3" / "__1_0.distcp", 500)

    outcomes = launch(load_damaged, 2, tmp_path / "zero3")

    assert outcomes[0] == outcomes[1]
    message, changed = outcomes[0]
    assert "__1_0.distcp is damaged: its sha256 is not the manifest's" in message
    assert changed == []


# -- a save that fails -------------------------------------------------------------------------------------------


class Large(torch.nn.Module):
    """Enough for a write that takes a while."""

    def __init__(self, value: float, megabytes: int = 48) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.full((megabytes << 16,), value) for _ in range(4))


def fail_and_recover(folder: Path) -> dict[str, str]:
    """What each failed save says; each leaves a folder without a checkpoint, into which the next one saves."""
    said: dict[str, str] = {}
    objects = {"model": Large(1.0, megabytes=1)}

    def attempt(case: str, objects: dict[str, Any], name: str = "next") -> None:
        try:
            ice.save_sharded(folder / name, objects)
        except CheckpointError as error:
            said[case] = str(error)
        assert not (folder / name / "COMMIT").exists()
        dist.barrier()

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, limits[1]))  # the disk is full after 256 KiB
    attempt("full", objects)
    if world.rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = sorted(path.name for path in (folder / "next").iterdir())
    broken = Engine(lambda engine, batch: None)
    broken.state_dict = lambda: 1 / 0  # type: ignore[method-assign,return-value]
    attempt("state", {**objects, "trainer": broken})
    attempt("objects", {"trainer": broken, **(objects if world.rank() == 0 else {})})
    attempt("folder", objects, "next" if world.rank() == 0 else "other")
    ice.save_sharded(folder / "next", objects)
    return {**said, "left": ", ".join(left)}


@pytest.mark.soak
@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_what_fails_on_one_rank_is_an_error_on_all_and_the_folder_can_be_used_again(tmp_path: Path) -> None:
    outcomes = launch(fail_and_recover, 2, tmp_path)

    assert outcomes[0] == outcomes[1]
    said = outcomes[0]
    assert said["full"].startswith(f"saving {tmp_path}/next: rank 1: ")
    assert "rank 0" not in said["full"]
    assert "File too large" in said["full"] or "PytorchStreamWriter" in said["full"]
    assert said["state"] == f"saving {tmp_path}/next: rank 0: ZeroDivisionError: division by zero"
    there = f"{tmp_path}/next of"
    assert said["objects"] == (
        f"save_sharded() differs between ranks: {there} trainer, model on rank 0, {there} trainer on rank 1; "
        "give all the same"
    )
    assert f"{there} model on rank 0, {tmp_path}/other of model on rank 1; give all the same" in said["folder"]
    assert "__1_0.distcp" in said["left"]
    assert "COMMIT" not in said["left"]
    restored = Large(0.0, megabytes=1)
    ice.load_sharded(tmp_path / "next", {"model": restored})
    assert all(bool((weight == 1.0).all()) for weight in restored.weights)


def die_while_writing(folder: Path) -> str:
    model = Large(1.0)
    ice.save_sharded(folder / "first", {"model": model})
    if world.rank() == 1:
        part = folder / "second" / "__1_0.distcp"

        def kill() -> None:
            while not (part.exists() and part.stat().st_size):
                time.sleep(0.0005)
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=kill, daemon=True).start()
    try:
        ice.save_sharded(folder / "second", {"model": Large(2.0)})
    except CheckpointError as error:
        said = str(error)
        # Outlives its error: the others must not need this rank's end to hear of it.
        (folder / f"heard by {world.rank()}").touch()
        while len(list(folder.glob("heard by *"))) < dist.get_world_size() - 1:
            time.sleep(0.01)
        return said
    return "saved"


@pytest.mark.soak
@pytest.mark.distributed
@pytest.mark.timeout(300)
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_rank_killed_while_it_writes_leaves_the_checkpoint_before(tmp_path: Path, world_size: int) -> None:
    outcomes = watch(die_while_writing, world_size, tmp_path, timeout=200)

    assert outcomes[1].exitcode == -signal.SIGKILL
    for outcome in outcomes[0], *outcomes[2:]:
        assert outcome.error is None
        message = outcome.value
        assert f"saving {tmp_path}/second: lost the connection" in message
        assert "rank 1 does not answer any more" in message
    with pytest.raises(CheckpointError, match="second: the folder has no COMMIT marker"):
        ice.load_sharded(tmp_path / "second", {"model": Large(0.0)})
    restored = Large(0.0)
    ice.load_sharded(tmp_path / "first", {"model": restored})
    assert all(bool((weight == 1.0).all()) for weight in restored.weights)


def save_beside_the_default_group(folder: Path) -> float:
    value = torch.tensor([1.0 + world.rank()])
    if world.rank() == 0:
        pending = dist.all_reduce(value, async_op=True)
    ice.save_sharded(folder / "beside", {"model": Large(1.0, megabytes=1)})
    model = Large(0.0, megabytes=1)
    ice.load_sharded(folder / "beside", {"model": model})
    if world.rank() == 1:
        pending = dist.all_reduce(value, async_op=True)
    pending.wait()
    return float(value + model.weights[0][0])


def save_alone(folder: Path) -> None:
    if world.rank() == 1:
        rounds().exchange(Kind.GATE, [], "iteration 7 (epoch 1)")  # as in a run
    ice.save_sharded(folder / "alone", {"model": Large(1.0, megabytes=1)})


@pytest.mark.soak
@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_a_collective_of_the_users_may_be_under_way(tmp_path: Path) -> None:
    assert launch(save_beside_the_default_group, 2, tmp_path) == [4.0, 4.0]


def save_models_that_differ(folder: Path) -> list[str]:
    rank = dist.get_rank()
    models = torch.nn.Linear(4, 1 + rank), torch.nn.ModuleDict({f"stage{rank}": torch.nn.Linear(1, 1)})
    said = []
    for number, model in enumerate(models):
        with pytest.raises(CheckpointError) as error:
            ice.save_sharded(folder / str(number), {"model": model})
        said.append(str(error.value).removeprefix(f"saving {folder / str(number)}: "))
    return said


@pytest.mark.distributed
def test_a_model_that_differs_between_ranks_is_refused(tmp_path: Path) -> None:
    """Its tensors would be taken for pieces of one, or be a model that no rank has, and none could load it."""
    end = "; a model that is split over ranks has its parameters on all of them, as DTensors"
    first = f"'model.weight' is of shape (1, 4) on rank 0, of shape (2, 4) on rank 1{end}"
    second = f"'model.stage0.weight' is of shape (1, 1) on rank 0, not there on rank 1{end}"
    assert launch(save_models_that_differ, 2, tmp_path) == [[first, second]] * 2
    assert not [*tmp_path.iterdir()]


@pytest.mark.soak
@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_a_save_on_one_rank_only_is_an_error_there(tmp_path: Path) -> None:
    outcomes = watch(save_alone, 2, tmp_path)

    for outcome in outcomes:
        assert "rank 0 needs all ranks, at save_sharded(); rank 1 goes on training, at iteration 7" in outcome.error
    assert not (tmp_path / "alone").exists()


# -- one process -------------------------------------------------------------------------------------------------


def test_a_finished_checkpoint_and_foreign_files_are_never_overwritten(tmp_path: Path) -> None:
    ice.save_sharded(tmp_path / "a", {"model": Network(0)})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").touch()

    with pytest.raises(CheckpointError, match="a: the folder holds a finished checkpoint, which is never overwritten"):
        ice.save_sharded(tmp_path / "a", {"model": Network(1)})
    with pytest.raises(CheckpointError, match=r"b: the folder holds other files, such as 'thesis\.tex'"):
        ice.save_sharded(tmp_path / "b", {"model": Network(1)})

    model = Network(2)
    ice.load_sharded(tmp_path / "a", {"model": model})
    assert torch.equal(model.body.weight, Network(0).body.weight)
    assert (tmp_path / "b" / "thesis.tex").exists()


def test_a_folder_without_permission_or_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file"):
        ice.save_sharded(tmp_path / "file", {"model": Network(0)})
    with pytest.raises(CheckpointError, match="file"):
        ice.save_sharded(tmp_path / "file" / "below", {"model": Network(0)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "head", torch.nn.Linear(5, 2)), "'model.head.weight' had shape (1, 5), now (2, 5)"),
        (lambda m: setattr(m, "tail", torch.nn.Linear(1, 1)), "only the model has 'model.tail.weight'"),
        (lambda m: delattr(m, "head"), "only the checkpoint has 'model.head.weight', 'model.head.bias'"),
    ],
)
def test_a_model_that_changed_is_refused(change: Callable[[Any], None], message: str, tmp_path: Path) -> None:
    ice.save_sharded(tmp_path / "a", {"model": Network(0)})
    model = Network(1)
    change(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    with pytest.raises(CheckpointError) as caught:
        ice.load_sharded(tmp_path / "a", {"model": model})

    assert message in str(caught.value)
    assert differences(model.state_dict(), before) == []


def test_an_optimizer_that_does_not_fit_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    model, optimizer = build("plain", seed=0)
    train(model, optimizer, range(SAVED))
    ice.save_sharded(tmp_path / "a", {"model": model, "optimizer": optimizer})
    other = Network(1)
    fewer = ice.Optimizer(torch.optim.AdamW(list(other.named_parameters())[:3]))

    with pytest.raises(CheckpointError, match=r"only the state dict has 'head\.bias'") as caught:
        ice.load_sharded(tmp_path / "a", {"model": other, "optimizer": fewer})
    assert str(caught.value).endswith("To begin it anew, leave 'optimizer' out of what is loaded")
    with pytest.raises(CheckpointError, match="holds no 'ema'; it has model, optimizer"):
        ice.load_sharded(tmp_path / "a", {"model": other, "ema": Engine(lambda engine, batch: None)})

    assert torch.equal(other.body.weight, Network(1).body.weight)
    assert not fewer.state
    ice.load_sharded(tmp_path / "a", {"model": other})  # as the error says
    assert torch.equal(other.body.weight, model.body.weight)


def test_state_follows_names_into_other_groups_and_places_where_there_are_no_names(tmp_path: Path) -> None:
    model, optimizer = build("plain", seed=0)
    train(model, optimizer, range(SAVED))
    ice.save_sharded(tmp_path / "named", {"optimizer": optimizer})
    nameless = ice.Optimizer(torch.optim.AdamW(model.parameters(), lr=0.5))
    train(model, nameless, range(1))
    ice.save_sharded(tmp_path / "nameless", {"optimizer": nameless})
    other = Network(1)
    turned = ice.Optimizer(torch.optim.AdamW(list(other.named_parameters())[::-1], lr=0.5))
    straight = ice.Optimizer(torch.optim.AdamW(other.named_parameters(), lr=0.1))

    ice.load_sharded(tmp_path / "named", {"optimizer": turned})
    ice.load_sharded(tmp_path / "nameless", {"optimizer": straight})

    for source, target, lr in ((optimizer, turned, 0.5), (nameless, straight, 0.5)):
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(source.state[p]["exp_avg"], target.state[q]["exp_avg"])
        assert target.param_groups[0]["lr"] == lr
    assert [name for name, _ in turned.named_parameters()] == [name for name, _ in other.named_parameters()][::-1]


def test_wrappers_leave_no_trace_in_the_names(tmp_path: Path) -> None:
    ice.save_sharded(tmp_path / "a", {"model": torch.compile(Network(0))})
    model = Network(1)
    model.body = torch.compile(model.body)

    ice.load_sharded(tmp_path / "a", {"model": model})

    assert torch.equal(model.head.weight, Network(0).head.weight)


def test_torch_reads_the_folder_as_its_own(tmp_path: Path) -> None:
    ice.save_sharded(tmp_path / "a", {"model": Network(0)})
    state = {"model": Network(1).state_dict()}

    with pytest.warns(UserWarning, match="single process"):
        load(state, checkpoint_id=tmp_path / "a")

    assert differences(state["model"], Network(0).state_dict()) == []


def test_lbfgs_and_its_lists_of_tensors_are_saved(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = ice.Optimizer(torch.optim.LBFGS([("weight", weight)]))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weight - torch.arange(3.0)).pow(4).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    ice.save_sharded(tmp_path / "a", {"optimizer": optimizer})
    copy = torch.nn.Parameter(weight.detach().clone())
    restored = ice.Optimizer(torch.optim.LBFGS([("weight", copy)]))
    ice.load_sharded(tmp_path / "a", {"optimizer": restored})

    expected, found = optimizer.state[weight], restored.state[copy]
    assert expected.keys() == found.keys()
    assert expected["n_iter"] == found["n_iter"] > 0
    assert all(torch.equal(a, b) for a, b in zip(expected["old_dirs"], found["old_dirs"], strict=True))


def test_what_cannot_be_saved_is_named_with_its_place_and_leaves_no_folder(tmp_path: Path) -> None:
    trainer = Engine(lambda engine, batch: None)
    trainer.state_dict = lambda: {"a": 1, "b": [2, {"c": Path("x")}]}  # type: ignore[method-assign]

    with pytest.raises(CheckpointError, match=r"trainer\['b'\]\[1\]\['c'\] is PosixPath, which cannot be saved safely"):
        ice.save_sharded(tmp_path / "a", {"trainer": trainer})

    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("objects", "error", "message"),
    [
        ([1], ArgumentTypeError, "objects must be a dict of objects by name, got list"),
        ({"model.ema": Network(0)}, ArgumentValueError, "'model.ema' cannot be an object's name"),
        ({"step": 3}, ArgumentTypeError, "'step' must have state_dict and load_state_dict, int has not"),
        ({"sgd": torch.optim.SGD([torch.ones(1)])}, ArgumentTypeError, "'sgd' is SGD; wrap it: ice.Optimizer"),
    ],
)
def test_wrong_objects_are_refused(objects: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    for function in (ice.save_sharded, ice.load_sharded):
        with pytest.raises(error) as caught:
            function(tmp_path / "a", objects)
        assert message in str(caught.value)


def save_at_once(folder: Path, value: float, start: Any) -> None:
    model = Large(value, megabytes=1)
    start.wait()
    try:
        ice.save_sharded(folder, {"model": model})
    except CheckpointError:
        os._exit(1)


def test_of_two_jobs_that_save_into_one_folder_one_wins_and_the_other_is_refused(tmp_path: Path) -> None:
    for attempt in range(4):
        start = CONTEXT.Barrier(2)
        folder = tmp_path / str(attempt)
        jobs = [CONTEXT.Process(target=save_at_once, args=(folder, value, start)) for value in (1.0, 2.0)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join(60)
        codes = [job.exitcode for job in jobs]
        assert sorted(codes, key=str) == [0, 1]
        model = Large(0.0, megabytes=1)
        ice.load_sharded(folder, {"model": model})
        assert {float(v) for w in model.weights for v in w.detach().unique()} == {1.0 + codes.index(0)}
