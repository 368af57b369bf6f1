"""Schedules against mmcv 1.7.2: what its updater hooks wrote, iteration by iteration, and how theirs are written here.

The values are in ``data/mmcv.json``; ``data/make_mmcv.py`` made them with mmcv's own hooks.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ice_engine.errors import ArgumentValueError, ProcessorValueError
from ice_engine.processors.schedules import (
    Schedule,
    constant,
    cosine,
    cosine_restarts,
    cyclic_anneal,
    exponential,
    flat_cosine,
    inverse,
    one_cycle,
    one_cycle_momentum,
    polynomial,
    step,
    warmup,
)

DATA = json.loads((Path(__file__).parent / "data" / "mmcv.json").read_text())


def floor(arguments: dict[str, Any], what: str) -> dict[str, Any]:
    """``min_lr`` is a value, ``min_lr_ratio`` a multiple of the initial one; so they are here."""
    names = {f"min_{what}": "floor", f"min_{what}_ratio": "floor_ratio"}
    return {names[key]: value for key, value in arguments.items() if key in names}


def clamped(schedule: Schedule, least: float | None) -> Schedule:
    return schedule if least is None else schedule.clamp(min=least)


def renamed(arguments: dict[str, Any], **names: str) -> dict[str, Any]:
    return {ours: arguments[theirs] for theirs, ours in names.items() if theirs in arguments}


def cyclic_ratio(ratio: Any) -> Any:
    """A tuple of one number is, in mmcv, that number."""
    return ratio[0] if isinstance(ratio, list) and len(ratio) == 1 else ratio


# What each hook is here: its arguments and `unit=` and `dst=`, to a schedule.
CYCLIC = {"cyclic_times": "times", "step_ratio_up": "up", "anneal_strategy": "anneal", "gamma": "gamma"}
ONE_CYCLE = {"pct_start": "pct_start", "anneal_strategy": "anneal", "three_phase": "three_phase"}
POLICIES: dict[str, Callable[..., Schedule]] = {
    "FixedLrUpdaterHook": lambda a, **to: constant(**to),
    "StepLrUpdaterHook": lambda a, **to: clamped(
        step(step_size=a["step"], gamma=a.get("gamma", 0.1), **to), a.get("min_lr")
    ),
    "ExpLrUpdaterHook": lambda a, **to: exponential(gamma=a["gamma"], **to),
    "PolyLrUpdaterHook": lambda a, **to: polynomial(**renamed(a, power="power"), **floor(a, "lr"), **to),
    "InvLrUpdaterHook": lambda a, **to: inverse(**renamed(a, gamma="gamma", power="power"), **to),
    "CosineAnnealingLrUpdaterHook": lambda a, **to: cosine(**floor(a, "lr"), **to),
    "FlatCosineAnnealingLrUpdaterHook": lambda a, **to: flat_cosine(
        **renamed(a, start_percent="flat"), **floor(a, "lr"), **to
    ),
    "CosineRestartLrUpdaterHook": lambda a, **to: cosine_restarts(
        periods=a["periods"], weights=a.get("restart_weights"), **floor(a, "lr"), **to
    ),
    "CyclicLrUpdaterHook": lambda a, **to: cyclic_anneal(
        target_ratio=cyclic_ratio(a.get("target_ratio", (10, 1e-4))), **renamed(a, **CYCLIC), **to
    ),
    "OneCycleLrUpdaterHook": lambda a, **to: one_cycle(
        **renamed(a, **ONE_CYCLE, total_steps="total", div_factor="div_factor", final_div_factor="final_div_factor"),
        **to,
    ),
    "LinearAnnealingLrUpdaterHook": lambda a, **to: polynomial(**floor(a, "lr"), **to),
    "StepMomentumUpdaterHook": lambda a, **to: clamped(
        step(step_size=a["step"], gamma=a.get("gamma", 0.5), **to), a.get("min_momentum")
    ),
    "CosineAnnealingMomentumUpdaterHook": lambda a, **to: cosine(**floor(a, "momentum"), **to),
    "LinearAnnealingMomentumUpdaterHook": lambda a, **to: polynomial(**floor(a, "momentum"), **to),
    "CyclicMomentumUpdaterHook": lambda a, **to: cyclic_anneal(
        target_ratio=cyclic_ratio(a.get("target_ratio", (0.85 / 0.95, 1.0))), **renamed(a, **CYCLIC), **to
    ),
    "OneCycleMomentumUpdaterHook": lambda a, **to: one_cycle_momentum(
        **renamed(a, **ONE_CYCLE, base_momentum="low", max_momentum="high"), **to
    ),
}


def warm_up(arguments: dict[str, Any], momentum: bool, dst: str) -> Schedule:
    """mmcv multiplies the regular rate by the ramp, and divides momentum by it: then its line is a harmonic ramp."""
    ratio = arguments.get("warmup_ratio", 0.9 if momentum else 0.1)
    shapes = {"constant": "constant", "linear": "harmonic" if momentum else "linear", "exp": "exponential"}
    length = "epochs" if arguments.get("warmup_by_epoch") else "steps"
    return warmup(
        **{length: arguments["warmup_iters"]},
        start=1 / ratio if momentum else ratio,
        shape=shapes[arguments["warmup"]],  # type: ignore[arg-type]
        unit="iteration",
        dst=dst,
    )


def ours(case: dict[str, Any]) -> Schedule:
    arguments, dst = case["arguments"], case["key"]
    schedule = POLICIES[case["hook"]](arguments, unit="epoch" if case["by_epoch"] else "iteration", dst=dst)
    if arguments.get("warmup"):
        return warm_up(arguments, "Momentum" in case["hook"], dst) * schedule
    return schedule


def base(case: dict[str, Any]) -> float:
    """OneCycle ignores the optimizer's rate; its ``max_lr`` is our initial value."""
    return float(case["arguments"].get("max_lr", case["base"]))


