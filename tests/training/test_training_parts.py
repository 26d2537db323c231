"""Schedules, image sizes, metrics, the network."""

import numpy as np
import pytest
import torch

from yolo_lightning.boxes import xyxy_to_cxcywh
from yolo_lightning.callbacks.multi_scale import MultiScale, resize, size_at
from yolo_lightning.errors import InputError
from yolo_lightning.evaluation.average_precision import BoxAveragePrecision
from yolo_lightning.models.backbones import DARKNET19, SMALL, detector_layers
from yolo_lightning.models.head import candidates, decode_boxes
from yolo_lightning.models.networks import LayerStack, YOLOv2
from yolo_lightning.schedules import PolynomialDecay, Schedule, StepDecay


def test_burn_in_rises_by_the_fourth_power_to_the_full_rate():
    schedule = Schedule(burn_in_steps=10)
    assert schedule(0) == pytest.approx(1e-4)
    assert schedule(4) == pytest.approx(0.0625)
    assert schedule(9) == schedule(10) == schedule(10**6) == 1


def test_step_decay():
    schedule = StepDecay([60, 90], [0.1, 0.1])
    assert [schedule(s) for s in (0, 59, 60, 89)] == [1, 1, 0.1, 0.1]
    assert schedule(90) == pytest.approx(0.01)


def test_polynomial_decay():
    schedule = PolynomialDecay(100, power=4, burn_in_steps=0)
    assert [schedule(s) for s in (0, 50, 100, 101)] == [1, 0.0625, 0, 0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Schedule(-1),
        lambda: StepDecay([1, 2], [0.1]),
        lambda: StepDecay([2, 1], [0.1, 0.1]),
        lambda: PolynomialDecay(0),
    ],
)
def test_schedules_refuse_nonsense(make):
    with pytest.raises(InputError, match="schedule"):
        make()


def test_image_size_changes_every_ten_batches_and_visits_all():
    sizes = [96, 128, 160]
    drawn = [size_at(step, sizes, 10, seed=0) for step in range(600)]
    for block in range(60):
        assert len(set(drawn[10 * block : 10 * block + 10])) == 1
    assert {s: drawn.count(s) > 100 for s in sizes} == dict.fromkeys(sizes, True)
    assert drawn != [size_at(step, sizes, 10, seed=1) for step in range(600)]


def test_resize_shrinks_and_scales_to_one():
    images = torch.full((2, 3, 64, 64), 255, dtype=torch.uint8)
    out = resize(images, 32)
    assert out.shape == (2, 3, 32, 32)
    torch.testing.assert_close(out, torch.ones_like(out))
    assert resize(images, 64).max() == 1


def test_multi_scale_refuses_sizes_off_the_grid():
    with pytest.raises(InputError, match=r"sizes is \[100\]; allowed: positive multiples of 32"):
        MultiScale([100])


def test_backbones_have_the_paper_s_size_and_stride():
    backbone = LayerStack(DARKNET19)
    assert (backbone.stride, backbone.out_channels) == (32, 1024)
    kernels = [p for p in backbone.parameters() if p.ndim == 4]
    assert len(kernels) == 18
    # table 6, in thousands of weights, after the first two layers (864 and 18,432)
    by_hand = [73.728, 8.192, 73.728, 294.912, 32.768, 294.912]
    by_hand += [1179.648, 131.072, 1179.648, 131.072, 1179.648]
    by_hand += [4718.592, 524.288, 4718.592, 524.288, 4718.592]
    assert [k.numel() for k in kernels] == [864, 18_432, *(round(1000 * n) for n in by_hand)]
    assert LayerStack(SMALL).stride == 16


