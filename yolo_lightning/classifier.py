"""The LightningModule of the classifier, for a flat list of classes or a WordTree."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassStatScores

from yolo_lightning.batches import ClassificationBatch, unit_range
from yolo_lightning.checkpoints.pretrained import load_pretrained
from yolo_lightning.checkpoints.validation import check_same_model, check_same_tree
from yolo_lightning.errors import InputError
from yolo_lightning.evaluation.tree_accuracy import TreeAccuracy
from yolo_lightning.models.backbones import backbone_layers, checkpoint_layers, plain_backbone
from yolo_lightning.models.layers import layers_to_rows
from yolo_lightning.models.networks import Classifier
from yolo_lightning.optimization import (
    SGDConfig,
    apply_sgd_config,
    build_sgd,
    check_trainer,
    freeze_layers,
)
from yolo_lightning.schedules import Schedule
from yolo_lightning.tree.wordtree import WordTree

MAX_LOGGED_CLASSES = 100  # with more classes, per-class accuracies are not logged


class ClassifierModule(pl.LightningModule):
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
        weight_decay: of SGD; also applied to biases and batch norms, as in the original program.
        backbone_lr_factor: factor of the backbone's learning rate; 0 freezes the backbone and its
            running statistics.
        schedule: factor of the learning rate at each optimizer step.

    Raises:
        InputError: an unknown backbone, or a checkpoint of another network.

    Source: YOLO9000, section 3, "Training for classification", and section 4.
    """

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
        super().__init__()
        self.tree = WordTree.from_source(tree)
        layers = backbone_layers(backbone)
        self.num_backbone_layers, self.pretrained = len(layers), pretrained
        self.network = Classifier(layers, len(self.tree))
        # 20 % faster on CPUs
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.schedule = schedule or Schedule()
        self.sgd_config = SGDConfig(
            learning_rate, momentum, weight_decay, backbone_lr_factor, self.schedule
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
        self.save_hyperparameters(
            {
                "tree": [list(row) for row in self.tree.rows],
                "backbone": plain_backbone(backbone),
                "image_size": image_size,
                "learning_rate": learning_rate,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "backbone_lr_factor": backbone_lr_factor,
            },
            logger=False,
        )

    def setup(self, stage: str) -> None:
        """Check data and trainer, and load pretrained weights."""
        check_same_tree(self.trainer, self.tree)
        data = getattr(self.trainer, "datamodule", None)
        if getattr(data, "detection", None) is not None:
            raise InputError("data.detection: a classifier is trained on labels only; remove it")
        for name in ("validation", "test"):
            if hasattr(getattr(data, name, None), "shapes_wh_px"):
                raise InputError(f"data.{name}: a classifier is evaluated on images with labels")
        check_trainer(self.trainer)
        if stage == "fit" and self.pretrained is not None and not self.trainer.ckpt_path:
            report = load_pretrained(
                self.network, self.tree, self.pretrained, self.num_backbone_layers
            )
            rank_zero_only(print)(report)
        if stage == "fit" and not self.sgd_config.backbone_lr_factor:
            freeze_layers(self._backbone())

    def on_fit_start(self) -> None:
        """Copy the image size from the data."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if getattr(datamodule, "image_size", None) is not None:
            self.hparams["image_size"] = datamodule.image_size  # type: ignore[union-attr]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return SGD and its schedule."""
        backbone = [p for layer in self._backbone() for p in layer.parameters()]
        return build_sgd(self, backbone, self.sgd_config)

    def _backbone(self) -> list[nn.Module]:
        return list(self.network.body)[: self.num_backbone_layers]

    def on_train_start(self) -> None:
        """Apply the recipe's SGD hyper-parameters, also after resuming."""
        apply_sgd_config(self, self.sgd_config)

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
        self.log("train/loss_class", loss.detach(), prog_bar=True, batch_size=len(batch))
        lr, image_size = self.trainer.optimizers[0].param_groups[0]["lr"], batch.images.shape[-1]
        settings = {"train/lr": lr, "train/image_size": float(image_size)}
        self.log_dict(settings, batch_size=len(batch))
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

    def test_step(self, batch: ClassificationBatch, batch_idx: int) -> None:
        """Update the accuracies."""
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log accuracies."""
        self._log_accuracies("val")

    def on_test_epoch_end(self) -> None:
        """Log accuracies."""
        self._log_accuracies("test")

    def _log_accuracies(self, stage: str) -> None:
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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the name of the module class."""
        checkpoint["module"] = type(self).__name__

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint has the same tree and backbone."""
        saved = checkpoint["hyper_parameters"]
        layers = layers_to_rows(self.network.body.layers)
        parts = {
            "model.tree": (self.hparams["tree"], saved["tree"]),
            "model.backbone": (layers, layers_to_rows(checkpoint_layers(saved["backbone"]))),
        }
        check_same_model(checkpoint, type(self).__name__, parts)
