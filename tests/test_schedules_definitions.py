"""Schedules against their equations, in 40 digits: those that torch does not have, and times that are no whole numbers.

The equations are written here a second time, from the papers, in mpmath. Relative tolerance 1e-12.
"""

import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import cos, mpf, pi, sqrt, workdps

import ice_engine as ice
from ice_engine.errors import ArgumentTypeError, MissingKeyError, ProcessorValueError
from ice_engine.processors import schedules
from ice_engine.processors.schedules import Schedule, function, layer_decay, multiplicative, warmup

Equation = Callable[..., Any]


def value(schedule: Schedule, t: float, base: float = 1.0, **entries: Any) -> float:
    whole = math.floor(t)
    mapping = {"step": whole, "iteration": whole + 1, "epoch": whole + 1, **entries}
    if t != whole:  # a resumed run may stretch its clocks
        mapping["stretch"] = dict.fromkeys(("step", "iteration", "epoch"), (0, t - whole, 1.0))
    return float(schedule({f"initial_{schedule.dst}": base, **mapping})[schedule.dst])


def linear_ramp(t: Any, steps: int, start: float | None) -> Any:
    s = mpf(1) / (steps + 1) if start is None else mpf(start)
    return s + (1 - s) * t / steps


def to_floor(left: Any, base: Any, floor: float, floor_ratio: float | None) -> Any:
    """The value when *left* of the way from *base* to the floor is left."""
    end = base * mpf(floor_ratio) if floor_ratio is not None else mpf(floor)
    return end + (base - end) * left


def warmup_(t: Any, base: Any, *, steps: int, start: float, shape: str) -> Any:
    p, s = t / steps, mpf(start)
    ways = {
        "linear": lambda: s + (1 - s) * p,
        "constant": lambda: s,
        "exponential": lambda: s ** (1 - p),
        "harmonic": lambda: 1 / ((1 - p) / s + p),
        "cosine": lambda: 1 - (1 - s) * (1 + cos(pi * p)) / 2,
        "1-sqrt": lambda: 1 - (1 - s) * sqrt(1 - p),
    }
    return base if t >= steps else base * ways[shape]()


def inverse_(t: Any, base: Any, *, gamma: float, power: float) -> Any:
    return base / (1 + mpf(gamma) * t) ** mpf(power)


def inverse_sqrt_(t: Any, base: Any, *, warmup: int, start: float | None, timescale: float | None) -> Any:
    if t < warmup:
        return base * linear_ramp(t, warmup, start)
    tau = mpf(timescale if timescale is not None else warmup or 10_000)
    return base * sqrt(tau / (tau + t - warmup))


def flat_cosine_(t: Any, base: Any, *, flat: float, total: int, floor: float, floor_ratio: float | None) -> Any:
    change = round(flat * total)
    if t < change:
        return base
    left = (1 + cos(pi * (t - change) / (total - change))) / 2 if t < total else 0
    return to_floor(left, base, floor, floor_ratio)


def wsd_(
    t: Any,
    base: Any,
    *,
    warmup: int,
    stable: int,
    decay: int,
    start: float | None,
    shape: str,
    floor: float,
    floor_ratio: float | None,
) -> Any:
    if t < warmup:
        return base * linear_ramp(t, warmup, start)
    p = min(max((t - warmup - stable) / mpf(decay), 0), 1)
    left = {"1-sqrt": 1 - sqrt(p), "linear": 1 - p, "cosine": (1 + cos(pi * p)) / 2}[shape]
    return to_floor(left, base, floor, floor_ratio)


def cosine_restarts_(
    t: Any, base: Any, *, periods: list[int], weights: list[float], floor: float, floor_ratio: float | None
) -> Any:
    for period, weight in zip(periods, weights, strict=True):
        if t < period:
            return to_floor(mpf(weight) * (1 + cos(pi * t / period)) / 2, base, floor, floor_ratio)
        t -= period
    return to_floor(0, base, floor, floor_ratio)


def hard_restarts_(t: Any, base: Any, *, cycles: int, length: int, warmup: int, start: float | None) -> Any:
    if t < warmup:
        return base * linear_ramp(t, warmup, start)
    p = cycles * (t - warmup) / length
    return base * (1 + cos(pi * (p - int(p)))) / 2 if t - warmup < length else mpf(0)


