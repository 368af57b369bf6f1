"""The step of torch's Adam and AdamW, by torch's fused kernel and by nothing else, where that is the same.

``step()`` of torch sorts parameters by device and dtype at each step, and asks much else of each of them: of 1.2M
parameters in 77 tensors on a CPU that is 0.2 ms beside a kernel of 0.6.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

_KINDS = (torch.optim.Adam, torch.optim.AdamW)


def step(optimizer: torch.optim.Optimizer) -> bool:
    """Step *optimizer*, whose gradients are dense tensors of one dtype on a CPU, to the bits of torch's own step.

    Returns:
        Whether it has: not a first step, which makes the state, and none of what is not Adam's usual.
    """
    groups = optimizer.param_groups
    if type(optimizer) not in _KINDS or "found_inf" in vars(optimizer) or not all(map(_is_usual, groups)):
        return False
    try:
        tensors = [_tensors(optimizer.state, group["params"]) for group in groups]
    except (KeyError, TypeError):  # a parameter has no state yet
        return False
    for group, (parameters, gradients, means, squares, steps) in zip(groups, tensors, strict=True):
        if not parameters:
            continue
        torch._foreach_add_(steps, 1)
        run = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
        run(
            parameters,
            gradients,
            means,
            squares,
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
    return (
        all(type(number) in (float, int) for number in numbers)
        and not (group["amsgrad"] or group["capturable"] or group["differentiable"])
        and "decoupled_weight_decay" in group  # else torch is one in which AdamW was a class apart
    )


def _tensors(state: Mapping[torch.Tensor, Any], parameters: Sequence[torch.Tensor]) -> tuple[list[Any], ...]:
    """Return those of *parameters* that have a gradient, their gradients, and the three entries of their state."""
    stepped = [p for p in parameters if p.grad is not None]
    entries: list[Any] = [state.get(p) for p in stepped]
    of_state = ([entry[key] for entry in entries] for key in ("exp_avg", "exp_avg_sq", "step"))
    return stepped, [p.grad for p in stepped], *of_state
