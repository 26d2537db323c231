"""COCO's twelve numbers and Pascal VOC's, by hand and against known results."""

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

from tests.helpers.detections import add, figures_of, known_as, random_image
from yolo_lightning.errors import InputError
from yolo_lightning.evaluation import coco as cocometrics
from yolo_lightning.evaluation import matching as boxtables
from yolo_lightning.evaluation.average_precision import BoxAveragePrecision
from yolo_lightning.evaluation.coco import COCO_FIGURES, coco_evaluation
from yolo_lightning.evaluation.voc import VOC_FIGURES, voc_average_precision

Box = tuple[float, float, float, float]
A: Box = (0, 0, 10, 10)
B: Box = (20, 20, 40, 40)
C: Box = (50, 50, 150, 150)


def truth(image: int, label: int, box: Box, flag: int = 0, area: float = 0) -> list[float]:
    return [image, label, area, flag, *box]


def found(image: int, label: int, score: float, box: Box) -> list[float]:
    return [image, label, score, 0, *box]


def rows(*items: list[float]) -> Any:
    return np.array(items, dtype=np.float64).reshape(-1, 8)


def test_sizes_have_figures_of_their_own():
    # 100, 400 and 10,000 px: small, small, large; the large one is missed
    truths = rows(truth(0, 3, A), truth(0, 3, B), truth(1, 3, C))
    said = rows(found(0, 3, 0.9, A), found(0, 3, 0.8, B))
    figures = coco_evaluation(truths, said).figures
    assert tuple(figures) == COCO_FIGURES
    assert figures["AP_small"] == pytest.approx(1)
    assert figures["AP_medium"] == -1
    assert figures["AP_large"] == 0
    assert figures["AR_100"] == pytest.approx(2 / 3)
    assert figures["AR_1"] == pytest.approx(1 / 3)
    # precision 1 up to a recall of 2/3: 67 of the 101 points
    assert figures["AP"] == figures["AP50"] == pytest.approx(67 / 101)


def test_a_stated_area_decides_about_the_size():
    truths = rows(truth(0, 0, C, area=900))  # an outline that fills a tenth of its box
    figures = coco_evaluation(truths, rows(found(0, 0, 0.9, C))).figures
    assert figures["AP_small"] == pytest.approx(1)
    assert figures["AP_large"] == -1


def test_a_crowd_takes_any_number_of_detections():
    inside: list[Box] = [(0, 0, 10, 10), (20, 20, 30, 30), (60, 60, 70, 70)]
    truths = rows(truth(0, 0, (0, 0, 100, 100), flag=2), truth(0, 0, (200, 200, 240, 240)))
    boxes = [found(0, 0, 0.9 - k / 10, box) for k, box in enumerate(inside)]
    said = rows(*boxes, found(0, 0, 0.1, (200, 200, 240, 240)))
    assert coco_evaluation(truths, said).figures["AP50"] == pytest.approx(1)
    truths[0, 3] = 1  # a difficult object is matched by plain IoU, and these boxes are small in it
    assert coco_evaluation(truths, said).figures["AP50"] < 0.3


def test_any_number_of_detections_on_a_difficult_object_counts_for_nothing():
    near: Box = (1, 0, 11, 10)
    truths = rows(truth(0, 0, A, flag=1), truth(0, 0, B))
    said = rows(found(0, 0, 0.9, A), found(0, 0, 0.8, near), found(0, 0, 0.7, B))
    assert coco_evaluation(truths, said).figures["AP50"] == pytest.approx(1)
    said[1, 1] = 5  # of another class it is a mistake, though of a class that nobody asks for
    assert coco_evaluation(truths, said).figures["AP50"] == pytest.approx(1)


def test_parts_of_the_classes_give_what_all_at_once_give(monkeypatch):
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 80, (60, 2))
    truths = np.zeros((60, 8))
    truths[:, 0], truths[:, 1] = rng.integers(0, 9, 60), rng.integers(0, 7, 60)
    truths[:, 4:6], truths[:, 6:8] = low, low + rng.uniform(5, 60, (60, 2))
    said = truths[rng.integers(0, 60, 200)] + 0.0
    said[:, 4:] += rng.normal(0, 2, (200, 4))
    said[:, 2], said[:, 3] = rng.random(200), 0
    whole = coco_evaluation(truths, said)
    monkeypatch.setattr(cocometrics, "_MAX_ROWS", 40)
    assert coco_evaluation(truths, said) == whole
    assert 0 < whole.figures["AP"] < 1
    assert len(whole.per_class) == 7
    mean = np.mean([row["AP75"] for row in whole.per_class.values()])
    assert whole.figures["AP75"] == pytest.approx(mean)


