"""The callable shapes that users write and pass in."""

from collections.abc import Callable, Iterable, MutableMapping
from typing import Any, TypeAlias

import torch

DictProcessor: TypeAlias = Callable[[MutableMapping[str, Any]], MutableMapping[str, Any]]
"""A function from a mapping to a mapping; as an updater, called once per step and param group."""

Clip: TypeAlias = Callable[[Iterable[torch.Tensor]], torch.Tensor]
"""Limits the gradients of parameters in place and returns their norm before clipping, shape ()."""

OptimizerFactory: TypeAlias = Callable[..., torch.optim.Optimizer]
"""Makes a torch optimizer from parameters, such as ``functools.partial(torch.optim.AdamW, lr=1e-3)``."""
