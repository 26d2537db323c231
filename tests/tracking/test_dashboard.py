"""MLflow's pages for the runs of real trainings, in a headless browser."""

import os
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

CLOSE = "[data-component-id='mlflow.assistant.chat_panel.close']"
SCREENSHOT_FOLDER = os.environ.get("SCREENSHOTS")
"""Folder for screenshots of the pages; none are saved if it is not set."""


def free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory):
    """The address of the MLflow UI, and the folder of two trainings with different seeds."""
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
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            assert time.monotonic() < deadline, f"{url} does not respond"
            time.sleep(0.5)


def page(browser, url: str, *words: str, screenshot: str = "") -> str:
    """Open a page, wait until it shows all words, and return its text."""
    browser.get("about:blank")
    # the pages for model training, not those for language models
    browser.get(f"{url}{'&' if '?' in url else '?'}workflowType=machine_learning")
    deadline = time.monotonic() + 60
    while True:
        text = browser.find_element("tag name", "body").text
        missing = [word for word in words if word not in text]
        if not missing:
            break
        assert time.monotonic() < deadline, f"{missing} not on {url}: {text[:2000]}"
        time.sleep(0.3)
    if SCREENSHOT_FOLDER and screenshot:
        for button in browser.find_elements("css selector", CLOSE):
            button.click()
        time.sleep(5)  # charts are drawn after their titles
        browser.save_screenshot(str(Path(SCREENSHOT_FOLDER) / screenshot))
    return str(text)


def find_runs(folder: Path) -> list[tuple[str, str]]:
    store = sqlite3.connect(folder / "mlflow.db")
    runs = store.execute("select run_uuid, name from runs order by start_time").fetchall()
    store.close()
    return runs


def test_run_page_shows_description_metrics_tags_datasets_and_model(browser, dashboard):
    address, folder = dashboard
    (run, name), _ = find_runs(folder)
    page(
        browser, f"{address}/#/experiments/1/runs/{run}",
        name, "Finished", "The paper's claim in miniature", "recipe", "shapes", "detector",
        "train/loss_coord", screenshot="run.png",
    )  # fmt: skip


def test_metrics_page_shows_charts_and_images(browser, dashboard):
    address, folder = dashboard
    (run, _), _ = find_runs(folder)
    url = f"{address}/#/experiments/1/runs/{run}/model-metrics"
    page(browser, url, "train", "val/AP50", "images_per_s", "memory", screenshot="metrics.png")


def test_artifacts_page_shows_files(browser, dashboard):
    address, folder = dashboard
    (run, _), _ = find_runs(folder)
    names = ("anchors", "batches", "checkpoints", "plots", "recipe", "tree")
    page(browser, f"{address}/#/experiments/1/runs/{run}/artifacts", *names)
    path = f"{address}/#/experiments/1/runs/{run}/artifacts/recipe/resolved.yaml"
    page(browser, path, "seed_everything", screenshot="artifacts.png")
    page(browser, f"{address}/#/experiments/1/runs/{run}/artifacts/plots/errors.jpg", "KB")
    widths = "return [...document.images].map(image => image.naturalWidth)"
    deadline = time.monotonic() + 30
    while max(browser.execute_script(widths), default=0) < 500:
        assert time.monotonic() < deadline, "the image is not shown"
        time.sleep(0.2)


def test_compare_page_shows_different_parameters(browser, dashboard):
    address, folder = dashboard
    (one, first), (other, second) = find_runs(folder)
    chosen = f"runs=%5B%22{one}%22,%22{other}%22%5D&experiments=%5B%221%22%5D"
    words = ("Comparing 2 Runs", first, second, "data.seed", "Show diff only", "speed/images_per_s")
    page(browser, f"{address}/#/compare-runs?{chosen}", *words, screenshot="compare.png")
