"""What is to be done when a run is left, however it ends: Ignite's own exception event would swallow the exception."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from ignite.engine import Engine

Ending = Callable[[BaseException | None], None]


def when_left(engine: Engine, ending: Ending) -> Callable[[], None]:
    """Call *ending* whenever ``engine.run()`` returns or raises, with what it raised; the first one added first.

    An ending may raise an error of its own; all others are called all the same.

    Returns:
        What takes *ending* off again.
    """
    kept: dict[str, Any] = vars(engine)
    if "_ice_endings" not in kept:
        endings: list[Ending] = []
        kept["_ice_endings"] = endings
        engine.run = functools.wraps(engine.run)(functools.partial(_run, engine.run, endings))  # type: ignore[method-assign]
    kept["_ice_endings"].append(ending)
    return functools.partial(kept["_ice_endings"].remove, ending)


def _run(run: Callable[..., Any], endings: list[Ending], *args: Any, **kwargs: Any) -> Any:
    with contextlib.ExitStack() as stack:
        for ending in reversed(endings):
            stack.push(functools.partial(_call, ending))
        return run(*args, **kwargs)


def _call(ending: Ending, _: Any, error: BaseException | None, __: Any) -> None:
    ending(error)
