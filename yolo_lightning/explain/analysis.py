"""Explanation of the loss of one image: responsible boxes, targets, and terms."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from yolo_lightning.batches import ClassificationBatch, DetectionBatch
from yolo_lightning.boxes import cxcywh_to_xyxy, pairwise_iou, shape_iou
from yolo_lightning.losses import (
    LARGEST_MIN_OBJECTNESS,
    BoxSelection,
    LossSettings,
    assign_objects,
    classification_loss,
    detection_loss,
    select_boxes,
)
from yolo_lightning.models.head import HeadOutput, decode_boxes
from yolo_lightning.tree.exclusive import ExclusiveNames
from yolo_lightning.tree.wordtree import WordTree

TERMS = ("loss_coord", "loss_obj", "loss_noobj", "loss_class", "loss_anchor_prior")
OBJECT_TERMS = ("loss_coord", "loss_obj", "loss_class")
MAX_CANDIDATES, MAX_FALSE_POSITIVES = 5, 3
FALSE_POSITIVE_OBJECTNESS = 0.3
"""Objectness above which a box without an object is listed: an error, or a missing label."""

Corners = tuple[float, float, float, float]
"""x1, y1, x2, y2, in 0…1 of the network input."""


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
    overridden_by: int | None = None  # a later object with the same box, which alone counts


@dataclass(frozen=True)
class FalsePositive:
    """A box with a high objectness and no object."""

    box: PredictedBox
    iou: float  # with the nearest target; if it is small, a label may be missing
    loss: float  # its part of loss_noobj


@dataclass(frozen=True)
class LossExplanation:
    """What the explanations of all images have in common."""

    batch: DetectionBatch | ClassificationBatch  # of this image alone
    settings: LossSettings
    grid: int  # cells per side
    anchors_wh_norm: Sequence[tuple[float, float]]
    terms: Mapping[str, float]  # as in `yolo9000_loss`

    @property
    def image_size(self) -> int:
        """Side of the network input, px."""
        return self.batch.images.shape[-1]


@dataclass(frozen=True)
class BoxLossExplanation(LossExplanation):
    """The loss of an image with boxes."""

    objects: tuple[ObjectExplanation, ...]
    num_negatives: int  # boxes with a no-object loss
    num_ignored: int  # boxes without an object, with too high an IoU for a no-object loss
    false_positives: tuple[FalsePositive, ...]  # the negatives with the highest objectness


@dataclass(frozen=True)
class Candidate:
    """A box that may be selected for an image label."""

    box: PredictedBox
    prob_node: float  # P(node that the rule uses), 1 if it uses none
    prob_label: float  # P(image label)
    score: float  # area, product or objectness, by which the rule ranks


@dataclass(frozen=True)
class LabelLossExplanation(LossExplanation):
    """The loss of an image with an image label."""

    name: str
    node: str | None  # name of the node that the rule uses
    ranked_by: str  # "area", "objectness", or "product": objectness x P(node)
    candidates: tuple[Candidate, ...]  # the selected box, then the next best
    other_rules: Mapping[BoxSelection, PredictedBox]  # the boxes that they would select
    path: tuple[PathNode, ...]  # at the selected box


def width_height(xyxy: Corners) -> tuple[float, float]:
    """Return width and height of a box."""
    return xyxy[2] - xyxy[0], xyxy[3] - xyxy[1]


def area(xyxy: Corners) -> float:
    """Return the area of a box."""
    return math.prod(width_height(xyxy))


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


def _decode(output: HeadOutput, anchors_wh_cell: Tensor) -> list[PredictedBox]:
    """Return the boxes of an image, by anchor, row and column; their index is used below."""
    logits = output.box_logits.float()
    grid = logits.shape[-1]
    boxes = decode_boxes(logits, anchors_wh_cell, output.location).flatten(3)
    boxes = boxes.transpose(2, 3).reshape(-1, 4)
    objectness = logits[0, :, 4].sigmoid().flatten().tolist()
    return [
        PredictedBox(k // grid**2, k // grid % grid, k % grid, tuple(xyxy), objectness[k])
        for k, xyxy in enumerate(cxcywh_to_xyxy(boxes).tolist())
    ]


def _class_logits(output: HeadOutput, boxes: Sequence[int]) -> Tensor:
    """Return class logits (M, K) of boxes given by index."""
    index, cells = torch.tensor(boxes), output.box_logits.shape[-1] ** 2
    logits = output.class_logits.gather_boxes(0 * index, index // cells, index % cells)
    return logits.float()


def _to_floats(terms: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in terms.items()}


def _explain_object(
    output: HeadOutput,
    batch: DetectionBatch,
    anchors_wh_cell: Tensor,
    tree: WordTree,
    settings: LossSettings,
    boxes: Sequence[PredictedBox],
    names: ExclusiveNames | None,
) -> ObjectExplanation:
    """Return the loss of the only object of a batch, among the boxes of the image."""
    grid, target = output.box_logits.shape[-1], batch.boxes_cxcywh_norm
    found = assign_objects(batch, anchors_wh_cell, (grid, grid))
    index, label = int(found.anchor * grid**2 + found.cell), int(batch.labels)
    target_xyxy = cxcywh_to_xyxy(target[0])
    iou = float(pairwise_iou(torch.tensor([boxes[index].xyxy_norm]), target_xyxy))
    terms = _to_floats(detection_loss(output, batch, anchors_wh_cell, tree, settings, names))
    excluded = names.excluded(label, int(batch.sample_ids)) if names else []
    without = " and ".join(tree.names[node] for node in excluded)
    return ObjectExplanation(
        name=f"{tree.names[label]} without {without}" if without else tree.names[label],
        target_xyxy_norm=tuple(target_xyxy[0].tolist()),
        box=boxes[index],
        shape_ious=tuple(shape_iou(target[0, :, 2:], anchors_wh_cell / grid)[0].tolist()),
        iou=iou,
        objectness_target=iou if settings.rescore else 1.0,
        path=path_to(_class_logits(output, [index])[0], label, tree),
        terms={name: terms[name] for name in OBJECT_TERMS},
    )


@torch.no_grad()
def explain_boxes(
    output: HeadOutput,
    batch: DetectionBatch,
    anchors_wh_cell: Tensor,
    tree: WordTree,
    settings: LossSettings,
    names: ExclusiveNames | None = None,
) -> BoxLossExplanation:
    """Explain the loss of a batch of one image with boxes; anchors are float (A, 2), in cells."""
    boxes = _decode(output, anchors_wh_cell)
    slots, objects = (batch.labels[0] >= 0).nonzero().flatten().tolist(), []
    for slot in slots:
        # the box and the loss of an object do not depend on the other objects
        target, label = batch.boxes_cxcywh_norm[:, [slot]], batch.labels[:, [slot]]
        alone = replace(batch, boxes_cxcywh_norm=target, labels=label)
        explained = _explain_object(output, alone, anchors_wh_cell, tree, settings, boxes, names)
        objects.append(explained)
    last_object = {item.box: k for k, item in enumerate(objects)}  # which alone counts
    for k, item in enumerate(objects):
        if last_object[item.box] != k:
            objects[k] = replace(item, terms={}, overridden_by=last_object[item.box])
    targets = cxcywh_to_xyxy(batch.boxes_cxcywh_norm[0, slots])
    ious = pairwise_iou(torch.tensor([box.xyxy_norm for box in boxes]), targets).tolist()
    max_ious = [max(row, default=0.0) for row in ious]
    negatives = [
        FalsePositive(box, max_iou, 0.5 * settings.noobj_scale * box.objectness**2)
        for box, max_iou in zip(boxes, max_ious, strict=True)
        if box not in last_object and max_iou <= settings.ignore_iou
    ]
    false_positives = [one for one in negatives if one.box.objectness > FALSE_POSITIVE_OBJECTNESS]
    false_positives.sort(key=lambda one: -one.box.objectness)
    terms = _to_floats(detection_loss(output, batch, anchors_wh_cell, tree, settings, names))
    grid = output.box_logits.shape[-1]
    common = (batch, settings, grid, (anchors_wh_cell / grid).tolist(), terms)
    return BoxLossExplanation(
        *common,
        objects=tuple(objects),
        num_negatives=len(negatives),
        num_ignored=len(boxes) - len(last_object) - len(negatives),
        false_positives=tuple(false_positives[:MAX_FALSE_POSITIVES]),
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
    boxes, grid = _decode(output, anchors_wh_cell), output.box_logits.shape[-1]
    label, rule = int(batch.labels), settings.box_selection
    selected: dict[BoxSelection, int] = {}
    for name in get_args(BoxSelection):
        found = select_boxes(output, batch.labels, anchors_wh_cell, tree, boxed_ancestors, name)
        selected[name] = int(found[0] * grid**2 + found[1])
    first = selected.pop(rule)
    node = {"boxed_ancestor": int(boxed_ancestors[label]), "label": label}.get(rule, -1)
    logits = _class_logits(output, range(len(boxes)))
    probs = tree.log_probs(logits).double().exp()  # (A * G, K)
    prob_node = probs[:, node] if node >= 0 else torch.ones(len(boxes))
    objectness = torch.tensor([box.objectness for box in boxes])
    scores, ranked_by = objectness * prob_node, "objectness" if node < 0 else "product"
    if rule == "largest" and boxes[first].objectness > LARGEST_MIN_OBJECTNESS:
        areas = torch.tensor([area(box.xyxy_norm) for box in boxes]).clamp(max=1)
        scores, ranked_by = areas * (objectness > LARGEST_MIN_OBJECTNESS), "area"
    others = [k for k in scores.argsort(descending=True).tolist() if k != first and scores[k] > 0]
    candidates = [
        Candidate(boxes[k], float(prob_node[k]), float(probs[k, label]), float(scores[k]))
        for k in (first, *others[: MAX_CANDIDATES - 1])
    ]
    terms = _to_floats(
        classification_loss(output, batch, anchors_wh_cell, tree, boxed_ancestors, settings)
    )
    common = (batch, settings, grid, (anchors_wh_cell / grid).tolist(), terms)
    return LabelLossExplanation(
        *common,
        name=tree.names[label],
        node=tree.names[node] if node >= 0 else None,
        ranked_by=ranked_by,
        candidates=tuple(candidates),
        other_rules={name: boxes[k] for name, k in selected.items()},
        path=path_to(logits[first], label, tree),
    )
