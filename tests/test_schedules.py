"""Schedules: what holds for every one of them, their values by definition, clocks, composition and arguments.

A new schedule needs one row in EVERY, and one in REQUIRED. What they are elsewhere is in test_schedules_torch.py,
test_schedules_mmcv.py and test_schedules_transformers.py; their equations, in test_schedules_definitions.py.
"""

import copy
import inspect
import itertools
import json
import math
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ignite.engine import Engine

from ice_engine.errors import ArgumentTypeError, ArgumentValueError, MissingKeyError, ProcessorValueError
from ice_engine.processors import Processor, schedules
from ice_engine.processors.schedules import (
    Schedule,
    batch_scaling,
    constant,
    cosine,
    cosine_restarts,
    cyclic,
    cyclic_anneal,
    exponential,
    flat_cosine,
    function,
    hard_restarts,
    inverse,
    inverse_sqrt,
    layer_decay,
    linear,
    multiplicative,
    one_cycle,
    one_cycle_momentum,
    plateau,
    polynomial,
    step,
    swa,
    trapezoid,
    warmup,
    wsd,
)


def tenth_every_third(t: float) -> float:
    return 0.1 if t % 3 == 0 else 1.0


def shrinking(t: int) -> float:
    return t / (t + 0.5)


class Row(NamedTuple):
    """A schedule, and what it claims where the initial value is 1 and the run 40 steps, iterations or epochs long."""

    expression: str
    end: int | None = None  # from when on it stays
    trend: str = ""  # "falls" or "rises", never the other way; both, if it holds
    least: float = 0.0
    most: float = 1.0


HOLDS = "falls and rises"
EVERY: list[Row] = [
    Row("constant()", 0, HOLDS, 1),
    Row("constant(factor=0.5)", 0, HOLDS, 0.5, 0.5),
    Row("linear()", 40, "falls"),
    Row("linear(start=0.1, end=2.0, total=7, unit='iteration')", 7, "rises", 0.1, 2),
    Row("linear(start=0.0, warmup=10)", 40),
    Row("linear(end=0.2, total=30, warmup=10)", 30, least=1 / 11),
    Row("cosine()", 40, "falls"),
    Row("cosine(total=30, warmup=10)", 30),
    Row("cosine(total=30, warmup=29, start=0.0, floor=0.001, unit='epoch')", 30),
    Row("cosine(warmup=60)", 60),  # longer than the run
    Row("cosine(total=30, floor_ratio=0.1)", 30, "falls", 0.1),
    Row("cosine(total=30, cycles=1.25)", 30),
    Row("cosine(total=30, floor=0.01, rebound=True)", None, least=0.01),
    Row("exponential(gamma=0.9)", None, "falls"),
    Row("step(step_size=7)", None, "falls"),
    Row("step(step_size=(5, 9), gamma=0.5, unit='epoch')", 9, "falls", 0.25),
    Row("polynomial()", 40, "falls"),
    Row("polynomial(power=2.5, floor=1e-05, total=13, dst='weight_decay')", 13, "falls", 1e-5),
    Row("polynomial(power=0.5, floor_ratio=0.2, warmup=9, start=0.5)", 40, least=0.2),
    Row("inverse(gamma=0.3, power=1.5)", None, "falls"),
    Row("inverse_sqrt()", None, "falls"),
    Row("inverse_sqrt(warmup=10, start=0.0, timescale=3.0)"),
    Row("warmup(steps=5)", 5, "rises", 1 / 6),
    Row("warmup(steps=5, start=0.1, unit='iteration', dst='betas.0')", 5, "rises", 0.1),
    Row("warmup(epochs=2.0, unit='iteration')", 2, "rises", 1 / 3),
    Row("warmup(epochs=7.5, start=0.1, shape='1-sqrt', unit='iteration')", 8, "rises", 0.1),
    Row("warmup(steps=9, start=0.2, shape='constant')", 9, "rises", 0.2),
    Row("warmup(steps=9, start=0.2, shape='exponential')", 9, "rises", 0.2),
    Row("warmup(steps=9, start=1.25, shape='harmonic', dst='momentum')", 9, "falls", 1, 1.25),
    Row("warmup(steps=9, start=0.2, shape='cosine')", 9, "rises", 0.2),
    Row("flat_cosine()", 40, "falls"),
    Row("flat_cosine(flat=1.0, floor=0.5, total=9)", 9, "falls", 0.5),
    Row("flat_cosine(flat=0.0, floor_ratio=0.5, unit='epoch')", 40, "falls", 0.5),
    Row("wsd(decay=10)", 40, "falls"),
    Row("wsd(decay=10, warmup=5, shape='linear', floor=0.1, total=15)", 15, least=0.1),
    Row("wsd(decay=60, warmup=5, start=0.0, shape='cosine', floor_ratio=0.1)", 40),  # longer than the run
    Row("trapezoid(warmup=5, decay=10)", 40),
    Row("trapezoid(warmup=0, decay=1, total=9)", 9, "falls"),
    Row("cosine_restarts(periods=7)"),
    Row("cosine_restarts(periods=3, growth=2, floor=0.01)", None, "", 0.01),
    Row("cosine_restarts(periods=(5, 3, 9), floor_ratio=0.1)", 17, "", 0.1),
    Row("cosine_restarts(periods=(5, 3), weights=(1.0, 0.5))", 8),
    Row("hard_restarts(cycles=3.0)", 40),
    Row("hard_restarts(cycles=2.5, total=30, warmup=4, start=0.5)", 30),
    Row("hard_restarts()", 40, "falls"),
    Row("cyclic(peak=3.0, up=4)", None, "", 1, 3),
    Row("cyclic(peak=0.8, up=4, down=9, mode='triangular2', dst='momentum')", None, "", 0.8),
    Row("cyclic(peak=3.0, up=4, down=1, mode='exp_range', gamma=0.99)", None, "", 1, 3),
    Row("cyclic_anneal()", None, "", 1e-4, 10),
    Row("cyclic_anneal(target_ratio=(3.0, 0.5), times=3, up=0.0, anneal='linear', gamma=0.5)", None, "", 0.5, 3),
    Row("cyclic_anneal(target_ratio=(2.0, 2e-05), times=2, total=9)", None, "", 2e-5, 2),
    Row("one_cycle()", 39),
    Row("one_cycle(total=20, pct_start=0.05, three_phase=True)", 19),  # a rise without length
    Row("one_cycle(total=1)", 0, HOLDS),
    Row("one_cycle(pct_start=0.25, anneal='linear', div_factor=10.0, final_div_factor=2.0, three_phase=True)", 39),
    Row("one_cycle_momentum()", 39, "", 0.85, 0.95),
    Row("one_cycle_momentum(low=0.5, high=0.9, total=20, three_phase=True, dst='betas.0')", 10, "", 0.5, 0.9),
    Row("swa(target=0.05)", 10, "falls", 0.05),
    Row("swa(target=2.0, steps=30, anneal='linear', unit='epoch')", 30, "rises", 1, 2),
    Row("swa(target=0.05, steps=0)", 0, HOLDS, 0.05, 0.05),
    Row("function(f=tenth_every_third)", None, "", 0.1),
    Row("multiplicative(f=shrinking)", None, "falls"),
    Row("batch_scaling(batch_size=1024)", 0, HOLDS, 4, 4),
    Row("batch_scaling(batch_size=64, reference=1024, rule='sqrt')", 0, HOLDS, 0.25, 0.25),
    Row("layer_decay(decay=0.5)", 0, HOLDS, 0.125, 0.125),
    Row("plateau(metric='loss', patience=1)", 0, HOLDS, 0.01, 0.01),
    Row("plateau(metric='accuracy', mode='max', factor=0.5, floor=0.2)", 0, HOLDS, 1),
    Row("warmup(steps=5) * cosine(total=20)", 20),
    Row("warmup(steps=5) * cosine(total=20, unit='epoch') * constant(factor=0.1)", 20, most=0.1),
    Row("constant().then(cosine(), at=10)", 40, "falls"),
    Row("constant().then(linear(total=5), at=50)", 55, "falls"),
    Row(
        "(warmup(steps=5) * constant(factor=2.0)).then(step(step_size=3).clamp(min=0.01), at=10)",
        None,
        "",
        0.01,
        2,
    ),
    Row("constant().then(linear(total=5).then(constant(factor=0.3), at=6), at=4)", 10),
    Row("linear().then(swa(target=0.05, steps=5), at=10, rebase=True)", 15, "falls", 0.05),
    Row("constant().then(one_cycle(), at=50)", 50, "falls"),  # after the end of the run
    Row("constant().then(cyclic_anneal(times=2), at=50)", None, "", 0, 10),
    Row("constant().then(hard_restarts() * wsd(decay=3) * flat_cosine(), at=50)", 50, "falls"),
    Row("exponential(gamma=0.5).clamp(min=0.001, max=0.5)", 10, "falls", 0.001, 0.5),
    Row("(warmup(steps=5) * linear()).clamp(max=0.05) * constant(factor=3.0)", 40, "falls", 0, 0.15),
]

