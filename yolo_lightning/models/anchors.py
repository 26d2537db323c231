"""Anchors from the shapes of boxes: dimension clusters, and how well anchors match boxes."""

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from yolo_lightning.errors import InputError

Distance = Literal["iou", "squared_error"]

CELL_PX = 32
"""Darknet-19's stride; other backbones have others."""
MAX_CLUSTERS = 15
_CHUNK, _SAMPLE, _REFINED = 2**14, 20_000, 2
_MAX_PASSES, _PATIENCE, _MIN_GAIN = 300, 5, 1e-5


def average_iou(boxes_wh: NDArray[Any], anchors_wh: NDArray[Any]) -> float:
    """Return the mean over boxes of the IoU with the closest anchor, 0…1, centres coinciding.

    Args:
        boxes_wh: float (N, 2), widths and heights.
        anchors_wh: float (A, 2), in the same unit.

    Raises:
        InputError: no boxes, no anchors, or sizes that are not positive.

    Source: YOLO9000, section 2, "Dimension Clusters", table 1.
    """
    boxes, anchors = _checked(boxes_wh, "boxes"), _checked(anchors_wh, "anchors")
    return 1 - _mean(_nearest(boxes, anchors, "iou")[0])


def cluster(
    boxes_wh: NDArray[Any],
    num: int,
    restarts: int = 10,
    seed: int = 0,
    distance: Distance = "iou",
) -> NDArray[np.float64]:
    """Return anchors found by k-means on widths and heights.

    The result depends on the seed, not on the order of the boxes. Many boxes are clustered by a
    sample of them first; the best of these clusterings are then refined on all. A mean need not be
    the shape with the best IoU, so the best state on the way is returned rather than the last.

    Args:
        boxes_wh: float (N, 2), any one unit; squared errors depend on its scale, IoU does not.
        num: how many anchors.
        restarts: how many starts to choose from.
        seed: of starts and sample, 0 or more.
        distance: ``iou`` is 1 - IoU of the shapes, ``squared_error`` the usual k-means.

    Returns:
        float64 (num, 2), by ascending area, in the unit of the boxes.

    Raises:
        InputError: fewer distinct boxes than anchors, sizes that are not positive, or an option
            out of range.

    Source: YOLO9000, section 2, "Dimension Clusters".
    Paper is silent: starts, restarts and empty clusters. Starts are drawn as in k-means++, an
        empty cluster begins anew at the worst matched box.
    """
    boxes = _checked(boxes_wh, "boxes")
    for name, value, least in (("num", num, 1), ("restarts", restarts, 1), ("seed", seed, 0)):
        if value < least:
            raise InputError(f"{name} is {value}; allowed: {least} or more")
    if distance not in get_args(Distance):
        raise InputError(f"distance is {distance!r}; allowed: {', '.join(get_args(Distance))}")
    boxes = boxes[np.lexsort(boxes.T)]
    if (found := _distinct(boxes)) < num:
        raise InputError(f"{num} anchors need as many distinct boxes; found: {found}")
    generator = np.random.default_rng(seed)
    many = len(boxes) > _SAMPLE
    sample = boxes[generator.choice(len(boxes), _SAMPLE, replace=False)] if many else boxes
    starts = [_start(sample, num, distance, generator) for _ in range(restarts)]
    tried = sorted((_refined(sample, start, distance) for start in starts), key=lambda t: t[0])
    if many:
        tried = [_refined(boxes, anchors, distance) for _, anchors in tried[:_REFINED]]
    return _by_area(min(tried, key=lambda t: t[0])[1])


def elbow(
    boxes_wh: NDArray[Any], most: int = MAX_CLUSTERS, restarts: int = 10, seed: int = 0
) -> list[NDArray[np.float64]]:
    """Return IoU clusters for 1, 2, … `most` anchors, as many as there are distinct boxes.

    The average IoU never falls from one number to the next: where clustering ends lower, the
    anchors before are taken, and the worst matched box as one more.

    Args:
        boxes_wh: float (N, 2).
        most: the largest number of anchors.
        restarts: of each clustering.
        seed: of each clustering.

    Returns:
        float64 (k, 2) at index k - 1.

    Raises:
        InputError: whatever `cluster` refuses.
    """
    boxes = _checked(boxes_wh, "boxes")
    boxes = boxes[np.lexsort(boxes.T)]
    curve: list[NDArray[np.float64]] = []
    for num in range(1, min(most, _distinct(boxes)) + 1):
        anchors = cluster(boxes, num, restarts, seed)
        if curve and average_iou(boxes, anchors) < average_iou(boxes, curve[-1]):
            cost, _ = _nearest(boxes, curve[-1], "iou")
            anchors = _by_area(np.vstack([curve[-1], boxes[cost.argmax()]]))
        curve.append(anchors)
    return curve


def hand_picked() -> NDArray[np.float64]:
    """Return the nine anchor boxes of Faster R-CNN, float64 (9, 2), px.

    They are made for images whose shorter side is 600 px: see `shorter_side_wh`.

    Source: Faster R-CNN, section 3.3: areas of 128², 256², 512² px, aspect ratios 1:2, 1:1, 2:1.
    """
    sides, roots = np.array([128.0, 256.0, 512.0]), np.sqrt([0.5, 1.0, 2.0])
    sizes = [(side / root, side * root) for side in sides for root in roots]
    return np.array(sizes)


def letterboxed_wh(
    boxes_wh_px: NDArray[Any], images_wh_px: NDArray[Any], image_size: int
) -> NDArray[np.float64]:
    """Scale boxes (N, 2) as their images (N, 2) are, so that the longer side fits the input, px."""
    longer = images_wh_px.max(axis=1, keepdims=True)
    return np.asarray(boxes_wh_px * (image_size / longer.astype(np.float64)))


