"""Where runs lie: their folders, their checkpoints, and what is measured of these."""

import contextlib
import fcntl
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_only

from yolo_lightning.checkpoints.io import LAST, PREVIOUS
from yolo_lightning.checkpoints.validation import sound_checkpoint
from yolo_lightning.errors import InputError
from yolo_lightning.tracking.journal import FOLDER, RUN_ID_FILE

BEST = "best.ckpt"
_RECORD, _LOCK = "resolved.yaml", ".lock"


def rank() -> int:
    """Return the number of this process among those of a distributed run."""
    return int(getattr(rank_zero_only, "rank", 0) or 0)


def root_of(config: Namespace, recipes: Sequence[str]) -> Path:
    """Return the folder that holds the runs of a recipe."""
    name = Path(recipes[-1]).stem if recipes else "run"
    return Path(config.trainer.default_root_dir or f"outputs/{name}")


def folder_of(checkpoint: str | None) -> Path | None:
    """Return the run folder that a checkpoint lies in, None where it lies elsewhere."""
    if not checkpoint:
        return None
    folder = Path(checkpoint).parent.parent
    return folder if (folder / _RECORD).is_file() else None


def job_of(environment: Mapping[str, str]) -> str | None:
    """Return what the cluster calls this job, the same each time it starts; None outside of one."""
    if "SLURM_JOB_ID" in environment and "SLURM_PROCID" in environment:
        array = environment.get("SLURM_ARRAY_JOB_ID")
        task = environment.get("SLURM_ARRAY_TASK_ID")
        return f"slurm-{array}-{task}" if array else f"slurm-{environment['SLURM_JOB_ID']}"
    name = environment.get("TORCHELASTIC_RUN_ID", "none")
    # `none` is what torchrun says where nobody gave it a name
    return None if name == "none" else f"torchrun-{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}"


def newest_state(folder: Path) -> Path | None:
    """Return the newest sound state to go on from: of one run, or of the runs in a folder.

    Raises:
        InputError: the newest run's states are damaged, both of them.
    """
    found = [
        path
        for name in (LAST, PREVIOUS)
        for path in (*folder.glob(f"checkpoints/{name}"), *folder.glob(f"*/checkpoints/{name}"))
    ]
    if not found:
        return None
    newest = max(found, key=lambda path: path.stat().st_mtime)
    return sound_checkpoint(newest.with_name(LAST))


def run_folder(root: Path, checkpoint: str | None, job_folder: Path | None = None) -> Path:
    """Return the folder of the run that is resumed, else a fresh one, made on rank 0.

    Args:
        root: holds the runs of the recipe.
        checkpoint: to go on from.
        job_folder: where a cluster's job has its run.
    """
    resumed = folder_of(checkpoint)
    if resumed is not None:
        return resumed
    if job_folder is not None:
        if rank() == 0:
            job_folder.mkdir(parents=True, exist_ok=True)
        return job_folder
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    number = 1
    while True:
        folder = root / (stamp if number == 1 else f"{stamp}-{number}")
        if rank() != 0:
            return folder  # only rank 0's is used
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return folder


_held: list[IO[str]] = []


def hold(folder: Path) -> None:
    """Keep other trainings out of a run's folder until this process ends; on rank 0.

    A lock of the process, which forked loader workers neither share nor outlive.

    Raises:
        InputError: another process trains there.
    """
    if rank() != 0:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / _LOCK).open("w")
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"{folder}: another training is writing there; wait for its end, or leave out "
            "--resume auto for a run of its own"
        ) from None
    except OSError:
        return  # a file system without locks
    _held[:] = [lock]


def leave(folder: Path) -> None:
    """Remove a run's folder that nothing was written to."""
    with contextlib.suppress(OSError):
        if rank() == 0 and [path.name for path in folder.iterdir()] in ([], [_LOCK]):
            (folder / _LOCK).unlink(missing_ok=True)
            folder.rmdir()


def numbered_folder(parent: Path, name: str) -> Path:
    """Make and return a fresh folder: ``name-001``, ``name-002`` and so on.

    Raises:
        InputError: it cannot be made.
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


def tracked(checkpoint: str | None) -> Path | None:
    """Return the folder of a checkpoint's run where that is an MLflow run too, else None."""
    folder = Path(checkpoint).parent.parent if checkpoint else None
    if folder is None or not ((folder / RUN_ID_FILE).is_file() or (folder / FOLDER).is_dir()):
        return None
    return folder


def newest_checkpoint(root: Path) -> Path:
    """Return the best checkpoint of the newest run.

    Raises:
        InputError: no run holds one.
    """
    for name in (BEST, LAST):
        found = sorted(root.glob(f"*/checkpoints/{name}"), key=lambda p: p.stat().st_mtime)
        if found:
            return found[-1]
    deeper = sorted(str(path) for path in root.rglob(f"checkpoints/{LAST}"))
    hint = f"name one: {', '.join(deeper[-4:])}" if deeper else "train first"
    raise InputError(
        f"no --ckpt_path given, and no run under {str(root)!r} holds checkpoints/{BEST}; {hint}"
    )
