"""Inspect a source: read every image, and report sizes, classes, faults and duplicates."""

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from yolo_lightning.datamodules.files import AnnotatedImages, LabelledImages
from yolo_lightning.datamodules.source import ConcatSource, Source
from yolo_lightning.errors import InputError
from yolo_lightning.images import UnreadableSample, read_image
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


@dataclass
class Report:
    """Content of one source: N readable images with M boxes."""

    name: str
    kind: str  # "boxes" or "image labels"
    images: int = 0
    # number of objects, or images, by label name
    classes: Counter[str] = field(default_factory=Counter)
    # (N, 2), (M, 2), and the size of the image of each box (M, 2)
    sizes_wh_px: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    boxes_wh_px: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 2), np.float32))
    boxes_of_wh_px: NDArray[np.float32] = field(
        default_factory=lambda: np.zeros((0, 2), np.float32)
    )
    # (M, 2), 0…1 of the image
    centres_norm: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 2), np.float32))
    objects_per_image: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
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


def parts_of(source: Source) -> list[Source]:
    """Return the sources that a source concatenates, or the source itself."""
    return list(source.sources) if isinstance(source, ConcatSource) else [source]


def inspect(source: Source, tree: WordTree | None, workers: int | None = None) -> Report:
    """Read all of a source; check its labels if there is a tree."""
    has_boxes = hasattr(source, "shapes_wh_px")
    report = Report(source.name, "boxes" if has_boxes else "image labels")
    try:
        if isinstance(source, AnnotatedImages | LabelledImages):
            source.load_index()
        if tree is not None:
            source.bind(tree)
    except InputError as error:
        report.problem = str(error)
    if not isinstance(source, AnnotatedImages | LabelledImages):
        report.generated, report.images = True, len(source)
        for counts in source.node_counts().values() if report.problem is None else ():
            report.classes.update(counts)
        return report
    try:
        index = source.load_index()
    except InputError:
        return report
    report.images, report.classes = len(source), source.name_counts()
    report.faults = list(index.metadata["faults"])
    if isinstance(source, AnnotatedImages):
        report.objects_per_image = np.diff(index.arrays["box_offsets"])
        report.boxes_wh_px, report.boxes_of_wh_px, report.centres_norm = _boxes_of(source)
    if not report.images and report.problem is None:
        report.problem = f"{source.name}: contains no images"
    _read_all(source, report, workers)
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


class _ImageChecks(Dataset[tuple[str, int, int, str]]):
    """Hash, width, height and fault of each image."""

    def __init__(self, source: AnnotatedImages | LabelledImages) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[str, int, int, str]:
        path = self.source.image_path(index)
        digest = ""
        try:
            digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
            _, (height, width) = read_image(path)
        except OSError as error:
            return digest, 0, 0, f"{path}: cannot be read ({error.strerror})"
        except UnreadableSample as error:
            return digest, 0, 0, str(error)
        return digest, width, height, ""


def _read_all(
    source: AnnotatedImages | LabelledImages, report: Report, workers: int | None
) -> None:
    count, index_data = len(source), source.load_index()
    annotated = (
        index_data.arrays["sizes_wh"].tolist()
        if isinstance(source, AnnotatedImages) and not index_data.metadata["normalized"]
        else []
    )
    sizes = []
    for index, (digest, width, height, fault) in enumerate(_read_files(source, workers)):
        path = Path(source.image_name(index))
        if digest:
            report.digests[str(path)] = digest
        if fault:
            report.unreadable.append(fault)
        else:
            sizes.append((width, height))
            if annotated and all(annotated[index]) and annotated[index] != [width, height]:
                size = f"{annotated[index][0]} x {annotated[index][1]}"
                report.faults.append(f"{path}: is {width} x {height}, but annotated as {size}")
        if sys.stderr.isatty() and (index % 50 == 0 or index == count - 1):
            end = "\n" if index == count - 1 else ""
            print(f"\r{report.name}: {index + 1} of {count}", end=end, file=sys.stderr, flush=True)
    report.sizes_wh_px = np.array(sizes, np.int64).reshape(-1, 2)


def _read_files(
    source: AnnotatedImages | LabelledImages, workers: int | None
) -> Iterator[tuple[str, int, int, str]]:
    processes = (os.cpu_count() or 1) if workers is None else workers
    if len(source) < 64:
        processes = 0  # starting them would take longer
    loader = DataLoader(
        _ImageChecks(source),
        batch_size=16,
        num_workers=processes,
        collate_fn=list,
        worker_init_fn=_one_thread,
    )
    for rows in loader:
        yield from rows


def _one_thread(worker_id: int) -> None:
    torch.set_num_threads(1)


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
