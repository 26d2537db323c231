"""COCO's twelve numbers, matching by faster-coco-eval."""

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yolo_lightning.evaluation.matching import (
    AREA,
    CROWD,
    DIFFICULT,
    FLAG,
    IMAGE,
    LABEL,
    SCORE,
    Table,
    best_overlaps,
)

_MAX_AREA = 1e10
_MAX_DETECTIONS = (1, 10, 100)
_MAX_ROWS, _EXCUSED = 50_000, 0.5
_AREAS = {
    "all": (0, _MAX_AREA),
    "small": (0, 32**2),
    "medium": (32**2, 96**2),
    "large": (96**2, _MAX_AREA),
}

COCO_FIGURES = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip
"""COCO's twelve: average precision over IoU 0.50…0.95, at 0.50 and 0.75, by size; average recall
with 1, 10 and 100 detections an image, and by size."""


@dataclass
class CocoEvaluation:
    """What COCO's evaluation says; -1 where it has nothing to say.

    Attributes:
        figures: the twelve numbers, by the names in `COCO_FIGURES`.
        per_class: AP, AP50 and AP75 of every class with at least one truth, by class.
    """

    figures: dict[str, float]
    per_class: dict[int, dict[str, float]]


def coco_evaluation(truths: Table, detections: Table) -> CocoEvaluation:
    """Evaluate boxes as COCO does, over the classes that have a truth.

    Difficult truths are neither asked for nor punished, as in Pascal VOC's evaluation at an IoU of
    a half: however many detections overlap one of them most, none counts.

    Args:
        truths: (N, 8) rows of image, class, area in square px (0 for the box's own), flag
            (1 difficult, 2 crowd), x1, y1, x2, y2; see `boxtables`.
        detections: (M, 8) rows of image, class, score, 0, x1, y1, x2, y2.
    """
    classes = sorted({int(label) for label in truths[truths[:, FLAG] == 0, LABEL]})
    if not classes:
        return CocoEvaluation(dict.fromkeys(COCO_FIGURES, -1.0), {})
    truths, detections = _without_difficult(truths, detections)
    collecting = gc.isenabled()
    gc.disable()  # hundreds of thousands of annotations, none of them in a ring
    try:
        parts = [
            _evaluated(truths, detections, chosen)
            for chosen in _class_parts(classes, truths, detections)
        ]
    finally:
        if collecting:
            gc.enable()
    precision = np.concatenate([part[0] for part in parts], axis=2)
    recall = np.concatenate([part[1] for part in parts], axis=1)
    figures = [
        *(_mean(precision[rows, :, :, 0, -1]) for rows in (slice(None), slice(1), slice(5, 6))),
        *(_mean(precision[:, :, :, area, -1]) for area in (1, 2, 3)),
        *(_mean(recall[:, :, 0, most]) for most in range(len(_MAX_DETECTIONS))),
        *(_mean(recall[:, :, area, -1]) for area in (1, 2, 3)),
    ]
    each = precision[:, :, :, 0, -1]
    per_class = {
        label: {
            "AP": float(each[:, :, k].mean()),
            "AP50": float(each[0, :, k].mean()),
            "AP75": float(each[5, :, k].mean()),
        }
        for k, label in enumerate(classes)
    }
    return CocoEvaluation(dict(zip(COCO_FIGURES, figures, strict=True)), per_class)


def _without_difficult(truths: Table, detections: Table) -> tuple[Table, Table]:
    """Leave out difficult truths, and the detections that overlap one of them most, by a half."""
    hard = truths[:, FLAG] == DIFFICULT
    if not hard.any():
        return truths, detections
    best, overlaps = best_overlaps(truths, detections)
    return truths[~hard], detections[~(hard[best] & (overlaps >= _EXCUSED))]


def _class_parts(classes: list[int], truths: Table, detections: Table) -> Iterator[list[int]]:
    """Yield classes in parts whose boxes fit the memory; classes never meet in the evaluation."""
    labels = np.concatenate([truths[:, LABEL], detections[:, LABEL]]).astype(np.int64)
    counts = np.bincount(labels, minlength=classes[-1] + 1)
    part: list[int] = []
    for label in classes:
        if part and counts[[*part, label]].sum() > _MAX_ROWS:
            yield part
            part = []
        part.append(label)
    yield part


def _evaluated(
    truths: Table, detections: Table, classes: list[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return precision (IoU, recall, class, area, detections) and recall (without that)."""
    # imported here: it takes a second, and training starts without it
    from faster_coco_eval import COCO, COCOeval_faster

    truths, detections = (rows[np.isin(rows[:, LABEL], classes)] for rows in (truths, detections))
    images = np.unique(np.concatenate([truths[:, IMAGE], detections[:, IMAGE]])).astype(int)
    head = {
        "info": {},
        "images": [{"id": image + 1} for image in images.tolist()],
        "categories": [{"id": label, "name": str(label)} for label in classes],
    }
    sizes = truths[:, AREA]  # COCO's own evaluation takes those of the outlines
    ground_truth = COCO({**head, "annotations": _annotations(truths, sizes)})
    found = COCO({**head, "annotations": _annotations(detections, np.zeros(len(detections)))})
    evaluation = COCOeval_faster(ground_truth, found, iouType="bbox", print_function=_silent)
    evaluation.params.catIds = classes
    evaluation.params.areaRng = [list(bounds) for bounds in _AREAS.values()]
    evaluation.params.areaRngLbl = list(_AREAS)
    evaluation.params.maxDets = list(_MAX_DETECTIONS)
    evaluation.evaluate()
    evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"]), np.asarray(evaluation.eval["recall"])


def _mean(values: NDArray[np.float64]) -> float:
    """Return the mean of what there is; COCO writes -1 where a class has no truth of a size."""
    there = values[values > -1]
    return float(there.mean()) if there.size else -1.0


def _silent(*_: object) -> None:
    """Print nothing."""


def _annotations(rows: Table, areas: NDArray[np.float64]) -> list[dict[str, Any]]:
    """Return COCO annotations; ids and images count from 1, since 0 means none to the matcher."""
    sizes = rows[:, 6:8] - rows[:, 4:6]
    columns = zip(
        (rows[:, IMAGE].astype(np.int64) + 1).tolist(),
        rows[:, LABEL].astype(np.int64).tolist(),
        np.concatenate([rows[:, 4:6], sizes], axis=1).tolist(),
        np.where(areas > 0, areas, sizes.prod(axis=1)).tolist(),
        rows[:, SCORE].tolist(),
        (rows[:, FLAG] == CROWD).astype(np.int64).tolist(),
        strict=True,
    )
    # spelt out: half a million of them are half the time of everything here
    return [
        {
            "id": number,
            "image_id": image,
            "category_id": label,
            "bbox": box,
            "area": area,
            "score": score,
            "iscrowd": crowd,
        }
        for number, (image, label, box, area, score, crowd) in enumerate(columns, start=1)
    ]
