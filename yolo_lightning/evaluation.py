"""What detections are worth: average precision at two levels of the tree, and names."""

import math

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from yolo_lightning.batches import DetectionBatch
from yolo_lightning.boxes import pairwise_iou
from yolo_lightning.detections import Detections
from yolo_lightning.metrics import BoxAveragePrecision
from yolo_lightning.treemetrics import TreeAccuracy
from yolo_lightning.wordtree import WordTree

FOUND_SCORE, FOUND_IOU = 0.25, 0.5


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
        per_class: the newest figures by key: AP50, AP and, where there are two levels, how many
            objects were found and how many of these got their name.
        per_coarse_class: AP50 and AP at the level that boxes taught.
        along_tree_figures: accuracy by depth and the kinds of mistakes, see `TreeAccuracy`.
    """

    def __init__(self, tree: WordTree) -> None:
        super().__init__()
        self.tree = tree
        self.fine, self.coarse = BoxAveragePrecision(), BoxAveragePrecision()
        self.names, self.along_tree = NameAccuracy(len(tree)), TreeAccuracy(tree)
        self.has_depth = tree.paths.shape[1] > 1
        self.along_tree_figures: dict[str, float] = {}
        self.per_class: dict[str, dict[str, float]] = {}
        self.per_coarse_class: dict[str, dict[str, float]] = {}

    def begin(self, nodes: Tensor, boxed_ancestors: Tensor) -> None:
        """Forget everything, and learn which classes are asked for.

        Args:
            nodes: int64 (L,), the classes that images are labelled with.
            boxed_ancestors: int64 (K,), each node's deepest ancestor or self on the path to a
                label that boxes carry; -1 where none is.
        """
        for metric in (self.fine, self.coarse, self.names, self.along_tree):
            metric.reset()
        self.nodes = nodes
        own = torch.arange(len(boxed_ancestors), device=boxed_ancestors.device)
        self.coarse_of = torch.where(boxed_ancestors >= 0, boxed_ancestors, own)
        self.coarse_nodes = self.coarse_of[nodes].unique()
        self.has_levels = not torch.equal(self.coarse_nodes, nodes.sort().values)

    def update(
        self,
        batch: DetectionBatch,
        k: int,
        truth_xyxy_orig_px: Tensor,
        fine: Detections,
        coarse: Detections | None,
    ) -> None:
        """Add image k of a batch; `coarse` where there are two levels."""
        image, real = int(batch.sample_ids[k]), batch.labels[k] >= 0
        labels, difficult = batch.labels[k][real], batch.difficult[k][real]
        flags = (difficult, batch.crowd[k][real])
        _add(self.fine, image, fine, truth_xyxy_orig_px, labels, flags)
        if coarse is None or image < 0:
            return
        _add(self.coarse, image, coarse, truth_xyxy_orig_px, self.coarse_of[labels], flags)
        easy = ~difficult
        self.names.update(coarse, fine, self.coarse_of, truth_xyxy_orig_px[easy], labels[easy])

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

        ``AP50``, ``AP`` and the others of COCO's twelve numbers over all classes asked for;
        ``_boxed`` and ``_unboxed`` over those that had boxes in training and those that had not;
        ``_coarse`` at the level that boxes taught; ``name_accuracy`` of the objects found at that
        level; ``depth1`` … and the kinds of mistakes along a tree, shares of the objects found.

        Args:
            boxed: bool (K,), the classes that training boxes were labelled with.
        """
        fine = self.fine.compute()
        coarse = self.coarse.compute() if self.has_levels else {}
        named = self.names.compute() if self.has_levels else {}
        along = self.along_tree.compute() if self.has_depth else {}
        self.along_tree_figures = along if any(along.values()) else {}  # nothing was found
        for metric in (self.fine, self.coarse, self.names, self.along_tree):
            metric.reset()
        self.per_class = {self.tree.keys[node]: dict(row) for node, row in fine.items()}
        self.per_coarse_class = {self.tree.keys[node]: dict(row) for node, row in coarse.items()}
        for node, (found, right) in named.items():
            row = self.per_class.setdefault(self.tree.keys[node], {})
            row["found"], row["named"] = found, right
        groups = {
            "": fine,
            "_boxed": {node: row for node, row in fine.items() if boxed[node]},
            "_unboxed": {node: row for node, row in fine.items() if not boxed[node]},
            "_coarse": coarse,
        }
        figures: dict[str, float] = {}
        for suffix, members in groups.items():
            if not members and suffix in ("_unboxed", "_coarse"):
                continue  # the usual case of detection alone
            for measure in ("AP50", "AP"):
                # none of these classes among the images: NaN, so that who monitors it goes on
                each = [row[measure] for row in members.values()] or [math.nan]
                figures[measure + suffix] = sum(each) / len(each)
        if self.has_levels:
            found, right = (sum(pair[k] for pair in named.values()) for k in (0, 1))
            figures["name_accuracy"] = right / found if found else math.nan
        # the means are there already; COCO writes -1 where there is nothing to say
        sizes = {k: v for k, v in self.fine.figures.items() if k not in figures and v >= 0}
        return figures | sizes | self.along_tree_figures

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
        numbers = [f"{k} {v:.3f}" for k, v in self.fine.figures.items() if v >= 0]
        lines.append(f"COCO's numbers: {', '.join(numbers) or 'nothing to measure'}")
        if self.along_tree_figures:
            said = [f"{k.replace('_', ' ')} {v:.3f}" for k, v in self.along_tree_figures.items()]
            lines.append(f"of the objects found: {', '.join(said)}")
        return "\n".join(lines)


def _add(
    metric: BoxAveragePrecision,
    image: int,
    found: Detections,
    truth: Tensor,
    labels: Tensor,
    flags: tuple[Tensor, Tensor],
) -> None:
    metric.update(
        image, found.boxes_xyxy_orig_px, found.labels, found.scores, truth, labels, *flags
    )
