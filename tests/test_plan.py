"""Plan: what it says is what the run does, step for step; and it finds what people get wrong."""

import copy
import csv
import functools
import itertools
import math
import re
import sys
from array import array

import matplotlib.pyplot as plt
import pytest
import torch
from ignite.engine import Engine
from ignite.handlers.tensorboard_logger import TensorboardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import ice_engine as ice
from ice_engine.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    ClosureError,
    MissingKeyError,
    ProcessorValueError,
    UnknownKeyError,
)
from ice_engine.pictures import corners, sparkline
from ice_engine.window import closing_windows
from tests.test_schedules import EVERY, make

TAILS = ("step", "carry", "drop")
COUNTS = ("step", "iteration", "epoch", "micro_batches")


def make_optimizer(cls, *processors, groups=1, lr=0.1, named=False, entries=(), **settings):
    params = [torch.nn.Parameter(torch.ones(())) for _ in range(groups)]
    listed = [{"params": [p], "lr": lr, **({"name": "abcdef"[i]} if named else {})} for i, p in enumerate(params)]
    listed = [{**group, **dict(entries)} for group in listed]
    return ice.Optimizer(cls(listed, weight_decay=0.01), processors=list(processors), **settings)


adamw = functools.partial(make_optimizer, torch.optim.AdamW)


def happened(optimizer, epoch_length, **length):
    """Run it, and return for each step what it did it with, as a plan's rows say it: all numbers of all groups."""
    rows = []

    def train_step(engine, batch):
        optimizer.backward(sum(p for group in optimizer.param_groups for p in group["params"]) * batch)

    def note(engine):
        record = engine.state.optimizer_record
        row = {count: getattr(record, count) for count in COUNTS}
        for index, group in enumerate(optimizer.param_groups):
            name = group.get("name", f"group_{index}")
            assert record.values[name].items() <= group.items()
            for key, value in group.items():
                elements = enumerate(value) if key == "betas" else [(None, value)]
                numbers = ((i, v) for i, v in elements if type(v) in (int, float, torch.Tensor))
                row.update({f"{key}{'' if i is None else f'.{i}'}/{name}": float(v) for i, v in numbers})
        rows.append(row)

    trainer = Engine(train_step)
    optimizer.attach(trainer)
    trainer.add_event_handler(optimizer.event("STEP_COMPLETED"), note)
    trainer.run([1.0] * epoch_length, **length)
    return rows


def assert_plan_is_run(build, epoch_length, **length):
    planned = list(build().plan(epoch_length, **length).rows)
    run = happened(build(), epoch_length, **length)
    tags = list(planned[0]) if planned else []
    assert planned == [{tag: row[tag] for tag in tags} for row in run]
    # And what it does not have stayed as it was.
    assert all(len({row[tag] for row in run}) == 1 for tag in (run[0] if run else ()) if tag not in tags)
    return planned


# -- the plan is the run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("expression", [row.expression for row in EVERY])
@pytest.mark.parametrize("tail", TAILS)
def test_plan_and_run_are_equal_step_for_step_for_every_schedule(expression, tail):
    schedule = make(expression)
    cls = torch.optim.SGD if schedule.dst == "momentum" else torch.optim.AdamW
    entries = {"depth": 2, **({"momentum": 0.9} if cls is torch.optim.SGD else {})}

    def build():
        return make_optimizer(cls, schedule, groups=2, accumulation_steps=3, tail=tail, entries=entries)

    rows = assert_plan_is_run(build, 7, max_epochs=6)

    assert len(rows) == {"step": 18, "carry": 14, "drop": 12}[tail]


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("size", [1, 2, 4, 5, 6, 13])
@pytest.mark.parametrize("length", [{"max_epochs": 3}, {"max_iters": 10}, {"max_iters": 13}, {"max_iters": 4}], ids=str)
def test_plan_and_run_are_equal_for_every_tail_window_and_length(tail, size, length):
    def build():
        schedules = [ice.schedules.linear(), ice.schedules.linear(unit="iteration", dst="weight_decay")]
        return adamw(*schedules, accumulation_steps=size, tail=tail)

    rows = assert_plan_is_run(build, 5, **length)

    assert len(rows) == len(build().plan(5, **length))


