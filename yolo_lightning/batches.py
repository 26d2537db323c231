"""Samples and the two kinds of batches, and how samples become batches.

Shape letters used in every module: B images, A anchors per cell, Gh Gw grid cells, K tree nodes,
M objects or chosen boxes, C channels.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_OBJECT_FIELDS = ("boxes_xyxy_px", "labels", "difficult", "crowd", "areas_orig_px2")


@dataclass
class DetectionSample:
    """An image with its N objects."""

    # (H, W, 3), RGB, may be smaller than the image file; fitted by `darknet`: float32 in 0…1
    image: NDArray[np.uint8]
    boxes_xyxy_px: NDArray[np.float32]  # (N, 4), corners in px of `image`, inside it, not empty
    labels: NDArray[np.int64]  # (N,), tree nodes
    difficult: NDArray[np.bool_]  # (N,), objects to ignore, regions of a crowd among them
    faults: list[str] = field(default_factory=list)  # what was repaired, one sentence each
    size_hw_orig: tuple[int, int] = (0, 0)  # of the image file, px; by default that of `image`
    # (N,), which of `difficult` are regions of a crowd; none by default
    crowd: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    # (N,), areas of outlines in square px of the image file; 0, the default, where unknown
    areas_orig_px2: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))

    def __post_init__(self) -> None:
        if len(self.crowd) != len(self.difficult):
            self.crowd = np.zeros_like(self.difficult)
        if len(self.areas_orig_px2) != len(self.difficult):
            self.areas_orig_px2 = np.zeros(len(self.difficult), np.float32)
        if self.size_hw_orig == (0, 0):
            self.size_hw_orig = (self.image.shape[0], self.image.shape[1])

    def select(self, rows: NDArray[Any]) -> "DetectionSample":
        """Return the sample with some of its objects, given as a bool mask (N,) or as indices."""
        return replace(self, **{name: getattr(self, name)[rows] for name in _OBJECT_FIELDS})


@dataclass
class _Batch:
    """Fields that both kinds of batches have."""

    images: Tensor  # uint8 (B, 3, H, W), RGB, or float32 in 0…1 after resizing
    sample_ids: Tensor  # int64 (B,), the index of each sample in its source
    # number of this batch since training began, the same on every rank
    step: int = field(default=0, kw_only=True)
    # images of both kinds that all ranks read before this batch
    images_seen: int = field(default=0, kw_only=True)
    # what was repaired or skipped while reading, one sentence each
    faults: list[str] = field(default_factory=list, kw_only=True)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def _map(self, function: object) -> Self:
        assert callable(function)
        mapped = copy.copy(self)  # without `__post_init__`, which would wait for a GPU
        for f in fields(self):
            if isinstance(value := getattr(self, f.name), Tensor):
                setattr(mapped, f.name, function(value))
        return mapped

    def to(self, device: torch.device | str) -> Self:
        """Return the batch with every tensor on `device`; only copies to the host are waited for.

        Lightning asks for copies without waiting of tensors alone.
        """
        is_device = torch.device(device).type != "cpu"
        return self._map(lambda tensor: tensor.to(device, non_blocking=is_device))

    def pin_memory(self) -> Self:
        """Return the batch in page-locked memory; the data loader calls this."""
        return self._map(lambda tensor: tensor.pin_memory())


@dataclass
class DetectionBatch(_Batch):
    """Images with their boxes."""

    boxes_cxcywh_norm: Tensor  # float32 (B, M, 4), 0…1 of the network input; zeros as padding
    labels: Tensor  # int64 (B, M), tree nodes; -1 as padding
    difficult: Tensor  # bool (B, M), objects that evaluation ignores
    crowd: Tensor  # bool (B, M), which of `difficult` are regions of a crowd
    sizes_hw_orig: Tensor  # int64 (B, 2), height and width of the image files, px
    # float32 (B, M), areas of outlines in square px of the image files; 0 where unknown
    areas_orig_px2: Tensor = field(default_factory=lambda: torch.zeros(0), kw_only=True)
    # int64 (N,), the N objects as indices into the B * M labels; found before the batch moves to a
    # device, which would have to be waited for
    objects: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.objects = (self.labels >= 0).flatten().nonzero().flatten()
        if self.areas_orig_px2.shape != self.labels.shape:
            self.areas_orig_px2 = self.boxes_cxcywh_norm.new_zeros(self.labels.shape)

    def with_targets_on_host(self) -> Self:
        """Return the batch with all tensors but the images on the host; waits twice for a device.

        A copy of each of them would be waited for.
        """
        if self.labels.device.type == "cpu":
            return self
        columns = (self.labels, self.difficult, self.crowd, self.areas_orig_px2)
        tables = [self.boxes_cxcywh_norm, *(column[..., None] for column in columns)]
        objects = torch.cat(tables, dim=2).cpu()  # float32, in which numbers of nodes are exact
        labels, difficult, crowd, areas = objects[..., 4:].unbind(2)
        sizes, ids = torch.cat([self.sizes_hw_orig, self.sample_ids[:, None]], 1).cpu().split(2, 1)
        return replace(
            self,
            sample_ids=ids.flatten(),
            boxes_cxcywh_norm=objects[..., :4],
            labels=labels.long(),
            difficult=difficult.bool(),
            crowd=crowd.bool(),
            sizes_hw_orig=sizes,
            areas_orig_px2=areas,
        )


@dataclass
class ClassificationBatch(_Batch):
    """Images with one label each."""

    labels: Tensor  # int64 (B,), tree nodes


def stack_images(images: Sequence[NDArray[Any]]) -> Tensor:
    """Return (B, 3, H, W), channels last in memory, of images (H, W, 3) of one type."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def collate_detection(samples: Sequence[DetectionSample]) -> DetectionBatch:
    """Collate samples whose images have one size; M is a power of two, at least 8."""
    images = stack_images([sample.image for sample in samples])
    max_objects = 8
    while max_objects < max(len(sample.labels) for sample in samples):
        max_objects *= 2
    count, height, width = len(samples), images.shape[2], images.shape[3]
    boxes = torch.zeros(count, max_objects, 4)
    labels = torch.full((count, max_objects), -1)
    difficult = torch.zeros(count, max_objects, dtype=torch.bool)
    crowd = torch.zeros_like(difficult)
    areas = torch.zeros(count, max_objects)
    size_whwh = np.array([width, height, width, height], dtype=np.float32)
    for row, sample in enumerate(samples):
        n = len(sample.labels)
        x1, y1, x2, y2 = (sample.boxes_xyxy_px / size_whwh).T
        cxcywh = np.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], axis=1)
        boxes[row, :n] = torch.from_numpy(cxcywh)
        labels[row, :n] = torch.from_numpy(sample.labels)
        difficult[row, :n] = torch.from_numpy(sample.difficult)
        crowd[row, :n] = torch.from_numpy(sample.crowd)
        areas[row, :n] = torch.from_numpy(sample.areas_orig_px2)
    sizes = torch.tensor([[height, width]] * count)
    ids = torch.zeros(count, dtype=torch.long)
    faults = [fault for sample in samples for fault in sample.faults]
    return DetectionBatch(
        images, ids, boxes, labels, difficult, crowd, sizes, areas_orig_px2=areas, faults=faults
    )


def unit_range(images: Tensor) -> Tensor:
    """Return float images (B, 3, H, W) in 0…1 of uint8 or float ones, channels last in memory."""
    unit = images.float() / 255 if images.dtype == torch.uint8 else images
    return unit.contiguous(memory_format=torch.channels_last)
