"""Average precision as Pascal VOC defines it."""

import numpy as np

from yolo_lightning.evaluation.curves import (
    count_targets,
    precision_at,
    precision_recall,
    rank_by_class,
)
from yolo_lightning.evaluation.matching import FLAG, MATCH_IOU, SCORE, Rows, Table, best_overlaps

VOC_METRICS = ("VOC07_AP50", "VOC_AP50")
"""At an IoU of 0.5: from 11 points, as until 2009, and from every point, as since 2010."""


def evaluate_voc(
    targets: Table, detections: Table, iou_threshold: float = MATCH_IOU
) -> dict[int, dict[str, float]]:
    """Return `VOC_METRICS` of every class that has a target.

    A detection is matched to the target that it overlaps most, even if that is already matched.
    Difficult targets and crowds are ignored, and so are the detections matched to them. Average
    precision is the area under the highest precision at each recall and above, or its mean at
    recalls of 0, 0.1 … 1.
    """
    nodes, num_targets = count_targets(targets)
    ranked = rank_by_class(detections, _hits(targets, detections, iou_threshold), nodes)
    metrics: dict[int, dict[str, float]] = {}
    for node, count, (_, hits) in zip(nodes.tolist(), num_targets.tolist(), ranked, strict=True):
        recall, precision = precision_recall(hits, count)
        at_eleven_points = precision_at(np.linspace(0, 1, 11), recall, precision).mean()
        area = (np.diff(recall, prepend=0.0) * precision).sum()
        metrics[node] = dict(zip(VOC_METRICS, (float(at_eleven_points), float(area)), strict=True))
    return metrics


def _hits(targets: Table, detections: Table, iou_threshold: float) -> Rows:
    """Return 1 for true positives, 0 for false positives, -1 for ignored detections."""
    hits = np.zeros(len(detections), dtype=np.int64)
    best, _ = best_overlaps(targets, detections, iou_threshold)
    rows = np.flatnonzero(best >= 0)
    rows = rows[np.argsort(-detections[rows, SCORE], kind="stable")]
    _, highest_scoring = np.unique(best[rows], return_index=True)
    hits[rows[highest_scoring]] = 1
    hits[rows[targets[best[rows], FLAG] != 0]] = -1
    return hits
