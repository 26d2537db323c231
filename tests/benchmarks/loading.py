"""Reading photographs as training does, against decoding them alone."""

import itertools
import tempfile
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import torch

from tests.benchmarks.rehearsal_data import photograph
from tests.benchmarks.rows import Row, in_turn, spread, wall
from yolo_lightning.datamodules import DetectionAugmentation, YOLOText
from yolo_lightning.datamodules.batching import JointDataset
from yolo_lightning.datamodules.sampler import JointOrder
from yolo_lightning.tree.wordtree import WordTree

SIZE, BATCH_SIZE = 416, 16
_BOXES = "0 0.4 0.5 0.3 0.4\n0 0.7 0.3 0.2 0.2\n"


def write_photographs(folder: Path, count: int) -> list[Path]:
    """Write photographs with two boxes each, in YOLO's layout."""
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for k in range(count):
        (folder / f"labels/{k:04}.txt").write_text(_BOXES, encoding="utf-8")
    return [photograph(folder / f"images/{k:04}.jpg", rng) for k in range(count)]


def measure(tiny: bool = False) -> list[Row]:
    """Return the row: batches with crops and colours as in the recipes, on one core."""
    count, rounds = (2, 1) if tiny else (48, 9)
    batch_size = min(count, BATCH_SIZE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            files = write_photographs(Path(folder), count)
            source = YOLOText(folder, names=["object"])
            source.bind(WordTree.from_names(["object"]))
            order = JointOrder(count, 0, batch_size, 1, Fraction(0), 0, lambda step: SIZE)
            dataset = JointDataset(source, None, (DetectionAugmentation(), None), 0)
            steps = itertools.count()

            def read() -> None:
                for _ in range(count // batch_size):
                    dataset[order.plan(next(steps))]

            def decode() -> None:
                for file in files:
                    cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_COLOR)

            ours, alone = in_turn(rounds, read, decode)
    finally:
        torch.set_num_threads(threads)
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
