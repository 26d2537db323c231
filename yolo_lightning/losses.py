"""The YOLO9000 joint loss: assignment of objects to boxes, one function per term, and their sum.

Every term is a sum over all boxes, averaged over the images of the batch, as in the original
program; its learning rates therefore apply.

Shapes: box_logits (B, A, 5, Gh, Gw), objectness_logits and masks (B, A, Gh, Gw), anchors_wh_cell
(A, 2), boxes_cxcywh_norm (B, M, 4), labels (B, M) with -1 as padding, or (B,) without boxes;
boxed_ancestors, int64 (K,): each node's deepest ancestor or self with training boxes, or -1.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from yolo_lightning.batches import ClassificationBatch, DetectionBatch
from yolo_lightning.boxes import cxcywh_to_xyxy, pairwise_iou, shape_iou
from yolo_lightning.errors import InputError
from yolo_lightning.models.head import HeadOutput, Location, decode_boxes
from yolo_lightning.tree.exclusive import ExclusiveNames
from yolo_lightning.tree.wordtree import WordTree, segment_log_softmax

BoxSelection = Literal["label", "boxed_ancestor", "largest"]
ObjectnessRule = Literal["paper", "darknet"]

LARGEST_MIN_OBJECTNESS = 0.3
PAPER_MIN_OBJECTNESS = 0.3


@dataclass(frozen=True)
class LossSettings:
    """Weights and rules of the loss.

    Attributes:
        coord_scale (weight): of the error of centre and size: higher fits boxes more tightly.
            Source: yolov2.cfg.
        obj_scale (weight): of the objectness error of responsible boxes: higher finds more objects.
            Source: yolov2.cfg.
        noobj_scale (weight): of the no-object loss: higher gives fewer false positives. Source:
            yolov2.cfg.
        class_scale (weight): of the class loss. Source: yolov2.cfg.
        ignore_iou (IoU, 0 … 1): boxes whose IoU with a target exceeds this have no no-object loss.
            Source: yolov2.cfg.
        anchor_prior_images (images): from the start of training, for which boxes without an object
            are trained towards their anchors; 0: none. Source: Darknet.
        anchor_prior_scale (weight): of that term. Source: Darknet.
        label_noobj_scale (factor): of the no-object loss for images with a label only: 1 in the
            original program; the paper mentions no such loss, 0. Source: Darknet.
        box_selection: the box that a classification image trains: `label`, with the highest
            objectness x P(label), as in the paper; `boxed_ancestor`, with the highest objectness x
            P(deepest ancestor of the label that has boxes in training); `largest`, the largest one
            with objectness above 0.3. Source: YOLO9000, section 4, for `label`.
        objectness_rule: target of that box's objectness: `paper`, at least 0.3; `darknet`, none.
            Source: YOLO9000, section 4; Darknet.
        rescore: the objectness target of a responsible box is its IoU with the object, as in the
            paper, instead of 1, as in the released Tiny YOLOv2 for COCO. Source: YOLO9000, section
            2.

    Source: YOLO9000, sections 2 and 4; scales of the released configuration.
    """

    coord_scale: float = 1.0
    obj_scale: float = 5.0
    noobj_scale: float = 1.0
    class_scale: float = 1.0
    ignore_iou: float = 0.6
    anchor_prior_images: int = 12_800
    anchor_prior_scale: float = 0.01
    label_noobj_scale: float = 1.0
    box_selection: BoxSelection = "boxed_ancestor"
    objectness_rule: ObjectnessRule = "paper"
    rescore: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (("box_selection", BoxSelection), ("objectness_rule", ObjectnessRule)):
            if getattr(self, name) not in get_args(allowed):
                raise InputError(f"{name} is {getattr(self, name)!r}; allowed: {get_args(allowed)}")


@dataclass
class Assignment:
    """The responsible box of each of M objects."""

    image: Tensor  # int64 (M,)
    anchor: Tensor  # int64 (M,)
    cell: Tensor  # int64 (M,), row-major
    boxes_cxcywh_norm: Tensor  # (M, 4), the targets
    labels: Tensor  # int64 (M,), tree nodes


def assign_objects(
    boxes_cxcywh_norm: Tensor, labels: Tensor, anchors_wh_cell: Tensor, grid_hw: tuple[int, int]
) -> Assignment:
    """Assign each object to the anchor with the most similar shape in the cell of its centre.

    If two objects get the same box, the later one keeps it, as in the original program.

    Source: YOLO9000, section 2; "responsible" as in YOLO.
    Deviation: with a tree, the original program also keeps the class loss of the earlier object in
    those groups of siblings that the path of the later one does not pass; a box of a person would
    then learn which breed of dog it is. Here the earlier object has no loss.
    """
    height, width = grid_hw
    image, slot = (labels >= 0).nonzero(as_tuple=True)
    target, label = boxes_cxcywh_norm[image, slot], labels[image, slot]
    column = (target[:, 0] * width).long().clamp(0, width - 1)
    row = (target[:, 1] * height).long().clamp(0, height - 1)
    target_wh_cell = target[:, 2:] * target.new_tensor([width, height])
    anchor = shape_iou(target_wh_cell, anchors_wh_cell.to(target)).argmax(dim=1)
    cell = row * width + column
    last = _last_occurrences((image * len(anchors_wh_cell) + anchor) * height * width + cell)
    return Assignment(image[last], anchor[last], cell[last], target[last], label[last])


def _last_occurrences(values: Tensor) -> Tensor:
    _, inverse = torch.unique(values, return_inverse=True)
    position = torch.arange(len(values), device=values.device)
    last = torch.full_like(position, -1).scatter_reduce(0, inverse, position, "amax")
    return last[last >= 0]


def loss_coord(
    box_logits: Tensor,
    assignment: Assignment,
    anchors_wh_cell: Tensor,
    location: Location = "direct",
) -> Tensor:
    """Return the squared errors of centre and size, with larger weights for small boxes.

    The error of the centre is in cells, with the location `offset` in sides of the anchor.

    Source: YOLO9000, section 2, "Direct location prediction"; the weight 2 - w * h is from the
    original program.
    """
    height, width = box_logits.shape[-2:]
    predicted = box_logits.flatten(3)[assignment.image, assignment.anchor, :4, assignment.cell]
    target = assignment.boxes_cxcywh_norm
    grid_wh = target.new_tensor([width, height])
    cell_xy = torch.stack([assignment.cell % width, assignment.cell // width], dim=1)
    target_xy = target[:, :2] * grid_wh - cell_xy
    anchors = anchors_wh_cell.to(target)[assignment.anchor]
    target_wh = (target[:, 2:] * grid_wh / anchors).clamp(min=1e-6).log()
    if location == "direct":
        error_xy = predicted[:, :2].sigmoid() - target_xy
    else:
        error_xy = predicted[:, :2] - (target_xy - 0.5) / anchors
    error = error_xy.square().sum(dim=1) + (predicted[:, 2:] - target_wh).square().sum(dim=1)
    weight = 2 - target[:, 2] * target[:, 3]
    return 0.5 * (weight * error).sum()


def loss_obj(objectness_logits: Tensor, assignment: Assignment, target: Tensor) -> Tensor:
    """Return the squared errors of the responsible boxes' objectness; target is IoU or 1, (M,)."""
    logits = objectness_logits.flatten(2)[assignment.image, assignment.anchor, assignment.cell]
    return 0.5 * (target.detach() - logits.sigmoid()).square().sum()


