"""`yolo-lightning benchmark`: how fast data is read, beside the bare loop that it cannot beat."""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import torch

from yolo_lightning.datamodules.annotated import AnnotatedImages
from yolo_lightning.datamodules.autodetect import detection_source
from yolo_lightning.datamodules.batching import JointDataset
from yolo_lightning.datamodules.sampler import JointOrder
from yolo_lightning.datamodules.source import DetectionSample
from yolo_lightning.datamodules.transforms import DetectionAugmentation
from yolo_lightning.datamodules.yolo_txt import YOLOText
from yolo_lightning.errors import InputError
from yolo_lightning.images import read_image
from yolo_lightning.tree.wordtree import WordTree

_BATCH, _ROUNDS = 16, 7


def resized_copy(source: AnnotatedImages, folder: Path, width: int, height: int) -> YOLOText:
    """Write a source's images at one size, with their boxes, as YOLO text.

    Args:
        source: bound.
        folder: that they go to.
        width: of every image, px.
        height: of every image, px.
    """
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    for index in range(len(source)):
        sample = source.read(index)
        image = cv2.resize(sample.image, (width, height), interpolation=cv2.INTER_AREA)
        bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        cv2.imwrite(str(folder / f"images/{index:06}.jpg"), bgr)
        size = np.array([sample.image.shape[1], sample.image.shape[0]] * 2)
        x1, y1, x2, y2 = (sample.boxes_xyxy_px / size).T
        rows = np.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], axis=1)
        lines = [f"0 {' '.join(f'{v:.6f}' for v in row)}" for row in rows]
        (folder / f"labels/{index:06}.txt").write_text("\n".join(lines), encoding="utf-8")
    return YOLOText(str(folder), names=["object"])


def rates(source: AnnotatedImages, image_size: int) -> dict[str, float]:
    """Return images a second of one core: decoded, by a bare loop, and as training reads them.

    The bare loop decodes with OpenCV and augments, and knows its files and boxes already. The three
    take turns, and the median round counts.

    Args:
        source: bound.
        image_size: side of the network input, px.
    """
    torch.set_num_threads(1)
    augment = DetectionAugmentation()
    order = JointOrder(len(source), 0, _BATCH, _BATCH, Fraction(0), 0)
    dataset = JointDataset(source, None, (augment, None), image_size, 0)
    samples = [source.read(k) for k in range(len(source))]
    paths = [source.image_path(k) for k in range(len(source))]
    batches = max(1, len(source) // _BATCH)

    def decode(step: int) -> None:
        for index in order.plan(step).indices:
            read_image(paths[index])

    def bare(step: int) -> None:
        for index in order.plan(step).indices:
            image = cv2.imdecode(np.fromfile(paths[index], np.uint8), cv2.IMREAD_COLOR_RGB)
            known = samples[index]
            sample = DetectionSample(
                np.asarray(image, np.uint8), known.boxes_xyxy_px, known.labels, known.difficult
            )
            augment(sample, image_size, step)

    def ours(step: int) -> None:
        _ = dataset[order.plan(step)]

    ways: dict[str, Callable[[int], None]] = {"decode": decode, "bare loop": bare, "ours": ours}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(_ROUNDS):
        for name, way in ways.items():
            started = time.perf_counter()
            for step in range(turn * batches, (turn + 1) * batches):
                way(step)
            seconds[name].append(time.perf_counter() - started)
    return {name: batches * _BATCH / statistics.median(found) for name, found in seconds.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="yolo-lightning benchmark",
        description="Measure how fast one core decodes and augments a dataset with boxes.",
    )
    parser.add_argument("dataset", help="images with boxes, in a usual layout")
    parser.add_argument("--image-size", type=int, default=416, help="px, a multiple of 32 (416)")
    parser.add_argument("--resized", metavar="WxH", help="first bring all images to this size, px")
    return parser


def main(argv: Sequence[str]) -> None:
    """Print images a second.

    Raises:
        InputError: no dataset, or sizes that cannot be.
    """
    options = _parser().parse_args(list(argv))
    if options.image_size < 32 or options.image_size % 32:
        raise InputError(f"--image-size is {options.image_size}; allowed: multiples of 32")
    source = detection_source(options.dataset)
    source.bind(WordTree.flat(sorted(source.name_counts()) or ["nothing"]))
    with tempfile.TemporaryDirectory() as scratch:
        if options.resized:
            width, _, height = options.resized.partition("x")
            if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
                raise InputError(f"--resized {options.resized!r}; expected such as 640x480")
            source = resized_copy(source, Path(scratch), int(width), int(height))
            source.bind(WordTree.flat(["object"]))
        found = rates(source, options.image_size)
    print(f"{len(source)} images to {options.image_size} px, images a second of one core")
    for name, rate in found.items():
        print(f"  {name:<12}{rate:>8.0f}")
    print(f"  ours takes {found['bare loop'] / found['ours']:.2f} times as long as the bare loop")
