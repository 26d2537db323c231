"""From the journal into a store: every point once, one run, whatever happens in between."""

import json
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from tests.helpers import tracked
from tests.helpers.tracked import asked, fresh_store, logger, points, runs, ship, tags
from yolo_lightning.cli.commands.mlflow import sync as mlflow_sync
from yolo_lightning.cli.main import main
from yolo_lightning.errors import InputError
from yolo_lightning.tracking import shipped_entries, shipping
from yolo_lightning.tracking.journal import FOLDER, RUN_ID_FILE, Journal
from yolo_lightning.tracking.shipped_entries import EntryWriter
from yolo_lightning.tracking.shipper import Shipper
from yolo_lightning.tracking.shipping import ShippingThread
from yolo_lightning.tracking.store import JournalLock, StoreUnavailable


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, where loggers only write: each test ships by itself."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    tracked.no_threads(monkeypatch)
    return tmp_path


@pytest.fixture
def store(place: Path) -> str:
    return fresh_store(place)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return tracked.told(monkeypatch)


def trained(folder: Path, store: str, steps: range = range(5), **options: Any) -> Any:
    """Log a little training."""
    run = logger(folder, store, **options)
    run.begin(steps.start)
    for step in steps:
        run.log_metrics({"loss": 1 / (step + 1), "lr": 0.1}, step)
    run.finalize()
    return run


def once(steps: range) -> dict[tuple[str, int], int]:
    return {(key, step): 1 for key in ("loss", "lr") for step in steps}


def artifacts(place: Path) -> list[str]:
    roots = [path for path in place.glob("mlruns/*/*/artifacts") if path.is_dir()]
    files = (path.relative_to(root) for root in roots for path in root.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in files)


def failing(error: Exception) -> Any:
    def fail(*args: Any, **options: Any) -> Any:
        raise error

    return fail


def fail_once(monkeypatch: pytest.MonkeyPatch, method: str, after: bool = False) -> list[str]:
    """Let a method of the client fail once, before it did its work or after."""
    left, real = ["failure"], getattr(MlflowClient, method)

    def guarded(self: MlflowClient, *args: Any, **options: Any) -> Any:
        if not left:
            return real(self, *args, **options)
        if after:
            real(self, *args, **options)
        left.clear()
        raise ConnectionError("the answer was lost")

    monkeypatch.setattr(MlflowClient, method, guarded)
    return left


def test_a_training_is_one_run_with_every_point_once(place, store):
    trained(place / "a", store, range(2500))
    shipper = ship(place / "a")
    assert points(store) == once(range(2500))
    (run,) = runs(store)
    assert shipper.put_off == []
    assert asked(store, "select name, status from runs") == [("tests/one", "FINISHED")]
    assert (place / "a" / RUN_ID_FILE).read_text() == run
    ship(place / "a")
    assert points(store) == once(range(2500))


@pytest.mark.parametrize("lost", ["note", "note and file"])
def test_a_kill_between_the_store_and_the_note_doubles_nothing(place, store, lost, monkeypatch):
    trained(place / "a", store)
    note = Journal.note_shipped
    monkeypatch.setattr(Journal, "note_shipped", lambda *a, **k: None)
    ship(place / "a")
    monkeypatch.setattr(Journal, "note_shipped", note)
    if lost == "note and file":
        (place / "a" / RUN_ID_FILE).unlink()
    ship(place / "a")
    assert points(store) == once(range(5))
    assert len(runs(store)) == 1


def test_a_lost_answer_to_a_batch_doubles_nothing(place, store, monkeypatch):
    trained(place / "a", store)
    left = fail_once(monkeypatch, "log_batch", after=True)
    with pytest.raises(ConnectionError):
        ship(place / "a")
    assert not left
    ship(place / "a")
    assert points(store) == once(range(5))


def test_a_run_whose_opening_was_not_answered_is_found_by_its_token(place, store, monkeypatch):
    trained(place / "a", store)
    fail_once(monkeypatch, "create_run", after=True)
    with pytest.raises(ConnectionError):
        ship(place / "a")
    (run,) = runs(store)
    ship(place / "a")
    assert runs(store) == [run]
    assert points(store) == once(range(5))


