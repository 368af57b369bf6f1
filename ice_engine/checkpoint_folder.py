"""The files of one checkpoint in one folder: written whole, found again, and passed over where they are damaged."""

import contextlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ignite.handlers import DiskSaver

from ice_engine import checkpoint_file
from ice_engine.checkpoint_names import Names
from ice_engine.errors import ArgumentValueError, CheckpointError

logger = logging.getLogger(__name__)

_TICK = 1_000_000  # nanoseconds, which file systems tell apart


class Folder(DiskSaver):
    """A save handler of Ignite's, whose files are whole or not there.

    Args:
        path: The folder; made if it is not there.
        save_on_rank: The rank that writes.

    Raises:
        ArgumentValueError: If it is a file.
        CheckpointError: If it cannot be made.
    """

    def __init__(self, path: Path, save_on_rank: int) -> None:
        if path.exists() and not path.is_dir():
            message = f"save_handler must be a folder, got {path}, which is a file"
            raise ArgumentValueError(message)
        try:
            super().__init__(path, create_dir=True, require_empty=False, save_on_rank=save_on_rank)
        except OSError as err:
            message = f"{path} cannot be made: {err}; give a save_handler that can be written to"
            raise CheckpointError(message) from err

    def __call__(self, checkpoint: Mapping[str, Any], filename: str, metadata: Any = None) -> None:  # noqa: ARG002 - Ignite gives it
        """Write a file; at return it is whole and on the disk, and the newest, also by a clock that goes backwards."""
        file = self.dirname / filename
        checkpoint_file.write(file, checkpoint)
        with contextlib.suppress(OSError):  # it is written; another one may be removed at this moment
            newest = max((o.lstat().st_mtime_ns for o in self.dirname.glob(f"*{file.suffix}") if o != file), default=0)
            if file.stat().st_mtime_ns <= newest:
                os.utime(file, ns=(newest + _TICK, newest + _TICK))

    def remove(self, filename: str) -> None:
        """Remove a file, if it is there; one that cannot be removed is named in the log."""
        try:
            (self.dirname / filename).unlink(missing_ok=True)
        except OSError as err:  # nothing is lost: what was to be kept is there
            logger.warning("%s stays, as it cannot be removed: %s", self.dirname / filename, err)


def whole_files(folder: Path, names: Names) -> list[tuple[float, str]]:
    """Return priority and name of the files of *folder* that are named so, the newest whole one last.

    Those that are newer, and damaged, are named in the log.

    Raises:
        CheckpointError: If there are files, and all are damaged.
    """
    found = names.found_in(folder)
    rejected = []
    while found and (problem := checkpoint_file.damage(folder / found[-1][1])) is not None:
        rejected.append(f"{folder / found.pop()[1]} is damaged: {problem}")
        logger.warning("%s; it is passed over", rejected[-1])
    if rejected and not found:
        message = f"no checkpoint is whole: {'; '.join(rejected)}. Move them away to start afresh"
        raise CheckpointError(message)
    return found
