"""Networks of Darknet's layouts, and random weight files."""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from yolo_lightning.checkpoints.pretrained import last_conv
from yolo_lightning.darknet.config import LAYOUTS, Description
from yolo_lightning.models.layers import (
    Conv,
    extents,
)
from yolo_lightning.models.networks import Classifier, YOLOv2


def write_values(path: Path, count: int, wide: bool = False, seed: int = 0) -> Path:
    header = np.array([0, 2 if wide else 1, 0], "<i4").tobytes()
    header += np.array([640], "<i8" if wide else "<i4").tobytes()
    numbers = np.random.default_rng(seed).uniform(0.1, 1, count).astype("<f4")
    path.write_bytes(header + numbers.tobytes())
    return path


def network_of(description: Description) -> YOLOv2 | Classifier:
    if description.region is None:
        return Classifier(description.layers, description.classes)
    anchors = torch.tensor(description.region.anchors).view(-1, 2)
    return YOLOv2(description.layers, description.classes, anchors)


def conv_layers(description: Description) -> list[tuple[int, int, int, int]]:
    """Return (in, out, kernel, batch norm) of every convolution, in the order of the file."""
    found, channels = [], 3
    for layer, extent in zip(description.layers, extents(description.layers), strict=True):
        if isinstance(layer, Conv):
            found.append((channels, layer.filters, layer.size, int(layer.batch_norm)))
        channels = extent.channels
    return [*found, (channels, description.outputs, 1, 0)]


def operations(name: str, size: int) -> float:
    """Count billions of operations for one image, multiplications and additions one each."""
    description = LAYOUTS[name]()
    with torch.device("meta"):
        network = network_of(description)
        counter = FlopCounterMode(display=False)
        with counter:
            features = network.body(torch.empty(1, 3, size, size))
            nn.functional.conv2d(features, *last_conv(network))
    return counter.get_total_flops() / 1e9
