"""Detection metrics: average precision at several levels of the tree, and label accuracy."""

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import Metric

from yolo_lightning.batches import DetectionBatch
from yolo_lightning.boxes import pairwise_iou
from yolo_lightning.detections import Detections
from yolo_lightning.evaluation.average_precision import PADDING, BoxAveragePrecision
from yolo_lightning.evaluation.coco import COCO_METRICS
from yolo_lightning.evaluation.error_analysis import collapse_to_level
from yolo_lightning.evaluation.matching import MATCH_IOU, empty_table
from yolo_lightning.evaluation.tree_accuracy import TreeAccuracy
from yolo_lightning.evaluation.voc import VOC_METRICS
from yolo_lightning.tree.exclusive import ExclusiveNames, Parts, exclusive_parts
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
    """Among the objects detected under their coarse label: how many get the right fine label.

    A node and its only child count as one.
    """

    full_state_update = False
    detected: Tensor
    correct: Tensor

    def __init__(self, tree: WordTree) -> None:
        super().__init__()
        self.tree = tree
        self.add_state("detected", torch.zeros(len(tree)), dist_reduce_fx="sum")
        self.add_state("correct", torch.zeros(len(tree)), dist_reduce_fx="sum")

    def update(
        self,
        images: Sequence[tuple[Detections, Detections, Tensor, Tensor]],
        coarse_labels: Tensor,
    ) -> None:
        """Add images: coarse and fine detections, and boxes and labels of the targets, on the host.

        `coarse_labels`, int64 (K,), are those of all nodes.
        """
        labels = [[torch.zeros(0, dtype=torch.long)] for _ in range(2)]
        for coarse, fine, boxes_xyxy_orig_px, target_labels in images:
            expected = coarse_labels[target_labels][:, None]
            is_valid = (coarse.labels == expected) & (coarse.scores >= PREDICTION_SCORE_THRESHOLD)
            detected = _first_overlapping(boxes_xyxy_orig_px, coarse, is_valid) >= 0
            is_valid = coarse_labels[fine.labels] == expected
            first = _first_overlapping(boxes_xyxy_orig_px, fine, is_valid)
            reported = self.tree.reported
            fine_labels = functional.pad(reported[fine.labels], (0, 1), value=-1)[first]
            labels[0].append(target_labels[detected])
            labels[1].append(target_labels[detected & (fine_labels == reported[target_labels])])
        for state, found in zip((self.detected, self.correct), labels, strict=True):
            counts = torch.cat(found).bincount(minlength=len(state))
            state += counts.to(state.device, non_blocking=True)

    def compute(self) -> dict[int, tuple[int, int]]:
        """Return ``{node: (objects detected, of these labelled correctly)}``."""
        nodes = self.detected.nonzero().flatten().tolist()
        return {node: (int(self.detected[node]), int(self.correct[node])) for node in nodes}


