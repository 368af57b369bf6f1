"""Ground truth for schedules: values that the schedules of transformers really write.

Run as `python make_transformers.py > transformers.json`, with transformers and torch. Each case is the schedule's own
LambdaLR on a real SGD; the optimizer steps before the scheduler, as Trainer does it, 10 steps past the end.
"""

import datetime
import hashlib
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import optimization

RANDOM, PAST = np.random.default_rng(524), 10
HOW = """pip's transformers wheel with its dependencies, transformers.optimization imported whole, nothing stubbed.
schedule(optimizer, **arguments) on torch.optim.SGD with lr = base; values[i]: what step i (from 0) trains with; "end":
the step where the schedule's own end lies (null: it has none), the run goes 10 further. defects: the same, with "what";
"groups": lr of the parameter groups (optimizer.defaults["lr"] is base), values then one list a step."""
W, T = "num_warmup_steps", "num_training_steps"
MIN = "get_cosine_with_min_lr_schedule_with_warmup"
# Arguments to draw: a pair of floats or of ints is a range; all else is as it is.
PLAIN = {W: (3, 15), T: (20, 50)}
NO_WARMUP, LATE = PLAIN | {W: 0}, {W: (25, 35), T: (40, 50)}
WSD = {W: (3, 10), "num_decay_steps": (5, 15)}
PLAN = {
    "get_constant_schedule": [{}] * 6,
    "get_constant_schedule_with_warmup": [{W: 0}, {W: 1}, *[{W: (2, 25)}] * 5],
    "get_linear_schedule_with_warmup": [NO_WARMUP, LATE, *[PLAIN] * 5],
    "get_cosine_schedule_with_warmup": [
        *[NO_WARMUP, LATE, PLAIN, PLAIN],
        *[PLAIN | {"num_cycles": cycles} for cycles in (0.25, 1.0, 1.5, (0.1, 3.0), (0.1, 3.0))],
    ],
    "get_cosine_with_hard_restarts_schedule_with_warmup": [
        *[NO_WARMUP, LATE, PLAIN],
        *[PLAIN | {"num_cycles": cycles} for cycles in (2, 3, 4, 5, 1.5)],
        *[{W: 0, T: 40, "num_cycles": 4}, {W: 6, T: 55, "num_cycles": 7}],  # restarts fall on steps
    ],
    "get_polynomial_decay_schedule_with_warmup": [
        *[NO_WARMUP, LATE, PLAIN, PLAIN | {"power": 0.5, "lr_end": 0.0}],
        *[PLAIN | {"power": (0.4, 3.0), "lr_end": (0.0001, 0.04)}] * 5,
    ],
    "get_inverse_sqrt_schedule": [{W: 0}, *[{W: (2, 20)}] * 3, {W: 0, "timescale": 9}]
    + [{W: (2, 20), "timescale": (1, 60)}] * 4,
    MIN: [
        *[NO_WARMUP | {"min_lr": 0.01}, LATE | {"min_lr_rate": 0.1}, PLAIN | {"min_lr_rate": 0.0}],
        *[PLAIN | {"min_lr": (0.001, 0.04)}] * 2,
        *[PLAIN | {"min_lr_rate": (0.01, 0.6)}] * 2,
        *[PLAIN | {"min_lr_rate": (0.01, 0.6), "num_cycles": cycles} for cycles in (1.0, (0.2, 2.5))],
    ],
    f"{MIN}_lr_rate": [
        *[NO_WARMUP | {"min_lr": 0.01}, LATE | {"min_lr_rate": 0.1}],
        PLAIN | {W: 1, "min_lr": 0.0, "warmup_lr_rate": 0.1},
        *[PLAIN | {"min_lr": (0.001, 0.04)}, PLAIN | {"min_lr_rate": (0.01, 0.6), "num_cycles": 1.5}],
        *[PLAIN | {"min_lr_rate": (0.01, 0.6), "warmup_lr_rate": (0.01, 0.5)}] * 3,
    ],
    "get_wsd_schedule": [
        *[WSD | {T: (35, 50)}, WSD | {"num_stable_steps": (5, 25)}, WSD | {W: 0, T: 40}],
        *[
            WSD | {T: (35, 50), "warmup_type": up, "decay_type": down, "min_lr_ratio": (0.0, 0.4)}
            for up in ("linear", "cosine", "1-sqrt")
            for down in ("linear", "cosine", "1-sqrt")
        ],
        *[WSD | {"num_stable_steps": (5, 25), "decay_type": d, "min_lr_ratio": 0.2} for d in ("linear", "1-sqrt")],
        *[WSD | {T: (35, 50), "num_cycles": cycles, "min_lr_ratio": 0.1} for cycles in (1.5, (0.2, 2.0))],
        WSD | {T: 40, "num_stable_steps": 7},  # num_stable_steps wins, with a warning: ends before step 40
    ],
}
POLY, HARD = "get_polynomial_decay_schedule_with_warmup", "get_cosine_with_hard_restarts_schedule_with_warmup"
DEFECTS = [
    ("warm-up as long as the run", POLY, {W: 10, T: 10}, None),
    ("warm-up longer than the run", POLY, {W: 15, T: 10}, None),
    ("warm-up longer than the run", "get_linear_schedule_with_warmup", {W: 15, T: 10}, None),
    ("warm-up longer than the run", "get_cosine_schedule_with_warmup", {W: 15, T: 10}, None),
    ("lr_end above lr", POLY, {W: 2, T: 10, "lr_end": 1.0}, None),
    ("lr_end by the default lr, not the group's", POLY, {W: 2, T: 10, "lr_end": 0.1}, [0.5, 0.05]),
    ("min_lr by the default lr, not the group's", MIN, {W: 2, T: 10, "min_lr": 0.1}, [0.5, 0.05]),
    ("min_lr above lr: it rises", MIN, {W: 2, T: 10, "min_lr": 1.0}, None),
    ("neither min_lr nor min_lr_rate", MIN, {W: 2, T: 10}, None),
    ("a restart lost to the last bit, at step 30", HARD, {W: 0, T: 44, "num_cycles": 22}, None),
    ("timescale 0", "get_inverse_sqrt_schedule", {W: 3, "timescale": 0}, None),
    ("warm-up and decay longer than the run", "get_wsd_schedule", {W: 8, "num_decay_steps": 10, T: 12}, None),
    ("neither num_training_steps nor num_stable_steps", "get_wsd_schedule", {W: 2, "num_decay_steps": 3}, None),
]


