"""Drawing of boxes and captions into images, with OpenCV."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from yolo_lightning.batches import ClassificationBatch, DetectionBatch
from yolo_lightning.boxes import cxcywh_to_xyxy
from yolo_lightning.detections import Detection
from yolo_lightning.errors import InputError

Image = NDArray[np.uint8]  # (H, W, 3), RGB

Colour = tuple[int, int, int]

_FONT, _FONT_SCALE = cv2.FONT_HERSHEY_SIMPLEX, 0.42
_REFERENCE_SIDE = 500
"""Shorter side of an image, px, above which lines and text are scaled with the image."""

_SMALL_BOX = 40  # px; the lines of smaller boxes are thin
_HIDDEN_CAPTION = 10.0  # how much worse it is to hide a caption than a box

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
    """Return a copy of an image, enlarged by `scale`, with boxes and captions.

    Args:
        image: uint8 (H, W, 3), RGB.
        boxes_xyxy_px: float (N, 4), px of `image`.
        captions: one per box.
        colours: RGB, one per box.
        scale: integer.
    """
    size = (image.shape[1] * scale, image.shape[0] * scale)
    canvas = np.array(cv2.resize(image, size, interpolation=cv2.INTER_CUBIC), dtype=np.uint8)
    line_scale = _line_scale(canvas)
    corners = np.round(boxes_xyxy_px * scale).astype(int)
    for (x1, y1, x2, y2), colour in zip(corners.tolist(), colours, strict=True):
        is_small = min(x2 - x1, y2 - y1) < _SMALL_BOX * line_scale
        thickness = round((1 if is_small else 2) * line_scale)
        cv2.rectangle(canvas, (x1, y1), (x2, y2), colour, thickness, cv2.LINE_AA)
    draw_captions(canvas, corners, captions, colours)
    return canvas


def draw_captions(
    canvas: Image,
    boxes_xyxy_px: NDArray[np.int_],
    captions: Sequence[str],
    colours: Sequence[Colour],
) -> None:
    """Draw a caption at each box, in place, where it hides least of boxes and other captions."""
    shown = [index for index, text in enumerate(captions) if text]
    line_scale = _line_scale(canvas)
    sizes_wh = np.array([_caption_size(text, line_scale) for text in captions]).reshape(-1, 2)
    areas = (boxes_xyxy_px[:, 2:] - boxes_xyxy_px[:, :2]).clip(1).prod(axis=1)
    placed = np.zeros((0, 4), np.int_)
    for index in sorted(shown, key=lambda k: areas[k]):  # small boxes have the least choice
        (x1, y1, x2, y2), (width, height) = boxes_xyxy_px[index].tolist(), sizes_wh[index].tolist()
        places = np.array(
            [(x, y) for x in (x1, x2 - width) for y in (y1 - height, y2, y1)]
            + [(x2, y1), (x1 - width, y1)]
        )
        places = places.clip(0, np.subtract(canvas.shape[1::-1], (width, height)).clip(0))
        rectangles = np.concatenate([places, places + (width, height)], axis=1)
        hidden = 0.02 * np.arange(len(places))  # above on the left, unless another is better
        hidden += (_intersections(rectangles, boxes_xyxy_px) / areas).sum(axis=1)
        hidden += _HIDDEN_CAPTION * _intersections(rectangles, placed).sum(axis=1) / width / height
        best = int(np.argmin(hidden))
        placed = np.concatenate([placed, rectangles[best : best + 1]])
        x, y = places[best].tolist()
        draw_caption(canvas, captions[index], (x, y + height), colours[index], line_scale)


def _intersections(first: NDArray[np.int_], second: NDArray[np.int_]) -> NDArray[np.int_]:
    """Return the areas that boxes (N, 4) and (M, 4) share, (N, M)."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    return np.asarray((high - low).clip(0).prod(axis=2))


def draw_detections(image: Image, detections: Sequence[Detection]) -> Image:
    """Return a copy of an image with detections; a class has the same colour in all images."""
    boxes = np.array([one.box_xyxy_orig_px for one in detections], np.float32).reshape(-1, 4)
    captions = [f"{one.name} {one.score:.2f}" for one in detections]
    colours = [_COLOURS[one.node % len(_COLOURS)] for one in detections]
    return draw_boxes(image, boxes, captions, colours)


def draw_text(image: Image, text: str) -> None:
    """Draw text into the upper left corner of an image, in place."""
    draw_caption(image, text, (0, 0), (255, 255, 255), _line_scale(image))


def draw_batch(
    batch: DetectionBatch | ClassificationBatch,
    names: Sequence[str],
    max_images: int | None = None,
) -> Image:
    """Return the (first) images of a batch as a grid, with boxes and names of labels."""
    images = batch.images[:max_images].permute(0, 2, 3, 1).numpy()
    scale = max(1, 224 // images.shape[1])
    drawn = []
    for k, image in enumerate(images):
        boxes, labels = np.zeros((0, 4), np.float32), []
        if isinstance(batch, DetectionBatch):
            real = batch.labels[k] >= 0
            corners = cxcywh_to_xyxy(batch.boxes_cxcywh_norm[k][real]) * images.shape[1]
            boxes, labels = corners.numpy(), batch.labels[k][real].tolist()
        colours = [_COLOURS[label % len(_COLOURS)] for label in labels]
        canvas = draw_boxes(image, boxes, [names[label] for label in labels], colours, scale)
        if isinstance(batch, ClassificationBatch):
            draw_caption(canvas, names[int(batch.labels[k])], (2, 2), (255, 255, 255))
        drawn.append(canvas)
    return make_grid(drawn, min(6, len(drawn)))


def _line_scale(image: Image) -> float:
    return max(1.0, float(min(image.shape[:2])) / _REFERENCE_SIDE)


def _caption_size(text: str, scale: float) -> tuple[int, int]:
    """Return width and height of a caption with its background, px."""
    (width, height), _ = cv2.getTextSize(text, _FONT, _FONT_SCALE * scale, round(scale))
    return width + round(4 * scale), height + round(5 * scale)


def draw_caption(
    canvas: Image, text: str, left_bottom: tuple[int, int], colour: Colour, scale: float = 1.0
) -> None:
    """Draw text on a background above a point, moved into the image, in place."""
    font = (_FONT, _FONT_SCALE * scale)
    width, height = _caption_size(text, scale)
    left = max(0, min(left_bottom[0], canvas.shape[1] - width))
    top = max(0, left_bottom[1] - height)
    cv2.rectangle(canvas, (left, top), (left + width, top + height), colour, -1)
    text_colour = (255, 255, 255) if sum(colour) < 380 else (0, 0, 0)
    start = (left + round(2 * scale), top + height - round(4 * scale))
    cv2.putText(canvas, text, start, *font, text_colour, round(scale), cv2.LINE_AA)


def make_grid(images: Sequence[Image], columns: int, legend: str = "") -> Image:
    """Return images of equal size as a grid, with a line of text above."""
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


def save_image(path: Path, image: Image) -> None:
    """Write an image file; the extension selects the format.

    Raises:
        InputError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR)):
        raise InputError(f"{path}: the image cannot be written")
