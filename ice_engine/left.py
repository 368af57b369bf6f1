"""Gradients as ``backward()`` left them; what others put, change or clear would make the window's mean wrong."""

import operator
from collections.abc import Iterable, Sequence
from typing import Literal

import torch

from ice_engine.norms import entries


class Left:
    """Remembers the gradients of a window, and the version of each."""

    def __init__(self) -> None:
        self._of_window: tuple[list[torch.Tensor | None], list[int]] | None = None

    def note(self, parameters: Iterable[torch.Tensor]) -> None:
        """Remember the gradients of *parameters* as they are."""
        self._of_window = _gradients_and_versions(parameters)

    def forget(self) -> None:
        """Expect no gradients."""
        self._of_window = None

    def change(self, parameters: Sequence[torch.Tensor]) -> Literal["foreign", "cleared", "changed"] | None:
        """Return what somebody did to the gradients of *parameters* since, if anything."""
        if self._of_window is None:
            return "foreign" if has_gradient(parameters) else None
        gradients, versions = _gradients_and_versions(parameters)
        before, versions_before = self._of_window
        if versions == versions_before and all(map(operator.is_, gradients, before)):
            return None  # as every time; what follows looks for the one that differs
        for now, gradient, is_now, version in zip(gradients, before, versions, versions_before, strict=False):
            if now is gradient and is_now == version:
                continue
            cleared = gradient is not None and (now is None or not bool(entries(now).any()))
            return "cleared" if cleared else "changed"
        return None


def has_gradient(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether one of *parameters* has a gradient."""
    for parameter in parameters:  # noqa: SIM110 - any() takes twice the time, in every iteration
        if parameter.grad is not None:
            return True
    return False


def _gradients_and_versions(parameters: Iterable[torch.Tensor]) -> tuple[list[torch.Tensor | None], list[int]]:
    gradients = [parameter.grad for parameter in parameters]
    return gradients, [-1 if g is None else g._version for g in gradients]  # noqa: SLF001 - has no public name