def draw(what):
    """Draw an argument (see PLAIN)."""
    if isinstance(what, tuple):
        whole = isinstance(what[0], int)
        return int(RANDOM.integers(*what, endpoint=True)) if whole else round(RANDOM.uniform(*what), 4)
    return what


def run(schedule, arguments, base, groups=None):
    """Run a case, and record in text what it raises."""
    stable = sum(arguments.get(k, 0) for k in (W, "num_stable_steps", "num_decay_steps"))
    end = stable if "num_stable_steps" in arguments else arguments.get(T)
    row = {"schedule": schedule, "arguments": arguments, "base": base, "end": end}
    row |= ({"groups": groups} if groups else {}) | {"values": []}
    parameters = [{"params": [torch.zeros(1)], "lr": lr} for lr in groups or [base]]
    optimizer = torch.optim.SGD(parameters, lr=base)
    try:
        scheduler = getattr(optimization, schedule)(optimizer, **arguments)
        for _ in range((end or 40) + PAST):
            rates = [group["lr"] for group in optimizer.param_groups]
            row["values"] += [rates if groups else rates[0]]
            optimizer.step()
            scheduler.step()
    except Exception as error:  # noqa: BLE001
        row["raises"] = f"{type(error).__name__}: {error}"
    return row


def main():
    """Every schedule, each time with arguments of its own; then the defects."""
    warnings.simplefilter("ignore")  # WSD warns of two lengths
    defects = [{"what": what, **run(schedule, more, 0.5, groups)} for what, schedule, more, groups in DEFECTS]
    drawn = [(name, {k: draw(v) for k, v in spec.items()}) for name, specs in PLAN.items() for spec in specs]
    cases = [run(name, arguments, draw((0.05, 1.5))) for name, arguments in drawn]
    file = Path(optimization.__file__)
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}
    sums["transformers-5.24.0-py3-none-any.whl"] = "ff5ebedf9359f94bb63772b6380eba6e7104d010cbbb2cb82c788817ea7486f6"
    about = {"package": "transformers", "version": transformers.__version__, "sha256": sums}
    about |= {"python": sys.version.split()[0], "torch": torch.__version__, "date": datetime.date.today().isoformat()}
    about |= {"how": " ".join(HOW.split())}
    text = [",\n".join(json.dumps(row) for row in rows) for rows in (cases, defects)]
    sys.stdout.write(f'{{"provenance": {json.dumps(about)},\n"cases": [\n{text[0]}\n],\n"defects": [\n{text[1]}\n]}}\n')


if __name__ == "__main__":
    main()
