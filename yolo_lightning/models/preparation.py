"""How images become the input of a network: hyper-parameters that a checkpoint holds."""

from typing import Literal

Resize = Literal["letterbox", "stretch"]
"""Whole on grey, or with a changed aspect ratio."""

Interpolation = Literal["area", "darknet"]
"""How pixels are resized: `area`, averaging and rounded to uint8, or `darknet`, the original
program's bilinear interpolation, without averaging and in float."""

MAX_IMAGE_PX = 2048  # side of a network input

PREPARATION = {"image_size": 416, "resize": "letterbox", "interpolation": "area"}
"""Fallbacks where neither the data nor the model says a value; px for the size."""
