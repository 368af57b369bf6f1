"""A resumed run with another horizon, window, schedule or initial value: the declared policy decides, never silently.

The oracle is the cosine written down here, and a plain list of what every step trained with.
"""

import copy
import dataclasses
import functools
import io
import logging
import math
import sys
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events

import ice_engine as ice
from ice_engine.errors import ArgumentValueError, ScheduleChangedError, StateDictError
from ice_engine.processors.curve import build
from ice_engine.processors.description import describe
from ice_engine.processors.schedules import constant, cosine, exponential, function, linear, step, warmup, wsd

LENGTH = 10


class Run:
    """A trainer of one weight that notes the lr of every step; *state* is that of an earlier one."""

    def __init__(self, *processors: Any, state: Any = None, lr: float = 1.0, **settings: Any) -> None:
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.optimizer = ice.Optimizer(torch.optim.SGD([self.weight], lr=lr), processors=processors, **settings)
        self.trainer = Engine(lambda engine, batch: self.optimizer.backward(self.weight * batch))
        self.optimizer.attach(self.trainer)
        self.lr: list[float] = []
        self.trainer.add_event_handler(
            ice.OptimizerEvents.OPTIMIZER_STEP_COMPLETED,
            lambda: self.lr.append(self.optimizer.param_groups[0]["lr"]),
        )
        if state is not None:
            self.trainer.load_state_dict(state["trainer"])
            self.optimizer.load_state_dict(state["optimizer"])

    def __call__(self, epochs: int, length: int = LENGTH) -> "Run":
        self.trainer.run([0.01] * length, max_epochs=epochs)
        return self

    def state(self, **changes: Any) -> dict[str, Any]:
        """What a checkpoint brings to a new process, through a file that is loaded safely."""
        saved = {"trainer": self.trainer.state_dict(), "optimizer": self.optimizer.state_dict()}
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        loaded["trainer"].update(changes)
        return loaded


def half(t: float, total: float, base: float = 1.0) -> float:
    return base * (1 + math.cos(math.pi * min(t / total, 1))) / 2


def exactly(expected: list[float]) -> Any:
    return pytest.approx(expected, rel=1e-12, abs=1e-15)


def interrupted(*processors: Any, epochs: int = 4, after: int = 2, length: int = LENGTH, **settings: Any) -> Any:
    """The state of a run of *epochs* epochs that was stopped after some."""
    run = Run(*processors, **settings)
    run.trainer.add_event_handler(Events.EPOCH_COMPLETED(once=after), lambda: run.trainer.terminate())
    run(epochs, length)
    return run.state()


def lines(caplog: Any) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "ice_engine.horizon"]


# -- nothing changed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["error", "replan", "stretch", "keep"])
def test_a_run_that_is_resumed_as_it_was_goes_on_and_says_nothing(policy: Any, caplog: Any) -> None:
    whole = Run(cosine())(4)
    resumed = Run(cosine(), state=interrupted(cosine()), on_change=policy)(4)

    assert resumed.lr == whole.lr[20:]
    assert lines(caplog) == []


def test_more_epochs_do_not_change_a_schedule_that_has_an_end_of_its_own(caplog: Any) -> None:
    rest = Run(warmup(steps=5) * step(step_size=30), state=interrupted(warmup(steps=5) * step(step_size=30)))(8)

    assert rest.lr == exactly([1.0] * 10 + [0.1] * 30 + [0.01] * 20)
    assert lines(caplog) == []


def test_the_same_schedule_under_another_window_is_no_change_if_it_has_a_total_of_its_own() -> None:
    rest = Run(linear(total=40), state=interrupted(linear(total=40)), accumulation_steps=5)(4)

    assert rest.lr == exactly([1 - t / 40 for t in range(20, 24)])


def test_without_processors_there_is_no_schedule_and_a_scheduler_of_torchs_may_do_as_it_likes() -> None:
    assert Run(state=interrupted(), lr=0.5)(8).lr == [1.0] * 60  # as torch: the checkpoint's lr


# -- more epochs ----------------------------------------------------------------------------------------------


def test_a_longer_horizon_is_an_error_unless_declared_and_nothing_has_moved() -> None:
    resumed = Run(cosine(), state=interrupted(cosine()))

    with pytest.raises(ScheduleChangedError, match=r"lr at step 21: 0\.5 -> 0\.8536 \(total 40 -> 80\)\. Say which"):
        resumed(8)
    assert resumed.lr == []
    assert resumed.weight.item() == 1.0


