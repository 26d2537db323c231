"""A backbone that is not made of the package's layers."""

import torch
from torch import Tensor, nn

from yolo_lightning import DetectorModule


class PatchBackbone(nn.Module):
    """Embed patches of 16 px, then mix their channels."""

    stride = 16

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.out_channels = width
        self.embed = nn.Conv2d(3, width, self.stride, self.stride, bias=False)
        self.mix = nn.Linear(width, width)

    def forward(self, images: Tensor) -> Tensor:
        features = self.embed(images).movedim(1, 3)
        return torch.relu(self.mix(features)).movedim(3, 1)


class NoStride(nn.Module):
    """A module without the attribute `stride`."""

    out_channels = 8


class OwnDetector(DetectorModule):
    """A detector that takes a module of its own in place of the package's backbone."""

    def __init__(
        self,
        tree: str,
        anchors_wh_cell: list[tuple[float, float]],
        backbone: nn.Module,
        head_channels: int = 4,
        passthrough_channels: int = 0,
        image_size: int = 64,
        backbone_lr_factor: float = 1.0,
    ) -> None:
        super().__init__(tree, anchors_wh_cell, "small", head_channels, passthrough_channels)
        self.extra = backbone
