"""What the README promises about itself."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "python3 -m venv .venv && .venv/bin/pip install tox && .venv/bin/tox run -e "


def lines(file: str) -> list[str]:
    return (ROOT / file).read_text().splitlines()


@pytest.mark.parametrize("environment", ["demo", "tests"])
def test_readme_has_the_command_on_one_line(environment):
    assert COMMAND + environment in lines("README.md")


def test_ci_runs_the_test_command_of_the_readme():
    assert f"test_command='{COMMAND}tests'" in lines(".ci/run")


def test_readme_stays_below_120_lines():
    assert len(lines("README.md")) < 120
