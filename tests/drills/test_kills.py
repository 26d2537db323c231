"""Kill trainings with SIGKILL at chosen moments, resume them, and compare with no interruption.

Each start is a fork, so that it takes seconds, apart from kills during the imports.
"""

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.diary import entries, mismatches
from tests.helpers.kill_and_resume import STEPS, wait_for_process
from tests.helpers.paths import REPO
from tests.helpers.tracked import fresh_store
from tests.helpers.tracking_outage import (
    QUIET,
    arguments,
    find_runs,
    query_database,
    start,
    wait_for_exit,
    write_recipe,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

IMPORTS = ("yolo_lightning.cli.recipe", "yolo_lightning.tracking.logger", "mlflow.pyfunc",
           "yolo_lightning.serving.mlflow_model", "yolo_lightning.evaluation.report",
           "mlflow.store.tracking.sqlalchemy_store", "faster_coco_eval", "albumentations",
           "matplotlib.pyplot")  # fmt: skip
IN_STEPS = (f"--trainer.max_steps={STEPS}", "--trainer.max_epochs=-1")
OPTIONS = {
    "0 workers": ("--data.num_workers=0",),
    "2 workers": ("--data.num_workers=2", *IN_STEPS),
    "2 ranks": ("--data.num_workers=0", "--trainer.devices=2", "--trainer.strategy=ddp", *IN_STEPS),
}
IN_BATCHES = "--data.detection_batch_size=2"  # three batches in a validation, two on each rank

# Moments: see `kill_points.kill_at` for those with a file, `Clock` for those with SIGKILL; numbers
# alone are seconds after the start of an interpreter. "rank 1:" kills only that rank.
LAST = f"validation {STEPS}"
MOMENTS = {
    "imports": ("0.3", "2", "4", "7"),
    "a new store": tuple(f"sqlite3.connect mlflow 1 {delay}" for delay in (0, 0.2, 0.6, 1.2, 2)),
    "the first checkpoint": (
        "open resolved.yaml", "open journal.jsonl", "open rank0.jsonl", "open last.ckpt.part",
        "os.rename last.ckpt.part",
    ),
    "checkpoint writes": (
        "open last.ckpt.part 3", "os.rename previous.ckpt", "os.rename last.ckpt.part 4",
        "os.rename best.ckpt", "os.rename uploaded.json 3",
    ),
    "validations": (
        "SIGKILL validation 6", "open rank0.jsonl 4", f"SIGKILL {LAST}", "open validations.jsonl",
        "os.mkdir report", "os.rename finished.yaml",
    ),
}  # fmt: skip
RANKS = {
    "start and checkpoints": (
        "open journal.jsonl", "rank 1: open rank1.jsonl", "open last.ckpt.part 2",
        "os.rename last.ckpt.part 3", "rank 1: SIGKILL before 9",
    ),
    "validations": (
        "rank 1: SIGKILL validation 12", f"SIGKILL {LAST}", f"rank 1: SIGKILL {LAST}",
        "open validations.jsonl", "os.rename finished.yaml",
    ),
}  # fmt: skip
CHAINS = [(mode, name, m) for mode in ("0 workers", "2 workers") for name, m in MOMENTS.items()]
CHAINS += [("2 ranks", name, moments) for name, moments in RANKS.items()]


def test_there_are_sixty_kills():
    assert sum(len(moments) for *_, moments in CHAINS) == 60


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Iterator[Callable[[str], Path]]:
    """Return a function that gives the folder of an uninterrupted training."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUIET.items():
            patch.setenv(name, value)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for name in IMPORTS:
            import_module(name)
        folders: dict[str, Path] = {}

        def train(mode: str) -> Path:
            if mode not in folders:
                folders[mode] = tmp_path_factory.mktemp("whole")
                write_recipe(folders[mode], fresh_store(folders[mode]))
                Training(folders[mode], mode).finish()
            return folders[mode]

        yield train


class Training:
    """Processes that train in one folder, one after the other.

    Args:
        folder: of the recipe.
        mode: see `OPTIONS`.
    """

    def __init__(self, folder: Path, mode: str) -> None:
        self.folder, self.options = folder, (IN_BATCHES, *OPTIONS[mode])
        self.ranks = 2 if mode == "2 ranks" else 1

    def _start(self, killed_rank: int = 0, **environment: str) -> list[int]:
        """Start all ranks; the environment is that of the rank that will be killed."""
        if self.ranks == 1:
            return [start(self.folder, *self.options, environment=environment)]
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = str(listener.getsockname()[1])
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
        return [
            start(self.folder, *self.options, environment={
                **common, "LOCAL_RANK": str(rank), **(environment if rank == killed_rank else {})
            })
            for rank in range(2)
        ]  # fmt: skip

    def finish(self) -> None:
        """Train to the end."""
        for process in self._start():
            wait_for_exit(process, self.folder, timeout_s=120)

    def kill(self, moment: str) -> None:
        """Train until a moment, in which one rank or all are killed."""
        if moment[0].isdigit():
            self._kill_in_imports(float(moment))
            return
        rank, alone = (1, True) if moment.startswith("rank 1: ") else (0, False)
        moment = moment.removeprefix("rank 1: ")
        name = "STOP" if moment.startswith("SIGKILL") else "KILL_AT"
        processes = self._start(rank, **{name: moment})
        wait_for_exit(processes.pop(rank), self.folder, -signal.SIGKILL, timeout_s=120)
        for process in processes:
            if not alone:
                os.killpg(process, signal.SIGKILL)
            assert wait_for_process(process, 60) is not None, f"waits for ever after {moment}"

    def _kill_in_imports(self, seconds: float) -> None:
        code = "import sys; from yolo_lightning.cli.main import main; sys.exit(main(sys.argv[1:]))"
        with (self.folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", code, *arguments(self.folder, *self.options)],
                cwd=self.folder, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(REPO)},
            )  # fmt: skip
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("mode", "name", "moments"), CHAINS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_killed_training_equals_an_uninterrupted_one(
    reference, tmp_path, record_property, mode, name, moments
):
    uninterrupted = reference(mode)
    is_new = name in ("imports", "a new store")
    store = f"sqlite:///{tmp_path}/mlflow.db" if is_new else fresh_store(tmp_path)
    write_recipe(tmp_path, store)
    training = Training(tmp_path, mode)
    for moment in moments:
        training.kill(moment)
    training.finish()
    different = differences(uninterrupted, tmp_path, training.ranks)
    lost = lost_validations(uninterrupted, tmp_path)
    dead = store_errors(tmp_path)
    for figure, value in (("kills", moments), ("mismatches", different),
                          ("lost validations", lost), ("dead stores", dead)):  # fmt: skip
        record_property(f"kill -9: {figure}", len(value))
    found = different + lost + dead
    assert not found, "\n".join(found)


def differences(uninterrupted: Path, killed: Path, ranks: int) -> list[str]:
    """Compare steps, validations, final weights and the best checkpoint."""
    found = []
    for rank in range(ranks):
        expected, actual = entries(uninterrupted, rank), entries(killed, rank)
        assert [entry[0] for entry in expected] == list(range(STEPS))
        found += mismatches(expected, actual, STEPS)
    expected, actual = (entries(folder, name="validations") for folder in (uninterrupted, killed))
    assert [entry[0] for entry in expected] == [6, 12, 18, 24]
    found += mismatches(expected, actual, 0)
    for name in ("last.ckpt", "best.ckpt"):
        whole, resumed = (newest_checkpoint(folder, name) for folder in (uninterrupted, killed))
        if resumed["global_step"] != whole["global_step"]:
            found.append(f"{name} is of step {resumed['global_step']}")
        for key, value in whole["state_dict"].items():
            if not torch.equal(value, resumed["state_dict"][key]):
                found.append(f"{name}: {key} differs")
    return found + [f"left behind: {path}" for path in killed.glob("runs/**/*.part")]


def newest_checkpoint(folder: Path, name: str) -> dict[str, Any]:
    paths = folder.glob(f"runs/*/checkpoints/{name}")
    newest = max(paths, key=lambda path: path.stat().st_mtime)
    content: dict[str, Any] = torch.load(newest, weights_only=True)
    return content


def lost_validations(uninterrupted: Path, killed: Path) -> list[str]:
    """Return the validations that are not in the diary, or not all of them in the run."""
    whole, resumed = (
        {int(str(entry[0])) for entry in entries(folder, name="validations")}
        for folder in (uninterrupted, killed)
    )
    expected, actual = (validation_points(folder) for folder in (uninterrupted, killed))
    assert len(expected) > 12
    lost = whole - resumed | {step + 1 for _, step, _ in expected - actual}
    return [f"the validation after step {step} is lost" for step in sorted(lost)]


def validation_points(folder: Path) -> set[tuple[str, int, str]]:
    query = (
        "select key, step, value from metrics m join runs r on r.run_uuid = m.run_uuid "
        "where r.status = 'FINISHED' and key like 'val/%'"
    )
    with contextlib.suppress(sqlite3.Error):  # counted as a dead store
        points = query_database(folder / "mlflow.db", query)
        return {(key, step, repr(value)) for key, step, value in points}
    return set()


def store_errors(folder: Path) -> list[str]:
    """Return why a store cannot be opened, or which of its runs have a wrong status."""
    database = folder / "mlflow.db"
    try:
        if query_database(database, "pragma integrity_check") != [("ok",)]:
            return [f"{database} is damaged"]
        statuses = sorted(status for _, status in find_runs(database, folder))
    except sqlite3.Error as error:
        return [f"{database}: {error}"]
    if statuses.count("FINISHED") != 1 or "RUNNING" in statuses:
        return [f"runs are {', '.join(statuses) or 'missing'}"]
    return []
