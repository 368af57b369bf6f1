"""Which saved parameter is which of ours, and which saved param group a group of ours goes on from."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from ice_engine.errors import StateDictError
from ice_engine.names import PLACE, bare_name, class_name, few

_MOST = 5  # names in an error


@dataclass(frozen=True)
class LoadReport:
    """What became of a state dict that was loaded, by parameter name.

    Args:
        matched: Parameters that are here and there; they have their saved state, if they had one.
        new: Parameters that are only here, or have another shape there; they start without state.
        dropped: Parameters that are only in the state dict, or have another shape here; their state was left out.
        kept: Param groups that kept their own entries (``lr``, ``weight_decay``, ...), because no saved group
            was theirs. Empty unless parameters are grouped otherwise than they were saved.

    Examples:
        >>> print(LoadReport(matched=("body.weight",), new=("head.weight", "head.bias"), kept=("head",)))
        1 matched; 2 new: 'head.weight', 'head.bias'; kept their own entries: 'head'

    .. versionadded:: 0.1.0
    """

    matched: tuple[str, ...]
    new: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} matched"]
        parts += [f"{len(self.new)} new: {few(self.new)}"] if self.new else []
        parts += [f"{len(self.dropped)} dropped: {few(self.dropped)}"] if self.dropped else []
        parts += [f"kept their own entries: {few(self.kept)}"] if self.kept else []
        return "; ".join(parts)


@dataclass(frozen=True)
class _Side:
    """The parameters of one side, group by group: what they are called, and by what they are found."""

    names: list[list[str]]
    keys: list[list[str]]

    @cached_property
    def places(self) -> dict[str, tuple[int, int]]:
        return {key: (i, j) for i, keys in enumerate(self.keys) for j, key in enumerate(keys)}

    def name(self, key: str) -> str:
        i, j = self.places[key]
        return self.names[i][j]


def shapes(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, list[int]]:
    """Return the shape of each parameter whose name is its own, as plain data to be saved."""
    pairs = list(named)
    times = Counter(name for name, _ in pairs)
    return {name: list(p.shape) for name, p in pairs if times[name] == 1 and not is_lazy(p)}


def fit(
    optimizer: torch.optim.Optimizer,
    names: list[list[str]],
    plain: dict[str, Any],
    extra: Mapping[str, Any] | None,
    *,
    strict: bool,
    mend: str = "To load what fits and leave out the rest: optimizer.load_state_dict(state_dict, strict=False)",
) -> tuple[dict[str, Any], LoadReport]:
    """Rearrange a state dict so that torch, which goes by position, gives each parameter its own state.

    By name, if all parameters of both sides have one of their own; else by position. Changes nothing but
    what it returns.

    Args:
        optimizer: The torch optimizer that will load it.
        names: Of its parameters, group by group.
        plain: Torch's part of a state dict.
        extra: Our part, or None.
        strict: Refuse what does not match, instead of leaving it out.
        mend: What to do then, for the error.

    Returns:
        A state dict of *optimizer*'s groups, and the report.

    Raises:
        StateDictError: If it is of another class, if positions do not fit, or, when *strict*, if parameters are
            new, dropped or of another shape.
    """
    _check_class(optimizer, plain, extra)
    there, here = _sides(plain["param_groups"], names)
    resized = _resized(optimizer, there, here, (extra or {}).get("shapes", {}))
    matched = {key for key in here.places if key in there.places and key not in resized}
    new, dropped = ([key for key in side.places if key not in matched] for side in (here, there))
    if strict and (new or dropped):
        message = f"the state dict does not fit: {_misfit(there, here, new, dropped, resized)}. {mend}"
        raise StateDictError(message)
    sources = _sources(plain["param_groups"], optimizer.param_groups, there, here, matched)
    if here.keys != there.keys or resized:
        groups = _groups(optimizer, plain, sources, regrouped=not _same_partition(there, here))
        plain = {**plain, "state": _states(optimizer, plain, there, here, matched), "param_groups": groups}
    return plain, LoadReport(
        matched=tuple(here.name(key) for key in here.places if key in matched),
        new=tuple(map(here.name, new)),
        dropped=tuple(map(there.name, dropped)),
        kept=tuple(
            str(group.get("name", f"group_{i}")) for i, group in enumerate(optimizer.param_groups) if sources[i] is None
        ),
    )


def _check_class(optimizer: torch.optim.Optimizer, plain: dict[str, Any], extra: Mapping[str, Any] | None) -> None:
    saved_class, wrapped = (extra or {}).get("class"), class_name(optimizer)
    for i, group in enumerate(plain["param_groups"]):
        lacking = [key for key in optimizer.defaults if key not in group]
        if lacking and saved_class not in (None, wrapped):
            message = (
                f"the state dict is of {saved_class}, this wraps {wrapped}; param group {i} lacks {', '.join(lacking)}"
            )
            raise StateDictError(message)


# -- parameters -----------------------------------------------------------------------------------------------


def _sides(groups: Sequence[Mapping[str, Any]], names: list[list[str]]) -> tuple[_Side, _Side]:
    places = [[f"{PLACE}{i}.params.{j}" for j in range(len(group["params"]))] for i, group in enumerate(groups)]
    saved = [list(group.get("param_names") or own) for group, own in zip(groups, places, strict=True)]
    sizes = [len(own) for own in places]
    if [len(own) for own in saved] == sizes and not any(n.startswith(PLACE) for own in saved + names for n in own):
        for key in (bare_name, str):
            there, here = ([[key(name) for name in own] for own in side] for side in (saved, names))
            if all(max(Counter(chain.from_iterable(keys)).values(), default=1) == 1 for keys in (there, here)):
                return _Side(saved, there), _Side(names, here)
    if sizes != [len(own) for own in names]:
        named = (
            "; give this state the names that it lacks: plain = ice.Optimizer(torch.optim.AdamW("
            "model.named_parameters())), with the groups it was saved with; plain.load_state_dict(state); "
            "optimizer.load_state_dict(plain.state_dict())"
        )
        message = (
            f"the state dict's param groups have {sizes} parameters, the optimizer's {[len(own) for own in names]}; "
            "build the optimizer with the groups it was saved with, or, to load by name, from "
            f"model.named_parameters() or ice.param_groups(model, ...){named if saved == places else ''}"
        )
        raise StateDictError(message)
    saved = [own if len(own) == size else place for own, size, place in zip(saved, sizes, places, strict=True)]
    for i, (own, mine) in enumerate(zip(saved, names, strict=True)):
        for old, new in zip(own, mine, strict=True):
            if not (old.startswith(PLACE) or new.startswith(PLACE) or bare_name(old) == bare_name(new)):
                message = (
                    f"param group {i} of the state dict has {old!r} where the optimizer has {new!r}, and not all "
                    "parameters have names of their own to go by. Build the optimizer with the order it was saved with"
                )
                raise StateDictError(message)
    return _Side(saved, places), _Side(names, places)


def _resized(
    optimizer: torch.optim.Optimizer, there: _Side, here: _Side, old: Mapping[str, list[int]]
) -> dict[str, tuple[list[int], list[int]]]:
    own = shapes(
        (n, p) for i, ns in enumerate(here.names) for n, p in zip(ns, optimizer.param_groups[i]["params"], strict=True)
    )
    pairs = {key: (there.name(key), here.name(key)) for key in here.places if key in there.places}
    both = {key: (list(old[a]), own[b]) for key, (a, b) in pairs.items() if a in old and b in own}
    return {key: (before, now) for key, (before, now) in both.items() if before != now}


def _misfit(
    there: _Side,
    here: _Side,
    new: list[str],
    dropped: list[str],
    resized: Mapping[str, tuple[list[int], list[int]]],
) -> str:
    new, dropped = ([key for key in keys if key not in resized] for keys in (new, dropped))
    parts = [f"only the optimizer has {few([here.name(key) for key in new])}"] if new else []
    parts += [f"only the state dict has {few([there.name(key) for key in dropped])}"] if dropped else []
    parts += [
        f"{here.name(key)!r} had shape {(*old,)}, now {(*own,)}" for key, (old, own) in [*resized.items()][:_MOST]
    ]
    parts += [f"and {len(resized) - _MOST} more have another shape"] if len(resized) > _MOST else []
    return "; ".join(parts)


def _states(
    optimizer: torch.optim.Optimizer, plain: dict[str, Any], there: _Side, here: _Side, matched: set[str]
) -> dict[Any, Any]:
    # What is kept under no parameter's number is the optimizer's own. Stray numbers would now mean other parameters.
    numbers = {number for group in plain["param_groups"] for number in group["params"]}
    states = {k: value for k, value in plain["state"].items() if k not in numbers and not isinstance(k, int)}
    for number, (key, (i, j)) in enumerate(here.places.items()):
        if key in matched:
            group, place = there.places[key]
            saved = plain["param_groups"][group]["params"][place]
            if saved in plain["state"]:
                states[number] = plain["state"][saved]
        else:
            # Some optimizers, as older torch's Adagrad, make state when they are built and cannot step without.
            fresh = optimizer.state.get(optimizer.param_groups[i]["params"][j], {})
            if "step" in fresh and float(fresh["step"]) == 0:
                states[number] = fresh
    return states


# -- groups ---------------------------------------------------------------------------------------------------


def _same_partition(there: _Side, here: _Side) -> bool:
    return Counter(map(frozenset, there.keys)) == Counter(map(frozenset, here.keys))


def _sources(
    saved: Sequence[Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    there: _Side,
    here: _Side,
    matched: set[str],
) -> list[int | None]:
    """Return for each group the saved one whose entries it takes, None where it keeps its own."""
    if _same_partition(there, here):
        left: dict[frozenset[str], list[int]] = {}
        for i, keys in enumerate(there.keys):
            left.setdefault(frozenset(keys), []).append(i)
        return [left[frozenset(keys)].pop(0) for keys in here.keys]
    called, names = [g.get("name") for g in saved], [g.get("name") for g in groups]
    sources: list[int | None] = [
        called.index(name) if name is not None and called.count(name) == names.count(name) == 1 else None
        for name in names
    ]
    origins = [{there.places[key][0] for key in keys if key in matched} for keys in here.keys]
    # Of one saved group alone: two groups that were one differ in their entries, or they still were one.
    claims = Counter(
        next(iter(o)) for o, source in zip(origins, sources, strict=True) if source is None and len(o) == 1
    )
    for i, origin in enumerate(origins):
        if sources[i] is None and len(origin) == 1:
            (group,) = origin
            if claims[group] == 1 and group not in sources:
                sources[i] = group
    return sources


def _groups(
    optimizer: torch.optim.Optimizer, plain: dict[str, Any], sources: list[int | None], *, regrouped: bool
) -> list[dict[str, Any]]:
    made, first = [], 0
    for group, source in zip(optimizer.param_groups, sources, strict=True):
        own = {key: value for key, value in group.items() if key != "params"}
        entries = own if source is None else dict(plain["param_groups"][source])
        if regrouped and source is not None:
            # Its name and what its user added stay, but not a start value of an lr that is replaced.
            stays = {key: value for key, value in own.items() if not key.startswith("initial_")}
            entries = {**stays, **entries, **({"name": own["name"]} if "name" in own else {})}
        entries.pop("param_names", None)
        made.append({**entries, "params": list(range(first, first + len(group["params"])))})
        first += len(group["params"])
    return made
