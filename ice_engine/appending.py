"""A file that only grows."""

from pathlib import Path


class AppendedFile:
    """Collects bytes and hands them over to the operating system in one go, past every buffer of Python's.

    So a fork of the process, which would have a copy of a buffer and write it once more when it exits, writes nothing.

    Args:
        path: The file; made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._pieces: list[bytes] = []

    def add(self, piece: bytes) -> None:
        """Put *piece* at the end, with the next :meth:`sync`."""
        self._pieces.append(piece)

    def sync(self) -> None:
        """Hand over what was added."""
        data = memoryview(b"".join(self._pieces))
        self._pieces.clear()
        while data:
            data = data[self._file.write(data) :]

    def close(self) -> None:
        """Hand over what is left and close the file."""
        try:
            self.sync()
        finally:
            self._file.close()
