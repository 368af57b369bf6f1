"""Parameters that a loss must not reach: what it would leave in them, another optimizer would step on."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch

from ice_engine.errors import AttachError


@contextlib.contextmanager
def gradients_aside(parameters: Iterable[torch.Tensor]) -> Iterator[Callable[[], bool]]:
    """Let *parameters* have the gradients at the end that they had at the beginning, whatever comes between.

    Yields:
        Whether any of them has got one meanwhile.
    """
    before = [(parameter, parameter.grad) for parameter in parameters]
    try:
        for parameter, _ in before:
            parameter.grad = None
        yield lambda: any(parameter.grad is not None for parameter, _ in before)
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


class GradOff(contextlib.AbstractContextManager[None]):
    """Lets *parameters* require no grad inside; at the end every flag is as it was at the beginning. For one ``with``.

    Args:
        parameters: Whose flags change.
        changed: Called when they have, and before that at the end.

    Raises:
        AttachError: If it is entered a second time: other parameters may be meant by then.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], changed: Callable[[], object]) -> None:
        self._parameters, self._changed = list(parameters), changed
        self._before: list[bool] | None = None

    def __enter__(self) -> None:
        if self._before is not None:
            message = "this toggle() was entered before, and is for one with; write with optimizer.toggle(...): anew"
            raise AttachError(message)
        self._before = [parameter.requires_grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.requires_grad = False
        self._changed()

    def __exit__(self, *_: object) -> None:
        self._changed()  # else those of what was gathered inside would be kept
        for parameter, required in zip(self._parameters, self._before or (), strict=True):
            parameter.requires_grad = required
        self._changed()
