"""A source over an index of files: what boxes and labels have in common."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from yolo_lightning.datamodules.index import Index, Parsed, cached
from yolo_lightning.datamodules.source import Source, digest
from yolo_lightning.errors import InputError
from yolo_lightning.images import Header, read_header
from yolo_lightning.tree.wordtree import WordTree


class Indexed(Source):
    """A source whose images lie in files; subclasses say where, and how these are parsed.

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
        if not len(self):
            hint = f": {self.faults[0]}" if self.faults else ""
            raise InputError(f"{self.name}: holds no images{hint}")
        counts, names = self.name_counts(), index.facts["names"]
        origins = dict(zip(names, index.facts["origins"], strict=True))
        used = {name: origins[name] for name in names if counts[name]}
        found = nodes_of(used, self.mapping, tree)
        self._nodes = np.array([found.get(name, -1) for name in names], dtype=np.int64)
        self._counts: dict[int, Counter[str]] = {}
        for name, node in found.items():
            self._counts.setdefault(node, Counter())[name] += counts[name]

    def name_counts(self) -> Counter[str]:
        """Return how many objects, or images, each of the source's own names has; needs no tree."""
        index = self.open()
        counts = np.bincount(index["classes"], minlength=len(index.facts["names"]))
        return Counter(dict(zip(index.facts["names"], counts.tolist(), strict=True)))

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.open()["images_at"]) - 1

    def node_counts(self) -> dict[int, Counter[str]]:
        """Return by node how many objects, or images, each name gives it."""
        return self._counts

    def fingerprint(self) -> str:
        """Return what changes with files' names, labels and boxes; no image is read."""
        index = self.open()
        names = list(index.facts["names"])
        return digest(
            names, *(part for name in sorted(index.arrays) for part in (name, index[name]))
        )

    def image_path(self, index: int) -> Path:
        """Return where a sample's image is."""
        opened = self.open()
        return Path(opened.facts["root"]) / opened.text("images", index)

    def image_name(self, index: int) -> str:
        """Return the path of a sample's image."""
        return str(self.image_path(index))

    def readable(self, index: int) -> Header:
        """Return what the file of a sample says about its image.

        Raises:
            UnreadableSample: it is missing, or no image.
        """
        return read_header(self.image_path(index))


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
