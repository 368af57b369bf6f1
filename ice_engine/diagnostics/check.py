"""Is one big batch the same as its micro-batches, on a user's own model? If not, which module breaks it, and why."""

import dataclasses
import inspect
import itertools
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from ignite.engine import _prepare_batch

from ice_engine.arguments import count, positive
from ice_engine.batches import batch_size, check_weight, samples
from ice_engine.diagnostics.culprits import Finding, culprits, notes
from ice_engine.diagnostics.randomness import nothing_left_behind
from ice_engine.diagnostics.trial import Gradients, Span, Trial, gap
from ice_engine.errors import ArgumentTypeError, ArgumentValueError
from ice_engine.window import Reduction
from ice_engine.wrappers import bare

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_SHOWN = 4  # modules of one kind in a printed report


@dataclasses.dataclass(frozen=True)
class AccumulationReport:
    """What :func:`check_accumulation` found; true if one big batch and its micro-batches are the same.

    Attributes:
        equal: Whether no gradient differs by more than *tolerance*, with random draws held still.
        tolerance: Largest relative difference that counts as equal.
        even: Largest relative difference of a parameter's gradient for micro-batches of equal size; inf if one
            failed or was not finite; None if the batch does not divide.
        ragged: The same for micro-batches of different sizes; None if the batch is too small for them.
        even_sizes: Samples in each of the equal micro-batches.
        ragged_sizes: Samples in each of the others.
        parameter: Where the largest difference is.
        dtype: Type that model and loss were run in.
        culprits: What makes the difference, in the order of execution; empty if there is none.
        notes: What makes no difference here, and is to be known.
        accumulation_steps: Micro-batches that were asked for; the ragged split has fewer where only so they have
            different sizes, of 2 samples or more.
    """

    equal: bool
    tolerance: float
    even: float | None
    ragged: float | None
    even_sizes: tuple[int, ...]
    ragged_sizes: tuple[int, ...]
    parameter: str
    dtype: torch.dtype
    culprits: tuple[Finding, ...] = ()
    notes: tuple[Finding, ...] = ()
    accumulation_steps: int = 0

    def __bool__(self) -> bool:
        return self.equal

    def __str__(self) -> str:
        sizes = self.even_sizes or self.ragged_sizes
        verdict = "the same as" if self.equal else "NOT the same as"
        name = str(self.dtype).removeprefix("torch.")
        lines = [f"one batch of {sum(sizes)} is {verdict} its micro-batches (to {self.tolerance:.0e}, in {name})"]
        for sizes, worst in ((self.even_sizes, self.even), (self.ragged_sizes, self.ragged)):
            if worst is not None:
                far = "no finite gradient" if math.isinf(worst) else f"gradients differ by {worst:.1e}"
                few = f" ({len(sizes)} micro-batches, not {self.accumulation_steps})"
                lines.append(f"  {_listed(sizes)}{few if len(sizes) != self.accumulation_steps else ''}: {far}")
        if not self.equal and self.parameter:
            lines.append(f"  most in {self.parameter!r}")
        for title, findings in (("broken by", self.culprits), ("note:", self.notes)):
            for why, mend in dict.fromkeys((finding.why, finding.mend) for finding in findings):
                same = [finding.place for finding in findings if (finding.why, finding.mend) == (why, mend)]
                more = f" and {len(same) - _SHOWN} more" if len(same) > _SHOWN else ""
                lines.append(f"{title} {', '.join(same[:_SHOWN])}{more}")
                lines += [line for text in (why, mend) for line in _wrap(text)]
        return "\n".join(lines)


