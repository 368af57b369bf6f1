"""A file that only grows."""

import errno
import os
from pathlib import Path


class AppendedFile:
    """Collects bytes and hands them over to the operating system in one go, past every buffer of Python's.

    So a fork of the process, which would have a copy of a buffer and write it once more when it exits, writes nothing.

    Args:
        path: The file; made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._pieces: list[bytes] = []

    def add(self, piece: bytes) -> None:
        """Put *piece* at the end, with the next :meth:`sync`."""
        self._pieces.append(piece)

    def sync(self) -> None:
        """Hand over what was added.

        Raises:
            OSError: If it cannot be written, or the file was deleted: then nobody could read it.
        """
        data = memoryview(b"".join(self._pieces))
        self._pieces.clear()
        # Both, as some file systems count no links.
        if data and not os.fstat(self._file.fileno()).st_nlink and not self._path.exists():
            raise FileNotFoundError(errno.ENOENT, "it was deleted while the run was writing it", str(self._path))
        while data:
            data = data[self._file.write(data) :]

    def close(self) -> None:
        """Hand over what is left and close the file."""
        try:
            self.sync()
        finally:
            self._file.close()
