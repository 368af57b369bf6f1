"""docs/coming-from-schedules.md: each expression is made with real arguments, and gives the other library's numbers.

A row's first cell is a call, ``Name(parameters with defaults)``; its second is an expression in those parameters. The
numbers are those of the installed torch, and of ``data/*.json``, which the other libraries themselves wrote.
"""

import functools
import inspect
import itertools
import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from ignite.handlers import param_scheduler
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from ice_engine.errors import ArgumentValueError
from ice_engine.processors import schedules
from ice_engine.processors.schedules import Schedule

HERE = Path(__file__).parent
PAGE = (HERE.parent / "docs/coming-from-schedules.md").read_text()
COUNT = 60


class Row(NamedTuple):
    """One row: whose, its name and parameters there, the expression here."""

    label: str
    name: str
    signature: inspect.Signature
    expression: str

    def fits(self, arguments: dict[str, Any]) -> bool:
        try:
            self.signature.bind(**arguments)
        except TypeError:
            return False
        return True

    def make(self, arguments: dict[str, Any], **to: Any) -> Schedule:
        bound = self.signature.bind(**arguments)
        bound.apply_defaults()
        return eval(self.expression, {"schedules": Bound(to)}, dict(bound.arguments))  # type: ignore[no-any-return]  # noqa: S307 - our own page


class Bound:
    """``schedules``, with ``unit=`` and ``dst=`` given to every factory."""

    def __init__(self, to: dict[str, Any]) -> None:
        self._to = to

    def __getattr__(self, name: str) -> Callable[..., Schedule]:
        return functools.partial(getattr(schedules, name), **self._to)


def table(header: str) -> list[Row]:
    """The rows of the table that starts with this header cell."""
    lines = iter(PAGE.splitlines())
    for line in lines:
        if line.startswith(f"| {header} |"):
            break
    else:
        raise AssertionError(header)
    next(lines)
    rows = []
    for line in itertools.takewhile(lambda line: line.startswith("|"), lines):
        theirs, ours, _ = (cell.strip() for cell in line.strip("|").split("|"))
        found = re.fullmatch(r"(?P<label>.*?)`(?P<name>\w+)\((?P<parameters>.*)\)`", theirs)
        assert found, theirs
        signature = inspect.signature(eval(f"lambda {found['parameters']}: 0"))  # noqa: S307 - our own page
        rows.append(Row(found["label"], found["name"], signature, ours.strip("`")))
    return rows


def row_for(rows: list[Row], name: str, arguments: dict[str, Any], label: str = "") -> Row | None:
    return next((r for r in rows if r.name == name and label in r.label and r.fits(arguments)), None)


def steps(schedule: Schedule, count: int, base: float, run: int = COUNT) -> list[float]:
    """What it gives at each step, iteration or epoch of a run of *run*."""
    found = []
    for t in range(count):
        clocks = {"step": t, "iteration": t + 1, "epoch": t + 1}
        lengths = {"total_steps": run, "epoch_length": 1, "max_epochs": run}
        found.append(schedule({**clocks, **lengths, f"initial_{schedule.dst}": base})[schedule.dst])
    return found


def near(expected: list[float]) -> Any:
    """The others multiply step by step, so they drift from the closed form by some last bits."""
    return pytest.approx(expected, rel=1e-9, abs=1e-13)


# -- torch ----------------------------------------------------------------------------------------------------

TORCH = table("torch")


def lambda_decay(t: int) -> float:
    return 1 / (1 + t)


