"""What detections get wrong: the confusion matrix, and the kinds of mistakes."""

from dataclasses import dataclass

import numpy as np

from yolo_lightning.errors import InputError
from yolo_lightning.evaluation.curves import (
    FOUND_IOU,
    Rows,
    groups,
    match,
    over_difficult,
    overlaps,
)
from yolo_lightning.evaluation.matching import BOX, FLAG, IMAGE, LABEL, SCORE, Table
from yolo_lightning.tree.wordtree import WordTree

Box = tuple[float, float, float, float]

NEAR_IOU, SAME_IOU = 0.1, 0.95
"""IoU below which nothing is near, and above which two boxes are one."""

KINDS = ("wrong class", "badly placed", "duplicate", "background", "missed")
_WRONG, _PLACED, _DUPLICATE, _BACKGROUND, _MISSED = range(len(KINDS))


@dataclass
class Matches:
    """The detections above a confidence, and the truths that they lie on.

    Attributes:
        truths: (N, 8), those that count.
        detections: (M, 8), those that count, one name a box.
        hits: int64 (M,), the truth of its class that each finds, -1 for none.
        lies_on: int64 (M,), the truth of another class, found by nothing else, that each lies on.
    """

    truths: Table
    detections: Table
    hits: Rows
    lies_on: Rows


def matches_at(
    truths: Table, detections: Table, tree: WordTree, confidence: float = 0.25
) -> Matches:
    """Match what is told at a confidence: first to truths of its class, then to any that are left.

    First as for average precision, so that the matrix has on its diagonal what is found; what is
    left of both is paired by falling IoU, whatever the class, at 0.5 and above.
    Detections that overlap a difficult truth most, by a half, and those in a crowd do not count.

    Args:
        truths: (N, 8).
        detections: (M, 8).
        tree: the classes.
        confidence: 0…1, the least score that counts.

    Deviation: the usual tools pair by IoU alone; there a wrong name that fits its object a little
    better makes the right one count as background.
    """
    told = one_name_a_box(detections[detections[:, SCORE] >= confidence], tree)
    hits, excused = match(truths, told)
    for own, said in groups(truths[:, IMAGE], np.where(hits < 0, told[:, IMAGE], -1.0)):
        excused[said] |= over_difficult(overlaps(told[said], truths[own])[0], truths[own, FLAG])
    counts = truths[:, FLAG] == 0
    place = np.append(np.cumsum(counts) - 1, -1)  # the last one is for no hit
    easy, told, hits = truths[counts], told[~excused], place[hits[~excused]]
    return Matches(easy, told, hits, _pairs(easy, told, hits))


def _pairs(truths: Table, detections: Table, hits: Rows) -> Rows:
    """Return the truth that each detection without a hit lies on, paired by falling IoU, or -1."""
    lies_on = np.full_like(hits, -1)
    lost = np.ones(len(truths), dtype=np.bool_)
    lost[hits[hits >= 0]] = False
    left = np.where(lost, truths[:, IMAGE], -1.0), np.where(hits < 0, detections[:, IMAGE], -2.0)
    for own, said in groups(*left):
        over, _ = overlaps(detections[said], truths[own])
        while over.max() >= FOUND_IOU:
            row, column = divmod(int(over.argmax()), over.shape[1])
            lies_on[said[row]] = own[column]
            over[row], over[:, column] = -1.0, -1.0
    return lies_on


def one_name_a_box(detections: Table, tree: WordTree) -> Table:
    """Return the detections with one name a box.

    Evaluation asks about every class, so one box may stand there under several. Of boxes that
    overlap by more than 0.95 the one with the highest score names the object; where a class below
    it has at least half of its score, more likely than not given the other, that one does.

    Args:
        detections: (M, 8).
        tree: the classes.
    """
    above, kept = tree.paths.numpy(), []
    keys = detections[:, IMAGE]
    for _, rows in groups(np.unique(keys), keys):
        rows = rows[np.argsort(-detections[rows, SCORE], kind="stable")]
        over, _ = overlaps(detections[rows], detections[rows])
        there = np.ones(len(rows), dtype=np.bool_)
        for first in range(len(rows)):
            if not there[first]:
                continue
            same = rows[there & ((over[first] > SAME_IOU) | (np.arange(len(rows)) == first))]
            there &= ~np.isin(rows, same)
            kept.append(_named(detections, same, above))
    return detections[np.array(kept, dtype=np.int64)]


