"""From plans to batches: read, augment, collate."""

import math
from collections.abc import Iterator
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from yolo_lightning.batches import ClassificationBatch, DetectionBatch
from yolo_lightning.datamodules.sampler import BatchPlan
from yolo_lightning.datamodules.source import DetectionSample, DetectionSource, ImageLabelSource
from yolo_lightning.datamodules.transforms import (
    ClassificationAugmentation,
    DetectionAugmentation,
    centre_crop,
    fit_sample,
)
from yolo_lightning.errors import InputError
from yolo_lightning.images import Image, Resize, UnreadableSample, fit

Batch = DetectionBatch | ClassificationBatch
Read = TypeVar("Read", covariant=True)


class _Readable(Protocol[Read]):
    def __len__(self) -> int: ...

    def read(self, index: int, least_side: int | None = None) -> Read: ...


_GOLDEN, _TOLD = 0.618, 20


class JointDataset(Dataset[Batch]):
    """Turn a plan into a batch: decode, augment, collate; a pure function of the plan."""

    def __init__(
        self,
        detection: DetectionSource | None,
        classification: ImageLabelSource | None,
        augmentations: tuple[DetectionAugmentation | None, ClassificationAugmentation | None],
        canvas_size: int,
        seed: int,
        resize: Resize = "letterbox",
    ) -> None:
        self.detection, self.classification = detection, classification
        self.detection_augmentation, self.classification_augmentation = augmentations
        self.canvas_size, self.seed, self.resize = canvas_size, seed, resize

    def __getitem__(self, plan: BatchPlan) -> Batch:
        """Return the batch that a plan names."""
        faults: list[str] = []
        if plan.kind == "detection":
            batch: Batch = collate_detection(
                [self._detection_sample(*place, faults) for place in _places(plan)]
            )
        else:
            pairs = [self._labelled_image(*place, faults) for place in _places(plan)]
            batch = ClassificationBatch(
                _stack([image for image, _ in pairs]),
                torch.zeros(0),
                torch.tensor([node for _, node in pairs]),
            )
        batch.sample_ids = torch.tensor(plan.indices)
        batch.step, batch.images_seen = plan.step, plan.images_seen
        batch.faults = [*batch.faults, *faults]
        return batch

    def _detection_sample(self, index: int, number: int, faults: list[str]) -> DetectionSample:
        source = self.detection
        assert source is not None, "the order holds no detection batches without a source"
        least = self.canvas_size
        if self.detection_augmentation is not None:
            least = self.detection_augmentation.longest_side(least)
        sample = _read_or_next(source, index, least, faults)
        sample = sample.chosen(~sample.difficult)
        if self.detection_augmentation is None:
            return fit_sample(sample, self.canvas_size, self.resize)
        seed = _seed(self.seed, 0, number, index)
        return self.detection_augmentation(sample, self.canvas_size, seed, self.resize)

    def _labelled_image(self, index: int, number: int, faults: list[str]) -> tuple[Image, int]:
        source = self.classification
        assert source is not None, "the order holds no classification batches without a source"
        least = self.canvas_size
        if self.classification_augmentation is not None:
            least = self.classification_augmentation.longest_side(least)
        image, node = _read_or_next(source, index, least, faults)
        if self.classification_augmentation is None:
            return fit(image, (self.canvas_size, self.canvas_size))[0], node
        seed = _seed(self.seed, 1, number, index)
        return self.classification_augmentation(image, self.canvas_size, seed), node


class EvaluationDataset(Dataset[Batch]):
    """Whole images, boxes in the network input; padding has the sample id -1."""

    def __init__(
        self, source: DetectionSource, image_size: int, resize: Resize = "letterbox"
    ) -> None:
        self.source, self.image_size, self.resize = source, image_size, resize

    def __getitem__(self, positions: list[int]) -> DetectionBatch:
        """Return the images at these positions; those past the end stand in as padding."""
        samples, sizes, ids, faults = [], [], [], []
        for position in positions:
            index = position % len(self.source)
            try:
                sample = self.source.read(index, self.image_size)
            except UnreadableSample as error:
                # evaluation never puts another image in the place of one that it cannot read
                faults.append(f"{error}; left out of the evaluation")
                empty = np.zeros((0,), dtype=np.int64)
                blank = np.zeros((self.image_size, self.image_size, 3), dtype=np.uint8)
                boxes = np.zeros((0, 4), dtype=np.float32)
                sample = DetectionSample(blank, boxes, empty, empty.astype(np.bool_))
                position = len(self.source)
            sizes.append(sample.size_hw_orig)
            ids.append(position if position < len(self.source) else -1)
            samples.append(fit_sample(sample, self.image_size, self.resize))
        batch = collate_detection(samples)
        batch.sizes_hw_orig, batch.sample_ids = torch.tensor(sizes), torch.tensor(ids)
        batch.faults = [*batch.faults, *faults]
        return batch


