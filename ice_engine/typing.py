"""The callable shapes that users write and pass in."""

from collections.abc import Callable, Iterable, MutableMapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch

DictProcessor: TypeAlias = Callable[[MutableMapping[str, Any]], MutableMapping[str, Any]]
"""A function from a mapping to a mapping; as an updater, called once per step and param group."""

Clip: TypeAlias = Callable[[Iterable[torch.Tensor]], torch.Tensor]
"""Limits the gradients of parameters in place and returns their norm before clipping, shape ()."""


@runtime_checkable
class GroupClip(Protocol):
    """A clip that may limit each param group by itself."""

    @property
    def per_group(self) -> bool:
        """Whether it is to be called with the groups."""
        ...

    def by_group(self, groups: Iterable[Iterable[torch.Tensor]]) -> torch.Tensor:
        """Limit the gradients of each group's parameters in place; return the norm over all before, shape ()."""
        ...


OptimizerFactory: TypeAlias = Callable[..., torch.optim.Optimizer]
"""Makes a torch optimizer from parameters, such as ``functools.partial(torch.optim.AdamW, lr=1e-3)``."""
