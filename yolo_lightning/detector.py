"""The LightningModule of the detector and the YOLO9000 joint loss."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from yolo_lightning.batches import ClassificationBatch, DetectionBatch, unit_range
from yolo_lightning.boxes import batched_nms
from yolo_lightning.detections import (
    BestPairs,
    DetectionList,
    Detections,
    split_kept,
    to_host,
    to_original_px,
)
from yolo_lightning.errors import InputError, expand
from yolo_lightning.evaluation.detection import PREDICTION_SCORE_THRESHOLD, DetectionEvaluation
from yolo_lightning.images import Image, decode_image, decoding_side, fit, read_image
from yolo_lightning.losses import LossSettings, yolo9000_loss
from yolo_lightning.models.anchors import (
    DEFAULT_COUNT,
    Released,
    as_yaml_values,
    cluster_anchors,
    released_anchors,
    scale_to_input,
)
from yolo_lightning.models.backbones import (
    default_head_channels,
    detector_layers,
    without_batch_norm,
)
from yolo_lightning.models.head import Candidates, Location, select_candidates
from yolo_lightning.models.layers import MAX_FILTERS, LayerRow, ReorgKind, layer_outputs
from yolo_lightning.models.networks import YOLOv2
from yolo_lightning.models.preparation import Interpolation, Resize
from yolo_lightning.schedules import Schedule
from yolo_lightning.training_module import TrainingModule
from yolo_lightning.tree.exclusive import ExclusiveNames

SCORE_THRESHOLD = 0.005  # minimum score of detections in evaluation, as in the original program

MAX_LOGGED_CLASSES = 1000
"""With more classes, per-class metrics are not logged; reports contain those of all classes."""

BOX_TERMS = ("loss_coord", "loss_anchor_prior")  # loss terms of images with boxes only
_TERMS = ("loss", "loss_obj", "loss_noobj", "loss_class")


class DetectorModule(TrainingModule):
    """YOLOv2, or YOLO9000 if trained with a class hierarchy and classification batches.

    Args:
        tree: the classes: a tree file, a list of names (a tree of one level), or rows. Source:
            YOLO9000, section 4.
        anchors_wh_cell (grid cells): widths and heights of the anchors, each of which predicts a
            box per cell, of a size relative to its own; or the name of released ones, `voc`,
            `coco`, `tiny_voc` or `yolo9000`. Null: five, clustered from the boxes of the data when
            a training begins; until then those for VOC. Source: YOLO9000, section 2.
        backbone: a name, layers as rows such as ``[conv, 32, 3]``, or a module with attributes
            `out_channels` and `stride` (px of input per output cell) that maps (B, 3, H, W) to (B,
            out_channels, H / stride, W / stride). Source: YOLO9000, section 3.
        head_channels (channels): of the head's 3x3 convolutions: fewer are faster and learn less; 0
            for no head; null for those of the backbone's output, at least 256 and at most 1024, as
            Darknet-19 has. Source: YOLO9000, section 3.
        passthrough_channels (channels): of the 1x1 convolution that reduces the finer features for
            the passthrough, which helps with small objects; null for no reduction, 0 for no
            passthrough. Source: YOLO9000, section 2; 64 in yolov2.cfg.
        reorg: how the passthrough folds cells into channels: `darknet`, as its weights and exports
            require, or `space_to_depth`, as in the paper. Source: YOLO9000, section 2; Darknet.
        batch_norm: false gives every convolution of the network a bias instead of its batch norm,
            as in YOLO; only for a backbone that is a name or a list of layers. Source: YOLO9000,
            section 2.
        location: how the centre of a box is predicted: `direct`, inside its cell, as in the paper,
            or `offset`, anywhere, in sides of the anchor, as in Faster R-CNN. Source: YOLO9000,
            section 2.
        pretrained: Darknet weights or a checkpoint to start from: far fewer steps are needed.
            Source: YOLO9000, sections 2 and 3.
        image_size (px): default network input of predictions: one side, or height and width; larger
            finds smaller objects and is slower; training uses that of the data, if it has one.
            Source: YOLO9000, section 2.
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
        loss: weights and rules of the loss: see `LossSettings`. Source: YOLO9000, sections 2 and 4.
        iou_threshold (IoU, 0 … 1): of non-maximum suppression: of two boxes that overlap more, the
            one with the lower score is dropped. Source: Darknet.
        resize: `letterbox` keeps the aspect ratio and pads with grey, `stretch` does not; training
            replaces it by that of the data. Source: Darknet.
        interpolation: how images are resized to the network input: `area`, or `darknet`, for
            weights that the original program trained; training replaces it by that of the data.

    Raises:
        InputError: an unknown backbone, invalid anchors, or a checkpoint of another network.

    Source: YOLO9000, sections 2 to 4.
    """

    network: YOLOv2
    boxed: Tensor

    def __init__(
        self,
        tree: str | list[str] | list[tuple[str, str, str]],
        anchors_wh_cell: list[tuple[float, float]] | Released | None = None,
        backbone: str | list[LayerRow] | nn.Module = "darknet19",
        head_channels: int | None = None,
        passthrough_channels: int | None = 64,
        reorg: ReorgKind = "darknet",
        batch_norm: bool = True,
        location: Location = "direct",
        pretrained: str | None = None,
        image_size: int | list[int] = 416,
        learning_rate: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        backbone_lr_factor: float = 1.0,
        schedule: Schedule | None = None,
        loss: LossSettings | None = None,  # a dict in checkpoints
        iou_threshold: float = 0.45,
        resize: Resize = "letterbox",
        interpolation: Interpolation = "area",
    ) -> None:
        super().__init__(tree, backbone, pretrained, schedule)
        self._clusters_anchors = anchors_wh_cell is None
        if anchors_wh_cell is None or isinstance(anchors_wh_cell, str):
            cell_px = layer_outputs(self.backbone_layers)[-1].stride
            anchors_wh_cell = released_anchors(anchors_wh_cell or "voc", cell_px)
        if head_channels is None:
            head_channels = default_head_channels(self.backbone_layers)
        anchors = torch.tensor([list(pair) for pair in anchors_wh_cell], dtype=torch.float32)
        is_positive = (anchors > 0) & anchors.isfinite()
        if anchors.ndim != 2 or anchors.shape[1] != 2 or not is_positive.all():
            raise InputError(
                f"model.anchors_wh_cell is {anchors_wh_cell}; allowed: pairs of positive numbers"
            )
        for name, value in (
            ("head_channels", head_channels),
            ("passthrough_channels", passthrough_channels or 0),
        ):
            if not 0 <= value <= MAX_FILTERS:
                raise InputError(f"model.{name} is {value}; allowed: 0 … {MAX_FILTERS:,}")
        if location not in get_args(Location):
            allowed = ", ".join(get_args(Location))
            raise InputError(f"model.location is {location!r}; allowed: {allowed}")
        if not 0 <= iou_threshold <= 1:
            raise InputError(f"model.iou_threshold is {iou_threshold}; allowed: 0 … 1")
        self.loss = LossSettings(**loss) if isinstance(loss, dict) else loss or LossSettings()
        self.iou_threshold = iou_threshold
        layers = detector_layers(self.backbone_layers, head_channels, passthrough_channels, reorg)
        layers = layers if batch_norm else without_batch_norm(layers)
        self.set_network(
            YOLOv2(layers, len(self.tree), anchors, location),
            backbone,
            anchors_wh_cell=[[float(side) for side in pair] for pair in anchors_wh_cell],
            head_channels=head_channels,
            passthrough_channels=passthrough_channels,
            reorg=reorg,
            batch_norm=batch_norm,
            location=location,
            image_size=image_size,
            learning_rate=learning_rate,
            momentum=momentum,
            weight_decay=weight_decay,
            backbone_lr_factor=backbone_lr_factor,
            loss=asdict(self.loss),
            iou_threshold=iou_threshold,
            resize=resize,
            interpolation=interpolation,
        )
        # classes with boxes in training; saved in checkpoints because `test` needs them
        self.register_buffer("boxed", torch.zeros(len(self.tree), dtype=torch.bool))
        self.evaluation = DetectionEvaluation(self.tree)
        self._exclusive_names: ExclusiveNames | None = None

    def _check_data(self, stage: str) -> None:
        data = self._datamodule
        if stage == "fit" and hasattr(data, "detection") and data.detection is None:
            raise InputError("data.detection is empty; a detector is trained on images with boxes")
        for name in ("validation", "test"):
            source = getattr(data, name, None)
            if source is not None and not hasattr(source, "shapes_wh_px"):
                raise InputError(f"data.{name}: a detector is evaluated on images with boxes")

    def _cluster_anchors(self) -> None:
        """Set anchors that suit the training boxes, as fitted to the network input."""
        boxes, images = self._datamodule.detection.shapes_wh_px()
        size, resize = max(self.input_size_hw()), self.hparams["resize"]
        shapes = scale_to_input(boxes, images, size, resize) / self.network.stride
        try:
            anchors = as_yaml_values(cluster_anchors(shapes, DEFAULT_COUNT))
        except InputError as error:
            raise InputError(f"{error}; set model.anchors_wh_cell") from None
        self._set_anchors(anchors)
        rank_zero_only(print)(f"anchors_wh_cell: {anchors}, clusters of {len(shapes):,} boxes")

    def _set_anchors(self, anchors_wh_cell: list[list[float]]) -> None:
        self._clusters_anchors = False
        self.hparams["anchors_wh_cell"] = anchors_wh_cell
        self.network.anchors_wh_cell.copy_(torch.tensor(anchors_wh_cell))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the checkpoint's anchors if the constructor got none, and check the rest."""
        saved = checkpoint["hyper_parameters"].get("anchors_wh_cell", ())
        if self._clusters_anchors and len(saved) == DEFAULT_COUNT:
            self._set_anchors(saved)
        super().on_load_checkpoint(checkpoint)

    def on_fit_start(self) -> None:
        """Copy the classes with boxes from the data, cluster anchors if there are none yet.

        Weights are restored by now.
        """
        if self._clusters_anchors and hasattr(self._datamodule, "detection"):
            self._cluster_anchors()
        boxed_nodes = getattr(self._datamodule, "boxed_nodes", None)
        if boxed_nodes is not None:
            self.boxed.zero_()[boxed_nodes] = True
        self._boxed_ancestors = self.boxed_ancestors()
        self._exclusive_names = self._exclusive_names_of("detection", self.device)

    def boxed_ancestors(self) -> Tensor:
        """Return int64 (K,): each node's deepest ancestor or self that has boxes; -1 if none."""
        # ancestors of a class with boxes have boxes too
        has_boxes = self.tree.ancestors_or_self(self.boxed.nonzero().flatten())
        return self.tree.deepest_ancestor_in(has_boxes).to(self.device)

    def _exclusive_names_of(self, part: str, device: torch.device) -> ExclusiveNames | None:
        """Return what the labels of a source of the data mean; None if that is unknown."""
        source = getattr(self._datamodule, part, None)
        if source is None or not hasattr(self._datamodule, "exclusive_names"):
            return None
        names: ExclusiveNames = self._datamodule.exclusive_names(source, device)
        return names

    def loss_terms(self, batch: DetectionBatch | ClassificationBatch) -> dict[str, Tensor]:
        """Return the weighted loss terms by name."""
        output = self.network(unit_range(batch.images))
        return yolo9000_loss(
            output,
            batch,
            self.network.anchors_wh_cell,
            self.tree,
            self._boxed_ancestors,
            self.loss,
            self._exclusive_names,
        )

    def training_step(self, batch: DetectionBatch | ClassificationBatch, batch_idx: int) -> Tensor:
        """Return the loss of a batch of either kind, and keep its terms to be logged."""
        terms = self.loss_terms(batch)
        loss = torch.stack(list(terms.values())).sum()
        prefix = "train/" if isinstance(batch, DetectionBatch) else "train/cls_"
        losses = {f"{prefix}loss": loss.detach()}
        for name, value in terms.items():
            if prefix == "train/" or name not in BOX_TERMS:
                losses[prefix + name] = value.detach()
        self._keep_losses(batch, losses)
        return loss

    @torch.no_grad()
    def forward(
        self,
        image: str | Path | bytes | Image,
        score_threshold: float = 0.25,
        tree_threshold: float = 0.5,
        image_size: int | None = None,
    ) -> DetectionList:
        """Detect objects in one image, also encoded in bytes; return them by descending score.

        `tree_threshold` is the minimum P(node) of a label; `image_size` is the side of the network
        input, px, by default the model's.

        Raises:
            InputError: an invalid image size, or an array other than uint8 (H, W, 3).
            UnreadableSample: the file is missing, not an image, damaged, or too large.
        """
        network_input, size_hw_orig = self.preprocess(image, image_size)
        sizes = torch.tensor([size_hw_orig])
        images = network_input[None].to(self.device)
        (detections,) = self.detect_most_specific(images, sizes, score_threshold, tree_threshold)
        return detections.to_list(self.tree)

    def input_size_hw(self, image_size: int | None = None) -> tuple[int, int]:
        """Return height and width of the network input, px, each a multiple of the stride."""
        size = self.hparams["image_size"] if image_size is None else image_size
        size_hw = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        stride = self.network.stride
        if any(side < stride or side % stride for side in size_hw):
            raise InputError(f"image size {size}: allowed are multiples of {stride}")
        return size_hw

    def preprocess(
        self, image: str | Path | bytes | Image, image_size: int | None = None
    ) -> tuple[Tensor, tuple[int, int]]:
        """Return an image as network input (3, H, W), and its original height and width, px.

        The input is uint8, or float32 in 0…1 if `self.hparams["interpolation"]` is `darknet`.

        Raises:
            InputError: an invalid image size, or an array other than uint8 (H, W, 3).
        """
        size_hw, interpolation = self.input_size_hw(image_size), self.hparams["interpolation"]
        min_side = decoding_side(max(size_hw), interpolation)
        if isinstance(image, str | Path):
            pixels, size_hw_orig = read_image(expand(image), min_side)
        elif isinstance(image, bytes):
            pixels, size_hw_orig = decode_image(image, "image", min_side)
        else:
            shape, dtype = [*getattr(image, "shape", [])], getattr(image, "dtype", None)
            if len(shape) != 3 or shape[2] != 3 or 0 in shape or dtype != np.uint8:
                found = type(image).__name__ if dtype is None else f"{dtype} {tuple(shape)}"
                raise InputError(
                    f"an image of {found}; allowed: a path, the bytes of a file, or an array, "
                    "uint8 (H, W, 3), RGB"
                )
            pixels, size_hw_orig = image, (image.shape[0], image.shape[1])
        resized, *_ = fit(pixels, size_hw, self.hparams["resize"], size_hw_orig, interpolation)
        return torch.from_numpy(resized).permute(2, 0, 1), size_hw_orig

    @torch.no_grad()
    def detect(
        self, images: Tensor, sizes_hw_orig: Tensor, nodes: Tensor, score_threshold: float
    ) -> list[Detections]:
        """Detect objects of the given nodes, int64 (L,): all (box, node) pairs above the threshold.

        Images (B, 3, H, W) are uint8 or float, resized as `self.hparams["resize"]` says; their
        original sizes are int64 (B, 2). Non-maximum suppression is applied per node.
        """
        candidates, boxes = self._candidates(images, sizes_hw_orig, score_threshold)
        pairs = BestPairs(candidates.image, len(images), [nodes.cpu()], score_threshold)
        nodes = nodes.to(self.device, non_blocking=True)
        for rows, logits in candidates.chunks():
            probs = self.tree.log_probs(logits).index_select(1, nodes).exp()
            pairs.add(rows.start, candidates.objectness[rows], probs)
        return pairs.suppress(boxes, self.iou_threshold)[0]

    def _candidates(
        self, images: Tensor, sizes_hw_orig: Tensor, threshold: float
    ) -> tuple[Candidates, Tensor]:
        """Return the candidates, and their corners in px of the original images, on the host."""
        output = self.network(unit_range(images))
        found = select_candidates(output, self.network.anchors_wh_cell, threshold)
        return found, self._original_px(
            found.boxes_cxcywh_norm, found.image, sizes_hw_orig, images.shape[-2:]
        )

    def _original_px(
        self, boxes_cxcywh_norm: Tensor, image: Tensor, sizes_hw_orig: Tensor, size_hw: torch.Size
    ) -> Tensor:
        sizes, resize = sizes_hw_orig.cpu(), self.hparams["resize"]
        return to_original_px(boxes_cxcywh_norm, image, sizes, size_hw, resize)

    @torch.no_grad()
    def detect_most_specific(
        self,
        images: Tensor,
        sizes_hw_orig: Tensor,
        score_threshold: float = 0.25,
        tree_threshold: float = 0.5,
    ) -> list[Detections]:
        """Detect objects and label each with the most specific node above `tree_threshold`.

        For the images, see `detect`. Non-maximum suppression ignores the labels, because boxes of
        one object may have labels at different levels.

        Source: YOLO9000, section 4.
        """
        candidates, boxes = self._candidates(images, sizes_hw_orig, score_threshold)
        labels, probs = self._most_specific_nodes(candidates, tree_threshold)
        found = Detections(boxes, labels, candidates.objectness * probs)
        return [
            one for one, _ in self._suppress(found, candidates.image, len(images), score_threshold)
        ]

    def _most_specific_nodes(
        self, candidates: Candidates, threshold: float
    ) -> tuple[Tensor, Tensor]:
        """Return the label of each candidate, and P(label), on the host."""
        logits, count = candidates.class_logits, len(candidates.objectness)
        if not count:
            return torch.empty_like(candidates.image), torch.empty_like(candidates.objectness)
        if logits.are_few(count, self.tree.descent_widths):
            gather = logits.node_logits(candidates.image, candidates.anchor, candidates.cell)
            zeros = torch.zeros(count, device=logits.device)
            labels, probs, _ = self.tree.descend_gathered(gather, zeros, threshold)
        else:
            parts = [
                self.tree.most_specific_nodes(one, threshold) for _, one in candidates.chunks()
            ]
            labels, probs = (torch.cat(one) for one in zip(*parts, strict=True))
        probs, labels = to_host(probs, labels)
        return labels, probs

    def _suppress(
        self, detections: Detections, image: Tensor, num_images: int, threshold: float
    ) -> list[tuple[Detections, Tensor]]:
        """Return each image's detections with one label per box, and their indices."""
        rows = (detections.scores > threshold).nonzero().flatten()
        boxes, scores = detections.boxes_xyxy_orig_px[rows], detections.scores[rows]
        kept = rows[batched_nms(boxes, scores, image[rows], self.iou_threshold)]
        return split_kept(detections, kept, image, num_images)

    def _reset_evaluation(self, stage: str) -> None:
        source = getattr(self._datamodule, stage, None)
        nodes = source.nodes if source is not None else self.tree.leaves
        exclusive_names = self._exclusive_names_of(stage, torch.device("cpu"))
        self.evaluation.reset(nodes, self.boxed_ancestors(), exclusive_names, self.device)

    def validation_step(self, batch: DetectionBatch, batch_idx: int) -> None:
        """Add detections and targets to the metrics."""
        evaluation, batch = self.evaluation, batch.with_targets_on_host()
        candidates, boxes = self._candidates(batch.images, batch.sizes_hw_orig, SCORE_THRESHOLD)
        sources = evaluation.source_numbers(batch.sample_ids)[candidates.image]
        levels = [level.nodes for level in evaluation.levels]
        pairs = BestPairs(candidates.image, len(batch), levels, SCORE_THRESHOLD)
        descents = []  # on the device, of boxes whose score may be high enough
        likely = candidates.objectness > PREDICTION_SCORE_THRESHOLD
        for rows, logits in candidates.chunks():
            probs = evaluation.class_probs(self.tree.log_probs(logits).exp(), sources[rows])
            pairs.add(rows.start, candidates.objectness[rows], probs)
            index = likely[rows].nonzero().flatten()
            if evaluation.is_hierarchical and len(index):
                index = index.to(logits.device, non_blocking=True)
                descents.append(self.tree.descend(logits.index_select(0, index), 0.5))
        most_specific: list[tuple[Detections, Tensor]] = []
        if descents:
            labels, probs, ends = (torch.cat(one) for one in zip(*descents, strict=True))
            probs, labels, ends = to_host(probs, labels, ends)
            scores = candidates.objectness[likely] * probs
            predicted = Detections(boxes[likely], labels, scores)
            image = candidates.image[likely]
            kept = self._suppress(predicted, image, len(batch), PREDICTION_SCORE_THRESHOLD)
            most_specific = [(one, ends[index]) for one, index in kept]
        evaluation.update(
            batch,
            self._targets_original_px(batch),
            pairs.suppress(boxes, self.iou_threshold),
            most_specific,
        )

    def _targets_original_px(self, batch: DetectionBatch) -> list[Tensor]:
        """Return the corners of each image's objects in px of the original image."""
        image, slot = (batch.labels >= 0).nonzero(as_tuple=True)
        boxes = batch.boxes_cxcywh_norm[image, slot]
        size_hw = batch.images.shape[-2:]
        corners = self._original_px(boxes, image, batch.sizes_hw_orig, size_hw)
        return [*corners.split(image.bincount(minlength=len(batch)).tolist())]

    def _log_metrics(self, stage: str) -> None:
        for name, value in self.evaluation.compute(self.boxed).items():
            # values are equal on all ranks; sync_dist lets callbacks monitor them on every rank
            self.log(f"{stage}/{name}", value, sync_dist=True)
        metrics = self.class_metrics()
        if not self.trainer.sanity_checking and len(metrics) <= 2 * MAX_LOGGED_CLASSES:
            # not with `self.log`, which would synchronise the ranks once per class
            connector = self.trainer._logger_connector
            connector.log_metrics({f"{stage}/{k}": torch.tensor(v) for k, v in metrics.items()})

    def metric_names(self) -> list[str]:
        """Return the names of the losses and metrics that callbacks may monitor."""
        losses = [*_TERMS, *BOX_TERMS, *(f"cls_{name}" for name in _TERMS)]
        metrics = [f"val/{name}" for name in self.evaluation.metric_names()]
        return metrics + [f"train/{name}" for name in losses]

    def class_metrics(self) -> dict[str, float]:
        """Return the latest AP50 and AP per class, by name, or by key if the name is not unique."""
        per_class = self.evaluation.per_class
        names = dict(zip(self.tree.keys, self.tree.names, strict=True))
        ambiguous = {
            name for name, count in Counter(map(names.get, per_class)).items() if count > 1
        }
        return {
            f"{measure}/{key if names[key] in ambiguous else names[key]}": row[measure]
            for key, row in per_class.items()
            for measure in ("AP50", "AP")
            if measure in row
        }

    def table(self) -> str:
        """Return the latest metrics of each class as text."""
        return self.evaluation.table()
