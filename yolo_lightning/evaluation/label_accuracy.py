"""Top-1 and top-5 accuracy of image labels, over all leaves or over the labels of a dataset."""

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from yolo_lightning.errors import InputError
from yolo_lightning.tree.wordtree import WordTree

_MAX_LOGITS = 2**21  # that are converted to probabilities at a time


class LabelAccuracy(Metric):
    """Top-1 and top-5 accuracy, in total and by class.

    The classes to choose from are all leaves. If a label of the evaluated images is an inner node,
    they are the labels instead: an image has one label, so a class X means X and none of the other
    labels below it, and its probability is P(X) minus that of the topmost other labels below X. A
    node and its only child count as one.

    Paper is silent: labels at several levels of the tree.

    Attributes:
        metrics: ``top1`` and ``top5``, 0…1, of the last `compute`; NaN without images.
        per_class: of every class with images, by key: ``name``, ``images``, ``top1``, ``top5``.
    """

    full_state_update = False
    images: Tensor
    top1: Tensor
    top5: Tensor

    def __init__(self, tree: WordTree) -> None:
        super().__init__()
        self.tree = tree
        self.metrics: dict[str, float] = {}
        self.per_class: dict[str, dict[str, Any]] = {}
        for name in ("images", "top1", "top5"):
            self.add_state(name, torch.zeros(len(tree)), dist_reduce_fx="sum")
        self.set_labels(tree.leaves)

    def set_labels(self, labels: Tensor) -> None:
        """Choose the classes for images with these labels, int64 (N,)."""
        has_inner = not torch.isin(labels, self.tree.leaves).all()
        self.nodes = labels.unique() if has_inner else self.tree.leaves  # int64 (L,), sorted
        is_class = torch.zeros(len(self.tree), dtype=torch.bool)
        is_class[self.nodes] = True
        parents = self.tree.parents[self.nodes]
        above = self.tree.deepest_ancestor_in(is_class)[parents]
        nested = (parents >= 0) & (above >= 0)
        # columns of classes below another one, and the column of the nearest one above each
        self._below = nested.nonzero().flatten()
        self._above = torch.searchsorted(self.nodes, above[nested])

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add images: class logits (B, K), labels int64 (B,); the label -1 is padding.

        Raises:
            InputError: a label is none of the classes.
        """
        logits, labels = logits[labels >= 0], labels[labels >= 0]
        unknown = labels[~torch.isin(labels, self.nodes.to(labels.device))]
        if len(unknown):
            name = self.tree.names[int(unknown[0])]
            raise InputError(
                f"an image has the label {name!r}, which is not in the evaluated dataset's list "
                "of labels, and not a leaf"
            )
        size = max(1, _MAX_LOGITS // len(self.tree))
        for part, own in zip(logits.split(size), labels.split(size), strict=True):
            probs = self.class_probs(part)
            best = probs.topk(min(5, probs.shape[1])).indices
            reported = self.tree.reported.to(best.device)
            hits = reported[self.nodes.to(best.device)[best]] == reported[own][:, None]
            self.images += torch.bincount(own, minlength=len(self.images))
            self.top1 += torch.bincount(own[hits[:, 0]], minlength=len(self.images))
            self.top5 += torch.bincount(own[hits.any(dim=1)], minlength=len(self.images))

    def class_probs(self, logits: Tensor) -> Tensor:
        """Return the probability (B, L) that each of the classes is the label of an image."""
        probs = self.tree.log_probs(logits)[:, self.nodes.to(logits.device)].exp()
        below, above = self._below.to(logits.device), self._above.to(logits.device)
        return probs.index_add(1, above, -probs[:, below])

    def compute(self) -> dict[str, float]:
        """Return `metrics`, and update `per_class`."""
        images, tree = float(self.images.sum()), self.tree
        counts = {"top1": self.top1, "top5": self.top5}
        self.metrics = {
            k: float(v.sum()) / images if images else math.nan for k, v in counts.items()
        }
        nodes = self.images.nonzero().flatten()
        rows = torch.stack([self.images, self.top1, self.top5], dim=1)[nodes].tolist()
        self.per_class = {
            tree.keys[node]: {
                "name": tree.names[node],
                "images": int(count),
                "top1": top1 / count,
                "top5": top5 / count,
            }
            for node, (count, top1, top5) in zip(nodes.tolist(), rows, strict=True)
        }
        return self.metrics
