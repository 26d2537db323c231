"""Run folders: where they are, how they are locked, and which checkpoints they hold."""

import contextlib
import fcntl
import os
import re
import stat
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import yaml
from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_only

from yolo_lightning.checkpoints.io import LAST, PREVIOUS
from yolo_lightning.checkpoints.validation import resumable_checkpoint
from yolo_lightning.errors import InputError, expand, write_atomically
from yolo_lightning.tracking.journal import JOURNAL_FOLDER, RUN_ID_FILE

BEST = "best.ckpt"
FINISHED = "finished.yaml"  # in the folder of a run that was trained to its end
_RECORD, _LOCK = "resolved.yaml", ".lock"


def rank() -> int:
    """Return the global rank of this process."""
    return int(getattr(rank_zero_only, "rank", 0) or 0)


def runs_root(config: Namespace, recipes: Sequence[str]) -> Path:
    """Return the folder that holds all runs of a recipe."""
    name = Path(recipes[-1]).stem if recipes else "run"
    return Path(config.trainer.default_root_dir or f"outputs/{name}")


def require_plain(folder: Path) -> Path:
    """Return a run folder that holds files and folders alone.

    A run folder may come from somebody else. A training that goes on in it would write through
    links to other files of the user's, log and remove those files, or wait for ever for a pipe.

    Raises:
        InputError: it holds a link or a special file.
    """
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *files)):
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:  # another process has just moved it
                continue
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                kind = "link" if stat.S_ISLNK(mode) else "special file"
                raise InputError(f"{path}: a {kind}; allowed in a run folder: files and folders")
    return folder


def checkpoint_run_folder(checkpoint: str | None) -> Path | None:
    """Return the run folder that contains a checkpoint; None if it is outside of one.

    Raises:
        InputError: see `require_plain`.
    """
    if not checkpoint:
        return None
    folder = Path(checkpoint).parent.parent
    return require_plain(folder) if (folder / _RECORD).is_file() else None


def tracked_run_folder(checkpoint: str | None) -> Path | None:
    """Return the run folder of a checkpoint if it also holds an MLflow run, else None.

    Raises:
        InputError: see `require_plain`.
    """
    folder = Path(checkpoint).parent.parent if checkpoint else None
    if folder is None or not (
        (folder / RUN_ID_FILE).is_file() or (folder / JOURNAL_FOLDER).is_dir()
    ):
        return None
    return require_plain(folder)


def cluster_job_id(environment: Mapping[str, str]) -> str | None:
    """Return an id of the SLURM or torchrun job that survives restarts; None outside of a job."""
    if "SLURM_JOB_ID" in environment and "SLURM_PROCID" in environment:
        array = environment.get("SLURM_ARRAY_JOB_ID")
        task = environment.get("SLURM_ARRAY_TASK_ID")
        return f"slurm-{array}-{task}" if array else f"slurm-{environment['SLURM_JOB_ID']}"
    name = environment.get("TORCHELASTIC_RUN_ID", "none")
    # torchrun sets `none` if it got no --rdzv-id
    return None if name == "none" else f"torchrun-{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}"


def newest_run(root: Path) -> Path | None:
    """Return the run that was started last in a folder of runs; None if there is none."""
    locks = list(root.glob(f"*/{_LOCK}"))  # written by every start
    return max(locks, key=lambda file: file.stat().st_mtime).parent if locks else None


def find_resume_checkpoint(folder: Path) -> Path | None:
    """Return the newest valid checkpoint to resume from, in one run or in a folder of runs.

    Raises:
        InputError: both checkpoints of the newest run are damaged.
    """
    checkpoints = [
        path
        for name in (LAST, PREVIOUS)
        for path in (*folder.glob(f"checkpoints/{name}"), *folder.glob(f"*/checkpoints/{name}"))
    ]
    if not checkpoints:
        return None
    newest = max(checkpoints, key=lambda path: path.stat().st_mtime)
    return resumable_checkpoint(newest.with_name(LAST))


def find_best_checkpoint(root: Path, missing: str = "no --ckpt_path given, and no run in") -> Path:
    """Return the best checkpoint of the newest run, or its last one if none was marked as best.

    `root` is a folder of runs, or a run; `missing` begins the message of the error.

    Raises:
        InputError: no run has a checkpoint.
    """
    for name in (BEST, LAST):
        found = [*root.glob(f"checkpoints/{name}"), *root.glob(f"*/checkpoints/{name}")]
        if found:
            return max(found, key=lambda path: path.stat().st_mtime)
    nested = sorted(str(path) for path in root.rglob(f"checkpoints/{LAST}"))
    hint = f"pass one of: {', '.join(nested[-4:])}" if nested else "train first"
    raise InputError(f"{missing} {str(root)!r} has checkpoints/{BEST} or {LAST}; {hint}")


def find_pretrained(path: str) -> str:
    """Return a path to weights; of a folder of runs, the best checkpoint of its newest run.

    Raises:
        InputError: an empty path, or a folder without checkpoints.
    """
    if not path:
        raise InputError("model.pretrained is ''; allowed: a file, a folder of runs, or null")
    folder = expand(path)
    if not folder.is_dir():
        return path
    return str(find_best_checkpoint(folder, "model.pretrained: no run in"))


def mark_finished(folder: Path, step: int) -> None:
    """Record that a run was trained to its end, and which checkpoint is its best one."""
    names = [name for name in (BEST, LAST) if (folder / "checkpoints" / name).is_file()]
    if names:
        values = {"step": step, "checkpoint": f"checkpoints/{names[0]}"}
        write_atomically(folder / FINISHED, yaml.safe_dump(values, sort_keys=False))


def prepare_run_folder(root: Path, checkpoint: str | None, job_folder: Path | None = None) -> Path:
    """Return the folder of the resumed checkpoint, of the job, or a new one; rank 0 creates it."""
    resumed = checkpoint_run_folder(checkpoint)
    if resumed is not None:
        return resumed
    if job_folder is not None:
        if rank() == 0:
            job_folder.mkdir(parents=True, exist_ok=True)
        return require_plain(job_folder)
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    number = 1
    while True:
        folder = root / (stamp if number == 1 else f"{stamp}-{number}")
        if rank() != 0:
            return folder  # only rank 0 uses it
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return folder


def make_numbered_folder(parent: Path, name: str) -> Path:
    """Create the next free folder of ``name-001``, ``name-002``, … and return it.

    Raises:
        InputError: it cannot be created.
    """
    number = 1
    while True:
        folder = parent / f"{name}-{number:03}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise InputError(f"{str(folder)!r}: {error.strerror or error}") from None
        else:
            return folder


_locks: list[IO[str]] = []


def lock(folder: Path) -> None:
    """Lock a run folder against other trainings until this process ends; rank 0 only.

    The lock belongs to the process: forked loader workers do not inherit it.

    Raises:
        InputError: another process holds the lock.
    """
    if rank() != 0:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK).open("w")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"{folder}: another training is writing there; wait until it ends, or omit "
            "--resume auto to start a new run"
        ) from None
    except OSError:
        return  # the file system does not support locks
    _locks[:] = [file]


def remove_if_empty(folder: Path) -> None:
    """Remove a run folder with nothing but the lock file, and its parent if it is empty then."""
    with contextlib.suppress(OSError):
        if rank() == 0 and [path.name for path in folder.iterdir()] in ([], [_LOCK]):
            (folder / _LOCK).unlink(missing_ok=True)
            folder.rmdir()
            folder.parent.rmdir()