@pytest.mark.parametrize("tail", TAILS)
def test_windows_are_those_of_the_definition(tail):
    for size, length, iterations in itertools.product(range(1, 6), range(1, 6), range(1, 14)):
        expected, window = [], 0
        for iteration in range(1, iterations + 1):
            window += 1
            ends = iteration % length == 0 or iteration == iterations
            if window == size or (tail == "step" and ends) or (tail == "carry" and iteration == iterations):
                expected.append((iteration, (iteration - 1) // length + 1, window))
                window = 0
            window = 0 if tail == "drop" and ends else window

        assert list(closing_windows(size, tail, length, iterations)) == expected


def test_total_steps_is_the_number_of_steps_for_every_tail():
    def expect(group):
        seen.append((group["step"], group["total_steps"]))
        return group

    for tail, size, iters in itertools.product(TAILS, range(1, 6), range(1, 14)):
        seen = []
        plan = adamw(expect, accumulation_steps=size, tail=tail).plan(4, max_iters=iters)
        assert seen == [(step, len(plan)) for step in range(len(plan))]


def test_functions_that_read_all_there_is_see_in_the_plan_what_they_see_in_the_run():
    keys = [
        *("step", "attempt", "iteration", "epoch", "epoch_length", "max_epochs", "max_iters", "total_steps"),
        *("current_epoch", "epoch_steps", "global_steps", "epoch_size", "group_index", "group_name"),
        *("lr", "initial_lr", "betas", "betas.1", "weight_decay"),
    ]

    def build(seen):
        def look(group):
            optimizer, state = group["optimizer"], group["engine"].state
            seen.append(
                {key: group[key] for key in keys}
                | {"keys": list(group), "clocks": optimizer.clocks, "lrs": [g["lr"] for g in optimizer.param_groups]}
                | {k: getattr(state, k) for k in ("iteration", "epoch", "epoch_length", "max_epochs", "max_iters")}
                | {k: getattr(state, f"optimizer_{k}") for k in ("step", "attempt", "skipped")}
                | {"same": group["n"] is group["module_node"] is optimizer, "class": type(optimizer)}
                | {"parameters": [p.shape for p in group["params"]], "name": optimizer.name}
            )
            assert optimizer.engine is group["engine"]
            group["lr"] *= 0.5 + group["group_index"] / 4
            return group

        return adamw(look, groups=2, named=True, accumulation_steps=2)

    planned, run = [], []
    build(planned).plan(3, 2)
    happened(build(run), 3, max_epochs=2)

    assert planned == run
    assert len(run) == 8


def test_every_kind_of_processor_is_planned():
    @ice.dictprocess
    def halve(value, epoch, by=0.5):
        return value * by**epoch

    class Drift(ice.Processor):
        calls = 0

        def __call__(self, mapping):
            self.calls += 1
            mapping["betas.0"] = 0.9 / self.calls
            return mapping

    def plain(group):
        return {"weight_decay": group["weight_decay"] * 0.9}

    def build():
        both = ice.Compose(ice.schedules.cosine(), halve(value="lr", dst="lr"))
        partial = functools.partial(lambda x, group: {**group, "eps": x * (1 + group["step"])}, 1e-8)
        limited = ice.schedules.constant(0.5, dst="betas.1").only("b").scale(0.5)
        return adamw(both, Drift(), plain, partial, limited, groups=3, named=True, accumulation_steps=2)

    rows = assert_plan_is_run(build, 5, max_epochs=4)

    keys = ("lr", "betas.0", "betas.1", "weight_decay", "eps")
    assert list(rows[0]) == [*COUNTS, *(f"{key}/{group}" for key in keys for group in "abc")]


def test_tensor_lr_is_planned_as_it_runs_and_stays_what_it_is():
    def build():
        return adamw(ice.schedules.cosine(), lr=torch.tensor(0.1), groups=2)

    optimizer = build()
    tensors = [group["lr"] for group in optimizer.param_groups]
    assert_plan_is_run(build, 9, max_epochs=2)
    optimizer.plan(9, 2)

    assert [group["lr"] for group in optimizer.param_groups] == tensors == [torch.tensor(0.1)] * 2


def test_an_entry_that_is_first_written_late_is_planned_from_the_start():
    def late(group):
        if group["step"] == 3:
            group["weight_decay"] = 0.5
        return group

    plan = adamw(late).plan(5, 1)

    assert list(plan.series["weight_decay/group_0"]) == [0.01, 0.01, 0.01, 0.5, 0.5]
    assert list(plan.series) == ["lr/group_0", "weight_decay/group_0"]


def test_elements_of_a_tuple_are_planned_one_by_one():
    one, both = ice.schedules.linear(dst="betas.0"), lambda group: {"betas": (0.5, group["betas"][1])}

    assert list(adamw(one).plan(5, 1).series) == ["lr/group_0", "betas.0/group_0"]
    assert list(adamw(one, both).plan(5, 1).series) == ["lr/group_0", "betas.0/group_0", "betas.1/group_0"]


def test_values_that_are_no_numbers_are_left_out():
    def odd(group):
        group["foreach"] = bool(group["step"])
        group["extra"] = 0.5 if group["step"] == 2 else "none"
        return group

    optimizer = adamw(odd)
    optimizer.param_groups[0]["extra"] = None
    plan = optimizer.plan(3, 1)

    assert list(plan.series) == ["lr/group_0", "extra/group_0"]
    assert [row.get("extra/group_0") for row in plan.rows] == [None, None, 0.5]


# -- nothing changes --------------------------------------------------------------------------------------------


def state_of(optimizer):
    return copy.deepcopy((optimizer.state_dict(), vars(optimizer.inner)["param_groups"], optimizer.clocks))


def test_planning_half_way_through_gives_the_whole_run_and_changes_nothing():
    schedules = [ice.schedules.cosine(warmup=3), ice.schedules.linear(dst="betas.0"), lambda g: {"eps": g["eps"] * 2}]
    optimizer = adamw(*schedules, groups=2, accumulation_steps=2)
    expected = list(optimizer.plan(6, 4).rows)
    happened(optimizer, 6, max_epochs=2)
    before = state_of(optimizer)
    plan = optimizer.plan(max_epochs=4)

    assert state_of(optimizer) == before
    assert optimizer.clocks["step"] == 6
    # eps has no initial value that it could start from anew.
    without = [{k: v for k, v in row.items() if "eps" not in k} for row in plan.rows]
    assert without == [{k: v for k, v in row.items() if "eps" not in k} for row in expected]


def test_lr_changed_by_hand_is_kept_where_no_schedule_changes_it():
    optimizer = adamw(ice.schedules.cosine(dst="weight_decay"))
    optimizer.param_groups[0]["lr"] = 0.7

    assert set(optimizer.plan(5, 1).series["lr/group_0"]) == {0.7}


def test_state_of_processors_is_copied_with_what_they_hold_of_the_run():
    class Counter(ice.Processor):
        def __init__(self):
            self.calls, self.optimizer, self.seen = 0, None, []

        def __call__(self, mapping):
            self.calls += 1
            self.seen.append(self.optimizer is mapping["optimizer"])
            self.optimizer.param_groups[0]["eps"] = self.calls
            mapping["weight_decay"] = 1.0 / self.calls * all(self.seen)
            return mapping

    counter = Counter()
    optimizer = adamw(counter)
    counter.optimizer = optimizer
    plan = optimizer.plan(4, 1)

    assert list(plan.series["weight_decay/group_0"]) == [1.0, 1 / 2, 1 / 3, 1 / 4]
    assert (counter.calls, counter.seen) == (0, [])
    assert optimizer.param_groups[0]["eps"] == 1e-8
    assert optimizer.plan(4, 1).series == plan.series


def test_a_processor_that_cannot_be_copied_is_named():
    class Reader(ice.Processor):
        def __init__(self):
            self.lines = (line for line in ())

        def __call__(self, mapping):
            return mapping

    with pytest.raises(ArgumentTypeError, match=r"processor 'Reader' cannot be copied .*__deepcopy__"):
        adamw(Reader()).plan(4, 1)


# -- lengths ----------------------------------------------------------------------------------------------------


def test_lengths_left_out_come_from_the_engine():
    optimizer = adamw(ice.schedules.linear())
    happened(optimizer, 5, max_epochs=3)

    assert len(optimizer.plan()) == 15
    assert len(optimizer.plan(max_epochs=2)) == 10
    assert len(optimizer.plan(4)) == 12
    assert len(optimizer.plan(max_iters=7)) == 7


def test_max_iters_comes_from_the_engine_too():
    optimizer = adamw(ice.schedules.linear())
    happened(optimizer, 5, max_iters=8)

    assert len(optimizer.plan()) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {},
            r"needs epoch_length and max_epochs \(or max_iters\): optimizer 'optimizer' is attached to no engine; wri",
        ),
        ({"max_epochs": 3}, r"plan\(\) needs epoch_length: "),
        ({"epoch_length": 3}, r"plan\(\) needs max_epochs \(or max_iters\): "),
        ({"epoch_length": 3, "max_epochs": 3, "max_iters": 3}, "got max_epochs=3 and max_iters=3; give one of them"),
        ({"epoch_length": 0, "max_epochs": 3}, "epoch_length must be at least 1, got 0"),
        ({"epoch_length": 3, "max_epochs": 0}, "max_epochs must be at least 1, got 0"),
        ({"epoch_length": 3, "max_iters": 0}, "max_iters must be at least 1, got 0"),
    ],
)
def test_impossible_lengths_are_refused(arguments, message):
    with pytest.raises(ArgumentValueError, match=message):
        adamw(ice.schedules.linear()).plan(**arguments)


def test_an_engine_that_has_not_run_knows_no_length():
    optimizer = adamw().attach(Engine(lambda engine, batch: None))

    with pytest.raises(ArgumentValueError, match="is attached to an engine that does not know it yet"):
        optimizer.plan()


def test_lengths_are_ints():
    with pytest.raises(ArgumentTypeError, match=r"epoch_length must be an int, got 2.5"):
        adamw().plan(2.5, 1)


def test_without_an_optimizer_a_plan_is_made_of_groups_and_processors():
    groups = [{"lr": 0.4, "name": "head"}, {"lr": 0.2}]
    plan = ice.Plan(groups, [ice.schedules.linear(total=4)], epoch_length=2, max_epochs=2)

    assert {tag: list(values) for tag, values in plan.series.items()} == {
        "lr/head": pytest.approx([0.4, 0.3, 0.2, 0.1]),
        "lr/group_1": pytest.approx([0.2, 0.15, 0.1, 0.05]),
    }
    assert groups == [{"lr": 0.4, "name": "head"}, {"lr": 0.2}]
    with pytest.raises(ArgumentValueError, match=r"max_epochs or max_iters, .* got neither"):
        ice.Plan(groups, epoch_length=2)


def test_groups_of_one_name_are_told_apart():
    plan = ice.Plan([{"lr": 1.0, "name": "a"}, {"lr": 2.0, "name": "a"}], epoch_length=1, max_epochs=1)

    assert list(plan.series) == ["lr/a#0", "lr/a#1"]


