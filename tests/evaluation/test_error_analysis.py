"""Curves, matching, the confusion matrix, and the kinds of mistakes, by hand."""

import numpy as np
import pytest

from tests.helpers.detections import BOX, CAT, DOG, FAR, FLAT, HALF, PIG, THIRD, said, table, truth
from yolo_lightning.errors import InputError
from yolo_lightning.evaluation.average_precision import coco_evaluation
from yolo_lightning.evaluation.curves import CONFIDENCES, RECALLS, curves, match, mean_precision
from yolo_lightning.evaluation.error_analysis import (
    KINDS,
    collapse,
    confusion,
    in_order,
    matches_at,
    mistakes,
    one_name_a_box,
)
from yolo_lightning.evaluation.matching import no_boxes
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


def kinds_of(truths, detections, tree=FLAT, confidence=0.25):
    found = mistakes(matches_at(table(*truths), table(*detections), tree, confidence))
    assert tuple(found) == KINDS
    return {kind: each for kind, each in found.items() if each}


def at(confidence):
    return int(np.searchsorted(CONFIDENCES, confidence - 1e-9))


def test_curves_are_those_computed_by_hand():
    truths = table(truth(CAT), truth(CAT, FAR))
    found = curves(truths, table(said(CAT, 0.9), said(CAT, 0.8), said(CAT, 0.7, FAR)))
    assert found.nodes.tolist() == [CAT]
    assert found.objects.tolist() == [2]
    # one of two found: all right; both found: two of three
    np.testing.assert_allclose(found.precision_at_recall[0, RECALLS <= 0.5], 1)
    np.testing.assert_allclose(found.precision_at_recall[0, RECALLS > 0.5], 2 / 3)
    for confidence, precision, recall, f1 in (
        (0.85, 1, 0.5, 2 / 3),
        (0.75, 0.5, 0.5, 0.5),
        (0.5, 2 / 3, 1, 0.8),
        (0.0, 2 / 3, 1, 0.8),
    ):
        assert found.precision[0, at(confidence)] == pytest.approx(precision)
        assert found.recall[0, at(confidence)] == pytest.approx(recall)
        assert found.f1[0, at(confidence)] == pytest.approx(f1)
    assert np.isnan(found.precision[0, at(0.95)])
    assert found.recall[0, at(0.95)] == found.f1[0, at(0.95)] == 0
    assert CONFIDENCES[found.best] == pytest.approx(0.7)  # of equals the surest


def test_means_leave_out_classes_that_find_nothing_any_more():
    truths = table(truth(CAT), truth(DOG, FAR))
    found = curves(truths, table(said(CAT, 0.9), said(DOG, 0.5, FAR), said(DOG, 0.5)))
    mean = mean_precision(found.precision)
    assert mean[at(0.4)] == pytest.approx((1 + 0.5) / 2)
    assert mean[at(0.6)] == pytest.approx(1)
    assert np.isnan(mean[at(0.95)])


def scattered(count, seed):
    """Return truths of three classes, difficult and crowds among them, and detections near them."""
    draw = np.random.default_rng(seed)
    low = draw.uniform(0, 300, (count, 2))
    truths = np.zeros((count, 8))
    truths[:, 0], truths[:, 1] = np.arange(count) // 8, draw.integers(0, 3, count)
    truths[:, 3] = draw.choice([0, 1, 2], count, p=[0.8, 0.1, 0.1])
    truths[:, 4:6], truths[:, 6:] = low, low + draw.uniform(40, 120, (count, 2))
    near = np.repeat(truths, 4, axis=0)
    near[:, 1] = np.where(draw.random(4 * count) < 0.7, near[:, 1], draw.integers(0, 3, 4 * count))
    near[:, 2], near[:, 3] = draw.random(4 * count), 0
    near[:, 4:] += draw.normal(0, 5, (4 * count, 4))
    return truths, near


def test_areas_below_the_curves_are_coco_s_ap50():
    truths, detections = scattered(400, seed=1)
    reference = coco_evaluation(truths, detections).per_class
    found = curves(truths, detections)
    assert found.nodes.tolist() == [0, 1, 2]
    for k, node in enumerate(found.nodes.tolist()):
        assert found.precision_at_recall[k].mean() == pytest.approx(reference[node]["AP50"])


