"""Augmentation; the only file that uses albumentations."""

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from yolo_lightning.batches import DetectionSample
from yolo_lightning.datamodules.source import check_option
from yolo_lightning.images import GREY, Image, fit, resize_pixels
from yolo_lightning.models.preparation import Interpolation, Resize

if TYPE_CHECKING:
    import albumentations as A

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # before it is imported, on first use

_MIN_VISIBLE, _PLACED_SIZES = 0.2, (0.25, 2.0)

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
    sample: DetectionSample, window_xyxy_px: NDArray[np.float64], size: int
) -> DetectionSample:
    """Crop a window, px of the image, and resize it to a square; grey outside the image."""
    canvas = np.full((size, size, 3), GREY, dtype=np.uint8)
    height, width = sample.image.shape[:2]
    low, high = window_xyxy_px[:2], window_xyxy_px[2:]
    scale = size / (high - low)
    # boxes are mapped by these whole pixels, not by the window
    source = np.array([np.floor(low).clip(0), np.minimum(np.ceil(high), [width, height])], np.int64)
    target = np.round((source - low) * scale).clip(0, size).astype(np.int64)
    source_wh, target_wh = source[1] - source[0], target[1] - target[0]
    boxes = sample.boxes_xyxy_px.astype(np.float64)
    if source_wh.min() > 0 and target_wh.min() > 0:
        crop = sample.image[source[0][1] : source[1][1], source[0][0] : source[1][0]]
        canvas[target[0][1] : target[1][1], target[0][0] : target[1][0]] = resize_pixels(
            crop, *target_wh
        )
        boxes = (boxes - np.tile(source[0], 2)) * np.tile(target_wh / source_wh, 2)
        boxes += np.tile(target[0], 2)
    else:
        boxes[:] = 0  # the window is outside the image
    clipped = boxes.clip(0, size)
    sides = clipped[:, 2:] - clipped[:, :2]
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    # drop boxes of which less than a fifth of the area or less than a pixel remains
    keep = (sides.min(axis=1, initial=np.inf) >= 1) & (sides.prod(axis=1) >= _MIN_VISIBLE * areas)
    boxes_xyxy_px = clipped[keep].astype(np.float32)
    return replace(sample.select(np.asarray(keep)), image=canvas, boxes_xyxy_px=boxes_xyxy_px)


def _check(name: str, value: object, valid: bool, allowed: str) -> None:
    check_option(f"augmentation: {name}", value, valid, allowed)


