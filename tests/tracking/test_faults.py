"""Stores that fail, hang or send invalid responses; names and values that MLflow rejects."""

import json
import math
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor

from tests.helpers import tracked
from tests.helpers.paths import REPO
from tests.helpers.recipes import QUICK, TINY, quickstart_values
from tests.helpers.servers import Responder, released, respond_with, server
from tests.helpers.tracked import fresh_store, logger, points, query_store, runs, tags, upload
from yolo_lightning.cli.main import main
from yolo_lightning.errors import InputError
from yolo_lightning.tracking import system_metrics
from yolo_lightning.tracking.journal import JOURNAL_FOLDER, Journal
from yolo_lightning.tracking.logger import RunLogger
from yolo_lightning.tracking.names import valid_key
from yolo_lightning.tracking.store import short_message
from yolo_lightning.tracking.system_metrics import SystemMetrics

pytestmark = pytest.mark.end_to_end

STEPS = 50


def truncated_response(request: BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.send_header("Content-Length", "5000")
    request.end_headers()
    request.wfile.write(b'{"experiment": {"exp')


def reset(request: BaseHTTPRequestHandler) -> None:
    linger = (1).to_bytes(4, "little") + (0).to_bytes(4, "little")
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    request.connection.close()


def loop(request: BaseHTTPRequestHandler) -> None:
    respond_with(302, "", Location=request.path)(request)


def hang(request: BaseHTTPRequestHandler) -> None:
    released.wait(20)


PAGE = "<html><body>Sign in to go on</body></html>"
RESPONDERS: dict[str, Responder] = {
    "500": respond_with(500, '{"error_code": "INTERNAL_ERROR", "message": "out of order"}'),
    "500 page": respond_with(500, PAGE, "text/html"),
    "503": respond_with(503, ""),
    "400": respond_with(400, '{"error_code": "INVALID_PARAMETER_VALUE", "message": "no"}'),
    "401": respond_with(401, "You are not authenticated", "text/plain"),
    "403": respond_with(403, '{"error_code": "PERMISSION_DENIED", "message": "not you"}'),
    "403 page": respond_with(403, PAGE, "text/html"),
    "404 page": respond_with(404, PAGE, "text/html"),
    "a page": respond_with(200, PAGE, "text/html"),
    "nothing": respond_with(200, ""),
    "an empty object": respond_with(200, "{}"),
    "a list": respond_with(200, "[1, 2]"),
    "another object": respond_with(200, '{"experiment": {"experiment_id": {"a": 1}}}'),
    "a truncated response": truncated_response,
    "a hang": hang,
    "a reset": reset,
    "a redirect to itself": loop,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    tracked.use_fast_threads(monkeypatch)
    return tmp_path


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return tracked.collect_warnings(monkeypatch)


@pytest.fixture
def offline_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No upload threads: the test uploads itself."""
    tracked.disable_threads(monkeypatch)
    return folder


def train(run: RunLogger) -> tuple[float, float]:
    """Log a training; return the duration of the steps and of `finalize` in seconds."""
    run.log_hyperparams({"model": {"learning_rate": 0.1}})
    run.start_training(0)
    started = time.monotonic()
    for step in range(STEPS):
        run.log_metrics({"loss": 1 / (step + 1)}, step)
        time.sleep(0.01)
    trained = time.monotonic()
    run.finalize()
    return trained - started, time.monotonic() - trained


def assert_synced(run_folder: Path, folder: Path) -> None:
    for thread in threading.enumerate():  # a last attempt, which would end with the process
        if thread.name == "mlflow-upload":
            thread.join(20)
    healthy = fresh_store(folder, "healthy.db")
    for _ in range(2):
        assert main(["mlflow", "sync", str(run_folder), "--store", healthy]) == 0
        assert points(healthy) == {("loss", step): 1 for step in range(STEPS)}
    assert query_store(healthy, "select status from runs") == [("FINISHED",)]
    assert query_store(healthy, "select value from params") == [("0.1",)]


def files_with_the_password(folder: Path) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path.name for path in files if b"s3cr" in path.read_bytes()]


@pytest.mark.parametrize("name", RESPONDERS)
def test_a_failing_server_does_not_affect_training(folder, warnings, capfd, name):
    with server(RESPONDERS[name]) as port:
        run = logger(folder / "run", f"http://user:s3cr@t@127.0.0.1:{port}")
        steps_s, end_s = train(run)
    assert steps_s < 2, "training must not wait for the server"
    assert end_s < 10
    outages = [text for text in warnings if "is not available" in text]
    incomplete = [text for text in warnings if "is not complete" in text]
    assert (len(outages), len(incomplete)) == (1, 1)
    assert len(warnings) == 2, warnings
    assert outages[0].startswith(f"MLflow at http://***@127.0.0.1:{port} is not available (")
    assert f"metrics are kept in {folder / 'run/mlflow'} and uploaded later" in outages[0]
    assert f"yolo-lightning mlflow sync {folder / 'run'}" in incomplete[0]
    assert not [text for text in warnings if "s3cr" in text or "t@127" in text]
    assert "s3cr" not in "".join(capfd.readouterr())
    assert not files_with_the_password(folder)
    assert run.run_id is None
    assert_synced(folder / "run", folder)
    assert not files_with_the_password(folder)


def test_a_closed_port_warns_once(folder, warnings):
    with socket.socket() as closed:  # bound, so that nobody else gets the port, but not listening
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        train(logger(folder / "run", f"http://127.0.0.1:{port}"))
    assert len(warnings) == 2
    assert f"MLflow at http://127.0.0.1:{port} is not available" in warnings[0]
    assert_synced(folder / "run", folder)


def wait_until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "timeout"
        time.sleep(0.01)


@pytest.mark.parametrize("is_connected", [False, True])
def test_a_store_that_recovers_during_training_gets_all_points(folder, warnings, is_connected):
    store = fresh_store(folder)
    run = logger(folder / "run", store)
    if is_connected:
        run.log_metrics({"loss": 1.0}, 0)
        wait_until(lambda: points(store))
    (folder / "mlflow.db").rename(folder / "away.db")
    (folder / "mlflow.db").mkdir()  # SQLite cannot open a folder
    for step in range(is_connected, 10):
        run.log_metrics({"loss": 1.0 / (step + 1)}, step)
    wait_until(lambda: warnings)
    assert "is not available" in warnings[0]
    (folder / "mlflow.db").rmdir()
    (folder / "away.db").rename(folder / "mlflow.db")
    for step in range(10, 20):
        run.log_metrics({"loss": 1.0 / (step + 1)}, step)
    wait_until(lambda: len(points(store)) > is_connected)
    run.finalize()
    assert points(store) == {("loss", step): 1 for step in range(20)}
    assert len(warnings) == 1
    assert run.run_id == runs(store)[0]


@pytest.mark.parametrize(
    ("store", "words"),
    [
        ("htp://127.0.0.1:5000", "htp"),
        ("./mlruns", "mlruns"),
        ("sqlite:///no/such\0place/x.db", "null byte"),
        ("sqlite:////proc/no/x.db", "No such file"),
        ("postgresql://user:s3cret@127.0.0.1:1/runs", "psycopg"),
    ],
)
def test_an_invalid_address_warns_once_with_the_reason(folder, warnings, store, words):
    train(logger(folder / "run", store))
    assert len(warnings) == 2
    assert words in warnings[0]
    assert str(folder / "run/mlflow") in warnings[0]
    assert "s3cret" not in "".join(warnings)
    assert_synced(folder / "run", folder)


def test_a_store_in_a_read_only_folder_warns_once(folder, warnings, monkeypatch):
    original = os.open

    def guarded(file: Any, *args: Any, **options: Any) -> Any:
        if str(file).startswith(str(folder / "locked")):
            raise PermissionError(13, "Permission denied", str(file))
        return original(file, *args, **options)

    monkeypatch.setattr(os, "open", guarded)  # root can write everywhere
    train(logger(folder / "run", f"sqlite:///{folder}/locked/mlflow.db"))
    assert len(warnings) == 2
    assert "Permission denied" in warnings[0]
    assert_synced(folder / "run", folder)


def test_sync_reports_each_run_that_failed(folder, warnings, capsys, monkeypatch):
    tracked.disable_threads(monkeypatch)
    for name in "ab":
        run = logger(folder / "runs" / name, "sqlite:///x.db")
        run.log_metrics({"loss": 1.0}, 0)
    with server(RESPONDERS["403"]) as port:
        assert main(["mlflow", "sync", "runs", "--store", f"http://me:s3@127.0.0.1:{port}"]) == 2
    shown = capsys.readouterr().err
    for name in "ab":
        assert f"runs/{name}: upload to http://***@127.0.0.1:{port} failed: " in shown
    assert "not you" in shown
    assert "s3" not in shown
    for arguments, words in ((["none"], "not found"), ([str(REPO / "docs")], "no MLflow journal")):
        assert main(["mlflow", "sync", *arguments]) == 2
        assert words in capsys.readouterr().err


def test_sync_uses_the_password_in_the_environment(offline_folder, monkeypatch, capsys):
    authorizations: list[str] = []

    def record(request: BaseHTTPRequestHandler) -> None:
        authorizations.append(request.headers["Authorization"])
        RESPONDERS["403"](request)

    with server(record) as port:
        run = logger(offline_folder / "run", f"http://me:s3cret@127.0.0.1:{port}")
        run.log_metrics({"a": 1.0}, 0)
        assert main(["mlflow", "sync", "run"]) == 2
        assert "--store" in capsys.readouterr().err
        assert not authorizations
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:s3cret@127.0.0.1:{port}")
        assert main(["mlflow", "sync", "run"]) == 2
    assert "not you" in capsys.readouterr().err
    assert authorizations[0] == "Basic bWU6czNjcmV0"  # me:s3cret


def test_messages_are_short_and_without_secrets():
    text = "API request to http://me:p/ss@host:5000/x failed,\nor to http://token@host "
    shown = "API request to http://***@host:5000/x failed, or to http://***@host"
    assert short_message(RuntimeError(text)) == shown
    assert short_message(RuntimeError("a " * 10**7)) == "a " * 150 + " …"
    assert short_message("a\x1b[31m\x9b\0b") == r"a\x1b[31m\x9b\x00b"  # for the terminal


# --- names and values


@pytest.mark.parametrize(
    "name",
    ["a*b", "../x", "..x/y", "/x", "x/", "a//b", "", ".", "..", "x" * 300, "a\nb", "ü/日本", "a,b",
     "a\0b", "a\udcffb", "a/./b", "x/" * 200, " ", "é" * 250, "a:b c-d.e_f/g"],
)  # fmt: skip
def test_valid_key_returns_a_name_that_mlflow_accepts(name):
    from mlflow.utils.validation import _validate_metric_name, _validate_tag_name

    key = valid_key(name)
    _validate_metric_name(key)
    _validate_tag_name(key)
    assert 0 < len(key) <= 250
    if name in ("ü/日本", "a:b c-d.e_f/g", " "):
        assert key == name


def test_different_names_get_different_keys():
    names = ["a*b", "a?b", "a_b", "a//b", "a/b", "x" * 260, "x" * 261, ".", "..", "_"]
    assert len({valid_key(name) for name in names}) == len(names)
    assert valid_key("a*b") == "a_b-7a83b459"


def test_invalid_names_warn_once_and_keep_their_keys_when_resuming(offline_folder, warnings):
    store = fresh_store(offline_folder)
    unusual = ["a*b", "a?b", "../x", "/lead", "y" * 300, ""]
    run = logger(offline_folder / "run", store, tags={"t*g": "1"})
    for step in range(3):
        run.log_metrics({name: float(step) for name in [*unusual, "ü"]}, step)
    assert len(warnings) == len(unusual) + 1
    key = valid_key("a*b")
    assert warnings[1] == f"MLflow does not accept the name 'a*b'; logged as {key!r}"
    resumed = logger(offline_folder / "run", store)
    resumed.log_metrics(dict.fromkeys(reversed(["a_b", *unusual, "ü"]), 3.0), 3)
    upload(offline_folder / "run")
    logged = points(store)
    assert len(logged) == 3 * 7 + 8
    assert set(logged.values()) == {1}
    rows = query_store(store, f"select step from metrics where key = '{key}' order by step")
    assert rows == [(0,), (1,), (2,), (3,)]
    assert tags(store)[valid_key("t*g")] == "1"


def test_values_that_are_not_finite_are_logged(offline_folder, warnings):
    store = fresh_store(offline_folder)
    run = logger(offline_folder / "run", store)
    for step in range(3):
        run.log_metrics({"nan": math.nan, "up": math.inf, "down": -math.inf, "fine": 1.0}, step)
    assert warnings == [
        "metric up is infinite (at step 0; MLflow shows +1.8e308)",
        "metric down is infinite (at step 0; MLflow shows -1.8e308)",
    ]
    upload(offline_folder / "run")
    rows = query_store(store, "select key, value, is_nan, count(*) from metrics group by key")
    logged = {key: (value, bool(is_nan), count) for key, value, is_nan, count in rows}
    largest = np.finfo(float).max
    assert logged == {
        "nan": (0, True, 3), "up": (largest, False, 3), "down": (-largest, False, 3),
        "fine": (1, False, 3),
    }  # fmt: skip


@pytest.mark.parametrize(
    "value", ["text", None, [1, 2], {"a": 1}, np.ones(3), 10**400, object(), "1.5"]
)
def test_a_metric_that_is_not_a_number_is_ignored_and_warns_once(offline_folder, warnings, value):
    store = fresh_store(offline_folder)
    run: Any = logger(offline_folder / "run", store)
    for step in (0, np.int64(1), 2.0):
        run.log_metrics({"bad": value, "good": np.float32(0.5), "whole": True}, step)
    (warning,) = warnings
    assert warning.startswith("metric bad is not a number and is ignored (")
    upload(offline_folder / "run")
    assert points(store) == {(key, step): 1 for key in ("good", "whole") for step in range(3)}


def test_long_values_are_truncated_with_a_warning(offline_folder, warnings):
    store = fresh_store(offline_folder)
    run = logger(offline_folder / "run", store, tags={"long": "t" * 9000, "number": 3})
    run.log_hyperparams(
        {"text": "p" * 7000, "lines": "a\nb\n", "none": None, "odd": "a\0b\udcff", 7: "key"}
    )
    upload(offline_folder / "run")
    params = dict(query_store(store, "select key, value from params"))
    assert (len(params["text"]), params["text"][-2:]) == (6000, "p…")
    assert (params["lines"], params["none"], params["7"]) == ("a\nb\n", "None", "key")
    assert params["odd"] == "a\N{REPLACEMENT CHARACTER}b?"
    assert (len(tags(store)["long"]), tags(store)["number"]) == (8000, "3")
    assert warnings == [
        "long is truncated for MLflow (9,000 characters; allowed: up to 8,000)",
        "text is truncated for MLflow (7,000 characters; allowed: up to 6,000)",
    ]


def test_parameters_contain_no_password(offline_folder):
    store = fresh_store(offline_folder)
    run = logger(offline_folder / "run", store)
    run.log_hyperparams({"logger": [{"class_path": "a.B", "uri": "http://me:s3cret@host:1/"}]})
    upload(offline_folder / "run")
    assert query_store(store, "select value from params where key like '%uri'") == [
        ("http://***@host:1/",)
    ]
    assert not files_with_the_password(offline_folder)


@pytest.mark.parametrize(("name", "words"), [
    ("", "has 0 characters; allowed: 1 to 500"), ("x" * 501, "has 501 characters"),
    ("a\x1b[31m", "holds control characters"), ("a\nb", "holds control characters"),
])  # fmt: skip
def test_an_invalid_experiment_name_raises(offline_folder, name, words):
    with pytest.raises(InputError, match=f"experiment_name.* {words}"):
        RunLogger(name)


@pytest.mark.parametrize("name", ["..", ".", "a/../b", "日本" * 200])
def test_files_of_an_experiment_of_any_name_have_their_own_folder(offline_folder, name):
    run = RunLogger(name, tracking_uri=fresh_store(offline_folder), system_metrics=False)
    run.configure_run(offline_folder / "run", "one")
    (offline_folder / "x.txt").write_text("x")
    run.log_artifact(offline_folder / "x.txt", "plots")
    upload(offline_folder / "run")
    (file,) = offline_folder.rglob("plots/x.txt")
    assert len(file.relative_to(offline_folder).parts) == 6  # mlruns/NAME/ID/artifacts/plots/x.txt


def test_a_long_run_name_is_truncated(offline_folder):
    store = fresh_store(offline_folder)
    run = logger(offline_folder / "run", store, run_name="é\udcff" * 200)
    run.log_metrics({"a": 1.0}, 0)
    upload(offline_folder / "run")
    assert query_store(store, "select name from runs") == [("é?" * 125,)]


def test_each_missing_file_warns_once(offline_folder, warnings):
    store = fresh_store(offline_folder)
    run = logger(offline_folder / "run", store)
    for _ in range(2):
        run.log_artifact(offline_folder / "none.txt", "plots")
        run.log_artifacts(offline_folder / "nowhere", "plots")
        run.log_model(offline_folder / "no-model", "detector", 3)
    assert len(warnings) == 3
    assert all("cannot be logged to MLflow: " in text for text in warnings)
    (offline_folder / "run/x.txt").write_text("x")
    run.log_artifact(offline_folder / "run/x.txt", "plots")
    shutil.rmtree(offline_folder / "run/mlflow/files")
    (offline_folder / "run/x.txt").unlink()
    run.log_metrics({"a": 1.0}, 0)
    upload(offline_folder / "run")
    assert points(store) == {("a", 0): 1}
    assert warnings[3:] == ["MLflow: plots/x.txt no longer exists; such files are skipped"]


def test_a_full_disk_warns_once_and_loses_no_points(folder, warnings, monkeypatch):
    store, write = fresh_store(folder), os.write
    run = logger(folder / "run", store)
    run.log_metrics({"loss": 1.0}, 0)

    def refuse(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("yolo_lightning.tracking.journal.os.write", refuse)
        for step in range(1, 20):
            run.log_metrics({"loss": 1 / (step + 1)}, step)
        run.log_image("grid", np.zeros((4, 4, 3), np.uint8), 3)
    assert os.write is write
    run.log_metrics({"loss": 0.0}, 20)
    run.finalize()
    assert points(store) == {("loss", step): 1 for step in range(21)}
    (warning,) = warnings
    assert "No space left on device" in warning
    assert "lines are buffered in memory" in warning
    assert len(list(Journal(folder / "run" / JOURNAL_FOLDER).entries(0, "metrics"))) == 21


def test_points_are_uploaded_if_the_disk_stays_full(folder, warnings, monkeypatch):
    store = fresh_store(folder)
    run = logger(folder / "run", store)
    run.log_metrics({"loss": 1.0}, 0)

    def refuse(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("yolo_lightning.tracking.journal.os.write", refuse)
    for step in range(1, 20):
        run.log_metrics({"loss": 1 / (step + 1)}, step)
    run.finalize()
    assert points(store) == {("loss", step): 1 for step in range(20)}
    assert len(warnings) == 1


def test_a_run_folder_deleted_during_training_is_created_again(offline_folder):
    store = fresh_store(offline_folder)
    run = logger(offline_folder / "run", store)
    run.log_metrics({"a": 1.0}, 0)
    shutil.rmtree(offline_folder / "run")
    run.log_metrics({"a": 2.0}, 1)
    assert [
        e["step"] for e, _ in Journal(offline_folder / "run" / JOURNAL_FOLDER).entries(0, "metrics")
    ] == [1]


def test_a_failing_monitor_is_disabled_with_a_warning(warnings, monkeypatch):
    class Broken(DiskMonitor):
        def aggregate_metrics(self) -> dict[str, float]:
            raise OSError("no /proc here")

    monkeypatch.setattr(system_metrics, "DiskMonitor", Broken)
    samples: list[Any] = []
    system = SystemMetrics(samples.append, interval_s=0.01)
    time.sleep(0.3)
    system.stop()
    assert warnings == ["Broken failed and is disabled: no /proc here"]
    assert len(samples) > 1
    assert "system/cpu_utilization_percentage" in samples[-1]


def test_fit_with_a_hanging_server_completes_and_can_be_synced(
    workplace, monkeypatch, warnings, capsys
):
    tracked.use_fast_threads(monkeypatch)
    recipe = quickstart_values()
    loggers = recipe["trainer"]["logger"]
    assert "RunLogger" in loggers["class_path"]
    with server(RESPONDERS["a hang"]) as port:
        uri = f"--trainer.logger.init_args.tracking_uri=http://127.0.0.1:{port}"
        assert main(["fit", *QUICK, *TINY, uri]) == 0
    assert len([text for text in warnings if "is not available" in text]) == 1
    assert len([text for text in warnings if "is not complete" in text]) == 1
    (folder,) = (workplace / "outputs/quickstart").iterdir()
    lines = (folder / "mlflow/journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["op"] for line in lines][0] == "open"
    healthy = fresh_store(workplace, "healthy.db")
    assert main(["mlflow", "sync", str(folder), "--store", healthy]) == 0
    assert query_store(healthy, "select status from runs") == [("FINISHED",)]
    steps = query_store(healthy, "select step from metrics where key = 'train/lr' order by step")
    assert steps == [(0,), (1,), (2,), (3,)]
    assert set(points(healthy).values()) == {1}
    stored = {path.name for path in (workplace / "mlruns").rglob("*") if path.is_file()}
    assert {"best.ckpt", "recipe.yaml", "resolved.yaml", "tree.tsv", "steps.crc32"} <= stored
