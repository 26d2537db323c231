"""Annotations while a dataset is parsed: collect them, repair boxes, build the index."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yolo_lightning.datamodules.index import Index, pack_strings
from yolo_lightning.images import UnreadableSample, read_header

_TOLERANCE_PX = 1.0  # rounding may move boxes out of the image by this much without a report


class Annotations:
    """Annotated images while they are parsed; image paths are relative to `root`."""

    def __init__(
        self, root: Path, locate: Callable[[int, int], str], normalized: bool = False
    ) -> None:
        # locate(image, object) gives the location for messages; boxes are px, or 0…1 if normalized
        self.root, self.locate, self.normalized = root, locate, normalized
        self.faults: list[str] = []
        self.names: dict[str, int] = {}  # class numbers
        self.origins: list[str] = []  # where each class first occurs
        self._paths: list[str] = []
        self._sizes_wh: list[tuple[int, int]] = []
        self._counts: list[int] = []
        self._boxes: list[Sequence[float]] = []
        self._classes: list[int] = []
        self._numbers: list[int] = []
        self._difficult: list[bool] = []

    def add_image(self, path: str, size_wh: tuple[int, int] = (0, 0)) -> None:
        """Add an image; a size of 0 x 0 is read from its file later."""
        self._paths.append(path)
        self._sizes_wh.append(size_wh)
        self._counts.append(0)

    def add_box(
        self, box_xyxy: Sequence[float], name: str, number: int, difficult: bool = False
    ) -> None:
        """Add an object to the last image."""
        if name not in self.names:
            self.names[name] = len(self.names)
            self.origins.append(self.locate(len(self._paths) - 1, number))
        self._boxes.append(box_xyxy)
        self._classes.append(self.names[name])
        self._numbers.append(number)
        self._difficult.append(difficult)
        self._counts[-1] += 1

    def build_index(self, watched: list[Path]) -> Index:
        """Return the index of the images added."""
        boxes = np.array(self._boxes, dtype=np.float32).reshape(-1, 4)
        arrays = AnnotationArrays(
            self._paths,
            np.array(self._sizes_wh, np.int32).reshape(-1, 2),
            np.repeat(np.arange(len(self._paths)), self._counts),
            boxes,
            np.array(self._classes, np.int32),
            np.array(self._numbers, np.int64),
            np.array(self._difficult, np.bool_),
            np.zeros(len(boxes), np.bool_),
            np.zeros(len(boxes), np.float32),
        )
        return build_index(arrays, self, watched)


@dataclass
class AnnotationArrays:
    """N images with M objects, sorted by image."""

    paths: list[str]
    sizes_wh: NDArray[np.int32]  # (N, 2), px; 0 if unknown
    image_numbers: NDArray[np.int64]  # (M,), the image of each object
    boxes_xyxy: NDArray[np.float32]  # (M, 4), px or relative to the image
    classes: NDArray[np.int32]
    numbers: NDArray[np.int64]  # (M,), of the objects, for messages
    difficult: NDArray[np.bool_]
    crowd: NDArray[np.bool_]
    areas_px2: NDArray[np.float32]  # (M,), of outlines; 0 if only the box is known


def build_index(arrays: AnnotationArrays, annotations: Annotations, watched: list[Path]) -> Index:
    """Repair or drop bad boxes and return the index."""
    _read_unknown_sizes(arrays, annotations)
    keep = _repair_boxes(arrays, annotations)
    counts = np.bincount(arrays.image_numbers[keep], minlength=len(arrays.paths))
    packed = {
        **pack_strings("paths", arrays.paths),
        "sizes_wh": arrays.sizes_wh,
        "box_offsets": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        "boxes_xyxy": arrays.boxes_xyxy[keep],
        "classes": arrays.classes[keep],
        "difficult": arrays.difficult[keep],
        "crowd": arrays.crowd[keep],
        "areas_px2": arrays.areas_px2[keep],
    }
    metadata = {
        "names": list(annotations.names),
        "origins": annotations.origins,
        "faults": annotations.faults,
        "root": str(annotations.root),
        "normalized": annotations.normalized,
    }
    return Index(packed, metadata, watched)


def build_label_index(
    root: Path,
    paths: Sequence[str],
    labels: Sequence[str],
    origins: Mapping[str, str],
    faults: Sequence[str],
    watched: Sequence[Path],
) -> Index:
    """Return the index of images with one label each; paths are relative to `root`."""
    names = sorted(origins)
    numbers = {name: number for number, name in enumerate(names)}
    arrays = {
        **pack_strings("paths", paths),
        "classes": np.array([numbers[label] for label in labels], np.int32),
    }
    metadata = {
        "names": names,
        "origins": [origins[name] for name in names],
        "faults": list(faults),
        "root": str(root),
    }
    return Index(arrays, metadata, list(watched))


def _read_unknown_sizes(arrays: AnnotationArrays, annotations: Annotations) -> None:
    """Read image sizes from files where the annotated size is missing or a box exceeds it."""
    uncertain = arrays.sizes_wh.min(axis=1, initial=1) <= 0
    if not annotations.normalized:  # is the box wrong, or the size?
        high = np.maximum(arrays.boxes_xyxy[:, :2], arrays.boxes_xyxy[:, 2:])
        exceeds = (high > arrays.sizes_wh[arrays.image_numbers] + _TOLERANCE_PX).any(axis=1)
        uncertain[arrays.image_numbers[exceeds]] = True
    numbers = np.flatnonzero(uncertain).tolist()
    if not numbers:
        return

    def read_size_wh(number: int) -> tuple[int, int]:
        try:
            height, width = read_header(annotations.root / arrays.paths[number]).size_hw
        except UnreadableSample:
            return 0, 0
        return width, height

    annotated = arrays.sizes_wh[numbers].tolist()
    with ThreadPoolExecutor(8) as pool:
        actual = list(pool.map(read_size_wh, numbers))
    for number, old, new in zip(numbers, annotated, actual, strict=True):
        if all(old) and all(new) and tuple(old) != new:
            annotations.faults.append(
                f"{annotations.root / arrays.paths[number]}: is {new[0]} x {new[1]}, but annotated "
                f"as {old[0]} x {old[1]}"
            )
        arrays.sizes_wh[number] = new if all(new) else old


def _repair_boxes(arrays: AnnotationArrays, annotations: Annotations) -> NDArray[np.bool_]:
    """Repair boxes in place, report faults, and return the mask of the objects to keep."""
    boxes = arrays.boxes_xyxy
    faults: list[tuple[int, str]] = []

    def report(rows: Any, fault: str) -> None:
        faults.extend((int(row), fault) for row in np.flatnonzero(rows))

    keep = np.isfinite(boxes).all(axis=1)
    report(~keep, "has no usable box, skipped")
    boxes[~keep] = 0
    report((boxes[:, 2:] < boxes[:, :2]).any(axis=1), "has swapped corners, repaired")
    low, high = np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])
    empty = keep & (high <= low).any(axis=1)
    report(empty, "has no area, skipped")
    sizes = arrays.sizes_wh[arrays.image_numbers].astype(np.float32)
    # an unreadable image has no known edge
    edge = np.where(sizes > 0, 1 if annotations.normalized else sizes, np.inf).astype(np.float32)
    outside = keep & ~empty & ((low >= edge) | (high <= 0)).any(axis=1)
    report(outside, "lies outside the image, skipped")
    keep = keep & ~empty & ~outside
    excess_px = np.maximum(high - edge, -low) * (sizes if annotations.normalized else 1)
    report(keep & (excess_px > _TOLERANCE_PX).any(axis=1), "extends beyond the image, clipped")
    boxes[:, :2], boxes[:, 2:] = low.clip(0), np.minimum(high, edge)
    duplicate: Any = _duplicates(arrays, keep)
    report(duplicate, "is listed twice, one skipped")
    for row, fault in sorted(faults):
        location = annotations.locate(int(arrays.image_numbers[row]), int(arrays.numbers[row]))
        annotations.faults.append(f"{location} {fault}")
    return np.asarray(keep & ~duplicate)


def _duplicates(arrays: AnnotationArrays, keep: Any) -> NDArray[np.bool_]:
    """Return which objects repeat another one of their image; regions of a crowd never do."""
    columns = [arrays.image_numbers, arrays.classes, *arrays.boxes_xyxy.view(np.uint32).T]
    key = np.zeros(len(keep), dtype=np.uint64)
    for column in columns:
        key = (key ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    rows = np.flatnonzero(keep & ~arrays.crowd)
    rows = rows[np.argsort(arrays.difficult[rows], kind="stable")]  # prefer the easy one of two
    _, first = np.unique(key[rows], return_index=True)
    duplicate = np.zeros(len(keep), dtype=np.bool_)
    duplicate[rows] = True
    duplicate[rows[first]] = False
    return duplicate
