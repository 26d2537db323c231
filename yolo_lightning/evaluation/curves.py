"""Precision, recall and F1 over confidence, of detections matched as COCO does."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from yolo_lightning.evaluation.matching import FLAG, LABEL, SCORE, Rows, Table, match_detections

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
    nodes, num_targets = count_targets(targets)
    curves = Curves(
        nodes,
        num_targets,
        np.zeros((len(nodes), len(RECALLS))),
        *np.zeros((3, len(nodes), len(CONFIDENCES))),
    )
    ranked = rank_by_class(detections, np.where(ignored, -1, matched >= 0), nodes)
    for k, (count, (scores, hits)) in enumerate(zip(num_targets.tolist(), ranked, strict=True)):
        curves.precision_at_recall[k] = precision_at(RECALLS, *precision_recall(hits, count))
        # number of detections with at least each confidence, and of true positives among them
        predicted = np.searchsorted(-scores, -CONFIDENCES, side="right")
        true_positives = np.append(0, np.cumsum(hits))[predicted]
        has_any = predicted > 0
        curves.precision[k] = np.where(has_any, true_positives / predicted.clip(1), np.nan)
        curves.recall[k] = true_positives / count
        curves.f1[k] = 2 * true_positives / (predicted + count)
    return curves


def count_targets(targets: Table) -> tuple[Rows, Rows]:
    """Return classes, ascending, and their targets without difficult ones and crowds, (L,) each."""
    counted = targets[targets[:, FLAG] == 0, LABEL].astype(np.int64)
    return np.unique(counted, return_counts=True)


def rank_by_class(detections: Table, hits: Rows, nodes: Rows) -> Iterator[tuple[Table, Rows]]:
    """Yield scores and hits of the detections of each class, by descending score.

    `hits`, int64 (M,), are 1 for true positives, 0 for false positives, -1 for ignored detections,
    which are left out.
    """
    order = np.lexsort((-detections[:, SCORE], detections[:, LABEL]))
    order = order[hits[order] >= 0]
    labels = detections[order, LABEL]
    for first, last in zip(
        np.searchsorted(labels, nodes), np.searchsorted(labels, nodes, "right"), strict=True
    ):
        yield detections[order[first:last], SCORE], hits[order[first:last]]


def precision_recall(hits: Rows, num_targets: int) -> tuple[Table, Table]:
    """Return recall, and the highest precision at this recall and above, after each detection."""
    true_positives = np.cumsum(hits)
    precision = true_positives / np.arange(1, len(hits) + 1)
    return true_positives / num_targets, np.maximum.accumulate(precision[::-1])[::-1]


def precision_at(points: Table, recall: Table, precision: Table) -> Table:
    """Return the highest precision at recalls; 0 at those that are not reached."""
    return np.append(precision, 0.0)[np.searchsorted(recall, points)]


def mean_precision(precision: Table) -> Table:
    """Return the mean over the classes that have detections, (201,); NaN where none has."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.nansum(precision, axis=0) / (~np.isnan(precision)).sum(axis=0))
