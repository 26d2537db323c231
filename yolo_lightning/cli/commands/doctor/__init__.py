"""`yolo-lightning doctor`: check this machine, the tracking store and the rendezvous."""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from yolo_lightning.cli import launch, recipe_policy
from yolo_lightning.cli.commands.doctor.connections import (
    CheckResult,
    check_rendezvous,
    check_tracking,
)
from yolo_lightning.errors import InputError, expand
from yolo_lightning.version import __version__

EXTRAS = {
    "video": ("av",),
    "export": ("onnx", "onnxscript", "onnxruntime"),
}
_PACKAGES = (
    "torch", "lightning", "torchmetrics", "mlflow", "albumentations", "opencv-python-headless",
    "jsonargparse", "omegaconf", "numpy",
)  # fmt: skip
_IMAGE_FORMATS = ("JPEG", "PNG", "WebP", "BMP", "TIFF")
_VIDEO_CODECS = {"VP9": "libvpx-vp9", "H.264": "libx264"}
_DEFAULT_STORE = "sqlite:///mlflow.db"
_GIB = 2**30
_MARKS = {"ok": "   ", "note": " - ", "failed": " ! "}
_RESERVED_SHM = _GIB // 4  # shared memory left for other programs of the container
_PREFETCH_FACTOR = 2  # batches that each loader worker prefetches, the default of torch