def values(case: dict[str, Any], count: int) -> list[float]:
    schedule, n, found = ours(case), case["epoch_length"], []
    for i in range(count):
        mapping = {
            "iteration": i + 1,
            "epoch": i // n + 1,
            "epoch_length": n,
            "max_epochs": case["max_epochs"],
            "max_iters": case["max_iters"],
            f"initial_{case['key']}": base(case),
        }
        found.append(schedule(mapping)[case["key"]])
    return found


def same(case: dict[str, Any]) -> Any:
    # Near the end of a linear OneCycle mmcv's value is the difference of two that are up to 1e6 times as large, and has
    # lost as many digits; ours has not, see below. Everything else agrees to 1e-12 and without an absolute tolerance.
    cancels = "OneCycleLr" in case["hook"] and case["arguments"].get("anneal_strategy") == "linear"
    return pytest.approx(case["values"], rel=1e-12, abs=4e-16 * base(case) if cancels else 0)


def unsorted(case: dict[str, Any]) -> bool:
    times = case["arguments"].get("step")
    return isinstance(times, list) and times != sorted(times)


@pytest.mark.parametrize("hook", sorted({case["hook"] for case in DATA["cases"]}))
def test_every_iteration_is_mmcvs(hook: str) -> None:
    cases = [case for case in DATA["cases"] if case["hook"] == hook and not unsorted(case)]

    assert cases
    for case in cases:
        assert len(case["values"]) == case["max_iters"]
        assert values(case, len(case["values"])) == same(case), case


def test_all_but_one_of_mmcvs_cases_are_compared() -> None:
    assert len(DATA["cases"]) >= 400
    assert {case["hook"] for case in DATA["cases"]} == set(POLICIES)
    (odd,) = filter(unsorted, DATA["cases"])

    # In [8, 3], mmcv takes both drops at 8; nobody means that.
    with pytest.raises(ArgumentValueError, match=r"rising times.*got \[8, 3\]"):
        ours(odd)


def test_linear_one_cycle_ends_exactly_where_it_should_and_mmcv_does_not() -> None:
    ends = [
        c for c in DATA["cases"] if c["arguments"].get("anneal_strategy") == "linear" and "max_lr" in c["arguments"]
    ]
    ends = [case for case in ends if "total_steps" not in case["arguments"]]

    assert ends
    for case in ends:
        end = case["arguments"]["max_lr"] / case["arguments"]["div_factor"] / 1e4
        assert values(case, case["max_iters"])[-1] == end
    assert any(case["values"][-1] != pytest.approx(end, rel=1e-12) for case in ends)


# -- where mmcv is not defined --------------------------------------------------------------------------------

PAST = [case for case in DATA["defects"] if case["past"]]
ENDLESS = ("Fixed", "Step", "Exp", "Inv", "Cyclic")


