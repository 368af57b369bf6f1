"""The state of all random generators of this process, as plain data."""

import array
import random
import sys
from typing import Any

import torch


def capture() -> dict[str, Any]:
    """Return the states of Python's, numpy's and torch's generators: the CPU's, and every GPU's in use."""
    version, words, gauss = random.getstate()
    return {
        # Of 625 numbers, each would be looked at; torch.tensor(words) does so too, and takes 0.3 ms.
        "python": (version, torch.frombuffer(array.array("q", words), dtype=torch.int64), gauss),
        "numpy": _numpy_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
    }


def restore(state: dict[str, Any]) -> None:
    """Let all generators go on from what :func:`capture` returned; those of GPUs that are not here are left out."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist() if isinstance(words, torch.Tensor) else words), gauss))
    if state["numpy"] is not None:
        import numpy as np

        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002 - what augmentations draw from
    torch.set_rng_state(state["torch"])
    for device, generator in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(generator, device)


def _numpy_state() -> tuple[Any, ...] | None:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    name, keys, *rest = numpy.random.get_state()
    return name, torch.from_numpy(keys.astype(numpy.int64)), *rest
