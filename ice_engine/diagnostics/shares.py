"""What share of a big batch's loss each micro-batch's has: which weights make accumulation exact, if any do."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ice_engine.batches import difference, replaced, rows, tensors


class Weights(NamedTuple):
    """Candidate weights of the micro-batches, how to compute them, and what they count."""

    values: list[float]
    expression: str
    words: str


class Shares(NamedTuple):
    """How the loss of the big batch is made up.

    Attributes:
        apart: From factors of the micro-batches' losses to the largest relative difference they leave.
        implied: The factors that fit best; None where the data do not tell.
    """

    apart: Callable[[Sequence[float]], float]
    implied: list[float] | None


def by_predictions(
    loss_fn: Callable[[], Callable[[Any, Any], torch.Tensor]], predictions: Sequence[Any], targets: Sequence[Any],
    spans: Sequence[tuple[int, int]], total: int,
) -> Shares | None:  # fmt: skip
    """Compare the gradient with respect to predictions; None if these do not have the samples in a dimension.

    Args:
        loss_fn: Returns a fresh loss function.
        predictions: Of the big batch, and of its micro-batches.
        targets: In the same order.
        spans: First sample and the one after the last, of each micro-batch.
        total: Samples of the big batch.
    """
    found = [_slopes(loss_fn(), p, y) for p, y in zip(predictions, targets, strict=True)]
    (whole, whole_values), parts = found[0], found[1:]
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for (start, stop), (slopes, values) in zip(spans, parts, strict=True):
        theirs, mine = [], []
        for path, slope in slopes.items():
            if path not in whole or slope.dim() == 0:
                return None
            blocks = rows(whole[path], slope.shape, start, stop, total)
            if not blocks:
                return None
            if blocks[0].shape == whole[path].shape:
                continue  # the same for every batch
            inputs = rows(whole_values[path], slope.shape, start, stop, total)
            fits = [difference(given, values[path]) for given in inputs]
            best = fits.index(min(fits)) if len(fits) == len(blocks) else 0
            theirs.append(blocks[best].flatten())
            mine.append(slope.flatten())
        if not mine:
            return None
        pairs.append((torch.cat(theirs), torch.cat(mine)))
    size = max(float(slope.abs().max()) for slope in whole.values())
    if not size > 0.0:
        return None

    def apart(factors: Sequence[float]) -> float:
        # A factor of 0 leaves out what may be NaN, as a weight of 0 does.
        left = [b - f * g if f else b for (b, g), f in zip(pairs, factors, strict=True)]
        return max(float(t.abs().nan_to_num(torch.inf).max()) for t in left) / size

    implied = [float(b @ g / (g @ g)) if bool(g.isfinite().all()) and float(g @ g) > 0 else 0.0 for b, g in pairs]
    return Shares(apart, implied)


def _slopes(loss_fn: Any, predictions: Any, target: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    leaves: dict[str, torch.Tensor] = {}

    def leaf(tensor: torch.Tensor, path: str) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        leaves[path] = tensor.detach().clone().requires_grad_()
        return leaves[path].clone()  # for a loss that works in place

    loss = loss_fn(replaced(predictions, leaf), target)
    slopes = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True) if leaves else ()
    named = {path: slope for (path, _), slope in zip(leaves.items(), slopes, strict=True) if slope is not None}
    return named, {path: tensor.detach() for path, tensor in leaves.items()}


def by_parameters(whole: torch.Tensor, parts: Sequence[torch.Tensor]) -> Shares:
    """Compare the gradient with respect to parameters, each flattened into one vector."""
    size = float(whole.abs().max())

    def apart(factors: Sequence[float]) -> float:
        total = sum((f * part for f, part in zip(factors, parts, strict=True) if f), torch.zeros_like(whole))
        return float((whole - total).abs().nan_to_num(torch.inf).max()) / size

    return Shares(apart, None)


def candidates(batches: Sequence[tuple[Any, Any]], loss_fn: Any) -> Iterator[Weights]:
    """Yield what the losses of micro-batches may be means over, the likeliest first."""
    yield Weights([1.0] * len(batches), "1", "one for each micro-batch")
    counters = dict(_counters(batches[0], loss_fn))
    for expression, (count, words) in counters.items():
        yield Weights([float(count(x, y)) for x, y in batches], expression, words)


Counter = Callable[[Any, Any], Any]

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _counters(batch: tuple[Any, Any], loss_fn: Any) -> Iterator[tuple[str, tuple[Counter, str]]]:
    bound = getattr(loss_fn, "keywords", {})  # of functools.partial
    ignored = dict.fromkeys([bound.get("ignore_index", getattr(loss_fn, "ignore_index", -100)), -100])
    class_weights = bound.get("weight", getattr(loss_fn, "weight", None))
    sides = [[*tensors(batch[1], "y")], [*tensors(batch[0], "x")]]
    for index in ignored:
        for path, tensor in itertools.chain(*sides):
            yield from _others(path, tensor, index)
            if isinstance(class_weights, torch.Tensor) and tensor.dtype in _WHOLE:
                count = _counter(path, functools.partial(_class_weights, class_weights, index))
                yield f"class_weights[{path}].sum()", (count, f"the class weights of {path}")
    for side in sides:  # masks before what may be told from padding by chance
        for path, tensor in sorted(side, key=lambda found: found[1].dtype != torch.bool):
            if not tensor.is_complex():
                yield f"{path}.sum()", (_counter(path, torch.sum), f"the sum of {path}")
            if tensor.dtype == torch.bool:
                yield f"(~{path}).sum()", (_counter(path, _unset), f"the entries of {path} that are not set")
            for index in (0, -1):
                yield from _others(path, tensor, index)


def _unset(mask: torch.Tensor) -> torch.Tensor:
    return (~mask).sum()


def _class_weights(weights: torch.Tensor, ignored: int, tensor: torch.Tensor) -> torch.Tensor:
    valid = tensor != ignored
    return torch.where(valid, weights[torch.where(valid, tensor, 0).long()], 0.0).sum()


def _others(path: str, tensor: torch.Tensor, index: int) -> Iterator[tuple[str, tuple[Counter, str]]]:
    """Yield how many entries are not *index*; of samples and tokens also with the shift of a language model."""
    if tensor.dtype in _WHOLE:
        for shift in ("", "[:, 1:]") if tensor.dim() == 2 else ("",):  # noqa: PLR2004
            count = _counter(path, functools.partial(_valid, index, bool(shift)))
            yield f"({path}{shift} != {index}).sum()", (count, f"the entries of {path}{shift} that are not {index}")


def _valid(ignored: int, shifted: bool, tensor: torch.Tensor) -> torch.Tensor:
    return (tensor[:, 1:] if shifted else tensor).ne(ignored).sum()


def _counter(path: str, function: Callable[[torch.Tensor], Any]) -> Counter:
    def count(x: Any, y: Any) -> Any:
        return function(dict((*tensors(x, "x"), *tensors(y, "y")))[path])

    return count