@dataclass
class Level:
    """Classes of the tree under which detections are evaluated."""

    suffix: str  # of the names of its metrics, empty for the classes of the targets
    nodes: Tensor  # int64 (L,), the classes
    labels: Tensor  # int64 (K,), the label at this level of each node
    precision: BoxAveragePrecision = field(default_factory=BoxAveragePrecision)
    # by source, the classes whose probability is that of some nodes below: c columns of `nodes`;
    # for each of these nodes the position of its class among the c, and the node; int64, on the
    # device of the model
    parts: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def class_probs(self, probs: Tensor, sources: Tensor) -> Tensor:
        """Return P(class), (M, L), of P(node), (M, K), in images of these sources, int64 (M,).

        Where names exclude each other, a class does not include other classes below it. Sources
        are on the host; the device is not waited for.
        """
        of_classes = probs.index_select(1, self.nodes.to(probs.device, non_blocking=True))
        for source, (columns, position, nodes) in self.parts.items():
            is_source = sources == source
            if is_source.any():
                sums = probs.new_zeros(len(probs), len(columns))
                sums.index_add_(1, position, probs.index_select(1, nodes))
                is_source = is_source.to(probs.device, non_blocking=True)[:, None]
                others = of_classes.index_select(1, columns)
                of_classes.index_copy_(1, columns, torch.where(is_source, sums, others))
        return of_classes


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
        self.fine = BoxAveragePrecision()
        self.name_accuracy, self.tree_accuracy = NameAccuracy(tree), TreeAccuracy(tree)
        self.is_hierarchical = tree.paths.shape[1] > 1
        # the classes of the targets, the coarse level if it differs, and then those of the tree
        self.levels: list[Level] = []
        self.coarse: Level | None = None
        self.exclusive_names: ExclusiveNames | None = None
        self.seen_classes: Tensor | None = None  # bool (K,), replaces the classes with boxes
        self.metrics: dict[str, float] = {}
        self.tree_metrics: dict[str, float] = {}
        self.per_class: dict[str, dict[str, float]] = {}
        self.per_coarse_class: dict[str, dict[str, float]] = {}
        self.targets, self.detections = empty_table(), empty_table()
        self._group_sizes: dict[str, int] = {}

    def reset(
        self,
        nodes: Tensor,
        boxed_ancestors: Tensor,
        exclusive_names: ExclusiveNames | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Reset all metrics and set the classes of the targets, int64 (L,).

        `boxed_ancestors`, int64 (K,), holds each node's deepest ancestor or self on the path to a
        class of the training boxes, or -1. `exclusive_names` are those of the targets' sources, on
        the host; `device` is that of the model.
        """
        nodes, boxed_ancestors = nodes.cpu(), boxed_ancestors.cpu()
        itself = torch.arange(len(boxed_ancestors))
        coarse_labels = torch.where(boxed_ancestors >= 0, boxed_ancestors, itself)
        coarse = Level("_coarse", coarse_labels[nodes].unique(), coarse_labels)
        self.coarse = None if torch.equal(coarse.nodes, nodes.sort().values) else coarse
        self.levels = [Level("", nodes, itself, self.fine)]
        self.levels += [coarse] if self.coarse else []
        self.levels += self._distinct_levels(nodes)
        self.exclusive_names = exclusive_names
        labels_by_source = exclusive_names.nodes if exclusive_names else []
        for level in self.levels:
            # at the coarse level, which asks whether an object is found at all under a more
            # general name, a class includes those below it
            if level is not self.coarse:
                for source, labels in enumerate(labels_by_source):
                    if parts := self._parts(level, labels):
                        tables = (list(parts), *_flatten([*parts.values()]))
                        columns, position, part = (torch.tensor(x, device=device) for x in tables)
                        level.parts[source] = columns, position, part
        self._reset_metrics()

    def source_numbers(self, sample_ids: Tensor) -> Tensor:
        """Return int64 (B,), the number of the source of each image."""
        if self.exclusive_names is None:
            return torch.zeros_like(sample_ids)
        return self.exclusive_names.source_numbers(sample_ids)

    def class_probs(self, probs: Tensor, sources: Tensor) -> Tensor:
        """Return those of `Level.class_probs`, of all levels in sequence."""
        return torch.cat([level.class_probs(probs, sources) for level in self.levels], dim=1)

    def _parts(self, level: Level, labels: Sequence[int]) -> Parts:
        """Return the parts of a level's classes in a source whose `labels` exclude each other.

        They are given by column. A class above or below another one has the parts of all labels
        that it stands for.
        """
        column = {node: k for k, node in enumerate(level.nodes.tolist())}
        at_level = level.labels[list(labels)].tolist()
        above = set(exclusive_parts(self.tree, at_level))
        nested = {node for node in at_level if not above.isdisjoint(self.tree.paths[node].tolist())}
        parts_of_labels = exclusive_parts(self.tree, labels)
        parts: Parts = defaultdict(list)
        for label, node in zip(labels, at_level, strict=True):
            if node in nested and node in column:
                parts[column[node]] += parts_of_labels.get(label) or [label]
        return parts

    def _reset_metrics(self) -> None:
        metrics: list[Metric] = [level.precision for level in self.levels]
        for metric in (*metrics, self.name_accuracy, self.tree_accuracy):
            metric.reset()

    def _distinct_levels(self, nodes: Tensor) -> list[Level]:
        """Return the levels, from the top, whose classes differ from those of the next level."""
        all_nodes = np.arange(len(self.tree))
        levels, next_classes = [], nodes.sort().values
        for level in range(self.tree.paths.shape[1] - 1, 0, -1):
            collapsed = collapse_to_level(self.tree, all_nodes, level)
            ancestors = torch.from_numpy(collapsed)
            classes = ancestors[nodes].unique()
            if not torch.equal(classes, next_classes):
                levels.append(Level(f"_level{level}", classes, ancestors))
            next_classes = classes
        return levels[::-1][:MAX_LEVELS]

    def update(
        self,
        batch: DetectionBatch,
        targets_xyxy_orig_px: Sequence[Tensor],
        detections: Sequence[Sequence[Detections]],
        most_specific: Sequence[tuple[Detections, Tensor]] = (),
    ) -> None:
        """Add a batch with its targets on the host; the sample id -1 is padding.

        `detections` are, for each of `levels`, those of each image under the classes of the level.
        `most_specific` are, for each image, detections with one label per box, and the end of each
        box's most probable path, int64 (N,); they are needed only in a tree with several levels.
        """
        targets = _to_targets(batch, targets_xyxy_orig_px)
        for level, of_images in zip(self.levels, detections, strict=True):
            preds = [
                {"boxes": one.boxes_xyxy_orig_px, "labels": one.labels, "scores": one.scores}
                for one in of_images
            ]
            at_level = [{**one, "labels": level.labels[one["labels"]]} for one in targets]
            level.precision.update(preds, at_level)
        named: list[tuple[Detections, Detections, Tensor, Tensor]] = []
        on_paths: list[tuple[Tensor, Tensor, Tensor]] = []
        for k, target in enumerate(targets):
            if target["image_id"] == PADDING:
                continue
            counted = ~target["difficult"]
            boxes, labels = target["boxes"][counted], target["labels"][counted]
            if self.coarse:
                named.append((detections[1][k], detections[0][k], boxes, labels))
            if most_specific:
                predicted, leaves = most_specific[k]
                first = _first_overlapping(boxes, predicted)
                labels, first = labels[first >= 0], first[first >= 0]
                on_paths.append((predicted.labels[first], leaves[first], labels))
        if self.coarse:
            self.name_accuracy.update(named, self.coarse.labels)
        if on_paths:
            self.tree_accuracy.update(*map(torch.cat, zip(*on_paths, strict=True)))

    def compute(self, boxed: Tensor) -> dict[str, float]:
        """Return the mean metrics, 0…1, and update `per_class`.

        ``AP50``, ``AP``, the other COCO metrics and the two of VOC over all classes; with the
        suffixes ``_boxed`` and ``_unboxed`` over the classes with and without training boxes, of
        the latter ``_below_boxed`` over those with an ancestor with boxes and ``_never_boxed`` over
        the others; ``_coarse`` and ``_level1`` … at those levels; ``name_accuracy``; ``depth1`` …
        and the kinds of `TreeAccuracy`. Groups without classes are left out, except the first two.
        `boxed`, bool (K,), are the classes of the training boxes; if there are none, they are
        unknown, and all groups by training boxes are left out.
        """
        for level in self.levels:
            level.precision.compute()
        name_counts = self.name_accuracy.compute() if self.coarse else {}
        tree_metrics = self.tree_accuracy.compute() if self.is_hierarchical else {}
        self.tree_metrics = tree_metrics if any(tree_metrics.values()) else {}  # no detections
        self._reset_metrics()
        self.targets, self.detections = self.fine.tables
        keys, coarse = self.tree.keys, self.coarse.precision.per_class if self.coarse else {}
        self.per_class = {keys[node]: dict(row) for node, row in self.fine.per_class.items()}
        self.per_coarse_class = {keys[node]: dict(row) for node, row in coarse.items()}
        for node, (detected, correct) in name_counts.items():
            self.per_class.setdefault(keys[node], {}).update(detected=detected, correct=correct)
        metrics = self._group_means(self.fine.per_class, boxed)
        for level in self.levels[1:]:
            metrics |= _means(level.precision.per_class.values(), level.suffix)
        if self.coarse:
            detected, correct = (sum(pair[k] for pair in name_counts.values()) for k in (0, 1))
            metrics["name_accuracy"] = correct / detected if detected else math.nan
        # without the means above, and without -1, which means undefined
        others = {k: v for k, v in self.fine.results.items() if k not in metrics and v >= 0}
        self.metrics = metrics | others | self.tree_metrics
        return self.metrics

    def metric_names(self) -> list[str]:
        """Return the names of the metrics; which of them `compute` returns depends on the data."""
        names = ["AP50", "AP", *COCO_METRICS, *VOC_METRICS]
        levels = range(1, self.tree.paths.shape[1])  # a flat tree has none below the first
        suffixes = [*_GROUPS, "_coarse", *(f"_level{level}" for level in levels)]
        names += [f"{metric}{suffix}" for suffix in suffixes for metric in ("AP50", "AP")]
        names += ["name_accuracy", *self.tree_accuracy.metric_names()] if levels else []
        return list(dict.fromkeys(names))

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
        if not seen.any():
            groups = {"": groups[""]}
        means: dict[str, float] = {}
        self._group_sizes = {}
        for suffix, members in groups.items():
            rows = [row for node, row in fine.items() if members[node]]
            if rows or suffix in ("", "_boxed"):
                self._group_sizes[suffix] = len(rows)
                means |= _means(rows, suffix)
        return means

    def table(self) -> str:
        """Return the metrics of each class, and the means of groups of them, as text."""
        names = dict(zip(self.tree.keys, self.tree.names, strict=True))
        keys = [*self.per_class, *self.per_coarse_class]
        width = max([12, *(len(names[key]) for key in keys)]) + 2
        counts = ("detected", "correct") if self.coarse else ()
        lines = [f"{'class':<{width}}{'AP50':>8}{'AP':>8}" + "".join(f"{c:>10}" for c in counts)]

        def line(name: str, row: Mapping[str, float]) -> str:
            # a class that has only crowds has no average precision
            cells = [f"{row[m]:>8.3f}" if m in row else " " * 8 for m in ("AP50", "AP")]
            cells += [f"{row[m]:>10.0f}" for m in counts if m in row]
            return f"{name:<{width}}" + "".join(cells)

        lines += [line(names[key], row) for key, row in self.per_class.items()]
        if self.coarse:
            lines.append("at the level of the training boxes:")
        lines += [line(f"  {names[key]}", row) for key, row in self.per_coarse_class.items()]
        for suffix, title in _GROUPS.items() if self._group_sizes.get("_unboxed") else ():
            if self._group_sizes.get(suffix):
                values = _format({m: self.metrics[m + suffix] for m in ("AP50", "AP")})
                lines.append(f"{title} ({self._group_sizes[suffix]}): {values}")
        if self.tree_metrics:
            shares = {k.replace("_", " "): v for k, v in self.tree_metrics.items()}
            lines.append(f"of the detected objects: {_format(shares)}")
        return "\n".join(lines)


def _flatten(lists: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Return the number of each element's list, and the elements."""
    pairs = [(number, element) for number, elements in enumerate(lists) for element in elements]
    return [number for number, _ in pairs], [element for _, element in pairs]


def _first_overlapping(
    targets_xyxy_px: Tensor, detections: Detections, is_valid: Tensor | None = None
) -> Tensor:
    """Return the highest-scoring detection that overlaps each target (M,), or -1.

    `is_valid`, bool (M, N), are the detections that count for each target.
    """
    overlaps = pairwise_iou(targets_xyxy_px, detections.boxes_xyxy_orig_px) >= MATCH_IOU
    if is_valid is not None:
        overlaps &= is_valid
    # detections are sorted by descending score; a last column of True stands for none
    first = functional.pad(overlaps.int(), (0, 1), value=1).argmax(dim=1)
    return torch.where(first < len(detections.labels), first, -1)


def _means(rows: Collection[dict[str, float]], suffix: str) -> dict[str, float]:
    """Return AP50 and AP; NaN without rows, so that a callback can still monitor them."""
    return {
        metric + suffix: sum(row[metric] for row in rows) / len(rows) if rows else math.nan
        for metric in ("AP50", "AP")
    }


def _format(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())


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
