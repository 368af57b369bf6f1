"""ZeRO stage 1: each rank keeps the optimizer state of its own parameters only, and sends them to the others.

Torch's ``ZeroRedundancyOptimizer`` partitions and steps. What it gets wrong around that is mended here: names of
parameters, groups that are added later, loading, copying. Of its ways to save none is used; see ``consolidation``.
"""

import functools
import inspect
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor

from ice_engine.distributed.agreement import announce
from ice_engine.errors import ArgumentTypeError, ArgumentValueError, ClosureError, StateDictError
from ice_engine.names import PLACE

# What ZeroRedundancyOptimizer's constructor would take for itself.
_ITS_OWN = ("params", "optimizer_class", "process_group", "parameters_as_bucket_view", "overlap_with_ddp")


class ZeroOptimizer(ZeroRedundancyOptimizer):  # type: ignore[misc, unused-ignore]
    """Shards the state of *optimizer_class* over all ranks.

    Its ``param_groups`` are those of the whole model on every rank; what is written there reaches the rank's own
    part, ``optim``, at the next step. Its ``state`` is this rank's part of it.
    """

    # Of torch's class, which does not declare them.
    _all_params: list[torch.Tensor]
    _all_state_dicts: list[dict[str, Any]]
    _clear_cache: Callable[[], None]
    _get_is_trainable_mask: Callable[[], list[bool]]

    def __init__(
        self, params: list[dict[str, Any]], optimizer_class: type[torch.optim.Optimizer], **defaults: Any
    ) -> None:
        self.wrapped_class = optimizer_class
        super().__init__(params, optimizer_class, **defaults)
        # All of them, not only those that were given: a group that is added later is complete on every rank.
        self.defaults = self.optim.defaults

    @property
    def state(self) -> Any:
        """This rank's part of the state, live; torch's own is empty until loaded, and stale from then on."""
        return self.optim.state

    @state.setter
    def state(self, value: Any) -> None:
        if "optim" in vars(self):  # the base constructor sets an empty one before
            self.optim.state = value

    @staticmethod
    def _sync_param_groups(src_param_groups: list[dict[str, Any]], dst_param_groups: list[dict[str, Any]]) -> None:
        # Both ways around each step. Torch's only adds, so that an entry that was deleted comes back.
        for source, group in zip(src_param_groups, dst_param_groups, strict=True):
            for key in group.keys() - source.keys():
                del group[key]
            group.update({key: value for key, value in source.items() if key != "params"})

    def local_state_dict(self) -> dict[str, Any]:
        """Return a state dict of the whole optimizer, but for the state of other ranks' parameters."""
        return torch.optim.Optimizer.state_dict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this rank's part of a whole, plain state dict, which is left as it is.

        Args:
            state_dict: As the plain optimizer of the same params would load it.

        Raises:
            StateDictError: If its param groups are of other sizes; nothing has changed then.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        saved = state_dict["param_groups"]
        theirs, ours = ([len(group["params"]) for group in groups] for groups in (saved, self.param_groups))
        if theirs != ours:
            message = f"the state dict's param groups have {theirs} parameters, the optimizer's {ours}"
            raise StateDictError(message)
        # By the inner optimizer, which knows where its state belongs: torch's ZeRO forces `step` to the CPU, where
        # fused and capturable optimizers cannot use it, and keeps a second copy in the outer optimizer.
        self.optim.load_state_dict(self._own_part(state_dict))
        self.param_groups = [
            {**({"param_names": own["param_names"]} if "param_names" in own else {}), **group, "params": own["params"]}
            for group, own in zip(saved, self.param_groups, strict=True)
        ]
        self._all_state_dicts.clear()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _own_part(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        pairs = zip(state_dict["param_groups"], self.param_groups, strict=True)
        numbers = {p: number for saved, own in pairs for number, p in zip(saved["params"], own["params"], strict=True)}
        others = set(numbers.values())
        state = {key: value for key, value in state_dict["state"].items() if key not in others}
        groups = []
        for saved, own in zip(state_dict["param_groups"], self.optim.param_groups, strict=True):
            groups.append({**saved, "params": [numbers[p] for p in own["params"]]})
            state.update({n: state_dict["state"][n] for n in groups[-1]["params"] if n in state_dict["state"]})
        return {"state": state, "param_groups": groups}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, on all ranks.

        Args:
            param_group: ``params`` and the entries that differ from the defaults.

        Raises:
            ArgumentValueError: If its parameters cannot be sharded with the others.
        """
        if not self.initialized:  # torch's constructor adds the first ones
            super().add_param_group(param_group)
            return
        (group,) = as_groups([param_group])
        check_parameters([*self.param_groups, group])
        announce(f"add_param_group() of {_summary([group])}")
        super().add_param_group(group)
        # Torch leaves out what follows: frozen later, the new parameters would not be noticed.
        self._all_params.extend(group["params"])
        self._is_trainable_mask = self._get_is_trainable_mask()
        self._all_state_dicts.clear()

    def remove_last_param_group(self) -> None:
        """Undo :meth:`add_param_group`."""
        gone = self.param_groups.pop()
        self.optim.param_groups.pop()
        del self._all_params[len(self._all_params) - len(gone["params"]) :]
        self._is_trainable_mask = self._get_is_trainable_mask()
        self._clear_cache()

    def __reduce_ex__(self, _protocol: Any) -> NoReturn:
        message = (
            f"an optimizer that is sharded over ranks ({self.wrapped_class.__name__}, sharding='zero1') cannot be "
            "copied or pickled: it talks to the other ranks. Build another one on every rank and give it the state: "
            "other.load_state_dict(optimizer.state_dict()), the whole of which is on rank 0 alone"
        )
        raise ArgumentTypeError(message)


def shard(factory: Any, params: Any) -> ZeroOptimizer:
    """Make the optimizer that *factory* stands for, its state sharded over all ranks.

    Args:
        factory: An optimizer class, or a ``functools.partial`` of one with keywords.
        params: Parameters, ``(name, parameter)`` pairs, or param groups of either; the same on all ranks.

    Returns:
        An optimizer with the state of this rank's parameters.

    Raises:
        ArgumentTypeError: If *factory* does not say which class it makes, with which settings.
        ArgumentValueError: If its settings or *params* cannot be sharded.
        ClosureError: If the class needs a closure.
    """
    made, settings = _class_and_settings(factory)
    closure = inspect.signature(made.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        message = (
            f"{made.__name__} evaluates the loss in a closure, which would see parameters of other ranks as they were "
            "before the step; leave out sharding"
        )
        raise ClosureError(message)
    groups = as_groups(params)
    check_parameters(groups)
    # The partition follows from the parameters: where they differ, a rank would wait for what nobody sends.
    announce(f"sharding='zero1' of {_summary(groups)} for {made.__name__}")
    return ZeroOptimizer(groups, made, **settings)


def _class_and_settings(factory: Any) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    made, settings, args = factory, {}, ()
    if isinstance(factory, functools.partial):
        made, settings, args = factory.func, dict(factory.keywords), factory.args
    if not (isinstance(made, type) and issubclass(made, torch.optim.Optimizer)) or args:
        message = (
            f"sharding='zero1' must know the optimizer's class and settings, which {factory!r} does not tell; pass "
            "the class, or functools.partial(torch.optim.AdamW, lr=...) with keywords only"
        )
        raise ArgumentTypeError(message)
    if issubclass(made, ZeroRedundancyOptimizer):
        refuse_raw(made)
    taken = [key for key in settings if key in _ITS_OWN]
    if taken:
        message = (
            f"{taken[0]!r} is no setting of {made.__name__} that sharding='zero1' can have: its state is sharded over "
            "all ranks, after the backward pass; take it out of the functools.partial"
        )
        raise ArgumentValueError(message)
    return made, settings


def refuse_raw(made: type[torch.optim.Optimizer]) -> None:
    """Refuse torch's own ZeRO optimizer, whose state can neither be saved nor loaded exactly.

    Raises:
        ArgumentTypeError: If *made* is one, and not ours.
    """
    if issubclass(made, ZeroRedundancyOptimizer) and not issubclass(made, ZeroOptimizer):
        message = (
            "a ZeroRedundancyOptimizer cannot be wrapped as it is: its state_dict() is another one on every rank, and "
            "with overlap_with_ddp it drops steps. Let ice_engine make it: "
            "Optimizer(functools.partial(torch.optim.AdamW, lr=...), model.parameters(), sharding='zero1')"
        )
        raise ArgumentTypeError(message)


# -- params ---------------------------------------------------------------------------------------------------


def as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Return *params* as param groups of tensors, their names in ``param_names``: torch's ZeRO takes no pairs.

    Raises:
        ArgumentValueError: If there are none, or only some have a name.
    """
    given = list(params)
    groups = given if given and all(isinstance(entry, dict) for entry in given) else [{"params": given}]
    made = []
    for i, group in enumerate(groups):
        own = group["params"]
        entries = [own] if isinstance(own, torch.Tensor) else list(own)
        names = [entry[0] for entry in entries if isinstance(entry, tuple)]
        if names and len(names) < len(entries):
            message = f"of the {len(entries)} parameters of param group {i} {len(names)} have a name; give all or none"
            raise ArgumentValueError(message)
        tensors = [entry[1] for entry in entries] if names else entries
        made.append({**group, "params": tensors, **({"param_names": names} if names else {})})
    if not any(group["params"] for group in made):
        message = "there are no parameters to optimize; did you pass an iterator twice? Pass model.parameters()"
        raise ArgumentValueError(message)
    return made


def check_parameters(groups: list[dict[str, Any]]) -> None:
    """Refuse what cannot be sharded as whole tensors of one type.

    Raises:
        ArgumentTypeError: If something is no tensor.
        ArgumentValueError: If a parameter is sharded already, or they differ in type.
    """
    named = list(_named(groups))
    for name, p in named:
        if not isinstance(p, torch.Tensor):
            message = f"params must be parameters, pairs or groups, but {name!r} is {type(p).__name__}"
            raise ArgumentTypeError(message)
        if isinstance(p, DTensor):
            message = (
                f"{name!r} is a DTensor: fully_shard() shards parameters, gradients and optimizer state already; "
                "leave out sharding='zero1'"
            )
            raise ArgumentValueError(message)
        first, model = named[0]
        # Of one type only, as torch demands: with several it may cast one to the other, silently.
        if torch.typename(p.data) != torch.typename(model.data):
            message = (
                f"sharding='zero1' needs parameters of one dtype and device: {first!r} is "
                f"{torch.typename(model.data)}, {name!r} {torch.typename(p.data)}. Keep them in float32 and run "
                "the model under torch.autocast, or give each type an optimizer of its own"
            )
            raise ArgumentValueError(message)


def _named(groups: list[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    for i, group in enumerate(groups):
        places = [f"{PLACE}{i}.params.{j}" for j in range(len(group["params"]))]
        yield from zip(group.get("param_names") or places, group["params"], strict=True)


def _summary(groups: list[dict[str, Any]]) -> str:
    named = list(_named(groups))
    text = "\n".join(f"{name} {p.dtype} {tuple(p.shape)}" for name, p in named)
    return f"{len(named)} parameters, {named[0][0]!r} the first (checksum {zlib.crc32(text.encode()):08x})"
