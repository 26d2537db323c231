"""Golden arrays, computed by the original program."""

import numpy as np
import torch

from tests.helpers.paths import REPO
from yolo_lightning.batches import DetectionBatch

GOLDEN = REPO / "tests/golden"


def load(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / name) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def detection_batch(
    boxes: torch.Tensor, labels: torch.Tensor, images_seen: int = 20_000
) -> DetectionBatch:
    count = len(boxes)
    return DetectionBatch(
        torch.zeros(count, 3, 1, 1),
        torch.arange(count),
        boxes,
        labels,
        torch.zeros_like(labels, dtype=torch.bool),
        torch.zeros_like(labels, dtype=torch.bool),
        torch.ones(count, 2, dtype=torch.long),
        images_seen=images_seen,
    )
