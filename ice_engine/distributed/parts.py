"""A flat dict of tensors and plain data, of which each rank writes its part, and reads what it needs."""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ice_engine import disk
from ice_engine.distributed import manifest, world
from ice_engine.distributed.manifest import METADATA, Manifest
from ice_engine.distributed.metadata import read_metadata
from ice_engine.distributed.together import agree, connected, fail_if, gather, group, reason, together
from ice_engine.errors import CheckpointError

Shapes: TypeAlias = dict[str, list[int]]
"""Shapes of whole parameters, by key."""


def write(folder: Path, objects: list[str], shapes: Shapes, collect: Callable[[], dict[str, Any]]) -> None:
    """Save what all ranks *collect* into *folder*; at return it is whole and on the disk. Call on every rank.

    Args:
        folder: A new folder that all ranks share.
        objects: Names for the manifest; the same on all ranks.
        shapes: Of the models; the same on all ranks.
        collect: Returns this rank's part. What several ranks have under one key is written once; DTensors are
            written by the shard.

    Raises:
        CheckpointError: On every rank, if any of them fails; the folder then holds no checkpoint.
    """
    doing = f"saving {folder}"
    agree("save_sharded()", f"{folder} of {', '.join(objects)}")
    # Collected first: what cannot be saved leaves no folder behind.
    entries = together(doing, collect)
    _check_shapes(doing, shapes)
    with ExitStack() as held:

        def begin() -> None:
            held.enter_context(manifest.alone(folder))
            manifest.clear(folder)

        together(doing, begin if world.rank() == 0 else lambda: None)
        _write_parts(doing, folder, entries)
        own = together(doing, lambda: _own_files(folder))
        told = gather(doing, json.dumps(own))
        files = {name: (size, sha) for text in told for name, (size, sha) in json.loads(text).items()}
        whole = Manifest(objects, world.world_size(), files)
        together(doing, lambda: manifest.commit(folder, whole) if world.rank() == 0 else None)


def _check_shapes(doing: str, shapes: Shapes) -> None:
    text = json.dumps(shapes)
    if len({*gather(doing, hashlib.sha256(text.encode()).hexdigest())}) == 1:
        return
    told: list[Shapes] = [json.loads(each) for each in gather(doing, text)]
    for rank, other in enumerate(told):
        for key in {**told[0], **other}:
            here, there = (f"of shape {(*each[key],)}" if key in each else "not there" for each in (told[0], other))
            if here != there:
                message = (
                    f"{doing}: {key!r} is {here} on rank 0, {there} on rank {rank}; a model that is split over ranks "
                    "has its parameters on all of them, as DTensors"
                )
                raise CheckpointError(message)


def _write_parts(doing: str, folder: Path, entries: dict[str, Any]) -> None:
    try:
        with connected(doing), _quiet():
            save(
                entries,
                storage_writer=FileSystemWriter(folder, overwrite=False),
                planner=DefaultSavePlanner(flatten_state_dict=False),
                process_group=group(),
                no_dist=world.world_size() == 1,
            )
    except CheckpointException as err:
        # Raised on all ranks, with the errors of those that failed.
        fail_if(doing, {rank: reason(cause) for rank, (cause, _) in err.failures.items()}, err)
        raise


def _own_files(folder: Path) -> dict[str, tuple[int, str]]:
    names = [path.name for path in folder.glob(f"__{world.rank()}_*.distcp")]
    names += [METADATA] if world.rank() == 0 else []
    digests = {name: manifest.digest(folder / name) for name in names}
    disk.sync(folder)
    return digests


class Parts:
    """A finished checkpoint whose files were all found whole. Make it on every rank; each reads a share of the bytes.

    Args:
        folder: Where it is.

    Raises:
        CheckpointError: On every rank, if any of them finds a file that is not as it was written.
    """

    def __init__(self, folder: Path) -> None:
        doing = f"loading {folder}"
        self._folder = folder
        self._manifest = together(doing, self._check)
        self._metadata = together(doing, lambda: read_metadata(folder / METADATA))
        self.objects = self._manifest.objects
        self.files = self._manifest.files

    def _check(self) -> Manifest:
        whole = manifest.read(self._folder)
        by_size = sorted(whole.files, key=lambda name: (-whole.files[name][0], name))
        manifest.check(self._folder, whole, by_size[world.rank() :: world.world_size()])
        return whole

    @property
    def keys(self) -> list[str]:
        """Of all tensors and plain data."""
        return list(self._metadata.state_dict_metadata)

    def tensor(self, key: str) -> tuple[torch.Size, torch.dtype] | None:
        """Return size and type of the whole tensor under *key*; None if it is plain data or not there."""
        found = self._metadata.state_dict_metadata.get(key)
        return (found.size, found.properties.dtype) if isinstance(found, TensorStorageMetadata) else None

    def read(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Fill the tensors of *wanted*, each rank its own shards, and replace what is no tensor by plain data.

        Talks to no other rank: ranks may want different keys.

        Raises:
            CheckpointError: If a key is not there, or what is there cannot be read.
        """
        missing = [key for key in wanted if key not in self._metadata.state_dict_metadata]
        if missing:
            message = f"it holds no {missing[0]!r}; it has {', '.join(self.objects)}"
            raise CheckpointError(message)
        try:
            with _quiet():
                load(
                    wanted,
                    storage_reader=_Reader(self._folder, self._metadata, self._manifest),
                    planner=_Planner(flatten_state_dict=False, flatten_sharded_tensors=False),
                    no_dist=True,
                )
        except CheckpointException as err:
            reasons = "; ".join(reason(cause) for cause, _ in err.failures.values())
            message = f"it cannot be read: {reasons}"
            raise CheckpointError(message) from err
        return wanted


class _Reader(FileSystemReader):
    """Torch's unpickles ``.metadata``, whatever is in it; this one is given what was read safely."""

    def __init__(self, folder: Path, metadata: Metadata, whole: Manifest) -> None:
        super().__init__(folder)
        for info in metadata.storage_data.values():
            if info.relative_path not in whole.files:
                message = f"{METADATA} is refused: it leads to {info.relative_path!r}, which is no part of it"
                raise CheckpointError(message)
        self._metadata = metadata

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self._metadata


class _Planner(DefaultLoadPlanner):
    """Torch's unpickles what is no tensor, whatever is in it."""

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, map_location="cpu", weights_only=True)


@contextmanager
def _quiet() -> Iterator[None]:
    # torch warns at no_dist=True, as if it had not been asked for.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield
