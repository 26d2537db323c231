"""Check connections: to the tracking store, and between the ranks of a job."""

import http.client
import os
import re
import socket
import sqlite3
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from yolo_lightning.errors import InputError, mask_secrets

_SQLITE = "sqlite:///"
_TRACKING_TIMEOUT_S, _LOOKUP_TIMEOUT_S, _RENDEZVOUS_TIMEOUT_S = 5.0, 3.0, 10.0
_DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}

Value = TypeVar("Value")


@dataclass
class CheckResult:
    """One line of the report."""

    name: str
    text: str  # without passwords
    state: str = "ok"  # or `note`; `failed` if training would not start


def call_with_timeout(seconds: float, function: Callable[[], Value]) -> Value:
    """Call a function in a thread and return its result.

    Raises:
        TimeoutError: it did not return in time; its thread keeps running.
    """
    future: Future[Value] = Future()

    def call() -> None:
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"no reply within {seconds:g} s") from None


def check_tracking(uri: str) -> CheckResult:
    """Check that MLflow's store is reachable; creates nothing and sends no credentials."""
    if uri.startswith(_SQLITE):
        text, state = _check_sqlite(Path(uri.removeprefix(_SQLITE)).absolute())
    else:
        try:
            text, state = call_with_timeout(_TRACKING_TIMEOUT_S, lambda: _check_server(uri))
        except (OSError, http.client.HTTPException) as error:
            text, state = f"unreachable: {_reason(error)}", "failed"
        except ValueError:
            text, state = "not a valid address", "failed"
    return CheckResult("tracking", f"{mask_secrets(uri)}: {text}", state)


def _reason(error: Exception) -> str:
    """Return the reason of a failed connection, without the number of the error."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    return str(getattr(cause, "strerror", None) or cause)


def _check_sqlite(file: Path) -> tuple[str, str]:
    if not file.exists():
        folder = next(parent for parent in file.parents if parent.exists())
        if folder.is_dir() and os.access(folder, os.W_OK):
            return "will be created by the first run", "ok"
        return f"cannot be created: {folder} is not writable", "failed"
    try:
        store = sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=_TRACKING_TIMEOUT_S)
        try:
            (runs,) = store.execute("select count(*) from runs").fetchone()
        finally:
            store.close()
    except sqlite3.Error as error:
        return f"not an MLflow store ({error})", "failed"
    if not (os.access(file, os.W_OK) and os.access(file.parent, os.W_OK)):
        return "the file or its folder is not writable", "failed"
    return f"{runs} run{'' if runs == 1 else 's'}", "ok"


def _check_server(uri: str) -> tuple[str, str]:
    """Check an MLflow server by its health endpoint, or a database server by its port."""
    parts = urlsplit(uri)
    kind = parts.scheme.split("+")[0]
    host, port = parts.hostname, parts.port
    if kind in _DATABASE_PORTS and host:
        socket.create_connection((host, port or _DATABASE_PORTS[kind]), _TRACKING_TIMEOUT_S).close()
        return "the database port is open; its content was not checked", "ok"
    if kind not in ("http", "https") or not host:
        if kind in ("", "file"):
            return "MLflow no longer supports folders; use sqlite:///mlflow.db", "failed"
        return "not checked: neither SQLite nor a server", "note"
    server = parts.netloc.rpartition("@")[2]
    url = f"{kind}://{server}{parts.path.rstrip('/')}/health"
    try:
        with urllib.request.urlopen(url, timeout=_TRACKING_TIMEOUT_S) as response:
            body = response.read(100).decode("utf-8", "replace").strip()
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return f"reachable, but requires authentication ({error.code})", "note"
        return f"HTTP status {error.code}; expected 200 from an MLflow server", "failed"
    if body != "OK":
        return "reachable, but not an MLflow server", "failed"
    return "reachable", "ok"


def check_rendezvous(environment: Mapping[str, str]) -> CheckResult:
    """Check that the ranks of a job can connect to each other.

    If all ranks run this at the same time, rank 0 listens and the others connect to it. Otherwise
    the port must be free on the host of rank 0, and open when checked from another machine.

    Raises:
        InputError: the port is invalid.
    """
    master = _master_address(environment)
    if master is None:
        return CheckResult("rendezvous", "not needed: one machine")
    host, port = master
    rank, world_size = _rank_and_world_size(environment)
    try:
        addresses = call_with_timeout(
            _LOOKUP_TIMEOUT_S, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
    except (OSError, UnicodeError) as error:
        return CheckResult("rendezvous", f"cannot resolve {host}: {_reason(error)}", "failed")
    listener = _listen(addresses) if rank in (0, None) else None
    if listener is None:
        seconds = _LOOKUP_TIMEOUT_S if rank is None else _RENDEZVOUS_TIMEOUT_S
        reason = _connect(master, seconds)
        text = f"unreachable: {reason}" if reason else "reachable"
        state = "failed" if reason else "ok"
        return CheckResult("rendezvous", f"port {port} of {host} is {text}", state)
    with listener:
        if rank is None:
            text = f"port {port} is free on {host}, which is this machine"
            return CheckResult("rendezvous", text)
        count = _count_connections(listener, world_size - 1)
    text = f"{count} of {world_size - 1} other ranks connected to port {port} of {host}"
    return CheckResult("rendezvous", text, "ok" if count == world_size - 1 else "failed")


def _rank_and_world_size(environment: Mapping[str, str]) -> tuple[int | None, int]:
    """Return (None, 1) for a process that was not started as a rank of a job."""
    names = [("RANK", "WORLD_SIZE", "RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID")]
    for rank, world_size, required in names:
        count = environment.get(world_size, "")
        if required in environment and count.isdigit() and int(count) > 1:
            return int(environment.get(rank, "0")), int(count)
    return None, 1


def _listen(addresses: Sequence[Any]) -> socket.socket | None:
    """Return a listening socket; None if the port is in use or of another machine."""
    for family, *_, address in addresses:
        with suppress(OSError):
            return socket.create_server(address, family=family)
    return None


def _count_connections(listener: socket.socket, expected: int) -> int:
    """Count the connections until all expected ones or the timeout."""
    deadline = time.monotonic() + _RENDEZVOUS_TIMEOUT_S
    for count in range(expected):
        listener.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            listener.accept()[0].close()
        except TimeoutError:
            return count
    return expected


def _connect(address: tuple[str, int], seconds: float) -> str:
    """Try to connect until the timeout; return the last error, or an empty string."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(address, max(0.1, deadline - time.monotonic())).close()
            return ""
        except OSError as error:
            if time.monotonic() > deadline - 0.2:
                return _reason(error)
        time.sleep(0.2)


def _master_address(environment: Mapping[str, str]) -> tuple[str, int] | None:
    """Return host and port of rank 0 as Lightning determines them; None without a job."""
    host = environment.get("MASTER_ADDR")
    job = environment.get("SLURM_JOB_ID", "")
    if host is None:
        if environment.get("SLURM_JOB_NAME") in ("bash", "interactive"):
            return None
        nodes = environment.get("SLURM_NODELIST") or environment.get("SLURM_JOB_NODELIST")
        if not nodes or environment.get("SLURM_NTASKS", "1") == "1":
            return None
        nodes = re.sub(r"\[(.*?)[,-].*\]", r"\1", nodes)
        host = re.sub(r"\[(.*?)\]", r"\1", nodes).split(" ")[0].split(",")[0]
    default_port = 15000 + int(job[-4:]) if job.isdigit() else 12910
    port = environment.get("MASTER_PORT", str(default_port))
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"MASTER_PORT is {port!r}; allowed: 1 … 65535")
    return host, int(port)