@pytest.mark.parametrize("case", PAST, ids=lambda case: case["hook"])
def test_past_the_end_of_the_run_it_is_defined(case: dict[str, Any]) -> None:
    end, count = case["max_iters"], case["max_iters"] + case["past"]
    found = values(case, count)

    before = {**case, "values": case["values"][:end]}
    assert found[: len(before["values"])] == same(before)
    assert all(isinstance(value, float) and math.isfinite(value) and value >= 0 for value in found)
    if case["hook"].startswith(ENDLESS):
        assert found == same(case)  # mmcv goes on, and so does ours
    elif "total_steps" not in case["arguments"] and "CosineRestart" not in case["hook"]:
        assert found[end:] == [found[end]] * case["past"]  # mmcv: complex, negative, rising again, or an exception


def test_mmcv_itself_is_not_defined_past_the_end() -> None:
    past = [value for case in PAST for value in case["values"][case["max_iters"] :]]

    assert any(isinstance(value, str) and "j" in value for value in past)  # a complex rate
    assert any(isinstance(value, float) and value < 0 for value in past)
    assert sum("UnboundLocalError" in case.get("raises", "") for case in PAST) == 9
    assert sum("exceeds cumulative_periods" in case.get("raises", "") for case in PAST) == 4


@pytest.mark.parametrize("case", [c for c in PAST if c["hook"].startswith("CosineAnnealing")], ids=repr)
def test_cosine_that_rebounds_is_mmcvs_past_the_end_too(case: dict[str, Any]) -> None:
    what = "momentum" if "Momentum" in case["hook"] else "lr"
    schedule = cosine(**floor(case["arguments"], what), total=case["max_iters"], unit="iteration", rebound=True)
    if case["by_epoch"]:
        schedule = cosine(**floor(case["arguments"], what), total=case["max_epochs"], unit="epoch", rebound=True)
    n = case["epoch_length"]
    mappings = [
        {"iteration": i + 1, "epoch": i // n + 1, "initial_lr": case["base"]} for i in range(len(case["values"]))
    ]

    assert [schedule(mapping)["lr"] for mapping in mappings] == pytest.approx(case["values"], rel=1e-12, abs=0)


def defect(hook: str, **arguments: Any) -> dict[str, Any]:
    """The one case of *hook* whose arguments include these."""
    (found,) = [
        case
        for case in DATA["defects"]
        if case["hook"] == hook and not case["past"] and arguments.items() <= case["arguments"].items()
    ]
    return found


@pytest.mark.parametrize("hook", ["CyclicLrUpdaterHook", "CyclicMomentumUpdaterHook"])
def test_cycle_without_a_rise_starts_at_the_peak_and_ends_where_it_was_told(hook: str) -> None:
    case = defect(hook, step_ratio_up=0.0)  # 2 cycles of 10, gamma 0.5
    found, start = values(case, 20), case["base"]
    high, low = (10, 1e-4) if hook == "CyclicLrUpdaterHook" else (0.85 / 0.95, 1.0)

    for cycle, scale in enumerate((1, 0.5)):
        top, bottom = start * (1 + scale * (high - 1)), start * low
        half = [(1 + math.cos(math.pi * c / 10)) / 2 for c in range(10)]
        assert found[10 * cycle :][:10] == pytest.approx([bottom + (top - bottom) * h for h in half], rel=1e-12)
    # mmcv weakens the end of the second cycle instead of its peak.
    assert case["values"][:10] == pytest.approx(found[:10])
    assert case["values"][10] == pytest.approx(start * high)


@pytest.mark.parametrize("three_phase", [False, True])
def test_one_cycle_whose_rise_has_no_length_starts_at_the_peak(three_phase: bool) -> None:
    case = defect("OneCycleLrUpdaterHook", pct_start=0.05, three_phase=three_phase)  # of 20: ends at iteration 0

    assert case["raises"] == "ZeroDivisionError: float division by zero"
    found = values(case, 20)
    assert found[0] == 1.0
    assert found[-1] == 1 / 25 / 1e4
    assert found[1:] == sorted(found[1:], reverse=True)


def test_more_cycles_than_iterations_are_refused() -> None:
    case = defect("CyclicLrUpdaterHook", cyclic_times=21)  # of 20 iterations

    assert case["raises"] == "ZeroDivisionError: integer modulo by zero"
    with pytest.raises(ProcessorValueError, match="fit times=21 cycles into 20; each needs one at least"):
        values(case, 1)
    with pytest.raises(ArgumentValueError, match="must be at least times=21, a step for each cycle, got 20"):
        cyclic_anneal(times=21, total=20)
