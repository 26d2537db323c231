"""The detection head; box_logits (B, A, 5, Gh, Gw) are x, y, w, h, objectness."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Location = Literal["direct", "offset"]
"""How the centre of a box is predicted, see `decode_boxes`."""

MAX_LOGITS, MAX_LOGITS_ON_GPU = 2**21, 2**26
"""Class logits of boxes computed at once, which bounds the memory of evaluation and prediction:
copies of them take ten times their 8 MB. A GPU is waited for after each part, so it gets parts of
256 MB: 7,100 boxes with 9,418 nodes."""

MAX_WEIGHTS = 2**25
"""Class weights copied at once for the nodes of some images or boxes, 128 MB."""

NodeLogits = Callable[[Tensor], Tensor]
"""A function from nodes of each of M boxes, int64 (M, S), to their logits, float (M, S)."""


class ClassLogits(Protocol):
    """Class logits that are gathered for some boxes or some nodes."""

    @property
    def device(self) -> torch.device:
        """That of the logits."""

    @property
    def num_nodes(self) -> int:
        """K, the number of nodes."""

    def gather_boxes(self, image: Tensor, anchor: Tensor, cell: Tensor) -> Tensor:
        """Return logits (M, K) of M boxes, given by int64 (M,) indices; cells are row-major.

        The indices are on the host; the device is not waited for.
        """

    def node_logits(self, image: Tensor, anchor: Tensor, cell: Tensor) -> NodeLogits:
        """Return what computes the logits of single nodes of M boxes; see `gather_boxes`."""

    def are_few(self, num_boxes: int, steps: Sequence[int]) -> bool:
        """Whether `node_logits` of at most so many nodes a box and step cost less than all."""

    def gather_cells(self, cells: Tensor) -> Tensor:
        """Return logits (M, A, K) of all anchors in M of the B * Gh * Gw cells, int64 (M,).

        Does not wait for the device.
        """

    def gather_nodes(self, nodes: Tensor) -> Tensor:
        """Return logits (B, A, R, Gh * Gw) of R nodes per image, int64 (B, R), in all boxes."""


@dataclass
class SparseClassLogits:
    """Class logits that are computed from the features for the requested boxes only.

    With 9,418 nodes, the dense last convolution takes nearly all memory and a third of all
    arithmetic, but the loss reads only a few cells. The values equal those of the dense form.
    """

    features: Tensor  # (B, C, Gh, Gw), input of the last 1x1 convolution
    weight: Tensor  # (A, K, C)
    bias: Tensor  # (A, K)

    @property
    def device(self) -> torch.device:
        """That of the features."""
        return self.features.device

    @property
    def num_nodes(self) -> int:
        """K, the number of nodes."""
        return self.weight.shape[1]

    def gather_boxes(self, image: Tensor, anchor: Tensor, cell: Tensor) -> Tensor:
        """Return logits (M, K), one product for each anchor."""
        order = anchor.argsort(stable=True)
        selected = self._box_features(image[order], cell[order])
        counts = torch.bincount(anchor, minlength=len(self.weight)).tolist()
        logits = torch.cat(
            [
                F.linear(features, weight, bias)
                for features, weight, bias in zip(
                    selected.split(counts), self.weight, self.bias, strict=True
                )
            ]
        )
        return logits.index_select(0, order.argsort().to(self.device, non_blocking=True))

    def _box_features(self, image: Tensor, cell: Tensor) -> Tensor:
        """Return (M, C)."""
        rows = image * (self.features.shape[2] * self.features.shape[3]) + cell
        return self._gather_features(rows.to(self.device, non_blocking=True))

    def node_logits(self, image: Tensor, anchor: Tensor, cell: Tensor) -> NodeLogits:
        """Return what computes logits from the weight rows of the nodes only."""
        features = self._box_features(image, cell)[:, None]  # (M, 1, C)
        first_row = (anchor * self.num_nodes).to(self.device, non_blocking=True)[:, None]
        weight, bias = self.weight.flatten(0, 1), self.bias.flatten()

        def gather(nodes: Tensor) -> Tensor:
            rows = (first_row + nodes).flatten()
            of_nodes = weight.index_select(0, rows).view(*nodes.shape, -1)
            biases = bias.index_select(0, rows).view(len(nodes), 1, -1)
            # with the features first, eight times faster on CPUs
            return torch.baddbmm(biases, features, of_nodes.transpose(1, 2)).squeeze(1).float()

        return gather

    def are_few(self, num_boxes: int, steps: Sequence[int]) -> bool:
        """Compare the numbers of weight rows that are read, and bound the memory of copies."""
        num_anchors, num_nodes, channels = self.weight.shape
        fits = num_boxes * max(steps) * channels <= MAX_WEIGHTS
        return fits and num_boxes * sum(steps) < num_anchors * num_nodes

    def gather_cells(self, cells: Tensor) -> Tensor:
        """Return logits (M, A, K); all class weights stay in the autograd graph, even if M is 0."""
        features = self._gather_features(cells)
        logits = F.linear(features, self.weight.flatten(0, 1), self.bias.flatten())
        return logits.view(-1, *self.bias.shape)

    def _gather_features(self, cells: Tensor) -> Tensor:
        """Return (M, C)."""
        return self.features.flatten(2).transpose(1, 2).flatten(0, 1).index_select(0, cells)

    def gather_nodes(self, nodes: Tensor) -> Tensor:
        """Return logits (B, A, R, Gh * Gw), computed from the weight rows of these nodes only."""
        num_anchors, num_nodes, channels = self.weight.shape
        anchors = torch.arange(num_anchors, device=nodes.device)[:, None] * num_nodes
        index = anchors + nodes.clamp(min=0)[:, None]  # (B, A, R)
        size = max(1, MAX_WEIGHTS // (index[0].numel() * channels))  # images at once
        logits = []
        parts = zip(self.features.flatten(2).split(size), index.split(size), strict=True)
        for features, rows in parts:
            weight = self.weight.flatten(0, 1).index_select(0, rows.flatten())
            bias = self.bias.flatten().index_select(0, rows.flatten())
            bias = bias.view(len(rows), -1, 1)
            product = torch.baddbmm(bias, weight.view(len(rows), -1, channels), features)
            logits.append(product.view(*rows.shape, -1))
        return torch.cat(logits)


@dataclass
class DenseClassLogits:
    """Class logits that a dense head has already computed."""

    logits: Tensor  # (B, A, K, Gh, Gw)

    @property
    def device(self) -> torch.device:
        """That of the logits."""
        return self.logits.device

    @property
    def num_nodes(self) -> int:
        """K, the number of nodes."""
        return self.logits.shape[2]

    def gather_boxes(self, image: Tensor, anchor: Tensor, cell: Tensor) -> Tensor:
        """Return logits (M, K)."""
        index = (one.to(self.device, non_blocking=True) for one in (image, anchor, cell))
        image, anchor, cell = index
        return self.logits.flatten(3)[image, anchor, :, cell]

    def node_logits(self, image: Tensor, anchor: Tensor, cell: Tensor) -> NodeLogits:
        """Return what selects logits."""
        logits = self.gather_boxes(image, anchor, cell).float()
        return lambda nodes: logits.gather(1, nodes)

    def are_few(self, num_boxes: int, steps: Sequence[int]) -> bool:
        """All logits are there."""
        return False

    def gather_cells(self, cells: Tensor) -> Tensor:
        """Return logits (M, A, K)."""
        return self.logits.permute(0, 3, 4, 1, 2).flatten(0, 2).index_select(0, cells)

    def gather_nodes(self, nodes: Tensor) -> Tensor:
        """Return logits (B, A, R, Gh * Gw)."""
        flat = self.logits.flatten(3)  # (B, A, K, G)
        index = nodes.clamp(min=0)[:, None, :, None]
        return flat.gather(2, index.expand(-1, flat.shape[1], -1, flat.shape[3]))


@dataclass
class HeadOutput:
    """Output of the network: box logits before any activation, and class logits on demand."""

    box_logits: Tensor
    class_logits: ClassLogits
    location: Location = "direct"

    @classmethod
    def from_dense(cls, raw: Tensor, num_anchors: int) -> "HeadOutput":
        """Split a dense head's output (B, A * (5 + K), Gh, Gw), anchor by anchor."""
        dense = raw.unflatten(1, (num_anchors, -1))
        return cls(dense[:, :, :5], DenseClassLogits(dense[:, :, 5:]))


