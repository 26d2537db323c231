"""Upload of the journal: one run, no lost and no duplicate points, also after failures."""

import json
import os
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from tests.helpers import tracked
from tests.helpers.tracked import fresh_store, logger, points, query_store, runs, tags, upload
from yolo_lightning.cli.commands.mlflow import sync as mlflow_sync
from yolo_lightning.cli.main import main
from yolo_lightning.errors import InputError
from yolo_lightning.tracking import artifacts as artifact_module
from yolo_lightning.tracking import upload_thread
from yolo_lightning.tracking.artifacts import ArtifactWriter
from yolo_lightning.tracking.journal import JOURNAL_FOLDER, RUN_ID_FILE, Journal
from yolo_lightning.tracking.store import StoreUnavailable, lock, unlock
from yolo_lightning.tracking.upload_thread import UploadThread
from yolo_lightning.tracking.uploader import Uploader

pytestmark = pytest.mark.end_to_end


def log_training(folder: Path, store: str, steps: range = range(5), **options: Any) -> Any:
    """Log a short training."""
    run = logger(folder, store, **options)
    run.start_training(steps.start)
    for step in steps:
        run.log_metrics({"loss": 1 / (step + 1), "lr": 0.1}, step)
    run.finalize()
    return run


def expected_points(steps: range) -> dict[tuple[str, int], int]:
    return {(key, step): 1 for key in ("loss", "lr") for step in steps}


def artifacts(folder: Path) -> list[str]:
    roots = [path for path in folder.glob("mlruns/*/*/artifacts") if path.is_dir()]
    files = (path.relative_to(root) for root in roots for path in root.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in files)


def raising(error: Exception) -> Any:
    def fail(*args: Any, **options: Any) -> Any:
        raise error

    return fail


def fail_once(monkeypatch: pytest.MonkeyPatch, method: str, after: bool = False) -> list[str]:
    """Make a method of the client fail once, before or after the request is processed."""
    left, original = ["failure"], getattr(MlflowClient, method)

    def guarded(self: MlflowClient, *args: Any, **options: Any) -> Any:
        if not left:
            return original(self, *args, **options)
        if after:
            original(self, *args, **options)
        left.clear()
        raise ConnectionError("the response was lost")

    monkeypatch.setattr(MlflowClient, method, guarded)
    return left


def test_a_training_is_one_run_without_duplicate_points(folder, store):
    log_training(folder / "a", store, range(2500))
    uploader = upload(folder / "a")
    assert points(store) == expected_points(range(2500))
    (run,) = runs(store)
    assert uploader.pending == []
    assert query_store(store, "select name, status from runs") == [("tests/one", "FINISHED")]
    assert (folder / "a" / RUN_ID_FILE).read_text() == run
    upload(folder / "a")
    assert points(store) == expected_points(range(2500))


@pytest.mark.parametrize("lost", ["record", "record and file"])
def test_a_kill_before_the_upload_is_recorded_duplicates_no_points(
    folder, store, lost, monkeypatch
):
    log_training(folder / "a", store)
    record_upload = Journal.record_upload
    monkeypatch.setattr(Journal, "record_upload", lambda *a, **k: None)
    upload(folder / "a")
    monkeypatch.setattr(Journal, "record_upload", record_upload)
    if lost == "record and file":
        (folder / "a" / RUN_ID_FILE).unlink()
    upload(folder / "a")
    assert points(store) == expected_points(range(5))
    assert len(runs(store)) == 1


def test_a_lost_response_to_log_batch_duplicates_no_points(folder, store, monkeypatch):
    log_training(folder / "a", store)
    left = fail_once(monkeypatch, "log_batch", after=True)
    with pytest.raises(ConnectionError):
        upload(folder / "a")
    assert not left
    upload(folder / "a")
    assert points(store) == expected_points(range(5))


def test_a_run_is_found_by_its_token_after_a_lost_response(folder, store, monkeypatch):
    log_training(folder / "a", store)
    fail_once(monkeypatch, "create_run", after=True)
    with pytest.raises(ConnectionError):
        upload(folder / "a")
    (run,) = runs(store)
    upload(folder / "a")
    assert runs(store) == [run]
    assert points(store) == expected_points(range(5))


