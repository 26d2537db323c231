"""Detections in an image, and post-processing of boxes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from yolo_lightning.boxes import batched_nms, cxcywh_to_xyxy, unletterbox
from yolo_lightning.tree.wordtree import WordTree

if TYPE_CHECKING:
    import pandas as pd

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


class DetectionArrays(NamedTuple):
    """The N detections in one image as arrays, by descending score."""

    boxes_xyxy_orig_px: NDArray[np.float32]  # (N, 4)
    scores: NDArray[np.float32]  # (N,)
    labels: NDArray[np.int64]  # (N,), tree nodes
    names: NDArray[np.str_]  # (N,)


class DetectionList(list[Detection]):
    """The detections in one image as plain values, by descending score."""

    def to_numpy(self) -> DetectionArrays:
        """Return boxes, scores, labels and names as arrays, also of no detections."""
        return DetectionArrays(
            np.array([d.box_xyxy_orig_px for d in self], np.float32).reshape(-1, 4),
            np.array([d.score for d in self], np.float32),
            np.array([d.node for d in self], np.int64),
            np.array([d.name for d in self], np.str_),
        )

    def to_pandas(self) -> "pd.DataFrame":
        """Return a table with the columns name, key, score, x1, y1, x2, y2; px of the image."""
        import pandas as pd

        rows = [(d.name, d.key, d.score, *d.box_xyxy_orig_px) for d in self]
        return pd.DataFrame(rows, columns=["name", "key", "score", "x1", "y1", "x2", "y2"])

    def to_coco(
        self, image_id: int, category_ids: Mapping[str, int] | None = None
    ) -> list[dict[str, Any]]:
        """Return COCO's result dictionaries: image_id, category_id, bbox (x, y, w, h), score.

        Args:
            image_id: of the image in the annotation file.
            category_ids: by name; default: node + 1, as in the ``detections.json`` of `detect`.

        Raises:
            ValueError: a detected class is not in `category_ids`.
        """
        rows = []
        for found in self:
            if category_ids is not None and found.name not in category_ids:
                raise ValueError(f"category_ids has no {found.name!r}, which was detected")
            x1, y1, x2, y2 = found.box_xyxy_orig_px
            category_id = found.node + 1 if category_ids is None else category_ids[found.name]
            box = [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)]
            score = round(found.score, 6)
            rows.append(
                {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
            )
        return rows


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

    def to_list(self, tree: WordTree) -> DetectionList:
        """Return the detections as plain values, by descending score."""
        rows = zip(
            self.boxes_xyxy_orig_px.tolist(),
            self.labels.tolist(),
            self.scores.tolist(),
            strict=True,
        )
        return DetectionList(
            Detection((x1, y1, x2, y2), tree.names[node], score, node, tree.keys[node])
            for (x1, y1, x2, y2), node, score in rows
        )


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