class LabelEvaluationDataset(Dataset[Batch]):
    """The middles of images with one label each; padding has the sample id -1."""

    def __init__(self, source: ImageLabelSource, image_size: int) -> None:
        self.source, self.image_size = source, image_size

    def __getitem__(self, positions: list[int]) -> ClassificationBatch:
        """Return the images at these positions; those past the end stand in as padding."""
        images, labels, ids, faults = [], [], [], []
        for position in positions:
            try:
                image, node = self.source.read(position % len(self.source), self.image_size)
            except UnreadableSample as error:
                faults.append(f"{error}; left out of the evaluation")
                image, node = np.zeros((self.image_size, self.image_size, 3), np.uint8), 0
                position = len(self.source)
            images.append(centre_crop(image, self.image_size))
            labels.append(node)
            ids.append(position if position < len(self.source) else -1)
        return ClassificationBatch(
            _stack(images), torch.tensor(ids), torch.tensor(labels), faults=faults
        )


class EvaluationSampler(Sampler[list[int]]):
    """Each rank's batches of positions: equally many for all, so that no rank waits for another.

    Args:
        size: number of images.
        batch_size: images in a batch of one rank.
        rank, world_size: this process among all.
    """

    def __init__(self, size: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        share = -(-size // world_size)
        positions = range(rank * share, (rank + 1) * share)
        self._batches = [list(positions[k : k + batch_size]) for k in range(0, share, batch_size)]

    def __len__(self) -> int:
        """Return the number of batches of this rank."""
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)


def _places(plan: BatchPlan) -> Iterator[tuple[int, int]]:
    return zip(plan.indices, plan.passes, strict=True)


def _seed(*key: int) -> int:
    """Return the seed of one sample's augmentation."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def _read_or_next(source: _Readable[Read], index: int, least_side: int, faults: list[str]) -> Read:
    """Return a sample, or another readable one in its place; says so in `faults`.

    Stand-ins come from all over the source: neighbours are often of one class, and broken together.
    """
    size, at, stride = len(source), index, 0
    for number in range(size):
        try:
            return source.read(at, least_side)
        except UnreadableSample as error:
            if number < _TOLD:
                faults.append(f"{error}; another image stands in")
            stride = stride or _stride(size)
            at = (at + stride) % size
    raise InputError(f"no readable image among {size}: {faults[-1]}")


def _stride(size: int) -> int:
    """Return a step that reaches every sample before any comes again, each far from the last."""
    stride = max(1, round(size * _GOLDEN))
    while math.gcd(stride, size) > 1:
        stride += 1
    return stride


def _stack(images: list[Image]) -> Tensor:
    """Return uint8 (B, 3, H, W), channels last in memory, as networks here want them."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def collate_detection(samples: list[DetectionSample]) -> DetectionBatch:
    """Stack samples of one size; the number of object slots is a power of two, at least 8."""
    images = _stack([sample.image for sample in samples])
    most = max(len(sample.labels) for sample in samples)
    slots = 8
    while slots < most:
        slots *= 2
    count, height, width = len(samples), images.shape[2], images.shape[3]
    boxes = torch.zeros(count, slots, 4)
    labels = torch.full((count, slots), -1)
    difficult = torch.zeros(count, slots, dtype=torch.bool)
    crowd = torch.zeros_like(difficult)
    areas = torch.zeros(count, slots)
    unit = np.array([width, height, width, height], dtype=np.float32)
    for row, sample in enumerate(samples):
        n = len(sample.labels)
        x1, y1, x2, y2 = (sample.boxes_xyxy_px / unit).T
        centre_size = np.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], axis=1)
        boxes[row, :n] = torch.from_numpy(centre_size)
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
