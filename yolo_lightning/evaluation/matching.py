"""Tables of boxes, and matching of detections to targets.

A table is float64 (N, 8): image, class, area of the target in square px (0 for that of the box) or
score of the detection, flag (`DIFFICULT`, `CROWD` or 0), x1, y1, x2, y2.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from yolo_lightning.boxes import pairwise_ioa, pairwise_iou

IMAGE, LABEL, SCORE, AREA, FLAG, BOX = 0, 1, 2, 2, 3, slice(4, 8)
NUM_COLUMNS = 8
DIFFICULT, CROWD = 1, 2
IMAGE_AND_CLASS, IMAGE_ONLY = (IMAGE, LABEL), (IMAGE,)

MATCH_IOU = 0.5  # IoU at and above which a detection matches a target

Table = NDArray[np.float64]
Rows = NDArray[np.int64]

_MAX_PAIRS = 500_000  # pairs of boxes compared at once, which bounds the memory


def empty_table() -> Table:
    """Return a table without rows."""
    return np.zeros((0, NUM_COLUMNS))


class Pairs(NamedTuple):
    """P pairs of a target and a detection that overlap."""

    targets: Rows  # (P,)
    detections: Rows  # (P,)
    iou: Table  # (P,)

    def select(self, index: NDArray[np.generic]) -> "Pairs":
        """Return some of the pairs, given as a bool mask (P,) or as indices."""
        return Pairs(*(values[index] for values in self))


def overlapping_pairs(
    targets: Table,
    detections: Table,
    min_iou: float,
    same: Sequence[int] = IMAGE_AND_CLASS,
    overlap: Callable[[Tensor, Tensor], Tensor] = pairwise_iou,
) -> Pairs:
    """Return all pairs that overlap by `min_iou` or more and are equal in the columns `same`.

    By descending IoU; equal ones by ascending rows of the detection, then of the target.
    """
    blocks = [Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    for target_rows, detection_rows in _candidates(targets, detections, same):
        boxes = [
            torch.from_numpy(table[rows, BOX])[:, None]
            for table, rows in ((detections, detection_rows), (targets, target_rows))
        ]
        block = Pairs(target_rows, detection_rows, overlap(*boxes).flatten().numpy())
        blocks.append(block.select(block.iou >= min_iou))
    pairs = Pairs(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))
    return pairs.select(np.lexsort((pairs.targets, pairs.detections, -pairs.iou)))


def _candidates(
    targets: Table, detections: Table, same: Sequence[int]
) -> Iterator[tuple[Rows, Rows]]:
    """Yield rows of targets and detections that are equal in the columns `same`, in blocks."""
    keys = np.zeros(len(targets) + len(detections), np.int64)
    for column in same:
        values = np.concatenate([targets[:, column], detections[:, column]]).astype(np.int64)
        keys = keys * (values.max(initial=0) + 1) + values
    target_keys, detection_keys = np.split(keys, [len(targets)])
    order = np.argsort(target_keys, kind="stable")
    first, last = (
        np.searchsorted(target_keys[order], detection_keys, side) for side in ("left", "right")
    )
    counts = last - first
    ends = np.cumsum(counts)
    limits = np.arange(_MAX_PAIRS, ends.max(initial=0), _MAX_PAIRS)
    for rows in np.split(np.arange(len(detections)), np.searchsorted(ends, limits)):
        size = counts[rows]
        position = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
        yield order[np.repeat(first[rows], size) + position], np.repeat(rows, size)


def match_in_order(pairs: Pairs, num_detections: int) -> Rows:
    """Return the target of each detection, or -1: a pair is matched if both are still free."""
    matched = np.full(num_detections, -1, dtype=np.int64)
    taken: set[int] = set()
    for target, detection in zip(pairs.targets.tolist(), pairs.detections.tolist(), strict=True):
        if matched[detection] < 0 and target not in taken:
            matched[detection] = target
            taken.add(target)
    return matched


def best_overlaps(
    targets: Table, detections: Table, min_iou: float, same: Sequence[int] = IMAGE_AND_CLASS
) -> tuple[Rows, Table]:
    """Return the target that each detection overlaps most, by `min_iou` or more, and the IoU.

    Both are (M,). Of equal targets the first one counts; -1 stands for no target.
    """
    pairs = overlapping_pairs(targets, detections, min_iou, same)
    best, iou = np.full(len(detections), -1, dtype=np.int64), np.zeros(len(detections))
    rows, first = np.unique(pairs.detections, return_index=True)
    best[rows], iou[rows] = pairs.targets[first], pairs.iou[first]
    return best, iou


def overlaps_difficult(
    targets: Table, detections: Table, same: Sequence[int] = IMAGE_AND_CLASS
) -> NDArray[np.bool_]:
    """Return bool (M,), whether each detection overlaps a difficult target most, by 0.5 or more."""
    best, _ = best_overlaps(targets, detections, MATCH_IOU, same)
    return np.append(targets[:, FLAG] == DIFFICULT, False)[best]


def match_detections(targets: Table, detections: Table) -> tuple[Rows, NDArray[np.bool_]]:
    """Match detections to targets of their class as COCO does.

    By descending score, each is matched to the unmatched target that it overlaps most. Returns the
    row of that target or -1, int64 (M,), and the ignored detections, bool (M,): those that overlap
    a difficult target most, by 0.5 or more, and unmatched ones inside a crowd.
    """
    ignored = overlaps_difficult(targets, detections)
    pairs = overlapping_pairs(targets, detections, MATCH_IOU)
    pairs = pairs.select((targets[pairs.targets, FLAG] == 0) & ~ignored[pairs.detections])
    by_score = np.lexsort((pairs.detections, -detections[pairs.detections, SCORE]))
    matched = match_in_order(pairs.select(by_score), len(detections))
    crowds = targets[targets[:, FLAG] == CROWD]
    in_crowd = overlapping_pairs(crowds, detections, MATCH_IOU, overlap=pairwise_ioa).detections
    ignored[in_crowd[matched[in_crowd] < 0]] = True
    return matched, ignored
