"""What is found in an image."""

from dataclasses import dataclass

import torch
from torch import Tensor

from yolo_lightning.tree.wordtree import WordTree


@dataclass(frozen=True)
class Detection:
    """One object, as it is told to people and files.

    Attributes:
        box_xyxy_orig_px: corners, px of the original image.
        name: of its class, as specific as the model is sure.
        score: 0…1, objectness x P(class).
        node: of the tree.
        key: of that node.
    """

    box_xyxy_orig_px: tuple[float, float, float, float]
    name: str
    score: float
    node: int
    key: str


@dataclass
class Detections:
    """What was found in one image.

    Attributes:
        boxes_xyxy_orig_px: float (N, 4), px of the original image.
        labels: int64 (N,), tree nodes.
        scores: float (N,), objectness x P(label), descending.
    """

    boxes_xyxy_orig_px: Tensor
    labels: Tensor
    scores: Tensor

    def chosen(self, rows: Tensor) -> "Detections":
        """Return some of them.

        Args:
            rows: bool (N,), or their numbers.
        """
        return Detections(self.boxes_xyxy_orig_px[rows], self.labels[rows], self.scores[rows])

    def below(self, nodes: Tensor, tree: WordTree) -> "Detections":
        """Return those labelled with one of these nodes, int64 (L,), or something below one."""
        paths = tree.paths[self.labels.cpu()]
        return self.chosen(torch.isin(paths, nodes.cpu()).any(dim=1).to(self.labels.device))

    def told(self, tree: WordTree) -> list[Detection]:
        """Return each with its name, best first."""
        rows = zip(
            self.boxes_xyxy_orig_px.tolist(),
            self.labels.tolist(),
            self.scores.tolist(),
            strict=True,
        )
        return [
            Detection((x1, y1, x2, y2), tree.names[node], score, node, tree.keys[node])
            for (x1, y1, x2, y2), node, score in rows
        ]