def cosine_(
    t: Any,
    base: Any,
    *,
    length: int,
    warmup: int,
    start: float | None,
    floor: float,
    floor_ratio: float | None,
    cycles: float,
    rebound: bool,
) -> Any:
    if t < warmup:
        return base * linear_ramp(t, warmup, start)
    p = (t - warmup) / length
    return to_floor((1 + cos(2 * pi * mpf(cycles) * (p if rebound else min(p, 1)))) / 2, base, floor, floor_ratio)


def cyclic_anneal_(
    t: Any, base: Any, *, target_ratio: tuple[float, float], times: int, up: float, gamma: float, length: int, kind: str
) -> Any:
    cycle = int(t / length)
    since, rise = t - cycle * length, math.floor(up * length)
    high, low = map(mpf, target_ratio)
    peak = base * (1 + mpf(gamma) ** cycle * (high - 1))
    first, last, p = (
        (base, peak, since / rise) if since < rise else (peak, base * low, (since - rise) / (length - rise))
    )
    return first + (last - first) * (p if kind == "linear" else (1 - cos(pi * p)) / 2)


sizes = st.integers(1, 60)
times = st.integers(0, 400).map(lambda half: half / 2)
parts = st.floats(0.01, 1.0)
floors = st.one_of(
    st.fixed_dictionaries({"floor": st.just(0.0) | st.floats(1e-6, 1.0), "floor_ratio": st.none()}),
    st.fixed_dictionaries({"floor": st.just(0.0), "floor_ratio": parts}),
)
ramps = st.one_of(
    st.just({"warmup": 0, "start": None}),
    st.fixed_dictionaries({"warmup": st.integers(1, 30), "start": st.none() | st.floats(0.0, 1.0)}),
)


