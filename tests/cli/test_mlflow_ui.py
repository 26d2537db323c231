"""The command that starts MLflow's dashboard."""

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
    """A working folder with a file that answers as a store with no runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_DEFAULT_ARTIFACT_ROOT", raising=False)
    with contextlib.closing(sqlite3.connect("mlflow.db")) as database:
        database.execute("create table runs (id text)")
    return tmp_path / "mlflow.db"


@pytest.fixture
def served(monkeypatch):
    """What would be started, in place of starting it."""
    calls = []

    def serve(command, environment):
        calls.append((list(command), dict(environment)))
        return 0

    monkeypatch.setattr(mlflow_ui, "_serve", serve)
    return calls


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


def test_the_server_is_this_python_s_on_the_store_of_the_working_folder(store, served, capsys):
    port = free_port()
    main(["ui", "--port", str(port)])
    ((command, environment),) = served
    assert command[:4] == [sys.executable, "-m", "mlflow", "ui"]
    assert command[command.index("--port") + 1] == str(port)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert environment["MLFLOW_BACKEND_STORE_URI"] == f"sqlite:///{store}"
    # where trainings of the same folder keep theirs
    assert environment["MLFLOW_DEFAULT_ARTIFACT_ROOT"] == str(store.parent / "mlruns")
    assert environment["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert f"http://127.0.0.1:{port}" in capsys.readouterr().out


def test_a_password_stands_neither_in_the_command_nor_in_what_is_printed(
    served, monkeypatch, capsys
):
    with socket.create_server(("127.0.0.1", 0)) as database:
        port = database.getsockname()[1]
        uri = f"postgresql://me:secret@127.0.0.1:{port}/runs"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.delenv("MLFLOW_DEFAULT_ARTIFACT_ROOT", raising=False)
        main(["ui", "--port", str(free_port())])
    ((command, environment),) = served
    assert environment["MLFLOW_BACKEND_STORE_URI"] == uri
    assert "MLFLOW_DEFAULT_ARTIFACT_ROOT" not in environment
    assert "secret" not in " ".join(command) + capsys.readouterr().out


def test_a_store_that_is_not_there_yet_is_named_and_not_created(tmp_path, served, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match=f"no mlflow.db in {tmp_path}"):
        main(["ui"])
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    with pytest.raises(InputError, match="no runs in folders any more"):
        main(["ui"])
    assert not served


def test_a_port_in_use_is_named_and_another_offered(store, served):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} of 127.0.0.1 is in use"):
            main(["ui", "--port", str(port)])
    with pytest.raises(InputError, match="allowed: 1 … 65535"):
        main(["ui", "--port", "70000"])
    assert not served


def test_a_server_s_own_dashboard_is_named_and_nothing_started(served, monkeypatch, capsys):
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
    assert f"{address}: answers; it has a dashboard of its own" in capsys.readouterr().out
    with pytest.raises(InputError, match="does not answer"):
        main(["ui"])
    assert not served


def test_the_server_s_exit_code_is_passed_on(store, monkeypatch):
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    monkeypatch.setattr(mlflow_ui, "_command", lambda host, port: command)
    with pytest.raises(SystemExit) as leaving:
        main(["ui", "--port", str(free_port())])
    assert leaving.value.code == 3


def test_ctrl_c_tells_the_server_once_and_ends_quietly(store, monkeypatch, capfd):
    lines = (
        "import signal, sys, time",
        "told = []",
        "signal.signal(signal.SIGTERM, lambda *_: told.append('TERM'))",
        "signal.signal(signal.SIGINT, lambda *_: told.append('INT'))",
        "print('ready', flush=True)",
        "while not told: time.sleep(0.02)",
        "time.sleep(0.3)",
        "print(told)",
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
def test_the_dashboard_starts_shows_files_of_runs_and_ends_on_ctrl_c(tmp_path, monkeypatch):
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
    with (tmp_path / "said.txt").open("w") as said:
        server = subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment, stdout=said, stderr=said, process_group=0,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}/get-artifact?run_uuid={run_id}&path=plots/note.txt"
    try:
        found = b""
        end = time.monotonic() + 120
        while not found and time.monotonic() < end and server.poll() is None:
            time.sleep(0.5)
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                found = urllib.request.urlopen(address, timeout=30).read()
        assert found == b"a file of the run", (tmp_path / "said.txt").read_text()
        os.killpg(server.pid, signal.SIGINT)  # as a terminal does
        assert server.wait(60) == 0
        assert "Traceback" not in (tmp_path / "said.txt").read_text()
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(address, timeout=5)
    finally:
        if server.poll() is None:
            server.terminate()
            server.wait(60)
