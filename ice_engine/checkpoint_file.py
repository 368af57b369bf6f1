"""One checkpoint in one file, which is whole or is not there, and knows by its digest that it is.

It is a file of ``torch.save``. That is a zip archive, whose comment, the last bytes of the file, says what the sha256
of all bytes before it is: torch and others read it as any other, and it stays checked wherever it is copied.
"""

import json
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ice_engine import disk
from ice_engine.errors import CheckpointError
from ice_engine.part_file import part_of

VERSION = 1
_END = b"PK\x05\x06"  # of an archive's last record, which is 22 bytes long without a comment
_LENGTH = 2  # bytes of that record that say how long the comment is: the only ones after what the digest is of


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Put *content* into the file at *path*: at return it is whole, read back and on the disk.

    Until then there is what was there before.

    Raises:
        CheckpointError: If it cannot be written; nothing is left of it.
    """
    try:
        with part_of(path) as part:
            torch.save(content, part)
            _check(part)
            _seal(part)
            part.replace(path)
            disk.sync(path.parent)
    except Exception as err:
        free = _free(path.parent)
        message = f"{path} cannot be written: {str(err).rstrip('. ')}{free}. Checkpoints that were there still are"
        raise CheckpointError(message) from err


def _free(folder: Path) -> str:
    """Return how much room there is: of a full disk, torch says that it is at an unexpected position."""
    try:
        return f"; {shutil.disk_usage(folder).free:,} bytes are free there"
    except OSError:  # it is not there, or may not be looked into
        return ""


def _check(path: Path) -> None:
    """Compare what was written with the checksums that torch took in memory."""
    if (problem := damage(path)) is not None:
        message = f"it was written and then found damaged: {problem}"
        raise CheckpointError(message)


def _seal(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-22, os.SEEK_END)
        if file.read(4) != _END:
            message = "torch.save did not write a zip archive"
            raise CheckpointError(message)
        size = file.seek(-_LENGTH, os.SEEK_END)
        file.seek(0)
        comment = json.dumps({"ice_engine": VERSION, "size": size, "sha256": disk.digest(file, size)[1]}).encode()
        file.seek(size)
        file.write(len(comment).to_bytes(_LENGTH, "little") + comment)
        file.flush()
        os.fsync(file.fileno())


def damage(path: Path) -> str | None:
    """Return what is wrong with the file at *path*; None if every byte is as it was written.

    Of a file that was written without a digest, such as by Ignite, the checksums of its entries are compared.
    """
    try:
        if not path.stat().st_size:
            return "empty"
        seal = _seal_of(path)
        if seal is not None:
            with path.open("rb", buffering=0) as file:
                whole = disk.digest(file, seal["size"])[1] == seal["sha256"]
            return None if whole else "its sha256 is not the one that it was written with; bits have changed"
        with zipfile.ZipFile(path) as archive:
            changed = archive.testzip()
    except FileNotFoundError:
        return "not there"
    except Exception as err:  # noqa: BLE001 - damaged archives raise whatever there is
        return f"truncated, or no checkpoint ({type(err).__name__}: {err})"
    return None if changed is None else f"bits of its entry {changed} have changed"


def _seal_of(path: Path) -> dict[str, Any] | None:
    """Return what the file says of itself; None if it has nothing to say, as one that Ignite wrote.

    Raises:
        ValueError: If that, or the file, is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        comment = archive.comment
    if not comment:
        return None
    seal = json.loads(comment)
    try:
        found = {"ice_engine": int(seal["ice_engine"]), "size": int(seal["size"]), "sha256": str(seal["sha256"])}
    except (KeyError, TypeError) as err:
        message = "its last bytes are no digest"
        raise ValueError(message) from err
    if found["size"] != path.stat().st_size - len(comment) - _LENGTH:
        message = "its digest is of a file of another size"
        raise ValueError(message)
    return found


def version(path: Path) -> int:
    """Return the version of the format of the file at *path*, which is not damaged; 0 if it says none."""
    seal = _seal_of(path)
    return 0 if seal is None else int(seal["ice_engine"])


def read(path: Path, *, mapped: bool = False) -> Any:
    """Return what the file at *path* holds, on the CPU.

    Args:
        path: The file.
        mapped: Leave tensors on the disk until they are looked at; the file must stay as it is until then.

    Raises:
        CheckpointError: If it is of a newer version, or cannot be read without running what it holds.
    """
    try:
        found = version(path)
    except (zipfile.BadZipFile, OSError, ValueError) as err:
        raise CheckpointError(str(err)) from err
    if found > VERSION:
        message = f"it is of version {found}, this ice_engine reads {VERSION}; install a newer one"
        raise CheckpointError(message)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as err:
        raise CheckpointError(str(err).rstrip(". ")) from err
