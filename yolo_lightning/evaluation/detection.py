"""What detections are worth: average precision at two levels of the tree, and names."""

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
    COCO_FIGURES,
    PADDING,
    VOC_FIGURES,
    BoxAveragePrecision,
)
from yolo_lightning.evaluation.error_analysis import collapse
from yolo_lightning.evaluation.matching import no_boxes
from yolo_lightning.evaluation.tree_accuracy import TreeAccuracy
from yolo_lightning.tree.wordtree import WordTree

FOUND_SCORE, FOUND_IOU = 0.25, 0.5
MAX_LEVELS = 4
"""Levels of a tree that average precision is computed at: each costs as much as the classes do."""
_GROUPS = {
    "_boxed": "classes with boxes",
    "_unboxed": "classes without boxes",
    "_below_boxed": "  below a class with boxes",
    "_never_boxed": "  not below one",
}


class NameAccuracy(Metric):
    """Of the objects that were found at the level which boxes taught: how many got their name.

    Args:
        num_nodes: K, nodes of the WordTree.
    """

    full_state_update = False
    found: Tensor
    right: Tensor

    def __init__(self, num_nodes: int) -> None:
        super().__init__()
        self.add_state("found", torch.zeros(num_nodes), dist_reduce_fx="sum")
        self.add_state("right", torch.zeros(num_nodes), dist_reduce_fx="sum")

    def update(
        self,
        coarse: Detections,
        fine: Detections,
        coarse_of: Tensor,
        truth_xyxy_orig_px: Tensor,
        truth_labels: Tensor,
    ) -> None:
        """Add one image.

        Args:
            coarse: detections named by what boxes taught.
            fine: detections named as specifically as asked.
            coarse_of: int64 (K,), what boxes taught about each node.
            truth_xyxy_orig_px: float (M, 4).
            truth_labels: int64 (M,).
        """
        for box, label in zip(truth_xyxy_orig_px, truth_labels.tolist(), strict=True):
            over = pairwise_iou(box[None], coarse.boxes_xyxy_orig_px)[0] >= FOUND_IOU
            same = coarse.labels == coarse_of[label]
            if not bool((over & same & (coarse.scores >= FOUND_SCORE)).any()):
                continue
            over = pairwise_iou(box[None], fine.boxes_xyxy_orig_px)[0] >= FOUND_IOU
            named = (over & (coarse_of[fine.labels] == coarse_of[label])).nonzero().flatten()
            self.found[label] += 1
            # detections stand by descending score: the first one names the object
            self.right[label] += float(len(named) > 0 and int(fine.labels[named[0]]) == label)

    def compute(self) -> dict[int, tuple[int, int]]:
        """Return ``{node: (objects found, of these named rightly)}``."""
        nodes = self.found.nonzero().flatten().tolist()
        return {node: (int(self.found[node]), int(self.right[node])) for node in nodes}