def test_replan_takes_the_new_horizon_from_where_the_run_is(caplog: Any) -> None:
    resumed = Run(cosine(), state=interrupted(cosine()), on_change="replan")(8)

    assert resumed.lr == exactly([half(t, 80) for t in range(20, 80)])
    assert lines(caplog) == ["optimizer 'optimizer', on_change='replan': lr at step 21: 0.5 -> 0.8536 (total 40 -> 80)"]
    assert caplog.records[0].levelno == logging.WARNING


def test_keep_ends_the_saved_schedule_where_it_would_have_ended(caplog: Any) -> None:
    resumed = Run(cosine(), state=interrupted(cosine()), on_change="keep")(8)

    assert resumed.lr == exactly([half(t, 40) for t in range(20, 80)])
    assert lines(caplog) == [
        "optimizer 'optimizer', on_change='keep': lr at step 21: 0.5 instead of 0.8536 (total 40 -> 80)"
    ]


def test_stretch_goes_on_from_the_same_value_and_ends_with_the_run() -> None:
    resumed = Run(cosine(), state=interrupted(cosine()), on_change="stretch")(8)

    assert resumed.lr == exactly([half(20 + (t - 20) * 20 / 60, 40) for t in range(20, 80)])
    assert resumed.lr[0] == 0.5


def test_a_shorter_horizon_is_a_change_too() -> None:
    with pytest.raises(ScheduleChangedError, match=r"0\.5 -> 0\.25 \(total 40 -> 30\)"):
        Run(cosine(), state=interrupted(cosine()))(3)
    stretched = Run(cosine(), state=interrupted(cosine()), on_change="stretch")(3)
    assert stretched.lr == exactly([half(20 + (t - 20) * 2, 40) for t in range(20, 30)])