def test_the_diagonal_counts_what_recall_counts():
    truths, detections = scattered(400, seed=2)
    found = curves(truths, detections)
    matrix = confusion(matches_at(truths, detections, FLAT, 0.5), FLAT)
    hits = found.recall[:, at(0.5)] * found.objects
    assert matrix.counts.diagonal()[:-1].tolist() == pytest.approx(hits.tolist())
    # every truth once, every detection that counts once
    assert matrix.counts[:-1].sum(axis=1).tolist() == found.objects.tolist()


def test_difficult_truths_and_crowds_are_neither_asked_for_nor_punished():
    truths = table(truth(CAT), truth(CAT, FAR, flag=1), truth(CAT, (200, 0, 300, 99), flag=2))
    detections = table(
        said(CAT, 0.9, FAR), said(CAT, 0.8, FAR), said(CAT, 0.7, (210, 10, 220, 20)), said(CAT, 0.6)
    )
    hits, excused = match(truths, detections)
    assert hits.tolist() == [-1, -1, -1, 0]
    assert excused.tolist() == [True, True, True, False]
    found = curves(truths, detections)
    assert found.objects.tolist() == [1]
    assert found.precision[0, at(0.5)] == 1
    # whatever a difficult object is called, it is no mistake
    assert kinds_of(truths, [*detections, said(DOG, 0.9, FAR)]) == {}


def test_of_two_detections_the_surer_finds_the_object_and_the_other_is_a_duplicate():
    found = kinds_of([truth(CAT)], [said(CAT, 0.5), said(CAT, 0.7, HALF)])
    ((kind, (one,)),) = found.items()
    assert kind == one.kind == "duplicate"
    assert one.score == 0.5
    assert one.box_xyxy_orig_px == one.truth_xyxy_orig_px == BOX
    assert one.iou == 1
    assert one.label == one.truth_label == CAT


def test_a_wrong_name_on_an_object_explains_why_it_is_not_found():
    found = kinds_of([truth(CAT, image=7)], [said(DOG, 0.9, HALF, image=7)])
    ((kind, (one,)),) = found.items()
    assert kind == "wrong class"
    assert (one.image, one.label, one.truth_label, one.score, one.iou) == (7, DOG, CAT, 0.9, 0.5)


def test_a_badly_placed_box_explains_an_object_of_its_class_alone():
    found = kinds_of([truth(CAT)], [said(CAT, 0.9, THIRD)])
    assert list(found) == ["badly placed"]
    assert found["badly placed"][0].iou == pytest.approx(1 / 3)
    found = kinds_of([truth(CAT)], [said(DOG, 0.9, THIRD)])
    assert list(found) == ["badly placed", "missed"]
    assert found["badly placed"][0].truth_label == CAT
    # an object of its own class goes before one that is overlapped more
    tenth = (28.0, 10.0, 48.0, 30.0)  # IoU with THIRD 12/28
    found = kinds_of([truth(DOG), truth(CAT, tenth)], [said(DOG, 0.9, THIRD)])
    assert found["badly placed"][0].truth_label == DOG


def test_a_box_on_nothing_is_background_and_an_object_without_a_box_is_missed():
    found = kinds_of([truth(CAT)], [said(CAT, 0.4, FAR), said(CAT, 0.2), said(PIG, 0.9, image=3)])
    assert {kind: len(each) for kind, each in found.items()} == {"background": 2, "missed": 1}
    assert [one.score for one in found["background"]] == [0.9, 0.4]  # the surest first
    assert found["background"][1].truth_xyxy_orig_px is None
    assert found["background"][1].iou == 0
    (missed,) = found["missed"]
    assert (missed.box_xyxy_orig_px, missed.label, missed.score) == (None, None, None)
    assert missed.truth_xyxy_orig_px == BOX


def test_of_the_missed_the_largest_stand_first():
    small, large = (0.0, 0.0, 5.0, 5.0), (0.0, 0.0, 90.0, 40.0)
    found = kinds_of([truth(CAT, small), truth(DOG, large, image=1), truth(PIG, image=2)], [])
    assert [one.image for one in found["missed"]] == [1, 2, 0]


def test_a_right_name_is_not_pushed_aside_by_a_wrong_one_that_fits_better():
    matches = matches_at(table(truth(CAT)), table(said(DOG, 0.9), said(CAT, 0.3, HALF)), FLAT)
    assert confusion(matches, FLAT).counts.tolist() == [
        [1, 0, 0],  # the cat, found
        [0, 0, 0],
        [0, 1, 0],  # the dog, left over
    ]
    assert {k: len(v) for k, v in mistakes(matches).items() if v} == {"wrong class": 1}


