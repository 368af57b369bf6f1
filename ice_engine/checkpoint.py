"""Ignite's Checkpoint that writes the new file before it removes an old one, and finds its way back."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from ignite import distributed as idist
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint as IgniteCheckpoint
from ignite.handlers import DiskSaver

from ice_engine.errors import ArgumentTypeError, ArgumentValueError, CheckpointError
from ice_engine.hooks import HookRegistry
from ice_engine.summary import summary


class _WriteThenRemove(DiskSaver):
    """Ignite removes the old file first; when the write then fails, none is left. Here it waits for the new one."""

    def __init__(self, folder: Path, save_on_rank: int) -> None:
        super().__init__(folder, create_dir=True, require_empty=False, save_on_rank=save_on_rank)
        self.outdated: list[str] = []

    def remove(self, filename: str) -> None:
        self.outdated.append(filename)

    def _save_func(self, checkpoint: Mapping[str, Any], path: Path, func: Callable[..., None]) -> None:
        # Ignite's own leaves its temporary file behind when the disk is full, and does not wait for the disk.
        part = path.with_name(f"{path.name}.part")
        try:
            with part.open("wb") as file:
                func(checkpoint, file, **self.kwargs)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def __call__(self, checkpoint: Mapping[str, Any], filename: str, metadata: Mapping[str, Any] | None = None) -> None:
        try:
            super().__call__(checkpoint, filename, metadata)
        except Exception as err:
            # Not the error as it is: at a TypeError, Ignite would write a second time.
            message = f"{self.dirname / filename} cannot be written: {err}. Checkpoints that were there still are"
            raise CheckpointError(message) from err
        for outdated in self.outdated:
            # The other ranks come here while the new file is still being written.
            if outdated != filename and idist.get_rank() == self.save_on_rank:
                (self.dirname / outdated).unlink(missing_ok=True)
        self.outdated.clear()


class Checkpoint(IgniteCheckpoint):
    """Saves objects during a run, and resumes from the newest file.

    Takes the arguments of ``ignite.handlers.Checkpoint``. With a folder as *save_handler*, the new file
    is whole before an old one is removed, and the folder may hold files already. A save that fails stops the run,
    and leaves the files as they were.

    Args:
        to_save: Objects with ``state_dict`` by name; the trainer among them, so that a run goes on where it was.
        save_handler: A folder, or a save handler of Ignite's.
        filename_prefix: Prefix of the file names.
        **settings: Ignite's other arguments, such as ``n_saved``, ``score_function`` and ``global_step_transform``.

    Raises:
        ArgumentTypeError: If an argument has the wrong type, or an object of *to_save* has no ``state_dict``.
        ArgumentValueError: If an argument has an impossible value.

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
            self._folder = Path(save_handler).expanduser()
            if self._folder.exists() and not self._folder.is_dir():
                message = f"save_handler must be a folder, got {self._folder}, which is a file"
                raise ArgumentValueError(message)
            save_handler = _WriteThenRemove(self._folder, settings.get("save_on_rank", 0))
        try:
            super().__init__(to_save, save_handler, filename_prefix, **settings)
        except TypeError as err:
            raise ArgumentTypeError(*err.args) from err
        except ValueError as err:
            raise ArgumentValueError(*err.args) from err

    def attach(self, engine: Engine, event: Any = Events.EPOCH_COMPLETED, *, name: str | None = None) -> "Checkpoint":
        """Save on *event*, after handlers such as validation that are there already.

        Args:
            engine: The trainer.
            event: An event of Ignite's or ours, with or without a filter. Files are numbered by iteration even on
                our events, unless ``global_step_transform`` says otherwise.
            name: Name of the hook, unique on the engine; made up if left out.

        Returns:
            This object.
        """
        HookRegistry(engine).add(event, self, name=name, order=50)
        if self._folder is not None:
            summary(engine).wrote(self._folder)
        return self

    def __call__(self, engine: Engine, *args: Any, **kwargs: Any) -> None:
        """Save, if the score or the time says so; the handler that :meth:`attach` adds.

        Raises:
            CheckpointError: If the file cannot be written; files that were there are untouched.
        """
        if self.score_function is None:
            # A run that starts over counts from 1 again; Ignite would save nothing until it is further than the last.
            now = self._global_step(engine)
            self._saved = [item for item in self._saved if item.priority <= now]
        saved = list(self._saved)
        try:
            super().__call__(engine, *args, **kwargs)
        except BaseException:
            # Ignite notes a file as saved before it is, and would take the next attempt for a repetition.
            self._saved = saved
            if isinstance(self.save_handler, _WriteThenRemove):
                self.save_handler.outdated.clear()
            raise

    def resume(self, engine: Engine) -> Path | None:
        """Load the newest checkpoint of the folder into the objects of ``to_save``.

        Call it after the optimizer is attached and before the run. A run that was at its end starts over, as Ignite
        has it, unless ``run(max_epochs=...)`` asks for more epochs. Files of other names in the folder, such as those
        of a second ``Checkpoint`` with a prefix, are left alone.

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
            message = (
                "resume() needs the trainer in to_save, or its epoch would start anew: "
                "to_save={'trainer': trainer, ...}"
            )
            raise CheckpointError(message)
        found = self._find(self._folder)
        if not found:
            return None
        newest = found[-1].filename
        try:
            state = torch.load(self._folder / newest, map_location="cpu", weights_only=True)
            self._load(state)
        except Exception as err:
            others = ", ".join(item.filename for item in found[:-1])
            mend = f"Move it away to resume from one of the others there: {others}" if others else "It is the only one"
            message = (
                f"{self._folder / newest} cannot be loaded: {str(err).rstrip('. ')}. {mend}. To load what fits into a "
                "model that changed: state = torch.load(file, weights_only=True), then model.load_state_dict(..., "
                "strict=False) and optimizer.load_state_dict(..., strict=False)"
            )
            raise CheckpointError(message) from err
        if self.include_self and "checkpointer" in state:
            self.load_state_dict(state["checkpointer"])
        else:
            self._adopt(found)
        return self._folder / newest

    def _global_step(self, engine: Engine) -> float:
        if self.global_step_transform is not None:
            return float(self.global_step_transform(engine, engine.last_event_name))
        return float(engine.state.iteration)

    def _load(self, state: Mapping[str, Any]) -> None:
        # Before anything is loaded, so that nothing is half loaded. A single object is saved without its name.
        missing = [name for name in self.to_save if name not in state] if len(self.to_save) > 1 else []
        if missing:
            message = f"it lacks {', '.join(missing)} of to_save; it has: {', '.join(map(str, state))}"
            raise CheckpointError(message)
        self.load_objects(self.to_save, state)

    def _find(self, folder: Path) -> list[IgniteCheckpoint.Item]:
        """The files this object would have written, the newest last, each with Ignite's priority."""
        name = next(iter(self.to_save)) if len(self.to_save) == 1 and not self.include_self else "checkpoint"
        numbered = self.global_step_transform is not None or self.score_function is None
        pattern = self._get_filename_pattern(0 if numbered else None)
        step, score = _Field("global_step", r"-?\d+"), _Field("score", r"-?[\d.]+|-?inf|nan")
        text = pattern.format(
            filename_prefix=self.filename_prefix,
            ext=self.ext,
            name=name,
            score_name=self.score_name,
            score=step if self.score_function is None else score,
            global_step=step,
        )
        expression = re.escape(text)
        for variable in (step, score):
            expression = expression.replace(re.escape(variable.mark), f"(?P<{variable.name}>{variable.expression})", 1)
            expression = expression.replace(re.escape(variable.mark), f"(?:{variable.expression})")
        found = []
        for file in folder.iterdir() if folder.is_dir() else ():
            match = re.fullmatch(expression, file.name)
            if match is not None:
                groups = match.groupdict()
                priority = groups.get("global_step" if self.score_function is None else "score")
                number = float("-inf") if priority is None else float(priority)
                # Files of the same tick of the clock are told apart by their numbers.
                numbers = [int(digits) for digits in re.findall(r"\d+", file.name)]
                found.append(((file.stat().st_mtime_ns, numbers), IgniteCheckpoint.Item(number, file.name)))
        return [item for _, item in sorted(found, key=lambda pair: pair[0])]

    def _adopt(self, found: list[IgniteCheckpoint.Item]) -> None:
        """Count the files found as saved by this object, so that ``n_saved`` holds over resumed runs."""
        known = [item for item in found if item.priority != float("-inf")]
        if self.score_function is None and known:
            # Those of an earlier run that came further would forbid every save until there.
            known = [item for item in known if item.priority <= found[-1].priority]
        self._saved = sorted(known, key=lambda item: item.priority)[-(self.n_saved or len(known)) :]


class _Field:
    """A part of a file name that varies; formats to a mark that no file name has, whatever the format."""

    def __init__(self, name: str, expression: str) -> None:
        self.name = name
        self.expression = expression
        self.mark = f"\x00{name}\x00"

    def __format__(self, specification: str) -> str:
        return self.mark
