"""The pictures of the documentation: a command draws them all, and each one is shown somewhere.

Screenshots are made by tests/test_browser.py; `tox run -e pictures` makes both.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = [DOCS.parent / "README.md", *DOCS.glob("*.md")]


def shown() -> set[Path]:
    """Every picture that a page shows."""
    links = ((page, link) for page in PAGES for link in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text()))
    return {(page.parent / link).resolve() for page, link in links}


def test_every_picture_that_is_shown_is_there_and_every_one_there_is_shown() -> None:
    assert shown() == {
        *DOCS.glob("*.png"),
        *(DOCS / "figures").iterdir(),
        *(DOCS / "screenshots").iterdir(),
        *(DOCS / "measured").glob("*.png"),
    }


def test_every_picture_says_in_words_what_it_shows() -> None:
    for page in PAGES:
        for words in re.findall(r"!\[([^\]]*)\]\(", page.read_text()):
            assert len(words.split()) >= 5, (page.name, words)


@pytest.mark.timeout(300)
def test_the_command_draws_every_picture_of_the_figures_folder(tmp_path: Path) -> None:
    command = [sys.executable, str(DOCS / "figures.py"), str(tmp_path / "figures")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    drawn = sorted((tmp_path / "figures").iterdir())
    assert [path.name for path in drawn] == sorted(path.name for path in (DOCS / "figures").iterdir())
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < 150_000
