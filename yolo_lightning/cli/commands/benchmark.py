"""`yolo-lightning benchmark`: measure data loading against a plain loop as the upper bound."""

import argparse
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from yolo_lightning.errors import InputError

if TYPE_CHECKING:
    from yolo_lightning.datamodules.files import AnnotatedImages
    from yolo_lightning.datamodules.yolo_txt import YOLOText

_BATCH, _ROUNDS = 16, 7


def resized_copy(source: "AnnotatedImages", folder: Path, width: int, height: int) -> "YOLOText":
    """Save a bound source as a YOLO text dataset with all images at one size, px."""
    import cv2
    import numpy as np

    from yolo_lightning.datamodules.yolo_txt import YOLOText

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


def images_per_second(source: "AnnotatedImages", image_size: int) -> dict[str, float]:
    """Measure decoding alone, a plain loop, and the dataset of training, on one core.

    The plain loop decodes with OpenCV and augments; its files and boxes are already in memory. The
    three alternate, and the median round is returned. The source must be bound to a tree.
    """
    import cv2
    import numpy as np
    import torch

    from yolo_lightning.batches import DetectionSample
    from yolo_lightning.datamodules.batching import JointDataset
    from yolo_lightning.datamodules.sampler import JointOrder
    from yolo_lightning.datamodules.transforms import DetectionAugmentation
    from yolo_lightning.images import read_image

    torch.set_num_threads(1)
    augment = DetectionAugmentation()
    order = JointOrder(len(source), 0, _BATCH, _BATCH, Fraction(0), 0, lambda step: image_size)
    dataset = JointDataset(source, None, (augment, None), 0)
    paths, annotations = [], []
    for k in range(len(source)):
        sample = source.read(k)
        paths.append(source.image_path(k))
        annotations.append((sample.boxes_xyxy_px, sample.labels, sample.difficult))
    batches = max(1, len(source) // _BATCH)

    def decode(step: int) -> None:
        for index in order.plan(step).indices:
            read_image(paths[index])

    def plain_loop(step: int) -> None:
        for index in order.plan(step).indices:
            image = cv2.imdecode(np.fromfile(paths[index], np.uint8), cv2.IMREAD_COLOR_RGB)
            sample = DetectionSample(np.asarray(image, np.uint8), *annotations[index])
            augment(sample, image_size, step)

    def dataset_read(step: int) -> None:
        _ = dataset[order.plan(step)]

    readers = {"decode": decode, "plain loop": plain_loop, "dataset": dataset_read}
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for k in range(_ROUNDS):
        for name, read in readers.items():
            started = time.perf_counter()
            for step in range(k * batches, (k + 1) * batches):
                read(step)
            seconds[name].append(time.perf_counter() - started)
    return {name: batches * _BATCH / statistics.median(times) for name, times in seconds.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="yolo-lightning benchmark",
        description="Measure how fast one core decodes and augments a dataset with boxes.",
    )
    parser.add_argument("dataset", help="images with boxes, in a supported layout")
    parser.add_argument(
        "--image-size", type=int, default=416, help="px, a multiple of 32 (default: 416)"
    )
    parser.add_argument("--resized", metavar="WxH", help="resize all images first, px")
    parser.add_argument(
        "--allow-outside", action="store_true", help="let the dataset name files outside its folder"
    )
    return parser


def main(argv: Sequence[str]) -> None:
    """Print images per second.

    Raises:
        InputError: no dataset was recognized, an image cannot be read, or an invalid size.
    """
    options = _parser().parse_args(list(argv))
    if options.image_size < 32 or options.image_size % 32:
        raise InputError(f"--image-size is {options.image_size}; allowed: multiples of 32")
    size = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", options.resized or "1x1")
    if size is None:
        raise InputError(f"--resized {options.resized!r}; expected a size such as 640x480")
    from yolo_lightning.datamodules.autodetect import detection_source
    from yolo_lightning.images import UnreadableSample
    from yolo_lightning.tree.wordtree import WordTree

    source = detection_source(options.dataset, allow_outside=options.allow_outside)
    source.bind(WordTree.from_names(sorted(source.name_counts()) or ["nothing"]))
    with tempfile.TemporaryDirectory() as scratch:
        try:
            if options.resized:
                source = resized_copy(source, Path(scratch), int(size[1]), int(size[2]))
                source.bind(WordTree.from_names(["object"]))
            rates = images_per_second(source, options.image_size)
        except UnreadableSample as error:
            raise InputError(f"{error}; list all such images with check-data") from None
    print(f"{len(source)} images to {options.image_size} px, images per second on one core")
    for name, rate in rates.items():
        print(f"  {name:<12}{rate:>8.0f}")
    ratio = rates["plain loop"] / rates["dataset"]
    print(f"  the dataset takes {ratio:.2f} times as long as the plain loop")
