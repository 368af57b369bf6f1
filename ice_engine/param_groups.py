"""Param groups by parameter name: ordered rules, and every parameter in exactly one group."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch.nn.parameter import is_lazy

from ice_engine.arguments import choice, number, positive
from ice_engine.errors import ArgumentTypeError, ArgumentValueError
from ice_engine.names import depths as depths_of
from ice_engine.names import few, likely, unwrapped

Frozen = Literal["keep", "drop", "error"]
NoWeightDecay: TypeAlias = Callable[[str, torch.nn.Parameter, torch.nn.Module], bool]

_NORM = re.compile(r"Norm(\dd)?$")  # of a class: LayerNorm, BatchNorm2d, a user's LlamaRMSNorm
_NO_DECAY = ".no_weight_decay"


@dataclass(frozen=True, eq=False)
class _Parameter:
    names: tuple[str, ...]  # several where weights are tied
    tensor: torch.nn.Parameter
    module: torch.nn.Module

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True, eq=False)
class _Rule:
    label: str  # how errors call it
    pattern: re.Pattern[str] | None  # None matches every name: the default
    name: str
    overrides: dict[str, Any]

    def matches(self, name: str) -> bool:
        return self.pattern is None or self.pattern.search(name) is not None


def param_groups(
    model: torch.nn.Module,
    rules: Mapping[str, Mapping[str, Any]] | None = None,
    default: Mapping[str, Any] | None = None,
    *,
    no_weight_decay: bool | NoWeightDecay = False,
    layers: str | None = None,
    layer_decay: float | None = None,
    frozen: Frozen = "keep",
) -> list[dict[str, Any]]:
    r"""Sort a model's parameters into named param groups, by rules on their names.

    The first rule whose pattern is found in a name (``re.search``) takes the parameter. A pattern that
    takes nothing and a parameter that no rule takes are errors, so a typo cannot train the wrong thing.

    Args:
        model: The module. Names are those of ``named_parameters()``, without the prefixes of
            DistributedDataParallel and ``torch.compile``.
        rules: Regular expression to the group's own entries, such as ``{r"^head\.": {"lr": 1e-3}}``. The group
            is called by its entry ``"name"``, else by the pattern.
        default: Entries of the group, called ``"default"``, of all that no rule takes; None: there must be none left.
            Rules take nothing from it but ``lr`` under *layer_decay*: what one leaves out is the optimizer's own.
        no_weight_decay: True gives biases, what belongs to a normalisation and what has at most one dimension
            weight decay 0, in groups of their own called ``"<name>.no_weight_decay"``; or a predicate
            ``(name, parameter, module) -> bool``, where *module* is the one that owns the parameter.
        layers: Regular expression with one group of digits, such as ``r"blocks\.(\d+)"``. Splits groups by
            distance from the top, in their names and as entry ``"depth"``: 0 after the last block (final norm,
            head), 1 the last block, L the first, L+1 before it (embeddings), all in the order of registration;
            what stands between two blocks belongs to the one before it.
        layer_decay: Multiplies the group's ``lr`` (or else that of *default*) by ``layer_decay ** depth``;
            above 0, at most 1. Needs *layers*, and then leaves out the entry ``"depth"``. Without it,
            :func:`ice.schedules.layer_decay <ice_engine.processors.scaling.layer_decay>` does the same from that entry.
        frozen: What becomes of parameters that require no grad: ``"keep"`` them, so that they can be unfrozen
            later, ``"drop"`` them, or ``"error"``.

    Returns:
        Param groups for any torch optimizer, with names of groups and parameters. They are in the order of the rules,
        the default last, inside a rule deepest first and decayed before not decayed, inside a group in the model's.

    Raises:
        ArgumentTypeError: If an argument has the wrong type.
        ArgumentValueError: If a pattern is invalid or takes nothing, a parameter is taken by no rule or, tied,
            by two, a name is given twice, a lazy parameter has no shape yet, or *layers* does not fit the model.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
        >>> groups = param_groups(model, {r"^2\.": {"name": "head", "lr": 1e-3}}, default={}, no_weight_decay=True)
        >>> for group in groups:
        ...     print(group["name"], [name for name, _ in group["params"]])
        head ['2.weight']
        head.no_weight_decay ['2.bias']
        default ['0.weight']
        default.no_weight_decay ['0.bias', '1.weight', '1.bias']
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.05)

    References:
        Bao et al., `BEiT <https://arxiv.org/abs/2106.08254>`_, 2021, whose layer numbering this is, from the top.

    .. versionadded:: 0.1.0
    """
    choice("frozen", frozen, ("keep", "drop", "error"))
    if not (isinstance(no_weight_decay, bool) or callable(no_weight_decay)):
        message = f"no_weight_decay must be True, False or a predicate, got {no_weight_decay!r}"
        raise ArgumentTypeError(message)
    spares = _spared if no_weight_decay is True else no_weight_decay or None
    table = _table(rules, default)
    parameters = _parameters(model)
    depths = {} if layers is None else depths_of([p.name for p in parameters], layers)
    decay = _decay(layer_decay, layers)
    kept = _thawed(parameters, frozen)
    _check_rules(table, parameters, kept)
    taken = _assign(table, kept)
    groups: list[dict[str, Any]] = []
    for rule in table:
        parts: dict[tuple[int, bool], list[_Parameter]] = {}
        for parameter in (p for p in kept if taken[p] is rule):
            splits = spares is not None and rule.overrides.get("weight_decay") != 0
            spared = splits and bool(spares(parameter.name, parameter.tensor, parameter.module))  # type: ignore[misc]
            parts.setdefault((-depths.get(parameter.name, 0), spared), []).append(parameter)
        for (height, spared), members in sorted(parts.items(), key=lambda part: part[0]):
            entries = _entries(rule, default or {}, -height if layers is not None else None, decay, spared=spared)
            groups.append({"params": [(p.name, p.tensor) for p in members], **entries})
    _check_unique([group["name"] for group in groups])
    return groups


# -- what is given --------------------------------------------------------------------------------------------


def _table(rules: Any, default: Any) -> list[_Rule]:
    if not isinstance(rules, Mapping | None):
        message = (
            f"rules must be a dict of patterns to overrides, got {rules!r}; such as {{r'^head\\.': {{'lr': 1e-3}}}}"
        )
        raise ArgumentTypeError(message)
    table = []
    for key, overrides in (rules or {}).items():
        where = f"rules[{key!r}]"
        if not isinstance(key, str):
            message = f"{where}: a pattern must be a string, got {type(key).__name__}"
            raise ArgumentTypeError(message)
        try:
            pattern = re.compile(key)
        except re.error as err:
            message = f"{where} is not a regular expression: {err}; escape a literal name with re.escape"
            raise ArgumentValueError(message) from err
        table.append(_rule(where, pattern, key, overrides))
    if default is not None:
        table.append(_rule("default", None, "default", default))
    _check_unique([rule.name for rule in table])
    return table


def _rule(where: str, pattern: re.Pattern[str] | None, name: str, overrides: Any) -> _Rule:
    if not isinstance(overrides, Mapping) or not all(isinstance(key, str) for key in overrides):
        message = f"{where} must be a dict of group entries by name, got {overrides!r}; such as {{'lr': 1e-3}}"
        raise ArgumentTypeError(message)
    ours = [key for key in ("params", "param_names") if key in overrides]
    if ours:
        message = f"{where} sets {ours[0]!r}, which comes from the model; leave it out, the pattern chooses parameters"
        raise ArgumentValueError(message)
    name = overrides.get("name", name)
    if not isinstance(name, str):
        message = f"{where}['name'] must be a string, got {name!r}"
        raise ArgumentTypeError(message)
    return _Rule(where, pattern, name, dict(overrides))


def _check_unique(names: Sequence[str]) -> None:
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        message = (
            f"two groups are called {twice[0]!r}; give each rule a 'name' of its own, or join their patterns: 'a|b'"
        )
        raise ArgumentValueError(message)


def _decay(layer_decay: Any, layers: str | None) -> float | None:
    if layer_decay is None:
        return None
    if layers is None:
        message = rf"layer_decay={layer_decay!r} needs layers=, such as layers=r'blocks\.(\d+)'"
        raise ArgumentValueError(message)
    if positive("layer_decay", layer_decay) > 1:
        message = f"layer_decay must be at most 1, got {layer_decay!r}"
        raise ArgumentValueError(message)
    return float(layer_decay)


# -- the model's parameters -----------------------------------------------------------------------------------


def _parameters(model: Any) -> list[_Parameter]:
    if not isinstance(model, torch.nn.Module):
        message = f"model must be a torch.nn.Module, got {type(model).__name__}"
        raise ArgumentTypeError(message)
    named = list(model.named_parameters(remove_duplicate=False))
    bare = unwrapped([name for name, _ in named])
    lazy = [name for name, (_, tensor) in zip(bare, named, strict=True) if is_lazy(tensor)]
    if lazy:
        message = f"{few(lazy)} of a lazy module have no shape yet; run a batch through the model first: model(batch)"
        raise ArgumentValueError(message)
    names: dict[torch.Tensor, list[str]] = {}
    for name, (_, tensor) in zip(bare, named, strict=True):
        names.setdefault(tensor, []).append(name)
    if not names:
        message = f"the model, {type(model).__name__}, has no parameters"
        raise ArgumentValueError(message)
    return [
        _Parameter(tuple(names[tensor]), tensor, model.get_submodule(name.rpartition(".")[0]))
        for name, tensor in model.named_parameters()
    ]


def _thawed(parameters: list[_Parameter], frozen: Frozen) -> list[_Parameter]:
    still = [p.name for p in parameters if not p.tensor.requires_grad]
    if frozen == "error" and still:
        message = f"{few(still)} require no grad; unfreeze them, or pass frozen='keep' or frozen='drop'"
        raise ArgumentValueError(message)
    kept = [p for p in parameters if p.tensor.requires_grad or frozen != "drop"]
    if not kept:
        message = (
            "frozen='drop' leaves nothing: no parameter of the model requires grad; unfreeze what shall be trained"
        )
        raise ArgumentValueError(message)
    return kept


def _spared(name: str, parameter: torch.nn.Parameter, module: torch.nn.Module) -> bool:
    own = name.rpartition(".")[2]
    is_bias = own == "bias" or own.startswith("bias_") or own.endswith("_bias")
    return is_bias or parameter.ndim <= 1 or any(_NORM.search(cls.__name__) for cls in type(module).__mro__)


# -- who takes what -------------------------------------------------------------------------------------------


def _taker(table: list[_Rule], name: str) -> _Rule | None:
    return next((rule for rule in table if rule.matches(name)), None)


def _check_rules(table: list[_Rule], parameters: list[_Parameter], kept: list[_Parameter]) -> None:
    names = [name for p in parameters for name in p.names]
    for rule in (rule for rule in table if rule.pattern is not None):
        if not any(map(rule.matches, names)):
            message = f"{rule.label} matches no parameter; {likely(rule.pattern.pattern, names)}"  # type: ignore[union-attr]
            raise ArgumentValueError(message)
        takers = [_taker(table, name) for p in kept for name in p.names if rule.matches(name)]
        if not takers:
            message = (
                f"{rule.label} matches frozen parameters only, and frozen='drop' leaves those out; "
                "unfreeze them first, pass frozen='keep', or leave out the rule"
            )
            raise ArgumentValueError(message)
        if rule not in takers:
            earlier = " and ".join(dict.fromkeys(taker.label for taker in takers if taker))
            message = (
                f"{rule.label} matches only parameters that {earlier} took, and the first match wins; "
                "put the narrower pattern first"
            )
            raise ArgumentValueError(message)


def _assign(table: list[_Rule], kept: list[_Parameter]) -> dict[_Parameter, _Rule]:
    taken, left = {}, []
    for parameter in kept:
        takers = [_taker(table, name) for name in parameter.names]
        for name, taker in zip(parameter.names, takers, strict=True):
            if taker is not takers[0]:
                first, other = (rule.label if rule else "no rule" for rule in (takers[0], taker))
                message = (
                    f"{parameter.name!r} ({first}) and {name!r} ({other}) are one tied parameter, which cannot be in "
                    "two groups; write one rule that matches both names: 'a|b'"
                )
                raise ArgumentValueError(message)
        if takers[0] is None:
            left.append(parameter.name)
        else:
            taken[parameter] = takers[0]
    if left:
        message = (
            f"no rule takes {few(left)}; pass default={{}} to train them with the optimizer's own settings, or add a "
            "rule for them"
        )
        raise ArgumentValueError(message)
    return taken


def _entries(
    rule: _Rule, default: Mapping[str, Any], depth: int | None, decay: float | None, *, spared: bool
) -> dict[str, Any]:
    entries = dict(rule.overrides)
    suffix = "" if depth is None else f".depth_{depth}"
    entries["name"] = f"{rule.name}{suffix}{_NO_DECAY if spared else ''}"
    if spared:
        entries["weight_decay"] = 0.0
    if depth is not None:
        if "depth" in rule.overrides:
            message = f"{rule.label} sets 'depth', and so does layers=; give one of them another name"
            raise ArgumentValueError(message)
        if decay is None:  # else lr has it already, and schedules.layer_decay() would decay it once more
            entries["depth"] = depth
    if decay is not None and depth is not None:
        lr = rule.overrides.get("lr", default.get("lr"))
        if lr is None:
            own = f"{rule.label} or to " if rule.pattern is not None else ""
            message = f"layer_decay needs an 'lr' to multiply; give one to {own}default={{'lr': 1e-3}}"
            raise ArgumentValueError(message)
        entries["lr"] = (lr if isinstance(lr, torch.Tensor) else number(f"{rule.label}['lr']", lr)) * decay**depth
    # Of its own in each group: a tensor is written in place, and one for two groups would be scheduled twice.
    return {key: _own(value) for key, value in entries.items()}


def _own(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
