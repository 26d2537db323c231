"""`BoxAveragePrecision`: average precision by hand."""

import pytest
import torch

from yolo_lightning.boxes import xyxy_to_cxcywh
from yolo_lightning.evaluation.average_precision import BoxAveragePrecision


def update(metric, image, boxes, labels, scores, target_boxes, target_labels, difficult=None):
    preds = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.long),
        "scores": torch.tensor(scores),
    }
    targets = {
        "image_id": image,
        "boxes": torch.tensor(target_boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(target_labels, dtype=torch.long),
        "difficult": torch.tensor(difficult or [0] * len(target_labels), dtype=torch.bool),
    }
    metric.update([preds], [targets])


def per_class(metric):
    metric.compute()
    return metric.per_class


def test_average_precision_by_hand():
    metric = BoxAveragePrecision()
    box, far = [10, 10, 50, 50], [60, 60, 90, 90]
    update(metric, 0, [box, far], [3, 3], [0.9, 0.95], [box], [3])
    update(metric, 1, [box], [3], [0.8], [box], [3])
    result = per_class(metric)
    # by score: false, true, true positive; the maximum precision at recall 1/2 and 1 is 2/3
    assert result[3]["AP50"] == pytest.approx(2 / 3, abs=1e-6)
    assert set(result) == {3}


def test_average_precision_ignores_padding_difficult_and_other_classes():
    metric = BoxAveragePrecision()
    box, difficult = [10, 10, 50, 50], [60, 60, 90, 90]
    update(
        metric,
        0,
        [box, difficult, box],
        [0, 0, 7],
        [0.8, 0.9, 0.99],
        [box, difficult],
        [0, 0],
        [0, 1],
    )
    update(metric, -1, [box], [0], [0.99], [difficult], [0])
    assert per_class(metric)[0]["AP50"] == pytest.approx(1.0)


def test_only_detections_that_overlap_a_difficult_object_are_ignored():
    metric = BoxAveragePrecision()
    large, inside = [0, 0, 100, 100], [[10, 10, 20, 20], [40, 40, 50, 50]]
    clear = [200, 200, 240, 240]
    boxes = [*inside, clear]
    update(metric, 0, boxes, [0, 0, 0], [0.9, 0.9, 0.5], [large, clear], [0, 0], [1, 0])
    # two false positives with higher scores: IoU 0.01 with the difficult object
    assert per_class(metric)[0]["AP50"] == pytest.approx(1 / 3, abs=1e-6)


def test_average_precision_without_objects_or_detections():
    assert per_class(BoxAveragePrecision()) == {}
    metric = BoxAveragePrecision()
    update(metric, 0, [], [], [], [[0, 0, 9, 9]], [1])
    assert per_class(metric)[1]["AP50"] == 0
    metric.reset()
    assert per_class(metric) == {}
    assert set(metric.results.values()) == {-1.0}


def test_average_precision_decreases_with_the_overlap():
    metric = BoxAveragePrecision()
    target, detection = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[0.0, 0, 10, 7.2]])
    assert xyxy_to_cxcywh(target).tolist() == [[5, 5, 10, 10]]
    update(metric, 0, detection.tolist(), [2], [0.5], target.tolist(), [2])
    result = per_class(metric)[2]
    assert result["AP50"] == pytest.approx(1.0)
    assert result["AP"] == pytest.approx(0.5)  # IoU 0.72: five of the ten thresholds
