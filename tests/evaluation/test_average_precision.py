"""COCO and Pascal VOC metrics, computed by hand and against published results."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics import MetricCollection

from tests.helpers.detections import add, metrics_of, random_image, with_image_id
from yolo_lightning.errors import InputError
from yolo_lightning.evaluation import coco, matching
from yolo_lightning.evaluation.average_precision import BoxAveragePrecision
from yolo_lightning.evaluation.coco import COCO_METRICS, evaluate_coco
from yolo_lightning.evaluation.voc import VOC_METRICS, evaluate_voc

Box = tuple[float, float, float, float]
A: Box = (0, 0, 10, 10)
B: Box = (20, 20, 40, 40)
C: Box = (50, 50, 150, 150)


def target(image: int, label: int, box: Box, flag: int = 0, area: float = 0) -> list[float]:
    return [image, label, area, flag, *box]


def detection(image: int, label: int, score: float, box: Box) -> list[float]:
    return [image, label, score, 0, *box]


def rows(*items: list[float]) -> Any:
    return np.array(items, dtype=np.float64).reshape(-1, 8)


def test_metrics_by_size():
    # 100, 400 and 10,000 px: small, small, large; the large one is missed
    targets = rows(target(0, 3, A), target(0, 3, B), target(1, 3, C))
    detections = rows(detection(0, 3, 0.9, A), detection(0, 3, 0.8, B))
    metrics = evaluate_coco(targets, detections).metrics
    assert tuple(metrics) == COCO_METRICS
    assert metrics["AP_small"] == pytest.approx(1)
    assert metrics["AP_medium"] == -1
    assert metrics["AP_large"] == 0
    assert metrics["AR_100"] == pytest.approx(2 / 3)
    assert metrics["AR_1"] == pytest.approx(1 / 3)
    # precision 1 up to a recall of 2/3: 67 of the 101 points
    assert metrics["AP50"] == pytest.approx(67 / 101, abs=1e-12)
    assert metrics["AP"] == pytest.approx(67 / 101, abs=1e-12)


def test_the_given_area_determines_the_size():
    targets = rows(target(0, 0, C, area=900))  # an outline that fills a tenth of its box
    metrics = evaluate_coco(targets, rows(detection(0, 0, 0.9, C))).metrics
    assert metrics["AP_small"] == pytest.approx(1)
    assert metrics["AP_large"] == -1


def test_all_detections_inside_a_crowd_are_ignored():
    inside: list[Box] = [(0, 0, 10, 10), (20, 20, 30, 30), (60, 60, 70, 70)]
    targets = rows(target(0, 0, (0, 0, 100, 100), flag=2), target(0, 0, (200, 200, 240, 240)))
    boxes = [detection(0, 0, 0.9 - k / 10, box) for k, box in enumerate(inside)]
    detections = rows(*boxes, detection(0, 0, 0.1, (200, 200, 240, 240)))
    assert evaluate_coco(targets, detections).metrics["AP50"] == pytest.approx(1)
    targets[0, 3] = 1  # a difficult object is matched by plain IoU, and these boxes are small in it
    assert evaluate_coco(targets, detections).metrics["AP50"] < 0.3


def test_all_detections_on_a_difficult_target_are_ignored():
    near: Box = (1, 0, 11, 10)
    targets = rows(target(0, 0, A, flag=1), target(0, 0, B))
    detections = rows(detection(0, 0, 0.9, A), detection(0, 0, 0.8, near), detection(0, 0, 0.7, B))
    assert evaluate_coco(targets, detections).metrics["AP50"] == pytest.approx(1)
    detections[1, 1] = 5  # of another class, which has no target and is not evaluated
    assert evaluate_coco(targets, detections).metrics["AP50"] == pytest.approx(1)


def test_evaluating_classes_in_parts_gives_equal_results(monkeypatch):
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 80, (60, 2))
    targets = np.zeros((60, 8))
    targets[:, 0], targets[:, 1] = rng.integers(0, 9, 60), rng.integers(0, 7, 60)
    targets[:, 4:6], targets[:, 6:8] = low, low + rng.uniform(5, 60, (60, 2))
    detections = targets[rng.integers(0, 60, 200)] + 0.0
    detections[:, 4:] += rng.normal(0, 2, (200, 4))
    detections[:, 2], detections[:, 3] = rng.random(200), 0
    whole = evaluate_coco(targets, detections)
    monkeypatch.setattr(coco, "_MAX_ROWS", 40)
    assert evaluate_coco(targets, detections) == whole
    assert 0 < whole.metrics["AP"] < 1
    assert len(whole.per_class) == 7
    mean = np.mean([row["AP75"] for row in whole.per_class.values()])
    assert whole.metrics["AP75"] == pytest.approx(mean)


def test_metrics_without_targets_are_undefined():
    assert set(evaluate_coco(rows(), rows()).metrics.values()) == {-1.0}
    only_difficult = rows(target(0, 0, A, flag=1))
    assert evaluate_coco(only_difficult, rows(detection(0, 0, 0.5, A))).per_class == {}
    assert evaluate_voc(only_difficult, rows(detection(0, 0, 0.5, A))) == {}
    missed = evaluate_coco(rows(target(0, 0, A)), rows())
    assert missed.metrics["AP"] == 0


# --- Pascal VOC


def test_voc_uses_the_highest_precision_at_each_recall_and_above():
    targets = rows(target(0, 0, A), target(1, 0, A))
    detections = rows(detection(0, 0, 0.9, A), detection(0, 0, 0.8, B), detection(1, 0, 0.7, A))
    assert evaluate_voc(targets, detections)[0] == pytest.approx(
        {"VOC07_AP50": (6 + 5 * 2 / 3) / 11, "VOC_AP50": 0.5 + 0.5 * 2 / 3}
    )


def test_voc_matches_the_most_overlapped_target_even_if_already_matched():
    near: Box = (1, 0, 11, 10)  # IoU with A 9/11, with `aside` more than a half
    aside: Box = (4, 0, 14, 10)
    targets = rows(target(0, 0, A), target(0, 0, aside))
    detections = rows(detection(0, 0, 0.9, A), detection(0, 0, 0.8, near))
    # COCO matches the second detection to the unmatched target
    assert evaluate_voc(targets, detections)[0]["VOC_AP50"] == pytest.approx(0.5)
    assert evaluate_coco(targets, detections).per_class[0]["AP50"] > 0.99


def test_voc_ignores_difficult_targets_and_crowds():
    targets = rows(target(0, 0, A), target(0, 0, B, flag=1), target(0, 0, C, flag=2))
    detections = rows(
        detection(0, 0, 0.9, B), detection(0, 0, 0.85, B), detection(0, 0, 0.8, C),
        detection(0, 0, 0.7, A),
    )  # fmt: skip
    assert evaluate_voc(targets, detections)[0]["VOC_AP50"] == pytest.approx(1)


def test_voc_iou_threshold_is_inclusive():
    half: Box = (0, 0, 10, 5)
    less: Box = (0, 0, 10, 4.99)
    for box, expected in ((half, 1), (less, 0)):
        found = evaluate_voc(rows(target(0, 0, A)), rows(detection(0, 0, 1, box)))
        assert found == {0: dict.fromkeys(VOC_METRICS, expected)}


def match_one_by_one(targets: Any, detections: Any, threshold: float) -> list[tuple[int, int]]:
    """Return each detection's class, and 1 if true positive, 0 if false, -1 if ignored."""
    matched: set[int] = set()
    out = []
    for row in detections[np.argsort(-detections[:, 2], kind="stable")]:
        candidates = np.flatnonzero((targets[:, :2] == row[:2]).all(axis=1))
        overlaps = []
        for x1, y1, x2, y2 in targets[candidates, 4:]:
            width, height = min(x2, row[6]) - max(x1, row[4]), min(y2, row[7]) - max(y1, row[5])
            both = max(width, 0) * max(height, 0)
            areas = (x2 - x1) * (y2 - y1) + (row[6] - row[4]) * (row[7] - row[5])
            overlaps.append(both / (areas - both))
        hit = 0
        if overlaps and max(overlaps) >= threshold:
            best = int(candidates[int(np.argmax(overlaps))])
            hit = -1 if targets[best, 3] else int(best not in matched)
            matched.add(best)
        out.append((int(row[1]), hit))
    return out


