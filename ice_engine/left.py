"""Gradients as ``backward()`` left them; what others put, change or clear would make the window's mean wrong."""

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
        gradients = [parameter.grad for parameter in parameters]
        versions = [-1 if g is None else g._version for g in gradients]  # noqa: SLF001 - has no public name
        self._of_window = gradients, versions

    def forget(self) -> None:
        """Expect no gradients."""
        self._of_window = None

    @property
    def expects(self) -> bool:
        """Whether gradients are remembered; perhaps of other ranks only, whose reduction this one took part in."""
        return self._of_window is not None

    def change(self, parameters: Sequence[torch.Tensor]) -> Literal["foreign", "cleared", "changed"] | None:
        """Return what somebody did to the gradients of *parameters* since, if anything."""
        if self._of_window is None:
            return "foreign" if has_gradient(parameters) else None
        for parameter, before, version in zip(parameters, *self._of_window, strict=False):
            now = parameter.grad
            if now is not before or (now is not None and now._version != version):  # noqa: SLF001 - has no public name
                cleared = before is not None and (now is None or not bool(entries(now).any()))
                return "cleared" if cleared else "changed"
        return None


def has_gradient(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether one of *parameters* has a gradient."""
    for parameter in parameters:  # noqa: SIM110 - any() takes twice the time, in every iteration
        if parameter.grad is not None:
            return True
    return False
