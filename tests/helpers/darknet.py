"""Released networks of Darknet, and random weight files."""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from yolo_lightning.checkpoints.pretrained import last_conv
from yolo_lightning.darknet.config import NetworkDescription
from yolo_lightning.darknet.released import LAYOUTS
from yolo_lightning.models.layers import (
    Conv,
    layer_outputs,
)
from yolo_lightning.models.networks import Classifier, YOLOv2


def write_values(path: Path, count: int, is_64_bit: bool = False, seed: int = 0) -> Path:
    header = np.array([0, 2 if is_64_bit else 1, 0], "<i4").tobytes()
    header += np.array([640], "<i8" if is_64_bit else "<i4").tobytes()
    values = np.random.default_rng(seed).uniform(0.1, 1, count).astype("<f4")
    path.write_bytes(header + values.tobytes())
    return path


def build_network(description: NetworkDescription) -> YOLOv2 | Classifier:
    if description.region is None:
        return Classifier(description.layers, description.classes)
    anchors = torch.tensor(description.region.anchors).view(-1, 2)
    return YOLOv2(description.layers, description.classes, anchors)


def conv_layers(description: NetworkDescription) -> list[tuple[int, int, int, int]]:
    """Return (in, out, kernel, batch norm) of every convolution, in the order of the file."""
    convs, channels = [], 3
    for layer, output in zip(description.layers, layer_outputs(description.layers), strict=True):
        if isinstance(layer, Conv):
            convs.append((channels, layer.filters, layer.size, int(layer.batch_norm)))
        channels = output.channels
    return [*convs, (channels, description.outputs, 1, 0)]


def operations(name: str, size: int) -> float:
    """Return billions of operations per image; a multiply-add counts as two."""
    description = LAYOUTS[name]()
    with torch.device("meta"):
        network = build_network(description)
        counter = FlopCounterMode(display=False)
        with counter:
            features = network.body(torch.empty(1, 3, size, size))
            nn.functional.conv2d(features, *last_conv(network))
    return counter.get_total_flops() / 1e9
