"""Box formats, IoU, letterbox geometry, non-maximum suppression: pure functions on tensors."""

from collections.abc import Iterator

import torch
from torch import Tensor

_MAX_PAIRS = 2**18  # boxes compared in one operation; this many fit a processor's cache


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """Convert (…, 4) from centre and size to corners, in the same unit."""
    centre, half = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """Convert (…, 4) from corners to centre and size, in the same unit."""
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def pairwise_iou(first_xyxy: Tensor, second_xyxy: Tensor) -> Tensor:
    """Return IoU (…, N, M) of boxes (…, N, 4) and (…, M, 4) in the same unit.

    It is 0 for empty boxes, also for those that are infinitely long, whose area is NaN.
    """
    overlap = _intersection(first_xyxy, second_xyxy)
    union = _area(first_xyxy)[..., :, None] + _area(second_xyxy)[..., None, :] - overlap
    return torch.where(union > 0, overlap / union, 0.0)


def pairwise_ioa(first_xyxy: Tensor, second_xyxy: Tensor) -> Tensor:
    """Return the intersections over the areas of the first boxes; shapes as in `pairwise_iou`."""
    area = _area(first_xyxy)[..., :, None]
    return _intersection(first_xyxy, second_xyxy) / area.clamp(min=torch.finfo(area.dtype).tiny)


def _intersection(first_xyxy: Tensor, second_xyxy: Tensor) -> Tensor:
    # one contiguous tensor per coordinate is several times faster than pairs of coordinates
    first = first_xyxy.movedim(-1, 0).contiguous()[..., :, None]
    second = second_xyxy.movedim(-1, 0).contiguous()[..., None, :]
    low, high = torch.maximum(first[:2], second[:2]), torch.minimum(first[2:], second[2:])
    width, height = (high - low).clamp_(min=0).unbind()
    return width * height


def _area(boxes_xyxy: Tensor) -> Tensor:
    return (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).clamp(min=0).prod(dim=-1)


def shape_iou(first_wh: Tensor, second_wh: Tensor) -> Tensor:
    """Return IoU (N, A) of widths and heights (N, 2) and (A, 2), all boxes at the same centre."""
    overlap = torch.minimum(first_wh[:, None], second_wh[None]).prod(dim=-1)
    union = first_wh.prod(dim=-1)[:, None] + second_wh.prod(dim=-1)[None] - overlap
    return overlap / union


def letterbox_geometry(
    size_hw_orig: tuple[int, int], size_hw: tuple[int, int]
) -> tuple[int, int, float, float]:
    """Return height, width, top and left margin, px, of an image scaled to fit and centred.

    The size is rounded down to whole pixels; margins may be half pixels.

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
    image: Tensor,
    sizes_hw_orig: Tensor,
    size_hw: tuple[int, int],
    whole_px_margins: bool = True,
) -> Tensor:
    """Map boxes (N, 4) from 0…1 of a letterboxed network input to 0…1 of the original images.

    All tensors are on the host. Box n is in image `image[n]`, int64 (N,), whose height and width
    are in `sizes_hw_orig`, int64 (B, 2), px. `whole_px_margins` says that margins were rounded down
    to whole pixels, which the original program does when it places the image, but not when it maps
    boxes back.
    """
    net_height, net_width = size_hw
    offsets, scales = [], []
    for height, width in sizes_hw_orig.tolist():
        new_height, new_width, top, left = letterbox_geometry((height, width), size_hw)
        if whole_px_margins:
            top, left = int(top), int(left)
        offsets.append([left / net_width, top / net_height, 0.0, 0.0])
        scales.append([net_width / new_width, net_height / new_height] * 2)
    offset, scale = (boxes_cxcywh_norm.new_tensor(rows)[image] for rows in (offsets, scales))
    return (boxes_cxcywh_norm - offset) * scale


def batched_nms(
    boxes_xyxy: Tensor, scores: Tensor, classes: Tensor, iou_threshold: float = 0.45
) -> Tensor:
    """Return the indices that greedy non-maximum suppression keeps, within each class.

    Exact: a box is suppressed if and only if a kept, higher-scoring box of its class overlaps it.

    Args:
        boxes_xyxy: float (N, 4), in any unit.
        scores: float (N,).
        classes: int64 (N,).
        iou_threshold: 0…1; boxes with a higher IoU overlap.

    Returns:
        int64 (kept,), by descending score; equal scores by ascending index.
    """
    order = scores.argsort(descending=True, stable=True)
    kept = [torch.zeros_like(order[:0])]
    for table in _class_tables(order, classes[order]):
        # padding becomes empty boxes, which overlap nothing
        padded = boxes_xyxy[table.clamp(min=0)] * (table >= 0)[..., None]
        kept.append(
            table[_keep_greedily(pairwise_iou(padded, padded), iou_threshold) & (table >= 0)]
        )
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    return order[rank[torch.cat(kept)].sort().values]


def _class_tables(order: Tensor, classes: Tensor) -> Iterator[Tensor]:
    """Yield tables of indices with one row per class, -1 as padding."""
    # classes of similar size share a table, so that one frequent class does not pad all others
    _, row, counts = torch.unique(classes, return_inverse=True, return_counts=True)
    sizes, by_size = counts.sort(stable=True)
    row = by_size.argsort()[row]
    by_row = row.argsort(stable=True)
    row, order, ends = row[by_row], order[by_row], sizes.cumsum(0)
    column = torch.arange(len(row), device=row.device) - (ends - sizes)[row]
    widths, start, first = sizes.tolist(), 0, 0
    while start < len(widths):
        end = start + 1
        while end < len(widths) and (end + 1 - start) * widths[end] ** 2 <= _MAX_PAIRS:
            end += 1
        last = first + sum(widths[start:end])
        table = order.new_full((end - start, widths[end - 1]), -1)
        table[row[first:last] - start, column[first:last]] = order[first:last]
        yield table
        start, first = end, last


def _keep_greedily(iou: Tensor, threshold: float) -> Tensor:
    """Return bool (G, N), kept boxes of each class; `iou` is (G, N, N), by descending score."""
    # a box is kept if no kept box suppresses it. Applied to all boxes in parallel, this is correct
    # for the first n boxes after n iterations, and for all boxes once nothing changes
    # [g, i, j]: box i suppresses box j if kept; float, as a matrix product is faster than any()
    suppresses = (iou > threshold).triu_(diagonal=1).float()
    kept = torch.ones_like(suppresses[:, :1])
    while True:
        free = (kept @ suppresses == 0).float()
        if torch.equal(free, kept):
            return kept[:, 0] > 0
        kept = free