def decode_boxes(
    box_logits: Tensor, anchors_wh_cell: Tensor, location: Location = "direct"
) -> Tensor:
    """Return boxes_cxcywh_norm (B, A, 4, Gh, Gw) in 0…1 of the network input; anchors are (A, 2).

    The centre of a box is inside its cell if `location` is `direct`; with `offset`, it is anywhere:
    x = t_x * w_a + x_a, where (x_a, y_a) is the centre of the cell and w_a the width of the anchor.

    Source: YOLO9000, section 2, "Direct location prediction"; `offset` is that of Faster R-CNN.
    Deviation: the paper prints x = t_x * w_a - x_a; Faster R-CNN has a plus, as here.
    """
    height, width = box_logits.shape[-2:]
    x = torch.arange(width, device=box_logits.device, dtype=box_logits.dtype)
    y = torch.arange(height, device=box_logits.device, dtype=box_logits.dtype)[:, None]
    anchors = anchors_wh_cell.to(box_logits.dtype)[:, :, None, None]
    xy_logits = box_logits[:, :, :2]
    xy_cell = xy_logits.sigmoid() if location == "direct" else 0.5 + xy_logits * anchors
    wh_cell = box_logits[:, :, 2:4].exp() * anchors
    return torch.stack(
        [
            (xy_cell[:, :, 0] + x) / width,
            (xy_cell[:, :, 1] + y) / height,
            wh_cell[:, :, 0] / width,
            wh_cell[:, :, 1] / height,
        ],
        dim=2,
    )


