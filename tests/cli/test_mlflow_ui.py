"""`mlflow ui`."""

import contextlib
import http.server
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from tests.helpers.paths import REPO
from yolo_lightning.cli.commands.mlflow import main
from yolo_lightning.cli.commands.mlflow import ui as mlflow_ui
from yolo_lightning.errors import InputError


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A working folder with a SQLite file that passes for a store without runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_DEFAULT_ARTIFACT_ROOT", raising=False)
    with contextlib.closing(sqlite3.connect("mlflow.db")) as database:
        database.execute("create table runs (id text)")
    return tmp_path / "mlflow.db"


@pytest.fixture
def serve_calls(monkeypatch):
    """The calls of `_serve`, which starts nothing."""
    calls = []

    def serve(command, environment):
        calls.append((list(command), dict(environment)))
        return 0

    monkeypatch.setattr(mlflow_ui, "_serve", serve)
    return calls


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_the_server_uses_this_python_and_the_store_in_the_working_folder(
    store, serve_calls, capsys
):
    port = free_port()
    main(["ui", "--port", str(port)])
    ((command, environment),) = serve_calls
    assert command[:4] == [sys.executable, "-m", "mlflow", "ui"]
    assert command[command.index("--port") + 1] == str(port)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert environment["MLFLOW_BACKEND_STORE_URI"] == f"sqlite:///{store}"
    # as for trainings in the same folder
    assert environment["MLFLOW_DEFAULT_ARTIFACT_ROOT"] == str(store.parent / "mlruns")
    assert environment["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert environment["PYTHONSAFEPATH"] == "1"
    assert f"http://127.0.0.1:{port}" in capsys.readouterr().out


def test_a_password_is_neither_in_the_command_nor_printed(serve_calls, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as database:
        port = database.getsockname()[1]
        uri = f"postgresql://me:secret@127.0.0.1:{port}/runs"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.delenv("MLFLOW_DEFAULT_ARTIFACT_ROOT", raising=False)
        main(["ui", "--port", str(free_port())])
    ((command, environment),) = serve_calls
    assert environment["MLFLOW_BACKEND_STORE_URI"] == uri
    assert "MLFLOW_DEFAULT_ARTIFACT_ROOT" not in environment
    assert "secret" not in " ".join(command) + capsys.readouterr().out


def test_a_missing_store_raises_and_is_not_created(tmp_path, serve_calls, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match=f"no mlflow.db in {tmp_path}"):
        main(["ui"])
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    with pytest.raises(InputError, match="no longer supports folders"):
        main(["ui"])
    assert not serve_calls


def test_module_of_the_working_folder_is_not_imported(store, serve_calls, monkeypatch):
    """A folder with an mlflow.py would run it, in place of MLflow."""
    monkeypatch.chdir(store.parent)
    (store.parent / "mlflow.py").touch()
    main(["ui", "--port", str(free_port())])
    ((command, environment),) = serve_calls
    code = "import importlib.util; print(importlib.util.find_spec('mlflow').origin)"
    program = [*command[: command.index("-m")], "-c", code]
    result = subprocess.run(program, env=dict(environment), capture_output=True, text=True)
    assert result.stdout.endswith("site-packages/mlflow/__init__.py\n")


def test_pipe_as_store_is_refused(tmp_path, serve_calls, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    os.mkfifo("mlflow.db")
    for command in ("ui", "compare"):
        with pytest.raises(InputError, match="MLflow database .*mlflow.db' is no regular file"):
            main([command])


def test_a_port_in_use_raises_with_another_port(store, serve_calls):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} of 127.0.0.1 is in use"):
            main(["ui", "--port", str(port)])
    with pytest.raises(InputError, match="allowed: 1 … 65535"):
        main(["ui", "--port", "70000"])
    assert not serve_calls


def test_an_mlflow_server_has_its_own_ui_and_nothing_is_started(serve_calls, monkeypatch, capsys):
    class Healthy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"OK")

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Healthy)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    try:
        main(["ui"])
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert f"{address}: reachable; this server has its own MLflow UI" in capsys.readouterr().out
    with pytest.raises(InputError, match="unreachable"):
        main(["ui"])
    assert not serve_calls


def test_the_exit_code_of_the_server_is_returned(store, monkeypatch):
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    monkeypatch.setattr(mlflow_ui, "_command", lambda host, port: command)
    with pytest.raises(SystemExit) as caught:
        main(["ui", "--port", str(free_port())])
    assert caught.value.code == 3


def test_ctrl_c_stops_the_server_with_one_signal_and_no_traceback(store, monkeypatch, capfd):
    lines = (
        "import signal, sys, time",
        "received = []",
        "signal.signal(signal.SIGTERM, lambda *_: received.append('TERM'))",
        "signal.signal(signal.SIGINT, lambda *_: received.append('INT'))",
        "print('ready', flush=True)",
        "while not received: time.sleep(0.02)",
        "time.sleep(0.3)",
        "print(received)",
    )
    command = [sys.executable, "-c", "\n".join(lines)]
    monkeypatch.setattr(mlflow_ui, "_command", lambda host, port: command)
    before = signal.getsignal(signal.SIGINT)
    timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    main(["ui", "--port", str(free_port())])
    timer.join()
    out, err = capfd.readouterr()
    assert "['TERM']" in out
    assert not err
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_the_ui_starts_shows_artifacts_and_stops_on_ctrl_c(tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run_id = client.create_run(client.create_experiment("shapes")).info.run_id
    (tmp_path / "note.txt").write_text("a file of the run")
    client.log_artifact(run_id, str(tmp_path / "note.txt"), "plots")
    port = free_port()
    code = f"from yolo_lightning.cli.commands.mlflow import main; main(['ui', '--port', '{port}'])"
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    environment["PYTHONPATH"] = str(REPO)
    with (tmp_path / "log.txt").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment, stdout=log, stderr=log, process_group=0,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}/get-artifact?run_uuid={run_id}&path=plots/note.txt"
    try:
        content = b""
        deadline = time.monotonic() + 120
        while not content and time.monotonic() < deadline and server.poll() is None:
            time.sleep(0.5)
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                content = urllib.request.urlopen(address, timeout=30).read()
        assert content == b"a file of the run", (tmp_path / "log.txt").read_text()
        os.killpg(server.pid, signal.SIGINT)  # as a terminal does
        assert server.wait(60) == 0
        assert "Traceback" not in (tmp_path / "log.txt").read_text()
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(address, timeout=5)
    finally:
        if server.poll() is None:
            server.terminate()
            server.wait(60)
