"""Run trainings in separate processes."""

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
    """Start a training in `folder`; its output goes to log.txt."""
    write_recipe(folder)
    log = (folder / "log.txt").open("w")
    return subprocess.Popen(
        [sys.executable, "-m", "yolo_lightning", *arguments(folder, 1), *options],
        env=ENVIRONMENT, cwd=folder, stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip


def wait_or_kill(process, seconds):
    """Return the exit code; kill the process group and raise on a timeout."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def rank_pids(pid: int) -> dict[int, int]:
    """Return the process ids of ranks 0 and 1; `pid` is the process that launched the training."""
    pids = {0: pid}
    for entry in Path("/proc").iterdir():
        try:
            environment = (entry / "environ").read_bytes()
            command_line = (entry / "cmdline").read_bytes()
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        is_child = parent == pid and b"yolo_lightning" in command_line
        if is_child and b"LOCAL_RANK=1" in environment:
            pids[1] = int(entry.name)
    return pids