def _named(detections: Table, rows: Rows, above: Rows) -> int:
    """Return which of the names of one box, by falling score, is told."""
    labels, scores = detections[rows, LABEL].astype(np.int64), detections[rows, SCORE]
    named = 0
    for row in range(1, len(rows)):  # scores fall: what stands further down the tree comes later
        below = labels[named] in above[labels[row], 1:]
        if below and scores[row] >= 0.5 * scores[named]:
            named = row
    return int(rows[named])


@dataclass
class Confusion:
    """How often truths of a class are told as which.

    Attributes:
        nodes: int64 (L,), the classes, those of one branch side by side.
        counts: int64 (L + 1, L + 1), truths along the rows, predictions along the columns; the last
            row holds predictions on nothing, the last column missed truths.
    """

    nodes: Rows
    counts: Rows


def confusion(matches: Matches, tree: WordTree, level: int | None = None) -> Confusion:
    """Return the confusion matrix over the classes that occur, and background.

    Args:
        matches: see `matches_at`.
        tree: the classes.
        level: of the tree, from 1 at the top, to which classes are collapsed; None for as they are.

    Raises:
        InputError: the tree has no such level.
    """
    labels = [table[:, LABEL].astype(np.int64) for table in (matches.truths, matches.detections)]
    if level is not None:
        labels = [collapse(tree, nodes, level) for nodes in labels]
    truth, said = labels
    nodes = np.array(in_order(tree, np.unique(np.concatenate(labels))), dtype=np.int64)
    place = np.full(len(tree) + 1, len(nodes))  # the last one is background
    place[nodes] = np.arange(len(nodes))
    on = np.where(matches.hits >= 0, matches.hits, matches.lies_on)
    lost = np.setdiff1d(np.arange(len(truth)), on)
    # a prediction on nothing, -1, takes the last one: background
    rows = np.concatenate([np.append(truth, len(tree))[on], truth[lost]])
    columns = np.concatenate([said, np.full(len(lost), len(tree))])
    counts = np.zeros((len(nodes) + 1, len(nodes) + 1), dtype=np.int64)
    np.add.at(counts, (place[rows], place[columns]), 1)
    return Confusion(nodes, counts)


def collapse(tree: WordTree, nodes: Rows, level: int) -> Rows:
    """Return each node's ancestor at a level, or itself where it lies no deeper.

    Args:
        tree: the classes.
        nodes: int64 (N,).
        level: from 1, the top.

    Raises:
        InputError: the tree has no such level.
    """
    check_level(tree, level)
    paths = tree.paths.numpy()
    lengths = (paths[nodes] >= 0).sum(axis=1)
    return np.asarray(paths[nodes, (lengths - level).clip(0)])


def check_level(tree: WordTree, level: int | None) -> None:
    """Refuse a level that the tree does not have; None is fine.

    Raises:
        InputError: names those that it has.
    """
    depth = tree.paths.shape[1]
    if level is not None and not 1 <= level <= depth:
        raise InputError(f"report.level is {level}; allowed: 1 … {depth}, 1 at the tree's top")


def in_order(tree: WordTree, nodes: Rows) -> list[int]:
    """Return nodes so that those of one branch stand together, parents first."""
    paths = tree.paths[nodes].tolist()
    return [path[-1] for path in sorted([k for k in path[::-1] if k >= 0] for path in paths)]


@dataclass(frozen=True)
class Mistake:
    """One thing that went wrong.

    Attributes:
        kind: one of `KINDS`.
        image: its number in the source.
        box_xyxy_orig_px: what was predicted; None for a missed object.
        label, score: of that, a tree node and 0…1.
        truth_xyxy_orig_px: the object that it lies on or near, or that was missed; None where
            nothing is as near as an IoU of 0.1.
        truth_label: of that.
        iou: of the two boxes; 0 where there is only one.
    """

    kind: str
    image: int
    box_xyxy_orig_px: Box | None
    label: int | None
    score: float | None
    truth_xyxy_orig_px: Box | None
    truth_label: int | None
    iou: float