def test_a_deleted_run_is_said_with_the_way_back_and_goes_on_once_restored(place, store):
    run = trained(place / "a", store, range(3))
    ship(place / "a")
    client, run_id = MlflowClient(store), runs(store)[0]
    client.delete_run(run_id)
    for step in range(3, 6):
        run.log_metrics({"loss": 1 / (step + 1), "lr": 0.1}, step)
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match=f"mlflow runs restore --run-id {run_id}"):
            ship(place / "a")
    client.restore_run(run_id)
    ship(place / "a")
    assert points(store) == once(range(6))
    assert runs(store) == [run_id]


def test_a_run_deleted_between_two_batches_is_one_warning_and_loses_nothing(
    place, store, said, monkeypatch
):
    run = trained(place / "a", store, range(3))
    shipper = Shipper(run.journal)
    while shipper.ship():
        pass
    client = MlflowClient(store)
    client.delete_run(shipper.run_id)
    thread = ShippingThread(shipper, every_s=0.02)
    run.log_metrics({"loss": 0.25, "lr": 0.1}, 3)
    until(lambda: thread._failures > 3)
    (warning,) = said
    assert "does not take figures" in warning
    assert "mlflow runs restore" in warning
    assert str(place / "a" / FOLDER) in warning
    client.restore_run(runs(store)[0])
    assert thread.finish()
    assert points(store) == once(range(4))
    assert len(said) == 1


