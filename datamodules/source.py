"""What a source of images is: the interface between files and batches."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from yolo_lightning.errors import InputError
from yolo_lightning.wordtree import WordTree

Image = NDArray[np.uint8]
"""uint8 (H, W, 3), RGB."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")

cv2.setNumThreads(0)  # loader workers are the parallelism; threads inside them only collide


class UnreadableSample(Exception):
    """A sample that has to be left out; the message names it and says why."""


@dataclass
class DetectionSample:
    """An image with its boxes.

    Attributes:
        image: uint8 (H, W, 3), RGB.
        boxes_xyxy_px: float32 (N, 4), corners in px of `image`, inside it, never empty.
        labels: int64 (N,), tree nodes.
        difficult: bool (N,).
        faults: what was repaired, a sentence each.
    """

    image: Image
    boxes_xyxy_px: NDArray[np.float32]
    labels: NDArray[np.int64]
    difficult: NDArray[np.bool_]
    faults: list[str] = field(default_factory=list)


class DetectionSource(ABC):
    """Images with boxes."""

    faults: list[str]
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

    @property
    @abstractmethod
    def nodes(self) -> Tensor:
        """int64, sorted: the nodes that boxes of this source are labelled with."""

    @abstractmethod
    def read(self, index: int) -> DetectionSample:
        """Return one sample.

        Raises:
            UnreadableSample: the sample has to be left out.
        """


class ImageLabelSource(ABC):
    """Images with one label each; see `DetectionSource` for the shared members."""

    faults: list[str]

    @abstractmethod
    def bind(self, tree: WordTree) -> None:
        """Read the index and map labels to nodes."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def read(self, index: int) -> tuple[Image, int]:
        """Return one image and its node."""


def read_image(path: Path) -> Image:
    """Decode a file to RGB, its EXIF orientation honoured.

    Raises:
        UnreadableSample: the file is missing or no image.
    """
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise UnreadableSample(f"{path}: cannot be read ({error.strerror})") from None
    image = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB) if len(data) else None
    if image is None:
        raise UnreadableSample(f"{path}: not a readable image")
    return np.asarray(image, dtype=np.uint8)


def existing_folder(path: str | Path, what: str) -> Path:
    """Return the folder, or say that it is missing.

    Raises:
        InputError: no such folder.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise InputError(f"{what}: folder {str(path)!r} not found (working folder: {Path.cwd()})")
    return folder


def unique_nodes(labels: list[NDArray[np.int64]]) -> Tensor:
    """Return the sorted distinct nodes among the labels of many images."""
    joined = np.concatenate(labels) if labels else np.zeros(0, dtype=np.int64)
    return torch.from_numpy(np.unique(joined))
