"""Augmentation. All use of albumentations is in this file."""

import os
from dataclasses import replace
from typing import Literal, get_args

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import numpy as np
from numpy.typing import NDArray

from yolo_lightning.datamodules.source import DetectionSample
from yolo_lightning.errors import InputError
from yolo_lightning.images import GREY, Image, Resize, fit, scaled

_MIN_SEEN, _PLACED_SIZES = 0.2, (0.25, 2.0)


Geometry = Literal["crop", "place"]


def centre_crop(image: Image, size: int) -> Image:
    """Return the largest square in an image's middle, scaled to `size` px."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : top + side, left : left + side]
    return scaled(square, size, size)


def fit_sample(sample: DetectionSample, size: int, resize: Resize = "letterbox") -> DetectionSample:
    """Make an image square, its boxes along with it."""
    image, (x_scale, y_scale), (left, top) = fit(
        sample.image, (size, size), resize, sample.size_hw_orig
    )
    boxes = sample.boxes_xyxy_px * np.array([x_scale, y_scale] * 2) + np.array([left, top] * 2)
    return replace(sample, image=image, boxes_xyxy_px=boxes.astype(np.float32))


def crop_window(
    sample: DetectionSample, window_xyxy_px: NDArray[np.float64], size: int
) -> DetectionSample:
    """Return what a window shows of an image, stretched to a square; grey where it shows none.

    Args:
        sample: boxes inside the image.
        window_xyxy_px: float (4,), corners in px of the image; may reach beyond it.
        size: side of the square, px.

    Returns:
        The sample; boxes are clipped to the square, and those go that keep less than a fifth of
        their area or less than a pixel.
    """
    canvas = np.full((size, size, 3), GREY, dtype=np.uint8)
    height, width = sample.image.shape[:2]
    low, high = window_xyxy_px[:2], window_xyxy_px[2:]
    scale = size / (high - low)
    # whole pixels on both sides: boxes follow these, not the window
    seen = np.array([np.floor(low).clip(0), np.minimum(np.ceil(high), [width, height])], np.int64)
    place = np.round((seen - low) * scale).clip(0, size).astype(np.int64)
    shown, filled = seen[1] - seen[0], place[1] - place[0]
    boxes = sample.boxes_xyxy_px.astype(np.float64)
    if shown.min() > 0 and filled.min() > 0:
        part = sample.image[seen[0][1] : seen[1][1], seen[0][0] : seen[1][0]]
        canvas[place[0][1] : place[1][1], place[0][0] : place[1][0]] = scaled(part, *filled)
        boxes = (boxes - np.tile(seen[0], 2)) * np.tile(filled / shown, 2) + np.tile(place[0], 2)
    else:
        boxes[:] = 0  # the image lies beside the window
    clipped = boxes.clip(0, size)
    sides = clipped[:, 2:] - clipped[:, :2]
    whole = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    kept = (sides.min(axis=1, initial=np.inf) >= 1) & (sides.prod(axis=1) >= _MIN_SEEN * whole)
    boxes_xyxy_px = clipped[kept].astype(np.float32)
    return replace(sample.chosen(np.asarray(kept)), image=canvas, boxes_xyxy_px=boxes_xyxy_px)


class _Colour:
    """Hue, saturation and exposure, drawn within factors.

    Deviation: factors are uniform between a factor's inverse and itself, where the original program
    draws one above 1 and inverts it half of the time; saturation mixes with grey, not in HSV.
    """

    def __init__(self, hue: float, saturation: float, exposure: float) -> None:
        for name, factor in (("saturation", saturation), ("exposure", exposure)):
            if factor < 1:
                raise InputError(f"augmentation: {name} is {factor}; allowed: 1 (none) or more")
        if not 0 <= hue <= 0.5:
            raise InputError(f"augmentation: hue is {hue}; allowed: 0 (none) … 0.5")
        self.transform = A.ColorJitter(
            brightness=(1 / exposure, exposure),
            contrast=(1, 1),
            saturation=(1 / saturation, saturation),
            hue=(-hue, hue),
            p=float(hue > 0 or saturation > 1 or exposure > 1),
        )


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise InputError(f"augmentation: {name} is {value}; allowed: 0 … 1")


class DetectionAugmentation:
    """Random window, flip and colour, for images with boxes.

    Args:
        jitter: how much the window's sides (`crop`) or the image's (`place`) vary, relative.
        flip: probability of a horizontal flip.
        hue: largest turn of the hue, 1 is the whole circle.
        saturation, exposure: largest factors; their inverses are the smallest.
        geometry: `crop`, the paper's random crops: each side of the image moves in or out by up to
            `jitter`, what is laid bare is grey, and what is seen is fitted as evaluation fits it;
            `place`, the original program's: sides change by up to `jitter`, and the whole image
            lies at a random place, at a quarter to twice the network's size.

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
        _check_probability("flip", flip)
        most = 0.5 if geometry == "crop" else 1.0  # two sides may meet
        if not 0 <= jitter < most:
            raise InputError(
                f"augmentation: jitter is {jitter}; allowed: 0 (none) up to below {most}"
            )
        if geometry not in get_args(Geometry):
            raise InputError(
                f"augmentation: geometry is {geometry!r}; allowed: {', '.join(get_args(Geometry))}"
            )
        self._jitter, self._geometry = jitter, geometry
        self._zoom = _PLACED_SIZES[1] if geometry == "place" else 1 / (1 - 2 * jitter)
        self._pipeline = A.Compose(
            [A.HorizontalFlip(p=flip), _Colour(hue, saturation, exposure).transform],
            bbox_params=A.BboxParams("pascal_voc", ["row"], clip=True),
            seed=0,
        )

    def __call__(
        self, sample: DetectionSample, size: int, seed: int, resize: Resize = "letterbox"
    ) -> DetectionSample:
        """Return the augmented sample, (size, size, 3); `seed` alone decides every draw."""
        height, width = sample.image.shape[:2]
        boxes = sample.boxes_xyxy_px.clip(0, [width, height, width, height])
        sample = replace(sample, boxes_xyxy_px=boxes)
        sample = sample.chosen(np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(axis=1)))
        sample = crop_window(sample, self.window(width, height, seed, resize), size)
        self._pipeline.set_random_seed(seed)
        rows = np.arange(len(sample.labels))
        out = self._pipeline(image=sample.image, bboxes=sample.boxes_xyxy_px, row=rows)
        kept = np.asarray(out["row"], dtype=np.int64)
        moved: NDArray[np.float32] = np.asarray(out["bboxes"], dtype=np.float32).reshape(-1, 4)
        return replace(sample.chosen(kept), image=out["image"], boxes_xyxy_px=moved)

    def longest_side(self, size: int) -> int:
        """Return the length that an image is drawn at, at most, in a square of `size` px."""
        return int(size * self._zoom)

    def window(self, width: int, height: int, seed: int, resize: Resize) -> NDArray[np.float64]:
        """Return which part of an image is seen: corners, px, perhaps beyond it."""
        rng, size_wh = np.random.default_rng(seed), np.array([width, height], dtype=np.float64)
        if self._geometry == "place":
            return self._placed(rng, size_wh)
        moves = rng.uniform(-self._jitter, self._jitter, (2, 2)) * size_wh
        low, high = moves[0], size_wh + moves[1]
        if resize == "letterbox":
            centre, side = (low + high) / 2, (high - low).max()
            low, high = centre - side / 2, centre + side / 2
        return np.concatenate([low, high])

    def _placed(
        self, rng: np.random.Generator, size_wh: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        width, height = size_wh * (1 + rng.uniform(-self._jitter, self._jitter, 2))
        # relative to the square: the longer side is a quarter to twice as long
        longer = rng.uniform(*_PLACED_SIZES)
        placed = longer * np.array([min(1.0, width / height), min(1.0, height / width)])
        start = rng.uniform(0, 1, 2) * (1 - placed)
        return np.concatenate([-start, 1 - start]) * np.tile(size_wh / placed, 2)


class ClassificationAugmentation:
    """Random scale, crop, turn, flip and colour, for images with one label.

    The shorter side is scaled to a random length, the image is turned and squeezed, and a square
    window of the network's size is cut out of it; what lies outside the image is grey.

    Args:
        shorter_side: least and largest length of the image's shorter side, px.
        aspect: smallest factor of the width; the inverse is the largest.
        degrees: largest turn to either side.
        flip: probability of a horizontal flip.
        hue: largest turn of the hue, 1 is the whole circle.
        saturation, exposure: largest factors; their inverses are the smallest.

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
        if not 0 < low <= high:
            raise InputError(
                f"augmentation: shorter_side is {list(shorter_side)}; allowed: two lengths in px, "
                "the smaller one first"
            )
        _check_probability("flip", flip)
        if not 0 <= degrees <= 180:
            raise InputError(f"augmentation: degrees is {degrees}; allowed: 0 (none) … 180")
        if not 0 < aspect <= 1:
            raise InputError(f"augmentation: aspect is {aspect}; allowed: above 0 up to 1 (none)")
        self._longest = high
        self._scale = A.SmallestMaxSize(list(range(low, high + 1)), area_for_downscale="image")
        self._turn = A.Affine(
            scale={"x": (aspect, 1 / aspect), "y": (1.0, 1.0)},
            rotate=(-degrees, degrees),
            fill=GREY,
            p=float(degrees > 0 or aspect < 1),
        )
        self._rest = (A.HorizontalFlip(p=flip), _Colour(hue, saturation, exposure).transform)
        self._pipelines: dict[int, A.Compose] = {}

    def longest_side(self, size: int) -> int:
        """Return the largest length that an image's shorter side is scaled to, px."""
        return max(size, self._longest)

    def __call__(self, image: Image, size: int, seed: int) -> Image:
        """Return the augmented image, (size, size, 3); `seed` alone decides every draw."""
        if size not in self._pipelines:
            window = A.RandomCrop(size, size, True, "center", fill=GREY)
            self._pipelines[size] = A.Compose(
                [self._scale, self._turn, window, *self._rest], seed=0
            )
        pipeline = self._pipelines[size]
        pipeline.set_random_seed(seed)
        return np.asarray(pipeline(image=image)["image"], dtype=np.uint8)
