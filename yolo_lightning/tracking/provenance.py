"""Provenance of a run: git commit, package versions, device name."""

import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from yolo_lightning.version import __version__

_PACKAGES = ("torch", "lightning", "mlflow", "albumentations", "opencv-python-headless", "numpy")
_GIT_TIMEOUT_S = 10


def versions() -> dict[str, str]:
    """Return the versions of this package, Python and the main dependencies."""
    result = {"yolo_lightning": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            result[name] = "unknown"
    return result


def processor_name(device: torch.device) -> str:
    """Return the model name of a GPU or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    file = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)$", file.read_text(), re.M) if file.exists() else None
    return match[1] if match else platform.processor() or platform.machine()


def git_state(folder: Path) -> dict[str, str]:
    """Return ``git.commit`` and ``git.dirty`` (``true``, ``false``); empty without a repository."""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return {}
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"git.commit": commit, "git.dirty": str(bool(changes)).lower()}


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