def test_an_optimizer_that_needs_a_closure_has_no_plan():
    optimizer = ice.Optimizer(torch.optim.LBFGS([torch.nn.Parameter(torch.ones(()))]))

    with pytest.raises(ClosureError, match="LBFGS evaluates the loss in a closure and steps without windows"):
        optimizer.plan(3, 1)


# -- errors of processors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processor", "error", "step"),
    [
        (lambda g: g["engine"].state.output["loss"], AttributeError, 1),
        (lambda g: g["engine"].data, AttributeError, 1),
        (lambda g: {"lr": 1.0 if g["step"] < 3 else math.inf}, ProcessorValueError, 4),
        (lambda g: {"lt": 1.0}, UnknownKeyError, 1),
        (ice.schedules.linear(unit="epoch"), MissingKeyError, 1),
        (ice.schedules.exponential(gamma=1e300), ProcessorValueError, 3),
    ],
)
def test_what_a_processor_raises_says_at_which_step_of_the_plan(processor, error, step):
    with pytest.raises(error) as caught:
        adamw(processor).plan(4, max_iters=8)
    if sys.version_info >= (3, 11):
        assert f"raised while planning step {step} of 8: a plan has clocks" in caught.value.__notes__[-1]


# -- what it looks like ---------------------------------------------------------------------------------------


def sample(**settings):
    schedules = [ice.schedules.cosine(warmup=5), ice.schedules.linear(start=0.95, end=1.0, dst="betas.0")]
    return adamw(*schedules, groups=3, **{"accumulation_steps": 4, **settings}).plan(10, 8)


def test_rows_are_a_sequence_of_flat_dicts():
    plan = sample()
    rows = plan.rows

    assert len(rows) == len(plan) == len(plan.steps) == 24
    assert rows[0] == rows[-24] == next(iter(rows))
    assert list(rows[0]) == [*COUNTS, *plan.series]
    assert list(rows[3:9:2]) == [rows[3], rows[5], rows[7]]
    assert len(rows[3:9:2]) == 3
    assert [row["step"] for row in rows] == list(plan.steps) == list(range(1, 25))
    assert [row["lr/group_1"] for row in rows] == list(plan.series["lr/group_1"])
    with pytest.raises(IndexError):
        rows[24]


def test_csv_reads_back_as_it_was(tmp_path):
    plan = sample()
    plan.to_csv(tmp_path / "plan.csv")
    with (tmp_path / "plan.csv").open(newline="") as file:
        read = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]

    assert read == list(plan.rows)


def test_rows_go_through_a_csv_dict_writer(tmp_path):
    rows = sample().rows
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)

    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 25


