"""The LightningModule of the classifier, for a flat list of classes or a WordTree."""

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassStatScores

from yolo_lightning.batches import ClassificationBatch, unit_range
from yolo_lightning.errors import InputError
from yolo_lightning.evaluation.tree_accuracy import TreeAccuracy
from yolo_lightning.models.networks import Classifier
from yolo_lightning.schedules import Schedule
from yolo_lightning.training_module import TrainingModule

MAX_LOGGED_CLASSES = 100  # with more classes, per-class accuracies are not logged


class ClassifierModule(TrainingModule):
    """Image classifier, whose backbone can be used to initialise a detector.

    Args:
        tree: the classes: a tree file, a list of names (a tree of one level), or rows.
        backbone: a name, layers as rows such as ``[conv, 32, 3]``, or a module with attributes
            `out_channels` and `stride` (px of input per output cell) that maps (B, 3, H, W) to
            (B, out_channels, H / stride, W / stride).
        pretrained: Darknet weights or a checkpoint to start from.
        image_size: default network input of predictions, px: one side, or height and width;
            training replaces it by that of the data.
        learning_rate: per optimizer step, for gradients averaged over the global batch.
        momentum: of SGD.
        weight_decay: of SGD; of weights of two or more dimensions, not of biases and norms, as
            in the original program.
        backbone_lr_factor: factor of the backbone's learning rate; 0 freezes the backbone and its
            running statistics.
        schedule: factor of the learning rate at each optimizer step.

    Raises:
        InputError: an unknown backbone, or a checkpoint of another network.

    Source: YOLO9000, section 3, "Training for classification", and section 4.
    """

    network: Classifier

    def __init__(
        self,
        tree: str | list[str] | list[tuple[str, str, str]],
        backbone: str | list[list[Any]] | nn.Module = "darknet19",
        pretrained: str | None = None,
        image_size: int | list[int] = 224,
        learning_rate: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        backbone_lr_factor: float = 1.0,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(tree, backbone, pretrained, schedule)
        self.set_network(
            Classifier(self.backbone_layers, len(self.tree)),
            backbone,
            image_size=image_size,
            learning_rate=learning_rate,
            momentum=momentum,
            weight_decay=weight_decay,
            backbone_lr_factor=backbone_lr_factor,
        )
        self._leaf_index = torch.full((len(self.tree),), -1)
        self._leaf_index[self.tree.leaves] = torch.arange(len(self.tree.leaves))
        leaves = max(2, len(self.tree.leaves))  # the metrics require two classes
        self.top1 = MulticlassAccuracy(leaves, top_k=1, average="micro", ignore_index=-1)
        self.top5 = MulticlassAccuracy(
            leaves, top_k=min(5, leaves), average="micro", ignore_index=-1
        )
        self.per_class_stats = MulticlassStatScores(leaves, average=None, ignore_index=-1)
        self.tree_accuracy = TreeAccuracy(self.tree)
        self.per_class: dict[str, float] = {}

    def _check_data(self, stage: str) -> None:
        data = self._datamodule
        if getattr(data, "detection", None) is not None:
            raise InputError("data.detection: a classifier is trained on labels only; remove it")
        for name in ("validation", "test"):
            if hasattr(getattr(data, name, None), "shapes_wh_px"):
                raise InputError(f"data.{name}: a classifier is evaluated on images with labels")

    def forward(self, images: Tensor) -> Tensor:
        """Return class logits (B, K) of uint8 or float images (B, 3, H, W)."""
        return torch.as_tensor(self.network(unit_range(images)))

    def loss_terms(self, batch: ClassificationBatch) -> dict[str, Tensor]:
        """Return the loss by name."""
        logits = self(batch.images).float()
        return {"loss_class": self.tree.path_loss(logits, batch.labels).mean()}

    def training_step(self, batch: ClassificationBatch, batch_idx: int) -> Tensor:
        """Return the sum of cross-entropies along each label's path, averaged over the images."""
        loss = self.loss_terms(batch)["loss_class"]
        self._log_step(batch, {"train/loss_class": loss.detach()})
        return loss

    def validation_step(self, batch: ClassificationBatch, batch_idx: int) -> None:
        """Update the accuracy over leaves and, if the tree has several levels, along the path."""
        logits = self(batch.images).float()
        probs = self.tree.log_probs(logits)[:, self.tree.leaves].exp()
        if probs.shape[1] == 1:
            probs = torch.cat([probs, torch.zeros_like(probs)], dim=1)
        targets = self._leaf_index.to(batch.labels.device)[batch.labels.clamp(min=0)]
        # distributed evaluation pads with ids of -1
        is_sample = (batch.sample_ids >= 0) & (batch.labels >= 0)
        for metric in (self.top1, self.top5, self.per_class_stats):
            metric.update(probs, torch.where(is_sample, targets, -1))
        if self.tree.paths.shape[1] > 1:
            predicted, _ = self.tree.most_specific_nodes(logits, threshold=0.5)
            leaves, _ = self.tree.most_specific_nodes(logits, threshold=0.0)
            self.tree_accuracy.update(predicted, leaves, torch.where(is_sample, batch.labels, -1))

    def _log_metrics(self, stage: str) -> None:
        accuracies = {"top1": self.top1.compute(), "top5": self.top5.compute()}
        keys = [self.tree.keys[node] for node in self.tree.leaves.tolist()]
        # per leaf: true positives, false positives, true negatives, false negatives, support
        counts = self.per_class_stats.compute()[: len(keys)].tolist()
        self.per_class = {
            key: row[0] / row[4] for key, row in zip(keys, counts, strict=True) if row[4]
        }
        on_path = self.tree_accuracy.compute() if self.tree.paths.shape[1] > 1 else {}
        for metric in (self.top1, self.top5, self.per_class_stats, self.tree_accuracy):
            metric.reset()
        for name, value in accuracies.items():
            self.log(f"{stage}/{name}", value.to(self.device), prog_bar=True, sync_dist=True)
        self.log_dict({f"{stage}/{name}": value for name, value in on_path.items()}, sync_dist=True)
        if len(keys) <= MAX_LOGGED_CLASSES:
            per_class = {f"{stage}/top1/{key}": value for key, value in self.per_class.items()}
            self.log_dict(per_class, sync_dist=True)

    def table(self) -> str:
        """Return the accuracy of each class as text, lowest first."""
        names = dict(zip(self.tree.keys, self.tree.names, strict=True))
        width = max([5, *(len(names[key]) for key in self.per_class)]) + 2
        rows = sorted(self.per_class.items(), key=lambda item: item[1])
        lines = [f"{names[key]:<{width}}{value:>8.3f}" for key, value in rows[:MAX_LOGGED_CLASSES]]
        if len(rows) > MAX_LOGGED_CLASSES:
            lines.append(f"… and {len(rows) - MAX_LOGGED_CLASSES} classes with higher accuracies")
        return "\n".join([f"{'class':<{width}}{'top-1':>8}", *lines])
