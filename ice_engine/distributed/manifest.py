"""What makes a folder of files a checkpoint: a list of them with size and digest, and a mark that is made last.

.. code-block:: text

    step_1000/
    ├── __0_0.distcp   ┐
    ├── __1_0.distcp   │ torch.distributed.checkpoint's: a part of each rank, and where to find what
    ├── .metadata      ┘
    ├── manifest.json    size and sha256 of each of them
    └── COMMIT           sha256 of the manifest; without it, the checkpoint is not whole
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ice_engine import disk
from ice_engine.errors import CheckpointError
from ice_engine.part_file import is_locked

VERSION = 1
METADATA = ".metadata"
_MANIFEST, _COMMIT = "manifest.json", "COMMIT"
_OURS = re.compile(r"__\d+_\d+\.distcp|\.metadata(\.tmp)?|manifest\.json|(COMMIT|manifest\.json)\.part")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of.

    Args:
        objects: Names of what was saved.
        world_size: Number of ranks that saved it.
        files: Size and sha256 of each file, by its name.
    """

    objects: list[str]
    world_size: int
    files: dict[str, tuple[int, str]]


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make *folder*, and keep it from other jobs meanwhile, where its file system can; ends with the process.

    Raises:
        CheckpointError: If another job is saving into it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if os.name == "nt":  # opens no folders
        yield
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        if not is_locked(lock, anyway=True):
            message = "another job is saving into the folder; save into one of its own"
            raise CheckpointError(message)
        yield
    finally:
        os.close(lock)


def clear(folder: Path) -> None:
    """Empty *folder* of a checkpoint that was never finished.

    Raises:
        CheckpointError: If it holds a finished one, or anything else.
    """
    there = sorted(path.name for path in folder.iterdir())
    if _COMMIT in there:
        message = "the folder holds a finished checkpoint, which is never overwritten; save into a new folder"
        raise CheckpointError(message)
    foreign = [name for name in there if not _OURS.fullmatch(name)]
    if foreign:
        message = f"the folder holds other files, such as {foreign[0]!r}; save into a new folder"
        raise CheckpointError(message)
    for name in there:
        (folder / name).unlink()


def digest(path: Path) -> tuple[int, str]:
    """Return size and sha256 of the file at *path*."""
    with path.open("rb", buffering=0) as file:
        return disk.digest(file)


def commit(folder: Path, manifest: Manifest) -> None:
    """Write *manifest*, then the mark that makes the checkpoint whole; both are on the disk at return.

    Raises:
        CheckpointError: If another rank's file is not there.
    """
    for name, (size, _) in manifest.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            message = f"{name}, which another rank wrote, is not there on rank 0; all ranks must share the folder"
            raise CheckpointError(message)
    text = json.dumps({"version": VERSION, **asdict(manifest)}, indent=1)
    _write(folder / _MANIFEST, text)
    _write(folder / _COMMIT, hashlib.sha256(text.encode()).hexdigest())
    disk.sync(folder.parent)


def _write(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    disk.sync(path.parent)


def read(folder: Path) -> Manifest:
    """Return the manifest of the finished checkpoint in *folder*; its files are not looked at yet.

    Raises:
        CheckpointError: If there is none, or it is not what was committed.
    """
    if not folder.is_dir():
        message = "there is no such folder"
        raise CheckpointError(message)
    if not (folder / _COMMIT).is_file():
        message = f"the folder has no {_COMMIT} marker: it was never finished. Load another checkpoint"
        raise CheckpointError(message)
    if not (folder / _MANIFEST).is_file():
        raise _damaged(folder / _MANIFEST, "missing")
    data = (folder / _MANIFEST).read_bytes()
    if hashlib.sha256(data).hexdigest().encode() != (folder / _COMMIT).read_bytes():
        raise _damaged(folder / _MANIFEST, f"its sha256 is not the one in {_COMMIT}")
    try:
        content = json.loads(data)
        version = content.pop("version")
    except (ValueError, AttributeError, KeyError, RecursionError) as err:
        raise _damaged(folder / _MANIFEST, "not a manifest") from err
    if version != VERSION:
        message = f"a checkpoint of version {version!r}, this ice_engine reads {VERSION}; install a newer one"
        raise CheckpointError(message)
    return _parsed(folder / _MANIFEST, content)


def _parsed(path: Path, content: dict[str, Any]) -> Manifest:
    try:
        files = {name: (int(size), str(sha)) for name, (size, sha) in content["files"].items()}
        manifest = Manifest([str(name) for name in content["objects"]], int(content["world_size"]), files)
    except (TypeError, ValueError, AttributeError, KeyError) as err:
        raise _damaged(path, "not a manifest") from err
    # A name with a way in it would lead out of the folder.
    strange = [name for name in files if not _OURS.fullmatch(name)]
    if strange or METADATA not in files:
        raise _damaged(path, f"it lists {strange[0]!r}" if strange else f"it does not list {METADATA}")
    return manifest


def check(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Compare files of *folder* with their sizes and digests.

    Raises:
        CheckpointError: At the first that is missing, of another size, or of another digest.
    """
    for name in names:
        size, sha = manifest.files[name]
        path = folder / name
        if not path.is_file():
            raise _damaged(path, "missing")
        found = path.stat().st_size
        if found != size:
            raise _damaged(path, f"{'truncated' if found < size else 'too long'}, {found} bytes instead of {size}")
        if digest(path) != (size, sha):
            raise _damaged(path, "its sha256 is not the manifest's; bits have changed")


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path.name} is damaged: {reason}. Nothing was loaded; load another checkpoint")
