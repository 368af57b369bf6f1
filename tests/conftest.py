"""What every test starts from: a seed, one thread, no display."""

import logging
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("Agg")
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that a test starts, too
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["COVERAGE_PROCESS_CONFIG"] = ""  # not in those: they would take twice as long to import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pictures", type=Path, metavar="FOLDER", help="save there what the tests see in a browser")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish() -> None:
    """Save what coverage counted in this process: one that ends badly, or that xdist kills as too slow, loses it."""
    if coverage := sys.modules.get("coverage"):
        counting = coverage.Coverage.current()
        if counting is not None:
            counting.save()


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global generator is what libraries draw from
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _ignites_log() -> Iterator[None]:
    """Let a test silence Ignite's log, as where an exception is part of it, for itself alone."""
    yield
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("ignite") and isinstance(logger, logging.Logger):
            logger.disabled = False
