"""Augmentation; the only file that uses albumentations."""

import math
import os
from dataclasses import dataclass, replace
from typing import Literal, get_args

import cv2
import numpy as np
from numpy.typing import NDArray

from yolo_lightning.batches import DetectionSample
from yolo_lightning.datamodules.source import check_option
from yolo_lightning.images import GREY, Image, fit
from yolo_lightning.models.preparation import Interpolation, Resize

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # before it is imported, on first use

_MIN_VISIBLE, _PLACED_SIZES = 0.2, (0.25, 2.0)
_MAX_SHORTER_SIDE = 16.0  # times the network input's side; more was meant as px

Vector = NDArray[np.float64]
Geometry = Literal["crop", "place"]


def fit_sample(
    sample: DetectionSample,
    size: int,
    resize: Resize = "letterbox",
    interpolation: Interpolation = "area",
) -> DetectionSample:
    """Fit an image and its boxes into a square."""
    image, (x_scale, y_scale), (left, top) = fit(
        sample.image, (size, size), resize, sample.size_hw_orig, interpolation
    )
    boxes = sample.boxes_xyxy_px * np.array([x_scale, y_scale] * 2) + np.array([left, top] * 2)
    return replace(sample, image=image, boxes_xyxy_px=boxes.astype(np.float32))


def crop_window(
    image: Image, window_xyxy_px: Vector, size: int, colour: "Colour | None" = None
) -> tuple[Image, Vector, Vector]:
    """Crop a window, px of the image, and resize it to a square; grey outside the image.

    Returns:
        The square, and the mapping of boxes to it: scale (x, y) and offset (x, y), px.
    """
    canvas = np.full((size, size, 3), GREY, dtype=np.uint8)
    height, width = image.shape[:2]
    low, high = window_xyxy_px[:2], window_xyxy_px[2:]
    scale = size / (high - low)
    # boxes are mapped by these whole pixels, not by the window
    source = np.array([np.floor(low).clip(0), np.minimum(np.ceil(high), [width, height])], np.int64)
    target = np.round((source - low) * scale).clip(0, size).astype(np.int64)
    source_wh, target_wh = source[1] - source[0], target[1] - target[0]
    if source_wh.min() <= 0 or target_wh.min() <= 0:
        return canvas, np.zeros(2), np.zeros(2)  # the window is outside the image
    (left, top), (right, bottom) = source.tolist()
    pixels = _resize(image[top:bottom, left:right], *target_wh.tolist())
    (left, top), (right, bottom) = target.tolist()
    canvas[top:bottom, left:right] = pixels if colour is None else colour(pixels)
    scale = target_wh / source_wh
    return canvas, scale, target[0] - source[0] * scale


def _resize(image: Image, width: int, height: int) -> Image:
    """Resize to width and height, px, by area from twice the size on, bilinearly below it."""
    # by area takes five times as long; below twice the size, both read every pixel
    old_height, old_width = image.shape[:2]
    is_half = old_width >= 2 * width or old_height >= 2 * height
    method = cv2.INTER_AREA if is_half else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (width, height), interpolation=method), np.uint8)


def _check(name: str, value: object, valid: bool, allowed: str) -> None:
    check_option(f"augmentation: {name}", value, valid, allowed)


def _draw_factor(rng: np.random.Generator, largest: float) -> float:
    """Draw a factor between 1 and `largest`, and invert it half of the time."""
    factor = rng.uniform(1, largest)
    return float(factor if rng.random() < 0.5 else 1 / factor)


