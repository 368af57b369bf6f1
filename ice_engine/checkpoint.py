"""Ignite's Checkpoint that writes the new file before it removes an old one, and finds its way back."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint as IgniteCheckpoint
from ignite.handlers import DiskSaver

from ice_engine.errors import ArgumentTypeError, CheckpointError
from ice_engine.hooks import HookRegistry


class _WriteThenRemove(DiskSaver):
    """Ignite removes the old file first; when the write then fails, none is left. Here it waits for the new one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), create_dir=True, require_empty=False, atomic=True)
        self._outdated: list[str] = []

    def remove(self, filename: str) -> None:
        self._outdated.append(filename)

    def __call__(self, checkpoint: Mapping[str, Any], filename: str, metadata: Mapping[str, Any] | None = None) -> None:
        super().__call__(checkpoint, filename, metadata)
        for outdated in self._outdated:
            if outdated != filename:
                (Path(self.dirname) / outdated).unlink(missing_ok=True)
        self._outdated.clear()


class Checkpoint(IgniteCheckpoint):
    """Saves objects during a run, and resumes from the newest file.

    Takes the arguments of ``ignite.handlers.Checkpoint``. With a folder as *save_handler*, the new file
    is whole before an old one is removed, and the folder may hold files already.

    Args:
        to_save: Objects with ``state_dict`` by name; the trainer among them, so that a run goes on where it was.
        save_handler: A folder, or a save handler of Ignite's.
        filename_prefix: Prefix of the file names.
        **settings: Ignite's other arguments, such as ``n_saved``, ``score_function`` and ``global_step_transform``.

    Raises:
        ArgumentTypeError: If *to_save* is not a mapping of objects with ``state_dict``.

    Checkpoint:
        A save inside a window holds no gradients of it; the optimizer says so when it is loaded. Random
        states and the position within an epoch are not saved: save at an epoch's end.

    .. versionadded:: 0.1.0
    """

    def __init__(
        self,
        to_save: Mapping[str, Any],
        save_handler: str | Path | Callable[..., None],
        filename_prefix: str = "",
        **settings: Any,
    ) -> None:
        if not isinstance(to_save, Mapping):
            message = f"to_save must be a dict of objects by name, got {type(to_save).__name__}"
            raise ArgumentTypeError(message)
        self._folder: Path | None = None
        if isinstance(save_handler, str | Path):
            self._folder = Path(save_handler)
            save_handler = _WriteThenRemove(self._folder)
        super().__init__(to_save, save_handler, filename_prefix, **settings)

    def attach(self, engine: Engine, event: Any = Events.EPOCH_COMPLETED) -> "Checkpoint":
        """Save on *event*, after handlers such as validation that are there already.

        Args:
            engine: The trainer.
            event: An event of Ignite's or ours, with or without a filter.

        Returns:
            This object.
        """
        HookRegistry(engine).add(event, self, name="checkpoint", order=50)
        return self

    def resume(self, engine: Engine) -> Path | None:
        """Load the newest checkpoint of the folder into the objects of ``to_save``.

        Args:
            engine: The trainer; must be among ``to_save``, or its counters would start anew.

        Returns:
            The file that was loaded; None if there is none, and the run starts fresh.

        Raises:
            CheckpointError: If the folder is unknown, the trainer is not saved, or the file cannot be read.
        """
        if self._folder is None:
            message = "resume() looks into the folder given as save_handler, got another save handler; use load_objects"
            raise CheckpointError(message)
        if not any(saved is engine for saved in self.to_save.values()):
            message = "resume() needs the trainer in to_save, or its epoch would start anew: to_save={'trainer': trainer, ...}"
            raise CheckpointError(message)
        files = sorted(
            self._folder.glob(f"{self.filename_prefix}*.{self.ext}"), key=lambda file: file.stat().st_mtime_ns
        )
        if not files:
            return None
        newest = files[-1]
        try:
            state = torch.load(newest, map_location="cpu", weights_only=True)
            self.load_objects(self.to_save, state)
        except (OSError, RuntimeError, EOFError, ValueError, KeyError) as err:
            others = ", ".join(file.name for file in files[:-1]) or "none"
            message = (
                f"{newest} cannot be loaded: {err}. Other checkpoints there: {others}; remove it to resume from those"
            )
            raise CheckpointError(message) from err
        return newest
