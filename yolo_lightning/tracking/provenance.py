"""What a training ran from, and on: source code, versions, devices."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from yolo_lightning.version import __version__

_PACKAGES = ("torch", "lightning", "mlflow", "albumentations", "opencv-python-headless", "numpy")
_GIT_S = 10


def versions() -> dict[str, str]:
    """Return the versions of this package, Python, and what figures depend on."""
    found = {"yolo_lightning": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def device_name(device: torch.device) -> str:
    """Return what a device is called: a GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{device.type}: {models[0] if models else name}, {os.cpu_count()} cores"


def git_state(folder: Path) -> dict[str, str]:
    """Return the commit of a folder's repository and whether files differ from it.

    Returns:
        ``git.commit`` and ``git.dirty``, ``true`` or ``false``; empty where there is no repository.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return {}
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"git.commit": commit, "git.dirty": str(bool(changed)).lower()}


def _git(folder: Path, *arguments: str) -> str | None:
    command: list[Any] = ["git", "-C", folder, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
