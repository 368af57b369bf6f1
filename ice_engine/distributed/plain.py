"""Plain data: what can be saved and loaded again without running anything."""

import pickle
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import torch

from ice_engine.distributed.shards import is_sharded
from ice_engine.errors import CheckpointError


def check_plain(key: str, value: Any) -> Any:
    """Return *value* if it can be saved, and loaded with ``weights_only=True``.

    Args:
        key: What an error calls it.
        value: What a ``state_dict()`` returned.

    Raises:
        CheckpointError: Naming the first entry that cannot.
    """
    for name, entry in _entries(value):
        # torch would take a sharded tensor, and save this rank's shard only.
        if is_sharded(entry) or not isinstance(entry, torch.Tensor):
            check_plain(f"{key}[{name!r}]", entry)
    if is_sharded(value) or not _loads(value):
        message = (
            f"{key} is {type(value).__name__}, which cannot be saved safely; wanted are numbers, strings, tensors that "
            "are not sharded, and lists and dicts of them. Change what state_dict() returns"
        )
        raise CheckpointError(message)
    return value


def _entries(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list | tuple | set) else []


def _loads(value: Any) -> bool:
    if value is None or type(value) in {bool, int, float, str}:
        return True
    buffer = BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, map_location="meta", weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError, RuntimeError):
        return False
    return True
