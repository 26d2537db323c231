"""Hostile run folders, working folders and servers: nothing leaves, nothing is overwritten."""

import errno
import functools
import gzip
import json
import os
import resource
import sqlite3
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.rest_utils import MlflowHostCreds, http_request

from tests.helpers.servers import released, respond_with, server
from tests.helpers.tracked import fresh_store, logger, points, query_store, runs, upload
from yolo_lightning.cli.main import main
from yolo_lightning.errors import InputError
from yolo_lightning.tracking import artifacts, bounded_http, files
from yolo_lightning.tracking.journal import RUN_ID_FILE, Journal
from yolo_lightning.tracking.store import create_client, creation_lock, lock
from yolo_lightning.tracking.uploader import Uploader

pytestmark = pytest.mark.end_to_end

SECRET = "-----BEGIN PRIVATE KEY-----"


@pytest.fixture
def folder(folder: Path) -> Path:
    """The working folder with a secret next to the run folder ``a``."""
    (folder / "secret").write_text(SECRET)
    return folder


def upload_all(run: Any) -> None:
    uploader = Uploader(run.journal)
    while uploader.upload_next():
        pass
    uploader.close()


def stored_files(folder: Path) -> list[Path]:
    return [path for path in (folder / "mlruns").rglob("*") if path.is_file()]


def file_entry(name: str, **fields: Any) -> dict[str, Any]:
    return {"op": "file", "t": 1, "file": name, "folder": "x", **fields}


def plant_link(run: Path, secret: Path) -> dict[str, Any]:
    (run / "mlflow/files/x").mkdir(parents=True)
    (run / "mlflow/files/x/link").symlink_to(secret)
    return file_entry("x/link")


def plant_linked_folder(run: Path, secret: Path) -> dict[str, Any]:
    (run / "mlflow/files").mkdir(parents=True)
    (run / "mlflow/files/x").symlink_to(secret.parent)
    return file_entry("x/secret")


def plant_source(run: Path, secret: Path) -> dict[str, Any]:
    return file_entry("x/none", source="../secret")


def plant_absolute_source(run: Path, secret: Path) -> dict[str, Any]:
    return file_entry("x/none", source=str(secret))


def plant_source_link(run: Path, secret: Path) -> dict[str, Any]:
    (run / "link").symlink_to(secret)
    return file_entry("x/none", source="link")


def plant_model(run: Path, secret: Path) -> dict[str, Any]:
    (run / "mlflow/files/models/m").mkdir(parents=True)
    (run / "mlflow/files/models/m/MLmodel").write_text("{}")
    (run / "mlflow/files/models/m/link").symlink_to(secret)
    return {"op": "model", "t": 1, "file": "models/m", "name": "m", "step": 1}


def plant_image(run: Path, secret: Path) -> dict[str, Any]:
    (run / "mlflow/files/images").mkdir(parents=True)
    (run / "mlflow/files/images/i.png").symlink_to(secret)
    return {"op": "image", "t": 1, "file": "images/i.png", "key": "k", "step": 1}


def plant_pipe(run: Path, secret: Path) -> dict[str, Any]:
    (run / "mlflow/files/x").mkdir(parents=True)
    os.mkfifo(run / "mlflow/files/x/pipe")
    return file_entry("x/pipe")


PLANTED = [
    plant_link, plant_linked_folder, plant_source, plant_absolute_source, plant_source_link,
    plant_model, plant_image, plant_pipe,
]  # fmt: skip


@pytest.mark.parametrize("plant", PLANTED)
def test_no_file_outside_of_the_run_folder_is_uploaded(folder, store, warnings, plant, monkeypatch):
    monkeypatch.setattr(
        artifacts, "log_model", lambda client, run_id, path, *_: pytest.fail("was logged")
    )
    run = logger(folder / "a", store)
    run.log_metrics({"loss": 1.0}, 0)
    run.journal.append(plant(folder / "a", folder / "secret"))
    run.log_metrics({"loss": 1.0}, 1)
    assert upload(folder / "a").pending == []
    assert points(store) == {("loss", 0): 1, ("loss", 1): 1}, "the rest is uploaded"
    assert not [path for path in stored_files(folder) if SECRET in path.read_text()]
    (warning,) = warnings
    assert "skipped" in warning
    assert "run folder" in warning or "not a regular file" in warning


