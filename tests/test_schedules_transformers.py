"""Schedules against transformers 5.24: what its schedules set, step by step, and how theirs are written here.

The values are in ``data/transformers.json``; ``data/make_transformers.py`` made them with transformers' own functions.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ice_engine.errors import ArgumentValueError
from ice_engine.processors.schedules import (
    Schedule,
    constant,
    cosine,
    hard_restarts,
    inverse_sqrt,
    linear,
    polynomial,
    warmup,
    wsd,
)

DATA = json.loads((Path(__file__).parent / "data" / "transformers.json").read_text())
RENAMED = {
    "num_training_steps": "total",
    "num_cycles": "cycles",
    "power": "power",
    "timescale": "timescale",
    "min_lr": "floor",
    "min_lr_rate": "floor_ratio",
}


def renamed(arguments: dict[str, Any]) -> dict[str, Any]:
    """Their arguments by our names. Their ramps start at 0, which wastes the first step."""
    found = {RENAMED[key]: value for key, value in arguments.items() if key in RENAMED}
    steps = arguments["num_warmup_steps"]
    return {**found, "warmup": steps, "start": 0.0} if steps else found


def warmed_up(arguments: dict[str, Any]) -> Schedule:
    steps = arguments["num_warmup_steps"]
    return warmup(steps=steps, start=0.0) if steps else constant()


def cosine_a_step_ahead(arguments: dict[str, Any]) -> Schedule:
    """``..._warmup_lr_rate`` is at its peak in the last step of the warm-up, and a step ahead from there on."""
    steps, total = arguments["num_warmup_steps"], arguments["num_training_steps"]
    start = arguments.get("warmup_lr_rate")
    rest = {key: value for key, value in renamed(arguments).items() if key not in ("total", "warmup", "start")}
    if steps == 1 and start is not None:
        return warmup(steps=1, start=start) * cosine(total=total - 1, rebound=True, **rest)
    return cosine(total=total - 1, warmup=steps - 1, start=start, rebound=True, **rest)


def warmup_stable_decay(arguments: dict[str, Any]) -> Schedule:
    steps, decay = arguments["num_warmup_steps"], arguments["num_decay_steps"]
    stable = arguments.get("num_stable_steps")
    total = arguments["num_training_steps"] if stable is None else steps + stable + decay
    ratio, shape = arguments.get("min_lr_ratio", 0.0), arguments.get("decay_type", "cosine")
    up, cycles = arguments.get("warmup_type", "linear"), arguments.get("num_cycles", 0.5)
    ramp = warmup(steps=steps, start=ratio, shape=up) if steps else constant()
    if cycles == 0.5:
        if up == "linear" and steps:
            return wsd(decay=decay, warmup=steps, start=ratio, shape=shape, floor_ratio=ratio, total=total)
        return ramp * wsd(decay=decay, shape=shape, floor_ratio=ratio, total=total)
    waves = cosine(total=decay, cycles=cycles, floor_ratio=ratio).then(constant(ratio), at=decay)
    return ramp.then(waves, at=total - decay)


SCHEDULES: dict[str, Callable[[dict[str, Any]], Schedule]] = {
    "get_constant_schedule": lambda a: constant(),
    "get_constant_schedule_with_warmup": warmed_up,
    "get_linear_schedule_with_warmup": lambda a: linear(**renamed(a)),
    "get_cosine_schedule_with_warmup": lambda a: cosine(**renamed(a), rebound=True),
    "get_cosine_with_hard_restarts_schedule_with_warmup": lambda a: hard_restarts(**renamed(a)),
    "get_polynomial_decay_schedule_with_warmup": lambda a: polynomial(**renamed(a), floor=a.get("lr_end", 1e-7)),
    "get_inverse_sqrt_schedule": lambda a: inverse_sqrt(**renamed(a)),
    "get_cosine_with_min_lr_schedule_with_warmup": lambda a: cosine(**renamed(a), rebound=True),
    "get_cosine_with_min_lr_schedule_with_warmup_lr_rate": cosine_a_step_ahead,
    "get_wsd_schedule": warmup_stable_decay,
}


def ours(case: dict[str, Any]) -> Schedule:
    return SCHEDULES[case["schedule"]](case["arguments"])


def values(schedule: Schedule, count: int, base: float) -> list[float]:
    return [schedule({"step": t, "initial_lr": base})["lr"] for t in range(count)]


def test_every_schedule_of_transformers_has_a_name_here() -> None:
    assert {case["schedule"] for case in DATA["cases"]} == set(SCHEDULES)


def has_no_first_step(case: dict[str, Any]) -> bool:
    """Without a warm-up, ``..._warmup_lr_rate`` begins with the second value of its cosine."""
    return case["schedule"].endswith("_lr_rate") and not case["arguments"]["num_warmup_steps"]


@pytest.mark.parametrize(
    "case",
    [case for case in DATA["cases"] if not has_no_first_step(case)],
    ids=lambda case: f"{case['schedule']}-{case['arguments']}",
)
def test_every_step_is_transformers(case: dict[str, Any]) -> None:
    """Past their ends too, and without an absolute tolerance."""
    found = values(ours(case), len(case["values"]), case["base"])

    assert found == pytest.approx(case["values"], rel=1e-12, abs=0)


def test_the_one_that_skips_its_first_value_is_ours_a_step_later() -> None:
    (case,) = filter(has_no_first_step, DATA["cases"])
    schedule = cosine(**renamed(case["arguments"]), rebound=True)

    found = values(schedule, len(case["values"]) + 1, case["base"])[1:]
    assert found == pytest.approx(case["values"], rel=1e-12, abs=0)


# -- what transformers gets wrong -----------------------------------------------------------------------------


def defects(what: str) -> list[dict[str, Any]]:
    found = [case for case in DATA["defects"] if case["what"] == what]
    assert found
    return found


@pytest.mark.parametrize(
    "case", defects("warm-up as long as the run") + defects("warm-up longer than the run"), ids=lambda c: c["schedule"]
)
def test_warmup_that_leaves_no_room_is_refused(case: dict[str, Any]) -> None:
    with pytest.raises(ArgumentValueError, match=r"warmup=\.\.\.\) must be below total=10, which includes it"):
        ours(case)


def test_warmup_and_decay_that_leave_no_room_are_refused() -> None:
    (case,) = defects("warm-up and decay longer than the run")

    with pytest.raises(ArgumentValueError, match=r"must fit into total=12, which includes both, got 8 \+ 10"):
        wsd(decay=10, warmup=8, total=12)
    jump = case["values"][8] - case["values"][7]
    assert jump < -0.1  # theirs falls off its ramp


def test_timescale_of_nothing_is_refused() -> None:
    (case,) = defects("timescale 0")

    assert case["raises"] == "ZeroDivisionError: division by zero"
    with pytest.raises(ArgumentValueError, match=r"inverse_sqrt\(timescale=\.\.\.\) must be above 0, got 0"):
        ours(case)


@pytest.mark.parametrize(
    "what", ["lr_end by the default lr, not the group's", "min_lr by the default lr, not the group's"]
)
def test_floor_is_the_same_value_in_every_group(what: str) -> None:
    (case,) = defects(what)
    schedule, (first, second) = ours(case), case["groups"]

    assert values(schedule, 11, first)[10] == values(schedule, 11, second)[10] == 0.1
    assert case["values"][10] == pytest.approx([0.1, 0.01])  # theirs, by the first group's


def test_floor_above_the_rate_is_approached_from_below() -> None:
    (refused,), (rising,) = defects("lr_end above lr"), defects("min_lr above lr: it rises")

    assert "must be smaller" in refused["raises"]
    found = values(ours(refused), 12, 0.5)
    assert found == sorted(found)
    assert found[-1] == 1.0
    assert values(ours(rising), len(rising["values"]), 0.5) == pytest.approx(rising["values"], rel=1e-12)


def test_every_restart_is_at_the_top() -> None:
    """The remainder of a float misses some: 49 * (1 / 49) is below 1."""
    theirs = [(1 + math.cos(math.pi * ((49 * (t / 49)) % 1.0))) / 2 for t in range(49)]

    assert min(theirs) < 1e-9
    assert values(hard_restarts(cycles=49, total=49), 49, 1.0) == [1.0] * 49
