"""Which truths detections find, and precision, recall and F1 over confidence."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from yolo_lightning.evaluation.matching import (
    BOX,
    CROWD,
    DIFFICULT,
    FLAG,
    IMAGE,
    LABEL,
    SCORE,
    Table,
)

Rows = NDArray[np.int64]

FOUND_IOU = 0.5
"""IoU at and above which an object is found."""

_MAX_CLASSES = 1e7
CONFIDENCES: Table = np.arange(201) / 200
RECALLS: Table = np.linspace(0, 1, 101)


@dataclass
class Curves:
    """Precision, recall and F1 of L classes at an IoU of 0.5, detections matched as by COCO.

    Attributes:
        nodes: int64 (L,), the classes with at least one truth that counts.
        objects: int64 (L,), how many these are.
        precision_at_recall: (L, 101), the highest precision at each of `RECALLS` and beyond it, 0
            where that recall is not reached; a row's mean is COCO's AP50.
        precision: (L, 201), of the detections with at least each of `CONFIDENCES`; NaN where there
            is none.
        recall, f1: (L, 201).
    """

    nodes: Rows
    objects: Rows
    precision_at_recall: Table
    precision: Table
    recall: Table
    f1: Table

    @property
    def best(self) -> int | None:
        """The number in `CONFIDENCES` with the highest mean F1, of equals the surest.

        None where nothing is found.
        """
        if not len(self.nodes):
            return None
        mean = self.f1.mean(axis=0)
        return int(np.flatnonzero(mean == mean.max())[-1]) if mean.max() > 0 else None


def curves(truths: Table, detections: Table) -> Curves:
    """Return precision, recall and F1 of every class that has a truth.

    Difficult truths and crowds are neither asked for nor punished, as in `coco_evaluation`.
    """
    hits, excused = match(truths, detections)
    easy = truths[truths[:, FLAG] == 0]
    nodes, objects = np.unique(easy[:, LABEL].astype(np.int64), return_counts=True)
    shown = np.zeros((len(nodes), len(RECALLS)))
    precision, recall, f1 = np.zeros((3, len(nodes), len(CONFIDENCES)))
    for k, (node, count) in enumerate(zip(nodes.tolist(), objects.tolist(), strict=True)):
        rows = np.flatnonzero((detections[:, LABEL] == node) & ~excused)
        rows = rows[np.argsort(-detections[rows, SCORE], kind="stable")]
        true = np.concatenate([[0], np.cumsum(hits[rows] >= 0)])
        said = np.arange(len(true))
        shown[k] = _envelope(true[1:] / count, true[1:] / said[1:])
        at = np.searchsorted(-detections[rows, SCORE], -CONFIDENCES, side="right")
        precision[k] = np.where(said[at] > 0, true[at] / said[at].clip(1), np.nan)
        recall[k] = true[at] / count
        f1[k] = 2 * true[at] / (said[at] + count)
    return Curves(nodes, objects, shown, precision, recall, f1)


def _envelope(recall: Table, precision: Table) -> Table:
    """Return the highest precision at each of `RECALLS` and beyond it."""
    best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return np.asarray(best[np.searchsorted(recall, RECALLS, side="left")])


def mean_precision(precision: Table) -> Table:
    """Return the mean over the classes that still find something, (201,); NaN where none does."""
    there = ~np.isnan(precision)
    count = there.sum(axis=0)
    total = np.where(there, precision, 0.0).sum(axis=0)
    return np.where(count > 0, total / count.clip(1), np.nan)


def match(
    truths: Table, detections: Table, iou_threshold: float = FOUND_IOU
) -> tuple[Rows, NDArray[np.bool_]]:
    """Match detections to truths of their class as COCO's evaluation does.

    By falling score, each takes the free truth of its class that it overlaps most.

    Args:
        truths: (N, 8).
        detections: (M, 8).
        iou_threshold: 0…1, at and above which a truth is found.

    Returns:
        The row of the truth that each detection finds, int64 (M,), -1 for none; and which
        detections do not count, bool (M,): those that overlap a difficult truth most, by a half,
        and those that lie in a crowd and find nothing else.
    """
    hits = np.full(len(detections), -1, dtype=np.int64)
    excused = np.zeros(len(detections), dtype=np.bool_)
    # one number an image and class
    keys = [table[:, [IMAGE, LABEL]] @ [_MAX_CLASSES, 1.0] for table in (truths, detections)]
    for own, said in groups(*keys):
        rows = said[np.argsort(-detections[said, SCORE], kind="stable")]
        flags = truths[own, FLAG]
        over, covered = overlaps(detections[rows], truths[own])
        free = flags == 0
        off = over_difficult(over, flags)
        for row in np.flatnonzero((over >= iou_threshold)[:, free].any(axis=1) & ~off).tolist():
            best = int(np.where(free, over[row], -1.0).argmax())
            if free[best] and over[row, best] >= iou_threshold:
                hits[rows[row]], free[best] = own[best], False
        crowded = (covered[:, flags == CROWD] >= iou_threshold).any(axis=1)
        excused[rows] = off | (crowded & (hits[rows] < 0))
    return hits, excused


def over_difficult(over: Table, flags: Table) -> NDArray[np.bool_]:
    """Return which detections overlap a difficult truth most, by a half, bool (M,).

    Args:
        over: (M, N), IoU with each truth.
        flags: (N,), of these.
    """
    off = (flags[over.argmax(axis=1)] == DIFFICULT) & (over.max(axis=1) >= FOUND_IOU)
    return np.asarray(off, dtype=np.bool_)


def groups(first: Table, second: Table) -> Iterator[tuple[Rows, Rows]]:
    """Yield the rows of two tables for each key that both have, given their keys, (N,) and (M,)."""
    orders = [np.argsort(keys, kind="stable") for keys in (first, second)]
    both = np.intersect1d(first, second)
    bounds = [
        np.searchsorted(keys[order], both, side=side).tolist()
        for keys, order in zip((first, second), orders, strict=True)
        for side in ("left", "right")
    ]
    for a, b, c, d in zip(*bounds, strict=True):
        yield orders[0][a:b], orders[1][c:d]


def overlaps(detections: Table, truths: Table) -> tuple[Table, Table]:
    """Return IoU, and the share of each detection that each truth covers, both (M, N), 0…1."""
    first, second = detections[:, None, BOX], truths[None, :, BOX]
    low = np.maximum(first[..., :2], second[..., :2])
    high = np.minimum(first[..., 2:], second[..., 2:])
    inside = (high - low).clip(0).prod(axis=-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).clip(0).prod(axis=-1) for boxes in (first, second)]
    tiny = np.finfo(np.float64).tiny
    return inside / (areas[0] + areas[1] - inside).clip(tiny), inside / areas[0].clip(tiny)
