"""Images with a label each in files: indexed, and read."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from yolo_lightning.datamodules.annotated import nodes_of
from yolo_lightning.datamodules.images import Header, Image, read_header, read_image
from yolo_lightning.datamodules.index import Index, Parsed, cached, pack
from yolo_lightning.datamodules.source import ImageLabelSource
from yolo_lightning.errors import InputError
from yolo_lightning.wordtree import WordTree


class LabelledImages(ImageLabelSource):
    """A source of labelled images over an index; subclasses say where it is and how it is parsed.

    Args:
        mapping: nodes by the source's own names, where these are called otherwise in the tree.
    """

    def __init__(self, mapping: dict[str, str] | None) -> None:
        self.mapping = dict(mapping or {})
        self.faults = []
        self._index: Index | None = None

    @abstractmethod
    def _key(self) -> tuple[Path, dict[str, Any]]:
        """Return the dataset's folder, and what else the index depends on."""

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
        if not len(index["classes"]):
            hint = f": {self.faults[0]}" if self.faults else ""
            raise InputError(f"{self.name}: holds no images{hint}")
        names, origins = index.facts["names"], index.facts["origins"]
        found = nodes_of(dict(zip(names, origins, strict=True)), self.mapping, tree)
        self._nodes = np.array([found[name] for name in names], dtype=np.int64)
        self._counts: dict[int, Counter[str]] = {}
        for name, count in self.name_counts().items():
            self._counts.setdefault(found[name], Counter())[name] += count

    def name_counts(self) -> Counter[str]:
        """Return how many images have each of the source's own names; needs no tree."""
        index = self.open()
        counts = np.bincount(index["classes"], minlength=len(index.facts["names"]))
        return Counter(dict(zip(index.facts["names"], counts.tolist(), strict=True)))

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.open()["classes"])

    def node_counts(self) -> dict[int, Counter[str]]:
        """Return by node how many images each name gives it."""
        return self._counts

    def image_path(self, index: int) -> Path:
        """Return where an image is."""
        opened = self.open()
        return Path(opened.facts["root"]) / opened.text("images", index)

    def readable(self, index: int) -> Header:
        """Return what the file of a sample says about its image.

        Raises:
            UnreadableSample: it is missing, or no image.
        """
        return read_header(self.image_path(index))

    def image_name(self, index: int) -> str:
        """Return the path of an image."""
        return str(self.image_path(index))

    def read(self, index: int, least_side: int | None = None) -> tuple[Image, int]:
        """Return one image and its node."""
        image, _ = read_image(self.image_path(index), least_side)
        return image, int(self._nodes[self.open()["classes"][index]])


def label_index(
    root: Path,
    images: Sequence[str],
    labels: Sequence[str],
    origins: Mapping[str, str],
    faults: Sequence[str],
    watched: Sequence[Path],
) -> Parsed:
    """Return the index of images with a label each.

    Args:
        root: folder that the paths are relative to.
        images: paths.
        labels: a name an image.
        origins: where each name was met first.
        faults: what was skipped, a sentence each.
        watched: files and folders that were read.
    """
    names = sorted(origins)
    number = {name: k for k, name in enumerate(names)}
    arrays = {
        **pack("images", images),
        "classes": np.array([number[label] for label in labels], np.int32),
    }
    facts = {
        "names": names,
        "origins": [origins[name] for name in names],
        "faults": list(faults),
        "root": str(root),
    }
    return Parsed(Index(arrays, facts), list(watched))