@dataclass
class Colour:
    """A change of hue, saturation and exposure.

    Source: the original program's `random_distort_image`. Deviation: hue and saturation have 256
    values each.
    """

    hue: float  # part of the circle
    saturation: float  # factor
    exposure: float  # factor

    def __call__(self, image: Image) -> Image:
        """Return the changed image."""
        if self.hue or self.saturation != 1:
            hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
            if self.saturation != 1:
                factors = np.diag([1, self.saturation, 1])
                hsv = cv2.transform(hsv, factors, dst=hsv)  # saturates at 255
            shift = np.tile(np.array([round(256 * self.hue) % 256, 0, 0], np.uint8), image.shape[1])
            rows = hsv.reshape(len(hsv), -1)
            np.add(rows, shift, out=rows)  # wraps at 256: one turn of the circle
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL, dst=hsv)
        if self.exposure != 1:  # not on V, which would leave bright colours as they are
            image = cv2.convertScaleAbs(image, alpha=self.exposure)
        return np.asarray(image, np.uint8)


class _FlipAndColour:
    """A random horizontal flip, and random hue, saturation and exposure.

    Source: the original program; factors are drawn above 1 and inverted half of the time.
    """

    def __init__(self, flip: float, hue: float, saturation: float, exposure: float) -> None:
        _check("flip", flip, 0 <= flip <= 1, "0 … 1")
        _check("saturation", saturation, saturation >= 1, "1 (none) or more")
        _check("exposure", exposure, exposure >= 1, "1 (none) or more")
        _check("hue", hue, 0 <= hue <= 0.5, "0 (none) … 0.5")
        self._flip, self._hue = flip, hue
        self._saturation, self._exposure = saturation, exposure

    def draw(self, rng: np.random.Generator) -> tuple[bool, Colour]:
        """Return whether to flip, and the change of colours."""
        return bool(rng.random() < self._flip), Colour(
            rng.uniform(-self._hue, self._hue),
            _draw_factor(rng, self._saturation),
            _draw_factor(rng, self._exposure),
        )


class DetectionAugmentation:
    """Random crop, flip and colour, for images with boxes.

    Args:
        jitter (part of a side): largest change of the window's sides (`crop`) or the image's
            (`place`); 0 for none. Source: YOLO9000, section 3; 0.2 or 0.3 in Darknet's files.
        flip (probability): of a horizontal flip; 0 where left and right differ, such as text.
            Source: Darknet.
        hue (part of the circle): largest rotation of the hue, to either side; lower it where
            colours tell classes apart. Source: YOLO9000, section 3; yolov2.cfg.
        saturation (factor): the largest; its inverse is the smallest; 1 for none. Source: YOLO9000,
            section 3; yolov2.cfg.
        exposure (factor): of brightness, the largest; its inverse is the smallest; 1 for none.
            Source: YOLO9000, section 3; yolov2.cfg.
        geometry: `crop`, as in the paper: each side moves in or out by up to `jitter`, and the
            result is fitted as in evaluation; `place`, as in the original program: sides change by
            up to `jitter`, and the image is placed at random, at 1/4 to 2 times the network's size.
            Source: YOLO9000, section 3; Darknet.

    Raises:
        InputError: a value out of range.

    Source: YOLO9000, section 3, "Training for detection"; figures of the released configurations.
    """

    def __init__(
        self,
        jitter: float = 0.2,
        flip: float = 0.5,
        hue: float = 0.1,
        saturation: float = 1.5,
        exposure: float = 1.5,
        geometry: Geometry = "crop",
    ) -> None:
        limit = 0.5 if geometry == "crop" else 1.0  # at 0.5, opposite sides could meet
        _check("jitter", jitter, 0 <= jitter < limit, f"0 (none) up to below {limit}")
        geometries = get_args(Geometry)
        _check("geometry", repr(geometry), geometry in geometries, ", ".join(geometries))
        self._jitter, self._geometry = jitter, geometry
        self._flip_and_colour = _FlipAndColour(flip, hue, saturation, exposure)

    def __call__(
        self, sample: DetectionSample, size: int, seed: int, resize: Resize = "letterbox"
    ) -> DetectionSample:
        """Return the augmented sample, (size, size, 3), determined by `seed`."""
        rng = np.random.default_rng(seed)
        height, width = sample.image.shape[:2]
        window = self._window(rng, width, height, resize)
        is_flipped, colour = self._flip_and_colour.draw(rng)
        image, scale, offset = crop_window(sample.image, window, size, colour)
        boxes_xyxy_px, keep = _move_boxes(sample, scale, offset, size)
        if is_flipped:
            image = cv2.flip(image, 1)
            boxes_xyxy_px[:, [0, 2]] = size - boxes_xyxy_px[:, [2, 0]]
        return replace(sample.select(keep), image=image, boxes_xyxy_px=boxes_xyxy_px)

    def required_side(self, size: int, seed: int, resize: Resize = "letterbox") -> int:
        """Return the shorter side, px, of an image that is not enlarged to `size` px."""
        # the window of other images is at least as large in relation to their shorter side
        window = self._window(np.random.default_rng(seed), 1, 1, resize)
        return math.ceil(size / float((window[2:] - window[:2]).min()))

    def _window(self, rng: np.random.Generator, width: int, height: int, resize: Resize) -> Vector:
        """Draw the corners (4,) of the window, px of the image; may extend beyond it."""
        size_wh = np.array([width, height], dtype=np.float64)
        if self._geometry == "place":
            return self._placement_window(rng, size_wh)
        moves = rng.uniform(-self._jitter, self._jitter, (2, 2)) * size_wh
        low, high = moves[0], size_wh + moves[1]
        if resize == "letterbox":
            centre, side = (low + high) / 2, (high - low).max()
            low, high = centre - side / 2, centre + side / 2
        return np.concatenate([low, high])

    def _placement_window(self, rng: np.random.Generator, size_wh: Vector) -> Vector:
        width, height = size_wh * (1 + rng.uniform(-self._jitter, self._jitter, 2))
        # relative to the square: the longer side is 0.25 to 2
        longer = rng.uniform(*_PLACED_SIZES)
        placed = longer * np.array([min(1.0, width / height), min(1.0, height / width)])
        start = rng.uniform(0, 1, 2) * (1 - placed)
        return np.concatenate([-start, 1 - start]) * np.tile(size_wh / placed, 2)


