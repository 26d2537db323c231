"""Box formats, IoU, letterbox geometry, non-maximum suppression: pure functions on tensors."""

from collections.abc import Iterator

import torch
from torch import Tensor

_MAX_PAIRS = 2**18
"""Pairs of boxes that are compared at once: what a processor's cache holds."""


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """Convert (…, 4) from centre and size to corners, in the same unit."""
    centre, size = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """Convert (…, 4) from corners to centre and size, in the same unit."""
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def pairwise_iou(first_xyxy: Tensor, second_xyxy: Tensor) -> Tensor:
    """Return IoU (…, N, M) of boxes (…, N, 4) and (…, M, 4) in one unit; empty boxes give 0."""
    # a plane a coordinate: pairs that lie two by two in memory take several times as long
    x1, y1, x2, y2 = first_xyxy.movedim(-1, 0).contiguous()[..., :, None]
    u1, v1, u2, v2 = second_xyxy.movedim(-1, 0).contiguous()[..., None, :]
    width = (torch.minimum(x2, u2) - torch.maximum(x1, u1)).clamp_(min=0)
    height = (torch.minimum(y2, v2) - torch.maximum(y1, v1)).clamp_(min=0)
    overlap = width * height
    union = _area(first_xyxy)[..., :, None] + _area(second_xyxy)[..., None, :] - overlap
    return torch.where(union > 0, overlap / union.clamp(min=torch.finfo(union.dtype).tiny), 0.0)


def _area(boxes_xyxy: Tensor) -> Tensor:
    return (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).clamp(min=0).prod(dim=-1)


def shape_iou(first_wh: Tensor, second_wh: Tensor) -> Tensor:
    """Return IoU (N, A) of widths and heights (N, 2) and (A, 2), as if the centres coincided."""
    overlap = torch.minimum(first_wh[:, None], second_wh[None]).prod(dim=-1)
    union = first_wh.prod(dim=-1)[:, None] + second_wh.prod(dim=-1)[None] - overlap
    return overlap / union


def letterbox_geometry(
    size_hw_orig: tuple[int, int], size_hw: tuple[int, int]
) -> tuple[int, int, float, float]:
    """Return new height, new width, top and left margin of an image in the network input, px.

    The whole image is scaled to fit, rounded down to whole pixels, and centred; margins may end
    on a half.

    Args:
        size_hw_orig: height and width of the image, px.
        size_hw: height and width of the network input, px.

    Source: the original program's letterbox (integer division towards zero).
    """
    height, width = size_hw_orig
    net_height, net_width = size_hw
    if net_width / width < net_height / height:
        new_width, new_height = net_width, max(1, height * net_width // width)
    else:
        new_height, new_width = net_height, max(1, width * net_height // height)
    return new_height, new_width, (net_height - new_height) / 2, (net_width - new_width) / 2


def unletterbox(
    boxes_cxcywh_norm: Tensor,
    size_hw_orig: tuple[int, int],
    size_hw: tuple[int, int],
    whole_px_margins: bool = True,
) -> Tensor:
    """Map boxes (N, 4) from a letterboxed network input (0…1) to the original image (0…1).

    Args:
        boxes_cxcywh_norm: float (N, 4).
        size_hw_orig: height and width of the image, px.
        size_hw: height and width of the network input, px.
        whole_px_margins: whether the image was placed at whole pixels, as `letterbox` does;
            the original program places it so too, yet maps back as if it had not.
    """
    new_height, new_width, top, left = letterbox_geometry(size_hw_orig, size_hw)
    if whole_px_margins:
        top, left = int(top), int(left)
    net_height, net_width = size_hw
    offset = boxes_cxcywh_norm.new_tensor([left / net_width, top / net_height, 0.0, 0.0])
    scale = boxes_cxcywh_norm.new_tensor([net_width / new_width, net_height / new_height] * 2)
    return (boxes_cxcywh_norm - offset) * scale


def batched_nms(
    boxes_xyxy: Tensor, scores: Tensor, classes: Tensor, iou_threshold: float = 0.45
) -> Tensor:
    """Return the indices kept by greedy non-maximum suppression within each class.

    Exact: a box goes if and only if a kept box of its class with a higher score overlaps it by
    more than the threshold. All boxes are settled at once, in rounds, until nothing changes.

    Args:
        boxes_xyxy: float (N, 4), any one unit.
        scores: float (N,).
        classes: int64 (N,); boxes of different classes never meet.
        iou_threshold: 0…1.

    Returns:
        int64 (kept,), by descending score; equal scores by ascending index.
    """
    order = scores.argsort(descending=True, stable=True)
    kept = [torch.zeros_like(order[:0])]
    for table in _by_class(order, classes[order]):
        padded = (
            boxes_xyxy[table.clamp(min=0)] * (table >= 0)[..., None]
        )  # an empty box: no overlap
        kept.append(table[_greedy(pairwise_iou(padded, padded), iou_threshold) & (table >= 0)])
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    return order[rank[torch.cat(kept)].sort().values]


def _by_class(order: Tensor, classes: Tensor) -> Iterator[Tensor]:
    """Yield tables of indices with a row per class, in their order, -1 as padding.

    Classes of similar size share a table, and no table has more pairs than fit the memory, so that
    one frequent class does not widen the rows of all.
    """
    _, row, counts = torch.unique(classes, return_inverse=True, return_counts=True)
    by_row = order[row.argsort(stable=True)].split(counts.tolist())
    by_size = sorted(by_row, key=len)
    start = 0
    while start < len(by_size):
        end = start + 1
        while end < len(by_size) and _pairs(by_size, start, end + 1) <= _MAX_PAIRS:
            end += 1
        yield torch.nn.utils.rnn.pad_sequence(by_size[start:end], True, -1)
        start = end


def _pairs(rows: list[Tensor], start: int, end: int) -> int:
    return (end - start) * len(rows[end - 1]) ** 2


def _greedy(iou: Tensor, threshold: float) -> Tensor:
    """Return bool (G, N), which boxes of each class survive; they stand by descending score.

    A box survives if none that survives suppresses it. Said of all at once, again and again: after
    round n the first n are right, and where nothing changes any more, all are.
    """
    # [g, i, j]: i outranks j and overlaps it too much; numbers, since products are quicker than any
    above = (iou > threshold).triu_(diagonal=1).float()
    kept = torch.ones_like(above[:, :1])
    while True:
        free = (kept @ above == 0).float()
        if torch.equal(free, kept):
            return kept[:, 0] > 0
        kept = free
