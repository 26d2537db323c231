"""Everything about a source, read whole: what it holds, what is faulty, what is there twice."""

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

from yolo_lightning.datamodules.annotated import AnnotatedImages
from yolo_lightning.datamodules.labelled import LabelledImages
from yolo_lightning.datamodules.source import ConcatSource, Source
from yolo_lightning.errors import InputError
from yolo_lightning.images import UnreadableSample, read_image
from yolo_lightning.tree.wordtree import WordTree

FAULTS = {
    "no usable box": "boxes that are no four numbers",
    "has no area": "boxes without an area",
    "swapped corners": "boxes with swapped corners",
    "outside the image": "boxes outside their image",
    "over the edge": "boxes over the edge",
    "there twice": "objects or images listed twice",
    "is missing": "missing images",
    "no such file": "images without a text file",
    "empty, its image": "empty text files",
    "unknown category": "unknown categories",
    ": class ": "unknown class numbers",
    "not readable": "unreadable annotations",
    "gives the size as": "sizes of zero",
    "its annotation says": "sizes that are not the image's",
}
"""Kinds of faults by a part of their sentence."""

_SMALL, _MEDIUM = 32**2, 96**2


@dataclass
class Report:
    """What was found in one source.

    Attributes:
        name: of the source.
        kind: ``boxes`` or ``image labels``.
        images: how many.
        classes: objects, or images, by the source's own names.
        sizes_wh_px: int64 (N, 2), of the images that could be read.
        boxes_wh_px, boxes_of_wh_px: float32 (M, 2), boxes and the images that they lie in.
        centres_norm: float32 (M, 2), centres of boxes, 0…1 of their images.
        objects_per_image: int64 (N,).
        unreadable: images that cannot be decoded, a sentence each.
        faults: what is repaired or skipped, a sentence each.
        digests: of the files' bytes, by path.
        problem: why training would not start, if it would not.
        generated: whether images are drawn instead of read.
    """

    name: str
    kind: str
    images: int = 0
    classes: Counter[str] = field(default_factory=Counter)
    sizes_wh_px: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    boxes_wh_px: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 2), np.float32))
    boxes_of_wh_px: NDArray[np.float32] = field(
        default_factory=lambda: np.zeros((0, 2), np.float32)
    )
    centres_norm: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 2), np.float32))
    objects_per_image: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    unreadable: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    problem: str | None = None
    generated: bool = False

    def fault_kinds(self) -> Counter[str]:
        """Return how many faults of each kind there are."""
        found: Counter[str] = Counter()
        for fault in self.faults:
            found[next((kind for part, kind in FAULTS.items() if part in fault), "others")] += 1
        return found

    def to_plain(self) -> dict[str, Any]:
        """Return counts, percentiles and sentences, as JSON holds them."""
        areas = self.boxes_wh_px.prod(axis=1)
        least, most = self.boxes_wh_px.min(axis=1), self.boxes_wh_px.max(axis=1)
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
            "box_longer_to_shorter_side": _percentiles(most / least.clip(min=1e-6)),
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
    names = ("least", "5 %", "median", "95 %", "most")
    return {name: round(float(v), 3) for name, v in zip(names, points, strict=True)}


def parts_of(source: Source) -> list[Source]:
    """Return the sources that a source is made of."""
    return list(source.sources) if isinstance(source, ConcatSource) else [source]


def inspect(source: Source, tree: WordTree | None, workers: int | None = None) -> Report:
    """Read a source whole.

    Args:
        source: bound or not.
        tree: what its labels are looked up in; None where there is none yet.
        workers: processes that decode; as many as there are cores by default.
    """
    has_boxes = hasattr(source, "shapes_wh_px")
    report = Report(source.name, "boxes" if has_boxes else "image labels")
    try:
        if isinstance(source, AnnotatedImages | LabelledImages):
            source.open()
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
        index = source.open()
    except InputError:
        return report
    report.images, report.classes = len(source), source.name_counts()
    report.faults = list(index.facts["faults"])
    if isinstance(source, AnnotatedImages):
        report.objects_per_image = np.diff(index["first"])
        report.boxes_wh_px, report.boxes_of_wh_px, report.centres_norm = _boxes_of(source)
    if not report.images and report.problem is None:
        report.problem = f"{source.name}: holds no images"
    _read_all(source, report, workers)
    return report


def _boxes_of(
    source: AnnotatedImages,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Return sizes of boxes, of their images, and relative centres."""
    index = source.open()
    sizes = np.repeat(index["sizes_wh"], np.diff(index["first"]), axis=0).astype(np.float32)
    known = (sizes > 0).all(axis=1)
    boxes, sizes = np.array(index["boxes_xyxy"])[known], sizes[known]
    if index.facts["normalised"]:
        boxes *= np.tile(sizes, 2)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 / sizes
    return boxes[:, 2:] - boxes[:, :2], sizes, centres


class _Files(Dataset[tuple[str, int, int, str]]):
    """Digest, width, height and fault of each image."""

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
    """Decode every image, with all cores; an image that two labels share is read twice."""
    count = len(source)
    stated = (
        source.open()["sizes_wh"].tolist()
        if isinstance(source, AnnotatedImages) and not source.open().facts["normalised"]
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
            if stated and all(stated[index]) and stated[index] != [width, height]:
                said = f"{stated[index][0]} x {stated[index][1]}"
                report.faults.append(f"{path}: is {width} x {height}, its annotation says {said}")
        if sys.stderr.isatty() and (index % 50 == 0 or index == count - 1):
            end = "\n" if index == count - 1 else ""
            print(f"\r{report.name}: {index + 1} of {count}", end=end, file=sys.stderr, flush=True)
    report.sizes_wh_px = np.array(sizes, np.int64).reshape(-1, 2)


def _read_files(
    source: AnnotatedImages | LabelledImages, workers: int | None
) -> Iterator[tuple[str, int, int, str]]:
    processes = (os.cpu_count() or 1) if workers is None else workers
    if len(source) < 64:
        processes = 0  # starting them takes longer
    loader = DataLoader(
        _Files(source),
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
    """Return groups of files with the same bytes, as parts of the recipe and paths.

    Args:
        reports: by the part of the recipe that they belong to, such as ``detection``.
    """
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
