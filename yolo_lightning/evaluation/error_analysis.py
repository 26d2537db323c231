"""Error analysis of detections: the confusion matrix, and errors by kind as in TIDE."""

import heapq
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from yolo_lightning.errors import InputError
from yolo_lightning.evaluation.matching import (
    FLAG,
    IMAGE,
    IMAGE_ONLY,
    LABEL,
    MATCH_IOU,
    SCORE,
    Rows,
    Table,
    best_overlaps,
    match_detections,
    match_in_order,
    overlapping_pairs,
    overlaps_difficult,
)
from yolo_lightning.tree.wordtree import WordTree

BACKGROUND_IOU, DUPLICATE_LABEL_IOU = 0.1, 0.95
"""IoU below which a detection is on background, and above which two are labels of one box."""

ERROR_KINDS = ("classification", "localization", "duplicate", "background", "missed")


@dataclass
class Matches:
    """Detections at or above a confidence, matched to targets; without ignored ones."""

    targets: Table  # (N, 8)
    detections: Table  # (M, 8), one label per box
    matched: Rows  # (M,), the target of its class that each is matched to, or -1
    confused: Rows  # (M,), the target that it is matched to in the second step, or -1


def match_predictions(
    targets: Table, detections: Table, tree: WordTree, confidence: float = 0.25
) -> Matches:
    """Match detections to targets of their class first, then to the remaining targets.

    The first step is that of average precision: the diagonal of the confusion matrix counts true
    positives. The second pairs the rest by descending IoU, 0.5 or more, whatever the class.
    Detections that overlap a difficult target most, and those in a crowd, are ignored.

    Deviation: other tools match by IoU alone, where a wrong label with a slightly better box turns
    the correct one into background.
    """
    predicted = one_label_per_box(detections[detections[:, SCORE] >= confidence], tree)
    matched, ignored = match_detections(targets, predicted)
    unmatched = np.flatnonzero(matched < 0)
    ignored[unmatched] |= overlaps_difficult(targets, predicted[unmatched], IMAGE_ONLY)
    counted = targets[:, FLAG] == 0
    new_index = np.append(np.cumsum(counted) - 1, -1)  # the last one is for unmatched, -1
    targets, predicted = targets[counted], predicted[~ignored]
    matched = new_index[matched[~ignored]]
    pairs = overlapping_pairs(targets, predicted, MATCH_IOU, IMAGE_ONLY)
    is_free = (matched[pairs.detections] < 0) & ~np.isin(pairs.targets, matched)
    confused = match_in_order(pairs.select(is_free), len(predicted))
    return Matches(targets, predicted, matched, confused)


def one_label_per_box(detections: Table, tree: WordTree) -> Table:
    """Return the detections with one label per box; a box may be detected under several labels.

    Among boxes with an IoU above 0.95 the highest-scoring label is kept, or a descendant of it
    with at least half of its score, that is a conditional probability of at least 0.5.
    """
    detections = detections[np.lexsort((-detections[:, SCORE], detections[:, IMAGE]))]
    pairs = overlapping_pairs(detections, detections, DUPLICATE_LABEL_IOU, IMAGE_ONLY)
    pairs = pairs.select((pairs.iou > DUPLICATE_LABEL_IOU) & (pairs.detections < pairs.targets))
    by_score = np.lexsort((pairs.targets, pairs.detections))
    paths, labels, scores = tree.paths.numpy(), detections[:, LABEL], detections[:, SCORE]
    best, is_other_label = np.arange(len(detections)), np.zeros(len(detections), dtype=np.bool_)
    for first, other in np.column_stack([pairs.detections, pairs.targets])[by_score].tolist():
        if is_other_label[first] or is_other_label[other]:
            continue
        is_other_label[other] = True
        is_descendant = labels[best[first]] in paths[int(labels[other]), 1:]
        if is_descendant and scores[other] >= 0.5 * scores[best[first]]:
            best[first] = other
    return detections[best[~is_other_label]]


@dataclass
class ConfusionMatrix:
    """How often each true class is predicted as each class."""

    nodes: Rows  # (L,), the classes in depth-first order
    # (L + 1, L + 1), true classes along the rows; last row background, last column missed
    counts: Rows


def confusion_matrix(matches: Matches, tree: WordTree, level: int | None = None) -> ConfusionMatrix:
    """Return the confusion matrix over the classes that occur, collapsed to a level if given.

    Raises:
        InputError: the tree has no such level.
    """
    labels = [table[:, LABEL].astype(np.int64) for table in (matches.targets, matches.detections)]
    if level is not None:
        labels = [collapse_to_level(tree, nodes, level) for nodes in labels]
    true_labels, predicted_labels = labels
    nodes = np.array(depth_first_order(tree, np.unique(np.concatenate(labels))), dtype=np.int64)
    index = np.full(len(tree) + 1, len(nodes))  # the last one is background
    index[nodes] = np.arange(len(nodes))
    targets = np.where(matches.matched >= 0, matches.matched, matches.confused)
    missed = np.setdiff1d(np.arange(len(true_labels)), targets)
    # a detection without a target, -1, takes the last row, background
    rows = np.concatenate([np.append(true_labels, len(tree))[targets], true_labels[missed]])
    columns = np.concatenate([predicted_labels, np.full(len(missed), len(tree))])
    counts = np.zeros((len(nodes) + 1, len(nodes) + 1), dtype=np.int64)
    np.add.at(counts, (index[rows], index[columns]), 1)
    return ConfusionMatrix(nodes, counts)


