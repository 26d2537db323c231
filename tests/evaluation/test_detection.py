"""Detection metrics at several levels of the tree, computed by hand."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.golden import detection_batch
from tests.helpers.miniatures import FRUIT, bind_source, save_grey, write, write_coco
from tests.helpers.paths import REPO
from yolo_lightning.datamodules import COCOJson
from yolo_lightning.datamodules.batching import EvaluationDataset
from yolo_lightning.detections import Detections
from yolo_lightning.errors import InputError
from yolo_lightning.evaluation.coco import evaluate_coco
from yolo_lightning.evaluation.detection import DetectionEvaluation
from yolo_lightning.tree.labels import load_reviewed_labels
from yolo_lightning.tree.seen_classes import IMAGENET_DET_44, imagenet_det_seen, seen_nodes
from yolo_lightning.tree.wordtree import WordTree

TREE = WordTree(
    [
        ("cat", "-", "cat"), ("dog", "-", "dog"), ("bengal", "cat", "Bengal"),
        ("manx", "cat", "Manx"), ("pug", "dog", "pug"),
    ]
)  # fmt: skip
HERE, THERE = [0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 90.0, 90.0]


def detections(*rows: tuple[list[float], int, float]) -> Detections:
    return Detections(
        torch.tensor([row[0] for row in rows]).reshape(-1, 4),
        torch.tensor([row[1] for row in rows], dtype=torch.long),
        torch.tensor([row[2] for row in rows]),
    )


def make_evaluation(nodes: list[int], boxed: list[int]) -> DetectionEvaluation:
    supervised = TREE.ancestors_or_self(torch.tensor(boxed, dtype=torch.long))
    out = DetectionEvaluation(TREE)
    out.reset(torch.tensor(nodes), TREE.deepest_ancestor_in(supervised))
    return out


def add(evaluation: DetectionEvaluation, boxes: list[list[float]], labels: list[int], fine, coarse):
    batch = detection_batch(torch.zeros(1, len(labels), 4), torch.tensor([labels]))
    batch.sample_ids += len(evaluation.fine.targets)  # a new image each time
    by_level = [[one] for one in (fine, coarse) if one is not None]
    by_level += [[detections()] for _ in evaluation.levels[len(by_level) :]]
    evaluation.update(batch, [torch.tensor(boxes)], by_level)


def test_fine_targets_with_coarse_training_boxes():
    evaluation = make_evaluation([2, 3, 4], boxed=[0, 1])
    assert evaluation.coarse is not None
    assert evaluation.coarse.nodes.tolist() == [0, 1]
    # a correct Bengal, a Manx predicted as Bengal, a pug with a score that is too low
    add(
        evaluation,
        [HERE],
        [2],
        detections((HERE, 2, 0.8), (HERE, 3, 0.1)),
        detections((HERE, 0, 0.9)),
    )
    add(
        evaluation,
        [HERE],
        [3],
        detections((HERE, 2, 0.6), (HERE, 3, 0.3)),
        detections((HERE, 0, 0.9)),
    )
    add(evaluation, [THERE], [4], detections((THERE, 4, 0.2)), detections((THERE, 1, 0.2)))
    means = evaluation.compute(torch.tensor([True, True, False, False, False]))
    assert means["name_accuracy"] == 0.5
    assert means["AP50_coarse"] == 1
    assert evaluation.per_class["bengal"]["AP50"] == 1  # 0.8 before the false 0.6
    assert (
        evaluation.per_class["bengal"]["detected"],
        evaluation.per_class["bengal"]["correct"],
    ) == (1, 1)
    assert (evaluation.per_class["manx"]["detected"], evaluation.per_class["manx"]["correct"]) == (
        1,
        0,
    )
    assert "detected" not in evaluation.per_class["pug"]
    assert set(evaluation.per_coarse_class) == {"cat", "dog"}
    assert means["AP50"] == means["AP50_unboxed"]
    assert "at the level of the training boxes:\n  cat" in evaluation.table()


def test_average_precision_at_each_level_of_the_tree():
    evaluation = make_evaluation([2, 3, 4], boxed=[2, 3, 4])
    fine_level, level = evaluation.levels
    assert (fine_level.suffix, fine_level.nodes.tolist()) == ("", [2, 3, 4])
    assert (level.suffix, level.nodes.tolist()) == ("_level1", [0, 1])
    assert level.labels.tolist() == [0, 1, 0, 0, 1]
    # a Manx predicted as Bengal is a cat at level 1; a pug is predicted as cat
    for label, score in ((3, 0.9), (2, 0.8), (4, 0.7)):
        batch = detection_batch(torch.zeros(1, 1, 4), torch.tensor([[label]]))
        batch.sample_ids += len(evaluation.fine.targets)
        fine, coarse = detections((HERE, 2, score)), detections((HERE, 0, score))
        evaluation.update(batch, [torch.tensor([HERE])], [[fine], [coarse]])
    means = evaluation.compute(torch.ones(5, dtype=torch.bool))
    # Bengal 1/2, a false positive first; Manx and pug 0
    assert means["AP50"] == pytest.approx(1 / 6)
    # cat 1, both before the false positive; dog 0
    assert means["AP50_level1"] == 0.5
    deep = WordTree([("0", "-", "0"), *((str(k), str(k - 1), str(k)) for k in range(1, 9))])
    chain = DetectionEvaluation(deep)
    chain.reset(torch.tensor([8]), torch.arange(9))
    # no more than four
    assert [one.suffix for one in chain.levels] == ["", *(f"_level{k}" for k in range(1, 5))]


def test_a_coarse_misclassification_does_not_count_as_detected():
    evaluation = make_evaluation([2, 3, 4], boxed=[0, 1])
    add(
        evaluation,
        [HERE],
        [2],
        detections((HERE, 4, 0.9), (HERE, 2, 0.3)),
        detections((HERE, 1, 0.9)),
    )
    assert evaluation.compute(torch.zeros(5, dtype=torch.bool))["AP50_coarse"] == 0
    assert "detected" not in evaluation.per_class["bengal"]


def test_a_class_that_has_only_crowds_has_no_average_precision():
    evaluation = make_evaluation([2, 3], boxed=[0])
    batch = detection_batch(torch.zeros(1, 2, 4), torch.tensor([[2, 3]]))
    batch.crowd[0, 1] = True
    by_level = [[detections((HERE, 2, 0.9), (THERE, 3, 0.8))]]
    by_level += [[detections((HERE, 0, 0.9), (THERE, 0, 0.8))] for _ in evaluation.levels[1:]]
    evaluation.update(batch, [torch.tensor([HERE, THERE])], by_level)
    evaluation.compute(torch.zeros(5, dtype=torch.bool))
    assert evaluation.per_class["manx"] == {"detected": 1, "correct": 1}
    blank = " " * 16
    assert f"Bengal           1.000   1.000         1         1\nManx          {blank}" in (
        evaluation.table()
    )


def test_without_a_coarse_level():
    evaluation = make_evaluation([0, 1], boxed=[0, 1])
    assert evaluation.coarse is None
    add(evaluation, [HERE], [0], detections((HERE, 0, 0.9)), None)
    means = evaluation.compute(torch.tensor([True, True, False, False, False]))
    group_means = {"AP50", "AP", "AP50_boxed", "AP_boxed"}
    # one small box: the metrics of medium and large ones are undefined
    others = {"AP75", "AP_small", "AR_1", "AR_10", "AR_100", "AR_small", "VOC07_AP50", "VOC_AP50"}
    assert set(means) - group_means == others
    assert means["AP75"] == means["AR_1"] == means["VOC_AP50"] == 1
    assert means == evaluation.metrics
    text = evaluation.table()
    assert "at the level" not in text
    assert "classes with" not in text


def test_classes_without_boxes_are_grouped_by_their_ancestors():
    evaluation = make_evaluation([1, 2, 3, 4], boxed=[0, 4])
    # of the classes without boxes, both cats are below a class with boxes, the dog is above one
    fine = detections((HERE, 2, 0.9), (HERE, 3, 0.8), (THERE, 1, 0.7), (THERE, 4, 0.6))
    add(evaluation, [HERE, THERE, HERE, THERE], [2, 3, 1, 4], fine, detections())
    means = evaluation.compute(torch.tensor([True, False, False, False, True]))
    assert [means[f"AP50{group}"] for group in ("", "_boxed", "_unboxed")] == [0.5, 1, 1 / 3]
    assert means["AP50_below_boxed"] == 0.5
    assert means["AP50_never_boxed"] == means["AP_never_boxed"] == 0
    text = evaluation.table()
    assert "classes with boxes (1): AP50 1.000, AP 1.000" in text
    assert "classes without boxes (3): AP50 0.333, AP 0.333" in text
    assert (
        "  below a class with boxes (2): AP50 0.500, AP 0.500\n"
        "  not below a class with boxes (1): AP50 0.000"
    ) in text


def test_seen_classes_replace_the_classes_of_the_training_boxes():
    evaluation = make_evaluation([2, 3, 4], boxed=[2, 3, 4])
    evaluation.seen_classes = seen_nodes(TREE, ["manx", "dog"])
    add(evaluation, [HERE], [2], detections((HERE, 2, 0.9)), None)
    add(evaluation, [HERE], [3], detections(), None)
    add(evaluation, [HERE], [4], detections((HERE, 4, 0.9)), None)
    means = evaluation.compute(torch.ones(5, dtype=torch.bool))
    assert (means["AP50_boxed"], means["AP50_unboxed"]) == (0, 1)
    assert (means["AP50_below_boxed"], means["AP50_never_boxed"]) == (1, 1)  # pug, Bengal


def test_unknown_classes_of_training_boxes_give_no_groups():
    evaluation = make_evaluation([2, 3, 4], boxed=[])
    add(evaluation, [HERE], [2], detections((HERE, 2, 0.9)), None)
    means = evaluation.compute(torch.zeros(5, dtype=torch.bool))
    assert means["AP50"] == 1
    assert not [name for name in means if "boxed" in name]
    assert "boxes (" not in evaluation.table()


def test_targets_and_detections_are_available_as_tables():
    evaluation = make_evaluation([0, 1], boxed=[0, 1])
    batch = detection_batch(torch.zeros(2, 2, 4), torch.tensor([[0, -1], [1, 0]]))
    batch.sample_ids += 7
    batch.difficult[1] = True
    batch.crowd[1, 1] = True
    batch.areas_orig_px2[1] = torch.tensor([30.0, 0.0])
    fine = [detections((HERE, 0, 0.5)), detections((THERE, 1, 0.25), (HERE, 0, 0.125))]
    evaluation.update(batch, [torch.tensor([HERE]), torch.tensor([THERE, HERE])], [fine])
    evaluation.compute(torch.ones(5, dtype=torch.bool))
    assert evaluation.targets.tolist() == [
        [7, 0, 0, 0, *HERE], [8, 1, 30, 1, *THERE], [8, 0, 0, 2, *HERE],
    ]  # fmt: skip
    assert evaluation.detections.tolist() == [
        [7, 0, 0.5, 0, *HERE], [8, 1, 0.25, 0, *THERE], [8, 0, 0.125, 0, *HERE],
    ]  # fmt: skip
    again = evaluate_coco(evaluation.targets, evaluation.detections)
    assert again.per_class[0]["AP"] == evaluation.per_class["cat"]["AP"] == pytest.approx(1)
    assert set(evaluation.per_class["cat"]) == {"AP", "AP50", "AP75", "VOC07_AP50", "VOC_AP50"}


def test_areas_of_outlines_determine_the_size_of_an_object(tmp_path):
    save_grey(tmp_path / "a.jpg", width=400, height=400)
    sizes: list[Any] = [900, None, 50_000, float("nan"), "large", -1, 0]
    annotations = [
        {"id": k, "image_id": 5, "category_id": 3, "bbox": [k, 199 * k, 200, 200], "area": size}
        for k, size in enumerate(sizes[:2])
    ]
    del annotations[1]["area"]
    image = {"id": 5, "file_name": "a.jpg", "width": 400, "height": 400}
    file = write_coco(tmp_path / "ann.json", annotations, [image])
    batch = EvaluationDataset(bind_source(COCOJson(str(file))), 64)[[0]]
    # px of the file, not of the network input
    assert batch.areas_orig_px2[0].tolist() == [900.0] + [0.0] * 7
    evaluation = DetectionEvaluation(FRUIT)
    evaluation.reset(torch.tensor([1]), torch.arange(2))
    boxes = torch.tensor([[0.0, 0, 200, 200], [1.0, 199, 201, 399]])
    evaluation.update(batch, [boxes], [[detections((boxes[0].tolist(), 1, 0.9))]])
    means = evaluation.compute(torch.ones(2, dtype=torch.bool))
    assert means["AP_small"] == pytest.approx(1)
    assert means["AP_large"] == 0
    annotations = [{**annotations[0], "bbox": [k, 0, 9, 9], "area": s} for k, s in enumerate(sizes)]
    write_coco(file, annotations, [image])
    source = bind_source(COCOJson(str(file)))
    assert source.read(0).areas_orig_px2.tolist() == [900, 0, 50_000, 0, 0, 0, 0]
    assert source.read(0).select(np.array([2])).areas_orig_px2.tolist() == [50_000]


def test_padding_does_not_count():
    evaluation = make_evaluation([2, 3], boxed=[0])
    batch = detection_batch(torch.zeros(1, 1, 4), torch.tensor([[2]]))
    batch.sample_ids[:] = -1
    coarse = detections((HERE, 0, 0.9))
    by_level = [[detections((HERE, 2, 0.9))], [coarse], [coarse]]
    evaluation.update(batch, [torch.tensor([HERE])], by_level)
    means = evaluation.compute(torch.zeros(5, dtype=torch.bool))
    assert means["name_accuracy"] != means["name_accuracy"]  # nothing was detected: NaN
    assert evaluation.per_class == {}


def test_kinds_of_labels_of_detected_objects():
    evaluation = make_evaluation([2, 3, 4], boxed=[0, 1])
    # (label, predicted, leaf): right, only cat, Manx instead of Bengal, pug
    cases = [(2, 2, 2), (2, 0, 2), (2, 3, 3), (2, 4, 4)]

    def update(labels, boxes, predicted, leaves, **flags):
        batch = detection_batch(torch.zeros(1, len(labels), 4), torch.tensor([labels]))
        for name, value in flags.items():
            getattr(batch, name)[:] = value
        none = [[detections()] for _ in evaluation.levels]
        specific = [(predicted, torch.tensor(leaves, dtype=torch.long))]
        evaluation.update(batch, [torch.tensor(boxes)], none, specific)

    for number, (label, predicted, leaf) in enumerate(cases):
        # the second box overlaps the target too, with a lower score; the third one does not
        preds = detections((HERE, predicted, 0.9), (HERE, 2, 0.5), (THERE, 4, 0.4))
        update([label, -1], [HERE], preds, [leaf, 2, 4], sample_ids=number)
    found = detections((HERE, 3, 0.9))
    update([3], [THERE], found, [3])  # missed
    update([3], [HERE], detections(), [])
    update([3], [HERE], found, [3], sample_ids=-1)  # padding
    update([3], [HERE], found, [3], difficult=True)
    means = evaluation.compute(torch.zeros(5, dtype=torch.bool))
    kinds = ("right", "not_specific_enough", "wrong_leaf", "wrong_branch")
    assert [means[kind] for kind in kinds] == [0.25] * 4
    assert (means["depth1"], means["depth2"]) == (0.75, 0.5)
    assert set(means) <= set(evaluation.metric_names())
    assert "of the detected objects: depth1 0.750, depth2 0.500, right 0.250" in evaluation.table()


# --- seen classes


def test_the_44_classes_are_38_of_coco_and_six_more():
    lines = (REPO / "yolo_lightning/tree/data/imagenet_det_seen.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    tables = load_reviewed_labels()
    det, coco = tables["ilsvrc_det"], tables["coco"]
    assert len(rows) == len({wnid for wnid, *_ in rows}) == len(imagenet_det_seen()) == 44
    assert len(set(det.values()) - set(imagenet_det_seen())) == 156
    for wnid, name, coco_name, reason in rows:
        assert det[name] == wnid
        assert (coco[coco_name] == wnid) == (reason == "equal")
        assert reason == "equal" or reason.startswith("same objects: ")
    equal = {wnid for wnid, _, _, reason in rows if reason == "equal"}
    assert equal == set(det.values()) & set(coco.values())
    assert len(equal) == 38


@pytest.mark.parametrize("column", [0, 1])
def test_the_44_classes_are_looked_up_by_wnid_and_by_name(column):
    table = [(wnid, name) for name, wnid in load_reviewed_labels()["ilsvrc_det"].items()]
    tree = WordTree.from_names([pair[column] for pair in table])
    seen = seen_nodes(tree, IMAGENET_DET_44)
    assert int(seen.sum()) == 44
    chosen = {table[node][1] for node in seen.nonzero().flatten().tolist()}
    assert {"person", "cup or mug", "watercraft"} < chosen
    assert not chosen & {"tennis ball", "flower pot", "lion"}
    part = WordTree.from_names(["n00007846", "n02129165"])
    assert seen_nodes(part, IMAGENET_DET_44).tolist() == [True, False]
    with pytest.raises(InputError, match="imagenet_det_44: none of its wnids and names is a key"):
        seen_nodes(WordTree.from_names(["lion", "Person"]), IMAGENET_DET_44)


def test_a_file_names_seen_classes_by_key_or_name(tmp_path):
    file = write(tmp_path / "seen.txt", "# classes with boxes\npug\n\nBengal\tas a name\n")
    assert seen_nodes(TREE, str(file)).tolist() == [False, False, True, False, True]
    assert torch.equal(seen_nodes(TREE, str(file)), seen_nodes(TREE, ["bengal", "pug"]))
    write(file, "pug\nMank\ndogg\n")
    with pytest.raises(InputError) as caught:
        seen_nodes(TREE, str(file))
    message = str(caught.value)
    assert f"{file}:2: label 'Mank' is not in the tree; did you mean 'Manx'" in message
    assert f"{file}:3: label 'dogg' is not in the tree; did you mean 'dog'" in message
    write(file, "# nothing yet\n")
    with pytest.raises(InputError, match=r"seen\.txt: contains no classes"):
        seen_nodes(TREE, str(file))
    with pytest.raises(InputError, match="list of seen classes 'nowhere.txt' not found"):
        seen_nodes(TREE, "nowhere.txt")
    with pytest.raises(InputError, match="did you mean 'imagenet_det_44'"):
        seen_nodes(TREE, "imagenet_det_4")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not readable as UTF-8"):
        seen_nodes(TREE, str(file))