few = settings(max_examples=20)  # for each of the rows
every = pytest.mark.parametrize("expression", [row.expression for row in EVERY])


def make(expression: str) -> Schedule:
    return eval(expression)  # type: ignore[no-any-return]  # noqa: S307 - our own text


def at(t: float, *, base: float = 1.0, dst: str = "lr", run: int | None = 40) -> dict[str, Any]:
    """What a schedule sees when *t* steps, iterations and epochs lie behind it; a fraction, by a stretched clock."""
    whole = math.floor(t)
    clocks = {"step": whole, "iteration": whole + 1, "epoch": whole + 1}
    if t != whole:
        clocks["stretch"] = dict.fromkeys(("step", "iteration", "epoch"), (0, t - whole, 1.0))  # type: ignore[assignment]
    lengths = {"total_steps": run, "epoch_length": run and 1, "max_epochs": run}
    told = {"depth": 3, "measurements": {"loss": (1.0, 2.0, 2.0, math.nan, 2.0)}}
    return {f"initial_{dst}": base, dst: -1.0, "other": "kept", **clocks, **lengths, **told}


def value(schedule: Schedule, t: float, base: float = 1.0) -> float:
    return float(schedule(at(t, base=base, dst=schedule.dst))[schedule.dst])


def values(schedule: Schedule, count: int, base: float = 1.0) -> list[float]:
    return [value(schedule, t, base) for t in range(count)]


def exactly(expected: list[float]) -> Any:
    return pytest.approx(expected, rel=1e-12, abs=1e-15)


# -- what holds for every schedule ----------------------------------------------------------------------------


@every
@few
@given(t=st.integers(0, 10_000) | st.floats(0, 10_000), base=st.floats(1e-8, 100))
def test_only_its_own_entry_changes_and_to_a_finite_number(expression: str, t: float, base: float) -> None:
    schedule = make(expression)
    before = at(t, base=base, dst=schedule.dst)
    mapping = dict(before)

    assert schedule(mapping) is mapping
    result = mapping.pop(schedule.dst)
    before.pop(schedule.dst)
    assert mapping == before
    assert isinstance(result, float)
    assert math.isfinite(result)
    assert result >= 0


@every
@few
@given(t=st.integers(0, 200))
def test_same_clock_gives_the_same_value_in_any_order(expression: str, t: int) -> None:
    schedule = make(expression)
    fresh = value(schedule, t)
    values(schedule, 5)

    assert value(schedule, t) == fresh