@pytest.mark.parametrize("unit", ["step", "iteration", "epoch"])
def test_stretch_stretches_the_clock_of_every_unit(unit: Any) -> None:
    schedule = linear(unit=unit)
    resumed = Run(schedule, state=interrupted(schedule), on_change="stretch")(6)

    clock = [t // LENGTH if unit == "epoch" else t for t in range(20, 60)]
    done, total = (2, 4) if unit == "epoch" else (20, 40)
    new = 6 if unit == "epoch" else 60
    assert resumed.lr == exactly([1 - (done + (t - done) * (total - done) / (new - done)) / total for t in clock])


@pytest.mark.parametrize("policy", ["replan", "stretch", "keep"])
def test_what_was_decided_holds_in_the_next_resumed_run_without_another_word(policy: Any, caplog: Any) -> None:
    whole = Run(cosine(), state=interrupted(cosine()), on_change=policy)(8)
    part = Run(cosine(), state=interrupted(cosine()), on_change=policy)
    part.trainer.add_event_handler(
        ice.OptimizerEvents.OPTIMIZER_STEP_COMPLETED(once=50), lambda: part.trainer.terminate()
    )
    part(8)
    caplog.clear()
    rest = Run(cosine(), state=part.state(), on_change="error")(8)

    assert part.lr + rest.lr == whole.lr
    assert lines(caplog) == []


def test_stretched_twice_it_still_ends_with_the_run() -> None:
    first = Run(linear(), state=interrupted(linear()), on_change="stretch")
    first.trainer.add_event_handler(
        ice.OptimizerEvents.OPTIMIZER_STEP_COMPLETED(once=40), lambda: first.trainer.terminate()
    )
    first(6)  # from 20 of 40 at 20, to 30 of 40 at 40
    second = Run(linear(), state=first.state(), on_change="stretch")(8)

    assert second.lr == exactly([1 - (30 + (t - 40) * 10 / 40) / 40 for t in range(40, 80)])


def test_more_epochs_in_the_same_process_are_a_change_as_well() -> None:
    run = Run(cosine(), on_change="stretch")(4)
    with pytest.raises(ScheduleChangedError, match=r"lr at step 41: 0 -> 0\.5 \(total 40 -> 80\)"):
        Run(cosine())(4)(8)
    run = Run(cosine(), on_change="replan")(4)(8)
    assert run.lr == exactly([half(t, 40) for t in range(40)] + [half(t, 80) for t in range(40, 80)])


def test_a_fresh_run_of_another_length_is_no_resumed_one() -> None:
    run = Run(cosine())(2)
    run.trainer.state.max_epochs = None  # Ignite's way to start anew
    run(4)

    assert run.lr[20:] == exactly([half(t, 40) for t in range(40)])


# -- another window -------------------------------------------------------------------------------------------


def test_another_window_counts_what_was_done_and_what_is_left() -> None:
    state = interrupted(linear(), accumulation_steps=2)  # 10 of 20 steps
    with pytest.raises(ScheduleChangedError, match=r"lr at step 11: 0\.5 -> 0\.2857 \(total 20 -> 14\)"):
        Run(linear(), state=state, accumulation_steps=5)(4)

    replanned = Run(linear(), state=state, accumulation_steps=5, on_change="replan")(4)
    assert replanned.lr == exactly([1 - t / 14 for t in range(10, 14)])
    stretched = Run(linear(), state=state, accumulation_steps=5, on_change="stretch")(4)
    assert stretched.lr == exactly([0.5, 0.375, 0.25, 0.125])
    kept = Run(linear(), state=state, accumulation_steps=5, on_change="keep")(4)
    assert kept.lr == exactly([0.5, 0.45, 0.4, 0.35])


@pytest.mark.parametrize(("tail", "steps"), [("step", 8), ("carry", 7), ("drop", 6)])
def test_what_is_left_is_counted_with_the_windows_that_will_close(tail: Any, steps: int) -> None:
    state = interrupted(linear(), accumulation_steps=4, epochs=4, after=2, tail="drop")  # 4 of 8 steps
    run = Run(linear(), state=state, accumulation_steps=3, tail=tail, on_change="replan")(4)

    assert len(run.lr) == steps
    assert run.lr == exactly([1 - t / (4 + steps) for t in range(4, 4 + steps)])


def test_a_resume_inside_an_epoch_counts_the_rest_of_it() -> None:
    whole = Run(linear(), accumulation_steps=2)
    whole.trainer.add_event_handler(
        ice.OptimizerEvents.OPTIMIZER_STEP_COMPLETED(once=7), lambda: whole.trainer.terminate()
    )
    whole(4)
    state = whole.state()  # at iteration 14: 6 and 20 are left
    resumed = Run(linear(), state=state, accumulation_steps=3, on_change="replan")
    resumed.trainer.run([0.01] * 6, max_epochs=4, epoch_length=LENGTH)  # the engine has no more than it is given

    assert resumed.lr[0] == pytest.approx(1 - 7 / (7 + 2 + 2 * 4), rel=1e-12)


# -- another data set -----------------------------------------------------------------------------------------


def test_a_longer_epoch_is_a_change_of_the_total() -> None:
    state = interrupted(cosine())
    state["trainer"]["epoch_length"] = 20  # 20 iterations are one epoch now
    with pytest.raises(ScheduleChangedError, match=r"\(total 40 -> 80\)"):
        Run(cosine(), state=state)(4, length=20)


# -- another schedule -----------------------------------------------------------------------------------------


def test_another_schedule_is_an_error_that_shows_both() -> None:
    with pytest.raises(
        ScheduleChangedError,
        match=r"lr at step 21: 0\.5 -> 0\.25 \(processors \[cosine\(\)\] -> \[exponential\(gamma=0\.933\d*\)\]\)",
    ):
        Run(exponential(gamma=0.25 ** (1 / 20)), state=interrupted(cosine()))(4)


def test_replan_takes_the_new_schedule() -> None:
    resumed = Run(linear(), state=interrupted(cosine()), on_change="replan")(4)

    assert resumed.lr == exactly([1 - t / 40 for t in range(20, 40)])


def test_keep_goes_on_with_the_saved_schedule_whatever_the_script_says() -> None:
    saved = (warmup(steps=5) * cosine()).clamp(min=0.01)
    resumed = Run(linear(), constant(3.0), state=interrupted(saved), on_change="keep")

    assert resumed(4).lr == Run(saved)(4).lr[20:]
    assert resumed.optimizer.processors == (saved,)


def test_keep_and_stretch_together_with_more_epochs_are_of_the_saved_schedule() -> None:
    kept = Run(constant(), state=interrupted(linear()), on_change="keep")(8)
    stretched = Run(constant(), state=interrupted(linear()), on_change="stretch")(8)

    assert kept.lr == exactly([max(1 - t / 40, 0) for t in range(20, 80)])
    assert stretched.lr == exactly([0.5 - (t - 20) / 120 for t in range(20, 80)])


@ice.dictprocess
def halve(lr: float) -> float:
    return lr / 2


def test_functions_are_kept_if_they_are_still_there() -> None:
    state = interrupted(linear(), halve(dst="lr"))
    resumed = Run(cosine(), halve(dst="lr"), state=state, on_change="keep")(4)

    assert resumed.lr == exactly([(1 - t / 40) / 2 for t in range(20, 40)])


def test_functions_that_are_gone_cannot_be_kept() -> None:
    state = interrupted(linear(), halve(dst="lr"))

    with pytest.raises(ScheduleChangedError, match=r"cannot be kept, as halve\(dst='lr'\) cannot be made from a check"):
        Run(linear(), state=state, on_change="keep")(4)


@ice.dictprocess
def part_left(step: int, total_steps: int) -> float:
    return max(1 - step / total_steps, 0)


def test_a_function_that_asks_for_the_length_is_a_schedule_as_well() -> None:
    state = interrupted(part_left(dst="lr"))

    with pytest.raises(ScheduleChangedError, match=r"\(?total 40 -> 80"):
        Run(part_left(dst="lr"), state=state)(8)
    assert Run(part_left(dst="lr"), state=state, on_change="keep")(6).lr[:3] == exactly([0.5, 0.475, 0.45])
    assert Run(part_left(dst="lr"), state=state, on_change="replan")(8).lr[0] == 0.75


# -- another initial value ------------------------------------------------------------------------------------


def test_an_edited_lr_is_a_change_because_a_checkpoint_brings_its_own() -> None:
    state = interrupted(cosine())

    with pytest.raises(ScheduleChangedError, match=r"lr at step 21: 0\.5 -> 0\.05 \(initial_lr 1 -> 0\.1\)"):
        Run(cosine(), state=state, lr=0.1)(4)
    assert Run(cosine(), state=state, lr=0.1, on_change="keep")(4).lr[0] == 0.5
    replanned = Run(cosine(), state=state, lr=0.1, on_change="replan")(4)
    assert replanned.lr == exactly([half(t, 40, 0.1) for t in range(20, 40)])


def test_the_group_that_changes_is_named() -> None:
    def optimizer(lr: float) -> ice.Optimizer:
        groups = [
            {"params": [torch.nn.Parameter(torch.ones(()))], "name": n, "lr": r} for n, r in (("a", 1.0), ("b", lr))
        ]
        return ice.Optimizer(torch.optim.SGD(groups), processors=[linear(total=10)])

    first, second = optimizer(1.0), optimizer(2.0)
    second.load_state_dict(first.state_dict())
    trainer = Engine(lambda engine, batch: second.backward(second.param_groups[0]["params"][0] * 1))
    second.attach(trainer)

    with pytest.raises(ScheduleChangedError, match=r"lr of 'b' at step 1: 1 -> 2 \(initial_lr 1 -> 2\)"):
        trainer.run(range(2))


# -- loops without an engine ----------------------------------------------------------------------------------


def test_a_loop_of_ones_own_is_asked_at_its_first_step() -> None:
    def make(lr: float, policy: Any) -> tuple[torch.nn.Parameter, ice.Optimizer]:
        weight = torch.nn.Parameter(torch.ones(()))
        sgd = torch.optim.SGD([weight], lr=lr)
        return weight, ice.Optimizer(sgd, processors=[linear(total=4)], on_change=policy)

    weight, optimizer = make(1.0, "error")
    optimizer.backward(weight * 1)
    optimizer.update()
    for policy, expected in (("keep", 0.75), ("replan", 1.5)):
        weight, other = make(2.0, policy)
        other.load_state_dict(optimizer.state_dict())
        other.backward(weight * 1)
        assert other.update()
        assert other.param_groups[0]["lr"] == expected


def test_a_state_saved_before_the_resumed_run_began_is_still_of_the_saved_one() -> None:
    state = interrupted(cosine())
    again = Run(cosine(), state=state).state()

    assert again["optimizer"]["ice_engine"] == state["optimizer"]["ice_engine"]


def test_an_unknown_policy_is_refused_at_once() -> None:
    with pytest.raises(ArgumentValueError, match="on_change must be one of 'error', 'replan', 'stretch', 'keep'; got"):
        Run(on_change="ignore")


def test_stretch_needs_to_know_the_length() -> None:
    state = interrupted(linear())
    state["optimizer"]["ice_engine"]["horizon"]["plan"].update(total_steps=None, epoch_length=None, max_epochs=None)

    with pytest.raises(ScheduleChangedError, match="'stretch' needs to know how long the run is"):
        Run(constant(), state=state, on_change="stretch")(8)


@pytest.mark.parametrize(
    "damage", [lambda h: h.clear(), lambda h: h["run"].pop("tail"), lambda h: h.update(plan=None, run=3)]
)
def test_a_damaged_horizon_is_refused_when_loaded(damage: Any) -> None:
    state = interrupted(linear())
    damage(state["optimizer"]["ice_engine"]["horizon"])

    with pytest.raises(StateDictError, match="'ice_engine' is damaged"):
        Run(linear(), state=state)


def test_a_state_of_before_horizons_were_saved_goes_on_as_the_script_says() -> None:
    state = interrupted(linear())
    del state["optimizer"]["ice_engine"]["horizon"]

    assert Run(linear(), state=state)(4).lr == exactly([1 - t / 40 for t in range(20, 40)])


def _root(base: float, t: float, *, power: float) -> float:
    return base / (1 + t) ** power


def root(power: float = 0.5) -> Any:
    return build(root, _root, unit="step", dst="lr", power=power)


def test_a_schedule_of_ones_own_is_resumed_like_the_others() -> None:
    whole = Run(root())(4)

    assert Run(root(), state=interrupted(root()))(4).lr == whole.lr[20:]
    assert Run(root(), state=interrupted(root()), on_change="keep")(8).lr[:20] == whole.lr[20:]
    with pytest.raises(ScheduleChangedError, match=r"processors \[.*root.*\] -> \[linear\(\)\]"):
        Run(linear(), state=interrupted(root()))(4)
    with pytest.raises(ScheduleChangedError, match=r"cannot be kept, as .*root.* cannot be made from a checkpoint"):
        Run(linear(), state=interrupted(root()), on_change="keep")(4)


def test_stretch_says_what_the_next_value_is_and_what_it_would_have_been(caplog: Any) -> None:
    Run(cosine(), state=interrupted(cosine()), on_change="stretch")(8)

    (line,) = lines(caplog)
    assert line == "optimizer 'optimizer', on_change='stretch': lr at step 21: 0.5 instead of 0.8536 (total 40 -> 80)"


# -- processors that are no schedules, and code that changed --------------------------------------------------


class Halve(ice.Processor):
    """As the documentation teaches it: without a repr, so that its default one is an address."""

    def __init__(self, by: float = 2.0) -> None:
        self.by = by

    def __call__(self, mapping: Any) -> Any:
        mapping["lr"] = mapping["initial_lr"] / self.by
        return mapping


@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: ice.Compose(p)], ids=["alone", "composed"])
@pytest.mark.parametrize("policy", ["error", "keep", "stretch"])
def test_a_class_of_ones_own_is_the_same_in_the_next_process(wrap: Any, policy: Any, caplog: Any) -> None:
    state = interrupted(wrap(Halve()))

    assert Run(wrap(Halve()), state=state, on_change=policy)(4).lr == [0.5] * 20
    assert lines(caplog) == []
    with pytest.raises(ScheduleChangedError, match=r"Halve\(by=2\.0\).* -> .*Halve\(by=4\.0\)"):
        Run(wrap(Halve(4.0)), state=state)(4)


