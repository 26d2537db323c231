"""The detector as one graph, from pixels to boxes, scores and nodes, and its export to files."""

import copy
import json
import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops import while_loop
from torch.export import Dim, ExportedProgram

from yolo_lightning.boxes import cxcywh_to_xyxy, pairwise_iou
from yolo_lightning.models.head import SparseClassLogits, decode_boxes
from yolo_lightning.models.layers import Reorg
from yolo_lightning.models.networks import YOLOv2, space_to_depth
from yolo_lightning.models.preparation import Interpolation, Resize
from yolo_lightning.tree.tables import TreeTables
from yolo_lightning.tree.wordtree import WordTree

INPUTS = ("images", "sizes_hw_orig")
OUTPUTS = ("boxes_xyxy_orig_px", "scores", "nodes")

METADATA_FILE = "metadata.json"  # name of the metadata among the extra files of a `.pt2` file

SCORE_THRESHOLD = "score_threshold"
"""Name of the score threshold: an initializer in ONNX files, a buffer in `.pt2` files."""


@dataclass(frozen=True)
class GraphSettings:
    """Constants of an exported graph."""

    resize: Resize = "letterbox"
    score_threshold: float = 0.25
    tree_threshold: float = 0.5  # minimum P(node) of a label
    iou_threshold: float = 0.45
    top: int = 100  # output rows per image
    interpolation: Interpolation = "area"  # of the images; determines their type

    @property
    def images_dtype(self) -> torch.dtype:
        """Return the type of the input `images`: uint8, or float32 in 0…1 for `darknet`."""
        return torch.uint8 if self.interpolation == "area" else torch.float32


