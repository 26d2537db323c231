"""`yolo-lightning classify`: classify images."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yolo_lightning.cli.arguments import CommandParser
from yolo_lightning.errors import InputError, printable


def _format_table(path: Path, result: dict[str, Any], as_path: bool) -> str:
    """Return the classes of an image, or its path through the tree, as text."""
    lines = [str(path)]
    for depth, row in enumerate(result["path"] if as_path else result["classes"]):
        indent = "  " * depth if as_path else ""
        lines.append(f"  {100 * row['probability']:6.2f} %  {indent}{row['name']}")
    return "\n".join(lines)


def _parser() -> CommandParser:
    parser = CommandParser(prog="yolo-lightning classify", description="Classify images.")
    parser.add_argument(
        "checkpoint",
        help="a classifier, or a detector, which names an image by its box of the highest "
        "objectness",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="images and folders of images")
    parser.add_argument(
        "--top",
        type=int,
        metavar="K",
        help="number of most probable classes (default: 5); of a tree: print leaves, not the path",
    )
    parser.add_argument(
        "--image-size", type=int, help="px, a multiple of 32 (default: the model's own)"
    )
    parser.add_argument(
        "--resize",
        choices=("crop", "letterbox", "stretch", "shorter-side"),
        help="crop the centre, as in validation; the whole image on grey; the whole image with a "
        "changed aspect ratio; the whole image in a larger network input (default: crop; for a "
        "detector as in its training)",
    )
    parser.add_argument(
        "--interpolation",
        choices=("area", "darknet"),
        help="of resized images: averaging, or as the original program (default: the model's own)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 … (default: cpu)")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of tables")
    return parser


def main(argv: Sequence[str]) -> None:
    """Run `classify`; unreadable images raise `InputError` after all others are classified."""
    options = _parser().parse_args(list(argv))
    if options.top is not None and options.top < 1:
        raise InputError(f"--top is {options.top}; allowed: 1 or more")
    if options.image_size is not None and (options.image_size < 32 or options.image_size % 32):
        raise InputError(f"--image-size is {options.image_size}; allowed: multiples of 32")

    from yolo_lightning.detector import DetectorModule
    from yolo_lightning.images import UnreadableSample
    from yolo_lightning.inference.classification import classify, find_images, prepare
    from yolo_lightning.inference.loading import load

    paths = list(find_images(options.images))
    module = load(options.checkpoint, options.device)
    if options.interpolation is not None:
        module.hparams["interpolation"] = options.interpolation
    if options.resize == "shorter-side" and isinstance(module, DetectorModule):
        raise InputError("--resize shorter-side; allowed for a detector: letterbox, stretch, crop")
    resize = options.resize or module.hparams.get("resize", "crop")  # classifiers have none
    size = options.image_size or module.hparams["image_size"]
    size_hw = (size, size) if isinstance(size, int) else (size[0], size[1])
    results, errors = [], []
    for path in paths:
        try:
            network_input = prepare(path, module, size_hw, resize)
        except UnreadableSample as error:
            errors.append(str(error))
            continue
        result = classify(module, network_input, options.top or 5)
        if options.json:
            results.append({"image": str(path), **result})
        else:
            table = _format_table(path, result, "path" in result and options.top is None)
            print(printable(table))
    if options.json:
        json.dump(results, sys.stdout, indent=2)
        print()
    if errors:
        raise InputError("\n  ".join(errors))