def loss_noobj(objectness_logits: Tensor, mask: Tensor) -> Tensor:
    """Return the squared objectness of the boxes in the mask."""
    return 0.5 * (objectness_logits.sigmoid().square() * mask).sum()


def loss_anchor_prior(box_logits: Tensor, mask: Tensor, location: Location = "direct") -> Tensor:
    """Return the squared distances of boxes in the mask from anchors centred in their cells."""
    xy_logits = box_logits[:, :, :2]
    error_xy = xy_logits.sigmoid() - 0.5 if location == "direct" else xy_logits
    centre = error_xy.square().sum(dim=2)
    size = box_logits[:, :, 2:4].square().sum(dim=2)
    return 0.5 * ((centre + size) * mask).sum()


def detection_loss(
    output: HeadOutput,
    batch: DetectionBatch,
    anchors_wh_cell: Tensor,
    tree: WordTree,
    settings: LossSettings,
    exclusive_names: ExclusiveNames | None = None,
) -> dict[str, Tensor]:
    """Return the terms for images with boxes, summed over the batch.

    Deviation: a label of `exclusive_names` means no other of these names below it.
    """
    box_logits = output.box_logits.float()
    objectness = box_logits[:, :, 4]  # (B, A, Gh, Gw), logits
    grid_hw = (box_logits.shape[-2], box_logits.shape[-1])
    targets = batch.boxes_cxcywh_norm
    assignment = assign_objects(targets, batch.labels, anchors_wh_cell, grid_hw)
    assigned = (assignment.image, assignment.anchor, assignment.cell)
    responsible = torch.zeros_like(objectness, dtype=torch.bool).flatten(2)
    responsible[assigned] = True
    with torch.no_grad():
        boxes = decode_boxes(box_logits, anchors_wh_cell, output.location)
        boxes = boxes.flatten(3).transpose(2, 3)  # (B, A, G, 4)
        iou = pairwise_iou(cxcywh_to_xyxy(boxes.flatten(1, 2)), cxcywh_to_xyxy(targets))
        max_iou = iou.masked_fill(batch.labels[:, None] < 0, 0).amax(dim=2).view_as(responsible)
        assigned_xyxy = cxcywh_to_xyxy(boxes[assigned])[:, None]
        assigned_targets_xyxy = cxcywh_to_xyxy(assignment.boxes_cxcywh_norm)[:, None]
        assigned_iou = pairwise_iou(assigned_xyxy, assigned_targets_xyxy)[:, 0, 0]
    objectness_target = assigned_iou if settings.rescore else torch.ones_like(assigned_iou)
    not_responsible = (~responsible).view_as(objectness)
    noobj_mask = (~responsible & (max_iou <= settings.ignore_iou)).view_as(objectness)
    in_warm_up = batch.images_seen < settings.anchor_prior_images
    prior_mask = not_responsible if in_warm_up else torch.zeros_like(not_responsible)
    prior_scale = settings.anchor_prior_scale
    logits = output.class_logits.gather_boxes(*assigned).float()
    if exclusive_names is None:
        class_losses = tree.path_loss(logits, assignment.labels)
    else:
        sample_ids = batch.sample_ids[assignment.image]
        class_losses = exclusive_names.path_loss(logits, assignment.labels, sample_ids)
    return {
        "loss_coord": settings.coord_scale
        * loss_coord(box_logits, assignment, anchors_wh_cell, output.location),
        "loss_obj": settings.obj_scale * loss_obj(objectness, assignment, objectness_target),
        "loss_noobj": settings.noobj_scale * loss_noobj(objectness, noobj_mask),
        "loss_class": settings.class_scale * class_losses.sum(),
        "loss_anchor_prior": prior_scale
        * loss_anchor_prior(box_logits, prior_mask, output.location),
    }