def shorter_side_wh(
    boxes_wh_px: NDArray[Any], images_wh_px: NDArray[Any], length: int = 600
) -> NDArray[np.float64]:
    """Scale boxes (N, 2) as their images (N, 2) are, to a shorter side of this length, px."""
    shorter = images_wh_px.min(axis=1, keepdims=True)
    return np.asarray(boxes_wh_px * (length / shorter.astype(np.float64)))


def as_yaml_values(anchors_wh: NDArray[Any]) -> list[list[float]]:
    """Return anchors (A, 2) as plain numbers with four significant digits."""
    return [[float(f"{value:.4g}") for value in anchor] for anchor in anchors_wh.tolist()]


def _checked(sizes_wh: NDArray[Any], what: str) -> NDArray[np.float32]:
    sizes = np.asarray(sizes_wh, dtype=np.float32)
    if sizes.ndim != 2 or sizes.shape[1] != 2 or not len(sizes):
        raise InputError(f"{what} have shape {sizes.shape}; allowed: (N, 2), at least one")
    if not bool((np.isfinite(sizes) & (sizes > 0)).all()):
        raise InputError(f"{what}: a width or height is not above 0")
    return sizes


def _mean(cost: NDArray[np.float32]) -> float:
    return float(cost.mean(dtype=np.float64))


def _distinct(sorted_wh: NDArray[np.float32]) -> int:
    return 1 + int((np.diff(sorted_wh, axis=0) != 0).any(axis=1).sum())


def _by_area(anchors_wh: NDArray[np.float64]) -> NDArray[np.float64]:
    return anchors_wh[np.lexsort((anchors_wh[:, 0], anchors_wh.prod(axis=1)))]


def _distances(
    boxes_wh: NDArray[np.float32], anchors_wh: NDArray[np.float32], distance: Distance
) -> NDArray[np.float32]:
    """Return (A, N), box sizes along the rows: short rows would cost numpy ten times as much."""
    w, h = np.ascontiguousarray(boxes_wh.T)
    anchor_w, anchor_h = anchors_wh.T[:, :, None]
    if distance == "squared_error":
        return np.asarray((w - anchor_w) ** 2 + (h - anchor_h) ** 2)
    overlap = np.minimum(w, anchor_w) * np.minimum(h, anchor_h)
    return np.asarray(1 - overlap / (w * h + anchor_w * anchor_h - overlap))


def _nearest(
    boxes_wh: NDArray[np.float32], anchors_wh: NDArray[Any], distance: Distance
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the distance (N,) of each box to its nearest anchor, and which one that is."""
    anchors = anchors_wh.astype(np.float32)
    cost = np.empty(len(boxes_wh), dtype=np.float32)
    index = np.empty(len(boxes_wh), dtype=np.int64)
    for start in range(0, len(boxes_wh), _CHUNK):
        part = slice(start, start + _CHUNK)
        distances = _distances(boxes_wh[part], anchors, distance)
        distances.argmin(axis=0, out=index[part])
        distances.min(axis=0, out=cost[part])
    return cost, index


def _start(
    boxes_wh: NDArray[np.float32], num: int, distance: Distance, generator: np.random.Generator
) -> NDArray[np.float64]:
    """Draw boxes one by one, each with a probability in proportion to its distance so far."""
    rows = [int(generator.integers(len(boxes_wh)))]
    cost = np.full(len(boxes_wh), np.inf)
    while len(rows) < num:
        cost = np.minimum(cost, _nearest(boxes_wh, boxes_wh[rows[-1:]], distance)[0])
        reach = cost.cumsum()
        drawn = np.searchsorted(reach, generator.random() * reach[-1], side="right")
        rows.append(min(int(drawn), len(boxes_wh) - 1))
    return boxes_wh[rows].astype(np.float64)


def _filled(
    boxes_wh: NDArray[np.float32], anchors_wh: NDArray[np.float64], distance: Distance
) -> tuple[NDArray[np.float64], NDArray[np.float32], NDArray[np.int64]]:
    """Return anchors none of which is without boxes, and what `_nearest` says of them."""
    while True:
        cost, index = _nearest(boxes_wh, anchors_wh, distance)
        empty = np.flatnonzero(np.bincount(index, minlength=len(anchors_wh)) == 0)
        if not len(empty) or cost.max() <= 0:  # a sample may hold too few distinct boxes
            return anchors_wh, cost, index
        anchors_wh = anchors_wh.copy()
        anchors_wh[empty[0]] = boxes_wh[cost.argmax()]


def _refined(
    boxes_wh: NDArray[np.float32], anchors_wh: NDArray[np.float64], distance: Distance
) -> tuple[float, NDArray[np.float64]]:
    """Return the lowest mean distance that k-means meets from here, and its anchors."""
    lowest, best, stale = np.inf, anchors_wh, 0
    for _ in range(_MAX_PASSES):
        anchors_wh, cost, index = _filled(boxes_wh, anchors_wh, distance)
        mean = _mean(cost)
        stale = 0 if mean < lowest * (1 - _MIN_GAIN) else stale + 1
        if mean < lowest:
            lowest, best = mean, anchors_wh
        counts = np.bincount(index, minlength=len(anchors_wh)).clip(min=1)
        sums = [np.bincount(index, side, len(anchors_wh)) for side in boxes_wh.T]
        moved = np.stack(sums, axis=1) / counts[:, None]
        if stale == _PATIENCE or np.array_equal(moved, anchors_wh):
            break
        anchors_wh = moved
    return lowest, best
