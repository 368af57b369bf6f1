"""How a torch optimizer steps: its fused kernel, which takes a factor for the gradients along, or what it has.

A fused optimizer updates all its parameters in one kernel. That kernel divides the gradients by ``grad_scale`` as it
reads them, and writes them back so; what torch made for its ``GradScaler`` serves for any factor, such as a clip's. So
the mean of a window, the loss scale and the clip cost no pass over the gradients of their own. Nor do they with plain
SGD, whose step is as linear in ``lr`` as in the gradient: there the factor goes along in ``lr``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.autograd import _profiler_enabled  # type: ignore[attr-defined] # has no public name
from torch.optim import optimizer as torch_optimizer

from ice_engine import adam

# Of these the fused form is the faster one in all sizes, and gradients that it cannot take are refused by all forms.
_FASTER = (torch.optim.Adam, torch.optim.AdamW)
_DEVICES = ("cpu", "cuda")

# The functions that torch puts around every optimizer's step(): for hooks and the profiler, and to record no gradient.
_WRAPPER = torch.optim.Optimizer.profile_hook_step(lambda _: None).__code__
_NO_GRAD = getattr(torch_optimizer, "_use_grad_for_differentiable", lambda step: step)(lambda _: None).__code__


def prefer(optimizer: torch.optim.Optimizer) -> None:
    """Let *optimizer*, which has not stepped yet, run its fused form where its maker left open which.

    torch itself takes the loop on a CPU, which is 2 to 6 times slower, and several kernels on a GPU. The results differ
    by rounding.
    """
    if type(optimizer) not in _FASTER or optimizer.defaults["fused"] is not None:
        return
    open_groups = [g for g in optimizer.param_groups if g["fused"] is g["foreach"] is None]
    parameters = [p for group in open_groups for p in group["params"]]
    if (
        len(open_groups) < len(optimizer.param_groups)
        or any(group["differentiable"] or isinstance(group["lr"], torch.Tensor) for group in open_groups)
        or any(type(p) is not torch.nn.Parameter or p.dtype != torch.float32 for p in parameters)
        or any(p.device.type not in _DEVICES for p in parameters)
    ):
        return
    for group in [optimizer.defaults, *open_groups]:
        group["fused"] = True
    optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined] # noqa: SLF001 - as with fused=True


def form(groups: Sequence[Mapping[str, Any]]) -> str | None:
    """Return which form steps these param *groups*: ``"fused"``, ``"foreach"``, ``"for-loop"``, or several of them.

    None for an optimizer that has one form alone.
    """
    found = dict.fromkeys(_form(group) for group in groups)
    return None if None in found else " and ".join(map(str, found))


def _form(group: Mapping[str, Any]) -> str | None:
    if "foreach" not in group:
        return None
    if group.get("fused"):
        return "fused"
    foreach = group["foreach"]
    if foreach is None and group.get("fused") is None:  # as each step() of torch decides it
        differentiable = group.get("differentiable", False)
        foreach = torch_optimizer._default_to_fused_or_foreach(group["params"], differentiable)[1]  # noqa: SLF001
    return "foreach" if foreach else "for-loop"


def takes_factor(
    optimizer: torch.optim.Optimizer, gradients: Sequence[torch.Tensor], factor: float | torch.Tensor, *, shown: bool
) -> bool:
    """Whether *optimizer* multiplies these *gradients* by *factor* itself, and nobody looks at them before.

    A fused kernel does so in single precision alone: its factor is a single one, too coarse for double gradients, and
    torch's kernels for half precision on the CPU ignore it in part. It writes the product back; plain SGD, which takes
    a number only, does not, and so is not left to do it where gradients are *shown* to somebody after the step.
    """
    if _hooks_before(optimizer) or "step" in vars(optimizer):
        return False
    if _divides(optimizer):
        return gradients[0].dtype == torch.float32
    return (
        type(optimizer) is torch.optim.SGD
        and type(factor) is float
        and not shown
        and all(_is_linear(group) for group in optimizer.param_groups)
        and not _hooks_after(optimizer)
    )


def _divides(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the kernel of *optimizer* divides the gradients by its ``grad_scale``."""
    able: bool = getattr(optimizer, "_step_supports_amp_scaling", False)
    return able and all(group.get("fused") for group in optimizer.param_groups)