@dataclass
class Candidates:
    """Boxes of a batch whose objectness exceeds a threshold, with class logits on demand.

    All but the class logits are on the host. The boxes are sorted by image, anchor and cell.
    """

    boxes_cxcywh_norm: Tensor  # (M, 4)
    objectness: Tensor  # (M,), probabilities
    image: Tensor  # int64 (M,), as `anchor` and `cell` an index into the class logits
    anchor: Tensor
    cell: Tensor
    class_logits: ClassLogits

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows, and their class logits, float (m, K): at most `MAX_LOGITS`, or one row."""
        max_logits = MAX_LOGITS if self.class_logits.device.type == "cpu" else MAX_LOGITS_ON_GPU
        size = max(1, max_logits // self.class_logits.num_nodes)
        for start in range(0, len(self.objectness), size):
            rows = slice(start, start + size)
            index = self.image[rows], self.anchor[rows], self.cell[rows]
            yield rows, self.class_logits.gather_boxes(*index).float()


def select_candidates(
    output: HeadOutput, anchors_wh_cell: Tensor, objectness_threshold: float
) -> Candidates:
    """Return the boxes above the threshold; waits for the device once.

    No detection with a score above the threshold is lost: score = objectness x P(class).
    """
    box_logits = output.box_logits.float()
    boxes = decode_boxes(box_logits, anchors_wh_cell, output.location)
    table = torch.cat([boxes, box_logits[:, :, 4:].sigmoid()], dim=2).flatten(3).cpu()
    # of all boxes, because selecting them on the device takes two waits more
    image, anchor, cell = (table[:, :, 4] > objectness_threshold).nonzero(as_tuple=True)
    rows = table[image, anchor, :, cell]
    return Candidates(rows[:, :4], rows[:, 4], image, anchor, cell, output.class_logits)
