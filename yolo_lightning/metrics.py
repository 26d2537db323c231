"""Average precision over boxes: our own `torchmetrics.Metric`, matching by faster-coco-eval."""

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from yolo_lightning.boxes import pairwise_iou

_IMAGE, _LABEL, _SCORE, _FLAG, _BOX = 0, 1, 2, 3, slice(4, 8)
_COLUMNS = 8
_CROWD = 2

MAX_DETECTIONS = 100
_LARGEST_AREA = 1e10
_MOST_DETECTIONS = (1, 10, MAX_DETECTIONS)
_MOST_ROWS, _EXCUSED = 50_000, 0.5
_AREAS = {
    "all": (0, _LARGEST_AREA),
    "small": (0, 32**2),
    "medium": (32**2, 96**2),
    "large": (96**2, _LARGEST_AREA),
}

COCO_FIGURES = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip
"""COCO's twelve: average precision over IoU 0.50…0.95, at 0.50 and 0.75, by size; average recall
with 1, 10 and 100 detections an image, and by size."""


class BoxAveragePrecision(Metric):
    """COCO average precision, in px of the original images.

    Images with the id -1, the padding of distributed evaluation, are left out. Ranks that saw no
    image take part in the synchronisation all the same.

    Attributes:
        figures: COCO's twelve numbers when `compute` was last called, by `COCO_FIGURES`; -1 where
            there is nothing to say.
    """

    full_state_update = False
    truths: list[Tensor]
    detections: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.figures: dict[str, float] = {}
        self.add_state("truths", default=[], dist_reduce_fx="cat")
        self.add_state("detections", default=[], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Forget everything; a table without rows keeps ranks without images from hanging."""
        super().reset()
        self.truths.append(torch.zeros(0, _COLUMNS, dtype=torch.float64, device=self.device))
        self.detections.append(torch.zeros(0, _COLUMNS, dtype=torch.float64, device=self.device))

    def update(
        self,
        image_id: int,
        boxes_xyxy_orig_px: Tensor,
        labels: Tensor,
        scores: Tensor,
        truth_xyxy_orig_px: Tensor,
        truth_labels: Tensor,
        truth_difficult: Tensor,
        truth_crowd: Tensor | None = None,
    ) -> None:
        """Add one image.

        Args:
            image_id: its index in the source; -1 for padding.
            boxes_xyxy_orig_px: float (N, 4).
            labels: int64 (N,), tree nodes.
            scores: float (N,); of more than 100 detections the best 100 stay.
            truth_xyxy_orig_px: float (M, 4).
            truth_labels: int64 (M,).
            truth_difficult: bool (M,), neither asked for nor punished.
            truth_crowd: bool (M,), those of them that are regions of a crowd: any number of
                detections may lie in one, as far as they are covered by it.
        """
        if image_id < 0:
            return
        best = scores.argsort(descending=True, stable=True)[:MAX_DETECTIONS]
        self.detections.append(
            _table(image_id, boxes_xyxy_orig_px[best], labels[best], _SCORE, scores[best])
        )
        flags = truth_difficult.int()
        if truth_crowd is not None:
            flags = torch.where(truth_crowd, _CROWD, flags)
        self.truths.append(_table(image_id, truth_xyxy_orig_px, truth_labels, _FLAG, flags))

    def compute(self) -> dict[int, dict[str, float]]:
        """Return AP, AP50 and AP75, 0…1, by node, for every class that has a truth."""
        evaluation = coco_evaluation(_joined(self.truths), _joined(self.detections))
        self.figures = evaluation.figures
        return evaluation.per_class


def _table(image_id: int, boxes: Tensor, labels: Tensor, column: int, values: Tensor) -> Tensor:
    """Return rows on the device of the boxes, where distributed synchronisation wants them."""
    rows = torch.zeros(len(labels), _COLUMNS, dtype=torch.float64, device=boxes.device)
    rows[:, _IMAGE] = image_id
    rows[:, _LABEL] = labels.double()
    rows[:, column] = values.double()
    rows[:, _BOX] = boxes.double()
    return rows


def _joined(state: list[Tensor] | Tensor) -> NDArray[np.float64]:
    joined = state if isinstance(state, Tensor) else torch.cat(state)
    return np.asarray(joined.cpu().numpy(), dtype=np.float64)


@dataclass
class CocoEvaluation:
    """What COCO's evaluation says; -1 where it has nothing to say.

    Attributes:
        figures: the twelve numbers, by the names in `COCO_FIGURES`.
        per_class: AP, AP50 and AP75 of every class with at least one truth, by class.
    """

    figures: dict[str, float]
    per_class: dict[int, dict[str, float]]


def coco_evaluation(truths: NDArray[np.float64], detections: NDArray[np.float64]) -> CocoEvaluation:
    """Evaluate boxes as COCO does, over the classes that have a truth.

    Difficult truths are neither asked for nor punished, as in Pascal VOC's evaluation at an IoU of
    a half: however many detections overlap one of them most, none counts.

    Args:
        truths: (N, 8) rows of image, class, area in square px (0 for the box's own), flag
            (1 difficult, 2 crowd), x1, y1, x2, y2.
        detections: (M, 8) rows of image, class, score, 0, x1, y1, x2, y2.
    """
    classes = sorted({int(label) for label in truths[truths[:, _FLAG] == 0, _LABEL]})
    if not classes:
        return CocoEvaluation(dict.fromkeys(COCO_FIGURES, -1.0), {})
    truths, detections = _without_difficult(truths, detections)
    collecting = gc.isenabled()
    gc.disable()  # hundreds of thousands of annotations, none of them in a ring
    try:
        parts = [
            _evaluated(truths, detections, chosen)
            for chosen in _class_parts(classes, truths, detections)
        ]
    finally:
        if collecting:
            gc.enable()
    precision = np.concatenate([part[0] for part in parts], axis=2)
    recall = np.concatenate([part[1] for part in parts], axis=1)
    figures = [
        *(_mean(precision[rows, :, :, 0, -1]) for rows in (slice(None), slice(1), slice(5, 6))),
        *(_mean(precision[:, :, :, area, -1]) for area in (1, 2, 3)),
        *(_mean(recall[:, :, 0, most]) for most in range(len(_MOST_DETECTIONS))),
        *(_mean(recall[:, :, area, -1]) for area in (1, 2, 3)),
    ]
    each = precision[:, :, :, 0, -1]
    per_class = {
        label: {
            "AP": float(each[:, :, k].mean()),
            "AP50": float(each[0, :, k].mean()),
            "AP75": float(each[5, :, k].mean()),
        }
        for k, label in enumerate(classes)
    }
    return CocoEvaluation(dict(zip(COCO_FIGURES, figures, strict=True)), per_class)


def _without_difficult(
    truths: NDArray[np.float64], detections: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Leave out difficult truths, and the detections that overlap one of them most, by a half."""
    hard = truths[:, _FLAG] == 1
    kept = np.ones(len(detections), dtype=np.bool_)
    for image, label in np.unique(truths[hard][:, [_IMAGE, _LABEL]], axis=0).tolist():
        rows, own = (
            np.flatnonzero((table[:, _IMAGE] == image) & (table[:, _LABEL] == label))
            for table in (detections, truths)
        )
        boxes, others = (
            torch.from_numpy(table[:, _BOX]) for table in (detections[rows], truths[own])
        )
        over = pairwise_iou(boxes, others).numpy()
        best = over.argmax(axis=1)
        kept[rows] = ~(hard[own][best] & (over.max(axis=1) >= _EXCUSED))
    return truths[~hard], detections[kept]


def _class_parts(
    classes: list[int], truths: NDArray[np.float64], detections: NDArray[np.float64]
) -> Iterator[list[int]]:
    """Yield classes in parts whose boxes fit the memory; classes never meet in the evaluation."""
    labels = np.concatenate([truths[:, _LABEL], detections[:, _LABEL]]).astype(np.int64)
    counts = np.bincount(labels, minlength=classes[-1] + 1)
    part: list[int] = []
    for label in classes:
        if part and counts[[*part, label]].sum() > _MOST_ROWS:
            yield part
            part = []
        part.append(label)
    yield part


def _evaluated(
    truths: NDArray[np.float64], detections: NDArray[np.float64], classes: list[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return precision (IoU, recall, class, area, detections) and recall (without that)."""
    # imported here: it takes a second, and training starts without it
    from faster_coco_eval import COCO, COCOeval_faster

    truths, detections = (rows[np.isin(rows[:, _LABEL], classes)] for rows in (truths, detections))
    images = np.unique(np.concatenate([truths[:, _IMAGE], detections[:, _IMAGE]])).astype(int)
    head = {
        "info": {},
        "images": [{"id": image + 1} for image in images.tolist()],
        "categories": [{"id": label, "name": str(label)} for label in classes],
    }
    sizes = truths[:, _SCORE]  # COCO's own evaluation takes those of the outlines
    ground_truth = COCO({**head, "annotations": _annotations(truths, sizes)})
    found = COCO({**head, "annotations": _annotations(detections, np.zeros(len(detections)))})
    evaluation = COCOeval_faster(ground_truth, found, iouType="bbox", print_function=_silent)
    evaluation.params.catIds = classes
    evaluation.params.areaRng = [list(bounds) for bounds in _AREAS.values()]
    evaluation.params.areaRngLbl = list(_AREAS)
    evaluation.params.maxDets = list(_MOST_DETECTIONS)
    evaluation.evaluate()
    evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"]), np.asarray(evaluation.eval["recall"])


def _mean(values: NDArray[np.float64]) -> float:
    """Return the mean of what there is; COCO writes -1 where a class has no truth of a size."""
    there = values[values > -1]
    return float(there.mean()) if there.size else -1.0


def voc_average_precision(
    truths: NDArray[np.float64],
    detections: NDArray[np.float64],
    iou_threshold: float = 0.5,
    points: Literal[11] | None = None,
) -> dict[int, float]:
    """Return average precision as Pascal VOC's evaluation defines it, by class with a truth.

    A detection goes to the truth that it overlaps most, taken or not; difficult truths (and crowds)
    are neither asked for nor punished.

    Args:
        truths: (N, 8) rows as for `coco_evaluation`.
        detections: (M, 8) rows as for `coco_evaluation`.
        iou_threshold: 0…1, at and above which a truth is found.
        points: 11 for the years up to 2009; None, every point, from 2010 on.
    """
    found: dict[int, float] = {}
    for label in sorted({int(v) for v in truths[truths[:, _FLAG] == 0, _LABEL]}):
        own, said = truths[truths[:, _LABEL] == label], detections[detections[:, _LABEL] == label]
        said = said[np.argsort(-said[:, _SCORE], kind="stable")]
        hits = _voc_hits(own, said, iou_threshold)
        counted = hits >= 0
        true = np.cumsum(hits[counted])
        recall = true / (own[:, _FLAG] == 0).sum()
        precision = true / np.arange(1, len(true) + 1)
        found[label] = _area_below(recall, precision, points)
    return found


def _voc_hits(
    truths: NDArray[np.float64], detections: NDArray[np.float64], threshold: float
) -> NDArray[np.int64]:
    """Return 1 for hits, 0 for misses, -1 for what does not count; detections by falling score."""
    hits = np.zeros(len(detections), dtype=np.int64)
    taken = np.zeros(len(truths), dtype=np.bool_)
    images = truths[:, _IMAGE]
    rows_of = {image: np.flatnonzero(images == image) for image in np.unique(images).tolist()}
    boxes = torch.from_numpy(truths[:, _BOX])
    for number, detection in enumerate(detections):
        rows = rows_of.get(detection[_IMAGE])
        if rows is None:
            continue
        over = pairwise_iou(torch.from_numpy(detection[None, _BOX]), boxes[rows])[0].numpy()
        best = int(over.argmax())
        if over[best] < threshold:
            continue
        row = rows[best]
        hits[number] = -1 if truths[row, _FLAG] else int(not taken[row])
        taken[row] = True
    return hits


def _area_below(
    recall: NDArray[np.float64], precision: NDArray[np.float64], points: int | None
) -> float:
    """Return the area below the highest precision at each recall and beyond it."""
    best = np.maximum.accumulate(precision[::-1])[::-1] if len(precision) else precision
    if points is not None:
        at = np.searchsorted(recall, np.linspace(0, 1, points))
        return float(np.mean([best[k] if k < len(best) else 0.0 for k in at]))
    steps = np.diff(recall, prepend=0.0)
    return float((steps * best).sum())


def _silent(*_: object) -> None:
    """Print nothing."""


def _annotations(rows: NDArray[np.float64], areas: NDArray[np.float64]) -> list[dict[str, Any]]:
    """Return COCO annotations; ids and images count from 1, since 0 means none to the matcher."""
    sizes = rows[:, 6:8] - rows[:, 4:6]
    areas = np.where(areas > 0, areas, sizes.prod(axis=1))
    columns = zip(
        (rows[:, _IMAGE].astype(np.int64) + 1).tolist(),
        rows[:, _LABEL].astype(np.int64).tolist(),
        np.concatenate([rows[:, 4:6], sizes], axis=1).tolist(),
        areas.tolist(),
        rows[:, _SCORE].tolist(),
        (rows[:, _FLAG] == _CROWD).astype(np.int64).tolist(),
        strict=True,
    )
    names = ("image_id", "category_id", "bbox", "area", "score", "iscrowd")
    return [
        {"id": number, **dict(zip(names, values, strict=True))}
        for number, values in enumerate(columns, start=1)
    ]
