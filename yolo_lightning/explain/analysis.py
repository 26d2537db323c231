"""What the loss sees in one image: which box answers for what, and what each part costs."""

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
    assign,
    loss_coord,
    loss_obj,
    select_boxes,
    yolo9000_loss,
)
from yolo_lightning.models.head import HeadOutput, decode_boxes
from yolo_lightning.tree.wordtree import WordTree

TERMS = ("loss_coord", "loss_obj", "loss_noobj", "loss_class", "loss_anchor_prior")
CANDIDATES, UNEXPECTED = 5, 3
UNEXPECTED_OBJECTNESS = 0.3
"""Boxes without an object that are surer than this are told about: mistakes, or missing truths."""

Corners = tuple[float, float, float, float]


@dataclass(frozen=True)
class Box:
    """One of the network's boxes.

    Attributes:
        anchor, row, column: its place, from 0.
        xyxy_norm: corners as decoded, 0…1 of the network input; may reach beyond.
        objectness: 0…1.
    """

    anchor: int
    row: int
    column: int
    xyxy_norm: Corners
    objectness: float


@dataclass(frozen=True)
class Step:
    """A node of the path from the top of the tree to a label.

    Attributes:
        name: of the node.
        given_parent: P(node | parent).
        absolute: P(node), the product down to here.
        rival: the most probable of its siblings and their P(node | parent); None where that is the
            node itself.
    """

    name: str
    given_parent: float
    absolute: float
    rival: tuple[str, float] | None


@dataclass(frozen=True)
class ExplainedObject:
    """An object with a box.

    Attributes:
        name: of its label.
        truth_xyxy_norm: corners, 0…1 of the network input.
        box: the one that is responsible.
        shape_ious: IoU of the truth with each anchor, centres aligned; the largest decides
            which anchor is responsible.
        iou: of the box with the truth.
        target: what its objectness learns.
        path: from the top of the tree to the label.
        terms: what it costs, its share of the image's terms; empty where `taken_by` is not None.
        taken_by: place in the list of the later object that has the same box, and it alone counts.
    """

    name: str
    truth_xyxy_norm: Corners
    box: Box
    shape_ious: tuple[float, ...]
    iou: float
    target: float
    path: tuple[Step, ...]
    terms: Mapping[str, float]
    taken_by: int | None


@dataclass(frozen=True)
class Unexpected:
    """A box that is sure of an object where none is labelled.

    Attributes:
        box: the box.
        iou: with the nearest truth; where it is small, a truth may be missing.
        cost: its share of loss_noobj.
    """

    box: Box
    iou: float
    cost: float


@dataclass(frozen=True)
class BoxesExplained:
    """What an image with boxes costs.

    Attributes:
        grid_hw: Gh, Gw.
        anchors_wh_norm: widths and heights, relative to the network input.
        objects: in the order of the annotation.
        terms: of the image, as `yolo9000_loss` returns them.
        counted: boxes that pay no-object loss.
        spared: boxes that answer for nothing, yet overlap a truth enough to pay nothing.
        unexpected: the surest of those that pay.
    """

    grid_hw: tuple[int, int]
    anchors_wh_norm: tuple[tuple[float, float], ...]
    objects: tuple[ExplainedObject, ...]
    terms: Mapping[str, float]
    counted: int
    spared: int
    unexpected: tuple[Unexpected, ...]


@dataclass(frozen=True)
class Candidate:
    """A box that an image's label could train.

    Attributes:
        box: the box.
        prob_node: P(the node that the rule looks at), 1 where it looks at none.
        prob_label: P(the image's label).
        score: what the rule ranks by.
    """

    box: Box
    prob_node: float
    prob_label: float
    score: float


@dataclass(frozen=True)
class LabelExplained:
    """What an image with a label costs.

    Attributes:
        grid_hw, anchors_wh_norm: see `BoxesExplained`.
        name: of the label.
        rule: how the box was chosen.
        node: name of the node that the rule looked at; None where there is none.
        any_sure: whether a box is sure enough for the rule `largest`.
        candidates: the chosen box, then the next best of those that could be chosen.
        others: what the other rules would choose.
        target: what the chosen box's objectness learns: at least 0.3, or None for nothing.
        path: from the top of the tree to the label, at the chosen box.
        terms: of the image, as `yolo9000_loss` returns them.
        counted: boxes that pay no-object loss.
    """

    grid_hw: tuple[int, int]
    anchors_wh_norm: tuple[tuple[float, float], ...]
    name: str
    rule: BoxSelection
    node: str | None
    any_sure: bool
    candidates: tuple[Candidate, ...]
    others: Mapping[BoxSelection, Box]
    target: float | None
    path: tuple[Step, ...]
    terms: Mapping[str, float]
    counted: int


