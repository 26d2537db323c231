"""From the start of the process of `fit` to the end of its first step."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil

from tests.benchmarks.rows import Row, Seconds, spread, wall
from tests.helpers.paths import REPO

_OPTIONS = ("--trainer.max_steps", "1", "--trainer.limit_val_batches", "0")


class FirstStep(pl.Callback):
    """Write the seconds from the start of the process to the end of the first step to a file.

    Args:
        path: of the file.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, *_: Any) -> None:
        """Write wall clock and user time."""
        process = psutil.Process()
        elapsed, user = time.time() - process.create_time(), process.cpu_times().user
        Path(self.path).write_text(f"{elapsed} {user}")


def measure(tiny: bool = False) -> list[Row]:
    """Return the row; the first of several starts reads files from the disk, and is not counted."""
    found = [_start() for _ in range(1 if tiny else 6)]
    counted = found if tiny else found[1:]
    cpu = spread([one.cpu for one in counted], ".1f", " s")
    return [
        Row("start of `fit` to the end of the first step, quickstart, warm",
            f"{wall(counted, '.1f')}, processor {cpu}", "8 s")
    ]  # fmt: skip


def _start() -> Seconds:
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "seconds"
        command = [
            sys.executable, "-m", "yolo_lightning", "fit",
            "--config", str(REPO / "recipes/quickstart.yaml"),
            "--trainer.default_root_dir", f"{temporary}/run", *_OPTIONS,
            "--allow-module", "tests.benchmarks.start",
            "--trainer.callbacks+=tests.benchmarks.start.FirstStep",
            f"--trainer.callbacks.path={file}",
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(REPO)}
        subprocess.run(
            command, cwd=temporary, env=environment, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, timeout=300, check=True,
        )  # fmt: skip
        elapsed, user = map(float, file.read_text().split())
        return Seconds(elapsed, user)
