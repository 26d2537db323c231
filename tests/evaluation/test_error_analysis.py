"""Curves, matching, the confusion matrix and the kinds of errors, computed by hand."""

import math

import numpy as np
import pytest

from tests.helpers.detections import (
    CAT,
    DOG,
    FAR,
    FLAT,
    HALF,
    PIG,
    THIRD,
    detection,
    table,
    target,
)
from yolo_lightning.errors import InputError
from yolo_lightning.evaluation.coco import evaluate_coco
from yolo_lightning.evaluation.curves import (
    CONFIDENCES,
    RECALLS,
    compute_curves,
    mean_precision,
)
from yolo_lightning.evaluation.error_analysis import (
    ERROR_KINDS,
    collapse_to_level,
    confusion_matrix,
    depth_first_order,
    find_errors,
    match_predictions,
    most_confused,
    one_label_per_box,
    weakest_classes,
)
from yolo_lightning.evaluation.matching import empty_table, match_detections
from yolo_lightning.tree.wordtree import WordTree

TREE = WordTree(
    [
        ("animal", "-", "animal"),
        ("thing", "-", "thing"),
        ("dog", "animal", "dog"),
        ("chair", "thing", "chair"),
        ("cat", "animal", "cat"),
        ("collie", "dog", "collie"),
        ("poodle", "dog", "poodle"),
    ]
)


def errors_by_kind(targets, detections, tree=FLAT, confidence=0.25):
    found = find_errors(match_predictions(table(*targets), table(*detections), tree, confidence))
    assert tuple(found) == ERROR_KINDS
    return {kind: each for kind, each in found.items() if each}


def index_of(confidence):
    return int(np.searchsorted(CONFIDENCES, confidence - 1e-9))


def test_curves_equal_those_computed_by_hand():
    targets = table(target(CAT), target(CAT, FAR))
    found = compute_curves(
        targets, table(detection(CAT, 0.9), detection(CAT, 0.8), detection(CAT, 0.7, FAR))
    )
    assert found.nodes.tolist() == [CAT]
    assert found.num_targets.tolist() == [2]
    # precision 1 up to a recall of 0.5; two of three at a recall of 1
    np.testing.assert_allclose(found.precision_at_recall[0, RECALLS <= 0.5], 1)
    np.testing.assert_allclose(found.precision_at_recall[0, RECALLS > 0.5], 2 / 3)
    for confidence, precision, recall, f1 in (
        (0.85, 1, 0.5, 2 / 3),
        (0.75, 0.5, 0.5, 0.5),
        (0.5, 2 / 3, 1, 0.8),
        (0.0, 2 / 3, 1, 0.8),
    ):
        assert found.precision[0, index_of(confidence)] == pytest.approx(precision)
        assert found.recall[0, index_of(confidence)] == pytest.approx(recall)
        assert found.f1[0, index_of(confidence)] == pytest.approx(f1)
    assert np.isnan(found.precision[0, index_of(0.95)])
    assert found.recall[0, index_of(0.95)] == found.f1[0, index_of(0.95)] == 0
    assert CONFIDENCES[found.best_index] == pytest.approx(0.7)  # the last of equals


def test_mean_precision_leaves_out_classes_without_detections():
    targets = table(target(CAT), target(DOG, FAR))
    found = compute_curves(
        targets, table(detection(CAT, 0.9), detection(DOG, 0.5, FAR), detection(DOG, 0.5))
    )
    mean = mean_precision(found.precision)
    assert mean[index_of(0.4)] == pytest.approx((1 + 0.5) / 2)
    assert mean[index_of(0.6)] == pytest.approx(1)
    assert np.isnan(mean[index_of(0.95)])