class _Boxes:
    """All boxes of one image, decoded.

    Attributes:
        xyxy_norm: float (A, G, 4).
        objectness: float (A, G).
        anchors_wh_norm: float (A, 2).
    """

    def __init__(self, output: HeadOutput, anchors_wh_cell: Tensor) -> None:
        logits = output.box_logits.float()
        self.grid_hw = (logits.shape[-2], logits.shape[-1])
        decoded = decode_boxes(logits, anchors_wh_cell).flatten(3)[0]  # (A, 4, G)
        self.xyxy_norm = cxcywh_to_xyxy(decoded.transpose(1, 2))
        self.objectness = logits[0, :, 4].sigmoid().flatten(1)
        grid_wh = anchors_wh_cell.new_tensor([self.grid_hw[1], self.grid_hw[0]])
        self.anchors_wh_norm = anchors_wh_cell / grid_wh

    def at(self, anchor: int, cell: int) -> Box:
        row, column = divmod(cell, self.grid_hw[1])
        objectness = float(self.objectness[anchor, cell])
        return Box(anchor, row, column, _corners(self.xyxy_norm[anchor, cell]), objectness)

    def anchors(self) -> tuple[tuple[float, float], ...]:
        return tuple((float(w), float(h)) for w, h in self.anchors_wh_norm)


def _corners(xyxy: Tensor) -> Corners:
    x1, y1, x2, y2 = xyxy.tolist()
    return x1, y1, x2, y2


def path_of(logits: Tensor, label: int, tree: WordTree) -> tuple[Step, ...]:
    """Return the path to a label with its probabilities, from the top.

    Args:
        logits: float (K,), class logits of one box.
        label: the node.
        tree: the classes.
    """
    conditional, absolute = tree.log_softmax(logits[None])[0], tree.log_probs(logits[None])[0]
    steps = []
    for node in reversed([n for n in tree.paths[label].tolist() if n >= 0]):
        siblings = (tree.groups == tree.groups[node]).nonzero().flatten()
        best = int(siblings[conditional[siblings].argmax()])
        rival = None if best == node else (tree.names[best], float(conditional[best].exp()))
        shares = float(conditional[node].exp()), float(absolute[node].exp())
        steps.append(Step(tree.names[node], *shares, rival))
    return tuple(steps)


@torch.no_grad()
def explain_boxes(
    output: HeadOutput,
    batch: DetectionBatch,
    anchors_wh_cell: Tensor,
    tree: WordTree,
    settings: LossSettings,
) -> BoxesExplained:
    """Return what the loss sees in an image with boxes.

    Args:
        output: what the network says about the image.
        batch: that image alone.
        anchors_wh_cell: float (A, 2), cells.
        tree: the classes.
        settings: scales and rules.
    """
    boxes = _Boxes(output, anchors_wh_cell)
    nowhere = torch.full((len(tree),), -1)
    terms = yolo9000_loss(output, batch, anchors_wh_cell, tree, nowhere, settings)
    claims = _claims(batch, anchors_wh_cell, boxes.grid_hw)
    places = [(int(claim.anchor), int(claim.cell)) for claim in claims]
    winner = {place: k for k, place in enumerate(places)}  # the last has it
    free = torch.ones_like(boxes.objectness, dtype=torch.bool)
    for place in places:
        free[place] = False
    truths = cxcywh_to_xyxy(batch.boxes_cxcywh_norm[0, batch.labels[0] >= 0])
    # (A, G); the zero stands in where an image has no objects
    overlap = pairwise_iou(boxes.xyxy_norm, torch.cat([truths, truths.new_zeros(1, 4)])).amax(dim=2)
    near = overlap > settings.ignore_iou
    return BoxesExplained(
        boxes.grid_hw,
        boxes.anchors(),
        tuple(
            _explain_object(
                output, claim, boxes, anchors_wh_cell, tree, settings,
                None if winner[place] == k else winner[place],
            )
            for k, (claim, place) in enumerate(zip(claims, places, strict=True))
        ),
        {name: float(value) for name, value in terms.items()},
        int((free & ~near).sum()),
        int((free & near).sum()),
        _unexpected(boxes, free & ~near, overlap, settings.noobj_scale),
    )  # fmt: skip


def _claims(
    batch: DetectionBatch, anchors_wh_cell: Tensor, grid_hw: tuple[int, int]
) -> list[Assignment]:
    """Return the assignment of each object as if it were alone."""
    slots = (batch.labels[0] >= 0).nonzero().flatten().tolist()
    boxes, labels = batch.boxes_cxcywh_norm, batch.labels
    return [
        assign(boxes[:, k : k + 1], labels[:, k : k + 1], anchors_wh_cell, grid_hw) for k in slots
    ]


def _explain_object(
    output: HeadOutput,
    claim: Assignment,
    boxes: _Boxes,
    anchors_wh_cell: Tensor,
    tree: WordTree,
    settings: LossSettings,
    taken_by: int | None,
) -> ExplainedObject:
    """Return one object, `claim` being its assignment alone."""
    box_logits, label = output.box_logits.float(), int(claim.labels)
    truth = cxcywh_to_xyxy(claim.boxes_cxcywh_norm)
    iou = pairwise_iou(boxes.xyxy_norm[claim.anchor, claim.cell], truth)[0]  # (1,)
    target = iou if settings.rescore else torch.ones_like(iou)
    logits = output.class_logits.at(claim.image, claim.anchor, claim.cell).float()
    coord = loss_coord(box_logits, claim, anchors_wh_cell)
    obj = loss_obj(box_logits[:, :, 4], claim, target)
    kind = tree.path_loss(logits, claim.labels).sum()
    terms = {
        "loss_coord": settings.coord_scale * float(coord),
        "loss_obj": settings.obj_scale * float(obj),
        "loss_class": settings.class_scale * float(kind),
    }
    shape_ious = shape_iou(claim.boxes_cxcywh_norm[:, 2:], boxes.anchors_wh_norm)[0]
    return ExplainedObject(
        tree.names[label],
        _corners(truth[0]),
        boxes.at(int(claim.anchor), int(claim.cell)),
        tuple(shape_ious.tolist()),
        float(iou),
        float(target),
        path_of(logits[0], label, tree),
        terms if taken_by is None else {},
        taken_by,
    )


