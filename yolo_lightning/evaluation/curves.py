"""Matching of detections to targets, and precision, recall and F1 over confidence."""

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

MATCH_IOU = 0.5  # IoU at and above which a detection matches a target

_MAX_CLASSES = 1e7
CONFIDENCES: Table = np.arange(201) / 200
RECALLS: Table = np.linspace(0, 1, 101)


@dataclass
class Curves:
    """Precision, recall and F1 of the L classes that have a target, at an IoU of 0.5."""

    nodes: Rows  # (L,)
    num_targets: Rows  # (L,), without difficult targets and crowds
    # (L, 101), the highest precision at each of RECALLS and above; the mean of a row is COCO's AP50
    precision_at_recall: Table
    precision: Table  # (L, 201), of detections with at least each of CONFIDENCES; NaN if none
    recall: Table  # (L, 201)
    f1: Table  # (L, 201)

    @property
    def best_index(self) -> int | None:
        """Index into `CONFIDENCES` with the highest mean F1; None if no target is detected."""
        if not len(self.nodes):
            return None
        mean = self.f1.mean(axis=0)
        return int(np.flatnonzero(mean == mean.max())[-1]) if mean.max() > 0 else None


def compute_curves(targets: Table, detections: Table) -> Curves:
    """Return the curves; difficult targets and crowds are ignored, as in `evaluate_coco`."""
    matched, ignored = match_detections(targets, detections)
    counted = targets[targets[:, FLAG] == 0]
    nodes, num_targets = np.unique(counted[:, LABEL].astype(np.int64), return_counts=True)
    precision_at_recall = np.zeros((len(nodes), len(RECALLS)))
    precision, recall, f1 = np.zeros((3, len(nodes), len(CONFIDENCES)))
    for k, (node, count) in enumerate(zip(nodes.tolist(), num_targets.tolist(), strict=True)):
        rows = np.flatnonzero((detections[:, LABEL] == node) & ~ignored)
        rows = rows[np.argsort(-detections[rows, SCORE], kind="stable")]
        true_positives = np.concatenate([[0], np.cumsum(matched[rows] >= 0)])
        predicted = np.arange(len(true_positives))
        precision_at_recall[k] = _interpolated_precision(
            true_positives[1:] / count, true_positives[1:] / predicted[1:]
        )
        # number of detections with at least each confidence
        n = np.searchsorted(-detections[rows, SCORE], -CONFIDENCES, side="right")
        precision[k] = np.where(predicted[n] > 0, true_positives[n] / predicted[n].clip(1), np.nan)
        recall[k] = true_positives[n] / count
        f1[k] = 2 * true_positives[n] / (predicted[n] + count)
    return Curves(nodes, num_targets, precision_at_recall, precision, recall, f1)


def _interpolated_precision(recall: Table, precision: Table) -> Table:
    highest = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return np.asarray(highest[np.searchsorted(recall, RECALLS, side="left")])


def mean_precision(precision: Table) -> Table:
    """Return the mean over the classes that have detections, (201,); NaN where none has."""
    defined = ~np.isnan(precision)
    count = defined.sum(axis=0)
    total = np.where(defined, precision, 0.0).sum(axis=0)
    return np.where(count > 0, total / count.clip(1), np.nan)


def match_detections(
    targets: Table, detections: Table, iou_threshold: float = MATCH_IOU
) -> tuple[Rows, NDArray[np.bool_]]:
    """Match detections to targets of their class as COCO does.

    By descending score, each is matched to the unmatched target that it overlaps most. Returns the
    row of that target or -1, int64 (M,), and the ignored detections, bool (M,): those that overlap
    a difficult target most, by 0.5 or more, and unmatched ones inside a crowd.
    """
    matched = np.full(len(detections), -1, dtype=np.int64)
    ignored = np.zeros(len(detections), dtype=np.bool_)
    # one key per image and class
    keys = [table[:, [IMAGE, LABEL]] @ [_MAX_CLASSES, 1.0] for table in (targets, detections)]
    for target_rows, detection_rows in group_rows(*keys):
        rows = detection_rows[np.argsort(-detections[detection_rows, SCORE], kind="stable")]
        flags = targets[target_rows, FLAG]
        iou, ioa = pairwise_iou_and_ioa(detections[rows], targets[target_rows])
        free = flags == 0
        on_difficult = overlaps_difficult(iou, flags)
        matchable = (iou >= iou_threshold)[:, free].any(axis=1) & ~on_difficult
        for row in np.flatnonzero(matchable).tolist():
            best = int(np.where(free, iou[row], -1.0).argmax())
            if free[best] and iou[row, best] >= iou_threshold:
                matched[rows[row]], free[best] = target_rows[best], False
        in_crowd = (ioa[:, flags == CROWD] >= iou_threshold).any(axis=1)
        ignored[rows] = on_difficult | (in_crowd & (matched[rows] < 0))
    return matched, ignored


def overlaps_difficult(iou: Table, flags: Table) -> NDArray[np.bool_]:
    """Return bool (M,), whether each detection overlaps a difficult target most, by 0.5 or more."""
    difficult = (flags[iou.argmax(axis=1)] == DIFFICULT) & (iou.max(axis=1) >= MATCH_IOU)
    return np.asarray(difficult, dtype=np.bool_)


def group_rows(first: Table, second: Table) -> Iterator[tuple[Rows, Rows]]:
    """Yield the rows of two tables for each key in both, given their keys (N,) and (M,)."""
    orders = [np.argsort(keys, kind="stable") for keys in (first, second)]
    shared = np.intersect1d(first, second)
    bounds = [
        np.searchsorted(keys[order], shared, side=side).tolist()
        for keys, order in zip((first, second), orders, strict=True)
        for side in ("left", "right")
    ]
    for a, b, c, d in zip(*bounds, strict=True):
        yield orders[0][a:b], orders[1][c:d]


def pairwise_iou_and_ioa(detections: Table, targets: Table) -> tuple[Table, Table]:
    """Return IoU, and intersection over the area of the detection, both (M, N), 0…1."""
    first, second = detections[:, None, BOX], targets[None, :, BOX]
    low = np.maximum(first[..., :2], second[..., :2])
    high = np.minimum(first[..., 2:], second[..., 2:])
    intersection = (high - low).clip(0).prod(axis=-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).clip(0).prod(axis=-1) for boxes in (first, second)]
    tiny = np.finfo(np.float64).tiny
    union = areas[0] + areas[1] - intersection
    return intersection / union.clip(tiny), intersection / areas[0].clip(tiny)