def _move_boxes(
    sample: DetectionSample, scale: Vector, offset: Vector, size: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Map boxes into a square; return those that remain visible, and which of all they are."""
    height, width = sample.image.shape[:2]
    inside = sample.boxes_xyxy_px.clip(0, [width, height, width, height])
    boxes = inside * np.tile(scale, 2) + np.tile(offset, 2)
    clipped = boxes.clip(0, size)
    sides = clipped[:, 2:] - clipped[:, :2]
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    # drop boxes of which less than a fifth of the area or less than a pixel remains
    keep = (sides.min(axis=1, initial=np.inf) >= 1) & (sides.prod(axis=1) >= _MIN_VISIBLE * areas)
    return clipped[keep].astype(np.float32), np.asarray(keep)


class ClassificationAugmentation:
    """Random scale, rotation, crop, flip and colour, for images with one label.

    Args:
        shorter_side (times the network input's side): least and largest length of the image's
            shorter side, of which the network input is a crop: larger shows smaller parts. Source:
            YOLO9000, section 3; darknet19.cfg.
        aspect (factor): of the width, the smallest; the inverse is the largest; 1 for none. Source:
            darknet19.cfg.
        degrees (degrees): largest rotation to either side. Source: YOLO9000, section 3;
            darknet19.cfg.
        flip (probability): of a horizontal flip; 0 where left and right differ, such as text.
            Source: Darknet.
        hue (part of the circle): largest rotation of the hue, to either side; lower it where
            colours tell classes apart. Source: YOLO9000, section 3; darknet19.cfg.
        saturation (factor): the largest; its inverse is the smallest; 1 for none. Source: YOLO9000,
            section 3; darknet19.cfg.
        exposure (factor): of brightness, the largest; its inverse is the smallest; 1 for none.
            Source: YOLO9000, section 3; darknet19.cfg.

    Raises:
        InputError: a value out of range.

    Source: YOLO9000, section 3, "Training for classification"; the original program's
    `random_augment_image`; figures of the released configuration, which draws 128 … 448 px for a
    window of 256 and 448 … 512 for one of 448. As there, the lengths follow the size of the network
    input where it changes. Deviation: grey, not black, outside the image.
    """

    def __init__(
        self,
        shorter_side: tuple[float, float] = (0.5, 1.75),
        aspect: float = 0.75,
        degrees: float = 7.0,
        flip: float = 0.5,
        hue: float = 0.1,
        saturation: float = 1.33,
        exposure: float = 1.33,
    ) -> None:
        low, high = shorter_side
        lengths = f"two factors above 0 up to {_MAX_SHORTER_SIDE}, the smaller one first"
        is_valid = 0 < low <= high <= _MAX_SHORTER_SIDE
        _check("shorter_side", list(shorter_side), is_valid, lengths)
        _check("degrees", degrees, 0 <= degrees <= 180, "0 (none) … 180")
        _check("aspect", aspect, 0 < aspect <= 1, "above 0 up to 1 (none)")
        self._shorter_side, self._aspect, self._radians = (
            shorter_side,
            aspect,
            math.radians(degrees),
        )
        self._flip_and_colour = _FlipAndColour(flip, hue, saturation, exposure)
        import albumentations.augmentations.geometric.functional as geometric

        self._warp_affine = geometric.warp_affine

    def required_side(self, size: int, seed: int) -> int:
        """Return the shorter side, px, of an image that is not enlarged."""
        shorter, aspect = self._draw_shape(np.random.default_rng(seed))
        return math.ceil(size * shorter * max(aspect, 1 / aspect))

    def __call__(self, image: Image, size: int, seed: int) -> Image:
        """Return the augmented image, (size, size, 3), determined by `seed`."""
        rng = np.random.default_rng(seed)
        shorter, aspect = self._draw_shape(rng)
        size_wh = np.array(image.shape[1::-1], dtype=np.float64)
        shape_wh = size_wh * [aspect, 1]
        scale = size * shorter / shape_wh.min() * np.array([aspect, 1])
        # where the crop is larger than the image, the image is in its centre
        spare = (size_wh * scale - size).clip(0) / 2
        shift = rng.uniform(-spare, spare)
        radians = rng.uniform(-self._radians, self._radians)
        is_flipped, colour = self._flip_and_colour.draw(rng)
        if radians:
            image = colour(self._rotate(image, scale, shift, radians, size))
        else:
            low = size_wh / 2 + (shift - size / 2) / scale
            image = crop_window(image, np.concatenate([low, low + size / scale]), size, colour)[0]
        return np.asarray(cv2.flip(image, 1), np.uint8) if is_flipped else image

    def _draw_shape(self, rng: np.random.Generator) -> tuple[float, float]:
        """Draw the shorter side, times that of the network input, and the factor of the width."""
        return float(rng.uniform(*self._shorter_side)), _draw_factor(rng, 1 / self._aspect)

    def _rotate(
        self, image: Image, scale: Vector, shift: Vector, radians: float, size: int
    ) -> Image:
        """Scale an image, rotate it around its centre, and crop `shift` px beside the centre."""
        height, width = image.shape[:2]
        if scale.min() <= 0.5:  # a warp reads four pixels for one
            image = _resize(image, *np.ceil([width, height] * scale).astype(int).tolist())
            scale = scale * [width / image.shape[1], height / image.shape[0]]
            height, width = image.shape[:2]
        cos, sin = math.cos(radians), math.sin(radians)
        turned = np.array([[cos, sin], [-sin, cos]]) * scale[:, None]
        # pixels have their centres at whole numbers
        centre = np.array([width - 1, height - 1]) / 2
        offset = (size - 1) / 2 - shift - turned @ centre
        matrix = np.eye(3)
        matrix[:2, :2], matrix[:2, 2] = turned, offset
        fill = (GREY, GREY, GREY)
        warped = self._warp_affine(
            image, matrix, cv2.INTER_LINEAR, fill, cv2.BORDER_CONSTANT, (size, size)
        )
        return np.asarray(warped, np.uint8)