def _unexpected(
    boxes: _Boxes, paying: Tensor, overlap: Tensor, scale: float
) -> tuple[Unexpected, ...]:
    sureness = boxes.objectness * paying
    values, places = sureness.flatten().topk(min(UNEXPECTED, sureness.numel()))
    found = [
        (value, divmod(place, sureness.shape[1]))
        for value, place in zip(values.tolist(), places.tolist(), strict=True)
        if value > UNEXPECTED_OBJECTNESS
    ]
    return tuple(
        Unexpected(boxes.at(*place), float(overlap[place]), scale * 0.5 * value**2)
        for value, place in found
    )


@torch.no_grad()
def explain_label(
    output: HeadOutput,
    batch: ClassificationBatch,
    anchors_wh_cell: Tensor,
    tree: WordTree,
    boxed_ancestors: Tensor,
    settings: LossSettings,
) -> LabelExplained:
    """Return what the loss sees in an image with one label; see `yolo9000_loss`.

    Args:
        output: what the network says about the image.
        batch: that image alone.
        anchors_wh_cell: float (A, 2), cells.
        tree: the classes.
        boxed_ancestors: int64 (K,), each node's deepest ancestor or self that boxes taught, or -1.
        settings: scales and rules.
    """
    boxes, label = _Boxes(output, anchors_wh_cell), int(batch.labels)
    rule = settings.box_selection
    terms = yolo9000_loss(output, batch, anchors_wh_cell, tree, boxed_ancestors, settings)
    chosen: dict[BoxSelection, tuple[int, int]] = {}
    for name in get_args(BoxSelection):
        anchor, cell = select_boxes(
            output, batch.labels, anchors_wh_cell, tree, boxed_ancestors, name
        )
        chosen[name] = int(anchor), int(cell)
    node = {"boxed_ancestor": int(boxed_ancestors[label]), "label": label}.get(rule, -1)
    logits = _logits(output, torch.tensor([chosen[rule]]))[0]
    return LabelExplained(
        boxes.grid_hw,
        boxes.anchors(),
        tree.names[label],
        rule,
        tree.names[node] if node >= 0 else None,
        bool((boxes.objectness > LARGEST_MIN_OBJECTNESS).any()),
        _candidates(output, boxes, tree, (label, node), rule, chosen[rule]),
        {name: boxes.at(*place) for name, place in chosen.items() if name != rule},
        0.3 if settings.objectness_rule == "paper" else None,
        path_of(logits, label, tree),
        {name: float(value) for name, value in terms.items()},
        boxes.objectness.numel() - 1,
    )


def _logits(output: HeadOutput, places: Tensor) -> Tensor:
    """Return class logits (M, K) of one image's boxes: anchor and cell, int64 (M, 2)."""
    image = torch.zeros_like(places[:, 0])
    return output.class_logits.at(image, places[:, 0], places[:, 1]).float()


def _candidates(
    output: HeadOutput,
    boxes: _Boxes,
    tree: WordTree,
    label_node: tuple[int, int],
    rule: BoxSelection,
    chosen: tuple[int, int],
) -> tuple[Candidate, ...]:
    """Return the chosen box and the next best, with what the rule ranks by."""
    objectness, (label, node) = boxes.objectness, label_node
    places = torch.ones_like(objectness).nonzero()  # (A * G, 2)
    log_probs = tree.log_probs(_logits(output, places))  # (A * G, K)
    prob_label = log_probs[:, label].view_as(objectness).exp()
    log_node = log_probs[:, node].view_as(objectness) if node >= 0 else 0 * objectness
    if rule == "largest":
        size = boxes.xyxy_norm[..., 2:] - boxes.xyxy_norm[..., :2]
        sure = objectness > LARGEST_MIN_OBJECTNESS
        area = size.prod(dim=-1).clamp(max=1) * sure
        score = (area if bool(sure.any()) else objectness).log()
    else:
        score = objectness.log() + log_node
    order = score.flatten().argsort(descending=True)
    ranked = places[order[score.flatten()[order].isfinite()]].tolist()
    best = [chosen, *((anchor, cell) for anchor, cell in ranked if (anchor, cell) != chosen)]
    return tuple(
        Candidate(
            boxes.at(*place),
            float(log_node[place].exp()),
            float(prob_label[place]),
            float(score[place].exp()),
        )
        for place in best[:CANDIDATES]
    )
