"""Figures at two levels of the tree, by hand."""

import torch

from tests.test_golden import detection_batch
from yolo_lightning.detections import Detections
from yolo_lightning.evaluation import DetectionEvaluation
from yolo_lightning.wordtree import WordTree

TREE = WordTree(
    [
        ("cat", "-", "cat"), ("dog", "-", "dog"), ("bengal", "cat", "Bengal"),
        ("manx", "cat", "Manx"), ("pug", "dog", "pug"),
    ]
)  # fmt: skip
HERE, THERE = [0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 90.0, 90.0]


def found(*rows: tuple[list[float], int, float]) -> Detections:
    return Detections(
        torch.tensor([row[0] for row in rows]).reshape(-1, 4),
        torch.tensor([row[1] for row in rows], dtype=torch.long),
        torch.tensor([row[2] for row in rows]),
    )


def evaluation(nodes: list[int], boxed: list[int]) -> DetectionEvaluation:
    supervised = TREE.ancestors_or_self(torch.tensor(boxed))
    out = DetectionEvaluation(TREE)
    out.begin(torch.tensor(nodes), TREE.deepest_ancestor_in(supervised))
    return out


def add(to: DetectionEvaluation, truth: list[list[float]], labels: list[int], fine, coarse):
    batch = detection_batch(torch.zeros(1, len(labels), 4), torch.tensor([labels]))
    batch.sample_ids += len(to.fine.truths)  # another image each time
    to.update(batch, 0, torch.tensor(truth), fine, coarse)


def test_breeds_under_boxes_that_say_cat_and_dog():
    figures = evaluation([2, 3, 4], boxed=[0, 1])
    assert figures.has_levels
    assert figures.coarse_nodes.tolist() == [0, 1]
    # a Bengal named rightly, a Manx taken for a Bengal, a pug that is seen too faintly
    add(figures, [HERE], [2], found((HERE, 2, 0.8), (HERE, 3, 0.1)), found((HERE, 0, 0.9)))
    add(figures, [HERE], [3], found((HERE, 2, 0.6), (HERE, 3, 0.3)), found((HERE, 0, 0.9)))
    add(figures, [THERE], [4], found((THERE, 4, 0.2)), found((THERE, 1, 0.2)))
    means = figures.compute(torch.tensor([True, True, False, False, False]))
    assert means["name_accuracy"] == 0.5
    assert means["AP50_coarse"] == 1
    assert figures.per_class["bengal"]["AP50"] == 1  # 0.8 before the false 0.6
    assert (figures.per_class["bengal"]["found"], figures.per_class["bengal"]["named"]) == (1, 1)
    assert (figures.per_class["manx"]["found"], figures.per_class["manx"]["named"]) == (1, 0)
    assert "found" not in figures.per_class["pug"]
    assert set(figures.per_coarse_class) == {"cat", "dog"}
    assert means["AP50"] == means["AP50_unboxed"]
    assert "as boxes say:\n  cat" in figures.table()


def test_a_dog_on_a_cat_names_nothing():
    figures = evaluation([2, 3, 4], boxed=[0, 1])
    add(figures, [HERE], [2], found((HERE, 4, 0.9), (HERE, 2, 0.3)), found((HERE, 1, 0.9)))
    assert figures.compute(torch.zeros(5, dtype=torch.bool))["AP50_coarse"] == 0
    assert "found" not in figures.per_class["bengal"]


def test_one_level_is_measured_once():
    figures = evaluation([0, 1], boxed=[0, 1])
    assert not figures.has_levels
    add(figures, [HERE], [0], found((HERE, 0, 0.9)), None)
    means = figures.compute(torch.tensor([True, True, False, False, False]))
    ours = {"AP50", "AP", "AP50_boxed", "AP_boxed"}
    # one small box: COCO has nothing to say of medium and large ones
    assert set(means) - ours == {"AP75", "AP_small", "AR_1", "AR_10", "AR_100", "AR_small"}
    assert means["AP75"] == means["AR_1"] == 1
    assert "as boxes say" not in figures.table()
    assert "COCO's numbers: AP 1.000, AP50 1.000, AP75 1.000, AP_small 1.000" in figures.table()


def test_padding_counts_nowhere():
    figures = evaluation([2, 3], boxed=[0])
    batch = detection_batch(torch.zeros(1, 1, 4), torch.tensor([[2]]))
    batch.sample_ids[:] = -1
    figures.update(batch, 0, torch.tensor([HERE]), found((HERE, 2, 0.9)), found((HERE, 0, 0.9)))
    means = figures.compute(torch.zeros(5, dtype=torch.bool))
    assert means["name_accuracy"] != means["name_accuracy"]  # nothing was found: NaN
    assert figures.per_class == {}


def test_mistakes_of_found_objects_are_told_apart():
    figures = evaluation([2, 3, 4], boxed=[0, 1])
    # (label, called, leaf at the end of the path): right, a cat and no more, Manx for Bengal, a pug
    cases = [(2, 2, 2), (2, 0, 2), (2, 3, 3), (2, 4, 4)]
    for number, (label, called, leaf) in enumerate(cases):
        batch = detection_batch(torch.zeros(1, 2, 4), torch.tensor([[label, -1]]))
        batch.sample_ids += number
        # the second box lies on the object too, with a lower score; the third one elsewhere
        named = found((HERE, called, 0.9), (HERE, 2, 0.5), (THERE, 4, 0.4))
        deepest = torch.tensor([leaf, 2, 4])
        figures.update_tree(batch, 0, torch.tensor([HERE]), named, deepest)
    missed = detection_batch(torch.zeros(1, 1, 4), torch.tensor([[3]]))
    figures.update_tree(missed, 0, torch.tensor([THERE]), found((HERE, 3, 0.9)), torch.tensor([3]))
    padding = detection_batch(torch.zeros(1, 1, 4), torch.tensor([[3]]))
    padding.sample_ids[:] = -1
    figures.update_tree(padding, 0, torch.tensor([HERE]), found((HERE, 3, 0.9)), torch.tensor([3]))
    hard = detection_batch(torch.zeros(1, 1, 4), torch.tensor([[3]]))
    hard.difficult[:] = True
    figures.update_tree(hard, 0, torch.tensor([HERE]), found((HERE, 3, 0.9)), torch.tensor([3]))
    means = figures.compute(torch.zeros(5, dtype=torch.bool))
    kinds = ("right", "not_specific_enough", "wrong_leaf", "wrong_branch")
    assert [means[kind] for kind in kinds] == [0.25] * 4
    assert (means["depth1"], means["depth2"]) == (0.75, 0.5)
    assert "of the objects found: depth1 0.750, depth2 0.500, right 0.250" in figures.table()
