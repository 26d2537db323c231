"""Image files: their sizes, decoding to RGB, upright, and fitting into a network input."""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from yolo_lightning.boxes import letterbox_geometry

Image = NDArray[np.uint8]
"""uint8 (H, W, 3), RGB."""

Resize = Literal["letterbox", "stretch"]
"""How an image fills the network input: whole on grey, or its sides scaled each by itself."""

GREY = 127

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")

MAX_PIXELS = 178_000_000
"""A file may claim any size in a few bytes; larger images are refused before they are decoded."""

_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)
_REDUCED = (
    (8, cv2.IMREAD_REDUCED_COLOR_8),
    (4, cv2.IMREAD_REDUCED_COLOR_4),
    (2, cv2.IMREAD_REDUCED_COLOR_2),
)

cv2.setNumThreads(0)  # loader workers are the parallelism; threads inside them only collide
warnings.filterwarnings("ignore", category=Pillow.DecompressionBombWarning)


class UnreadableSample(Exception):
    """A sample that has to be left out; the message names it and says why."""


@dataclass(frozen=True)
class Header:
    """What a file says about its image before it is decoded.

    Attributes:
        size_hw: height and width, px, as it is seen: its EXIF orientation honoured.
        kind: the format's name, such as ``JPEG``.
    """

    size_hw: tuple[int, int]
    kind: str


def is_image(path: Path) -> bool:
    """Tell by its ending whether a file is an image that can be read."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def read_header(path: Path) -> Header:
    """Return size and format of an image file without decoding it.

    Raises:
        UnreadableSample: the file is missing, no image, or too large.
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
            kind = str(image.format)
            exif = Pillow.Exif()  # not image.getexif(): a PNG's decodes it, and XMP counts there
            exif.load(image.info.get("exif") or b"")
            turned = exif.get(_ORIENTATION) in _TURNED
    except Pillow.DecompressionBombError:
        raise UnreadableSample(
            f"{path}: claims more than {MAX_PIXELS // 1_000_000} million pixels"
        ) from None
    except Exception:  # Pillow's readers raise whatever a broken header makes them stumble over
        raise UnreadableSample(f"{path}: not a readable image") from None
    if width * height > MAX_PIXELS:
        raise UnreadableSample(
            f"{path}: {width} x {height} px, more than {MAX_PIXELS // 1_000_000} million"
        )
    return Header((width, height) if turned else (height, width), kind)


def read_image(path: Path, least_side: int | None = None) -> tuple[Image, tuple[int, int]]:
    """Decode a file to RGB, turned as its EXIF orientation says.

    Grey, palette, 16-bit and CMYK images become RGB; transparency is dropped.

    Args:
        path: JPEG, PNG, BMP or WebP.
        least_side: px that the shorter side has to keep: a JPEG that is much larger is decoded at a
            half, a quarter or an eighth of its size, several times faster.

    Returns:
        The image, and height and width of the file's own image, px.

    Raises:
        UnreadableSample: the file is missing, no image, broken, or too large.
    """
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise _unreadable(path, error) from None
    header = _header(io.BytesIO(data.data), path)
    flag = cv2.IMREAD_COLOR_RGB
    if least_side is not None and header.kind == "JPEG":
        shorter = min(header.size_hw)
        flag = next((f for factor, f in _REDUCED if shorter >= factor * least_side), flag)
    image = cv2.imdecode(data, flag)
    if image is None:
        raise UnreadableSample(f"{path}: broken or cut off, cannot be decoded")
    if flag != cv2.IMREAD_COLOR_RGB:  # there is no reduced decoding to RGB
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)
    return np.asarray(image, np.uint8), header.size_hw


def _unreadable(path: Path, error: OSError) -> UnreadableSample:
    return UnreadableSample(f"{path}: cannot be read ({error.strerror or error})")


def fit(
    image: Image,
    size_hw: tuple[int, int],
    resize: Resize = "letterbox",
    size_hw_orig: tuple[int, int] | None = None,
) -> tuple[Image, tuple[float, float], tuple[int, int]]:
    """Fit an image into the network input.

    Args:
        image: uint8 (H, W, 3).
        size_hw: height and width of the network input, px.
        resize: `letterbox`, whole and centred on grey, or `stretch`.
        size_hw_orig: height and width of the file's own image, where decoding shrank it.

    Returns:
        The network input, and how image px map to it: x and y scale, left and top margin, px.
    """
    height, width = image.shape[:2]
    if resize == "stretch":
        return (
            scaled(image, size_hw[1], size_hw[0]),
            (size_hw[1] / width, size_hw[0] / height),
            (0, 0),
        )
    new_height, new_width, y, x = letterbox_geometry(size_hw_orig or (height, width), size_hw)
    top, left = int(y), int(x)
    fitted = scaled(image, new_width, new_height)
    if (new_height, new_width) != size_hw:
        canvas = np.full((*size_hw, 3), GREY, dtype=np.uint8)
        canvas[top : top + new_height, left : left + new_width] = fitted
        fitted = canvas
    return fitted, (new_width / width, new_height / height), (left, top)


def scaled(image: Image, width: int, height: int) -> Image:
    """Scale each side by itself, px."""
    old_height, old_width = image.shape[:2]
    if (old_height, old_width) == (height, width):
        return image
    method = cv2.INTER_AREA if width < old_width else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (width, height), interpolation=method), np.uint8)
