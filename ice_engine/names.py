"""What a parameter's name tells: which one it is under its wrappers, which one was meant, how deep it stands."""

import difflib
import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from ice_engine.errors import ArgumentTypeError, ArgumentValueError

PLACE = "param_groups."  # how the optimizer calls parameters without a name


def bare_name(name: str) -> str:
    """Return *name* without what DistributedDataParallel and ``torch.compile`` put before a module's names."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def class_name(optimizer: Any) -> str:
    """Return the name of an optimizer's class; of one that is sharded over ranks, of the plain one."""
    return str(getattr(optimizer, "wrapped_class", type(optimizer)).__name__)


def unwrapped(names: Sequence[str]) -> list[str]:
    """Return all *names* of a model without its wrappers' prefixes.

    A wrapper's ``module.`` is before every name; of a model with a ``module`` among others it stays.
    """
    compiled = [name.replace("_orig_mod.", "") for name in names]
    return [bare_name(name) for name in names] if all(name.startswith("module.") for name in compiled) else compiled


def few(names: Sequence[str], most: int = 5) -> str:
    """Return *names* as an error lists them: the first *most*, and how many more there are."""
    more = len(names) - most
    return ", ".join(map(repr, names[:most])) + (f" and {more} more" if more > 0 else "")


def likely(pattern: str, names: Sequence[str]) -> str:
    """Return, for an error, which of *names* a *pattern* that matches none may have meant."""
    literal = re.sub(r"\\.|[^\w.]", lambda match: "." if match[0] == r"\." else "", pattern).strip(".")
    pieces: dict[str, str] = {}
    for name in names:
        parts = name.split(".")
        for piece in (name, *accumulate(parts, "{}.{}".format), *parts):
            pieces.setdefault(piece, name)
    close = dict.fromkeys(pieces[piece] for piece in difflib.get_close_matches(literal, pieces, n=3))
    return f"did you mean {few(list(close))}?" if close else f"the model has {few(names)}"


def depths(names: Sequence[str], layers: Any) -> dict[str, int]:
    r"""Return how far from the top each of *names* stands, counted in blocks.

    Args:
        names: Of all parameters, in the order of registration.
        layers: Regular expression with one group of digits, such as ``r"blocks\.(\d+)"``.

    Returns:
        By name: 0 after the last block, 1 in the last, L in the first, L+1 before it. What stands between two
        blocks belongs to the one before it.

    Raises:
        ArgumentTypeError: If *layers* is not a string.
        ArgumentValueError: If it is no such expression, or finds no block or no number in one.
    """
    if not isinstance(layers, str):
        message = rf"layers must be a regular expression, got {layers!r}; such as layers=r'blocks\.(\d+)'"
        raise ArgumentTypeError(message)
    try:
        pattern = re.compile(layers)
    except re.error as err:
        message = f"layers={layers!r} is not a regular expression: {err}"
        raise ArgumentValueError(message) from err
    if pattern.groups != 1:
        message = rf"layers={layers!r} captures {pattern.groups} groups, wanted is the block's number: r'blocks\.(\d+)'"
        raise ArgumentValueError(message)
    blocks: dict[int, int] = {}  # by place among the names
    for place, name in enumerate(names):
        match = pattern.search(name)
        if match and not (match[1] or "").isdecimal():
            message = rf"layers={layers!r} finds {match[1]!r} in {name!r}, which is no number; capture digits: (\d+)"
            raise ArgumentValueError(message)
        if match:
            blocks[place] = int(match[1])
    if not blocks:
        message = f"layers={layers!r} matches no parameter; {likely(layers, names)}"
        raise ArgumentValueError(message)
    numbers = sorted(set(blocks.values()), reverse=True)
    found, depth, last = {}, len(numbers) + 1, max(blocks)
    for place, name in enumerate(names):
        if place in blocks:
            depth = numbers.index(blocks[place]) + 1
        found[name] = 0 if place > last else depth
    return found
