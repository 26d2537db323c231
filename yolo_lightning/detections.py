"""Detections in an image, and post-processing of boxes."""

from collections.abc import Mapping, Sequence
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
"""Maximum number of (box, class) pairs per image for non-maximum suppression. It bounds time and
memory for untrained networks; evaluation keeps 100 detections per image."""


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
    """Detections in one image, by descending score; those of a model are on the host."""

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


def to_host(scores: Tensor, *indices: Tensor) -> list[Tensor]:
    """Return scores, float32 (N,), and indices below 2**31, int64 (N,); waits for the device once.

    They are copied together, bit by bit.
    """
    if scores.device.type == "cpu":
        return [scores, *indices]
    bits = torch.stack([scores.view(torch.int32), *(index.int() for index in indices)]).cpu()
    return [bits[0].view(torch.float32), *(index.long() for index in bits[1:])]


class BestPairs:
    """The (box, class) pairs of a batch with a score above a threshold, on the host.

    Classes may be those of several levels, which are independent of each other. Boxes are added a
    few at a time, so that scores of all boxes and classes need not fit into memory. Of each image
    and level, at most the `MAX_PAIRS` highest scores are kept; of equal ones those added first.

    Suppression on the host needs one copy of a few numbers a pair, where a device would be waited
    for in each of its rounds; and results do not depend on the device.

    Args:
        image: int64 (M,), the image of each box.
        num_images: B.
        levels: the nodes of each level, int64 (L,).
        threshold: the minimum score.
    """

    def __init__(
        self, image: Tensor, num_images: int, levels: Sequence[Tensor], threshold: float
    ) -> None:
        self._image, self._num_images, self._threshold = image, num_images, threshold
        self._nodes, self._num_levels = torch.cat([*levels]), len(levels)
        lengths = torch.tensor([len(nodes) for nodes in levels])
        self._level = torch.arange(len(levels)).repeat_interleave(lengths)  # of each column
        # pairs are box x columns + column
        self._pairs, self._scores = image.new_empty(0), torch.empty(0)

    def add(self, first_box: int, objectness: Tensor, probs: Tensor) -> None:
        """Add the next boxes; waits for the device twice.

        Objectness is (m,), on the host; probs (m, L) are of the classes of all levels in sequence,
        float32 on the device.
        """
        scores = objectness.to(probs.device, non_blocking=True)[:, None] * probs
        index = (scores > self._threshold).flatten().nonzero().flatten()
        scores, index = to_host(scores.flatten().index_select(0, index), index)
        pairs = index + first_box * len(self._nodes)
        self._pairs = torch.cat([self._pairs, pairs])
        self._scores = torch.cat([self._scores, scores])
        if len(self._pairs) > MAX_PAIRS:
            best = self._best_of_groups()
            self._pairs, self._scores = self._pairs[best], self._scores[best]

    def _best_of_groups(self) -> Tensor:
        """Return the indices of the `MAX_PAIRS` highest scores of each group, ascending."""
        order = self._scores.argsort(descending=True, stable=True)
        groups, by_group = self._groups()[order].sort(stable=True)
        counts = groups.bincount()
        rank = torch.arange(len(groups)) - (counts.cumsum(0) - counts)[groups]
        best: Tensor = order[by_group[rank < MAX_PAIRS]].sort().values
        return best

    def _groups(self) -> Tensor:
        """Return a number for each pair, that of its level and image."""
        box, column = self._pairs // len(self._nodes), self._pairs % len(self._nodes)
        return self._level[column] * self._num_images + self._image[box]

    def suppress(self, boxes_xyxy_orig_px: Tensor, iou_threshold: float) -> list[list[Detections]]:
        """Return the pairs that non-maximum suppression within each class and image keeps.

        They are those of each image, for each level; boxes are (M, 4).
        """
        box, column = self._pairs // len(self._nodes), self._pairs % len(self._nodes)
        classes = self._image[box] * len(self._nodes) + column
        kept = batched_nms(boxes_xyxy_orig_px[box], self._scores, classes, iou_threshold)
        found = Detections(boxes_xyxy_orig_px[box], self._nodes[column], self._scores)
        count = self._num_levels * self._num_images
        parts = [part for part, _ in split_kept(found, kept, self._groups(), count)]
        size = self._num_images
        return [parts[start : start + size] for start in range(0, count, size)]


def split_kept(
    detections: Detections, kept: Tensor, groups: Tensor, num_groups: int
) -> list[tuple[Detections, Tensor]]:
    """Return the kept detections of each group, and their indices, in the order of `kept`.

    `groups` are the numbers of all detections' groups, int64 (N,).
    """
    ordered, by_group = groups[kept].sort(stable=True)
    counts = ordered.bincount(minlength=num_groups).tolist()
    return [(detections.select(rows), rows) for rows in kept[by_group].split(counts)]


def to_original_px(
    boxes_cxcywh_norm: Tensor,
    image: Tensor,
    sizes_hw_orig: Tensor,
    size_hw: torch.Size,
    resize: str = "letterbox",
) -> Tensor:
    """Convert boxes (N, 4) to corners in px of the original images, clipped to these.

    All tensors are on the host; for `image` and `sizes_hw_orig`, see `unletterbox`.
    """
    boxes = boxes_cxcywh_norm
    if resize == "letterbox":
        boxes = unletterbox(boxes, image, sizes_hw_orig, (size_hw[0], size_hw[1]))
    limits = sizes_hw_orig.flip(1).repeat(1, 2).to(boxes.dtype)[image]  # width, height, twice
    return torch.minimum((cxcywh_to_xyxy(boxes) * limits).clamp(min=0), limits)
