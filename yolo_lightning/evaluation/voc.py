"""Average precision as Pascal VOC's evaluation defines it."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from yolo_lightning.evaluation.matching import FLAG, LABEL, SCORE, Table, best_overlaps

VOC_FIGURES = ("VOC07_AP50", "VOC_AP50")
"""At an overlap of a half: from 11 points, as up to 2009, and from every point, from 2010 on."""

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Recall and precision, 0…1, after each detection by falling score."""


def voc_average_precision(
    truths: Table,
    detections: Table,
    iou_threshold: float = 0.5,
    points: Literal[11] | None = None,
) -> dict[int, float]:
    """Return average precision as Pascal VOC's evaluation defines it, by class with a truth.

    A detection goes to the truth that it overlaps most, taken or not; difficult truths (and crowds)
    are neither asked for nor punished.

    Args:
        truths: (N, 8), see `boxtables`.
        detections: (M, 8).
        iou_threshold: 0…1, at and above which a truth is found.
        points: 11 for the years up to 2009; None, every point, from 2010 on.
    """
    curves = voc_curves(truths, detections, iou_threshold)
    return {label: area_below(curve, points) for label, curve in curves.items()}


def voc_figures(truths: Table, detections: Table) -> dict[int, dict[str, float]]:
    """Return both of `VOC_FIGURES`, by class with a truth; see `voc_average_precision`."""
    return {
        label: dict(zip(VOC_FIGURES, (area_below(curve, 11), area_below(curve)), strict=True))
        for label, curve in voc_curves(truths, detections).items()
    }


def voc_curves(truths: Table, detections: Table, iou_threshold: float = 0.5) -> dict[int, Curve]:
    """Return recall and precision, by class with a truth; see `voc_average_precision`."""
    hits = _hits(truths, detections, iou_threshold)
    order = np.lexsort((-detections[:, SCORE], detections[:, LABEL]))
    hits, labels = hits[order], detections[order, LABEL]
    asked, counts = np.unique(truths[truths[:, FLAG] == 0, LABEL], return_counts=True)
    found: dict[int, Curve] = {}
    for label, first, last, count in zip(
        asked.tolist(),
        np.searchsorted(labels, asked).tolist(),
        np.searchsorted(labels, asked, "right").tolist(),
        counts.tolist(),
        strict=True,
    ):
        own = hits[first:last]
        true = np.cumsum(own[own >= 0])
        found[int(label)] = true / count, true / np.arange(1, len(true) + 1)
    return found


def _hits(truths: Table, detections: Table, threshold: float) -> NDArray[np.int64]:
    """Return 1 for hits, 0 for misses, -1 for what does not count."""
    hits = np.zeros(len(detections), dtype=np.int64)
    best, overlaps = best_overlaps(truths, detections)
    rows = np.flatnonzero((best >= 0) & (overlaps >= threshold))
    rows = rows[np.argsort(-detections[rows, SCORE], kind="stable")]
    _, surest = np.unique(best[rows], return_index=True)
    hits[rows[surest]] = 1
    hits[rows[truths[best[rows], FLAG] != 0]] = -1
    return hits


def area_below(curve: Curve, points: Literal[11] | None = None) -> float:
    """Return the area below the highest precision at each recall and beyond it.

    Args:
        curve: recall, rising, and precision.
        points: 11 for the mean at recalls of 0, 0.1 … 1; None for the whole area.
    """
    recall, precision = curve
    best = np.maximum.accumulate(precision[::-1])[::-1]
    if points is not None:
        at = np.searchsorted(recall, np.linspace(0, 1, points))
        return float(np.append(best, 0.0)[at].mean())
    return float((np.diff(recall, prepend=0.0) * best).sum())