TORCH_CASES: list[tuple[str, dict[str, Any]]] = [
    ("LambdaLR", {"lr_lambda": lambda_decay}),
    ("MultiplicativeLR", {"lr_lambda": lambda_decay}),
    ("StepLR", {"step_size": 7}),
    ("StepLR", {"step_size": 10, "gamma": 0.3}),
    ("MultiStepLR", {"milestones": [3, 10, 11], "gamma": 0.5}),
    ("ConstantLR", {}),
    ("ConstantLR", {"factor": 0.25, "total_iters": 9}),
    ("LinearLR", {}),
    ("LinearLR", {"start_factor": 0.2, "end_factor": 0.9, "total_iters": 30}),
    ("ExponentialLR", {"gamma": 0.9}),
    ("PolynomialLR", {}),
    ("PolynomialLR", {"total_iters": 30, "power": 2.0}),
    ("CosineAnnealingLR", {"T_max": 20}),
    ("CosineAnnealingLR", {"T_max": 50, "eta_min": 0.01}),
    ("CosineAnnealingWarmRestarts", {"T_0": 7}),
    ("CosineAnnealingWarmRestarts", {"T_0": 4, "T_mult": 3, "eta_min": 0.01}),
    ("CyclicLR", {"base_lr": 0.3, "max_lr": 0.7, "step_size_up": 5}),
    ("CyclicLR", {"base_lr": 0.3, "max_lr": 0.7, "step_size_up": 4, "step_size_down": 9, "mode": "triangular2"}),
    ("CyclicLR", {"base_lr": 0.3, "max_lr": 0.7, "step_size_up": 4, "mode": "exp_range", "gamma": 0.97}),
    ("OneCycleLR", {"max_lr": 0.3, "total_steps": 60}),
    ("OneCycleLR", {"max_lr": 0.3, "total_steps": 60, "pct_start": 0.2, "anneal_strategy": "linear"}),
    ("OneCycleLR", {"max_lr": 0.3, "total_steps": 60, "div_factor": 5, "final_div_factor": 10, "three_phase": True}),
    ("PolynomialLR", {"total_iters": 30, "power": 0.5}),
    ("SWALR", {"swa_lr": 0.05}),
    ("SWALR", {"swa_lr": 0.05, "anneal_epochs": 20, "anneal_strategy": "linear"}),
]


def sgd(lr: float = 0.3, momentum: float = 0.9) -> torch.optim.SGD:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr, momentum=momentum)


def run(optimizer: torch.optim.Optimizer, scheduler: Any, key: str = "lr", count: int = COUNT) -> list[float]:
    found = []
    for t in range(count):
        found.append(optimizer.param_groups[0][key])
        optimizer.step()
        if t + 1 < count:  # OneCycleLR raises past its end
            scheduler.step()
    return found


def torchs(name: str) -> Any:
    return SWALR if name == "SWALR" else getattr(lr_scheduler, name)


@pytest.mark.parametrize(("name", "arguments"), TORCH_CASES)
def test_every_row_of_torch_gives_torchs_numbers(name: str, arguments: dict[str, Any]) -> None:
    optimizer = sgd()
    expected = run(optimizer, torchs(name)(optimizer, **arguments))
    row = row_for(TORCH, name, arguments)

    assert row is not None
    assert steps(row.make(arguments), COUNT, 0.3) == near(expected)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("CyclicLR", {"base_momentum": 0.8, "max_momentum": 0.9, "step_size_up": 5}),
        ("CyclicLR", {"base_momentum": 0.7, "max_momentum": 0.9, "step_size_up": 4, "mode": "triangular2"}),
        ("OneCycleLR", {"total_steps": 60}),
        ("OneCycleLR", {"total_steps": 60, "base_momentum": 0.5, "pct_start": 0.2, "three_phase": True}),
    ],
)
def test_every_row_of_torchs_momentum_gives_torchs_numbers(name: str, arguments: dict[str, Any]) -> None:
    optimizer, rates = sgd(), {"CyclicLR": {"base_lr": 0.3, "max_lr": 0.7}, "OneCycleLR": {"max_lr": 0.3}}
    expected = run(optimizer, torchs(name)(optimizer, **rates[name], **arguments), "momentum")
    row = row_for(TORCH, name, arguments, label="momentum")

    assert row is not None
    to = {} if "dst=" in row.expression else {"dst": "momentum"}
    assert steps(row.make(arguments, **to), COUNT, 0.9) == near(expected)


@pytest.mark.parametrize(
    ("parts", "ours"),
    [
        (
            [lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4), lambda o: lr_scheduler.ExponentialLR(o, 0.9)],
            [schedules.warmup(steps=4, start=0.1), schedules.exponential(gamma=0.9)],
        ),
        (
            [lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4), lambda o: lr_scheduler.StepLR(o, 7)],
            [schedules.warmup(steps=4, start=0.1), schedules.step(step_size=7)],
        ),
    ],
)
def test_the_rows_that_combine_give_torchs_numbers(parts: Any, ours: Any) -> None:
    optimizer = sgd()
    made = [part(optimizer) for part in parts]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.13 steps with an epoch at a milestone, and warns of it
        expected = run(optimizer, lr_scheduler.SequentialLR(optimizer, made, milestones=[4]))
    arguments = {"schedulers": ours, "milestones": [4]}
    row = row_for(TORCH, "SequentialLR", arguments)
    assert row is not None
    assert steps(row.make(arguments), COUNT, 0.3) == near(expected)

    optimizer = sgd()
    chained = lr_scheduler.ChainedScheduler([part(optimizer) for part in parts], optimizer=optimizer)
    row = row_for(TORCH, "ChainedScheduler", {"schedulers": ours})
    assert row is not None
    assert steps(row.make({"schedulers": ours}), COUNT, 0.3) == near(run(optimizer, chained))


