"""Detections in an image, and post-processing of boxes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from yolo_lightning.boxes import batched_nms, cxcywh_to_xyxy, unletterbox
from yolo_lightning.tree.wordtree import WordTree

MAX_PAIRS = 8192
"""Maximum number of (box, class) pairs per image for non-maximum suppression. It bounds the memory
of untrained networks; evaluation keeps 100 detections per image."""


@dataclass(frozen=True)
class Detection:
    """One detected object as plain values."""

    box_xyxy_orig_px: tuple[float, float, float, float]
    name: str
    score: float  # objectness x P(class)
    node: int
    key: str


@dataclass
class Detections:
    """Detections in one image, by descending score."""

    boxes_xyxy_orig_px: Tensor  # float (N, 4)
    labels: Tensor  # int64 (N,), tree nodes
    scores: Tensor  # float (N,), objectness x P(label)

    def select(self, rows: Tensor) -> "Detections":
        """Return some of the detections, given as a bool mask (N,) or as indices."""
        return Detections(self.boxes_xyxy_orig_px[rows], self.labels[rows], self.scores[rows])

    def select_subtree(self, nodes: Tensor, tree: WordTree) -> "Detections":
        """Return the detections of these nodes, int64 (L,), and of nodes below them."""
        paths = tree.paths[self.labels.cpu()]
        return self.select(torch.isin(paths, nodes.cpu()).any(dim=1).to(self.labels.device))

    def to_list(self, tree: WordTree) -> list[Detection]:
        """Return the detections as plain values, by descending score."""
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


class BestPairs:
    """The (box, class) pairs of an image with a score above a threshold.

    Boxes are added a few at a time, so that scores of all boxes and classes need not fit into
    memory. At most the `MAX_PAIRS` highest scores are kept; of equal ones those added first.
    """

    def __init__(self, nodes: Tensor, threshold: float) -> None:
        self.nodes, self.threshold = nodes, threshold
        self._num_boxes = 0
        # boxes, columns of `nodes`, scores
        self._pairs = (nodes.new_empty(0), nodes.new_empty(0), nodes.new_empty(0).float())

    def add(self, objectness: Tensor, probs: Tensor) -> None:
        """Add the next boxes of the image: objectness (M,), P(class) of `nodes` (M, L)."""
        scores = objectness[:, None] * probs
        box, column = (scores > self.threshold).nonzero(as_tuple=True)
        new = (box + self._num_boxes, column, scores[box, column])
        box, column, score = (torch.cat(both) for both in zip(self._pairs, new, strict=True))
        if len(score) > MAX_PAIRS:
            best = score.argsort(descending=True, stable=True)[:MAX_PAIRS].sort().values
            box, column, score = box[best], column[best], score[best]
        self._pairs = box, column, score
        self._num_boxes += len(scores)

    def suppress(self, boxes_xyxy_orig_px: Tensor, iou_threshold: float) -> Detections:
        """Return the pairs that non-maximum suppression within each class keeps."""
        box, column, score = self._pairs
        kept = batched_nms(boxes_xyxy_orig_px[box], score, column, iou_threshold)
        return Detections(boxes_xyxy_orig_px[box[kept]], self.nodes[column[kept]], score[kept])


def to_original_px(
    boxes_cxcywh_norm: Tensor,
    size_hw_orig: tuple[int, int],
    size_hw: torch.Size,
    resize: str = "letterbox",
) -> Tensor:
    """Convert boxes (N, 4) to corners in px of the original image, clipped to it."""
    height, width = size_hw_orig
    boxes = boxes_cxcywh_norm
    if resize == "letterbox":
        boxes = unletterbox(boxes, (height, width), (size_hw[0], size_hw[1]))
    corners = cxcywh_to_xyxy(boxes) * boxes.new_tensor([width, height] * 2)
    return torch.minimum(corners.clamp(min=0), boxes.new_tensor([width, height] * 2))
