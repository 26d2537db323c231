"""Addresses and clients of MLflow tracking stores, and the lock of a journal."""

import contextlib
import fcntl
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from mlflow.store.db import utils as db_utils
from mlflow.tracking import MlflowClient

SQLITE = "sqlite:///"

_MAX_MESSAGE_LENGTH = 300
_creating = threading.Lock()


class StoreUnavailable(Exception):
    """The store cannot accept entries now; the message gives the reason."""


def absolute_uri(uri: str) -> str:
    """Return a store's address, with an absolute path if it is a SQLite file."""
    if not uri.startswith(SQLITE):
        return uri
    # MLflow caches one database engine per address
    return SQLITE + str(Path(uri.removeprefix(SQLITE)).absolute())


@contextlib.contextmanager
def creation_lock(uri: str) -> Iterator[None]:
    """Allow one thread of one process at a time to create and migrate a SQLite store."""
    if not uri.startswith(SQLITE):
        yield
        return
    database = Path(uri.removeprefix(SQLITE))
    database.parent.mkdir(parents=True, exist_ok=True)
    with _creating, open(f"{database}.lock", "w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.lockf(lock, fcntl.LOCK_EX)  # of the process: forked workers do not inherit it
        yield


def create_client(uri: str) -> MlflowClient:
    """Return a client of a store; a SQLite file is created if it does not exist."""
    if "://" in uri and not uri.startswith(("http", "databricks")):
        # MLflow would retry for minutes, log each attempt, and block other stores; we retry later
        db_utils.MAX_RETRY_COUNT = 2
        logging.getLogger(db_utils.__name__).setLevel(logging.CRITICAL)
    with creation_lock(uri):
        return MlflowClient(uri)


class LazyClient:
    """A client that connects to the store on the first attribute access.

    Lightning accesses `experiment` of all loggers, on all ranks, before training starts.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._client: MlflowClient | None = None

    def __getattr__(self, name: str) -> Any:
        if self._client is None:
            self._client = create_client(self._uri)
        return getattr(self._client, name)


class JournalLock:
    """Prevents two processes, or two threads of this one, from uploading the same journal.

    The lock belongs to the process, so forked workers do not inherit it.
    """

    _locked_folders: ClassVar[set[Path]] = set()
    _guard = threading.Lock()

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._file: Any = None
        self._acquired = False

    def acquire(self) -> None:
        """Acquire the lock; raise `StoreUnavailable` if another process or thread holds it."""
        with self._guard:
            if self._acquired:
                return
            busy = StoreUnavailable("another process is uploading this journal")
            if self._folder in self._locked_folders:  # opening the file would end that lock
                raise busy
            with contextlib.suppress(OSError):  # a full disk, or a file system without locks
                self._file = (self._folder / "lock").open("w")
                try:
                    fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError):
                    self._file.close()
                    raise busy from None
            self._locked_folders.add(self._folder)
            self._acquired = True

    def release(self) -> None:
        """Release the lock if this object holds it."""
        with self._guard:
            if not self._acquired:
                return
            if self._file is not None:
                self._file.close()
            self._locked_folders.discard(self._folder)
            self._acquired, self._file = False, None


def strip_credentials(text: str) -> str:
    """Remove users, passwords and secrets from the addresses in a text."""
    text = re.sub(r"://[^/\s]*@", "://", text)
    # a password may contain a slash; do not match a port and the path after it
    text = re.sub(r"://[^/\s:@]+:(?!\d+(?:[/\s]|$))\S*@", "://", text)
    return _mask_query_secrets(text)


def strip_passwords(text: str) -> str:
    """Remove passwords and secrets from the addresses in a text, but keep the users."""
    text = re.sub(r"(://[^:/@\s]*):[^/\s]*@", r"\1@", text)
    text = re.sub(r"(://[^:/@\s]+):(?!\d+(?:[/\s]|$))\S*@", r"\1@", text)
    return _mask_query_secrets(text)


def _mask_query_secrets(text: str) -> str:
    return re.sub(r"(?i)([?&](?:password|passwd|token|secret|key)=)[^&\s]*", r"\1***", text)


def short_message(error: object) -> str:
    """Return an error message on one line, without credentials, cut to 300 characters."""
    text = " ".join(str(getattr(error, "message", error)).split())
    text = strip_credentials(text or type(error).__name__)
    return text if len(text) <= _MAX_MESSAGE_LENGTH else text[:_MAX_MESSAGE_LENGTH] + " …"
