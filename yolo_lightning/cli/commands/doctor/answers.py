"""What answers to `yolo-lightning doctor`: the tracking store, and the other ranks of a job."""

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
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from yolo_lightning.errors import InputError
from yolo_lightning.tracking.store import masked

_SQLITE = "sqlite:///"
_TRACKING_S, _LOOKUP_S, _MEETING_S = 5.0, 3.0, 10.0
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}

Value = TypeVar("Value")


@dataclass
class Finding:
    """One line of the report.

    Args:
        name: what was looked at.
        text: what was found; secrets are masked.
        state: `ok`, `note` for what may matter, `failed` for what training needs and lacks.
    """

    name: str
    text: str
    state: str = "ok"


def within(seconds: float, function: Callable[[], Value]) -> Value:
    """Return what a function returns, which may hang for ever in a lookup.

    Raises:
        TimeoutError: not within the time; its thread is left behind.
    """
    returned: list[Value] = []
    raised: list[Exception] = []

    def call() -> None:
        try:
            returned.append(function())
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not returned:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return returned[0]


def tracking(uri: str) -> Finding:
    """Return whether a tracking store answers; nothing is created, and no secret is sent.

    Args:
        uri: of MLflow's store.
    """
    name, shown = "tracking", masked(uri)
    if uri.startswith(_SQLITE):
        text, state = _sqlite(Path(uri.removeprefix(_SQLITE)).absolute())
    else:
        try:
            text, state = within(_TRACKING_S, lambda: _answer(uri))
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            text, state = f"does not answer: {reason}", "failed"
        except ValueError:
            text, state = "is no address", "failed"
    return Finding(name, f"{shown}: {text}", state)


def _sqlite(file: Path) -> tuple[str, str]:
    if not file.exists():
        folder = next(parent for parent in file.parents if parent.exists())
        if folder.is_dir() and os.access(folder, os.W_OK):
            return "the first run creates it", "ok"
        return f"cannot be created, {folder} is not writable", "failed"
    try:
        store = sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=_TRACKING_S)
        try:
            (runs,) = store.execute("select count(*) from runs").fetchone()
        finally:
            store.close()
    except sqlite3.Error as error:
        return f"is no store of MLflow ({error})", "failed"
    if not (os.access(file, os.W_OK) and os.access(file.parent, os.W_OK)):
        return "it or its folder is not writable", "failed"
    return f"{runs} run{'' if runs == 1 else 's'}", "ok"


def _answer(uri: str) -> tuple[str, str]:
    """Return what a server says.

    Raises:
        ValueError: an address that is none.
        OSError: nothing answers.
    """
    parts = urlsplit(uri)
    kind = parts.scheme.split("+")[0]
    host, port = parts.hostname, parts.port
    if kind in _PORTS and host:
        socket.create_connection((host, port or _PORTS[kind]), _TRACKING_S).close()
        return "the database's port answers; what it holds was not looked at", "ok"
    if kind not in ("http", "https") or not host:
        if kind in ("", "file"):
            return "MLflow keeps no runs in folders any more; take sqlite:///mlflow.db", "failed"
        return "not looked at: neither SQLite nor a server", "note"
    place = f"[{host}]" if ":" in host else host
    place = f"{kind}://{place}{'' if port is None else f':{port}'}{parts.path.rstrip('/')}/health"
    try:
        with urllib.request.urlopen(place, timeout=_TRACKING_S) as reply:
            said = reply.read(100).decode("utf-8", "replace").strip()
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return f"answers, and wants to know who asks ({error.code})", "note"
        return f"answers with {error.code}, which is no MLflow server in order", "failed"
    if said != "OK":
        return "answers, but not as an MLflow server", "failed"
    return "answers", "ok"


def rendezvous(environment: Mapping[str, str]) -> Finding:
    """Return whether the ranks of a job can meet.

    Where all ranks of a job run this at once, rank 0 listens and the others come to it. Else the
    port is to be free on the machine that it belongs to, and to answer from others.

    Args:
        environment: with `MASTER_ADDR` and `MASTER_PORT`, or SLURM's variables.

    Raises:
        InputError: a port that is none.
    """
    name = "rendezvous"
    meeting = _meeting(environment)
    if meeting is None:
        return Finding(name, "none asked for: one machine")
    host, port = meeting
    try:
        found = within(_LOOKUP_S, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        return Finding(name, f"{host} has no address: {reason}", "failed")
    places = [(str(address[0]), port) for *_, address in found]
    rank, world = _rank_of(environment)
    here = next((place for place in places if _is_here(place[0])), None)
    if here is not None and rank in (0, None):
        listener = _listening(here)
        if listener is not None and rank == 0:
            came = _arrivals(listener, world - 1)
            text = f"{came} of {world - 1} other ranks came to port {port} of {host}"
            return Finding(name, text, "ok" if came == world - 1 else "failed")
        if listener is not None:
            listener.close()
            return Finding(name, f"port {port} is free on {host}, which is this machine")
    reason = _reached(places, _LOOKUP_S if rank is None else _MEETING_S)
    if reason:
        return Finding(name, f"port {port} of {host} does not answer: {reason}", "failed")
    return Finding(name, f"port {port} of {host} answers")


def _rank_of(environment: Mapping[str, str]) -> tuple[int | None, int]:
    """Return which of how many ranks this is; None for a process that nobody started as one."""
    ranks = [("RANK", "WORLD_SIZE", "RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID")]
    for rank, world, needed in ranks:
        count = environment.get(world, "")
        if needed in environment and count.isdigit() and int(count) > 1:
            return int(environment.get(rank, "0")), int(count)
    return None, 1


def _is_here(address: str) -> bool:
    """Return whether an address is one of this machine's: only those can be listened to."""
    listener = _listening((address, 0))
    if listener is not None:
        listener.close()
    return listener is not None


def _listening(place: tuple[str, int]) -> socket.socket | None:
    """Return a socket that listens; None where the address is another machine's, or taken."""
    family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
    try:
        return socket.create_server(place, family=family)
    except OSError:
        return None


def _arrivals(listener: socket.socket, expected: int) -> int:
    """Return how many connections came in time."""
    deadline, came = time.monotonic() + _MEETING_S, 0
    with listener:
        while came < expected and (left := deadline - time.monotonic()) > 0:
            listener.settimeout(left)
            try:
                listener.accept()[0].close()
            except TimeoutError:
                break
            came += 1
    return came


def _reached(places: Sequence[tuple[str, int]], seconds: float) -> str:
    """Return why none of some addresses answered in time; nothing where one did."""
    deadline, reason = time.monotonic() + seconds, ""
    while True:
        for place in places:
            left = max(0.1, deadline - time.monotonic())
            try:
                socket.create_connection(place, left).close()
            except OSError as error:
                reason = error.strerror or str(error)
            else:
                return ""
        if time.monotonic() > deadline - 0.2:
            return reason
        time.sleep(0.2)


def _meeting(environment: Mapping[str, str]) -> tuple[str, int] | None:
    """Return host and port as Lightning takes them from the environment."""
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
    usual = 15000 + int(job[-4:]) if job.isdigit() else 12910
    port = environment.get("MASTER_PORT", str(usual))
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"MASTER_PORT is {port!r}; allowed: 1 … 65535")
    return host, int(port)
