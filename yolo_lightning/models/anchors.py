"""Anchors: dimension clusters, and the average IoU of anchors and boxes."""

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from yolo_lightning.errors import InputError

Distance = Literal["iou", "squared_error"]
Released = Literal["voc", "coco", "tiny_voc", "yolo9000"]

CELL_PX = 32  # stride of Darknet-19
DEFAULT_COUNT = 5  # Source: YOLO9000, section 2, "Dimension Clusters"
RELEASED: dict[str, list[tuple[float, float]]] = {
    "voc": [
        (1.3221, 1.73145), (3.19275, 4.00944), (5.05587, 8.09892), (9.47112, 4.84053),
        (11.2364, 10.0071),
    ],
    "coco": [
        (0.57273, 0.677385), (1.87446, 2.06253), (3.33843, 5.47434), (7.88282, 3.52778),
        (9.77052, 9.16828),
    ],
    "tiny_voc": [(1.08, 1.19), (3.42, 4.41), (6.63, 11.38), (9.42, 5.11), (16.62, 10.52)],
    "yolo9000": [(0.77871, 1.14074), (3.00525, 4.31277), (9.22725, 9.61974)],
}  # fmt: skip
"""Widths and heights of the original program's configurations, in cells of 32 px."""

MAX_CLUSTERS = 15
_CHUNK, _SAMPLE, _REFINED = 2**14, 20_000, 2
_MAX_PASSES, _PATIENCE, _MIN_GAIN = 300, 5, 1e-5


def average_iou(boxes_wh: NDArray[Any], anchors_wh: NDArray[Any]) -> float:
    """Return the mean IoU of boxes (N, 2) and their closest anchors (A, 2) at the same centre.

    Raises:
        InputError: no boxes, no anchors, or sizes that are not positive.

    Source: YOLO9000, section 2, "Dimension Clusters", table 1.
    """
    boxes, anchors = _check_sizes(boxes_wh, "boxes"), _check_sizes(anchors_wh, "anchors")
    return 1 - _mean(_nearest(boxes, anchors, "iou")[0])


def cluster_anchors(
    boxes_wh: NDArray[Any],
    num: int,
    restarts: int = 10,
    seed: int = 0,
    distance: Distance = "iou",
) -> NDArray[np.float64]:
    """Return anchors, float64 (num, 2) by ascending area, found by k-means on boxes (N, 2).

    The order of the boxes does not matter. Many boxes are clustered on a sample first. The best
    iteration is returned, because the mean of a cluster need not have the best IoU. The distance is
    1 - IoU of the shapes, or the squared error of standard k-means.

    Raises:
        InputError: fewer distinct boxes than anchors, or a value out of range.

    Source: YOLO9000, section 2, "Dimension Clusters".
    Paper is silent: initialisation (k-means++), restarts, and empty clusters (moved to the box with
        the largest distance).
    """
    boxes = _check_sizes(boxes_wh, "boxes")
    for name, value, minimum in (("num", num, 1), ("restarts", restarts, 1), ("seed", seed, 0)):
        if value < minimum:
            raise InputError(f"{name} is {value}; allowed: {minimum} or more")
    if distance not in get_args(Distance):
        raise InputError(f"distance is {distance!r}; allowed: {', '.join(get_args(Distance))}")
    boxes = boxes[np.lexsort(boxes.T)]
    if (distinct := _count_distinct(boxes)) < num:
        raise InputError(f"{num} anchors require {num} distinct boxes; found: {distinct}")
    generator = np.random.default_rng(seed)
    use_sample = len(boxes) > _SAMPLE
    sample = boxes[generator.choice(len(boxes), _SAMPLE, replace=False)] if use_sample else boxes
    initial = [_initialise(sample, num, distance, generator) for _ in range(restarts)]
    results = sorted((_k_means(sample, start, distance) for start in initial), key=lambda t: t[0])
    if use_sample:
        results = [_k_means(boxes, anchors, distance) for _, anchors in results[:_REFINED]]
    return _sort_by_area(min(results, key=lambda t: t[0])[1])


