"""Figures at two levels of the tree, by hand."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.golden import detection_batch
from tests.helpers.miniatures import FRUIT, bound, plain, write, write_coco
from tests.helpers.paths import REPO
from yolo_lightning.datamodules import COCOJson
from yolo_lightning.datamodules.batching import EvaluationDataset
from yolo_lightning.detections import Detections
from yolo_lightning.errors import InputError
from yolo_lightning.evaluation.coco import coco_evaluation
from yolo_lightning.evaluation.detection import DetectionEvaluation
from yolo_lightning.tree.labels import reviewed
from yolo_lightning.tree.seen_classes import IMAGENET_DET_44, imagenet_det_seen, seen_nodes
from yolo_lightning.tree.wordtree import WordTree

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
    to.update(batch, [torch.tensor(truth)], [fine], [coarse] if coarse else [])


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


def test_every_level_of_the_tree_is_measured_by_its_own_names():
    figures = evaluation([2, 3, 4], boxed=[2, 3, 4])
    ((level, stands_for, asked),) = figures.levels
    assert (level, stands_for.tolist(), asked.tolist()) == (1, [0, 1, 0, 0, 1], [0, 1])
    # a Manx taken for a Bengal is a cat all the same; a pug was taken for a cat
    for truth, score in ((3, 0.9), (2, 0.8), (4, 0.7)):
        batch = detection_batch(torch.zeros(1, 1, 4), torch.tensor([[truth]]))
        batch.sample_ids += len(figures.fine.truths)
        told, named = found((HERE, 2, score)), found((HERE, 0, score))
        figures.update(batch, [torch.tensor([HERE])], [told], [], [[named]])
    means = figures.compute(torch.ones(5, dtype=torch.bool))
    # a false Bengal before the right one: 1/2; no Manx and no pug
    assert means["AP50"] == pytest.approx(1 / 6)
    # both cats before the false one: 1; no dog
    assert means["AP50_level1"] == 0.5
    deep = WordTree([("0", "-", "0"), *((str(k), str(k - 1), str(k)) for k in range(1, 9))])
    chain = DetectionEvaluation(deep)
    chain.begin(torch.tensor([8]), torch.arange(9))
    assert [number for number, *_ in chain.levels] == [1, 2, 3, 4]  # no more than four


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
    others = {"AP75", "AP_small", "AR_1", "AR_10", "AR_100", "AR_small", "VOC07_AP50", "VOC_AP50"}
    assert set(means) - ours == others
    assert means["AP75"] == means["AR_1"] == means["VOC_AP50"] == 1
    assert means == figures.figures
    text = figures.table()
    assert "as boxes say" not in text
    assert "classes with" not in text
    assert "COCO's numbers: AP 1.000, AP50 1.000, AP75 1.000, AP_small 1.000" in text
    assert "Pascal VOC's numbers: VOC07_AP50 1.000, VOC_AP50 1.000" in text


def test_classes_without_boxes_are_told_apart_by_what_is_above_them():
    figures = evaluation([1, 2, 3, 4], boxed=[0, 4])
    # of the classes without boxes, both cats lie below one that had some, the dog above one
    said = found((HERE, 2, 0.9), (HERE, 3, 0.8), (THERE, 1, 0.7), (THERE, 4, 0.6))
    add(figures, [HERE, THERE, HERE, THERE], [2, 3, 1, 4], said, found())
    means = figures.compute(torch.tensor([True, False, False, False, True]))
    assert [means[f"AP50{group}"] for group in ("", "_boxed", "_unboxed")] == [0.5, 1, 1 / 3]
    assert means["AP50_below_boxed"] == 0.5
    assert means["AP50_never_boxed"] == means["AP_never_boxed"] == 0
    text = figures.table()
    assert "classes with boxes (1): AP50 1.000, AP 1.000" in text
    assert "classes without boxes (3): AP50 0.333, AP 0.333" in text
    assert (
        "  below a class with boxes (2): AP50 0.500, AP 0.500\n  not below one (1): AP50 0.000"
        in text
    )


def test_a_list_of_seen_classes_takes_the_place_of_the_training_s():
    figures = evaluation([2, 3, 4], boxed=[2, 3, 4])
    figures.seen = seen_nodes(TREE, ["manx", "dog"])
    add(figures, [HERE], [2], found((HERE, 2, 0.9)), None)
    add(figures, [HERE], [3], found(), None)
    add(figures, [HERE], [4], found((HERE, 4, 0.9)), None)
    means = figures.compute(torch.ones(5, dtype=torch.bool))
    assert (means["AP50_boxed"], means["AP50_unboxed"]) == (0, 1)
    assert (means["AP50_below_boxed"], means["AP50_never_boxed"]) == (1, 1)  # pug, Bengal


def test_everything_measured_is_kept_as_tables():
    figures = evaluation([0, 1], boxed=[0, 1])
    batch = detection_batch(torch.zeros(2, 2, 4), torch.tensor([[0, -1], [1, 0]]))
    batch.sample_ids += 7
    batch.difficult[1] = True
    batch.crowd[1, 1] = True
    batch.areas_orig_px2[1] = torch.tensor([30.0, 0.0])
    said = [found((HERE, 0, 0.5)), found((THERE, 1, 0.25), (HERE, 0, 0.125))]
    figures.update(batch, [torch.tensor([HERE]), torch.tensor([THERE, HERE])], said, [])
    figures.compute(torch.ones(5, dtype=torch.bool))
    assert figures.truths.tolist() == [
        [7, 0, 0, 0, *HERE], [8, 1, 30, 1, *THERE], [8, 0, 0, 2, *HERE],
    ]  # fmt: skip
    assert figures.detections.tolist() == [
        [7, 0, 0.5, 0, *HERE], [8, 1, 0.25, 0, *THERE], [8, 0, 0.125, 0, *HERE],
    ]  # fmt: skip
    again = coco_evaluation(figures.truths, figures.detections)
    assert again.per_class[0]["AP"] == figures.per_class["cat"]["AP"] == pytest.approx(1)
    assert set(figures.per_class["cat"]) == {"AP", "AP50", "AP75", "VOC07_AP50", "VOC_AP50"}


def test_the_areas_of_outlines_decide_what_is_small(tmp_path):
    plain(tmp_path / "a.jpg", width=400, height=400)
    sizes: list[Any] = [900, None, 50_000, float("nan"), "large", -1, 0]
    annotations = [
        {"id": k, "image_id": 5, "category_id": 3, "bbox": [k, 199 * k, 200, 200], "area": size}
        for k, size in enumerate(sizes[:2])
    ]
    del annotations[1]["area"]
    image = {"id": 5, "file_name": "a.jpg", "width": 400, "height": 400}
    file = write_coco(tmp_path / "ann.json", annotations, [image])
    batch = EvaluationDataset(bound(COCOJson(str(file))), 64)[[0]]
    # px of the file, whatever the network's input is
    assert batch.areas_orig_px2[0].tolist() == [900.0] + [0.0] * 7
    figures = DetectionEvaluation(FRUIT)
    figures.begin(torch.tensor([1]), torch.arange(2))
    boxes = torch.tensor([[0.0, 0, 200, 200], [1.0, 199, 201, 399]])
    figures.update(batch, [boxes], [found((boxes[0].tolist(), 1, 0.9))], [])
    means = figures.compute(torch.ones(2, dtype=torch.bool))
    assert means["AP_small"] == pytest.approx(1)
    assert means["AP_large"] == 0
    annotations = [{**annotations[0], "bbox": [k, 0, 9, 9], "area": s} for k, s in enumerate(sizes)]
    write_coco(file, annotations, [image])
    source = bound(COCOJson(str(file)))
    assert source.read(0).areas_orig_px2.tolist() == [900, 0, 50_000, 0, 0, 0, 0]
    assert source.read(0).chosen(np.array([2])).areas_orig_px2.tolist() == [50_000]


def test_padding_counts_nowhere():
    figures = evaluation([2, 3], boxed=[0])
    batch = detection_batch(torch.zeros(1, 1, 4), torch.tensor([[2]]))
    batch.sample_ids[:] = -1
    figures.update(batch, [torch.tensor([HERE])], [found((HERE, 2, 0.9))], [found((HERE, 0, 0.9))])
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


# --- classes that count as seen


def test_the_44_are_the_38_of_coco_and_six_more():
    lines = (REPO / "yolo_lightning/tree/data/imagenet_det_seen.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    tables = reviewed()
    det, coco = tables["ilsvrc_det"], tables["coco"]
    assert len(rows) == len({wnid for wnid, *_ in rows}) == len(imagenet_det_seen()) == 44
    assert len(set(det.values()) - set(imagenet_det_seen())) == 156
    for wnid, name, partner, why in rows:
        assert det[name] == wnid
        assert (coco[partner] == wnid) == (why == "equal")
        assert why == "equal" or why.startswith("same objects: ")
    equal = {wnid for wnid, _, _, why in rows if why == "equal"}
    assert equal == set(det.values()) & set(coco.values())
    assert len(equal) == 38


@pytest.mark.parametrize("column", [0, 1])
def test_the_44_are_found_by_wnid_and_by_name(column):
    table = [(wnid, name) for name, wnid in reviewed()["ilsvrc_det"].items()]
    tree = WordTree.flat([pair[column] for pair in table])
    seen = seen_nodes(tree, IMAGENET_DET_44)
    assert int(seen.sum()) == 44
    chosen = {table[node][1] for node in seen.nonzero().flatten().tolist()}
    assert {"person", "cup or mug", "watercraft"} < chosen
    assert not chosen & {"tennis ball", "flower pot", "lion"}
    part = WordTree.flat(["n00007846", "n02129165"])
    assert seen_nodes(part, IMAGENET_DET_44).tolist() == [True, False]
    with pytest.raises(InputError, match="imagenet_det_44: none of its wnids and names is a key"):
        seen_nodes(WordTree.flat(["lion", "Person"]), IMAGENET_DET_44)


def test_a_file_names_seen_classes_by_key_or_name(tmp_path):
    file = write(tmp_path / "seen.txt", "# what boxes taught\npug\n\nBengal\tas a name\n")
    assert seen_nodes(TREE, str(file)).tolist() == [False, False, True, False, True]
    assert torch.equal(seen_nodes(TREE, str(file)), seen_nodes(TREE, ["bengal", "pug"]))
    write(file, "pug\nMank\ndogg\n")
    with pytest.raises(InputError) as caught:
        seen_nodes(TREE, str(file))
    said = str(caught.value)
    assert f"{file}:2: label 'Mank' is not in the tree; did you mean 'Manx'" in said
    assert f"{file}:3: label 'dogg' is not in the tree; did you mean 'dog'" in said
    write(file, "# nothing yet\n")
    with pytest.raises(InputError, match=r"seen\.txt: names no class"):
        seen_nodes(TREE, str(file))
    with pytest.raises(InputError, match="'nowhere.txt' of classes seen with boxes not found"):
        seen_nodes(TREE, "nowhere.txt")
    with pytest.raises(InputError, match="did you mean 'imagenet_det_44'"):
        seen_nodes(TREE, "imagenet_det_4")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not readable as UTF-8"):
        seen_nodes(TREE, str(file))