@torch.no_grad()
def select_boxes(
    output: HeadOutput,
    labels: Tensor,
    anchors_wh_cell: Tensor,
    tree: WordTree,
    boxed_ancestors: Tensor,
    rule: BoxSelection,
) -> tuple[Tensor, Tensor]:
    """Return the box that each classification image trains: anchor and cell, int64 (B,) each.

    Source: YOLO9000, section 4, "Joint classification and detection", for `label`.
    Deviation: `boxed_ancestor` locates objects by classes with boxes only, because the paper's rule
    selects boxes that already predict the label; `largest` follows Detic.
    """
    box_logits = output.box_logits.float()
    objectness = box_logits[:, :, 4].sigmoid().flatten(2)  # (B, A, G)
    if rule == "largest":
        boxes = decode_boxes(box_logits, anchors_wh_cell, output.location).flatten(3)
        area = (boxes[:, :, 2] * boxes[:, :, 3]).clamp(max=1)
        is_object = objectness > LARGEST_MIN_OBJECTNESS
        has_object = is_object.flatten(1).any(dim=1)[:, None, None]
        score = torch.where(has_object, area * is_object, objectness)
    else:
        nodes = boxed_ancestors[labels] if rule == "boxed_ancestor" else labels
        score = objectness.log() + _node_log_probs(output, nodes, tree)
    best = score.flatten(1).argmax(dim=1)
    return best // score.shape[2], best % score.shape[2]


