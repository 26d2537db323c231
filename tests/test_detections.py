"""Detections as plain values, arrays, a table and COCO's dictionaries."""

import json

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO

from yolo_lightning import WordTree
from yolo_lightning.detections import Detection, DetectionList, Detections

TREE = WordTree.from_names(["cat", "dog"])
FOUND = Detections(
    torch.tensor([[1.0, 2.0, 5.0, 8.5], [0.0, 0.0, 10.0, 20.0]]),
    torch.tensor([1, 0]),
    torch.tensor([0.75, 0.5]),
).to_list(TREE)
NONE = Detections(torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0)).to_list(TREE)


def test_a_list_holds_plain_values():
    assert [
        Detection((1.0, 2.0, 5.0, 8.5), "dog", 0.75, 1, "dog"),
        Detection((0.0, 0.0, 10.0, 20.0), "cat", 0.5, 0, "cat"),
    ] == FOUND
    assert NONE == []


@pytest.mark.parametrize("found", [FOUND, NONE, DetectionList()], ids=len)
def test_arrays_have_the_same_shapes_and_types_for_any_number(found):
    boxes, scores, labels, names = arrays = found.to_numpy()
    assert boxes.tolist() == [list(d.box_xyxy_orig_px) for d in found]
    assert boxes.shape == (len(found), 4)
    assert scores.shape == labels.shape == names.shape == (len(found),)
    assert (boxes.dtype, scores.dtype, labels.dtype) == (np.float32, np.float32, np.int64)
    assert names.dtype.kind == "U"
    assert arrays.scores.tolist() == [d.score for d in found]
    assert [TREE.names[label] for label in arrays.labels] == arrays.names.tolist()


def test_a_table_has_a_row_for_each_detection():
    table = FOUND.to_pandas()
    assert [*table.columns] == ["name", "key", "score", "x1", "y1", "x2", "y2"]
    assert table.values.tolist() == [
        ["dog", "dog", 0.75, 1, 2, 5, 8.5],
        ["cat", "cat", 0.5, 0, 0, 10, 20],
    ]
    assert [*NONE.to_pandas().columns] == [*table.columns]


def test_coco_reads_the_dictionaries(tmp_path):
    file = tmp_path / "annotations.json"
    ids = {"dog": 18, "cat": 17}
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    images = [{"id": 42, "width": 20, "height": 20, "file_name": "a.jpg"}]
    file.write_text(json.dumps({"images": images, "categories": categories, "annotations": []}))
    results = FOUND.to_coco(42, ids)
    assert results == [
        {"image_id": 42, "category_id": 18, "bbox": [1.0, 2.0, 4.0, 6.5], "score": 0.75},
        {"image_id": 42, "category_id": 17, "bbox": [0.0, 0.0, 10.0, 20.0], "score": 0.5},
    ]
    loaded = COCO(str(file)).loadRes(json.loads(json.dumps(results)))
    assert [row["area"] for row in loaded.dataset["annotations"]] == [26.0, 200.0]
    assert [row["category_id"] for row in FOUND.to_coco(42)] == [2, 1]
    with pytest.raises(ValueError, match="category_ids has no 'cat', which was detected"):
        FOUND.to_coco(42, {"dog": 18})
