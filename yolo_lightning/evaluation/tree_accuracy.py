"""Accuracy along the tree: by depth, and by kind of error."""

import torch
from torch import Tensor
from torchmetrics import Metric

from yolo_lightning.tree.wordtree import WordTree

KINDS = ("right", "not_specific_enough", "wrong_leaf", "wrong_branch")


class TreeAccuracy(Metric):
    """Accuracy by depth, and predictions by kind.

    `right`: the label or below it; `not_specific_enough`: an ancestor of the label; `wrong_leaf`:
    elsewhere below the label's parent; `wrong_branch`: otherwise. Nodes that cannot be told from
    their parents count as these, see `WordTree.reported`.
    """

    full_state_update = False
    kind_counts: Tensor
    correct: Tensor
    total: Tensor

    def __init__(self, tree: WordTree) -> None:
        super().__init__()
        self.tree = tree
        levels = tree.paths.shape[1]
        self.add_state("kind_counts", torch.zeros(len(KINDS)), dist_reduce_fx="sum")
        self.add_state("correct", torch.zeros(levels), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(levels), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, leaves: Tensor, labels: Tensor) -> None:
        """Add images or objects, int64 (B,) each, on any device; the label -1 is padding.

        `leaves` are at the end of the most probable path, and determine the accuracy by depth.
        """
        real = labels >= 0
        paths = self.tree.paths.to(labels.device)
        reported = self.tree.reported.to(labels.device)
        predicted, leaves, labels = (reported[nodes[real]] for nodes in (predicted, leaves, labels))
        parents = self.tree.parents.to(labels.device)[labels]
        path = paths[predicted]
        at_or_below = (path == labels[:, None]).any(dim=1)
        above = (paths[labels] == predicted[:, None]).any(dim=1) & ~at_or_below
        below_parent = ((path == parents[:, None]) & (parents >= 0)[:, None]).any(dim=1)
        below_parent |= (parents < 0) & (self.tree.parents.to(labels.device)[predicted] < 0)
        kind = torch.where(below_parent, 2, 3)
        kind = torch.where(above, 1, torch.where(at_or_below, 0, kind))
        true_path, predicted_path = _from_root(paths[labels]), _from_root(paths[leaves])
        for state, counts in (
            (self.kind_counts, torch.bincount(kind, minlength=len(KINDS))),
            (self.total, (true_path >= 0).sum(dim=0)),
            (self.correct, ((true_path >= 0) & (true_path == predicted_path)).sum(dim=0)),
        ):
            state += counts.to(state.device, non_blocking=True)

    def compute(self) -> dict[str, float]:
        """Return shares, 0…1: ``depth1`` (the top), ``depth2`` …, and the four kinds."""
        by_depth = {
            f"depth{level}": correct / total
            for level, (correct, total) in enumerate(
                zip(self.correct.tolist(), self.total.tolist(), strict=True), start=1
            )
            if total
        }
        count = max(1.0, float(self.kind_counts.sum()))
        return by_depth | {
            kind: value / count
            for kind, value in zip(KINDS, self.kind_counts.tolist(), strict=True)
        }

    def metric_names(self) -> list[str]:
        """Return the names of the shares; which depths `compute` returns depends on the labels."""
        return [*(f"depth{level}" for level in range(1, len(self.total) + 1)), *KINDS]


def _from_root(paths: Tensor) -> Tensor:
    """Reverse paths (B, D) from node to root, padded with -1 at the end."""
    lengths = (paths >= 0).sum(dim=1, keepdim=True)
    position = torch.arange(paths.shape[1], device=paths.device)[None]
    reversed_paths = paths.gather(1, (lengths - 1 - position).clamp(min=0))
    return torch.where(position < lengths, reversed_paths, -1)
