"""The detection head: dense boxes and objectness, class logits on demand, and decoding."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class ClassLogits(Protocol):
    """Class logits for the boxes that someone asks about."""

    def at(self, image: Tensor, anchor: Tensor, cell: Tensor) -> Tensor:
        """Return logits (M, K) of chosen boxes; int64 (M,) each, cells numbered row by row."""

    def of_nodes(self, nodes: Tensor) -> Tensor:
        """Return logits (B, A, Gh * Gw, R) of each image's own nodes (B, R) in every box."""


@dataclass
class SparseClassLogits:
    """Class logits computed from features where they are read.

    With 9,418 nodes the dense last convolution is a third of all arithmetic and nearly all
    memory, yet the loss reads a handful of cells. The numbers are those of the dense form.

    Attributes:
        features: float (B, C, Gh, Gw), input of the head's last 1x1 convolution.
        weight: float (A, K, C).
        bias: float (A, K).
    """

    features: Tensor
    weight: Tensor
    bias: Tensor

    def at(self, image: Tensor, anchor: Tensor, cell: Tensor) -> Tensor:
        """Return logits (M, K); every class weight stays in the graph, also where M is 0."""
        rows = self.features.flatten(2).transpose(1, 2).flatten(0, 1)  # (B * Gh * Gw, C)
        cells = self.features.shape[2] * self.features.shape[3]
        order = anchor.argsort(stable=True)
        chosen = rows.index_select(0, (image * cells + cell)[order])
        counts = torch.bincount(anchor, minlength=len(self.weight)).tolist()
        logits = torch.cat(
            [
                F.linear(part, weight, bias)
                for part, weight, bias in zip(
                    chosen.split(counts), self.weight, self.bias, strict=True
                )
            ]
        )
        return logits.index_select(0, order.argsort())

    def of_nodes(self, nodes: Tensor) -> Tensor:
        """Return logits (B, A, Gh * Gw, R) from the rows of these nodes alone."""
        features = self.features.flatten(2)  # (B, C, G)
        logits = []
        for feature, wanted in zip(features, nodes.clamp(min=0), strict=True):
            weight = self.weight.index_select(1, wanted)  # (A, R, C)
            bias = self.bias.index_select(1, wanted)
            logits.append((weight @ feature + bias[:, :, None]).transpose(1, 2))
        return torch.stack(logits)


@dataclass
class DenseClassLogits:
    """Class logits that exist already, as a dense head gives them.

    Attributes:
        logits: float (B, A, K, Gh, Gw).
    """

    logits: Tensor

    def at(self, image: Tensor, anchor: Tensor, cell: Tensor) -> Tensor:
        """Return logits (M, K)."""
        return self.logits.flatten(3)[image, anchor, :, cell]

    def of_nodes(self, nodes: Tensor) -> Tensor:
        """Return logits (B, A, Gh * Gw, R)."""
        flat = self.logits.flatten(3).transpose(2, 3)  # (B, A, G, K)
        index = nodes.clamp(min=0)[:, None, None, :].expand(*flat.shape[:3], -1)
        return flat.gather(3, index)


@dataclass
class HeadOutput:
    """What the network says about a batch.

    Attributes:
        box_logits: float (B, A, 5, Gh, Gw): x, y, w, h, objectness before any activation.
        class_logits: class logits on demand.
    """

    box_logits: Tensor
    class_logits: ClassLogits

    @classmethod
    def from_dense(cls, raw: Tensor, num_anchors: int) -> "HeadOutput":
        """Split a dense head's output (B, A * (5 + K), Gh, Gw), anchor by anchor."""
        dense = raw.unflatten(1, (num_anchors, -1))
        return cls(dense[:, :, :5], DenseClassLogits(dense[:, :, 5:]))


def decode_boxes(box_logits: Tensor, anchors_wh_cell: Tensor) -> Tensor:
    """Return boxes_cxcywh_norm (B, A, 4, Gh, Gw) in 0…1 of the network input.

    Args:
        box_logits: float (B, A, 5, Gh, Gw).
        anchors_wh_cell: float (A, 2), cells.

    Source: YOLO9000, section 2, "Direct location prediction".
    """
    height, width = box_logits.shape[-2:]
    x = torch.arange(width, device=box_logits.device, dtype=box_logits.dtype)
    y = torch.arange(height, device=box_logits.device, dtype=box_logits.dtype)[:, None]
    anchors = anchors_wh_cell.to(box_logits.dtype)[:, :, None, None]
    return torch.stack(
        [
            (box_logits[:, :, 0].sigmoid() + x) / width,
            (box_logits[:, :, 1].sigmoid() + y) / height,
            box_logits[:, :, 2].exp() * anchors[:, 0] / width,
            box_logits[:, :, 3].exp() * anchors[:, 1] / height,
        ],
        dim=2,
    )


@dataclass
class Candidates:
    """Boxes of one image whose objectness passes a threshold.

    Attributes:
        boxes_cxcywh_norm: float (M, 4), 0…1 of the network input.
        objectness: float (M,), probabilities.
        logits: float (M, K), class logits.
    """

    boxes_cxcywh_norm: Tensor
    objectness: Tensor
    logits: Tensor


def candidates(
    output: HeadOutput, anchors_wh_cell: Tensor, objectness_threshold: float
) -> list[Candidates]:
    """Return each image's boxes above the threshold; class logits are computed for these alone.

    Args:
        output: what the network says about B images.
        anchors_wh_cell: float (A, 2), cells.
        objectness_threshold: 0…1; also a bound on objectness x P(class), so nothing is lost that
            a score threshold of the same value would keep.
    """
    box_logits = output.box_logits.float()
    objectness = box_logits[:, :, 4].sigmoid().flatten(2)  # (B, A, G)
    boxes = decode_boxes(box_logits, anchors_wh_cell).flatten(3)  # (B, A, 4, G)
    image, anchor, cell = (objectness > objectness_threshold).nonzero(as_tuple=True)
    chosen = boxes[image, anchor, :, cell]
    scores = objectness[image, anchor, cell]
    logits = output.class_logits.at(image, anchor, cell).float()
    counts = torch.bincount(image, minlength=len(box_logits)).tolist()
    parts = zip(chosen.split(counts), scores.split(counts), logits.split(counts), strict=True)
    return [Candidates(*part) for part in parts]
