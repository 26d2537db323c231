"""The YOLO9000 joint loss: assignment of objects to boxes, one function per term, and their sum.

Every term is a sum over all boxes, averaged over the images of the batch, as in the original
program; its learning rates therefore apply.

Shapes: box_logits (R, 5), objectness_logits and masks (R,) of all R = B * Gh * Gw * A boxes, by
image, cell and anchor, or of the M boxes that are responsible for objects; anchors_wh_cell (A, 2);
boxed_ancestors, int64 (K,): each node's deepest ancestor or self with training boxes, or -1.

Nothing here waits for the device.
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
    """The responsible box of each of M objects; of several with the same box, the last counts."""

    image: Tensor  # int64 (M,)
    cell: Tensor  # int64 (M,), among the B * Gh * Gw cells of the batch
    anchor: Tensor  # int64 (M,)
    box: Tensor  # int64 (M,), among all boxes of the batch
    counts: Tensor  # bool (M,), false if a later object has the same box
    targets_xy_cell: Tensor  # (M, 2), centres relative to the cell
    targets_wh_cell: Tensor  # (M, 2)
    labels: Tensor  # int64 (M,), tree nodes
    is_free: Tensor  # bool (R,), which boxes of the batch are not responsible for an object


def assign_objects(
    batch: DetectionBatch, anchors_wh_cell: Tensor, grid_hw: tuple[int, int]
) -> Assignment:
    """Assign each object to the anchor with the most similar shape in the cell of its centre.

    If two objects get the same box, the later one keeps it, as in the original program.

    Source: YOLO9000, section 2; "responsible" as in YOLO.
    Deviation: with a tree, the original program also keeps the class loss of the earlier object in
    those groups of siblings that the path of the later one does not pass; a box of a person would
    then learn which breed of dog it is. Here the earlier object has no loss.
    """
    (images, slots), device = batch.labels.shape, batch.labels.device
    (height, width), num_anchors = grid_hw, len(anchors_wh_cell)
    image = batch.objects // slots
    boxes_cxcywh_norm = batch.boxes_cxcywh_norm.flatten(0, 1).index_select(0, batch.objects)
    grid_wh = torch.linspace(width, height, 2, device=device)  # needs no copy to the device
    xy_cell, wh_cell = (boxes_cxcywh_norm.unflatten(1, (2, 2)) * grid_wh).unbind(1)
    column_row = xy_cell.floor().clamp(min=0).minimum(grid_wh - 1)
    cell = (column_row[:, 1] * width + column_row[:, 0]).long() + image * (height * width)
    anchor = shape_iou(wh_cell, anchors_wh_cell.to(wh_cell)).argmax(dim=1)
    box = cell * num_anchors + anchor
    number = torch.arange(len(box), device=device)
    last = torch.full((images * height * width * num_anchors,), -1, device=device)
    last = last.scatter_reduce(0, box, number, "amax")  # object of each box, or -1
    return Assignment(
        image,
        cell,
        anchor,
        box,
        counts=last.index_select(0, box) == number,
        targets_xy_cell=xy_cell - column_row,
        targets_wh_cell=wh_cell,
        labels=batch.labels.flatten().index_select(0, batch.objects),
        is_free=last < 0,
    )


def loss_coord(
    box_logits: Tensor,
    assignment: Assignment,
    anchors_wh_cell: Tensor,
    grid_hw: tuple[int, int],
    location: Location = "direct",
) -> Tensor:
    """Return the sum of squared errors of centre and size, with larger weights for small boxes.

    The error of the centre is in cells, with the location `offset` in sides of the anchor.

    Args:
        box_logits: of the responsible boxes.
        assignment: of the objects to these boxes.
        anchors_wh_cell: of all anchors.
        grid_hw: rows and columns of the grid.
        location: see `decode_boxes`.

    Source: YOLO9000, section 2, "Direct location prediction"; the weight 2 - w * h is from the
    original program.
    """
    target_xy, target_wh = assignment.targets_xy_cell, assignment.targets_wh_cell
    anchors = anchors_wh_cell.to(target_wh).index_select(0, assignment.anchor)
    xy_logits, wh_logits = box_logits[:, :2], box_logits[:, 2:4]
    if location == "direct":
        error_xy = xy_logits.sigmoid() - target_xy
    else:
        error_xy = xy_logits - (target_xy - 0.5) / anchors
    error_wh = wh_logits - (target_wh / anchors).clamp(min=1e-6).log()
    error = torch.cat([error_xy, error_wh], dim=1).square().sum(dim=1)
    # 2 - w * h of the image, as one operation
    weight = torch.rsub(target_wh.prod(dim=1), 2, alpha=1 / (grid_hw[0] * grid_hw[1]))
    return (weight * error * assignment.counts).sum()


def loss_obj(objectness_logits: Tensor, assignment: Assignment, target: Tensor) -> Tensor:
    """Return the sum of squared errors of objectness of responsible boxes; target is (M,)."""
    error = target.detach() - objectness_logits.sigmoid()
    return (error.square() * assignment.counts).sum()


def loss_noobj(objectness_logits: Tensor, mask: Tensor) -> Tensor:
    """Return the sum of the squared objectness of the boxes in the mask."""
    return (objectness_logits.sigmoid().square() * mask).sum()


def loss_anchor_prior(box_logits: Tensor, mask: Tensor, location: Location = "direct") -> Tensor:
    """Return the sum of squared distances of boxes in the mask from anchors in cells' centres."""
    xy_logits, wh_logits = box_logits[:, :2], box_logits[:, 2:4]
    error_xy = xy_logits.sigmoid() - 0.5 if location == "direct" else xy_logits
    distance = error_xy.square().sum(dim=1) + wh_logits.square().sum(dim=1)
    return (distance * mask).sum()


