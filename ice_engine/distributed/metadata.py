"""Where in a checkpoint's files a tensor is: torch's own pickle, read without running what is in it."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from ice_engine.errors import CheckpointError

_CHECKPOINT = "torch.distributed.checkpoint"

# Data classes only, by their full names: "metadata.pickle.loads" is reached from a module that is allowed as a whole.
_ALLOWED = {
    *(
        (f"{_CHECKPOINT}.metadata", name)
        for name in (
            "_MEM_FORMAT_ENCODING",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
        )
    ),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        message = f"it asks for {module}.{name}, which torch.distributed.checkpoint does not write"
        raise pickle.UnpicklingError(message)


def read_metadata(path: Path) -> Metadata:
    """Return what ``torch.distributed.checkpoint`` wrote to *path*.

    Raises:
        CheckpointError: If it holds anything else; nothing of it has run.
    """
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
    except Exception as err:  # pickle raises whatever the bytes lead to
        message = f"{path.name} is refused: {err}. Load another checkpoint"
        raise CheckpointError(message) from err
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        message = (
            f"{path.name} is refused: it holds {type(metadata).__name__}, no list of tensors. Load another checkpoint"
        )
        raise CheckpointError(message)
    return metadata
