"""Inspect a source: read every image, and report sizes, classes, faults and duplicates."""

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yolo_lightning.datamodules.files import AnnotatedImages, FileSource
from yolo_lightning.datamodules.source import DetectionSource, Source
from yolo_lightning.errors import InputError
from yolo_lightning.images import UnreadableSample, decode_image, read_file
from yolo_lightning.tree.wordtree import WordTree

FAULTS = {
    "no usable box": "boxes that are not four numbers",
    "has no area": "boxes without an area",
    "swapped corners": "boxes with swapped corners",
    "outside the image": "boxes outside their image",
    "beyond the image": "boxes that extend beyond their image",
    "listed twice": "objects or images listed twice",
    "is missing": "missing images",
    "no such file": "images without a text file",
    "empty, its image": "empty text files",
    "unknown category": "unknown categories",
    ": class ": "unknown class numbers",
    "not readable": "unreadable annotations",
    "gives the size as": "sizes of zero",
    "but annotated as": "image sizes that differ from the file's",
}

_SMALL, _MEDIUM = 32**2, 96**2
_CHUNK = 256  # images that are checked at a time


_no_sizes = partial(np.zeros, (0, 2))


@dataclass
class Report:
    """Content of one source: N readable images with M boxes."""

    name: str
    kind: str  # "boxes" or "image labels"
    images: int = 0
    # number of objects, or images, by label name
    classes: Counter[str] = field(default_factory=Counter)
    sizes_wh_px: NDArray[Any] = field(default_factory=_no_sizes)  # (N, 2), of images
    boxes_wh_px: NDArray[Any] = field(default_factory=_no_sizes)  # (M, 2)
    boxes_of_wh_px: NDArray[Any] = field(default_factory=_no_sizes)  # (M, 2), of their images
    centres_norm: NDArray[Any] = field(default_factory=_no_sizes)  # (M, 2), 0…1 of the image
    objects_per_image: NDArray[Any] = field(default_factory=partial(np.zeros, 0, np.int64))
    unreadable: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)  # what is repaired or skipped
    digests: dict[str, str] = field(default_factory=dict)  # hashes of the image files, by path
    problem: str | None = None  # why training would not start
    generated: bool = False  # images are drawn instead of read

    def fault_kinds(self) -> Counter[str]:
        """Return the number of faults of each kind."""
        return Counter(
            next((kind for part, kind in FAULTS.items() if part in fault), "others")
            for fault in self.faults
        )

    def to_plain(self) -> dict[str, Any]:
        """Return counts, percentiles and messages as JSON values."""
        areas = self.boxes_wh_px.prod(axis=1)
        shorter, longer = self.boxes_wh_px.min(axis=1), self.boxes_wh_px.max(axis=1)
        return {
            "name": self.name,
            "kind": self.kind,
            "images": self.images,
            "classes": dict(self.classes.most_common()),
            "image_width_px": _percentiles(self.sizes_wh_px[:, 0]),
            "image_height_px": _percentiles(self.sizes_wh_px[:, 1]),
            "image_sizes": {
                f"{w} x {h}": count
                for (w, h), count in Counter(map(tuple, self.sizes_wh_px.tolist())).most_common(10)
            },
            "box_side_px": _percentiles(np.sqrt(areas)),
            "box_side_relative": _percentiles(
                np.sqrt(areas / self.boxes_of_wh_px.prod(axis=1).clip(min=1))
            ),
            "box_longer_to_shorter_side": _percentiles(longer / shorter.clip(min=1e-6)),
            "boxes_by_area": {
                "small, below 32 x 32 px": int((areas < _SMALL).sum()),
                "medium": int(((areas >= _SMALL) & (areas < _MEDIUM)).sum()),
                "large, from 96 x 96 px": int((areas >= _MEDIUM).sum()),
            },
            "objects_per_image": _percentiles(self.objects_per_image),
            "images_without_objects": int((self.objects_per_image == 0).sum()),
            "fault_kinds": dict(self.fault_kinds().most_common()),
            "faults": self.faults,
            "unreadable": self.unreadable,
            "problem": self.problem,
        }


