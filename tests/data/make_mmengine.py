"""Ground truth for schedules: values that mmengine's own parameter schedulers set.

Run as `python make_mmengine.py > mmengine.json`, with mmengine 0.10.7 and torch. Each case is real schedulers on a real
SGD, stepped after it as mmengine's ParamSchedulerHook does; `values[i]` is what step i (from 0) trains with.
"""

import datetime
import json
import sys
import warnings

import mmengine
import torch
from mmengine.optim import scheduler as schedulers

BASE, COUNT = 0.4, 40
CASES = [
    [["StepLR", {"step_size": 7}]],
    [["StepLR", {"step_size": 5, "gamma": 0.3}]],
    [["MultiStepLR", {"milestones": [8, 11, 30]}]],
    [["MultiStepLR", {"milestones": [1, 25], "gamma": 0.5}]],
    [["ConstantLR", {"end": 6}]],
    [["ConstantLR", {"factor": 0.25, "end": 13}]],
    [["LinearLR", {"end": 11}]],
    [["LinearLR", {"start_factor": 0.001, "end": 20}]],
    [["LinearLR", {"start_factor": 1.0, "end_factor": 0.1, "end": 40}]],
    [["ExponentialLR", {"gamma": 0.9}]],
    [["PolyLR", {"end": 40}]],
    [["PolyLR", {"eta_min": 0.01, "power": 0.9, "end": 40}]],
    [["PolyLR", {"eta_min": 0.001, "power": 2.0, "end": 30}]],
    [["CosineAnnealingLR", {"T_max": 40, "eta_min": 0.0}]],
    [["CosineAnnealingLR", {"T_max": 40, "eta_min": 0.02}]],
    [["CosineAnnealingLR", {"T_max": 15, "eta_min": 0.02}]],
    [["CosineAnnealingLR", {"T_max": 40, "eta_min_ratio": 0.05}]],
    [["OneCycleLR", {"eta_max": 0.4, "total_steps": 40}]],
    [["OneCycleLR", {"eta_max": 0.7, "total_steps": 40, "pct_start": 0.2, "anneal_strategy": "linear"}]],
    [["OneCycleLR", {"eta_max": 0.7, "total_steps": 40, "div_factor": 10.0, "final_div_factor": 50.0}]],
    [["OneCycleLR", {"eta_max": 0.7, "total_steps": 40, "three_phase": True}]],
    [["CosineRestartLR", {"periods": [15, 25], "restart_weights": [1, 1], "eta_min": 0.02}]],
    [["CosineRestartLR", {"periods": [10, 10, 20], "restart_weights": [1, 0.5, 0.25], "eta_min": 0.0}]],
    [["CosineRestartLR", {"periods": [20, 20], "restart_weights": [1, 0.5], "eta_min_ratio": 0.0}]],
    [["CosineRestartLR", {"periods": [20, 20], "restart_weights": [1, 0.5], "eta_min": 0.1}]],  # not as mmcv's
    [
        ["LinearLR", {"start_factor": 0.01, "end": 10}],
        ["CosineAnnealingLR", {"T_max": 30, "eta_min": 0.0, "begin": 10}],
    ],
    [["LinearLR", {"start_factor": 0.01, "end": 10}], ["MultiStepLR", {"milestones": [5, 30]}]],
]
METRICS = [5.0, 4.0, 4.0, 3.99, 4.5, 4.1, 3.0, 3.0, 3.0, 3.1, 2.0, 2.0, 2.2, 2.1, 2.0, 2.0, 1.9, 1.9, 1.9, 1.9]
PLATEAU = [
    {"patience": 2},
    {"patience": 1, "factor": 0.5, "cooldown": 2, "threshold": 0.1},
    {"rule": "greater", "patience": 3, "min_value": 0.01, "threshold_rule": "abs"},
]


def run(case: list, metrics: list | None = None) -> list:
    """Return what each step trains with."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=BASE)
    made = [getattr(schedulers, name)(optimizer, **arguments) for name, arguments in case]
    values = []
    for i in range(len(metrics) if metrics else COUNT):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in made:
            scheduler.step({"loss": metrics[i]}) if metrics else scheduler.step()
    return values


def main() -> None:
    """Every case, then those that follow a metric."""
    warnings.simplefilter("ignore")
    about = {"package": "mmengine", "version": mmengine.__version__, "torch": torch.__version__}
    about |= {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "how": " ".join(__doc__.split())}
    rows = [{"schedulers": case, "base": BASE, "values": run(case)} for case in CASES]
    for arguments in PLATEAU:
        case = [["ReduceOnPlateauLR", {"monitor": "loss", **arguments}]]
        rows.append({"schedulers": case, "base": BASE, "metrics": METRICS, "values": run(case, METRICS)})
    text = ",\n".join(json.dumps(row) for row in rows)
    sys.stdout.write(f'{{"provenance": {json.dumps(about)},\n"cases": [\n{text}\n]}}\n')


if __name__ == "__main__":
    main()
