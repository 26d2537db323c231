"""Tables and tensors of targets and detections."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from yolo_lightning.evaluation.average_precision import BoxAveragePrecision
from yolo_lightning.tree.wordtree import WordTree

Image = tuple[dict[str, Tensor], dict[str, Any]]
"""Detections and targets of an image, as torchmetrics takes them."""

FLAT = WordTree.from_names(["cat", "dog", "pig"])
CAT, DOG, PIG = range(3)
BOX = (10.0, 10.0, 30.0, 30.0)
HALF = (10.0, 10.0, 20.0, 30.0)  # IoU with BOX: exactly 0.5
THIRD = (20.0, 10.0, 40.0, 30.0)  # IoU with BOX: 200 of 600 square px
FAR = (100.0, 100.0, 120.0, 120.0)


def random_image(seed: int, classes: int = 5) -> Image:
    """Return detections and targets of an image, with crowds, areas, and equal scores."""
    rng = np.random.default_rng(seed)
    num_targets, num_detections = int(rng.integers(0, 9)), int(rng.integers(0, 60))
    low, sizes = rng.uniform(0, 300, (num_targets, 2)), 4 + 250 * rng.random((num_targets, 2)) ** 2
    boxes, labels = np.concatenate([low, low + sizes], 1), rng.integers(0, classes, num_targets)
    pick = rng.integers(0, max(num_targets, 1), num_detections if num_targets else 0)
    near = boxes[pick] + rng.normal(0, 6, (len(pick), 4))
    near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
    is_wrong = rng.random(len(pick)) < 0.2
    predicted = np.where(is_wrong, rng.integers(0, classes + 1, len(pick)), labels[pick])
    targets = {
        "boxes": torch.from_numpy(boxes).float(),
        "labels": torch.from_numpy(labels),
        "iscrowd": torch.from_numpy((rng.random(num_targets) < 0.1).astype(np.int64)),
        "area": torch.from_numpy(sizes.prod(1) * rng.choice([0, 0.3, 0.9], num_targets)),
    }
    detections = {
        "scores": torch.from_numpy(rng.integers(1, 20, len(pick)) / 20),
        "boxes": torch.from_numpy(near).float(),
        "labels": torch.from_numpy(predicted),
    }
    return detections, targets


def add(metric: Any, *images: Image) -> None:
    metric.update([detections for detections, _ in images], [targets for _, targets in images])


def with_image_id(image_id: int | None, image: Image) -> Image:
    return image[0], {**image[1], "image_id": image_id}


def metrics_of(*images: Image) -> dict[str, float]:
    metric = BoxAveragePrecision()
    add(metric, *images)
    metric.compute()
    return metric.results


def target(label, box=BOX, image=0, flag=0):
    return [image, label, 0.0, flag, *box]


def detection(label, score, box=BOX, image=0):
    return [image, label, score, 0.0, *box]


def table(*rows):
    return np.array(rows, dtype=np.float64).reshape(-1, 8)
