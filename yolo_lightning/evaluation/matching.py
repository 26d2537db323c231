"""Tables of boxes that evaluation is made from, and which truth each detection overlaps most.

A table is float64 (N, 8), a box a row: image, class, the truth's area in square px (0 for the box's
own) or the detection's score, flag, x1, y1, x2, y2. Flags of truths are `DIFFICULT` and `CROWD`; of
detections the column is 0.
"""

import numpy as np
from numpy.typing import NDArray

IMAGE, LABEL, SCORE, AREA, FLAG, BOX = 0, 1, 2, 2, 3, slice(4, 8)
COLUMNS = 8
DIFFICULT, CROWD = 1, 2

Table = NDArray[np.float64]

_MAX_PAIRS = 500_000
"""Pairs of boxes that are compared at once: bounds the memory that this takes."""


def no_boxes() -> Table:
    """Return a table without rows."""
    return np.zeros((0, COLUMNS))


def best_overlaps(
    truths: Table, detections: Table
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return which truth of its own image and class each detection overlaps most, and by how much.

    Args:
        truths: (N, 8).
        detections: (M, 8).

    Returns:
        int64 (M,), rows of `truths`, of equals the first; -1 where the image has none of the class.
        float64 (M,), IoU, 0…1.
    """
    best = np.full(len(detections), -1, dtype=np.int64)
    overlaps = np.zeros(len(detections))
    classes = 1 + int(max(truths[:, LABEL].max(initial=0), detections[:, LABEL].max(initial=0)))
    group, wanted = (
        rows[:, IMAGE].astype(np.int64) * classes + rows[:, LABEL].astype(np.int64)
        for rows in (truths, detections)
    )
    order = np.argsort(group, kind="stable")
    first, last = (np.searchsorted(group[order], wanted, side) for side in ("left", "right"))
    counts = last - first
    some = np.flatnonzero(counts)
    ends = np.cumsum(counts[some])
    full = np.arange(_MAX_PAIRS, ends.max(initial=0), _MAX_PAIRS)
    for rows in np.split(some, np.searchsorted(ends, full)):
        if not len(rows):
            continue
        size = counts[rows]
        start = np.cumsum(size) - size
        pairs = order[np.repeat(first[rows] - start, size) + np.arange(size.sum())]
        over = _iou(truths[pairs, BOX], np.repeat(detections[rows, BOX], size, axis=0))
        overlaps[rows] = np.maximum.reduceat(over, start)
        highest = np.flatnonzero(over == np.repeat(overlaps[rows], size))
        best[rows] = pairs[highest[np.searchsorted(highest, start)]]
    return best, overlaps


def _iou(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return IoU (N,) of boxes (N, 4) pair by pair; empty boxes give 0."""
    low, high = np.maximum(first[:, :2], second[:, :2]), np.minimum(first[:, 2:], second[:, 2:])
    overlap = (high - low).clip(0).prod(axis=1)
    areas = [(box[:, 2:] - box[:, :2]).clip(0).prod(axis=1) for box in (first, second)]
    union = areas[0] + areas[1] - overlap
    iou: NDArray[np.float64] = overlap / np.where(union > 0, union, 1)
    return iou
