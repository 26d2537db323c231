"""Images with boxes in files: annotations are collected, cleaned, indexed, and read."""

import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yolo_lightning.datamodules.images import (
    Header,
    UnreadableSample,
    is_image,
    read_header,
    read_image,
)
from yolo_lightning.datamodules.index import Index, Parsed, cached, pack
from yolo_lightning.datamodules.source import DetectionSample, DetectionSource
from yolo_lightning.errors import InputError
from yolo_lightning.wordtree import WordTree

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
    ) -> None:
        self.images, self.sizes_wh, self.image_of = images, sizes_wh, image_of
        self.boxes_xyxy, self.classes, self.numbers = boxes_xyxy, classes, numbers
        self.difficult, self.crowd = difficult, crowd


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


class AnnotatedImages(DetectionSource):
    """A detection source over an index; subclasses say where it is and how it is parsed.

    Args:
        mapping: nodes by the source's own names, where these are called otherwise in the tree.
    """

    def __init__(self, mapping: dict[str, str] | None) -> None:
        self.mapping = dict(mapping or {})
        self.faults = []
        self._index: Index | None = None

    @abstractmethod
    def _key(self) -> tuple[Path, dict[str, Any]]:
        """Return the dataset's folder, and what else the index depends on.

        Raises:
            InputError: the dataset is missing.
        """

    @abstractmethod
    def _parse(self) -> Parsed:
        """Read the dataset."""

    def open(self) -> Index:
        """Return the index, made where there is none; needs no tree."""
        if self._index is None:
            folder, key = self._key()
            self._index = cached(folder, {"source": type(self).__name__, **key}, self._parse)
        return self._index

    def bind(self, tree: WordTree) -> None:
        """Open the index and map names to nodes.

        Raises:
            InputError: a missing folder, labels that are not in the tree, no images.
        """
        index = self.open()
        self.faults = list(index.facts["faults"])
        if not len(index["sizes_wh"]):
            hint = f": {self.faults[0]}" if self.faults else ""
            raise InputError(f"{self.name}: no annotated images{hint}")
        counts = np.bincount(index["classes"], minlength=len(index.facts["names"]))
        names = index.facts["names"]
        used = {name: index.facts["origins"][k] for k, name in enumerate(names) if counts[k]}
        found = nodes_of(used, self.mapping, tree)
        self._nodes = np.array([found.get(name, -1) for name in names], dtype=np.int64)
        self._counts: dict[int, Counter[str]] = {}
        for name, node in found.items():
            count = int(counts[names.index(name)])
            self._counts.setdefault(node, Counter())[name] += count

    def name_counts(self) -> Counter[str]:
        """Return how many objects have each of the source's own names; needs no tree."""
        index = self.open()
        counts = np.bincount(index["classes"], minlength=len(index.facts["names"]))
        return Counter(dict(zip(index.facts["names"], counts.tolist(), strict=True)))

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.open()["sizes_wh"])

    def node_counts(self) -> dict[int, Counter[str]]:
        """Return by node how many objects each name gives it."""
        return self._counts

    def image_path(self, index: int) -> Path:
        """Return where a sample's image is."""
        opened = self.open()
        return Path(opened.facts["root"]) / opened.text("images", index)

    def readable(self, index: int) -> Header:
        """Return what the file of a sample says about its image.

        Raises:
            UnreadableSample: it is missing, or no image.
        """
        return read_header(self.image_path(index))

    def image_name(self, index: int) -> str:
        """Return the path of a sample's image."""
        return str(self.image_path(index))

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


def nodes_of(
    origins: Mapping[str, str], mapping: Mapping[str, str], tree: WordTree
) -> dict[str, int]:
    """Return the node of each name of a source.

    Args:
        origins: where each name was met first, by name.
        mapping: nodes by name, where they are called otherwise in the tree.
        tree: the classes.

    Raises:
        InputError: all names that are not in the tree, with where they stand and how to mend it.
    """
    found: dict[str, int] = {}
    trouble: list[str] = []
    for name, where in origins.items():
        try:
            found[name] = tree.node(mapping.get(name, name), where)
        except InputError as error:
            trouble.append(str(error))
    if trouble:
        raise InputError(
            "\n  ".join(trouble) + "\n  add what is missing to the tree, or say what it is "
            "called there: mapping: {label: node} on the source"
        )
    return found


def inside(path: str, root: Path, allow_outside: bool, where: str) -> str:
    """Return an annotated path relative to its dataset where it lies in it.

    Links are not followed: what lies behind one in the dataset's folder was put there.

    Raises:
        InputError: it leaves the folder, and nobody allowed that.
    """
    if ".." not in path and not os.path.isabs(path):
        return path
    whole = os.path.normpath(os.path.join(root, path))
    if within(whole, root):
        return os.path.relpath(whole, os.path.normpath(root))
    if allow_outside:
        return whole
    raise InputError(
        f"{where}: path {path!r} leaves the dataset's folder {str(root)!r}; if that is meant, set "
        "allow_outside: true"
    )


def within(path: str | Path, root: Path) -> bool:
    """Tell whether a path lies below a folder; links are not followed."""
    return os.path.normpath(path).startswith(os.path.join(os.path.normpath(root), ""))


class Listing:
    """Which files there are, each folder listed once."""

    def __init__(self) -> None:
        self._folders: dict[str, dict[str, None]] = {}
        self._images: dict[str, dict[str, str]] = {}

    def names(self, folder: Path) -> dict[str, None]:
        """Return the names of a folder's files, ascending; a set that keeps its order."""
        key = str(folder)
        if key not in self._folders:
            try:
                self._folders[key] = dict.fromkeys(sorted(os.listdir(folder)))
            except OSError:
                self._folders[key] = {}
        return self._folders[key]

    def has(self, path: Path) -> bool:
        """Tell whether there is such a file."""
        return path.name in self.names(path.parent)

    def image(self, folder: Path, stem: str) -> str | None:
        """Return the name of a folder's image by its name without the ending; .jpg comes first."""
        key = str(folder)
        if key not in self._images:
            images = [name for name in self.names(folder) if is_image(Path(name))]
            images.sort(key=lambda name: not name.endswith(".jpg"))
            self._images[key] = {os.path.splitext(name)[0]: name for name in reversed(images)}
        return self._images[key].get(stem)

    @property
    def folders(self) -> list[Path]:
        """The folders that were looked at."""
        return [Path(folder) for folder in self._folders]