def cluster_for_each_count(
    boxes_wh: NDArray[Any], max_count: int = MAX_CLUSTERS, restarts: int = 10, seed: int = 0
) -> list[NDArray[np.float64]]:
    """Return IoU clusters for each number of anchors: float64 (k, 2) at index k - 1.

    There are at most as many anchors as distinct boxes. The average IoU never decreases: if
    clustering finds nothing better, the worst matched box is added to the previous anchors.
    Raises `InputError` as `cluster_anchors` does.
    """
    boxes = _check_sizes(boxes_wh, "boxes")
    boxes = boxes[np.lexsort(boxes.T)]
    curve: list[NDArray[np.float64]] = []
    for num in range(1, min(max_count, _count_distinct(boxes)) + 1):
        anchors = cluster_anchors(boxes, num, restarts, seed)
        if curve and average_iou(boxes, anchors) < average_iou(boxes, curve[-1]):
            cost, _ = _nearest(boxes, curve[-1], "iou")
            anchors = _sort_by_area(np.vstack([curve[-1], boxes[cost.argmax()]]))
        curve.append(anchors)
    return curve


def faster_rcnn_anchors() -> NDArray[np.float64]:
    """Return the anchors of Faster R-CNN, float64 (9, 2), px, for a shorter image side of 600 px.

    Source: Faster R-CNN, section 3.3: areas of 128², 256², 512² px, aspect ratios 1:2, 1:1, 2:1.
    """
    sides, roots = np.array([128.0, 256.0, 512.0]), np.sqrt([0.5, 1.0, 2.0])
    sizes = [(side / root, side * root) for side in sides for root in roots]
    return np.array(sizes)


def released_anchors(name: str, cell_px: int) -> list[tuple[float, float]]:
    """Return anchors of the original program, in cells of `cell_px`; `name` is one of `Released`.

    Raises:
        InputError: an unknown name.
    """
    if name not in RELEASED:
        allowed = f"{', '.join(RELEASED)}, pairs of positive numbers, or null"
        raise InputError(f"model.anchors_wh_cell is {name!r}; allowed: {allowed}")
    scale = CELL_PX / cell_px
    return [(width * scale, height * scale) for width, height in RELEASED[name]]


def scale_to_input(
    boxes_wh_px: NDArray[Any], images_wh_px: NDArray[Any], image_size: int, resize: str
) -> NDArray[np.float64]:
    """Scale boxes (N, 2) with their images (N, 2) to a square network input of image_size px.

    `resize` is ``letterbox`` or ``stretch``.
    """
    if resize == "stretch":
        return np.asarray(boxes_wh_px / images_wh_px.astype(np.float64) * image_size)
    return scale_to_letterbox(boxes_wh_px, images_wh_px, image_size)


def scale_to_letterbox(
    boxes_wh_px: NDArray[Any], images_wh_px: NDArray[Any], image_size: int
) -> NDArray[np.float64]:
    """Scale boxes (N, 2) with their images (N, 2) to a longer side of image_size px."""
    longer = images_wh_px.max(axis=1, keepdims=True)
    return np.asarray(boxes_wh_px * (image_size / longer.astype(np.float64)))


def scale_to_shorter_side(
    boxes_wh_px: NDArray[Any], images_wh_px: NDArray[Any], length: int = 600
) -> NDArray[np.float64]:
    """Scale boxes (N, 2) with their images (N, 2) to a shorter side of `length` px."""
    shorter = images_wh_px.min(axis=1, keepdims=True)
    return np.asarray(boxes_wh_px * (length / shorter.astype(np.float64)))


def as_yaml_values(anchors_wh: NDArray[Any]) -> list[list[float]]:
    """Return anchors (A, 2) as lists of numbers with four significant digits."""
    return [[float(f"{value:.4g}") for value in anchor] for anchor in anchors_wh.tolist()]