@pytest.mark.parametrize(
    "arguments",
    [
        {"patience": 2},
        {"patience": 1, "factor": 0.5, "cooldown": 2, "threshold": 0.1, "threshold_mode": "abs"},
        {"mode": "max", "patience": 3, "min_lr": 0.01},
    ],
)
def test_the_row_of_the_plateau_gives_torchs_numbers(arguments: dict[str, Any]) -> None:
    metrics = [5.0, 4.0, 4.0, 3.99, 4.5, 4.1, 3.0, 3.0, 3.0, 3.1, 2.0, 2.0, 2.2, 2.1, 2.0, 2.0, 1.9, 1.9, 1.9, 1.9]
    optimizer, expected = sgd(), []
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, **arguments)
    for value in metrics:
        optimizer.step()
        scheduler.step(value)
        expected.append(optimizer.param_groups[0]["lr"])

    row = row_for(TORCH, "ReduceLROnPlateau", arguments)
    assert row is not None
    assert measured(row.make(arguments), metrics, 0.3)[1:] == near(expected)


def measured(schedule: Schedule, metrics: list[float], base: float) -> list[float]:
    """What it gives before each measurement, and after the last one."""
    histories = [tuple(metrics[:n]) for n in range(len(metrics) + 1)]
    return [schedule({"step": 0, "initial_lr": base, "measurements": {"loss": history}})["lr"] for history in histories]


def test_every_scheduler_of_torch_has_a_row_whose_defaults_are_torchs() -> None:
    names = {row.name for row in TORCH}

    assert names == {*lr_scheduler.__all__, "SWALR"} - {"LRScheduler"}
    for row in TORCH:
        theirs = inspect.signature(torchs(row.name)).parameters
        for name, parameter in row.signature.parameters.items():
            assert name in theirs, row
            if parameter.default is not parameter.empty and name != "total_steps":
                assert parameter.default == theirs[name].default, (row.name, name)


# -- Ignite ---------------------------------------------------------------------------------------------------

IGNITE = table("Ignite")


def simulated(scheduler: Any, **arguments: Any) -> list[float]:
    return [value for _, value in scheduler.simulate_values(num_events=COUNT, param_name="lr", **arguments)]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("LinearCyclicalScheduler", {"start_value": 0.1, "end_value": 1.0, "cycle_size": 10}),
        ("CosineAnnealingScheduler", {"start_value": 0.3, "end_value": 0.01, "cycle_size": 8}),
        ("CosineAnnealingScheduler", {"start_value": 0.3, "end_value": 0.0, "cycle_size": 4, "cycle_mult": 2}),
    ],
)
def test_every_row_of_ignite_gives_ignites_numbers(name: str, arguments: dict[str, Any]) -> None:
    row = row_for(IGNITE, name, arguments)

    assert row is not None
    expected = simulated(getattr(param_scheduler, name), **arguments)
    assert steps(row.make(arguments, unit="iteration"), COUNT, arguments["start_value"]) == near(expected)


def test_what_the_page_says_of_other_schedulers_of_ignite_gives_its_numbers() -> None:
    listed = re.findall(r"^- \*\*.*(?:\n  .*)*", PAGE.split("## Ignite")[1].split("\n## ")[0], re.MULTILINE)
    line, points, warmed, after = re.findall(r"`((?:schedules|a\.)[^`]*)`", "".join(listed))
    optimizer = sgd()
    pieces = simulated(param_scheduler.PiecewiseLinear, milestones_values=[(0, 0.0), (6, 0.3), (40, 0.0)])
    ramp: list[Any] = [None] * COUNT
    param_scheduler.create_lr_scheduler_with_warmup(
        lr_scheduler.ExponentialLR(optimizer, 0.9), 0.0, 6, output_simulated_values=ramp
    )
    parts = [
        param_scheduler.PiecewiseLinear(optimizer, "lr", [(0, 0.0), (6, 0.3)]),
        param_scheduler.CosineAnnealingScheduler(optimizer, "lr", 0.3, 0.0, 20),
    ]
    joined = param_scheduler.ConcatScheduler.simulate_values(COUNT, parts, durations=[6])
    ours = {"a": schedules.warmup(steps=6, start=0.0), "numpy": numpy, "schedules": schedules}

    for expression, b, expected in (
        (line, None, pieces),
        (points, None, pieces),
        (warmed, schedules.exponential(gamma=0.9), [value for _, value in ramp]),
        (after, schedules.cosine_restarts(periods=20), [value for _, value in joined]),
    ):
        assert steps(eval(expression, {**ours, "b": b}), COUNT, 0.3) == near(expected), expression  # noqa: S307 - our own page


