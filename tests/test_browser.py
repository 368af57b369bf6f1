"""The demo's run as TensorBoard shows it in a real browser, headless Chromium; with --pictures, as the pages show it.

What is drawn is held against the run's event files, as TensorBoard's own reader reads them.
"""

import io
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]
PATIENCE = 60.0  # seconds, for a server to start and for a page to be drawn
FIND = """
const found = [];
const walk = root => {
  for (const element of root.querySelectorAll("*")) {
    if (element.matches(arguments[0])) found.push(element);
    if (element.shadowRoot) walk(element.shadowRoot);
  }
};
walk(arguments[1] ? arguments[1].shadowRoot ?? arguments[1] : document);
"""  # what TensorBoard shows is in shadow roots, into which no selector looks


def until(condition: Callable[[], Any], what: str) -> Any:
    """Return what *condition* returns as soon as that is true."""
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, f"{what} did not come within {PATIENCE:.0f} s"
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the demo's curves."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, str(ROOT / "examples/digits.py"), "--out", "digits"]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "COVERAGE_PROCESS_CONFIG": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return folder / "digits/tensorboard"


@pytest.fixture(scope="module")
def written(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run), size_guidance={"scalars": 0, "tensors": 0}).Reload()


@pytest.fixture(scope="module")
def address(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where TensorBoard serves the run."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", run.parent.name, "--port", "0"]  # 0: a free one
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file, subprocess.Popen(command, cwd=run.parents[1], stdout=file, stderr=file) as server:
        try:
            found = until(lambda: re.search(r"http://localhost:\d+/", log.read_text()), "TensorBoard's address")[0]
            tags = f"{found}data/plugin/scalars/tags"
            until(lambda: b"training/loss" in urllib.request.urlopen(tags, timeout=10).read(), "the run")  # noqa: S310
            yield found
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: tox run -e pictures")
    if not (CHROMIUM and DRIVER):
        pytest.skip("there is no chromium and chromedriver: sudo .ci/browser installs them")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for flag in [*FLAGS, f"--user-data-dir={profile}", "--window-size=1800,1500"]:
        options.add_argument(flag)
    service = webdriver.chrome.service.Service(DRIVER)
    with webdriver.Chrome(options=options, service=service) as driver:
        driver.set_page_load_timeout(PATIENCE)
        yield driver


class Page:
    """A tab of TensorBoard in the browser."""

    def __init__(self, browser: Any, address: str, tab: str) -> None:
        self._browser = browser
        browser.get("about:blank")  # else it is only another anchor of the page that is there
        browser.get(f"{address}#{tab}")

    def find(self, selector: str, inside: Any = None, returns: str = "e") -> list[Any]:
        """Return what *returns* says of each element e, in shadow roots, too."""
        found: list[Any] = self._browser.execute_script(f"{FIND} return found.map(e => {returns})", selector, inside)
        return found

    def texts(self, selector: str, inside: Any = None) -> list[str]:
        return [" ".join(text.split()) for text in self.find(selector, inside, "e.textContent")]

    def picture(self, folder: Path | None, name: str, height: int) -> None:
        """Save what is seen, if the pictures are asked for."""
        if folder is not None:
            self._browser.set_window_size(1800, height)
            time.sleep(2)  # charts are drawn anew for the size
            folder.mkdir(parents=True, exist_ok=True)
            seen = Image.open(io.BytesIO(self._browser.get_screenshot_as_png()))
            seen.convert("RGB").quantize(128).save(folder / f"{name}.png", optimize=True)  # a third of the size


@pytest.fixture
def pictures(request: pytest.FixtureRequest) -> Path | None:
    return request.config.getoption("--pictures")


CHARTS = {
    "loss": ["training/loss", "validation/loss"],
    "accuracy": ["validation/accuracy"],
    "lr": ["optimizer/lr/group_0", "plan/optimizer/lr/group_0"],
    "gradient norm, before and after clipping": ["optimizer/clipped_norm", "optimizer/grad_norm"],
    "skipped steps": ["optimizer/skipped"],
    "loss scale": ["optimizer/loss_scale"],
    "items behind a step": ["optimizer/weight"],
    "items per second": ["optimizer/items_per_second"],
    "seconds of a window": ["optimizer/time/compute", "optimizer/time/data", "optimizer/time/step"],
    "memory in MiB": ["memory/host"],
}


def points(path: str) -> int:
    """How many points a line of SVG goes through."""
    return path.count("L") + path.count("M")


def test_the_dashboard_opens_and_every_curve_is_drawn(browser, address, written, pictures):
    page = Page(browser, address, "custom_scalars")
    card = "tf-custom-scalar-multi-line-chart-card"

    def drawn() -> dict[str, tuple[list[str], list[int]]] | None:
        found = {}
        for chart in page.find(card):
            (title,) = page.texts(".heading-label", chart) or ("",)
            tags = sorted(text.split(" ")[1] for text in page.texts(".match-list-entry", chart))
            # A line as it is and one that is smoothed, of each curve.
            lines = sorted(points(path) for path in page.find("path.line", chart, "e.getAttribute('d') ?? ''"))
            found[title] = tags, lines
        wanted = sum(2 * len(tags) for tags in CHARTS.values())
        return found if sum(n > 1 for _, lines in found.values() for n in lines) == wanted else None

    found = until(drawn, "every curve")
    assert {title: tags for title, (tags, _) in found.items()} == CHARTS
    assert list(found) == list(CHARTS)
    for title, (tags, lines) in found.items():
        there = sorted([len(written.Scalars(tag)) for tag in tags] * 2)
        # Of points on the same pixels, and beyond the chart, some are left out.
        assert all(0.8 * n <= drawn <= n for drawn, n in zip(lines, there, strict=True)), (title, lines, there)
    assert sorted(tag for tags in CHARTS.values() for tag in tags) == sorted(written.Tags()["scalars"])

    for button in page.find(".toggle-matches-button"):
        browser.execute_script("arguments[0].click()", button)  # which curve has which mark
    page.picture(pictures, "dashboard", 1800)


def test_the_hparams_tab_has_the_run_with_its_settings_and_last_metrics(browser, address, written, pictures):
    page = Page(browser, address, "hparams")
    cells = until(lambda: "AdamW" in (found := page.texts("vaadin-grid-cell-content")) and found, "the row")
    for metric in ("accuracy", "loss"):
        assert f"{written.Scalars(f'validation/{metric}')[-1].value:.5g}" in cells
    assert {"AdamW", "0.0040000", "4.0000", "(0.9, 0.999)"} <= set(cells)
    page.picture(pictures, "hparams", 800)


def test_the_text_tab_has_the_configuration_as_a_table_and_the_optimizer(browser, address, pictures):
    page = Page(browser, address, "text")
    rows = until(lambda: page.texts("tr")[1:], "the table")
    assert "epochs 20" in rows
    assert "iterations per epoch 45" in rows
    (code,) = page.texts("code")
    assert code.startswith("Optimizer(name='optimizer', accumulation_steps=4, clip=clip_norm(1.0), processors=[warmup(")
    assert "param_names: ['0.weight'," in code
    page.picture(pictures, "text", 700)
