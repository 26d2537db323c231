"""Create image files and EXIF data."""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image


def write_image(path: Path, width: int = 64, height: int = 48, value: int = 120) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((height, width, 3), value, dtype=np.uint8))
    return path


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif
