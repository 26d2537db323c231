"""Parity with the original program: loss gradients, decoding, letterbox, NMS."""

import numpy as np
import pytest
import torch

from tests.helpers.golden import GOLDEN, detection_batch, load
from yolo_lightning.batches import ClassificationBatch
from yolo_lightning.boxes import batched_nms, cxcywh_to_xyxy, unletterbox
from yolo_lightning.losses import LossSettings, ObjectnessRule, yolo9000_loss
from yolo_lightning.models.head import HeadOutput, select_candidates
from yolo_lightning.tree.wordtree import WordTree


def gradient(raw, batch, anchors, tree, settings):
    raw = raw.clone().requires_grad_()
    output = HeadOutput.from_dense(raw, len(anchors))
    boxed_ancestors = torch.arange(len(tree))
    terms = yolo9000_loss(output, batch, anchors, tree, boxed_ancestors, settings)
    total = sum(terms.values(), torch.zeros(())) * len(batch)
    total.backward()
    assert raw.grad is not None
    return raw.grad


@pytest.mark.parametrize("name", ["region_flat_warmup.npz", "region_flat_after_warmup.npz"])
def test_flat_loss_has_the_original_gradients(name):
    data = load(name)
    tree = WordTree.from_names([str(k) for k in range(20)])
    batch = detection_batch(data["boxes_cxcywh"], data["labels"], int(data["images_seen"]))
    grad = gradient(data["raw"], batch, data["anchors_cells"], tree, LossSettings())
    assert (grad - data["grad"]).abs().max() <= 1e-5
    assert data["grad"].abs().max() > 0.1


@pytest.mark.parametrize("rule", ["paper", "darknet"])
def test_tree_loss_has_the_original_gradients(rule: ObjectnessRule):
    data = load(f"region_tree_{rule}.npz")
    lines = [line.split() for line in (GOLDEN / "small.tree").read_text().splitlines()]
    keys = [line[0] for line in lines]
    tree = WordTree([(k, "-" if p == "-1" else keys[int(p)], k) for k, p in lines])
    assert tree.parents.tolist() == data["parents"].tolist()
    settings = LossSettings(box_selection="label", objectness_rule=rule)
    is_cls = data["is_classification"].bool()
    detection = detection_batch(data["boxes_cxcywh"][~is_cls], data["labels"][~is_cls])
    classification = ClassificationBatch(
        torch.zeros(int(is_cls.sum()), 3, 1, 1),
        torch.arange(int(is_cls.sum())),
        data["labels"][is_cls][:, 0],
        images_seen=int(data["images_seen"]),
    )
    for mask, batch in ((~is_cls, detection), (is_cls, classification)):
        grad = gradient(data["raw"][mask], batch, data["anchors_cells"], tree, settings)
        assert (grad - data["grad"][mask]).abs().max() <= 1e-5


@pytest.mark.parametrize("size", ["375x500", "500x375", "768x576"])
def test_decoding_letterbox_and_nms_equal_the_original(size):
    data = load(f"detections_{size}.npz")
    width, height = data["image_wh"].tolist()
    net_width, net_height = data["network_wh"].tolist()
    threshold = float(data["score_threshold"])
    output = HeadOutput.from_dense(data["raw"], 5)
    tree = WordTree.from_names([str(k) for k in range(20)])
    found = select_candidates(output, data["anchors_cells"], threshold)
    ((_, logits),) = found.chunks()
    scores = found.objectness[:, None] * tree.log_probs(logits).exp()
    boxes = unletterbox(
        found.boxes_cxcywh_norm,
        found.image,
        torch.tensor([[height, width]]),
        (net_height, net_width),
        whole_px_margins=False,
    )
    box, label = (scores > threshold).nonzero(as_tuple=True)
    rows = torch.cat([boxes[box], label[:, None], scores[box, label][:, None]], dim=1).double()
    assert_same_rows(rows, data["before_nms"])
    kept = batched_nms(
        cxcywh_to_xyxy(boxes[box]), scores[box, label], label, float(data["iou_threshold"])
    )
    assert_same_rows(rows[kept], data["after_nms"])


def assert_same_rows(rows: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare two sets of rows (cx, cy, w, h, class, score), whatever their order."""
    assert rows.shape == expected.shape

    def ordered(table: torch.Tensor) -> np.ndarray:
        array = table.numpy().round(6)
        return table.numpy()[np.lexsort((array[:, 1], array[:, 0], array[:, 4]))]

    np.testing.assert_allclose(ordered(rows), ordered(expected), rtol=1e-4, atol=1e-5)
