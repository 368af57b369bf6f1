"""What TensorBoard shows of a run besides curves: which of them stand together, hyperparameters, the configuration."""

import platform
import re
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

_TITLES = {
    "clipped_norm": "gradient norm, before and after clipping",
    "grad_norm": "gradient norm, before and after clipping",
    "items_per_second": "items per second",
    "loss_scale": "loss scale",
    "noise_scale": "gradient noise scale, in items",
    "skipped": "skipped steps",
    "time": "seconds of a window",
    "update_ratio": "step, as a part of the weights",
    "weight": "items behind a step",
}


def layout(tags: Iterable[str], optimizers: Iterable[str]) -> Layout:
    """Return which curves are drawn in one chart, by category and title, for the tab Custom Scalars.

    Losses stand together, whoever found them, and a plan with what it planned.

    Args:
        tags: Of all curves there are.
        optimizers: Their names, with which tags begin.
    """
    names = list(optimizers)
    charts: dict[str, dict[str, list[str]]] = {"run": {}, **{name: {} for name in names}, "machine": {}}
    for tag in tags:
        category, title = _place(tag, names)
        charts[category].setdefault(title, []).append(f"^{re.escape(tag)}$")
    return {
        category: {title: ("Multiline", found) for title, found in of_category.items()}
        for category, of_category in charts.items()
        if of_category
    }


def _place(tag: str, optimizers: list[str]) -> tuple[str, str]:
    source, *parts = tag.split("/")
    if source == PLAN:
        # There, the place in a tuple such as betas stands with the key.
        return parts[0], parts[1].partition(".")[0]
    if source == MEMORY:
        return "machine", "memory in MiB"
    if source in optimizers:
        return source, _TITLES.get(parts[0], parts[0])
    return "run", "loss" if "loss" in tag else source


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
    return {key: _simple(value) for key, value in {**found, **given}.items()}


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
    return value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
