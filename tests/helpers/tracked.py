"""Stores, loggers and database queries for the tracking tests."""

import functools
import sqlite3
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from mlflow.store.db import utils as db_utils
from mlflow.tracking import MlflowClient
from sqlalchemy import Engine, create_engine

from yolo_lightning.tracking import (
    artifacts,
    run_lookup,
    system_metrics,
    upload_thread,
    uploader,
)
from yolo_lightning.tracking import logger as tracking
from yolo_lightning.tracking.journal import JOURNAL_FOLDER, Journal
from yolo_lightning.tracking.upload_thread import UploadThread
from yolo_lightning.tracking.uploader import Uploader

MODULES_WITH_WARNINGS = (
    run_lookup, artifacts, uploader, upload_thread, system_metrics, tracking,
)  # fmt: skip


_create_tables = db_utils._initialize_tables


@functools.cache
def empty_tables() -> bytes:
    """Return a SQLite file with MLflow's tables, whose creation takes more than a second."""
    with tempfile.TemporaryDirectory() as folder:
        engine = create_engine(f"sqlite:///{folder}/mlflow.db")
        _create_tables(engine)
        engine.dispose()
        return Path(folder, "mlflow.db").read_bytes()


def copy_tables(engine: Engine) -> None:
    """Do what MLflow's `_initialize_tables` does to a new SQLite file, at once."""
    Path(str(engine.url.database)).write_bytes(empty_tables())


@functools.cache
def empty_store() -> bytes:
    """Return the file of a SQLite store that holds the default experiment only."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "mlflow.db").write_bytes(empty_tables())
        MlflowClient(f"sqlite:///{folder}/mlflow.db")
        return Path(folder, "mlflow.db").read_bytes()


def fresh_store(folder: Path, name: str = "mlflow.db") -> str:
    """Write an empty store to a folder; return its address."""
    (folder / name).write_bytes(empty_store())
    return f"sqlite:///{folder / name}"


def query_store(store: str, query: str, *values: Any) -> list[tuple[Any, ...]]:
    database = sqlite3.connect(store.removeprefix("sqlite:///"))
    try:
        return database.execute(query, values).fetchall()
    finally:
        database.close()


def points(store: str, *, system: bool = False) -> Counter[tuple[str, int]]:
    """Return the number of points in a store for each metric and step."""
    rows = query_store(store, "select key, step from metrics")
    return Counter((k, step) for k, step in rows if system or not k.startswith("system/"))


def runs(store: str) -> list[str]:
    return [row[0] for row in query_store(store, "select run_uuid from runs order by start_time")]


def tags(store: str) -> dict[str, str]:
    return dict(query_store(store, "select key, value from tags"))


def collect_warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that receives all warnings of the tracking package, from any thread."""
    messages: list[str] = []
    for module in MODULES_WITH_WARNINGS:
        if hasattr(module, "rank_zero_warn"):
            warn = lambda message, *a, **k: messages.append(str(message))  # noqa: E731
            monkeypatch.setattr(module, "rank_zero_warn", warn)
    return messages


def use_fast_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use short intervals and timeouts in upload threads."""

    class FastThread(UploadThread):
        MAX_INTERVAL_S, OUTAGE_TIMEOUT_S = 0.2, 2.0

        def __init__(self, uploader: Uploader) -> None:
            super().__init__(uploader, interval_s=0.05)

    monkeypatch.setattr("yolo_lightning.tracking.upload_thread.UploadThread", FastThread)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def disable_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make loggers write to the journal only; the test uploads it."""

    class NoThread:
        def __init__(self, uploader: Uploader) -> None:
            pass

        def finish(self, timeout_s: float | None = None) -> bool:
            return True

    monkeypatch.setattr("yolo_lightning.tracking.upload_thread.UploadThread", NoThread)


def logger(
    folder: Path,
    store: str,
    checkpoint_run_id: str | None = None,
    evaluated_step: int | None = None,
    **options: Any,
) -> tracking.RunLogger:
    options = {"system_metrics": False} | options
    result = tracking.RunLogger("tests", tracking_uri=store, **options)
    result.configure_run(folder, "tests/one", checkpoint_run_id, evaluated_step)
    return result


def upload(folder: Path, store: str | None = None) -> Uploader:
    """Upload the journal of a run folder, as a process does that does nothing else."""
    uploader = Uploader(Journal(folder / JOURNAL_FOLDER), store)
    try:
        while uploader.upload_next():
            pass
    finally:
        uploader.close()
    return uploader
