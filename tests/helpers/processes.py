"""Trainings as processes of their own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.helpers.kill_and_resume import arguments, write_recipe
from tests.helpers.paths import REPO

ENVIRONMENT = {
    **os.environ, "PYTHONPATH": str(REPO), "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1",
    "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1",
}  # fmt: skip


def start(folder, *options):
    write_recipe(folder)
    log = (folder / "log.txt").open("w")
    return subprocess.Popen(
        [sys.executable, "-m", "yolo_lightning", *arguments(folder, 1), *options],
        env=ENVIRONMENT, cwd=folder, stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip


def left_within(process, seconds):
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def ranks_of(process: int) -> dict[int, int]:
    """Return the processes of a training's ranks, the launching one first."""
    found = {0: process}
    for entry in Path("/proc").iterdir():
        try:
            text = (entry / "environ").read_bytes()
            line = (entry / "cmdline").read_bytes()
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        if parent == process and b"yolo_lightning" in line and b"LOCAL_RANK=1" in text:
            found[1] = int(entry.name)
    return found