def plain(group: Any) -> Any:
    group["lr"] = group["initial_lr"] * max(1 - group["step"] / group["total_steps"], 0)
    return group


def test_a_plain_function_that_reads_the_length_follows_the_policy() -> None:
    state = interrupted(plain)

    with pytest.raises(ScheduleChangedError, match="total 40 -> 80, which plain reads"):
        Run(plain, state=state)(8)
    assert Run(plain, state=state, on_change="keep")(8).lr == exactly([max(1 - t / 40, 0) for t in range(20, 80)])
    assert Run(plain, state=state, on_change="replan")(8).lr == exactly([1 - t / 80 for t in range(20, 80)])
    with pytest.raises(ScheduleChangedError, match="'stretch' stretches schedules, and plain is a function that reads"):
        Run(plain, state=state, on_change="stretch")(8)


def test_a_composed_schedule_follows_the_policy() -> None:
    state = interrupted(ice.Compose(cosine()))

    with pytest.raises(ScheduleChangedError, match=r"lr at step 21: 0\.5 -> 0\.8536 \(total 40 -> 80\)"):
        Run(ice.Compose(cosine()), state=state)(8)
    kept = Run(ice.Compose(cosine()), state=state, on_change="keep")(8)
    assert kept.lr == exactly([half(t, 40) for t in range(20, 80)])


