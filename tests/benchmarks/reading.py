"""How fast training batches are read, against decoding alone.

Photographs are generated, 640 x 480 px, JPEG of quality 90, and read as a detector is trained:
crops, flips and colours at 416 px, batches included.

    python -m tests.benchmarks.reading
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import torch

from yolo_lightning.datamodules import DetectionAugmentation, YOLOText
from yolo_lightning.datamodules.batching import JointDataset
from yolo_lightning.datamodules.sampler import JointOrder
from yolo_lightning.images import Image
from yolo_lightning.tree.wordtree import WordTree

WIDTH, HEIGHT, QUALITY = 640, 480, 90
BATCH = 16  # images


def photograph(seed: int) -> Image:
    """Return an image with details of all sizes, as a photograph has them; about 100 kB as JPEG."""
    rng = np.random.default_rng(seed)
    total = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    for level in range(7):
        shape = (HEIGHT >> level, WIDTH >> level, 3)
        details = rng.normal(0, 4 * 1.6**level, shape).astype(np.float32)
        total += cv2.resize(details, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    return (128 + total).clip(0, 255).astype(np.uint8)


def write_photographs(folder: Path, images: int) -> None:
    """Write photographs with two boxes each, in YOLO's layout."""
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    for k in range(images):
        options = [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
        cv2.imwrite(str(folder / f"images/{k:04}.jpg"), photograph(k), options)
        boxes = "0 0.4 0.5 0.3 0.4\n0 0.7 0.3 0.2 0.2\n"
        (folder / f"labels/{k:04}.txt").write_text(boxes, encoding="utf-8")


def measure(
    images: int = 48, size: int = 416, rounds: int = 9, jitter: float = 0.2
) -> tuple[float, float]:
    """Return images per second of one core: read as training reads, and decoded alone.

    The two alternate; the figures are medians over the rounds, of CPU time.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photographs(folder, images)
        source = YOLOText(name, names=["object"])
        source.bind(WordTree.from_names(["object"]))
        order = JointOrder(images, 0, BATCH, BATCH, Fraction(0), 0, lambda step: size)
        dataset = JointDataset(source, None, (DetectionAugmentation(jitter), None), 0)
        paths = [str(source.image_path(k)) for k in range(images)]

        def read(step: int) -> None:
            _ = dataset[order.plan(step)]

        def decode(step: int) -> None:
            for index in order.plan(step).indices:
                cv2.imdecode(np.fromfile(paths[index], np.uint8), cv2.IMREAD_COLOR)

        return _rates((read, decode), images // BATCH, rounds)


def _rates(
    readers: tuple[Callable[[int], None], ...], batches: int, rounds: int
) -> tuple[float, float]:
    seconds: list[list[float]] = [[] for _ in readers]
    for number in range(rounds):
        for reader, times in zip(readers, seconds, strict=True):
            started = time.process_time()
            for step in range(number * batches, (number + 1) * batches):
                reader(step)
            times.append(time.process_time() - started)
    ours, decoded = (batches * BATCH / statistics.median(times) for times in seconds)
    return ours, decoded


def main() -> None:
    """Print the figures."""
    ours, decoded = measure()
    print(
        f"{WIDTH} x {HEIGHT} px to 416 px: {ours:.0f} images a second of one core, decoding alone"
    )
    print(f"{decoded:.0f}; ratio {ours / decoded:.2f}")


if __name__ == "__main__":
    main()
