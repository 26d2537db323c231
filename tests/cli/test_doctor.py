"""The command `doctor`, in process: its checks, and that it never prints passwords."""

import http.server
import socket
import sqlite3
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers.paths import REPO
from yolo_lightning.cli.commands import doctor
from yolo_lightning.cli.commands.doctor import connections
from yolo_lightning.cli.commands.doctor.connections import (
    call_with_timeout,
    check_rendezvous,
    check_tracking,
)
from yolo_lightning.cli.main import main
from yolo_lightning.errors import InputError

JOB_VARIABLES = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_NTASKS",
    "SLURM_JOB_ID",
    "TORCHELASTIC_RUN_ID",
)


@pytest.fixture
def outside_of_jobs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in JOB_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return workplace


@contextmanager
def server(status: int = 200, body: bytes = b"OK") -> Iterator[tuple[int, list[str]]]:
    """Run a server on a local port; yield the port and the list of its requests."""
    requests: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(f"{self.path} {self.headers.get('Authorization')}")
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield http_server.server_address[1], requests
        http_server.shutdown()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_doctor_prints_a_report_and_creates_nothing(outside_of_jobs, capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for text in ("yolo-lightning", "torch", "mlflow", "CPU", "GPU", "outputs",
                 "images  JPEG, PNG, WebP, BMP, TIFF\n",
                 "sqlite:///mlflow.db: will be created by the first run", "not needed: one machine",
                 "a single process, without a launcher", "no problems found"):  # fmt: skip
        assert text in printed, text
    assert sorted(path.name for path in outside_of_jobs.iterdir()) == ["recipes"]


def test_unreachable_tracking_server_fails_without_printing_the_password(
    outside_of_jobs, monkeypatch, capsys
):
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:hush-hush@127.0.0.1:{port}")
    started = time.monotonic()
    assert main(["doctor"]) == 2
    assert time.monotonic() - started < 10
    output = capsys.readouterr()
    expected = f"tracking: http://***@127.0.0.1:{port}: unreachable: "
    assert expected in output.err
    assert "hush" not in output.out + output.err
    assert "no problems found" not in output.out


def test_tracking_check_requests_health_without_credentials(outside_of_jobs, monkeypatch, capsys):
    with server() as (port, requests):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:hush-hush@127.0.0.1:{port}/base/")
        assert main(["doctor"]) == 0
    assert requests == ["/base/health None"]
    assert f"http://***@127.0.0.1:{port}/base/: reachable" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "body", "state", "message"),
    [
        (401, b"", "note", "requires authentication (401)"),
        (404, b"", "failed", "HTTP status 404"),
        (500, b"", "failed", "HTTP status 500"),
        (200, b"<html>", "failed", "not an MLflow server"),
    ],
)
def test_unexpected_responses_are_reported(status, body, state, message):
    with server(status, body) as (port, _):
        result = check_tracking(f"http://127.0.0.1:{port}")
    assert result.state == state
    assert message in result.text


def test_tracking_check_times_out(monkeypatch):
    monkeypatch.setattr(connections, "_TRACKING_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        result = check_tracking(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - started < 2
    assert result.state == "failed"
    assert "unreachable" in result.text


def test_call_with_timeout_gives_up_on_a_hanging_call():
    with pytest.raises(TimeoutError, match="no reply within 0.1 s"):
        call_with_timeout(0.1, lambda: time.sleep(5))
    assert call_with_timeout(1, lambda: 3) == 3
    with pytest.raises(KeyError):
        call_with_timeout(1, lambda: dict[str, int]()["x"])


def test_sqlite_files_and_folders_are_checked(tmp_path):
    store = tmp_path / "mlflow.db"
    uri = f"sqlite:///{store}"
    assert check_tracking(uri).text.endswith("will be created by the first run")
    assert not store.exists()
    store.write_bytes(b"no database at all, but long enough to be looked at" * 40)
    assert check_tracking(uri).state == "failed"
    assert "not an MLflow store" in check_tracking(uri).text
    store.unlink()
    with sqlite3.connect(store) as database:
        database.execute("create table runs (id text)")
        database.execute("insert into runs values ('a'), ('b')")
    database.close()
    assert (check_tracking(uri).state, check_tracking(uri).text) == ("ok", f"{uri}: 2 runs")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db"]
    assert check_tracking(str(tmp_path)).state == "failed"
    assert check_tracking(f"file://{tmp_path}").state == "failed"
    assert check_tracking("databricks").state == "failed"
    assert check_tracking("databricks://profile").state == "note"


def test_only_the_port_of_a_database_server_is_checked():
    with socket.create_server(("127.0.0.1", 0)) as database:
        port = database.getsockname()[1]
        result = check_tracking(f"postgresql+psycopg2://me:hush@127.0.0.1:{port}/runs")
    assert result.state == "ok"
    assert result.text.startswith(f"postgresql+psycopg2://***@127.0.0.1:{port}/runs: ")
    assert check_tracking(f"mysql://127.0.0.1:{free_port()}/runs").state == "failed"


def test_credentials_are_masked():
    assert (
        check_tracking("http://me:hush:hush@127.0.0.1:x/").text
        == "http://***@127.0.0.1:x/: not a valid address"
    )


def job_environment(port: int, **others: str) -> dict[str, str]:
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **others}


