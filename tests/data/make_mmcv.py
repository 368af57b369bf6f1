"""Ground truth for schedules: values that the LR and momentum updater hooks of mmcv 1.7.2 really write.

Run as `python make_mmcv.py > mmcv.json`, with mmcv 1.7.2 (lite build) and torch; an empty torchvision.py on the path
will do. The hooks are mmcv's own, unaltered; only the runner is ours: it has what they read, in the order of mmcv's.
"""

import datetime
import hashlib
import json
import sys
import types
from itertools import product
from pathlib import Path

import mmcv
import numpy as np
import torch
from mmcv.runner.hooks import HOOKS, lr_updater, momentum_updater

RANDOM, FLAGS = np.random.default_rng(172), (False, True)
EPOCH, ITER, KINDS = "EpochBasedRunner", "IterBasedRunner", [None, "constant", "linear", "exp", "epochs"]
HOW = """pip's mmcv-1.7.2.tar.gz, installed whole with MMCV_WITH_OPS=0; torchvision an empty stub (only
mmcv.runner.checkpoint imports it), OpenCV headless. Real hooks and torch optimizers; a minimal runner in the order of
the one named. hook(by_epoch=by_epoch, **arguments), a list target_ratio as tuple; values[i]: what iteration i (from 0)
trains with. defects: values up to what is raised, complex ones as text; past: iterations run beyond max_iters."""
# Arguments to draw: a pair of floats or of ints is a range, DRAWS has words; all else is as it is.
R, S, G, C = (0.01, 0.5), (0.001, 0.04), (0.2, 0.9), {"periods": "periods", "restart_weights": [(0.3, 1.0)] * 3}
LR = [("Fixed", {})] * 2 + [("Exp", {"gamma": (0.7, 0.99)})] * 2 + [("Step", {"step": "step"}), ("Poly", {})]
LR += [("Step", {"step": "step", "gamma": G, "min_lr": S}), ("Step", {"step": "steps", "min_lr": (0.002, 0.1)})]
LR += [("Step", {"step": "steps", "gamma": G}), ("Poly", {"power": (0.4, 3.0)}), ("Inv", {"gamma": (0.05, 1.0)})]
LR += [("Poly", {"power": (0.4, 3.0), "min_lr": S}), ("Inv", {"gamma": (0.05, 1.0), "power": (0.3, 2.0)})]
LR += [("FlatCosineAnnealing", d) for d in ({"min_lr_ratio": R}, {"start_percent": (0.1, 0.8), "min_lr": S})]
LR += [("CosineRestart", C | {"min_lr_ratio": R}), ("CosineRestart", C | {"min_lr": S})]
MOM = [("Step", {"step": "step"}), ("Step", {"step": "steps", "gamma": G})]
MOM += [("Step", {"step": "step", "gamma": G, "min_momentum": (0.1, 0.4)})]
for _name in ("CosineAnnealing", "LinearAnnealing"):
    LR += [(_name, {"min_lr_ratio": R}), (_name, {"min_lr": S})]
    MOM += [(_name, {"min_momentum_ratio": R}), (_name, {"min_momentum": (0.05, 0.4)})]
# Families whose class refuses by_epoch=True
LR_ITER, MOM_ITER = [("Cyclic", {}), ("OneCycle", {"max_lr": (0.1, 2.0)})], [("Cyclic", {}), ("OneCycle", {})]
for _anneal, _a, _b in product(("cos", "linear"), FLAGS, FLAGS):
    _c = {"cyclic_times": (1, 4), "step_ratio_up": (0.2, 0.7), "anneal_strategy": _anneal}
    _c |= {"gamma": (0.4, 0.95)} if _a else {}
    _o = {"pct_start": (0.15, 0.45), "anneal_strategy": _anneal, "three_phase": _a}
    _t = {"total_steps": "total", "final_div_factor": (10.0, 2e4)} if _b else {}
    LR_ITER += [("Cyclic", _c | {"target_ratio": [(2.0, 12.0), (1e-4, 0.5)] if _b else (2.0, 12.0)})]
    LR_ITER += [("OneCycle", _o | {"max_lr": (0.1, 2.0), "div_factor": (2.0, 30.0)} | _t)]
    MOM_ITER += [("Cyclic", _c | {"target_ratio": [(0.6, 0.95), (0.9, 1.05)]})] * _b
    MOM_ITER += [("OneCycle", _o | {"base_momentum": (0.7, 0.9), "max_momentum": (0.9, 0.99)})] * _b