def scalars(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def float32(values):
    return torch.tensor(list(values), dtype=torch.float32).tolist()


def test_event_file_has_every_value_at_its_step(tmp_path):
    plan = sample()
    plan.to_tensorboard(tmp_path)

    assert scalars(tmp_path) == {
        f"plan/{tag}": list(zip(plan.steps, float32(values), strict=True)) for tag, values in plan.series.items()
    }


def test_a_writer_or_logger_of_the_users_is_written_to_and_stays_open(tmp_path):
    plan = sample()
    with SummaryWriter(tmp_path / "writer") as writer, TensorboardLogger(log_dir=tmp_path / "logger") as logger:
        plan.to_tensorboard(writer)
        plan.to_tensorboard(logger)
        writer.add_scalar("after", 1.0, 1)

    assert set(scalars(tmp_path / "writer")) == {*(f"plan/{tag}" for tag in plan.series), "after"}
    assert set(scalars(tmp_path / "logger")) == {f"plan/{tag}" for tag in plan.series}
    with pytest.raises(ArgumentTypeError, match=r"log_dir must be a path, a SummaryWriter or an Ignite .* got int"):
        plan.to_tensorboard(3)


def test_a_long_plan_is_thinned_out_and_keeps_its_ends_and_corners(tmp_path):
    staircase = ice.schedules.warmup(steps=700) * ice.schedules.step(step_size=(1501, 3333))
    plan = adamw(staircase).plan(1000, 5)
    plan.to_tensorboard(tmp_path)
    written = dict(scalars(tmp_path)["plan/lr/group_0"])

    assert len(written) <= 1000
    assert {1, 701, 1501, 1502, 3333, 3334, 5000} <= set(written)
    assert list(written.values()) == float32(plan.series["lr/group_0"][step - 1] for step in written)


def test_corners_keep_short_curves_whole_and_long_ones_to_their_limit():
    assert corners([3.0, 1.0], most=4) == [0, 1]
    assert corners([0.0] * 50, most=10) == [0, 12, 24, 36, 49]
    for most in (4, 5, 100):
        kept = corners([math.sin(i) for i in range(10_000)], most)
        assert len(kept) <= most
        assert kept == sorted(set(kept))
        assert (kept[0], kept[-1]) == (0, 9999)


def test_table_fits_a_hundred_columns_and_folds_what_is_the_same():
    text = str(sample())
    lines = text.splitlines()

    assert max(map(len, lines)) <= 100
    assert lines[0] == "24 steps in 8 epochs of 10 iterations; 4 micro-batches a step, fewer in 8 short windows"
    assert lines[3].startswith("lr/group_0 (3 groups)         0.01667       0.1 0.0006819  ▂▃▅▆▇████▇▇▆▆▅▅▄▄▃▃▂▂▁▁▁")
    assert [line.split()[0] for line in lines[3:5]] == ["lr/group_0", "betas.0/group_0"]
    assert "short tail: " in text


def test_table_of_a_run_that_ends_inside_an_epoch_and_of_one_that_ends_in_nothing():
    assert str(adamw().plan(10, max_iters=25)).startswith(
        "25 steps in 2 epochs of 10 iterations and 5 iterations; 1 micr"
    )
    assert str(adamw().plan(10, max_iters=1)).startswith("1 step in 1 iteration; 1 micro-batch a step")
    empty = adamw(ice.schedules.cosine(), accumulation_steps=20, tail="drop").plan(10, 2)
    assert str(empty).startswith("0 steps in 2 epochs of 10 iterations; 20 micro-batches a step")
    assert list(empty.rows) == []
    assert "no problems found" in str(adamw().plan(10, 1))
    assert repr(adamw().plan(10, 1)) == "<Plan of 10 steps, 1 series, 0 problems>"


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], ""),
        ([0.0, 0.0], "▁▁"),
        ([0.5] * 3, "▅▅▅"),
        ([0, 1, 2, 3, 4, 5, 6, 7], "▁▂▃▄▅▆▇█"),
        ([0.90, 0.95], "▁█"),
        ([-1.0, 1.0], "▁█"),
        ([1.0] * 50 + [0.0] * 50, "█" * 20 + "▁" * 20),
        (array("d", range(1000)), "".join(c * 5 for c in "▁▂▃▄▅▆▇█")),
    ],
)
def test_sparklines(values, line):
    drawn = sparkline(values)

    assert drawn == line or (len(values) == 1000 and len(drawn) == 40 and drawn == "".join(sorted(drawn)))