def random_tables(count, seed):
    """Return targets of three classes, some difficult or crowds, and detections near them."""
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 300, (count, 2))
    targets = np.zeros((count, 8))
    targets[:, 0], targets[:, 1] = np.arange(count) // 8, rng.integers(0, 3, count)
    targets[:, 3] = rng.choice([0, 1, 2], count, p=[0.8, 0.1, 0.1])
    targets[:, 4:6], targets[:, 6:] = low, low + rng.uniform(40, 120, (count, 2))
    near = np.repeat(targets, 4, axis=0)
    near[:, 1] = np.where(rng.random(4 * count) < 0.7, near[:, 1], rng.integers(0, 3, 4 * count))
    near[:, 2], near[:, 3] = rng.random(4 * count), 0
    near[:, 4:] += rng.normal(0, 5, (4 * count, 4))
    return targets, near


def test_mean_precision_at_recall_equals_ap50_of_coco():
    targets, detections = random_tables(400, seed=1)
    reference = evaluate_coco(targets, detections).per_class
    found = compute_curves(targets, detections)
    assert found.nodes.tolist() == [0, 1, 2]
    for k, node in enumerate(found.nodes.tolist()):
        assert found.precision_at_recall[k].mean() == pytest.approx(reference[node]["AP50"])


def test_the_diagonal_of_the_confusion_matrix_counts_true_positives():
    targets, detections = random_tables(400, seed=2)
    found = compute_curves(targets, detections)
    matrix = confusion_matrix(match_predictions(targets, detections, FLAT, 0.5), FLAT)
    hits = found.recall[:, index_of(0.5)] * found.num_targets
    assert matrix.counts.diagonal()[:-1].tolist() == pytest.approx(hits.tolist())
    # every target once, every counted detection once
    assert matrix.counts[:-1].sum(axis=1).tolist() == found.num_targets.tolist()


def test_difficult_targets_and_crowds_are_ignored():
    targets = table(target(CAT), target(CAT, FAR, flag=1), target(CAT, (200, 0, 300, 99), flag=2))
    detections = table(
        detection(CAT, 0.9, FAR),
        detection(CAT, 0.8, FAR),
        detection(CAT, 0.7, (210, 10, 220, 20)),
        detection(CAT, 0.6),
    )
    matched, ignored = match_detections(targets, detections)
    assert matched.tolist() == [-1, -1, -1, 0]
    assert ignored.tolist() == [True, True, True, False]
    found = compute_curves(targets, detections)
    assert found.num_targets.tolist() == [1]
    assert found.precision[0, index_of(0.5)] == 1
    # under another label, a detection on a difficult target is no error either
    assert errors_by_kind(targets, [*detections, detection(DOG, 0.9, FAR)]) == {}


def test_the_lower_scoring_of_two_detections_is_a_duplicate():
    found = errors_by_kind([target(CAT)], [detection(CAT, 0.5), detection(CAT, 0.7, HALF)])
    ((kind, (one,)),) = found.items()
    assert kind == one.kind == "duplicate"
    assert one.detection.tolist() == detection(CAT, 0.5)
    assert one.target.tolist() == target(CAT)
    assert one.iou == 1


def test_a_classification_error_is_not_also_a_missed_target():
    found = errors_by_kind([target(CAT, image=7)], [detection(DOG, 0.9, HALF, image=7)])
    ((kind, (one,)),) = found.items()
    assert kind == "classification"
    assert (one.image, one.iou) == (7, 0.5)
    assert one.detection.tolist() == detection(DOG, 0.9, HALF, image=7)
    assert one.target.tolist() == target(CAT, image=7)


def test_a_localization_error_covers_only_a_target_of_its_class():
    found = errors_by_kind([target(CAT)], [detection(CAT, 0.9, THIRD)])
    assert list(found) == ["localization"]
    assert found["localization"][0].iou == pytest.approx(1 / 3)
    found = errors_by_kind([target(CAT)], [detection(DOG, 0.9, THIRD)])
    assert list(found) == ["localization", "missed"]
    assert found["localization"][0].target.tolist() == target(CAT)
    # a target of its class has priority over one with a higher IoU
    tenth = (28.0, 10.0, 48.0, 30.0)  # IoU with THIRD 12/28
    found = errors_by_kind([target(DOG), target(CAT, tenth)], [detection(DOG, 0.9, THIRD)])
    assert found["localization"][0].target.tolist() == target(DOG)