@pytest.mark.parametrize(("expression", "end"), [(r.expression, r.end) for r in EVERY if r.end is not None])
@few
@given(past=st.integers(0, 10_000) | st.floats(0, 10_000))
def test_past_its_end_it_stays(expression: str, end: int, past: float) -> None:
    schedule = make(expression)

    assert value(schedule, end + past) == value(schedule, end)


@pytest.mark.parametrize("row", EVERY, ids=lambda row: row.expression)
def test_it_stays_within_its_bounds_and_keeps_its_direction(row: Row) -> None:
    schedule = make(row.expression)
    found = [value(schedule, t / 2) for t in range(140)]  # clocks that are stretched show halves
    ulp = 1e-15 * max(found)

    assert row.least - ulp <= min(found)
    assert max(found) <= row.most + ulp
    if row.end:
        assert value(schedule, row.end - 1) != value(schedule, row.end)
    for before, after in itertools.pairwise(found):
        assert after <= before + ulp or "falls" not in row.trend
        assert after >= before - ulp or "rises" not in row.trend


@every
def test_its_spec_is_plain_data_unless_it_holds_a_function(expression: str) -> None:
    schedule = make(expression)
    if any(callable(setting) for curve, _ in schedule.curves() for _, setting in curve.settings):
        with pytest.raises(ArgumentTypeError, match=r"holds a function, f, which cannot be written down"):
            _ = schedule.spec
        return

    assert json.loads(json.dumps(schedule.spec)) == schedule.spec
    if not schedule.parts:
        arguments = dict(schedule.spec)
        factory = getattr(schedules, arguments.pop("schedule"))
        assert factory(**arguments) == schedule


def test_every_schedule_has_its_rows() -> None:
    """A factory is what makes a schedule: it has a clock and an entry to write."""
    public = [getattr(schedules, name) for name in schedules.__all__]
    made = [
        each for each in public if inspect.isfunction(each) and {"unit", "dst"} <= {*inspect.signature(each).parameters}
    ]
    rows = {curve.factory for row in EVERY for curve, _ in make(row.expression).curves()}

    assert made
    assert set(made) == rows == {factory for factory, _ in REQUIRED}
    assert schedules.__all__ == sorted(schedules.__all__)


@every
def test_repr_is_the_expression_that_builds_it(expression: str) -> None:
    schedule = make(expression)

    assert repr(schedule) == expression.replace("constant(factor=1.0)", "constant()")
    assert make(repr(schedule)) == schedule
    assert hash(make(repr(schedule))) == hash(schedule)


@every
@pytest.mark.parametrize("clone", [lambda s: pickle.loads(pickle.dumps(s)), copy.deepcopy])  # noqa: S301
def test_copies_are_equal_and_do_the_same(expression: str, clone: Callable[[Schedule], Schedule]) -> None:
    schedule = make(expression)

    assert clone(schedule) == schedule
    assert values(clone(schedule), 50) == values(schedule, 50)


def test_schedules_differ_where_their_expressions_do() -> None:
    for first, second in itertools.combinations(EVERY, 2):
        assert make(first.expression) != make(second.expression)


@every
def test_it_is_a_frozen_processor_that_writes_its_entry(expression: str) -> None:
    schedule = make(expression)

    assert isinstance(schedule, Processor)
    assert schedule.writes == (schedule.dst,)
    with pytest.raises(AttributeError, match="cannot assign"):
        schedule.dst = "momentum"  # type: ignore[misc]


@every
def test_missing_initial_value_is_named_with_the_keys_there_are(expression: str) -> None:
    schedule = make(expression)
    message = f"needs 'initial_{schedule.dst}', which the mapping lacks; it has: lr, step. Attach the optimizer first, "

    with pytest.raises(MissingKeyError, match=message):
        schedule({"lr": 1.0, "step": 0})


@every
def test_missing_clock_is_named(expression: str) -> None:
    schedule = make(expression)
    initial = f"initial_{schedule.dst}"

    with pytest.raises(MissingKeyError, match=f"needs '(step|iteration|epoch)', .* lacks; it has: {initial}\\."):
        schedule({initial: 1.0})


@pytest.mark.parametrize("unit", ["step", "iteration", "epoch"])
def test_clock_that_nothing_counts_is_named(unit: Any) -> None:
    with pytest.raises(MissingKeyError, match=f"'constant' follows '{unit}', which is None"):
        constant(unit=unit)({"initial_lr": 1.0, unit: None})


@every
def test_called_with_an_engine_it_names_the_right_way(expression: str) -> None:
    with pytest.raises(ArgumentTypeError, match=r"was called with an Engine.*optimizer\.hooks\.add"):
        make(expression)(Engine(lambda engine, batch: None))  # type: ignore[arg-type]


