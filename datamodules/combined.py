"""Detection and classification batches on one stateless, alternating order."""

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, TypeVar

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from yolo_lightning.batches import ClassificationBatch, DetectionBatch
from yolo_lightning.datamodules.sampler import AlternatingBatchSampler, BatchPlan, JointOrder
from yolo_lightning.datamodules.source import (
    DetectionSample,
    DetectionSource,
    Image,
    ImageLabelSource,
    UnreadableSample,
)
from yolo_lightning.datamodules.transforms import (
    ClassificationAugmentation,
    DetectionAugmentation,
    letterbox,
    letterbox_sample,
)
from yolo_lightning.errors import InputError
from yolo_lightning.wordtree import WordTree

Batch = DetectionBatch | ClassificationBatch
Read = TypeVar("Read")

_TRIES = 20


class CombinedDataModule(pl.LightningDataModule):
    """Any detection source and any classification source, in alternating batches.

    Not Lightning's ``CombinedLoader``: it has no mode that alternates in ``fit``. Resuming one in
    the middle of an epoch also repeats or loses batches, where here batch number g is computed.

    Args:
        tree: the classes: a tree file, a list of names (a tree of one level), or rows.
        detection: images with boxes.
        classification: images with labels; None trains on boxes alone.
        validation: what ``validate``, and ``fit`` in between, measure on.
        test: what ``test`` measures on; `validation` by default.
        detection_batch_size: images in a detection batch, over *all* ranks.
        classification_batch_size: images in a classification batch, over *all* ranks.
        classification_batches_per_detection_batch: 0 or more, fractions allowed.
        image_size: side of the network input in evaluation, px, a multiple of 32.
        canvas_size: side of training images, px; the largest that `MultiScale` draws, which
            shrinks them on the device. `image_size` by default.
        steps_per_epoch: batches of an epoch; by default one pass of the detection source with its
            interleaved classification batches.
        detection_augmentation, classification_augmentation: none where None.
        num_workers: loader processes of each rank.
        seed: chooses order and augmentation; the batch of a step depends on nothing else.

    Raises:
        InputError: a size or a ratio out of range; on `setup`, whatever the sources find.
    """

    def __init__(
        self,
        tree: str | list[str] | list[tuple[str, str, str]],
        detection: DetectionSource,
        classification: ImageLabelSource | None = None,
        validation: DetectionSource | None = None,
        test: DetectionSource | None = None,
        detection_batch_size: int = 64,
        classification_batch_size: int = 64,
        classification_batches_per_detection_batch: float = 1,
        image_size: int = 416,
        canvas_size: int | None = None,
        steps_per_epoch: int | None = None,
        detection_augmentation: DetectionAugmentation | None = None,
        classification_augmentation: ClassificationAugmentation | None = None,
        num_workers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tree = WordTree.of(tree)
        self.detection, self.classification = detection, classification
        self.validation = validation
        self.test = validation if test is None else test
        self.batch_sizes = (detection_batch_size, classification_batch_size)
        ratio = classification_batches_per_detection_batch
        for name, value in (
            ("image_size", image_size),
            ("canvas_size", canvas_size or image_size),
        ):
            if value <= 0 or value % 32:
                raise InputError(f"data.{name} is {value}; allowed: positive multiples of 32")
        if num_workers < 0:
            raise InputError(f"data.num_workers is {num_workers}; allowed: 0 or more")
        for name, value in (
            ("detection_batch_size", detection_batch_size),
            ("classification_batch_size", classification_batch_size),
            ("steps_per_epoch", steps_per_epoch or 1),
        ):
            if value < 1:
                raise InputError(f"data.{name} is {value}; allowed: 1 or more")
        if ratio < 0:
            raise InputError(
                f"data.classification_batches_per_detection_batch is {ratio}; allowed: 0 or more"
            )
        self.ratio = Fraction(ratio).limit_denominator(1000)
        if classification is None:
            self.ratio = Fraction(0)
        self.image_size, self.canvas_size = image_size, canvas_size or image_size
        self.steps_per_epoch = steps_per_epoch
        self.augmentations = (detection_augmentation, classification_augmentation)
        self.num_workers, self.seed = num_workers, seed
        self._bound: set[int] = set()

    def setup(self, stage: str | None = None) -> None:
        """Read the indices of the sources that a stage needs, and map their labels to nodes."""
        if stage == "validate" and self.validation is None:
            raise InputError("the recipe names no data.validation to measure on")
        needed: dict[str, list[DetectionSource | ImageLabelSource | None]] = {
            "fit": [self.detection, self.classification, self.validation],
            "validate": [self.validation],
            "test": [self.test],
        }
        for source in needed.get(stage or "fit", []):
            if source is not None and id(source) not in self._bound:
                source.bind(self.tree)
                self._bound.add(id(source))

    @property
    def source_faults(self) -> list[str]:
        """What the sources read so far repaired or skipped, a sentence each."""
        sources = (self.detection, self.classification, self.validation, self.test)
        unique = {id(s): s for s in sources if s is not None and id(s) in self._bound}
        return [fault for source in unique.values() for fault in source.faults]

    @property
    def boxed_nodes(self) -> Tensor:
        """int64, sorted: the nodes that training boxes are labelled with."""
        return self.detection.nodes

    @property
    def order(self) -> JointOrder:
        """Which samples each step reads."""
        return JointOrder(
            len(self.detection),
            len(self.classification) if self.classification is not None and self.ratio else 0,
            *self.batch_sizes,
            self.ratio,
            self.seed,
        )

    def train_dataloader(self) -> "ResumableLoader":
        """Return the loader of both kinds of batches."""
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        if trainer and world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise InputError(
                "trainer.use_distributed_sampler has to be false: the data's own sampler gives "
                "each rank its share"
            )

        if trainer and _cuts_epochs(trainer):
            raise InputError(
                "trainer.limit_train_batches and trainer.overfit_batches would cut epochs short "
                "behind the sampler's back; set data.steps_per_epoch, or a source's length, instead"
            )

        def steps_trained() -> int:
            # `processed` counts batches that were trained, through epochs, resumes, accumulation
            if trainer is None:
                return 0
            return int(
                trainer.fit_loop.epoch_loop.batch_progress.state_dict()["total"]["processed"]
            )

        order = self.order
        steps = self.steps_per_epoch or order.steps_per_pass
        sampler = AlternatingBatchSampler(order, steps, steps_trained, rank, world_size)
        dataset = JointDataset(
            self.detection, self.classification, self.augmentations, self.canvas_size, self.seed
        )
        return ResumableLoader(dataset, sampler, self.num_workers)

    def val_dataloader(self) -> "ResumableLoader | list[Any]":
        """Return the loader of validation images, none where the recipe names none."""
        return self._evaluation_loader(self.validation)

    def test_dataloader(self) -> "ResumableLoader | list[Any]":
        """Return the loader of test images."""
        if self.test is None:
            raise InputError("the recipe names neither data.test nor data.validation")
        return self._evaluation_loader(self.test)

    def _evaluation_loader(self, source: DetectionSource | None) -> "ResumableLoader | list[Any]":
        if source is None:
            return []
        rank, world = (
            (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        )
        share = max(1, self.batch_sizes[0] // world)
        sampler = EvaluationSampler(len(source), share, rank, world)
        return ResumableLoader(
            EvaluationDataset(source, self.image_size), sampler, self.num_workers
        )


class ResumableLoader(DataLoader[Batch]):
    """A loader whose sampler names whole batches, and that has no position to save.

    Lightning warns about a resume in mid-epoch unless a loader can save its state: this one's is
    empty, since the sampler asks the trainer where it stands.
    """

    def __init__(self, dataset: Dataset[Batch], sampler: Sampler[Any], num_workers: int) -> None:
        super().__init__(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=num_workers > 0,
            worker_init_fn=_one_thread,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the order is computed."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take nothing: the order is computed."""


def _cuts_epochs(trainer: Any) -> bool:
    if trainer.fast_dev_run:
        return False
    return bool(trainer.limit_train_batches != 1.0 or trainer.overfit_batches)


def _one_thread(worker_id: int) -> None:
    torch.set_num_threads(1)


class JointDataset(Dataset[Batch]):
    """Turn a plan into a batch: decode, augment, collate; a pure function of the plan."""

    def __init__(
        self,
        detection: DetectionSource,
        classification: ImageLabelSource | None,
        augmentations: tuple[DetectionAugmentation | None, ClassificationAugmentation | None],
        canvas_size: int,
        seed: int,
    ) -> None:
        self.detection, self.classification = detection, classification
        self.detection_augmentation, self.classification_augmentation = augmentations
        self.canvas_size, self.seed = canvas_size, seed

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
        sample = _read_or_next(self.detection.read, index, len(self.detection), faults)
        easy = ~sample.difficult
        sample = DetectionSample(
            sample.image,
            sample.boxes_xyxy_px[easy],
            sample.labels[easy],
            sample.difficult[easy],
            sample.faults,
        )
        sample = letterbox_sample(sample, self.canvas_size)
        if self.detection_augmentation is None:
            return sample
        return self.detection_augmentation(sample, _seed(self.seed, 0, number, index))

    def _labelled_image(self, index: int, number: int, faults: list[str]) -> tuple[Image, int]:
        source = self.classification
        assert source is not None, "the order holds no classification batches without a source"
        image, node = _read_or_next(source.read, index, len(source), faults)
        if self.classification_augmentation is None:
            return letterbox(image, self.canvas_size)[0], node
        seed = _seed(self.seed, 1, number, index)
        return self.classification_augmentation(image, self.canvas_size, seed), node


class EvaluationDataset(Dataset[Batch]):
    """Letterboxed images, boxes in the network input; padding has the sample id -1."""

    def __init__(self, source: DetectionSource, image_size: int) -> None:
        self.source, self.image_size = source, image_size

    def __getitem__(self, positions: list[int]) -> DetectionBatch:
        """Return the images at these positions; those past the end stand in as padding."""
        samples, sizes, ids, faults = [], [], [], []
        for position in positions:
            index = position % len(self.source)
            try:
                sample = self.source.read(index)
            except UnreadableSample as error:
                # evaluation never puts another image in the place of one that it cannot read
                faults.append(f"{error}; left out of the evaluation")
                empty = np.zeros((0,), dtype=np.int64)
                blank = np.zeros((self.image_size, self.image_size, 3), dtype=np.uint8)
                boxes = np.zeros((0, 4), dtype=np.float32)
                sample = DetectionSample(blank, boxes, empty, empty.astype(np.bool_))
                position = len(self.source)
            sizes.append(sample.image.shape[:2])
            ids.append(position if position < len(self.source) else -1)
            samples.append(letterbox_sample(sample, self.image_size))
        batch = collate_detection(samples)
        batch.sizes_hw_orig, batch.sample_ids = torch.tensor(sizes), torch.tensor(ids)
        batch.faults = [*batch.faults, *faults]
        return batch


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


def _read_or_next(read: Callable[[int], Read], index: int, size: int, faults: list[str]) -> Read:
    """Return a sample, or the next readable one in its place; says so in `faults`."""
    for offset in range(min(size, _TRIES)):
        try:
            return read((index + offset) % size)
        except UnreadableSample as error:
            faults.append(f"{error}; the next image stands in")
    raise InputError(f"no readable image among {min(size, _TRIES)} in a row: {faults[-1]}")


def _stack(images: list[Image]) -> Tensor:
    """Return uint8 (B, 3, H, W)."""
    return torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy())


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
    unit = np.array([width, height, width, height], dtype=np.float32)
    for row, sample in enumerate(samples):
        n = len(sample.labels)
        x1, y1, x2, y2 = (sample.boxes_xyxy_px / unit).T
        centre_size = np.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], axis=1)
        boxes[row, :n] = torch.from_numpy(centre_size)
        labels[row, :n] = torch.from_numpy(sample.labels)
        difficult[row, :n] = torch.from_numpy(sample.difficult)
    sizes = torch.tensor([[height, width]] * count)
    ids = torch.zeros(count, dtype=torch.long)
    faults = [fault for sample in samples for fault in sample.faults]
    return DetectionBatch(images, ids, boxes, labels, difficult, sizes, faults=faults)