@pytest.mark.parametrize("max_pairs", [1, 9, 10**6])
def test_voc_hits_equal_matching_one_by_one(monkeypatch, max_pairs):
    monkeypatch.setattr(matching, "_MAX_PAIRS", max_pairs)
    rng = np.random.default_rng(max_pairs)
    low = rng.integers(0, 60, (50, 2))
    targets = np.column_stack([
        rng.integers(0, 5, 50), rng.integers(0, 3, 50), np.zeros(50),
        rng.choice([0, 0, 0, 1, 2], 50), low, low + rng.integers(5, 50, (50, 2)),
    ]).astype(float)  # fmt: skip
    detections = targets[rng.integers(0, 50, 300)]
    detections[:, 4:] += rng.integers(-3, 4, (300, 4))
    detections[:, 2], detections[:, 3] = rng.integers(0, 20, 300) / 20, 0  # many scores are equal
    expected = match_one_by_one(targets, detections, 0.5)
    assert {hit for _, hit in expected} == {-1, 0, 1}
    for label, found in evaluate_voc(targets, detections).items():
        hits = np.array([hit for node, hit in expected if node == label and hit >= 0])
        true, count = np.cumsum(hits), np.sum((targets[:, 1] == label) & (targets[:, 3] == 0))
        best = [(true / np.arange(1, len(true) + 1))[k:].max() for k in np.flatnonzero(hits)]
        assert found["VOC_AP50"] == pytest.approx(sum(best) / count)


