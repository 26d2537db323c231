"""Trainings with a real MLflow server: outages and kills; no lost and no duplicate points."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers.kill_and_resume import STEPS, wait_for_process
from tests.helpers.paths import REPO
from tests.helpers.tracking_outage import (
    QUIET,
    Clock,
    PointCount,
    Server,
    count_points,
    find_runs,
    kill,
    products_for,
    start,
    sync,
    wait_for_exit,
    wait_for_step,
    write_recipe,
)
from yolo_lightning.cli import recipe as cli
from yolo_lightning.tracking.upload_thread import UploadThread

pytestmark = pytest.mark.end_to_end

assert cli, Clock
IN_THREE_BATCHES = "--data.detection_batch_size=2"  # six validation images


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server for all tests of this module."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUIET.items():
            patch.setenv(name, value)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        mlflow_server = Server(tmp_path_factory.mktemp("server"))
        try:
            mlflow_server.start()
            yield mlflow_server
        finally:
            mlflow_server.kill()


@pytest.fixture(scope="module")
def short_timeouts():
    """Upload threads with a short interval and a short request timeout."""

    class FastThread(UploadThread):
        def __init__(self, uploader):
            super().__init__(uploader, interval_s=0.2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("yolo_lightning.tracking.upload_thread.UploadThread", FastThread)
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
        yield


@pytest.fixture(scope="module")
def outage_folder(server, short_timeouts, tmp_path_factory):
    """Folder of a training whose server hung from step 4 until the training had warned about it."""
    folder = tmp_path_factory.mktemp("outage")
    write_recipe(folder, server.uri, products=products_for(300))
    process = start(folder)
    wait_for_step(folder, process, 4)
    server.hang()
    try:
        deadline = time.monotonic() + 60
        while "is not available" not in (folder / "log.txt").read_text():
            assert time.monotonic() < deadline, "no warning about the outage"
            time.sleep(0.05)
    finally:
        server.resume()
    wait_for_exit(process, folder)
    return folder


def run_folder(folder: Path) -> Path:
    (path,) = folder.glob("runs/*")
    return path


def test_after_an_outage_the_server_has_every_point_once(server, outage_folder):
    log = (outage_folder / "log.txt").read_text()
    assert log.count("is not available") == 1
    if "mlflow sync" in log:  # on a slow machine, the training ended first
        sync(outage_folder, server.uri)
    count = PointCount(server.database, outage_folder)
    assert count.complete, str(count)
    assert count.expected > 5 * STEPS
    assert count.status == "FINISHED"
    query = "select step from metrics where key = 'train/lr' and run_uuid = ? order by step"
    with sqlite3.connect(server.database) as database:
        steps = [step for (step,) in database.execute(query, (count.run_id,))]
    assert steps == list(range(STEPS))


def test_the_files_of_the_run_are_on_the_server(server, outage_folder):
    ((run_id, _),) = find_runs(server.database, outage_folder)
    run = run_folder(outage_folder)
    (root,) = (server.folder / "artifacts").glob(f"*/{run_id}/artifacts")
    for local, remote in {
        "recipe.yaml": "recipe/recipe.yaml",
        "resolved.yaml": "recipe/resolved.yaml",
        "tree.tsv": "tree/tree.tsv",
        "batches/steps.crc32": "batches/steps.crc32",
        "checkpoints/best.ckpt": "checkpoints/best.ckpt",
    }.items():
        assert (root / remote).read_bytes() == (run / local).read_bytes(), remote
    models = list((server.folder / "artifacts").glob("*/models/*/artifacts/MLmodel"))
    assert any(f"run_id: {run_id}" in path.read_text() for path in models) or len(models) == 1
    address = f"{server.uri}/api/2.0/mlflow/artifacts/list?run_id={run_id}&path=checkpoints"
    with urllib.request.urlopen(address, timeout=20) as response:
        files = json.load(response)["files"]
    assert [file["path"] for file in files] == ["checkpoints/best.ckpt"]
    pending = [path for path in (run / "mlflow/files").rglob("*") if path.is_file()]
    assert not pending, "uploaded files must be removed"


@pytest.mark.slow
def test_training_completes_without_its_server_and_is_synced_later(
    server, short_timeouts, tmp_path
):
    write_recipe(tmp_path, server.uri, products=products_for(60))
    process = start(tmp_path)
    wait_for_step(tmp_path, process, 4)
    server.hang()
    try:
        wait_for_step(tmp_path, process, STEPS - 1)
        started = time.monotonic()
        wait_for_exit(process, tmp_path)
        # the server hangs until the test goes on; the end of a training waits for at most a minute
        assert time.monotonic() - started < 60, "training must not wait for the server"
    finally:
        server.resume()
    assert "is not complete" in (tmp_path / "log.txt").read_text()
    for _ in range(2):
        sync(tmp_path, server.uri)
        count = PointCount(server.database, tmp_path)
        assert count.complete, str(count)
        assert count.status == "FINISHED"


# --- resumed trainings


def fit(folder, store, *stops, options=()):
    """Interrupt a training at each stop, then run it to the end."""
    write_recipe(folder, store)
    for stop in stops:
        code = -signal.SIGKILL if "SIGKILL" in stop else 143
        process = start(folder, IN_THREE_BATCHES, *options, environment={"STOP": stop})
        wait_for_exit(process, folder, code)
    wait_for_exit(start(folder, IN_THREE_BATCHES, *options), folder)


def point_differences(database, uninterrupted, interrupted):
    """Return the missing and the additional points of an interrupted training."""
    ((uninterrupted_id, _),) = find_runs(database, uninterrupted)
    ((interrupted_id, status),) = find_runs(database, interrupted)
    assert status == "FINISHED"
    expected, actual = (
        _comparable(count_points(database, run_id)) for run_id in (uninterrupted_id, interrupted_id)
    )
    assert sum(expected.values()) > 5 * STEPS
    return sorted((expected - actual).elements()), sorted((actual - expected).elements())


def _comparable(points):
    return Counter({(key, step, repr(value)): n for (key, step, value), n in points.items()})


def test_a_resumed_training_logs_the_same_points_as_an_uninterrupted_one(server, tmp_path):
    """Interrupt after a detection batch: metrics of the last classification batch must be kept."""
    uninterrupted, interrupted = tmp_path / "whole", tmp_path / "stopped"
    fit(uninterrupted, server.uri)
    fit(interrupted, server.uri, "SIGTERM before 3")
    assert point_differences(server.database, uninterrupted, interrupted) == ([], [])


SETTINGS = {
    "each epoch": (),
    "two batches a step": ("--trainer.accumulate_grad_batches=2",),
    "validation within epochs": (
        "--trainer.val_check_interval=4", "--trainer.check_val_every_n_epoch=null"
    ),
    "every fifth step": ("--trainer.log_every_n_steps=5", "--trainer.max_steps=23"),
}  # fmt: skip
STOPS = {
    "saved": ["SIGTERM before 2", "SIGTERM before 6", "SIGTERM before 11", "SIGTERM before 18"],
    "killed": ["SIGKILL before 4", "SIGKILL after 5", "SIGKILL after 10", "SIGKILL before 22"],
    "in validations": ["SIGKILL validation {0}", "SIGTERM validation {0}",
                       "SIGTERM validation {1}"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_points_do_not_depend_on_where_training_is_interrupted(server, tmp_path, setting):
    validation_steps = {"two batches a step": (3, 6), "validation within epochs": (4, 8)}
    uninterrupted = tmp_path / "whole"
    fit(uninterrupted, server.uri, options=SETTINGS[setting])
    for name, stops in STOPS.items():
        interrupted = tmp_path / name.replace(" ", "-")
        stops_of_setting = [stop.format(*validation_steps.get(setting, (6, 12))) for stop in stops]
        fit(interrupted, server.uri, *stops_of_setting, options=SETTINGS[setting])
        assert point_differences(server.database, uninterrupted, interrupted) == ([], []), name


@pytest.mark.slow
def test_points_do_not_depend_on_a_stop_in_the_last_validation(server, tmp_path):
    """Nor on a kill before the first checkpoint, which leaves no run behind."""
    uninterrupted, interrupted = tmp_path / "whole", tmp_path / "stopped"
    options = ("--trainer.max_steps=24",)
    fit(uninterrupted, server.uri, options=options)
    stops = ("SIGKILL after 0", "SIGKILL validation 24", "SIGTERM validation 24")
    fit(interrupted, server.uri, *stops, options=options)
    assert point_differences(server.database, uninterrupted, interrupted) == ([], [])
    files = [sorted(path.name for path in folder.glob("runs/*/report/*"))
             for folder in (uninterrupted, interrupted)]  # fmt: skip
    assert files[0] == files[1] != []
    wait_for_exit(start(interrupted, IN_THREE_BATCHES, *options), interrupted)  # once more
    assert point_differences(server.database, uninterrupted, interrupted) == ([], [])


@pytest.mark.slow
def test_a_training_killed_and_resumed_five_times_is_one_run(tmp_path, quiet_environment):
    database = tmp_path / "mlflow.db"
    uninterrupted, killed = tmp_path / "whole", tmp_path / "killed"
    fit(uninterrupted, f"sqlite:///{database}")
    write_recipe(killed, f"sqlite:///{database}", products=products_for(80))
    for step in (4, 6, 9, 13, 19):
        process = start(killed, IN_THREE_BATCHES)
        wait_for_step(killed, process, step)
        kill(process)
    wait_for_exit(start(killed, IN_THREE_BATCHES), killed)
    count = PointCount(database, killed)
    assert count.complete, str(count)
    assert point_differences(database, uninterrupted, killed) == ([], [])


@pytest.fixture
def quiet_environment(monkeypatch):
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)


@pytest.mark.slow
def test_a_training_killed_during_an_outage_loses_no_points(server, short_timeouts, tmp_path):
    write_recipe(tmp_path, server.uri, products=products_for(80))
    process = start(tmp_path)
    wait_for_step(tmp_path, process, 5)
    server.kill()
    try:
        wait_for_step(tmp_path, process, 15)
        kill(process)
    finally:
        server.start()
    before = PointCount(server.database, tmp_path)
    assert before.missing, "there was an outage"
    assert before.status == "RUNNING"
    wait_for_exit(start(tmp_path), tmp_path)
    count = PointCount(server.database, tmp_path)
    assert count.complete, str(count)
    assert (count.run_id, count.status) == (before.run_id, "FINISHED")


@pytest.mark.slow
def test_two_trainings_that_create_a_database_at_once_are_complete(tmp_path):
    """Two processes with imports of their own, as started from a shell."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        write_recipe(folder, f"sqlite:///{tmp_path}/mlflow.db")
    code = "import sys; from tests.helpers.tracking_outage import *; from pathlib import Path;"
    code += "from yolo_lightning.cli.main import main; sys.exit(main(arguments(Path(sys.argv[1]))))"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder)], cwd=folder, stderr=subprocess.PIPE,
            env={**os.environ, **QUIET, "PYTHONPATH": str(REPO)},
        ) for folder in folders
    ]  # fmt: skip
    for process in processes:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors.decode()[-3000:]
    for folder in folders:
        count = PointCount(tmp_path / "mlflow.db", folder)
        assert count.complete, str(count)
        assert count.status == "FINISHED"


