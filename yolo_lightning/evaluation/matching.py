"""Tables of boxes, and the target that each detection overlaps most.

A table is float64 (N, 8): image, class, area of the target in square px (0 for that of the box) or
score of the detection, flag (`DIFFICULT`, `CROWD` or 0), x1, y1, x2, y2.
"""

import numpy as np
from numpy.typing import NDArray

IMAGE, LABEL, SCORE, AREA, FLAG, BOX = 0, 1, 2, 2, 3, slice(4, 8)
NUM_COLUMNS = 8
DIFFICULT, CROWD = 1, 2

Table = NDArray[np.float64]

_MAX_PAIRS = 500_000  # pairs of boxes compared at once, which bounds the memory


def empty_table() -> Table:
    """Return a table without rows."""
    return np.zeros((0, NUM_COLUMNS))


def best_overlaps(
    targets: Table, detections: Table
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the target of its image and class that each detection overlaps most, and the IoU.

    Both are (M,). Of equal targets the first one counts; -1 stands for no target.
    """
    best = np.full(len(detections), -1, dtype=np.int64)
    ious = np.zeros(len(detections))
    classes = 1 + int(max(targets[:, LABEL].max(initial=0), detections[:, LABEL].max(initial=0)))
    target_keys, detection_keys = (
        rows[:, IMAGE].astype(np.int64) * classes + rows[:, LABEL].astype(np.int64)
        for rows in (targets, detections)
    )
    order = np.argsort(target_keys, kind="stable")
    first, last = (
        np.searchsorted(target_keys[order], detection_keys, side) for side in ("left", "right")
    )
    counts = last - first
    candidates = np.flatnonzero(counts)
    ends = np.cumsum(counts[candidates])
    limits = np.arange(_MAX_PAIRS, ends.max(initial=0), _MAX_PAIRS)
    for rows in np.split(candidates, np.searchsorted(ends, limits)):
        if not len(rows):
            continue
        size = counts[rows]
        start = np.cumsum(size) - size
        pairs = order[np.repeat(first[rows] - start, size) + np.arange(size.sum())]
        iou = _paired_iou(targets[pairs, BOX], np.repeat(detections[rows, BOX], size, axis=0))
        ious[rows] = np.maximum.reduceat(iou, start)
        highest = np.flatnonzero(iou == np.repeat(ious[rows], size))
        best[rows] = pairs[highest[np.searchsorted(highest, start)]]
    return best, ious


def _paired_iou(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    low, high = np.maximum(first[:, :2], second[:, :2]), np.minimum(first[:, 2:], second[:, 2:])
    intersection = (high - low).clip(0).prod(axis=1)
    areas = [(box[:, 2:] - box[:, :2]).clip(0).prod(axis=1) for box in (first, second)]
    union = areas[0] + areas[1] - intersection
    iou: NDArray[np.float64] = intersection / np.where(union > 0, union, 1)
    return iou