# -- numbers from the definitions -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (constant(), [1, 1, 1]),
        (constant(factor=0.5), [0.5, 0.5]),
        (linear(total=4), [1, 0.75, 0.5, 0.25, 0, 0]),
        (linear(start=0, end=2, total=2), [0, 1, 2, 2]),
        (cosine(total=4), [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0, 0]),
        (cosine(total=4, floor=0.2), [1, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.6 - 0.4 * math.sqrt(0.5), 0.2, 0.2]),
        (cosine(total=5, warmup=3), [0.25, 0.5, 0.75, 1, 0.5, 0, 0]),
        (cosine(total=5, warmup=3, start=0), [0, 1 / 3, 2 / 3, 1, 0.5, 0, 0]),
        (cosine(total=3, warmup=2, start=0.5, floor=0.1), [0.5, 0.75, 1, 0.1, 0.1]),
        (exponential(gamma=0.5), [1, 0.5, 0.25]),
        (exponential(gamma=2), [1, 2, 4]),
        (step(step_size=2), [1, 1, 0.1, 0.1, 0.01]),
        (step(step_size=[1, 3], gamma=0.5), [1, 0.5, 0.5, 0.25, 0.25]),
        (polynomial(total=4), [1, 0.75, 0.5, 0.25, 0, 0]),
        (polynomial(total=4, power=2, floor=0.5), [1, 0.5 + 0.5 * 0.5625, 0.625, 0.53125, 0.5, 0.5]),
        (polynomial(total=4, power=0.5), [1, math.sqrt(0.75), math.sqrt(0.5), 0.5, 0, 0]),
        (warmup(steps=3), [0.25, 0.5, 0.75, 1, 1]),
        (warmup(steps=4, start=0), [0, 0.25, 0.5, 0.75, 1, 1]),
        (warmup(steps=2, start=3), [3, 2, 1, 1]),
    ],
    ids=repr,
)
def test_values_are_those_of_the_definition(schedule: Schedule, expected: list[float]) -> None:
    assert values(schedule, len(expected)) == exactly(expected)


def test_mmcv_polynomial_over_two_epochs_of_five_iterations() -> None:
    assert values(polynomial(total=10, unit="iteration"), 10) == exactly([1 - t / 10 for t in range(10)])


def test_first_warmup_step_is_not_wasted_and_the_ramp_meets_the_peak() -> None:
    ramp = values(cosine(total=100, warmup=9), 11)

    assert ramp[:10] == exactly([(t + 1) / 10 for t in range(10)])
    assert ramp[10] < 1


# -- clocks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "mapping"),
    [
        ("step", {"step": 3}),
        ("iteration", {"iteration": 4}),
        ("epoch", {"epoch": 4}),
    ],
)
def test_each_unit_follows_its_own_clock(unit: Any, mapping: dict[str, int]) -> None:
    clocks = {"step": 50, "iteration": 60, "epoch": 70, **mapping}

    assert linear(total=4, unit=unit)({"initial_lr": 1.0, **clocks})["lr"] == 0.25


@pytest.mark.parametrize("unit", ["iteration", "epoch"])
def test_before_the_run_ignites_zero_is_the_beginning(unit: Any) -> None:
    assert linear(total=4, unit=unit)({"initial_lr": 1.0, unit: 0})["lr"] == 1.0


@pytest.mark.parametrize(
    ("unit", "clock", "lengths"),
    [
        ("step", 6, {"total_steps": 8}),
        ("iteration", 7, {"epoch_length": 4, "max_epochs": 2}),
        ("epoch", 7, {"max_epochs": 8}),
    ],
)
def test_without_a_total_it_lasts_the_whole_run(unit: Any, clock: int, lengths: dict[str, int]) -> None:
    lengths = {"total_steps": 999, "max_epochs": 999, "epoch_length": 999, **lengths}

    assert linear(unit=unit)({"initial_lr": 1.0, unit: clock, **lengths})["lr"] == 0.25


@pytest.mark.parametrize(
    ("unit", "lengths", "unknown"),
    [
        ("step", {}, "'total_steps'"),
        ("step", {"total_steps": None, "max_epochs": 3, "epoch_length": 3}, "'total_steps'"),
        ("iteration", {"epoch_length": 3}, "'max_epochs'"),
        ("iteration", {"epoch_length": None, "max_epochs": None}, "'epoch_length' and 'max_epochs'"),
        ("epoch", {"max_epochs": None}, "'max_epochs'"),
    ],
)
@pytest.mark.parametrize("factory", [cosine, linear, polynomial])
def test_unknown_length_of_the_run_asks_for_a_total(
    factory: Callable[..., Schedule], unit: Any, lengths: dict[str, Any], unknown: str
) -> None:
    message = f"whose length in {unit}s is unknown: {unknown} of the mapping.*Pass {factory.__name__}\\(total="

    with pytest.raises(MissingKeyError, match=message):
        factory(unit=unit)({"initial_lr": 1.0, unit: 1, **lengths})


def test_a_total_of_its_own_needs_no_run() -> None:
    assert linear(total=4)({"initial_lr": 1.0, "step": 1, "total_steps": None})["lr"] == 0.75


def test_any_entry_can_be_scheduled_from_its_own_initial_value() -> None:
    group = {"initial_lr": 5.0, "initial_betas.0": 0.8, "step": 1}

    assert linear(total=2, dst="betas.0")(group) == {**group, "betas.0": 0.4}
    with pytest.raises(MissingKeyError, match=r"'linear' needs 'initial_betas\.1'"):
        linear(total=2, dst="betas.1")(group)


def test_growth_beyond_every_float_is_named() -> None:
    with pytest.raises(ProcessorValueError, match=r"'exponential' is beyond every float at step 10000: expo"):
        value(exponential(gamma=2.0), 10_000)


# -- composition ----------------------------------------------------------------------------------------------


def test_product_of_factors_is_the_product_of_their_values() -> None:
    product = values(warmup(steps=5) * cosine(total=20), 25, base=0.3)
    rise, fall = values(warmup(steps=5), 25), values(cosine(total=20), 25, base=0.3)

    assert product == exactly([a * b for a, b in zip(rise, fall, strict=True)])


def test_product_applies_the_left_one_to_what_the_right_one_gives() -> None:
    floored, halved = polynomial(total=1, floor=0.2), constant(0.5)

    assert value(floored * halved, 0) == 0.5
    assert value(floored * halved, 1) == 0.2
    assert value(halved * floored, 1) == 0.1


