"""`yolo-lightning doctor`: what this machine has, and whether tracking and rendezvous answer."""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from yolo_lightning.cli import launch
from yolo_lightning.cli.commands.doctor.answers import Finding, rendezvous, tracking
from yolo_lightning.errors import InputError
from yolo_lightning.version import __version__

EXTRAS = {
    "plots": ("matplotlib",),
    "video": ("av",),
    "export": ("onnx", "onnxscript", "onnxruntime"),
}
_PACKAGES = (
    "torch", "lightning", "torchmetrics", "mlflow", "albumentations", "opencv-python-headless",
    "jsonargparse", "omegaconf", "numpy",
)  # fmt: skip
_STORE = "sqlite:///mlflow.db"
_GIB = 2**30
_MARKS = {"ok": "   ", "note": " - ", "failed": " ! "}
_SPARE_SHM = _GIB // 4  # what other programs of a container may have of the shared memory
_PREFETCHED = 2  # batches that a loader worker prepares ahead, torch's default


def versions() -> list[Finding]:
    """Return the versions of what training is built on."""
    found = [
        Finding("yolo-lightning", __version__),
        Finding("Python", f"{platform.python_version()}, {platform.platform()}"),
    ]
    for package in _PACKAGES:
        try:
            found.append(Finding(package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(package, f"missing: {sys.executable} does not see it", "failed"))
    return found


def extras() -> list[Finding]:
    """Return which optional parts are installed, and how the others would be."""
    found = []
    for extra, packages in EXTRAS.items():
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        how = f"pip install 'yolo-lightning[{extra}]'"
        text = f"{', '.join(missing)} missing: {how}" if missing else ", ".join(packages)
        found.append(Finding(extra, text, "note" if missing else "ok"))
    return found


def devices() -> list[Finding]:
    """Return what networks can run on."""
    try:
        import torch
    except Exception as error:
        return [Finding("torch", f"cannot be imported: {error}", "failed")]
    cores = len(os.sched_getaffinity(0))
    found = [Finding("CPU", f"{_cpu()}, {cores} cores, {torch.get_num_threads()} threads of torch")]
    if not torch.cuda.is_available():
        listed = launch.visible_gpus(os.environ)
        lost = f"{listed} are there, and torch {torch.__version__} cannot use them"
        text, state = (lost, "failed") if listed else ("none", "ok")
        return [*found, Finding("GPU", text, state)]
    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else ()
    version = ".".join(map(str, nccl)) or "missing"
    found.append(Finding("CUDA", f"{torch.version.cuda}, NCCL {version}{_driver()}"))
    for index in range(torch.cuda.device_count()):
        try:
            known = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            with torch.cuda.device(index):
                half = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
        except RuntimeError as error:
            found.append(Finding(f"GPU {index}", str(error).splitlines()[0], "failed"))
            continue
        memory = f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB free"
        capability = f"compute capability {known.major}.{known.minor}"
        found.append(Finding(f"GPU {index}", f"{known.name}, {memory}, {capability}, {half}"))
    return found


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return ""
    named = re.search(r"Kernel Module\D*([\d.]+)", text)
    return f", driver {named[1]}" if named else ""


def codecs() -> list[Finding]:
    """Return which pictures are read, and which videos are written."""
    import numpy as np

    try:
        import cv2
    except Exception as error:
        return [Finding("images", f"OpenCV cannot be imported: {error}", "failed")]
    grey = np.full((8, 8, 3), 128, np.uint8)
    lost = []
    for ending in (".jpg", ".png", ".webp", ".bmp", ".tiff"):
        try:
            read = cv2.imdecode(cv2.imencode(ending, grey)[1], cv2.IMREAD_COLOR)
        except cv2.error:
            read = None
        if read is None or abs(int(read.mean()) - 128) > 2:
            lost.append(ending.removeprefix("."))
    text = f"cannot be read: {', '.join(lost)}" if lost else "JPEG, PNG, WebP, BMP, TIFF are read"
    found = [Finding("images", text, "failed" if lost else "ok")]
    if importlib.util.find_spec("av") is not None:
        import av

        able = {name: name in av.codecs_available for name in ("libvpx-vp9", "libx264")}
        text = f"PyAV {av.__version__} writes " + ", ".join(
            f"{label}{'' if able[name] else ' not'}"
            for name, label in (("libvpx-vp9", "VP9"), ("libx264", "H.264"))
        )
        found.append(Finding("video", text, "ok" if all(able.values()) else "note"))
    return found


def storage(output: str, needed_bytes: int | None, shared: str = "/dev/shm") -> list[Finding]:
    """Return the room for runs, and for what loader workers hand over.

    Args:
        output: folder of runs, which need not exist.
        needed_bytes: what the loader workers of a recipe hold at once, if one is known.
        shared: where shared memory is mounted.
    """
    folder = Path(output).expanduser().absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    text, state = f"{free / _GIB:.1f} GiB free", "ok" if free > 2 * _GIB else "note"
    if not there.is_dir() or not os.access(there, os.W_OK):
        text, state = f"{there} is not writable", "failed"
    found = [Finding(output, text, state)]
    if not Path(shared).is_dir():
        return found
    free = shutil.disk_usage(shared).free
    text, state = f"{free / _GIB:.2f} GiB free for loader workers", "ok"
    if needed_bytes is None and free < _GIB:
        text += "; containers get more with --shm-size"
        state = "note"
    elif needed_bytes is not None:
        text += f", the recipe's hold up to {needed_bytes / _GIB:.2f} GiB"
        if free < needed_bytes + _SPARE_SHM:
            text += ": take fewer data.num_workers, or start the container with --shm-size"
            state = "failed"
    return [*found, Finding(shared, text, state)]


def needed_by(values: Mapping[str, Any], nodes: int) -> int | None:
    """Return how much the loader workers of one node hold at once, bytes; None where unknown.

    Args:
        values: of the recipe by dotted key.
        nodes: that share the global batch.
    """

    def value(name: str, usual: int | None) -> Any:
        return values.get(f"data.init_args.{name}", values.get(f"data.{name}", usual))

    side = value("canvas_size", None) or value("image_size", 416)
    batch = [value(f"{kind}_batch_size", 64) for kind in ("detection", "classification")]
    workers = value("num_workers", 2)
    if not all(isinstance(number, int) for number in (side, *batch, workers)):
        return None  # references
    return int(_PREFETCHED * workers * max(batch) * 3 * side**2 // max(1, nodes))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="yolo-lightning doctor",
        description="Say what this machine has, and whether tracking and the rendezvous answer.",
        epilog="Run it inside of a job to see what its ranks will see. The exit code is 2 where "
        "training would not start.",
    )
    add = parser.add_argument
    add("--recipe", metavar="RECIPE", help="what this one needs, and whether the launch fits it")
    add("--output", metavar="FOLDER", help="where runs go; the recipe's, else outputs")
    return parser


def _values(recipe: str | None, args: Sequence[str]) -> dict[str, Any]:
    """Return a recipe's values with what the environment gives for them."""
    rest, allowed = launch.split_allowed(args)
    named = ["--recipe", recipe] if recipe else []
    if not recipe and rest:
        raise InputError(f"{rest[0]}: no such option; allowed: --recipe, --output")
    values = launch.check_command_line([*named, *rest], allowed)
    return {key: launch.resolved(value, os.environ) for key, value in values.items()}


def _launch(values: Mapping[str, Any]) -> Finding:
    """Return what started this process, and whether that fits a recipe."""
    try:
        found = launch.launch_of(os.environ)
        if values:
            seen = launch.visible_gpus(os.environ)
            launch.check_launch(values, os.environ, lambda: seen)
    except InputError as error:
        return Finding("launch", str(error), "failed")
    text = "one process, started by hand"
    if found is not None:
        text = f"{found.by}, {found.nodes} nodes x {found.tasks} tasks"
    return Finding("launch", text)


def _shown(title: str, findings: Iterable[Finding]) -> list[Finding]:
    """Print a part of the report as soon as it is known."""
    found = list(findings)
    width = max(len(finding.name) for finding in found)
    lines = [
        f"{_MARKS[finding.state]} {finding.name:<{width}}  {finding.text}" for finding in found
    ]
    print("\n".join([title, *lines]), flush=True)
    return found


def main(argv: Sequence[str]) -> None:
    """Print the report.

    Raises:
        InputError: something that training needs is missing or does not answer.
    """
    options, rest = _parser().parse_known_args(list(argv))
    values = _values(options.recipe, rest)
    uri = _text(values, "trainer.logger.init_args.tracking_uri")
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or _STORE
    output = options.output or _text(values, "trainer.default_root_dir") or "outputs"
    nodes = values.get("trainer.num_nodes", 1)
    needed = needed_by(values, nodes if isinstance(nodes, int) else 1) if values else None
    found = _shown("versions", versions())
    found += _shown("extras", extras())
    found += _shown("storage", storage(output, needed))
    silent = values.get("trainer.logger") is False
    store = Finding("tracking", "the recipe logs nowhere") if silent else tracking(uri)
    found += _shown("job", [_launch(values), rendezvous(os.environ), store])
    found += _shown("devices", devices())
    found += _shown("codecs", codecs())
    failed = [finding for finding in found if finding.state == "failed"]
    if failed:
        raise InputError("; ".join(f"{finding.name}: {finding.text}" for finding in failed))
    print("all well")


def _text(values: Mapping[str, Any], key: str) -> str | None:
    """Return a text of the recipe; None for other values and for references."""
    value = values.get(key)
    return value if isinstance(value, str) and "${" not in value else None
