"""Why micro-batches differ from their big batch: which module, or what about the loss, in words."""

import dataclasses
import functools
import textwrap
from collections.abc import Sequence
from typing import Any

import torch

from ice_engine.batches import copied, samples
from ice_engine.diagnostics.randomness import Still, seed
from ice_engine.diagnostics.shares import Shares, Weights, by_parameters, by_predictions, candidates
from ice_engine.diagnostics.tracing import Comparison, record
from ice_engine.diagnostics.trial import Gradients, Span, Trial
from ice_engine.names import few

_BATCH_NORM = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d, torch.nn.SyncBatchNorm)

_NO_BATCH_NORM = (
    "use GroupNorm or LayerNorm, or freeze it: eval() after every model.train(), which create_trainer calls. "
    "SyncBatchNorm does not help: it joins ranks, not micro-batches"
)


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that makes micro-batches differ from the big batch.

    Attributes:
        module: Path of the module in the model, ``""`` for the model itself, ``"loss_fn"`` for the loss.
        kind: Its class.
        why: What it does.
        mend: What to do about it.
    """

    module: str
    kind: str
    why: str
    mend: str

    @property
    def place(self) -> str:
        """The module and its class, such as ``'features.1' (BatchNorm2d)``."""
        return f"{self.module!r} ({self.kind})" if self.module else f"the model itself ({self.kind})"

    def __str__(self) -> str:
        return f"{self.place}: {self.why}" + (f"; {self.mend}" if self.mend else "")


def culprits(trial: Trial, spans: Sequence[Span], limit: float) -> tuple[Finding, ...]:
    """Name what makes these micro-batches differ from the big batch.

    Args:
        trial: Of the model.
        spans: First sample and the one after the last, of each micro-batch.
        limit: Largest relative difference that counts as equal.
    """
    model, _ = trial.fresh()
    with Still(lambda: None):
        seed()
        predictions, recorded = record(model, trial.piece(0, trial.total)[0])
        predictions = copied(predictions)
        carried, fresh, other = (Comparison(recorded, trial.total, limit) for _ in range(3))
        seed(1)  # torch is held still: what differs now draws from another generator
        other.run(trial.fresh()[0], trial.piece(0, trial.total)[0], 0, trial.total)
        outputs, worn = [], trial.fresh()[0]
        for start, stop in spans:
            seed()
            outputs.append(copied(carried.run(worn, trial.piece(start, stop)[0], start, stop)))
            seed()
            fresh.run(trial.fresh()[0], trial.piece(start, stop)[0], start, stop)
    findings = [
        _drawing_finding(name, model.get_submodule(name), where)
        if name in other.parted
        else _module_finding(name, model.get_submodule(name), where, stateful=name not in fresh.parted)
        for name, where in carried.parted.items()
    ]
    findings += [
        _failed_finding(name, model.get_submodule(name), message)
        for name, message in carried.failed.items()
        if name not in carried.parted
    ]
    findings += _loss_finding(trial, spans, [predictions, *outputs], limit, alone=not findings)
    return tuple(findings) or (_unexplained(trial, predictions),)


def _drawing_finding(name: str, module: torch.nn.Module, where: str) -> Finding:
    why = "it draws random numbers in the shape of its batch from Python's or numpy's generator, not held still here"
    mend = "draw them with torch, such as torch.randn_like(x), which is held still; or leave them out of this check"
    return Finding(name, type(module).__name__, why + (f" ({where})" if where else ""), mend)


def _module_finding(name: str, module: torch.nn.Module, where: str, *, stateful: bool) -> Finding:
    kind, where = type(module).__name__, f" ({where})" if where else ""
    if isinstance(module, _BATCH_NORM) or "BatchNorm" in kind:
        why = f"in training mode it normalises with the statistics of the micro-batch, not of the whole batch{where}"
        return Finding(name, kind, why, _NO_BATCH_NORM)
    if stateful:
        return Finding(
            name,
            kind,
            f"it keeps state that each micro-batch changes for the next one{where}",
            "change that state once per step instead: on OPTIMIZER_STEP_COMPLETED",
        )
    return Finding(
        name,
        kind,
        f"what it gives for a sample depends on the other samples of its batch{where}",
        "compute over the features of each sample, or keep running statistics that change once per step",
    )


def _failed_finding(name: str, module: torch.nn.Module, message: str) -> Finding:
    batch_norm = isinstance(module, _BATCH_NORM)
    mend = _NO_BATCH_NORM if batch_norm else "make it work on as few samples, or use larger micro-batches"
    return Finding(name, type(module).__name__, message, mend)


def _unexplained(trial: Trial, predictions: Any) -> Finding:
    model, loss_fn = trial.fresh()
    with Still(lambda: None):
        seed()
        if loss_fn(copied(predictions), trial.piece(0, trial.total)[1]).requires_grad:
            why = (
                "a part of it does not come from y_pred, such as a penalty on the weights, and is not the mean of "
                "those of the micro-batches"
            )
            mend = "where the loss is a sum over the samples, multiply that part with their number"
            return Finding("loss_fn", _kind(trial.loss_fn), why, mend)
    return Finding(
        "",
        type(model).__name__,
        "all modules and the loss agree, the gradient does not",
        "look for a hook on gradients, or a backward of its own, that depends on the batch, and for a loss with state",
    )


def _loss_finding(
    trial: Trial,
    spans: Sequence[Span],
    predictions: Sequence[Any],
    limit: float,
    *,
    alone: bool,
) -> list[Finding]:
    """Find the factors with which the losses of the micro-batches add up to that of the big batch."""
    shares: Shares | None = None
    batches = [trial.piece(start, stop) for start, stop in spans]
    try:
        if all(p is not None for p in predictions):
            targets = [trial.piece(0, trial.total)[1], *(y for _, y in batches)]
            with Still(lambda: None):
                seed()
                shares = by_predictions(lambda: trial.fresh()[1], predictions, targets, spans, trial.total)
        if shares is None and alone:
            ones = [trial.gradients([span], weight=lambda *_: 1) for span in [(0, trial.total), *spans]]
            whole, *parts = (_vector(gradients, ones[0]) for gradients in ones)
            shares = by_parameters(whole, parts)
    except Exception as err:  # noqa: BLE001 - the big batch went through
        why = textwrap.shorten(f"it fails on a micro-batch: {type(err).__name__}: {err}", 200)
        return [Finding("loss_fn", _kind(trial.loss_fn), why, "")] if alone else []
    if shares is None:
        return []
    return _judge_loss(trial, batches, shares, limit)


def _vector(gradients: Gradients, like: Gradients) -> torch.Tensor:
    found = [gradients.get(name, torch.zeros_like(gradient)) for name, gradient in like.items()]
    return torch.cat([gradient.flatten() for gradient in found])


def _judge_loss(trial: Trial, batches: Sequence[tuple[Any, Any]], shares: Shares, limit: float) -> list[Finding]:
    """Say what the loss is, if not what weights and *loss_reduction* take it for."""
    kind, total = _kind(trial.loss_fn), trial.total
    given = [float(trial.weight(x, y)) for x, y in batches]
    summed = trial.reduction == "sum"
    whole = float(trial.weight(*trial.piece(0, total))) if summed else 0.0
    if sum(given) > 0 and shares.apart([(whole if summed else w) / sum(given) for w in given]) <= limit:
        return []
    if shares.apart([1.0] * len(batches)) <= limit:
        mend = (
            "reduce it with a mean; or say so: Optimizer(..., loss_reduction='sum'), and here loss_reduction='sum', "
            "with weight= the number of items that the step is to be the mean over"
        )
        return [Finding("loss_fn", kind, "it is a sum over the batch, not a mean", mend)]
    sizes = [float(samples(x, y)) for x, y in batches]
    default = Weights(sizes, "", "the samples")
    for weights in (default, *candidates(batches, trial.fresh()[1])):
        part = sum(weights.values)
        if part > 0 and shares.apart([w / part for w in weights.values]) <= limit:
            return [_weighed_finding(kind, weights, given, summed=summed)]
    if shares.implied is not None and shares.apart(shares.implied) <= limit:
        held = ", ".join(f"{factor:.3g}" for factor in shares.implied)
        why = f"it is a mean over something of which the micro-batches of {_numbers(sizes)} samples hold {held}"
        return [Finding("loss_fn", kind, why, "pass weight= the number that it divides by, here and to create_trainer")]
    why = "what it gives for a sample depends on the other samples of its batch, as a contrastive loss does"
    mend = (
        "no weights mend this: compute it over the whole window at once, from outputs that were kept, or against a "
        "queue of earlier ones"
    )
    return [Finding("loss_fn", kind, why, mend)]


def _weighed_finding(kind: str, weights: Weights, given: Sequence[float], *, summed: bool) -> Finding:
    why = f"it is a mean over {weights.words} ({_numbers(weights.values)} in the micro-batches)"
    why += ", not a sum" if summed else f", weighed with {_numbers(given)}"
    mend = [
        "take out loss_reduction='sum'" if summed else "",
        f"pass weight=lambda x, y: {weights.expression}, here and to create_trainer" if weights.expression else "",
    ]
    return Finding("loss_fn", kind, why, ", and ".join(filter(None, mend)) or "leave out weight=: it is the samples")


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _kind(loss_fn: Any) -> str:
    inner = loss_fn.func if isinstance(loss_fn, functools.partial) else loss_fn
    return getattr(inner, "__name__", type(inner).__name__)


def notes(trial: Trial) -> tuple[Finding, ...]:
    """Name what was held still or left as it is for the comparison."""
    model, found = trial.model, []
    if trial.drawn_outside:
        why = (
            "draws at random (Python's or numpy's generator), anew for every micro-batch; here that begins anew from "
            "the same seed for each, which holds still only what does not depend on their size"
        )
        found.append(Finding("", type(model).__name__, why, ""))
    for path, operation in trial.drawing.items():
        kind = _kind(trial.loss_fn) if path == "loss_fn" else type(model.get_submodule(path)).__name__
        why = (
            f"draws at random ({operation}), anew for every micro-batch; held still here. One batch and its "
            "micro-batches then agree in expectation, not number by number"
        )
        found.append(Finding(path, kind, why, ""))
    asleep = [name for name, module in model.named_modules() if not module.training] if model.training else []
    if asleep:
        kind = type(model.get_submodule(asleep[0])).__name__
        why = (
            f"is in evaluation mode (of all: {few(asleep)}) and was left in it; create_trainer calls model.train(), "
            "which would end that"
        )
        found.append(Finding(asleep[0], kind, why, "override train() in the model to keep it"))
    return tuple(found)
