"""The detector as one graph, from pixels to boxes, scores and nodes, and the files it goes into."""

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

from yolo_lightning.boxes import batched_nms, cxcywh_to_xyxy, pairwise_iou
from yolo_lightning.images import Resize
from yolo_lightning.models.head import SparseClassLogits, decode_boxes
from yolo_lightning.models.layers import Reorg
from yolo_lightning.models.networks import YOLOv2, space_to_depth
from yolo_lightning.tree.wordtree import WordTree

INPUTS = ("images", "sizes_hw_orig")
OUTPUTS = ("boxes_xyxy_orig_px", "scores", "nodes")

METADATA_FILE = "metadata.json"
"""What a `.pt2` file calls its metadata, among its extra files."""

SCORE_THRESHOLD = "score_threshold"
"""What both kinds of files call the threshold: ONNX's an initializer, torch's a buffer."""


@dataclass(frozen=True)
class GraphSettings:
    """What is settled when a graph is made.

    Attributes:
        resize: how images are fitted into the network input.
        score_threshold: 0…1, of objectness x P(node).
        tree_threshold: 0…1, of P(node), down to which the tree is descended.
        iou_threshold: 0…1, of non-maximum suppression.
        top: rows given for each image, 1 or more.
    """

    resize: Resize = "letterbox"
    score_threshold: float = 0.25
    tree_threshold: float = 0.5
    iou_threshold: float = 0.45
    top: int = 100


