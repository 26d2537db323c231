"""Generated images that are kept in memory, as the miniature reads each of them many times."""

from functools import cache
from typing import Any

from yolo_lightning.batches import DetectionSample
from yolo_lightning.datamodules import ShapesDetection, ShapesImageLabels
from yolo_lightning.images import Image


@cache
def _drawn(kind: Any, arguments: tuple[Any, ...], index: int, nodes: tuple[Any, ...]) -> Any:
    """Draw an image; sources with equal arguments share it."""
    source = kind(*arguments)
    source._nodes = dict(nodes)
    return source.read(index)


def _hashable(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(tuple(v) if isinstance(v, list) else v for v in values)


class CachedShapesDetection(ShapesDetection):
    """`ShapesDetection` in memory."""

    def read(self, index: int, min_side: int | None = None) -> DetectionSample:
        nodes = tuple(self._nodes.items())
        sample: DetectionSample = _drawn(ShapesDetection, _hashable(self._arguments), index, nodes)
        return sample


class CachedShapesImageLabels(ShapesImageLabels):
    """`ShapesImageLabels` in memory."""

    def read(self, index: int, min_side: int | None = None) -> tuple[Image, int]:
        nodes = tuple(self._nodes.items())
        sample: tuple[Image, int] = _drawn(
            ShapesImageLabels, _hashable(self._arguments), index, nodes
        )
        return sample
