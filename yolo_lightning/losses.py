"""The YOLO9000 joint loss: assignment, one function per term, and their sum in one place.

Every term is a sum over the images of the batch divided by their number, as in the original
program, whose learning rates therefore hold.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from yolo_lightning.batches import ClassificationBatch, DetectionBatch
from yolo_lightning.boxes import cxcywh_to_xyxy, pairwise_iou, shape_iou
from yolo_lightning.errors import InputError
from yolo_lightning.models.head import HeadOutput, decode_boxes
from yolo_lightning.tree.wordtree import WordTree, segment_log_softmax

BoxSelection = Literal["label", "boxed_ancestor", "largest"]
ObjectnessRule = Literal["paper", "darknet"]

LARGEST_MIN_OBJECTNESS = 0.3


@dataclass(frozen=True)
class LossSettings:
    """Scales and rules of the loss.

    Attributes:
        coord_scale, obj_scale, noobj_scale, class_scale: factors of the terms.
        ignore_iou: a box that overlaps a truth by more than this pays no no-object loss.
        anchor_prior_images: while fewer images were seen, boxes without an object are pulled to
            their anchors.
        anchor_prior_scale: factor of that pull.
        label_noobj_scale: factor, on top of `noobj_scale`, of the no-object loss of images with a
            label alone: 1 as in the original program; the paper's text has none, 0.
        box_selection: which box a classification image trains: the one with the highest
            objectness x P(`label`), the paper's; with the highest objectness x P(the deepest
            ancestor of the label that boxes supervise), `boxed_ancestor`; or the `largest` one
            above an objectness of 0.3.
        objectness_rule: what that box's objectness learns: `paper`, at least 0.3;
            `darknet`, nothing.
        rescore: whether the objectness of a box that answers for an object learns their IoU, as in
            the paper, or 1, as in the released Tiny YOLOv2 for COCO.

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

    @classmethod
    def of(cls, settings: object) -> "LossSettings":
        """Return settings from themselves, from the mapping in a checkpoint, or from None."""
        if isinstance(settings, cls):
            return settings
        return cls(**settings) if isinstance(settings, dict) else cls()

    def __post_init__(self) -> None:
        for name, allowed in (("box_selection", BoxSelection), ("objectness_rule", ObjectnessRule)):
            if getattr(self, name) not in get_args(allowed):
                raise InputError(f"{name} is {getattr(self, name)!r}; allowed: {get_args(allowed)}")


@dataclass
class Assignment:
    """Which box answers for which object; one entry per object, M in all.

    Attributes:
        image, anchor, cell: int64 (M,), the responsible box; cells numbered row by row.
        boxes_cxcywh_norm: float (M, 4), the truth.
        labels: int64 (M,), tree nodes.
    """

    image: Tensor
    anchor: Tensor
    cell: Tensor
    boxes_cxcywh_norm: Tensor
    labels: Tensor


def assign(
    boxes_cxcywh_norm: Tensor, labels: Tensor, anchors_wh_cell: Tensor, grid_hw: tuple[int, int]
) -> Assignment:
    """Give each object the anchor of the most similar shape in the cell that holds its centre.

    Where two objects of an image claim one box, the later one has it, as in the original program.

    Args:
        boxes_cxcywh_norm: float (B, M, 4).
        labels: int64 (B, M), -1 as padding.
        anchors_wh_cell: float (A, 2), cells.
        grid_hw: Gh, Gw.

    Source: YOLO9000, section 2; "responsible" as in YOLO.
    """
    height, width = grid_hw
    image, slot = (labels >= 0).nonzero(as_tuple=True)
    truth, label = boxes_cxcywh_norm[image, slot], labels[image, slot]
    column = (truth[:, 0] * width).long().clamp(0, width - 1)
    row = (truth[:, 1] * height).long().clamp(0, height - 1)
    size_cell = truth[:, 2:] * truth.new_tensor([width, height])
    anchor = shape_iou(size_cell, anchors_wh_cell.to(truth)).argmax(dim=1)
    cell = row * width + column
    last = _last_claims((image * len(anchors_wh_cell) + anchor) * height * width + cell)
    return Assignment(image[last], anchor[last], cell[last], truth[last], label[last])


def _last_claims(claims: Tensor) -> Tensor:
    """Return the indices of the last entry of each distinct value."""
    _, inverse = torch.unique(claims, return_inverse=True)
    position = torch.arange(len(claims), device=claims.device)
    last = torch.full_like(position, -1).scatter_reduce(0, inverse, position, "amax")
    return last[last >= 0]