def test_nothing_to_ask_for_says_nothing():
    assert set(coco_evaluation(rows(), rows()).figures.values()) == {-1.0}
    only_hard = rows(truth(0, 0, A, flag=1))
    assert coco_evaluation(only_hard, rows(found(0, 0, 0.5, A))).per_class == {}
    assert voc_average_precision(only_hard, rows(found(0, 0, 0.5, A))) == {}
    missed = coco_evaluation(rows(truth(0, 0, A)), rows())
    assert missed.figures["AP"] == 0


# --- Pascal VOC


@pytest.mark.parametrize(
    ("points", "expected"), [(None, 0.5 + 0.5 * 2 / 3), (11, (6 + 5 * 2 / 3) / 11)]
)
def test_voc_takes_the_best_precision_at_each_recall_and_beyond(points, expected):
    truths = rows(truth(0, 0, A), truth(1, 0, A))
    said = rows(found(0, 0, 0.9, A), found(0, 0, 0.8, B), found(1, 0, 0.7, A))
    assert voc_average_precision(truths, said, points=points)[0] == pytest.approx(expected)


def test_voc_asks_for_the_truth_that_is_overlapped_most_taken_or_not():
    near: Box = (1, 0, 11, 10)  # IoU with A 9/11, with `aside` more than a half
    aside: Box = (4, 0, 14, 10)
    truths = rows(truth(0, 0, A), truth(0, 0, aside))
    said = rows(found(0, 0, 0.9, A), found(0, 0, 0.8, near))
    # COCO would give the second one the truth that is free
    assert voc_average_precision(truths, said)[0] == pytest.approx(0.5)
    assert coco_evaluation(truths, said).per_class[0]["AP50"] > 0.99


def test_voc_neither_asks_for_difficult_objects_nor_punishes_them():
    truths = rows(truth(0, 0, A), truth(0, 0, B, flag=1), truth(0, 0, C, flag=2))
    said = rows(
        found(0, 0, 0.9, B), found(0, 0, 0.85, B), found(0, 0, 0.8, C), found(0, 0, 0.7, A)
    )  # fmt: skip
    assert voc_average_precision(truths, said)[0] == pytest.approx(1)


def test_voc_at_an_overlap_of_exactly_the_threshold():
    half: Box = (0, 0, 10, 5)
    assert voc_average_precision(rows(truth(0, 0, A)), rows(found(0, 0, 1, half)))[0] == 1
    less = rows(found(0, 0, 1, (0, 0, 10, 4.99)))
    assert voc_average_precision(rows(truth(0, 0, A)), less)[0] == 0


def one_by_one(truths: Any, said: Any, threshold: float) -> list[tuple[int, int]]:
    """Return each detection's class, and 1 for a hit, 0 for a miss, -1 for none of both."""
    taken: set[int] = set()
    out = []
    for row in said[np.argsort(-said[:, 2], kind="stable")]:
        own = np.flatnonzero((truths[:, :2] == row[:2]).all(axis=1))
        overlaps = []
        for x1, y1, x2, y2 in truths[own, 4:]:
            width, height = min(x2, row[6]) - max(x1, row[4]), min(y2, row[7]) - max(y1, row[5])
            both = max(width, 0) * max(height, 0)
            areas = (x2 - x1) * (y2 - y1) + (row[6] - row[4]) * (row[7] - row[5])
            overlaps.append(both / (areas - both))
        hit = 0
        if overlaps and max(overlaps) >= threshold:
            best = int(own[int(np.argmax(overlaps))])
            hit = -1 if truths[best, 3] else int(best not in taken)
            taken.add(best)
        out.append((int(row[1]), hit))
    return out