def test_product_is_associative_also_by_equality() -> None:
    a, b, c = warmup(steps=5), polynomial(total=9, floor=0.1), constant(0.5)

    assert (a * b) * c == a * (b * c)
    assert values((a * b) * c, 12) == [value(a, t, value(b, t, value(c, t))) for t in range(12)]


def test_product_may_follow_two_clocks() -> None:
    product = warmup(steps=4, start=0) * step(step_size=1, gamma=0.5, unit="epoch")

    assert product({"initial_lr": 1.0, "step": 2, "epoch": 3})["lr"] == 0.5 * 0.25


def test_then_starts_the_second_clock_at_the_change_from_the_same_base() -> None:
    schedule = constant(0.5).then(linear(total=4), at=2)

    assert values(schedule, 8, base=2.0) == [1, 1, 2, 1.5, 1, 0.5, 0, 0]


def test_then_counts_in_the_unit_of_both() -> None:
    schedule = constant(unit="epoch").then(constant(0.5, unit="epoch"), at=2)

    assert [schedule({"initial_lr": 1.0, "epoch": e, "step": 99})["lr"] for e in (1, 2, 3)] == [1, 1, 0.5]


def test_second_without_a_total_lasts_the_rest_of_the_run() -> None:
    schedule = constant().then(linear(), at=30)

    assert values(schedule, 42)[29:] == exactly([1, *(1 - t / 10 for t in range(11)), 0])


def test_thens_chain_and_nest_on_clocks_of_their_own() -> None:
    chained = constant(1).then(constant(2), at=2).then(linear(total=2), at=3)
    nested = constant(1).then(constant(2).then(linear(total=2), at=1), at=2)

    assert values(chained, 6) == [1, 1, 2, 1, 0.5, 0]
    assert values(nested, 6) == values(chained, 6)


def test_then_shifts_every_factor_of_a_product() -> None:
    shifted = constant().then(warmup(steps=3) * linear(total=10), at=4)

    assert values(shifted, 20)[4:] == values(warmup(steps=3) * linear(total=10), 16)


def test_clamp_limits_on_either_side() -> None:
    line = linear(total=4)

    assert values(line.clamp(min=0.3), 5) == [1, 0.75, 0.5, 0.3, 0.3]
    assert values(line.clamp(max=0.6), 5) == [0.6, 0.6, 0.5, 0.25, 0]
    assert values(line.clamp(min=0.3, max=0.6), 5) == [0.6, 0.6, 0.5, 0.3, 0.3]