def both(ours: dict[str, Any], **theirs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return ours, {**ours, **theirs}


def without(arguments: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key not in keys}


@st.composite
def spans(draw: st.DrawFn, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A total that includes a warmup; the equation counts what is left of it."""
    ramp, length = draw(ramps), draw(sizes)
    rest = {key: draw(strategy) for key, strategy in more.items()}
    rest |= rest.pop("floors", {})
    return {"total": ramp["warmup"] + length, **ramp, **rest}, {"length": length, **ramp, **rest}


@st.composite
def stable(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    ramp, flat, decay = draw(ramps), draw(st.integers(0, 60)), draw(sizes)
    rest = {**ramp, **draw(floors), "decay": decay, "shape": draw(st.sampled_from(["1-sqrt", "linear", "cosine"]))}
    return {"total": ramp["warmup"] + flat + decay, **rest}, {"stable": flat, **rest}


@st.composite
def restarts(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    periods = draw(st.lists(sizes, min_size=1, max_size=5))
    weights = draw(st.lists(st.floats(0.1, 2.0), min_size=len(periods), max_size=len(periods)))
    return both({"periods": periods, "weights": weights, **draw(floors)})


@st.composite
def cycles(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    count, length, kind = draw(st.integers(1, 5)), draw(sizes), draw(st.sampled_from(["cos", "linear"]))
    ratios, up, gamma = (draw(st.floats(1, 10)), draw(parts)), draw(st.floats(0, 0.99)), draw(parts)
    shared = {"target_ratio": ratios, "times": count, "up": up, "gamma": gamma}
    spare = draw(st.integers(0, count - 1))  # what does not make a cycle more
    return {**shared, "anneal": kind, "total": count * length + spare}, {**shared, "kind": kind, "length": length}


SHAPES = ["linear", "constant", "exponential", "harmonic", "cosine", "1-sqrt"]
WARMUPS = st.fixed_dictionaries({"steps": sizes, "start": parts, "shape": st.sampled_from(SHAPES)})
EQUATIONS: dict[str, tuple[Equation, st.SearchStrategy[tuple[dict[str, Any], dict[str, Any]]]]] = {
    "warmup": (warmup_, WARMUPS.map(both)),
    "inverse": (
        inverse_,
        st.fixed_dictionaries({"gamma": st.floats(1e-4, 10), "power": st.floats(0.1, 4)}).map(both),
    ),
    "inverse_sqrt": (
        inverse_sqrt_,
        st.builds(lambda ramp, scale: both({**ramp, "timescale": scale}), ramps, st.none() | st.floats(0.5, 500)),
    ),
    "flat_cosine": (
        flat_cosine_,
        st.builds(
            lambda flat, total, floor: both({"flat": flat, "total": total, **floor}), st.floats(0, 1), sizes, floors
        ),
    ),
    "wsd": (wsd_, stable()),
    "trapezoid": (
        lambda t, base, **a: wsd_(t, base, shape="linear", floor=0.0, floor_ratio=None, **a),
        stable().map(lambda pair: tuple(without(a, "shape", "floor", "floor_ratio") for a in pair)),
    ),
    "cosine": (cosine_, spans(floors=floors, cycles=st.floats(0.1, 3), rebound=st.booleans())),
    "cosine_restarts": (cosine_restarts_, restarts()),
    "hard_restarts": (hard_restarts_, spans(cycles=st.integers(1, 9))),
    "cyclic_anneal": (cyclic_anneal_, cycles()),
}


@pytest.mark.parametrize("name", EQUATIONS)
@settings(max_examples=40)
@given(data=st.data(), base=st.floats(1e-5, 10))
def test_every_value_is_that_of_the_equation(name: str, data: st.DataObject, base: float) -> None:
    equation, drawn = EQUATIONS[name]
    ours, theirs = data.draw(drawn)
    schedule = getattr(schedules, name)(**ours)

    for t in data.draw(st.lists(times, min_size=8, max_size=8)):
        with workdps(40):
            expected = float(equation(mpf(t), mpf(base), **theirs))
        # Where a wave touches 0, what is left of it is a difference: exact to the last place of the base.
        assert value(schedule, t, base) == pytest.approx(expected, rel=1e-12, abs=1e-15 * base), t


# -- factors --------------------------------------------------------------------------------------------------


def test_batch_size_scales_linearly_or_by_its_root() -> None:
    assert value(schedules.batch_scaling(1024), 9, 0.1) == pytest.approx(0.4)
    assert value(schedules.batch_scaling(64), 9, 0.1) == pytest.approx(0.025)
    assert value(schedules.batch_scaling(1024, rule="sqrt"), 9, 0.1) == pytest.approx(0.2)
    assert value(schedules.batch_scaling(18, 8, rule="sqrt"), 9, 2.0) == pytest.approx(3.0)


@given(decay=st.floats(0.1, 1.0), depth=st.integers(0, 48) | st.floats(0, 48))
def test_layer_decay_is_a_power_of_the_groups_own_depth(decay: float, depth: float) -> None:
    with workdps(40):
        expected = float(3 * mpf(decay) ** mpf(depth))

    assert value(layer_decay(decay), 7, 3.0, depth=depth) == pytest.approx(expected, rel=1e-12)


def test_layer_decay_without_a_depth_says_what_there_is() -> None:
    with pytest.raises(MissingKeyError, match="'layer_decay' needs 'depth', which the mapping lacks; it has: "):
        value(layer_decay(0.9), 0)


@pytest.mark.parametrize("depth", [-1, math.nan, math.inf, "3", None, True])
def test_depth_that_is_none_is_refused(depth: Any) -> None:
    with pytest.raises(ProcessorValueError, match=r"found 'depth' to be .*; it must be the number of layers above"):
        value(layer_decay(0.9), 0, depth=depth)


# -- a warmup in epochs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_warmup_in_epochs_is_one_of_as_many_iterations(shape: Any) -> None:
    epochs = warmup(epochs=2.5, start=0.3, shape=shape, unit="iteration")
    steps = warmup(steps=10, start=0.3, shape=shape, unit="iteration")

    found = [value(epochs, t / 2, epoch_length=4) for t in range(30)]
    assert found == [value(steps, t / 2) for t in range(30)]


def test_warmup_in_epochs_of_unknown_length_asks_for_steps() -> None:
    schedule = warmup(epochs=2, unit="iteration")

    with pytest.raises(MissingKeyError, match=r"whose length is unknown: 'epoch_length' .* Pass warmup\(steps="):
        value(schedule, 0, epoch_length=None)
    with pytest.raises(MissingKeyError, match="'warmup' needs 'epoch_length', which the mapping lacks"):
        value(schedule, 0)


# -- functions of one's own -----------------------------------------------------------------------------------


class Counted:
    """A function of time that counts its calls."""

    __name__ = "counted"

    def __init__(self, answer: Callable[[float], Any]) -> None:
        self.answer, self.asked = answer, []  # type: ignore[var-annotated]

    def __call__(self, t: float) -> Any:
        self.asked.append(t)
        return self.answer(t)


def test_function_is_given_the_clock_and_multiplies_the_initial_value() -> None:
    f = Counted(lambda t: t * t)

    assert [value(function(f), t, 0.5) for t in (0, 3, 2.5)] == [0.0, 4.5, 3.125]
    assert f.asked == [0, 3, 2.5]


@pytest.mark.parametrize("make", [function, multiplicative])
@pytest.mark.parametrize("answer", [math.nan, math.inf, None, "1", 1j, [1.0], torch.ones(2), np.ones(2)])
def test_function_that_returns_no_finite_number_is_named_with_its_time(make: Any, answer: Any) -> None:
    schedule = make(Counted(lambda t: answer if t == 3 else 1.0))

    assert value(schedule, 2) == 1.0
    with pytest.raises(
        ProcessorValueError, match=rf"{make.__name__}.* counted\(3\) returned .*must return a finite num"
    ):
        value(schedule, 3)


@pytest.mark.parametrize("make", [function, multiplicative])
def test_numbers_of_other_libraries_do(make: Any) -> None:
    for answer in (True, 1, np.float32(1), np.int64(1), torch.tensor(1.0)):
        found = make(lambda t, answer=answer: answer)({"step": 2, "initial_lr": 0.5})["lr"]
        assert (found, type(found)) == (0.5, float)


@pytest.mark.parametrize("make", [function, multiplicative])
def test_growth_beyond_every_float_is_named_with_its_time(make: Any) -> None:
    with pytest.raises(
        ProcessorValueError, match=rf"'{make.__name__}' is beyond every float at step 3: {make.__name__}"
    ):
        value(make(Counted(lambda t: 1e308)), 3, base=1e3)


@pytest.mark.parametrize("make", [function, multiplicative])
def test_what_cannot_be_called_is_refused(make: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=rf"{make.__name__}\(\) wants a function of time, got 3 \(int\)"):
        make(3)


@given(clocks=st.lists(st.integers(0, 60) | st.floats(0, 60), max_size=20))
def test_products_do_not_depend_on_the_order_of_calls_and_cost_one_call_each(clocks: list[float]) -> None:
    f = Counted(lambda t: 1 + 1 / t)  # the product is t + 1
    schedule = multiplicative(f)

    for t in clocks:
        assert value(schedule, t) == pytest.approx(int(t) + 1, rel=1e-12)
    assert f.asked == list(range(1, int(max(clocks, default=0)) + 1))


def halving(t: int) -> float:
    return 0.5


def test_what_a_product_remembers_is_no_part_of_its_value() -> None:
    once, often = multiplicative(halving), multiplicative(halving)
    assert (value(once, 1), value(often, 500)) == (0.5, 0.5**500)

    assert once == often
    assert hash(once) == hash(often)
    assert once != multiplicative(math.sqrt)
    assert len(pickle.dumps(once)) == len(pickle.dumps(often))
    assert value(pickle.loads(pickle.dumps(often)), 3) == 0.125  # noqa: S301


# -- in an optimizer ------------------------------------------------------------------------------------------


def test_optimizer_follows_a_rate_by_depth_and_momentum_the_other_way() -> None:
    top, bottom = (torch.ones(1, requires_grad=True) for _ in range(2))
    groups = [{"params": [top], "depth": 0}, {"params": [bottom], "depth": 2}]
    rate = layer_decay(0.5) * schedules.one_cycle(total=5, pct_start=0.6, anneal="linear", div_factor=4)
    momentum = schedules.one_cycle_momentum(low=0.5, high=0.9, total=5, pct_start=0.6, anneal="linear", dst="betas.0")
    optimizer = ice.Optimizer(torch.optim.AdamW(groups, lr=1.0), processors=[rate, momentum])

    seen = []
    for _ in range(3):
        optimizer.backward((top + bottom).sum())
        optimizer.update()
        seen += [(group["lr"], *group["betas"]) for group in optimizer.param_groups]

    assert seen == [
        *[(0.25, 0.9, 0.999), (0.0625, 0.9, 0.999)],
        *[(0.625, pytest.approx(0.7), 0.999), (0.15625, pytest.approx(0.7), 0.999)],
        *[(1.0, 0.5, 0.999), (0.25, 0.5, 0.999)],
    ]