def test_a_function_whose_code_changed_is_another_schedule() -> None:
    def of(base: float) -> Any:
        # Of one name, so that only their code differs.
        return (lambda t: 0.99**t) if base == 0.99 else (lambda t: 0.9**t)

    state = interrupted(function(of(0.99)))

    assert Run(function(of(0.99)), state=state)(4).lr == exactly([0.99**t for t in range(20, 40)])
    with pytest.raises(ScheduleChangedError, match=r"other code in \[function\(f=<lambda>\)\]"):
        Run(function(of(0.9)), state=state)(4)


def scaled(group: Any, by: float, shape: Any = None) -> Any:
    group["lr"] = group["initial_lr"] * by
    return group


def closure(by: float) -> Any:
    return lambda group: scaled(group, by)


@dataclasses.dataclass
class Shaped:
    by: float
    shape: Any

    def __call__(self, group: Any) -> Any:
        return scaled(group, self.by)


def with_default(value: float) -> Any:
    # Another function in every process, and here in every call.
    def ruled(group: Any, shape: Any = lambda: 0, by: float = value) -> Any:
        return scaled(group, by)

    return ruled


RULES = {
    "partial": lambda by: functools.partial(scaled, by=by, shape=lambda: 0),
    "partial of a schedule": lambda by: function(functools.partial(lambda t, by: by, by=by)),
    "closure": closure,
    "dict as a default": lambda by: lambda group, entries={"by": by}: scaled(group, **entries),
    "default": with_default,
    "own repr": lambda by: Shaped(by, lambda: 0),
}


