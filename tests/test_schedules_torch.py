"""Schedules against torch's own schedulers: the same parameters, the same numbers, step by step and past the end.

Relative tolerance 1e-12, and no absolute one; where torch's own arithmetic loses more than that, the test says so.
Add a scheduler by a line in PAIRS that draws both.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from ice_engine.processors.history import History
from ice_engine.processors.schedules import (
    Schedule,
    cosine,
    cosine_restarts,
    cyclic,
    exponential,
    function,
    linear,
    multiplicative,
    one_cycle,
    one_cycle_momentum,
    plateau,
    polynomial,
    step,
    swa,
    warmup,
)

Theirs = Callable[[torch.optim.Optimizer], Any]
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "lr": torch.optim.SGD,
    "momentum": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.5),
    "betas.0": torch.optim.Adam,
}


def run(theirs: Theirs, steps: int, *, base: float = 0.3, key: str = "lr") -> list[float]:
    """What torch's scheduler has set when each of *steps* steps is taken."""
    optimizer = OPTIMIZERS[key]([torch.zeros(1, requires_grad=True)], lr=base)
    (group,) = optimizer.param_groups
    scheduler, found = theirs(optimizer), []
    for t in range(steps):
        if t:
            optimizer.step()
            scheduler.step()
        found.append(group["betas"][0] if key == "betas.0" else group[key])
    return found


def closed_form(theirs: Theirs, steps: int, base: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=base)
    scheduler, found = theirs(optimizer), []
    for t in range(steps):
        scheduler.last_epoch = t
        found += scheduler._get_closed_form_lr()
    return found


def ours(schedule: Schedule, steps: int, *, base: float = 0.3) -> list[float]:
    dst = schedule.dst
    return [schedule({"step": t, f"initial_{dst}": base})[dst] for t in range(steps)]


def same(expected: list[float], *, lost: float = 0.0) -> Any:
    """*lost*: what torch's own arithmetic loses, as an absolute error."""
    return pytest.approx(expected, rel=1e-12, abs=lost)


@dataclass(frozen=True)
class Wave:
    """A function of time for LambdaLR and MultiplicativeLR."""

    rate: float
    height: float

    def __call__(self, t: float) -> float:
        return 1 + self.height * math.sin(self.rate * t)


sizes = st.integers(1, 40)
factors = st.floats(0.05, 1.0)
gammas = st.floats(0.3, 1.05)
bases = st.floats(1e-6, 10.0)
waves = st.builds(Wave, st.floats(0.1, 3.0), st.floats(0.0, 0.5))
milestones = st.lists(st.integers(1, 40), min_size=1, max_size=5, unique=True).map(sorted)

