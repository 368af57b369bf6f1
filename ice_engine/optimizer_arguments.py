"""What an optimizer is made with: arguments that are refused by the name it has for users, and where they belong."""

import difflib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import torch

from ice_engine.clipping import ClipNorm
from ice_engine.errors import ArgumentTypeError
from ice_engine.typing import Clip

P = ParamSpec("P")


def as_optimizer(init: Callable[P, None]) -> Callable[P, None]:
    """Let *init* refuse arguments by the name that users call it by; types and help() see its own signature."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as err:
            unknown = next((key for key in kwargs if key not in signature.parameters), None)
            optimizer = args[1] if len(args) > 1 else kwargs.get("optimizer")
            hint = "" if unknown is None else _meant(unknown, kwargs[unknown], optimizer, list(signature.parameters))
            message = f"Optimizer(...) {err}{hint}"
            raise ArgumentTypeError(message) from None
        init(*args, **kwargs)

    return checked


def _meant(unknown: str, value: Any, optimizer: Any, known: Sequence[str]) -> str:
    """Return, for an error, where an *unknown* argument belongs."""
    made = type(optimizer) if isinstance(optimizer, torch.optim.Optimizer) else optimizer
    if isinstance(made, type) and unknown in inspect.signature(made).parameters:
        name = f"torch.optim.{made.__name__}" if made.__module__.startswith("torch.optim.") else made.__name__
        return f", which {name} takes: Optimizer(functools.partial({name}, {unknown}={value!r}), model.parameters())"
    close = difflib.get_close_matches(unknown, known, n=1)
    return f"; did you mean {close[0]}=?" if close else ""


def check_clip(clip: Clip | None) -> None:
    """Check that *clip* can be called with the parameters alone.

    Raises:
        ArgumentTypeError: If it cannot; with what was probably meant.
    """
    if clip is None:
        return
    if isinstance(clip, list | tuple):
        message = (
            f"clip must be one callable, got {clip!r}; to call several, one after the other: "
            "clip=lambda parameters: (clips[0](parameters), clips[1](parameters))[0]"
        )
        raise ArgumentTypeError(message)
    if not callable(clip):
        limit = clip if type(clip) in {int, float} else 1.0
        message = f"clip must be callable, got {clip!r}; such as clip=ice.clip_norm({limit!r})"
        raise ArgumentTypeError(message)
    name = getattr(clip, "__name__", clip)
    if getattr(clip, "__module__", None) == ClipNorm.__module__ and inspect.isfunction(clip):
        message = f"clip is the function {name} itself; call it, with its limit: clip=ice.{name}(...)"
        raise ArgumentTypeError(message)
    try:
        signature = inspect.signature(clip)
    except (TypeError, ValueError):  # of compiled code
        return
    try:
        signature.bind(())
    except TypeError as err:
        message = (
            f"clip is called with the parameters alone, and {name} cannot be: {err}; "
            "write clip=ice.clip_norm(1.0), or bind the rest with functools.partial"
        )
        raise ArgumentTypeError(message) from err
