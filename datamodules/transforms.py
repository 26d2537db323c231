"""Augmentation and letterboxing. All use of albumentations is in this file."""

import os
from dataclasses import replace

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
from numpy.typing import NDArray

from yolo_lightning.boxes import letterbox_geometry
from yolo_lightning.datamodules.images import Image
from yolo_lightning.datamodules.source import DetectionSample
from yolo_lightning.errors import InputError

GREY = 127


def letterbox(image: Image, size: int) -> tuple[Image, float, float, float, float]:
    """Scale an image to fit a grey square, centred.

    Args:
        image: uint8 (H, W, 3).
        size: side of the square, px.

    Returns:
        The square, and how image px map to it: x scale, y scale, left and top margin, px.
    """
    height, width = image.shape[:2]
    new_height, new_width, top, left = letterbox_geometry((height, width), (size, size))
    top, left = int(top), int(left)
    if (height, width) != (new_height, new_width):
        shrinks = new_width < width
        method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        image = np.asarray(
            cv2.resize(image, (new_width, new_height), interpolation=method), np.uint8
        )
    if (new_height, new_width) != (size, size):
        canvas = np.full((size, size, 3), GREY, dtype=np.uint8)
        canvas[top : top + new_height, left : left + new_width] = image
        image = canvas
    return image, new_width / width, new_height / height, left, top


def centre_crop(image: Image, size: int) -> Image:
    """Return the largest square in an image's middle, scaled to `size` px."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : top + side, left : left + side]
    if side == size:
        return square
    method = cv2.INTER_AREA if size < side else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(square, (size, size), interpolation=method), np.uint8)


def letterbox_sample(sample: DetectionSample, size: int) -> DetectionSample:
    """Letterbox an image together with its boxes."""
    image, x_scale, y_scale, left, top = letterbox(sample.image, size)
    scale = np.array([x_scale, y_scale] * 2, dtype=np.float32)
    boxes = sample.boxes_xyxy_px * scale + np.array([left, top] * 2, dtype=np.float32)
    return replace(sample, image=image, boxes_xyxy_px=boxes)


class _Colour:
    """Hue, saturation and exposure, drawn within factors."""

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


class DetectionAugmentation:
    """Random crop or padding, flip and colour, for images with boxes.

    The letterboxed image is moved and scaled, each side by itself; what leaves the frame is cut
    off, what is laid bare is grey. A box that keeps less than a fifth of its area goes.

    Args:
        jitter: the frame's sides vary by 1 ± jitter and its place by ± jitter, relative.
        flip: probability of a horizontal flip.
        hue: largest turn of the hue, 1 is the whole circle.
        saturation, exposure: largest factors; their inverses are the smallest.

    Source: YOLO9000, section 3, "Training for detection"; figures of the released configurations.
    """

    def __init__(
        self,
        jitter: float = 0.2,
        flip: float = 0.5,
        hue: float = 0.1,
        saturation: float = 1.5,
        exposure: float = 1.5,
    ) -> None:
        if not 0 <= jitter < 1:
            raise InputError(f"augmentation: jitter is {jitter}; allowed: 0 (none) up to below 1")
        geometry = A.Affine(
            scale={"x": (1 - jitter, 1 + jitter), "y": (1 - jitter, 1 + jitter)},
            translate_percent={"x": (-jitter, jitter), "y": (-jitter, jitter)},
            fill=GREY,
            p=float(jitter > 0),
        )
        self._pipeline = A.Compose(
            [A.HorizontalFlip(p=flip), geometry, _Colour(hue, saturation, exposure).transform],
            bbox_params=A.BboxParams(
                "pascal_voc", ["row"], clip=True, min_visibility=0.2, min_width=1, min_height=1
            ),
            seed=0,
        )

    def __call__(self, sample: DetectionSample, seed: int) -> DetectionSample:
        """Return the augmented sample; `seed` alone decides every draw."""
        size = np.array([sample.image.shape[1], sample.image.shape[0]] * 2)
        boxes = sample.boxes_xyxy_px.clip(0, size)
        rows = np.flatnonzero((boxes[:, 2:] - boxes[:, :2]).min(axis=1, initial=np.inf) >= 1)
        self._pipeline.set_random_seed(seed)
        out = self._pipeline(image=sample.image, bboxes=boxes[rows], row=rows)
        kept = np.asarray(out["row"], dtype=np.int64)
        moved: NDArray[np.float32] = np.asarray(out["bboxes"], dtype=np.float32).reshape(-1, 4)
        return replace(sample.chosen(kept), image=out["image"], boxes_xyxy_px=moved)


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
