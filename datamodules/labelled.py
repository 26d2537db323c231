"""Images with a label each in files: indexed, and read."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from yolo_lightning.datamodules.index import Index, Parsed, pack
from yolo_lightning.datamodules.indexed import Indexed
from yolo_lightning.datamodules.source import ImageLabelSource
from yolo_lightning.images import Image, read_image


class LabelledImages(Indexed, ImageLabelSource):
    """A source of labelled images over an index."""

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