class TreeDescent(nn.Module):
    """`WordTree.most_specific_nodes` with a fixed number of steps, one per level of the tree."""

    members: Tensor
    child_group: Tensor
    is_other: Tensor

    def __init__(self, tree: WordTree, threshold: float) -> None:
        super().__init__()
        self.levels = tree.paths.shape[1]
        self.log_threshold = math.log(threshold) if threshold > 0 else -math.inf
        tables = TreeTables.build(
            tree.parents, tree.groups, tree.paths, tree.is_other, torch.device("cpu")
        )
        self.top_group = int(tables.child_group[-1])
        groups = torch.arange(tree.num_groups)
        members = tables.siblings(groups, int(tables.group_sizes.max()))
        self.register_buffer("members", members)  # (G, largest size), -1 as padding
        self.register_buffer("child_group", tables.child_group)
        self.register_buffer("is_other", tables.is_other)

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return nodes, int64 (M,), and their probabilities, float (M,), of logits (M, K)."""
        log_prob = logits.new_zeros(logits.shape[0])
        node = torch.full_like(log_prob, -1, dtype=torch.int64)
        group = torch.full_like(node, self.top_group)
        active = torch.ones_like(node, dtype=torch.bool)
        for level in range(self.levels):
            siblings = self.members[group]
            values = logits.gather(1, siblings.clamp(min=0)).masked_fill(siblings < 0, -torch.inf)
            best, column = values.log_softmax(dim=1).max(dim=1)
            child = siblings.gather(1, column[:, None]).squeeze(1)
            child_log_prob = log_prob + best
            if level:
                active = active & (child_log_prob >= self.log_threshold) & ~self.is_other[child]
            node = torch.where(active, child, node)
            log_prob = torch.where(active, child_log_prob, log_prob)
            group = self.child_group[child]
            active = active & (group >= 0)
            group = group.clamp(min=0)
        return node, log_prob.exp()


def _no_rows(boxes_xyxy: Tensor, scores: Tensor, iou_threshold: float, top: int) -> Tensor:
    return scores.new_empty((scores.shape[0], top), dtype=torch.int64)


# an operator without an implementation, which `write_onnx` translates to NonMaxSuppression
torch.library.define(
    "yolo_lightning::nms_rows",
    "(Tensor boxes_xyxy, Tensor scores, float iou_threshold, int top) -> Tensor",
)
torch.library.register_fake("yolo_lightning::nms_rows", _no_rows)


def nms_rows(boxes_xyxy: Tensor, scores: Tensor, iou_threshold: float, top: int) -> Tensor:
    """Return the rows that non-maximum suppression keeps, int64 (B, top), -1 as padding.

    Rows are sorted by descending score, equal scores by ascending row. Boxes (B, N, 4) with a score
    (B, N) of 0 are ignored. Only operators of torch: files load without this package.
    """
    # each step keeps one box per image

    def condition(step: Tensor, scores: Tensor, rows: Tensor) -> Tensor:
        return (step < top) & (scores > 0).any()

    def keep_best(step: Tensor, scores: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        best = scores.argmax(dim=1, keepdim=True)  # (B, 1), the first of equal scores
        is_current = torch.arange(top, device=rows.device) == step
        rows = torch.where(is_current & (scores.gather(1, best) > 0), best, rows)
        box = boxes_xyxy.gather(1, best[:, :, None].expand(-1, -1, 4))
        suppressed = pairwise_iou(box, boxes_xyxy).squeeze(1) > iou_threshold
        return step + 1, scores.masked_fill(suppressed.scatter(1, best, True), 0.0), rows

    rows = torch.full((scores.shape[0], top), -1, device=scores.device)
    start = torch.zeros((), dtype=torch.int64, device=scores.device)
    kept: Tensor = while_loop(condition, keep_best, (start, scores, rows))[2]
    return kept


class DetectorGraph(nn.Module):
    """`DetectorModule.detect_most_specific` with outputs of fixed shapes.

    The network is copied; `nms` is `nms_rows`, or the operator of that name for ONNX.
    """

    score_threshold: Tensor

    def __init__(
        self,
        network: YOLOv2,
        tree: WordTree,
        settings: GraphSettings,
        nms: Callable[[Tensor, Tensor, float, int], Tensor],
    ) -> None:
        super().__init__()
        self.network, self.settings, self.nms = _traceable(network), settings, nms
        self.descent = TreeDescent(tree, settings.tree_threshold)
        # a buffer keeps its name in the files, where `compare` changes its value; ONNX export
        # merges equal constants, so the value must be unique: the next larger float
        threshold = torch.tensor(float(settings.score_threshold))
        unique = torch.nextafter(threshold, torch.tensor(torch.inf))
        self.register_buffer(SCORE_THRESHOLD, unique)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, sizes_hw_orig: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best boxes of each image, by descending score.

        Images are RGB (B, 3, H, W), resized, with H and W multiples of the stride, of the type
        `GraphSettings.images_dtype`;
        sizes_hw_orig are int64 (B, 2), px of the original images.

        Returns:
            boxes_xyxy_orig_px, float (B, top, 4); scores, float (B, top), objectness x P(node);
            nodes, int64 (B, top). Padding is 0, 0, and -1.
        """
        # makes all later symbolic shapes multiples of the number of cells
        stride = self.network.stride
        height, width = (side // stride * stride for side in images.shape[2:])
        images = images.narrow(2, 0, height).narrow(3, 0, width)
        output = self.network(images if images.is_floating_point() else images.float() / 255)
        objectness = output.box_logits[:, :, 4].sigmoid().flatten(2)  # (B, A, G)
        boxes = decode_boxes(output.box_logits, self.network.anchors_wh_cell, output.location)
        boxes = boxes.flatten(3).transpose(2, 3).flatten(1, 2)  # (B, A * G, 4)
        if self.settings.resize == "letterbox":
            boxes = unletterbox_each(boxes, sizes_hw_orig, height, width)
        limits = sizes_hw_orig.flip(1).repeat(1, 2)[:, None].float()  # (B, 1, 4): w, h, w, h
        boxes = torch.minimum((cxcywh_to_xyxy(boxes) * limits).clamp(min=0), limits)
        nodes, scores = self._label_boxes(objectness, output.class_logits)
        rows = self.nms(boxes, scores, self.settings.iou_threshold, self.settings.top)
        is_box, index = rows >= 0, rows.clamp(min=0)
        kept_boxes = boxes.gather(1, index[:, :, None].expand(-1, -1, 4))
        return (
            torch.where(is_box[:, :, None], kept_boxes, 0.0),
            torch.where(is_box, scores.gather(1, index), 0.0),
            torch.where(is_box, nodes.gather(1, index), -1),
        )

    def _label_boxes(self, objectness: Tensor, classes: SparseClassLogits) -> tuple[Tensor, Tensor]:
        """Return nodes and scores (B, A * G) of objectness (B, A, G); 0 below the threshold."""
        batch, anchors, cells = objectness.shape
        features = classes.features.flatten(2).transpose(1, 2).flatten(0, 1)  # (B * G, C)
        flat = objectness.transpose(0, 1).flatten()  # (A * B * G,), anchor by anchor
        indices, logits = [], []
        for anchor, (weight, bias) in enumerate(zip(classes.weight, classes.bias, strict=True)):
            is_candidate = objectness[:, anchor].flatten() > self.score_threshold
            cell = is_candidate.nonzero().flatten()
            logits.append(F.linear(features.index_select(0, cell), weight, bias))
            indices.append(cell + anchor * batch * cells)
        index = torch.cat(indices)
        node, prob = self.descent(torch.cat(logits))
        score = flat.index_select(0, index) * prob
        score = torch.where(score > self.score_threshold, score, 0.0)
        nodes = torch.zeros_like(flat, dtype=torch.int64).scatter(0, index, node)
        scores = torch.zeros_like(flat).scatter(0, index, score)
        shape = (anchors, batch, cells)
        return (
            nodes.reshape(shape).transpose(0, 1).flatten(1),
            scores.reshape(shape).transpose(0, 1).flatten(1),
        )


def unletterbox_each(
    boxes_cxcywh_norm: Tensor, sizes_hw_orig: Tensor, height: int, width: int
) -> Tensor:
    """Apply `boxes.unletterbox` to boxes (B, N, 4) of images of different sizes (B, 2)."""
    old_height, old_width = sizes_hw_orig.unbind(1)
    fills_width = width * old_height < height * old_width
    fitting = (old_height * width // old_width).clamp(min=1)
    new_height = torch.where(fills_width, fitting, torch.full_like(old_height, height))
    fitting = (old_width * height // old_height).clamp(min=1)
    new_width = torch.where(fills_width, torch.full_like(old_width, width), fitting)
    left, top = (width - new_width) // 2, (height - new_height) // 2
    margins = torch.stack([left / width, top / height], dim=1)
    scale = torch.stack([width / new_width, height / new_height], dim=1).repeat(1, 2)
    offset = torch.cat([margins, torch.zeros_like(margins)], dim=1)
    return (boxes_cxcywh_norm - offset[:, None]) * scale[:, None]


class _DarknetReorg(nn.Module):
    """`Reorg` of the kind `darknet`, with operations that support dynamic sizes."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, features: Tensor) -> Tensor:
        s = self.stride
        height, width = features.shape[2] // s, features.shape[3] // s
        parts = features.unflatten(2, (-1, s)).unflatten(1, (-1, s * s))
        folded = space_to_depth(parts.flatten(4, 5).flatten(2, 3), s)  # (B, C, H, W)
        regrouped: Tensor = folded.flatten(2).unflatten(2, (s * s, height, width))
        return regrouped.flatten(1, 2)


def _traceable(network: YOLOv2) -> YOLOv2:
    """Return a copy that can be traced with dynamic image sizes."""
    traceable = copy.deepcopy(network).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for number, layer in enumerate(traceable.body.layers):
        if isinstance(layer, Reorg) and layer.kind == "darknet":
            traceable.body[number] = _DarknetReorg(layer.stride)
    assert isinstance(traceable, YOLOv2)
    return traceable


def trace(graph: DetectorGraph) -> ExportedProgram:
    """Trace the graph for any batch size and image sizes of at least two cells per side."""
    stride = graph.network.stride
    batch, rows, columns = Dim("batch", min=1), Dim("rows", min=2), Dim("columns", min=2)
    dtype = graph.settings.images_dtype
    example = torch.zeros(2, 3, 2 * stride, 3 * stride, dtype=dtype)
    sizes = torch.tensor([[stride, 2 * stride], [2 * stride, stride]])
    program = torch.export.export(
        graph,
        (example, sizes),
        dynamic_shapes={
            "images": {0: batch, 2: stride * rows, 3: stride * columns},
            "sizes_hw_orig": {0: batch},
        },
    )
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else []:
            node.meta.pop("stack_trace", None)  # contains paths of this machine
    return program


def write_torch(
    network: YOLOv2, tree: WordTree, settings: GraphSettings, path: Path, metadata: dict[str, Any]
) -> None:
    """Write a file for `torch.export.load`, with the metadata as JSON in `METADATA_FILE`."""
    program = trace(DetectorGraph(network, tree, settings, nms_rows))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, path, extra_files={METADATA_FILE: json.dumps(metadata)})


def write_onnx(
    network: YOLOv2, tree: WordTree, settings: GraphSettings, path: Path, metadata: dict[str, Any]
) -> None:
    """Write a single ONNX file, with each value of the metadata as JSON."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    nms = torch.ops.yolo_lightning.nms_rows.default
    program = trace(DetectorGraph(network, tree, settings, nms))
    # hide a warning that torchvision is missing; it is not used
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=INPUTS,
            output_names=OUTPUTS,
            dynamic_shapes={
                "images": {0: "batch", 2: "height", 3: "width"},
                "sizes_hw_orig": {0: "batch"},
            },
            custom_translation_table={nms: _onnx_nms},
        )
    assert exported is not None
    ClearMetadataAndDocStringPass()(exported.model)  # contains paths of this machine
    for key, value in metadata.items():
        exported.model.metadata_props[key] = json.dumps(value)
    exported.save(path, external_data=False)


def _onnx_nms(boxes: Any, scores: Any, iou_threshold: float, top: int) -> Any:
    """Translate `nms_rows` to ONNX; the order of the axes of the corners does not matter."""
    from onnxscript import opset18 as op

    def integers(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    picked = op.NonMaxSuppression(
        boxes,
        op.Unsqueeze(scores, integers(1)),
        integers(top),
        op.Constant(value_floats=[iou_threshold]),
        op.Constant(value_floats=[0.0]),
    )  # (n, 3): image, class, row
    positions = op.Gather(picked, integers(0, 2), axis=1)
    # the operator does not sort its output, and may return fewer than `top` rows
    kept = op.ScatterND(op.Mul(scores, 0.0), positions, op.GatherND(scores, positions))
    values, rows = op.TopK(op.Pad(kept, integers(0, 0, 0, top)), integers(top), axis=1)
    return op.Where(op.Greater(values, 0.0), rows, integers(-1))