# Ours and theirs, of the same parameters. Chainable: theirs multiplies what it finds, so that it can be in a chain.
CHAINABLE: dict[str, st.SearchStrategy[tuple[Schedule, Theirs]]] = {
    "MultiplicativeLR": waves.map(lambda f: (multiplicative(f), lambda o: lr_scheduler.MultiplicativeLR(o, f))),
    "StepLR": st.builds(
        lambda n, gamma: (step(step_size=n, gamma=gamma), lambda o: lr_scheduler.StepLR(o, n, gamma)), sizes, gammas
    ),
    "MultiStepLR": st.builds(
        lambda times, gamma: (step(step_size=times, gamma=gamma), lambda o: lr_scheduler.MultiStepLR(o, times, gamma)),
        milestones,
        gammas,
    ),
    "ConstantLR": st.builds(
        lambda n, factor: (
            warmup(steps=n, start=factor, shape="constant"),
            lambda o: lr_scheduler.ConstantLR(o, factor, n),
        ),
        sizes,
        factors,
    ),
    # An end of 0 is left out: there the recursion ends at 1e-17 instead. See the closed form below.
    "LinearLR": st.builds(
        lambda n, start, end: (
            linear(start=start, end=end, total=n),
            lambda o: lr_scheduler.LinearLR(o, start, end, n),
        ),
        sizes,
        factors,
        factors,
    ),
    "LinearLR as a warmup": st.builds(
        lambda n, start: (warmup(steps=n, start=start), lambda o: lr_scheduler.LinearLR(o, start, 1.0, n)),
        sizes,
        factors,
    ),
    "ExponentialLR": gammas.map(lambda g: (exponential(gamma=g), lambda o: lr_scheduler.ExponentialLR(o, g))),
    "PolynomialLR": st.builds(
        lambda n, power: (
            polynomial(total=n, power=power),
            lambda o: lr_scheduler.PolynomialLR(o, total_iters=n, power=power),
        ),
        sizes,
        st.floats(0.2, 4.0),
    ),
}
# An eta_min of at most the rate's own size, and T_max of at most 40: the recursion multiplies its rounding by T_max^2.
COSINE = st.builds(
    lambda n, eta: (
        cosine(total=n, floor=eta, rebound=True),
        lambda o: lr_scheduler.CosineAnnealingLR(o, n, eta_min=eta),
    ),
    sizes,
    st.just(0.0) | st.floats(1e-6, 1e-3),
)
PAIRS = {
    "LambdaLR": waves.map(lambda f: (function(f), lambda o: lr_scheduler.LambdaLR(o, f))),
    **CHAINABLE,
    "CosineAnnealingLR": COSINE,
    "CosineAnnealingWarmRestarts": st.builds(
        lambda n, growth, eta: (
            cosine_restarts(periods=n, growth=growth, floor=eta),
            lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, n, growth, eta_min=eta),
        ),
        sizes,
        st.integers(1, 4),
        st.just(0.0) | st.floats(1e-6, 1.0),
    ),
    "SWALR": st.builds(
        lambda n, target, anneal: (
            swa(target=target, steps=n, anneal=anneal),
            lambda o: SWALR(o, target, anneal_epochs=n, anneal_strategy=anneal),
        ),
        st.integers(0, 40),
        st.floats(1e-3, 10.0),
        st.sampled_from(["cos", "linear"]),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
@settings(max_examples=25)
@given(data=st.data(), base=bases)
def test_every_step_is_torchs(name: str, data: st.DataObject, base: float) -> None:
    schedule, theirs = data.draw(PAIRS[name])

    assert ours(schedule, 130, base=base) == same(run(theirs, 130, base=base))


CLOSED = {
    **{name: CHAINABLE[name] for name in ("StepLR", "MultiStepLR", "ConstantLR", "ExponentialLR", "PolynomialLR")},
    "LinearLR": st.builds(
        lambda n, start, end: (
            linear(start=start, end=end, total=n),
            lambda o: lr_scheduler.LinearLR(o, start, end, n),
        ),
        st.integers(1, 100),
        factors,
        st.floats(0.0, 1.0),
    ),
    # Next to a minimum of 0, cos() + 1 has lost T^2 / 10 units in the last place; 100 of them are 1e-13.
    "CosineAnnealingLR": st.builds(
        lambda n, eta: (
            cosine(total=n, floor=eta, rebound=True),
            lambda o: lr_scheduler.CosineAnnealingLR(o, n, eta_min=eta),
        ),
        st.integers(1, 100),
        st.floats(0.0, 20.0),
    ),
}


@pytest.mark.parametrize("name", CLOSED)
@settings(max_examples=25)
@given(data=st.data(), base=bases)
def test_every_step_is_torchs_closed_form(name: str, data: st.DataObject, base: float) -> None:
    schedule, theirs = data.draw(CLOSED[name])

    assert ours(schedule, 350, base=base) == same(closed_form(theirs, 350, base))


# -- cycles ---------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    base=st.floats(0.01, 1.0),
    peak=st.floats(0.01, 5.0),
    up=sizes,
    down=st.none() | sizes,
    mode=st.sampled_from(["triangular", "triangular2", "exp_range"]),
    gamma=st.floats(0.9, 1.001),
)
def test_cyclic_is_torchs(base: float, peak: float, up: int, down: int | None, mode: Any, gamma: float) -> None:
    """torch takes the place in the cycle from 1 + t / period, whose last digits t costs; hence at most 130 steps."""
    schedule = cyclic(peak=peak, up=up, down=down, mode=mode, gamma=gamma if mode == "exp_range" else 1.0)

    def theirs(optimizer: torch.optim.Optimizer) -> Any:
        return lr_scheduler.CyclicLR(optimizer, base, peak, up, down, mode=mode, gamma=gamma, cycle_momentum=False)

    assert ours(schedule, 130, base=base) == same(run(theirs, 130))


