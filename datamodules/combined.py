"""The datamodule: detection and classification batches in one alternating, stateless order."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import Dataset

from yolo_lightning.datamodules.batching import (
    Batch,
    EvaluationDataset,
    JointDataset,
    LabelEvaluationDataset,
    evaluation_batches,
    require_readable,
)
from yolo_lightning.datamodules.loader import ResumableLoader, TrainingLoader, copy_to_gpu
from yolo_lightning.datamodules.sampler import AlternatingBatchSampler, JointOrder
from yolo_lightning.datamodules.source import (
    ConcatDetectionSource,
    ConcatImageLabelSource,
    DetectionSource,
    ImageLabelSource,
    check_option,
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
from yolo_lightning.models.preparation import (
    MAX_IMAGE_PX,
    PREPARATION,
    Interpolation,
    Resize,
)
from yolo_lightning.tree.exclusive import ExclusiveNames
from yolo_lightning.tree.wordtree import WordTree

EvaluationSource = (
    DetectionSource | ImageLabelSource | list[DetectionSource | ImageLabelSource] | None
)


def _concat(sources: Any) -> Any:
    """Return a list of sources of one kind as one source, anything else unchanged."""
    if not isinstance(sources, list):
        return sources
    if all(isinstance(source, DetectionSource) for source in sources):
        return ConcatDetectionSource(sources)
    if all(isinstance(source, ImageLabelSource) for source in sources):
        return ConcatImageLabelSource(sources)
    raise InputError(
        "a list of sources mixes images with boxes and images with labels; use separate lists"
    )


class CombinedDataModule(pl.LightningDataModule):
    """A detection source and a classification source in alternating batches, or one of them alone.

    Args:
        tree: the classes: a tree file, a list of names (a tree of one level), or rows; the model's
            by default.
        detection: images with boxes, or a list of such sources; None to train a classifier.
        classification: images with labels, or a list of such sources; None to train on boxes only.
            Only training needs one of these two.
        validation: images for ``validate``, and for validation during ``fit``.
        test: images for ``test``; `validation` by default.
        detection_batch_size (images): in a detection batch, over *all* ranks. Source: yolov2.cfg.
        classification_batch_size (images): in a classification batch, over *all* ranks.
        classification_batches_per_detection_batch (ratio): 0 or more, fractions allowed: more
            teaches names, less teaches boxes. Source: YOLO9000, section 4: 4.
        image_size (px): side of the network input, a multiple of 32; with `MultiScale`, in
            evaluation alone; the model's by default. Source: YOLO9000, section 2.
        steps_per_epoch (batches): by default one pass over the detection source with its
            classification batches, or over the classification source alone.
        resize: how images with boxes become square: `letterbox`, whole on grey, or `stretch`;
            images with labels are cropped at the centre; the model's by default. Source: Darknet.
        interpolation: how images are resized in evaluation: `area`, or `darknet`, for weights that
            the original program trained; training images are always resized by area; the model's by
            default.
        detection_augmentation: no augmentation if None.
        classification_augmentation: no augmentation if None.
        num_workers (processes): that load images, per rank: more feed a faster GPU; 0 loads in the
            training process.
        loader_timeout_s (s): how long to wait for a batch from the loader processes until the
            training ends with the names of the images that they read; 0: for ever.
        seed (number): of order, augmentation and the sizes of `MultiScale`; the batch of a step
            depends on nothing else.

    Values that are "the model's by default" are set by `setup`, from the trainer's module.

    Raises:
        InputError: a size or a ratio out of range; on `setup`, errors of the sources.
    """

    # Lightning's CombinedLoader cannot alternate in fit, and repeats or loses batches when training
    # resumes within an epoch. Here each batch is computed from its number.

    tree: WordTree
    image_size: int
    # side of the training images of a step, px, as `MultiScale` sets it when a training is set up
    size_of_step: Callable[[int], int] | None = None
    resize: Resize
    interpolation: Interpolation

    def __init__(
        self,
        tree: str | list[str] | list[tuple[str, str, str]] | None = None,
        detection: DetectionSource | list[DetectionSource] | None = None,
        classification: ImageLabelSource | list[ImageLabelSource] | None = None,
        validation: EvaluationSource = None,
        test: EvaluationSource = None,
        detection_batch_size: int = 64,
        classification_batch_size: int = 64,
        classification_batches_per_detection_batch: float = 1,
        image_size: int | None = None,
        steps_per_epoch: int | None = None,
        resize: Resize | None = None,
        interpolation: Interpolation | None = None,
        detection_augmentation: DetectionAugmentation | None = None,
        classification_augmentation: ClassificationAugmentation | None = None,
        num_workers: int = 2,
        loader_timeout_s: int = 600,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if tree is not None:
            self.tree = WordTree.from_source(tree)
        self.detection = _concat(detection)
        self.classification = _concat(classification)
        self.validation = _concat(validation)
        self.test = self.validation if test is None else _concat(test)
        given = {
            "tree": tree,
            "image_size": image_size,
            "resize": resize,
            "interpolation": interpolation,
        }
        self._not_given = [name for name, value in given.items() if value is None]
        for name, default in PREPARATION.items():
            setattr(self, name, default if given[name] is None else given[name])
        self.check_size("data.image_size", self.image_size)
        ratio = classification_batches_per_detection_batch
        for name, value, low, high in (
            ("num_workers", num_workers, 0, 1024),
            ("loader_timeout_s", loader_timeout_s, 0, 10**6),
            ("detection_batch_size", detection_batch_size, 1, 10**6),
            ("classification_batch_size", classification_batch_size, 1, 10**6),
            ("steps_per_epoch", steps_per_epoch or 1, 1, 10**12),
            ("classification_batches_per_detection_batch", ratio, 0, 10**6),
        ):
            check_option(f"data.{name}", value, low <= value <= high, f"{low} … {high:,}")
        self.ratio = Fraction(ratio if classification is not None else 0).limit_denominator(1000)
        self.batch_sizes = (detection_batch_size, classification_batch_size)
        self.steps_per_epoch = steps_per_epoch
        self.augmentations = (detection_augmentation, classification_augmentation)
        self.num_workers, self.seed = num_workers, seed
        self.loader_timeout_s = loader_timeout_s
        self._bound: set[int] = set()

    @staticmethod
    def check_size(name: str, size: object) -> None:
        """Raise an `InputError` if a size cannot be that of images, px."""
        valid = isinstance(size, int) and 0 < size <= MAX_IMAGE_PX and size % 32 == 0
        check_option(name, size, valid, f"multiples of 32 up to {MAX_IMAGE_PX}, of a square")

    def _take_from_model(self) -> None:
        """Set the values that the constructor did not get from the model."""
        module: Any = getattr(self.trainer, "lightning_module", None)
        for name in set(self._not_given) & set(PREPARATION):
            if name in getattr(module, "hparams", {}):
                setattr(self, name, module.hparams[name])
        self.check_size("data.image_size", self.image_size)
        if "tree" in self._not_given and hasattr(module, "tree"):
            if getattr(self, "tree", None) is not module.tree:
                self._bound.clear()
            self.tree = module.tree
        if not hasattr(self, "tree"):
            raise InputError("data.tree is not set, and there is no model to take it from")

    def require_training_data(self) -> None:
        """Raise an `InputError` if there is neither `detection` nor `classification`."""
        if self.detection is None and self.classification is None:
            raise InputError("data.detection and data.classification: training needs one of them")

    def prepare_data(self) -> None:
        """Parse the datasets, on one rank of each machine, before `setup` opens the indices."""
        # COCO takes 1.4 GB and ImageNet-22k lists 22,000 folders: not on every rank at once
        stage = self.trainer.state.fn if self.trainer else None
        for source in self._sources_of(stage):
            with contextlib.suppress(InputError):  # every rank reports it, in `setup`
                source.prepare()

    def _sources_of(self, stage: str | None) -> list[DetectionSource | ImageLabelSource]:
        """Return the sources of a stage."""
        sources = {
            "fit": [self.detection, self.classification, self.validation],
            "validate": [self.validation],
            "test": [self.test],
        }
        return [source for source in sources.get(stage or "fit", []) if source is not None]

    def setup(self, stage: str | None = None) -> None:
        """Take missing values from the model, and bind the sources of a stage to the tree."""
        if stage == "fit":
            self.require_training_data()
            self.size_of_step = None  # of an earlier training; callbacks are set up after the data
        if stage == "validate" and self.validation is None:
            raise InputError("data.validation is not set: nothing to validate on")
        self._take_from_model()
        for source in self._sources_of(stage):
            if id(source) not in self._bound:
                source.bind(self.tree)
                if stage == "fit" and source is not self.validation:  # before a run is left
                    require_readable(source)
                self._bound.add(id(source))
        if stage == "fit" and self.detection is not None and not len(self.detection.nodes):
            raise InputError(f"data.detection: {self.detection.name} contains no box to learn from")

    @property
    def source_faults(self) -> list[str]:
        """What the bound sources repaired or skipped, one sentence each."""
        sources = (self.detection, self.classification, self.validation, self.test)
        unique = {id(s): s for s in sources if s is not None and id(s) in self._bound}
        return [fault for source in unique.values() for fault in source.faults]

    def vocabulary_report(self) -> str:
        """Return what each class learns from, as text."""
        sources = getattr(self.detection, "sources", [self.detection])
        exclusive = [source.exclusive_nodes for source in sources if source is not None]
        return vocabulary_report(self.tree, *self._counts(), exclusive)

    def vocabulary_table(self) -> list[dict[str, object]]:
        """Return one row per class with its labels, from boxes and from images."""
        return vocabulary_table(self.tree, *self._counts())

    @property
    def _trained_labels(self) -> ImageLabelSource | None:
        """The classification source, unless no batch is taken from it."""
        return self.classification if self.ratio or self.detection is None else None

    def _counts(self) -> tuple[Counts, Counts]:
        """Return the training boxes and training image labels, by node and name."""
        boxes, labels = self.detection, self._trained_labels
        return boxes.node_counts() if boxes else {}, labels.node_counts() if labels else {}

    def inputs(self) -> list[dict[str, Any]]:
        """Return one entry per bound source; ``labelled`` counts objects or images with a label."""
        has_boxes = isinstance(self.validation, DetectionSource)
        entries = [
            ("training", "boxes", self.detection),
            ("training", "image labels", self._trained_labels),
            ("validation", "boxes" if has_boxes else "image labels", self.validation),
        ]
        return [
            {
                "use": use,
                "holds": holds,
                "name": source.name,
                "fingerprint": source.fingerprint(),
                "images": len(source),
                "nodes": len(source.node_counts()),
                "labelled": sum(sum(c.values()) for c in source.node_counts().values()),
            }
            for use, holds, whole in entries
            if whole is not None and id(whole) in self._bound
            for source in getattr(whole, "sources", [whole])
        ]

    @property
    def boxed_nodes(self) -> Tensor:
        """int64, sorted: the nodes that occur as labels of training boxes."""
        return self.detection.nodes if self.detection is not None else torch.zeros(0).long()

    def exclusive_names(
        self, source: DetectionSource, device: torch.device | str = "cpu"
    ) -> ExclusiveNames:
        """Return what the labels of a bound source mean."""
        sources = getattr(source, "sources", [source])
        nodes = [one.exclusive_nodes for one in sources]
        return ExclusiveNames(self.tree, [len(one) for one in sources], nodes, device)

    @property
    def order(self) -> JointOrder:
        """The samples of each step."""
        return JointOrder(
            len(self.detection or ()),
            len(self._trained_labels or ()),
            *self.batch_sizes,
            self.ratio,
            self.seed,
            self.size_of_step or (lambda step: self.image_size),
        )

    @property
    def batches_per_epoch(self) -> int:
        """Batches of a training epoch."""
        return self.steps_per_epoch or self.order.steps_per_pass

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Copy a batch to a GPU beside the kernels of the step before."""
        if device.type == "cuda" and isinstance(batch, Batch):
            return copy_to_gpu(batch, device)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def train_dataloader(self) -> TrainingLoader:
        """Return the loader of training batches."""
        trainer = self.trainer
        rank, world_size = self._rank_and_world_size
        if trainer and world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise InputError(
                "trainer.use_distributed_sampler must be false: the data's own sampler gives each "
                "rank its share"
            )
        if trainer and _limits_epochs(trainer):
            raise InputError(
                "trainer.limit_train_batches and trainer.overfit_batches would shorten epochs "
                "without the sampler; set data.steps_per_epoch, or a source's length, instead"
            )

        def steps_trained() -> int:
            # `processed` counts trained batches over all epochs, also after resuming
            progress = trainer.fit_loop.epoch_loop.batch_progress.state_dict() if trainer else None
            return int(progress["total"]["processed"]) if progress else 0

        sampler = AlternatingBatchSampler(
            self.order, self.batches_per_epoch, steps_trained, rank, world_size
        )
        return TrainingLoader(
            self._training_dataset(), sampler, self.num_workers, self.loader_timeout_s
        )

    @property
    def _rank_and_world_size(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def batch(
        self, step: int, rank: int = 0, world_size: int = 1, image_size: int | None = None
    ) -> Batch:
        """Return the batch of a rank at a step, counted since training began.

        Args:
            step: number of the batch, from 0.
            rank: of the process.
            world_size: number of processes.
            image_size: px; that of the step by default.

        Raises:
            InputError: a global batch size that is not a multiple of `world_size`.
        """
        order = self.order
        AlternatingBatchSampler(order, 1, lambda: step, rank, world_size)  # checks the shares
        plan = order.plan(step, rank, world_size)
        return self._training_dataset()[replace(plan, image_size=image_size or plan.image_size)]

    def _training_dataset(self) -> JointDataset:
        return JointDataset(
            self.detection,
            self.classification,
            self.augmentations,
            self.seed,
            self.resize,
        )

    def val_dataloader(self) -> ResumableLoader | list[Any]:
        """Return the loader of validation images, or no loader without `validation`."""
        return self._evaluation_loader(self.validation)

    def test_dataloader(self) -> ResumableLoader | list[Any]:
        """Return the loader of test images."""
        if self.test is None:
            raise InputError("data.test and data.validation are not set: nothing to test on")
        return self._evaluation_loader(self.test)

    def _evaluation_loader(
        self, source: DetectionSource | ImageLabelSource | None
    ) -> ResumableLoader | list[Any]:
        if source is None:
            return []
        if isinstance(source, DetectionSource):
            dataset: Dataset[Batch] = EvaluationDataset(
                source, self.image_size, self.resize, self.interpolation
            )
            batch_size = self.batch_sizes[0]
        else:
            dataset = LabelEvaluationDataset(source, self.image_size, self.interpolation)
            batch_size = self.batch_sizes[1]
        rank, world_size = self._rank_and_world_size
        share = max(1, batch_size // world_size)
        batches = evaluation_batches(len(source), share, rank, world_size)
        return ResumableLoader(dataset, batches, self.num_workers, self.loader_timeout_s)


def _limits_epochs(trainer: Any) -> bool:
    if trainer.fast_dev_run:
        return False
    limit = trainer.limit_train_batches
    return bool(isinstance(limit, int) or limit != 1.0 or trainer.overfit_batches)
