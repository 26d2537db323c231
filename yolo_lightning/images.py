"""Image files: read sizes, decode to RGB within limits, and fit into a network input."""

import io
import os
import re
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

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

# Limits of files, checked before decoding: a small file may declare any size, or need minutes.
MAX_BYTES = 512 * 2**20
MAX_PIXELS = 178_000_000
MAX_SCANS = 100  # of a JPEG; a progressive one usually has 10, and each is a pass over all blocks
MAX_SCANNED_PIXELS = 3_000_000_000  # pixels x scans
MAX_PNG_TEXTS = 20  # compressed; each may expand to 8 MB
MAX_HEADER_READS = 20_000  # about 3 for each part of a header, which may be a few bytes

_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF")  # of which some are found as .jpg in datasets
_SCAN = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")  # start of a scan
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
        UnreadableSample: the file is missing, not a regular file, not an image, or too large.
    """
    with _open(path) as file:
        return _header(file, str(path))


def read_file(path: Path) -> bytes:
    """Return the bytes of an image file.

    Raises:
        UnreadableSample: the file is missing, not a regular file, or too large.
    """
    with _open(path) as file:
        try:
            return file.read(os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise _unreadable(path, error) from None


def _open(path: Path) -> IO[bytes]:
    """Open a regular file; opening a named pipe or a device may block or have side effects."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableSample(f"{path}: not a regular file")
        if status.st_size > MAX_BYTES:
            raise UnreadableSample(
                f"{path}: {status.st_size:,} bytes; allowed: at most {MAX_BYTES:,}"
            )
        return open(path, "rb", opener=_open_descriptor)
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise _unreadable(path, error) from None


def _open_descriptor(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # Windows has no O_NONBLOCK


class _BoundedReads:
    """A file for Pillow, which needs a minute for a header of millions of parts."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file, self._name, self._count = file, name, 0
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        self._count += 1
        if self._count > MAX_HEADER_READS:
            raise UnreadableSample(f"{self._name}: a header of too many parts")
        return self._file.read(size)


def _header(file: IO[bytes], name: str) -> Header:
    try:
        with Pillow.open(cast(IO[bytes], _BoundedReads(file, name)), formats=_FORMATS) as image:
            width, height = image.size
            format_name = "JPEG" if image.format == "MPO" else str(image.format)
            exif = Pillow.Exif()  # image.getexif() would decode PNGs, and would read XMP too
            exif.load(image.info.get("exif") or b"")
            transposed = exif.get(_ORIENTATION) in _TRANSPOSED
    except Pillow.DecompressionBombError:
        raise UnreadableSample(
            f"{name}: declares more than {MAX_PIXELS // 1_000_000} million pixels"
        ) from None
    except UnreadableSample:
        raise
    except Exception:  # Pillow raises many kinds of exceptions for damaged headers
        raise UnreadableSample(
            f"{name}: not a readable image (allowed: JPEG, PNG, BMP, WebP, GIF)"
        ) from None
    if width * height > MAX_PIXELS:
        raise UnreadableSample(
            f"{name}: {width} x {height} px, more than {MAX_PIXELS // 1_000_000} million"
        )
    return Header((width, height) if transposed else (height, width), format_name)


def check_image(data: bytes, name: str) -> Header:
    """Return the header of an encoded image that is within the limits of this module.

    They bound the time of decoding to a few seconds of one core.

    Args:
        data: content of a JPEG, PNG, BMP, WebP or GIF file.
        name: of the image, for messages.

    Raises:
        UnreadableSample: not an image, or beyond a limit.
    """
    if len(data) > MAX_BYTES:
        raise UnreadableSample(f"{name}: {len(data):,} bytes; allowed: at most {MAX_BYTES:,}")
    header = _header(io.BytesIO(data), name)
    height, width = header.size_hw
    if header.format == "JPEG":
        scans = len(_SCAN.findall(data))
        allowed = min(MAX_SCANS, MAX_SCANNED_PIXELS // (width * height))
        if scans > allowed:
            raise UnreadableSample(
                f"{name}: {scans:,} scans of {width} x {height} px; allowed: at most {allowed}"
            )
    elif header.format == "PNG":
        texts = data.count(b"zTXt") + data.count(b"iTXt")
        if texts > MAX_PNG_TEXTS:
            raise UnreadableSample(
                f"{name}: {texts:,} compressed texts; allowed: at most {MAX_PNG_TEXTS}"
            )
    return header


def read_image(path: Path, min_side: int | None = None) -> tuple[Image, tuple[int, int]]:
    """Decode an image file; see `decode_image` for the arguments, the result and the errors."""
    return decode_image(read_file(path), str(path), min_side)


def decode_image(
    data: bytes, name: str, min_side: int | None = None
) -> tuple[Image, tuple[int, int]]:
    """Decode an image to RGB and apply its EXIF orientation; return it and the file's size_hw.

    Grey, palette, 16-bit and CMYK images become RGB; transparency is dropped. Of an animation, the
    first frame is decoded.

    Args:
        data: content of a JPEG, PNG, BMP, WebP or GIF file.
        name: of the image, for messages.
        min_side: px that the shorter side must keep. A much larger JPEG is decoded at a half, a
            quarter or an eighth of its size, which is several times faster.

    Raises:
        UnreadableSample: not an image, damaged, or beyond a limit of `check_image`.
    """
    header = check_image(data, name)
    flag = cv2.IMREAD_COLOR_RGB
    if min_side is not None and header.format == "JPEG":
        shorter = min(header.size_hw)
        flag = next((f for factor, f in _REDUCED if shorter >= factor * min_side), flag)
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    except cv2.error:
        image = None
    if image is None:
        raise UnreadableSample(f"{name}: damaged or truncated, cannot be decoded")
    if flag != cv2.IMREAD_COLOR_RGB:  # OpenCV decodes at reduced size to BGR only
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)
    return np.asarray(image, np.uint8), header.size_hw


def _unreadable(path: Path, error: OSError | ValueError) -> UnreadableSample:
    return UnreadableSample(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})")


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