def test_links_inside_the_run_folder_and_hard_links_are_uploaded(folder, store, warnings):
    run = logger(folder / "a", store)
    run.log_metrics({"loss": 1.0}, 0)
    (folder / "a/plain").write_text("inside")
    (folder / "a/link").symlink_to("plain")
    pending = folder / "a/mlflow/files/x/hard"
    pending.parent.mkdir(parents=True)
    pending.hardlink_to(folder / "secret")
    run.journal.append(file_entry("x/none", source="link"))
    run.journal.append(file_entry("x/hard"))
    upload(folder / "a")
    assert sorted(path.read_text() for path in stored_files(folder)) == [SECRET, "inside"]
    assert warnings == []


def test_a_file_that_is_too_large_is_skipped(folder, store, warnings, monkeypatch):
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 2**30)
    run = logger(folder / "a", store)
    run.log_metrics({"loss": 1.0}, 0)
    pending = folder / "a/mlflow/files/x/large"
    pending.parent.mkdir(parents=True)
    with pending.open("wb") as file:
        file.truncate(2**31)
    run.journal.append(file_entry("x/large"))
    upload(folder / "a")
    assert not stored_files(folder)
    assert "x/large: larger than 1 GiB" in warnings[0]


def test_a_store_that_only_the_run_names_gets_nothing(folder, store, capsys, monkeypatch):
    named = fresh_store(folder, "stranger.db")
    run = logger(folder / "a", named)
    run.log_metrics({"loss": 1.0}, 0)
    assert main(["mlflow", "sync", "a"]) == 2
    shown = capsys.readouterr().err
    assert f"names the store {named}, not yours, {store}" in shown
    assert "--store" in shown
    assert (runs(named), runs(store)) == ([], [])
    assert main(["mlflow", "sync", "a", "--store", named]) == 0
    assert points(named) == {("loss", 0): 1}
    run.log_metrics({"loss": 1.0}, 1)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", named)
    assert main(["mlflow", "sync", "a"]) == 0
    assert points(named) == {("loss", 0): 1, ("loss", 1): 1}


def write_entry(journal: Path, **fields: Any) -> None:
    entry = file_entry("checkpoints/a", callback="c", **fields)
    (journal / "journal.jsonl").write_text(json.dumps(entry) + "\n")


def write_empty_metrics(journal: Path) -> None:
    line = '{"op": "metrics", "t": 1, "step": 9, "values": {}}'
    (journal / "journal.jsonl").write_text(line + "\n")


def write_index(journal: Path, text: str) -> None:
    """Write an index that fits to the journal, where it may."""
    (journal / "journal.jsonl").write_text("x\n" * 50)
    (journal / "index.jsonl").write_text(text + "\n")


def write_part(journal: Path, **values: Any) -> None:
    part = {"op": "part", "end": 100, "first": 0, "last": 9, "state": []}
    write_index(journal, json.dumps(part | values))


def plant_overlapping_parts(journal: Path) -> None:
    """Write an index that describes the same lines many times."""
    part = '{"op": "part", "end": %d, "first": 0, "last": 9, "state": []}\n'
    write_index(journal, "".join(part % (50 + 50 * (k % 2)) for k in range(5_000)))
    line = '{"op": "metrics", "t": 1, "step": 1, "values": {"a": 1}}\n'
    (journal / "journal.jsonl").write_text(line * 5_000)


