"""Pictures of detections."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from yolo_lightning.errors import InputError

Image = NDArray[np.uint8]
"""uint8 (H, W, 3), RGB."""

Colour = tuple[int, int, int]

_FONT, _FONT_SCALE = cv2.FONT_HERSHEY_SIMPLEX, 0.42


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
    corners = np.round(boxes_xyxy_px * scale).astype(int)
    for (x1, y1, x2, y2), colour in zip(corners.tolist(), colours, strict=True):
        cv2.rectangle(canvas, (x1, y1), (x2, y2), colour, 2, cv2.LINE_AA)
    for (x1, y1, _, _), caption, colour in zip(corners.tolist(), captions, colours, strict=True):
        (width, height), _ = cv2.getTextSize(caption, _FONT, _FONT_SCALE, 1)
        left = max(0, min(x1, size[0] - width - 4))
        top = max(0, y1 - height - 5)
        cv2.rectangle(canvas, (left, top), (left + width + 4, top + height + 5), colour, -1)
        dark = sum(colour) < 380
        ink = (255, 255, 255) if dark else (0, 0, 0)
        place = (left + 2, top + height + 1)
        cv2.putText(canvas, caption, place, _FONT, _FONT_SCALE, ink, 1, cv2.LINE_AA)
    return canvas


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
