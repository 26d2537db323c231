"""Shared fixtures."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.images import write_image
from tests.helpers.paths import REPO, SHARED_DATA

torch.set_num_threads(1)


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
    """Request the validation reports, which `workplace` disables otherwise."""


@pytest.fixture
def workplace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Path:
    """A temporary working folder with a link to the recipes.

    Validation reports, which take a second each, are only written with the fixture `reports`.
    """
    if "reports" not in request.fixturenames:
        from yolo_lightning.callbacks import ValidationReport

        monkeypatch.setattr(ValidationReport, "on_train_end", lambda *_: None)
    (tmp_path / "recipes").symlink_to(REPO / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.fixture
def real_data() -> Path:
    """The folder of real datasets."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the real datasets are not installed")
    return SHARED_DATA


Box = tuple[str, float, float, float, float]


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
