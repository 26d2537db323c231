"""The LightningModule of the classifier, for a flat list of classes or a WordTree."""

import torch
from torch import Tensor, nn

from yolo_lightning.batches import ClassificationBatch, unit_range
from yolo_lightning.errors import InputError
from yolo_lightning.evaluation.label_accuracy import LabelAccuracy
from yolo_lightning.evaluation.tree_accuracy import TreeAccuracy
from yolo_lightning.models.backbones import without_batch_norm
from yolo_lightning.models.layers import LayerRow
from yolo_lightning.models.networks import Classifier
from yolo_lightning.models.preparation import Interpolation
from yolo_lightning.schedules import Schedule
from yolo_lightning.training_module import TrainingModule

MAX_LOGGED_CLASSES = 100  # with more classes, per-class accuracies are not logged


class ClassifierModule(TrainingModule):
    """Image classifier, whose backbone can be used to initialise a detector.

    Args:
        tree: the classes: a tree file, a list of names (a tree of one level), or rows. Source:
            YOLO9000, section 4.
        backbone: a name, layers as rows such as ``[conv, 32, 3]``, or a module with attributes
            `out_channels` and `stride` (px of input per output cell) that maps (B, 3, H, W) to (B,
            out_channels, H / stride, W / stride). Source: YOLO9000, section 3.
        batch_norm: false gives every convolution of the network a bias instead of its batch norm,
            as in YOLO; only for a backbone that is a name or a list of layers. Source: YOLO9000,
            section 2.
        pretrained: Darknet weights or a checkpoint to start from: far fewer steps are needed.
            Source: YOLO9000, sections 2 and 3.
        image_size (px): default network input of predictions: one side, or height and width;
            training uses that of the data, if it has one. Source: YOLO9000, section 3.
        learning_rate (per optimizer step): of SGD, for gradients averaged over the global batch;
            higher learns faster, too high diverges. Source: YOLO9000, section 3.
        momentum (factor): of SGD, the part of the last update that is added to the next one.
            Source: YOLO9000, section 3.
        weight_decay (factor): how strongly SGD pulls weights of two or more dimensions to zero; not
            biases and norms, as in the original program. Source: YOLO9000, section 3.
        backbone_lr_factor (factor): of the learning rate for the backbone: below 1 keeps more of
            pretrained weights; 0 freezes the backbone and its running statistics.
        schedule: factor of the learning rate at each optimizer step; null: a constant rate. Source:
            YOLO9000, section 3.
        interpolation: how images are resized to the network input: `area`, or `darknet`, for
            weights that the original program trained; training replaces it by that of the data.

    Raises:
        InputError: an unknown backbone, or a checkpoint of another network.

    Source: YOLO9000, section 3, "Training for classification", and section 4.
    """

    network: Classifier

    def __init__(
        self,
        tree: str | list[str] | list[tuple[str, str, str]],
        backbone: str | list[LayerRow] | nn.Module = "darknet19",
        batch_norm: bool = True,
        pretrained: str | None = None,
        image_size: int | list[int] = 224,
        learning_rate: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        backbone_lr_factor: float = 1.0,
        schedule: Schedule | None = None,
        interpolation: Interpolation = "area",
    ) -> None:
        super().__init__(tree, backbone, pretrained, schedule)
        layers = self.backbone_layers if batch_norm else without_batch_norm(self.backbone_layers)
        self.set_network(
            Classifier(layers, len(self.tree)),
            backbone,
            batch_norm=batch_norm,
            image_size=image_size,
            learning_rate=learning_rate,
            momentum=momentum,
            weight_decay=weight_decay,
            backbone_lr_factor=backbone_lr_factor,
            interpolation=interpolation,
        )
        self.evaluation = LabelAccuracy(self.tree)
        self.tree_accuracy = TreeAccuracy(self.tree)

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
        self._keep_losses(batch, {"train/loss_class": loss.detach()})
        return loss

    def _reset_evaluation(self, stage: str) -> None:
        source = getattr(self._datamodule, stage, None)
        self.evaluation.set_labels(self.tree.leaves if source is None else source.nodes)

    def validation_step(self, batch: ClassificationBatch, batch_idx: int) -> None:
        """Update top-1 and top-5 and, if the tree has several levels, accuracy along the path.

        For the classes of top-1 and top-5, see `LabelAccuracy`.
        """
        logits = self(batch.images).float()
        # distributed evaluation pads with ids of -1
        labels = torch.where(batch.sample_ids >= 0, batch.labels, -1)
        self.evaluation.update(logits, labels)
        if self.tree.paths.shape[1] > 1:
            predicted, _, leaves = self.tree.descend(logits, threshold=0.5)
            self.tree_accuracy.update(predicted, leaves, labels)

    def _log_metrics(self, stage: str) -> None:
        accuracies = self.evaluation.compute()
        on_path = self.tree_accuracy.compute() if self.tree.paths.shape[1] > 1 else {}
        self.evaluation.reset()
        self.tree_accuracy.reset()
        self.evaluation.metrics = accuracies | on_path
        for name, value in accuracies.items():
            self.log(f"{stage}/{name}", value, sync_dist=True)
        self.log_dict({f"{stage}/{name}": value for name, value in on_path.items()}, sync_dist=True)
        if len(self.evaluation.nodes) <= MAX_LOGGED_CLASSES:
            rows = self.evaluation.per_class.items()
            self.log_dict({f"{stage}/top1/{k}": row["top1"] for k, row in rows}, sync_dist=True)

    def metric_names(self) -> list[str]:
        """Return the names of the losses and metrics that callbacks may monitor."""
        is_tree = self.tree.paths.shape[1] > 1
        names = ["top1", "top5", *(self.tree_accuracy.metric_names() if is_tree else [])]
        names += [f"top1/{key}" for key in self.tree.keys]
        return [f"val/{name}" for name in names] + ["train/loss_class"]

    def table(self) -> str:
        """Return the accuracy of each class as text, lowest first, and that along the tree."""
        rows = sorted(self.evaluation.per_class.values(), key=lambda row: float(row["top1"]))
        width = max([5, *(len(row["name"]) for row in rows)]) + 2
        lines = [
            f"{row['name']:<{width}}{row['top1']:>8.3f}{row['images']:>8}"
            for row in rows[:MAX_LOGGED_CLASSES]
        ]
        if len(rows) > MAX_LOGGED_CLASSES:
            lines.append(f"… and {len(rows) - MAX_LOGGED_CLASSES} classes with higher accuracies")
        on_path = {k: v for k, v in self.evaluation.metrics.items() if k not in ("top1", "top5")}
        if on_path:
            shares = ", ".join(f"{k.replace('_', ' ')} {v:.3f}" for k, v in on_path.items())
            lines.append(f"along the tree: {shares}")
        return "\n".join([f"{'class':<{width}}{'top-1':>8}{'images':>8}", *lines])