def test_figure_has_a_panel_per_key_and_a_line_per_group():
    plan = sample()
    figure = plan.plot()

    assert [axes.get_title(loc="left") for axes in figure.axes] == ["lr", "betas.0"]
    lines = [line for line in figure.axes[0].lines if not line.get_label().startswith("_")]
    assert [line.get_label() for line in lines] == ["group_0", "group_1", "group_2"]
    assert list(lines[1].get_xdata()) == list(plan.steps)
    assert list(lines[1].get_ydata()) == list(plan.series["lr/group_1"])
    marks = [line for line in figure.axes[0].lines if line.get_label().startswith("_")]
    assert [mark.get_xdata()[0] for mark in marks] == [3, 6, 9, 12, 15, 18, 21]
    assert figure.axes[-1].get_xlabel() == "step"
    plt.close(figure)


def test_figure_of_one_key_or_one_group_goes_into_given_axes():
    plan = sample()
    figure, (left, right) = plt.subplots(1, 2)

    assert plan.plot("lr", ax=left) is figure
    assert plan.plot("lr/group_2", ax=right) is figure
    assert [len([line for line in ax.lines if line.get_label()[0] != "_"]) for ax in (left, right)] == [3, 1]
    with pytest.raises(ArgumentValueError, match=r"the plan has no 'lt'; it has: lr/group_0, .*lr, betas.0"):
        plan.plot("lt")
    with pytest.raises(ArgumentValueError, match=r"plan.plot\(\) would draw 2: lr, betas.0; .* plan.plot\('lr', ax=ax"):
        plan.plot("lr", "betas.0", ax=left)
    plt.close(figure)


def test_long_curves_are_drawn_with_few_points_and_marks():
    figure = adamw(ice.schedules.cosine()).plan(30, 300).plot()
    lines = figure.axes[0].lines

    assert len(lines) <= 27
    assert max(len(line.get_xdata()) for line in lines) <= 2000
    plt.close(figure)


def test_without_matplotlib_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)

    for draw in (sample().plot, lambda: ice.schedules.cosine(total=3).plot(3)):
        with pytest.raises(ModuleNotFoundError, match=r"plot\(\) draws with matplotlib, .*; pip install matplotlib"):
            draw()


@pytest.mark.parametrize("expression", [row.expression for row in EVERY])
def test_every_schedule_of_one_clock_can_be_drawn_by_itself(expression):
    schedule = make(expression)
    if len(schedule.units) > 1:
        with pytest.raises(ArgumentValueError, match=r"follows epoch and step, .*optimizer\.plan\(.*\)\.plot\(\)"):
            schedule.plot(40)
        return
    others = {"epoch_length": 5, "depth": 2}
    figure = schedule.plot(40, base=2.0, **others)
    (line,) = figure.axes[0].lines
    (unit,) = schedule.units

    others.update(total_steps=40, max_iters=40, max_epochs=40, measurements={})
    clocks = [{unit: t if unit == "step" else t + 1, **others} for t in range(40)]
    assert list(line.get_ydata()) == [schedule({f"initial_{schedule.dst}": 2.0, **c})[schedule.dst] for c in clocks]
    assert figure.axes[0].get_xlabel() == unit
    plt.close(figure)


def test_limited_schedules_are_drawn_where_they_apply_and_into_given_axes():
    figure, ax = plt.subplots()

    assert ice.schedules.constant(0.5).only("head").plot(3, ax=ax) is figure
    assert list(ax.lines[0].get_ydata()) == [0.5] * 3
    with pytest.raises(ArgumentValueError, match=r"plot\(total\) must be at least 1, got 0"):
        ice.schedules.cosine().plot(0)
    plt.close(figure)


# -- problems -----------------------------------------------------------------------------------------------------

S = ice.schedules


def labels(plan):
    return [problem.partition(":")[0] for problem in plan.problems]


def optimizer_of(processors, *, groups=2, **settings):
    return adamw(*processors, groups=groups, named=True, **settings)