@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
@pytest.mark.parametrize("policy", ["error", "keep"])
def test_what_a_function_computes_with_is_compared_by_value(make: Any, policy: Any, caplog: Any) -> None:
    state = interrupted(make(0.5))

    assert Run(make(0.5), state=state, on_change=policy)(4).lr == [0.5] * 20
    assert lines(caplog) == []
    with pytest.raises(ScheduleChangedError, match="would change"):
        Run(make(0.25), state=state)(4)


class Cached:
    """Without a ``__repr__``; its table fills as it goes."""

    def __init__(self) -> None:
        self.table: dict[int, float] = {}

    def __call__(self, group: Any) -> Any:
        group["lr"] = self.table.setdefault(group["step"], 1 / (1 + group["step"]))
        return group


def test_what_a_processor_keeps_on_itself_as_it_goes_is_no_change(caplog: Any) -> None:
    state = interrupted(Cached())

    assert Run(Cached(), state=state)(4).lr == exactly([1 / (1 + t) for t in range(20, 40)])
    assert lines(caplog) == []


def test_the_order_in_which_a_set_was_filled_is_no_change() -> None:
    assert list({0, 8}) != list({8, 0})  # as strings are in another order in every process
    assert describe(Halve({0, 8})) == describe(Halve({8, 0}))


def test_a_copied_optimizer_describes_its_processors_as_they_were_given() -> None:
    run = Run(Cached())(2)
    copied = copy.deepcopy(run.optimizer)

    terms = [optimizer.state_dict()["ice_engine"]["horizon"]["processors"] for optimizer in (run.optimizer, copied)]
    assert terms[0] == terms[1]


def test_an_edited_docstring_is_no_change() -> None:
    def documented() -> Any:
        def ruled(group: Any) -> Any:
            """Old."""
            return scaled(group, 0.5)

        return ruled

    state = interrupted(documented())
    ruled = documented()
    ruled.__code__ = ruled.__code__.replace(co_consts=("New.", *ruled.__code__.co_consts[1:]))
    ruled.__doc__ = "New."

    assert Run(ruled, state=state)(4).lr == [0.5] * 20


def test_a_print_of_an_earlier_version_of_ours_is_not_compared() -> None:
    state = interrupted(scaled_by_half)
    horizon = state["optimizer"]["ice_engine"]["horizon"]
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert horizon["processors"][0].startswith(f"scaled_by_half @{version}b:")
    horizon["processors"] = [f"scaled_by_half @{version}:01234567"]

    assert Run(scaled_by_half, state=state)(4).lr == [0.5] * 20


def scaled_by_half(group: Any) -> Any:
    return scaled(group, 0.5)


def test_of_two_functions_of_one_name_each_is_kept() -> None:
    first, second = (lambda g: {"lr": g["lr"] * 0.5 + 0.1}), (lambda g: {"lr": g["initial_lr"] * 0.25})
    resumed = Run(first, second, constant(), state=interrupted(first, second), on_change="keep")

    assert resumed(4).lr == [0.25] * 20
    assert resumed.optimizer.processors == (first, second)


def starts_an_epoch(group: Any) -> bool:
    return bool(group["epoch_steps"] <= 5 and group["param_group"] is not None and group["current_epoch"] > 0)


@pytest.mark.parametrize("policy", ["replan", "keep", "stretch"])
def test_a_predicate_may_read_all_that_it_sees_in_a_run(policy: Any) -> None:
    schedule = linear().when(starts_an_epoch)

    assert len(Run(schedule, state=interrupted(schedule), on_change=policy)(8).lr) == 60