# --- the metric


@pytest.fixture
def torchmetrics_map(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return torchmetrics' metric, with a stand-in for torchvision where that is missing."""
    mean_ap = pytest.importorskip("torchmetrics.detection.mean_ap")

    def box_convert(boxes: Tensor, in_fmt: str, out_fmt: str) -> Tensor:
        assert (in_fmt, out_fmt) == ("xyxy", "xywh")
        return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)

    if not mean_ap._TORCHVISION_AVAILABLE:
        part: Any = ModuleType("torchvision.ops")
        part.box_convert = box_convert
        monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
        monkeypatch.setitem(sys.modules, "torchvision.ops", part)
        monkeypatch.setattr(mean_ap, "_TORCHVISION_AVAILABLE", True)
    return mean_ap.MeanAveragePrecision(
        backend="faster_coco_eval",
        class_metrics=True,
        # the defaults are rounded to single precision, where a recall of exactly 0.6 falls short
        iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
        rec_thresholds=np.linspace(0, 1, 101).tolist(),
    )


TORCHMETRICS_NAMES = dict(zip(COCO_METRICS, (
    "map", "map_50", "map_75", "map_small", "map_medium", "map_large",
    "mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large",
), strict=True))  # fmt: skip


def test_metrics_in_a_collection_equal_those_of_torchmetrics(torchmetrics_map):
    metric = BoxAveragePrecision()
    both = MetricCollection({"ours": metric, "theirs": torchmetrics_map}, prefix="val/")
    for start in range(0, 42, 7):
        add(both, *(random_image(k) for k in range(start, start + 7)))
    result = both.compute()
    for ours, theirs in TORCHMETRICS_NAMES.items():
        assert result[f"val/{ours}"].shape == ()
        assert float(result[f"val/{ours}"]) == pytest.approx(
            float(result[f"val/{theirs}"]), abs=1e-6
        )
    assert 0.05 < result["val/AP"] < result["val/VOC_AP50"] < 0.9
    per_class = both["ours"].per_class
    assert sorted(per_class) == [0, 1, 2, 3, 4]  # class 5 has no targets
    shown = zip(result["val/classes"].tolist(), result["val/map_per_class"].tolist(), strict=True)
    assert {k: row["AP"] for k, row in per_class.items()} == pytest.approx(
        {k: value for k, value in shown if k in per_class}
    )
    for name in VOC_METRICS:
        mean = np.mean([row[name] for row in per_class.values()])
        assert float(result[f"val/{name}"]) == pytest.approx(mean)


def test_a_repeated_image_counts_once_and_padding_does_not_count():
    images = [random_image(k) for k in range(4)]
    once = metrics_of(*(with_image_id(k, image) for k, image in enumerate(images)))
    metric = BoxAveragePrecision()
    add(
        metric,
        with_image_id(3, images[3]),
        with_image_id(0, images[0]),
        with_image_id(-1, images[1]),
    )
    add(
        metric,
        with_image_id(0, images[2]),
        with_image_id(2, images[2]),
        with_image_id(1, images[1]),
    )
    add(metric, with_image_id(3, images[3]), with_image_id(-1, images[1]))
    metric.compute()
    assert metric.results == once
    targets, detections = metric.tables
    assert np.unique(targets[:, 0]).tolist() == np.unique(detections[:, 0]).tolist() == [0, 1, 2, 3]
    assert targets.shape[1] == detections.shape[1] == 8
    assert len(targets) == sum(len(target["labels"]) for _, target in images)


def test_images_without_an_id_all_count_in_order():
    twice = random_image(2)
    metric = BoxAveragePrecision()
    add(metric, twice)
    add(metric, with_image_id(5, random_image(1)), twice)
    metric.compute()
    assert np.unique(metric.tables[0][:, 0]).tolist() == [5, 6, 7]
    assert metric.results == metrics_of(random_image(1), twice, twice)


