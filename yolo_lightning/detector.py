"""The LightningModule of the detector and the YOLO9000 joint loss."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from yolo_lightning.batches import ClassificationBatch, DetectionBatch, unit_range
from yolo_lightning.boxes import batched_nms, cxcywh_to_xyxy, unletterbox
from yolo_lightning.checkpoints.pretrained import load_pretrained
from yolo_lightning.checkpoints.validation import refuse_other_model, same_data_tree
from yolo_lightning.detections import Detection, Detections
from yolo_lightning.errors import InputError
from yolo_lightning.evaluation.detection import FOUND_SCORE, DetectionEvaluation
from yolo_lightning.images import Image, Resize, fit, read_image
from yolo_lightning.losses import LossSettings, yolo9000_loss
from yolo_lightning.models.backbones import backbone_layers, detector_layers
from yolo_lightning.models.head import Candidates, candidates
from yolo_lightning.models.layers import Layer, ReorgKind, to_plain
from yolo_lightning.models.networks import YOLOv2
from yolo_lightning.optimization import SGDConfig, apply_recipe_rates, check_trainer, freeze, sgd
from yolo_lightning.schedules import Schedule
from yolo_lightning.tree.wordtree import WordTree

SCORE_THRESHOLD = 0.005
"""The least score that counts in evaluation, as in the original program."""

MAX_PAIRS = 8192
"""Most (box, class) pairs of an image that suppression compares; evaluation keeps 100 of them.
Bounds the memory that a network takes while it is sure of nothing."""

MAX_CLASSES = 1000
"""Classes whose figures are logged one by one; reports hold those of all."""
SHOWN = ("AP50", "AP50_boxed", "AP50_unboxed", "AP50_coarse")
"""Figures that stand beside the progress bar."""

BOX_TERMS = ("loss_coord", "loss_anchor_prior")
"""What only images with boxes pay."""


class DetectorModule(pl.LightningModule):
    """YOLOv2, or YOLO9000 where the tree is deep and classification batches take part.

    Args:
        tree: the classes: a tree file, a list of names (a tree of one level), or rows.
        anchors_wh_cell: widths and heights of the anchors, in grid cells.
        backbone: name of the backbone, or its layers as rows such as ``[conv, 32, 3]``.
        head_channels: channels of the head's 3x3 convolutions; 0 for no head.
        passthrough_channels: channels of the passthrough's reducing convolution; null folds the
            finer features in whole, 0 leaves them out.
        reorg: how the passthrough folds them: `darknet`'s own way, which its weights and exports
            need, or `space_to_depth`, as the paper says.
        pretrained: Darknet weights or a checkpoint to start from.
        image_size: px, a side or height and width: where predictions are made unless asked
            otherwise; training sets it to the data's.
        learning_rate: per optimizer step, for a gradient averaged over the images of the global
            batch.
        momentum, weight_decay: of SGD; biases and batch norms decay too, as in the original.
        backbone_lr_factor: factor of the backbone's learning rate; 0 freezes the backbone and its
            running statistics.
        schedule: factor of the learning rate at each optimizer step.
        loss: scales and rules of the loss.
        iou_threshold: of non-maximum suppression.
        resize: how images become square: `letterbox`, whole on grey, or `stretch`, each side by
            itself; training sets it to the data's.

    Raises:
        InputError: an unknown backbone or anchors that are not positive pairs; on loading a
            checkpoint, a tree or anchors that differ from the recipe's.

    Source: YOLO9000, sections 2 to 4.
    """

    boxed: Tensor

    def __init__(
        self,
        tree: str | list[str] | list[tuple[str, str, str]],
        anchors_wh_cell: list[tuple[float, float]],
        backbone: str | list[list[Any]] = "darknet19",
        head_channels: int = 1024,
        passthrough_channels: int | None = 64,
        reorg: ReorgKind = "darknet",
        pretrained: str | None = None,
        image_size: int | list[int] = 416,
        learning_rate: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        backbone_lr_factor: float = 1.0,
        schedule: Schedule | None = None,
        loss: LossSettings | None = None,
        iou_threshold: float = 0.45,
        resize: Resize = "letterbox",
    ) -> None:
        super().__init__()
        anchors = torch.tensor([list(pair) for pair in anchors_wh_cell], dtype=torch.float32)
        if anchors.ndim != 2 or anchors.shape[1] != 2 or not bool((anchors > 0).all()):
            raise InputError(
                f"model.anchors_wh_cell is {anchors_wh_cell}; allowed: pairs of positive numbers"
            )
        for name, value, low in (
            ("head_channels", head_channels, 0),
            ("passthrough_channels", passthrough_channels or 0, 0),
        ):
            if value < low:
                raise InputError(f"model.{name} is {value}; allowed: {low} or more")
        if not 0 <= iou_threshold <= 1:
            raise InputError(f"model.iou_threshold is {iou_threshold}; allowed: 0 … 1")
        self.tree = WordTree.of(tree)
        layers = backbone_layers(backbone)
        self.backbone_length, self.pretrained = len(layers), pretrained
        self.network = YOLOv2(
            detector_layers(layers, head_channels, passthrough_channels, reorg),
            len(self.tree),
            anchors,
        )
        # a fifth faster on CPUs
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.schedule = schedule or Schedule()
        self.sgd_config = SGDConfig(
            learning_rate, momentum, weight_decay, backbone_lr_factor, self.schedule
        )
        self.loss = LossSettings.of(loss)
        self.iou_threshold = iou_threshold
        # travel with the weights: `test` needs to know what training saw with boxes
        self.register_buffer("boxed", torch.zeros(len(self.tree), dtype=torch.bool))
        self.evaluation = DetectionEvaluation(self.tree)
        # what rebuilds this module, as plain values: checkpoints load with weights_only=True
        self.save_hyperparameters(
            {
                "tree": [list(row) for row in self.tree.rows],
                "anchors_wh_cell": [[float(v) for v in pair] for pair in anchors_wh_cell],
                "backbone": backbone,
                "head_channels": head_channels,
                "passthrough_channels": passthrough_channels,
                "reorg": reorg,
                "image_size": image_size,
                "learning_rate": learning_rate,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "backbone_lr_factor": backbone_lr_factor,
                "loss": asdict(self.loss),
                "iou_threshold": iou_threshold,
                "resize": resize,
            },
            logger=False,
        )

    @property
    def _datamodule(self) -> Any:
        return getattr(self.trainer, "datamodule", None)

    def setup(self, stage: str) -> None:
        """Check that data and options fit this module.

        Raises:
            InputError: the data's tree is another one, or half of a precision is asked for.
        """
        same_data_tree(self.trainer, self.tree)
        data = self._datamodule
        self.hparams["resize"] = getattr(data, "resize", self.hparams["resize"])
        if stage == "fit" and hasattr(data, "detection") and data.detection is None:
            raise InputError("data.detection: a detector needs images with boxes; name some")
        for name in ("validation", "test"):
            source = getattr(self._datamodule, name, None)
            if source is not None and not hasattr(source, "shapes_wh_px"):
                raise InputError(f"data.{name}: a detector is measured on images with boxes")
        check_trainer(self.trainer)
        if stage == "fit" and self.pretrained is not None and not self.trainer.ckpt_path:
            report = load_pretrained(self.network, self.tree, self.pretrained, self.backbone_length)
            rank_zero_only(print)(report)
        if stage == "fit" and not self.sgd_config.backbone_lr_factor:
            freeze(self._backbone())

    def on_fit_start(self) -> None:
        """Learn what the data says about predicting, now that weights are restored."""
        image_size = getattr(self._datamodule, "image_size", None)
        if image_size is not None:
            self.hparams["image_size"] = image_size
        boxed_nodes = getattr(self._datamodule, "boxed_nodes", None)
        if boxed_nodes is not None:
            self.boxed.zero_()[boxed_nodes] = True
        self._boxed_ancestors = self.boxed_ancestors()

    def boxed_ancestors(self) -> Tensor:
        """Return int64 (K,): each node's deepest ancestor or self on the path to a boxed node.

        -1 where there is none.
        """
        boxed_nodes = self.boxed.nonzero().flatten()
        supervised = self.tree.ancestors_or_self(boxed_nodes)
        return self.tree.deepest_ancestor_in(supervised).to(self.device)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return SGD and its schedule, per optimizer step."""
        backbone = [p for layer in self._backbone() for p in layer.parameters()]
        return sgd(self, backbone, self.sgd_config)

    def _backbone(self) -> list[nn.Module]:
        return list(self.network.body)[: self.backbone_length]

    def on_train_start(self) -> None:
        """Let the recipe's sgd_config hold on resuming, where the checkpoint brought its own."""
        apply_recipe_rates(self, self.sgd_config)

    def loss_terms(self, batch: DetectionBatch | ClassificationBatch) -> dict[str, Tensor]:
        """Return the terms of the loss of a batch of either kind, weighted, by name."""
        output = self.network(unit_range(batch.images))
        return yolo9000_loss(
            output, batch, self.network.anchors_wh_cell, self.tree, self._boxed_ancestors, self.loss
        )

    def training_step(self, batch: DetectionBatch | ClassificationBatch, batch_idx: int) -> Tensor:
        """Return the loss of a batch of either kind."""
        terms = self.loss_terms(batch)
        loss = torch.stack(list(terms.values())).sum()
        prefix = "train/" if isinstance(batch, DetectionBatch) else "train/cls_"
        shown = {f"{prefix}loss": loss.detach()}
        for name, value in terms.items():
            if prefix == "train/" or name not in BOX_TERMS:
                shown[prefix + name] = value.detach()
        self.log_dict(shown, prog_bar=True, batch_size=len(batch))
        sgd_config = self.trainer.optimizers[0].param_groups[0]
        settings = {"train/lr": sgd_config["lr"], "train/image_size": float(batch.images.shape[-1])}
        self.log_dict(settings, batch_size=len(batch))
        return loss

    @torch.no_grad()
    def forward(
        self,
        image: str | Path | Image,
        score_threshold: float = 0.25,
        tree_threshold: float = 0.5,
        image_size: int | None = None,
    ) -> list[Detection]:
        """Return what an image shows, best first, each object named as surely as asked.

        Args:
            image: a file, or uint8 (H, W, 3), RGB.
            score_threshold: 0…1, of objectness x P(node).
            tree_threshold: 0…1, of P(node), down to which the tree is descended.
            image_size: px, a multiple of 32; the model's own where None.

        Raises:
            InputError: a network input that is no multiple of the stride.
            InputError: pixels of another kind.
            UnreadableSample: the file is missing, no image, broken, or too large.
        """
        fitted, size_hw_orig = self.fitted(image, image_size)
        sizes = torch.tensor([size_hw_orig])
        images = fitted[None].to(self.device)
        (found,) = self.describe(images, sizes, score_threshold, tree_threshold)
        return found.told(self.tree)

    def size_hw(self, image_size: int | None = None) -> tuple[int, int]:
        """Return height and width of the network input, px.

        Args:
            image_size: both of them; the model's own where None.

        Raises:
            InputError: not a multiple of the stride.
        """
        size = self.hparams["image_size"] if image_size is None else image_size
        size_hw = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        stride = self.network.stride
        if any(side < stride or side % stride for side in size_hw):
            raise InputError(f"image size {size}: allowed are multiples of {stride}")
        return size_hw

    def fitted(
        self, image: str | Path | Image, image_size: int | None = None
    ) -> tuple[Tensor, tuple[int, int]]:
        """Return an image as the network takes it, and the height and width of the original, px.

        Args:
            image: a file, or uint8 (H, W, 3), RGB.
            image_size: px; the model's own where None.

        Returns:
            uint8 (3, H, W), read and fitted as for validation.
        """
        size_hw = self.size_hw(image_size)
        if isinstance(image, str | Path):
            pixels, size_hw_orig = read_image(Path(image).expanduser(), max(size_hw))
        else:
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                raise InputError(
                    f"an image of {image.dtype} {image.shape}; allowed: uint8 (H, W, 3), RGB"
                )
            pixels, size_hw_orig = image, (image.shape[0], image.shape[1])
        square, *_ = fit(pixels, size_hw, self.hparams["resize"], size_hw_orig)
        return torch.from_numpy(square).permute(2, 0, 1), size_hw_orig

    @torch.no_grad()
    def detect(
        self, images: Tensor, sizes_hw_orig: Tensor, nodes: Tensor, score_threshold: float
    ) -> list[Detections]:
        """Return every (box, node) pair whose score passes the threshold, after suppression.

        Args:
            images: uint8 or float (B, 3, H, W), fitted as the module's `resize` says.
            sizes_hw_orig: int64 (B, 2), px of the original images.
            nodes: int64 (L,), the classes asked for.
            score_threshold: 0…1, of objectness x P(node).
        """
        return [
            self._named(image, self._probs(image), size, images.shape[-2:], nodes, score_threshold)
            for image, size in zip(
                self._candidates(images, score_threshold), sizes_hw_orig.tolist(), strict=True
            )
        ]

    def _probs(self, image: Candidates) -> Tensor:
        return self.tree.log_probs(image.logits).exp()

    def _named(
        self,
        image: Candidates,
        probs: Tensor,
        size_hw_orig: tuple[int, int],
        size_hw: torch.Size,
        nodes: Tensor,
        threshold: float,
    ) -> Detections:
        scores = image.objectness[:, None] * probs[:, nodes]
        box, column = _best_pairs(scores, threshold)
        boxes = self._original_px(image.boxes_cxcywh_norm, size_hw_orig, size_hw)[box]
        kept = batched_nms(boxes, scores[box, column], column, self.iou_threshold)
        return Detections(boxes[kept], nodes[column[kept]], scores[box[kept], column[kept]])

    @torch.no_grad()
    def describe(
        self,
        images: Tensor,
        sizes_hw_orig: Tensor,
        score_threshold: float = 0.25,
        tree_threshold: float = 0.5,
    ) -> list[Detections]:
        """Return one label a box: the most specific node that is still probable.

        Args:
            images: uint8 or float (B, 3, H, W), fitted as the module's `resize` says.
            sizes_hw_orig: int64 (B, 2), px of the original images.
            score_threshold: 0…1, of objectness x P(node).
            tree_threshold: 0…1, of P(node), down to which the tree is descended.

        Source: YOLO9000, section 4; boxes suppress each other whatever their label, since the
        same object may be named at two levels.
        """
        return [
            self._described(image, size, images.shape[-2:], score_threshold, tree_threshold)[0]
            for image, size in zip(
                self._candidates(images, score_threshold), sizes_hw_orig.tolist(), strict=True
            )
        ]

    def _described(
        self,
        image: Candidates,
        size_hw_orig: tuple[int, int],
        size_hw: torch.Size,
        score_threshold: float,
        tree_threshold: float,
    ) -> tuple[Detections, Tensor]:
        """Return one label a box, and which of the candidates these boxes are."""
        labels, probs = self.tree.most_specific(image.logits, tree_threshold)
        scores = image.objectness * probs
        sure = (scores > score_threshold).nonzero().flatten()
        boxes = self._original_px(image.boxes_cxcywh_norm[sure], size_hw_orig, size_hw)
        same = torch.zeros_like(sure)
        kept = batched_nms(boxes, scores[sure], same, self.iou_threshold)
        rows = sure[kept]
        return Detections(boxes[kept], labels[rows], scores[rows]), rows

    def _candidates(self, images: Tensor, threshold: float) -> list[Candidates]:
        output = self.network(unit_range(images))
        return candidates(output, self.network.anchors_wh_cell, threshold)

    def _original_px(
        self, boxes_cxcywh_norm: Tensor, size_hw_orig: tuple[int, int], size_hw: torch.Size
    ) -> Tensor:
        return original_px(boxes_cxcywh_norm, size_hw_orig, size_hw, self.hparams["resize"])

    def on_validation_epoch_start(self) -> None:
        """Look up which classes the images are labelled with."""
        self._begin_evaluation("validation")

    def on_test_epoch_start(self) -> None:
        """Look up which classes the images are labelled with."""
        self._begin_evaluation("test")

    def _begin_evaluation(self, stage: str) -> None:
        source = getattr(self._datamodule, stage, None)
        nodes = source.nodes if source is not None else self.tree.leaves
        self.evaluation.begin(nodes.to(self.device), self.boxed_ancestors())

    def validation_step(self, batch: DetectionBatch, batch_idx: int) -> None:
        """Collect detections and truths."""
        size_hw, evaluation = batch.images.shape[-2:], self.evaluation
        truths: list[Tensor] = []
        fine: list[Detections] = []
        coarse: list[Detections] = []
        levels = [(fine, evaluation.nodes)]
        if evaluation.has_levels:
            levels.append((coarse, evaluation.coarse_nodes))
        at_levels: list[list[Detections]] = [[] for _ in evaluation.levels]
        levels += zip(at_levels, (nodes for *_, nodes in evaluation.levels), strict=True)
        images = self._candidates(batch.images, SCORE_THRESHOLD)
        for k, (image, size) in enumerate(zip(images, batch.sizes_hw_orig.tolist(), strict=True)):
            boxes = batch.boxes_cxcywh_norm[k][batch.labels[k] >= 0]
            truths.append(self._original_px(boxes, size, size_hw))
            probs = self._probs(image)
            for found, nodes in levels:
                found.append(self._named(image, probs, size, size_hw, nodes, SCORE_THRESHOLD))
            if evaluation.has_depth:
                named, rows = self._described(image, size, size_hw, FOUND_SCORE, 0.5)
                deepest, _ = self.tree.most_specific(image.logits[rows], 0.0)
                evaluation.update_tree(batch, k, truths[k], named, deepest)
        evaluation.update(batch, truths, fine, coarse, at_levels)

    def test_step(self, batch: DetectionBatch, batch_idx: int) -> None:
        """Collect detections and truths."""
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log average precision."""
        self._log_figures("val")

    def on_test_epoch_end(self) -> None:
        """Log average precision."""
        self._log_figures("test")

    def _log_figures(self, stage: str) -> None:
        for name, value in self.evaluation.compute(self.boxed).items():
            # equal on every rank: the mean changes nothing, and all may monitor it
            self.log(f"{stage}/{name}", value, prog_bar=name in SHOWN, sync_dist=True)
        each = self.class_figures()
        if not self.trainer.sanity_checking and len(each) <= 2 * MAX_CLASSES:
            # not by `log`, which would ask all ranks once for each class
            connector = self.trainer._logger_connector
            connector.log_metrics({f"{stage}/{k}": torch.tensor(v) for k, v in each.items()})

    def class_figures(self) -> dict[str, float]:
        """Return the newest AP50 and AP of each class, by name; by key where a name recurs."""
        per_class = self.evaluation.per_class
        names = dict(zip(self.tree.keys, self.tree.names, strict=True))
        recurring = {
            name for name, times in Counter(map(names.get, per_class)).items() if times > 1
        }
        return {
            f"{measure}/{key if names[key] in recurring else names[key]}": row[measure]
            for key, row in per_class.items()
            for measure in ("AP50", "AP")
            if measure in row
        }

    def table(self) -> str:
        """Return the newest figures of each class as text."""
        return self.evaluation.table()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say which module the checkpoint is of."""
        checkpoint["module"] = type(self).__name__

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights that belong to other classes or other anchors.

        Raises:
            InputError: names what differs.
        """
        theirs = checkpoint["hyper_parameters"]
        parts = {
            f"model.{name}": (self.hparams[name], theirs[name])
            for name in ("tree", "anchors_wh_cell")
            if name in theirs  # a classifier's has no anchors, and is refused as such
        }
        if "head_channels" in theirs:
            own = to_plain(self.network.body.layers)
            parts["the network's list of layers"] = (own, to_plain(_layers_of(theirs)))
        refuse_other_model(checkpoint, type(self).__name__, parts)


def _layers_of(hparams: dict[str, Any]) -> tuple[Layer, ...]:
    """Return the body that a checkpoint's values describe."""
    return detector_layers(
        backbone_layers(hparams["backbone"]),
        hparams["head_channels"],
        hparams["passthrough_channels"],
        hparams["reorg"],
    )


