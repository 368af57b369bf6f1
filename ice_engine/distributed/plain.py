"""Plain data: what can be saved and loaded again without running anything."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch

from ice_engine.distributed.shards import is_sharded
from ice_engine.errors import CheckpointError

_AS_THEY_ARE = (type(None), torch.dtype, torch.device, torch.Size)
_NUMBERS_AND_TEXT: tuple[Any, ...] = (bool, int, float, complex, str, bytes)
_COLLECTIONS: tuple[Any, ...] = (list, tuple, set)
# Most of a state's entries, and nearly all of its keys; found first, and named only in an error, a state dict of 100
# tensors takes 0.3 ms instead of 0.8, which training waits for at each save.
_ATOMS = frozenset((*_AS_THEY_ARE, *_NUMBERS_AND_TEXT))
_ENTRY, _KEY, _METADATA = "{}[{!r}]", "a key of {}", "{}._metadata"

Place = str | tuple[Any, ...]
"""What an error calls a value: a name, or one of the words above, the place that it is in, and its key there."""


def plain(key: Place, value: Any) -> Any:
    """Return *value* as what loads with ``weights_only=True``; containers are new, tensors are the same.

    Subclasses become what they are of: a numpy scalar a number, a ``defaultdict`` a dict, a named tuple a tuple.

    Args:
        key: What an error calls it.
        value: What a ``state_dict()`` returned.

    Raises:
        CheckpointError: Naming the first entry that cannot be saved.
    """
    if type(value) in _ATOMS or isinstance(value, _AS_THEY_ARE):
        return value
    if isinstance(value, torch.Tensor) and not is_sharded(value):
        return value.detach() if value.requires_grad else value
    for kind in _NUMBERS_AND_TEXT:
        if isinstance(value, kind):
            # Not str(value): of an Enum that is its name.
            return value if type(value) is kind else kind.__str__(value) if kind is str else kind(value)
    if isinstance(value, Mapping):
        return _mapping(key, value)
    for kind in _COLLECTIONS:
        if isinstance(value, kind):
            return kind(plain((_ENTRY, key, i), entry) for i, entry in enumerate(value))
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () and hasattr(value, "item"):
        return plain(key, value.item())
    mend = "use torch.from_numpy()" if type(value).__name__ == "ndarray" else "change what state_dict() returns"
    message = (
        f"{_words(key)} is {type(value).__name__}, which cannot be saved safely; wanted are numbers, strings, tensors "
        f"that are not sharded, and lists and dicts of them; {mend}"
    )
    raise CheckpointError(message)


def _mapping(key: Place, value: Mapping[Any, Any]) -> Any:
    pairs = [
        (k if type(k) in _ATOMS else plain((_KEY, key), k), plain((_ENTRY, key, k), entry))
        for k, entry in value.items()
    ]
    if not isinstance(value, OrderedDict):
        return dict(pairs)
    ordered = OrderedDict(pairs)
    if (metadata := vars(value).get("_metadata")) is not None:  # a module's, of its layers' versions
        vars(ordered)["_metadata"] = plain((_METADATA, key), metadata)
    return ordered


def _words(key: Place) -> str:
    if isinstance(key, str):
        return key
    words, outer, *inner = key
    return str(words.format(_words(outer), *inner))