PLAN = [("Lr", LR, (1, 0), 5), ("Lr", LR_ITER, (0,), 5), ("Momentum", MOM, (1, 0), 4), ("Momentum", MOM_ITER, (0,), 4)]
DRAWS = {
    "step": lambda p: draw((1, p // 2)),
    "steps": lambda p: sorted(RANDOM.choice(range(1, p), min(3, p - 1), replace=False).tolist()),
    "periods": lambda p: np.diff([0, *sorted(RANDOM.choice(range(1, p), 2, replace=False)), p + 1]).tolist(),
    "total": lambda p: p + draw((1, 15)),
}
LRU, MOMU, LOW, RATIO, GAMMA = "LrUpdaterHook", "MomentumUpdaterHook", {"min_lr": 0.0}, "target_ratio", {"gamma": 0.5}
CYC, ONE, LINEAR, MAX = f"Cyclic{LRU}", f"OneCycle{LRU}", {"warmup": "linear", "warmup_iters": 8}, {"max_lr": 1.0}
SPECIAL = [  # hook, arguments, by_epoch, runner; 5 epochs of 4 iterations, base 0.5
    *[(f"FlatCosineAnnealing{LRU}", {"start_percent": p, **LOW}, p < 1, EPOCH) for p in (0.5, 1.0)],  # round(2.5): 2
    (f"CosineAnnealing{LRU}", {**LOW, "warmup": "linear", "warmup_iters": 30}, 1, EPOCH),  # longer than the run
    *[(f"Step{LRU}", more, 0, EPOCH) for more in ({"step": [8, 3]}, {"step": 5, "min_lr": 0.7})],  # odd
    (CYC, {RATIO: [10.0], "cyclic_times": 3, **GAMMA}, 0, ITER),  # 20 % 3: a fourth cycle begins
    *[(ONE, {**MAX, "pct_start": p, "three_phase": t}, 0, ITER) for p in (0.0, 0.7, 1.0) for t in FLAGS],
]
DEFECTS = [  # and every family past its end: see main
    *[(f"CosineRestart{LRU}", {**LOW, "periods": [4, 8], **w}, 0, EPOCH) for w in ({"restart_weights": [1, 0.5]}, {})],
    *[(h, {"step_ratio_up": 0.0, "cyclic_times": 2, **GAMMA}, 0, EPOCH) for h in (CYC, f"Cyclic{MOMU}")],
    *[(h, d, 0, EPOCH) for h, d in ((CYC, {"cyclic_times": 21}), (CYC, {RATIO: 8}), (ONE, {**MAX, "total_steps": 9}))],
    *[(ONE, {**MAX, "pct_start": p, "three_phase": t}, 0, EPOCH) for p in (0.05, 1) for t in FLAGS],
    *[(f"OneCycle{MOMU}", more, 0, EPOCH) for more in ({"pct_start": 0.05}, {"base_momentum": 0})],
    (f"Fixed{LRU}", {**LINEAR, "warmup_by_epoch": True}, 0, ITER),
    *[(f"Step{kind}", {"step": 1, **LINEAR}, 1, ITER) for kind in (LRU, MOMU)],  # without any effect
]


def draw(what, p=0):
    """Draw an argument (see LR) for a schedule of length p."""
    if isinstance(what, tuple):
        whole = isinstance(what[0], int)
        return int(RANDOM.integers(*what, endpoint=True)) if whole else round(RANDOM.uniform(*what), 4)
    return [draw(w) for w in what] if isinstance(what, list) else DRAWS.get(what, lambda _: what)(p)


def warmup(kind, iters, key):
    """Draw a warm-up's arguments; the kind "epochs" is one of the others, in epochs. At times without a ratio."""
    of = {"warmup": KINDS[draw((1, 3))], "warmup_by_epoch": True} if kind == "epochs" else {"warmup": kind}
    of["warmup_iters"] = draw((1, 3) if kind == "epochs" else (3, iters // 2))
    of |= {"warmup_ratio": draw((0.02, 0.6) if key == "lr" else (0.5, 0.99))} if draw((0, 4)) else {}
    return of if kind else {}


def drive(row, iters):
    """Yield the value of each iteration, as it stands when the optimizer would step."""
    adam, n, by_iter = row["key"] == "betas.0", row["epoch_length"], row["runner"] == ITER
    setting = {"betas": (row["base"], 0.999)} if adam else {row["key"]: row["base"]}
    optimizer = (torch.optim.AdamW if adam else torch.optim.SGD)([torch.zeros(1)], **{"lr": 0.1, **setting})
    runner = types.SimpleNamespace(optimizer=optimizer, data_loader=range(n), iter=0, epoch=0)
    runner.max_iters, runner.max_epochs = row["max_iters"], None if by_iter else row["max_epochs"]
    arguments = {k: tuple(v) if k == RATIO and isinstance(v, list) else v for k, v in row["arguments"].items()}
    hook = HOOKS.get(row["hook"])(by_epoch=row["by_epoch"], **arguments)
    hook.before_run(runner)
    for i in range(iters):
        runner.iter, runner.epoch = i, max(i - 1, 0) // n if by_iter else i // n  # by iteration: before next(loader)
        if not by_iter and i % n == 0:
            hook.before_train_epoch(runner)
        hook.before_train_iter(runner)
        group = optimizer.param_groups[0]
        yield group["betas"][0] if adam else group[row["key"]]


def run(hook, arguments, by_epoch, runner, *, key=None, base=0.5, n=4, m=5, past=0):
    """Run a case, and record in text what it raises (at iteration len(values), or before the run)."""
    key = key or ("lr" if LRU in hook else "momentum")
    row = {"hook": hook, "arguments": arguments, "by_epoch": bool(by_epoch), "runner": runner, "key": key, "base": base}
    row |= {"epoch_length": n, "max_epochs": m, "max_iters": n * m, "past": past, "values": []}
    try:
        for value in drive(row, n * m + past):
            row["values"] += [value if isinstance(value, float) else repr(value)]
    except Exception as error:  # noqa: BLE001
        row["raises"] = f"{type(error).__name__}: {error}"
    return row


def main():
    """Every family with every warm-up, each with arguments of its own; then the special ones and the defects."""
    cases, defects = [run(*special) for special in SPECIAL], [run(*defect) for defect in DEFECTS]
    for what, families, ways, kinds in PLAN:
        for (i, (name, spec)), by_epoch, (j, kind) in product(enumerate(families), ways, enumerate(KINDS[:kinds])):
            n = draw((3, 9))
            m = draw((-(-20 // n), 60 // n))
            key = "lr" if what == "Lr" else ("momentum", "betas.0")[(i + j) % 2]
            size = {"key": key, "n": n, "m": m, "base": draw((0.05, 1.5) if key == "lr" else (0.5, 0.95))}
            arguments = {k: draw(v, m if by_epoch else n * m) for k, v in spec.items()} | warmup(kind, n * m, key)
            by = EPOCH if by_epoch or kind == "epochs" or (i + j) % 2 else ITER
            cases += [run(f"{name}{what}UpdaterHook", arguments, by_epoch, by, **size)]
            if kind is None:
                defects += [run(f"{name}{what}UpdaterHook", arguments, by_epoch, EPOCH, **size, past=2 * n)]
    files = map(Path, (lr_updater.__file__, momentum_updater.__file__))
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    sums["mmcv-1.7.2.tar.gz"] = "2116a1609f9d3f59824074774366fd8b9410437bc95a24d535669b35d55352be"
    about = {"package": "mmcv", "version": mmcv.__version__, "sha256": sums, "python": sys.version.split()[0]}
    about |= {"torch": torch.__version__, "date": datetime.date.today().isoformat(), "how": " ".join(HOW.split())}
    text = [",\n".join(json.dumps(row) for row in rows) for rows in (cases, defects)]
    sys.stdout.write(f'{{"provenance": {json.dumps(about)},\n"cases": [\n{text[0]}\n],\n"defects": [\n{text[1]}\n]}}\n')


if __name__ == "__main__":
    main()
