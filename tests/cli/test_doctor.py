"""The doctor, in process: what is there, what answers, and that secrets stay out of it."""

import http.server
import socket
import sqlite3
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.paths import REPO
from yolo_lightning.cli.commands import doctor
from yolo_lightning.cli.commands.doctor import answers as doctor_answers
from yolo_lightning.cli.commands.doctor.answers import rendezvous, tracking, within
from yolo_lightning.cli.main import main
from yolo_lightning.errors import InputError
from yolo_lightning.tracking.store import masked

MEETING = ("MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID")


@pytest.fixture
def alone(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in MEETING:
        monkeypatch.delenv(name, raising=False)
    return workplace


@contextmanager
def server(status: int = 200, body: bytes = b"OK") -> Iterator[tuple[int, list[str]]]:
    """Answer on a port of this machine; yields the port, and what was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.path} {self.headers.get('Authorization')}")
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running.server_address[1], asked
        running.shutdown()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as trial:
        return int(trial.getsockname()[1])


def test_it_reports_and_creates_nothing(alone, capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    for words in ("yolo-lightning", "torch", "mlflow", "CPU", "GPU", "JPEG, PNG, WebP", "outputs",
                  "sqlite:///mlflow.db: the first run creates it", "none asked for: one machine",
                  "started by hand", "all well"):  # fmt: skip
        assert words in said, words
    assert sorted(path.name for path in alone.iterdir()) == ["recipes"]


def test_a_tracking_server_that_is_gone_is_a_failure_without_its_secrets(
    alone, monkeypatch, capsys
):
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:hush-hush@127.0.0.1:{port}")
    started = time.monotonic()
    assert main(["doctor"]) == 2
    assert time.monotonic() - started < 10
    said = capsys.readouterr()
    expected = f"tracking: http://***@127.0.0.1:{port}: does not answer: "
    assert expected in said.err
    assert "hush" not in said.out + said.err
    assert "all well" not in said.out


def test_a_tracking_server_is_asked_for_its_health_and_gets_no_password(alone, monkeypatch, capsys):
    with server() as (port, asked):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:hush-hush@127.0.0.1:{port}/base/")
        assert main(["doctor"]) == 0
    assert asked == ["/base/health None"]
    assert f"http://***@127.0.0.1:{port}/base/: answers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "body", "state", "said"),
    [
        (401, b"", "note", "wants to know who asks (401)"),
        (404, b"", "failed", "answers with 404"),
        (500, b"", "failed", "answers with 500"),
        (200, b"<html>", "failed", "not as an MLflow server"),
    ],
)
def test_other_answers_are_told_apart(status, body, state, said):
    with server(status, body) as (port, _):
        found = tracking(f"http://127.0.0.1:{port}")
    assert found.state == state
    assert said in found.text


def test_a_server_that_never_answers_is_left(monkeypatch):
    monkeypatch.setattr(doctor_answers, "_TRACKING_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        found = tracking(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - started < 2
    assert found.state == "failed"
    assert "does not answer" in found.text


def test_a_lookup_that_hangs_is_left():
    with pytest.raises(TimeoutError, match="no answer within 0.1 s"):
        within(0.1, lambda: time.sleep(5))
    assert within(1, lambda: 3) == 3
    with pytest.raises(KeyError):
        within(1, lambda: dict[str, int]()["x"])


def test_stores_in_files_are_told_apart(tmp_path):
    store = tmp_path / "mlflow.db"
    uri = f"sqlite:///{store}"
    assert tracking(uri).text.endswith("the first run creates it")
    assert not store.exists()
    store.write_bytes(b"no database at all, but long enough to be looked at" * 40)
    assert tracking(uri).state == "failed"
    assert "is no store of MLflow" in tracking(uri).text
    store.unlink()
    with sqlite3.connect(store) as database:
        database.execute("create table runs (id text)")
        database.execute("insert into runs values ('a'), ('b')")
    database.close()
    assert (tracking(uri).state, tracking(uri).text) == ("ok", f"{uri}: 2 runs")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db"]
    assert tracking(str(tmp_path)).state == "failed"
    assert tracking(f"file://{tmp_path}").state == "failed"
    assert tracking("databricks").state == "failed"
    assert tracking("databricks://profile").state == "note"


def test_a_database_server_is_asked_for_its_port():
    with socket.create_server(("127.0.0.1", 0)) as database:
        port = database.getsockname()[1]
        found = tracking(f"postgresql+psycopg2://me:hush@127.0.0.1:{port}/runs")
    assert found.state == "ok"
    assert found.text.startswith(f"postgresql+psycopg2://***@127.0.0.1:{port}/runs: ")
    assert tracking(f"mysql://127.0.0.1:{free_port()}/runs").state == "failed"


def test_secrets_are_masked():
    assert masked("http://a:b@host/x") == "http://***@host/x"
    assert masked("http://a:b/c@d@host/x") == "http://***@host/x"
    assert masked("http://host/x?token=1&a=2&Password=3") == (
        "http://host/x?token=***&a=2&Password=***"
    )
    assert masked("sqlite:///a/b.db") == "sqlite:///a/b.db"
    assert (
        tracking("http://me:hush:hush@127.0.0.1:x/").text
        == "http://***@127.0.0.1:x/: is no address"
    )


def job(port: int, **others: str) -> dict[str, str]:
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **others}


def test_the_rendezvous_is_free_here_or_answers(monkeypatch):
    port = free_port()
    assert rendezvous({}).text == "none asked for: one machine"
    assert "is free on 127.0.0.1" in rendezvous(job(port)).text
    with socket.create_server(("127.0.0.1", port)):
        assert rendezvous(job(port)).text.endswith("answers")
    monkeypatch.setattr(doctor_answers, "_is_here", lambda address: False)
    monkeypatch.setattr(doctor_answers, "_LOOKUP_S", 0.3)
    found = rendezvous(job(port))  # now another machine's, where nobody listens
    assert found.state == "failed"
    assert f"port {port} of 127.0.0.1 does not answer" in found.text


def test_a_host_without_an_address_is_named(monkeypatch):
    def lookup(*args: object, **options: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    found = rendezvous({"MASTER_ADDR": "nowhere", "MASTER_PORT": "1234"})
    assert found.state == "failed"
    assert found.text == "nowhere has no address: Name or service not known"
    nodes = {"SLURM_NODELIST": "gpu[07-09,12],cpu1", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "71234"}
    assert rendezvous(nodes).text.startswith("gpu07 has no address")
    assert "one machine" in rendezvous({**nodes, "SLURM_JOB_NAME": "bash"}).text
    with pytest.raises(InputError, match="MASTER_PORT is 'x'; allowed: 1 … 65535"):
        rendezvous({"MASTER_ADDR": "a", "MASTER_PORT": "x"})


def test_the_ranks_of_a_job_meet(monkeypatch):
    monkeypatch.setattr(doctor_answers, "_MEETING_S", 3.0)
    port = free_port()
    found: dict[int, str] = {}

    def run(rank: int) -> None:
        found[rank] = rendezvous(job(port, RANK=str(rank), WORLD_SIZE="3")).text

    ranks = [threading.Thread(target=run, args=(rank,)) for rank in (1, 2, 0)]
    for rank in ranks:  # rank 0 comes last: the others wait for it
        rank.start()
        time.sleep(0.1)
    for rank in ranks:
        rank.join()
    assert found == {
        0: f"2 of 2 other ranks came to port {port} of 127.0.0.1",
        1: f"port {port} of 127.0.0.1 answers",
        2: f"port {port} of 127.0.0.1 answers",
    }
    monkeypatch.setattr(doctor_answers, "_MEETING_S", 0.3)
    lonely = rendezvous(job(port, SLURM_PROCID="0", SLURM_NTASKS="3", SLURM_STEP_ID="0"))
    assert lonely.state == "failed"
    assert lonely.text.startswith("0 of 2 other ranks came")


def test_a_recipe_says_what_is_needed(alone, capsys, monkeypatch):
    recipe = "recipes/quickstart.yaml"
    with server() as (port, _):
        options = ["--trainer.logger.init_args.tracking_uri", f"http://127.0.0.1:{port}"]
        assert main(["doctor", "--recipe", recipe, *options]) == 0
    said = capsys.readouterr().out
    assert "outputs/quickstart" in said
    assert f"http://127.0.0.1:{port}: answers" in said
    assert main(["doctor", "--recipe", recipe, "--trainer.logger=false"]) == 0
    assert "the recipe logs nowhere" in capsys.readouterr().out
    assert main(["doctor", "--recipe", recipe, "--trainer.num_nodes=2"]) == 2
    assert "launch: the recipe says trainer.num_nodes 2" in capsys.readouterr().err
    assert main(["doctor", "--recipe", recipe, "--model=os.system"]) == 2
    assert "model names 'os.system'" in capsys.readouterr().err
    assert main(["doctor", "--recip3", recipe]) == 2
    assert "--recip3: no such option" in capsys.readouterr().err


def test_loader_workers_need_shared_memory(tmp_path):
    values = {
        "data.init_args.canvas_size": 608, "data.init_args.num_workers": 4,
        "data.init_args.detection_batch_size": 64, "data.init_args.classification_batch_size": 16,
    }  # fmt: skip
    assert doctor.needed_by(values, 1) == 2 * 4 * 64 * 3 * 608 * 608
    assert doctor.needed_by(values, 4) == 2 * 4 * 16 * 3 * 608 * 608
    assert doctor.needed_by({**values, "data.init_args.num_workers": 0}, 1) == 0
    assert doctor.needed_by({"data.image_size": "${..x}"}, 1) is None
    much, little = doctor.storage(str(tmp_path), 2**60, str(tmp_path)), doctor.storage(
        str(tmp_path / "not/there"), 1, str(tmp_path)
    )  # fmt: skip
    assert [finding.state for finding in much] == ["ok", "failed"]
    assert "--shm-size" in much[1].text
    assert [finding.state for finding in little] == ["ok", "ok"]
    assert not (tmp_path / "not").exists()
    (tmp_path / "file").write_text("")
    assert doctor.storage(str(tmp_path / "file/runs"), None)[0].state == "failed"


def test_missing_packages_are_named_with_what_installs_them(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    lines = {finding.name: finding for finding in doctor.extras()}
    assert lines["export"].text == (
        "onnx, onnxscript, onnxruntime missing: pip install 'yolo-lightning[export]'"
    )
    assert {finding.state for finding in lines.values()} == {"note"}
    monkeypatch.setattr(doctor, "_PACKAGES", ("no-such-package",))
    assert doctor.versions()[-1].state == "failed"


def test_the_extras_are_those_of_the_project():
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    declared = {
        extra: tuple(requirement.split(">=")[0] for requirement in requirements)
        for extra, requirements in project["optional-dependencies"].items()
        if extra != "dev"
    }
    assert declared == doctor.EXTRAS


def test_a_torch_without_cuda_beside_gpus_is_a_failure(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("yolo_lightning.cli.launch.visible_gpus", lambda environment: 2)
    found = {finding.name: finding for finding in doctor.devices()}
    assert found["GPU"].state == "failed"
    assert found["GPU"].text.startswith("2 are there, and torch")
    assert "cores" in found["CPU"].text
