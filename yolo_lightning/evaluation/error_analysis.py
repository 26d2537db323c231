"""Error analysis of detections: the confusion matrix, and errors by kind as in TIDE."""

from dataclasses import dataclass

import numpy as np

from yolo_lightning.errors import InputError
from yolo_lightning.evaluation.curves import (
    MATCH_IOU,
    Rows,
    group_rows,
    match_detections,
    overlaps_difficult,
    pairwise_iou_and_ioa,
)
from yolo_lightning.evaluation.matching import BOX, FLAG, IMAGE, LABEL, SCORE, Table
from yolo_lightning.tree.wordtree import WordTree

Box = tuple[float, float, float, float]

BACKGROUND_IOU, DUPLICATE_LABEL_IOU = 0.1, 0.95
"""IoU below which a detection is on background, and above which two are labels of one box."""

ERROR_KINDS = ("classification", "localization", "duplicate", "background", "missed")
_CLASSIFICATION, _LOCALIZATION, _DUPLICATE, _BACKGROUND, _MISSED = range(len(ERROR_KINDS))


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
    unmatched_images = np.where(matched < 0, predicted[:, IMAGE], -1.0)
    for target_rows, rows in group_rows(targets[:, IMAGE], unmatched_images):
        iou, _ = pairwise_iou_and_ioa(predicted[rows], targets[target_rows])
        ignored[rows] |= overlaps_difficult(iou, targets[target_rows, FLAG])
    counted = targets[:, FLAG] == 0
    new_index = np.append(np.cumsum(counted) - 1, -1)  # the last one is for unmatched, -1
    targets, predicted = targets[counted], predicted[~ignored]
    matched = new_index[matched[~ignored]]
    return Matches(targets, predicted, matched, _match_remaining(targets, predicted, matched))


def _match_remaining(targets: Table, detections: Table, matched: Rows) -> Rows:
    confused = np.full_like(matched, -1)
    is_free = np.ones(len(targets), dtype=np.bool_)
    is_free[matched[matched >= 0]] = False
    target_images = np.where(is_free, targets[:, IMAGE], -1.0)
    detection_images = np.where(matched < 0, detections[:, IMAGE], -2.0)
    for target_rows, rows in group_rows(target_images, detection_images):
        iou, _ = pairwise_iou_and_ioa(detections[rows], targets[target_rows])
        while iou.max() >= MATCH_IOU:
            row, column = divmod(int(iou.argmax()), iou.shape[1])
            confused[rows[row]] = target_rows[column]
            iou[row], iou[:, column] = -1.0, -1.0
    return confused


def one_label_per_box(detections: Table, tree: WordTree) -> Table:
    """Return the detections with one label per box; a box may be detected under several labels.

    Among boxes with an IoU above 0.95 the highest-scoring label is kept, or a descendant of it
    with at least half of its score, that is a conditional probability of at least 0.5.
    """
    paths, kept = tree.paths.numpy(), []
    keys = detections[:, IMAGE]
    for _, rows in group_rows(np.unique(keys), keys):
        rows = rows[np.argsort(-detections[rows, SCORE], kind="stable")]
        iou, _ = pairwise_iou_and_ioa(detections[rows], detections[rows])
        remaining = np.ones(len(rows), dtype=np.bool_)
        for first in range(len(rows)):
            if not remaining[first]:
                continue
            is_same = (iou[first] > DUPLICATE_LABEL_IOU) | (np.arange(len(rows)) == first)
            same_box = rows[remaining & is_same]
            remaining &= ~np.isin(rows, same_box)
            kept.append(_most_specific(detections, same_box, paths))
    return detections[np.array(kept, dtype=np.int64)]