def test_background_detections_and_missed_targets():
    found = errors_by_kind(
        [target(CAT)], [detection(CAT, 0.4, FAR), detection(CAT, 0.2), detection(PIG, 0.9, image=3)]
    )
    assert {kind: len(each) for kind, each in found.items()} == {"background": 2, "missed": 1}
    scores = [one.detection[2] for one in found["background"]]
    assert scores == [0.9, 0.4]  # by descending score
    assert found["background"][1].target is None
    assert found["background"][1].iou == 0
    (missed,) = found["missed"]
    assert missed.detection is None
    assert missed.target.tolist() == target(CAT)


def test_missed_targets_are_sorted_by_area():
    small, large = (0.0, 0.0, 5.0, 5.0), (0.0, 0.0, 90.0, 40.0)
    found = errors_by_kind(
        [target(CAT, small), target(DOG, large, image=1), target(PIG, image=2)], []
    )
    assert [one.image for one in found["missed"]] == [1, 2, 0]


def test_a_correct_label_is_matched_before_a_wrong_one_with_a_higher_iou():
    matches = match_predictions(
        table(target(CAT)), table(detection(DOG, 0.9), detection(CAT, 0.3, HALF)), FLAT
    )
    assert confusion_matrix(matches, FLAT).counts.tolist() == [
        [1, 0, 0],  # the cat, detected
        [0, 0, 0],
        [0, 1, 0],  # the dog, on background
    ]
    assert {k: len(v) for k, v in find_errors(matches).items() if v} == {"classification": 1}


def test_the_confusion_matrix_equals_one_counted_by_hand():
    targets = table(
        target(CAT),
        target(CAT, FAR),
        target(DOG, image=1),
        target(DOG, FAR, 1),
        target(CAT, image=2),
    )
    detections = table(
        detection(CAT, 0.9), detection(CAT, 0.8, HALF),  # detected, and a duplicate
        detection(DOG, 0.9, FAR),  # a cat predicted as dog
        detection(CAT, 0.9, image=1),  # a dog predicted as cat
        detection(CAT, 0.4, THIRD, image=2),  # near a cat
        detection(PIG, 0.9, FAR, 3), detection(PIG, 0.2, FAR, 4),  # background, below confidence
    )  # fmt: skip
    found = confusion_matrix(match_predictions(targets, detections, FLAT), FLAT)
    assert found.nodes.tolist() == [CAT, DOG, PIG]
    assert found.counts.tolist() == [
        [1, 1, 0, 1],
        [1, 0, 0, 1],
        [0, 0, 0, 0],
        [2, 0, 1, 0],
    ]


def test_one_label_per_box():
    pairs = [
        detection(CAT, 0.4),
        detection(DOG, 0.6),
        detection(PIG, 0.5, HALF),
        detection(CAT, 0.3, image=1),
    ]
    kept = one_label_per_box(table(*pairs), FLAT)
    assert sorted(kept[:, 2].tolist()) == [0.3, 0.5, 0.6]
    # a second label of the same box is no error
    assert list(errors_by_kind([target(DOG)], pairs[:2])) == []


def test_the_most_specific_label_with_half_of_the_score_is_kept():
    animal, dog, collie, chair = (
        TREE.find_node(key) for key in ("animal", "dog", "collie", "chair")
    )
    pairs = [
        detection(animal, 0.9),
        detection(dog, 0.8),
        detection(collie, 0.41),
        detection(chair, 0.89),
    ]
    assert one_label_per_box(table(*pairs), TREE)[:, 1].tolist() == [collie]
    pairs[2][2] = 0.39
    assert one_label_per_box(table(*pairs), TREE)[:, 1].tolist() == [dog]
    assert one_label_per_box(table(pairs[0], pairs[2]), TREE)[:, 1].tolist() == [animal]