def mistakes(matches: Matches) -> dict[str, list[Mistake]]:
    """Return every mistake by kind, the worst first: the surest, of the missed the largest.

    A detection that is no hit is a `duplicate` or of the `wrong class` where it overlaps a truth by
    a half or more (that which it overlaps most says which); `badly placed` where it overlaps one by
    a tenth, of its class if there is any; else `background`. A truth is `missed` where nothing
    finds it, lies on it under a wrong name, or is badly placed under its own.

    Args:
        matches: see `matches_at`.

    Source: the kinds are those of TIDE (Bolya and others, ECCV 2020). Deviation: what overlaps
    only another class, and by less than a half, has a kind of its own there.
    """
    truths, told = matches.truths, matches.detections
    kinds, near, ious = _explained(matches)
    wrong = np.flatnonzero(matches.hits < 0)
    found: dict[str, list[Mistake]] = {kind: [] for kind in KINDS}
    for row in wrong[np.argsort(-told[wrong, SCORE], kind="stable")].tolist():
        on = truths[near[row]] if near[row] >= 0 else None
        kind = KINDS[kinds[row]]
        found[kind].append(_mistake(kind, told[row], on, float(ious[row])))
    rows = wrong[near[wrong] >= 0]
    named = truths[near[rows], LABEL] == told[rows, LABEL]
    covered = near[rows[(kinds[rows] == _WRONG) | named]]
    lost = np.setdiff1d(np.arange(len(truths)), np.concatenate([matches.hits, covered]))
    areas = (truths[lost, 6:8] - truths[lost, 4:6]).prod(axis=1)
    for row in lost[np.argsort(-areas, kind="stable")].tolist():
        found[KINDS[_MISSED]].append(_mistake(KINDS[_MISSED], None, truths[row], 0.0))
    return found


def _mistake(kind: str, said: Table | None, truth: Table | None, iou: float) -> Mistake:
    either = said if said is not None else truth
    assert either is not None, "a mistake is about a prediction or a truth"
    box, on = (None if row is None else _box(row) for row in (said, truth))
    label, its = (None if row is None else int(row[LABEL]) for row in (said, truth))
    score = None if said is None else float(said[SCORE])
    return Mistake(kind, int(either[IMAGE]), box, label, score, on, its, iou)


def _box(row: Table) -> Box:
    x1, y1, x2, y2 = row[BOX].tolist()
    return x1, y1, x2, y2


def _explained(matches: Matches) -> tuple[Rows, Rows, Table]:
    """Return kind, nearest truth or -1, and IoU with it, of every detection that is no hit."""
    truths, told = matches.truths, matches.detections
    kinds = np.full(len(told), _BACKGROUND)
    near, ious = np.full(len(told), -1), np.zeros(len(told))
    images = np.where(matches.hits < 0, told[:, IMAGE], -1.0)
    for own, said in groups(truths[:, IMAGE], images):
        over, _ = overlaps(told[said], truths[own])
        same = told[said, None, LABEL] == truths[None, own, LABEL]
        each = np.arange(len(said))
        beside = np.where(same, over, -1.0)
        on, by = over.argmax(axis=1), beside.argmax(axis=1)
        lies, close = over[each, on] >= FOUND_IOU, beside[each, by] >= NEAR_IOU
        chosen = np.where(~lies & close, by, on)
        most = over[each, chosen]
        lying = np.where(same[each, on], _DUPLICATE, _WRONG)
        kinds[said] = np.where(lies, lying, np.where(most >= NEAR_IOU, _PLACED, _BACKGROUND))
        near[said] = np.where(most >= NEAR_IOU, own[chosen], -1)
        ious[said] = np.where(most >= NEAR_IOU, most, 0.0)
    return kinds, near, ious
