"""Random draws: held still for a comparison, and as they were afterwards."""

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ice_engine import random_state


@contextlib.contextmanager
def nothing_left_behind(model: torch.nn.Module, loss_fn: Any = None) -> Iterator[None]:
    """Give back the state of all random generators, and the gradients and buffers of *model*, whatever happens inside.

    Copies are what is run; but a loss may know the model itself, and reach it, or other modules that it closes over.
    """
    modules = {each: None for known in (model, *closed_over(loss_fn)) for each in known.modules()}
    state = random_state.capture()
    gradients = [(p, p.grad) for module in modules for p in module.parameters(recurse=False)]
    buffers = [(b, b.detach().clone()) for module in modules for b in module.buffers(recurse=False)]
    places = [(module._buffers, dict(module._buffers)) for module in modules]  # noqa: SLF001 - some assign new ones
    try:
        for p, _ in gradients:
            p.grad = None
        yield
    finally:
        random_state.restore(state)
        for p, gradient in gradients:
            p.grad = gradient
        for place, kept in places:
            place.update(kept)
        for buffer, value in buffers:
            if not _identical(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)


def closed_over(function: Any) -> list[torch.nn.Module]:
    """Return the modules that *function* closes over, which no copy of it has copies of."""
    found = []
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # an empty cell
            found += [cell.cell_contents] if isinstance(cell.cell_contents, torch.nn.Module) else []
    return found


def _identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(torch.nan_to_num(a, 0.5), torch.nan_to_num(b, 0.5)) if a.is_floating_point() else a.equal(b)


def seed(number: int = 0) -> None:
    """Let Python's, numpy's and torch's generators begin anew, as before every other micro-batch."""
    random.seed(number)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(number)
    torch.manual_seed(number)


def drawn_outside() -> bool:
    """Whether Python's or numpy's generator has moved since :func:`seed`; torch's are held still by :class:`Still`."""
    numpy = sys.modules.get("numpy")
    now = random.getstate(), numpy.random.random() if numpy is not None else None
    seed()
    return now != (random.getstate(), numpy.random.random() if numpy is not None else None)


class Still(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Replaces what torch draws at random by one value, the same for all samples: dropout keeps everything.

    Attributes:
        drawing: By path of the module in which something was drawn first: the name of the operation.
        narrowed: Types that floating point tensors were cast down to; they limit the precision.
    """

    supports_higher_order_operators = True

    def __init__(self, current: Callable[[], str | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._current = current
        self.drawing: dict[str, str] = {}
        self.narrowed: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()):
            return self._still(func, args, kwargs)
        out = func(*args, **kwargs)
        if getattr(func, "__name__", "").startswith("_to_copy"):
            source = args[0]
            if source.is_floating_point() and out.is_floating_point() and source.element_size() > out.element_size():
                self.narrowed.add(out.dtype)
        return out

    def _still(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        names = [argument.name for argument in func._schema.arguments]  # noqa: SLF001 - nowhere else
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        for chance in ("dropout_p", "dropout"):
            if chance in names:
                if given.get(chance, 0.0):
                    self._note(func)
                return func(**{**given, chance: 0.0})
        self._note(func)
        if "train" in names:
            return func(**{**given, "train": False})
        if given.get("generator") is not None:
            given["generator"] = None  # the caller's: not to be moved on
        return _settled(func, given)

    def _note(self, func: Any) -> None:
        if (path := self._current()) is not None:
            self.drawing.setdefault(path, func._schema.name.removeprefix("aten::").rstrip("_"))  # noqa: SLF001


def _settled(func: Any, given: dict[str, Any]) -> Any:
    """Return what *func* draws, with one value everywhere; the expected one where there is one."""
    name = func._schema.name.removeprefix("aten::")  # noqa: SLF001
    kind = name.rstrip("_")
    chance = given.get("p", given["self"] if name == "bernoulli" else 0.5)  # arguments at their defaults are left out
    if isinstance(chance, torch.Tensor):
        chance = chance.clone()  # may be what is drawn into
    if kind == "rrelu_with_noise":
        middle = (given.get("lower", 1 / 8) + given.get("upper", 1 / 3)) / 2
        return func(**{**given, "lower": middle, "upper": middle})
    first = given.get("self")
    out = func(**given)
    if kind == "randperm":
        return out.copy_(torch.arange(len(out), device=out.device).roll(1))  # every sample meets another one
    if kind == "multinomial" and isinstance(first, torch.Tensor):
        return out.copy_(first.argmax(-1, keepdim=True).expand_as(out))
    if kind == "bernoulli":
        value: Any = chance
    elif kind == "uniform":
        value = (given.get("from", 0.0) + given.get("to", 1.0)) / 2
    elif kind.startswith("normal"):
        value = given.get("mean", 0.0)
    elif kind.startswith("randint"):
        value = (given.get("low", 0) + given["high"]) // 2
    else:
        value = {"rand": 0.5, "rand_like": 0.5, "randn": 0.0, "randn_like": 0.0}.get(kind, 1.0)
    return out.copy_(value) if isinstance(value, torch.Tensor) else out.fill_(value)