def test_forward_returns_the_batch_value_and_accumulates():
    images = [random_image(k) for k in range(6)]
    metric = BoxAveragePrecision()
    for start in (0, 3):
        part = images[start : start + 3]
        batch_value = metric([one for one, _ in part], [one for _, one in part])
        assert {k: float(v) for k, v in batch_value.items()} == pytest.approx(metrics_of(*part))
    metric.compute()
    assert metric.results == metrics_of(*images)


def test_the_hundred_highest_scoring_detections_of_an_image_are_kept():
    scores = torch.linspace(0.01, 1, 500)[
        torch.randperm(500, generator=torch.Generator().manual_seed(0))
    ]
    boxes = torch.arange(500.0)[:, None] + torch.tensor([0.0, 0, 9, 9])
    preds = {"boxes": boxes, "labels": torch.zeros(500, dtype=torch.long), "scores": scores}
    labels = {"boxes": boxes[:1], "labels": torch.zeros(1, dtype=torch.long)}
    metric = BoxAveragePrecision()
    add(metric, (preds, labels))
    assert [len(part) for part in metric.detections] == [100]
    metric.compute()
    kept = metric.tables[1]
    assert sorted(kept[:, 2]) == pytest.approx(sorted(scores.tolist())[-100:])
    assert (scores[kept[:, 4].astype(int)].numpy() == kept[:, 2].astype(np.float32)).all()


@pytest.mark.parametrize(
    ("preds", "target", "message"),
    [
        ({"scores": None}, {}, "preds, image 1: scores missing"),
        ({}, {"labels": None}, "target, image 1: labels missing"),
        ({"scores": torch.zeros(2)}, {}, "preds, image 1: lengths differ: .*'scores': 2"),
        ({}, {"difficult": torch.zeros(3)}, "target, image 1: lengths differ: .*'difficult': 3"),
    ],
)
def test_invalid_input_is_refused(preds, target, message):
    one = {"boxes": torch.zeros(1, 4), "labels": torch.zeros(1, dtype=torch.long)}
    good = ({**one, "scores": torch.zeros(1)}, one)
    bad = tuple(
        {k: v for k, v in {**part, **new}.items() if v is not None}
        for part, new in zip(good, (preds, target), strict=True)
    )
    with pytest.raises(InputError, match=message):
        BoxAveragePrecision().update([good[0], bad[0]], [good[1], bad[1]])
    with pytest.raises(InputError, match="preds has 1 images, target has 2"):
        BoxAveragePrecision().update([good[0]], [good[1], good[1]])


# --- published results


@pytest.mark.data
def test_coco_metrics_equal_the_official_ones(real_data):
    folder = real_data / "eval_cases/test_coco_eval"
    parts = [
        json.loads((folder / name).read_text())["annotations"]
        for name in ("gts/sampled_gts_bbox_area.json", "dets/sampled_bbox_results.json")
    ]
    targets, detections = (
        rows(
            *(
                [a["image_id"], a["category_id"], a.get("score", 0), 2 * a.get("iscrowd", 0), x, y,
                 x + w, y + h]
                for a in part
                for x, y, w, h in [a["bbox"]]
            )
        )
        for part in parts
    )  # fmt: skip
    official = [
        0.503647, 0.696973, 0.571667, 0.593252, 0.557991, 0.489363, 0.386813, 0.593680, 0.595353,
        0.654764, 0.603130, 0.553744,
    ]  # fmt: skip
    metrics = evaluate_coco(targets, detections).metrics
    assert list(metrics.values()) == pytest.approx(official, abs=1e-6)


@pytest.mark.data
def test_voc_metrics_equal_published_ones(real_data):
    def boxes(folder: Path) -> Any:
        lines = [
            (int(file.stem), line.split()[1:])
            for file in sorted(folder.glob("*.txt"))
            for line in file.read_text().splitlines()
        ]
        out = np.zeros((len(lines), 8))
        for row, (image, values) in zip(out, lines, strict=True):
            *score, x, y, width, height = map(float, values)
            # these boxes include their last pixel
            row[:] = [image, 0, *(score or [0]), 0, x, y, x + width + 1, y + height + 1]
        return out

    folder = real_data / "eval_cases/test_case_1"
    targets, detections = boxes(folder / "gts"), boxes(folder / "dets")
    ious = (0.1, 0.3, 0.5, 0.75)
    found = [evaluate_voc(targets, detections, iou)[0] for iou in ious]
    eleven_points, every_point = ([row[name] for row in found] for name in VOC_METRICS)
    assert eleven_points == pytest.approx([1 / 3, 0.2683982683, 0.0303030303, 0], abs=1e-6)
    assert every_point == pytest.approx([0.3371980676, 0.2456866804, 0.0222222222, 0], abs=1e-6)
