"""Random programs against a slow reference: whatever is called in whatever order, every number is the same.

The reference knows nothing of ice_engine. It is plain Python in double precision, written from the definitions: a list
of losses, their weighted mean, the formulas of clip, schedule, loss scale and optimizer. One machine drives the loop
without an engine, the other real Ignite engines: each run happens twice, on an engine whose handlers call the
reference, and on one whose optimizer is ours.
"""

import copy
import dataclasses
import io
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from ignite.engine import Engine, Events

import ice_engine as ice
from ice_engine.errors import (
    ArgumentValueError,
    BackwardError,
    IceEngineWarning,
    NoGradientsError,
    NonFiniteGradientError,
)
from tests.unsized import Unsized

WEIGHT_DECAY, MOMENTUM, BETAS, EPS = 0.05, 0.75, (0.8, 0.9), 0.01
RATES = (0.125, 0.02)
START = ([0.5, -1.25], [2.0])
KINDS = ("GRADIENTS_READY", "STEP_STARTED", "STEP_COMPLETED", "STEP_SKIPPED")


# -- the reference ----------------------------------------------------------------------------------------


class Refused(Exception):  # noqa: N818
    """A call that must raise."""


class Stopped(Exception):  # noqa: N818
    """Too many steps were skipped, or the policy is to raise."""


class Boom(Exception):  # noqa: N818
    """The user's own."""


class Empty(Exception):  # noqa: N818
    """Nothing to step with."""


RAISED = {
    Refused: (BackwardError, ArgumentValueError),
    Stopped: NonFiniteGradientError,
    Boom: Boom,
    Empty: NoGradientsError,
}


@dataclasses.dataclass(frozen=True)
class Loss:
    """The gradient of a loss by each of two parameters (None: it does not depend on it) and its weight."""

    gradient: tuple[tuple[float, ...] | None, tuple[float, ...] | None]
    weight: float | None


@dataclasses.dataclass(frozen=True)
class Setup:
    k: int
    tail: str
    reduction: str
    optimizer: str
    clip: str | None
    schedule: str | None
    scaler: tuple[float, int] | None
    nonfinite: str | None
    most_skips: int
    weighted: bool
    meddle: str | None

    @property
    def policy(self):
        return self.nonfinite or ("skip" if self.clip or self.scaler else "off")


