"""`yolo-lightning mlflow ui`: MLflow's dashboard on the store that the recipes write to."""

import argparse
import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from yolo_lightning.cli.commands.mlflow import SQLITE, check_answers, store_uri
from yolo_lightning.errors import InputError
from yolo_lightning.tracking.store import masked

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="yolo-lightning mlflow ui",
        description="Start MLflow's dashboard on the store that the recipes write to.",
        epilog="Another store: MLFLOW_TRACKING_URI=sqlite:///FILE.db. Ctrl-C ends the dashboard.",
        allow_abbrev=False,
    )
    parser.add_argument("--port", type=int, default=5000, help="where it answers (5000)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 for other machines too (127.0.0.1)"
    )
    return parser


def main(argv: Sequence[str]) -> None:
    """Serve the dashboard until it is stopped.

    Raises:
        InputError: no store there, or a place that cannot be listened on.
        SystemExit: with the server's exit code, where it fails.
    """
    options = _parser().parse_args(list(argv))
    store = store_uri()
    kind = store.split(":")[0].split("+")[0]
    said = check_answers(store)
    if kind in ("http", "https"):
        print(f"{said}; it has a dashboard of its own: open that address in a browser")
        return
    if kind not in _DATABASES:
        raise InputError(f"{masked(store)}: a dashboard needs a database or a server of MLflow")
    _check_free(options.host, options.port)
    host = f"[{options.host}]" if ":" in options.host else options.host
    print(f"{said}\nthe dashboard, in some seconds: http://{host}:{options.port}; Ctrl-C ends it")
    sys.stdout.flush()
    code = _serve(_command(options.host, options.port), _environment(store))
    if code:
        raise SystemExit(code)


def _check_free(host: str, port: int) -> None:
    """Refuse a place that cannot be listened on: MLflow itself ends with code 0 there."""
    if not 1 <= port <= 65535:
        raise InputError(f"--port is {port}; allowed: 1 … 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"port {port} of {host} is in use, perhaps by a dashboard that runs already; "
                f"take another: --port {port % 65535 + 1}"
            ) from None
        raise InputError(f"--host {host} --port {port}: {error.strerror or error}") from None


def _command(host: str, port: int) -> list[str]:
    place = ["--host", host, "--port", str(port)]
    # one process is plenty for people who look; MLflow's default of 4 starts half as fast
    return [
        sys.executable, "-m", "mlflow", "ui", *place, "--workers", "1",
        "--uvicorn-opts", "--log-level warning",
    ]  # fmt: skip


def _environment(store: str) -> Mapping[str, str]:
    """Return the environment of MLflow's server: the address may hold a password, so not listed."""
    given = {
        # its processes for jobs of language models, 1 GB in all
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        **os.environ,
        "MLFLOW_BACKEND_STORE_URI": store,
    }
    if store.startswith(SQLITE):
        # an experiment made in the dashboard would else keep its files where only the server is
        # asked for them, and trainings write to the file
        folder = Path(store.removeprefix(SQLITE)).parent / "mlruns"
        given.setdefault("MLFLOW_DEFAULT_ARTIFACT_ROOT", str(folder))
    return given


def _serve(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Return how the server ended, 0 where it was told to."""
    # in a group of its own: Ctrl-C reaches a whole group, MLflow hands it on, and uvicorn, told
    # twice, leaves with a traceback
    server = subprocess.Popen(command, env=dict(environment), process_group=0)
    told: list[int] = []

    def stop(number: int, _: object) -> None:
        if not told:
            server.terminate()
        told.append(number)

    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in ends}
    try:
        code = server.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0 if told else code if code >= 0 else 128 - code
