"""The step of torch's Adam and AdamW, by torch's fused kernel and by nothing else, where that is the same.

``step()`` of torch sorts parameters by device and dtype at each step, and asks much else of each of them: of 1.2M
parameters in 77 tensors on a CPU that is 0.2 ms beside a kernel of 0.6.
"""

from collections.abc import Mapping
from typing import Any

import torch

_KINDS = (torch.optim.Adam, torch.optim.AdamW)
_ENTRIES = {"step", "exp_avg", "exp_avg_sq"}


def step(optimizer: torch.optim.Optimizer) -> bool:
    """Step *optimizer*, whose gradients are dense tensors of one dtype on a CPU, to the bits of torch's own step.

    Returns:
        Whether it has: not a first step, which makes the state, and none of what is not Adam's usual.
    """
    state = optimizer.state
    if (
        type(optimizer) not in _KINDS
        or "found_inf" in vars(optimizer)
        or not all(map(_is_usual, optimizer.param_groups))
    ):
        return False
    runs = []
    for group in optimizer.param_groups:
        parameters = [p for p in group["params"] if p.grad is not None]
        entries: list[Any] = [state.get(p) for p in parameters]
        if not all(entry and entry.keys() == _ENTRIES for entry in entries):
            return False
        runs.append((group, parameters, entries))
    for group, parameters, entries in runs:
        if not parameters:
            continue
        steps = [entry["step"] for entry in entries]
        torch._foreach_add_(steps, 1)
        run = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
        run(
            parameters,
            [p.grad for p in parameters],
            [entry["exp_avg"] for entry in entries],
            [entry["exp_avg_sq"] for entry in entries],
            [],
            steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=group["maximize"],
            grad_scale=getattr(optimizer, "grad_scale", None),
        )
    return True


def _is_usual(group: Mapping[str, Any]) -> bool:
    numbers = (group["lr"], *group["betas"], group["weight_decay"], group["eps"])
    return all(type(number) in (float, int) for number in numbers) and not (
        group["amsgrad"] or group["capturable"] or group["differentiable"]
    )