def test_a_function_that_knows_only_the_run_s_own_steps_is_not_asked_for_others() -> None:
    def table(t: float) -> float:
        return ([1.0] * 40)[int(t)]

    schedule = function(table) * linear(total=40)
    state = interrupted(schedule, accumulation_steps=2)

    assert len(Run(schedule, state=state, accumulation_steps=4, on_change="replan")(4).lr) == 6


# -- errors leave nothing half done ---------------------------------------------------------------------------


def test_after_an_error_the_next_run_gets_it_again() -> None:
    state = interrupted(linear(), halve(dst="lr"))
    resumed = Run(linear(), state=state, on_change="keep")
    for _ in range(3):
        resumed.trainer._internal_run_generator = None  # Ignite's next run() would be a silent no-op
        with pytest.raises(ScheduleChangedError, match="cannot be kept"):
            resumed(4)

    only = Run(cosine())
    only.optimizer.load_state_dict(interrupted(cosine())["optimizer"])
    for _ in range(2):
        only.trainer._internal_run_generator = None
        with pytest.warns(ice.IceEngineWarning, match="goes on at step 20"), pytest.raises(ScheduleChangedError):
            only(8)
    assert only.lr == resumed.lr == []


def test_loaded_twice_the_script_s_lr_is_still_what_it_asked_for() -> None:
    state = interrupted(cosine())
    resumed = Run(cosine(), state=state, lr=0.1, on_change="replan")
    resumed.optimizer.load_state_dict(state["optimizer"])

    assert resumed(4).lr == exactly([half(t, 40, 0.1) for t in range(20, 40)])


# -- the clocks of a stretched run ----------------------------------------------------------------------------


def test_stretch_inside_an_epoch_goes_on_from_the_saved_value() -> None:
    first = Run(linear(unit="epoch"))
    first.trainer.add_event_handler(
        ice.OptimizerEvents.OPTIMIZER_STEP_COMPLETED(once=15), lambda: first.trainer.terminate()
    )
    first(4)
    second = Run(linear(unit="epoch"), state=first.state(), on_change="stretch")(8)

    assert first.lr[-1] == second.lr[0] == 0.75
    assert second.lr == sorted(second.lr, reverse=True)


def test_a_complete_run_has_nothing_left_to_stretch_and_says_so() -> None:
    with pytest.raises(ScheduleChangedError, match="nothing is left of the saved schedule, which has ended; take 'rep"):
        Run(cosine(), state=Run(cosine())(4).state(), on_change="stretch")(8)


def test_a_change_between_the_probes_of_a_long_run_is_found_with_its_first_step() -> None:
    state = interrupted(wsd(decay=20), epochs=100, after=50)

    with pytest.raises(ScheduleChangedError, match=r"lr at step 982: 0\.7764 -> 1 \(total 1000 -> 1010\)"):
        Run(wsd(decay=20), state=state)(101)


# -- lengths that change in a run, runs that start afresh -----------------------------------------------------


def test_a_length_changed_during_the_run_is_a_change_as_well(caplog: Any) -> None:
    def run(policy: Any) -> Run:
        found = Run(cosine(), on_change=policy)
        found.trainer.add_event_handler(
            Events.EPOCH_COMPLETED(once=2), lambda engine: setattr(engine.state, "max_epochs", 8)
        )
        return found

    with pytest.raises(ScheduleChangedError, match=r"lr at step 21: 0\.5 -> 0\.8536 \(total 40 -> 80\)"):
        run("error")(4)
    assert run("stretch")(4).lr[20:] == exactly([half(20 + (t - 20) / 3, 40) for t in range(20, 80)])
    assert len(lines(caplog)) == 1


def test_an_end_in_iterations_given_during_the_run_is_a_change_as_well() -> None:
    def run(processor: Any, policy: Any, last: int, **settings: Any) -> Run:
        found = Run(processor, on_change=policy, **settings)
        found.trainer.add_event_handler(
            Events.EPOCH_COMPLETED(once=2), lambda engine: setattr(engine.state, "max_iters", last)
        )
        return found

    with pytest.raises(ScheduleChangedError, match=r"lr at step 21: 0\.5 -> 0\.25 \(total 40 -> 30\)"):
        run(cosine(), "error", 30)(4)
    assert run(cosine(), "replan", 30)(4).lr[20:] == exactly([half(t, 30) for t in range(20, 30)])
    assert run(cosine(), "keep", 30)(4).lr[20:] == exactly([half(t, 40) for t in range(20, 30)])
    with pytest.raises(ScheduleChangedError, match=r"iterations 40 -> 39\)"):  # in as many steps
        run(cosine(unit="iteration"), "error", 39, accumulation_steps=2)(4)
    assert run(cosine(), "error", 40)(4).lr == exactly([half(t, 40) for t in range(40)])