def test_collapse_to_level():
    nodes = np.arange(len(TREE))
    assert [TREE.keys[k] for k in collapse_to_level(TREE, nodes, 1)] == (
        ["animal", "thing", "animal", "thing", "animal", "animal", "animal"]
    )
    assert [TREE.keys[k] for k in collapse_to_level(TREE, nodes, 2)] == (
        ["animal", "thing", "dog", "chair", "cat", "dog", "dog"]
    )
    assert collapse_to_level(TREE, nodes, 3).tolist() == nodes.tolist()
    for level in (0, 4):
        with pytest.raises(InputError, match=f"report.level is {level}; allowed: 1 … 3"):
            collapse_to_level(TREE, nodes, level)


def test_collapsing_turns_confused_leaves_of_a_branch_into_matches():
    collie, poodle, cat = (TREE.find_node(key) for key in ("collie", "poodle", "cat"))
    targets = table(target(collie), target(poodle, FAR), target(cat, image=1))
    detections = table(
        detection(poodle, 0.9), detection(poodle, 0.9, FAR), detection(collie, 0.9, image=1)
    )
    matches = match_predictions(targets, detections, TREE)
    full = confusion_matrix(matches, TREE)
    assert [TREE.keys[k] for k in full.nodes] == ["collie", "poodle", "cat"]
    assert full.counts.tolist() == [[0, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    level = confusion_matrix(matches, TREE, 2)
    assert [TREE.keys[k] for k in level.nodes] == ["dog", "cat"]
    assert level.counts.tolist() == [[2, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert confusion_matrix(matches, TREE, 1).counts.tolist() == [[3, 0], [0, 0]]


def test_depth_first_order():
    order = [TREE.keys[k] for k in depth_first_order(TREE, np.arange(len(TREE)))]
    assert order == ["animal", "dog", "collie", "poodle", "cat", "thing", "chair"]


def test_empty_tables():
    for targets, detections in (
        (empty_table(), empty_table()),
        (empty_table(), table(detection(CAT, 0.9))),
        (table(target(CAT)), empty_table()),
    ):
        found = compute_curves(targets, detections)
        assert found.best_index is None
        assert len(found.nodes) == len(targets)
        matches = match_predictions(targets, detections, FLAT)
        assert confusion_matrix(matches, FLAT).counts.sum() == len(targets) + len(detections)
        counts = {kind: len(each) for kind, each in find_errors(matches).items()}
        assert counts["missed"] == len(targets)
        assert counts["background"] == len(detections)


def test_the_classes_that_are_mistaken_most_often_are_named_with_their_counts():
    boxes = [(100 * k, 0, 100 * k + 50, 50) for k in range(6)]
    targets = table(*(target(CAT, box) for box in boxes[:4]), target(DOG, boxes[4]))
    labels = (DOG, DOG, CAT, DOG, CAT, DOG)  # the third is correct, the last is on background
    found = [detection(label, 0.9, box) for label, box in zip(labels, boxes, strict=True)]
    matches = match_predictions(targets, table(*found), FLAT)
    assert most_confused(matches) == [(CAT, DOG, 3), (DOG, CAT, 1)]
    assert most_confused(matches, 1) == [(CAT, DOG, 3)]


def test_the_weakest_classes_are_those_with_the_lowest_known_value():
    rows: dict[str, dict[str, float]] = {
        "a": {"AP50": 0.5},
        "b": {"AP50": math.nan},
        "c": {"AP50": 0.1},
        "d": {"detected": 1},
    }
    assert weakest_classes(rows) == [("c", 0.1), ("a", 0.5)]
    assert weakest_classes({"a": {"top1": 0.5}, "b": {"top1": 0.25}}, 1) == [("b", 0.25)]