def until(condition: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


def erase(store: str) -> None:
    """Take all runs out of a store for good, as `mlflow gc` does."""
    database = sqlite3.connect(store.removeprefix("sqlite:///"))
    for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
        database.execute(f"delete from {table}")
    database.commit()
    database.close()


def test_a_run_that_is_gone_for_good_is_opened_anew_with_everything(place, store, said):
    run = trained(place / "a", store, range(3))
    first = ship(place / "a").run_id or runs(store)[0]
    erase(store)
    run.log_metrics({"loss": 0.25, "lr": 0.1}, 3)
    ship(place / "a")
    (second,) = runs(store)
    assert second != first
    assert points(store) == once(range(4))
    assert said == [f"MLflow run {first} is not in {store}"]


def test_a_run_that_goes_while_it_is_written_to_is_opened_anew_too(place, store, said):
    run = trained(place / "a", store, range(3))
    shipper = Shipper(run.journal)
    while shipper.ship():
        pass
    erase(store)
    run.log_metrics({"loss": 0.25, "lr": 0.1}, 3)
    with pytest.raises(MlflowException):
        shipper.ship()
    while shipper.ship():
        pass
    assert points(store) == once(range(4))
    assert len(runs(store)) == len(said) == 1


def test_another_store_gets_everything_and_the_first_stays_at_home(place, store, said):
    trained(place / "a", store, range(3))
    file = place / "a/note.txt"
    file.write_text("here")
    run = logger(place / "a", store)
    run.log_file(file, "recipe")
    run.log_picture("grid", np.zeros((8, 8, 3), np.uint8), 1)
    ship(place / "a")
    (home,) = runs(store)
    other = fresh_store(place, "other.db")
    ship(place / "a", other)
    assert points(other) == once(range(3))
    assert artifacts(place).count("recipe/note.txt") == 2, (
        "what lies in the run's folder goes along"
    )
    (lost,) = said
    assert "left out 1 files that are not there any more: pictures/" in lost
    assert (place / "a" / RUN_ID_FILE).read_text() == home
    trained(place / "a", store, range(3, 4))
    ship(place / "a")
    assert runs(store) == [home]
    assert points(store) == once(range(4))
    ship(place / "a", other)
    assert points(other) == once(range(4))
    assert len(runs(other)) == 1


def test_a_deleted_experiment_is_said_with_the_way_back(place, store):
    client = MlflowClient(store)
    experiment = client.create_experiment("tests")
    client.delete_experiment(experiment)
    run = trained(place / "a", store, range(2))
    way = f"mlflow experiments restore --experiment-id {experiment}"
    with pytest.raises(StoreUnavailable, match=way):
        ship(place / "a")
    client.restore_experiment(experiment)
    ship(place / "a")
    client.delete_experiment(experiment)  # the run with it
    run.log_metrics({"loss": 1 / 3, "lr": 0.1}, 2)
    with pytest.raises(StoreUnavailable, match=way):
        ship(place / "a")
    client.restore_experiment(experiment)
    ship(place / "a")
    assert points(store) == once(range(3))


def test_what_a_store_refuses_is_left_out_by_name_and_the_others_arrive(place, store, said):
    run = trained(place / "a", store, range(3))
    bad = {"op": "metrics", "t": 5, "step": 3, "values": {"loss": 0.25, "../up": 1.0, "lr": 0.1}}
    run.journal.append(bad)
    run.journal.append(bad | {"step": 4, "values": {"loss": 0.2, "../up": 2.0, "lr": 0.1}})
    run.journal.append({"op": "tags", "values": {"good": "1", "bad*": "2"}})
    run.journal.append({"op": "params", "values": {"fine": "1", "": "2"}})
    ship(place / "a")
    assert points(store) == once(range(5))
    assert tags(store)["good"] == "1"
    assert asked(store, "select key from params") == [("fine",)]
    assert len(said) == 3
    for name, message in zip(("../up=1.0", "bad*=2", "=2"), said, strict=True):
        assert message.startswith(f"MLflow refuses {name}: ")


def test_a_store_that_refuses_all_and_knows_no_run_costs_nothing(place, store, said, monkeypatch):
    trained(place / "a", store)
    shipper = Shipper(Journal(place / "a" / FOLDER))
    shipper.ship()
    error = MlflowException.invalid_parameter_value("a gate says 400 to everything")
    with monkeypatch.context() as patch:
        for name in ("log_batch", "get_run", "update_run"):
            patch.setattr(MlflowClient, name, failing(error))
        with pytest.raises(MlflowException, match="a gate"):
            shipper.ship()
    shipper.close()
    ship(place / "a")
    assert points(store) == once(range(5))
    assert said == []


def test_senseless_lines_hold_nothing_up(place, store, said):
    run = trained(place / "a", store, range(2))
    with (place / "a" / FOLDER / "journal.jsonl").open("a") as file:
        file.write('{"op": "metrics", "values": 3}\nnot json\n\n{"op": "open"}\n{"op": "zap"}\n')
    run.journal.append({"op": "inputs", "datasets": [{"use": "training", "dataset": {"x": 1}}]})
    run.journal.append({"op": "picture", "t": 1, "file": "pictures/x", "key": "k", "step": 1})
    broken = run.journal.pending("pictures/y")
    broken.parent.mkdir(parents=True)
    broken.write_text("no picture")
    run.journal.append({"op": "picture", "t": 1, "file": "pictures/y", "key": "k", "step": 1})
    run.log_metrics({"loss": 1 / 3, "lr": 0.1}, 2)
    ship(place / "a")
    assert points(store) == once(range(3))
    assert len([text for text in said if "makes no sense" in text]) == 4
    assert len([text for text in said if "left out" in text]) == 7
    assert any("not there any more: pictures/x" in text for text in said)
    assert broken.is_file(), "what is left out is not thrown away"


def test_metrics_without_limits_of_a_request_and_many_parameters_arrive(place, store):
    run = logger(place / "a", store)
    run.log_metrics({f"val/AP/{k}": k / 9418 for k in range(2400)}, 7)
    run.log_hyperparams({f"p{k}": "x" * 5900 for k in range(230)})
    ship(place / "a")
    assert len(points(store)) == 2400
    assert asked(store, "select count(*) from params") == [(230,)]


# --- which run


def test_an_adopted_run_keeps_its_points_and_gets_the_new_ones(place, store):
    first = trained(place / "a", store, range(5))
    first._record_system({"system/cpu": 1.0})
    first._record_system({"system/cpu": 2.0})
    ship(place / "a")
    (run_id,) = runs(store)
    # the checkpoint was moved away from its folder: a fresh journal, resumed two steps earlier
    second = logger(place / "b", store, held=run_id)
    second.begin(3)
    for step in range(3, 8):
        second.log_metrics({"loss": 1 / (step + 1), "lr": 0.1}, step)
    second._record_system({"system/cpu": 3.0})
    ship(place / "b")
    second._record_system({"system/cpu": 4.0})
    ship(place / "b")
    assert runs(store) == [run_id]
    assert points(store) == once(range(8))
    system = "select step, value from metrics where key like 'system/%' order by step"
    assert asked(store, system) == [(0, 1.0), (1, 2.0), (2, 3.0), (3, 4.0)], "their steps go on"


def test_the_explicit_id_counts_most_then_the_environment_the_file_the_checkpoint(
    place, store, monkeypatch
):
    client = MlflowClient(store)
    made = {name: client.create_run("0").info.run_id for name in ("id", "env", "file", "held")}

    def chosen(name: str, **options: Any) -> str:
        run = logger(place / name, store, made["held"], **options)
        run.log_metrics({"a": 1.0}, 0)
        ship(place / name)
        return str((place / name / RUN_ID_FILE).read_text())

    assert chosen("one") == made["held"]
    (place / "two").mkdir()
    (place / "two" / RUN_ID_FILE).write_text(made["file"] + "\n")
    assert chosen("two") == made["file"]
    (place / "three").mkdir()
    (place / "three" / RUN_ID_FILE).write_text(made["file"])
    monkeypatch.setenv("MLFLOW_RUN_ID", made["env"])
    assert chosen("three") == made["env"]
    assert chosen("four", run_id=made["id"]) == made["id"]
    assert len(runs(store)) == 4


@pytest.mark.parametrize("wanted", ["0" * 32, "no id at all!"])
def test_an_id_that_no_run_has_is_said_and_a_run_opened(place, store, said, wanted):
    trained(place / "a", store, run_id=wanted)
    ship(place / "a")
    assert points(store) == once(range(5))
    assert said == [f"MLflow run {wanted} is not in {store}"]


def test_parameters_that_change_on_resuming_become_tags_and_follow_back(place, store):
    for rate in ("0.1", "0.2", "0.2", "0.1"):
        logger(place / "a", store).log_hyperparams({"model": {"init_args": {"rate": rate}}})
        ship(place / "a")
        assert asked(store, "select key, value from params") == [("model.rate", "0.1")]
        assert tags(store).get("changed.model.rate", "0.1") == rate
    assert len(runs(store)) == 1


def test_parameters_of_an_adopted_run_that_differ_become_tags(place, store, said):
    logger(place / "a", store).log_hyperparams({"rate": 0.1, "size": 5})
    ship(place / "a")
    other = logger(place / "b", store, run_id=runs(store)[0])
    other.log_hyperparams({"rate": 0.3, "size": 5, "fresh": 1})
    ship(place / "b")
    params = dict(asked(store, "select key, value from params"))
    assert params == {"rate": "0.1", "size": "5", "fresh": "1"}
    assert {k: v for k, v in tags(store).items() if "changed" in k} == {"changed.rate": "0.3"}
    assert said == []


@pytest.mark.parametrize("name", ["lr search", 'it\'s "one" `sweep`\\'])
def test_a_sweep_has_one_parent(place, store, name):
    for trial in ("a", "b"):
        trained(place / trial, store, parent=name)
        ship(place / trial)
    rows = asked(store, "select run_uuid, value from tags where key = 'mlflow.parentRunId'")
    (parent,) = {value for _, value in rows}
    assert len(rows) == 2
    assert len(runs(store)) == 3
    named = asked(store, "select name, status from runs where run_uuid = ?", parent)
    assert named == [(name, "FINISHED")]


def test_two_trainings_at_once_share_one_database_and_their_sweep(place, store):
    for trial in ("a", "b"):
        trained(place / trial, store, range(300), parent="sweep")
    both = [threading.Thread(target=ship, args=(place / trial,)) for trial in ("a", "b")]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    for trial in ("a", "b"):  # what a busy database did not take
        ship(place / trial)
    assert points(store) == dict.fromkeys(once(range(300)), 2)
    assert len(runs(store)) == 3


def test_figures_of_a_validation_join_the_run_once_unless_they_differ(place, store):
    trained(place / "a", store)
    ship(place / "a")
    for figure in (0.5, 0.5, 0.25):
        run = logger(place / "a", store, joins_at=4)
        # as Lightning says it where nothing is trained
        run.log_metrics({"test/AP": figure, "epoch": 0}, 0)
        run.close()
        ship(place / "a")
        time.sleep(0.002)
    assert points(store) == once(range(5)) | {("test/AP", 4): 2}
    assert asked(store, "select status from runs") == [("FINISHED",)]
    lonely = logger(place / "b", store, joins_at=4)
    lonely.log_metrics({"test/AP": 0.5}, 5)
    with pytest.raises(StoreUnavailable, match="not there"):
        ship(place / "b")
    assert len(runs(store)) == 1


def test_system_metrics_go_on_after_a_resume(place, store):
    for _ in range(2):
        run = logger(place / "a", store, system_metrics=True)
        run.begin(0)
        run.finalize()
        ship(place / "a")
    steps = "select distinct step from metrics where key = 'system/cpu_utilization_percentage'"
    assert asked(store, steps) == [(0,), (1,)]


# --- one at a time


def test_a_journal_is_shipped_by_one_at_a_time(place, store):
    run = trained(place / "a", store)
    first = Shipper(run.journal)
    first.ship()
    with pytest.raises(StoreUnavailable, match="another process"):
        ship(place / "a")
    with pytest.raises(StoreUnavailable, match="another process"):
        ship(place / "a")  # the refused one did not end the first one's lock
    first.close()
    ship(place / "a")
    assert points(store) == once(range(5))


def test_a_lock_is_not_inherited_by_forked_workers(place):
    import multiprocessing

    lock, context = JournalLock(place), multiprocessing.get_context("fork")
    lock.take()
    release, taken = context.Event(), context.Queue()
    worker = context.Process(target=release.wait)
    worker.start()

    def take() -> None:
        JournalLock._here.clear()  # as a process that was not forked
        try:
            JournalLock(place).take()
            taken.put("taken")
        except StoreUnavailable:
            taken.put("refused")

    for expected in ("refused", "taken"):
        other = context.Process(target=take)
        other.start()
        assert taken.get(timeout=20) == expected
        other.join()
        lock.leave()
    release.set()
    worker.join()


def test_sync_says_who_is_shipping(place, store):
    run = trained(place / "a", store)
    first = Shipper(run.journal)
    first.ship()
    with pytest.raises(InputError, match="another process is shipping"):
        mlflow_sync.main([str(place / "a")])
    first.close()
    assert main(["mlflow", "sync", str(place / "a")]) == 0


# --- files


def picture() -> Any:
    return np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8)