def _best_pairs(scores: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return rows and columns of the scores above a threshold, of too many the highest."""
    row, column = (scores > threshold).nonzero(as_tuple=True)
    if len(row) > MAX_PAIRS:
        best = scores[row, column].topk(MAX_PAIRS).indices.sort().values
        row, column = row[best], column[best]
    return row, column


def original_px(
    boxes_cxcywh_norm: Tensor,
    size_hw_orig: tuple[int, int],
    size_hw: torch.Size,
    resize: str = "letterbox",
) -> Tensor:
    """Map boxes from the network input to px of the original image, clipped to it.

    Args:
        boxes_cxcywh_norm: float (N, 4), 0…1 of the network input.
        size_hw_orig: height and width of the image file, px.
        size_hw: of the network input, px.
        resize: how the image was fitted, `letterbox` or `stretch`.

    Returns:
        float (N, 4), corners.
    """
    height, width = size_hw_orig
    boxes = boxes_cxcywh_norm
    if resize == "letterbox":
        boxes = unletterbox(boxes, (height, width), (size_hw[0], size_hw[1]))
    corners = cxcywh_to_xyxy(boxes) * boxes.new_tensor([width, height] * 2)
    return torch.minimum(corners.clamp(min=0), boxes.new_tensor([width, height] * 2))
