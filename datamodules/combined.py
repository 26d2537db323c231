"""Detection and classification batches on one stateless, alternating order."""

from fractions import Fraction
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from yolo_lightning import signals
from yolo_lightning.datamodules.batching import (
    Batch,
    EvaluationDataset,
    EvaluationSampler,
    JointDataset,
    LabelEvaluationDataset,
)
from yolo_lightning.datamodules.sampler import AlternatingBatchSampler, JointOrder
from yolo_lightning.datamodules.source import (
    ConcatDetectionSource,
    ConcatImageLabelSource,
    DetectionSource,
    ImageLabelSource,
)
from yolo_lightning.datamodules.transforms import (
    ClassificationAugmentation,
    DetectionAugmentation,
)
from yolo_lightning.datamodules.vocabulary import (
    Counts,
    vocabulary_report,
    vocabulary_table,
)
from yolo_lightning.errors import InputError
from yolo_lightning.images import Resize
from yolo_lightning.tree.wordtree import WordTree

EvaluationSource = (
    DetectionSource | ImageLabelSource | list[DetectionSource | ImageLabelSource] | None
)


def _joined(given: Any) -> Any:
    """Return a list of sources of one kind as one source.

    Raises:
        InputError: both kinds in one list, or an empty list.
    """
    if not isinstance(given, list):
        return given
    if all(isinstance(source, DetectionSource) for source in given):
        return ConcatDetectionSource(given)
    if all(isinstance(source, ImageLabelSource) for source in given):
        return ConcatImageLabelSource(given)
    raise InputError("a list of sources holds images with boxes and images with labels; part them")


