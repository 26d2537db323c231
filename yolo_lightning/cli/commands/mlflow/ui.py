"""`yolo-lightning mlflow ui`: start the MLflow UI on the store of the recipes."""

import argparse
import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from yolo_lightning.cli.commands.mlflow import check_store
from yolo_lightning.errors import InputError, mask_secrets
from yolo_lightning.tracking.names import SQLITE, own_store

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="yolo-lightning mlflow ui",
        description="Start the MLflow UI on the store of the recipes.",
        epilog="Set MLFLOW_TRACKING_URI to use another store. Press Ctrl-C to stop.",
        allow_abbrev=False,
    )
    parser.add_argument("--port", type=int, default=5000, help="port to listen on (default: 5000)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0: all (default: 127.0.0.1)",
    )
    return parser


def main(argv: Sequence[str]) -> None:
    """Run the MLflow UI until it is stopped.

    Raises:
        InputError: the store does not exist, or the address or port cannot be used.
        SystemExit: with the server's exit code, if it fails.
    """
    options = _parser().parse_args(list(argv))
    uri = own_store()
    scheme = uri.split(":")[0].split("+")[0]
    state = check_store(uri)
    if scheme in ("http", "https"):
        print(f"{state}; this server has its own MLflow UI: open the address in a browser")
        return
    if scheme not in _DATABASES:
        raise InputError(f"{mask_secrets(uri)}: the UI needs a database or an MLflow server")
    _check_port_is_free(options.host, options.port)
    host = f"[{options.host}]" if ":" in options.host else options.host
    print(f"{state}\nMLflow UI starts at http://{host}:{options.port}; press Ctrl-C to stop")
    sys.stdout.flush()
    code = _serve(_command(options.host, options.port), _environment(uri))
    if code:
        raise SystemExit(code)


def _check_port_is_free(host: str, port: int) -> None:
    """Raise if the port cannot be used: MLflow would exit with code 0."""
    if not 1 <= port <= 65535:
        raise InputError(f"--port is {port}; allowed: 1 … 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"port {port} of {host} is in use, maybe by another MLflow UI; "
                f"use another one: --port {port % 65535 + 1}"
            ) from None
        raise InputError(f"--host {host} --port {port}: {error.strerror or error}") from None


def _command(host: str, port: int) -> list[str]:
    # one worker is enough for viewing; MLflow's default of 4 takes twice as long to start
    return [
        sys.executable, "-m", "mlflow", "ui", "--host", host, "--port", str(port),
        "--workers", "1", "--uvicorn-opts", "--log-level warning",
    ]  # fmt: skip


def _environment(uri: str) -> Mapping[str, str]:
    """Return the server's environment, which contains the store: it may have a password."""
    environment = {
        # processes for jobs of language models, 1 GB in total
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        **os.environ,
        "MLFLOW_BACKEND_STORE_URI": uri,
        "PYTHONSAFEPATH": "1",  # `python -m` would import modules of the working folder
    }
    if uri.startswith(SQLITE):
        # else experiments created in the UI get an artifact location that only the server can
        # write to, but trainings write to the SQLite file without a server
        folder = Path(uri.removeprefix(SQLITE)).parent / "mlruns"
        environment.setdefault("MLFLOW_DEFAULT_ARTIFACT_ROOT", str(folder))
    return environment


def _serve(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the server and return its exit code, 0 if it was stopped by a signal to this process."""
    # a new process group: else Ctrl-C reaches uvicorn twice, from the terminal and from MLflow,
    # and it exits with a traceback
    server = subprocess.Popen(command, env=dict(environment), process_group=0)
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        if not received:
            server.terminate()
        received.append(number)

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, stop) for number in signals}
    try:
        code = server.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0 if received else code if code >= 0 else 128 - code
