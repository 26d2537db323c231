"""The LightningModule of the classifier, over a flat list of classes or a WordTree."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassStatScores

from yolo_lightning.batches import ClassificationBatch, unit_range
from yolo_lightning.checkpoints.pretrained import load_pretrained
from yolo_lightning.checkpoints.validation import refuse_other_model, same_data_tree
from yolo_lightning.errors import InputError
from yolo_lightning.evaluation.tree_accuracy import TreeAccuracy
from yolo_lightning.models.backbones import backbone_layers
from yolo_lightning.models.layers import to_plain
from yolo_lightning.models.networks import Classifier
from yolo_lightning.optimization import SGDConfig, apply_recipe_rates, check_trainer, freeze, sgd
from yolo_lightning.schedules import Schedule
from yolo_lightning.tree.wordtree import WordTree

MAX_LOGGED = 100
"""Most classes whose accuracies are logged one by one."""


class ClassifierModule(pl.LightningModule):
    """Image classification; the backbone that it trains is what detectors start from.

    Args:
        tree: the classes: a tree file, a list of names (a tree of one level), or rows.
        backbone: name of the backbone, or its layers as rows such as ``[conv, 32, 3]``.
        pretrained: Darknet weights or a checkpoint to start from.
        image_size: px, a side or height and width: where predictions are made unless asked
            otherwise; training sets it to the data's.
        learning_rate: per optimizer step, for a gradient averaged over the images of the global
            batch.
        momentum, weight_decay: of SGD; biases and batch norms decay too, as in the original.
        backbone_lr_factor: factor of the backbone's learning rate; 0 freezes the backbone and its
            running statistics.
        schedule: factor of the learning rate at each optimizer step.

    Raises:
        InputError: an unknown backbone; on loading a checkpoint, a tree or layers that differ from
            the recipe's.

    Source: YOLO9000, section 3, "Training for classification", and section 4, "Hierarchical
    classification".
    """

    def __init__(
        self,
        tree: str | list[str] | list[tuple[str, str, str]],
        backbone: str | list[list[Any]] = "darknet19",
        pretrained: str | None = None,
        image_size: int | list[int] = 224,
        learning_rate: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        backbone_lr_factor: float = 1.0,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__()
        self.tree = WordTree.of(tree)
        layers = backbone_layers(backbone)
        self.backbone_length, self.pretrained = len(layers), pretrained
        self.network = Classifier(layers, len(self.tree))
        # a fifth faster on CPUs
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.schedule = schedule or Schedule()
        self.sgd_config = SGDConfig(
            learning_rate, momentum, weight_decay, backbone_lr_factor, self.schedule
        )
        self._leaf_number = torch.full((len(self.tree),), -1)
        self._leaf_number[self.tree.leaves] = torch.arange(len(self.tree.leaves))
        leaves = max(2, len(self.tree.leaves))  # the metric counts from two classes on
        self.top1 = MulticlassAccuracy(leaves, top_k=1, average="micro", ignore_index=-1)
        self.top5 = MulticlassAccuracy(
            leaves, top_k=min(5, leaves), average="micro", ignore_index=-1
        )
        self.by_label = MulticlassStatScores(leaves, average=None, ignore_index=-1)
        self.along_tree = TreeAccuracy(self.tree)
        self.per_class: dict[str, float] = {}
        self.save_hyperparameters(
            {
                "tree": [list(row) for row in self.tree.rows],
                "backbone": backbone,
                "image_size": image_size,
                "learning_rate": learning_rate,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "backbone_lr_factor": backbone_lr_factor,
            },
            logger=False,
        )

    def setup(self, stage: str) -> None:
        """Check that data and options fit this module, and start from pretrained weights.

        Raises:
            InputError: the data's tree is another one, or the trainer would train something else.
        """
        same_data_tree(self.trainer, self.tree)
        data = getattr(self.trainer, "datamodule", None)
        if getattr(data, "detection", None) is not None:
            raise InputError("data.detection: a classifier trains on labels alone; leave it out")
        for name in ("validation", "test"):
            if hasattr(getattr(data, name, None), "shapes_wh_px"):
                raise InputError(f"data.{name}: a classifier is measured on images with labels")
        check_trainer(self.trainer)
        if stage == "fit" and self.pretrained is not None and not self.trainer.ckpt_path:
            report = load_pretrained(self.network, self.tree, self.pretrained, self.backbone_length)
            rank_zero_only(print)(report)
        if stage == "fit" and not self.sgd_config.backbone_lr_factor:
            freeze(self._backbone())

    def on_fit_start(self) -> None:
        """Learn from the data at which size predictions are made."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if getattr(datamodule, "image_size", None) is not None:
            self.hparams["image_size"] = datamodule.image_size  # type: ignore[union-attr]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return SGD and its schedule, per optimizer step."""
        backbone = [p for layer in self._backbone() for p in layer.parameters()]
        return sgd(self, backbone, self.sgd_config)

    def _backbone(self) -> list[nn.Module]:
        return list(self.network.body)[: self.backbone_length]

    def on_train_start(self) -> None:
        """Let the recipe's sgd_config hold on resuming, where the checkpoint brought its own."""
        apply_recipe_rates(self, self.sgd_config)

    def forward(self, images: Tensor) -> Tensor:
        """Return class logits (B, K) of uint8 or float images (B, 3, H, W)."""
        return torch.as_tensor(self.network(unit_range(images)))

    def loss_terms(self, batch: ClassificationBatch) -> dict[str, Tensor]:
        """Return the loss by its name."""
        logits = self(batch.images).float()
        return {"loss_class": self.tree.path_loss(logits, batch.labels).mean()}

    def training_step(self, batch: ClassificationBatch, batch_idx: int) -> Tensor:
        """Return the loss: the cross-entropies along each label's path, averaged over images."""
        loss = self.loss_terms(batch)["loss_class"]
        self.log("train/loss_class", loss.detach(), prog_bar=True, batch_size=len(batch))
        sgd_config = self.trainer.optimizers[0].param_groups[0]
        settings = {"train/lr": sgd_config["lr"], "train/image_size": float(batch.images.shape[-1])}
        self.log_dict(settings, batch_size=len(batch))
        return loss

    def validation_step(self, batch: ClassificationBatch, batch_idx: int) -> None:
        """Count what is right: leaves for leaf labels, and along the path for any label."""
        logits = self(batch.images).float()
        probs = self.tree.log_probs(logits)[:, self.tree.leaves].exp()
        if probs.shape[1] == 1:
            probs = torch.cat([probs, torch.zeros_like(probs)], dim=1)
        numbers = self._leaf_number.to(batch.labels.device)[batch.labels.clamp(min=0)]
        # padding of distributed evaluation counts for nothing
        real = (batch.sample_ids >= 0) & (batch.labels >= 0)
        for metric in (self.top1, self.top5, self.by_label):
            metric.update(probs, torch.where(real, numbers, -1))
        if self.tree.paths.shape[1] > 1:
            named, _ = self.tree.most_specific(logits, threshold=0.5)
            deepest, _ = self.tree.most_specific(logits, threshold=0.0)
            self.along_tree.update(named, deepest, torch.where(real, batch.labels, -1))

    def test_step(self, batch: ClassificationBatch, batch_idx: int) -> None:
        """Count leaves that are right."""
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log accuracies."""
        self._log_accuracies("val")

    def on_test_epoch_end(self) -> None:
        """Log accuracies."""
        self._log_accuracies("test")

    def _log_accuracies(self, stage: str) -> None:
        """Log top-1 and top-5 over the leaves, each leaf's own, and accuracy along the tree."""
        figures = {"top1": self.top1.compute(), "top5": self.top5.compute()}
        keys = [self.tree.keys[node] for node in self.tree.leaves.tolist()]
        # a row a leaf: hits, false alarms, rejections, misses, images
        counts = self.by_label.compute()[: len(keys)].tolist()
        self.per_class = {
            key: row[0] / row[4] for key, row in zip(keys, counts, strict=True) if row[4]
        }
        along = self.along_tree.compute() if self.tree.paths.shape[1] > 1 else {}
        for metric in (self.top1, self.top5, self.by_label, self.along_tree):
            metric.reset()
        for name, value in figures.items():
            self.log(f"{stage}/{name}", value.to(self.device), prog_bar=True, sync_dist=True)
        self.log_dict({f"{stage}/{name}": value for name, value in along.items()}, sync_dist=True)
        if len(keys) <= MAX_LOGGED:
            each = {f"{stage}/top1/{key}": value for key, value in self.per_class.items()}
            self.log_dict(each, sync_dist=True)

    def table(self) -> str:
        """Return the accuracy of each class as text, the worst first."""
        names = dict(zip(self.tree.keys, self.tree.names, strict=True))
        width = max([5, *(len(names[key]) for key in self.per_class)]) + 2
        rows = sorted(self.per_class.items(), key=lambda item: item[1])
        lines = [f"{names[key]:<{width}}{value:>8.3f}" for key, value in rows[:MAX_LOGGED]]
        if len(rows) > MAX_LOGGED:
            lines.append(f"… and {len(rows) - MAX_LOGGED} classes with higher figures")
        return "\n".join([f"{'class':<{width}}{'top-1':>8}", *lines])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say which module the checkpoint is of."""
        checkpoint["module"] = type(self).__name__

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights that belong to other classes or another backbone.

        Raises:
            InputError: names what differs.
        """
        theirs = checkpoint["hyper_parameters"]
        own = to_plain(self.network.body.layers)
        parts = {
            "model.tree": (self.hparams["tree"], theirs["tree"]),
            "model.backbone": (own, to_plain(backbone_layers(theirs["backbone"]))),
        }
        refuse_other_model(checkpoint, type(self).__name__, parts)
