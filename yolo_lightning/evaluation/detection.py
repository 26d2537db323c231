"""Detection metrics: average precision at several levels of the tree, and label accuracy."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from yolo_lightning.batches import DetectionBatch
from yolo_lightning.boxes import pairwise_iou
from yolo_lightning.detections import Detections
from yolo_lightning.evaluation.average_precision import (
    COCO_METRICS,
    PADDING,
    VOC_METRICS,
    BoxAveragePrecision,
)
from yolo_lightning.evaluation.matching import MATCH_IOU, empty_table
from yolo_lightning.evaluation.error_analysis import collapse_to_level
from yolo_lightning.evaluation.tree_accuracy import TreeAccuracy
from yolo_lightning.tree.wordtree import WordTree

PREDICTION_SCORE_THRESHOLD = 0.25
"""Default score threshold of prediction, at which objects count as detected."""
MAX_LEVELS = 4
"""Levels of the tree with an average precision; each costs as much as that of the classes."""
_GROUPS = {
    "_boxed": "classes with boxes",
    "_unboxed": "classes without boxes",
    "_below_boxed": "  below a class with boxes",
    "_never_boxed": "  not below a class with boxes",
}


class NameAccuracy(Metric):
    """Among the objects detected under their coarse label: how many get the right fine label."""

    full_state_update = False
    detected: Tensor
    correct: Tensor

    def __init__(self, num_nodes: int) -> None:
        super().__init__()
        self.add_state("detected", torch.zeros(num_nodes), dist_reduce_fx="sum")
        self.add_state("correct", torch.zeros(num_nodes), dist_reduce_fx="sum")

    def update(
        self,
        coarse: Detections,
        fine: Detections,
        coarse_labels: Tensor,
        targets_xyxy_orig_px: Tensor,
        target_labels: Tensor,
    ) -> None:
        """Add one image: detections, the coarse label of each node (K,), and targets (M,)."""
        for box, label in zip(targets_xyxy_orig_px, target_labels.tolist(), strict=True):
            overlaps = pairwise_iou(box[None], coarse.boxes_xyxy_orig_px)[0] >= MATCH_IOU
            same = coarse.labels == coarse_labels[label]
            if not bool((overlaps & same & (coarse.scores >= PREDICTION_SCORE_THRESHOLD)).any()):
                continue
            overlaps = pairwise_iou(box[None], fine.boxes_xyxy_orig_px)[0] >= MATCH_IOU
            same = coarse_labels[fine.labels] == coarse_labels[label]
            rows = (overlaps & same).nonzero().flatten()
            self.detected[label] += 1
            # detections are sorted by descending score: the first one labels the object
            self.correct[label] += float(len(rows) > 0 and int(fine.labels[rows[0]]) == label)

    def compute(self) -> dict[int, tuple[int, int]]:
        """Return ``{node: (objects detected, of these labelled correctly)}``."""
        nodes = self.detected.nonzero().flatten().tolist()
        return {node: (int(self.detected[node]), int(self.correct[node])) for node in nodes}


class DetectionEvaluation(nn.Module):
    """Metrics of a detector over a set of images.

    Where the targets have finer labels than the training boxes (breeds, where boxes are labelled
    cat), the coarse level of the training boxes is evaluated too. In a tree with several levels,
    the labels of detected objects are compared with their targets by `TreeAccuracy`. The metrics
    and the tables `targets` and `detections` (empty on ranks > 0) are those of the last `compute`.
    """

    def __init__(self, tree: WordTree) -> None:
        super().__init__()
        self.tree = tree
        self.fine, self.coarse = BoxAveragePrecision(), BoxAveragePrecision()
        self.name_accuracy, self.tree_accuracy = NameAccuracy(len(tree)), TreeAccuracy(tree)
        self.is_hierarchical = tree.paths.shape[1] > 1
        self.by_level = nn.ModuleList(BoxAveragePrecision() for _ in range(MAX_LEVELS))
        # levels, from the top, whose classes differ from those of the next level: number, ancestor
        # of each node (K,), classes (L,)
        self.levels: list[tuple[int, Tensor, Tensor]] = []
        self.seen_classes: Tensor | None = None  # bool (K,), replaces the classes with boxes
        self.metrics: dict[str, float] = {}
        self.tree_metrics: dict[str, float] = {}
        self.per_class: dict[str, dict[str, float]] = {}
        self.per_coarse_class: dict[str, dict[str, float]] = {}
        self.targets, self.detections = empty_table(), empty_table()
        self._group_sizes: dict[str, int] = {}

    def reset(self, nodes: Tensor, boxed_ancestors: Tensor) -> None:
        """Reset all metrics and set the classes of the targets, int64 (L,).

        `boxed_ancestors`, int64 (K,), holds each node's deepest ancestor or self on the path to a
        class of the training boxes, or -1.
        """
        for metric in self._metrics:
            metric.reset()
        self.nodes = nodes
        self.levels = self._distinct_levels(nodes)
        itself = torch.arange(len(boxed_ancestors), device=boxed_ancestors.device)
        self.coarse_labels = torch.where(boxed_ancestors >= 0, boxed_ancestors, itself)
        self.coarse_nodes = self.coarse_labels[nodes].unique()
        self.has_coarse_level = not torch.equal(self.coarse_nodes, nodes.sort().values)

    @property
    def _metrics(self) -> list[Metric]:
        levels = [metric for metric in self.by_level if isinstance(metric, Metric)]
        return [self.fine, self.coarse, self.name_accuracy, self.tree_accuracy, *levels]

    def _distinct_levels(self, nodes: Tensor) -> list[tuple[int, Tensor, Tensor]]:
        all_nodes = np.arange(len(self.tree))
        levels, next_classes = [], nodes.sort().values
        for level in range(self.tree.paths.shape[1] - 1, 0, -1):
            collapsed = collapse_to_level(self.tree, all_nodes, level)
            ancestors = torch.from_numpy(collapsed).to(nodes.device)
            classes = ancestors[nodes].unique()
            if not torch.equal(classes, next_classes):
                levels.append((level, ancestors, classes))
            next_classes = classes
        return levels[::-1][:MAX_LEVELS]

    def update(
        self,
        batch: DetectionBatch,
        targets_xyxy_orig_px: Sequence[Tensor],
        fine: Sequence[Detections],
        coarse: Sequence[Detections],
        by_level: Sequence[Sequence[Detections]] = (),
    ) -> None:
        """Add a batch; the sample id -1 is padding.

        Detections of each image are `fine` under the classes of the targets, `coarse` under coarse
        labels (empty without a coarse level), and `by_level` under the classes of each of `levels`.
        """
        targets = _to_targets(batch, targets_xyxy_orig_px)
        self.fine.update([_to_preds(one) for one in fine], targets)
        for metric, (_, ancestors, _), detections in zip(
            self.by_level, self.levels, by_level, strict=False
        ):
            collapsed = [{**target, "labels": ancestors[target["labels"]]} for target in targets]
            metric.update([_to_preds(one) for one in detections], collapsed)  # type: ignore[operator]
        if not coarse:
            return
        collapsed = [{**one, "labels": self.coarse_labels[one["labels"]]} for one in targets]
        self.coarse.update([_to_preds(one) for one in coarse], collapsed)
        for target, coarse_one, fine_one in zip(targets, coarse, fine, strict=True):
            if target["image_id"] != PADDING:
                counted = ~target["difficult"]
                boxes, labels = target["boxes"][counted], target["labels"][counted]
                self.name_accuracy.update(coarse_one, fine_one, self.coarse_labels, boxes, labels)

    def update_tree_accuracy(
        self,
        batch: DetectionBatch,
        k: int,
        targets_xyxy_orig_px: Tensor,
        predicted: Detections,
        leaves: Tensor,
    ) -> None:
        """Add the detected objects of image k to the accuracy along the tree.

        `predicted` has one label per box; `leaves`, int64 (N,), ends each box's most probable path.
        """
        if int(batch.sample_ids[k]) < 0 or not len(predicted.labels):
            return
        real = batch.labels[k] >= 0
        counted = ~batch.difficult[k][real]
        labels = batch.labels[k][real][counted]
        iou = pairwise_iou(targets_xyxy_orig_px[counted], predicted.boxes_xyxy_orig_px)
        overlaps = iou >= MATCH_IOU
        detected = overlaps.any(dim=1)
        # boxes are sorted by descending score: the first one labels the object
        first = overlaps.int().argmax(dim=1)[detected]
        self.tree_accuracy.update(predicted.labels[first], leaves[first], labels[detected])

    def compute(self, boxed: Tensor) -> dict[str, float]:
        """Return the mean metrics, 0…1, and update `per_class`.

        ``AP50``, ``AP``, the other COCO metrics and the two of VOC over all classes; with the
        suffixes ``_boxed`` and ``_unboxed`` over the classes with and without training boxes, of
        the latter ``_below_boxed`` over those with an ancestor with boxes and ``_never_boxed`` over
        the others; ``_coarse`` and ``_level1`` … at those levels; ``name_accuracy``; ``depth1`` …
        and the kinds of `TreeAccuracy`. Groups without classes are left out, except the first two.
        `boxed`, bool (K,), are the classes of the training boxes.
        """
        self.fine.compute()
        name_counts: dict[int, tuple[int, int]] = {}
        fine, coarse = self.fine.per_class, {}
        if self.has_coarse_level:
            self.coarse.compute()
            name_counts, coarse = self.name_accuracy.compute(), self.coarse.per_class
        tree_metrics = self.tree_accuracy.compute() if self.is_hierarchical else {}
        self.tree_metrics = tree_metrics if any(tree_metrics.values()) else {}  # no detections
        self.targets, self.detections = self.fine.tables
        level_means = self._level_means()
        for metric in self._metrics:
            metric.reset()
        self.per_class = {self.tree.keys[node]: dict(row) for node, row in fine.items()}
        self.per_coarse_class = {self.tree.keys[node]: dict(row) for node, row in coarse.items()}
        for node, (detected, correct) in name_counts.items():
            row = self.per_class.setdefault(self.tree.keys[node], {})
            row["detected"], row["correct"] = detected, correct
        metrics = self._group_means(fine, boxed)
        if coarse:
            metrics |= _means(list(coarse.values()), "_coarse")
        if self.has_coarse_level:
            detected, correct = (sum(pair[k] for pair in name_counts.values()) for k in (0, 1))
            metrics["name_accuracy"] = correct / detected if detected else math.nan
        # without the means above, and without -1, which means undefined
        others = {k: v for k, v in self.fine.results.items() if k not in metrics and v >= 0}
        self.metrics = metrics | level_means | others | self.tree_metrics
        return self.metrics

    def _level_means(self) -> dict[str, float]:
        means: dict[str, float] = {}
        for metric, (level, _, _) in zip(self.by_level, self.levels, strict=False):
            assert isinstance(metric, BoxAveragePrecision)
            metric.compute()
            means |= _means(list(metric.per_class.values()), f"_level{level}")
        return means

    def _group_means(self, fine: dict[int, dict[str, float]], boxed: Tensor) -> dict[str, float]:
        seen = (boxed if self.seen_classes is None else self.seen_classes).cpu()
        below = ~seen & (self.tree.deepest_ancestor_in(seen) >= 0)
        groups = {
            "": torch.ones_like(seen),
            "_boxed": seen,
            "_unboxed": ~seen,
            "_below_boxed": below,
            "_never_boxed": ~seen & ~below,
        }
        means: dict[str, float] = {}
        self._group_sizes = {}
        for suffix, members in groups.items():
            rows = [row for node, row in fine.items() if members[node]]
            if rows or suffix in ("", "_boxed"):
                self._group_sizes[suffix] = len(rows)
                means |= _means(rows, suffix)
        return means

    def table(self) -> str:
        """Return the metrics of each class, and the means, as text."""
        names = dict(zip(self.tree.keys, self.tree.names, strict=True))
        keys = [*self.per_class, *self.per_coarse_class]
        width = max([12, *(len(names[key]) for key in keys)]) + 2
        header = f"{'class':<{width}}{'AP50':>8}{'AP':>8}"
        lines = [header + (f"{'detected':>10}{'correct':>10}" if self.has_coarse_level else "")]
        for key, row in self.per_class.items():
            cells = [f"{row[m]:>8.3f}" if m in row else " " * 8 for m in ("AP50", "AP")]
            cells += [f"{row[m]:>10.0f}" if m in row else "" for m in ("detected", "correct")]
            lines.append(f"{names[key]:<{width}}" + "".join(cells))
        if self.has_coarse_level:
            lines.append("at the level of the training boxes:")
        for key, row in self.per_coarse_class.items():
            lines.append(f"  {names[key]:<{width - 2}}{row['AP50']:>8.3f}{row['AP']:>8.3f}")
        for suffix, title in _GROUPS.items() if self._group_sizes.get("_unboxed") else ():
            if self._group_sizes.get(suffix):
                values = _format({m: self.metrics[m + suffix] for m in ("AP50", "AP")})
                lines.append(f"{title} ({self._group_sizes[suffix]}): {values}")
        results = {k: v for k, v in self.fine.results.items() if v >= 0}
        lines.append(f"COCO metrics: {_format(results, COCO_METRICS)}")
        lines.append(f"Pascal VOC metrics: {_format(results, VOC_METRICS)}")
        if self.tree_metrics:
            shares = {k.replace("_", " "): v for k, v in self.tree_metrics.items()}
            lines.append(f"of the detected objects: {_format(shares)}")
        return "\n".join(lines)


def _means(rows: Sequence[dict[str, float]], suffix: str) -> dict[str, float]:
    """Return AP50 and AP; NaN without rows, so that a callback can still monitor them."""
    return {
        metric + suffix: sum(row[metric] for row in rows) / len(rows) if rows else math.nan
        for metric in ("AP50", "AP")
    }


def _format(metrics: Mapping[str, float], names: Sequence[str] | None = None) -> str:
    values = [f"{k} {v:.3f}" for k, v in metrics.items() if names is None or k in names]
    return ", ".join(values) or "none, no targets"


def _to_preds(detections: Detections) -> dict[str, Tensor]:
    return {
        "boxes": detections.boxes_xyxy_orig_px,
        "labels": detections.labels,
        "scores": detections.scores,
    }


def _to_targets(
    batch: DetectionBatch, targets_xyxy_orig_px: Sequence[Tensor]
) -> list[dict[str, Any]]:
    images = enumerate(zip(batch.sample_ids.tolist(), targets_xyxy_orig_px, strict=True))
    return [
        {
            "image_id": image_id,
            "boxes": boxes,
            "labels": batch.labels[k][real],
            "difficult": batch.difficult[k][real],
            "iscrowd": batch.crowd[k][real],
            "area": batch.areas_orig_px2[k][real],
        }
        for k, (image_id, boxes) in images
        for real in [batch.labels[k] >= 0]
    ]
