"""How far down a tree predictions are right, and in which way they are wrong."""

import torch
from torch import Tensor
from torchmetrics import Metric

from yolo_lightning.tree.wordtree import WordTree

KINDS = ("right", "not_specific_enough", "wrong_leaf", "wrong_branch")


class TreeAccuracy(Metric):
    """Accuracy by depth, and mistakes told apart.

    A prediction is `right` where it is the label or lies below it; `not_specific_enough` where it
    is an ancestor of the label; `wrong_leaf` where it lies below the label's parent, beside the
    label; `wrong_branch` elsewhere.

    Args:
        tree: the classes.
    """

    full_state_update = False
    kinds: Tensor
    right_at: Tensor
    seen_at: Tensor

    def __init__(self, tree: WordTree) -> None:
        super().__init__()
        self.tree = tree
        levels = tree.paths.shape[1]
        self.add_state("kinds", torch.zeros(len(KINDS)), dist_reduce_fx="sum")
        self.add_state("right_at", torch.zeros(levels), dist_reduce_fx="sum")
        self.add_state("seen_at", torch.zeros(levels), dist_reduce_fx="sum")

    def update(self, named: Tensor, deepest: Tensor, labels: Tensor) -> None:
        """Add images.

        Args:
            named: int64 (B,), the node that each is named by, as specific as the model is sure.
            deepest: int64 (B,), the leaf at the end of the most probable path.
            labels: int64 (B,), tree nodes; -1 for padding, which counts for nothing.
        """
        real = labels >= 0
        paths = self.tree.paths.to(labels.device)
        named, deepest, labels = named[real], deepest[real], labels[real]
        parents = self.tree.parents.to(labels.device)[labels]
        path = paths[named]
        below_label = (path == labels[:, None]).any(dim=1)
        above_label = (paths[labels] == named[:, None]).any(dim=1) & ~below_label
        beside = ((path == parents[:, None]) & (parents >= 0)[:, None]).any(dim=1)
        beside |= (parents < 0) & (self.tree.parents.to(labels.device)[named] < 0)
        kind = torch.where(beside, 2, 3)
        kind = torch.where(above_label, 1, torch.where(below_label, 0, kind))
        self.kinds += torch.bincount(kind, minlength=len(KINDS))
        truth, guess = _from_the_top(paths[labels]), _from_the_top(paths[deepest])
        self.seen_at += (truth >= 0).sum(dim=0)
        self.right_at += ((truth >= 0) & (truth == guess)).sum(dim=0)

    def compute(self) -> dict[str, float]:
        """Return shares, 0…1: ``depth1`` (the top), ``depth2`` …, and the four kinds."""
        figures = {
            f"depth{level}": right / seen
            for level, (right, seen) in enumerate(
                zip(self.right_at.tolist(), self.seen_at.tolist(), strict=True), start=1
            )
            if seen
        }
        total = max(1.0, float(self.kinds.sum()))
        return figures | {
            name: count / total for name, count in zip(KINDS, self.kinds.tolist(), strict=True)
        }


def _from_the_top(paths: Tensor) -> Tensor:
    """Return paths (B, D) that begin with a node as paths that begin at the top, -1 behind."""
    lengths = (paths >= 0).sum(dim=1, keepdim=True)
    place = torch.arange(paths.shape[1], device=paths.device)[None]
    turned = paths.gather(1, (lengths - 1 - place).clamp(min=0))
    return torch.where(place < lengths, turned, -1)
