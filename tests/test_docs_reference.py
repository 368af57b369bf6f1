"""docs/reference.md: every public name stands in its table, and where the name was made is documented below."""

import inspect
import re
from pathlib import Path

import pytest

import ice_engine as ice
from ice_engine import errors, typing
from ice_engine.processors import schedules

PAGE = (Path(__file__).resolve().parents[1] / "docs/reference.md").read_text()
ROWS = dict(re.findall(r"^\| \{py:obj\}`ice\.(\w+) <([\w.]+)>` \|", PAGE, re.MULTILINE))
MODULES = {  # with the names that are listed, or all
    module: re.findall(r"\w+", listed)
    for module, listed in re.findall(r"automodule:: (\S+)\n(?!   :no-m)(?:   :members: (.*))?", PAGE)
}


def place(thing: object) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"  # type: ignore[attr-defined]


def test_the_table_has_every_public_name_and_no_other():
    assert {*ROWS, "schedules"} == set(ice.__all__)
    assert "| [`ice.schedules`](#schedules) |" in PAGE


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_row_leads_to_where_the_name_is_documented(name):
    thing = getattr(ice, name)
    assert ROWS[name] == (f"{typing.__name__}.{name}" if name in vars(typing) else place(thing))
    assert name in (MODULES[ROWS[name].rpartition(".")[0]] or [name])
    assert inspect.getdoc(thing) or name in vars(typing)  # a type alias has none


@pytest.mark.parametrize("module", [schedules, errors], ids=lambda module: module.__name__)
def test_every_schedule_and_every_error_is_documented(module):
    public = {name: thing for name, thing in vars(module).items() if not name.startswith("_") and inspect.getdoc(thing)}
    made_here = {thing for thing in public.values() if getattr(thing, "__module__", "").startswith("ice_engine")}
    assert len(made_here) > 10
    assert [thing for thing in made_here if thing.__module__ not in MODULES] == []