@pytest.mark.parametrize("passthrough", [0, 4, None])
def test_network_gives_boxes_per_cell_for_any_multiple_of_its_stride(passthrough):
    network = YOLOv2(detector_layers(SMALL, 8, passthrough), 3, torch.ones(2, 2)).eval()
    for height, width in ((64, 64), (96, 32)):
        output = network(torch.rand(1, 3, height, width))
        assert output.box_logits.shape == (1, 2, 5, height // 16, width // 16)
        found = output.class_logits.at(*(torch.tensor([0, 0]),) * 2, torch.tensor([0, 1]))
        assert found.shape == (2, 3)


def test_class_logits_are_those_of_the_chosen_anchor_and_cell():
    torch.manual_seed(0)
    network = YOLOv2(detector_layers(SMALL, 8, 4), 3, torch.ones(2, 2)).eval()
    output = network(torch.rand(2, 3, 32, 64))
    sparse = output.class_logits
    image, anchor, cell = torch.tensor([1, 0, 1]), torch.tensor([1, 0, 0]), torch.tensor([5, 0, 7])
    features = sparse.features.flatten(2)
    for k, row in enumerate(sparse.at(image, anchor, cell)):
        expected = network.class_weight[anchor[k]] @ features[image[k], :, cell[k]]
        torch.testing.assert_close(row, expected + network.class_bias[anchor[k]])


def test_decode_by_hand():
    logits = torch.zeros(1, 1, 5, 2, 4)
    logits[0, 0, 2, 1, 3] = np.log(2.0)
    boxes = decode_boxes(logits, torch.tensor([[1.0, 0.5]]))
    torch.testing.assert_close(boxes[0, 0, :, 1, 3], torch.tensor([3.5 / 4, 1.5 / 2, 2 / 4, 0.25]))


def test_candidates_batched_equal_single():
    torch.manual_seed(1)
    network = YOLOv2(detector_layers(SMALL, 8, 4), 3, torch.ones(2, 2)).eval()
    images = torch.rand(3, 3, 64, 64)
    batched = candidates(network(images), torch.ones(2, 2), 0.5)
    for k, found in enumerate(batched):
        (single,) = candidates(network(images[k : k + 1]), torch.ones(2, 2), 0.5)
        torch.testing.assert_close(found.boxes_cxcywh_norm, single.boxes_cxcywh_norm)
        torch.testing.assert_close(found.logits, single.logits, rtol=1e-4, atol=1e-5)


def update(metric, image, boxes, labels, scores, truth, truth_labels, difficult=None):
    found = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.long),
        "scores": torch.tensor(scores),
    }
    known = {
        "image_id": image,
        "boxes": torch.tensor(truth, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(truth_labels, dtype=torch.long),
        "difficult": torch.tensor(difficult or [0] * len(truth_labels), dtype=torch.bool),
    }
    metric.update([found], [known])


def per_class(metric):
    metric.compute()
    return metric.per_class


def test_average_precision_by_hand():
    metric = BoxAveragePrecision()
    box, far = [10, 10, 50, 50], [60, 60, 90, 90]
    update(metric, 0, [box, far], [3, 3], [0.9, 0.95], [box], [3])
    update(metric, 1, [box], [3], [0.8], [box], [3])
    result = per_class(metric)
    # by score: miss, hit, hit; precision at recall 1/2 and 1 is at best 2/3
    assert result[3]["AP50"] == pytest.approx(2 / 3, abs=1e-6)
    assert set(result) == {3}


def test_average_precision_ignores_padding_difficult_and_other_classes():
    metric = BoxAveragePrecision()
    box, hard = [10, 10, 50, 50], [60, 60, 90, 90]
    update(metric, 0, [box, hard, box], [0, 0, 7], [0.8, 0.9, 0.99], [box, hard], [0, 0], [0, 1])
    update(metric, -1, [box], [0], [0.99], [hard], [0])
    assert per_class(metric)[0]["AP50"] == pytest.approx(1.0)


def test_a_difficult_object_excuses_only_what_overlaps_it():
    metric = BoxAveragePrecision()
    large, inside = [0, 0, 100, 100], [[10, 10, 20, 20], [40, 40, 50, 50]]
    clear = [200, 200, 240, 240]
    boxes = [*inside, clear]
    update(metric, 0, boxes, [0, 0, 0], [0.9, 0.9, 0.5], [large, clear], [0, 0], [1, 0])
    # two false ones above the hit: they overlap the difficult object by a hundredth
    assert per_class(metric)[0]["AP50"] == pytest.approx(1 / 3, abs=1e-6)


def test_average_precision_of_nothing():
    assert per_class(BoxAveragePrecision()) == {}
    metric = BoxAveragePrecision()
    update(metric, 0, [], [], [], [[0, 0, 9, 9]], [1])
    assert per_class(metric)[1]["AP50"] == 0
    metric.reset()
    assert per_class(metric) == {}
    assert set(metric.figures.values()) == {-1.0}


def test_average_precision_falls_with_the_overlap():
    metric = BoxAveragePrecision()
    truth, found = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[0.0, 0, 10, 7.2]])
    assert xyxy_to_cxcywh(truth).tolist() == [[5, 5, 10, 10]]
    update(metric, 0, found.tolist(), [2], [0.5], truth.tolist(), [2])
    result = per_class(metric)[2]
    assert result["AP50"] == pytest.approx(1.0)
    assert result["AP"] == pytest.approx(0.5)  # IoU 0.72: five of the ten thresholds
