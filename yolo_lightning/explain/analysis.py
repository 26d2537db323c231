"""Explanation of the loss of one image: responsible boxes, targets, and terms."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from yolo_lightning.batches import ClassificationBatch, DetectionBatch
from yolo_lightning.boxes import cxcywh_to_xyxy, pairwise_iou, shape_iou
from yolo_lightning.losses import (
    LARGEST_MIN_OBJECTNESS,
    Assignment,
    BoxSelection,
    LossSettings,
    assign_objects,
    loss_coord,
    loss_obj,
    select_boxes,
    yolo9000_loss,
)
from yolo_lightning.models.head import HeadOutput, decode_boxes
from yolo_lightning.tree.wordtree import WordTree

TERMS = ("loss_coord", "loss_obj", "loss_noobj", "loss_class", "loss_anchor_prior")
MAX_CANDIDATES, MAX_FALSE_POSITIVES = 5, 3
FALSE_POSITIVE_OBJECTNESS = 0.3
"""Objectness above which a box without an object is listed: an error, or a missing label."""

Corners = tuple[float, float, float, float]
"""x1, y1, x2, y2, 0…1 of the network input."""


@dataclass(frozen=True)
class PredictedBox:
    """One box of the network."""

    anchor: int  # from 0, as row and column
    row: int
    column: int
    xyxy_norm: Corners  # not clipped
    objectness: float  # 0…1


@dataclass(frozen=True)
class PathNode:
    """A node on the path from the top of the tree to a label."""

    name: str
    conditional_prob: float  # P(node | parent)
    prob: float  # P(node), the product of the conditional probabilities down to this node
    best_sibling: tuple[str, float] | None  # name and P(sibling | parent) of a more probable one


@dataclass(frozen=True)
class ObjectExplanation:
    """The loss of one object with a box."""

    name: str
    target_xyxy_norm: Corners
    box: PredictedBox  # the responsible one
    shape_ious: tuple[float, ...]  # of target and anchors, both centred; the largest is responsible
    iou: float  # of box and target
    objectness_target: float
    path: tuple[PathNode, ...]
    terms: Mapping[str, float]  # its part of the terms of the image; empty if overridden
    overridden_by: int | None  # index of a later object with the same box, which alone counts


@dataclass(frozen=True)
class FalsePositive:
    """A box with a high objectness and no object."""

    box: PredictedBox
    iou: float  # with the nearest target; if it is small, a label may be missing
    loss: float  # its part of loss_noobj


@dataclass(frozen=True)
class BoxLossExplanation:
    """The loss of an image with boxes; `terms` as in `yolo9000_loss`."""

    grid_hw: tuple[int, int]
    anchors_wh_norm: tuple[tuple[float, float], ...]
    objects: tuple[ObjectExplanation, ...]
    terms: Mapping[str, float]
    num_negatives: int  # boxes with a no-object loss
    num_ignored: int  # boxes without an object, with too high an IoU for a no-object loss
    false_positives: tuple[FalsePositive, ...]  # the negatives with the highest objectness


@dataclass(frozen=True)
class Candidate:
    """A box that may be selected for an image label."""

    box: PredictedBox
    prob_node: float  # P(node that the rule uses), 1 if it uses none
    prob_label: float  # P(image label)
    score: float  # by which the rule ranks


@dataclass(frozen=True)
class LabelLossExplanation:
    """The loss of an image with an image label; `terms` as in `yolo9000_loss`."""

    grid_hw: tuple[int, int]
    anchors_wh_norm: tuple[tuple[float, float], ...]
    name: str
    rule: BoxSelection
    node: str | None  # name of the node that the rule uses
    any_above_min: bool  # whether any objectness is high enough for the rule `largest`
    candidates: tuple[Candidate, ...]  # the selected box, then the next best
    other_rules: Mapping[BoxSelection, PredictedBox]  # the boxes that they would select
    objectness_target: float | None  # lower bound for the selected box; None without such a loss
    path: tuple[PathNode, ...]  # at the selected box
    terms: Mapping[str, float]
    num_negatives: int  # boxes with a no-object loss


class _DecodedBoxes:
    """All boxes of one image: `xyxy_norm` (A, G, 4), `objectness` (A, G)."""

    def __init__(self, output: HeadOutput, anchors_wh_cell: Tensor) -> None:
        logits = output.box_logits.float()
        self.grid_hw = (logits.shape[-2], logits.shape[-1])
        decoded = decode_boxes(logits, anchors_wh_cell).flatten(3)[0]  # (A, 4, G)
        self.xyxy_norm = cxcywh_to_xyxy(decoded.transpose(1, 2))
        self.objectness = logits[0, :, 4].sigmoid().flatten(1)
        grid_wh = anchors_wh_cell.new_tensor([self.grid_hw[1], self.grid_hw[0]])
        self.anchors_wh_norm = anchors_wh_cell / grid_wh

    def box(self, anchor: int, cell: int) -> PredictedBox:
        row, column = divmod(cell, self.grid_hw[1])
        objectness = float(self.objectness[anchor, cell])
        return PredictedBox(anchor, row, column, _corners(self.xyxy_norm[anchor, cell]), objectness)

    def anchors(self) -> tuple[tuple[float, float], ...]:
        return tuple((float(w), float(h)) for w, h in self.anchors_wh_norm)


def _corners(xyxy: Tensor) -> Corners:
    x1, y1, x2, y2 = xyxy.tolist()
    return x1, y1, x2, y2


def path_to(logits: Tensor, label: int, tree: WordTree) -> tuple[PathNode, ...]:
    """Return the path from the top of the tree to a label, given class logits (K,) of a box."""
    conditional, log_probs = tree.log_softmax(logits[None])[0], tree.log_probs(logits[None])[0]
    path = []
    for node in reversed([n for n in tree.paths[label].tolist() if n >= 0]):
        siblings = (tree.groups == tree.groups[node]).nonzero().flatten()
        best = int(siblings[conditional[siblings].argmax()])
        best_sibling = None if best == node else (tree.names[best], float(conditional[best].exp()))
        probs = float(conditional[node].exp()), float(log_probs[node].exp())
        path.append(PathNode(tree.names[node], *probs, best_sibling))
    return tuple(path)


@torch.no_grad()
def explain_boxes(
    output: HeadOutput,
    batch: DetectionBatch,
    anchors_wh_cell: Tensor,
    tree: WordTree,
    settings: LossSettings,
) -> BoxLossExplanation:
    """Explain the loss of a batch of one image with boxes; anchors are float (A, 2), in cells."""
    boxes = _DecodedBoxes(output, anchors_wh_cell)
    no_ancestors = torch.full((len(tree),), -1)
    terms = yolo9000_loss(output, batch, anchors_wh_cell, tree, no_ancestors, settings)
    assignments = _assign_each(batch, anchors_wh_cell, boxes.grid_hw)
    keys = [(int(one.anchor), int(one.cell)) for one in assignments]
    last_object = {key: k for k, key in enumerate(keys)}  # of equals, the last one counts
    without_object = torch.ones_like(boxes.objectness, dtype=torch.bool)
    for key in keys:
        without_object[key] = False
    targets = cxcywh_to_xyxy(batch.boxes_cxcywh_norm[0, batch.labels[0] >= 0])
    # (A, G); a zero box allows images without objects
    iou = pairwise_iou(boxes.xyxy_norm, torch.cat([targets, targets.new_zeros(1, 4)])).amax(dim=2)
    near = iou > settings.ignore_iou
    return BoxLossExplanation(
        boxes.grid_hw,
        boxes.anchors(),
        tuple(
            _explain_object(
                output, assignment, boxes, anchors_wh_cell, tree, settings,
                None if last_object[key] == k else last_object[key],
            )
            for k, (assignment, key) in enumerate(zip(assignments, keys, strict=True))
        ),
        {name: float(value) for name, value in terms.items()},
        int((without_object & ~near).sum()),
        int((without_object & near).sum()),
        _false_positives(boxes, without_object & ~near, iou, settings.noobj_scale),
    )  # fmt: skip


def _assign_each(
    batch: DetectionBatch, anchors_wh_cell: Tensor, grid_hw: tuple[int, int]
) -> list[Assignment]:
    """Return the assignment of each object without the other objects."""
    indices = (batch.labels[0] >= 0).nonzero().flatten().tolist()
    boxes, labels = batch.boxes_cxcywh_norm, batch.labels
    return [
        assign_objects(boxes[:, k : k + 1], labels[:, k : k + 1], anchors_wh_cell, grid_hw)
        for k in indices
    ]


def _explain_object(
    output: HeadOutput,
    assignment: Assignment,
    boxes: _DecodedBoxes,
    anchors_wh_cell: Tensor,
    tree: WordTree,
    settings: LossSettings,
    overridden_by: int | None,
) -> ObjectExplanation:
    box_logits, label = output.box_logits.float(), int(assignment.labels)
    target = cxcywh_to_xyxy(assignment.boxes_cxcywh_norm)
    iou = pairwise_iou(boxes.xyxy_norm[assignment.anchor, assignment.cell], target)[0]  # (1,)
    objectness_target = iou if settings.rescore else torch.ones_like(iou)
    logits = output.class_logits.gather_boxes(
        assignment.image, assignment.anchor, assignment.cell
    ).float()
    coord = loss_coord(box_logits, assignment, anchors_wh_cell)
    obj = loss_obj(box_logits[:, :, 4], assignment, objectness_target)
    class_loss = tree.path_loss(logits, assignment.labels).sum()
    terms = {
        "loss_coord": settings.coord_scale * float(coord),
        "loss_obj": settings.obj_scale * float(obj),
        "loss_class": settings.class_scale * float(class_loss),
    }
    shape_ious = shape_iou(assignment.boxes_cxcywh_norm[:, 2:], boxes.anchors_wh_norm)[0]
    return ObjectExplanation(
        tree.names[label],
        _corners(target[0]),
        boxes.box(int(assignment.anchor), int(assignment.cell)),
        tuple(shape_ious.tolist()),
        float(iou),
        float(objectness_target),
        path_to(logits[0], label, tree),
        terms if overridden_by is None else {},
        overridden_by,
    )


def _false_positives(
    boxes: _DecodedBoxes, is_negative: Tensor, iou: Tensor, scale: float
) -> tuple[FalsePositive, ...]:
    objectness = boxes.objectness * is_negative
    values, indices = objectness.flatten().topk(min(MAX_FALSE_POSITIVES, objectness.numel()))
    found = [
        (value, divmod(index, objectness.shape[1]))
        for value, index in zip(values.tolist(), indices.tolist(), strict=True)
        if value > FALSE_POSITIVE_OBJECTNESS
    ]
    return tuple(
        FalsePositive(boxes.box(*key), float(iou[key]), scale * 0.5 * value**2)
        for value, key in found
    )


@torch.no_grad()
def explain_label(
    output: HeadOutput,
    batch: ClassificationBatch,
    anchors_wh_cell: Tensor,
    tree: WordTree,
    boxed_ancestors: Tensor,
    settings: LossSettings,
) -> LabelLossExplanation:
    """Explain the loss of a batch of one image with an image label; see `yolo9000_loss`.

    `boxed_ancestors`, int64 (K,), holds each node's deepest ancestor or self on the path to a class
    with boxes, or -1.
    """
    boxes, label = _DecodedBoxes(output, anchors_wh_cell), int(batch.labels)
    rule = settings.box_selection
    terms = yolo9000_loss(output, batch, anchors_wh_cell, tree, boxed_ancestors, settings)
    selected: dict[BoxSelection, tuple[int, int]] = {}
    for name in get_args(BoxSelection):
        anchor, cell = select_boxes(
            output, batch.labels, anchors_wh_cell, tree, boxed_ancestors, name
        )
        selected[name] = int(anchor), int(cell)
    node = {"boxed_ancestor": int(boxed_ancestors[label]), "label": label}.get(rule, -1)
    logits = _class_logits(output, torch.tensor([selected[rule]]))[0]
    return LabelLossExplanation(
        boxes.grid_hw,
        boxes.anchors(),
        tree.names[label],
        rule,
        tree.names[node] if node >= 0 else None,
        bool((boxes.objectness > LARGEST_MIN_OBJECTNESS).any()),
        _candidates(output, boxes, tree, label, node, rule, selected[rule]),
        {name: boxes.box(*key) for name, key in selected.items() if name != rule},
        0.3 if settings.objectness_rule == "paper" else None,
        path_to(logits, label, tree),
        {name: float(value) for name, value in terms.items()},
        boxes.objectness.numel() - 1,
    )


def _class_logits(output: HeadOutput, keys: Tensor) -> Tensor:
    """Return class logits (M, K) of boxes of one image, given anchor and cell, int64 (M, 2)."""
    image = torch.zeros_like(keys[:, 0])
    return output.class_logits.gather_boxes(image, keys[:, 0], keys[:, 1]).float()


def _candidates(
    output: HeadOutput,
    boxes: _DecodedBoxes,
    tree: WordTree,
    label: int,
    node: int,
    rule: BoxSelection,
    selected: tuple[int, int],
) -> tuple[Candidate, ...]:
    """Return the selected box and the next best by the score of the rule."""
    objectness = boxes.objectness
    keys = torch.ones_like(objectness).nonzero()  # (A * G, 2)
    log_probs = tree.log_probs(_class_logits(output, keys))  # (A * G, K)
    prob_label = log_probs[:, label].view_as(objectness).exp()
    log_prob_node = log_probs[:, node].view_as(objectness) if node >= 0 else 0 * objectness
    if rule == "largest":
        size = boxes.xyxy_norm[..., 2:] - boxes.xyxy_norm[..., :2]
        is_allowed = objectness > LARGEST_MIN_OBJECTNESS
        area = size.prod(dim=-1).clamp(max=1) * is_allowed
        log_score = (area if bool(is_allowed.any()) else objectness).log()
    else:
        log_score = objectness.log() + log_prob_node
    order = log_score.flatten().argsort(descending=True)
    ranked = keys[order[log_score.flatten()[order].isfinite()]].tolist()
    best = [selected, *((anchor, cell) for anchor, cell in ranked if (anchor, cell) != selected)]
    return tuple(
        Candidate(
            boxes.box(*key),
            float(log_prob_node[key].exp()),
            float(prob_label[key]),
            float(log_score[key].exp()),
        )
        for key in best[:MAX_CANDIDATES]
    )