# -- transformers ---------------------------------------------------------------------------------------------

TRANSFORMERS = table("`lr_scheduler_type` and function")
TRANSFORMERS_DATA = json.loads((HERE / "data/transformers.json").read_text())


def transformers_row(case: dict[str, Any]) -> tuple[Row, dict[str, Any]] | None:
    """The row and its arguments; without a warm-up, what the page says: ``warmup=`` and ``start=`` are left out."""
    arguments, name = dict(case["arguments"]), case["schedule"]
    ahead = name.endswith("_lr_rate")
    if arguments.get("num_warmup_steps") == 0 and name == "get_constant_schedule_with_warmup":
        name, arguments = "get_constant_schedule", {}
    if ahead and arguments["num_warmup_steps"] < 2:
        return None  # "from 2 warm-up steps"
    if arguments.get("num_stable_steps") is None or "num_training_steps" not in arguments:
        row = row_for(TRANSFORMERS, name, arguments)
    else:  # theirs ignores num_training_steps then, with a warning
        del arguments["num_training_steps"]
        row = row_for(TRANSFORMERS, name, arguments)
    if row is not None and arguments.get("num_warmup_steps") == 0:
        row = row._replace(expression=re.sub(r"(warmup=num_warmup_steps|start=[\w.]+), ", "", row.expression))
    return None if row is None else (row, arguments)


def test_every_row_of_transformers_gives_transformers_numbers() -> None:
    used, left = set(), []
    for case in TRANSFORMERS_DATA["cases"]:
        found = transformers_row(case)
        if found is None:
            left.append(case)
            continue
        row, arguments = found
        used.add(row.expression)
        assert steps(row.make(arguments), len(case["values"]), case["base"]) == near(case["values"]), case

    assert {row.expression for row in TRANSFORMERS} <= used
    assert all(case["schedule"].endswith("_lr_rate") and case["arguments"]["num_warmup_steps"] < 2 for case in left)
    assert len(left) == 2
    assert {row.name for row in TRANSFORMERS} == {case["schedule"] for case in TRANSFORMERS_DATA["cases"]}


# -- mmcv -----------------------------------------------------------------------------------------------------

MMCV = json.loads((HERE / "data/mmcv.json").read_text())


def mmcv_cases() -> Iterator[tuple[dict[str, Any], Row, Row | None]]:
    """Each case with the rows of its policy and of its warm-up."""
    policies, momenta, ramps = table("policy"), table("momentum policy"), table("warm-up")
    for case in MMCV["cases"]:
        arguments, momentum = dict(case["arguments"]), "Momentum" in case["hook"]
        ramp = {key: arguments.pop(key) for key in list(arguments) if key.startswith("warmup")}
        ratio = arguments.get("target_ratio")
        if isinstance(ratio, list) and len(ratio) == 1:
            arguments["target_ratio"] = ratio[0]  # in mmcv, a tuple of one number is that number
        name = re.sub(r"(Lr|Momentum)UpdaterHook", "", case["hook"])
        row = row_for(momenta if momentum else policies, name, arguments)
        assert row is not None, case
        warm = None
        if ramp.get("warmup"):
            settings = {key: ramp[key] for key in ("warmup_iters", "warmup_ratio") if key in ramp}
            warm = row_for(ramps, ramp["warmup"], settings, label="momentum" if momentum else "")
            assert warm is not None, case
        yield {**case, "arguments": arguments, "ramp": ramp}, row, warm