@pytest.mark.parametrize("at_once", [1, 9, 10**6])
def test_voc_counts_all_at_once_what_it_counts_one_by_one(monkeypatch, at_once):
    monkeypatch.setattr(boxtables, "_MAX_PAIRS", at_once)
    rng = np.random.default_rng(at_once)
    low = rng.integers(0, 60, (50, 2))
    truths = np.column_stack([
        rng.integers(0, 5, 50), rng.integers(0, 3, 50), np.zeros(50),
        rng.choice([0, 0, 0, 1, 2], 50), low, low + rng.integers(5, 50, (50, 2)),
    ]).astype(float)  # fmt: skip
    said = truths[rng.integers(0, 50, 300)]
    said[:, 4:] += rng.integers(-3, 4, (300, 4))
    said[:, 2], said[:, 3] = rng.integers(0, 20, 300) / 20, 0  # many scores are equal
    found = one_by_one(truths, said, 0.5)
    assert {hit for _, hit in found} == {-1, 0, 1}
    for label, precision in voc_average_precision(truths, said).items():
        hits = np.array([hit for own, hit in found if own == label and hit >= 0])
        true, count = np.cumsum(hits), np.sum((truths[:, 1] == label) & (truths[:, 3] == 0))
        best = [(true / np.arange(1, len(true) + 1))[k:].max() for k in np.flatnonzero(hits)]
        assert precision == pytest.approx(sum(best) / count)


# --- the metric


@pytest.fixture
def their_metric(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torchmetrics' own; where torchvision is missing, the one function that it needs stands in."""
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
        # its own are rounded to single precision, and a recall of exactly 0.6 falls short of one
        iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
        rec_thresholds=np.linspace(0, 1, 101).tolist(),
    )


THEIR_NAMES = dict(zip(COCO_FIGURES, (
    "map", "map_50", "map_75", "map_small", "map_medium", "map_large",
    "mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large",
), strict=True))  # fmt: skip


def test_in_a_collection_all_numbers_are_those_of_torchmetrics(their_metric):
    metric = BoxAveragePrecision()
    both = MetricCollection({"ours": metric, "theirs": their_metric}, prefix="val/")
    for start in range(0, 42, 7):
        add(both, *(random_image(k) for k in range(start, start + 7)))
    result = both.compute()
    for ours, theirs in THEIR_NAMES.items():
        assert result[f"val/{ours}"].shape == ()
        assert float(result[f"val/{ours}"]) == pytest.approx(
            float(result[f"val/{theirs}"]), abs=1e-6
        )
    assert 0.05 < result["val/AP"] < result["val/VOC_AP50"] < 0.9
    per_class = both["ours"].per_class
    assert sorted(per_class) == [0, 1, 2, 3, 4]  # nothing is of the class 5
    shown = zip(result["val/classes"].tolist(), result["val/map_per_class"].tolist(), strict=True)
    assert {k: row["AP"] for k, row in per_class.items()} == pytest.approx(
        {k: value for k, value in shown if k in per_class}
    )
    for name in VOC_FIGURES:
        mean = np.mean([row[name] for row in per_class.values()])
        assert float(result[f"val/{name}"]) == pytest.approx(mean)


def test_an_image_that_comes_twice_counts_once_and_padding_never():
    images = [random_image(k) for k in range(4)]
    once = figures_of(*(known_as(k, image) for k, image in enumerate(images)))
    metric = BoxAveragePrecision()
    add(metric, known_as(3, images[3]), known_as(0, images[0]), known_as(-1, images[1]))
    add(metric, known_as(0, images[2]), known_as(2, images[2]), known_as(1, images[1]))
    add(metric, known_as(3, images[3]), known_as(-1, images[1]))
    metric.compute()
    assert metric.figures == once
    truths, said = metric.tables
    assert np.unique(truths[:, 0]).tolist() == np.unique(said[:, 0]).tolist() == [0, 1, 2, 3]
    assert truths.shape[1] == said.shape[1] == 8
    assert len(truths) == sum(len(known["labels"]) for _, known in images)


def test_images_without_an_id_all_count_in_their_order():
    twice = random_image(2)
    metric = BoxAveragePrecision()
    add(metric, twice)
    add(metric, known_as(5, random_image(1)), twice)
    metric.compute()
    assert np.unique(metric.tables[0][:, 0]).tolist() == [5, 6, 7]
    assert metric.figures == figures_of(random_image(1), twice, twice)


