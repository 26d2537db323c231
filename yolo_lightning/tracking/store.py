"""MLflow stores by their addresses, told without passwords; locks for who writes into them."""

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

_SHOWN = 300
_creating = threading.Lock()


class StoreUnavailable(Exception):
    """The store does not take entries now; the message says why."""


def absolute(store: str) -> str:
    """Return a store's address that holds whatever the working folder is.

    MLflow keeps one engine an address.
    """
    if not store.startswith(SQLITE):
        return store
    return SQLITE + str(Path(store.removeprefix(SQLITE)).absolute())


@contextlib.contextmanager
def creation_lock(store: str) -> Iterator[None]:
    """Let one thread of one process create and migrate a SQLite store.

    A process's lock, which forked workers do not hold.
    """
    if not store.startswith(SQLITE):
        yield
        return
    database = Path(store.removeprefix(SQLITE))
    database.parent.mkdir(parents=True, exist_ok=True)
    with _creating, open(f"{database}.lock", "w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.lockf(lock, fcntl.LOCK_EX)
        yield


def client_of(store: str) -> MlflowClient:
    """Return a client of a store, which is created where it is a SQLite file.

    Raises:
        Exception: whatever MLflow says of the store.
    """
    if "://" in store and not store.startswith(("http", "databricks")):
        # MLflow would try for minutes, aloud, and keep other stores waiting; who ships tries again
        db_utils.MAX_RETRY_COUNT = 2
        logging.getLogger(db_utils.__name__).setLevel(logging.CRITICAL)
    with creation_lock(store):
        return MlflowClient(store)


class LazyClient:
    """A client of a store that is made when something is first asked of it.

    Lightning looks at the clients of all loggers, on all ranks, before training begins.
    """

    def __init__(self, store: str) -> None:
        self._store = store
        self._client: MlflowClient | None = None

    def __getattr__(self, name: str) -> Any:
        if self._client is None:
            self._client = client_of(self._store)
        return getattr(self._client, name)


class JournalLock:
    """Keeps other processes, and other threads of this one, from shipping the same journal.

    A process's lock, which forked workers do not inherit.
    """

    _here: ClassVar[set[Path]] = set()
    _guard = threading.Lock()

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._file: Any = None
        self._taken = False

    def take(self) -> None:
        """Take it, once.

        Raises:
            StoreUnavailable: another one has it.
        """
        with self._guard:
            if self._taken:
                return
            busy = StoreUnavailable("another process is shipping this journal")
            if self._folder in self._here:  # opening the file would end that one's lock
                raise busy
            with contextlib.suppress(OSError):  # a full disk, or a file system without locks
                self._file = (self._folder / "lock").open("w")
                try:
                    fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError):
                    self._file.close()
                    raise busy from None
            self._here.add(self._folder)
            self._taken = True

    def leave(self) -> None:
        """Let others have it."""
        with self._guard:
            if not self._taken:
                return
            if self._file is not None:
                self._file.close()
            self._here.discard(self._folder)
            self._taken, self._file = False, None


def public(text: str) -> str:
    """Return a text without the users, passwords and secrets in its addresses."""
    text = re.sub(r"://[^/\s]*@", "://", text)
    # a slash in a password; not a port, and the path behind it
    text = re.sub(r"://[^/\s:@]+:(?!\d+(?:[/\s]|$))\S*@", "://", text)
    return _without_secrets(text)


def without_password(store: str) -> str:
    """Return a store's address as it may be written down: its user stays."""
    store = re.sub(r"(://[^:/@\s]*):[^/\s]*@", r"\1@", store)
    store = re.sub(r"(://[^:/@\s]+):(?!\d+(?:[/\s]|$))\S*@", r"\1@", store)
    return _without_secrets(store)


def _without_secrets(text: str) -> str:
    return re.sub(r"(?i)([?&](?:password|passwd|token|secret|key)=)[^&\s]*", r"\1***", text)


def short(error: object) -> str:
    """Return what went wrong on one line, of a bearable length and without passwords."""
    text = " ".join(str(getattr(error, "message", error)).split())
    text = public(text or type(error).__name__)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + " …"


def masked(uri: str) -> str:
    """Return an address without its user, its password, and secrets among its parameters."""
    return re.sub(
        r"(?i)((?:password|passwd|token|secret|key)=)[^&\s]*", r"\1***",
        re.sub(r"//.*@", "//***@", uri),
    )  # fmt: skip