@pytest.mark.parametrize("key", ["momentum", "betas.0"])
@settings(max_examples=20)
@given(
    low=st.floats(0.5, 0.8),
    high=st.floats(0.8, 0.99),
    up=sizes,
    down=sizes,
    mode=st.sampled_from(["triangular", "triangular2", "exp_range"]),
)
def test_cyclic_momentum_is_the_same_schedule_the_other_way(
    key: str, low: float, high: float, up: int, down: int, mode: Any
) -> None:
    gamma = 0.99 if mode == "exp_range" else 1.0
    schedule = cyclic(peak=low, up=up, down=down, mode=mode, gamma=gamma, dst=key)

    def theirs(optimizer: torch.optim.Optimizer) -> Any:
        return lr_scheduler.CyclicLR(
            optimizer, 0.1, 1.0, up, down, mode=mode, gamma=gamma, base_momentum=low, max_momentum=high
        )

    assert ours(schedule, 130, base=high) == same(run(theirs, 130, key=key))


one_cycles = st.fixed_dictionaries(
    {"pct_start": st.floats(0.0, 1.0), "anneal": st.sampled_from(["cos", "linear"]), "three_phase": st.booleans()}
)


def torchs_one_cycle(total: int, setting: dict[str, Any], **more: Any) -> Theirs:
    renamed = {("anneal_strategy" if key == "anneal" else key): value for key, value in setting.items()}
    return lambda o: lr_scheduler.OneCycleLR(o, total_steps=total, **renamed, **{"max_lr": 1.0, **more})


@settings(max_examples=60)
@given(
    peak=st.floats(1e-4, 10.0),
    total=st.integers(1, 100),
    setting=one_cycles,
    div=st.floats(1.0, 50.0),
    final=st.floats(1.0, 1e4),
)
@example(peak=1.0, total=20, setting={"pct_start": 0.0, "anneal": "cos", "three_phase": True}, div=25.0, final=1e4)
@example(peak=1.0, total=20, setting={"pct_start": 1.0, "anneal": "linear", "three_phase": False}, div=25.0, final=1e4)
@example(peak=1.0, total=20, setting={"pct_start": 0.75, "anneal": "cos", "three_phase": True}, div=25.0, final=1e4)
def test_one_cycle_is_torchs(peak: float, total: int, setting: dict[str, Any], div: float, final: float) -> None:
    """To the end, which is at total - 1. On a line, torch's last values are differences of some near the peak."""
    assume(setting["pct_start"] * total != 1)  # where torch divides by 0; see below
    schedule = one_cycle(total=total, div_factor=div, final_div_factor=final, **setting)
    theirs = torchs_one_cycle(total, setting, max_lr=peak, div_factor=div, final_div_factor=final, cycle_momentum=False)

    lost = 4e-16 * peak if setting["anneal"] == "linear" else 0.0
    assert ours(schedule, total, base=peak) == same(run(theirs, total), lost=lost)


@pytest.mark.parametrize("key", ["momentum", "betas.0"])
@settings(max_examples=30)
@given(low=st.floats(0.5, 0.8), high=st.floats(0.8, 0.99), total=st.integers(1, 100), setting=one_cycles)
def test_one_cycle_momentum_is_torchs(key: str, low: float, high: float, total: int, setting: dict[str, Any]) -> None:
    assume(setting["pct_start"] * total != 1)
    schedule = one_cycle_momentum(low=low, high=high, total=total, dst=key, **setting)
    theirs = torchs_one_cycle(total, setting, base_momentum=low, max_momentum=high)

    assert ours(schedule, total) == same(run(theirs, total, key=key))