class DetectionEvaluation(nn.Module):
    """Figures over a set of images.

    Where the images are labelled more finely than training boxes were (breeds, where boxes say
    cat), the level that boxes taught is measured too.

    Along a tree of several levels, what found objects are called is compared with what they are:
    right, not specific enough, the wrong leaf of the right branch, or the wrong branch.

    Args:
        tree: the classes.

    Attributes:
        seen: bool (K,), the classes that count as had with boxes, instead of those that training
            boxes were labelled with; see `seen.seen_nodes`.
        figures: the newest means, see `compute`.
        per_class: the newest figures by key: AP50, AP, AP75, VOC's two and, where there are two
            levels, how many objects were found and how many of these got their name.
        per_coarse_class: those of the level that boxes taught.
        along_tree_figures: accuracy by depth and the kinds of mistakes, see `TreeAccuracy`.
        levels: those of the tree that average precision is asked for at, from the top: number,
            int64 (K,) what stands for each node there, int64 (L,) the classes; one that asks for
            the same classes as the next one is left out, and no more than `MAX_LEVELS` are kept.
        truths, detections: float64 (N, 8), all that `per_class` was computed from, as
            `coco_evaluation` takes them: images are sample ids, boxes in px of the original
            images. In distributed runs the first rank has those of all, the others have none.
    """

    def __init__(self, tree: WordTree) -> None:
        super().__init__()
        self.tree = tree
        self.fine, self.coarse = BoxAveragePrecision(), BoxAveragePrecision()
        self.names, self.along_tree = NameAccuracy(len(tree)), TreeAccuracy(tree)
        self.has_depth = tree.paths.shape[1] > 1
        self.at_levels = nn.ModuleList(BoxAveragePrecision() for _ in range(MAX_LEVELS))
        self.levels: list[tuple[int, Tensor, Tensor]] = []
        self.seen: Tensor | None = None
        self.figures: dict[str, float] = {}
        self.along_tree_figures: dict[str, float] = {}
        self.per_class: dict[str, dict[str, float]] = {}
        self.per_coarse_class: dict[str, dict[str, float]] = {}
        self.truths, self.detections = no_boxes(), no_boxes()
        self._counts: dict[str, int] = {}

    def begin(self, nodes: Tensor, boxed_ancestors: Tensor) -> None:
        """Forget everything, and learn which classes are asked for.

        Args:
            nodes: int64 (L,), the classes that images are labelled with.
            boxed_ancestors: int64 (K,), each node's deepest ancestor or self on the path to a
                label that boxes carry; -1 where none is.
        """
        for metric in self._metrics:
            metric.reset()
        self.nodes = nodes
        self.levels = self._levels_of(nodes)
        own = torch.arange(len(boxed_ancestors), device=boxed_ancestors.device)
        self.coarse_of = torch.where(boxed_ancestors >= 0, boxed_ancestors, own)
        self.coarse_nodes = self.coarse_of[nodes].unique()
        self.has_levels = not torch.equal(self.coarse_nodes, nodes.sort().values)

    @property
    def _metrics(self) -> list[Metric]:
        levels = [metric for metric in self.at_levels if isinstance(metric, Metric)]
        return [self.fine, self.coarse, self.names, self.along_tree, *levels]

    def _levels_of(self, nodes: Tensor) -> list[tuple[int, Tensor, Tensor]]:
        """Return the levels that ask for other classes than the next one; see `levels`."""
        every = np.arange(len(self.tree))
        found, below = [], nodes.sort().values
        for level in range(self.tree.paths.shape[1] - 1, 0, -1):
            stands_for = torch.from_numpy(collapse(self.tree, every, level)).to(nodes.device)
            asked = stands_for[nodes].unique()
            if not torch.equal(asked, below):
                found.append((level, stands_for, asked))
            below = asked
        return found[::-1][:MAX_LEVELS]

    def update(
        self,
        batch: DetectionBatch,
        truths_xyxy_orig_px: Sequence[Tensor],
        fine: Sequence[Detections],
        coarse: Sequence[Detections],
        at_levels: Sequence[Sequence[Detections]] = (),
    ) -> None:
        """Add a batch.

        Args:
            batch: the images; the sample id -1 is padding.
            truths_xyxy_orig_px: float (M, 4) of each image, without the batch's padding.
            fine: detections of each image, named by the nodes asked for.
            coarse: detections named by what boxes taught, where there are two levels.
            at_levels: detections named by the classes of each of `levels`.
        """
        targets = _targets(batch, truths_xyxy_orig_px)
        self.fine.update([_told(found) for found in fine], targets)
        for metric, (_, stands_for, _), named in zip(
            self.at_levels, self.levels, at_levels, strict=False
        ):
            above = [{**target, "labels": stands_for[target["labels"]]} for target in targets]
            metric.update([_told(found) for found in named], above)  # type: ignore[operator]
        if not coarse:
            return
        above = [{**target, "labels": self.coarse_of[target["labels"]]} for target in targets]
        self.coarse.update([_told(found) for found in coarse], above)
        for target, rough, found in zip(targets, coarse, fine, strict=True):
            if target["image_id"] != PADDING:
                easy = ~target["difficult"]
                boxes, labels = target["boxes"][easy], target["labels"][easy]
                self.names.update(rough, found, self.coarse_of, boxes, labels)

    def update_tree(
        self,
        batch: DetectionBatch,
        k: int,
        truth_xyxy_orig_px: Tensor,
        named: Detections,
        deepest: Tensor,
    ) -> None:
        """Add what the objects of image k are called; those that no box lies on have no name.

        Args:
            batch: holds the image.
            k: its place.
            truth_xyxy_orig_px: float (M, 4).
            named: one label a box, as specific as the model is sure.
            deepest: int64 (N,), the leaf at the end of each box's most probable path.
        """
        if int(batch.sample_ids[k]) < 0 or not len(named.labels):
            return
        real = batch.labels[k] >= 0
        easy = ~batch.difficult[k][real]
        labels = batch.labels[k][real][easy]
        over = pairwise_iou(truth_xyxy_orig_px[easy], named.boxes_xyxy_orig_px) >= FOUND_IOU
        found = over.any(dim=1)
        # boxes stand by descending score: the first one names the object
        first = over.int().argmax(dim=1)[found]
        self.along_tree.update(named.labels[first], deepest[first], labels[found])

    def compute(self, boxed: Tensor) -> dict[str, float]:
        """Return the means, 0…1, and keep the figures of each class.

        ``AP50``, ``AP``, the others of COCO's twelve numbers and VOC's two over all classes asked
        for; ``_boxed`` and ``_unboxed`` over those that had boxes in training and those that had
        not, of these ``_below_boxed`` over those with an ancestor that had, ``_never_boxed`` over
        the others; ``_coarse`` at the level that boxes taught; ``_level1`` and so on at `levels`;
        ``name_accuracy`` of the objects found at the level that boxes taught; ``depth1`` … and
        the kinds of mistakes along a tree, shares of the objects found. Groups without a class are
        left out, but for the first two.

        Args:
            boxed: bool (K,), the classes that training boxes were labelled with.
        """
        self.fine.compute()
        named: dict[int, tuple[int, int]] = {}
        fine, coarse = self.fine.per_class, {}
        if self.has_levels:
            self.coarse.compute()
            named, coarse = self.names.compute(), self.coarse.per_class
        along = self.along_tree.compute() if self.has_depth else {}
        self.along_tree_figures = along if any(along.values()) else {}  # nothing was found
        self.truths, self.detections = self.fine.tables
        at_levels = self._level_means()
        for metric in self._metrics:
            metric.reset()
        self.per_class = {self.tree.keys[node]: dict(row) for node, row in fine.items()}
        self.per_coarse_class = {self.tree.keys[node]: dict(row) for node, row in coarse.items()}
        for node, (found, right) in named.items():
            row = self.per_class.setdefault(self.tree.keys[node], {})
            row["found"], row["named"] = found, right
        figures = self._means(fine, boxed)
        if coarse:
            figures |= _means_of(list(coarse.values()), "_coarse")
        if self.has_levels:
            found, right = (sum(pair[k] for pair in named.values()) for k in (0, 1))
            figures["name_accuracy"] = right / found if found else math.nan
        # the means are there already; -1 stands where there is nothing to say
        others = {k: v for k, v in self.fine.figures.items() if k not in figures and v >= 0}
        self.figures = figures | at_levels | others | self.along_tree_figures
        return self.figures

    def _level_means(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        for metric, (level, _, _) in zip(self.at_levels, self.levels, strict=False):
            assert isinstance(metric, BoxAveragePrecision)
            metric.compute()
            figures |= _means_of(list(metric.per_class.values()), f"_level{level}")
        return figures

    def _means(self, fine: dict[int, dict[str, float]], boxed: Tensor) -> dict[str, float]:
        """Return AP50 and AP over all classes, and over those that had boxes and had none."""
        seen = (boxed if self.seen is None else self.seen).cpu()
        below = ~seen & (self.tree.deepest_ancestor_in(seen) >= 0)
        groups = {
            "": torch.ones_like(seen),
            "_boxed": seen,
            "_unboxed": ~seen,
            "_below_boxed": below,
            "_never_boxed": ~seen & ~below,
        }
        figures: dict[str, float] = {}
        self._counts = {}
        for suffix, members in groups.items():
            rows = [row for node, row in fine.items() if members[node]]
            if rows or suffix in ("", "_boxed"):
                self._counts[suffix] = len(rows)
                figures |= _means_of(rows, suffix)
        return figures

    def table(self) -> str:
        """Return the figures of each class as text."""
        names = dict(zip(self.tree.keys, self.tree.names, strict=True))
        keys = [*self.per_class, *self.per_coarse_class]
        width = max([12, *(len(names[key]) for key in keys)]) + 2
        head = f"{'class':<{width}}{'AP50':>8}{'AP':>8}"
        lines = [head + (f"{'found':>8}{'named':>8}" if self.has_levels else "")]
        for key, row in self.per_class.items():
            cells = [f"{row[m]:>8.3f}" if m in row else " " * 8 for m in ("AP50", "AP")]
            cells += [f"{row[m]:>8.0f}" if m in row else "" for m in ("found", "named")]
            lines.append(f"{names[key]:<{width}}" + "".join(cells))
        if self.has_levels:
            lines.append("as boxes say:")
        for key, row in self.per_coarse_class.items():
            lines.append(f"  {names[key]:<{width - 2}}{row['AP50']:>8.3f}{row['AP']:>8.3f}")
        for suffix, called in _GROUPS.items() if self._counts.get("_unboxed") else ():
            if self._counts.get(suffix):
                said = _said({m: self.figures[m + suffix] for m in ("AP50", "AP")})
                lines.append(f"{called} ({self._counts[suffix]}): {said}")
        numbers = {k: v for k, v in self.fine.figures.items() if v >= 0}
        lines.append(f"COCO's numbers: {_said(numbers, COCO_FIGURES)}")
        lines.append(f"Pascal VOC's numbers: {_said(numbers, VOC_FIGURES)}")
        if self.along_tree_figures:
            shares = {k.replace("_", " "): v for k, v in self.along_tree_figures.items()}
            lines.append(f"of the objects found: {_said(shares)}")
        return "\n".join(lines)


def _means_of(rows: Sequence[dict[str, float]], suffix: str) -> dict[str, float]:
    """Return AP50 and AP; of no rows NaN, so that whoever monitors them goes on."""
    return {
        measure + suffix: sum(row[measure] for row in rows) / len(rows) if rows else math.nan
        for measure in ("AP50", "AP")
    }


def _said(figures: Mapping[str, float], names: Sequence[str] | None = None) -> str:
    """Return figures as text, where there are any."""
    chosen = [f"{k} {v:.3f}" for k, v in figures.items() if names is None or k in names]
    return ", ".join(chosen) or "nothing to measure"


def _told(found: Detections) -> dict[str, Tensor]:
    """Return detections as `BoxAveragePrecision` takes them."""
    return {"boxes": found.boxes_xyxy_orig_px, "labels": found.labels, "scores": found.scores}


def _targets(batch: DetectionBatch, truths_xyxy_orig_px: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Return the truths of a batch as `BoxAveragePrecision` takes them."""
    images = enumerate(zip(batch.sample_ids.tolist(), truths_xyxy_orig_px, strict=True))
    return [
        {
            "image_id": image,
            "boxes": boxes,
            "labels": batch.labels[k][real],
            "difficult": batch.difficult[k][real],
            "iscrowd": batch.crowd[k][real],
            "area": batch.areas_orig_px2[k][real],
        }
        for k, (image, boxes) in images
        for real in [batch.labels[k] >= 0]
    ]