def test_rendezvous_port_must_be_free_locally_or_reachable(monkeypatch):
    port = free_port()
    assert check_rendezvous({}).text == "not needed: one machine"
    assert "is free on 127.0.0.1" in check_rendezvous(job_environment(port)).text
    with socket.create_server(("127.0.0.1", port)):
        assert check_rendezvous(job_environment(port)).text.endswith("is reachable")
    monkeypatch.setattr(connections, "_listen", lambda addresses: None)
    monkeypatch.setattr(connections, "_LOOKUP_TIMEOUT_S", 0.3)
    result = check_rendezvous(
        job_environment(port)
    )  # as seen from another machine, with no listener
    assert result.state == "failed"
    assert f"port {port} of 127.0.0.1 is unreachable" in result.text


def test_unresolvable_host_is_named(monkeypatch):
    def lookup(*args: object, **options: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    result = check_rendezvous({"MASTER_ADDR": "nowhere", "MASTER_PORT": "1234"})
    assert result.state == "failed"
    assert result.text == "cannot resolve nowhere: Name or service not known"
    nodes = {"SLURM_NODELIST": "gpu[07-09,12],cpu1", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "71234"}
    assert check_rendezvous(nodes).text.startswith("cannot resolve gpu07")
    assert "one machine" in check_rendezvous({**nodes, "SLURM_JOB_NAME": "bash"}).text
    with pytest.raises(InputError, match="MASTER_PORT is 'x'; allowed: 1 … 65535"):
        check_rendezvous({"MASTER_ADDR": "a", "MASTER_PORT": "x"})


def test_ranks_connect_to_rank_0(monkeypatch):
    monkeypatch.setattr(connections, "_RENDEZVOUS_TIMEOUT_S", 3.0)
    port = free_port()
    texts: dict[int, str] = {}

    def run(rank: int) -> None:
        texts[rank] = check_rendezvous(job_environment(port, RANK=str(rank), WORLD_SIZE="3")).text

    ranks = [threading.Thread(target=run, args=(rank,)) for rank in (1, 2, 0)]
    for rank in ranks:  # rank 0 comes last: the others wait for it
        rank.start()
        time.sleep(0.1)
    for rank in ranks:
        rank.join()
    assert texts == {
        0: f"2 of 2 other ranks connected to port {port} of 127.0.0.1",
        1: f"port {port} of 127.0.0.1 is reachable",
        2: f"port {port} of 127.0.0.1 is reachable",
    }
    monkeypatch.setattr(connections, "_RENDEZVOUS_TIMEOUT_S", 0.3)
    unconnected = check_rendezvous(
        job_environment(port, SLURM_PROCID="0", SLURM_NTASKS="3", SLURM_STEP_ID="0")
    )
    assert unconnected.state == "failed"
    assert unconnected.text.startswith("0 of 2 other ranks connected")


def test_recipe_values_are_checked(outside_of_jobs, capsys, monkeypatch):
    recipe = "recipes/quickstart.yaml"
    with server() as (port, _):
        options = ["--trainer.logger.init_args.tracking_uri", f"http://127.0.0.1:{port}"]
        assert main(["doctor", "--recipe", recipe, *options]) == 0
    printed = capsys.readouterr().out
    assert "outputs/quickstart" in printed
    assert f"http://127.0.0.1:{port}: reachable" in printed
    assert main(["doctor", "--recipe", recipe, "--trainer.logger=false"]) == 0
    assert "disabled by the recipe" in capsys.readouterr().out
    assert main(["doctor", "--recipe", recipe, "--trainer.num_nodes=2"]) == 2
    assert "launch: the recipe has trainer.num_nodes 2" in capsys.readouterr().err
    Path("hostile.yaml").write_text("model: {class_path: os.system}\n")
    assert main(["doctor", "--recipe", "hostile.yaml"]) == 2
    assert "model.class_path names 'os.system'" in capsys.readouterr().err
    assert main(["doctor", "--recip3", recipe]) == 2
    assert "--recip3: no such option" in capsys.readouterr().err


def test_shared_memory_of_loader_workers_is_checked(tmp_path):
    values = {
        "data.init_args.image_size": 608, "data.init_args.num_workers": 4,
        "data.init_args.detection_batch_size": 64, "data.init_args.classification_batch_size": 16,
    }  # fmt: skip
    assert doctor.loader_memory_bytes(values, 1) == 2 * 4 * 64 * 3 * 608 * 608
    assert doctor.loader_memory_bytes(values, 4) == 2 * 4 * 16 * 3 * 608 * 608
    assert doctor.loader_memory_bytes({**values, "data.init_args.num_workers": 0}, 1) == 0
    scales = {
        "class_path": "yolo_lightning.callbacks.MultiScale", "init_args": {"sizes": [320, 640]},
    }  # fmt: skip
    scaled = {**values, "trainer.callbacks": [{"class_path": "other.Callback"}, scales]}
    assert doctor.loader_memory_bytes(scaled, 1) == 2 * 4 * 64 * 3 * 640 * 640
    assert doctor.loader_memory_bytes({"data.image_size": "${..x}"}, 1) is None
    insufficient = list(doctor.storage(str(tmp_path), 2**60, str(tmp_path)))
    sufficient = list(doctor.storage(str(tmp_path / "not/there"), 1, str(tmp_path)))
    assert [result.state for result in insufficient] == ["ok", "failed"]
    assert "--shm-size" in insufficient[1].text
    assert [result.state for result in sufficient] == ["ok", "ok"]
    assert not (tmp_path / "not").exists()
    (tmp_path / "file").write_text("")
    assert next(doctor.storage(str(tmp_path / "file/runs"), None)).state == "failed"


def test_missing_packages_are_named_with_the_install_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    lines = {result.name: result for result in doctor.extras()}
    assert lines["export"].text == (
        "onnx, onnxscript, onnxruntime missing: pip install 'yolo-lightning[export]'"
    )
    assert {result.state for result in lines.values()} == {"note"}
    monkeypatch.setattr(doctor, "_PACKAGES", ("no-such-package",))
    assert list(doctor.versions())[-1].state == "failed"


def test_extras_match_pyproject():
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    declared = {
        extra: tuple(requirement.split(">=")[0] for requirement in requirements)
        for extra, requirements in project["optional-dependencies"].items()
        if extra not in ("dev", "docs")
    }
    assert declared == doctor.EXTRAS


def test_packages_that_cannot_be_imported_fail(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "cv2", None)
    for check in (doctor.devices, doctor.codecs):
        (result,) = check()
        assert result.state == "failed"
        assert "cannot be imported" in result.text


def test_missing_image_formats_are_named(monkeypatch):
    import cv2

    encode = cv2.imencode

    def without_webp(extension: str, image: object) -> object:
        if extension == ".webp":
            raise cv2.error("could not find a writer")
        return encode(extension, image)

    monkeypatch.setattr(cv2, "imencode", without_webp)
    result = next(doctor.codecs())
    assert (result.text, result.state) == ("JPEG, PNG, BMP, TIFF; missing: WebP", "failed")


def test_gpus_without_a_cuda_build_of_torch_fail(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("yolo_lightning.cli.launch.visible_gpu_count", lambda environment: 2)
    results = {result.name: result for result in doctor.devices()}
    assert results["GPU"].state == "failed"
    assert results["GPU"].text.startswith("2 found, but torch")
    assert "cores" in results["CPU"].text


def test_each_gpu_is_described_or_fails(monkeypatch):
    import torch

    def memory(index: int) -> tuple[int, int]:
        if index == 1:
            raise RuntimeError("CUDA error: device is busy\nmore")
        return 3 * 2**30, 4 * 2**30

    properties = SimpleNamespace(name="Card", major=9, minor=0)
    replaced = {
        "is_available": lambda: True, "device_count": lambda: 2, "mem_get_info": memory,
        "get_device_properties": lambda index: properties, "is_bf16_supported": lambda: True,
        "device": nullcontext,
    }  # fmt: skip
    for name, function in replaced.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    results = {result.name: (result.text, result.state) for result in doctor.devices()}
    assert "NCCL missing" in results["CUDA"][0]
    gpu = "Card, 3.0 of 4.0 GiB free, compute capability 9.0, bfloat16"
    assert results["GPU 0"] == (gpu, "ok")
    assert results["GPU 1"] == ("CUDA error: device is busy", "failed")