# -- combinations ---------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(data=st.data(), base=bases)
def test_chained_scheduler_is_a_product(data: st.DataObject, base: float) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(CHAINABLE)), min_size=2, max_size=4))
    pairs = [data.draw(CHAINABLE[name]) for name in names]
    product = pairs[0][0]
    for schedule, _ in pairs[1:]:
        product *= schedule

    def theirs(optimizer: torch.optim.Optimizer) -> Any:
        return lr_scheduler.ChainedScheduler([make(optimizer) for _, make in pairs], optimizer=optimizer)

    assert ours(product, 80, base=base) == same(run(theirs, 80, base=base))


SEQUENCED = {name: CHAINABLE[name] for name in ("ConstantLR", "LinearLR", "ExponentialLR", "PolynomialLR", "StepLR")}


@settings(max_examples=40)
@given(data=st.data(), base=bases)
def test_sequential_scheduler_is_then(data: st.DataObject, base: float) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(SEQUENCED)), min_size=2, max_size=4))
    pairs = [data.draw(SEQUENCED[name]) for name in names]
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=len(pairs) - 1, max_size=len(pairs) - 1))
    ends = list(itertools.accumulate(lengths))
    sequence = pairs[-1][0]
    for (schedule, _), length in zip(reversed(pairs[:-1]), reversed(lengths), strict=True):
        sequence = schedule.then(sequence, at=length)

    def theirs(optimizer: torch.optim.Optimizer) -> Any:
        return lr_scheduler.SequentialLR(optimizer, [make(optimizer) for _, make in pairs], milestones=ends)

    assert ours(sequence, 120, base=base) == same(run(theirs, 120, base=base))


class ThenSWA:
    """The recipe of torch's documentation: one scheduler until a step, SWALR from there."""

    def __init__(self, first: Any, second: Any, at: int) -> None:
        self.first, self.second, self.at, self.t = first, second, at, 0

    def step(self) -> None:
        (self.first if self.t < self.at else self.second).step()
        self.t += 1


@settings(max_examples=30)
@given(
    first=CHAINABLE["ExponentialLR"],
    second=PAIRS["SWALR"],
    at=sizes,
    base=st.floats(0.01, 10.0),
)
def test_swa_after_another_starts_from_where_that_was(first: Any, second: Any, at: int, base: float) -> None:
    assume(second[0].settings[1] != ("steps", 0))  # at once is, in torch, when it is made: before the first step
    schedule = first[0].then(second[0], at=at, rebase=True)

    assert ours(schedule, 100, base=base) == same(run(lambda o: ThenSWA(first[1](o), second[1](o), at), 100, base=base))


# -- what was measured ----------------------------------------------------------------------------------------

metrics = st.one_of(
    st.lists(st.sampled_from([0.0, 1.0, 1.0001, 0.99995, 0.9, 2.0, -1.0, math.nan, math.inf, -math.inf]), max_size=60),
    st.lists(st.floats(-2.0, 2.0), max_size=60),
)


@settings(max_examples=150)
@given(
    history=metrics,
    base=bases,
    setting=st.fixed_dictionaries(
        {
            "mode": st.sampled_from(["min", "max"]),
            "factor": st.floats(0.01, 0.99),
            "patience": st.integers(0, 5),
            "threshold": st.just(1e-4) | st.floats(0.0, 0.5),
            "threshold_mode": st.sampled_from(["rel", "abs"]),
            "cooldown": st.integers(0, 4),
            "eps": st.just(1e-8) | st.floats(0.0, 0.1),
        }
    ),
    floor=st.just(0.0) | st.floats(0.0, 1.0),
)
def test_plateau_is_torchs(history: list[float], base: float, setting: dict[str, Any], floor: float) -> None:
    schedule = plateau(metric="loss", floor=floor, **setting)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=base)
    theirs = lr_scheduler.ReduceLROnPlateau(optimizer, min_lr=floor, **setting)

    growing = History()
    for count in range(len(history) + 1):
        for loss in (tuple(history[:count]), growing):
            told = {"loss": loss, "other": (1.0,) * 99}
            found = schedule({"step": 0, "initial_lr": base, "measurements": told})["lr"]
            assert found == optimizer.param_groups[0]["lr"]  # to the last bit
        if count < len(history):
            theirs.step(history[count])
            growing.append(history[count])


