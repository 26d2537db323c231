"""Clients of MLflow tracking stores, creation of SQLite stores, and locks."""

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlflow.store.db import utils as db_utils
from mlflow.tracking import MlflowClient
from sqlalchemy import create_engine

from yolo_lightning.errors import mask_secrets, printable
from yolo_lightning.tracking.bounded_http import bound_answers
from yolo_lightning.tracking.files import open_file
from yolo_lightning.tracking.names import SQLITE

_ENVIRONMENT = {
    # the journal retries, so a request need not: MLflow's defaults would block for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
_MAX_MESSAGE_LENGTH = 300
_locks: set[int] = set()  # descriptors


class StoreUnavailable(Exception):
    """The store cannot accept entries now; the message gives the reason."""


def prepare_client() -> None:
    """Bound MLflow's requests and answers; what the environment sets stays."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    bound_answers()


def lock(file: Path, wait: bool = False) -> int:
    """Lock a file for this thread, if its file system has locks, and return its descriptor.

    Raises:
        StoreUnavailable: another thread or process has locked it, and `wait` is false.
        OSError: the file cannot be opened, or is a link, a pipe or a device.
    """
    descriptor = open_file(file, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StoreUnavailable("another process is uploading this journal") from None
    except OSError:
        pass
    _locks.add(descriptor)
    return descriptor


def unlock(descriptor: int) -> None:
    """Release a lock of this process."""
    if descriptor in _locks:
        _locks.discard(descriptor)
        with contextlib.suppress(OSError):  # also of a worker that was forked during `lock`
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _close_inherited_locks() -> None:
    """Leave the locks to the parent: a worker may outlive a parent that was killed."""
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_close_inherited_locks)


@contextlib.contextmanager
def creation_lock(uri: str) -> Iterator[None]:
    """Allow one thread of one process at a time to create and migrate a SQLite store."""
    if not uri.startswith(SQLITE):
        yield
        return
    database = Path(uri.removeprefix(SQLITE))
    database.parent.mkdir(parents=True, exist_ok=True)
    descriptor = lock(Path(f"{database}.lock"), wait=True)
    try:
        yield
    finally:
        unlock(descriptor)


def create_client(uri: str) -> MlflowClient:
    """Return a client of a store; a SQLite file is created if it does not exist."""
    prepare_client()
    if "://" in uri and not uri.startswith(("http", "databricks")):
        # MLflow would retry for minutes, log each attempt, and block other stores; we retry later
        db_utils.MAX_RETRY_COUNT = 2
        logging.getLogger(db_utils.__name__).setLevel(logging.CRITICAL)
    with creation_lock(uri):
        if uri.startswith(SQLITE):
            _create_database(Path(uri.removeprefix(SQLITE)))
        return MlflowClient(uri)


def _create_database(database: Path) -> None:
    """Create the tables beside the file, then rename: a kill leaves no half of a store."""
    if os.path.lexists(database):
        return
    part = database.with_name(f".{database.name}.part")
    leftovers = [part, *(Path(f"{part}{suffix}") for suffix in ("-journal", "-wal", "-shm"))]
    for file in leftovers:
        file.unlink(missing_ok=True)
    engine = create_engine(f"{SQLITE}{part}")
    try:
        db_utils._initialize_tables(engine)
    finally:
        engine.dispose()  # also closes SQLite's own files
    if not os.path.lexists(database):  # a program without this lock
        part.rename(database)


class LazyClient:
    """A client that connects to the store when one of its attributes is accessed.

    Lightning accesses `experiment` of all loggers, on all ranks, before training starts.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def __getattr__(self, name: str) -> Any:
        return getattr(create_client(self._uri), name)


def short_message(error: object) -> str:
    """Return an error message on one line, printable, without secrets, cut to 300 characters."""
    text = str(getattr(error, "message", error))[: 10 * _MAX_MESSAGE_LENGTH]  # may be a whole page
    text = printable(mask_secrets(" ".join(text.split()) or type(error).__name__))
    return text if len(text) <= _MAX_MESSAGE_LENGTH else text[:_MAX_MESSAGE_LENGTH] + " …"
