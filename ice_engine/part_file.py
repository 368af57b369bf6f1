"""A file while it is written: under a name that no other writer has, and removed if its writer is no more."""

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

_NAME = re.compile(r".+\.[0-9a-f]{8}\.part")


@contextlib.contextmanager
def part_of(path: Path) -> Iterator[Path]:
    """Give a new, empty file beside *path*, to be renamed to it; at exit it is removed, if it was not.

    Until then this process holds a lock on it, which the system takes away when the process ends, however it ends. So
    files of writers that were killed are known, and are removed here.

    Raises:
        OSError: If it cannot be made.
    """
    _remove_orphans(path.parent)
    part, number = _create(path)
    try:
        yield part
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        os.close(number)


def _create(path: Path) -> tuple[Path, int]:
    while True:
        part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        number = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        # Until it is locked, another process may take it for one that was left.
        if is_locked(number, anyway=True) and part.exists():
            return part, number
        os.close(number)


def _remove_orphans(folder: Path) -> None:
    if fcntl is None:
        return  # they are not told from those of writers that live
    for part in folder.iterdir():
        if _NAME.fullmatch(part.name):
            with contextlib.suppress(OSError):  # gone meanwhile, or somebody else's
                number = os.open(part, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    if is_locked(number, anyway=False):
                        part.unlink(missing_ok=True)
                finally:
                    os.close(number)


def is_locked(number: int, *, anyway: bool) -> bool:
    """Lock an open file, and return whether that is done; *anyway*, where the system or its disk has no locks."""
    if fcntl is None:
        return anyway
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return anyway
    return True
