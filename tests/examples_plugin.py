"""Runs every example: the Python blocks of README.md and docs/*.md, and what stands in docstrings.

A document is one namespace, run from top to bottom in a temporary directory of its own. Nothing is seeded: an example
that prints a random number must seed itself, or its reader sees another number. What is needed but not worth showing
goes into ``<!-- invisible-code-block: python ... -->``.
"""

import builtins
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sybil import Sybil
from sybil.integration.pytest import SybilItem
from sybil.parsers import myst, rest

ROOT = Path(__file__).resolve().parents[1]

# The root is on the path so that `tests` can be imported. Last, so that an installed wheel is what gets tested.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT] + [str(ROOT)]


def _directories() -> tuple[Callable[[dict[str, Any]], None], Callable[[dict[str, Any]], None]]:
    """Enter a temporary directory before a document, and leave and remove it afterwards."""
    entered: list[tuple[str, tempfile.TemporaryDirectory[str]]] = []

    def setup(_: dict[str, Any]) -> None:
        directory = tempfile.TemporaryDirectory(prefix="ice_engine-example-")
        entered.append((os.getcwd(), directory))  # noqa: PTH109 - handed back to os.chdir
        os.chdir(directory.name)

    def teardown(_: dict[str, Any]) -> None:
        home, directory = entered.pop()
        os.chdir(home)
        directory.cleanup()
        vars(builtins).pop("_", None)  # a >>> leaves its last value there, which tests that run later would see

    return setup, teardown


_setup, _teardown = _directories()

# Paths are absolute: Sybil silently collects nothing from a relative one.
_pages = Sybil(
    parsers=[myst.PythonCodeBlockParser(), myst.SkipParser()],
    path=str(ROOT),
    patterns=["README.md", "docs/*.md"],
    setup=_setup,
    teardown=_teardown,
)
_docstrings = Sybil(  # .py files are read by Sybil's PythonDocStringDocument
    parsers=[rest.DocTestParser(), rest.PythonCodeBlockParser()],
    path=str(ROOT / "ice_engine"),
    pattern="*.py",
    setup=_setup,
    teardown=_teardown,
)

pytest_collect_file = (_pages + _docstrings).pytest()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put examples back in reading order, after pytest-randomly has shuffled everything."""

    def place(item: pytest.Item) -> tuple[str, int]:
        return (str(item.path), item.example.region.start) if isinstance(item, SybilItem) else ("", 0)

    items.sort(key=place)