@pytest.mark.parametrize(
    ("combine", "error", "message"),
    [
        (lambda: cosine() * cosine(dst="momentum"), ArgumentValueError, "writes 'lr' and .* writes 'momentum'; give"),
        (lambda: cosine().then(linear(dst="wd"), at=1), ArgumentValueError, "writes 'lr' and .* writes 'wd'; give"),
        (lambda: cosine() * 2, TypeError, "unsupported operand"),
        (lambda: cosine() * len, TypeError, "unsupported operand"),
        (lambda: cosine().then(2, at=1), ArgumentTypeError, r"then\(\) wants a schedule, got 2 \(int\)"),
        (lambda: cosine().then(linear(), at=0), ArgumentValueError, r"then\(at=\.\.\.\) must be at least 1, got 0"),
        (lambda: cosine().then(linear(), at=1.5), ArgumentTypeError, r"then\(at=\.\.\.\) must be an int, got 1.5"),
        (lambda: cosine().then(linear(unit="epoch"), at=1), ArgumentValueError, "count in epoch and step; give both"),
        (
            lambda: (cosine() * linear(unit="epoch")).then(linear(), at=1),
            ArgumentValueError,
            "count in epoch and step",
        ),
        (lambda: cosine().clamp(), ArgumentTypeError, "wants min=, max= or both, got neither"),
        (lambda: cosine().clamp(min=2, max=1), ArgumentValueError, "must have min <= max, got 2.0 and 1.0"),
        (lambda: cosine().clamp(min=math.nan), ArgumentValueError, r"clamp\(min=\.\.\.\) must be finite, got nan"),
        (lambda: cosine().clamp(max="1"), ArgumentTypeError, r"clamp\(max=\.\.\.\) must be a number, got '1' \(str\)"),
    ],
)
def test_impossible_combinations_are_refused_when_combined(
    combine: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        combine()


# -- arguments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "arguments", "error", "message"),
    [
        (constant, {"factor": math.inf}, ArgumentValueError, r"constant\(factor=\.\.\.\) must be finite, got inf"),
        (constant, {"factor": "1"}, ArgumentTypeError, r"must be a number, got '1' \(str\)"),
        (constant, {"factor": True}, ArgumentTypeError, r"must be a number, got True \(bool\)"),
        (linear, {"start": math.nan}, ArgumentValueError, r"linear\(start=\.\.\.\) must be finite"),
        (linear, {"end": None}, ArgumentTypeError, r"linear\(end=\.\.\.\) must be a number, got None"),
        (linear, {"total": 0}, ArgumentValueError, r"linear\(total=\.\.\.\) must be at least 1, got 0"),
        (cosine, {"total": -5}, ArgumentValueError, r"cosine\(total=\.\.\.\) must be at least 1, got -5"),
        (cosine, {"total": 10.0}, ArgumentTypeError, r"cosine\(total=\.\.\.\) must be an int, got 10\.0 \(float\)"),
        (cosine, {"total": True}, ArgumentTypeError, r"must be an int, got True \(bool\)"),
        (cosine, {"warmup": -1}, ArgumentValueError, r"cosine\(warmup=\.\.\.\) must be at least 0, got -1"),
        (cosine, {"warmup": True}, ArgumentTypeError, r"cosine\(warmup=\.\.\.\) must be an int"),
        (cosine, {"total": 5, "warmup": 5}, ArgumentValueError, "must be below total=5, which includes it, got 5"),
        (cosine, {"start": 0.1}, ArgumentValueError, "there is none; give warmup= too"),
        (cosine, {"start": math.nan, "warmup": 2}, ArgumentValueError, r"cosine\(start=\.\.\.\) must be finite"),
        (cosine, {"floor": -math.inf}, ArgumentValueError, r"cosine\(floor=\.\.\.\) must be finite"),
        (exponential, {"gamma": 0}, ArgumentValueError, r"exponential\(gamma=\.\.\.\) must be above 0, got 0"),
        (exponential, {"gamma": math.nan}, ArgumentValueError, "must be finite, got nan"),
        (step, {"step_size": 0}, ArgumentValueError, r"step\(step_size=\.\.\.\) must be at least 1, got 0"),
        (step, {"step_size": True}, ArgumentTypeError, "must be an int, got True"),
        (step, {"step_size": 2.5}, ArgumentTypeError, "must be an int, got 2.5"),
        (step, {"step_size": "12"}, ArgumentTypeError, "must be an int or a list of ints, got '12'"),
        (step, {"step_size": []}, ArgumentValueError, r"rising times, each once and at least one, got \[\]"),
        (step, {"step_size": [3, 2]}, ArgumentValueError, r"rising times.*got \[3, 2\]"),
        (step, {"step_size": [2, 2]}, ArgumentValueError, r"rising times.*got \[2, 2\]"),
        (step, {"step_size": [0, 2]}, ArgumentValueError, "each of step.* must be at least 1, got 0"),
        (step, {"step_size": [1, 2.0]}, ArgumentTypeError, r"each of step.* must be an int, got 2\.0"),
        (step, {"step_size": 1, "gamma": -0.1}, ArgumentValueError, r"step\(gamma=\.\.\.\) must be above 0"),
        (polynomial, {"power": 0}, ArgumentValueError, r"polynomial\(power=\.\.\.\) must be above 0"),
        (polynomial, {"floor": math.nan}, ArgumentValueError, r"polynomial\(floor=\.\.\.\) must be finite"),
        (polynomial, {"total": 0}, ArgumentValueError, r"polynomial\(total=\.\.\.\) must be at least 1"),
        (warmup, {"steps": 0}, ArgumentValueError, r"warmup\(steps=\.\.\.\) must be at least 1, got 0"),
        (
            warmup,
            {"steps": None},
            ArgumentTypeError,
            r"warmup\(\) wants its length as steps= or as epochs=, got neither",
        ),
        (warmup, {"steps": 1, "start": math.inf}, ArgumentValueError, r"warmup\(start=\.\.\.\) must be finite"),
        (warmup, {"steps": 1, "epochs": 1}, ArgumentTypeError, "as steps= or as epochs=, got steps=1 and epochs=1"),
        (warmup, {"epochs": 0}, ArgumentValueError, r"warmup\(epochs=\.\.\.\) must be above 0, got 0"),
        (
            warmup,
            {"epochs": 2},
            ArgumentValueError,
            "got unit='step'; write unit=\"iteration\", or .* in steps as steps=",
        ),
        (warmup, {"epochs": 2, "unit": "epoch"}, ArgumentValueError, 'write unit="iteration", or give .* in epochs as'),
        (warmup, {"steps": 1, "shape": "exp"}, ArgumentValueError, r"warmup\(shape=\.\.\.\) must be one of 'linear', "),
        (warmup, {"steps": 1, "shape": "cosine"}, ArgumentTypeError, "needs the factor it starts at; give start= too"),
        (warmup, {"steps": 1, "shape": "harmonic", "start": 0}, ArgumentValueError, "start=.*must be above 0, got 0"),
        (warmup, {"steps": 1, "shape": "exponential", "start": -1}, ArgumentValueError, "must be above 0, got -1"),
        (linear, {"total": 5, "warmup": 5}, ArgumentValueError, r"linear\(warmup=\.\.\.\) must be below total=5"),
        (linear, {"warmup": 2.0}, ArgumentTypeError, r"linear\(warmup=\.\.\.\) must be an int, got 2\.0"),
        (cosine, {"floor": 0.1, "floor_ratio": 0.1}, ArgumentValueError, "give one, got 0.1 and 0.1"),
        (cosine, {"floor_ratio": "1"}, ArgumentTypeError, r"cosine\(floor_ratio=\.\.\.\) must be a number"),
        (cosine, {"cycles": 0}, ArgumentValueError, r"cosine\(cycles=\.\.\.\) must be above 0, got 0"),
        (cosine, {"rebound": 1}, ArgumentTypeError, r"cosine\(rebound=\.\.\.\) must be True or False, got 1 \(int\)"),
        (
            polynomial,
            {"total": 5, "warmup": 7},
            ArgumentValueError,
            r"polynomial\(warmup=\.\.\.\) must be below total=5",
        ),
        (polynomial, {"start": 0.1}, ArgumentValueError, "there is none; give warmup= too"),
        (polynomial, {"floor": 1, "floor_ratio": 0}, ArgumentValueError, "give one, got 1.0 and 0.0"),
        (inverse, {"gamma": 0}, ArgumentValueError, r"inverse\(gamma=\.\.\.\) must be above 0, got 0"),
        (inverse, {"gamma": 1, "power": -1}, ArgumentValueError, r"inverse\(power=\.\.\.\) must be above 0, got -1"),
        (inverse_sqrt, {"warmup": -1}, ArgumentValueError, r"inverse_sqrt\(warmup=\.\.\.\) must be at least 0"),
        (inverse_sqrt, {"start": 0}, ArgumentValueError, "there is none; give warmup= too"),
        (
            inverse_sqrt,
            {"timescale": 0},
            ArgumentValueError,
            r"inverse_sqrt\(timescale=\.\.\.\) must be above 0, got 0",
        ),
        (flat_cosine, {"flat": 1.5}, ArgumentValueError, r"flat_cosine\(flat=\.\.\.\) must be from 0 to 1, got 1\.5"),
        (flat_cosine, {"flat": math.nan}, ArgumentValueError, r"flat_cosine\(flat=\.\.\.\) must be finite, got nan"),
        (wsd, {"decay": 0}, ArgumentValueError, r"wsd\(decay=\.\.\.\) must be at least 1, got 0"),
        (wsd, {"decay": 3, "warmup": 3, "total": 5}, ArgumentValueError, r"fit into total=5, which .*, got 3 \+ 3"),
        (
            wsd,
            {"decay": 3, "shape": "sqrt"},
            ArgumentValueError,
            r"wsd\(shape=\.\.\.\) must be one of '1-sqrt', 'linear'",
        ),
        (wsd, {"decay": 3, "start": 0.1}, ArgumentValueError, "there is none; give warmup= too"),
        (trapezoid, {"warmup": 3, "decay": 3, "total": 5}, ArgumentValueError, r"trapezoid.* fit into total=5"),
        (
            trapezoid,
            {"warmup": 3, "decay": 2.5},
            ArgumentTypeError,
            r"trapezoid\(decay=\.\.\.\) must be an int, got 2\.5",
        ),
        (cosine_restarts, {"periods": 0}, ArgumentValueError, r"cosine_restarts\(periods=\.\.\.\) must be at least 1"),
        (cosine_restarts, {"periods": "12"}, ArgumentTypeError, "must be an int or a list of ints, got '12'"),
        (cosine_restarts, {"periods": []}, ArgumentValueError, r"must have at least one period, got \[\]"),
        (cosine_restarts, {"periods": [2, 0]}, ArgumentValueError, "each of cosine_restarts.* at least 1, got 0"),
        (
            cosine_restarts,
            {"periods": [2, 3], "growth": 2},
            ArgumentValueError,
            r"growth=2\) is for one period; the list",
        ),
        (
            cosine_restarts,
            {"periods": 2, "growth": 0},
            ArgumentValueError,
            r"growth=\.\.\.\) must be at least 1, got 0",
        ),
        (
            cosine_restarts,
            {"periods": 2, "growth": 1.5},
            ArgumentTypeError,
            r"growth=\.\.\.\) must be an int, got 1\.5",
        ),
        (
            cosine_restarts,
            {"periods": 2, "weights": [1]},
            ArgumentValueError,
            "weighs a list of periods, got periods=2",
        ),
        (cosine_restarts, {"periods": [2, 3], "weights": [1]}, ArgumentValueError, "each of the 2 periods, got 1"),
        (cosine_restarts, {"periods": [2], "weights": "1"}, ArgumentTypeError, "must be a list, got '1'"),
        (cosine_restarts, {"periods": [2], "weights": 1.0}, ArgumentTypeError, r"must be a list, got 1\.0 \(float\)"),
        (hard_restarts, {"cycles": 0}, ArgumentValueError, r"hard_restarts\(cycles=\.\.\.\) must be above 0, got 0"),
        (hard_restarts, {"total": 4, "warmup": 4}, ArgumentValueError, "must be below total=4"),
        (cyclic, {"peak": math.inf, "up": 2}, ArgumentValueError, r"cyclic\(peak=\.\.\.\) must be finite, got inf"),
        (cyclic, {"peak": 1, "up": 0}, ArgumentValueError, r"cyclic\(up=\.\.\.\) must be at least 1, got 0"),
        (cyclic, {"peak": 1, "up": 2, "down": 0}, ArgumentValueError, r"cyclic\(down=\.\.\.\) must be at least 1"),
        (cyclic, {"peak": 1, "up": 2, "mode": "exp"}, ArgumentValueError, r"cyclic\(mode=\.\.\.\) must be one of"),
        (
            cyclic,
            {"peak": 1, "up": 2, "gamma": 0.9},
            ArgumentValueError,
            "would do nothing with mode='triangular'; write",
        ),
        (cyclic_anneal, {"times": 0}, ArgumentValueError, r"cyclic_anneal\(times=\.\.\.\) must be at least 1, got 0"),
        (cyclic_anneal, {"times": 3, "total": 2}, ArgumentValueError, "must be at least times=3, a step for each"),
        (cyclic_anneal, {"up": 1.0}, ArgumentValueError, "must be at least 0 and below 1, got 1.0"),
        (cyclic_anneal, {"up": -0.1}, ArgumentValueError, "must be at least 0 and below 1, got -0.1"),
        (cyclic_anneal, {"gamma": 1.1}, ArgumentValueError, "must be above 0 and at most 1, got 1.1"),
        (cyclic_anneal, {"anneal": "cosine"}, ArgumentValueError, r"cyclic_anneal\(anneal=.* one of 'cos', 'linear'"),
        (cyclic_anneal, {"target_ratio": (1, 2, 3)}, ArgumentValueError, r"must be one number or two, got \(1, 2, 3\)"),
        (cyclic_anneal, {"target_ratio": "10"}, ArgumentTypeError, "must be one or two numbers, got '10'"),
        (cyclic_anneal, {"target_ratio": (1, None)}, ArgumentTypeError, "each of cyclic_anneal.* got None"),
        (
            one_cycle,
            {"pct_start": 1.2},
            ArgumentValueError,
            r"one_cycle\(pct_start=\.\.\.\) must be from 0 to 1, got 1\.2",
        ),
        (
            one_cycle,
            {"anneal": "exp"},
            ArgumentValueError,
            r"one_cycle\(anneal=\.\.\.\) must be one of 'cos', 'linear'",
        ),
        (one_cycle, {"div_factor": 0}, ArgumentValueError, r"one_cycle\(div_factor=\.\.\.\) must be above 0, got 0"),
        (one_cycle, {"final_div_factor": -1}, ArgumentValueError, r"one_cycle\(final_div_factor=.* above 0, got -1"),
        (one_cycle, {"three_phase": None}, ArgumentTypeError, r"one_cycle\(three_phase=.* True or False, got None"),
        (one_cycle, {"total": 0}, ArgumentValueError, r"one_cycle\(total=\.\.\.\) must be at least 1, got 0"),
        (one_cycle_momentum, {"low": 0.99}, ArgumentValueError, "must have low <= high, got 0.99 and 0.95"),
        (one_cycle_momentum, {"pct_start": -1}, ArgumentValueError, "must be from 0 to 1, got -1"),
        (swa, {"target": None}, ArgumentTypeError, r"swa\(target=\.\.\.\) must be a number, got None"),
        (swa, {"target": 1, "steps": -1}, ArgumentValueError, r"swa\(steps=\.\.\.\) must be at least 0, got -1"),
        (
            swa,
            {"target": 1, "anneal": None},
            ArgumentValueError,
            r"swa\(anneal=\.\.\.\) must be one of 'cos', 'linear'",
        ),
        (batch_scaling, {"batch_size": 0}, ArgumentValueError, r"batch_scaling\(batch_size=.* at least 1, got 0"),
        (
            batch_scaling,
            {"batch_size": 1, "reference": 0},
            ArgumentValueError,
            r"batch_scaling\(reference=.* at least 1",
        ),
        (batch_scaling, {"batch_size": 1, "rule": "root"}, ArgumentValueError, "must be one of 'linear', 'sqrt'; got"),
        (layer_decay, {"decay": 0}, ArgumentValueError, r"layer_decay\(decay=\.\.\.\) must be above 0, got 0"),
        (plateau, {"metric": 1}, ArgumentTypeError, r"plateau\(metric=\.\.\.\) must be the name of a metric, got 1"),
        (plateau, {"metric": ""}, ArgumentValueError, "must be the name of a metric, such as 'loss', got ''"),
        (plateau, {"metric": "x", "mode": "low"}, ArgumentValueError, r"plateau\(mode=\.\.\.\) must be one of 'min'"),
        (plateau, {"metric": "x", "factor": 1.0}, ArgumentValueError, "must be above 0 and below 1, got 1.0"),
        (plateau, {"metric": "x", "patience": -1}, ArgumentValueError, r"plateau\(patience=.* at least 0, got -1"),
        (plateau, {"metric": "x", "cooldown": 0.5}, ArgumentTypeError, r"plateau\(cooldown=.* an int, got 0\.5"),
        (plateau, {"metric": "x", "threshold": -1}, ArgumentValueError, r"plateau\(threshold=.* at least 0, got -1"),
        (plateau, {"metric": "x", "threshold_mode": 1}, ArgumentValueError, r"threshold_mode=.* 'rel', 'abs'; got 1"),
        (plateau, {"metric": "x", "eps": -1}, ArgumentValueError, r"plateau\(eps=\.\.\.\) must be at least 0, got -1"),
        (plateau, {"metric": "x", "floor": math.nan}, ArgumentValueError, r"plateau\(floor=\.\.\.\) must be finite"),
    ],
)
def test_impossible_arguments_are_refused_when_made(
    factory: Callable[..., Schedule], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        factory(**arguments)


REQUIRED: list[tuple[Callable[..., Schedule], dict[str, Any]]] = [
    (batch_scaling, {"batch_size": 1}),
    (constant, {}),
    (cosine, {}),
    (cosine_restarts, {"periods": 2}),
    (cyclic, {"peak": 1, "up": 2}),
    (cyclic_anneal, {}),
    (exponential, {"gamma": 0.5}),
    (flat_cosine, {}),
    (function, {"f": shrinking}),
    (hard_restarts, {}),
    (inverse, {"gamma": 0.5}),
    (inverse_sqrt, {}),
    (layer_decay, {"decay": 0.5}),
    (linear, {}),
    (multiplicative, {"f": shrinking}),
    (one_cycle, {}),
    (one_cycle_momentum, {}),
    (plateau, {"metric": "loss"}),
    (polynomial, {}),
    (step, {"step_size": 2}),
    (swa, {"target": 1}),
    (trapezoid, {"warmup": 1, "decay": 1}),
    (warmup, {"steps": 2}),
    (wsd, {"decay": 1}),
]


@pytest.mark.parametrize(("factory", "required"), REQUIRED)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"unit": "batch"}, ArgumentValueError, r"\(unit=\.\.\.\) must be one of 'step', 'iteration', 'epoch', got"),
        ({"unit": 1}, ArgumentTypeError, r"\(unit=\.\.\.\) must be a string, got 1 \(int\)"),
        ({"dst": None}, ArgumentTypeError, r"\(dst=\.\.\.\) must be a string, got None"),
        ({"dst": ""}, ArgumentValueError, r"\(dst=\.\.\.\) must be the key of an entry"),
    ],
)
def test_every_factory_checks_unit_and_dst(
    factory: Callable[..., Schedule],
    required: dict[str, Any],
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=factory.__name__ + message):
        factory(**required, **arguments)


def test_numpy_numbers_become_plain_ones() -> None:
    schedule = cosine(total=np.int64(10), warmup=np.int32(2), floor=np.float32(0.5))  # type: ignore[arg-type]

    assert repr(schedule) == "cosine(total=10, warmup=2, floor=0.5)"
    assert repr(step(step_size=[np.int64(1)], gamma=1)) == "step(step_size=(1,), gamma=1.0)"  # type: ignore[list-item]
    assert type(value(schedule, 5)) is float