def test_calling_the_metric_tells_of_the_batch_and_keeps_all():
    images = [random_image(k) for k in range(6)]
    metric = BoxAveragePrecision()
    for start in (0, 3):
        part = images[start : start + 3]
        told = metric([found for found, _ in part], [truth for _, truth in part])
        assert {k: float(v) for k, v in told.items()} == pytest.approx(figures_of(*part))
    metric.compute()
    assert metric.figures == figures_of(*images)


def test_an_evaluation_keeps_the_surest_hundred_detections_of_an_image():
    scores = torch.linspace(0.01, 1, 500)[
        torch.randperm(500, generator=torch.Generator().manual_seed(0))
    ]
    boxes = torch.arange(500.0)[:, None] + torch.tensor([0.0, 0, 9, 9])
    found = {"boxes": boxes, "labels": torch.zeros(500, dtype=torch.long), "scores": scores}
    truth = {"boxes": boxes[:1], "labels": torch.zeros(1, dtype=torch.long)}
    metric = BoxAveragePrecision()
    add(metric, (found, truth))
    assert [len(part) for part in metric.detections] == [100]
    metric.compute()
    kept = metric.tables[1]
    assert sorted(kept[:, 2]) == pytest.approx(sorted(scores.tolist())[-100:])
    assert (scores[kept[:, 4].astype(int)].numpy() == kept[:, 2].astype(np.float32)).all()


@pytest.mark.parametrize(
    ("found", "truth", "said"),
    [
        ({"scores": None}, {}, "preds, image 1: scores missing"),
        ({}, {"labels": None}, "target, image 1: labels missing"),
        ({"scores": torch.zeros(2)}, {}, "preds, image 1: lengths differ: .*'scores': 2"),
        ({}, {"difficult": torch.zeros(3)}, "target, image 1: lengths differ: .*'difficult': 3"),
    ],
)
def test_what_the_metric_cannot_take_is_named(found, truth, said):
    one = {"boxes": torch.zeros(1, 4), "labels": torch.zeros(1, dtype=torch.long)}
    good = ({**one, "scores": torch.zeros(1)}, one)
    bad = tuple(
        {k: v for k, v in {**part, **new}.items() if v is not None}
        for part, new in zip(good, (found, truth), strict=True)
    )
    with pytest.raises(InputError, match=said):
        BoxAveragePrecision().update([good[0], bad[0]], [good[1], bad[1]])
    with pytest.raises(InputError, match="preds are of 1 images, target of 2"):
        BoxAveragePrecision().update([good[0]], [good[1], good[1]])


# --- known results


@pytest.mark.data
def test_coco_s_twelve_numbers_are_the_official_ones(real_data):
    folder = real_data / "eval_cases/test_coco_eval"
    parts = [
        json.loads((folder / name).read_text())["annotations"]
        for name in ("gts/sampled_gts_bbox_area.json", "dets/sampled_bbox_results.json")
    ]
    truths, said = (
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
    figures = coco_evaluation(truths, said).figures
    assert list(figures.values()) == pytest.approx(official, abs=1e-6)


@pytest.mark.data
def test_voc_s_eight_numbers_are_the_known_ones(real_data):
    def boxes(folder: Path) -> Any:
        lines = [
            (int(file.stem), line.split()[1:])
            for file in sorted(folder.glob("*.txt"))
            for line in file.read_text().splitlines()
        ]
        out = np.zeros((len(lines), 8))
        for row, (image, values) in zip(out, lines, strict=True):
            *score, x, y, width, height = map(float, values)
            # pixels are counted there, the last one included
            row[:] = [image, 0, *(score or [0]), 0, x, y, x + width + 1, y + height + 1]
        return out

    folder = real_data / "eval_cases/test_case_1"
    truths, said = boxes(folder / "gts"), boxes(folder / "dets")
    at = (0.1, 0.3, 0.5, 0.75)
    eleven = [voc_average_precision(truths, said, iou, 11)[0] for iou in at]
    every = [voc_average_precision(truths, said, iou)[0] for iou in at]
    assert eleven == pytest.approx([1 / 3, 0.2683982683, 0.0303030303, 0], abs=1e-6)
    assert every == pytest.approx([0.3371980676, 0.2456866804, 0.0222222222, 0], abs=1e-6)
