"""`yolo-lightning export`: export a detector to ONNX or torch.export."""

import argparse
import os
import shlex
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from yolo_lightning.errors import InputError, expand

if TYPE_CHECKING:
    from yolo_lightning.detector import DetectorModule

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="yolo-lightning export",
        description="Export a detector as one graph, from pixels to boxes, scores and tree nodes, "
        "including non-maximum suppression, and compare it with the checkpoint.",
        epilog="Inputs: images (uint8 B x 3 x H x W, RGB, resized; float32 in 0…1 for a model with "
        "the interpolation darknet) and sizes_hw_orig (int64 B x 2, px of the original images). "
        "Outputs: boxes_xyxy_orig_px (B x top x 4), scores (B x "
        "top, descending) and nodes (B x top, padded with -1). The metadata contains the names "
        "of the nodes and all settings.",
    )
    parser.add_argument(
        "checkpoint",
        help="a detector; averaged weights are exported if the training averaged them",
    )
    parser.add_argument(
        "--format",
        choices=tuple(SUFFIXES),
        default="onnx",
        help="onnx, which needs the extra `export`, or torch-export, a .pt2 file for "
        "torch.export.load (default: onnx)",
    )
    parser.add_argument(
        "--output", help="file to write (default: CHECKPOINT.onnx or .pt2 in the working folder)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PX",
        help="size in the metadata and for the comparison; the graph accepts any size (default: "
        "the model's own)",
    )
    parser.add_argument(
        "--interpolation",
        choices=("area", "darknet"),
        help="how the images will be resized: averaging, or as the original program (default: the "
        "model's own)",
    )
    parser.add_argument(
        "--top", type=int, default=100, help="maximum number of boxes per image (default: 100)"
    )
    parser.add_argument(
        "--score-threshold", type=float, default=0.25, help="minimum score (default: 0.25)"
    )
    parser.add_argument(
        "--tree-threshold",
        type=float,
        default=0.5,
        help="minimum P(class) to report a more specific class (default: 0.5)",
    )
    parser.add_argument(
        "--iou-threshold",
        type=float,
        help="of non-maximum suppression (default: the checkpoint's)",
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


def _output_path(options: argparse.Namespace) -> Path:
    """Return the file to write; it may exist only with ``--overwrite``."""
    name = Path(options.checkpoint).stem + SUFFIXES[options.format]
    output = expand(options.output or name)
    if output.is_dir() or not output.name:
        raise InputError(f"--output {options.output!r} is a folder; expected a file to write")
    if output.exists() and not options.overwrite:
        raise InputError(f"{output} exists; --overwrite replaces it, --output names another")
    return output


def main(argv: Sequence[str]) -> None:
    """Run `export`.

    Raises:
        InputError: an invalid option or checkpoint, a write error, or an exported graph whose
            outputs differ from those of the checkpoint; it is deleted.
    """
    options = _parser().parse_args(list(argv))
    _check(options)
    output = _output_path(options)
    from yolo_lightning.detector import DetectorModule
    from yolo_lightning.inference.loading import load

    module = load(options.checkpoint)
    if not isinstance(module, DetectorModule):
        raise InputError(f"{options.checkpoint}: holds a classifier; export takes a detector")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as folder:
            temporary = Path(folder) / output.name
            summary = _write_and_compare(module, options, temporary, output)
            os.replace(temporary, output)
    except OSError as error:
        reason = f"{error.filename or output.parent}: {error.strerror or error}"
        raise InputError(f"{output} cannot be written: {reason}") from None
    print(summary)


def _write_and_compare(
    module: "DetectorModule", options: argparse.Namespace, temporary: Path, output: Path
) -> str:
    """Write a file that equals the checkpoint; return a summary for the user."""
    from yolo_lightning.export import check, graph

    size_hw = module.input_size_hw(options.image_size)
    if options.iou_threshold is not None:
        module.iou_threshold = options.iou_threshold
    settings = graph.GraphSettings(
        module.hparams["resize"],
        options.score_threshold,
        options.tree_threshold,
        module.iou_threshold,
        options.top,
        options.interpolation or module.hparams["interpolation"],
    )
    to_onnx = options.format == "onnx"
    write = graph.write_onnx if to_onnx else graph.write_torch
    run = check.run_onnx if to_onnx else check.run_torch
    metadata = check.metadata_of(module, settings, size_hw)
    start = time.perf_counter()
    write(module.network, module.tree, settings, temporary, metadata)
    seconds = time.perf_counter() - start
    # rounding decides between two nearly equal boxes in suppression: allow a second attempt
    for seed in range(2):
        boxes, images, difference = check.compare(module, temporary, run, settings, size_hw, seed)
        is_close = difference <= check.MAX_DIFFERENCE  # False for NaN
        if is_close:
            break
    measured = f"maximum difference {difference:.1e} (of the image's sides, or of the score)"
    if not is_close:
        raise InputError(
            f"{output}: differs from the checkpoint, {measured}; allowed: "
            f"{check.MAX_DIFFERENCE}. Not kept"
        )
    stride = module.network.stride
    return (
        f"{shlex.quote(str(output))}: {temporary.stat().st_size / 2**20:.1f} MiB, written in "
        f"{seconds:.0f} s; up to {settings.top} boxes per image, any batch size, image sizes in "
        f"multiples of {stride} px, at least {stride if to_onnx else 2 * stride} px\n"
        f"  checked: {boxes} boxes of {images} images, {measured}"
    )