@torch.no_grad()
def _ious(
    box_logits: Tensor, location: Location, batch: DetectionBatch, anchors_wh_cell: Tensor
) -> Tensor:
    """Return IoU (R, slots) of all boxes with the label slots of their images; 0 for padding."""
    boxes = decode_boxes(box_logits, anchors_wh_cell, location)  # (B, A, 4, Gh, Gw)
    boxes = boxes.permute(0, 3, 4, 1, 2).flatten(1, 3)
    # padding becomes empty boxes, which overlap nothing
    targets = batch.boxes_cxcywh_norm * (batch.labels >= 0)[..., None]
    return pairwise_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets)).flatten(0, 1)


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
    box_logits, location = output.box_logits.float(), output.location
    grid_hw, slots = (box_logits.shape[-2], box_logits.shape[-1]), batch.labels.shape[1]
    assignment = assign_objects(batch, anchors_wh_cell, grid_hw)
    ious = _ious(box_logits, location, batch, anchors_wh_cell)
    all_logits = box_logits.permute(0, 3, 4, 1, 2).flatten(0, 3)  # (R, 5)
    logits = all_logits.index_select(0, assignment.box)
    own_iou = ious.flatten().index_select(0, assignment.box * slots + batch.objects % slots)
    objectness_target = own_iou if settings.rescore else torch.ones_like(own_iou)
    noobj_mask = assignment.is_free & (ious.amax(dim=1) <= settings.ignore_iou)
    coord = loss_coord(logits, assignment, anchors_wh_cell, grid_hw, location)
    class_logits = _box_class_logits(output, assignment.cell, assignment.anchor)
    if exclusive_names is None:
        class_losses = tree.path_loss(class_logits, assignment.labels)
    else:
        sample_ids = batch.sample_ids.index_select(0, assignment.image)
        class_losses = exclusive_names.path_loss(class_logits, assignment.labels, sample_ids)
    terms = {
        "loss_coord": 0.5 * settings.coord_scale * coord,
        "loss_obj": 0.5
        * settings.obj_scale
        * loss_obj(logits[:, 4], assignment, objectness_target),
        "loss_noobj": 0.5 * settings.noobj_scale * loss_noobj(all_logits[:, 4], noobj_mask),
        "loss_class": settings.class_scale * (class_losses * assignment.counts).sum(),
        "loss_anchor_prior": torch.zeros_like(coord),
    }
    if batch.images_seen < settings.anchor_prior_images:
        distance = loss_anchor_prior(all_logits, assignment.is_free, location)
        terms["loss_anchor_prior"] = 0.5 * settings.anchor_prior_scale * distance
    return terms


def _box_class_logits(output: HeadOutput, cells: Tensor, anchors: Tensor) -> Tensor:
    """Return the class logits of M boxes, float (M, K)."""
    logits = output.class_logits.gather_cells(cells)  # (M, A, K)
    index = anchors[:, None, None].expand(-1, 1, logits.shape[2])
    return logits.gather(1, index).squeeze(1).float()


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
    logits = output.class_logits.gather_nodes(siblings).float()  # (B, A, R, G)
    segments = levels[:, None, :, None].expand_as(logits)
    log_probs = segment_log_softmax(logits, segments, tree.paths.shape[1] + 1, dim=2)
    return (log_probs * (on_path & (nodes >= 0)[:, None])[:, None, :, None]).sum(dim=2)


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
    objectness = output.box_logits[:, :, 4].float().flatten(2)  # (B, A, G), logits
    anchor, cell = select_boxes(
        output, batch.labels, anchors_wh_cell, tree, boxed_ancestors, settings.box_selection
    )
    rows, best = objectness.flatten(1), (anchor * objectness.shape[2] + cell)[:, None]
    is_selected = torch.arange(rows.shape[1], device=rows.device) == best  # (B, A * G)
    prob = rows.gather(1, best).sigmoid()
    shortfall = (
        F.relu(PAPER_MIN_OBJECTNESS - prob) if settings.objectness_rule == "paper" else 0.0 * prob
    )
    first_cell = torch.arange(len(rows), device=rows.device) * objectness.shape[2]
    class_logits = _box_class_logits(output, first_cell + cell, anchor)
    noobj_scale = settings.noobj_scale * settings.label_noobj_scale
    # zero, but in the autograd graph: DDP needs a gradient for every parameter
    zero = output.box_logits[:0].float().sum()
    return {
        "loss_coord": zero,
        "loss_obj": 0.5 * settings.obj_scale * shortfall.square().sum(),
        "loss_noobj": 0.5 * noobj_scale * loss_noobj(rows, ~is_selected),
        "loss_class": settings.class_scale * tree.path_loss(class_logits, batch.labels).sum(),
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
    means = torch.stack(list(terms.values())) / len(batch)
    return dict(zip(terms, means.unbind(), strict=True))
