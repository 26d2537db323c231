"""Average precision as Pascal VOC defines it."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from yolo_lightning.evaluation.matching import FLAG, LABEL, SCORE, Table, best_overlaps

VOC_METRICS = ("VOC07_AP50", "VOC_AP50")
"""At an IoU of 0.5: from 11 points, as until 2009, and from every point, as since 2010."""

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Recall and precision, 0…1, after each detection by descending score."""


def voc_average_precision(
    targets: Table,
    detections: Table,
    iou_threshold: float = 0.5,
    points: Literal[11] | None = None,
) -> dict[int, float]:
    """Return average precision of every class that has a target.

    A detection is matched to the target that it overlaps most, even if that is already matched.
    Difficult targets and crowds are ignored, and so are the detections matched to them.
    """
    curves = voc_precision_recall(targets, detections, iou_threshold)
    return {label: area_under_curve(curve, points) for label, curve in curves.items()}


def voc_metrics(targets: Table, detections: Table) -> dict[int, dict[str, float]]:
    """Return `VOC_METRICS` by class."""
    return {
        label: dict(
            zip(VOC_METRICS, (area_under_curve(curve, 11), area_under_curve(curve)), strict=True)
        )
        for label, curve in voc_precision_recall(targets, detections).items()
    }


def voc_precision_recall(
    targets: Table, detections: Table, iou_threshold: float = 0.5
) -> dict[int, Curve]:
    """Return recall and precision by class; see `voc_average_precision`."""
    hits = _hits(targets, detections, iou_threshold)
    order = np.lexsort((-detections[:, SCORE], detections[:, LABEL]))
    hits, labels = hits[order], detections[order, LABEL]
    classes, counts = np.unique(targets[targets[:, FLAG] == 0, LABEL], return_counts=True)
    curves: dict[int, Curve] = {}
    for label, first, last, count in zip(
        classes.tolist(),
        np.searchsorted(labels, classes).tolist(),
        np.searchsorted(labels, classes, "right").tolist(),
        counts.tolist(),
        strict=True,
    ):
        class_hits = hits[first:last]
        true_positives = np.cumsum(class_hits[class_hits >= 0])
        precision = true_positives / np.arange(1, len(true_positives) + 1)
        curves[int(label)] = true_positives / count, precision
    return curves


def _hits(targets: Table, detections: Table, iou_threshold: float) -> NDArray[np.int64]:
    """Return 1 for true positives, 0 for false positives, -1 for ignored detections."""
    hits = np.zeros(len(detections), dtype=np.int64)
    best, ious = best_overlaps(targets, detections)
    rows = np.flatnonzero((best >= 0) & (ious >= iou_threshold))
    rows = rows[np.argsort(-detections[rows, SCORE], kind="stable")]
    _, highest_scoring = np.unique(best[rows], return_index=True)
    hits[rows[highest_scoring]] = 1
    hits[rows[targets[best[rows], FLAG] != 0]] = -1
    return hits


def area_under_curve(curve: Curve, points: Literal[11] | None = None) -> float:
    """Return the area under the maximum precision at each recall and above.

    With 11 points, as until 2009, the mean at recalls of 0, 0.1 … 1.
    """
    recall, precision = curve
    interpolated = np.maximum.accumulate(precision[::-1])[::-1]
    if points is not None:
        index = np.searchsorted(recall, np.linspace(0, 1, points))
        return float(np.append(interpolated, 0.0)[index].mean())
    return float((np.diff(recall, prepend=0.0) * interpolated).sum())
