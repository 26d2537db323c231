"""Loss terms computed by hand, and properties of every batch."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.golden import detection_batch
from tests.helpers.trees import trees
from yolo_lightning.batches import ClassificationBatch, DetectionBatch
from yolo_lightning.losses import LossSettings, assign_objects, select_boxes, yolo9000_loss
from yolo_lightning.models.backbones import SMALL, detector_layers
from yolo_lightning.models.head import DenseClassLogits, HeadOutput, SparseClassLogits, decode_boxes
from yolo_lightning.models.networks import YOLOv2
from yolo_lightning.tree.wordtree import WordTree

ANCHORS = torch.tensor([[1.0, 1.0], [3.0, 2.0]])
TREE = WordTree.from_names(["a", "b"])


def labelled(count: int, labels: list[int]) -> ClassificationBatch:
    return ClassificationBatch(
        torch.zeros(count, 3, 8, 8), torch.arange(count), torch.tensor(labels)
    )


def head(grid: int = 2, classes: int = 2, batch: int = 1, fill: float = 0.0) -> torch.Tensor:
    return torch.full((batch, 2 * (5 + classes), grid, grid), fill)


def loss_terms(raw, batch, tree=TREE, **options):
    settings = LossSettings(**options)
    boxed_ancestors = torch.arange(len(tree))
    return yolo9000_loss(
        HeadOutput.from_dense(raw, len(ANCHORS)), batch, ANCHORS, tree, boxed_ancestors, settings
    )


def test_terms_of_one_object_by_hand():
    # one object of 1.5 x 1 cells about (0.6, 0.5) cells: anchor 0, cell (0, 0)
    box = torch.tensor([[[0.3, 0.25, 0.75, 0.5]]])
    raw = head()
    raw[0, :7, 0, 0] = torch.tensor([0.4, -0.2, 0.1, 0.3, 0.7, 1.0, -0.5])
    terms = loss_terms(raw, detection_batch(box, torch.tensor([[1]])))

    def sig(v: float) -> float:
        return 1 / (1 + math.exp(-v))

    x, y = sig(0.4), sig(-0.2)
    coord = (x - 0.6) ** 2 + (y - 0.5) ** 2 + (0.1 - math.log(1.5)) ** 2 + 0.3**2
    assert terms["loss_coord"].item() == pytest.approx(0.5 * (2 - 0.75 * 0.5) * coord, rel=1e-5)
    w, h = math.exp(0.1), math.exp(0.3)
    inter_w = min(x + w / 2, 0.6 + 0.75) - max(x - w / 2, 0.6 - 0.75)
    inter_h = min(y + h / 2, 1.0) - max(y - h / 2, 0.0)
    iou = inter_w * inter_h / (w * h + 1.5 - inter_w * inter_h)
    assert terms["loss_obj"].item() == pytest.approx(2.5 * (iou - sig(0.7)) ** 2, rel=1e-5)
    assert terms["loss_noobj"].item() == pytest.approx(0.5 * 7 * 0.25, rel=1e-5)
    assert terms["loss_class"].item() == pytest.approx(math.log(1 + math.exp(1.5)), rel=1e-5)
    assert terms["loss_anchor_prior"].item() == 0


def test_terms_of_unbounded_locations_by_hand():
    # an object of 3 x 2 cells about (1.4, 0.5) cells: anchor 1, cell (0, 1)
    boxes = torch.tensor([[[0.7, 0.25, 1.5, 1.0]]])
    early = detection_batch(boxes, torch.tensor([[1]]), images_seen=0)
    raw = head(fill=0.2)
    raw[0, 7:12, 0, 1] = torch.tensor([0.4, -0.2, 0.1, 0.3, 0.7])
    output = HeadOutput.from_dense(raw, len(ANCHORS))
    output.location = "offset"
    terms = yolo9000_loss(output, early, ANCHORS, TREE, torch.arange(2), LossSettings())
    # targets: (1.4 - 1.5) / 3 and (0.5 - 0.5) / 2 sides of the anchor
    coord = (0.4 + 0.1 / 3) ** 2 + 0.2**2 + 0.1**2 + 0.3**2
    assert terms["loss_coord"].item() == pytest.approx(0.5 * (2 - 1.5) * coord, rel=1e-5)
    # seven other boxes, whose x, y, w and h are 0.2
    assert terms["loss_anchor_prior"].item() == pytest.approx(0.005 * 7 * 4 * 0.04, rel=1e-5)
    # the responsible box is about (2.7, 0.1) cells
    w, h = 3 * math.exp(0.1), 2 * math.exp(0.3)
    inter_w, inter_h = 2.9 - (2.7 - w / 2), min(0.1 + h / 2, 1.5) - max(0.1 - h / 2, -0.5)
    iou = inter_w * inter_h / (w * h + 6 - inter_w * inter_h)
    sig = 1 / (1 + math.exp(-0.7))
    assert terms["loss_obj"].item() == pytest.approx(2.5 * (iou - sig) ** 2, rel=1e-4)


@pytest.mark.parametrize("location", ["direct", "offset"])
def test_a_box_that_decodes_to_its_object_has_no_coordinate_loss(location):
    box = torch.tensor([[[0.7, 0.3, 0.75, 0.5]]])
    xy = torch.tensor([1.4 - 1, 0.6])
    xy = xy.logit() if location == "direct" else (xy - 0.5) / ANCHORS[0]
    raw = head()
    raw[0, :4, 0, 1] = torch.cat([xy, torch.tensor([1.5, 1.0]).log()])
    output = HeadOutput.from_dense(raw, len(ANCHORS))
    output.location = location
    decoded = decode_boxes(output.box_logits, ANCHORS, location)[0, 0, :, 0, 1]
    torch.testing.assert_close(decoded, box[0, 0])
    batch = detection_batch(box, torch.tensor([[1]]))
    terms = yolo9000_loss(output, batch, ANCHORS, TREE, torch.arange(2), LossSettings())
    assert terms["loss_coord"].item() == pytest.approx(0, abs=1e-12)


def test_anchor_prior_by_hand_only_at_the_start_of_training():
    box = torch.tensor([[[0.3, 0.25, 0.5, 0.5]]])
    raw = head(fill=0.2)
    early = detection_batch(box, torch.tensor([[0]]), images_seen=0)
    centre = 1 / (1 + math.exp(-0.2)) - 0.5
    expected = 0.01 * 0.5 * 7 * 2 * (centre**2 + 0.2**2)
    assert loss_terms(raw, early)["loss_anchor_prior"].item() == pytest.approx(expected, rel=1e-5)
    early.images_seen = 12_800
    assert loss_terms(raw, early)["loss_anchor_prior"].item() == 0


def test_a_box_with_a_large_iou_has_no_no_object_loss():
    # the anchor of 3 x 2 cells in the same place overlaps a truth of 2.6 x 2 by more than 0.6,
    # yet the neighbouring cell's box too: both are spared, the responsible one is charged
    box = torch.tensor([[[0.375, 0.375, 2.6 / 4, 0.5]]])
    raw = head(grid=4)
    raw[0, 7 + 0, 1, 1] = 0.0
    counted = loss_terms(raw, detection_batch(box, torch.tensor([[0]])))["loss_noobj"].item()
    everything = 0.5 * 0.25 * (2 * 16 - 1)
    spared = (everything - counted) / 0.125
    assert spared == pytest.approx(round(spared))
    assert spared == 0
    near = box.clone()
    near[0, 0, 2] = 3 / 4
    raw[0, 7 + 2, 1, 2] = math.log(1.0)
    shifted = head(grid=4)
    shifted[0, 7, 1, 2] = -9.0  # centre at the cell's left edge: half a cell from the truth
    counted = loss_terms(shifted, detection_batch(near, torch.tensor([[0]])))["loss_noobj"].item()
    assert (everything - counted) / 0.125 == pytest.approx(1)


def test_a_batch_knows_its_objects_wherever_it_is():
    labels = torch.tensor([[3, -1, 5], [-1, -1, -1], [-1, 4, -1]])
    batch = detection_batch(torch.zeros(3, 3, 4), labels)
    assert batch.objects.tolist() == [0, 2, 7]
    moved = batch.to("meta")
    assert (moved.objects.device.type, moved.objects.shape) == ("meta", (3,))
    assert replace(batch, labels=torch.flip(labels, [0])).objects.tolist() == [1, 6, 8]
    assert batch.objects.device.type == "cpu"


def test_the_later_of_two_objects_keeps_the_same_box():
    boxes = torch.tensor([[[0.2, 0.2, 0.3, 0.3], [0.22, 0.2, 0.3, 0.3], [0.9, 0.9, 0.3, 0.3]]])
    found = assign_objects(detection_batch(boxes, torch.tensor([[5, 6, 7]])), ANCHORS, (2, 2))
    assert found.labels.tolist() == [5, 6, 7]
    assert found.counts.tolist() == [False, True, True]
    assert found.is_free.tolist().count(False) == 2


def test_of_two_objects_with_the_same_box_the_earlier_one_has_no_class_loss():
    """Darknet would train P(dog | animal) too, at the box of the bus."""
    rows = [("animal", "-", "a"), ("vehicle", "-", "v"), ("cat", "animal", "c"),
            ("dog", "animal", "d"), ("car", "vehicle", "k"), ("bus", "vehicle", "b")]  # fmt: skip
    tree = WordTree(rows)
    dog, bus = 3, 5
    boxes = torch.tensor([[[0.2, 0.2, 0.3, 0.3], [0.22, 0.2, 0.3, 0.3]]])
    raw = head(classes=6).requires_grad_()
    loss_terms(raw, detection_batch(boxes, torch.tensor([[dog, bus]])), tree)[
        "loss_class"
    ].backward()
    assert raw.grad is not None
    trained = raw.grad[0].unflatten(0, (2, -1))[:, 5:].abs().sum(dim=(0, 2, 3)) > 0
    on_path = {"animal", "vehicle", "car", "bus"}
    assert {row[0] for row, is_trained in zip(rows, trained, strict=True) if is_trained} == on_path


def test_losses_are_averaged_over_images_and_scaled():
    boxes = torch.tensor([[[0.3, 0.25, 0.5, 0.5]]])
    one = loss_terms(head(fill=0.3), detection_batch(boxes, torch.tensor([[0]])))
    two = loss_terms(
        head(batch=2, fill=0.3), detection_batch(boxes.repeat(2, 1, 1), torch.tensor([[0], [0]]))
    )
    doubled = loss_terms(
        head(fill=0.3),
        detection_batch(boxes, torch.tensor([[0]])),
        coord_scale=2.0,
        class_scale=3.0,
    )
    for name in one:
        torch.testing.assert_close(one[name], two[name])
    torch.testing.assert_close(doubled["loss_coord"], 2 * one["loss_coord"])
    torch.testing.assert_close(doubled["loss_class"], 3 * one["loss_class"])


def test_classification_terms_by_hand():
    raw = head()
    raw[0, 4] = -2.0  # objectness of anchor 0
    raw[0, 4, 1, 0] = -1.0  # the selected box: highest objectness, classes alike
    raw[0, 11] = -3.0
    terms = loss_terms(raw, labelled(1, [0]), box_selection="label")

    def sig(v: float) -> float:
        return 1 / (1 + math.exp(-v))

    assert terms["loss_obj"].item() == pytest.approx(2.5 * (0.3 - sig(-1)) ** 2, rel=1e-5)
    expected = 0.5 * (3 * sig(-2) ** 2 + 4 * sig(-3) ** 2)
    assert terms["loss_noobj"].item() == pytest.approx(expected, rel=1e-5)
    assert terms["loss_class"].item() == pytest.approx(math.log(2), rel=1e-5)
    assert terms["loss_coord"].item() == terms["loss_anchor_prior"].item() == 0
    silent = loss_terms(raw, labelled(1, [0]), objectness_rule="darknet")
    assert silent["loss_obj"].item() == 0


def test_rules_of_box_selection():
    tree = WordTree(
        [("cat", "-", ""), ("dog", "-", ""), ("bengal", "cat", ""), ("manx", "cat", "")]
    )
    raw = torch.zeros(1, 2, 9, 2, 2)
    raw[:, :, 4] = -3.0
    raw[0, 0, 4, 0, 0], raw[0, 0, 5, 0, 0], raw[0, 0, 7, 0, 0] = (
        1.0,
        4.0,
        -4.0,
    )  # sure cat, not bengal
    raw[0, 1, 4, 1, 1], raw[0, 1, 7, 1, 1] = 0.5, 4.0  # less sure, yet says bengal
    raw[0, 1, 4, 0, 1], raw[0, 1, 2:4, 0, 1] = -0.5, 1.0  # large
    output = HeadOutput.from_dense(raw.flatten(1, 2), 2)
    supervised = torch.tensor([True, True, False, False])

    def selected(rule, mask=supervised):
        ancestors = tree.deepest_ancestor_in(mask)
        anchor, cell = select_boxes(output, torch.tensor([2]), ANCHORS, tree, ancestors, rule)
        return anchor.item(), cell.item()

    assert selected("label") == (1, 3)
    assert selected("boxed_ancestor") == (0, 0)
    assert selected("largest") == (1, 1)
    # boxes taught the label itself: the label decides; boxes taught nothing: objectness alone
    assert selected("boxed_ancestor", torch.ones(4, dtype=torch.bool)) == selected("label")
    assert selected("boxed_ancestor", torch.zeros(4, dtype=torch.bool)) == (0, 0)


def test_unknown_rules():
    with pytest.raises(ValueError, match="box_selection is 'biggest'; allowed"):
        LossSettings(box_selection="biggest")  # type: ignore[arg-type]


@settings(max_examples=15, deadline=None)
@given(trees(), st.integers(0, 1000), st.sampled_from(["label", "boxed_ancestor"]))
def test_sparse_and_dense_class_heads_agree(tree, seed, rule):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    features, weight, bias = draw(3, 8, 4, 5), draw(2, len(tree), 8), draw(2, len(tree))
    boxes = draw(3, 2, 5, 4, 5)
    ancestors = tree.deepest_ancestor_in(torch.rand(len(tree), generator=generator) < 0.5)
    truth = torch.rand(3, 4, 4, generator=generator) * 0.8 + 0.1
    labels = torch.randint(-1, len(tree), (3, 4), generator=generator)
    detection = detection_batch(truth, labels)
    classification = labelled(3, torch.randint(0, len(tree), (3,), generator=generator).tolist())
    dense = torch.einsum("bcyx,akc->bakyx", features, weight) + bias[None, :, :, None, None]
    parameters = (features, weight, bias, boxes)
    for batch in (detection, classification):
        grads = []
        for logits in (SparseClassLogits(features, weight, bias), DenseClassLogits(dense)):
            terms = yolo9000_loss(
                HeadOutput(boxes, logits),
                batch,
                ANCHORS,
                tree,
                ancestors,
                LossSettings(box_selection=rule),
            )
            loss = torch.stack(list(terms.values())).sum()
            grads.append((loss, *torch.autograd.grad(loss, parameters, retain_graph=True)))
        for sparse_value, dense_value in zip(*grads, strict=True):
            assert (sparse_value - dense_value).abs().max() <= 1e-5


@pytest.mark.parametrize("objectness_rule", ["paper", "darknet"])
@pytest.mark.parametrize("kind", ["objects", "no objects", "classification"])
def test_every_parameter_gets_a_gradient_in_every_step(kind, objectness_rule):
    torch.manual_seed(0)
    network = YOLOv2(detector_layers(SMALL, 8, 4), 2, ANCHORS)
    output = network(torch.rand(2, 3, 32, 32))
    boxes = torch.rand(2, 3, 4) * 0.5 + 0.2
    batches: dict[str, DetectionBatch | ClassificationBatch] = {
        "objects": detection_batch(boxes, torch.tensor([[0, 1, -1], [-1, -1, -1]])),
        "no objects": detection_batch(boxes, torch.full((2, 3), -1)),
        "classification": labelled(2, [0, 1]),
    }
    options = LossSettings(objectness_rule=objectness_rule)
    terms = yolo9000_loss(output, batches[kind], ANCHORS, TREE, torch.arange(2), options)
    torch.stack(list(terms.values())).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    box_grad = network.box_conv.weight.grad
    assert box_grad is not None
    coordinates = box_grad.view(2, 5, -1)[:, :4]
    if kind == "objects":
        assert (coordinates != 0).any()
    else:
        assert (coordinates == 0).all()
        assert (box_grad.view(2, 5, -1)[:, 4] != 0).any()
