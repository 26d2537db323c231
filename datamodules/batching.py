"""Datasets whose items are whole batches: read, augment, collate."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from yolo_lightning.batches import (
    ClassificationBatch,
    DetectionBatch,
    DetectionSample,
    collate_detection,
    stack_images,
)
from yolo_lightning.datamodules.sampler import BatchPlan
from yolo_lightning.datamodules.source import DetectionSource, ImageLabelSource, Source
from yolo_lightning.datamodules.transforms import (
    ClassificationAugmentation,
    DetectionAugmentation,
    fit_sample,
)
from yolo_lightning.errors import InputError
from yolo_lightning.images import Image, UnreadableSample, centre_crop, decoding_side, fit
from yolo_lightning.models.preparation import Interpolation, Resize

Batch = DetectionBatch | ClassificationBatch
_GOLDEN_RATIO = 0.618
_MAX_REPORTED = 20
_MAX_WORKERS = 256


class PendingReads:
    """The image that each loader worker is reading, in memory that they share."""

    def __init__(self, *sources: Source | None) -> None:
        self._sources = [source for source in sources if source is not None]
        # by worker: number of the source, from 1, or 0 for none; index of the image
        self._reads = torch.zeros(_MAX_WORKERS, 2, dtype=torch.int64).share_memory_()

    @contextlib.contextmanager
    def reading(self, source: Source, index: int) -> Iterator[None]:
        """Note the image that this process reads."""
        info = get_worker_info()
        read = self._reads[(info.id if info is not None else 0) % _MAX_WORKERS].numpy()
        read[1], read[0] = index, 1 + next(k for k, s in enumerate(self._sources) if s is source)
        try:
            yield
        finally:
            read[0] = 0

    def names(self) -> list[str]:
        """Return the names of the images, such as their paths."""
        return [
            self._sources[number - 1].image_name(index)
            for number, index in self._reads.tolist()
            if number
        ]


class JointDataset(Dataset[Batch]):
    """Turn plans into training batches; a batch depends on its plan alone."""

    def __init__(
        self,
        detection: DetectionSource | None,
        classification: ImageLabelSource | None,
        augmentations: tuple[DetectionAugmentation | None, ClassificationAugmentation | None],
        seed: int,
        resize: Resize = "letterbox",
    ) -> None:
        self.detection, self.classification = detection, classification
        self.detection_augmentation, self.classification_augmentation = augmentations
        self.seed, self.resize = seed, resize
        self.pending = PendingReads(detection, classification)

    def __getitem__(self, plan: BatchPlan) -> Batch:
        """Return the batch of a plan."""
        faults: list[str] = []
        entries = list(zip(plan.indices, plan.passes, strict=True))
        if plan.kind == "detection":
            read = [self._read_sample(*entry, plan.image_size, faults) for entry in entries]
            samples, ids = zip(*read, strict=True)
            batch: Batch = collate_detection(samples)
        else:
            triples = [self._read_image(*entry, plan.image_size, faults) for entry in entries]
            images, nodes, ids = zip(*triples, strict=True)
            batch = ClassificationBatch(stack_images(images), torch.zeros(0), torch.tensor(nodes))
        batch.sample_ids = torch.tensor(ids)
        batch.step, batch.images_seen = plan.step, plan.images_seen
        batch.faults = [*batch.faults, *faults]
        return batch

    def _read_sample(
        self, index: int, pass_number: int, size: int, faults: list[str]
    ) -> tuple[DetectionSample, int]:
        """Return an augmented sample without its difficult objects, and the index of its image."""
        augmentation = self.detection_augmentation
        seed = _seed(self.seed, 0, pass_number, index)
        min_side = size
        if augmentation is not None:
            min_side = augmentation.required_side(size, seed, self.resize)
        sample, read = _read_or_replace(self.detection, index, min_side, faults, self.pending)
        sample = sample.select(~sample.difficult)
        if augmentation is None:
            return fit_sample(sample, size, self.resize), read
        return augmentation(sample, size, seed, self.resize), read

    def _read_image(
        self, index: int, pass_number: int, size: int, faults: list[str]
    ) -> tuple[Image, int, int]:
        """Return an augmented image, its node and its index."""
        augmentation = self.classification_augmentation
        seed = _seed(self.seed, 1, pass_number, index)
        min_side = size if augmentation is None else augmentation.required_side(size, seed)
        (image, node), read = _read_or_replace(
            self.classification, index, min_side, faults, self.pending
        )
        if augmentation is None:
            return fit(image, (size, size))[0], node, read
        return augmentation(image, size, seed), node, read


class EvaluationDataset(Dataset[Batch]):
    """Whole images and their boxes in the network input; padding has the sample id -1."""

    def __init__(
        self,
        source: DetectionSource,
        image_size: int,
        resize: Resize = "letterbox",
        interpolation: Interpolation = "area",
    ) -> None:
        self.source, self.image_size = source, image_size
        self.resize, self.interpolation = resize, interpolation
        self.pending = PendingReads(source)

    def __getitem__(self, positions: list[int]) -> DetectionBatch:
        """Return the images at these positions; positions beyond the end give padding."""
        boxes, no_labels = np.zeros((0, 4), dtype=np.float32), np.zeros(0, dtype=np.int64)
        blank = DetectionSample(_blank(self.image_size), boxes, no_labels, np.zeros(0, np.bool_))
        min_side = decoding_side(self.image_size, self.interpolation)
        samples, ids, faults = _read_or_blank(self.source, positions, min_side, blank, self.pending)
        batch = collate_detection(
            [fit_sample(s, self.image_size, self.resize, self.interpolation) for s in samples]
        )
        batch.sizes_hw_orig = torch.tensor([sample.size_hw_orig for sample in samples])
        batch.sample_ids, batch.faults = torch.tensor(ids), [*batch.faults, *faults]
        return batch


class LabelEvaluationDataset(Dataset[Batch]):
    """Centre crops of images with one label each; padding has the sample id -1."""

    def __init__(
        self, source: ImageLabelSource, image_size: int, interpolation: Interpolation = "area"
    ) -> None:
        self.source, self.image_size, self.interpolation = source, image_size, interpolation
        self.pending = PendingReads(source)

    def __getitem__(self, positions: list[int]) -> ClassificationBatch:
        """Return the images at these positions; positions beyond the end give padding."""
        blank, size_hw = (_blank(self.image_size), 0), (self.image_size, self.image_size)
        min_side = decoding_side(self.image_size, self.interpolation)
        pairs, ids, faults = _read_or_blank(self.source, positions, min_side, blank, self.pending)
        images, labels = zip(*pairs, strict=True)
        crops = stack_images([centre_crop(image, size_hw, self.interpolation) for image in images])
        return ClassificationBatch(crops, torch.tensor(ids), torch.tensor(labels), faults=faults)


def evaluation_batches(
    size: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> list[list[int]]:
    """Return the batches of positions 0…size - 1 of one rank; every rank gets equally many."""
    share = -(-size // world_size)
    positions = range(rank * share, (rank + 1) * share)
    return [list(positions[k : k + batch_size]) for k in range(0, share, batch_size)]


def _seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def _blank(size: int) -> Image:
    return np.zeros((size, size, 3), dtype=np.uint8)


def _read_or_blank(
    source: Source, positions: list[int], min_side: int | None, blank: Any, pending: PendingReads
) -> tuple[list[Any], list[int], list[str]]:
    """Return samples, ids and faults; an unreadable image becomes `blank`, with the id -1."""
    # evaluation never replaces an image by another one
    samples, ids, faults = [], [], []
    for position in positions:
        try:
            with pending.reading(source, position % len(source)):
                samples.append(source.read(position % len(source), min_side))
            ids.append(position if position < len(source) else -1)
        except UnreadableSample as error:
            samples.append(blank)
            ids.append(-1)
            faults.append(f"{error}; left out of the evaluation")
    return samples, ids, faults


def _read_or_replace(
    source: Source | None, index: int, min_side: int, faults: list[str], pending: PendingReads
) -> tuple[Any, int]:
    """Return a sample, or another one if it cannot be read, and its index; report to `faults`."""
    assert source is not None, "a plan without a source has no batches of its kind"
    # replace from far away: neighbours are often of one class and unreadable together
    size, stride = len(source), 0
    reason = ""
    for attempt in range(size):
        try:
            with pending.reading(source, index):
                return source.read(index, min_side), index
        except UnreadableSample as error:
            reason = str(error)
            if attempt < _MAX_REPORTED:
                faults.append(f"{reason}; another image is used instead")
            stride = stride or _coprime_stride(size)
            index = (index + stride) % size
    raise InputError(f"no readable image among {size}: {reason}")


def require_readable(source: Source) -> None:
    """Read one image.

    Raises:
        InputError: no image of the source can be read.
    """
    _read_or_replace(source, 0, 1, [], PendingReads(source))


def _coprime_stride(size: int) -> int:
    """Return a stride, near the golden ratio of the size, that reaches every index."""
    stride = max(1, round(size * _GOLDEN_RATIO))
    while math.gcd(stride, size) > 1:
        stride += 1
    return stride
