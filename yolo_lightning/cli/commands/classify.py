"""`yolo-lightning classify`: name what images show."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yolo_lightning.classifier import ClassifierModule
from yolo_lightning.errors import InputError
from yolo_lightning.images import UnreadableSample
from yolo_lightning.inference.classification import classify, images_in, read_image
from yolo_lightning.inference.loading import load


def _table(path: Path, found: dict[str, Any], as_path: bool) -> str:
    """Return an image's classes, or its path down the tree, as text."""
    lines = [str(path)]
    for depth, row in enumerate(found["path"] if as_path else found["classes"]):
        indent = "  " * depth if as_path else ""
        lines.append(f"  {100 * row['probability']:6.2f} %  {indent}{row['name']}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="yolo-lightning classify", description="Name what images show."
    )
    parser.add_argument("checkpoint", help="a classifier, trained or imported")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="images and folders of images")
    parser.add_argument(
        "--top", type=int, metavar="K", help="the K most probable classes (5); of a tree: leaves"
    )
    parser.add_argument("--image-size", type=int, help="px, a multiple of 32; the model's own")
    parser.add_argument(
        "--resize",
        choices=("letterbox", "shorter-side", "crop"),
        default="letterbox",
        help="the whole image in a grey frame, or its shorter side to the network's, all or middle",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 …")
    parser.add_argument("--json", action="store_true", help="a JSON list instead of tables")
    return parser


def main(argv: Sequence[str]) -> None:
    """Classify images.

    Raises:
        InputError: a bad option, no classifier, or images that cannot be read; those that can be
            are classified first.
    """
    options = _parser().parse_args(list(argv))
    if options.top is not None and options.top < 1:
        raise InputError(f"--top is {options.top}; allowed: 1 or more")
    if options.image_size is not None and (options.image_size < 32 or options.image_size % 32):
        raise InputError(f"--image-size is {options.image_size}; allowed: multiples of 32")
    paths = list(images_in(options.images))
    module = load(options.checkpoint, options.device)
    if not isinstance(module, ClassifierModule):
        raise InputError(f"{options.checkpoint}: holds a detector; classify takes a classifier")
    size = options.image_size or module.hparams["image_size"]
    size_hw = (size, size) if isinstance(size, int) else (size[0], size[1])
    results, unreadable = [], []
    for path in paths:
        try:
            image = read_image(path)
            found = classify(module, image, size_hw, options.resize, options.top or 5)
        except UnreadableSample as error:
            text = str(error)
            unreadable.append(text if str(path) in text else f"{path}: {text}")
            continue
        if options.json:
            results.append({"image": str(path), **found})
        else:
            print(_table(path, found, "path" in found and options.top is None))
    if options.json:
        json.dump(results, sys.stdout, indent=2)
        print()
    if unreadable:
        raise InputError("\n  ".join(unreadable))