# --- statuses


def run_interrupted(server, folder, stop, code, environment=None):
    """Interrupt a training; return its run id and status."""
    write_recipe(folder, server.uri)
    environment = {"STOP": stop, **(environment or {})}
    process = start(folder, IN_THREE_BATCHES, console=True, environment=environment)
    wait_for_exit(process, folder, code)
    (run,) = find_runs(server.database, folder)
    return run


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "code", "status"), [
    ("SIGTERM before 3", 143, "KILLED"),
    ("SIGTERM validation 6", 143, "KILLED"),
    ("SIGUSR1 before 3", 143, "KILLED"),  # no scheduler to requeue it
    ("SIGINT before 3", 130, "KILLED"),
    ("error before 3", 1, "FAILED"),
])  # fmt: skip
def test_run_status_after_an_interruption_and_after_resuming(server, tmp_path, stop, code, status):
    run_id, found = run_interrupted(server, tmp_path, stop, code)
    assert found == status
    process = start(tmp_path, IN_THREE_BATCHES, "--trainer.max_epochs=400")
    try:
        wait_for_step(tmp_path, process, 9)
        _wait_until(lambda: find_runs(server.database, tmp_path) == [(run_id, "RUNNING")])
    finally:
        os.kill(process, signal.SIGTERM)
    assert wait_for_process(process, 60) == 143
    wait_for_exit(start(tmp_path, IN_THREE_BATCHES, "--trainer.max_epochs=4"), tmp_path)
    assert [run for run, _ in find_runs(server.database, tmp_path)] == [run_id]


@pytest.mark.slow
def test_run_status_of_a_requeued_job_is_running(server, tmp_path):
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text("#!/bin/sh\nexit 0\n")
    scontrol.chmod(0o755)
    cluster = {"PATH": f"{scontrol.parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
    run_id, status = run_interrupted(server, tmp_path, "SIGUSR1 before 3", 143, cluster)
    assert status == "RUNNING"
    wait_for_exit(start(tmp_path, IN_THREE_BATCHES, environment=cluster), tmp_path)
    assert find_runs(server.database, tmp_path) == [(run_id, "FINISHED")]
    assert PointCount(server.database, tmp_path).complete


def _wait_until(condition, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
