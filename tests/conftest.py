"""Shared fixtures."""

import shlex
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.commands import header_commands
from tests.helpers.images import write_image
from tests.helpers.miniatures import save_grey
from tests.helpers.paper_data import write_paper_data
from tests.helpers.paths import REPO, SHARED_DATA
from yolo_lightning.cli.main import main

torch.set_num_threads(1)
# a shell starts its background jobs with Ctrl-C ignored, and their children inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)

BROWSER_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--window-size=1400,1300",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_external_connections(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test that connects to another machine, in any thread."""
    connect = socket.socket.connect
    external: list[Any] = []

    def checked_connect(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else "127.0.0.1"
        if host not in ("127.0.0.1", "::1", "localhost"):
            external.append(address)
            raise OSError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", checked_connect)
    yield
    assert not external


@pytest.fixture(autouse=True, scope="session")
def temporary_index_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the indices of read-only datasets out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def reports() -> None:
    """Request the validation reports and curves, which `workplace` disables otherwise."""


@pytest.fixture
def workplace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Path:
    """A temporary working folder with a link to the recipes.

    Validation reports and curves, which take a second each, need the fixture `reports`. MLflow
    stores are copied, as MLflow takes a second to create one.
    """
    from tests.helpers.tracked import copy_tables

    monkeypatch.setattr("mlflow.store.db.utils._initialize_tables", copy_tables)
    if "reports" not in request.fixturenames:
        from yolo_lightning.callbacks import ResultsTable, ValidationReport

        monkeypatch.setattr(ResultsTable, "_draw", lambda *_: None)
        monkeypatch.setattr(ValidationReport, "on_train_end", lambda *_: None)
    (tmp_path / "recipes").symlink_to(REPO / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in BROWSER_FLAGS:
        options.add_argument(flag)
    window = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield window
    window.quit()


@pytest.fixture
def real_data() -> Path:
    """The folder of real datasets."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the real datasets are not installed")
    return SHARED_DATA


@pytest.fixture(scope="session")
def paper_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], Path]:
    """Write the datasets, and build the trees with the commands at the top of the recipes."""
    root = tmp_path_factory.mktemp("paper")
    variables = write_paper_data(root)
    commands = {
        command.replace("$IMAGENET22K", variables["IMAGENET22K"])
        for recipe in (REPO / "recipes").rglob("*.yaml")
        for command in header_commands(recipe.read_text(encoding="utf-8"))
        if command.startswith("yolo-lightning wordtree build ")
    }
    (root / "recipes").symlink_to(REPO / "recipes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for command in sorted(commands):
            assert main(shlex.split(command)[1:]) == 0
    # pooch, beyond the top 9,000
    save_grey(Path(variables["IMAGENET22K"]) / "n02084732/n02084732_1.JPEG")
    return variables, root / "datasets"


@pytest.fixture
def paper(
    paper_data: tuple[dict[str, str], Path], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A working folder with the datasets of the paper in miniature, and the trees."""
    variables, trees = paper_data
    (workplace / "datasets").symlink_to(trees)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    yield workplace
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


Box = tuple[str, float, float, float, float]


@pytest.fixture
def known_step_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `init` measure half a second per step, and find no pretrained weights by itself."""
    from yolo_lightning.cli.commands import init_defaults

    monkeypatch.setattr(
        init_defaults, "measure_step", lambda _network, _size, images, *_: images / 32
    )
    for variable, _ in init_defaults.WEIGHTS.values():
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def write_voc() -> Callable[..., Path]:
    """Return a function that writes a VOC annotation and its image."""

    def write(
        folder: Path,
        name: str,
        boxes: list[Box],
        size: tuple[int, int] = (64, 48),
        stated: tuple[int, int] | None = None,
        difficult: int = 0,
        images: str = "",
    ) -> Path:
        write_image(folder / images / f"{name}.jpg", *size)
        width, height = stated or size
        objects = "".join(
            f"<object><name>{label}</name><difficult>{difficult}</difficult><bndbox>"
            f"<xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            for label, x1, y1, x2, y2 in boxes
        )
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{name}.xml"
        file.write_text(
            f"<annotation><filename>{name}.jpg</filename><size><width>{width}</width>"
            f"<height>{height}</height></size>{objects}</annotation>"
        )
        return file

    return write