def _most_specific(detections: Table, rows: Rows, paths: Rows) -> int:
    labels, scores = detections[rows, LABEL].astype(np.int64), detections[rows, SCORE]
    best = 0
    for row in range(1, len(rows)):  # scores descend, so descendants come after ancestors
        is_descendant = labels[best] in paths[labels[row], 1:]
        if is_descendant and scores[row] >= 0.5 * scores[best]:
            best = row
    return int(rows[best])


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
    # of the detection; None for a missed target
    box_xyxy_orig_px: Box | None
    label: int | None
    score: float | None
    # of the missed target, or of the one that the detection overlaps by an IoU of 0.1 or more
    target_xyxy_orig_px: Box | None
    target_label: int | None
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
    targets, predicted = matches.targets, matches.detections
    kinds, nearest, ious = _unmatched_kinds(matches)
    unmatched = np.flatnonzero(matches.matched < 0)
    errors: dict[str, list[DetectionError]] = {kind: [] for kind in ERROR_KINDS}
    for row in unmatched[np.argsort(-predicted[unmatched, SCORE], kind="stable")].tolist():
        target = targets[nearest[row]] if nearest[row] >= 0 else None
        kind = ERROR_KINDS[kinds[row]]
        errors[kind].append(_error(kind, predicted[row], target, float(ious[row])))
    rows = unmatched[nearest[unmatched] >= 0]
    same_label = targets[nearest[rows], LABEL] == predicted[rows, LABEL]
    covered = nearest[rows[(kinds[rows] == _CLASSIFICATION) | same_label]]
    missed = np.setdiff1d(np.arange(len(targets)), np.concatenate([matches.matched, covered]))
    areas = (targets[missed, 6:8] - targets[missed, 4:6]).prod(axis=1)
    for row in missed[np.argsort(-areas, kind="stable")].tolist():
        kind = ERROR_KINDS[_MISSED]
        errors[kind].append(_error(kind, None, targets[row], 0.0))
    return errors


def _error(kind: str, detection: Table | None, target: Table | None, iou: float) -> DetectionError:
    present = detection if detection is not None else target
    assert present is not None, "an error has a detection or a target"
    box, target_box = (None if row is None else _box(row) for row in (detection, target))
    label, target_label = (None if row is None else int(row[LABEL]) for row in (detection, target))
    score = None if detection is None else float(detection[SCORE])
    image = int(present[IMAGE])
    return DetectionError(kind, image, box, label, score, target_box, target_label, iou)


def _box(row: Table) -> Box:
    x1, y1, x2, y2 = row[BOX].tolist()
    return x1, y1, x2, y2


def _unmatched_kinds(matches: Matches) -> tuple[Rows, Rows, Table]:
    targets, predicted = matches.targets, matches.detections
    kinds = np.full(len(predicted), _BACKGROUND)
    nearest, ious = np.full(len(predicted), -1), np.zeros(len(predicted))
    images = np.where(matches.matched < 0, predicted[:, IMAGE], -1.0)
    for target_rows, rows in group_rows(targets[:, IMAGE], images):
        iou, _ = pairwise_iou_and_ioa(predicted[rows], targets[target_rows])
        same_class = predicted[rows, None, LABEL] == targets[None, target_rows, LABEL]
        each = np.arange(len(rows))
        class_iou = np.where(same_class, iou, -1.0)
        best, best_of_class = iou.argmax(axis=1), class_iou.argmax(axis=1)
        overlaps = iou[each, best] >= MATCH_IOU
        near_class = class_iou[each, best_of_class] >= BACKGROUND_IOU
        chosen = np.where(~overlaps & near_class, best_of_class, best)
        chosen_iou = iou[each, chosen]
        near = chosen_iou >= BACKGROUND_IOU
        overlap_kinds = np.where(same_class[each, best], _DUPLICATE, _CLASSIFICATION)
        kinds[rows] = np.where(overlaps, overlap_kinds, np.where(near, _LOCALIZATION, _BACKGROUND))
        nearest[rows] = np.where(near, target_rows[chosen], -1)
        ious[rows] = np.where(near, chosen_iou, 0.0)
    return kinds, nearest, ious