def test_the_confusion_matrix_is_the_one_counted_by_hand():
    truths = table(
        truth(CAT), truth(CAT, FAR), truth(DOG, image=1), truth(DOG, FAR, 1), truth(CAT, image=2)
    )
    detections = table(
        said(CAT, 0.9), said(CAT, 0.8, HALF),  # found, and once more
        said(DOG, 0.9, FAR),  # a cat called dog
        said(CAT, 0.9, image=1),  # a dog called cat
        said(CAT, 0.4, THIRD, image=2),  # near a cat
        said(PIG, 0.9, FAR, 3), said(PIG, 0.2, FAR, 4),  # on nothing, and one below the confidence
    )  # fmt: skip
    found = confusion(matches_at(truths, detections, FLAT), FLAT)
    assert found.nodes.tolist() == [CAT, DOG, PIG]
    assert found.counts.tolist() == [
        [1, 1, 0, 1],
        [1, 0, 0, 1],
        [0, 0, 0, 0],
        [2, 0, 1, 0],
    ]


def test_one_box_has_one_name():
    pairs = [said(CAT, 0.4), said(DOG, 0.6), said(PIG, 0.5, HALF), said(CAT, 0.3, image=1)]
    kept = one_name_a_box(table(*pairs), FLAT)
    assert sorted(kept[:, 2].tolist()) == [0.3, 0.5, 0.6]
    # two cats called cat and dog: the worse name of the same box is no mistake of its own
    assert list(kinds_of([truth(DOG)], pairs[:2])) == []


def test_a_box_is_called_by_what_is_more_specific_while_that_is_likelier_than_not():
    animal, dog, collie, chair = (TREE.node(key) for key in ("animal", "dog", "collie", "chair"))
    pairs = [said(animal, 0.9), said(dog, 0.8), said(collie, 0.41), said(chair, 0.89)]
    assert one_name_a_box(table(*pairs), TREE)[:, 1].tolist() == [collie]
    pairs[2][2] = 0.39
    assert one_name_a_box(table(*pairs), TREE)[:, 1].tolist() == [dog]
    assert one_name_a_box(table(pairs[0], pairs[2]), TREE)[:, 1].tolist() == [animal]


def test_classes_collapse_to_a_level_of_the_tree():
    nodes = np.arange(len(TREE))
    assert [TREE.keys[k] for k in collapse(TREE, nodes, 1)] == (
        ["animal", "thing", "animal", "thing", "animal", "animal", "animal"]
    )
    assert [TREE.keys[k] for k in collapse(TREE, nodes, 2)] == (
        ["animal", "thing", "dog", "chair", "cat", "dog", "dog"]
    )
    assert collapse(TREE, nodes, 3).tolist() == nodes.tolist()
    for level in (0, 4):
        with pytest.raises(InputError, match=f"report.level is {level}; allowed: 1 … 3"):
            collapse(TREE, nodes, level)


def test_collapsing_turns_wrong_leaves_of_the_right_branch_into_hits():
    collie, poodle, cat = (TREE.node(key) for key in ("collie", "poodle", "cat"))
    truths = table(truth(collie), truth(poodle, FAR), truth(cat, image=1))
    detections = table(said(poodle, 0.9), said(poodle, 0.9, FAR), said(collie, 0.9, image=1))
    matches = matches_at(truths, detections, TREE)
    full = confusion(matches, TREE)
    assert [TREE.keys[k] for k in full.nodes] == ["collie", "poodle", "cat"]
    assert full.counts.tolist() == [[0, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    level = confusion(matches, TREE, 2)
    assert [TREE.keys[k] for k in level.nodes] == ["dog", "cat"]
    assert level.counts.tolist() == [[2, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert confusion(matches, TREE, 1).counts.tolist() == [[3, 0], [0, 0]]


def test_nodes_of_one_branch_stand_together():
    order = [TREE.keys[k] for k in in_order(TREE, np.arange(len(TREE)))]
    assert order == ["animal", "dog", "collie", "poodle", "cat", "thing", "chair"]


def test_nothing_gives_nothing():
    for truths, detections in (
        (no_boxes(), no_boxes()),
        (no_boxes(), table(said(CAT, 0.9))),
        (table(truth(CAT)), no_boxes()),
    ):
        found = curves(truths, detections)
        assert found.best is None
        assert len(found.nodes) == len(truths)
        matches = matches_at(truths, detections, FLAT)
        assert confusion(matches, FLAT).counts.sum() == len(truths) + len(detections)
        counts = {kind: len(each) for kind, each in mistakes(matches).items()}
        assert counts["missed"] == len(truths)
        assert counts["background"] == len(detections)
