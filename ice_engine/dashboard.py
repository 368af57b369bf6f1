"""What TensorBoard shows of a run besides curves: which of them stand together, hyperparameters, the configuration."""

import platform
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import ignite
import torch
from ignite.engine import Engine

from ice_engine.distributed import world
from ice_engine.names import class_name
from ice_engine.optimizer import Optimizer
from ice_engine.processors.group_mapping import group_name
from ice_engine.processors.processor import name_of
from ice_engine.rows import MEMORY

PLAN = "plan"  # what the tags of planned values begin with

Layout = dict[str, dict[str, tuple[str, list[str]]]]

_CLIPPED = "gradient norm, before and after clipping"

# In the order of the charts, behind those of scheduled values: how it goes, then what it costs.
_TITLES = {
    "clipped_norm": _CLIPPED,
    "grad_norm": "gradient norm",
    "update_ratio": "step, as a part of the weights",
    "noise_scale": "gradient noise scale, in items",
    "skipped": "skipped steps",
    "loss_scale": "loss scale",
    "weight": "items behind a step",
    "items_per_second": "items per second",
    "time": "seconds of a window",
}
_ORDER = ["loss", "", *_TITLES.values()]  # "": any other


def layout(tags: Iterable[str], optimizers: Iterable[str]) -> Layout:
    """Return which curves are drawn in one chart, by category and title, for the tab Custom Scalars.

    All losses stand together, each other metric whoever measured it, and a plan with what it planned.

    Args:
        tags: Of all curves there are.
        optimizers: Their names, with which tags begin.
    """
    tags, names = list(tags), list(optimizers)
    charts: dict[str, dict[str, list[str]]] = {"run": {}, **{name: {} for name in names}, "machine": {}}
    for tag in tags:
        category, title = _place(tag, names, tags)
        charts[category].setdefault(title, []).append(f"^{re.escape(tag)}$")
    return {
        category: {title: ("Multiline", of_category[title]) for title in sorted(of_category, key=_rank)}
        for category, of_category in charts.items()
        if of_category
    }


def _rank(title: str) -> int:
    return _ORDER.index(title if title in _ORDER else "")


def _place(tag: str, optimizers: list[str], tags: list[str]) -> tuple[str, str]:
    source, *parts = tag.split("/")
    if source == PLAN:
        # There, the place in a tuple such as betas stands with the key.
        return parts[0], parts[1].partition(".")[0]
    if source == MEMORY:
        return "machine", "memory in MiB"
    if source in optimizers:
        is_clipped = parts[0] == "grad_norm" and f"{source}/clipped_norm" in tags
        return source, _CLIPPED if is_clipped else _TITLES.get(parts[0], parts[0])
    metric = re.sub(r"\.\d+$", "", "/".join(parts))  # of one with a number for each class, all
    return "run", "loss" if "loss" in metric else metric


def hyperparameters(optimizers: Iterable[Optimizer], given: Mapping[str, Any]) -> dict[str, float | str]:
    """Return what a run was made with, for the tab HParams: what *given* says, and what the optimizers are."""
    optimizers = list(optimizers)
    found: dict[str, Any] = {}
    for optimizer in optimizers:
        prefix = f"{optimizer.name}/" if len(optimizers) > 1 else ""
        found[f"{prefix}class"] = class_name(optimizer.inner)
        found[f"{prefix}accumulation_steps"] = optimizer.accumulation_steps or "by effective_batch_size"
        found[f"{prefix}processors"] = ", ".join(map(name_of, optimizer.processors)) or "none"
        found |= {f"{prefix}{key}": value for key, value in _entries(optimizer)}
    return {str(key): _simple(value) for key, value in {**found, **given}.items()}


def configuration(engine: Engine, optimizers: Iterable[Optimizer], given: Mapping[str, Any]) -> str:
    """Return in Markdown what a run is made of and made with."""
    state = engine.state
    facts = {
        "epochs": state.max_epochs,
        "iterations": getattr(state, "max_iters", None),
        "iterations per epoch": state.epoch_length,
        "processes": world.world_size(),
        **{key: _simple(value) for key, value in given.items()},
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, ignite {ignite.__version__}",
    }
    table = [f"| {key} | {value} |" for key, value in facts.items() if value is not None]
    parts = ["\n".join(["| of the run | |", "|---|---|", *table])]
    for optimizer in optimizers:
        indented = "\n".join(f"    {line}" for line in repr(optimizer).splitlines())
        parts.append(indented)
    return "\n\n".join(parts)


def _entries(optimizer: Optimizer) -> Iterable[tuple[str, Any]]:
    """Yield the numbers that the param groups begin with: once if all have the same, else of each group."""
    for key, default in optimizer.defaults.items():
        if isinstance(default, bool) or not isinstance(default, int | float | tuple | torch.Tensor):
            continue
        values = {
            group_name(group, i): group.get(f"initial_{key}", group[key])
            for i, group in enumerate(optimizer.param_groups)
        }
        if len({str(value) for value in values.values()}) == 1:
            yield key, next(iter(values.values()))
        else:
            yield from ((f"{key}/{group}", value) for group, value in values.items())


def _simple(value: Any) -> float | str:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # An int may be larger than what TensorBoard's floats hold.
    return value if is_number and (isinstance(value, float) or abs(value) <= sys.float_info.max) else str(value)