def versions() -> Iterator[CheckResult]:
    """Check the versions of required packages."""
    yield CheckResult("yolo-lightning", __version__)
    yield CheckResult("Python", f"{platform.python_version()}, {platform.platform()}")
    for package in _PACKAGES:
        try:
            yield CheckResult(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield CheckResult(package, f"missing in {sys.executable}", "failed")


def extras() -> Iterator[CheckResult]:
    """Check the optional packages."""
    for extra, packages in EXTRAS.items():
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        command = f"pip install 'yolo-lightning[{extra}]'"
        text = f"{', '.join(missing)} missing: {command}" if missing else ", ".join(packages)
        yield CheckResult(extra, text, "note" if missing else "ok")


def devices() -> Iterator[CheckResult]:
    """Check CPU and GPUs."""
    try:
        import torch
    except Exception as error:
        yield CheckResult("torch", f"cannot be imported: {error}", "failed")
        return
    from yolo_lightning.tracking.provenance import processor_name

    cores = len(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    name = processor_name(torch.device("cpu"))
    yield CheckResult("CPU", f"{name}, {cores} cores, {threads} torch threads")
    if not torch.cuda.is_available():
        listed = launch.visible_gpu_count(os.environ)
        unusable = f"{listed} found, but torch {torch.__version__} cannot use them"
        yield CheckResult("GPU", unusable, "failed") if listed else CheckResult("GPU", "none")
        return
    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else ()
    version = ".".join(map(str, nccl)) or "missing"
    yield CheckResult("CUDA", f"{torch.version.cuda}, NCCL {version}{_driver_version()}")
    for index in range(torch.cuda.device_count()):
        try:
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            with torch.cuda.device(index):
                precision = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
        except RuntimeError as error:
            yield CheckResult(f"GPU {index}", str(error).splitlines()[0], "failed")
            continue
        memory = f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB free"
        capability = f"compute capability {properties.major}.{properties.minor}"
        yield CheckResult(f"GPU {index}", f"{properties.name}, {memory}, {capability}, {precision}")


def _driver_version() -> str:
    file = Path("/proc/driver/nvidia/version")  # nvidia-smi may be missing in a container, or hang
    match = re.search(r"Kernel Module\D*([\d.]+)", file.read_text()) if file.exists() else None
    return f", driver {match[1]}" if match else ""


def codecs() -> Iterator[CheckResult]:
    """Check the image formats of OpenCV and the video codecs of PyAV."""
    import numpy as np

    try:
        import cv2
    except Exception as error:
        yield CheckResult("images", f"OpenCV cannot be imported: {error}", "failed")
        return

    def is_readable(extension: str) -> bool:
        try:
            encoded = cv2.imencode(extension, np.zeros((8, 8, 3), np.uint8))[1]
        except cv2.error:
            return False
        return cv2.imdecode(encoded, cv2.IMREAD_COLOR) is not None

    formats = {name: is_readable(f".{name.lower()}") for name in _IMAGE_FORMATS}
    yield CheckResult("images", _list(formats), "ok" if all(formats.values()) else "failed")
    if importlib.util.find_spec("av") is not None:
        import av

        video = {name: codec in av.codecs_available for name, codec in _VIDEO_CODECS.items()}
        text = f"PyAV {av.__version__}: {_list(video)}"
        yield CheckResult("video", text, "ok" if all(video.values()) else "note")


def _list(available: Mapping[str, bool]) -> str:
    found = [name for name, is_available in available.items() if is_available]
    missing = [name for name in available if name not in found]
    return ", ".join(found) + (f"; missing: {', '.join(missing)}" if missing else "")


def storage(
    output: str, needed_bytes: int | None, shared: str = "/dev/shm"
) -> Iterator[CheckResult]:
    """Check the disk space for runs, and the shared memory for loader workers.

    `output` need not exist; `needed_bytes` is None if the recipe is unknown.
    """
    folder = expand(output).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    text, state = f"{free / _GIB:.1f} GiB free", "ok" if free > 2 * _GIB else "note"
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        text, state = f"{existing} is not writable", "failed"
    yield CheckResult(output, text, state)
    if not Path(shared).is_dir():
        return
    free = shutil.disk_usage(shared).free
    text, state = f"{free / _GIB:.2f} GiB free for loader workers", "ok"
    if needed_bytes is None and free < _GIB:
        text += "; in a container, raise it with --shm-size"
        state = "note"
    elif needed_bytes is not None:
        text += f", the recipe needs up to {needed_bytes / _GIB:.2f} GiB"
        if free < needed_bytes + _RESERVED_SHM:
            text += ": reduce data.num_workers, or start the container with a larger --shm-size"
            state = "failed"
    yield CheckResult(shared, text, state)


def loader_memory_bytes(values: Mapping[str, Any], nodes: int) -> int | None:
    """Return the shared memory of all loader workers on one of the nodes; None if unknown."""

    def value(name: str, default: int | None, section: str = "data") -> Any:
        return values.get(f"{section}.init_args.{name}", values.get(f"{section}.{name}", default))

    side = value("image_size", None) or value("image_size", 416, "model")
    for callback in values.get("trainer.callbacks") or []:
        if str(callback.get("class_path")).endswith(".MultiScale"):
            side = max(callback["init_args"]["sizes"])
    batch = [value(f"{kind}_batch_size", 64) for kind in ("detection", "classification")]
    workers = value("num_workers", 2)
    if not all(isinstance(number, int) for number in (side, *batch, workers)):
        return None  # references
    return int(_PREFETCH_FACTOR * workers * max(batch) * 3 * side**2 // max(1, nodes))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="yolo-lightning doctor",
        description="Check versions, devices, storage, the tracking store and the rendezvous.",
        epilog="Run it inside a cluster job to check the environment of its ranks. The exit code "
        "is 2 if training would not start.",
    )
    add = parser.add_argument
    add("--recipe", metavar="RECIPE", help="check the needs of this recipe, and the launch")
    add("--output", metavar="FOLDER", help="folder of runs (default: the recipe's, or outputs)")
    return parser


def _values(recipe: str | None, args: Sequence[str]) -> dict[str, Any]:
    """Return the values of a recipe by dotted key, with environment variables inserted."""
    rest, modules, variables = launch.split_allowed(args)
    recipe_policy.allow(modules, variables)
    recipe_args = ["--recipe", recipe] if recipe else []
    if not recipe and rest:
        raise InputError(f"{rest[0]}: no such option; allowed: --recipe, --output")
    values = launch.check_command_line([*recipe_args, *rest], modules)
    values = {key: launch.resolve_env(value, os.environ) for key, value in values.items()}
    recipe_policy.check_values(values, launch.option_values(rest))
    return values


def _check_launch(values: Mapping[str, Any]) -> CheckResult:
    """Check the launcher of this process against the recipe, if there is one."""
    try:
        job = launch.detect_launch(os.environ)
        if values:
            launch.check_launch(values, os.environ, launch.visible_gpu_count(os.environ))
    except InputError as error:
        return CheckResult("launch", str(error), "failed")
    text = "a single process, without a launcher"
    if job is not None:
        text = f"{job.launcher}, {job.nodes} nodes x {job.tasks_per_node} tasks"
    return CheckResult("launch", text)


def _print_section(title: str, checks: Iterable[CheckResult]) -> list[CheckResult]:
    """Print a section of the report; return its results."""
    results = list(checks)
    width = max(len(result.name) for result in results)
    lines = [f"{_MARKS[result.state]} {result.name:<{width}}  {result.text}" for result in results]
    print("\n".join([title, *lines]), flush=True)
    return results


def main(argv: Sequence[str]) -> None:
    """Print the report.

    Raises:
        InputError: training would not start; names every failed check.
    """
    options, rest = _parser().parse_known_args(list(argv))
    values = _values(options.recipe, rest)
    uri = _string_value(values, "trainer.logger.init_args.tracking_uri")
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or _DEFAULT_STORE
    output = options.output or _string_value(values, "trainer.default_root_dir") or "outputs"
    nodes = values.get("trainer.num_nodes", 1)
    memory = loader_memory_bytes(values, nodes if isinstance(nodes, int) else 1) if values else None
    results = _print_section("versions", versions())
    results += _print_section("extras", extras())
    results += _print_section("storage", storage(output, memory))
    untracked = values.get("trainer.logger") is False
    disabled = CheckResult("tracking", "disabled by the recipe")
    store = disabled if untracked else check_tracking(uri)
    job = [_check_launch(values), check_rendezvous(os.environ), store]
    results += _print_section("job", job)
    results += _print_section("devices", devices())
    results += _print_section("codecs", codecs())
    failed = [result for result in results if result.state == "failed"]
    if failed:
        raise InputError("; ".join(f"{result.name}: {result.text}" for result in failed))
    print("no problems found")


def _string_value(values: Mapping[str, Any], key: str) -> str | None:
    """Return a string of the recipe; None for other types and for references."""
    value = values.get(key)
    return value if isinstance(value, str) and "${" not in value else None
