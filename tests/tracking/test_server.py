"""Trainings and a real MLflow server: it goes away, they are killed; every point is there once."""

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

from tests.helpers.kill_and_resume import STEPS, ended
from tests.helpers.paths import REPO
from tests.helpers.tracking_outage import (
    QUIET,
    Clock,
    Count,
    Server,
    finished,
    kill,
    points_of,
    products_for,
    runs_of,
    start,
    sync,
    wait_for_step,
    write_recipe,
)
from yolo_lightning.cli import recipe as cli
from yolo_lightning.tracking import (
    logger as tracking,  # what forked trainings need is imported once
)
from yolo_lightning.tracking.shipping import ShippingThread

assert cli, Clock
IN_THREE_BATCHES = "--data.detection_batch_size=2"  # the validation's six images


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server for all tests of this file."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUIET.items():
            patch.setenv(name, value)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        made = Server(tmp_path_factory.mktemp("server"))
        try:
            made.start()
            yield made
        finally:
            made.kill()


@pytest.fixture(scope="module")
def impatient():
    """Trainings look at their journal often, and give a request up after a second."""

    class Often(ShippingThread):
        def __init__(self, shipper):
            super().__init__(shipper, every_s=0.2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "ShippingThread", Often)
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
        yield


@pytest.fixture(scope="module")
def tracked_through_an_outage(server, impatient, tmp_path_factory):
    """The folder of a training whose server hung from its fifth step until that was noticed."""
    folder = tmp_path_factory.mktemp("outage")
    write_recipe(folder, server.uri, products=products_for(300))
    process = start(folder)
    wait_for_step(folder, process, 4)
    server.hang()
    try:
        until = time.monotonic() + 60
        while "does not take figures" not in (folder / "log.txt").read_text():
            assert time.monotonic() < until, "nobody noticed the outage"
            time.sleep(0.05)
    finally:
        server.go_on()
    finished(process, folder)
    return folder


def folder_of_run(folder: Path) -> Path:
    (found,) = folder.glob("runs/*")
    return found


def test_after_an_outage_the_server_holds_every_point_once(server, tracked_through_an_outage):
    log = (tracked_through_an_outage / "log.txt").read_text()
    assert log.count("does not take figures") == 1
    if "mlflow sync" in log:  # a machine so busy that the training ended first
        sync(tracked_through_an_outage)
    count = Count(server.database, tracked_through_an_outage)
    assert count.whole, str(count)
    assert count.expected > 5 * STEPS
    assert count.status == "FINISHED"
    query = "select step from metrics where key = 'train/lr' and run_uuid = ? order by step"
    with sqlite3.connect(server.database) as database:
        steps = [step for (step,) in database.execute(query, (count.run_id,))]
    assert steps == list(range(STEPS))


def test_the_runs_files_lie_on_the_server(server, tracked_through_an_outage):
    ((run_id, _),) = runs_of(server.database, tracked_through_an_outage)
    run = folder_of_run(tracked_through_an_outage)
    (root,) = (server.folder / "artifacts").glob(f"*/{run_id}/artifacts")
    for here, there in {
        "recipe.yaml": "recipe/recipe.yaml",
        "resolved.yaml": "recipe/resolved.yaml",
        "tree.tsv": "tree/tree.tsv",
        "batches/steps.crc32": "batches/steps.crc32",
        "checkpoints/best.ckpt": "checkpoints/best.ckpt",
    }.items():
        assert (root / there).read_bytes() == (run / here).read_bytes(), there
    models = list((server.folder / "artifacts").glob("*/models/*/artifacts/MLmodel"))
    assert any(f"run_id: {run_id}" in path.read_text() for path in models) or len(models) == 1
    address = f"{server.uri}/api/2.0/mlflow/artifacts/list?run_id={run_id}&path=checkpoints"
    with urllib.request.urlopen(address, timeout=20) as answer:
        files = json.load(answer)["files"]
    assert [file["path"] for file in files] == ["checkpoints/best.ckpt"]
    waiting = [path for path in (run / "mlflow/files").rglob("*") if path.is_file()]
    assert not waiting, "what is shipped takes no space here"


@pytest.mark.slow
def test_a_training_ends_well_without_its_server_and_is_synced_later(server, impatient, tmp_path):
    write_recipe(tmp_path, server.uri, products=products_for(60))
    process = start(tmp_path)
    wait_for_step(tmp_path, process, 4)
    server.hang()
    try:
        wait_for_step(tmp_path, process, STEPS - 1)
        begun = time.monotonic()
        finished(process, tmp_path)
        assert time.monotonic() - begun < 15, "it does not wait for a server that is away"
    finally:
        server.go_on()
    assert "not all of this run is in MLflow" in (tmp_path / "log.txt").read_text()
    for _ in range(2):
        sync(tmp_path)
        count = Count(server.database, tmp_path)
        assert count.whole, str(count)
        assert count.status == "FINISHED"


# --- resumed trainings


def fit(folder, store, *stops, options=()):
    """Train under stops, then to the end."""
    write_recipe(folder, store)
    for stop in stops:
        code = -signal.SIGKILL if "SIGKILL" in stop else 143
        process = start(folder, IN_THREE_BATCHES, *options, environment={"STOP": stop})
        finished(process, folder, code)
    finished(start(folder, IN_THREE_BATCHES, *options), folder)


def differences(database, whole, stopped):
    """Return what a stopped training logged otherwise than one that ran through."""
    ((whole_id, _),) = runs_of(database, whole)
    ((stopped_id, status),) = runs_of(database, stopped)
    assert status == "FINISHED"
    expected, found = (_comparable(points_of(database, one)) for one in (whole_id, stopped_id))
    assert sum(expected.values()) > 5 * STEPS
    return sorted((expected - found).elements()), sorted((found - expected).elements())


