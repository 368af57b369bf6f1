"""What a run is resumed from: the files of a folder, and what the newest one gives back."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Engine
from ignite.handlers import Checkpoint

from ice_engine import checkpoint_file, saved_objects
from ice_engine.checkpoint_folder import whole_files
from ice_engine.checkpoint_names import Names
from ice_engine.errors import CheckpointError
from ice_engine.run_position import positions

OURS = "ice_engine"  # the entry of a checkpoint that says where the run is
Item = Checkpoint.Item


def find(folder: Path, names: Names) -> list[Item]:
    """Return the files of *folder* that are named so, the newest whole one last.

    Raises:
        CheckpointError: If it is a file, or all in it are damaged.
    """
    if folder.exists() and not folder.is_dir():
        message = f"{folder} is a file, wanted is the folder that was there; move it away"
        raise CheckpointError(message)
    return [Item(*file) for file in whole_files(folder, names)]


def load(
    file: Path, found: list[Item], objects: Mapping[str, Any], trainer: Engine | None, *, lists: bool
) -> tuple[Mapping[str, Any], list[Item] | None]:
    """Give *objects* their states in *file*, and return its content, and what it says was saved, if it does.

    Args:
        file: The last of *found*.
        found: From :func:`find`.
        objects: By name.
        trainer: The one of *objects* whose run's position is in the file; None if it is not asked for.
        lists: Whether the file has a list of the files saved.

    Raises:
        CheckpointError: If they do not fit.
    """
    try:
        content = _checked(checkpoint_file.read(file), objects, trainer, lists=lists)
        listed = _listed(content["checkpointer"], found) if lists and "checkpointer" in content else None
        saved_objects.load(objects, content)
    except Exception as err:  # of whatever class: of a load_state_dict of the user's, told with the file, and raised
        others = ", ".join(item.filename for item in found[:-1])
        mend = f"Move it away to resume from one of the others there: {others}" if others else "It is the only one"
        message = (
            f"{file} cannot be loaded: {str(err).rstrip('. ')}. {mend}. To load what fits into a "
            "model that changed: state = torch.load(file, weights_only=True), then model.load_state_dict(..., "
            "strict=False) and optimizer.load_state_dict(..., strict=False)"
        )
        raise CheckpointError(message) from err
    return content, listed


def _checked(found: Any, objects: Mapping[str, Any], trainer: Engine | None, *, lists: bool) -> Mapping[str, Any]:
    """Return the states by name, before anything is loaded; a digest says that they are as written, not by whom."""
    if not isinstance(found, Mapping):
        message = f"it holds {type(found).__name__}, wanted is a dict of states by name"
        raise CheckpointError(message)
    content: Mapping[str, Any] = found
    if len(objects) == 1 and not lists and next(iter(objects)) not in content:
        content = {next(iter(objects)): content}
    if trainer is not None and OURS in content:
        name = next(name for name, saved in objects.items() if saved is trainer)
        content[OURS]["positions"] = positions(content[OURS], content.get(name))
    return content


def _listed(checkpointer: Any, found: list[Item]) -> list[Item]:
    """Return what a file says was saved, of what is in its folder: what else it names is not for it to have removed."""
    there = {item.filename for item in found}
    try:
        listed = [Item(priority + 0, filename) for priority, filename in checkpointer["_saved"]]
        return [item for item in listed if item.filename in there]
    except (KeyError, TypeError, ValueError) as err:
        message = "its list of files saved is damaged"
        raise CheckpointError(message) from err


def adopted(found: list[Item], n_saved: int | None, *, by_score: bool) -> list[Item]:
    """Return the files found that count as saved by who resumes, so that ``n_saved`` holds over resumed runs."""
    known = [item for item in found if not math.isnan(item.priority)]
    if not by_score and known:
        # Those of an earlier run that came further would forbid every save until there.
        known = [item for item in known if item.priority <= found[-1].priority]
    # One more: a process that was killed between a new file and the removal of an old one left both.
    return sorted(known, key=lambda item: item.priority)[-((n_saved or len(known)) + 1) :]
