"""Backbones, a readable list of layers each, and the classifier on top of one."""

from collections.abc import Sequence
from typing import Any

from yolo_lightning.errors import InputError, nearest
from yolo_lightning.models.layers import Conv, Layer, Pool, Reorg, ReorgKind, Route, from_plain

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


def detector_layers(
    backbone: Sequence[Layer],
    head_channels: int = 1024,
    passthrough_channels: int | None = 64,
    reorg: ReorgKind = "space_to_depth",
) -> tuple[Layer, ...]:
    """Return the layers from the image to the features that the last 1x1 convolution reads.

    Args:
        backbone: the backbone's layers.
        head_channels: channels of the head's three 3x3 convolutions; 0 for no head at all, as in
            the released YOLO9000 and in Tiny YOLOv2.
        passthrough_channels: of the reducing 1x1 convolution before the features of the backbone's
            last finer level are folded in; None folds them in whole, 0 leaves them out.
        reorg: how they are folded, see `Reorg`.

    Raises:
        InputError: a passthrough without a head, or from a backbone without a finer level.

    Source: YOLO9000, section 2, "Fine-Grained Features", and section 3, "Training for detection".
    The paper folds 512 channels in whole (3,072 after joining); the released configuration
    reduces them to 64 first.
    """
    if not head_channels:
        if passthrough_channels != 0:
            raise InputError(
                f"model.passthrough_channels is {passthrough_channels}; allowed without a head "
                "(model.head_channels 0): 0"
            )
        return tuple(backbone)
    layers = [*backbone, Conv(head_channels), Conv(head_channels)]
    if passthrough_channels != 0:
        pools = [k for k, layer in enumerate(backbone) if layer == Pool()]
        if not pools:
            raise InputError(
                "model.backbone has no pool of stride 2: nothing finer to pass through"
            )
        deep = len(layers) - 1
        layers.append(Route((pools[-1] - 1 - len(layers),)))
        if passthrough_channels is not None:
            layers.append(Conv(passthrough_channels, 1))
        layers.append(Reorg(2, reorg))
        layers.append(Route((-1, deep - len(layers))))
    return (*layers, Conv(head_channels))