def _percentiles(values: NDArray[Any]) -> dict[str, float]:
    if not len(values):
        return {}
    points = np.percentile(values, [0, 5, 50, 95, 100])
    names = ("min", "5 %", "median", "95 %", "max")
    return {name: round(float(v), 3) for name, v in zip(names, points, strict=True)}


def inspect(source: Source, tree: WordTree) -> Report:
    """Bind a source to the tree, and read all of its images."""
    report = Report(source.name, "boxes" if isinstance(source, DetectionSource) else "image labels")
    try:
        source.bind(tree)
    except InputError as error:
        report.problem = str(error)
    if not isinstance(source, FileSource):
        report.generated, report.images = True, len(source)
        for counts in source.node_counts().values() if report.problem is None else ():
            report.classes.update(counts)
        return report
    try:
        index = source.load_index()
    except InputError:
        return report
    report.images, report.classes = len(source), source.name_counts()
    report.faults = list(source.faults)
    if isinstance(source, AnnotatedImages):
        report.objects_per_image = np.diff(index.arrays["box_offsets"])
        report.boxes_wh_px, report.boxes_of_wh_px, report.centres_norm = _boxes_of(source)
    _read_all(source, report)
    return report


def _boxes_of(
    source: AnnotatedImages,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Return sizes of boxes, sizes of their images, and centres (0…1)."""
    index = source.load_index()
    arrays = index.arrays
    counts = np.diff(arrays["box_offsets"])
    sizes = np.repeat(arrays["sizes_wh"], counts, axis=0).astype(np.float32)
    known = (sizes > 0).all(axis=1)
    boxes, sizes = np.array(arrays["boxes_xyxy"])[known], sizes[known]
    if index.metadata["normalized"]:
        boxes *= np.tile(sizes, 2)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 / sizes
    return boxes[:, 2:] - boxes[:, :2], sizes, centres


def _read_all(source: FileSource, report: Report) -> None:
    """Add sizes, hashes and faults of all images to the report."""
    index_data = source.load_index()
    has_sizes = isinstance(source, AnnotatedImages) and not index_data.metadata["normalized"]
    annotated = index_data.arrays["sizes_wh"].tolist() if has_sizes else []
    sizes = []
    for index, (path, digest, size_wh, fault) in enumerate(_check_images(source)):
        if digest:
            report.digests[str(path)] = digest
        if size_wh is None:
            report.unreadable.append(fault)
            continue
        sizes.append(size_wh)
        if annotated and all(annotated[index]) and annotated[index] != size_wh:
            actual, old = (f"{width} x {height}" for width, height in (size_wh, annotated[index]))
            report.faults.append(f"{path}: is {actual}, but annotated as {old}")
    report.sizes_wh_px = np.array(sizes, np.int64).reshape(-1, 2)


def _check_images(source: FileSource) -> Iterator[tuple[Path, str, list[int] | None, str]]:
    """Check all images on all cores, in order, and print the progress in a terminal."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding and hashing release the GIL
        for start in range(0, len(source), _CHUNK):
            stop = min(start + _CHUNK, len(source))
            yield from pool.map(_check_image, map(source.image_path, range(start, stop)))
            if sys.stderr.isatty():
                end = "\n" if stop == len(source) else ""
                text = f"\r{source.name}: {stop} of {len(source)}"
                print(text, end=end, file=sys.stderr, flush=True)


def _check_image(path: Path) -> tuple[Path, str, list[int] | None, str]:
    """Return path, hash and size_wh of an image; the size is None if there is a fault."""
    digest = ""
    try:
        data = read_file(path)
        digest = hashlib.blake2b(data, digest_size=16).hexdigest()
        _, (height, width) = decode_image(data, str(path))
    except UnreadableSample as error:
        return path, digest, None, str(error)
    return path, digest, [width, height], ""


def same_files(reports: Sequence[tuple[str, Report]]) -> list[list[tuple[str, str]]]:
    """Return groups of identical files, as (part of the recipe, path)."""
    groups: dict[str, dict[str, str]] = {}
    for part, report in reports:
        for path, digest in report.digests.items():
            real = os.path.realpath(path)
            groups.setdefault(digest, {}).setdefault(real, part)
    return [
        [(part, path) for path, part in group.items()]
        for group in groups.values()
        if len(group) > 1
    ]
