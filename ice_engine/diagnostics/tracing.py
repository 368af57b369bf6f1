"""What the modules of a model get and give: recorded for one batch, and compared with those of another."""

import textwrap
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from ice_engine.batches import copied, difference, replaced, rows, tensors

Key = tuple[str, int, str]
"""A module's path, which of its calls, and ``"inputs"`` or ``"outputs"``."""


class Watch:
    """Hooks on all modules of a model, which tell the path of the one that runs.

    Args:
        model: Its hooks are taken off again when the ``with`` block ends.
        passing: Called with the key and the value of all inputs, ``(args, kwargs)``, and outputs; what it
            returns takes their place, unless it is None.
    """

    def __init__(self, model: torch.nn.Module, passing: Callable[[Key, Any], Any] = lambda *_: None) -> None:
        self._model, self._passing = model, passing
        self._handles: list[Any] = []
        self.outside: str | None = ""
        self.stack: list[tuple[str, int]] = []
        self.calls: Counter[str] = Counter()

    @property
    def current(self) -> str | None:
        """The path of the module that runs, ``""`` for the model itself; *outside* where none does."""
        return self.stack[-1][0] if self.stack else self.outside

    def __enter__(self) -> "Watch":
        for name, module in self._model.named_modules():
            self._handles += [
                module.register_forward_pre_hook(self._entering(name), with_kwargs=True),
                module.register_forward_hook(self._leaving(name)),
            ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _entering(self, name: str) -> Callable[..., Any]:
        def hook(_: torch.nn.Module, args: Any, kwargs: Any) -> Any:
            key = (name, self.calls[name], "inputs")
            passed = self._passing(key, (args, kwargs))
            self.calls[name] += 1
            self.stack.append(key[:2])
            return passed

        return hook

    def _leaving(self, name: str) -> Callable[..., Any]:
        def hook(_: torch.nn.Module, __: Any, outputs: Any) -> Any:
            while self.stack.pop()[0] != name:  # calls that ended in an exception, which the model caught
                pass
            return self._passing((name, self.calls[name] - 1, "outputs"), outputs)

        return hook


class Comparison:
    """Runs micro-batches along a recorded big batch, and finds the modules that part from it.

    What a module gets or gives for samples *start* to *stop* is compared with its rows for the big batch; where it
    differs, the rows are put in its place, so that what comes after can be judged by itself.

    Args:
        recorded: Inputs and outputs for the big batch.
        total: Samples of the big batch.
        tolerance: Largest relative difference that counts as equal.

    Attributes:
        parted: By path of a module: where its forward parts from the big batch, in words.
        failed: By path of a module: the exception that a micro-batch ended with.
    """

    def __init__(self, recorded: dict[Key, Any], total: int, tolerance: float) -> None:
        self._recorded, self._total, self._tolerance = recorded, total, tolerance
        self.parted: dict[str, str] = {}
        self.failed: dict[str, str] = {}

    def run(self, model: torch.nn.Module, x: Any, start: int, stop: int) -> Any:
        """Run *model* on samples *start* to *stop*, which *x* are, and return its outputs."""

        def passing(key: Key, value: Any) -> Any:
            wanted = dict(tensors(self._recorded.get(key)))
            apart = False

            def judged(tensor: torch.Tensor, path: str) -> torch.Tensor:
                nonlocal apart
                if path not in wanted or tensor.dim() == 0:
                    return tensor
                candidates = rows(wanted[path], tensor.shape, start, stop, self._total)
                if not candidates or min(difference(c, tensor.detach()) for c in candidates) <= self._tolerance:
                    return tensor
                apart = True
                return candidates[0].clone()

            mended = replaced(value, judged)
            if not apart:
                return None
            name, _, side = key
            if side == "inputs":  # whoever called it made these
                self.parted.setdefault(watch.current or "", f"its own forward, before it calls {name!r}")
            else:
                self.parted.setdefault(name, "")
            return mended

        with Watch(model, passing) as watch:
            try:
                return model(x)
            except Exception as err:  # noqa: BLE001 - the big batch went through
                what = textwrap.shorten(f"{type(err).__name__}: {err}", 200)
                message = f"it fails on a micro-batch of {stop - start}: {what}"
                self.failed.setdefault(watch.current or "", message)
                return None


def record(model: torch.nn.Module, x: Any) -> tuple[Any, dict[Key, Any]]:
    """Run *model* and return its outputs, and copies of what all its modules got and gave."""
    recorded: dict[Key, Any] = {}

    def passing(key: Key, value: Any) -> None:
        recorded[key] = copied(value)

    with Watch(model, passing):
        return model(x), recorded
