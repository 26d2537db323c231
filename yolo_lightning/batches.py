"""The two kinds of batches that training alternates between.

Shape letters used in every module: B images, A anchors per cell, Gh Gw grid cells, K tree nodes,
M objects or chosen boxes, C channels.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Self

import torch
from torch import Tensor


def unit_range(images: Tensor) -> Tensor:
    """Return images (B, 3, H, W) as floats in 0…1, channels last in memory.

    Args:
        images: uint8, or float in 0…1.
    """
    unit = images.float() / 255 if images.dtype == torch.uint8 else images
    return unit.contiguous(memory_format=torch.channels_last)


@dataclass
class _Batch:
    """What both kinds share.

    Attributes:
        images: uint8 (B, 3, H, W), RGB, or float32 in 0…1 once it was resized.
        sample_ids: int64 (B,), the index of each sample in its source.
        step: number of this batch since training began, the same on every rank.
        images_seen: images of both kinds that all ranks read before this batch.
        faults: what was repaired or skipped while this batch was read, a sentence each.
    """

    images: Tensor
    sample_ids: Tensor
    step: int = field(default=0, kw_only=True)
    images_seen: int = field(default=0, kw_only=True)
    faults: list[str] = field(default_factory=list, kw_only=True)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def _map(self, function: object) -> Self:
        assert callable(function)
        tensors = {
            f.name: function(getattr(self, f.name))
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return replace(self, **tensors)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return the batch with every tensor on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Return the batch in page-locked memory; the data loader calls this."""
        return self._map(lambda tensor: tensor.pin_memory())


@dataclass
class DetectionBatch(_Batch):
    """Images with their boxes.

    Attributes:
        boxes_cxcywh_norm: float32 (B, M, 4), relative to the network input, 0…1; zeros as padding.
        labels: int64 (B, M), tree nodes; -1 as padding.
        difficult: bool (B, M), objects that evaluation neither asks for nor punishes.
        crowd: bool (B, M), those of `difficult` that are regions of a crowd.
        sizes_hw_orig: int64 (B, 2), height and width of the image file, px.
        areas_orig_px2: float32 (B, M), what objects cover of the image file, square px; 0 where
            nothing but the box is known.
    """

    boxes_cxcywh_norm: Tensor
    labels: Tensor
    difficult: Tensor
    crowd: Tensor
    sizes_hw_orig: Tensor
    areas_orig_px2: Tensor = field(default_factory=lambda: torch.zeros(0), kw_only=True)

    def __post_init__(self) -> None:
        if self.areas_orig_px2.shape != self.labels.shape:
            self.areas_orig_px2 = self.boxes_cxcywh_norm.new_zeros(self.labels.shape)


@dataclass
class ClassificationBatch(_Batch):
    """Images with one label each.

    Attributes:
        labels: int64 (B,), tree nodes.
    """

    labels: Tensor
