"""Images with boxes in files: annotations are collected, cleaned, indexed, and read."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yolo_lightning.datamodules.index import Index, Parsed, pack
from yolo_lightning.datamodules.indexed import Indexed
from yolo_lightning.datamodules.source import DetectionSample, DetectionSource
from yolo_lightning.images import (
    UnreadableSample,
    read_header,
    read_image,
)

_NOISE_PX = 1.0
"""Boxes reach over the edge by rounding; only what is more than this is told."""


class Annotations:
    """Annotated images as they are parsed; `finish` cleans the boxes and makes the index.

    Args:
        root: folder that image paths are relative to.
        place: names an object of an image in messages: (number of the image, number of the
            object) to text.
        normalised: whether boxes are relative to the image instead of in px.
    """

    def __init__(
        self, root: Path, place: Callable[[int, int], str], normalised: bool = False
    ) -> None:
        self.root, self.place, self.normalised = root, place, normalised
        self.faults: list[str] = []
        self.images: list[str] = []
        self.sizes_wh: list[tuple[int, int]] = []
        self.counts: list[int] = []
        self.boxes: list[Sequence[float]] = []
        self.classes: list[int] = []
        self.numbers: list[int] = []
        self.difficult: list[bool] = []
        self.names: dict[str, int] = {}
        self.origins: list[str] = []

    def add_image(self, path: str, size_wh: tuple[int, int] = (0, 0)) -> None:
        """Begin an image; a size of 0 x 0 is looked up in the file."""
        self.images.append(path)
        self.sizes_wh.append(size_wh)
        self.counts.append(0)

    def add_box(
        self, box_xyxy: Sequence[float], name: str, number: int, difficult: bool = False
    ) -> None:
        """Add an object to the newest image."""
        if name not in self.names:
            self.names[name] = len(self.names)
            self.origins.append(self.place(len(self.images) - 1, number))
        self.boxes.append(box_xyxy)
        self.classes.append(self.names[name])
        self.numbers.append(number)
        self.difficult.append(difficult)
        self.counts[-1] += 1

    def finish(self, watched: list[Path]) -> Parsed:
        """Return the index of what was added."""
        boxes = np.array(self.boxes, dtype=np.float32).reshape(-1, 4)
        return finish(
            Raw(
                self.images,
                np.array(self.sizes_wh, np.int32).reshape(-1, 2),
                np.repeat(np.arange(len(self.images)), self.counts),
                boxes,
                np.array(self.classes, np.int32),
                np.array(self.numbers, np.int64),
                np.array(self.difficult, np.bool_),
                np.zeros(len(boxes), np.bool_),
                np.zeros(len(boxes), np.float32),
            ),
            self,
            watched,
        )


class Raw:
    """Parsed arrays before cleaning; `boxes_xyxy` in px or relative, objects sorted by image."""

    def __init__(
        self,
        images: list[str],
        sizes_wh: NDArray[np.int32],
        image_of: NDArray[np.int64],
        boxes_xyxy: NDArray[np.float32],
        classes: NDArray[np.int32],
        numbers: NDArray[np.int64],
        difficult: NDArray[np.bool_],
        crowd: NDArray[np.bool_],
        areas_px2: NDArray[np.float32],
    ) -> None:
        self.images, self.sizes_wh, self.image_of = images, sizes_wh, image_of
        self.boxes_xyxy, self.classes, self.numbers = boxes_xyxy, classes, numbers
        self.difficult, self.crowd, self.areas_px2 = difficult, crowd, areas_px2


def finish(raw: Raw, about: Annotations, watched: list[Path]) -> Parsed:
    """Clean the boxes and return the index."""
    _look_up_sizes(raw, about)
    kept = _clean(raw, about)
    counts = np.bincount(raw.image_of[kept], minlength=len(raw.images))
    arrays = {
        **pack("images", raw.images),
        "sizes_wh": raw.sizes_wh,
        "first": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        "boxes_xyxy": raw.boxes_xyxy[kept],
        "classes": raw.classes[kept],
        "difficult": raw.difficult[kept],
        "crowd": raw.crowd[kept],
        "areas_px2": raw.areas_px2[kept],
    }
    facts = {
        "names": list(about.names),
        "origins": about.origins,
        "faults": about.faults,
        "root": str(about.root),
        "normalised": about.normalised,
    }
    return Parsed(Index(arrays, facts), watched)


def _look_up_sizes(raw: Raw, about: Annotations) -> None:
    """Fill sizes that no annotation tells from the files, where these can be read."""
    doubted = raw.sizes_wh.min(axis=1, initial=1) <= 0
    if not about.normalised:  # a box over the edge: is it the box or the size that is wrong?
        far = np.maximum(raw.boxes_xyxy[:, :2], raw.boxes_xyxy[:, 2:])
        over = (far > raw.sizes_wh[raw.image_of] + _NOISE_PX).any(axis=1)
        doubted[raw.image_of[over]] = True
    unknown = np.flatnonzero(doubted)

    def size(number: int) -> tuple[int, int]:
        try:
            height, width = read_header(about.root / raw.images[number]).size_hw
        except UnreadableSample:
            return 0, 0
        return width, height

    if len(unknown):
        with ThreadPoolExecutor(8) as pool:
            stated = raw.sizes_wh[unknown].tolist()
            found = list(pool.map(size, unknown.tolist()))
        for number, said, true in zip(unknown.tolist(), stated, found, strict=True):
            if all(said) and all(true) and tuple(said) != true:
                about.faults.append(
                    f"{about.root / raw.images[number]}: is {true[0]} x {true[1]}, its annotation "
                    f"says {said[0]} x {said[1]}"
                )
            raw.sizes_wh[number] = true if all(true) else said


def _clean(raw: Raw, about: Annotations) -> NDArray[np.bool_]:
    """Repair boxes in place; return which stay, and say in `about.faults` what was wrong."""
    boxes = raw.boxes_xyxy
    found: list[tuple[int, str]] = []

    def tell(rows: Any, what: str) -> None:
        found.extend((int(row), what) for row in np.flatnonzero(rows))

    kept = np.isfinite(boxes).all(axis=1)
    tell(~kept, "has no usable box, skipped")
    boxes[~kept] = 0
    tell((boxes[:, 2:] < boxes[:, :2]).any(axis=1), "has swapped corners, repaired")
    low, high = np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])
    empty = kept & (high <= low).any(axis=1)
    tell(empty, "has no area, skipped")
    sizes = raw.sizes_wh[raw.image_of].astype(np.float32)
    # of an image that cannot be read nobody knows where its edge is
    edge = np.where(sizes > 0, 1 if about.normalised else sizes, np.inf).astype(np.float32)
    outside = kept & ~empty & ((low >= edge) | (high <= 0)).any(axis=1)
    tell(outside, "lies outside the image, skipped")
    kept = kept & ~empty & ~outside
    over = np.maximum(high - edge, -low) * (sizes if about.normalised else 1)
    tell(kept & (over > _NOISE_PX).any(axis=1), "reaches over the edge, clipped")
    boxes[:, :2], boxes[:, 2:] = low.clip(0), np.minimum(high, edge)
    again: Any = _repeated(raw, kept)
    tell(again, "stands there twice, one skipped")
    for row, what in sorted(found):
        where = about.place(int(raw.image_of[row]), int(raw.numbers[row]))
        about.faults.append(f"{where} {what}")
    return np.asarray(kept & ~again)


def _repeated(raw: Raw, kept: Any) -> NDArray[np.bool_]:
    """Return which objects equal another one of the same image that stays; crowds never do."""
    columns = [raw.image_of, raw.classes, *raw.boxes_xyxy.view(np.uint32).T]
    key = np.zeros(len(kept), dtype=np.uint64)
    for column in columns:
        key = (key ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    rows = np.flatnonzero(kept & ~raw.crowd)
    rows = rows[np.argsort(raw.difficult[rows], kind="stable")]  # of two, the easy one stays
    _, first = np.unique(key[rows], return_index=True)
    again = np.zeros(len(kept), dtype=np.bool_)
    again[rows] = True
    again[rows[first]] = False
    return again


class AnnotatedImages(Indexed, DetectionSource):
    """A detection source over an index."""

    def read(self, index: int, least_side: int | None = None) -> DetectionSample:
        """Return one sample, its boxes clipped to the image."""
        opened = self.open()
        path = self.image_path(index)
        image, (height, width) = read_image(path, least_side)
        first, last = opened["first"][index : index + 2]
        boxes = np.array(opened["boxes_xyxy"][first:last])
        stated = tuple(opened["sizes_wh"][index].tolist())
        faults = []
        if all(stated) and stated != (width, height) and not opened.facts["normalised"]:
            said = f"{stated[0]} x {stated[1]}"
            faults.append(f"{path}: is {width} x {height}, its annotation says {said}")
        if opened.facts["normalised"]:
            boxes *= [width, height, width, height]
        boxes = boxes.clip(0, [width, height, width, height])
        whole = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        if not whole.all():
            faults.append(f"{path}: {int((~whole).sum())} boxes outside it, skipped")
        scale = [image.shape[1] / width, image.shape[0] / height] * 2
        crowd = np.array(opened["crowd"][first:last][whole])
        return DetectionSample(
            image,
            (boxes[whole] * scale).astype(np.float32),
            self._nodes[opened["classes"][first:last]][whole],
            opened["difficult"][first:last][whole] | crowd,
            faults,
            (height, width),
            crowd,
            opened["areas_px2"][first:last][whole],
        )

    def shapes_wh_px(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return sizes of boxes and of their images, from the index; see `DetectionSource`."""
        index = self.open()
        boxes = np.array(index["boxes_xyxy"][:, 2:] - index["boxes_xyxy"][:, :2])
        sizes = np.repeat(index["sizes_wh"], np.diff(index["first"]), axis=0).astype(np.float32)
        if index.facts["normalised"]:
            boxes *= sizes
        easy = ~(index["difficult"] | index["crowd"]) & (sizes > 0).all(axis=1)
        return boxes[easy], sizes[easy]