def _hooks_before(optimizer: torch.optim.Optimizer) -> bool:
    # They, and those after the step, may look at the gradients. torch has no public name for any of them.
    own, everybodys = optimizer._optimizer_step_pre_hooks, torch_optimizer._global_optimizer_pre_hooks  # noqa: SLF001
    return bool(own or everybodys)


def _hooks_after(optimizer: torch.optim.Optimizer) -> bool:
    own, everybodys = optimizer._optimizer_step_post_hooks, torch_optimizer._global_optimizer_post_hooks  # noqa: SLF001
    return bool(own or everybodys)


def _is_linear(group: Mapping[str, Any]) -> bool:
    return group["momentum"] == group["weight_decay"] == 0 and type(group["lr"]) is float


def step_with(
    optimizer: torch.optim.Optimizer,
    form: str | None,
    factor: float | torch.Tensor,
    device: torch.device,
    *,
    plain: bool,
) -> None:
    """Step *optimizer*, which has this :func:`form`, with its gradients times *factor*.

    It must take any but 1, see :func:`takes_factor`. *plain* are gradients that are dense tensors of one dtype there.
    """
    loop = form == "for-loop" and device.type == "cpu"  # which was true when somebody looked; on a GPU torch is asked
    kernel = form == "fused" and device.type == "cpu" and plain
    if type(factor) is float and factor == 1.0:
        _step(optimizer, loop=loop, kernel=kernel)
        return
    if not _divides(optimizer):
        rates = [group["lr"] for group in optimizer.param_groups]
        try:
            for group in optimizer.param_groups:
                group["lr"] *= factor
            _step(optimizer, loop=loop, kernel=kernel)
        finally:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        return
    stepped: Any = optimizer
    if isinstance(factor, torch.Tensor):
        stepped.grad_scale = factor.reciprocal().to(torch.float32)
    else:
        stepped.grad_scale = torch.full((), 1.0 / factor, dtype=torch.float32, device=device)
    try:
        _step(optimizer, loop=loop, kernel=kernel)
    finally:
        del stepped.grad_scale


def _step(optimizer: torch.optim.Optimizer, *, loop: bool, kernel: bool) -> None:
    """Step *optimizer*, by its *loop* if so, or by its *kernel* alone; past what torch puts around that for others."""
    own: Any = type(optimizer).step
    # One opens a range for the profiler, at 9 us a step as much as the kernel of a small model, also where none runs.
    if (
        getattr(own, "__code__", None) is not _WRAPPER
        or "step" in vars(optimizer)
        or _profiler_enabled()
        or _hooks_before(optimizer)
        or _hooks_after(optimizer)
    ):
        optimizer.step()
        return
    inner = own.__wrapped__
    torchs = own.__module__.startswith("torch.optim.") and getattr(inner, "__code__", None) is _NO_GRAD
    if not torchs or optimizer.defaults["differentiable"]:
        inner(optimizer)  # a class of the user's own may read its groups, or need that wrapper
        return
    # Where it was left open, torch finds at each step that it is the loop: 3 us by itself, and 8 to 12 between backward
    # passes, which take the cache, of the 220 that an iteration of a tiny model takes.
    left_open = [group for group in optimizer.param_groups if group["foreach"] is None] if loop else ()
    records = torch.is_grad_enabled()
    try:
        # As the other wrapper, which takes 2 us more, for steps that are compiled; torch.no_grad() takes as much.
        torch._C._set_grad_enabled(False)  # noqa: SLF001 - what torch.set_grad_enabled() calls, an object around it
        for group in left_open:
            group["foreach"] = False
        if not (kernel and adam.step(optimizer)):
            inner.__wrapped__(optimizer)
    finally:
        for group in left_open:
            group["foreach"] = None
        torch._C._set_grad_enabled(records)  # noqa: SLF001 - as said