@pytest.mark.parametrize("plant", [
    lambda journal: (journal / "index.jsonl").mkdir(),
    lambda journal: os.mkfifo(journal / "index.jsonl"),
    lambda journal: (journal / "index.jsonl").symlink_to(journal.parent.parent / "secret"),
    lambda journal: write_index(journal, "[]"),
    lambda journal: write_index(journal, '{"first": 1}'),
    lambda journal: write_index(journal, "[" * 200_000),
    lambda journal: write_index(journal, '{"op": "part", "state": [' * 20_000),
    lambda journal: write_part(journal, end="x"),
    lambda journal: write_part(journal, end=10**30),
    lambda journal: write_part(journal, samples=None),
    lambda journal: write_part(journal, state=[1]),
    lambda journal: write_part(journal, state=[{"op": "params", "values": {"a": 1}}]),
    lambda journal: write_part(journal, state=[{"op": "zap"}]),
    plant_overlapping_parts,
    lambda journal: write_entry(journal, mtime_ns="x"),
    lambda journal: write_entry(journal, mtime_ns=[1]),
    lambda journal: (journal / "files").symlink_to(journal.parent.parent),
    lambda journal: (journal / "files").symlink_to("files"),
    write_empty_metrics,
])  # fmt: skip
def test_a_training_is_resumed_in_a_hostile_run_folder(folder, store, warnings, plant, monkeypatch):
    monkeypatch.setattr(Journal, "PART_BYTES", 50)
    journal = folder / "a/mlflow"
    journal.mkdir(parents=True)
    plant(journal)
    started = time.monotonic()
    run = logger(folder / "a", store)
    run.start_training(0)
    run.log_metrics({"loss": 1.0}, 0)
    run.log_image("image", np.zeros((8, 8, 3), np.uint8), 0)
    run.log_artifact(folder / "secret", "reports")
    (folder / "model").mkdir()
    run.log_model(folder / "model", "model", 0)
    assert time.monotonic() - started < 2
    assert {path.name for path in folder.iterdir()} <= {
        "a", "secret", "model", "mlflow.db", "mlflow.db.lock",
    }  # fmt: skip
    upload(folder / "a")
    assert points(store)[("loss", 0)] == 1


@pytest.mark.parametrize("run_id", ["../../../x", "a?b=c", "a b", "x" * 300, 3, ["a"], {"a": 1}])
def test_a_run_id_of_another_form_is_never_sent(folder, store, warnings, run_id, monkeypatch):
    run = logger(folder / "a", store)
    run.log_metrics({"loss": 1.0}, 0)
    journal = folder / "a/mlflow/journal.jsonl"
    first, *rest = journal.read_text().splitlines()
    opened = json.loads(first) | {"run_ids": [run_id], "checkpoint_run_id": run_id}
    journal.write_text("\n".join([json.dumps(opened), *rest, ""]))
    requested: list[str] = []
    get_run = MlflowClient.get_run

    def recorded(self: Any, requested_id: str) -> Any:
        requested.append(requested_id)
        return get_run(self, requested_id)

    monkeypatch.setattr(MlflowClient, "get_run", recorded)
    upload(folder / "a")
    assert set(requested) <= {runs(store)[0]}
    assert points(store) == {("loss", 0): 1}
    assert len(warnings) == 1
    assert "does not exist" in warnings[0]


@pytest.mark.parametrize("name", ["lock", "uploaded.json", "uploaded.json.part", "journal.jsonl"])
def test_links_in_the_journal_folder_are_not_written_through(folder, store, name):
    (folder / "a/mlflow").mkdir(parents=True)
    (folder / "a/mlflow" / name).symlink_to(folder / "secret")
    run = logger(folder / "a", store)
    run.log_metrics({"loss": 1.0}, 0)
    upload_all(run)
    assert (folder / "secret").read_text() == SECRET
    assert points(store) == {("loss", 0): 1}


