"""MLflow's own pages, in a browser without a window, over what real trainings left."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.helpers.paths import REPO
from tests.helpers.recipes import QUICK, TINY
from yolo_lightning.cli.main import main

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--window-size=1400,1300",
]  # fmt: skip
CLOSE = "[data-component-id='mlflow.assistant.chat_panel.close']"
FOLDER = os.environ.get("SCREENSHOTS")
"""Where to keep pictures of the pages; none are kept where it is not set."""


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in FLAGS:
        options.add_argument(flag)
    window = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield window
    window.quit()


def free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory):
    """Two trainings of different seeds, and MLflow's pages over their store."""
    folder = tmp_path_factory.mktemp("dashboard")
    (folder / "recipes").symlink_to(REPO / "recipes")
    address = ""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for seed in (0, 1):
            assert main(["fit", *QUICK, *TINY, f"--seed_everything={seed}"]) == 0
        port = free_port()
        address = f"http://127.0.0.1:{port}"
        server = subprocess.Popen(
            [sys.executable, "-m", "yolo_lightning", "mlflow", "ui", "--port", str(port)],
            env={**os.environ, "PYTHONPATH": str(REPO)}, start_new_session=True,
        )  # fmt: skip
    try:
        wait_for(f"{address}/health")
        yield address, folder
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def wait_for(url: str) -> None:
    until = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            assert time.monotonic() < until, f"{url} does not answer"
            time.sleep(0.5)


def page(browser, url: str, *words: str, picture: str = "") -> str:
    """Open a page and wait for words on it; return all of its text."""
    browser.get("about:blank")
    # the pages of trainings, not those of language models
    browser.get(f"{url}{'&' if '?' in url else '?'}workflowType=machine_learning")
    until = time.monotonic() + 60
    while True:
        text = browser.find_element("tag name", "body").text
        missing = [word for word in words if word not in text]
        if not missing:
            break
        assert time.monotonic() < until, f"{missing} not on {url}: {text[:2000]}"
        time.sleep(0.3)
    if FOLDER and picture:
        for button in browser.find_elements("css selector", CLOSE):
            button.click()
        time.sleep(5)  # charts are drawn after their titles
        browser.save_screenshot(str(Path(FOLDER) / picture))
    return str(text)


def runs_of(folder: Path) -> list[tuple[str, str]]:
    store = sqlite3.connect(folder / "mlflow.db")
    found = store.execute("select run_uuid, name from runs order by start_time").fetchall()
    store.close()
    return found


def test_the_page_of_a_run_shows_its_note_figures_tags_data_and_model(browser, dashboard):
    address, folder = dashboard
    (run, name), _ = runs_of(folder)
    page(
        browser, f"{address}/#/experiments/1/runs/{run}",
        name, "Finished", "The paper's claim in miniature", "recipe", "shapes", "detector",
        "train/loss_coord", picture="run.png",
    )  # fmt: skip


def test_charts_and_pictures_are_among_the_metrics(browser, dashboard):
    address, folder = dashboard
    (run, _), _ = runs_of(folder)
    url = f"{address}/#/experiments/1/runs/{run}/model-metrics"
    page(browser, url, "train", "val/AP50", "images_per_s", "memory", picture="metrics.png")


def test_the_artifacts_open(browser, dashboard):
    address, folder = dashboard
    (run, _), _ = runs_of(folder)
    names = ("anchors", "batches", "checkpoints", "plots", "recipe", "tree")
    page(browser, f"{address}/#/experiments/1/runs/{run}/artifacts", *names)
    path = f"{address}/#/experiments/1/runs/{run}/artifacts/recipe/resolved.yaml"
    page(browser, path, "seed_everything", picture="artifacts.png")
    page(browser, f"{address}/#/experiments/1/runs/{run}/artifacts/plots/mistakes.jpg", "KB")
    widths = "return [...document.images].map(image => image.naturalWidth)"
    until = time.monotonic() + 30
    while max(browser.execute_script(widths), default=0) < 500:
        assert time.monotonic() < until, "the picture is not shown"
        time.sleep(0.2)


def test_the_compare_page_shows_what_differs(browser, dashboard):
    address, folder = dashboard
    (one, first), (other, second) = runs_of(folder)
    chosen = f"runs=%5B%22{one}%22,%22{other}%22%5D&experiments=%5B%221%22%5D"
    words = ("Comparing 2 Runs", first, second, "data.seed", "Show diff only", "speed/images_per_s")
    page(browser, f"{address}/#/compare-runs?{chosen}", *words, picture="compare.png")