def _flip_and_colour(
    flip: float, hue: float, saturation: float, exposure: float
) -> "list[A.BasicTransform]":
    """Return a random horizontal flip, and random hue, saturation and exposure.

    Deviation: factors are uniform between a factor's inverse and itself; the original program draws
    one above 1 and inverts it half of the time. Saturation mixes with grey instead of using HSV.
    """
    _check("flip", flip, 0 <= flip <= 1, "0 … 1")
    _check("saturation", saturation, saturation >= 1, "1 (none) or more")
    _check("exposure", exposure, exposure >= 1, "1 (none) or more")
    _check("hue", hue, 0 <= hue <= 0.5, "0 (none) … 0.5")
    import albumentations as A

    colour = A.ColorJitter(
        brightness=(1 / exposure, exposure),
        contrast=(1, 1),
        saturation=(1 / saturation, saturation),
        hue=(-hue, hue),
        p=float(hue > 0 or saturation > 1 or exposure > 1),
    )
    return [A.HorizontalFlip(p=flip), colour]


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
        self._zoom = _PLACED_SIZES[1] if geometry == "place" else 1 / (1 - 2 * jitter)
        import albumentations as A

        self._pipeline = A.Compose(
            _flip_and_colour(flip, hue, saturation, exposure),
            bbox_params=A.BboxParams("pascal_voc", ["row"], clip=True),
            seed=0,
        )

    def __call__(
        self, sample: DetectionSample, size: int, seed: int, resize: Resize = "letterbox"
    ) -> DetectionSample:
        """Return the augmented sample, (size, size, 3), determined by `seed`."""
        height, width = sample.image.shape[:2]
        boxes = sample.boxes_xyxy_px.clip(0, [width, height, width, height])
        sample = replace(sample, boxes_xyxy_px=boxes)
        sample = sample.select(np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(axis=1)))
        sample = crop_window(sample, self.window(width, height, seed, resize), size)
        self._pipeline.set_random_seed(seed)
        rows = np.arange(len(sample.labels))
        out = self._pipeline(image=sample.image, bboxes=sample.boxes_xyxy_px, row=rows)
        keep = np.asarray(out["row"], dtype=np.int64)
        moved: NDArray[np.float32] = np.asarray(out["bboxes"], dtype=np.float32).reshape(-1, 4)
        return replace(sample.select(keep), image=out["image"], boxes_xyxy_px=moved)

    def required_side(self, size: int) -> int:
        """Return the side that an image needs for a square of `size` px at the largest zoom."""
        return int(size * self._zoom)

    def window(self, width: int, height: int, seed: int, resize: Resize) -> NDArray[np.float64]:
        """Return the corners (4,) of the window, px of the image; may extend beyond it."""
        rng, size_wh = np.random.default_rng(seed), np.array([width, height], dtype=np.float64)
        if self._geometry == "place":
            return self._placement_window(rng, size_wh)
        moves = rng.uniform(-self._jitter, self._jitter, (2, 2)) * size_wh
        low, high = moves[0], size_wh + moves[1]
        if resize == "letterbox":
            centre, side = (low + high) / 2, (high - low).max()
            low, high = centre - side / 2, centre + side / 2
        return np.concatenate([low, high])

    def _placement_window(
        self, rng: np.random.Generator, size_wh: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        width, height = size_wh * (1 + rng.uniform(-self._jitter, self._jitter, 2))
        # relative to the square: the longer side is 0.25 to 2
        longer = rng.uniform(*_PLACED_SIZES)
        placed = longer * np.array([min(1.0, width / height), min(1.0, height / width)])
        start = rng.uniform(0, 1, 2) * (1 - placed)
        return np.concatenate([-start, 1 - start]) * np.tile(size_wh / placed, 2)


class ClassificationAugmentation:
    """Random scale, rotation, crop, flip and colour, for images with one label.

    Args:
        shorter_side (px): least and largest length of the image's shorter side before the crop:
            larger shows smaller parts of it. Source: YOLO9000, section 3; darknet19.cfg.
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

    Source: YOLO9000, section 3, "Training for classification"; figures of the released
    configuration, which draws 128 … 448 px for a window of 256 and 448 … 512 for one of 448.
    """

    def __init__(
        self,
        shorter_side: tuple[int, int] = (128, 448),
        aspect: float = 0.75,
        degrees: float = 7.0,
        flip: float = 0.5,
        hue: float = 0.1,
        saturation: float = 1.33,
        exposure: float = 1.33,
    ) -> None:
        low, high = shorter_side
        lengths = "two lengths in px, the smaller one first"
        _check("shorter_side", list(shorter_side), 0 < low <= high, lengths)
        _check("degrees", degrees, 0 <= degrees <= 180, "0 (none) … 180")
        _check("aspect", aspect, 0 < aspect <= 1, "above 0 up to 1 (none)")
        import albumentations as A

        self._longest = high
        self._scale = A.SmallestMaxSize(list(range(low, high + 1)), area_for_downscale="image")
        self._rotate = A.Affine(
            scale={"x": (aspect, 1 / aspect), "y": (1.0, 1.0)},
            rotate=(-degrees, degrees),
            fill=GREY,
            p=float(degrees > 0 or aspect < 1),
        )
        self._rest = _flip_and_colour(flip, hue, saturation, exposure)
        self._pipelines: dict[int, Any] = {}

    def required_side(self, size: int) -> int:
        """Return the largest length that the shorter side is resized to, px."""
        return max(size, self._longest)

    def __call__(self, image: Image, size: int, seed: int) -> Image:
        """Return the augmented image, (size, size, 3), determined by `seed`."""
        if size not in self._pipelines:
            import albumentations as A

            window = A.RandomCrop(size, size, True, "center", fill=GREY)
            self._pipelines[size] = A.Compose(
                [self._scale, self._rotate, window, *self._rest], seed=0
            )
        pipeline = self._pipelines[size]
        pipeline.set_random_seed(seed)
        return np.asarray(pipeline(image=image)["image"], dtype=np.uint8)
