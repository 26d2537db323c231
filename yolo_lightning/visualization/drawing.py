"""Pictures of detections."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from yolo_lightning.batches import ClassificationBatch, DetectionBatch
from yolo_lightning.boxes import cxcywh_to_xyxy
from yolo_lightning.detections import Detection
from yolo_lightning.errors import InputError
from yolo_lightning.images import Image

Colour = tuple[int, int, int]

_FONT, _FONT_SCALE = cv2.FONT_HERSHEY_SIMPLEX, 0.42
_LEGIBLE_SIDE = 500
"""Px of the shorter side from which on lines and letters grow along with the image."""

_COLOURS: tuple[Colour, ...] = (
    (255, 140, 0), (64, 160, 255), (120, 200, 80), (220, 90, 160), (250, 210, 60), (150, 110, 230),
    (70, 200, 200), (230, 80, 60),
)  # fmt: skip


def draw_boxes(
    image: Image,
    boxes_xyxy_px: NDArray[np.float32],
    captions: Sequence[str],
    colours: Sequence[Colour],
    scale: int = 1,
) -> Image:
    """Return an enlarged copy with boxes and captions.

    Args:
        image: uint8 (H, W, 3), RGB.
        boxes_xyxy_px: float (N, 4), px of `image`.
        captions: a text a box.
        colours: RGB, one a box.
        scale: whole factor of enlargement.
    """
    size = (image.shape[1] * scale, image.shape[0] * scale)
    canvas = np.array(cv2.resize(image, size, interpolation=cv2.INTER_CUBIC), dtype=np.uint8)
    factor = _factor(canvas)
    line = round(2 * factor)
    corners = np.round(boxes_xyxy_px * scale).astype(int)
    for (x1, y1, x2, y2), colour in zip(corners.tolist(), colours, strict=True):
        cv2.rectangle(canvas, (x1, y1), (x2, y2), colour, line, cv2.LINE_AA)
    for (x1, y1, _, _), caption, colour in zip(corners.tolist(), captions, colours, strict=True):
        width, height = _extent(caption, factor)
        left = max(0, min(x1, size[0] - width))
        _write(canvas, caption, (left, max(0, y1 - height)), colour, factor)
    return canvas


def annotated(image: Image, found: Sequence[Detection]) -> Image:
    """Return a copy of an image with what was found in it, names and scores.

    Args:
        image: uint8 (H, W, 3), RGB.
        found: in px of `image`; a class has one colour in all images.
    """
    boxes = np.array([one.box_xyxy_orig_px for one in found], np.float32).reshape(-1, 4)
    captions = [f"{one.name} {one.score:.2f}" for one in found]
    return draw_boxes(image, boxes, captions, [_COLOURS[one.node % len(_COLOURS)] for one in found])


def stamp(image: Image, text: str) -> None:
    """Write a text into an image's left upper corner."""
    _write(image, text, (0, 0), (255, 255, 255), _factor(image))


def batch_picture(
    batch: DetectionBatch | ClassificationBatch, names: Sequence[str], most: int | None = None
) -> Image:
    """Return the images of a batch, with their boxes and labels.

    Args:
        batch: uint8 images.
        names: of the tree's nodes.
        most: images to draw, from the first on; all where None.
    """
    images = batch.images[:most].permute(0, 2, 3, 1).numpy()
    scale = max(1, 224 // images.shape[1])
    drawn = []
    for k, image in enumerate(images):
        boxes, labels = np.zeros((0, 4), np.float32), []
        if isinstance(batch, DetectionBatch):
            real = batch.labels[k] >= 0
            corners = cxcywh_to_xyxy(batch.boxes_cxcywh_norm[k][real]) * images.shape[1]
            boxes, labels = corners.numpy(), batch.labels[k][real].tolist()
        colours = [_COLOURS[label % len(_COLOURS)] for label in labels]
        shown = draw_boxes(image, boxes, [names[label] for label in labels], colours, scale)
        if isinstance(batch, ClassificationBatch):
            _write(shown, names[int(batch.labels[k])], (2, 2), (255, 255, 255))
        drawn.append(shown)
    return grid(drawn, min(6, len(drawn)))


def _factor(image: Image) -> float:
    """Return how much larger than usual lines and letters have to be to be seen."""
    return max(1.0, float(min(image.shape[:2])) / _LEGIBLE_SIDE)


def _extent(text: str, factor: float) -> tuple[int, int]:
    """Return width and height of a text on its ground, px."""
    (width, height), _ = cv2.getTextSize(text, _FONT, _FONT_SCALE * factor, round(factor))
    return width + round(4 * factor), height + round(5 * factor)


def _write(
    canvas: Image, text: str, place: tuple[int, int], colour: Colour, factor: float = 1.0
) -> None:
    """Write a text on a ground of its own, its left upper corner at `place`."""
    width, height = _extent(text, factor)
    left, top = place
    cv2.rectangle(canvas, (left, top), (left + width, top + height), colour, -1)
    ink = (255, 255, 255) if sum(colour) < 380 else (0, 0, 0)
    start = (left + round(2 * factor), top + height - round(4 * factor))
    thickness = round(factor)
    cv2.putText(canvas, text, start, _FONT, _FONT_SCALE * factor, ink, thickness, cv2.LINE_AA)


def grid(images: Sequence[Image], columns: int, legend: str = "") -> Image:
    """Return images of one size side by side, with a line of text above."""
    height, width = images[0].shape[:2]
    gap = 6
    rows = -(-len(images) // columns)
    top = 28 if legend else gap
    shape = (top + rows * (height + gap), gap + columns * (width + gap), 3)
    canvas = np.full(shape, 255, dtype=np.uint8)
    for number, image in enumerate(images):
        y = top + number // columns * (height + gap)
        x = gap + number % columns * (width + gap)
        canvas[y : y + height, x : x + width] = image
    if legend:
        cv2.putText(canvas, legend, (gap, 19), _FONT, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    return canvas


def save(path: Path, image: Image) -> None:
    """Write a picture; the ending chooses the format.

    Raises:
        InputError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR)):
        raise InputError(f"{path}: the picture cannot be written")