def test_a_length_changed_after_a_late_attach_is_a_change_as_well() -> None:
    run = Run(cosine())
    run.optimizer.detach()
    trainer = Engine(lambda engine, batch: engine.state.epoch > 1 and run.optimizer.backward(run.weight * batch))
    trainer.add_event_handler(Events.EPOCH_STARTED(once=2), lambda: run.optimizer.attach(trainer))
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=2), lambda: setattr(trainer.state, "max_epochs", 8))

    with pytest.raises(ScheduleChangedError, match=r"lr at step 11: 0\.8536 -> 0\.9505 \(total 40 -> 70\)"):
        trainer.run([0.01] * LENGTH, max_epochs=4)
    assert run.optimizer.clocks["step"] == LENGTH


def test_a_fresh_run_starts_from_the_initial_values_and_its_own_processors() -> None:
    late = constant(0.1).when(lambda group: group["epoch"] > 2)
    run = Run(late)(4)
    run.trainer.state.max_epochs = None
    assert run(4).lr == [1.0] * 20 + [0.1] * 20 + [1.0] * 20 + [0.1] * 20

    kept = Run(linear(), state=interrupted(constant()), on_change="keep")(4)
    kept.trainer.state.max_epochs = None
    assert kept(4).lr == exactly([1.0] * 20 + [1 - t / 40 for t in range(40)])


def test_a_fresh_run_after_a_resumed_one_undoes_what_a_function_wrote_before_it() -> None:
    def once(group: Any) -> Any:
        if group["step"] == 5:
            group["lr"] = 0.5
        return group

    resumed = Run(once, state=interrupted(once))(4)
    resumed.trainer.state.max_epochs = None

    assert resumed(1).lr == [0.5] * 20 + [1.0] * 5 + [0.5] * 5


def test_a_detached_optimizer_counts_for_itself() -> None:
    run = Run(linear(total=20, unit="iteration"))(1)
    run.optimizer.detach()
    rates = []
    for _ in range(3):
        run.optimizer.backward(run.weight * 1e-3)
        run.optimizer.update()
        rates.append(run.optimizer.param_groups[0]["lr"])

    assert rates == exactly([0.5, 0.45, 0.4])


def test_groups_of_one_name_are_told_apart() -> None:
    def make(lr: float) -> ice.Optimizer:
        groups = [{"params": [torch.nn.Parameter(torch.ones(()))], "name": "x", "lr": r} for r in (lr, 0.5)]
        return ice.Optimizer(torch.optim.SGD(groups), processors=[constant()])

    first, second = make(1.0), make(0.1)
    second.load_state_dict(first.state_dict())
    second.backward(second.param_groups[0]["params"][0] * 1)

    with pytest.raises(ScheduleChangedError, match=r"lr of 'x' at step 1: 1 -> 0\.1"):
        second.update()


@pytest.mark.parametrize("policy", ["keep", "stretch", "replan"])
def test_the_plan_of_a_resumed_run_is_what_it_does(policy: Any) -> None:
    resumed = Run(cosine(), state=interrupted(cosine()), on_change=policy)(8)
    plan = resumed.optimizer.plan()

    assert list(plan.series["lr/group_0"])[20:] == resumed.lr
    # Of a run that is asked for in so many words, it is that run's.
    assert list(resumed.optimizer.plan(10, 2).series["lr/group_0"]) == exactly([half(t, 20) for t in range(20)])


def test_a_run_without_any_step_is_saved_and_loaded() -> None:
    state = interrupted(linear(), accumulation_steps=20, tail="drop")

    assert state["optimizer"]["ice_engine"]["horizon"]["plan"]["total_steps"] == 0
    assert Run(linear(), state=state, accumulation_steps=20, tail="drop")(4).lr == []


def test_in_a_loop_of_ones_own_the_first_step_is_by_the_policy_too() -> None:
    def steps(schedule: Any, number: int, state: Any = None, **settings: Any) -> tuple[list[float], Any]:
        weight = torch.nn.Parameter(torch.ones(()))
        optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0), processors=[schedule], **settings)
        if state is not None:
            optimizer.load_state_dict(state)
        rates = []
        for _ in range(number):
            optimizer.backward(weight * 0.01)
            optimizer.update()
            rates.append(optimizer.param_groups[0]["lr"])
        return rates, optimizer.state_dict()

    _, state = steps(linear(total=10), 5)
    kept, _ = steps(linear(total=20), 3, state, on_change="keep")
    assert kept == exactly([0.5, 0.4, 0.3])