class TreeDescent(nn.Module):
    """`WordTree.most_specific` in as many steps as the tree has levels, whatever the logits say.

    Args:
        tree: the classes.
        threshold: 0…1, of P(node); the top level is always entered.
    """

    members: Tensor
    group_below: Tensor

    def __init__(self, tree: WordTree, threshold: float) -> None:
        super().__init__()
        self.levels = tree.paths.shape[1]
        self.log_threshold = math.log(threshold) if threshold > 0 else -math.inf
        sizes = torch.bincount(tree.groups).tolist()
        groups = list(tree.groups.argsort(stable=True).split(sizes))
        group_below = torch.full((len(tree) + 1,), -1)
        group_below[tree.parents] = tree.groups  # index -1: the top's
        self.top = int(group_below[-1])
        # (groups, largest size): the nodes of each, -1 as padding
        self.register_buffer("members", nn.utils.rnn.pad_sequence(groups, True, -1))
        self.register_buffer("group_below", group_below)

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return nodes, int64 (M,), and their absolute probabilities, float (M,).

        Args:
            logits: float (M, K).
        """
        total = logits.new_zeros(logits.shape[0])
        node = torch.full_like(total, -1, dtype=torch.int64)
        group = torch.full_like(node, self.top)
        active = torch.ones_like(node, dtype=torch.bool)
        for level in range(self.levels):
            siblings = self.members[group]
            picked = logits.gather(1, siblings.clamp(min=0)).masked_fill(siblings < 0, -torch.inf)
            best, place = picked.log_softmax(dim=1).max(dim=1)
            child = siblings.gather(1, place[:, None]).squeeze(1)
            below = total + best
            if level:
                active = active & (below >= self.log_threshold)
            node, total = torch.where(active, child, node), torch.where(active, below, total)
            group = self.group_below[child]
            active = active & (group >= 0)
            group = group.clamp(min=0)
        return node, total.exp()


@torch.library.custom_op("yolo_lightning::suppressed", mutates_args=())
def suppressed(boxes_xyxy: Tensor, scores: Tensor, iou_threshold: float, top: int) -> Tensor:
    """Return the rows kept by non-maximum suppression, int64 (B, top), -1 as padding.

    One operator, which `write_onnx` turns into ONNX's own.

    Args:
        boxes_xyxy: float (B, N, 4), any one unit.
        scores: float (B, N); rows of 0 take no part.
        iou_threshold: 0…1; a box goes where a kept one of higher score overlaps it by more.
        top: rows given for each image, by descending score; equal scores by ascending row.
    """
    rows = torch.full((scores.shape[0], top), -1, device=scores.device)
    for k, (boxes, score) in enumerate(zip(boxes_xyxy, scores, strict=True)):
        asked = (score > 0).nonzero().flatten()
        kept = batched_nms(boxes[asked], score[asked], torch.zeros_like(asked), iou_threshold)
        rows[k, : len(kept)] = asked[kept][:top]
    return rows


@suppressed.register_fake
def _(boxes_xyxy: Tensor, scores: Tensor, iou_threshold: float, top: int) -> Tensor:
    return scores.new_empty((scores.shape[0], top), dtype=torch.int64)


def suppressed_in_turn(
    boxes_xyxy: Tensor, scores: Tensor, iou_threshold: float, top: int
) -> Tensor:
    """Return what `suppressed` does by torch's own operators, one box an image at each step.

    A file that holds these needs nothing but torch to be loaded.
    """

    def unsettled(step: Tensor, scores: Tensor, rows: Tensor) -> Tensor:
        return (step < top) & (scores > 0).any()

    def settle(step: Tensor, scores: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        best = scores.argmax(dim=1, keepdim=True)  # (B, 1), of equal ones the first
        now = torch.arange(top, device=rows.device) == step
        rows = torch.where(now & (scores.gather(1, best) > 0), best, rows)
        box = boxes_xyxy.gather(1, best[:, :, None].expand(-1, -1, 4))
        gone = pairwise_iou(box, boxes_xyxy).squeeze(1) > iou_threshold
        return step + 1, scores.masked_fill(gone.scatter(1, best, True), 0.0), rows

    rows = torch.full((scores.shape[0], top), -1, device=scores.device)
    start = torch.zeros((), dtype=torch.int64, device=scores.device)
    settled: Tensor = while_loop(unsettled, settle, (start, scores, rows))[2]
    return settled


class DetectorGraph(nn.Module):
    """What `DetectorModule.describe` does, with outputs of fixed shapes.

    Args:
        network: gives boxes, objectness and class logits; a copy of it is kept.
        tree: the classes.
        settings: thresholds, and how images are fitted.
        suppress: `suppressed` or `suppressed_in_turn`.
    """

    score_threshold: Tensor

    def __init__(
        self,
        network: YOLOv2,
        tree: WordTree,
        settings: GraphSettings,
        suppress: Callable[[Tensor, Tensor, float, int], Tensor],
    ) -> None:
        super().__init__()
        self.network, self.settings, self.suppress = _traceable(network), settings, suppress
        self.descent = TreeDescent(tree, settings.tree_threshold)
        # a buffer, not a number: it keeps its name in the files, where it can be lowered
        # a float of its own, one step up: equal constants of a graph become one, and the check of
        # an export changes this one alone
        threshold = torch.tensor(float(settings.score_threshold))
        own = torch.nextafter(threshold, torch.tensor(torch.inf))
        self.register_buffer(SCORE_THRESHOLD, own)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, sizes_hw_orig: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best boxes of each image, by descending score.

        Args:
            images: uint8 (B, 3, H, W), RGB, fitted; H and W multiples of the stride.
            sizes_hw_orig: int64 (B, 2), px of the original images; H and W where boxes are asked
                for in px of the network input.

        Returns:
            boxes_xyxy_orig_px, float (B, top, 4); scores, float (B, top), objectness x P(node);
            nodes, int64 (B, top). Rows that no box fills are 0, 0, and -1.
        """
        # said so, every later shape is a plain multiple of the cells'
        stride = self.network.stride
        height, width = (side // stride * stride for side in images.shape[2:])
        images = images.narrow(2, 0, height).narrow(3, 0, width)
        output = self.network(images.float() / 255)
        objectness = output.box_logits[:, :, 4].sigmoid().flatten(2)  # (B, A, G)
        boxes = decode_boxes(output.box_logits, self.network.anchors_wh_cell)
        boxes = boxes.flatten(3).transpose(2, 3).flatten(1, 2)  # (B, A * G, 4)
        if self.settings.resize == "letterbox":
            boxes = unletterbox_each(boxes, sizes_hw_orig, height, width)
        limits = sizes_hw_orig.flip(1).repeat(1, 2)[:, None].float()  # width, height, both again
        boxes = torch.minimum((cxcywh_to_xyxy(boxes) * limits).clamp(min=0), limits)
        nodes, scores = self._named(objectness, output.class_logits)
        rows = self.suppress(boxes, scores, self.settings.iou_threshold, self.settings.top)
        found, at = rows >= 0, rows.clamp(min=0)
        chosen = boxes.gather(1, at[:, :, None].expand(-1, -1, 4))
        return (
            torch.where(found[:, :, None], chosen, 0.0),
            torch.where(found, scores.gather(1, at), 0.0),
            torch.where(found, nodes.gather(1, at), -1),
        )

    def _named(self, objectness: Tensor, classes: SparseClassLogits) -> tuple[Tensor, Tensor]:
        """Return nodes and scores (B, A * G) of objectness (B, A, G); 0 up to the threshold.

        Class logits are computed for boxes whose objectness, which bounds the score, passes it.
        """
        batch, anchors, cells = objectness.shape
        features = classes.features.flatten(2).transpose(1, 2).flatten(0, 1)  # (B * G, C)
        flat = objectness.transpose(0, 1).flatten()  # (A * B * G,), anchor by anchor
        places, logits = [], []
        for anchor, (weight, bias) in enumerate(zip(classes.weight, classes.bias, strict=True)):
            sure = objectness[:, anchor].flatten() > self.score_threshold
            cell = sure.nonzero().flatten()
            logits.append(F.linear(features.index_select(0, cell), weight, bias))
            places.append(cell + anchor * batch * cells)
        place = torch.cat(places)
        found, probs = self.descent(torch.cat(logits))
        score = flat.index_select(0, place) * probs
        score = torch.where(score > self.score_threshold, score, 0.0)
        nodes = torch.zeros_like(flat, dtype=torch.int64).scatter(0, place, found)
        scores = torch.zeros_like(flat).scatter(0, place, score)
        shape = (anchors, batch, cells)
        return (
            nodes.reshape(shape).transpose(0, 1).flatten(1),
            scores.reshape(shape).transpose(0, 1).flatten(1),
        )


def unletterbox_each(
    boxes_cxcywh_norm: Tensor, sizes_hw_orig: Tensor, height: int, width: int
) -> Tensor:
    """Return what `boxes.unletterbox` does for one size, for a size an image.

    Args:
        boxes_cxcywh_norm: float (B, N, 4), 0…1 of the network input.
        sizes_hw_orig: int64 (B, 2), px.
        height: of the network input, px.
        width: of the network input, px.
    """
    old_height, old_width = sizes_hw_orig.unbind(1)
    wide = width * old_height < height * old_width  # the width is what fills the input
    fitting = (old_height * width // old_width).clamp(min=1)
    new_height = torch.where(wide, fitting, torch.full_like(old_height, height))
    fitting = (old_width * height // old_height).clamp(min=1)
    new_width = torch.where(wide, torch.full_like(old_width, width), fitting)
    left, top = (width - new_width) // 2, (height - new_height) // 2
    margins = torch.stack([left / width, top / height], dim=1)
    scale = torch.stack([width / new_width, height / new_height], dim=1).repeat(1, 2)
    offset = torch.cat([margins, torch.zeros_like(margins)], dim=1)
    return (boxes_cxcywh_norm - offset[:, None]) * scale[:, None]


class _DarknetReorg(nn.Module):
    """`Reorg` of the kind `darknet`, in steps that hold for every size at once."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, C * stride², H / stride, W / stride)."""
        s = self.stride
        height, width = features.shape[2] // s, features.shape[3] // s
        parts = features.unflatten(2, (-1, s)).unflatten(1, (-1, s * s))
        folded = space_to_depth(parts.flatten(4, 5).flatten(2, 3), s)  # (B, C, H, W)
        regrouped: Tensor = folded.flatten(2).unflatten(2, (s * s, height, width))
        return regrouped.flatten(1, 2)


def _traceable(network: YOLOv2) -> YOLOv2:
    """Return a copy that can be traced without settling on the size of the traced image."""
    traceable = copy.deepcopy(network).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for number, layer in enumerate(traceable.body.layers):
        if isinstance(layer, Reorg) and layer.kind == "darknet":
            traceable.body[number] = _DarknetReorg(layer.stride)
    assert isinstance(traceable, YOLOv2)
    return traceable


def traced(graph: DetectorGraph) -> ExportedProgram:
    """Return the graph as torch.export sees it: any batch, any size from two cells a side."""
    stride = graph.network.stride
    batch, rows, columns = Dim("batch", min=1), Dim("rows", min=2), Dim("columns", min=2)
    example = torch.zeros(2, 3, 2 * stride, 3 * stride, dtype=torch.uint8)
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
            node.meta.pop("stack_trace", None)  # names files of this machine
    return program


def write_torch(
    network: YOLOv2, tree: WordTree, settings: GraphSettings, path: Path, metadata: dict[str, Any]
) -> None:
    """Write the graph for `torch.export.load`, which needs nothing of this package.

    Args:
        network: gives boxes, objectness and class logits.
        tree: the classes.
        settings: thresholds, and how images are fitted.
        path: of the file.
        metadata: plain values, kept as JSON in `METADATA_FILE` among the extra files.
    """
    program = traced(DetectorGraph(network, tree, settings, suppressed_in_turn))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, path, extra_files={METADATA_FILE: json.dumps(metadata)})


def write_onnx(
    network: YOLOv2, tree: WordTree, settings: GraphSettings, path: Path, metadata: dict[str, Any]
) -> None:
    """Write the graph as ONNX: a single file, suppression by its own `NonMaxSuppression`.

    Args:
        network: gives boxes, objectness and class logits.
        tree: the classes.
        settings: thresholds, and how images are fitted.
        path: of the file.
        metadata: plain values, each kept as JSON under its key.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    program = traced(DetectorGraph(network, tree, settings, suppressed))
    # it tells that torchvision is missing, which nothing here uses
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
            custom_translation_table={torch.ops.yolo_lightning.suppressed.default: _onnx_nms},
        )
    assert exported is not None
    ClearMetadataAndDocStringPass()(exported.model)  # it names files of this machine
    for key, value in metadata.items():
        exported.model.metadata_props[key] = json.dumps(value)
    exported.save(path, external_data=False)


def _onnx_nms(boxes: Any, scores: Any, iou_threshold: float, top: int) -> Any:
    """Return `suppressed` in ONNX; corners may come in any order of the axes."""
    from onnxscript import opset18 as op

    def whole(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    picked = op.NonMaxSuppression(
        boxes,
        op.Unsqueeze(scores, whole(1)),
        whole(top),
        op.Constant(value_floats=[iou_threshold]),
        op.Constant(value_floats=[0.0]),
    )  # (n, 3): image, class, row
    places = op.Gather(picked, whole(0, 2), axis=1)
    # the operator promises no order, and there may be fewer rows than are to be given
    kept = op.ScatterND(op.Mul(scores, 0.0), places, op.GatherND(scores, places))
    values, rows = op.TopK(op.Pad(kept, whole(0, 0, 0, top)), whole(top), axis=1)
    return op.Where(op.Greater(values, 0.0), rows, whole(-1))