def test_files_pictures_and_replaced_ones_arrive_and_nothing_waits_on(place, store):
    run = logger(place / "a", store)
    file = place / "plot.txt"
    for text in ("first", "second"):
        file.write_text(text)
        run.log_file(file, "plots")
    (place / "folder/deep").mkdir(parents=True)
    (place / "folder/deep/x").write_text("deep")
    run.log_folder(place / "folder", "report")
    run.log_picture("val/pre dictions*", picture(), 3)
    ship(place / "a")
    held = artifacts(place)
    assert held[-2:] == ["plots/plot.txt", "report/deep/x"]
    assert sum(name.startswith("images/val~pre dictions_+step+3") for name in held) == 2
    (stored,) = place.rglob("mlruns/**/plot.txt")
    assert stored.read_text() == "second"
    waiting = [path for path in (place / "a/mlflow/files").rglob("*") if path.is_file()]
    assert waiting == []


@pytest.mark.parametrize("name", ["../../../x", "/x", "", "a/b", "ü", "x" * 400])
def test_a_picture_s_name_leads_nowhere_else(place, store, name):
    logger(place / "a", store).log_picture(name, picture(), 0)
    assert {path.name for path in place.iterdir()} == {"a", "mlflow.db"}
    assert [path.parent.name for path in place.rglob("*.png")] == ["pictures"]


