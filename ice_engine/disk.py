"""What makes bytes on a disk something to rely on: their digest, and the wait until a name is there for good."""

import hashlib
import os
from pathlib import Path
from typing import Any

_BLOCK = 1 << 20


def digest(file: Any, size: int | None = None) -> tuple[int, str]:
    """Return how many bytes *file*, open and unbuffered or not, has from here on, at most *size*, and their sha256."""
    sha, read, block = hashlib.sha256(), 0, memoryview(bytearray(_BLOCK))
    while got := file.readinto(block if size is None else block[: min(size - read, _BLOCK)]):
        sha.update(block[:got])
        read += got
    return read, sha.hexdigest()


def sync(folder: Path) -> None:
    """Wait until the names of *folder*'s files are on the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