def loss_coord(box_logits: Tensor, found: Assignment, anchors_wh_cell: Tensor) -> Tensor:
    """Return the squared errors of centre and size; small boxes weigh more.

    Args:
        box_logits: float (B, A, 5, Gh, Gw).
        found: the M responsible boxes.
        anchors_wh_cell: float (A, 2), cells.

    Source: YOLO9000, section 2, "Direct location prediction"; the factor 2 - w * h is the original
    program's.
    """
    height, width = box_logits.shape[-2:]
    predicted = box_logits.flatten(3)[found.image, found.anchor, :4, found.cell]
    truth = found.boxes_cxcywh_norm
    grid = truth.new_tensor([width, height])
    corner = torch.stack([found.cell % width, found.cell // width], dim=1)
    target_xy = truth[:, :2] * grid - corner
    anchors = anchors_wh_cell.to(truth)[found.anchor]
    target_wh = (truth[:, 2:] * grid / anchors).clamp(min=1e-6).log()
    error = (predicted[:, :2].sigmoid() - target_xy).square().sum(dim=1)
    error = error + (predicted[:, 2:] - target_wh).square().sum(dim=1)
    weight = 2 - truth[:, 2] * truth[:, 3]
    return 0.5 * (weight * error).sum()


def loss_obj(objectness_logits: Tensor, found: Assignment, target: Tensor) -> Tensor:
    """Return the squared distance of the responsible boxes' objectness from what it learns.

    Args:
        objectness_logits: float (B, A, Gh, Gw).
        found: the M responsible boxes.
        target: float (M,), the IoU of each with its truth, or 1; held constant.
    """
    logits = objectness_logits.flatten(2)[found.image, found.anchor, found.cell]
    return 0.5 * (target.detach() - logits.sigmoid()).square().sum()


def loss_noobj(objectness_logits: Tensor, counted: Tensor) -> Tensor:
    """Return the squared objectness of the counted boxes, bool (B, A, Gh, Gw)."""
    return 0.5 * (objectness_logits.sigmoid().square() * counted).sum()


def loss_anchor_prior(box_logits: Tensor, counted: Tensor) -> Tensor:
    """Return the pull towards anchors in the middle of their cells, over bool (B, A, Gh, Gw)."""
    centre = (box_logits[:, :, :2].sigmoid() - 0.5).square().sum(dim=2)
    size = box_logits[:, :, 2:4].square().sum(dim=2)
    return 0.5 * ((centre + size) * counted).sum()


def detection_loss(
    output: HeadOutput,
    batch: DetectionBatch,
    anchors_wh_cell: Tensor,
    tree: WordTree,
    settings: LossSettings,
) -> dict[str, Tensor]:
    """Return the terms, summed over the batch, that images with boxes cost."""
    box_logits = output.box_logits.float()
    grid = (box_logits.shape[-2], box_logits.shape[-1])
    truth_cxcywh = batch.boxes_cxcywh_norm
    found = assign(truth_cxcywh, batch.labels, anchors_wh_cell, grid)
    responsible = torch.zeros_like(box_logits[:, :, 4], dtype=torch.bool).flatten(2)
    responsible[found.image, found.anchor, found.cell] = True
    with torch.no_grad():
        boxes = decode_boxes(box_logits, anchors_wh_cell).flatten(3)  # (B, A, 4, G)
        flat = cxcywh_to_xyxy(boxes.permute(0, 1, 3, 2).flatten(1, 2))  # (B, A * G, 4)
        iou = pairwise_iou(flat, cxcywh_to_xyxy(truth_cxcywh))
        best = iou.masked_fill(batch.labels[:, None] < 0, 0).amax(dim=2).view_as(responsible)
        own = cxcywh_to_xyxy(boxes[found.image, found.anchor, :, found.cell])[:, None]
        own_iou = pairwise_iou(own, cxcywh_to_xyxy(found.boxes_cxcywh_norm)[:, None])[:, 0, 0]
    target = own_iou if settings.rescore else torch.ones_like(own_iou)
    empty = (~responsible & (best <= settings.ignore_iou)).view_as(box_logits[:, :, 4])
    free = (~responsible).view_as(box_logits[:, :, 4])
    pulled = free if batch.images_seen < settings.anchor_prior_images else torch.zeros_like(free)
    logits = output.class_logits.at(found.image, found.anchor, found.cell)
    return {
        "loss_coord": settings.coord_scale * loss_coord(box_logits, found, anchors_wh_cell),
        "loss_obj": settings.obj_scale * loss_obj(box_logits[:, :, 4], found, target),
        "loss_noobj": settings.noobj_scale * loss_noobj(box_logits[:, :, 4], empty),
        "loss_class": settings.class_scale * tree.path_loss(logits.float(), found.labels).sum(),
        "loss_anchor_prior": settings.anchor_prior_scale * loss_anchor_prior(box_logits, pulled),
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

    Args:
        output: what the network says about B images.
        labels: int64 (B,), tree nodes.
        anchors_wh_cell: float (A, 2), cells.
        tree: the classes.
        boxed_ancestors: int64 (K,), each node's deepest ancestor or self on the path to a label
            that boxes carry; -1 where none is.
        rule: see `LossSettings.box_selection`.

    Source: YOLO9000, section 4, "Joint classification and detection", for `label`.
    Deviation: `boxed_ancestor` asks boxes where and image labels what, since the paper's rule
    picks by construction a box that agrees already; `largest` follows Detic.
    """
    box_logits = output.box_logits.float()
    objectness = box_logits[:, :, 4].sigmoid().flatten(2)  # (B, A, G)
    if rule == "largest":
        boxes = decode_boxes(box_logits, anchors_wh_cell).flatten(3)
        area = (boxes[:, :, 2] * boxes[:, :, 3]).clamp(max=1)
        sure = objectness > LARGEST_MIN_OBJECTNESS
        # where no box is sure, the one with the highest objectness
        score = torch.where(sure.flatten(1).any(dim=1)[:, None, None], area * sure, objectness)
    else:
        nodes = boxed_ancestors[labels] if rule == "boxed_ancestor" else labels
        score = objectness.log() + _log_prob_everywhere(output, nodes, tree)
    best = score.flatten(1).argmax(dim=1)
    return best // score.shape[2], best % score.shape[2]


def _log_prob_everywhere(output: HeadOutput, nodes: Tensor, tree: WordTree) -> Tensor:
    """Return log P(node) of each image's node in every box, (B, A, G); 0 where the node is -1."""
    siblings, levels, on_path = tree.path_rows(nodes.clamp(min=0))
    logits = output.class_logits.of_nodes(siblings).float()  # (B, A, G, R)
    depth = int(levels.max()) + 1
    # padding forms a segment of its own
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
    """Return the terms, summed over the batch, that images with one label each cost.

    The chosen box takes the class loss along its label's path; all others the no-object loss.
    """
    objectness = output.box_logits[:, :, 4].float()  # (B, A, Gh, Gw)
    image = torch.arange(len(objectness), device=objectness.device)
    anchor, cell = select_boxes(
        output, batch.labels, anchors_wh_cell, tree, boxed_ancestors, settings.box_selection
    )
    chosen = torch.zeros_like(objectness, dtype=torch.bool).flatten(2)
    chosen[image, anchor, cell] = True
    prob = objectness.flatten(2)[image, anchor, cell].sigmoid()
    shortfall = F.relu(0.3 - prob) if settings.objectness_rule == "paper" else 0.0 * prob
    logits = output.class_logits.at(image, anchor, cell)
    noobj_scale = settings.noobj_scale * settings.label_noobj_scale
    # coordinates learn nothing, yet keep a gradient of zero for every rank's reduction
    nothing = output.box_logits[:0].float().sum()
    return {
        "loss_coord": nothing,
        "loss_obj": settings.obj_scale * 0.5 * shortfall.square().sum(),
        "loss_noobj": noobj_scale * loss_noobj(objectness, ~chosen.view_as(objectness)),
        "loss_class": settings.class_scale * tree.path_loss(logits.float(), batch.labels).sum(),
        "loss_anchor_prior": nothing,
    }


def yolo9000_loss(
    output: HeadOutput,
    batch: DetectionBatch | ClassificationBatch,
    anchors_wh_cell: Tensor,
    tree: WordTree,
    boxed_ancestors: Tensor,
    settings: LossSettings,
) -> dict[str, Tensor]:
    """Return what a batch of either kind costs: its terms, each an average over its images.

    The sum of the values is the loss. Every term reaches every parameter of the head, so no rank
    waits for a gradient, whatever its images hold.

    Args:
        output: what the network says about the batch.
        batch: images with boxes, or images with one label each.
        anchors_wh_cell: float (A, 2), cells.
        tree: the classes.
        boxed_ancestors: int64 (K,), each node's deepest ancestor or self on the path to a label
            that boxes carry; -1 where none is.
        settings: scales and rules.
    """
    if isinstance(batch, DetectionBatch):
        terms = detection_loss(output, batch, anchors_wh_cell, tree, settings)
    else:
        terms = classification_loss(output, batch, anchors_wh_cell, tree, boxed_ancestors, settings)
    return {name: value / len(batch) for name, value in terms.items()}
