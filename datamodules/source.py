"""What a source of images is: the interface between files and batches."""

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from yolo_lightning.errors import InputError
from yolo_lightning.images import Image
from yolo_lightning.tree.wordtree import WordTree

_DRAWN = 500
_OBJECT_FIELDS = ("boxes_xyxy_px", "labels", "difficult", "crowd", "areas_orig_px2")


@dataclass
class DetectionSample:
    """An image with its boxes.

    Attributes:
        image: uint8 (H, W, 3), RGB; smaller than the file's own where that was much larger than
            asked for.
        boxes_xyxy_px: float32 (N, 4), corners in px of `image`, inside it, never empty.
        labels: int64 (N,), tree nodes.
        difficult: bool (N,); regions of a crowd count as difficult.
        faults: what was repaired, a sentence each.
        size_hw_orig: height and width of the file's own image, px.
        crowd: bool (N,), which of the difficult ones are regions of a crowd.
        areas_orig_px2: float32 (N,), what the outlines cover of the file's own image, square px; 0
            where nothing but the box is known.
    """

    image: Image
    boxes_xyxy_px: NDArray[np.float32]
    labels: NDArray[np.int64]
    difficult: NDArray[np.bool_]
    faults: list[str] = field(default_factory=list)
    size_hw_orig: tuple[int, int] = (0, 0)
    crowd: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    areas_orig_px2: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))

    def chosen(self, rows: NDArray[Any]) -> "DetectionSample":
        """Return the sample with some of its objects.

        Args:
            rows: bool (N,), or their numbers.
        """
        parts = {name: getattr(self, name)[rows] for name in _OBJECT_FIELDS}
        return replace(self, **parts)

    def __post_init__(self) -> None:
        if len(self.crowd) != len(self.difficult):
            self.crowd = np.zeros_like(self.difficult)
        if len(self.areas_orig_px2) != len(self.difficult):
            self.areas_orig_px2 = np.zeros(len(self.difficult), np.float32)
        if self.size_hw_orig == (0, 0):
            self.size_hw_orig = (self.image.shape[0], self.image.shape[1])


class Source(ABC):
    """Images and what is known about them."""

    name: str
    """What messages and reports call it."""

    faults: Sequence[str]
    """What `bind` repaired or skipped, a sentence each."""

    @abstractmethod
    def bind(self, tree: WordTree) -> None:
        """Read the index and map labels to nodes.

        Raises:
            InputError: a missing folder, an unknown label, nothing to read.
        """

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def node_counts(self) -> dict[int, Counter[str]]:
        """Return by node how many objects, or images, each of the source's own names gives it."""

    @property
    def nodes(self) -> Tensor:
        """int64, sorted: the nodes that this source labels something with."""
        return torch.tensor(sorted(self.node_counts()), dtype=torch.long)

    def image_name(self, index: int) -> str:
        """Return what a sample is called: its file's path, or its number."""
        return f"{self.name} {index}"

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that change with what the source holds, not with where."""
        counts = sorted((node, sorted(c.items())) for node, c in self.node_counts().items())
        return digest(type(self).__name__, len(self), counts)


class DetectionSource(Source):
    """Images with boxes."""

    @abstractmethod
    def read(self, index: int, least_side: int | None = None) -> DetectionSample:
        """Return one sample.

        Args:
            index: 0 … length - 1.
            least_side: px that the image's shorter side has to keep, where it may be shrunk.

        Raises:
            UnreadableSample: the sample has to be left out.
        """

    def shapes_wh_px(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return widths and heights of the boxes that training learns from, and of their images.

        Returns:
            float32 (N, 2) and (N, 2), px of the files' own images; of generated images, those of
            the first 500.
        """
        boxes, images = [], []
        for index in range(min(_DRAWN, len(self))):
            sample = self.read(index)
            easy = sample.boxes_xyxy_px[~sample.difficult]
            boxes.append(easy[:, 2:] - easy[:, :2])
            size = [sample.image.shape[1], sample.image.shape[0]]
            images.append(np.tile(np.array(size, np.float32), (len(easy), 1)))
        return np.concatenate(boxes), np.concatenate(images)


class ImageLabelSource(Source):
    """Images with one label each."""

    @abstractmethod
    def read(self, index: int, least_side: int | None = None) -> tuple[Image, int]:
        """Return one image and its node; see `DetectionSource.read`."""


S = TypeVar("S", DetectionSource, ImageLabelSource)


class ConcatSource(Generic[S]):
    """Sources of one kind, one after the other."""

    name = "several sources"

    def __init__(self, sources: Sequence[S]) -> None:
        if not sources:
            raise InputError("a list of sources is empty; name at least one")
        self.sources: list[S] = list(sources)
        self.faults: Sequence[str] = []

    def bind(self, tree: WordTree) -> None:
        """Bind them all."""
        for source in self.sources:
            source.bind(tree)
        self.faults = [fault for source in self.sources for fault in source.faults]
        self._ends = np.cumsum([len(source) for source in self.sources])

    def __len__(self) -> int:
        """Return the number of images."""
        return int(self._ends[-1])

    def node_counts(self) -> dict[int, Counter[str]]:
        """Return the sum of theirs."""
        total: dict[int, Counter[str]] = {}
        for source in self.sources:
            for node, counts in source.node_counts().items():
                total.setdefault(node, Counter()).update(counts)
        return total

    def fingerprint(self) -> str:
        """Return one that changes with any of theirs."""
        return digest(*(source.fingerprint() for source in self.sources))

    def _place(self, index: int) -> tuple[S, int]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self.sources[which], index - int(self._ends[which - 1] if which else 0)

    def image_name(self, index: int) -> str:
        """Return what a sample is called."""
        source, place = self._place(index)
        return source.image_name(place)


class ConcatDetectionSource(ConcatSource[DetectionSource], DetectionSource):
    """Detection sources, one after the other."""

    def read(self, index: int, least_side: int | None = None) -> DetectionSample:
        """Return one sample of the source that the number falls to."""
        source, place = self._place(index)
        return source.read(place, least_side)

    def shapes_wh_px(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return all of theirs."""
        boxes, images = zip(*(source.shapes_wh_px() for source in self.sources), strict=True)
        return np.concatenate(boxes), np.concatenate(images)


class ConcatImageLabelSource(ConcatSource[ImageLabelSource], ImageLabelSource):
    """Image-label sources, one after the other."""

    def read(self, index: int, least_side: int | None = None) -> tuple[Image, int]:
        """Return one sample of the source that the number falls to."""
        source, place = self._place(index)
        return source.read(place, least_side)


def digest(*parts: object) -> str:
    """Return 16 hexadecimal digits of texts, numbers and arrays."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            found.update(f"{part.dtype}{part.shape}".encode())
            found.update(np.ascontiguousarray(part).data)
        else:
            found.update(repr(part).encode("utf-8", "surrogateescape"))
    return found.hexdigest()[:16]


def existing_folder(path: str | Path, what: str) -> Path:
    """Return the folder, or say that it is missing.

    Raises:
        InputError: no such folder.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise InputError(f"{what}: folder {str(path)!r} not found (working folder: {Path.cwd()})")
    return folder


def existing_file(path: str | Path, what: str) -> Path:
    """Return the file, or say that it is missing.

    Raises:
        InputError: no such file.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"{what}: file {str(path)!r} not found (working folder: {Path.cwd()})")
    return file