def test_a_deleted_run_raises_with_the_restore_command_and_continues_when_restored(folder, store):
    run = log_training(folder / "a", store, range(3))
    upload(folder / "a")
    client, run_id = MlflowClient(store), runs(store)[0]
    client.delete_run(run_id)
    for step in range(3, 6):
        run.log_metrics({"loss": 1 / (step + 1), "lr": 0.1}, step)
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match=f"mlflow runs restore --run-id {run_id}"):
            upload(folder / "a")
    client.restore_run(run_id)
    upload(folder / "a")
    assert points(store) == expected_points(range(6))
    assert runs(store) == [run_id]


def test_a_run_deleted_during_upload_warns_once_and_loses_no_points(
    folder, store, warnings, monkeypatch
):
    run = log_training(folder / "a", store, range(3))
    uploader = Uploader(run.journal)
    while uploader.upload_next():
        pass
    client = MlflowClient(store)
    client.delete_run(uploader.run_id)
    thread = UploadThread(uploader, interval_s=0.02)
    run.log_metrics({"loss": 0.25, "lr": 0.1}, 3)
    wait_until(lambda: thread._failures > 3)
    (warning,) = warnings
    assert "is not available" in warning
    assert "mlflow runs restore" in warning
    assert str(folder / "a" / JOURNAL_FOLDER) in warning
    client.restore_run(runs(store)[0])
    assert thread.finish()
    assert points(store) == expected_points(range(4))
    assert len(warnings) == 1