def test_plateau_without_a_measurement_reduces_nothing() -> None:
    schedule = plateau(metric="loss", patience=0)

    for told in ({}, {"loss": ()}, {"accuracy": (1.0, 1.0, 1.0)}):
        assert schedule({"step": 9, "initial_lr": 0.1, "measurements": told})["lr"] == 0.1


# -- where torch is not defined, or not right -----------------------------------------------------------------


@pytest.mark.parametrize("anneal", ["cos", "linear"])
@pytest.mark.parametrize("three_phase", [False, True])
def test_past_the_end_of_one_cycle_the_last_value_stays(anneal: Any, three_phase: bool) -> None:
    setting = {"pct_start": 0.3, "anneal": anneal, "three_phase": three_phase}
    theirs = run(torchs_one_cycle(20, setting, cycle_momentum=False), 21)

    assert theirs[20] > theirs[19] if anneal == "cos" else theirs[20] < 0  # torch: up again, or below 0; then it raises
    with pytest.raises(ValueError, match="Tried to step 21 times"):
        run(torchs_one_cycle(20, setting, cycle_momentum=False), 22)
    assert ours(one_cycle(total=20, **setting), 60, base=1.0)[19:] == [1 / 25 / 1e4] * 41
    assert ours(one_cycle_momentum(total=20, **setting), 60)[19:] == [0.95] * 41


@pytest.mark.parametrize("three_phase", [False, True])
def test_one_cycle_without_a_rise_starts_at_the_peak(three_phase: bool) -> None:
    setting = {"pct_start": 0.05, "anneal": "cos", "three_phase": three_phase}

    with pytest.raises(ZeroDivisionError):
        run(torchs_one_cycle(20, setting), 1)
    assert ours(one_cycle(total=20, **setting), 1, base=1.0) == [1.0]
    assert ours(one_cycle_momentum(total=20, **setting), 1) == [0.85]


@pytest.mark.parametrize("power", [0.5, 1.5, 2.7, 3.0])
def test_past_the_end_of_a_polynomial_the_floor_stays(power: float) -> None:
    found = ours(polynomial(total=10, power=power, floor=0.01), 40, base=1.0)

    assert found[10:] == [0.01] * 30
    assert run(lambda o: lr_scheduler.PolynomialLR(o, 10, power), 40, base=1.0)[10:] == [0.0] * 30


def test_restarts_are_at_the_top_where_torchs_logarithm_misses_them() -> None:
    """``step(epoch)`` of torch finds the period by a float logarithm, which is below the integer at some restarts."""
    missed = []
    for growth, index in itertools.product((2, 3, 5, 6, 7, 10), range(1, 12)):
        restart = (growth**index - 1) // (growth - 1)  # the end of the periods before it, of a first period of 1
        assert ours_at(cosine_restarts(periods=1, growth=growth), restart) == 1.0
        assert ours_at(cosine_restarts(periods=1, growth=growth), restart - 1) < 1.0 or index == 1
        found = int(math.log(restart * (growth - 1) + 1, growth))
        missed += [(growth, index)] * (found != index)

    assert missed
    growth, index = missed[0]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 1, growth)
    theirs.step((growth**index - 1) // (growth - 1))
    assert optimizer.param_groups[0]["lr"] < 0.01  # at the bottom of the period before


def ours_at(schedule: Schedule, t: int) -> float:
    return float(schedule({"step": t, "initial_lr": 1.0})["lr"])
