"""Tables of true and detected boxes."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from yolo_lightning.evaluation.average_precision import BoxAveragePrecision
from yolo_lightning.tree.wordtree import WordTree

Image = tuple[dict[str, Tensor], dict[str, Any]]


def random_image(number: int, classes: int = 5) -> Image:
    """Return detections and truths of an image, with crowds, areas, and scores that are equal."""
    rng = np.random.default_rng(number)
    truths, found = int(rng.integers(0, 9)), int(rng.integers(0, 60))
    low, sizes = rng.uniform(0, 300, (truths, 2)), 4 + 250 * rng.random((truths, 2)) ** 2
    boxes, labels = np.concatenate([low, low + sizes], 1), rng.integers(0, classes, truths)
    pick = rng.integers(0, max(truths, 1), found if truths else 0)
    near = boxes[pick] + rng.normal(0, 6, (len(pick), 4))
    near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
    other = rng.random(len(pick)) < 0.2
    said = np.where(other, rng.integers(0, classes + 1, len(pick)), labels[pick])
    known = {
        "boxes": torch.from_numpy(boxes).float(),
        "labels": torch.from_numpy(labels),
        "iscrowd": torch.from_numpy((rng.random(truths) < 0.1).astype(np.int64)),
        "area": torch.from_numpy(sizes.prod(1) * rng.choice([0, 0.3, 0.9], truths)),
    }
    scores = torch.from_numpy(rng.integers(1, 20, len(pick)) / 20)
    return {
        "boxes": torch.from_numpy(near).float(), "labels": torch.from_numpy(said), "scores": scores,
    }, known  # fmt: skip


def add(metric: Any, *images: Image) -> None:
    metric.update([found for found, _ in images], [truth for _, truth in images])


def known_as(number: int | None, image: Image) -> Image:
    return image[0], {**image[1], "image_id": number}


def figures_of(*images: Image) -> dict[str, float]:
    metric = BoxAveragePrecision()
    add(metric, *images)
    metric.compute()
    return metric.figures


FLAT = WordTree.flat(["cat", "dog", "pig"])


CAT, DOG, PIG = range(3)


BOX = (10.0, 10.0, 30.0, 30.0)


HALF = (10.0, 10.0, 20.0, 30.0)  # IoU with BOX: exactly a half


THIRD = (20.0, 10.0, 40.0, 30.0)  # 200 of 600 square px


FAR = (100.0, 100.0, 120.0, 120.0)


def row(image, label, value, box, flag=0.0):
    return [image, label, value, flag, *box]


def truth(label, box=BOX, image=0, flag=0):
    return row(image, label, 0.0, box, flag)


def said(label, score, box=BOX, image=0):
    return row(image, label, score, box)


def table(*rows):
    return np.array(rows, dtype=np.float64).reshape(-1, 8)
