"""Stores that fail, hang and talk nonsense; names and values that MLflow does not take."""

import contextlib
import json
import math
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
import yaml
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor

from tests.helpers import tracked
from tests.helpers.paths import REPO
from tests.helpers.recipes import QUICK, TINY
from tests.helpers.tracked import asked, fresh_store, logger, points, runs, ship, tags
from yolo_lightning.cli.main import main
from yolo_lightning.errors import InputError
from yolo_lightning.tracking import system_metrics
from yolo_lightning.tracking.journal import FOLDER, Journal
from yolo_lightning.tracking.logger import RunLogger
from yolo_lightning.tracking.names import Names, allowed
from yolo_lightning.tracking.store import public, short, without_password
from yolo_lightning.tracking.system_metrics import SystemMetrics

STEPS = 50
Answer = Callable[[BaseHTTPRequestHandler], None]


def answer(status: int, body: str, kind: str = "application/json", **headers: str) -> Answer:
    def give(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in {"Content-Type": kind, **headers}.items():
            request.send_header(name.replace("_", "-"), value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body.encode())

    return give


def half(request: BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.send_header("Content-Length", "5000")
    request.end_headers()
    request.wfile.write(b'{"experiment": {"exp')


def reset(request: BaseHTTPRequestHandler) -> None:
    linger = (1).to_bytes(4, "little") + (0).to_bytes(4, "little")
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    request.connection.close()


def loop(request: BaseHTTPRequestHandler) -> None:
    answer(302, "", Location=request.path)(request)


def hang(request: BaseHTTPRequestHandler) -> None:
    released.wait(20)


released = Event()
PAGE = "<html><body>Sign in to go on</body></html>"
ANSWERS: dict[str, Answer] = {
    "500": answer(500, '{"error_code": "INTERNAL_ERROR", "message": "out of order"}'),
    "500 page": answer(500, PAGE, "text/html"),
    "503": answer(503, ""),
    "400": answer(400, '{"error_code": "INVALID_PARAMETER_VALUE", "message": "no"}'),
    "401": answer(401, "You are not authenticated", "text/plain"),
    "403": answer(403, '{"error_code": "PERMISSION_DENIED", "message": "not you"}'),
    "403 page": answer(403, PAGE, "text/html"),
    "404 page": answer(404, PAGE, "text/html"),
    "a page": answer(200, PAGE, "text/html"),
    "nothing": answer(200, ""),
    "an empty object": answer(200, "{}"),
    "a list": answer(200, "[1, 2]"),
    "another object": answer(200, '{"experiment": {"experiment_id": {"a": 1}}}'),
    "half an answer": half,
    "a hang": hang,
    "a reset": reset,
    "a redirect to itself": loop,
}


@contextlib.contextmanager
def server(give: Answer) -> Iterator[int]:
    """Serve one answer to everything; yield the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with contextlib.suppress(OSError):
                give(self)

        do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads, block_on_close = True, False

        def handle_error(self, *args: Any) -> None:
            pass

    released.clear()
    made = Quiet(("127.0.0.1", 0), Handler)
    thread = Thread(target=made.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield made.server_port
    finally:
        released.set()
        made.shutdown()
        made.server_close()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    tracked.quick_threads(monkeypatch)
    return tmp_path


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return tracked.told(monkeypatch)


@pytest.fixture
def alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No threads: a test ships by itself."""
    tracked.no_threads(monkeypatch)
    return place


def train(run: RunLogger) -> tuple[float, float]:
    """Log a training; return the seconds of the steps and of the end."""
    run.log_hyperparams({"model": {"learning_rate": 0.1}})
    run.begin(0)
    started = time.monotonic()
    for step in range(STEPS):
        run.log_metrics({"loss": 1 / (step + 1)}, step)
        time.sleep(0.01)
    trained = time.monotonic()
    run.finalize()
    return trained - started, time.monotonic() - trained


def assert_synced(folder: Path, place: Path) -> None:
    healthy = fresh_store(place, "healthy.db")
    for _ in range(2):
        assert main(["mlflow", "sync", str(folder), "--store", healthy]) == 0
        assert points(healthy) == {("loss", step): 1 for step in range(STEPS)}
    assert asked(healthy, "select status from runs") == [("FINISHED",)]
    assert asked(healthy, "select value from params") == [("0.1",)]


def hold_the_password(folder: Path) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path.name for path in files if b"s3cr" in path.read_bytes()]


@pytest.mark.parametrize("name", ANSWERS)
def test_a_server_that_fails_costs_the_training_nothing(place, said, capfd, name):
    with server(ANSWERS[name]) as port:
        run = logger(place / "run", f"http://user:s3cr@t@127.0.0.1:{port}")
        steps_s, end_s = train(run)
    assert steps_s < 2, "a training waits for no server"
    assert end_s < 10
    outages = [text for text in said if "does not take figures" in text]
    lasts = [text for text in said if "not all of this run is in MLflow" in text]
    assert (len(outages), len(lasts)) == (1, 1)
    assert len(said) == 2, said
    assert outages[0].startswith(f"MLflow at http://127.0.0.1:{port} does not take figures (")
    assert f"they are kept in {place / 'run/mlflow'} and follow" in outages[0]
    assert f"yolo-lightning mlflow sync {place / 'run'}" in lasts[0]
    assert not [text for text in said if "s3cr" in text or "t@127" in text]
    assert "s3cr" not in "".join(capfd.readouterr())
    assert not hold_the_password(place)
    assert run.run_id is None
    assert_synced(place / "run", place)
    assert not hold_the_password(place)


def test_a_port_where_nobody_listens_is_one_warning(place, said):
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    train(logger(place / "run", f"http://127.0.0.1:{port}"))
    assert len(said) == 2
    assert f"MLflow at http://127.0.0.1:{port} does not take figures" in said[0]
    assert_synced(place / "run", place)


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


@pytest.mark.parametrize("connected", [False, True])
def test_a_store_that_comes_back_gets_everything_while_training_goes_on(place, said, connected):
    store = fresh_store(place)
    run = logger(place / "run", store)
    if connected:
        run.log_metrics({"loss": 1.0}, 0)
        until(lambda: points(store))
    (place / "mlflow.db").rename(place / "away.db")
    (place / "mlflow.db").mkdir()  # nothing that SQLite opens
    for step in range(connected, 10):
        run.log_metrics({"loss": 1.0 / (step + 1)}, step)
    until(lambda: said)
    assert "does not take figures" in said[0]
    (place / "mlflow.db").rmdir()
    (place / "away.db").rename(place / "mlflow.db")
    for step in range(10, 20):
        run.log_metrics({"loss": 1.0 / (step + 1)}, step)
    until(lambda: len(points(store)) > connected)
    run.finalize()
    assert points(store) == {("loss", step): 1 for step in range(20)}
    assert len(said) == 1
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
def test_an_address_that_is_none_is_one_warning_with_the_reason(place, said, store, words):
    train(logger(place / "run", store))
    assert len(said) == 2
    assert words in said[0]
    assert str(place / "run/mlflow") in said[0]
    assert "s3cret" not in "".join(said)
    assert_synced(place / "run", place)


def test_a_store_in_a_folder_that_takes_no_files_is_one_warning(place, said, monkeypatch):
    real = open

    def guarded(file: Any, *args: Any, **options: Any) -> Any:
        if str(file).startswith(str(place / "locked")):
            raise PermissionError(13, "Permission denied", str(file))
        return real(file, *args, **options)

    monkeypatch.setattr("builtins.open", guarded)  # root may write everywhere
    train(logger(place / "run", f"sqlite:///{place}/locked/mlflow.db"))
    assert len(said) == 2
    assert "Permission denied" in said[0]
    assert_synced(place / "run", place)


def test_sync_names_each_run_that_a_store_did_not_take(place, said, capsys, monkeypatch):
    tracked.no_threads(monkeypatch)
    for name in "ab":
        run = logger(place / "runs" / name, "sqlite:///x.db")
        run.log_metrics({"loss": 1.0}, 0)
    with server(ANSWERS["403"]) as port:
        assert main(["mlflow", "sync", "runs", "--store", f"http://me:s3@127.0.0.1:{port}"]) == 2
    shown = capsys.readouterr().err
    for name in "ab":
        assert f"runs/{name}: http://127.0.0.1:{port} does not take it: " in shown
    assert "not you" in shown
    assert "s3" not in shown
    for arguments, words in ((["none"], "not found"), ([str(REPO / "docs")], "has a journal")):
        assert main(["mlflow", "sync", *arguments]) == 2
        assert words in capsys.readouterr().err


def test_sync_takes_the_password_of_the_environment(alone, monkeypatch):
    from yolo_lightning.cli.commands.mlflow.sync import _with_password

    run = logger(alone / "run", "http://me:s3cret@127.0.0.1:1")
    run.log_metrics({"a": 1.0}, 0)
    assert _with_password(run.journal) is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:s3cret@127.0.0.1:1")
    assert _with_password(run.journal) == "http://me:s3cret@127.0.0.1:1"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:s3cret@127.0.0.1:2")
    assert _with_password(run.journal) is None


@pytest.mark.parametrize(
    ("uri", "shown", "written"),
    [
        ("http://me:pass@host:5000/x", "http://host:5000/x", "http://me@host:5000/x"),
        ("http://me:p@ss@host:5000", "http://host:5000", "http://me@host:5000"),
        ("http://me:p/ss@host:5000", "http://host:5000", "http://me@host:5000"),
        ("http://host:5000/a@b", "http://host:5000/a@b", "http://host:5000/a@b"),
        ("http://token@host", "http://host", "http://token@host"),
        ("sqlite:////home/me@work/x.db", "sqlite:////home/me@work/x.db", None),
        ("postgresql://h/d?user=u&password=s", "postgresql://h/d?user=u&password=***", None),
        ("mlruns", "mlruns", None),
    ],
)
def test_addresses_are_told_without_secrets(uri, shown, written):
    assert public(uri) == shown
    if written:
        assert without_password(uri) == written
    sentence = f"API request to {uri} failed,\nor to {uri} "
    assert short(RuntimeError(sentence)) == f"API request to {shown} failed, or to {shown}"[:300]


# --- names and values


@pytest.mark.parametrize(
    "name",
    ["a*b", "../x", "..x/y", "/x", "x/", "a//b", "", ".", "..", "x" * 300, "a\nb", "ü/日本", "a,b",
     "a\0b", "a\udcffb", "a/./b", "x/" * 200, " ", "é" * 250, "a:b c-d.e_f/g"],
)  # fmt: skip
def test_every_name_becomes_one_that_mlflow_takes(name):
    from mlflow.utils.validation import _validate_metric_name, _validate_tag_name

    key = allowed(name)
    _validate_metric_name(key)
    _validate_tag_name(key)
    assert 0 < len(key) <= 250
    if name in ("ü/日本", "a:b c-d.e_f/g", " "):
        assert key == name


def test_two_names_never_become_one():
    names = Names()
    keys = [names.key(name) for name in ("a*b", "a?b", "a_b", "a*b", "x" * 260, "x" * 261)]
    assert keys[0] == keys[3] == "a_b"
    assert len({*keys}) == 5


def test_strange_names_arrive_with_one_warning_each_and_stay_theirs_on_resuming(alone, said):
    store = fresh_store(alone)
    strange = ["a*b", "a?b", "../x", "/lead", "y" * 300, ""]
    run = logger(alone / "run", store, tags={"t*g": "1"})
    for step in range(3):
        run.log_metrics({name: float(step) for name in [*strange, "ü"]}, step)
    assert len(said) == len(strange) + 1
    assert said[1] == "MLflow does not take the name 'a*b' beside others: it is 'a_b' there"
    again = logger(alone / "run", store)
    again.log_metrics(dict.fromkeys(reversed(["a_b", *strange, "ü"]), 3.0), 3)
    ship(alone / "run")
    held = points(store)
    assert len(held) == 3 * 7 + 8
    assert set(held.values()) == {1}
    rows = asked(store, "select step from metrics where key = 'a_b' order by step")
    assert rows == [(0,), (1,), (2,), (3,)]
    assert tags(store)["t_g"] == "1"


def test_numbers_that_are_none_are_kept_and_said_once(alone, said):
    store = fresh_store(alone)
    run = logger(alone / "run", store)
    for step in range(3):
        run.log_metrics({"nan": math.nan, "up": math.inf, "down": -math.inf, "fine": 1.0}, step)
    assert said == [
        "metric nan is not finite (nan at step 0; MLflow shows NaN)",
        "metric up is not finite (inf at step 0; MLflow shows +1.8e308)",
        "metric down is not finite (-inf at step 0; MLflow shows -1.8e308)",
    ]
    ship(alone / "run")
    rows = asked(store, "select key, value, is_nan, count(*) from metrics group by key")
    held = {key: (value, bool(is_nan), count) for key, value, is_nan, count in rows}
    largest = np.finfo(float).max
    assert held == {
        "nan": (0, True, 3), "up": (largest, False, 3), "down": (-largest, False, 3),
        "fine": (1, False, 3),
    }  # fmt: skip


@pytest.mark.parametrize(
    "value", ["text", None, [1, 2], {"a": 1}, np.ones(3), 10**400, object(), "1.5"]
)
def test_a_metric_that_is_no_number_is_left_out_by_name_once(alone, said, value):
    store = fresh_store(alone)
    run: Any = logger(alone / "run", store)
    for step in (0, np.int64(1), 2.0):
        run.log_metrics({"bad": value, "good": np.float32(0.5), "whole": True}, step)
    (warning,) = said
    assert warning.startswith("metric bad is no number, and is left out (")
    ship(alone / "run")
    assert points(store) == {(key, step): 1 for key in ("good", "whole") for step in range(3)}


def test_long_and_odd_values_are_cut_off_with_a_word(alone, said):
    store = fresh_store(alone)
    run = logger(alone / "run", store, tags={"long": "t" * 9000, "number": 3})
    run.log_hyperparams(
        {"text": "p" * 7000, "lines": "a\nb\n", "none": None, "odd": "a\0b\udcff", 7: "key"}
    )
    ship(alone / "run")
    params = dict(asked(store, "select key, value from params"))
    assert (len(params["text"]), params["text"][-2:]) == (6000, "p…")
    assert (params["lines"], params["none"], params["7"]) == ("a\nb\n", "None", "key")
    assert params["odd"] == "a\N{REPLACEMENT CHARACTER}b?"
    assert (len(tags(store)["long"]), tags(store)["number"]) == (8000, "3")
    assert said == [
        "long is cut off for MLflow (9,000 characters, it takes 8,000)",
        "text is cut off for MLflow (7,000 characters, it takes 6,000)",
    ]


def test_parameters_hold_no_password(alone):
    store = fresh_store(alone)
    run = logger(alone / "run", store)
    run.log_hyperparams({"logger": [{"class_path": "a.B", "uri": "http://me:s3cret@host:1/"}]})
    ship(alone / "run")
    assert asked(store, "select value from params where key like '%uri'") == [
        ("http://me@host:1/",)
    ]
    assert not hold_the_password(alone)


@pytest.mark.parametrize("name", ["", "x" * 501])
def test_an_experiment_that_mlflow_cannot_name_is_refused_at_once(alone, name):
    with pytest.raises(InputError, match=r"experiment_name has \d+ characters; allowed: 1 to 500"):
        RunLogger(name)


def test_a_run_s_name_has_no_limit(alone):
    store = fresh_store(alone)
    run = logger(alone / "run", store, run_name="é\udcff" * 200)
    run.log_metrics({"a": 1.0}, 0)
    ship(alone / "run")
    assert asked(store, "select name from runs") == [("é?" * 125,)]


def test_files_that_are_not_there_are_one_warning_each(alone, said):
    store = fresh_store(alone)
    run = logger(alone / "run", store)
    for _ in range(2):
        run.log_file(alone / "none.txt", "plots")
        run.log_folder(alone / "nowhere", "plots")
        run.log_model(alone / "no-model", "detector", 3)
    assert len(said) == 3
    assert all("is not kept for MLflow: " in text for text in said)
    (alone / "run/x.txt").write_text("x")
    run.log_file(alone / "run/x.txt", "plots")
    shutil.rmtree(alone / "run/mlflow/files")
    (alone / "run/x.txt").unlink()
    run.log_metrics({"a": 1.0}, 0)
    ship(alone / "run")
    assert points(store) == {("a", 0): 1}
    assert said[3:] == ["MLflow: left out 1 files that are not there any more: plots/x.txt"]


def test_a_full_disk_under_the_journal_is_one_warning_and_loses_nothing(place, said, monkeypatch):
    store, write = fresh_store(place), os.write
    run = logger(place / "run", store)
    run.log_metrics({"loss": 1.0}, 0)

    def refuse(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("yolo_lightning.tracking.journal.os.write", refuse)
        for step in range(1, 20):
            run.log_metrics({"loss": 1 / (step + 1)}, step)
        run.log_picture("grid", np.zeros((4, 4, 3), np.uint8), 3)
    assert os.write is write
    run.log_metrics({"loss": 0.0}, 20)
    run.finalize()
    assert points(store) == {("loss", step): 1 for step in range(21)}
    (warning,) = said
    assert "No space left on device" in warning
    assert "its lines wait in memory" in warning
    assert len(list(Journal(place / "run" / FOLDER).entries(0, "metrics"))) == 21


def test_a_training_whose_disk_stays_full_is_in_the_store(place, said, monkeypatch):
    store = fresh_store(place)
    run = logger(place / "run", store)
    run.log_metrics({"loss": 1.0}, 0)

    def refuse(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("yolo_lightning.tracking.journal.os.write", refuse)
    for step in range(1, 20):
        run.log_metrics({"loss": 1 / (step + 1)}, step)
    run.finalize()
    assert points(store) == {("loss", step): 1 for step in range(20)}
    assert len(said) == 1


def test_a_folder_that_was_removed_under_a_training_is_written_anew(alone):
    store = fresh_store(alone)
    run = logger(alone / "run", store)
    run.log_metrics({"a": 1.0}, 0)
    shutil.rmtree(alone / "run")
    run.log_metrics({"a": 2.0}, 1)
    assert [e["step"] for e, _ in Journal(alone / "run" / FOLDER).entries(0, "metrics")] == [1]


def test_a_monitor_that_fails_is_said_and_the_others_go_on(said, monkeypatch):
    class Broken(DiskMonitor):
        def aggregate_metrics(self) -> dict[str, float]:
            raise OSError("no /proc here")

    monkeypatch.setattr(system_metrics, "DiskMonitor", Broken)
    found: list[Any] = []
    measured = SystemMetrics(found.append, every_s=0.01)
    time.sleep(0.3)
    measured.stop()
    assert said == ["Broken does not measure any more: no /proc here"]
    assert len(found) > 1
    assert "system/cpu_utilization_percentage" in found[-1]


def test_a_fit_goes_on_beside_a_server_that_hangs_and_is_synced(
    workplace, monkeypatch, said, capsys
):
    tracked.quick_threads(monkeypatch)
    recipe = yaml.safe_load((REPO / "recipes/quickstart.yaml").read_text())
    loggers = recipe["trainer"]["logger"]
    assert "RunLogger" in loggers["class_path"]
    with server(ANSWERS["a hang"]) as port:
        uri = f"--trainer.logger.init_args.tracking_uri=http://127.0.0.1:{port}"
        assert main(["fit", *QUICK, *TINY, uri]) == 0
    assert len([text for text in said if "does not take figures" in text]) == 1
    assert len([text for text in said if "not all of this run is in MLflow" in text]) == 1
    (folder,) = (workplace / "outputs/quickstart").iterdir()
    lines = (folder / "mlflow/journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["op"] for line in lines][0] == "open"
    healthy = fresh_store(workplace, "healthy.db")
    assert main(["mlflow", "sync", str(folder), "--store", healthy]) == 0
    assert asked(healthy, "select status from runs") == [("FINISHED",)]
    steps = asked(healthy, "select step from metrics where key = 'train/lr' order by step")
    assert steps == [(0,), (1,), (2,), (3,)]
    assert set(points(healthy).values()) == {1}
    stored = {path.name for path in (workplace / "mlruns").rglob("*") if path.is_file()}
    assert {"best.ckpt", "recipe.yaml", "resolved.yaml", "tree.tsv", "steps.crc32"} <= stored