class CombinedDataModule(pl.LightningDataModule):
    """Any detection source and any classification source, in alternating batches, or either alone.

    Not Lightning's ``CombinedLoader``: it has no mode that alternates in ``fit``. Resuming one in
    the middle of an epoch also repeats or loses batches, where here batch number g is computed.

    Args:
        tree: the classes: a tree file, a list of names (a tree of one level), or rows.
        detection: images with boxes, a list for several sources; None trains a classifier on labels
            alone.
        classification: images with labels, a list for several sources; None trains on boxes alone.
        validation: what ``validate``, and ``fit`` in between, measure on.
        test: what ``test`` measures on; `validation` by default.
        detection_batch_size: images in a detection batch, over *all* ranks.
        classification_batch_size: images in a classification batch, over *all* ranks.
        classification_batches_per_detection_batch: 0 or more, fractions allowed.
        image_size: side of the network input in evaluation, px, a multiple of 32; images with
            boxes are letterboxed, of images with labels the middle is taken.
        canvas_size: side of training images, px; the largest that `MultiScale` draws, which
            shrinks them on the device. `image_size` by default.
        steps_per_epoch: batches of an epoch; by default one pass of the detection source with its
            interleaved classification batches, or of the classification source alone.
        resize: how images with boxes become square: `letterbox`, whole on grey, or `stretch`, each
            side by itself, as the original program trained.
        detection_augmentation, classification_augmentation: none where None.
        num_workers: loader processes of each rank.
        seed: chooses order and augmentation; the batch of a step depends on nothing else.

    Raises:
        InputError: a size or a ratio out of range; on `setup`, whatever the sources find.
    """

    def __init__(
        self,
        tree: str | list[str] | list[tuple[str, str, str]],
        detection: DetectionSource | list[DetectionSource] | None = None,
        classification: ImageLabelSource | list[ImageLabelSource] | None = None,
        validation: EvaluationSource = None,
        test: EvaluationSource = None,
        detection_batch_size: int = 64,
        classification_batch_size: int = 64,
        classification_batches_per_detection_batch: float = 1,
        image_size: int = 416,
        canvas_size: int | None = None,
        steps_per_epoch: int | None = None,
        resize: Resize = "letterbox",
        detection_augmentation: DetectionAugmentation | None = None,
        classification_augmentation: ClassificationAugmentation | None = None,
        num_workers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if detection is None and classification is None:
            raise InputError("data.detection and data.classification: name at least one of them")
        self.tree = WordTree.of(tree)
        self.detection = _joined(detection)
        self.classification = _joined(classification)
        self.validation = _joined(validation)
        self.test = self.validation if test is None else _joined(test)
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
        self.steps_per_epoch, self.resize = steps_per_epoch, resize
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
        if stage == "fit" and self.detection is not None and not len(self.detection.nodes):
            raise InputError(f"data.detection: {self.detection.name} holds no box to learn from")

    @property
    def source_faults(self) -> list[str]:
        """What the sources read so far repaired or skipped, a sentence each."""
        sources = (self.detection, self.classification, self.validation, self.test)
        unique = {id(s): s for s in sources if s is not None and id(s) in self._bound}
        return [fault for source in unique.values() for fault in source.faults]

    def vocabulary_report(self) -> str:
        """Return which names met, which labels are coarser, and what each class learns from."""
        return vocabulary_report(self.tree, *self._counts())

    def vocabulary_table(self) -> list[dict[str, object]]:
        """Return for every class what labels it with boxes and with images."""
        return vocabulary_table(self.tree, *self._counts())

    def _counts(self) -> tuple[Counts, Counts]:
        """Return what boxes and what image labels training learns from, by node and name."""
        uses_labels = self.ratio or self.detection is None
        boxes = self.detection.node_counts() if self.detection is not None else {}
        labels = self.classification if uses_labels else None
        return boxes, labels.node_counts() if labels is not None else {}

    def inputs(self) -> list[dict[str, Any]]:
        """Return what training and its validations read, one entry a source; after `setup`.

        Returns:
            ``use`` (training, validation), ``holds`` (boxes, image labels), ``name``,
            ``fingerprint``, ``images``, ``nodes`` and ``labelled``: objects, or images.
        """
        uses_labels = self.ratio or self.detection is None
        used = [
            ("training", "boxes", self.detection),
            ("training", "image labels", self.classification if uses_labels else None),
            ("validation", "boxes" if self.detection is not None else "", self.validation),
        ]
        return [
            {
                "use": use,
                "holds": holds or "image labels",
                "name": source.name,
                "fingerprint": source.fingerprint(),
                "images": len(source),
                "nodes": len(source.node_counts()),
                "labelled": sum(sum(c.values()) for c in source.node_counts().values()),
            }
            for use, holds, joined in used
            if joined is not None and id(joined) in self._bound
            for source in getattr(joined, "sources", [joined])
        ]

    @property
    def boxed_nodes(self) -> Tensor:
        """int64, sorted: the nodes that training boxes are labelled with."""
        return self.detection.nodes if self.detection is not None else torch.zeros(0).long()

    @property
    def order(self) -> JointOrder:
        """Which samples each step reads."""
        uses_labels = self.ratio or self.detection is None
        return JointOrder(
            len(self.detection) if self.detection is not None else 0,
            len(self.classification) if self.classification is not None and uses_labels else 0,
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
        return ResumableLoader(self._training_dataset(), sampler, self.num_workers)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Return what a rank reads at a step; `setup` comes before.

        Args:
            step: number of the batch since training began.
            rank: the process.
            world_size: how many there are.

        Raises:
            InputError: a global batch that the ranks cannot share equally.
        """
        order = self.order
        AlternatingBatchSampler(order, 1, lambda: step, rank, world_size)  # refuses unequal shares
        return self._training_dataset()[order.plan(step, rank, world_size)]

    def _training_dataset(self) -> JointDataset:
        return JointDataset(
            self.detection,
            self.classification,
            self.augmentations,
            self.canvas_size,
            self.seed,
            self.resize,
        )

    def val_dataloader(self) -> "ResumableLoader | list[Any]":
        """Return the loader of validation images, none where the recipe names none."""
        return self._evaluation_loader(self.validation)

    def test_dataloader(self) -> "ResumableLoader | list[Any]":
        """Return the loader of test images."""
        if self.test is None:
            raise InputError("the recipe names neither data.test nor data.validation")
        return self._evaluation_loader(self.test)

    def _evaluation_loader(
        self, source: DetectionSource | ImageLabelSource | None
    ) -> "ResumableLoader | list[Any]":
        if source is None:
            return []
        rank, world = (
            (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        )
        has_boxes = isinstance(source, DetectionSource)
        share = max(1, self.batch_sizes[0 if has_boxes else 1] // world)
        dataset: Dataset[Batch] = (
            EvaluationDataset(source, self.image_size, self.resize)
            if isinstance(source, DetectionSource)
            else LabelEvaluationDataset(source, self.image_size)
        )
        sampler = EvaluationSampler(len(source), share, rank, world)
        return ResumableLoader(dataset, sampler, self.num_workers)


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
            worker_init_fn=_begin_worker,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the order is computed."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take nothing: the order is computed."""


def _cuts_epochs(trainer: Any) -> bool:
    if trainer.fast_dev_run:
        return False
    limit = trainer.limit_train_batches
    return bool(isinstance(limit, int) or limit != 1.0 or trainer.overfit_batches)


def _begin_worker(worker_id: int) -> None:
    torch.set_num_threads(1)
    signals.ignore()  # a scheduler signals every process of a job, forked ones too
