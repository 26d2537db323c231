"""Creation of `mlflow.db`: a kill at any moment leaves a store that the next process opens."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow.store.db import utils as db_utils
from mlflow.tracking import MlflowClient
from sqlalchemy import Engine

from tests.helpers.paths import REPO
from tests.helpers.tracked import empty_store, fresh_store
from yolo_lightning.tracking.store import create_client

CREATE = (
    "import sys; from yolo_lightning.tracking.store import create_client; print('x', flush=True);"
    "create_client(sys.argv[1]).search_experiments(); print('done', flush=True)"
)


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which creating the store was interrupted after its first tables."""
    file = tmp_path / "mlflow.db"

    def fail(engine: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(db_utils, "_upgrade_db", fail)
        with pytest.raises(KeyboardInterrupt):
            create_client(f"sqlite:///{file}")
    return file


def test_an_interrupted_creation_leaves_no_store_and_is_repeated(interrupted, monkeypatch):
    complete = empty_store()

    def initialize(engine: Engine) -> None:  # the real one takes seconds
        assert not Path(str(engine.url.database)).exists()
        Path(str(engine.url.database)).write_bytes(complete)

    monkeypatch.setattr(db_utils, "_initialize_tables", initialize)
    assert not interrupted.exists()
    (part,) = interrupted.parent.glob(".mlflow.db.part")
    Path(f"{part}-journal").write_bytes(b"left by a killed process")
    client = create_client(f"sqlite:///{interrupted}")
    assert [e.name for e in client.search_experiments()] == ["Default"]
    assert sorted(path.name for path in interrupted.parent.iterdir()) == [
        "mlflow.db", "mlflow.db.lock"
    ]  # fmt: skip
    database = sqlite3.connect(interrupted)
    assert database.execute("pragma integrity_check").fetchone() == ("ok",)
    database.close()


def test_an_existing_store_is_not_created_again(tmp_path, monkeypatch):
    uri = fresh_store(tmp_path)
    monkeypatch.setattr(db_utils, "_initialize_tables", lambda engine: pytest.fail("created"))
    before = (tmp_path / "mlflow.db").stat()
    assert create_client(uri).search_experiments()
    after = (tmp_path / "mlflow.db").stat()
    assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size)


def start(file: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", CREATE, f"sqlite:///{file}"], stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(REPO)}, cwd=file.parent,
    )  # fmt: skip


@pytest.mark.slow
def test_a_kill_at_any_moment_of_the_creation_leaves_a_store_that_opens(tmp_path):
    moments = random.Random(0)
    for number in range(6):
        file = tmp_path / f"{number}" / "mlflow.db"
        file.parent.mkdir()
        process = start(file)
        assert process.stdout is not None
        assert process.stdout.readline() == b"x\n"
        deadline = time.monotonic() + 60
        while not list(file.parent.glob("*mlflow.db*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 4))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        client = create_client(f"sqlite:///{file}")
        assert client.create_run("0").info.run_id
        assert sorted(path.name for path in file.parent.iterdir()) == [
            "mlflow.db", "mlflow.db.lock"
        ]  # fmt: skip


@pytest.mark.slow
def test_two_processes_create_one_store_at_once(tmp_path):
    file = tmp_path / "mlflow.db"
    outputs = [process.communicate(timeout=200)[0] for process in [start(file), start(file)]]
    assert outputs == [b"x\ndone\n"] * 2
    assert MlflowClient(f"sqlite:///{file}").create_run("0").info.run_id
