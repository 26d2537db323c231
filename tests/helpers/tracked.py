"""Stores, loggers and counts that the tests of tracking share."""

import functools
import sqlite3
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from yolo_lightning.tracking import logger as tracking
from yolo_lightning.tracking import (
    run_finding,
    shipped_entries,
    shipper,
    shipping,
    system_metrics,
)
from yolo_lightning.tracking.journal import FOLDER, Journal
from yolo_lightning.tracking.shipper import Shipper
from yolo_lightning.tracking.shipping import ShippingThread

SPEAKING = (run_finding, shipped_entries, shipper, shipping, system_metrics, tracking)


@functools.cache
def empty_store() -> bytes:
    """Return an empty SQLite store, which takes MLflow seconds to make."""
    with tempfile.TemporaryDirectory() as folder:
        MlflowClient(f"sqlite:///{folder}/mlflow.db")
        return Path(folder, "mlflow.db").read_bytes()


def fresh_store(folder: Path, name: str = "mlflow.db") -> str:
    """Put an empty store into a folder; return its address."""
    (folder / name).write_bytes(empty_store())
    return f"sqlite:///{folder / name}"


def asked(store: str, query: str, *values: Any) -> list[tuple[Any, ...]]:
    database = sqlite3.connect(store.removeprefix("sqlite:///"))
    try:
        return database.execute(query, values).fetchall()
    finally:
        database.close()


def points(store: str, *, system: bool = False) -> Counter[tuple[str, int]]:
    """Return how many points a store holds of each metric and step."""
    rows = asked(store, "select key, step from metrics")
    return Counter((k, step) for k, step in rows if system or not k.startswith("system/"))


def runs(store: str) -> list[str]:
    return [row[0] for row in asked(store, "select run_uuid from runs order by start_time")]


def tags(store: str) -> dict[str, str]:
    return dict(asked(store, "select key, value from tags"))


def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect what is warned of, in whatever thread."""
    messages: list[str] = []
    for module in SPEAKING:
        if hasattr(module, "rank_zero_warn"):
            warn = lambda message, *a, **k: messages.append(str(message))  # noqa: E731
            monkeypatch.setattr(module, "rank_zero_warn", warn)
    return messages


def quick_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let threads look often, and give up soon."""

    class Quick(ShippingThread):
        MAX_PAUSE_S, HUNG_S = 0.2, 6.0

        def __init__(self, shipper: Shipper) -> None:
            super().__init__(shipper, every_s=0.05)

    monkeypatch.setattr(tracking, "ShippingThread", Quick)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let loggers only write: a test ships by itself."""

    class Idle:
        def __init__(self, shipper: Shipper) -> None:
            pass

        def finish(self, patience_s: float | None = None) -> bool:
            return True

    monkeypatch.setattr(tracking, "ShippingThread", Idle)


def logger(
    folder: Path, store: str, held: str | None = None, joins_at: int | None = None, **options: Any
) -> tracking.RunLogger:
    options = {"system_metrics": False} | options
    made = tracking.RunLogger("tests", tracking_uri=store, **options)
    made.place(folder, "tests/one", held, joins_at)
    return made


def ship(folder: Path, store: str | None = None) -> Shipper:
    """Ship a run folder's journal as a process does that does nothing else."""
    made = Shipper(Journal(folder / FOLDER), store)
    try:
        while made.ship():
            pass
    finally:
        made.close()
    return made
