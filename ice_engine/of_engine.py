"""What there is one of for each engine: made when it is first asked for, and kept on the engine, to live as long."""

from typing import Any, TypeVar

from ice_engine.errors import AttachError

T = TypeVar("T")

_KEPT = "_ice_kept"


class _Optimizers(list[Any]):
    """Those attached to an engine."""


def of_engine(engine: Any, kind: type[T], *args: Any) -> T:
    """Return the *kind* of *engine*; ``kind(*args)``, if there is none yet."""
    kept: dict[type[Any], Any] = vars(engine).setdefault(_KEPT, {})
    if kind not in kept:
        kept[kind] = kind(*args)
    found: T = kept[kind]
    return found


def optimizers_of(engine: Any) -> list[Any]:
    """Return the optimizers attached to *engine*, in that order: the list that attaching and detaching change."""
    return of_engine(engine, _Optimizers)


def require_attached(optimizer: Any, engine: Any) -> None:
    """Refuse *engine* for what an optimizer does elsewhere.

    Raises:
        AttachError: If *optimizer* is not attached to it.
    """
    if optimizer.engine is not engine:
        message = f"optimizer {optimizer.name!r} is not attached to this engine; call optimizer.attach(engine) before"
        raise AttachError(message)


def forget(engine: Any, kind: type[Any]) -> None:
    """Let the next :func:`of_engine` make a new one."""
    vars(engine).get(_KEPT, {}).pop(kind, None)
