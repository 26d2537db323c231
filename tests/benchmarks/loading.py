"""Preparing photographs for training, against decoding them alone."""

import tempfile
from pathlib import Path

import cv2
import numpy as np

from tests.benchmarks.rehearsal_data import photograph
from tests.benchmarks.rows import Row, in_turn, spread, wall
from yolo_lightning.batches import DetectionSample
from yolo_lightning.datamodules import DetectionAugmentation
from yolo_lightning.images import read_image

SIZE = 416


def measure(tiny: bool = False) -> list[Row]:
    """Return the row: crops and colour as in the recipes, on one core."""
    count, rounds = (2, 1) if tiny else (32, 9)
    rng, augment = np.random.default_rng(0), DetectionAugmentation()
    corners = rng.random((7, 2, 2)).astype(np.float32) * (640, 480)
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1) + 1], axis=1)
    labels, difficult = np.zeros(7, np.int64), np.zeros(7, np.bool_)
    min_side = augment.required_side(SIZE)
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)
    try:
        with tempfile.TemporaryDirectory() as folder:
            files = [photograph(Path(folder) / f"{k}.jpg", rng) for k in range(count)]

            def decode() -> None:
                for file in files:
                    read_image(file, min_side)

            def prepare() -> None:
                for seed, file in enumerate(files):
                    image, size_hw = read_image(file, min_side)
                    sample = DetectionSample(image, boxes, labels, difficult, [], size_hw)
                    augment(sample, SIZE, seed)

            ours, alone = in_turn(rounds, prepare, decode)
    finally:
        cv2.setNumThreads(threads)
    pairs = list(zip(ours, alone, strict=True))
    return [
        Row(
            f"photographs of 640 x 480 px read, cropped and coloured at {SIZE} px, one core: share "
            "of the rate of decoding, more is better",
            wall(ours, ".2f", 1000 / count, " ms an image"),
            "0.5",
            f"decoding alone, {wall(alone, '.2f', 1000 / count, ' ms')}",
            spread([b.wall / a.wall for a, b in pairs]),
            spread([b.cpu / a.cpu for a, b in pairs]),
        )
    ]  # fmt: skip