PROBLEMS = [
    # label, processors, settings, (epoch_length, max_epochs), part of the sentence
    ("lr reaches zero early", [S.linear(total=90)], {}, (10, 10), "lr of a and b is 0, .*, from step 91 of 100 on: 10"),
    ("lr reaches zero early", [S.exponential(gamma=0.5)], {}, (10, 10), "from step 31 of 100 on: 70 steps change"),
    ("lr reaches zero early", [S.linear(total=4, unit="epoch")], {}, (10, 5), "from step 41 of 50 on: 10 steps"),
    ("first step wasted", [S.cosine(warmup=5, start=0.0)], {}, (10, 10), "lr of a and b is 0 at the first step, wh"),
    ("first step wasted", [S.warmup(steps=2, start=0.0, unit="epoch")], {}, (10, 10), "at the first 10 steps"),
    ("warm-up longer than the run", [S.warmup(steps=200) * S.linear()], {}, (10, 10), "after 200 steps, and .* 100 st"),
    ("warm-up longer than the run", [S.cosine(warmup=120)], {}, (10, 10), r"warmup=120 of cosine\(warmup=120\)"),
    ("warm-up longer than the run", [S.warmup(steps=5, unit="epoch")], {}, (10, 5), "after 5 epochs, .* 5 epochs"),
    ("schedule longer than the run", [S.linear(total=400)], {}, (10, 10), "lr stops at 0.0752, and would end at 0"),
    ("schedule longer than the run", [S.linear(total=30, unit="epoch")], {}, (2, 10), "after 30 epochs, .* 10 epochs"),
    (
        "schedule longer than the run",
        [S.warmup(steps=5) * S.linear(total=400)],
        {},
        (10, 10),
        "after 400 steps, .*Write",
    ),
    (
        "schedule longer than the run",
        [S.constant().then(S.linear(total=5), at=100)],
        {},
        (10, 10),
        "begins at step 100",
    ),
    ("schedule longer than the run", [S.step(step_size=(50, 150))], {}, (10, 10), "1 of the 2 times in step_size="),
    ("schedule longer than the run", [S.step(step_size=101)], {}, (10, 10), "step_size=101 of step"),
    (
        "wrong unit",
        [S.linear(total=10)],
        {},
        (100, 10),
        r"is the number of epochs \(10\), but it counts steps, .* 1000",
    ),
    (
        "wrong unit",
        [S.linear(total=400)],
        {"accumulation_steps": 4},
        (40, 10),
        "micro-batches .400.,.* Write total=100",
    ),
    ("wrong unit", [S.cosine(warmup=398)], {"accumulation_steps": 4}, (40, 10), "warmup=398 of cosine.*iteration"),
    ("wrong unit", [S.step(step_size=(3, 6, 9))], {}, (100, 10), "fit into the number of epochs .*unit='epoch'"),
    ("wrong unit", [S.step(step_size=3)], {}, (100, 10), "fit into the number of epochs"),
    ("wrong unit", [S.linear(total=10, unit="iteration")], {}, (100, 10), "counts micro-batches, .* 1000.*'epoch'"),
    (
        "wrong unit",
        [S.linear(total=100, unit="iteration")],
        {"accumulation_steps": 4},
        (40, 10),
        "number of steps .100., .* Write total=400",
    ),
    ("wrong unit", [S.linear(total=1000, unit="epoch")], {}, (100, 10), "number of steps .1000., but it counts epochs"),
    ("wrong unit", [S.warmup(steps=1000, unit="epoch")], {}, (100, 10), "steps=1000 of warmup"),
    ("wrong unit", [ice.Compose(S.linear(total=10))], {}, (100, 10), "total=10 of linear"),
    ("short tail", [], {"accumulation_steps": 4}, (10, 3), "last window of each epoch has 2 of 4 micro-batches"),
    (
        "short tail",
        [],
        {"accumulation_steps": 4, "tail": "drop"},
        (10, 3),
        "drops the last 2 of 10 micro-batches of each epoch, 6 in the run",
    ),
    ("short tail", [], {"accumulation_steps": 4, "tail": "carry"}, (10, 3), "the run's last window has 2 of 4"),
    ("window longer than an epoch", [], {"accumulation_steps": 12}, (10, 3), "every step has 10 micro-batches at most"),
    ("window longer than an epoch", [], {"accumulation_steps": 12, "tail": "drop"}, (10, 3), "nothing is trained"),
    ("window longer than an epoch", [], {"accumulation_steps": 12, "tail": "carry"}, (10, 6), "spans 2 epochs"),
    ("group without a schedule", [S.linear().only("b")], {}, (10, 3), "no processor writes anything in a; its lr"),
    ("group without a schedule", [S.linear().only("b")], {"groups": 6}, (10, 3), "in a, c and 3 more groups;"),
    (
        "overwritten",
        [S.cosine(), S.constant(0.5)],
        {},
        (10, 3),
        r"constant.* writes 'lr' of a and b without .*cosine\(\) \* c",
    ),
    (
        "overwritten",
        [S.linear(dst="betas.0"), lambda g: {"betas": (0.5, 0.9)}],
        {},
        (10, 3),
        "<lambda> writes 'betas.0'",
    ),
]


