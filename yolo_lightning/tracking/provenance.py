"""Provenance of a run: git commit, package versions, device name."""

import platform
import re
from importlib import metadata
from pathlib import Path

import torch

from yolo_lightning.version import __version__

_PACKAGES = ("torch", "lightning", "mlflow", "albumentations", "opencv-python-headless", "numpy")
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_MAX_CHARACTERS = 2**24


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
    """Return ``git.commit`` of a folder's repository; empty if there is none.

    Reads files only: git itself would run programs that the repository's configuration names.
    """
    for parent in (folder.absolute(), *folder.absolute().parents):
        repository = parent / ".git"
        link = re.match(r"gitdir: (.+)", _read(parent, ".git"))  # a worktree or a submodule
        if link:
            repository = parent / link[1].strip()
        if not (repository / "HEAD").exists():
            continue
        commit = _read(repository, "HEAD").strip()
        if commit.startswith("ref: refs/"):
            common = _read(repository, "commondir").strip()  # holds the branches of all worktrees
            commit = _branch_commit(repository / common, commit.removeprefix("ref: "))
        return {"git.commit": commit} if _COMMIT.fullmatch(commit) else {}
    return {}


def _branch_commit(repository: Path, name: str) -> str:
    """Return the commit of a branch, from a file of its own or from the packed branches."""
    packed = re.search(rf"^(\w+) {re.escape(name)}$", _read(repository, "packed-refs"), re.M)
    return _read(repository, name).strip() or (packed[1] if packed else "")


def _read(repository: Path, name: str) -> str:
    """Return the start of a regular file below a folder, and not behind a link out of it."""
    try:
        file = (repository / name).resolve()
        if not file.is_file() or not file.is_relative_to(repository.resolve()):
            return ""
        with file.open(encoding="utf-8", errors="replace") as stream:
            return stream.read(_MAX_CHARACTERS)
    except (OSError, ValueError, RuntimeError):  # unreadable, or no name of a file
        return ""
