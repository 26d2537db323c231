"""The interface of a source of images, and sources joined one after the other."""

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from yolo_lightning.batches import DetectionSample
from yolo_lightning.errors import InputError
from yolo_lightning.images import Image
from yolo_lightning.tree.wordtree import WordTree

_SHAPE_SAMPLES = 500


def check_option(name: str, value: object, valid: bool, allowed: str) -> None:
    """Raise `InputError` if the value of an option is not valid."""
    if not valid:
        raise InputError(f"{name} is {value}; allowed: {allowed}")


class Source(ABC):
    """Images with annotations; subclasses define at least the abstract methods."""

    name: str = "custom source"  # in messages and reports
    faults: Sequence[str] = ()  # what `bind` repaired or skipped, one sentence each

    def prepare(self) -> None:  # noqa: B027
        """Parse annotations that are cached on disk, if there are any; `bind` finds them there."""

    @abstractmethod
    def bind(self, tree: WordTree) -> None:
        """Find the images and map their labels to nodes.

        Raises:
            InputError: a missing folder, an unknown label, no images.
        """

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def read(self, index: int, min_side: int | None = None) -> Any:
        """Return a sample; see `DetectionSource` and `ImageLabelSource`."""

    @abstractmethod
    def node_counts(self) -> dict[int, Counter[str]]:
        """Return by node the number of objects, or images, of each label name.

        Objects that are difficult, or a crowd, do not count: they are neither trained on nor
        required in evaluation. A node without others is left out.
        """

    @property
    def nodes(self) -> Tensor:
        """int64, sorted: the nodes that occur as labels, see `node_counts`."""
        return torch.tensor(sorted(self.node_counts()), dtype=torch.long)

    def image_name(self, index: int) -> str:
        """Return the name of an image in messages, such as its path."""
        return f"{self.name} {index}"

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that depend on the content, not on where it is stored."""
        counts = sorted((node, sorted(c.items())) for node, c in self.node_counts().items())
        return digest(type(self).__name__, len(self), counts)


class DetectionSource(Source):
    """Images with boxes."""

    @property
    def exclusive_nodes(self) -> list[int]:
        """The nodes of names that exclude each other; none if coarse and fine names are mixed.

        The box of a name then means no other of these names below it in the tree.
        """
        return []

    @abstractmethod
    def read(self, index: int, min_side: int | None = None) -> DetectionSample:
        """Return a sample; None for `min_side` means full size.

        Args:
            index: 0 … length - 1.
            min_side: px that the shorter side must keep if the image is decoded at reduced size.

        Raises:
            UnreadableSample: the image cannot be read.
        """

    def shapes_wh_px(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return sizes, float32 (N, 2), px, of boxes to train on, and of the image of each box."""
        # only the first images: each is read
        boxes, images = [], []
        for index in range(min(_SHAPE_SAMPLES, len(self))):
            sample = self.read(index)
            easy = sample.boxes_xyxy_px[~sample.difficult]
            boxes.append(easy[:, 2:] - easy[:, :2])
            size = [sample.image.shape[1], sample.image.shape[0]]
            images.append(np.tile(np.array(size, np.float32), (len(easy), 1)))
        return np.concatenate(boxes), np.concatenate(images)


class ImageLabelSource(Source):
    """Images with one label each."""

    @abstractmethod
    def read(self, index: int, min_side: int | None = None) -> tuple[Image, int]:
        """Return one image and its node; see `DetectionSource.read`."""


class ConcatSource(Source):
    """Sources of one kind, one after the other."""

    name = "several sources"

    def __init__(self, sources: Sequence[Source]) -> None:
        if not sources:
            raise InputError("a list of sources is empty; name at least one")
        self.sources: list[Any] = list(sources)

    def prepare(self) -> None:
        """Prepare every source."""
        for source in self.sources:
            source.prepare()

    def bind(self, tree: WordTree) -> None:
        """Bind every source."""
        for source in self.sources:
            source.bind(tree)
        self.faults = [fault for source in self.sources for fault in source.faults]
        self._ends = np.cumsum([len(source) for source in self.sources])

    def __len__(self) -> int:
        """Return the number of images."""
        return int(self._ends[-1])

    def node_counts(self) -> dict[int, Counter[str]]:
        """Return the sums over the sources."""
        total: dict[int, Counter[str]] = {}
        for source in self.sources:
            for node, counts in source.node_counts().items():
                total.setdefault(node, Counter()).update(counts)
        return total

    def fingerprint(self) -> str:
        """Return a hash of the sources' fingerprints."""
        return digest(*(source.fingerprint() for source in self.sources))

    def _locate(self, index: int) -> tuple[Any, int]:
        """Return the source of an image, and its index there."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.sources[number], index - int(self._ends[number - 1] if number else 0)

    def image_name(self, index: int) -> str:
        """Return the name that the image's own source gives it."""
        source, inner_index = self._locate(index)
        return str(source.image_name(inner_index))

    def read(self, index: int, min_side: int | None = None) -> Any:
        """Return a sample of the image's own source."""
        source, inner_index = self._locate(index)
        return source.read(inner_index, min_side)


class ConcatDetectionSource(ConcatSource, DetectionSource):
    """Detection sources, one after the other."""

    def shapes_wh_px(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return those of all sources; see `DetectionSource.shapes_wh_px`."""
        boxes, images = zip(*(source.shapes_wh_px() for source in self.sources), strict=True)
        return np.concatenate(boxes), np.concatenate(images)


class ConcatImageLabelSource(ConcatSource, ImageLabelSource):
    """Image-label sources, one after the other."""


def digest(*parts: object) -> str:
    """Return a hash, 16 hexadecimal digits, of strings, numbers and arrays."""
    sha256 = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            sha256.update(f"{part.dtype}{part.shape}".encode())
            sha256.update(np.ascontiguousarray(part).data)
        else:
            sha256.update(repr(part).encode("utf-8", "surrogateescape"))
    return sha256.hexdigest()[:16]