def _comparable(points):
    return Counter({(key, step, repr(value)): n for (key, step, value), n in points.items()})


def test_a_resumed_training_logs_what_one_that_ran_through_does(server, tmp_path):
    """The stop comes after a batch with boxes: the figures of the one with labels go along."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    fit(whole, server.uri)
    fit(stopped, server.uri, "SIGTERM before 3")
    assert differences(server.database, whole, stopped) == ([], [])


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
def test_wherever_a_training_is_stopped_its_points_are_those_of_one_that_is_not(
    server, tmp_path, setting
):
    validated = {"two batches a step": (3, 6), "validation within epochs": (4, 8)}
    whole = tmp_path / "whole"
    fit(whole, server.uri, options=SETTINGS[setting])
    for name, stops in STOPS.items():
        stopped = tmp_path / name.replace(" ", "-")
        told = [stop.format(*validated.get(setting, (6, 12))) for stop in stops]
        fit(stopped, server.uri, *told, options=SETTINGS[setting])
        assert differences(server.database, whole, stopped) == ([], []), name


@pytest.mark.slow
def test_a_training_that_is_killed_and_resumed_five_times_is_one_run(tmp_path, quiet):
    database = tmp_path / "mlflow.db"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    fit(whole, f"sqlite:///{database}")
    write_recipe(killed, f"sqlite:///{database}", products=products_for(80))
    for step in (4, 6, 9, 13, 19):
        process = start(killed, IN_THREE_BATCHES)
        wait_for_step(killed, process, step)
        kill(process)
    finished(start(killed, IN_THREE_BATCHES), killed)
    count = Count(database, killed)
    assert count.whole, str(count)
    assert differences(database, whole, killed) == ([], [])


@pytest.fixture
def quiet(monkeypatch):
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)


@pytest.mark.slow
def test_a_training_that_is_killed_while_its_server_is_dead_loses_nothing(
    server, impatient, tmp_path
):
    write_recipe(tmp_path, server.uri, products=products_for(80))
    process = start(tmp_path)
    wait_for_step(tmp_path, process, 5)
    server.kill()
    try:
        wait_for_step(tmp_path, process, 15)
        kill(process)
    finally:
        server.start()
    before = Count(server.database, tmp_path)
    assert before.missing, "there was an outage"
    assert before.status == "RUNNING"
    finished(start(tmp_path), tmp_path)
    count = Count(server.database, tmp_path)
    assert count.whole, str(count)
    assert (count.run_id, count.status) == (before.run_id, "FINISHED")


@pytest.mark.slow
def test_two_trainings_that_begin_a_database_at_once_are_both_whole(tmp_path):
    """As a shell starts them, with their own imports."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        write_recipe(folder, f"sqlite:///{tmp_path}/mlflow.db")
    code = "import sys; from tests.helpers.tracking_outage import *; from pathlib import Path;"
    code += "from yolo_lightning.cli.main import main; sys.exit(main(arguments(Path(sys.argv[1]))))"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder)], cwd=folder, stderr=subprocess.PIPE,
            env={**os.environ, **QUIET, "PYTHONPATH": str(REPO)},
        ) for folder in folders
    ]  # fmt: skip
    for process in both:
        _, said = process.communicate(timeout=200)
        assert process.returncode == 0, said.decode()[-3000:]
    for folder in folders:
        count = Count(tmp_path / "mlflow.db", folder)
        assert count.whole, str(count)
        assert count.status == "FINISHED"


# --- statuses


def interrupted(server, folder, stop, code, environment=None):
    """Stop a training; return its run and status."""
    write_recipe(folder, server.uri)
    environment = {"STOP": stop, **(environment or {})}
    process = start(folder, IN_THREE_BATCHES, console=True, environment=environment)
    finished(process, folder, code)
    (found,) = runs_of(server.database, folder)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "code", "status"), [
    ("SIGTERM before 3", 143, "KILLED"),
    ("SIGTERM validation 6", 143, "KILLED"),
    ("SIGUSR1 before 3", 143, "KILLED"),  # no scheduler puts it into a queue
    ("SIGINT before 3", 1, "KILLED"),
    ("error before 3", 1, "FAILED"),
])  # fmt: skip
def test_a_run_says_how_its_training_ended_and_that_it_goes_on(
    server, tmp_path, stop, code, status
):
    run_id, found = interrupted(server, tmp_path, stop, code)
    assert found == status
    process = start(tmp_path, IN_THREE_BATCHES, "--trainer.max_epochs=400")
    try:
        wait_for_step(tmp_path, process, 9)
        _until(lambda: runs_of(server.database, tmp_path) == [(run_id, "RUNNING")])
    finally:
        os.kill(process, signal.SIGTERM)
    assert ended(process, 60) == 143
    finished(start(tmp_path, IN_THREE_BATCHES, "--trainer.max_epochs=4"), tmp_path)
    assert [run for run, _ in runs_of(server.database, tmp_path)] == [run_id]


@pytest.mark.slow
def test_a_run_whose_job_is_in_the_queue_again_is_still_running(server, tmp_path):
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text("#!/bin/sh\nexit 0\n")
    scontrol.chmod(0o755)
    cluster = {"PATH": f"{scontrol.parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
    run_id, status = interrupted(server, tmp_path, "SIGUSR1 before 3", 143, cluster)
    assert status == "RUNNING"
    finished(start(tmp_path, IN_THREE_BATCHES, environment=cluster), tmp_path)
    assert runs_of(server.database, tmp_path) == [(run_id, "FINISHED")]
    assert Count(server.database, tmp_path).whole


def _until(holds, patience_s=30):
    until = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.1)
