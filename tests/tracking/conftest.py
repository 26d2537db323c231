"""A working folder and a store for loggers without upload threads; some files have their own."""

from pathlib import Path

import pytest

from tests.helpers import tracked
from tests.helpers.tracked import fresh_store


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder; loggers have no upload thread, each test uploads itself."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    tracked.disable_threads(monkeypatch)
    return tmp_path


@pytest.fixture
def store(folder: Path) -> str:
    return fresh_store(folder)


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return tracked.collect_warnings(monkeypatch)