def _listed(sizes: Sequence[int]) -> str:
    runs = [(size, len(list(run))) for size, run in itertools.groupby(sizes)]
    return " + ".join(f"{size}" if times == 1 else f"{times} x {size}" for size, times in runs)


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def check_accumulation(
    model: torch.nn.Module,
    loss_fn: Callable[[Any, Any], torch.Tensor],
    batch: Any,
    accumulation_steps: int,
    *,
    prepare_batch: Callable[..., Any] = _prepare_batch,
    weight: Callable[[Any, Any], float] = batch_size,
    loss_reduction: Reduction = "mean",
    tolerance: float | None = None,
) -> AccumulationReport:
    """Compare the gradient of one big batch with the one that is accumulated over its micro-batches.

    Copies of model and loss are run in training mode, in float64 where they can, through :class:`Optimizer
    <ice_engine.optimizer.Optimizer>`: the batch at once, cut into equal micro-batches, and into a ragged split.
    If gradients differ, every module's outputs are compared to name the ones that break it; then the loss, to
    find the weights that are right. Dropout and other draws of torch are held still meanwhile, and noted. A part of the
    loss that differentiates the model itself, or a module that *loss_fn* closes over, is compared with the rest. They,
    their gradients and the global random generators stay as they are; what else *loss_fn* reaches, such as globals
    other than the model or a numpy ``Generator`` of its own, does not, and is not compared.

    Args:
        model: Called as ``model(x)``. In evaluation mode, all of it is checked in training mode; in training mode,
            modules that are in evaluation mode stay so. Its hooks run for the copies, too.
        loss_fn: ``loss_fn(y_pred, y)``, shape ().
        batch: What a loader gives: of at least *accumulation_steps* samples, in the first dimension of each
            tensor of the ``x`` and ``y`` that *prepare_batch* makes of it; arrays and lists with an entry for each
            sample are cut as well.
        accumulation_steps: Micro-batches per window, at least 2.
        prepare_batch: ``(batch, device=, non_blocking=) -> (x, y)``, called once.
        weight: ``(x, y) ->`` items behind the loss; by default the samples.
        loss_reduction: What the loss is over its items: a ``"mean"``, or their ``"sum"``.
        tolerance: Largest relative difference that counts as equal, above 0; None for 1e-9 in float64, 1e-4 in
            float32, 0.02 in float16 and 0.1 in bfloat16, by the least precise type that is computed in.

    Returns:
        The report. It is true if equal; printed, it tells the differences, the culprits, and what to do.

    Raises:
        ArgumentTypeError: If an argument has the wrong type, or *model* cannot be called with *x* alone.
        ArgumentValueError: If there are fewer samples than micro-batches, tensors have different lengths, nothing is
            trainable, or *model* cannot be copied.
        BackwardError: If the loss is no scalar or requires no gradient.
        NoGradientsError: If every gradient of the big batch is 0.
        NonFiniteGradientError: If the loss or a gradient of the big batch is infinite or NaN.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
        >>> batch = (torch.rand(12, 4), torch.rand(12, 1))
        >>> report = check_accumulation(model, torch.nn.functional.mse_loss, batch, 3)
        >>> bool(report), [culprit.module for culprit in report.culprits]
        (False, ['1'])
        >>> model[1] = torch.nn.LayerNorm(8)
        >>> bool(check_accumulation(model, torch.nn.functional.mse_loss, batch, 3))
        True

    .. versionadded:: 0.1.0
    """
    if not isinstance(model, torch.nn.Module):
        message = f"model must be a torch.nn.Module, got {type(model).__name__}"
        raise ArgumentTypeError(message)
    for argument, function in {"loss_fn": loss_fn, "prepare_batch": prepare_batch, "weight": weight}.items():
        if not callable(function):
            message = f"{argument} must be callable, got {function!r} ({type(function).__name__})"
            raise ArgumentTypeError(message)
    check_weight(weight)
    if prepare_batch is _prepare_batch:
        _check_pair(batch)
    steps = count("accumulation_steps", accumulation_steps, 2)
    if tolerance is not None:
        tolerance = positive("tolerance", tolerance)
    model = bare(model)
    _check_trainable(model)
    with nothing_left_behind(model, loss_fn), torch.enable_grad():
        device = next(model.parameters()).device
        x, y = _prepared(prepare_batch(batch, device=device, non_blocking=False))
        total = samples(x, y)
        if total < steps:
            message = (
                f"the batch has {total} samples, too few for {steps} micro-batches; "
                f"give a larger one, or accumulation_steps={total}"
            )
            raise ArgumentValueError(message)
        _check_call(model, x)
        trial = Trial(model, loss_fn, x, y, total=total, weight=weight, reduction=loss_reduction)
        return _report(trial, steps, tolerance)


def _check_trainable(model: torch.nn.Module) -> None:
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        message = "a scripted model cannot be looked into; give the model as it was before torch.jit.script or trace"
        raise ArgumentTypeError(message)
    lazy = [name for name, p in model.named_parameters() if torch.nn.parameter.is_lazy(p)]
    if lazy:
        message = f"parameter {lazy[0]!r} has no shape yet; run one batch through the model first: model(x)"
        raise ArgumentValueError(message)
    if not any(p.requires_grad for p in model.parameters()):
        message = (
            f"no parameter of {type(model).__name__} is trainable, so there is no gradient to compare; "
            "set model.requires_grad_(True) on what is to be trained"
        )
        raise ArgumentValueError(message)