def wait_until(condition: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timeout"
        time.sleep(0.01)


def delete_all_runs(store: str) -> None:
    """Delete all runs permanently, as `mlflow gc` does."""
    database = sqlite3.connect(store.removeprefix("sqlite:///"))
    for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
        database.execute(f"delete from {table}")
    database.commit()
    database.close()


def test_a_permanently_deleted_run_is_created_again_with_all_points(folder, store, warnings):
    run = log_training(folder / "a", store, range(3))
    first = upload(folder / "a").run_id or runs(store)[0]
    delete_all_runs(store)
    run.log_metrics({"loss": 0.25, "lr": 0.1}, 3)
    upload(folder / "a")
    (second,) = runs(store)
    assert second != first
    assert points(store) == expected_points(range(4))
    assert warnings == [f"MLflow run {first} does not exist in {store}"]


def test_a_run_permanently_deleted_during_upload_is_created_again(folder, store, warnings):
    run = log_training(folder / "a", store, range(3))
    uploader = Uploader(run.journal)
    while uploader.upload_next():
        pass
    delete_all_runs(store)
    run.log_metrics({"loss": 0.25, "lr": 0.1}, 3)
    with pytest.raises(MlflowException):
        uploader.upload_next()
    while uploader.upload_next():
        pass
    assert points(store) == expected_points(range(4))
    assert len(runs(store)) == len(warnings) == 1


def test_upload_to_a_second_store_is_complete_and_keeps_the_first_run(folder, store, warnings):
    log_training(folder / "a", store, range(3))
    file = folder / "a/note.txt"
    file.write_text("here")
    run = logger(folder / "a", store)
    run.log_artifact(file, "recipe")
    run.log_image("grid", np.zeros((8, 8, 3), np.uint8), 1)
    upload(folder / "a")
    (home_run,) = runs(store)
    other = fresh_store(folder, "other.db")
    upload(folder / "a", other)
    assert points(other) == expected_points(range(3))
    assert artifacts(folder).count("recipe/note.txt") == 2, (
        "files in the run folder are uploaded again"
    )
    (warning,) = warnings
    assert "images/" in warning
    assert "no longer exists; such files are skipped" in warning
    assert (folder / "a" / RUN_ID_FILE).read_text() == home_run
    log_training(folder / "a", store, range(3, 4))
    upload(folder / "a")
    assert runs(store) == [home_run]
    assert points(store) == expected_points(range(4))
    upload(folder / "a", other)
    assert points(other) == expected_points(range(4))
    assert len(runs(other)) == 1


def test_a_deleted_experiment_raises_with_the_restore_command(folder, store):
    client = MlflowClient(store)
    experiment = client.create_experiment("tests")
    client.delete_experiment(experiment)
    run = log_training(folder / "a", store, range(2))
    command = f"mlflow experiments restore --experiment-id {experiment}"
    with pytest.raises(StoreUnavailable, match=command):
        upload(folder / "a")
    client.restore_experiment(experiment)
    upload(folder / "a")
    client.delete_experiment(experiment)  # the run with it
    run.log_metrics({"loss": 1 / 3, "lr": 0.1}, 2)
    with pytest.raises(StoreUnavailable, match=command):
        upload(folder / "a")
    client.restore_experiment(experiment)
    upload(folder / "a")
    assert points(store) == expected_points(range(3))


def test_rejected_items_are_skipped_with_a_warning_and_the_others_are_logged(
    folder, store, warnings
):
    run = log_training(folder / "a", store, range(3))
    bad = {"op": "metrics", "t": 5, "step": 3, "values": {"loss": 0.25, "../up": 1.0, "lr": 0.1}}
    run.journal.append(bad)
    run.journal.append(bad | {"step": 4, "values": {"loss": 0.2, "../up": 2.0, "lr": 0.1}})
    run.journal.append({"op": "tags", "values": {"good": "1", "bad*": "2"}})
    run.journal.append({"op": "params", "values": {"fine": "1", "": "2"}})
    upload(folder / "a")
    assert points(store) == expected_points(range(5))
    assert tags(store)["good"] == "1"
    assert query_store(store, "select key from params") == [("fine",)]
    assert len(warnings) == 3
    for name, message in zip(("../up=1.0", "bad*=2", "=2"), warnings, strict=True):
        assert message.startswith(f"MLflow rejects {name}: ")


def test_a_store_that_rejects_every_request_loses_no_points(folder, store, warnings, monkeypatch):
    log_training(folder / "a", store)
    uploader = Uploader(Journal(folder / "a" / JOURNAL_FOLDER))
    uploader.upload_next()
    error = MlflowException.invalid_parameter_value("a proxy rejects everything")
    with monkeypatch.context() as patch:
        for name in ("log_batch", "get_run", "update_run"):
            patch.setattr(MlflowClient, name, raising(error))
        with pytest.raises(MlflowException, match="a proxy"):
            uploader.upload_next()
    uploader.close()
    upload(folder / "a")
    assert points(store) == expected_points(range(5))
    assert warnings == []


def test_invalid_lines_are_skipped_with_a_warning(folder, store, warnings):
    run = log_training(folder / "a", store, range(2))
    with (folder / "a" / JOURNAL_FOLDER / "journal.jsonl").open("a") as file:
        file.write('{"op": "metrics", "values": 3}\nnot json\n\n{"op": "open"}\n{"op": "zap"}\n')
    run.journal.append({"op": "inputs", "datasets": [{"use": "training", "dataset": {"x": 1}}]})
    run.journal.append({"op": "image", "t": 1, "file": "images/x", "key": "k", "step": 1})
    run.log_metrics({"loss": 1 / 3, "lr": 0.1}, 2)
    upload(folder / "a")
    assert points(store) == expected_points(range(3))
    assert len([text for text in warnings if "unreadable line" in text]) == 1
    assert any("images/x no longer exists" in text for text in warnings)
    assert len([text for text in warnings if "MLflow: skipped {" in text]) == 1


def test_more_metrics_and_parameters_than_one_request_allows_are_logged(folder, store):
    run = logger(folder / "a", store)
    run.log_metrics({f"val/AP/{k}": k / 9418 for k in range(2400)}, 7)
    run.log_hyperparams({f"p{k}": "x" * 5900 for k in range(230)})
    upload(folder / "a")
    assert len(points(store)) == 2400
    assert query_store(store, "select count(*) from params") == [(230,)]


# --- choice of the run


def test_an_existing_run_keeps_its_points_and_gets_new_ones(folder, store):
    first = log_training(folder / "a", store, range(5))
    first._record_system({"system/cpu": 1.0})
    first._record_system({"system/cpu": 2.0})
    upload(folder / "a")
    (run_id,) = runs(store)
    # resumed two steps earlier, with a new journal: the checkpoint was moved out of its run folder
    second = logger(folder / "b", store, checkpoint_run_id=run_id)
    second.start_training(3)
    for step in range(3, 8):
        second.log_metrics({"loss": 1 / (step + 1), "lr": 0.1}, step)
    second._record_system({"system/cpu": 3.0})
    upload(folder / "b")
    second._record_system({"system/cpu": 4.0})
    upload(folder / "b")
    assert runs(store) == [run_id]
    assert points(store) == expected_points(range(8))
    system = "select step, value from metrics where key like 'system/%' order by value"
    samples = query_store(store, system)
    assert [value for _, value in samples] == [1.0, 2.0, 3.0, 4.0]
    assert abs(samples[0][0] - time.time()) < 600, "steps are seconds"


def test_a_long_run_is_not_read_back_when_it_is_adopted(folder, store, monkeypatch):
    log_training(folder / "a", store)
    upload(folder / "a")
    monkeypatch.setattr(
        MlflowClient, "get_metric_history", lambda *_: pytest.fail("reads the whole history")
    )
    log_training(folder / "b", store, range(3, 8), run_id=runs(store)[0])
    upload(folder / "b")
    assert points(store) == expected_points(range(8))


def test_run_id_priority_is_argument_environment_file_checkpoint(folder, store, monkeypatch):
    client = MlflowClient(store)
    run_ids = {
        name: client.create_run("0").info.run_id for name in ("id", "env", "file", "checkpoint")
    }

    def selected_run(name: str, **options: Any) -> str:
        run = logger(folder / name, store, run_ids["checkpoint"], **options)
        run.log_metrics({"a": 1.0}, 0)
        upload(folder / name)
        return str((folder / name / RUN_ID_FILE).read_text())

    assert selected_run("one") == run_ids["checkpoint"]
    (folder / "two").mkdir()
    (folder / "two" / RUN_ID_FILE).write_text(run_ids["file"] + "\n")
    assert selected_run("two") == run_ids["file"]
    (folder / "three").mkdir()
    (folder / "three" / RUN_ID_FILE).write_text(run_ids["file"])
    monkeypatch.setenv("MLFLOW_RUN_ID", run_ids["env"])
    assert selected_run("three") == run_ids["env"]
    assert selected_run("four", run_id=run_ids["id"]) == run_ids["id"]
    assert len(runs(store)) == 4


@pytest.mark.parametrize("run_id", ["0" * 32, "not a valid id!"])
def test_an_unknown_run_id_warns_and_creates_a_run(folder, store, warnings, run_id):
    log_training(folder / "a", store, run_id=run_id)
    upload(folder / "a")
    assert points(store) == expected_points(range(5))
    assert warnings == [f"MLflow run {run_id} does not exist in {store}"]


def test_parameters_that_change_when_resuming_keep_their_first_value(folder, store, warnings):
    changed = []
    for rate in ("0.1", "0.2", "0.2", "0.1"):
        run = logger(folder / "a", store)
        run.log_hyperparams(
            {"model": {"init_args": {"rate": rate}}, "trainer": {"max_steps": rate}}
        )
        changed.append(run._params_changed)
        upload(folder / "a")
    params = dict(query_store(store, "select key, value from params"))
    assert params == {"model.rate": "0.1", "trainer.max_steps": "0.1"}
    assert changed == [False, True, False, True]
    assert len(runs(store)) == 1
    assert warnings == []


def test_parameters_of_an_existing_run_keep_their_values(folder, store, warnings):
    logger(folder / "a", store).log_hyperparams({"rate": 0.1, "size": 5})
    upload(folder / "a")
    other = logger(folder / "b", store, run_id=runs(store)[0])
    other.log_hyperparams({"rate": 0.3, "size": 5, "fresh": 1})
    upload(folder / "b")
    params = dict(query_store(store, "select key, value from params"))
    assert params == {"rate": "0.1", "size": "5", "fresh": "1"}
    assert warnings == []


@pytest.mark.parametrize("name", ["lr search", 'it\'s "one" `sweep`\\'])
def test_the_runs_of_a_sweep_have_one_parent(folder, store, name):
    for trial in ("a", "b"):
        log_training(folder / trial, store, parent=name)
        upload(folder / trial)
    rows = query_store(store, "select run_uuid, value from tags where key = 'mlflow.parentRunId'")
    (parent,) = {value for _, value in rows}
    assert len(rows) == 2
    assert len(runs(store)) == 3
    parents = query_store(store, "select name, status from runs where run_uuid = ?", parent)
    assert parents == [(name, "FINISHED")]


def test_two_concurrent_trainings_share_a_database_and_a_parent(folder, store):
    for trial in ("a", "b"):
        log_training(folder / trial, store, range(300), parent="sweep")
    threads = [threading.Thread(target=upload, args=(folder / trial,)) for trial in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for trial in ("a", "b"):  # what a locked database has rejected
        upload(folder / trial)
    assert points(store) == dict.fromkeys(expected_points(range(300)), 2)
    assert len(runs(store)) == 3


def test_evaluation_metrics_are_added_to_the_run_once_unless_they_differ(folder, store):
    log_training(folder / "a", store)
    upload(folder / "a")
    for value in (0.5, 0.5, 0.25):
        run = logger(folder / "a", store, evaluated_step=4)
        # as Lightning logs without training
        run.log_metrics({"test/AP": value, "epoch": 0}, 0)
        run.close()
        upload(folder / "a")
        time.sleep(0.002)
    assert points(store) == expected_points(range(5)) | {("test/AP", 4): 2}
    assert query_store(store, "select status from runs") == [("FINISHED",)]
    # a checkpoint that was moved out of its run folder
    moved = logger(folder / "moved", store, checkpoint_run_id=runs(store)[0], evaluated_step=4)
    moved.log_metrics({"loss": 1 / 5, "lr": 0.2}, 0)
    upload(folder / "moved")
    assert (points(store)["loss", 4], points(store)["lr", 4]) == (1, 2)
    unknown = logger(folder / "b", store, evaluated_step=4)
    unknown.log_metrics({"test/AP": 0.5}, 5)
    with pytest.raises(StoreUnavailable, match="does not exist"):
        upload(folder / "b")
    assert len(runs(store)) == 1


def test_samples_of_system_metrics_have_the_time_as_step(folder, store):
    run = logger(folder / "a", store)
    for value in range(3):
        run._record_system({"system/cpu": value})
    upload(folder / "a")
    steps = [step for (step,) in query_store(store, "select step from metrics order by step")]
    assert len(set(steps)) == 3, "also of samples in one second"
    assert abs(steps[0] - time.time()) < 600


# --- locking


def test_only_one_uploader_at_a_time_holds_a_journal(folder, store):
    run = log_training(folder / "a", store)
    first = Uploader(run.journal)
    first.upload_next()
    with pytest.raises(StoreUnavailable, match="another process"):
        upload(folder / "a")
    with pytest.raises(StoreUnavailable, match="another process"):
        upload(folder / "a")  # the failed attempt did not release the first lock
    first.close()
    upload(folder / "a")
    assert points(store) == expected_points(range(5))


def test_a_lock_is_not_inherited_by_forked_workers(folder):
    """A worker may outlive a training that was killed."""
    reader, writer = os.pipe()
    if not (training := os.fork()):
        try:
            lock(folder / "lock")
            if not os.fork():
                os.close(writer)
                os.read(reader, 1)  # the worker ends with the test
        finally:
            os._exit(0)
    os.waitpid(training, 0)
    try:
        unlock(lock(folder / "lock"))
    finally:
        os.close(writer)


def test_a_lock_is_released_for_workers_too(folder):
    held = lock(folder / "lock")
    worker = os.dup(held)  # as if forked before the lock is known
    with pytest.raises(StoreUnavailable):
        lock(folder / "lock")
    unlock(held)
    unlock(lock(folder / "lock"))
    os.close(worker)


def test_sync_fails_while_another_process_is_uploading(folder, store):
    run = log_training(folder / "a", store)
    first = Uploader(run.journal)
    first.upload_next()
    with pytest.raises(InputError, match="another process is uploading"):
        mlflow_sync.main([str(folder / "a")])
    first.close()
    assert main(["mlflow", "sync", str(folder / "a")]) == 0


# --- files


def random_image() -> Any:
    return np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8)


def test_files_and_images_are_uploaded_and_removed_from_the_journal(folder, store):
    run = logger(folder / "a", store)
    file = folder / "plot.txt"
    for text in ("first", "second"):
        file.write_text(text)
        run.log_artifact(file, "plots")
    (folder / "folder/deep").mkdir(parents=True)
    (folder / "folder/deep/x").write_text("deep")
    run.log_artifacts(folder / "folder", "report")
    run.log_image("val/pre dictions*", random_image(), 3)
    upload(folder / "a")
    artifact_names = artifacts(folder)
    assert artifact_names[-2:] == ["plots/plot.txt", "report/deep/x"]
    assert sum(name.startswith("images/val~pre dictions_+step+3") for name in artifact_names) == 2
    (stored,) = folder.rglob("mlruns/**/plot.txt")
    assert stored.read_text() == "second"
    pending = [path for path in (folder / "a/mlflow/files").rglob("*") if path.is_file()]
    assert pending == []


@pytest.mark.parametrize("name", ["../../../x", "/x", "", "a/b", "ü", "x" * 400])
def test_an_image_name_cannot_escape_the_journal_folder(folder, store, name):
    logger(folder / "a", store).log_image(name, random_image(), 0)
    assert {path.name for path in folder.iterdir()} == {"a", "mlflow.db"}
    assert [path.parent.name for path in folder.rglob("*.png")] == ["images"]


def test_an_image_is_not_duplicated_after_a_lost_response(folder, store, monkeypatch):
    logger(folder / "a", store).log_image("grid", random_image(), 3)
    fail_once(monkeypatch, "log_artifact", after=True)
    assert len(upload(folder / "a").pending) == 2
    assert upload(folder / "a").pending == []
    assert len(artifacts(folder)) == 2  # the image and its thumbnail


@pytest.mark.parametrize(("filename", "name"), [
    ("best", "best.ckpt"), ("{step}", "best-val-AP50.ckpt"), (None, "best-val-AP50.ckpt"),
])  # fmt: skip
def test_the_best_checkpoint_replaces_the_one_before(folder, store, filename, name):
    run, callback = logger(folder / "a", store), ModelCheckpoint(monitor="val/AP50")
    callback.filename = filename
    checkpoints = folder / "a/checkpoints"
    checkpoints.mkdir(parents=True)
    for number in range(4):
        path = checkpoints / ("best.ckpt" if filename == "best" else f"step={number}.ckpt")
        path.unlink(missing_ok=True)
        path.write_text(f"weights {number}")
        callback.best_model_path = str(path)
        run.after_save_checkpoint(callback)
        run.after_save_checkpoint(callback)  # another of the k best was saved
        pending = list((folder / "a/mlflow/files/checkpoints").iterdir())
        assert [file.name for file in pending] == [name], "an outage must not fill the disk"
        if number == 1:
            upload(folder / "a")
            assert artifacts(folder) == [f"checkpoints/{name}"]
        if filename != "best":
            path.unlink()
    assert [entry["op"] for entry, _ in run.journal.entries()].count("file") == 4
    assert upload(folder / "a").pending == []
    assert artifacts(folder) == [f"checkpoints/{name}"]
    (stored,) = (folder / "mlruns").rglob(name)
    assert stored.read_text() == "weights 3"


def test_a_model_is_logged_once_and_its_folder_is_moved(folder, store, monkeypatch):
    calls: list[Any] = []

    def log_model(client: Any, run_id: str, folder: Path, *arguments: Any) -> None:
        calls.append((sorted(folder.iterdir()), arguments))

    monkeypatch.setattr(artifact_module, "log_model", log_model)
    run = logger(folder / "a", store)
    (folder / "model").mkdir()
    (folder / "model/MLmodel").write_text("x")
    run.log_model(folder / "model", "detector", 7)
    assert not (folder / "model").exists()
    upload(folder / "a")
    upload(folder / "a")
    ((files, arguments),) = calls
    assert [path.name for path in files] == ["MLmodel"]
    assert arguments == ("detector", 7, None)
    assert not list((folder / "a/mlflow/files/models").iterdir())


@pytest.fixture
def broken_artifact_store(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A store that accepts metrics but no files; clear the list to repair it."""
    failing, original = [True], MlflowClient.log_artifact

    def guarded(self: MlflowClient, *args: Any) -> None:
        if failing:
            raise PermissionError(30, "Read-only file system")
        original(self, *args)

    monkeypatch.setattr(MlflowClient, "log_artifact", guarded)
    return failing


def test_a_failing_artifact_store_does_not_delay_metrics(
    folder, store, warnings, broken_artifact_store
):
    run = logger(folder / "a", store)
    for name in "abc":
        (folder / f"{name}.txt").write_text(name)
        run.log_artifact(folder / f"{name}.txt", "plots")
    log_training(folder / "a", store)
    uploader = upload(folder / "a")
    assert points(store) == expected_points(range(5))
    assert len(uploader.pending) == 3
    (warning,) = warnings
    assert "cannot store the file plots/a.txt (" in warning
    assert "Read-only" in warning
    assert "it is kept in" in warning
    # the next process knows the deferred files, and that the rest is uploaded
    recorded = json.loads((folder / "a/mlflow/uploaded.json").read_text())[store]
    assert len(recorded["pending"]) == 4, "where to begin, and the ends of three entries"
    assert recorded["offset"] == run.journal.end
    broken_artifact_store.clear()
    assert upload(folder / "a").pending == []
    assert artifacts(folder) == [f"plots/{name}.txt" for name in "abc"]
    assert upload(folder / "a").pending == []
    assert points(store) == expected_points(range(5))


def test_sync_reports_deferred_files_and_uploads_them_later(
    folder, store, broken_artifact_store, capsys
):
    run = log_training(folder / "a", store)
    (folder / "x").write_text("x")
    run.log_artifact(folder / "x", "plots")
    assert main(["mlflow", "sync", "a"]) == 2
    assert "except 1 files that the store cannot accept" in capsys.readouterr().err
    assert points(store) == expected_points(range(5))
    broken_artifact_store.clear()
    assert main(["mlflow", "sync", "a"]) == 0
    assert "synced" in capsys.readouterr().out
    assert artifacts(folder) == ["plots/x"]
    assert main(["mlflow", "sync", "a"]) == 0
    assert "was complete" in capsys.readouterr().out


def test_the_thread_retries_deferred_files(
    folder, store, warnings, broken_artifact_store, monkeypatch
):
    monkeypatch.setattr(Uploader, "RETRY_S", 0.05)
    run = logger(folder / "a", store)
    (folder / "x").write_text("x")
    run.log_artifact(folder / "x", "plots")
    thread = UploadThread(Uploader(run.journal), interval_s=0.02)
    wait_until(lambda: warnings)  # of the first attempt
    broken_artifact_store.clear()
    wait_until(lambda: not thread.uploader.pending)
    assert thread.finish()
    assert artifacts(folder) == ["plots/x"]
    assert len(warnings) == 1


def test_a_file_that_always_fails_does_not_block_the_others(folder, store, monkeypatch):
    original = ArtifactWriter.write

    def guarded(self: ArtifactWriter, entry: dict[str, Any]) -> Any:
        if entry["file"].endswith("bad"):
            raise RuntimeError("never")
        return original(self, entry)

    monkeypatch.setattr(ArtifactWriter, "write", guarded)
    run = logger(folder / "a", store)
    for name in ("bad", "good"):
        (folder / name).write_text(name)
        run.log_artifact(folder / name, "x")
    # after a failure all files are deferred: the store may fail for each of them, slowly
    assert len(upload(folder / "a").pending) == 2
    assert len(upload(folder / "a").pending) == 1
    assert artifacts(folder) == ["x/good"]


def test_many_deferred_files_are_found_in_one_pass(folder, store, warnings, monkeypatch):
    run = log_training(folder / "a", store)
    ends = []
    for number in range(300):
        run.journal.append({"op": "file", "t": 1, "file": f"x/{number}", "folder": "x"})
        ends.append(run.journal.end)
    upload(folder / "a")
    run.journal.record_upload(store, runs(store)[0], ends[-1], pending=[-5, *ends, 7, 2**70])
    starts, read = [], Journal.entries

    def counted(self: Journal, offset: int = 0, *ops: str, **options: Any) -> Any:
        starts.append(offset)
        return read(self, offset, *ops, **options)

    monkeypatch.setattr(Journal, "entries", counted)
    uploader = upload(folder / "a")
    assert uploader.pending == []
    assert len([start for start in starts if start < ends[0]]) == 2, "the state, and these files"
    assert warnings == ["MLflow: x/0 no longer exists; such files are skipped"] * 2


# --- the thread


def test_the_end_of_a_training_waits_for_a_limited_time(folder, store, monkeypatch):
    original = MlflowClient.log_batch

    def slow(self: MlflowClient, *args: Any, **options: Any) -> None:
        time.sleep(0.3)
        original(self, *args, **options)

    monkeypatch.undo()
    monkeypatch.chdir(folder)
    messages = tracked.collect_warnings(monkeypatch)
    monkeypatch.setattr(MlflowClient, "log_batch", slow)
    run = logger(folder / "a", store, flush_timeout_s=1.0)
    for number in range(20):
        run.set_tags({f"tag{number}": "x"})
    run.log_metrics({"end": 1.0}, 3)
    started = time.monotonic()
    run.finalize()
    assert time.monotonic() - started < 3
    assert f"mlflow sync {folder / 'a'}" in messages[0]
    wait_until(lambda: not [t for t in threading.enumerate() if t.name == "mlflow-upload"])
    assert len(tags(store)) < 20, "the rest is left to sync"
    monkeypatch.setattr(MlflowClient, "log_batch", original)
    assert main(["mlflow", "sync", str(folder / "a")]) == 0
    assert points(store) == {("end", 3): 1}
    assert query_store(store, "select status from runs") == [("FINISHED",)]


def test_finish_returns_false_if_only_the_last_entries_failed(folder, store, warnings, monkeypatch):
    run = log_training(folder / "a", store)
    uploader = Uploader(run.journal)
    thread = UploadThread(uploader, interval_s=0.01)
    wait_until(lambda: uploader.progress == 1)
    monkeypatch.setattr(MlflowClient, "log_batch", raising(ConnectionError("gone")))
    run.log_metrics({"loss": 0.0, "lr": 0.0}, 9)
    assert not thread.finish()
    assert len(warnings) == 1


def test_finish_uploads_entries_that_were_just_logged(folder, store):
    for number in range(12):
        run = log_training(folder / f"{number}", store, range(3))
        thread = UploadThread(Uploader(run.journal), interval_s=0.0001)
        run.log_metrics({"end": 1.0}, number)
        assert thread.finish()
    assert {key: n for key, n in points(store).items() if key[0] == "end"} == {
        ("end", number): 1 for number in range(12)
    }


def test_forked_workers_and_the_busy_thread_do_not_block_each_other(folder, store):
    import multiprocessing

    run = log_training(folder / "a", store, range(2000))
    thread = UploadThread(Uploader(run.journal), interval_s=0.001)
    context = multiprocessing.get_context("fork")
    for step in range(2000, 2030):
        run.log_metrics({"loss": 1 / (step + 1), "lr": 0.1}, step)
        worker = context.Process(target=lambda: logging_worker())
        worker.start()
        worker.join(30)
        assert worker.exitcode == 0
    assert thread.finish()
    assert points(store) == expected_points(range(2030))


def logging_worker() -> None:
    import logging
    import warnings

    logging.getLogger("worker").warning("message of a worker")
    warnings.warn("warning of a worker", stacklevel=1)
    assert np.ones((64, 64)).sum() == 4096


def test_the_thread_reports_an_outage_once_and_the_recovery_once(monkeypatch, tmp_path):
    warnings: list[str] = []
    for name in ("rank_zero_warn", "rank_zero_info"):
        monkeypatch.setattr(upload_thread, name, warnings.append)

    class Stub:
        store_uri, pending, attempts = "http://nowhere", (), 0
        journal = Journal(tmp_path / JOURNAL_FOLDER)

        def upload_next(self) -> bool:
            self.attempts += 1
            if self.attempts < 4:
                raise OSError("gone")
            return self.attempts == 4

        def retry_now(self) -> None: ...

        def close(self) -> None: ...

    stub = Stub()
    thread = UploadThread(stub, interval_s=0.01)  # type: ignore[arg-type]
    wait_until(lambda: stub.attempts >= 4)
    assert thread.finish()
    warning, info = warnings
    assert "http://nowhere is not available (gone)" in warning
    assert info == "MLflow is available again; the metrics kept so far are being uploaded"
