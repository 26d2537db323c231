"""Image labels from one folder per class."""

from pathlib import Path

import numpy as np

from yolo_lightning.datamodules.source import (
    IMAGE_SUFFIXES,
    Image,
    ImageLabelSource,
    existing_folder,
    read_image,
)
from yolo_lightning.errors import InputError
from yolo_lightning.wordtree import WordTree


class ImageFolder(ImageLabelSource):
    """Images in ``root/<class>/``, at any depth below it; a class is a key or a name of the tree.

    Args:
        root: the folder that holds one folder per class.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.faults: list[str] = []

    def bind(self, tree: WordTree) -> None:
        """List the files and map folder names to nodes.

        Raises:
            InputError: no folder, no class folder, no image, or a class that is not in the tree.
        """
        root = existing_folder(self.root, "image folder")
        folders = sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))
        if not folders:
            raise InputError(f"image folder: {self.root!r} holds no class folders")
        self.paths: list[Path] = []
        labels: list[int] = []
        for folder in folders:
            node = tree.node(folder.name, f"image folder {folder}")
            files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
            if not files:
                self.faults.append(f"{folder}: no images")
            self.paths.extend(files)
            labels.extend([node] * len(files))
        if not self.paths:
            raise InputError(f"image folder: {self.root!r} holds no images {IMAGE_SUFFIXES}")
        self.labels = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.paths)

    def read(self, index: int) -> tuple[Image, int]:
        """Return one image and its node."""
        return read_image(self.paths[index]), int(self.labels[index])