@pytest.mark.parametrize("name", ["mlflow/journal.jsonl", "mlflow/uploaded.json", "mlflow_run_id"])
def test_a_file_that_cannot_be_read_is_named(folder, store, capsys, name, monkeypatch):
    """Without it an upload would be incomplete, or go to a second run."""
    run = logger(folder / "a", store)
    run.log_metrics({"loss": 1.0}, 0)
    (folder / "a" / name).touch()
    os_open = os.open

    def refuse(path: Any, flags: int, *mode: Any) -> int:
        if str(path).endswith(name) and flags & os.O_ACCMODE == os.O_RDONLY:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return os_open(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    assert main(["mlflow", "sync", "a"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert f"a/{name}: not readable (Permission denied)" in shown
    assert points(store) == {}


def test_a_token_that_cannot_be_read_is_named(folder, store, capsys, monkeypatch):
    logger(folder / "a", store).log_metrics({"loss": 1.0}, 0)

    def refuse(path: Path) -> str:
        raise InputError(f"{path}: not readable (Permission denied)")

    monkeypatch.setattr("yolo_lightning.tracking.journal.read_text", refuse)
    assert main(["mlflow", "sync", "a"]) == 2
    assert "a/mlflow/token: not readable" in capsys.readouterr().err
    assert runs(store) == []


def test_a_linked_run_id_file_is_replaced_and_a_linked_token_is_not_sent(folder, store):
    (folder / "a/mlflow").mkdir(parents=True)
    (folder / "a" / RUN_ID_FILE).symlink_to(folder / "secret")
    (folder / "a/mlflow/token").symlink_to(folder / "secret")
    run = logger(folder / "a", store)
    run.log_metrics({"loss": 1.0}, 0)
    upload_all(run)
    assert (folder / "secret").read_text() == SECRET
    assert not query_store(store, "select * from tags where value like '%PRIVATE%'")
    assert (folder / "a" / RUN_ID_FILE).read_text() == runs(store)[0]


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_lock_never_changes_what_stands_at_its_place(folder, kind):
    file, words = folder / "mlflow.db.lock", "is a link" if kind == "link" else "not a regular file"
    file.symlink_to(folder / "secret") if kind == "link" else os.mkfifo(file)
    with pytest.raises(OSError, match=words), creation_lock(f"sqlite:///{folder}/mlflow.db"):
        pytest.fail("locked")
    with pytest.raises(OSError, match=words):
        lock(file)
    assert (folder / "secret").read_text() == SECRET


def test_files_go_to_no_server_that_the_store_does_not_name(folder, store, warnings):
    run = logger(folder / "a", store)
    (folder / "plot").write_text("x")
    run.log_artifact(folder / "plot", "plots")
    run.log_metrics({"loss": 1.0}, 0)
    database = sqlite3.connect(folder / "mlflow.db")
    database.execute("insert into experiments (name, artifact_location, lifecycle_stage) values "
                     "('tests', 'mlflow-artifacts://attacker:5000/x', 'active')")  # fmt: skip
    database.commit()
    database.close()
    assert len(upload(folder / "a").pending) == 1
    assert "belong to another server, attacker" in warnings[0]
    assert points(store) == {("loss", 0): 1}


# --- answers of servers


class Flood:
    """Sends up to 2 GB and counts what was taken."""

    def __init__(self, length: str | None = None) -> None:
        self.length, self.sent = length, 0

    def __call__(self, request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        if self.length:
            request.send_header("Content-Length", self.length)
        request.end_headers()
        request.wfile.write(b'{"experiment": "')
        for _ in range(2000):
            self.sent += request.wfile.write(b"x" * 2**20)


def drip_body(request: BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.send_header("Content-Length", "100000")
    request.end_headers()
    while not released.wait(0.05):
        request.wfile.write(b" ")


def drip_headers(request: BaseHTTPRequestHandler) -> None:
    request.wfile.write(b"HTTP/1.1 200 OK\r\nX-Header: ")
    while not released.wait(0.05):
        request.wfile.write(b"x")


@functools.cache
def compressed_answer() -> bytes:
    return gzip.compress(b'{"a": "' + b" " * 2**26 + b'"}', 1)


def gzip_bomb(request: BaseHTTPRequestHandler) -> None:
    data = compressed_answer()
    assert "gzip" not in request.headers["Accept-Encoding"]
    request.send_response(200)
    request.send_header("Content-Encoding", "gzip")
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    request.wfile.write(data)


@pytest.fixture
def short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    compressed_answer()  # not within the second that an answer may take
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setattr(bounded_http, "_TIME_FACTOR", 1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.mark.parametrize(("respond", "words"), [
    (Flood(), "larger than 32 MiB"), (Flood(str(2**31)), "larger than 32 MiB"),
    (drip_body, "took longer than 1 s"), (drip_headers, "the answer too"),
    (gzip_bomb, "compressed (gzip)"),
])  # fmt: skip
def test_answers_are_bounded_in_size_and_time(folder, short_timeout, capsys, respond, words):
    run = logger(folder / "a", "sqlite:///none.db")
    run.log_metrics({"loss": 1.0}, 0)
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with server(respond) as port:
        assert main(["mlflow", "sync", "a", "--store", f"http://127.0.0.1:{port}"]) == 2
    assert words in capsys.readouterr().err
    assert time.monotonic() - started < 6
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000, "kB"
    if isinstance(respond, Flood):
        assert respond.sent < 100 * 2**20


@pytest.mark.parametrize("respond", [Flood(), drip_body, drip_headers, gzip_bomb])
def test_compare_bounds_answers_too(folder, short_timeout, capsys, respond, monkeypatch):
    monkeypatch.setattr("yolo_lightning.cli.commands.mlflow.compare.check_store", lambda uri: "")
    with server(respond) as port:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        started = time.monotonic()
        assert main(["mlflow", "compare"]) == 2
        assert time.monotonic() - started < 6
    assert f"http://127.0.0.1:{port}: API request to" in capsys.readouterr().err


def test_redirects_are_refused(folder, short_timeout, capsys):
    """A redirect could name another host, and MLflow would send it headers of its own."""
    reached: list[str] = []

    def record(request: BaseHTTPRequestHandler) -> None:
        reached.append(request.path)

    run = logger(folder / "a", "sqlite:///none.db")
    run.log_metrics({"loss": 1.0}, 0)
    with server(record) as other:
        redirect = respond_with(302, "", Location=f"http://localhost:{other}/x")
        with server(redirect) as port:
            uri = f"http://me:s3cret@127.0.0.1:{port}"
            assert main(["mlflow", "sync", "a", "--store", uri]) == 2
    assert "302" in capsys.readouterr().err
    assert reached == []


def test_each_answer_of_a_connection_has_its_own_limits(folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    monkeypatch.setattr(bounded_http, "MAX_ANSWER_BYTES", 1000)
    requests = []

    def respond(request: BaseHTTPRequestHandler) -> None:
        request.protocol_version, request.close_connection = "HTTP/1.1", False
        requests.append(request.path)
        respond_with(500, "x" * 700)(request)

    with server(respond) as port, pytest.raises(MlflowException, match="500") as error:
        create_client(f"http://127.0.0.1:{port}").get_experiment("1")
    assert len(requests) == 3
    assert "larger" not in str(error.value)


def test_a_download_may_be_larger_than_an_answer(folder, monkeypatch):
    monkeypatch.setattr(bounded_http, "MAX_ANSWER_BYTES", 100_000)
    bounded_http.bound_answers()
    with server(respond_with(200, "x" * 900_000)) as port:
        host = MlflowHostCreds(f"http://127.0.0.1:{port}")
        assert len(http_request(host, "/x", "GET", stream=True).content) == 900_000
        with pytest.raises(MlflowException, match="larger"):
            http_request(host, "/x", "GET")
