"""Backbones as lists of layers, and the layers of a detector."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from yolo_lightning.errors import InputError, nearest
from yolo_lightning.models.layers import (
    Conv,
    CustomBackbone,
    Layer,
    Pool,
    Reorg,
    ReorgKind,
    Route,
    layer_outputs,
    layers_from_rows,
)

if TYPE_CHECKING:
    from torch import nn

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
"""The released Tiny YOLOv2 for VOC up to its last convolution; used without a head."""

TINY_YOLOV2: tuple[Layer, ...] = (*TINY_YOLOV2_VOC[:-1], Conv(512))  # as released for COCO

EXTRACTION: tuple[Layer, ...] = (
    Conv(64, 7, 2), Pool(),
    Conv(192), Pool(),
    Conv(128, 1), Conv(256), Conv(256, 1), Conv(512), Pool(),
    Conv(256, 1), Conv(512), Conv(256, 1), Conv(512),
    Conv(256, 1), Conv(512), Conv(256, 1), Conv(512),
    Conv(512, 1), Conv(1024), Pool(),
    Conv(512, 1), Conv(1024), Conv(512, 1), Conv(1024),
)  # fmt: skip
"""YOLOv1's backbone, as the original program calls it, without its last convolution."""

YOLOV1: tuple[Layer, ...] = (*EXTRACTION, Conv(1024, 3, 2))
"""YOLOv1's stride of 64 px, which makes 7 x 7 cells of 448 px."""

SMALL: tuple[Layer, ...] = (
    Conv(16), Pool(),
    Conv(32), Pool(),
    Conv(64), Pool(),
    Conv(128), Pool(),
    Conv(256), Conv(128, 1), Conv(256),
)  # fmt: skip
"""For CPUs and small images: Darknet-19 with one level less, stride 16; not from the paper."""

BACKBONES: dict[str, tuple[Layer, ...]] = {
    "darknet19": DARKNET19,
    "tiny_darknet": TINY_DARKNET,
    "tiny_yolov2_voc": TINY_YOLOV2_VOC,
    "tiny_yolov2": TINY_YOLOV2,
    "extraction": EXTRACTION,
    "yolov1": YOLOV1,
    "small": SMALL,
}


def backbone_layers(backbone: "str | Sequence[Sequence[Any]] | nn.Module") -> tuple[Layer, ...]:
    """Return the layers of a name, of rows such as ``["conv", 32, 3]``, or of a module.

    Raises:
        InputError: an unknown name, invalid rows or module, or a class path.
    """
    if isinstance(backbone, Mapping):
        path = str(backbone.get("class_path"))[:100]
        raise InputError(
            f"model.backbone names the class {path}; only fit, validate and test import a class, "
            "and only if the recipe names it. In Python, pass the module: "
            f"load(path, backbone={path.rpartition('.')[2]}(...))"
        )
    if isinstance(backbone, str) or backbone is None:
        if backbone not in BACKBONES:
            names = f"{', '.join(BACKBONES)}, a list of layers, or a module"
            hint = nearest(str(backbone), BACKBONES) or f"allowed: {names}"
            raise InputError(f"model.backbone is {backbone!r}; {hint}")
        return BACKBONES[backbone]
    if isinstance(backbone, Sequence):
        return layers_from_rows(backbone)
    module_class = type(backbone)
    out_channels, stride = (getattr(backbone, name, 0) for name in ("out_channels", "stride"))
    for name, value in (("out_channels", out_channels), ("stride", stride)):
        if not isinstance(value, int) or value < 1:
            raise InputError(
                f"model.backbone: {module_class.__qualname__}.{name} is {value}; allowed: 1 or more"
            )
    return (CustomBackbone(_class_path(backbone), out_channels, stride, backbone),)


def without_batch_norm(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """Return the layers with a bias instead of the batch norm in every convolution.

    Raises:
        InputError: a backbone that is a module.
    """
    if any(isinstance(layer, CustomBackbone) for layer in layers):
        raise InputError(
            "model.batch_norm is false; allowed for a backbone that is a module: true, because "
            "only a list of layers says where its batch norms are"
        )
    return tuple(
        replace(layer, batch_norm=False) if isinstance(layer, Conv) else layer for layer in layers
    )


def checkpoint_layers(backbone: Any, out_channels: int = 1) -> tuple[Layer, ...]:
    """Return the layers of a backbone as saved in a checkpoint, without importing a class."""
    if isinstance(backbone, Mapping):
        return (CustomBackbone(str(backbone["class_path"]), out_channels, stride=1),)
    return backbone_layers(backbone)


def plain_backbone(backbone: "str | list[list[Any]] | nn.Module") -> Any:
    """Return a backbone as plain values for a checkpoint; a module becomes its class path."""
    if isinstance(backbone, str | Sequence):
        return backbone
    return {"class_path": _class_path(backbone)}


def _class_path(module: "nn.Module") -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def default_head_channels(backbone: Sequence[Layer]) -> int:
    """Return the width of a head in proportion to the backbone: its output channels, 256 … 1024.

    For Darknet-19 these are the paper's 1024 channels, and 256 for Tiny Darknet, whose head would
    otherwise have ten times the parameters of the backbone.
    """
    return min(1024, max(256, layer_outputs(backbone)[-1].channels))


def detector_layers(
    backbone: Sequence[Layer],
    head_channels: int = 1024,
    passthrough_channels: int | None = 64,
    reorg: ReorgKind = "space_to_depth",
) -> tuple[Layer, ...]:
    """Return the layers before the last 1x1 convolution; for the parameters, see `DetectorModule`.

    Raises:
        InputError: a passthrough without a head, or from a backbone without finer features.

    Source: YOLO9000, section 2, "Fine-Grained Features", and section 3, "Training for detection".
    Reducing the 512 channels of the passthrough to 64 is from the released configuration; the
    released YOLO9000 and Tiny YOLOv2 have no head.
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
                f"model.passthrough_channels is {passthrough_channels}; allowed for a backbone "
                "that is a module or has no pooling of stride 2: 0"
            )
        coarse = len(layers) - 1
        layers.append(Route((pools[-1] - 1 - len(layers),)))
        if passthrough_channels is not None:
            layers.append(Conv(passthrough_channels, 1))
        layers.append(Reorg(2, reorg))
        layers.append(Route((-1, coarse - len(layers))))
    return (*layers, Conv(head_channels))
