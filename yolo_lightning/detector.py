"""The LightningModule of the detector and the YOLO9000 joint loss."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from yolo_lightning.batches import ClassificationBatch, DetectionBatch
from yolo_lightning.boxes import batched_nms, cxcywh_to_xyxy, unletterbox
from yolo_lightning.darknet19 import TRUNKS
from yolo_lightning.errors import InputError
from yolo_lightning.losses import LossSettings, yolo9000_loss
from yolo_lightning.metrics import BoxAveragePrecision
from yolo_lightning.schedules import Schedule
from yolo_lightning.wordtree import WordTree
from yolo_lightning.yolov2 import Candidates, YOLOv2, candidates

SCORE_THRESHOLD = 0.005
"""The least score that counts in evaluation, as in the original program."""

MOST_PAIRS = 8192
"""Most (box, class) pairs of an image that suppression compares; evaluation keeps 100 of them.
Bounds the memory that a network takes while it is sure of nothing."""

BOX_TERMS = ("loss_coord", "loss_prior")
"""What only images with boxes pay."""


@dataclass
class Detections:
    """What was found in one image.

    Attributes:
        boxes_xyxy_orig_px: float (N, 4), px of the original image.
        labels: int64 (N,), tree nodes.
        scores: float (N,), objectness x P(label), descending.
    """

    boxes_xyxy_orig_px: Tensor
    labels: Tensor
    scores: Tensor


class DetectorModule(pl.LightningModule):
    """YOLOv2, or YOLO9000 where the tree is deep and classification batches take part.

    Args:
        tree: the classes: a tree file, a list of names (a tree of one level), or rows.
        anchors_wh_cell: widths and heights of the priors, in grid cells.
        trunk: name of the trunk.
        head_channels: channels of the head's 3x3 convolutions.
        passthrough_channels: channels of the passthrough's reducing convolution; 0 for none.
        learning_rate: per optimizer step, for a gradient averaged over the images of the global
            batch.
        momentum, weight_decay: of SGD; biases and batch norms decay too, as in the original.
        schedule: factor of the learning rate at each optimizer step.
        loss: scales and rules of the loss.
        iou_threshold: of non-maximum suppression.

    Raises:
        InputError: an unknown trunk or anchors that are not positive pairs; on loading a
            checkpoint, a tree or anchors that differ from the recipe's.

    Source: YOLO9000, sections 2 to 4.
    """

    boxed: Tensor
    boxed_ancestors: Tensor

    def __init__(
        self,
        tree: str | list[str] | list[tuple[str, str, str]],
        anchors_wh_cell: list[tuple[float, float]],
        trunk: str = "darknet19",
        head_channels: int = 1024,
        passthrough_channels: int = 64,
        learning_rate: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: Schedule | None = None,
        loss: LossSettings | None = None,
        iou_threshold: float = 0.45,
    ) -> None:
        super().__init__()
        if trunk not in TRUNKS:
            raise InputError(f"model.trunk is {trunk!r}; allowed: {', '.join(TRUNKS)}")
        anchors = torch.tensor([list(pair) for pair in anchors_wh_cell], dtype=torch.float32)
        if anchors.ndim != 2 or anchors.shape[1] != 2 or not bool((anchors > 0).all()):
            raise InputError(
                f"model.anchors_wh_cell is {anchors_wh_cell}; allowed: pairs of positive numbers"
            )
        for name, value, low in (
            ("learning_rate", learning_rate, 0),
            ("momentum", momentum, 0),
            ("weight_decay", weight_decay, 0),
            ("head_channels", head_channels, 1),
            ("passthrough_channels", passthrough_channels, 0),
        ):
            if value < low:
                raise InputError(f"model.{name} is {value}; allowed: {low} or more")
        if not 0 <= iou_threshold <= 1:
            raise InputError(f"model.iou_threshold is {iou_threshold}; allowed: 0 … 1")
        self.tree = WordTree.of(tree)
        self.network = YOLOv2(
            TRUNKS[trunk], len(self.tree), anchors, head_channels, passthrough_channels
        )
        # a fifth faster on CPUs
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.rate, self.momentum, self.weight_decay = learning_rate, momentum, weight_decay
        self.schedule = schedule or Schedule()
        self.loss = LossSettings.of(loss)
        self.iou_threshold = iou_threshold
        # travel with the weights: `test` needs to know what training saw with boxes
        self.register_buffer("boxed", torch.zeros(len(self.tree), dtype=torch.bool))
        self.register_buffer("boxed_ancestors", torch.full((len(self.tree),), -1))
        self.average_precision = BoxAveragePrecision()
        self._evaluated: Tensor | None = None
        self.per_class: dict[str, dict[str, float]] = {}
        # what rebuilds this module, as plain values: checkpoints load with weights_only=True
        self.save_hyperparameters(
            {
                "tree": [list(row) for row in self.tree.rows],
                "anchors_wh_cell": anchors.tolist(),
                "trunk": trunk,
                "head_channels": head_channels,
                "passthrough_channels": passthrough_channels,
                "learning_rate": learning_rate,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "loss": asdict(self.loss),
                "iou_threshold": iou_threshold,
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
        tree = getattr(self._datamodule, "tree", None)
        if tree is not None and tree.rows != self.tree.rows:
            raise InputError(
                "data.tree differs from model.tree: "
                f"{_first_difference(tree.rows, self.tree.rows, 'the data', 'the model')}"
            )
        precision = str(self.trainer.precision)
        if precision not in ("32-true", "16-mixed", "bf16-mixed"):
            raise InputError(
                f"trainer.precision is {precision}; allowed: 32-true, 16-mixed, bf16-mixed"
            )

    def on_fit_start(self) -> None:
        """Learn which nodes training boxes are labelled with, now that weights are restored.

        Raises:
            InputError: validation would come between two halves of an optimizer step, whose
                gradient no checkpoint holds.
        """
        every, parts = self.trainer.val_check_interval, self.trainer.accumulate_grad_batches
        if isinstance(every, int) and every % parts:
            raise InputError(
                f"trainer.val_check_interval is {every}; allowed: multiples of "
                f"trainer.accumulate_grad_batches, {parts}"
            )
        boxed_nodes = getattr(self._datamodule, "boxed_nodes", None)
        if boxed_nodes is not None:
            self.boxed.zero_()[boxed_nodes] = True
            supervised = self.tree.ancestors_or_self(boxed_nodes)
            self.boxed_ancestors.copy_(self.tree.deepest_ancestor_in(supervised))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return SGD and its schedule, per optimizer step."""
        # the fused kernel walks 29 million class weights once instead of four times; under mixed
        # precision it cannot be clipped
        fused = not self.trainer.gradient_clip_val
        optimizer = torch.optim.SGD(
            self.parameters(), self.rate, self.momentum, weight_decay=self.weight_decay, fused=fused
        )
        # a function, not the object: its values stay out of the checkpoint and the recipe's hold
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.schedule(step))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_train_start(self) -> None:
        """Let the recipe's rates hold on resuming, where the checkpoint brought its own."""
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
        scheduler.base_lrs = [self.rate] * len(scheduler.base_lrs)
        for group in scheduler.optimizer.param_groups:
            group.update(
                lr=self.rate * self.schedule(scheduler.last_epoch),
                initial_lr=self.rate,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
            )

    def training_step(self, batch: DetectionBatch | ClassificationBatch, batch_idx: int) -> Tensor:
        """Return the loss of a batch of either kind."""
        output = self.network(_unit_range(batch.images))
        terms = yolo9000_loss(
            output, batch, self.network.anchors_wh_cell, self.tree, self.boxed_ancestors, self.loss
        )
        loss = torch.stack(list(terms.values())).sum()
        prefix = "train/" if isinstance(batch, DetectionBatch) else "train/cls_"
        shown = {f"{prefix}loss": loss.detach()}
        for name, value in terms.items():
            if prefix == "train/" or name not in BOX_TERMS:
                shown[prefix + name] = value.detach()
        self.log_dict(shown, prog_bar=True, batch_size=len(batch))
        (rates,) = self.trainer.optimizers[0].param_groups
        settings = {"train/lr": rates["lr"], "train/image_size": float(batch.images.shape[-1])}
        self.log_dict(settings, batch_size=len(batch))
        return loss

    @torch.no_grad()
    def detect(
        self, images: Tensor, sizes_hw_orig: Tensor, nodes: Tensor, score_threshold: float
    ) -> list[Detections]:
        """Return every (box, node) pair whose score passes the threshold, after suppression.

        Args:
            images: uint8 or float (B, 3, H, W), letterboxed.
            sizes_hw_orig: int64 (B, 2), px of the original images.
            nodes: int64 (L,), the classes asked for.
            score_threshold: 0…1, of objectness x P(node).
        """
        found = []
        for image, size in zip(
            self._candidates(images, score_threshold), sizes_hw_orig.tolist(), strict=True
        ):
            scores = image.objectness[:, None] * self.tree.log_probs(image.logits)[:, nodes].exp()
            box, column = _best_pairs(scores, score_threshold)
            boxes = _original_px(image.boxes_cxcywh_norm, size, images.shape[-2:])[box]
            kept = batched_nms(boxes, scores[box, column], column, self.iou_threshold)
            found.append(
                Detections(boxes[kept], nodes[column[kept]], scores[box[kept], column[kept]])
            )
        return found

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
            images: uint8 or float (B, 3, H, W), letterboxed.
            sizes_hw_orig: int64 (B, 2), px of the original images.
            score_threshold: 0…1, of objectness x P(node).
            tree_threshold: 0…1, of P(node), down to which the tree is descended.

        Source: YOLO9000, section 4; boxes suppress each other whatever their label, since the
        same object may be named at two levels.
        """
        found = []
        for image, size in zip(
            self._candidates(images, score_threshold), sizes_hw_orig.tolist(), strict=True
        ):
            labels, probs = self.tree.most_specific(image.logits, tree_threshold)
            scores = image.objectness * probs
            sure = scores > score_threshold
            boxes = _original_px(image.boxes_cxcywh_norm, size, images.shape[-2:])[sure]
            labels, scores = labels[sure], scores[sure]
            kept = batched_nms(boxes, scores, torch.zeros_like(labels), self.iou_threshold)
            found.append(Detections(boxes[kept], labels[kept], scores[kept]))
        return found

    def _candidates(self, images: Tensor, threshold: float) -> list[Candidates]:
        output = self.network(_unit_range(images))
        return candidates(output, self.network.anchors_wh_cell, threshold)

    def on_validation_epoch_start(self) -> None:
        """Look up which classes the images are labelled with."""
        self._begin_evaluation("validation")

    def on_test_epoch_start(self) -> None:
        """Look up which classes the images are labelled with."""
        self._begin_evaluation("test")

    def _begin_evaluation(self, stage: str) -> None:
        source = getattr(self._datamodule, stage, None)
        nodes = source.nodes if source is not None else self.tree.leaves
        self._evaluated = nodes.to(self.device)
        self.average_precision.reset()

    def validation_step(self, batch: DetectionBatch, batch_idx: int) -> None:
        """Collect detections and truths."""
        assert self._evaluated is not None
        found = self.detect(batch.images, batch.sizes_hw_orig, self._evaluated, SCORE_THRESHOLD)
        for k, (detections, size) in enumerate(
            zip(found, batch.sizes_hw_orig.tolist(), strict=True)
        ):
            real = batch.labels[k] >= 0
            truth = _original_px(batch.boxes_cxcywh_norm[k][real], size, batch.images.shape[-2:])
            self.average_precision.update(
                int(batch.sample_ids[k]),
                detections.boxes_xyxy_orig_px,
                detections.labels,
                detections.scores,
                truth,
                batch.labels[k][real],
                batch.difficult[k][real],
            )

    def test_step(self, batch: DetectionBatch, batch_idx: int) -> None:
        """Collect detections and truths."""
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log average precision."""
        self._log_average_precision("val")

    def on_test_epoch_end(self) -> None:
        """Log average precision."""
        self._log_average_precision("test")

    def _log_average_precision(self, stage: str) -> None:
        """Log the means over all classes, those that had boxes in training, those that had not."""
        per_class = self.average_precision.compute()
        self.average_precision.reset()
        self.per_class = {self.tree.keys[node]: values for node, values in per_class.items()}
        boxed = self.boxed.tolist()
        groups = {
            "": per_class,
            "_boxed": {node: v for node, v in per_class.items() if boxed[node]},
            "_unboxed": {node: v for node, v in per_class.items() if not boxed[node]},
        }
        for suffix, members in groups.items():
            if not members and suffix == "_unboxed":
                continue  # the usual case of detection alone
            for measure in ("AP50", "AP"):
                # none of these classes among the images: NaN, so that who monitors it goes on
                values = [value[measure] for value in members.values()] or [math.nan]
                self.log(
                    f"{stage}/{measure}{suffix}",
                    sum(values) / len(values),
                    prog_bar=measure == "AP50",
                    # equal on every rank: the mean changes nothing, and all may monitor it
                    sync_dist=True,
                )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights that belong to other classes or other anchors.

        Raises:
            InputError: names what differs.
        """
        theirs = checkpoint["hyper_parameters"]
        for name in ("tree", "anchors_wh_cell"):
            own = self.hparams[name]
            if theirs[name] != own:
                raise InputError(
                    f"model.{name} differs from the checkpoint's: "
                    f"{_first_difference(own, theirs[name], 'the recipe', 'the checkpoint')}"
                )


def _best_pairs(scores: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return rows and columns of the scores above a threshold, of too many the highest."""
    row, column = (scores > threshold).nonzero(as_tuple=True)
    if len(row) > MOST_PAIRS:
        best = scores[row, column].topk(MOST_PAIRS).indices.sort().values
        row, column = row[best], column[best]
    return row, column


def _first_difference(first: list[Any], second: list[Any], in_first: str, in_second: str) -> str:
    if len(first) != len(second):
        return f"{len(first)} entries in {in_first}, {len(second)} in {in_second}"
    number = next(k for k, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1])
    return f"entry {number + 1} is {first[number]} in {in_first}, {second[number]} in {in_second}"


def _unit_range(images: Tensor) -> Tensor:
    """Return float images in 0…1, channels last in memory."""
    unit = images.float() / 255 if images.dtype == torch.uint8 else images
    return unit.contiguous(memory_format=torch.channels_last)


def _original_px(
    boxes_cxcywh_norm: Tensor, size_hw_orig: tuple[int, int], size_hw: torch.Size
) -> Tensor:
    """Map boxes from a letterboxed network input to px of the original image, clipped to it."""
    height, width = size_hw_orig
    boxes = unletterbox(boxes_cxcywh_norm, (height, width), (size_hw[0], size_hw[1]))
    corners = cxcywh_to_xyxy(boxes) * boxes.new_tensor([width, height] * 2)
    return torch.minimum(corners.clamp(min=0), boxes.new_tensor([width, height] * 2))