def _check_pair(batch: Any) -> None:
    if not isinstance(batch, list | tuple) or len(batch) != 2:  # noqa: PLR2004 - x and y
        found = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, list | tuple) else type(batch).__name__
        message = (
            f"batch must be a pair (x, y), got {found}; of a loader, give one batch: next(iter(loader)); of another "
            "batch, say what is x and y: "
            "prepare_batch=lambda batch, device, non_blocking: (batch[0].to(device), batch[1].to(device))"
        )
        raise ArgumentTypeError(message)


def _prepared(pair: Any) -> tuple[Any, Any]:
    if not isinstance(pair, list | tuple) or len(pair) != 2:  # noqa: PLR2004 - x and y
        message = (
            f"prepare_batch must return (x, y), got {type(pair).__name__}; such as "
            "prepare_batch=lambda batch, device, non_blocking: (batch['x'].to(device), batch['y'].to(device))"
        )
        raise ArgumentTypeError(message)
    return pair[0], pair[1]


def _check_call(model: torch.nn.Module, x: Any) -> None:
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # of compiled code
        return
    try:
        signature.bind(x)
    except TypeError as err:
        message = (
            f"{type(model).__name__}.forward{signature} cannot be called as model(x), as create_trainer does: {err}; "
            "wrap it in a module whose forward(x) takes all from x, such as self.model(x['ids'], x['mask']), "
            "and let prepare_batch put them there"
        )
        raise ArgumentTypeError(message) from err


def _report(trial: Trial, steps: int, tolerance: float | None) -> AccumulationReport:
    whole = trial.whole()
    splits = [_even(trial.total, steps), _ragged(trial.total, steps)]
    found = [_attempt(trial, spans) if spans else None for spans in splits]
    types = trial.narrowed | {gradient.dtype for gradient in whole.values()}
    dtype = max((t for t in types if t in _TOLERANCES), key=_TOLERANCES.__getitem__, default=torch.float32)
    limit = tolerance or _TOLERANCES[dtype]
    # Below this, an entry is rounding of larger ones, such as in a bias before a normalisation.
    noise = min(1.0, 100 * torch.finfo(dtype).eps / limit)
    gaps = [None if parts is None else gap(whole, parts, noise) for parts in found]
    even, ragged = (None if worst is None else worst[0] for worst in gaps)
    broken = [spans for spans, worst in zip(splits, gaps, strict=True) if worst is not None and worst[0] > limit]
    return AccumulationReport(
        equal=not broken,
        tolerance=limit,
        even=even,
        ragged=ragged,
        even_sizes=_sizes(splits[0]),
        ragged_sizes=_sizes(splits[1]),
        parameter=max((worst for worst in gaps if worst is not None), default=(0.0, ""))[1],
        dtype=trial.dtype or dtype,
        culprits=culprits(trial, broken[-1], limit) if broken else (),
        notes=notes(trial),
        accumulation_steps=steps,
    )


def _sizes(spans: Sequence[Span]) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in spans)


def _spans(sizes: Sequence[int]) -> list[Span]:
    stops = list(itertools.accumulate(sizes))
    return list(zip([0, *stops], stops, strict=False))


def _even(total: int, steps: int) -> list[Span]:
    return _spans([total // steps] * steps) if total % steps == 0 else []


def _ragged(total: int, steps: int) -> list[Span]:
    """Return a split into different sizes, of at least 2 samples where possible; empty if there is none."""
    splits = []
    for pieces in range(steps, 1, -1):
        size, rest = divmod(total, pieces)
        sizes = [size + (i < rest) for i in range(pieces)]
        if not rest:
            sizes[0], sizes[-1] = size + 1, size - 1
        if len(sizes := [n for n in sizes if n]) > 1:
            splits.append(sizes)
    return _spans(next((s for s in splits if min(s) > 1), splits[0])) if splits else []


def _attempt(trial: Trial, spans: Sequence[Span]) -> Gradients:
    """Return the gradient of these micro-batches; empty and so infinitely far off if one of them fails."""
    try:
        return trial.gradients(spans)
    except (ArgumentTypeError, ArgumentValueError):
        raise
    except Exception:  # noqa: BLE001 - the big batch went through; culprits() says what stopped this one
        return {"": torch.full((1,), math.nan)}