def test_every_row_of_mmcv_gives_mmcvs_numbers() -> None:
    used: set[str] = set()
    for case, row, warm in mmcv_cases():
        times = case["arguments"].get("step")
        if isinstance(times, list) and times != sorted(times):
            with pytest.raises(ArgumentValueError, match="rising"):
                row.make(case["arguments"])
            continue
        to = {"dst": case["key"]}
        schedule = row.make(case["arguments"], unit="epoch" if case["by_epoch"] else "iteration", **to)
        used.add(row.expression)
        if warm is not None:
            settings = {key: case["ramp"][key] for key in ("warmup_iters", "warmup_ratio") if key in case["ramp"]}
            used.add(warm.expression)
            length = "epochs=" if case["ramp"].get("warmup_by_epoch") else "steps="
            ramp = warm._replace(expression=warm.expression.replace("steps=", length))
            schedule = ramp.make(settings, unit="iteration", **to) * schedule
        n, base = case["epoch_length"], case["arguments"].get("max_lr", case["base"])
        found = [
            schedule(
                {
                    "iteration": i + 1,
                    "epoch": i // n + 1,
                    "epoch_length": n,
                    "max_epochs": case["max_epochs"],
                    "max_iters": case["max_iters"],
                    f"initial_{case['key']}": base,
                }
            )[case["key"]]
            for i in range(len(case["values"]))
        ]
        assert found == near(case["values"]), case

    assert used == {row.expression for row in (*table("policy"), *table("momentum policy"), *table("warm-up"))}


# -- mmengine -------------------------------------------------------------------------------------------------

MMENGINE = table("mmengine, from `begin=0`")
MMENGINE_DATA = json.loads((HERE / "data/mmengine.json").read_text())


def weighs_the_top(case: dict[str, Any]) -> bool:
    arguments = case["schedulers"][0][1]
    return bool(arguments.get("eta_min")) and set(arguments.get("restart_weights", [1])) != {1}


def test_every_row_of_mmengine_gives_mmengines_numbers() -> None:
    used = set()
    for case in MMENGINE_DATA["cases"]:
        if len(case["schedulers"]) > 1 or weighs_the_top(case):
            continue
        ((name, arguments),) = case["schedulers"]
        row = row_for(MMENGINE, name, arguments)
        assert row is not None, case
        used.add(row.expression)
        base = arguments.get("eta_max", case["base"])
        if "metrics" in case:
            assert measured(row.make(arguments), case["metrics"], base)[:-1] == near(case["values"]), case
        else:
            assert steps(row.make(arguments), len(case["values"]), base) == near(case["values"]), case

    assert used == {row.expression for row in MMENGINE}


def test_what_the_page_says_of_several_schedulers_of_mmengine_gives_its_numbers() -> None:
    listed = re.findall(r"^- \*\*.*(?:\n  .*)*", PAGE.split("## mmengine")[1], re.MULTILINE)
    after, both, weights = ("".join(re.findall(r"`(schedules[^`]*)`", text)) for text in listed[1:])
    cases = [case for case in MMENGINE_DATA["cases"] if len(case["schedulers"]) > 1]
    scope = {"schedules": schedules}

    for expression, case in zip((after, both), cases, strict=True):
        assert steps(eval(expression, scope), 40, case["base"]) == near(case["values"])  # noqa: S307 - our own page
    (case,) = filter(weighs_the_top, MMENGINE_DATA["cases"])
    second = eval(weights, scope)  # noqa: S307
    whole = schedules.cosine(total=20, floor=0.1).then(second, at=20)
    assert steps(whole, 40, case["base"]) == near(case["values"])


# -- choosing a schedule --------------------------------------------------------------------------------------


def test_every_schedule_to_take_can_be_made_and_trains() -> None:
    page = (HERE.parent / "docs/choosing-a-schedule.md").read_text()
    cells = [line.split("|")[2] for line in page.split("## Take this")[1].split("\n## ")[0].splitlines() if "|" in line]
    expressions = [text for cell in cells for text in re.findall(r"`([^`]+)`", cell)]

    assert len(expressions) > 12
    for expression in expressions:
        schedule = eval(expression, {"schedules": schedules})  # noqa: S307 - our own page
        mapping = {"step": 5, "iteration": 6, "epoch": 1, "total_steps": 20_000, "epoch_length": 200, "max_epochs": 100}
        value = schedule({**mapping, f"initial_{schedule.dst}": 0.9, "measurements": {}})[schedule.dst]
        assert 0 < value <= 0.9 * 4, expression


def test_the_overview_has_every_schedule_but_those_that_do_not_change_in_time() -> None:
    script = (HERE.parent / "docs/figures.py").read_text().split("CATALOGUE: ")[1].split("]\n\n")[0]
    drawn = set(re.findall(r'\("(\w+)"', script))

    others = {"Schedule", "from_spec", "batch_scaling", "layer_decay", "function", "multiplicative"}
    assert drawn == set(schedules.__all__) - others
