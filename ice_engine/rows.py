"""What a run records, as rows of a tag and a value: one form for TensorBoard, ledgers and Ignite's loggers.

========================== ================================================================================
tag                        value
========================== ================================================================================
``training/loss``          the trainer's output in the micro-batch that filled the window, if it is a number
                           or a tensor with one element; of a dict, each such entry as ``training/<key>``.
                           Anything else, such as predictions, is no number and is left out.
``optimizer/lr/group_0``   and so on, for every param group and every key that a processor writes;
                           ``optimizer/betas/group_0.1`` for the second of a tuple
``.../grad_norm``          before clipping
``.../clipped_norm``       after clipping, if ``clip_norm`` clips over all groups
``.../loss_scale``         with a GradScaler
``.../noise_scale``        and ``update_ratio/<group>``, if :meth:`Optimizer.measure
                           <ice_engine.optimizer.Optimizer.measure>` was asked for them
``.../weight``             items, or micro-batches, behind the step; of all ranks
``.../items_per_second``   that, by the time of the window
``.../time/data``          and ``compute`` and ``step``: where the window's seconds went
``.../skipped``            steps skipped so far
``.../skip``               why this one was: a text
``memory/host``            MiB of this process; ``memory/cuda``, the most that tensors ever took of one GPU
``validation/accuracy``    metrics of an evaluator called ``validation``
========================== ================================================================================

The prefix ``optimizer`` is the optimizer's name. A skipped step has ``skip``, ``skipped`` and ``loss_scale`` alone.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch

from ice_engine.events import StepRecord

OUTPUT, MEMORY = "training", "memory"  # what the tags of neither an optimizer nor an evaluator begin with


@dataclass(frozen=True, slots=True)
class Line:
    """The rows of one moment.

    Attributes:
        time: Seconds since 1970.
        source: The optimizer or evaluator that they are of.
        step: Where they stand: the optimizer's step; for an evaluator, that of the trainer's first optimizer.
        clocks: Others: ``iteration``; of an optimizer also ``attempt``, ``epoch`` and ``micro_batches``; of an
            evaluator ``evaluation``.
        rows: Values by tag.
    """

    time: float
    source: str
    step: int
    clocks: dict[str, int | None]
    rows: dict[str, float | str]


def kept(output: Any) -> Any:
    """Return the numbers in a trainer's *output* so that they can be read later, whatever happens to it by then.

    Nobody waits for a GPU here: what is there is copied, and read by :func:`step_rows`.
    """
    if type(output) is float:
        return output
    if isinstance(output, Mapping):
        return {key: _kept(value) for key, value in output.items()}
    return _kept(output)


def kept_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers in an evaluator's *metrics*, likewise."""
    return {
        key: [_kept(element) for element in value] if isinstance(value, tuple | list) else _kept(value)
        for key, value in metrics.items()
    }


def step_rows(name: str, record: StepRecord, output: Any = None) -> dict[str, float | str]:
    """Return what the *record* of a window says, and the *output* that :func:`kept` returned with it."""
    if record.skipped is not None:
        rows = {f"{name}/skip": record.skipped, f"{name}/loss_scale": record.loss_scale}
    else:
        outputs = output if isinstance(output, dict) else {"loss": output}
        rows = {f"{OUTPUT}/{key}": value for key, value in outputs.items()}
        rows |= {f"{name}/{tag}": value for tag, value in _measured(record)}
    rows[f"{name}/skipped"] = float(record.attempt - record.step)
    return _read(rows)


def metric_rows(name: str, metrics: Mapping[str, Any]) -> dict[str, float | str]:
    """Return the metrics that :func:`kept_metrics` returned."""
    return _read({f"{name}/{key}": value for key, value in metrics.items()})


def step_clocks(record: StepRecord) -> dict[str, int | None]:
    """Return the clocks of a window but its step."""
    return {clock: getattr(record, clock) for clock in ("attempt", "iteration", "epoch", "micro_batches")}


def _measured(record: StepRecord) -> Iterator[tuple[str, Any]]:
    for group, values in record.values.items():
        yield from ((f"{key}/{group}", value) for key, value in values.items())
    yield "grad_norm", record.grad_norm
    yield "clipped_norm", record.clipped_norm
    yield "loss_scale", record.loss_scale
    yield "noise_scale", record.noise_scale
    yield from ((f"update_ratio/{group}", ratio) for group, ratio in (record.update_ratio or {}).items())
    yield "weight", record.weight
    if record.times is not None:
        seconds = sum(record.times.values())
        yield "items_per_second", record.weight / seconds if seconds else None
        yield from ((f"time/{part}", spent) for part, spent in record.times.items())


def _kept(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and not value.is_cpu:
        return value.detach().clone() if value.numel() == 1 else None
    return _number(value)


def _number(value: Any) -> float | None:
    if isinstance(value, torch.Tensor):
        return float(value.detach()) if value.numel() == 1 and not value.is_complex() else None
    if not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:  # an int may be of any size
        return -math.inf if value < 0 else math.inf


def _read(entries: Mapping[str, Any]) -> dict[str, float | str]:
    """Return the numbers and texts among *entries*; those of a tuple such as betas get their places as tags."""
    found: dict[str, float | str] = {}
    for tag, entry in entries.items():
        if type(entry) is float or isinstance(entry, str):
            found[tag] = entry
        elif isinstance(entry, tuple | list):
            found |= _read({f"{tag}.{i}": element for i, element in enumerate(entry)})
        elif entry is not None and (value := _number(entry)) is not None:
            found[tag] = value
    return found
