"""COCO's twelve metrics, matched by faster-coco-eval."""

import gc
from collections.abc import Iterator
from typing import Any, NamedTuple

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
    overlaps_difficult,
)

_MAX_AREA = 1e10
_MAX_DETECTIONS = (1, 10, 100)
# what is evaluated at once, which bounds the memory: boxes, and pairs of a class and an image, at
# most classes x boxes; the curves of a class take as much as 1,000 pairs
_MAX_ROWS, _MAX_PAIRS, _PAIRS_PER_CLASS = 50_000, 400_000, 1_000
_AREAS = {
    "all": (0, _MAX_AREA),
    "small": (0, 32**2),
    "medium": (32**2, 96**2),
    "large": (96**2, _MAX_AREA),
}

COCO_METRICS = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip
"""Average precision over IoU 0.50…0.95, at 0.50 and at 0.75, and by size; average recall with 1, 10
and 100 detections per image, and by size."""


class Scores(NamedTuple):
    """Metrics over all classes, -1 if undefined, and the metrics of every class with a target."""

    metrics: dict[str, float]
    per_class: dict[int, dict[str, float]]


def evaluate_coco(targets: Table, detections: Table) -> Scores:
    """Return `COCO_METRICS` over the classes that have a target, and AP, AP50, AP75 of each.

    Difficult targets are ignored as in Pascal VOC at an IoU of 0.5: they are no misses, and
    detections that overlap one of them most are no false positives.
    """
    classes = sorted({int(label) for label in targets[targets[:, FLAG] == 0, LABEL]})
    if not classes:
        return Scores(dict.fromkeys(COCO_METRICS, -1.0), {})
    detections = detections[~overlaps_difficult(targets, detections)]
    targets = targets[targets[:, FLAG] != DIFFICULT]
    gc_enabled = gc.isenabled()
    gc.disable()  # hundreds of thousands of annotations without reference cycles
    try:
        parts = [
            _evaluate_classes(targets, detections, part)
            for part in _class_parts(classes, targets, detections)
        ]
    finally:
        if gc_enabled:
            gc.enable()
    precision, recall = (np.concatenate(values, axis=1) for values in zip(*parts, strict=True))
    values = [
        *(_mean(precision[ious, :, 0]) for ious in (slice(None), slice(1), slice(5, 6))),
        *(_mean(precision[:, :, area]) for area in (1, 2, 3)),
        *(_mean(recall[:, :, 0, limit]) for limit in range(len(_MAX_DETECTIONS))),
        *(_mean(recall[:, :, area, -1]) for area in (1, 2, 3)),
    ]
    per_class = {
        label: {"AP": float(by_iou.mean()), "AP50": float(by_iou[0]), "AP75": float(by_iou[5])}
        for label, by_iou in zip(classes, precision[:, :, 0].T, strict=True)
    }
    return Scores(dict(zip(COCO_METRICS, values, strict=True)), per_class)


def _class_parts(classes: list[int], targets: Table, detections: Table) -> Iterator[list[int]]:
    """Yield groups of classes whose boxes fit into memory; classes are evaluated independently."""
    labels = np.concatenate([targets[:, LABEL], detections[:, LABEL]]).astype(np.int64)
    counts = np.bincount(labels, minlength=classes[-1] + 1)
    part: list[int] = []
    rows = 0
    for label in classes:
        pairs = (len(part) + 1) * (rows + counts[label] + _PAIRS_PER_CLASS)
        if part and (rows + counts[label] > _MAX_ROWS or pairs > _MAX_PAIRS):
            yield part
            part, rows = [], 0
        part.append(label)
        rows += counts[label]
    yield part


def _evaluate_classes(
    targets: Table, detections: Table, classes: list[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return average precision (IoU, class, area) and recall (IoU, class, area, limit).

    Both are -1 for a class without a target of a size.
    """
    # imported here: the import takes a second that training does not need
    from faster_coco_eval import COCO, COCOeval_faster

    targets, detections = (rows[np.isin(rows[:, LABEL], classes)] for rows in (targets, detections))
    images = np.unique(np.concatenate([targets[:, IMAGE], detections[:, IMAGE]])).astype(int)
    header = {
        "info": {},
        "images": [{"id": image + 1} for image in images.tolist()],
        "categories": [{"id": label, "name": str(label)} for label in classes],
    }
    areas = targets[:, AREA]  # COCO uses the areas of the outlines
    ground_truth = COCO({**header, "annotations": _annotations(targets, areas)})
    results = COCO({**header, "annotations": _annotations(detections, np.zeros(len(detections)))})
    evaluation = COCOeval_faster(
        ground_truth, results, iouType="bbox", print_function=lambda *_: None
    )
    evaluation.params.catIds = classes
    evaluation.params.areaRng = [list(bounds) for bounds in _AREAS.values()]
    evaluation.params.areaRngLbl = list(_AREAS)
    evaluation.params.maxDets = list(_MAX_DETECTIONS)
    evaluation.evaluate()
    evaluation.accumulate()
    precision = np.asarray(evaluation.eval["precision"])[..., -1].mean(axis=1)
    return precision, np.asarray(evaluation.eval["recall"])


def _mean(values: NDArray[np.float64]) -> float:
    """Return the mean without COCO's -1 of classes that have no target of a size."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else -1.0


def _annotations(rows: Table, areas: NDArray[np.float64]) -> list[dict[str, Any]]:
    """Return COCO annotations; ids and images start at 1, since 0 means unmatched in COCO."""
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
    # literal dictionaries for speed: half a million take half of the evaluation's time
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
