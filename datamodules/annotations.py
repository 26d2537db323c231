"""Annotations while a dataset is parsed: collect them, repair boxes, build the index."""

import itertools
import os
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yolo_lightning.datamodules.dataset_files import DatasetFiles, visible_folders
from yolo_lightning.datamodules.index import Index, encode, offsets, pack_strings
from yolo_lightning.errors import require_name, short
from yolo_lightning.images import UnreadableSample, is_image, read_header

_MAX_SIDE_PX = 10**6  # of an image
_TOLERANCE_PX = 1.0  # rounding may move boxes out of the image by this much without a report

# one object: the number of its image, corners in px or 0…1, class, number in messages, area of the
# outline (0 if unknown)
_OBJECT = np.dtype(
    [
        ("image", np.int64), ("box_xyxy", np.float32, 4), ("class", np.int32),
        ("number", np.int64), ("difficult", np.bool_), ("crowd", np.bool_),
        ("area_px2", np.float32),
    ]
)  # fmt: skip

Objects = NDArray[Any]  # (M,) of _OBJECT, by image


class Annotations(DatasetFiles):
    """Annotated images while they are parsed; image paths are relative to `root`."""

    def __init__(
        self,
        root: Path,
        locate: Callable[[int, int], str],
        normalized: bool = False,
        allow_outside: bool = False,
    ) -> None:
        # locate(image, object) gives the location for messages; boxes are px, or 0…1 if normalized
        super().__init__(root, allow_outside)
        self.locate, self.normalized = locate, normalized
        self.paths: list[str] = []
        self._sizes_wh: list[tuple[int, int]] = []
        self._objects: list[tuple[Any, ...]] = []
        self._classes: dict[str, int] = {}  # numbers by name
        self._origins: list[str] = []

    def add_class(self, name: str, origin: str) -> None:
        """Add a class, whether it has objects or not; `origin` is where it is defined."""
        if name not in self._classes:
            self._classes[require_name(name, origin)] = len(self._classes)
            self._origins.append(origin)

    def add_image(self, path: str, width: Any = None, height: Any = None, origin: str = "") -> int:
        """Add an image and return its number; a size that is not given is read from its file.

        `origin` is where the size, in px, is given.
        """
        is_valid = all(type(v) is int and 0 < v <= _MAX_SIDE_PX for v in (width, height))
        if not is_valid and (width, height) != (None, None):
            self.faults.append(
                f"{origin}: gives the size as {short(width)} x {short(height)}, the size of the "
                "image file is used"
            )
        self.paths.append(path)
        self._sizes_wh.append((width, height) if is_valid else (0, 0))
        return len(self.paths) - 1

    def add_box(
        self,
        image: int,
        box_xyxy: Sequence[float],
        name: str,
        number: int,
        difficult: bool = False,
        crowd: bool = False,
        area_px2: float = 0.0,
    ) -> None:
        """Add an object to an image."""
        if name not in self._classes:
            self.add_class(name, self.locate(image, number))
        row = (image, tuple(box_xyxy), self._classes[name], number, difficult, crowd, area_px2)
        self._objects.append(row)

    def build_index(self) -> Index:
        """Repair or drop bad boxes and return the index."""
        with np.errstate(over="ignore"):  # coordinates above 1e38 become infinite
            objects = np.array(self._objects, _OBJECT)
        objects = objects[np.argsort(objects["image"], kind="stable")]
        sizes_wh = np.array(self._sizes_wh, np.int32).reshape(-1, 2)
        self._read_unknown_sizes(objects, sizes_wh)
        objects = objects[self._repair_boxes(objects, sizes_wh)]
        counts = np.bincount(objects["image"], minlength=len(self.paths))
        arrays = {
            **pack_strings("paths", self.paths),
            "sizes_wh": sizes_wh,
            "box_offsets": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            "boxes_xyxy": np.ascontiguousarray(objects["box_xyxy"]),
            "classes": objects["class"].copy(),
            "difficult": objects["difficult"].copy(),
            "crowd": objects["crowd"].copy(),
            "areas_px2": objects["area_px2"].copy(),
        }
        metadata = {
            "names": list(self._classes),
            "origins": self._origins,
            "faults": self.faults,
            "root": str(self.root),
            "normalized": self.normalized,
        }
        return Index(arrays, metadata, self.watched)

    def _read_unknown_sizes(self, objects: Objects, sizes_wh: NDArray[np.int32]) -> None:
        """Read image sizes from files where the annotated size is missing or a box exceeds it."""
        uncertain = sizes_wh.min(axis=1, initial=1) <= 0
        if not self.normalized:  # is the box wrong, or the size?
            high = np.maximum(objects["box_xyxy"][:, :2], objects["box_xyxy"][:, 2:])
            exceeds = (high > sizes_wh[objects["image"]] + _TOLERANCE_PX).any(axis=1)
            uncertain[objects["image"][exceeds]] = True
        numbers = np.flatnonzero(uncertain).tolist()
        paths = [self.root / self.paths[number] for number in numbers]
        with ThreadPoolExecutor(8) as pool:
            actual = list(pool.map(_read_size_wh, paths))
        for number, path, new in zip(numbers, paths, actual, strict=True):
            old = tuple(sizes_wh[number].tolist())
            if all(old) and all(new) and old != new:
                self.faults.append(
                    f"{path}: is {new[0]} x {new[1]}, but annotated as {old[0]} x {old[1]}"
                )
            if all(new):
                sizes_wh[number] = new

    def _repair_boxes(self, objects: Objects, sizes_wh: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Repair boxes in place, report faults, and return the mask of the objects to keep."""
        boxes = objects["box_xyxy"]
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
        sizes = sizes_wh[objects["image"]].astype(np.float32)
        # an unreadable image has no known edge
        edge = np.where(sizes > 0, 1 if self.normalized else sizes, np.inf).astype(np.float32)
        outside = keep & ~empty & ((low >= edge) | (high <= 0)).any(axis=1)
        report(outside, "lies outside the image, skipped")
        keep = keep & ~empty & ~outside
        with np.errstate(over="ignore"):
            excess_px = np.maximum(high - edge, -low) * (sizes if self.normalized else 1)
        report(keep & (excess_px > _TOLERANCE_PX).any(axis=1), "extends beyond the image, clipped")
        boxes[:, :2], boxes[:, 2:] = low.clip(0), np.minimum(high, edge)
        duplicate: Any = _duplicates(objects, keep)
        report(duplicate, "is listed twice, one skipped")
        for row, fault in sorted(faults):
            location = self.locate(int(objects["image"][row]), int(objects["number"][row]))
            self.faults.append(f"{location} {fault}")
        return np.asarray(keep & ~duplicate)


class ImageLabels(DatasetFiles):
    """Images with one label each while they are parsed; paths are relative to `root`."""

    # bytes and numbers instead of strings: 14 million paths take 0.5 GB instead of 2.5

    def __init__(self, root: Path, allow_outside: bool = False) -> None:
        super().__init__(root, allow_outside)
        self._paths = bytearray()  # one after the other
        self._lengths = array("i")  # of each path, bytes
        self._labels = array("i")  # of each image, in the order of `_origins`
        self._numbers: dict[str, int] = {}  # of each label
        self._origins: list[str] = []  # where each label first occurs

    def add(self, path: str, label: str, origin: str) -> None:
        """Add an image."""
        self._add_all([path], label, origin)

    def _add_all(self, paths: Sequence[str], label: str, origin: str) -> None:
        number = self._numbers.setdefault(label, len(self._numbers))
        if number == len(self._origins):
            self._origins.append(origin)
            require_name(label, origin)
        encoded = [encode(path) for path in paths]
        self._paths += b"".join(encoded)
        self._lengths.extend(map(len, encoded))
        self._labels.extend(itertools.repeat(number, len(encoded)))

    def __len__(self) -> int:
        return len(self._lengths)

    def add_class_folders(self, folder: Path) -> None:
        """Add the images below the folders in a folder; the folders' names are the labels."""
        for class_folder in visible_folders(folder):
            count = len(self)
            for parent, names in self.walk_folders(class_folder):
                images = [name for name in names if is_image(name)]
                if images:
                    prefix = os.path.join(os.path.relpath(parent, self.root), "")
                    paths = [prefix + name for name in images]
                    self._add_all(paths, class_folder.name, str(class_folder))
            if len(self) == count:
                self.faults.append(f"{class_folder}: no images")

    def build_index(self) -> Index:
        """Return the index."""
        names = sorted(self._numbers)
        order = [self._numbers[name] for name in names]
        sorted_numbers = np.empty(len(names), np.int32)
        sorted_numbers[order] = np.arange(len(names), dtype=np.int32)
        arrays: dict[str, NDArray[Any]] = {
            "paths": np.frombuffer(self._paths, np.uint8),
            "paths_offsets": offsets(np.frombuffer(self._lengths, np.int32)),
            "classes": sorted_numbers[np.frombuffer(self._labels, np.int32)],
        }
        metadata = {
            "names": names,
            "origins": [self._origins[number] for number in order],
            "faults": self.faults,
            "root": str(self.root),
        }
        return Index(arrays, metadata, self.watched)


def _read_size_wh(path: Path) -> tuple[int, int]:
    try:
        height, width = read_header(path).size_hw
    except UnreadableSample:
        return 0, 0
    return width, height


def _duplicates(objects: Objects, keep: Any) -> NDArray[np.bool_]:
    """Return which objects repeat another one of their image; regions of a crowd never do."""
    rows = np.flatnonzero(keep & ~objects["crowd"])
    table = np.column_stack([objects["image"], objects["class"], objects["box_xyxy"]])[rows]
    # equal ones become neighbours, those that are not difficult first
    order = np.lexsort([objects["difficult"][rows], *table.T])
    repeats = (table[order[1:]] == table[order[:-1]]).all(axis=1)
    duplicate = np.zeros(len(keep), dtype=np.bool_)
    duplicate[rows[order[1:][repeats]]] = True
    return duplicate
