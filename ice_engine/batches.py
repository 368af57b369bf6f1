"""Tensors in nested batches: found, replaced, compared, and cut along the samples."""

import copy
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ice_engine.errors import ArgumentTypeError, ArgumentValueError

# Most of what a state holds, without a tensor inside: not looked into, and its place not put into words.
_ATOMS = frozenset((type(None), bool, int, float, complex, str, bytes))


def batch_size(x: Any, y: Any) -> int:
    """Return the number of samples: the first dimension of *y*, or of *x* where *y* has none.

    Raises:
        ArgumentTypeError: If neither is a tensor or array; the length of a tuple or dict need not be that of the batch.
    """
    for value in (y, x):
        shape: Any = getattr(value, "shape", ())
        if len(shape) > 0:
            return int(shape[0])
    message = (
        f"cannot tell how many samples are in a batch of {type(x).__name__} and {type(y).__name__}; "
        "say so: create_trainer(..., weight=lambda x, y: ...)"
    )
    raise ArgumentTypeError(message)


def check_weight(weight: Callable[[Any, Any], float]) -> None:
    """Check that *weight* can be called with x and y.

    Raises:
        ArgumentTypeError: If not.
    """
    try:
        signature = inspect.signature(weight)
    except (TypeError, ValueError):  # of compiled code
        return
    try:
        signature.bind((), ())
    except TypeError as err:
        name = getattr(weight, "__name__", weight)
        message = f"weight is called as weight(x, y), and {name} cannot be: {err}; such as weight=lambda x, y: len(y)"
        raise ArgumentTypeError(message) from err


def tensors(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor in *value* with the expression that leads to it, such as ``y['labels'][0]``.

    Looks into mappings, lists, tuples and dataclasses.
    """
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors(item, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from tensors(item, f"{path}[{index}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name, None), f"{path}.{field.name}")


def replaced(
    value: Any,
    function: Callable[[torch.Tensor, str], torch.Tensor],
    path: str = "",
    *,
    others: Callable[[Any], Any] | None = None,
) -> Any:
    """Return *value* with ``function(tensor, path)`` in the place of every tensor; containers are new.

    Inside of a container, what is neither a tensor, a number nor text becomes ``others(value)``, where that is given;
    what that returns as it is, is looked into.
    """
    if isinstance(value, torch.Tensor):
        return function(value, path)
    if others is not None and (other := others(value)) is not value:
        return other
    return _rebuilt(value, functools.partial(replaced, function=function, others=others), path)


def _rebuilt(value: Any, inner: Callable[..., Any], path: str) -> Any:
    if isinstance(value, Mapping):
        items = {
            key: item if type(item) in _ATOMS else inner(item, path=f"{path}[{key!r}]") for key, item in value.items()
        }
        return _as_mapping(value, items)
    if isinstance(value, list | tuple):
        parts = [
            item if type(item) in _ATOMS else inner(item, path=f"{path}[{index}]") for index, item in enumerate(value)
        ]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        new = copy.copy(value)
        for field in dataclasses.fields(value):
            item = inner(getattr(value, field.name, None), path=f"{path}.{field.name}")
            object.__setattr__(new, field.name, item)
        return new
    return value


def _as_mapping(mapping: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    if type(mapping) is dict:
        return items
    try:
        new: Any = copy.copy(mapping)
        for key, item in items.items():
            new[key] = item
    except TypeError:  # one that cannot be copied or written
        return items
    return new


def samples(x: Any, y: Any) -> int:
    """Return the length that the first dimensions of all tensors share; those of shape () are left out.

    Raises:
        ArgumentTypeError: If there is no such tensor.
        ArgumentValueError: If lengths differ.
    """
    lengths = {path: len(t) for path, t in (*tensors(x, "x"), *tensors(y, "y")) if t.dim() > 0}
    if not lengths:
        message = (
            f"no tensor in a batch of {type(x).__name__} and {type(y).__name__} has samples in its first dimension; "
            "give a batch of which prepare_batch makes (x, y): tensors, or dicts, lists and tuples of them"
        )
        raise ArgumentTypeError(message)
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{path} has {length}" for path, length in lengths.items())
        message = (
            f"the first dimension of every tensor in the batch must be its samples, but their lengths differ: {found}; "
            "put the samples first, in prepare_batch=, and what all samples share into the model or the loss"
        )
        raise ArgumentValueError(message)
    return next(iter(lengths.values()))


def cut(value: Any, start: int, stop: int, total: int) -> Any:
    """Return samples *start* to *stop* of a batch of *total*; arrays and lists with an entry for each are cut too."""

    def others(found: Any) -> Any:
        return found[start:stop] if _is_per_sample(found, total) else found

    return replaced(value, lambda tensor, _: tensor[start:stop] if tensor.dim() > 0 else tensor, others=others)


def _is_per_sample(value: Any, total: int) -> bool:
    """Whether *value* is an array, list or tuple with one entry for each of *total* samples."""
    if not isinstance(value, list | tuple):
        shape = getattr(value, "shape", ())
        return isinstance(shape, tuple) and shape[:1] == (total,)
    # One that holds a tensor, or the samples of several things, such as their ids and their texts, is looked into.
    return (
        len(value) == total
        and not hasattr(value, "_fields")
        and next(tensors(value), None) is None
        and not any(_is_per_sample(item, total) for item in value)
    )


def rows(whole: torch.Tensor, shape: torch.Size, start: int, stop: int, total: int) -> list[torch.Tensor]:
    """Return the parts of *whole*, made from *total* samples, that *shape*, from samples *start* to *stop*, may be of.

    Every dimension that differs must hold the samples, or a multiple of them such as samples times heads, in either
    order. Without such a dimension *whole* itself is returned; an empty list if the shapes do not correspond.
    """
    if whole.dim() != len(shape):
        return []
    outer = inner = whole
    for dim, (size, part) in enumerate(zip(whole.shape, shape, strict=True)):
        if size == part:
            continue
        times, rest = divmod(size, total)
        if rest or part != times * (stop - start):
            return []
        outer = outer.narrow(dim, start * times, part)
        inner = inner.reshape(*inner.shape[:dim], times, total, *inner.shape[dim + 1 :])
        inner = inner.narrow(dim + 1, start, stop - start).flatten(dim, dim + 1)
    return [outer] if outer.shape == whole.shape or torch.equal(outer, inner) else [outer, inner]


def copied(value: Any, dtype: torch.dtype | None = None) -> Any:
    """Return *value* with copies of its tensors, detached; floating point ones in *dtype* where one is given."""

    def copy_of(tensor: torch.Tensor, _: str) -> torch.Tensor:
        to = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to(to, copy=True).requires_grad_(tensor.requires_grad and tensor.is_leaf)

    return replaced(value, copy_of)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return how far *a* and *b* are apart, relative to the largest entry; inf if only one is finite."""
    if not (a.is_floating_point() or a.is_complex()):
        return 0.0 if a.equal(b) else math.inf
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0
    apart = torch.where(same, 0.0, (a - b).abs()).max()
    largest = max((float(t.abs()[t.isfinite()].max()) for t in (a, b) if bool(t.isfinite().any())), default=0.0)
    value = float(apart) / largest if largest > 0 else math.inf
    return value if math.isfinite(value) else math.inf