def _node_log_probs(output: HeadOutput, nodes: Tensor, tree: WordTree) -> Tensor:
    """Return log P(node) of each image's node in all boxes, (B, A, G); 0 if the node is -1."""
    siblings, levels, on_path = tree.path_siblings(nodes.clamp(min=0))
    logits = output.class_logits.gather_nodes(siblings).float()  # (B, A, G, R)
    depth = int(levels.max()) + 1
    # padding is a separate segment
    segments = torch.where(siblings >= 0, levels, depth)[:, None, None].expand_as(logits)
    log_probs = segment_log_softmax(logits, segments, depth + 1)
    return (log_probs * (on_path & (nodes >= 0)[:, None])[:, None, None]).sum(dim=3)


def classification_loss(
    output: HeadOutput,
    batch: ClassificationBatch,
    anchors_wh_cell: Tensor,
    tree: WordTree,
    boxed_ancestors: Tensor,
    settings: LossSettings,
) -> dict[str, Tensor]:
    """Return the terms for images with one label each, summed over the batch.

    The selected box has the class loss along the path of the label, all others the no-object loss.
    """
    objectness = output.box_logits[:, :, 4].float()  # (B, A, Gh, Gw)
    image = torch.arange(len(objectness), device=objectness.device)
    anchor, cell = select_boxes(
        output, batch.labels, anchors_wh_cell, tree, boxed_ancestors, settings.box_selection
    )
    selected = torch.zeros_like(objectness, dtype=torch.bool).flatten(2)
    selected[image, anchor, cell] = True
    prob = objectness.flatten(2)[image, anchor, cell].sigmoid()
    shortfall = (
        F.relu(PAPER_MIN_OBJECTNESS - prob) if settings.objectness_rule == "paper" else 0.0 * prob
    )
    logits = output.class_logits.gather_boxes(image, anchor, cell)
    noobj_scale = settings.noobj_scale * settings.label_noobj_scale
    # zero, but in the autograd graph: DDP needs a gradient for every parameter
    zero = output.box_logits[:0].float().sum()
    return {
        "loss_coord": zero,
        "loss_obj": settings.obj_scale * 0.5 * shortfall.square().sum(),
        "loss_noobj": noobj_scale * loss_noobj(objectness, ~selected.view_as(objectness)),
        "loss_class": settings.class_scale * tree.path_loss(logits.float(), batch.labels).sum(),
        "loss_anchor_prior": zero,
    }


def yolo9000_loss(
    output: HeadOutput,
    batch: DetectionBatch | ClassificationBatch,
    anchors_wh_cell: Tensor,
    tree: WordTree,
    boxed_ancestors: Tensor,
    settings: LossSettings,
    exclusive_names: ExclusiveNames | None = None,
) -> dict[str, Tensor]:
    """Return the weighted loss terms of a batch, averaged over its images; their sum is the loss.

    Every parameter of the head gets a gradient from every batch, as DDP requires.
    """
    if isinstance(batch, DetectionBatch):
        terms = detection_loss(output, batch, anchors_wh_cell, tree, settings, exclusive_names)
    else:
        terms = classification_loss(output, batch, anchors_wh_cell, tree, boxed_ancestors, settings)
    return {name: value / len(batch) for name, value in terms.items()}