def test_a_picture_whose_answer_was_lost_is_there_once(place, store, monkeypatch):
    logger(place / "a", store).log_picture("grid", picture(), 3)
    fail_once(monkeypatch, "log_image", after=True)
    assert len(ship(place / "a").put_off) == 1
    assert ship(place / "a").put_off == []
    assert len(artifacts(place)) == 2  # the picture, and a small one of it


def test_superseded_checkpoints_go_and_wait_nowhere(place, store):
    class Kept:
        state_key, best_model_path = "ModelCheckpoint", ""
        best_k_models: dict[str, float] = {}

    run: Any = logger(place / "a", store)
    callback: Any = Kept()
    checkpoints = place / "a/checkpoints"
    checkpoints.mkdir(parents=True)
    for number in range(4):
        for old in checkpoints.iterdir():
            old.unlink()
        path = checkpoints / f"best-{number}.ckpt"
        path.write_text(f"weights {number}")
        callback.best_k_models = {str(path): 0.1}
        run.after_save_checkpoint(callback)
        waiting = list((place / "a/mlflow/files/checkpoints").iterdir())
        assert [one.name for one in waiting] == [path.name], "an outage does not fill the disk"
        if number == 1:
            ship(place / "a")
            assert artifacts(place) == ["checkpoints/best-1.ckpt"]
    again: Any = logger(place / "a", store)  # a new process knows what the run holds
    again.after_save_checkpoint(callback)
    ship(place / "a")
    assert artifacts(place) == ["checkpoints/best-3.ckpt"]