@pytest.mark.parametrize(("label", "processors", "settings", "length", "sentence"), PROBLEMS)
def test_every_problem_is_named_with_its_numbers(label, processors, settings, length, sentence):
    plan = optimizer_of(processors, **settings).plan(*length)
    found = [problem for problem in plan.problems if problem.startswith(f"{label}: ")]

    assert len(found) == 1, plan.problems
    assert re.search(sentence, found[0]), found[0]
    assert label in str(plan)


def test_a_run_that_ends_inside_an_epoch_names_its_own_last_window():
    for tail, what in (("step", "steps all the same"), ("drop", "is dropped")):
        (problem,) = optimizer_of([], accumulation_steps=5, tail=tail).plan(10, max_iters=27).problems
        assert problem.startswith("short tail: the run ends inside an epoch; its last window has 2 of 5")
        assert what in problem


@pytest.mark.parametrize(
    ("processors", "settings", "length"),
    [
        ([], {}, (10, 10)),
        ([S.constant()], {}, (10, 10)),
        ([S.cosine()], {}, (1000, 10)),
        ([S.cosine(total=100, warmup=10)], {}, (10, 10)),
        ([S.cosine(total=99)], {}, (10, 10)),
        ([S.linear()], {}, (10, 10)),
        ([S.linear(total=100)], {"accumulation_steps": 4}, (40, 10)),
        ([S.polynomial(power=2.0)], {}, (500, 10)),
        ([S.cosine(unit="epoch")], {}, (10, 10)),
        ([S.cosine(total=10, unit="epoch")], {}, (100, 10)),
        ([S.cosine(total=1000, unit="iteration", warmup=50)], {"accumulation_steps": 4}, (100, 10)),
        ([S.step(step_size=(30, 60, 90), unit="epoch")], {}, (10, 90)),
        ([S.step(step_size=(300, 600))], {}, (100, 10)),
        ([S.step(step_size=30, unit="epoch")], {}, (10, 90)),
        ([S.step(step_size=5, gamma=0.99)], {}, (100, 10)),
        ([S.exponential(gamma=0.95, unit="epoch")], {}, (100, 30)),
        ([S.warmup(steps=10) * S.cosine()], {}, (100, 10)),
        ([S.warmup(steps=10) * S.step(step_size=(4, 8), unit="epoch")], {}, (100, 10)),
        ([S.warmup(steps=10).then(S.cosine(), at=10)], {}, (100, 10)),
        ([S.linear(total=10, end=0.5).then(S.constant(0.5), at=10)], {}, (100, 10)),
        ([S.constant(0.0).then(S.cosine(), at=50)], {}, (100, 10)),  # frozen at first
        ([S.constant(0.0)], {}, (10, 10)),  # frozen
        ([S.cosine(), S.linear(dst="weight_decay"), S.linear(end=0.95, dst="betas.0")], {}, (10, 10)),
        ([S.linear(end=0.9, dst="betas.0"), S.linear(end=0.95, dst="betas.1")], {}, (10, 10)),
        pytest.param([S.cosine(), lambda g: {"lr": g["lr"] * 0.5}], {}, (10, 10), id="cosine, halved"),
        ([S.cosine(), S.constant(0.5).only("b")], {}, (10, 10)),
        ([S.cosine(), S.constant(0.5).when(lambda g: g["epoch"] > 5)], {}, (10, 10)),
        ([S.cosine().only("a"), S.linear().only("b")], {}, (10, 10)),
        pytest.param([lambda g: {**g, "lr": 0.1}], {}, (10, 10), id="a function"),
        ([S.cosine()], {"accumulation_steps": 5}, (10, 10)),
        ([S.cosine()], {"accumulation_steps": 4, "tail": "carry"}, (10, 10)),
        ([S.cosine()], {"accumulation_steps": 10}, (10, 10)),
    ],
    ids=repr,
)
def test_sane_plans_have_no_problems(processors, settings, length):
    assert optimizer_of(processors, **settings).plan(*length).problems == []


@pytest.mark.parametrize("steps", [100_000, pytest.param(1_000_000, marks=pytest.mark.soak)])
def test_long_runs_are_planned(steps):
    plan = adamw(ice.schedules.cosine(warmup=2000)).plan(10_000, steps // 10_000)

    assert len(plan) == len(plan.series["lr/group_0"]) == len(plan.rows) == steps
    assert plan.problems == []
    assert plan.rows[-1]["iteration"] == steps
    assert str(plan).startswith(f"{steps} steps in {steps // 10_000} epochs of 10000 iterations; 1 micro-batch a step")
