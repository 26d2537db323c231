"""Backbones, a readable list of layers each, and the classifier on top of one."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from yolo_lightning.errors import InputError, nearest
from yolo_lightning.models.layers import Conv, Layer, LayerStack, Pool, from_plain, init_weights

DARKNET19: tuple[Layer, ...] = (
    Conv(32), Pool(),
    Conv(64), Pool(),
    Conv(128), Conv(64, 1), Conv(128), Pool(),
    Conv(256), Conv(128, 1), Conv(256), Pool(),
    Conv(512), Conv(256, 1), Conv(512), Conv(256, 1), Conv(512), Pool(),
    Conv(1024), Conv(512, 1), Conv(1024), Conv(512, 1), Conv(1024),
)  # fmt: skip
"""Source: YOLO9000, section 3, table 6, without the classifier's last convolution."""

TINY_DARKNET: tuple[Layer, ...] = (
    Conv(16), Pool(),
    Conv(32), Pool(),
    Conv(16, 1), Conv(128), Conv(16, 1), Conv(128), Pool(),
    Conv(32, 1), Conv(256), Conv(32, 1), Conv(256), Pool(),
    Conv(64, 1), Conv(512), Conv(64, 1), Conv(512), Conv(128, 1),
)  # fmt: skip
"""The original authors' small ImageNet classifier, without its last convolution; stride 16."""

TINY_YOLOV2_VOC: tuple[Layer, ...] = (
    Conv(16), Pool(),
    Conv(32), Pool(),
    Conv(64), Pool(),
    Conv(128), Pool(),
    Conv(256), Pool(),
    Conv(512), Pool(2, 1),
    Conv(1024), Conv(1024),
)  # fmt: skip
"""The released Tiny YOLOv2 for VOC up to its last convolution; takes no further head."""

TINY_YOLOV2: tuple[Layer, ...] = (*TINY_YOLOV2_VOC[:-1], Conv(512))
"""The released Tiny YOLOv2 for COCO up to its last convolution; takes no further head."""

SMALL: tuple[Layer, ...] = (
    Conv(16), Pool(),
    Conv(32), Pool(),
    Conv(64), Pool(),
    Conv(128), Pool(),
    Conv(256), Conv(128, 1), Conv(256),
)  # fmt: skip
"""Our own, for CPUs and small images: Darknet-19's pattern with one level less, stride 16."""

BACKBONES: dict[str, tuple[Layer, ...]] = {
    "darknet19": DARKNET19,
    "tiny_darknet": TINY_DARKNET,
    "tiny_yolov2_voc": TINY_YOLOV2_VOC,
    "tiny_yolov2": TINY_YOLOV2,
    "small": SMALL,
}


def backbone_layers(backbone: str | Sequence[Sequence[Any]]) -> tuple[Layer, ...]:
    """Return the layers of a backbone: a name, or rows such as ``["conv", 32, 3]``.

    Raises:
        InputError: an unknown name, or rows that are no layers.
    """
    if not isinstance(backbone, str):
        return from_plain(backbone)
    if backbone not in BACKBONES:
        hint = (
            nearest(backbone, BACKBONES) or f"allowed: {', '.join(BACKBONES)}, or a list of layers"
        )
        raise InputError(f"model.backbone is {backbone!r}; {hint}")
    return BACKBONES[backbone]


class Classifier(nn.Module):
    """A backbone, a 1x1 convolution to the classes, and the mean over all cells.

    Args:
        layers: the backbone's.
        num_nodes: K, nodes of the WordTree.

    Source: YOLO9000, section 3, "Darknet-19".
    """

    def __init__(self, layers: Sequence[Layer], num_nodes: int) -> None:
        super().__init__()
        self.body = LayerStack(layers)
        self.class_conv = nn.Conv2d(self.body.out_channels, num_nodes, 1)
        init_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return class logits (B, K).

        Args:
            images: float (B, 3, H, W), RGB in 0…1; any size of at least one cell.
        """
        # the mean and the linear convolution change places: a cell's worth of arithmetic
        features = self.body(images).mean(dim=(2, 3))
        weight = self.class_conv.weight.flatten(1)
        return F.linear(features, weight, self.class_conv.bias)