def test_a_model_is_logged_once_and_its_folder_taken_away(place, store, monkeypatch):
    told: list[Any] = []
    tell = lambda client, run, folder, *more: told.append((sorted(folder.iterdir()), more))  # noqa: E731
    monkeypatch.setattr(shipped_entries, "log_model", tell)
    run = logger(place / "a", store)
    (place / "model").mkdir()
    (place / "model/MLmodel").write_text("x")
    run.log_model(place / "model", "detector", 7)
    assert not (place / "model").exists()
    ship(place / "a")
    ship(place / "a")
    ((files, more),) = told
    assert [path.name for path in files] == ["MLmodel"]
    assert more == ("detector", 7, None)
    assert not list((place / "a/mlflow/files/models").iterdir())


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A store that takes figures and no files; empty the list, and it takes both."""
    shut, real = [True], MlflowClient.log_artifact

    def guarded(self: MlflowClient, *args: Any) -> None:
        if shut:
            raise PermissionError(30, "Read-only file system")
        real(self, *args)

    monkeypatch.setattr(MlflowClient, "log_artifact", guarded)
    return shut


def test_files_that_their_store_does_not_take_hold_no_figures_up(place, store, said, closed):
    run = logger(place / "a", store)
    for name in "abc":
        (place / f"{name}.txt").write_text(name)
        run.log_file(place / f"{name}.txt", "plots")
    trained(place / "a", store)
    shipper = ship(place / "a")
    assert points(store) == once(range(5))
    assert len(shipper.put_off) == 3
    (warning,) = said
    assert "does not take the file plots/a.txt (" in warning
    assert "Read-only" in warning
    assert "it is kept in" in warning
    # the next process knows what waits, and that the rest is there
    noted = json.loads((place / "a/mlflow/shipped.json").read_text())[store]
    assert len(noted["put_off"]) == 3
    assert noted["offset"] == run.journal.end
    closed.clear()
    assert ship(place / "a").put_off == []
    assert artifacts(place) == [f"plots/{name}.txt" for name in "abc"]
    assert ship(place / "a").put_off == []
    assert points(store) == once(range(5))


def test_sync_says_that_files_stay_behind_and_takes_them_later(place, store, closed, capsys):
    run = trained(place / "a", store)
    (place / "x").write_text("x")
    run.log_file(place / "x", "plots")
    assert main(["mlflow", "sync", "a"]) == 2
    assert "1 files that their store does not take" in capsys.readouterr().err
    assert points(store) == once(range(5))
    closed.clear()
    assert main(["mlflow", "sync", "a"]) == 0
    assert "synced" in capsys.readouterr().out
    assert artifacts(place) == ["plots/x"]
    assert main(["mlflow", "sync", "a"]) == 0
    assert "was complete" in capsys.readouterr().out


def test_a_thread_tries_files_again_beside_the_training(place, store, said, closed, monkeypatch):
    monkeypatch.setattr(Shipper, "RETRY_S", 0.05)
    run = logger(place / "a", store)
    (place / "x").write_text("x")
    run.log_file(place / "x", "plots")
    thread = ShippingThread(Shipper(run.journal), every_s=0.02)
    until(lambda: thread.shipper.put_off)
    closed.clear()
    until(lambda: not thread.shipper.put_off)
    assert thread.finish()
    assert artifacts(place) == ["plots/x"]
    assert len(said) == 1


def test_a_file_that_always_fails_lets_the_others_go_first(place, store, monkeypatch):
    real = EntryWriter._file

    def picky(self: EntryWriter, entry: dict[str, Any]) -> None:
        if entry["file"].endswith("bad"):
            raise RuntimeError("never")
        real(self, entry)

    monkeypatch.setattr(EntryWriter, "_file", picky)
    run = logger(place / "a", store)
    for name in ("bad", "good"):
        (place / name).write_text(name)
        run.log_file(place / name, "x")
    # what fails may fail for all, slowly: the others are not tried before its turn comes again
    assert len(ship(place / "a").put_off) == 2
    assert len(ship(place / "a").put_off) == 1
    assert artifacts(place) == ["x/good"]


# --- the thread


def test_the_end_is_not_taken_for_whole_where_only_the_last_lines_failed(
    place, store, said, monkeypatch
):
    run = trained(place / "a", store)
    shipper = Shipper(run.journal)
    thread = ShippingThread(shipper, every_s=0.01)
    until(lambda: shipper.done == 1)
    monkeypatch.setattr(MlflowClient, "log_batch", failing(ConnectionError("gone")))
    run.log_metrics({"loss": 0.0, "lr": 0.0}, 9)
    assert not thread.finish()
    assert len(said) == 1


def test_nothing_is_lost_however_soon_the_end_follows(place, store):
    for number in range(12):
        folder = place / f"{number}"
        run = trained(folder, store, range(3))
        thread = ShippingThread(Shipper(run.journal), every_s=0.0001)
        run.log_metrics({"end": 1.0}, number)
        assert thread.finish()
    assert {key: n for key, n in points(store).items() if key[0] == "end"} == {
        ("end", number): 1 for number in range(12)
    }


def test_workers_forked_while_the_thread_is_busy_live_and_the_thread_goes_on(place, store):
    import multiprocessing

    run = trained(place / "a", store, range(2000))
    thread = ShippingThread(Shipper(run.journal), every_s=0.001)
    context = multiprocessing.get_context("fork")
    for step in range(2000, 2030):
        run.log_metrics({"loss": 1 / (step + 1), "lr": 0.1}, step)
        worker = context.Process(target=lambda: logging_worker())
        worker.start()
        worker.join(30)
        assert worker.exitcode == 0
    assert thread.finish()
    assert points(store) == once(range(2030))


def logging_worker() -> None:
    import logging
    import warnings

    logging.getLogger("worker").warning("a worker speaks")
    warnings.warn("and warns", stacklevel=1)
    assert np.ones((64, 64)).sum() == 4096


def test_a_thread_says_once_that_a_store_fails_and_once_that_it_answers_again(
    monkeypatch, tmp_path
):
    said: list[str] = []
    for name in ("rank_zero_warn", "rank_zero_info"):
        monkeypatch.setattr(shipping, name, said.append)

    class Stub:
        store, put_off, tries = "http://nowhere", (), 0
        journal = Journal(tmp_path / FOLDER)

        def ship(self) -> bool:
            self.tries += 1
            if self.tries < 4:
                raise OSError("gone")
            return self.tries == 4

        def hurry(self) -> None: ...

        def close(self) -> None: ...

    stub = Stub()
    thread = ShippingThread(stub, every_s=0.01)  # type: ignore[arg-type]
    until = time.monotonic() + 20
    while stub.tries < 4 and time.monotonic() < until:
        time.sleep(0.01)
    assert thread.finish()
    fails, answers = said
    assert "http://nowhere does not take figures (gone)" in fails
    assert answers == "MLflow takes figures again; those of the meantime follow"