SCHEDULES = {
    None: lambda s: 1.0,
    "step": lambda s: 0.5 ** (s // 2),
    "linear": lambda s: 1.0 - min(s / 8, 1.0),
    "cosine": lambda s: 0.5 * (1.0 + math.cos(math.pi * min(s / 10, 1.0))),
    "own": lambda s: 1.0 / (1 + s),
}


def meddle(how, gradients, attempt):
    """What a handler of GRADIENTS_READY does to a list of lists, or None where there is no gradient."""
    if how == "double":
        return [g and [2.0 * x for x in g] for g in gradients]
    if how == "repair":
        return [g and [x if math.isfinite(x) else 0.25 for x in g] for g in gradients]
    if how == "poison" and attempt % 3 == 0:
        return [g and [math.nan for _ in g] for g in gradients]
    return gradients


class Reference:
    def __init__(self, setup):
        self.setup = setup
        self.parameters = [list(values) for values in START]
        self.state = [{}, {}]
        self.rates = list(RATES)
        self.clocks = {"step": 0, "attempt": 0, "skipped": 0, "iteration": 0}
        self.scale = setup.scaler[0] if setup.scaler else None
        self.good = 0  # steps since the scale changed
        self.row = 0  # skips in a row
        self.record = None
        self.loaded = False
        self.lost = 0  # micro-batches of a window that an exception left open
        self.window, self.pending = [], []  # micro-batches, each a list of losses; the losses of the one under way
        self.gradients = [None, None]  # of the last closed window, for its events
        self.before = None  # the clocks before the window that is being stepped
        self.on_event = lambda kind: None

    # what is called

    def backward(self, loss):
        earlier = [each for micro in [*self.window, self.pending] for each in micro]
        if any((each.weight is None) != (loss.weight is None) for each in earlier):
            raise Refused
        if loss.weight is None and self.setup.reduction == "sum":
            raise Refused
        self.pending.append(loss)

    def update(self, iteration=None, size=None, epoch_ends=False):
        self.clocks["iteration"] = iteration or self.clocks["iteration"] + 1
        self.window.append(self.pending)
        self.pending = []
        if len(self.window) >= (size or self.setup.k):
            return self.close()
        return epoch_ends and self.end_epoch()

    def end_epoch(self):
        if self.setup.tail == "step":
            return self.flush()
        if self.setup.tail == "drop":
            self.drop()
        return False

    def end_run(self):
        self.end_epoch()
        self.flush()

    def start_run(self, iteration):
        self.lost = len(self.window) + bool(self.pending)
        self.drop()
        if iteration == 0 and not self.loaded:
            self.clocks = dict.fromkeys(self.clocks, 0)
            self.rates = list(RATES)
            self.row = 0
        self.loaded = False

    def flush(self):
        if self.pending:
            self.clocks["iteration"] += 1
            self.window.append(self.pending)
            self.pending = []
        return self.close() if self.window else False

    def drop(self):
        self.window, self.pending = [], []

    def load(self):
        """What is left of a copy of it in a new process."""
        if not self.keeps_window:
            self.drop()
        if self.before:
            self.clocks, self.before = self.before, None
        self.record = None
        self.loaded = True

    @property
    def is_open(self):
        return bool(self.window or self.pending)

    @property
    def keeps_window(self):
        """Whether its state holds the window; not while it closes, nor inside of a micro-batch."""
        return not (self.before or self.pending)

    # what a window is

    def weight(self):
        losses = [loss for micro in self.window for loss in micro]
        if all(loss.weight is None for loss in losses):
            return float(len(self.window))
        return float(sum(loss.weight for loss in losses))

    def reached(self, index):
        """Whether any loss of the open window that weighs something depends on a parameter."""
        losses = [loss for micro in [*self.window, self.pending] for loss in micro]
        return any(loss.weight != 0 and loss.gradient[index] is not None for loss in losses)

    def mean(self):
        losses = [loss for micro in self.window for loss in micro if loss.weight != 0]
        result = []
        for index, values in enumerate(self.parameters):
            parts = [
                [
                    x * (1.0 if loss.weight is None or self.setup.reduction == "sum" else loss.weight)
                    for x in loss.gradient[index]
                ]
                for loss in losses
                if loss.gradient[index] is not None
            ]
            total = [sum(part[i] for part in parts) for i in range(len(values))]
            result.append([x / self.weight() for x in total] if parts else None)
        return result

    def close(self):
        self.before = dict(self.clocks)
        try:
            return self.attempt()
        finally:
            self.drop()
            if self.before:  # neither a step nor a skip: an exception
                self.clocks, self.before = self.before, None

    def attempt(self):
        setup = self.setup
        self.clocks["attempt"] += 1
        weight, micro_batches = self.weight(), len(self.window)
        if weight == 0:
            self.gradients = [None, None]
            self.clocks["skipped"] += 1
            return self.end("STEP_SKIPPED", self.note(weight, micro_batches, None, skipped=True), None)
        self.gradients = self.mean()
        if self.gradients == [None, None]:
            raise Empty
        overflowed = not finite(self.gradients)
        try:
            self.fire("GRADIENTS_READY")
            self.gradients = meddle(setup.meddle, self.gradients, self.clocks["attempt"])
        except Boom:
            self.adapt(overflowed)
            raise
        bad = not finite(self.gradients) and setup.policy != "off"
        overflowed = overflowed or bad
        norm = norm_of(self.gradients, math.inf if setup.clip == "inf" else 2.0)
        if bad:
            self.row += 1
            self.clocks["skipped"] += 1
            self.end("STEP_SKIPPED", self.note(weight, micro_batches, norm, skipped=True), overflowed)
            if setup.policy == "raise" or self.row >= setup.most_skips:
                raise Stopped
            return False
        self.row = 0
        self.gradients = clipped(setup.clip, self.gradients, norm, self.parameters)
        factor = SCHEDULES[setup.schedule](self.clocks["step"])
        rates, self.rates = self.rates, [rate * factor for rate in RATES]
        self.clocks["step"] += 1
        before, self.record = self.record, self.note(weight, micro_batches, norm, skipped=False)
        try:
            self.fire("STEP_STARTED")
        except Boom:
            self.clocks["step"] -= 1
            self.record = before  # of the last window that was a step or a skip
            self.rates = rates
            self.adapt(overflowed)
            raise
        for index in (0, 1):
            if self.gradients[index] is not None:
                self.step(index)
        self.end("STEP_COMPLETED", self.record, overflowed)
        return True

    def end(self, kind, record, overflowed):
        self.record, self.before = record, None
        self.adapt(overflowed)
        self.drop()
        self.fire(kind)
        return False

    def fire(self, kind):
        self.on_event(kind)

    def note(self, weight, micro_batches, norm, *, skipped):
        keys = ("step", "attempt", "iteration")
        return {
            **{key: self.clocks[key] for key in keys},
            "weight": weight,
            "micro_batches": micro_batches,
            "grad_norm": norm,
            "loss_scale": self.scale,
            "skipped": skipped,
            "rates": tuple(self.rates),
        }

    def snapshot(self):
        return {
            "clocks": dict(self.clocks),
            "rates": list(self.rates),
            "scale": self.scale,
            "gradients": copy.deepcopy(self.gradients),
            "parameters": copy.deepcopy(self.parameters),
        }

    def adapt(self, overflowed):
        """torch.amp.GradScaler.update(), as its documentation has it."""
        if self.scale is None or overflowed is None:
            return
        if overflowed:
            self.scale, self.good = self.scale * 0.5, 0
            return
        self.good += 1
        if self.good == self.setup.scaler[1]:
            self.scale, self.good = self.scale * 2.0, 0

    def step(self, index):
        values, gradient, state, rate = (
            self.parameters[index],
            self.gradients[index],
            self.state[index],
            self.rates[index],
        )
        if self.setup.optimizer == "sgd":
            decayed = [g + WEIGHT_DECAY * p for g, p in zip(gradient, values, strict=True)]
            old = state.get("momentum_buffer")
            state["momentum_buffer"] = (
                decayed if old is None else [MOMENTUM * m + d for m, d in zip(old, decayed, strict=True)]
            )
            self.parameters[index] = [p - rate * m for p, m in zip(values, state["momentum_buffer"], strict=True)]
            return
        t = state["step"] = state.get("step", 0) + 1
        zeros = [0.0] * len(values)
        first, second = BETAS
        m = state["exp_avg"] = [
            first * a + (1 - first) * g for a, g in zip(state.get("exp_avg", zeros), gradient, strict=True)
        ]
        v = state["exp_avg_sq"] = [
            second * a + (1 - second) * g * g for a, g in zip(state.get("exp_avg_sq", zeros), gradient, strict=True)
        ]
        self.parameters[index] = [
            p * (1 - rate * WEIGHT_DECAY) - rate * (a / (1 - first**t)) / (math.sqrt(b / (1 - second**t)) + EPS)
            for p, a, b in zip(values, m, v, strict=True)
        ]


def finite(gradients):
    return all(math.isfinite(x) for g in gradients if g is not None for x in g)


def norm_of(gradients, p):
    entries = [abs(x) for g in gradients if g is not None for x in g]
    if any(map(math.isnan, entries)):
        return math.nan
    return max(entries, default=0.0) if p == math.inf else math.sqrt(sum(x * x for x in entries))


def clipped(how, gradients, norm, parameters):
    if how is None or not math.isfinite(norm):
        return gradients
    if how in {"norm", "inf"}:
        factor = min(1.0, 2.0 / (norm + 1e-6))
        return [g and [x * factor for x in g] for g in gradients]
    if how == "group":
        return [g and [x * min(1.0, 2.0 / (norm_of([g], 2.0) + 1e-6)) for x in g] for g in gradients]
    if how == "value":
        return [g and [min(max(x, -1.5), 1.5) for x in g] for g in gradients]
    factors = []
    for g, p in zip(gradients, parameters, strict=True):
        own, size = norm_of([g], 2.0), norm_of([p], 2.0)
        limit = 0.5 * (size if math.isnan(size) else max(size, 1e-3))
        factors.append(limit / own if own and not own <= limit else 1.0)
    return [g and [x * factor for x in g] for g, factor in zip(gradients, factors, strict=True)]


# -- ours -------------------------------------------------------------------------------------------------

CLIPS = {
    None: None,
    "norm": ice.clip_norm(2.0),
    "inf": ice.clip_norm(2.0, norm_type=math.inf),
    "group": ice.clip_norm(2.0, per_group=True),
    "value": ice.clip_value(1.5),
    "adaptive": ice.clip_adaptive(0.5),
}


@ice.dictprocess
def slower(initial_lr, step):
    return initial_lr / (1 + step)


PROCESSORS = {
    None: [],
    "step": [ice.schedules.step(step_size=2, gamma=0.5)],
    "linear": [ice.schedules.linear(total=8)],
    "cosine": [ice.schedules.cosine(total=10)],
    "own": [slower(dst="lr")],
}


def build(setup, values=START):
    parameters = [torch.nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in values]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(parameters, RATES, strict=True)]
    if setup.optimizer == "sgd":
        inner = torch.optim.SGD(groups, lr=1.0, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    else:
        inner = torch.optim.AdamW(groups, lr=1.0, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    return ice.Optimizer(
        inner,
        accumulation_steps=setup.k,
        tail=setup.tail,
        loss_reduction=setup.reduction,
        clip=CLIPS[setup.clip],
        processors=PROCESSORS[setup.schedule],
        grad_scaler=torch.amp.GradScaler("cpu", init_scale=setup.scaler[0], growth_interval=setup.scaler[1])
        if setup.scaler
        else None,
        nonfinite=setup.nonfinite,
        max_consecutive_skips=setup.most_skips,
    )


def parameters_of(optimizer):
    return [group["params"][0] for group in optimizer.param_groups]


def loss_of(optimizer, loss):
    parts = [
        (p * torch.tensor(g, dtype=torch.float64)).sum()
        for p, g in zip(parameters_of(optimizer), loss.gradient, strict=True)
        if g is not None
    ]
    return sum(parts[1:], parts[0])


def gradients_of(optimizer):
    return [None if p.grad is None else p.grad.tolist() for p in parameters_of(optimizer)]


def snapshot(optimizer):
    return {
        "clocks": optimizer.clocks,
        "rates": [group["lr"] for group in optimizer.param_groups],
        "scale": optimizer.grad_scaler.get_scale() if optimizer.grad_scaler else None,
        "gradients": gradients_of(optimizer),
        "parameters": [p.tolist() for p in parameters_of(optimizer)],
    }


def saved_to_disk(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(ours, expected, where=""):
    """Compare nested numbers to 1e-12; what is infinite or NaN in one must not be finite in the other."""
    if isinstance(expected, dict):
        assert ours.keys() == expected.keys(), where
        for key in expected:
            same(ours[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert ours is not None, f"{where}: None, expected {expected}"
        assert len(ours) == len(expected), f"{where}: {ours}, expected {expected}"
        for i, pair in enumerate(zip(ours, expected, strict=True)):
            same(*pair, f"{where}[{i}]")
    elif isinstance(expected, float) and isinstance(ours, float):
        if math.isfinite(expected) or math.isfinite(ours):
            # Absolutely, too: a mean whose items cancel is known only to the precision of the items.
            assert math.isclose(ours, expected, rel_tol=1e-12, abs_tol=1e-12), f"{where}: {ours}, expected {expected}"
    else:
        assert ours == expected, f"{where}: {ours!r}, expected {expected!r}"


def compare(optimizer, reference):
    """Everything that outlives a window."""
    expected = reference.snapshot()
    ours = snapshot(optimizer)
    del expected["gradients"], ours["gradients"]
    same(ours, expected, "now")
    for index, p in enumerate(parameters_of(optimizer)):
        state = {
            key: value.tolist() if value.numel() != 1 or key != "step" else int(value)
            for key, value in optimizer.state.get(p, {}).items()
            if value is not None
        }
        same(state, reference.state[index], f"state[{index}]")
        assert (p.grad is not None) == reference.reached(index), f"gradient of parameter {index}: {p.grad}"
    assert optimizer.clocks["attempt"] == optimizer.clocks["step"] + optimizer.clocks["skipped"]
    saved = optimizer.state_dict()["ice_engine"]
    assert saved["clocks"] == reference.clocks
    assert saved["consecutive_skips"] == reference.row
    if reference.scale is not None:
        assert saved["grad_scaler"]["_growth_tracker"] == reference.good
    compare_records(optimizer.record, reference)


def compare_records(record, reference):
    if record is None or reference.record is None:
        return
    expected = dict(reference.record)
    norm = expected.pop("grad_norm")
    ours = {key: getattr(record, key) for key in expected if key not in {"skipped", "rates"}}
    ours["skipped"] = record.skipped is not None
    ours["rates"] = [values["lr"] for values in record.values.values()]
    same(ours, expected, "record")
    assert record.grad_norm is not None or reference.setup.clip is None or norm is None
    if record.grad_norm is not None:
        same(float(record.grad_norm), norm, "record.grad_norm")


# -- what is drawn ----------------------------------------------------------------------------------------

numbers = st.one_of(
    st.integers(-64, 64).map(lambda n: n / 8),
    st.integers(-64, 64).map(lambda n: n / 8),
    st.integers(-64, 64).map(lambda n: n / 8),
    st.sampled_from([0.0, 1000.0, math.inf, -math.inf, math.nan]),
)


@st.composite
def losses(draw, weighted):
    gradient = draw(
        st.sampled_from([(2, 1), (2, 1), (2, 1), (2, None), (None, 1)]).flatmap(
            lambda sizes: st.tuples(*(st.none() if n is None else st.tuples(*[numbers] * n) for n in sizes))
        )
    )
    if draw(st.integers(0, 30)) == 30:
        weighted = not weighted  # a mistake
    return Loss(gradient, draw(st.sampled_from([1, 2, 3, 7, 0.5, 0, 0.1, 1000])) if weighted else None)


@st.composite
def setups(draw, *, engine):
    scaler = draw(st.one_of(st.none(), st.tuples(st.sampled_from([1.0, 1024.0, 65536.0]), st.integers(1, 3))))
    reduction = draw(st.sampled_from(["mean", "mean", "sum"]))
    return Setup(
        k=draw(st.integers(1, 4)),
        tail=draw(st.sampled_from(["step", "carry", "drop"])),
        reduction=reduction,
        optimizer=draw(st.sampled_from(["sgd", "adamw"])),
        clip=draw(st.sampled_from([None, *CLIPS])),
        schedule=draw(st.sampled_from([*SCHEDULES])),
        scaler=scaler,
        nonfinite=draw(st.sampled_from([None, "skip", "skip", "raise"] + ([] if scaler else ["off"]))),
        most_skips=draw(st.sampled_from([2, 3, 100])),
        weighted=reduction == "sum" or draw(st.booleans()),
        meddle=draw(st.sampled_from([None, None, "double", "repair", "poison"])) if engine else None,
    )


def both(reference, ours):
    """Call both; what one raises the other must raise. Returns what they returned."""
    expected: Any = None
    try:
        returned = reference()
    except (Refused, Stopped, Boom, Empty) as error:
        expected = error
    if expected is not None:
        with pytest.raises(RAISED[type(expected)]):
            ours()
        return None, expected
    actual = ours()
    return (returned, actual), None


# -- without an engine ------------------------------------------------------------------------------------


class Loop(RuleBasedStateMachine):
    """backward, update, flush, zero_grad, save, load, copy and pickle, in any order."""

    @initialize(setup=setups(engine=False))
    def begin(self, setup):
        self.setup, self.reference, self.optimizer = setup, Reference(setup), build(setup)
        self.saved = None

    def returned(self, reference, ours):
        pair, _ = both(reference, ours)
        if pair is not None:
            assert bool(pair[0]) == pair[1]

    def enter(self, loss, as_tensor):
        weight = loss.weight
        if weight is not None and as_tensor:
            weight = torch.tensor(weight, dtype=torch.float64)
        both(
            lambda: self.reference.backward(loss),
            lambda: self.optimizer.backward(loss_of(self.optimizer, loss), weight),
        )

    @rule(data=st.data(), as_tensor=st.booleans())
    def backward(self, data, as_tensor):
        self.enter(data.draw(losses(self.setup.weighted)), as_tensor)

    @rule(data=st.data())
    def train(self, data):
        for batch in data.draw(st.lists(st.lists(losses(self.setup.weighted), min_size=1, max_size=2), max_size=9)):
            for loss in batch:
                self.enter(loss, as_tensor=False)
            if self.reference.pending:
                self.returned(self.reference.update, self.optimizer.update)
            self.nothing_differs()

    @precondition(lambda self: self.reference.pending)
    @rule(size=st.one_of(st.none(), st.none(), st.integers(1, 5)), where=st.sampled_from(["", "", "inside", "end"]))
    def update(self, size, where):
        epoch = {"inside": {"epoch_steps": 1, "epoch_size": 2}, "end": {"epoch_steps": 2, "epoch_size": 2}}
        self.returned(
            lambda: self.reference.update(size=size, epoch_ends=where == "end"),
            lambda: self.optimizer.update(None, size, **epoch.get(where, {})),
        )

    @precondition(lambda self: not self.reference.pending)
    @rule(data=st.data())
    def update_without_backward(self, data):
        """The caller's own loss.backward(), which counts as one micro-batch where no weights are given."""
        known = [loss for micro in self.reference.window for loss in micro]
        if self.setup.reduction == "sum" or any(loss.weight is not None for loss in known):
            with pytest.raises(BackwardError):
                self.optimizer.update()
            return
        loss = dataclasses.replace(data.draw(losses(weighted=False)), weight=None)
        total, scaler = loss_of(self.optimizer, loss), self.optimizer.grad_scaler
        (scaler.scale(total) if scaler else total).backward()
        self.reference.pending.append(loss)
        self.returned(self.reference.update, self.optimizer.update)

    @rule()
    def flush(self):
        self.returned(self.reference.flush, self.optimizer.flush)

    @rule()
    def zero_grad(self):
        if self.reference.is_open:
            with pytest.raises(BackwardError):
                self.optimizer.zero_grad()
        else:
            self.optimizer.zero_grad()

    @precondition(lambda self: any(map(self.reference.reached, (0, 1))))
    @rule()
    def clear_the_gradients_behind_its_back(self):
        for p in parameters_of(self.optimizer):
            p.grad = None
        with pytest.warns(IceEngineWarning, match="dropped"), pytest.raises(BackwardError, match="were cleared"):
            self.optimizer.backward(loss_of(self.optimizer, Loss(((1.0, 1.0), (1.0,)), None)))
        self.reference.drop()

    @rule(weight=st.sampled_from([1, 2]))
    def backward_that_fails(self, weight):
        loss = loss_of(self.optimizer, Loss(((1.0, 1.0), (1.0,)), None))

        def fail(_):
            raise Boom

        loss.register_hook(fail)
        used = weight if self.setup.weighted else None
        if any(
            (each.weight is None) != (used is None)
            for m in [*self.reference.window, self.reference.pending]
            for each in m
        ):
            return
        with pytest.warns(IceEngineWarning, match="dropped"), pytest.raises(Boom):
            self.optimizer.backward(loss, used)
        self.reference.drop()

    @rule()
    def save(self):
        reference = copy.deepcopy(self.reference)
        values = [p.tolist() for p in parameters_of(self.optimizer)]
        self.saved = saved_to_disk(self.optimizer.state_dict()), values, reference

    @precondition(lambda self: self.saved)
    @rule(anew=st.booleans())
    def load(self, anew):
        state, values, reference = self.saved
        if anew:
            self.optimizer = build(self.setup, values)
        else:
            with torch.no_grad():
                for p, v in zip(parameters_of(self.optimizer), values, strict=True):
                    p.copy_(torch.tensor(v, dtype=torch.float64))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.optimizer.load_state_dict(state)
        lost = bool(reference.window) and not reference.keeps_window
        said = lost + (self.reference.is_open and not anew)  # what the saved one lost, and the own
        assert [w.category for w in caught] == [IceEngineWarning] * said, [str(w) for w in caught]
        self.reference = copy.deepcopy(reference)
        self.reference.load()

    @rule(how=st.sampled_from(["deepcopy", "pickle"]), go_on_with_copy=st.booleans())
    def copy(self, how, go_on_with_copy):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            other = copy.deepcopy(self.optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(self.optimizer))  # noqa: S301
        assert [w.category for w in caught] == [IceEngineWarning] * self.reference.is_open
        reference = copy.deepcopy(self.reference)
        reference.drop()
        compare(other, reference)
        if go_on_with_copy:
            self.optimizer, self.reference = other, reference

    @invariant()
    def nothing_differs(self):
        if hasattr(self, "optimizer"):
            compare(self.optimizer, self.reference)


# -- in an engine -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Batch:
    losses: tuple[Loss, ...]
    action: str | None = None
    where: str = "train_step"


@st.composite
def programs(draw, weighted):
    """Draw the batches of a run and what happens at some of them."""
    where = st.sampled_from(["ITERATION_STARTED", "between losses", "train_step", "ITERATION_COMPLETED"])
    calm = st.just((None, ""))
    eventful = st.one_of(calm, calm, st.tuples(st.sampled_from([*ACTIONS, "raise"]), where))
    fewest = draw(st.sampled_from([1, 1, 1, 1, 0]))
    batch = st.builds(
        lambda found, does: Batch(tuple(found), *does),
        st.lists(losses(weighted), min_size=fewest, max_size=2),
        draw(st.sampled_from([calm, eventful])),
    )
    return draw(st.lists(batch, min_size=1, max_size=6))


def moments(attempt):
    """Draw an event and which attempt's; mostly none."""
    soon = st.one_of(st.integers(1, 4), st.integers(attempt, attempt + 4))
    return st.one_of(st.none(), st.none(), st.none(), st.tuples(st.sampled_from(KINDS), soon))


ACTIONS = {
    "terminate": lambda e: e.terminate(),
    "terminate without COMPLETED": lambda e: e.terminate(skip_completed=True),
    "terminate_epoch": lambda e: e.terminate_epoch(),
    "terminate_epoch without EPOCH_COMPLETED": lambda e: e.terminate_epoch(skip_epoch_completed=True),
    "interrupt": lambda e: e.interrupt(),
}


class Program:
    """What the user's own handlers do, the same in both engines, and what they saw."""

    def __init__(self, take, look):
        self.take, self.look = take, look
        self.seen = []
        self.fail = None
        self.save_at = None
        self.save = lambda: None
        self.engine = Engine(self.train_step)
        self.engine.logger.disabled = True
        for event in (
            Events.STARTED,
            Events.ITERATION_COMPLETED,
            Events.EPOCH_COMPLETED,
            Events.COMPLETED,
            Events.TERMINATE,
        ):
            self.engine.add_event_handler(event, self.see, event.name)
        self.engine.add_event_handler(Events.ITERATION_COMPLETED, self.act, "ITERATION_COMPLETED")
        self.engine.add_event_handler(Events.ITERATION_STARTED, self.act, "ITERATION_STARTED")

    def train_step(self, engine, batch):
        for i, loss in enumerate(batch.losses):
            if i == 1:
                self.act(engine, "between losses")
            self.take(loss)
        self.act(engine, "train_step")

    def act(self, engine, where):
        batch = engine.state.batch
        if batch.action and batch.where == where:
            if batch.action == "raise":
                raise Boom
            ACTIONS[batch.action](engine)

    def see(self, engine, name):
        self.seen.append((name, engine.state.iteration, engine.state.epoch, self.look()))

    def on_optimizer_event(self, kind, clocks):
        self.seen.append((kind, self.engine.state.iteration, self.engine.state.epoch, self.look()))
        if self.save_at == (kind, clocks["attempt"]):
            self.save()
        if self.fail == (kind, clocks["attempt"]):
            raise Boom


class Trained(RuleBasedStateMachine):
    """Runs of random programs: stopped, broken, interrupted, resumed, run again."""

    @initialize(setup=setups(engine=True), listen=st.booleans(), late=st.booleans())
    def begin(self, setup, listen, late):
        self.setup, self.listen, self.late = setup, listen or setup.meddle is not None, late
        self.saved = None
        self.make(Reference(setup), build(setup))

    def make(self, reference, optimizer, state=None):
        self.reference, self.optimizer = reference, optimizer
        self.shadow = shadow = Program(reference.backward, reference.snapshot)
        first = {
            Events.STARTED: lambda e: reference.start_run(e.state.iteration),
            Events.ITERATION_COMPLETED: lambda e: reference.update(e.state.iteration) if reference.pending else None,
            Events.EPOCH_COMPLETED: lambda e: reference.end_epoch(),
            Events.TERMINATE_SINGLE_EPOCH: lambda *_, **__: reference.end_epoch(),
            Events.TERMINATE: lambda e: reference.end_run(),
            Events.COMPLETED: lambda e: reference.end_run(),
        }
        for event, handler in first.items():
            shadow.engine.add_event_handler(event, handler)
            handlers = shadow.engine._event_handlers[event]
            handlers.insert(0, handlers.pop())
        heard = [kind for kind in KINDS if self.listen or kind != "GRADIENTS_READY"]
        reference.on_event = lambda kind: shadow.on_optimizer_event(kind, reference.clocks) if kind in heard else None

        self.real = real = Program(
            lambda loss: optimizer.backward(loss_of(optimizer, loss), loss.weight), lambda: snapshot(optimizer)
        )
        if self.late:
            optimizer.attach(real.engine)
        if state is not None:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer.load_state_dict(state)
            assert [w.category for w in caught] == [IceEngineWarning] * bool(reference.window)
            reference.load()
        if not self.late:
            optimizer.attach(real.engine)
        for kind in heard:
            real.engine.add_event_handler(optimizer.event(kind), self.hear, optimizer, real, kind)

    def hear(self, engine, optimizer, real, kind):
        for clock in ("step", "attempt", "skipped"):
            assert getattr(engine.state, f"optimizer_{clock}") == optimizer.clocks[clock]
        real.on_optimizer_event(kind, optimizer.clocks)
        if kind == "GRADIENTS_READY" and self.setup.meddle:
            changed = meddle(self.setup.meddle, gradients_of(optimizer), optimizer.clocks["attempt"])
            for p, g in zip(parameters_of(optimizer), changed, strict=True):
                if g is not None:
                    p.grad.copy_(torch.tensor(g, dtype=torch.float64))

    @rule(
        data=st.data(),
        sized=st.booleans(),
        again=st.sampled_from(["anew", "go on", "as it is"]),
        raised_afresh=st.booleans(),
    )
    def run(self, data, sized, again, raised_afresh):
        batches = data.draw(programs(self.setup.weighted))
        source = batches if sized else Unsized(batches)
        arguments = self.length(data.draw, again)
        fail, save_at = (data.draw(moments(self.reference.clocks["attempt"])) for _ in range(2))
        if fail and fail[0] == "GRADIENTS_READY" and not self.listen:
            fail = None
        note(f"{arguments} {again} fail={fail} save={save_at}")
        saved: dict[str, Any] = {}
        self.shadow.save = lambda: saved.update(reference=self.copied(), engine=self.resumable())
        self.real.save = lambda: saved.update(state=self.state(), values=self.values())
        for program in (self.shadow, self.real):
            program.fail, program.save_at, program.seen = fail, save_at, []
        self.reference.lost = 0
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _, raised = both(
                lambda: self.shadow.engine.run(source, **arguments), lambda: self.real.engine.run(source, **arguments)
            )
        self.check_warnings([str(warning.message) for warning in caught])
        self.compare_what_was_seen()
        if saved and saved["engine"] is not None:
            self.saved = saved["state"], saved["values"], saved["reference"], saved["engine"]
        if raised is not None:
            for program in (self.shadow, self.real):
                program.engine._internal_run_generator = None  # Ignite: the run after an exception would do nothing
                if raised_afresh:
                    program.engine.state.iteration = program.engine.state.epoch = 0
        elif self.shadow.engine._internal_run_generator is None:
            assert not self.reference.is_open
            assert gradients_of(self.optimizer) == [None, None], "a stale gradient is left"

    def length(self, draw, again):
        """Draw how long the run is, as Ignite allows it after what was before."""
        state = self.shadow.engine.state
        if again == "anew" and self.shadow.engine._internal_run_generator is None:
            for program in (self.shadow, self.real):
                own = program.engine.state
                own.max_epochs = own.max_iters = own.epoch_length = None
        more = draw(st.integers(0, 3))
        if state.max_epochs is None and state.max_iters is None:
            return draw(st.sampled_from([{"max_epochs": 1 + more % 3}, {"max_iters": 1 + 3 * more}, {}]))
        if again != "go on":
            return {}
        if state.max_epochs is None:
            return {"max_iters": max(state.max_iters, state.iteration) + 2 * more}
        return {"max_epochs": max(state.max_epochs, state.epoch) + more} if state.max_iters is None else {}

    def check_warnings(self, texts):
        dropped = [text for text in texts if "of a window that an exception left open" in text]
        assert [f"dropped the {self.reference.lost} micro-batches" in text for text in dropped] == [True] * bool(
            self.reference.lost
        )
        known = ("got no loss in epoch", "goes on at", "Data iterator can not provide")
        assert not [text for text in texts if text not in dropped and not any(part in text for part in known)]

    def compare_what_was_seen(self):
        theirs, ours = self.shadow.seen, self.real.seen
        assert [event[:3] for event in ours] == [event[:3] for event in theirs]
        for mine, expected in zip(ours, theirs, strict=True):
            now, then = dict(mine[3]), dict(expected[3])
            if mine[0] not in KINDS:
                del now["gradients"], then["gradients"]
            same(now, then, f"at {mine[:3]}")

        for key in ("iteration", "epoch", "epoch_length", "max_epochs", "max_iters"):
            assert getattr(self.shadow.engine.state, key) == getattr(self.real.engine.state, key), key

    def state(self):
        return saved_to_disk(self.optimizer.state_dict())

    def values(self):
        return [p.tolist() for p in parameters_of(self.optimizer)]

    def copied(self):
        on_event, self.reference.on_event = self.reference.on_event, lambda kind: None
        try:
            return copy.deepcopy(self.reference)
        finally:
            self.reference.on_event = on_event

    def resumable(self):
        """What to resume an engine from, which must know its epoch's length."""
        state = self.shadow.engine.state
        if state.epoch_length is None or (state.max_epochs is None and state.max_iters is None):
            return None
        return dict(self.shadow.engine.state_dict())

    @rule()
    def save(self):
        state = self.resumable()
        if state is not None:
            self.saved = self.state(), self.values(), self.copied(), state

    @precondition(lambda self: self.saved)
    @rule(late=st.booleans(), with_engine=st.booleans())
    def resume_in_a_new_process(self, late, with_engine):
        state, values, reference, engine_state = self.saved
        self.late = late
        self.make(copy.deepcopy(reference), build(self.setup, values), state)
        if with_engine:
            for program in (self.shadow, self.real):
                program.engine.load_state_dict(engine_state)

    @invariant()
    def nothing_differs(self):
        if hasattr(self, "optimizer"):
            compare(self.optimizer, self.reference)


SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large, HealthCheck.large_base_example]
PHASES = [Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink]
MACHINES = pytest.mark.parametrize("machine", [Loop, Trained])


@pytest.mark.timeout(900)  # what is found is shrunk, which takes minutes; where nothing is found, seconds
@pytest.mark.parametrize("machine", [Loop, pytest.param(Trained, marks=pytest.mark.soak)])  # half a minute
def test_random_programs_equal_the_reference(machine):
    modest = settings(
        max_examples=250 if machine is Loop else 80,
        stateful_step_count=15,
        deadline=None,
        suppress_health_check=SLOW,
        phases=PHASES,
    )
    run_state_machine_as_test(machine, settings=modest)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@MACHINES
def test_many_random_programs_equal_the_reference(machine):
    many = settings(
        max_examples=1500,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=SLOW,
        phases=PHASES,
        derandomize=False,
        print_blob=True,
    )
    run_state_machine_as_test(machine, settings=many)


# -- what they found --------------------------------------------------------------------------------------


def one_weight(**settings):
    weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=1.0), **settings)
    trainer = Engine(lambda _, slope: optimizer.backward(weight * slope))
    trainer.logger.disabled = True
    return weight, optimizer, trainer


def test_a_refused_update_counts_no_iteration():
    _, optimizer, _ = one_weight(loss_reduction="sum")

    with pytest.raises(BackwardError, match="was not told the weight"):
        optimizer.update()

    assert optimizer.clocks == {"step": 0, "attempt": 0, "skipped": 0, "iteration": 0}


@pytest.mark.parametrize("kind", ["GRADIENTS_READY", "STEP_STARTED"])
def test_a_window_that_an_exception_broke_is_no_attempt(kind):
    _, optimizer, trainer = one_weight()
    optimizer.attach(trainer)

    @trainer.on(optimizer.event(kind))
    def fail():
        raise Boom

    with pytest.raises(Boom):
        trainer.run([1.0])

    assert optimizer.clocks == {"step": 0, "attempt": 0, "skipped": 0, "iteration": 1}
    assert trainer.state.optimizer_attempt == 0


@pytest.mark.parametrize("kind", ["GRADIENTS_READY", "STEP_STARTED"])
def test_what_is_saved_or_copied_inside_a_step_does_not_count_it(kind):
    _, optimizer, trainer = one_weight()
    optimizer.attach(trainer)
    taken = []

    @trainer.on(optimizer.event(kind)(once=2))
    def save():
        taken.append(optimizer.state_dict()["ice_engine"]["clocks"])
        with pytest.warns(IceEngineWarning, match="that copying left open"):
            taken.append(copy.deepcopy(optimizer).clocks)

    trainer.run([1.0, 1.0, 1.0])

    assert taken == [{"step": 1, "attempt": 1, "skipped": 0, "iteration": 2}] * 2