def collapse_to_level(tree: WordTree, nodes: Rows, level: int) -> Rows:
    """Return each node's ancestor at a level, or the node if it is above it; see `check_level`."""
    check_level(tree, level)
    paths = tree.paths.numpy()
    lengths = (paths[nodes] >= 0).sum(axis=1)
    return np.asarray(paths[nodes, (lengths - level).clip(0)])


def check_level(tree: WordTree, level: int | None) -> None:
    """Raise `InputError` if the tree lacks a level, counted from 1 at the top; None is valid."""
    depth = tree.paths.shape[1]
    if level is not None and not 1 <= level <= depth:
        raise InputError(f"report.level is {level}; allowed: 1 … {depth}, 1 at the top")


def depth_first_order(tree: WordTree, nodes: Rows) -> list[int]:
    """Return nodes in depth-first order, parents first."""
    paths = tree.paths[nodes].tolist()
    return [path[-1] for path in sorted([k for k in path[::-1] if k >= 0] for path in paths)]


@dataclass(frozen=True)
class DetectionError:
    """A false positive or a missed target; a record, not an exception."""

    kind: str  # one of ERROR_KINDS
    image: int  # index in the source
    detection: Table | None  # (8,), see `matching`; None for a missed target
    # (8,), the missed target, or the one that the detection overlaps by an IoU of 0.1 or more
    target: Table | None
    iou: float  # 0 without a detection or a target


def find_errors(matches: Matches) -> dict[str, list[DetectionError]]:
    """Return all errors by kind: false positives by descending score, missed targets by area.

    An unmatched detection with an IoU of 0.5 or more with a target is a `duplicate` or an error of
    `classification`, by the class of the target that it overlaps most; with an IoU of 0.1 or more,
    with a target of its class if there is one, it is an error of `localization`; else it is
    `background`. A target is `missed` if no detection is matched to it, overlaps it under another
    label, or is badly localized under its label.

    Source: TIDE (Bolya et al., ECCV 2020). Deviation: TIDE has a kind of its own for detections
    that overlap only targets of other classes, by less than 0.5.
    """
    targets = matches.targets
    predicted = matches.detections[matches.matched < 0]
    predicted = predicted[np.argsort(-predicted[:, SCORE], kind="stable")]
    best, best_iou = best_overlaps(targets, predicted, BACKGROUND_IOU, IMAGE_ONLY)
    best_of_class, class_iou = best_overlaps(targets, predicted, BACKGROUND_IOU)
    use_class = (best_iou < MATCH_IOU) & (best_of_class >= 0)
    nearest = np.where(use_class, best_of_class, best)
    ious = np.where(use_class, class_iou, best_iou)
    has_match = best_iou >= MATCH_IOU
    is_same_class = best == best_of_class
    kinds = np.select(
        [has_match & is_same_class, has_match, nearest >= 0],
        ["duplicate", "classification", "localization"],
        "background",
    ).tolist()
    errors: dict[str, list[DetectionError]] = {kind: [] for kind in ERROR_KINDS}
    for kind, row, target, iou in zip(kinds, predicted, nearest, ious.tolist(), strict=True):
        target_row = targets[target] if target >= 0 else None
        errors[kind].append(DetectionError(kind, int(row[IMAGE]), row, target_row, iou))
    covered = nearest[(has_match & ~is_same_class) | (nearest == best_of_class)]
    missed = np.setdiff1d(np.arange(len(targets)), np.concatenate([matches.matched, covered]))
    areas = (targets[missed, 6:8] - targets[missed, 4:6]).prod(axis=1)
    for row in targets[missed[np.argsort(-areas, kind="stable")]]:
        errors["missed"].append(DetectionError("missed", int(row[IMAGE]), None, row, 0.0))
    return errors


def weakest_classes(
    per_class: Mapping[str, Mapping[str, Any]], number: int = 3
) -> list[tuple[str, float]]:
    """Return the keys and the AP50, or top-1 accuracy, of the worst classes, the worst first."""
    values = {key: row.get("AP50", row.get("top1", math.nan)) for key, row in per_class.items()}
    known = ((key, value) for key, value in values.items() if not math.isnan(value))
    return heapq.nsmallest(number, known, key=lambda item: item[1])


def most_confused(matches: Matches, number: int = 3) -> list[tuple[int, int, int]]:
    """Return the classes that are taken for another most often: target, prediction, count."""
    is_confused = matches.confused >= 0
    targets = matches.targets[matches.confused[is_confused], LABEL].astype(int).tolist()
    predicted = matches.detections[is_confused, LABEL].astype(int).tolist()
    pairs = Counter(zip(targets, predicted, strict=True))
    return [(*pair, count) for pair, count in pairs.most_common() if pair[0] != pair[1]][:number]