def _check_sizes(sizes_wh: NDArray[Any], name: str) -> NDArray[np.float32]:
    sizes = np.asarray(sizes_wh, dtype=np.float32)
    if sizes.ndim != 2 or sizes.shape[1] != 2 or not len(sizes):
        raise InputError(f"{name} have shape {sizes.shape}; allowed: (N, 2), at least one")
    if not bool((np.isfinite(sizes) & (sizes > 0)).all()):
        raise InputError(f"{name}: a width or height is not positive")
    return sizes


def _mean(cost: NDArray[np.float32]) -> float:
    return float(cost.mean(dtype=np.float64))


def _count_distinct(sorted_wh: NDArray[np.float32]) -> int:
    return 1 + int((np.diff(sorted_wh, axis=0) != 0).any(axis=1).sum())


def _sort_by_area(anchors_wh: NDArray[np.float64]) -> NDArray[np.float64]:
    return anchors_wh[np.lexsort((anchors_wh[:, 0], anchors_wh.prod(axis=1)))]


def _distances(
    boxes_wh: NDArray[np.float32], anchors_wh: NDArray[np.float32], distance: Distance
) -> NDArray[np.float32]:
    w, h = np.ascontiguousarray(boxes_wh.T)  # (A, N) below: long rows are ten times faster
    anchor_w, anchor_h = anchors_wh.T[:, :, None]
    if distance == "squared_error":
        return np.asarray((w - anchor_w) ** 2 + (h - anchor_h) ** 2)
    overlap = np.minimum(w, anchor_w) * np.minimum(h, anchor_h)
    return np.asarray(1 - overlap / (w * h + anchor_w * anchor_h - overlap))


def _nearest(
    boxes_wh: NDArray[np.float32], anchors_wh: NDArray[Any], distance: Distance
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    anchors = anchors_wh.astype(np.float32)
    cost = np.empty(len(boxes_wh), dtype=np.float32)
    index = np.empty(len(boxes_wh), dtype=np.int64)
    for start in range(0, len(boxes_wh), _CHUNK):
        part = slice(start, start + _CHUNK)
        distances = _distances(boxes_wh[part], anchors, distance)
        distances.argmin(axis=0, out=index[part])
        distances.min(axis=0, out=cost[part])
    return cost, index


def _initialise(
    boxes_wh: NDArray[np.float32], num: int, distance: Distance, generator: np.random.Generator
) -> NDArray[np.float64]:
    """Draw boxes with probabilities in proportion to their distances from the boxes drawn."""
    rows = [int(generator.integers(len(boxes_wh)))]
    cost = np.full(len(boxes_wh), np.inf)
    while len(rows) < num:
        cost = np.minimum(cost, _nearest(boxes_wh, boxes_wh[rows[-1:]], distance)[0])
        cumulative = cost.cumsum()
        drawn = np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right")
        rows.append(min(int(drawn), len(boxes_wh) - 1))
    return boxes_wh[rows].astype(np.float64)


def _fill_empty_clusters(
    boxes_wh: NDArray[np.float32], anchors_wh: NDArray[np.float64], distance: Distance
) -> tuple[NDArray[np.float64], NDArray[np.float32], NDArray[np.int64]]:
    while True:
        cost, index = _nearest(boxes_wh, anchors_wh, distance)
        empty = np.flatnonzero(np.bincount(index, minlength=len(anchors_wh)) == 0)
        if not len(empty) or cost.max() <= 0:  # a sample may hold too few distinct boxes
            return anchors_wh, cost, index
        anchors_wh = anchors_wh.copy()
        anchors_wh[empty[0]] = boxes_wh[cost.argmax()]


def _k_means(
    boxes_wh: NDArray[np.float32], anchors_wh: NDArray[np.float64], distance: Distance
) -> tuple[float, NDArray[np.float64]]:
    lowest, best, stale = np.inf, anchors_wh, 0
    for _ in range(_MAX_PASSES):
        anchors_wh, cost, index = _fill_empty_clusters(boxes_wh, anchors_wh, distance)
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
