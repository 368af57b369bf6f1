"""An object of the user's, by where it is: ``train:optimizer`` or ``train:make_optimizer``."""

import importlib
import inspect
import operator
import traceback
from typing import Any

from ice_engine.errors import ArgumentValueError


def load_object(path: str) -> Any:
    """Import a module and return an object of it.

    Args:
        path: ``module:object``, both dotted if need be; the module is looked for as ``import`` does.

    Returns:
        The object itself; a function is not called.

    Raises:
        ArgumentValueError: If *path* is no such path, the module cannot be imported, or it has no such object.

    Examples:
        >>> load_object("math:pi")
        3.141592653589793
    """
    module_name, colon, name = path.partition(":")
    if not (colon and module_name and name):
        message = f"{path!r} is no module:object; write the module, a colon and the object, such as train:optimizer"
        raise ArgumentValueError(message)
    if "/" in module_name or module_name.endswith(".py"):
        dotted = module_name.removeprefix("./").removesuffix(".py").replace("/", ".")
        message = f"{module_name!r} is a file; name the module as import does: {dotted}:{name}"
        raise ArgumentValueError(message)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        message = f"cannot import {module_name!r}: {told(error)}"
        raise ArgumentValueError(message) from error
    try:
        return operator.attrgetter(name)(module)
    except AttributeError as error:
        names = [n for n, value in vars(module).items() if not n.startswith("_") and _is_own(value, module_name)]
        message = f"module {module_name!r} has no {name!r}; it has: {', '.join(names) or 'nothing of its own'}"
        raise ArgumentValueError(message) from error


def call(function: Any, path: str) -> Any:
    """Return what *function*, which *path* leads to, returns without arguments.

    Raises:
        ArgumentValueError: If it raises, or needs arguments.
    """
    try:
        return function()
    except (Exception, SystemExit) as error:
        message = f"{path}() raised {told(error)}; it is called without arguments"
        raise ArgumentValueError(message) from error


def told(error: BaseException) -> str:
    """Return an exception and where it was raised, in one line."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if len(frames) > 1 else ""
    return f"{type(error).__name__}: {error}{place}"


def _is_own(value: Any, module_name: str) -> bool:
    """Whether a module's attribute is not merely imported into it."""
    if inspect.isclass(value) or inspect.isroutine(value):
        return value.__module__ == module_name
    return not inspect.ismodule(value)
