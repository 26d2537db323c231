"""Image files: read sizes, decode to RGB, and fit into a network input."""

import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image as Pillow

from yolo_lightning.boxes import letterbox_geometry
from yolo_lightning.models.preparation import Interpolation, Resize

Image = NDArray[np.uint8]  # (H, W, 3), RGB
NetworkInput = NDArray[Any]  # (H, W, 3), RGB: uint8, or float32 in 0…1

GREY = 127  # of padding; 0.5 in float, as in the original program

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")

# refuse larger images before they are decoded: a small file may declare any size
MAX_PIXELS = 178_000_000

_ORIENTATION = 0x0112
_TRANSPOSED = (5, 6, 7, 8)
_REDUCED = (
    (8, cv2.IMREAD_REDUCED_COLOR_8),
    (4, cv2.IMREAD_REDUCED_COLOR_4),
    (2, cv2.IMREAD_REDUCED_COLOR_2),
)

cv2.setNumThreads(0)  # loader workers already use all cores
warnings.filterwarnings("ignore", category=Pillow.DecompressionBombWarning)


class UnreadableSample(Exception):
    """An image cannot be read; the message names it and the reason."""


@dataclass(frozen=True)
class Header:
    """Size and format of an image file."""

    size_hw: tuple[int, int]  # px, after the EXIF orientation is applied
    format: str  # such as JPEG


def is_image(path: str | Path) -> bool:
    """Return whether a file has the suffix of a supported image format."""
    return os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES


def read_header(path: Path) -> Header:
    """Return size and format of an image file without decoding it.

    Raises:
        UnreadableSample: the file is missing, not an image, or too large.
    """
    try:
        with path.open("rb") as file:
            return _header(file, path)
    except OSError as error:
        raise _unreadable(path, error) from None


def _header(file: IO[bytes], path: Path) -> Header:
    try:
        with Pillow.open(file) as image:
            width, height = image.size
            format_name = str(image.format)
            exif = Pillow.Exif()  # image.getexif() would decode PNGs, and would read XMP too
            exif.load(image.info.get("exif") or b"")
            transposed = exif.get(_ORIENTATION) in _TRANSPOSED
    except Pillow.DecompressionBombError:
        raise UnreadableSample(
            f"{path}: declares more than {MAX_PIXELS // 1_000_000} million pixels"
        ) from None
    except Exception:  # Pillow raises many kinds of exceptions for damaged headers
        raise UnreadableSample(f"{path}: not a readable image") from None
    if width * height > MAX_PIXELS:
        raise UnreadableSample(
            f"{path}: {width} x {height} px, more than {MAX_PIXELS // 1_000_000} million"
        )
    return Header((width, height) if transposed else (height, width), format_name)


def read_image(path: Path, min_side: int | None = None) -> tuple[Image, tuple[int, int]]:
    """Decode an image file to RGB and apply its EXIF orientation; return it and the file's size_hw.

    Grey, palette, 16-bit and CMYK images become RGB; transparency is dropped.

    Args:
        path: JPEG, PNG, BMP or WebP.
        min_side: px that the shorter side must keep. A much larger JPEG is decoded at a half, a
            quarter or an eighth of its size, which is several times faster.

    Raises:
        UnreadableSample: the file is missing, not an image, damaged, or too large.
    """
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise _unreadable(path, error) from None
    header = _header(io.BytesIO(data.data), path)
    flag = cv2.IMREAD_COLOR_RGB
    if min_side is not None and header.format == "JPEG":
        shorter = min(header.size_hw)
        flag = next((f for factor, f in _REDUCED if shorter >= factor * min_side), flag)
    image = cv2.imdecode(data, flag)
    if image is None:
        raise UnreadableSample(f"{path}: damaged or truncated, cannot be decoded")
    if flag != cv2.IMREAD_COLOR_RGB:  # OpenCV decodes at reduced size to BGR only
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)
    return np.asarray(image, np.uint8), header.size_hw


def _unreadable(path: Path, error: OSError) -> UnreadableSample:
    return UnreadableSample(f"{path}: cannot be read ({error.strerror or error})")


def fit(
    image: Image,
    size_hw: tuple[int, int],
    resize: Resize = "letterbox",
    size_hw_orig: tuple[int, int] | None = None,
    interpolation: Interpolation = "area",
) -> tuple[NetworkInput, tuple[float, float], tuple[int, int]]:
    """Fit an image into the network input.

    Args:
        image: uint8 (H, W, 3).
        size_hw: height and width of the network input, px.
        resize: `letterbox`, whole and centred on grey, or `stretch`.
        size_hw_orig: height and width of the image file, px, if it was decoded at reduced size.
        interpolation: see `Interpolation`.

    Returns:
        The network input, and the mapping of boxes to it: (x, y) scale, (left, top) margin, px.
    """
    height, width = image.shape[:2]
    if resize == "stretch":
        return (
            resize_image(image, size_hw, interpolation),
            (size_hw[1] / width, size_hw[0] / height),
            (0, 0),
        )
    new_height, new_width, y, x = letterbox_geometry(size_hw_orig or (height, width), size_hw)
    top, left = int(y), int(x)
    fitted = resize_image(image, (new_height, new_width), interpolation)
    if (new_height, new_width) != size_hw:
        grey = GREY if fitted.dtype == np.uint8 else 0.5
        canvas = np.full((*size_hw, 3), grey, fitted.dtype)
        canvas[top : top + new_height, left : left + new_width] = fitted
        fitted = canvas
    return fitted, (new_width / width, new_height / height), (left, top)


def centre_crop(
    image: Image, size_hw: tuple[int, int], interpolation: Interpolation = "area"
) -> NetworkInput:
    """Return the largest central window of the network input's shape, resized to it, px.

    Source: the original program's `center_crop_image`, whose window is always square.
    """
    height, width = image.shape[:2]
    scale = min(height / size_hw[0], width / size_hw[1])
    window_h, window_w = (max(1, round(side * scale)) for side in size_hw)
    top, left = (height - window_h) // 2, (width - window_w) // 2
    window = image[top : top + window_h, left : left + window_w]
    return resize_image(window, size_hw, interpolation)


def decoding_side(network_side: int, interpolation: Interpolation) -> int | None:
    """Return the `min_side` of `read_image`; `darknet` needs images at their full size."""
    return network_side if interpolation == "area" else None


def resize_image(
    image: Image, size_hw: tuple[int, int], interpolation: Interpolation
) -> NetworkInput:
    """Resize an image to height and width, px: uint8, or float32 in 0…1 for `darknet`."""
    if interpolation == "area":
        return resize_pixels(image, size_hw[1], size_hw[0])
    # as the original program's `resize_image`: the centres of the corner pixels stay in the corners
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255
    resized = F.interpolate(pixels, size_hw, mode="bilinear", align_corners=True)
    return np.asarray(resized[0].permute(1, 2, 0).numpy(), np.float32)


def resize_pixels(image: Image, width: int, height: int) -> Image:
    """Resize an image to width and height, px, by area, without keeping its aspect ratio."""
    old_height, old_width = image.shape[:2]
    if (old_height, old_width) == (height, width):
        return image
    method = cv2.INTER_AREA if width < old_width else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (width, height), interpolation=method), np.uint8)
