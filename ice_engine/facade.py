"""A torch optimizer that is another one: everything delegated, nothing copied.

Schedulers, GradScaler, distributed checkpoints and Ignite's handlers test ``isinstance`` and reach
into attributes. A subclass whose attributes are *properties* of the wrapped optimizer passes all of
them; copies would go stale, because ``load_state_dict`` replaces ``param_groups`` and ``state``.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

_FORWARDED = (
    "state",
    "param_groups",
    "defaults",
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
    # GradScaler hands these to a fused optimizer; set on the wrapper they would be lost, and the
    # kernel would train on scaled gradients.
    "grad_scale",
    "found_inf",
    "_zero_grad_profile_name",
    "_warned_capturable_if_run_uncaptured",
)


def _forwarded(name: str) -> property:
    def get(self: "OptimizerFacade") -> Any:
        return getattr(self._inner, name)

    def set_(self: "OptimizerFacade", value: Any) -> None:
        setattr(self._inner, name, value)

    def delete(self: "OptimizerFacade") -> None:
        delattr(self._inner, name)

    return property(get, set_, delete, f"The wrapped optimizer's ``{name.lstrip('_')}``, live.")


class OptimizerFacade(torch.optim.Optimizer):
    """Is a ``torch.optim.Optimizer`` by delegating to *inner*; ``step()`` always steps."""

    _inner: torch.optim.Optimizer

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        # The base __init__ is left out on purpose: it would make a second state and second param groups.
        self._inner = inner

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The wrapped optimizer."""
        return self._inner

    @functools.cached_property
    def needs_closure(self) -> bool:
        """Whether the wrapped optimizer's ``step`` cannot do without a closure, as LBFGS's."""
        closure = inspect.signature(self._inner.step).parameters.get("closure")
        return closure is not None and closure.default is closure.empty

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return getattr(self._inner, "_step_supports_amp_scaling", False)

    def __getattr__(self, name: str) -> Any:
        # What only some optimizers have, such as train() and eval(). Without the guard, copy and
        # pickle recurse on an instance that has no _inner yet.
        if name == "_inner" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._inner, name)

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Step the wrapped optimizer, always; windows live in ``update()``.

        Args:
            closure: Re-evaluates the model and returns the loss, for optimizers such as LBFGS.
            **kwargs: Whatever else the wrapped optimizer's ``step`` takes.

        Returns:
            What the wrapped optimizer returns.
        """
        return self._inner.step(**kwargs) if closure is None else self._inner.step(closure, **kwargs)

    # Hooks run once, around the inner step: torch must not wrap this method as well.
    step.hooked = True  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters.

        Args:
            set_to_none: Set them to None rather than to zeros.
        """
        self._inner.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group to the wrapped optimizer.

        Args:
            param_group: ``params`` and the entries that differ from the defaults.
        """
        self._inner.add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        # Not torch's own: "step" may have been patched into the instance by a scheduler.
        return {"_inner": self._inner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


for _name in _FORWARDED:
    setattr(OptimizerFacade, _name, _forwarded(_name))
