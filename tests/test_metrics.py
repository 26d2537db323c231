"""COCO's twelve numbers and Pascal VOC's, by hand and against known results."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yolo_lightning import metrics
from yolo_lightning.metrics import COCO_FIGURES, coco_evaluation, voc_average_precision

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
    monkeypatch.setattr(metrics, "_MOST_ROWS", 40)
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
