"""`yolo-lightning export`: a detector as one graph, for other runtimes."""

import argparse
import os
import shlex
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from yolo_lightning.errors import InputError
from yolo_lightning.export.check import MAX_APART, compare, metadata_of, open_onnx, open_torch

if TYPE_CHECKING:
    from yolo_lightning.detector import DetectorModule

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="yolo-lightning export",
        description="Write a detector as one graph, from pixels to boxes, scores and nodes, "
        "suppression included, and check it against the checkpoint.",
        epilog="The graph takes images (uint8 B x 3 x H x W, RGB, fitted) and sizes_hw_orig "
        "(int64 B x 2, px of the originals) and gives boxes_xyxy_orig_px (B x top x 4), scores "
        "(B x top, descending) and nodes (B x top, -1 where there are no more boxes). Names of "
        "the nodes and all settings travel in its metadata.",
    )
    parser.add_argument(
        "checkpoint",
        help="a detector; where training averaged its weights, the averages are exported",
    )
    parser.add_argument(
        "--format",
        choices=tuple(SUFFIXES),
        default="onnx",
        help="onnx, for ONNX Runtime and others (needs the extra `export`); torch-export, a .pt2 "
        "for torch.export.load, which needs torch alone where it runs (onnx)",
    )
    parser.add_argument("--output", help="the file; CHECKPOINT.onnx or .pt2 in the working folder")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PX",
        help="what the metadata tells and the check uses; the model's own. The graph takes any",
    )
    parser.add_argument("--top", type=int, default=100, help="rows given for each image (100)")
    parser.add_argument(
        "--score-threshold", type=float, default=0.25, help="least score of a box (0.25)"
    )
    parser.add_argument(
        "--tree-threshold",
        type=float,
        default=0.5,
        help="how probable a node is down to which the tree is descended (0.5)",
    )
    parser.add_argument(
        "--iou-threshold", type=float, help="of non-maximum suppression; the checkpoint's"
    )
    return parser


def _check(options: argparse.Namespace) -> None:
    for name in ("score_threshold", "tree_threshold", "iou_threshold"):
        value = getattr(options, name)
        if value is not None and not 0 <= value <= 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}; allowed: 0 … 1")
    for name in ("top", "image_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}; allowed: 1 or more")
    for package in ("onnx", "onnxscript", "onnxruntime") if options.format == "onnx" else ():
        try:
            import_module(package)
        except ImportError as error:
            raise InputError(
                f"--format onnx needs {package} ({error}): pip install 'yolo-lightning[export]'"
            ) from None


def _output(options: argparse.Namespace) -> Path:
    """Return the file to write; a file that exists only where it may be replaced."""
    name = Path(options.checkpoint).stem + SUFFIXES[options.format]
    output = Path(options.output or name).expanduser()
    if output.is_dir() or not output.name:
        raise InputError(f"--output {options.output!r} is a folder; expected a file to write")
    if output.exists() and not options.overwrite:
        raise InputError(f"{output} exists; --overwrite replaces it, --output names another")
    return output


def _folder_beside(output: Path) -> "tempfile.TemporaryDirectory[str]":
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-")
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{output} cannot be written: {error.filename}: {reason}") from None


def main(argv: Sequence[str]) -> None:
    """Write a detector's graph and check it.

    Raises:
        InputError: a bad option, no detector, a file that cannot be written, or one that does
            not do what the checkpoint does, which is not kept.
    """
    options = _parser().parse_args(list(argv))
    _check(options)
    output = _output(options)
    from yolo_lightning.detector import DetectorModule
    from yolo_lightning.inference.loading import load

    module = load(options.checkpoint)
    if not isinstance(module, DetectorModule):
        raise InputError(f"{options.checkpoint}: holds a classifier; export takes a detector")
    with _folder_beside(output) as folder:
        fresh = Path(folder) / output.name
        _write_checked(module, options, fresh, output)
        os.replace(fresh, output)


def _write_checked(
    module: "DetectorModule", options: argparse.Namespace, fresh: Path, output: Path
) -> None:
    from yolo_lightning.export import graph

    size_hw = module.size_hw(options.image_size)
    if options.iou_threshold is not None:
        module.iou_threshold = options.iou_threshold
    settings = graph.GraphSettings(
        module.hparams["resize"],
        options.score_threshold,
        options.tree_threshold,
        module.iou_threshold,
        options.top,
    )
    to_onnx = options.format == "onnx"
    write = graph.write_onnx if to_onnx else graph.write_torch
    start = time.perf_counter()
    write(module.network, module.tree, settings, fresh, metadata_of(module, settings, size_hw))
    seconds = time.perf_counter() - start
    # two boxes may be so nearly equal that rounding decides which suppresses the other: ask twice
    opened = (open_onnx if to_onnx else open_torch)(fresh)
    for seed in range(2):
        found = compare(module, opened, settings, size_hw, seed)
        if found.close:
            break
    differs = (
        f"maximum difference {max(found.of_boxes, found.of_scores):.1e} (boxes "
        f"{found.of_boxes:.1e} of the image's sides, scores {found.of_scores:.1e} of the score)"
    )
    if not found.close:
        raise InputError(
            f"{output}: differs from the checkpoint, {differs}; allowed: {MAX_APART}. Not kept"
        )
    stride = module.network.stride
    print(
        f"{shlex.quote(str(output))}: {fresh.stat().st_size / 2**20:.1f} MiB, written in "
        f"{seconds:.0f} s; up to {settings.top} boxes an image, any number of images, of sizes in "
        f"multiples of {stride} px from {stride if to_onnx else 2 * stride} px on"
    )
    print(f"  checked: {found.boxes} boxes of {found.images} images, {differs}")
