"""Faults in annotations: Pascal VOC, COCO and YOLO text."""

import json
import os

import pytest
import torch

from tests.helpers.miniatures import (
    FRUIT,
    GOOD_COCO,
    GOOD_VOC,
    bind_source,
    paths_of,
    save_grey,
    set_up_data,
    write,
    write_coco,
)
from yolo_lightning.batches import DetectionBatch
from yolo_lightning.datamodules import COCOJson, ImageFolder, VOCFolder, YOLOText, voc
from yolo_lightning.errors import InputError

Box = list[float]
GOOD_BOX: Box = [0, 0, 10, 20]


def sizes_of(boxes: list[Box]) -> list[Box]:
    return [[x2 - x1, y2 - y1] for x1, y1, x2, y2 in boxes]


# --- Pascal VOC


@pytest.mark.parametrize(
    ("box", "expected", "message"),
    [
        (("nan", 1, 9, 9), [], "has no usable box, skipped"),
        (("inf", 1, 9, 9), [], "has no usable box, skipped"),
        (("", 1, 9, 9), [], "has no usable box, skipped"),
        (("left", 1, 9, 9), [], "has no usable box, skipped"),
        ((9, 9, 20, 9), [], "has no area, skipped"),
        # pixels count from 1 and the last one is included, in whatever order corners stand
        ((40, 30, 11, 5), [[10, 4, 40, 30]], "has swapped corners, repaired"),
        ((40, 5, 11, 30), [[10, 4, 40, 30]], "has swapped corners, repaired"),
        ((65, 10, 80, 20), [], "lies outside the image, skipped"),
        ((-20, -20, -5, -5), [], "lies outside the image, skipped"),
        ((33, 25, 100, 90), [[32, 24, 64, 48]], "extends beyond the image, clipped"),
        ((-9, -9, 8, 8), [[0, 0, 8, 8]], "extends beyond the image, clipped"),
        # a pixel is rounding
        ((33, 25, 65, 49), [[32, 24, 64, 48]], None),
        ((0, 0, 8, 8), [[0, 0, 8, 8]], None),
    ],
)
def test_invalid_voc_object(tmp_path, write_voc, box, expected, message):
    file = write_voc(tmp_path, "a", [("apple", *box), GOOD_VOC])
    source = bind_source(VOCFolder(str(tmp_path)))
    assert source.read(0).boxes_xyxy_px.tolist() == [*expected, GOOD_BOX]
    assert source.read(0).faults == []
    assert source.faults == ([f"{file}: object 1 {message}"] if message else [])
    assert source.shapes_wh_px()[0].tolist() == sizes_of([*expected, GOOD_BOX])


def test_duplicate_voc_object_is_skipped(tmp_path, write_voc):
    twice = ("apple", 5, 5, 9, 9)
    file = write_voc(tmp_path, "a", [twice, GOOD_VOC, twice, ("banana", 5, 5, 9, 9)])
    write_voc(tmp_path, "b", [twice])
    source = bind_source(VOCFolder(str(tmp_path)))
    assert source.read(0).boxes_xyxy_px.tolist() == [[4, 4, 9, 9], GOOD_BOX, [4, 4, 9, 9]]
    assert source.read(0).labels.tolist() == [0, 1, 1]
    assert len(source.read(1).labels) == 1
    assert source.faults == [f"{file}: object 3 is listed twice, one skipped"]


def test_voc_objects_without_name_or_box_and_empty_files_are_reported(tmp_path, write_voc):
    file = write_voc(tmp_path, "a", [GOOD_VOC])
    text = file.read_text()
    extra = "<object><name> </name></object><object><name>apple</name></object></annotation>"
    file.write_text(text.replace("</annotation>", extra))
    write_voc(tmp_path, "empty", [])
    empty = write(tmp_path / "zero.xml", "")
    save_grey(tmp_path / "zero.jpg", 9)
    source = bind_source(VOCFolder(str(tmp_path)))
    assert paths_of(source, tmp_path) == ["a.jpg", "empty.jpg"]
    assert source.read(0).boxes_xyxy_px.tolist() == [GOOD_BOX]
    assert source.read(1).boxes_xyxy_px.shape == (0, 4)
    message = sorted(source.faults)
    assert message[0] == f"{file}: object 2 has no name, skipped"
    assert message[1] == f"{file}: object 3 has no usable box, skipped"
    assert message[2].startswith(f"{empty}: not readable XML")
    assert len(message) == 3


def test_voc_prefers_the_image_with_the_name_of_the_xml_file(tmp_path, write_voc):
    file = write_voc(tmp_path, "a", [GOOD_VOC])
    (tmp_path / "b.xml").write_text(file.read_text())  # a copy, with a.jpg still inside
    save_grey(tmp_path / "b.png", 9)
    save_grey(tmp_path / "c_named_within.png", 9)
    text = file.read_text().replace("a.jpg", "C:\\photos\\c_named_within.png")
    (tmp_path / "c.xml").write_text(text)
    source = bind_source(VOCFolder(str(tmp_path)))
    assert paths_of(source, tmp_path) == ["a.jpg", "b.png", "c_named_within.png"]


def test_wrong_annotated_size_drops_no_object(tmp_path, write_voc):
    # width and height are swapped, as programs write that overlook how a photo is turned
    write_voc(tmp_path, "a", [("apple", 51, 11, 60, 40), GOOD_VOC], (64, 48), (48, 64))
    source = bind_source(VOCFolder(str(tmp_path)))
    assert source.read(0).boxes_xyxy_px.tolist() == [[50, 10, 60, 40], GOOD_BOX]
    assert "is 64 x 48, but annotated as 48 x 64" in "".join(
        [*source.faults, *source.read(0).faults]
    )


# --- COCO


@pytest.mark.parametrize(
    ("bbox", "expected", "message"),
    [
        ([float("nan"), 1, 9, 9], [], "has no usable box, skipped"),
        ([1, 1, float("inf"), 9], [], "has no usable box, skipped"),
        ([1, 1, 9], [], "has no usable box, skipped"),
        ([1, 1, "wide", 9], [], "has no usable box, skipped"),
        ([1, 1, 10**400, 9], [], "has no usable box, skipped"),
        (None, [], "has no usable box, skipped"),
        ([], [], "has no usable box, skipped"),
        ([5, 5, 0, 10], [], "has no area, skipped"),
        ([40, 30, -29, -25], [[11, 5, 40, 30]], "has swapped corners, repaired"),
        ([70, 5, 10, 10], [], "lies outside the image, skipped"),
        ([-20, 5, 20, 10], [], "lies outside the image, skipped"),
        ([32, 24, 100, 100], [[32, 24, 64, 48]], "extends beyond the image, clipped"),
        ([32, 24, 33, 24], [[32, 24, 64, 48]], None),
        ([1.5, 2.25, 10, 10], [[1.5, 2.25, 11.5, 12.25]], None),
    ],
)
def test_invalid_coco_annotation(tmp_path, bbox, expected, message):
    save_grey(tmp_path / "a.jpg")
    bad = {"id": 7, "image_id": 5, "category_id": 90, "bbox": bbox}
    file = write_coco(tmp_path / "ann.json", [bad, GOOD_COCO])
    source = bind_source(COCOJson(str(file)))
    assert source.read(0).boxes_xyxy_px.tolist() == [*expected, GOOD_BOX]
    assert source.faults == ([f"{file}: annotation 7 (a.jpg) {message}"] if message else [])
    assert source.shapes_wh_px()[0].tolist() == sizes_of([*expected, GOOD_BOX])


def test_coco_annotations_without_image_or_category_are_skipped_and_reported(tmp_path):
    save_grey(tmp_path / "a.jpg")
    images = [
        {"id": 5, "file_name": "a.jpg"},
        {"id": 6, "file_name": "gone.jpg"},
        {"id": 5, "file_name": "a.jpg"},
        {"id": 8},
    ]
    box = {"bbox": [1, 1, 5, 5]}
    annotations = [
        GOOD_COCO,
        {**GOOD_COCO, "id": 2, "category_id": 1},
        {**GOOD_COCO, "id": 3},
        {**box, "id": 4, "image_id": 6, "category_id": 3},
        {**box, "id": 5, "image_id": 77, "category_id": 3},
        {**box, "id": 6, "image_id": 5},
    ]
    file = write_coco(tmp_path / "ann.json", annotations, images)
    source = bind_source(COCOJson(str(file)))
    assert len(source) == 1
    assert source.read(0).boxes_xyxy_px.tolist() == [GOOD_BOX]
    assert sorted(source.faults) == [
        f"{file}: annotation 2 has the unknown category 1, skipped",
        f"{file}: annotation 3 (a.jpg) is listed twice, one skipped",
        f"{file}: annotation 5 belongs to no image (77), skipped",
        f"{file}: annotation 6 has the unknown category None, skipped",
        f"{file}: image 5 is listed twice, one skipped",
        f"{file}: image 6: {tmp_path / 'gone.jpg'} is missing, skipped",
        f"{file}: image 8 has no id or no file_name, skipped",
    ]


@pytest.mark.parametrize("flag", ["iscrowd", "difficult"])
def test_a_class_with_crowds_or_difficult_objects_only_has_no_boxes(tmp_path, write_voc, flag):
    source: COCOJson | VOCFolder
    if flag == "iscrowd":
        save_grey(tmp_path / "a.jpg")
        apple = {**GOOD_COCO, "id": 2, "category_id": 90, "iscrowd": 1}
        source = COCOJson(str(write_coco(tmp_path / "ann.json", [GOOD_COCO, apple])))
    else:
        write_voc(tmp_path, "a", [("apple", 3, 3, 30, 30)], difficult=1)
        write_voc(tmp_path, "b", [GOOD_VOC])
        source = VOCFolder(str(tmp_path))
    data = set_up_data(detection=source, detection_batch_size=len(bind_source(source)))
    assert source.name_counts() == {"apple": 1, "banana": 1}
    assert 0 in [label for k in range(len(source)) for label in source.read(k).labels]
    assert set(data.batch(0).labels.flatten().tolist()) == {1, -1}  # what training reads
    assert source.node_counts() == {1: {"banana": 1}}
    assert source.nodes.tolist() == data.boxed_nodes.tolist() == [1]
    assert "they learn 1 from boxes, 1 from nothing" in data.vocabulary_report()


def test_coco_ids_are_never_labels(tmp_path):
    save_grey(tmp_path / "a.jpg")
    file = write_coco(
        tmp_path / "ann.json", [{**GOOD_COCO, "category_id": 90, "bbox": [1, 2, 3, 4]}, GOOD_COCO]
    )
    source = bind_source(COCOJson(str(file)))
    assert source.read(0).labels.tolist() == [0, 1]
    assert source.nodes.tolist() == [0, 1]
    assert source.name_counts() == {"apple": 1, "banana": 1}


def test_coco_categories_with_the_same_name_are_one_class(tmp_path):
    save_grey(tmp_path / "a.jpg")
    categories = [{"id": k, "name": name} for k, name in ((1, "apple"), (5, "apple"), (9, "kiwi"))]
    annotations = [
        {"id": k, "image_id": 5, "category_id": category, "bbox": [k, 2, 3, 4]}
        for k, category in enumerate((5, 1, 5))
    ]
    file = write_coco(tmp_path / "ann.json", annotations, categories=categories)
    source = bind_source(COCOJson(str(file)))  # kiwi has no boxes, so nobody misses it in the tree
    assert source.read(0).labels.tolist() == [0, 0, 0]
    assert source.node_counts() == {0: {"apple": 3}}
    assert source.read(0).boxes_xyxy_px[:, 0].tolist() == [0, 1, 2]


def test_coco_objects_belong_to_their_images_in_any_order(tmp_path):
    for name in "abc":
        save_grey(tmp_path / f"{name}.jpg")
    images = [{"id": k, "file_name": f"{name}.jpg"} for k, name in ((9, "a"), (2, "b"), (4, "c"))]
    annotations = [
        {"id": k, "image_id": image, "category_id": 3, "bbox": [k, 0, 5, 5]}
        for k, image in enumerate((4, 9, 4, 9, 4))
    ]
    source = bind_source(COCOJson(str(write_coco(tmp_path / "ann.json", annotations, images))))
    left = [source.read(k).boxes_xyxy_px[:, 0].tolist() for k in range(3)]
    assert left == [[1, 3], [], [0, 2, 4]]


def test_regions_of_a_crowd_are_evaluated_but_not_trained(tmp_path):
    save_grey(tmp_path / "a.jpg")
    region = {"id": 2, "image_id": 5, "category_id": 3, "bbox": [20, 4, 30, 40], "iscrowd": 1}
    # regions may repeat each other: they are no objects
    file = write_coco(tmp_path / "ann.json", [region, GOOD_COCO, {**region, "id": 3}])
    source = COCOJson(str(file))
    data = set_up_data(detection=source, validation=source, detection_batch_size=1)
    sample = source.read(0)
    assert sample.crowd.tolist() == sample.difficult.tolist() == [True, False, True]
    assert source.faults == []
    (trained,), (evaluated,) = list(data.train_dataloader()), list(data.val_dataloader())
    assert isinstance(trained, DetectionBatch)
    assert isinstance(evaluated, DetectionBatch)
    assert trained.labels[0].tolist() == [1] + [-1] * 7
    assert not trained.crowd.any()
    assert not trained.difficult.any()
    # 64 x 48 in 64 x 64: 8 px of grey above
    torch.testing.assert_close(trained.boxes_cxcywh_norm[0, 0], torch.tensor([5, 18, 10, 20]) / 64)
    assert evaluated.labels[0].tolist() == [1, 1, 1] + [-1] * 5
    assert evaluated.crowd[0].tolist() == [True, False, True] + [False] * 5
    assert evaluated.difficult.tolist() == evaluated.crowd.tolist()


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        ("ann.json", "."),
        ("ann.json", "images"),
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/instances_train2017.json", "images/train2017"),
        ("annotations/train.json", "train"),
        ("annotations/train.json", "images"),
        ("annotations/train.json", "."),
    ],
)
def test_coco_images_are_found_in_the_usual_folders(tmp_path, file, folder):
    save_grey(tmp_path / folder / "a.jpg")
    save_grey(tmp_path / "val2017/b.jpg")
    source = bind_source(COCOJson(str(write_coco(tmp_path / file, [GOOD_COCO]))))
    assert paths_of(source, tmp_path) == [os.path.normpath(f"{folder}/a.jpg")]


@pytest.mark.parametrize(
    ("name", "file", "folder"),
    [
        ("images/0a1b2c3d-a.jpg", "images/0a1b2c3d-a.jpg", ""),  # Label Studio with its images
        ("images\\0a1b2c3d-a.jpg", "images/0a1b2c3d-a.jpg", ""),
        ("images/0a1b2c3d-a.jpg", "images/a.jpg", ""),  # with the images as they were
        ("/data/upload/3/0a1b2c3d-a.jpg", "a.jpg", ""),
        ("../../label-studio/media/upload/3/0a1b2c3d-a.jpg", "images/a.jpg", ""),
        ("photos/a.jpg", "a.jpg", ""),
        ("/content/data/a.jpg", "elsewhere/a.jpg", "elsewhere"),
    ],
)
def test_coco_images_are_found_without_the_folders_and_the_hash_of_an_upload(
    tmp_path, name, file, folder
):
    save_grey(tmp_path / file)
    images = [{"id": 5, "file_name": name}]
    path = write_coco(tmp_path / "result.json", [GOOD_COCO], images)
    source = bind_source(COCOJson(str(path), images=str(tmp_path / folder) if folder else None))
    assert paths_of(source, tmp_path) == [file]
    assert not source.faults


def test_two_coco_images_never_get_one_file(tmp_path):
    save_grey(tmp_path / "a.jpg")
    names = ["0a1b2c3d-a.jpg", "11111111-a.jpg", "deadbeef-", "x/"]
    images = [{"id": 5 + k, "file_name": name} for k, name in enumerate(names)]
    source = bind_source(COCOJson(str(write_coco(tmp_path / "ann.json", [GOOD_COCO], images))))
    assert paths_of(source, tmp_path) == ["a.jpg"]
    assert source.faults == [
        f"{tmp_path}/ann.json: image 6: {tmp_path}/a.jpg is that of another image too, as "
        "'11111111-a.jpg' is missing, skipped",
        f"{tmp_path}/ann.json: image 7: {tmp_path}/deadbeef- is missing, skipped",
        f"{tmp_path}/ann.json: image 8: {tmp_path}/x is missing, skipped",
    ]


def test_coco_images_in_a_given_folder(tmp_path):
    save_grey(tmp_path / "far away/deep/a.jpg")
    images = [{"id": 5, "file_name": "deep/a.jpg"}]
    file = write_coco(tmp_path / "here/ann.json", [GOOD_COCO], images)
    with pytest.raises(InputError, match=r"ann\.json: its images are in none of .*images: …"):
        COCOJson(str(file)).bind(FRUIT)
    source = bind_source(COCOJson(str(file), images=str(tmp_path / "far away")))
    assert paths_of(source, tmp_path) == ["far away/deep/a.jpg"]
    with pytest.raises(InputError, match="COCO images 'nowhere' not found"):
        COCOJson(str(file), images="nowhere").bind(FRUIT)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        "{}",
        '{"images": [], "annotations": []}',
        '{"images": null, "annotations": [], "categories": []}',
    ],
)
def test_malformed_coco_file_raises(tmp_path, text):
    file = write(tmp_path / "ann.json", text)
    with pytest.raises(InputError, match=r"ann\.json: not a COCO annotation file \("):
        COCOJson(str(file)).bind(FRUIT)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"annotations": [1]}, "annotation 1 is not an object, skipped"),
        ({"annotations": [{"id": [2], "image_id": {}}]}, "annotation [2] belongs to no image ({})"),
        ({"annotations": [GOOD_COCO | {"category_id": [3]}]}, "has the unknown category [3]"),
        ({"images": ["b.jpg", {"id": 5, "file_name": "a.jpg"}]}, "image 'b.jpg' is not an object"),
        ({"images": [{"id": [6], "file_name": "a.jpg"}]}, "image [6] has no id or no file_name"),
        ({"categories": [{"id": [1], "name": "apple"}]}, "category [1] has no id or no name"),
        ({"categories": [{"id": 3, "name": "a"}, {"id": 3, "name": "b"}]}, "3 is listed twice"),
        ({"images": [{"id": 5, "file_name": "a.jpg", "width": 10**13, "height": 48}]},
         "image 5: gives the size as 10000000000000 x 48"),
    ],
)  # fmt: skip
def test_malformed_coco_entries_are_named(tmp_path, changes, fault):
    save_grey(tmp_path / "a.jpg")
    whole = {"images": [{"id": 5, "file_name": "a.jpg"}], "annotations": [], "categories": []}
    file = write(tmp_path / "ann.json", json.dumps(whole | changes))
    faults = "\n".join(COCOJson(str(file)).load_index().metadata["faults"])
    assert f"{file}: " in faults
    assert fault in faults


def test_missing_or_binary_coco_file_raises(tmp_path):
    file = tmp_path / "ann.json"
    with pytest.raises(InputError, match=r"COCO annotations '.*ann\.json' not found"):
        COCOJson(str(file)).bind(FRUIT)
    file.write_bytes(bytes(range(128, 256)))
    with pytest.raises(InputError, match=r"ann\.json: not readable as UTF-8 text"):
        COCOJson(str(file)).bind(FRUIT)


def test_coco_annotation_ids_of_any_type(tmp_path):
    save_grey(tmp_path / "a.jpg")
    ids = [10**30, "seven", None]
    annotations = [{**GOOD_COCO, "id": k, "bbox": [n, 0, 5, 5]} for n, k in enumerate(ids)]
    source = bind_source(COCOJson(str(write_coco(tmp_path / "ann.json", annotations))))
    assert len(source.read(0).labels) == 3


@pytest.mark.parametrize("absolute", [False, True])
def test_coco_images_outside_the_folder_need_allow_outside(tmp_path, absolute):
    save_grey(tmp_path / "inner/a.jpg")
    outer = save_grey(tmp_path / "outer/b.jpg")
    name = str(outer) if absolute else "../outer/b.jpg"
    images = [{"id": 5, "file_name": "a.jpg"}, {"id": 6, "file_name": name}]
    file = write_coco(tmp_path / "inner/ann.json", [GOOD_COCO], images)
    with pytest.raises(InputError, match=r"image 6: path '.*b\.jpg' leaves .*allow_outside: true"):
        COCOJson(str(file)).bind(FRUIT)
    source = bind_source(COCOJson(str(file), allow_outside=True))
    assert [source.image_path(k) for k in range(2)] == [tmp_path / "inner/a.jpg", outer]
    assert source.faults == []


def test_absolute_paths_do_not_decide_the_image_folder(tmp_path):
    save_grey(tmp_path / "images/a.jpg")
    far = save_grey(tmp_path / "far/b.jpg")
    images = [{"id": 6, "file_name": str(far)}, {"id": 5, "file_name": "a.jpg"}]
    file = write_coco(tmp_path / "ann.json", [GOOD_COCO], images)
    source = bind_source(COCOJson(str(file), allow_outside=True))
    assert paths_of(source, tmp_path) == ["far/b.jpg", "images/a.jpg"]


def test_parent_folder_inside_a_path_is_allowed(tmp_path):
    save_grey(tmp_path / "images/a.jpg")
    images = [{"id": 5, "file_name": "deep/../a.jpg"}]
    file = write_coco(tmp_path / "ann.json", [GOOD_COCO], images)
    source = bind_source(COCOJson(str(file), images=str(tmp_path / "images")))
    assert paths_of(source, tmp_path) == ["images/a.jpg"]


# --- YOLO text


@pytest.mark.parametrize(
    ("line", "expected", "message"),
    [
        ("0 nan 0.5 0.5 0.5", [], " has no usable box, skipped"),
        ("0 0.5 0.5 inf 0.5", [], " has no usable box, skipped"),
        ("0 0.5 0.5 0.5", [], " has no usable box, skipped"),
        ("0", [], " has no usable box, skipped"),
        ("0 0.1 0.1 0.3 nan 0.5 0.5", [], " has no usable box, skipped"),
        ("0 0.5 0.5 0 0.5", [], " has no area, skipped"),
        ("0 0.5 0.5 -0.5 0.5", [[16, 12, 48, 36]], " has swapped corners, repaired"),
        ("0 1.5 0.5 0.25 0.25", [], " lies outside the image, skipped"),
        ("0 1.0 0.5 0.5 0.5", [[48, 12, 64, 36]], " extends beyond the image, clipped"),
        ("0 0.5 0.5 1.001 1", [[0, 0, 64, 48]], None),
        ("3 0.5 0.5 0.5 0.5", [], ": class 3, allowed: 0 … 1, skipped"),
        ("-1 0.5 0.5 0.5 0.5", [], ": class -1, allowed: 0 … 1, skipped"),
        ("apple 0.5 0.5 0.5 0.5", [], ": 'apple 0.5 0.5 0.5 0.5' is not an object, skipped"),
        ("0,0.5,0.5,0.5,0.5", [], ": '0,0.5,0.5,0.5,0.5' is not an object, skipped"),
        # six columns: the last one is a confidence
        (
            "0 0.5 0.5 0.5 0.5 0.9",
            [[16, 12, 48, 36]],
            ": a sixth column, as on 1 of 2 lines; it is not used (detections of a model have "
            "their confidence there)",
        ),
        # polygons, the box around them; four corners of a turned box are one too
        ("0 0.25 0.5 0.5 0.25 0.75 0.5", [[16, 12, 48, 24]], None),
        ("0 0.5 0.25 0.75 0.5 0.5 0.75 0.25 0.5", [[16, 12, 48, 36]], None),
    ],
)
def test_invalid_yolo_line(tmp_path, line, expected, message):
    save_grey(tmp_path / "images/a.jpg")
    file = write(tmp_path / "labels/a.txt", f"{line}\n\n1 0.25 0.25 0.5 0.5\n")
    source = bind_source(YOLOText(str(tmp_path), names=["apple", "banana"]))
    assert source.read(0).boxes_xyxy_px.tolist() == [*expected, [0, 0, 32, 24]]
    assert source.faults == ([f"{file}:1{message}"] if message else [])
    assert source.shapes_wh_px()[0].tolist() == sizes_of([*expected, [0, 0, 32, 24]])


def test_missing_or_empty_yolo_files_mean_no_objects(tmp_path):
    for name in ("a", "b", "c", "d"):
        save_grey(tmp_path / f"images/{name}.jpg")
    twice = write(tmp_path / "labels/a.txt", "0 0.5 0.5 0.5 0.5\n" * 2)
    empty = write(tmp_path / "labels/b.txt", "\n")
    missing = tmp_path / "labels/c.txt"
    binary = tmp_path / "labels/d.txt"
    binary.write_bytes(b"0 0.5 \xff\xfe")
    source = bind_source(YOLOText(str(tmp_path), names=["apple"]))
    assert [len(source.read(k).labels) for k in range(4)] == [1, 0, 0, 0]
    message = sorted(source.faults)
    assert message[:3] == [
        f"{twice}:2 is listed twice, one skipped",
        f"{empty}: empty, its image is treated as having no objects",
        f"{missing}: no such file, images/c.jpg is treated as having no objects",
    ]
    assert message[3].startswith(f"{binary}: not readable as UTF-8 text (")
    assert len(message) == 4


def test_dataset_without_objects_can_be_validated_on(tmp_path):
    save_grey(tmp_path / "images/a.jpg")
    write(tmp_path / "labels/a.txt", "")
    source = YOLOText(str(tmp_path), names=["apple"])
    labelled = save_grey(tmp_path / "labelled/apple/b.jpg").parent.parent
    data = set_up_data(classification=ImageFolder(str(labelled)), validation=source)
    assert source.nodes.tolist() == []
    (batch,) = list(data.val_dataloader())
    assert batch.labels.tolist() == [[-1] * 8]
    with pytest.raises(InputError, match="data.detection: YOLO .* contains no box to learn from"):
        set_up_data(detection=source)


def test_duplicates_of_crowds_and_difficult_objects_keep_the_easy_object(tmp_path, write_voc):
    save_grey(tmp_path / "a.jpg")
    crowd = {**GOOD_COCO, "id": 2, "iscrowd": 1}
    file = write_coco(tmp_path / "ann.json", [crowd, GOOD_COCO])
    sample = bind_source(COCOJson(str(file))).read(0)
    assert sample.crowd.tolist() == [True, False]
    write_voc(tmp_path / "voc", "v", [("apple", 1, 1, 9, 9)], difficult=1)
    xml = tmp_path / "voc/v.xml"
    text = xml.read_text()
    hard = text[text.index("<object>") : text.index("</annotation>")]
    easy = hard.replace(">1</diff", ">0</diff")
    xml.write_text(text.replace("</annotation>", f"{easy}</annotation>"))
    assert bind_source(VOCFolder(str(tmp_path / "voc"))).read(0).difficult.tolist() == [False]


def test_an_xml_file_with_too_many_objects_is_skipped(tmp_path, write_voc, monkeypatch):
    monkeypatch.setattr(voc, "MAX_OBJECTS", 2)
    write_voc(tmp_path, "few", [("apple", 1, 1, 9, 9), ("apple", 11, 1, 19, 9)])
    file = write_voc(tmp_path, "many", [("apple", k, 1, 9, 9) for k in range(1, 4)])
    source = bind_source(VOCFolder(str(tmp_path)))
    assert len(source) == 1
    assert source.faults == [f"{file}: 3 objects; allowed: 2, skipped"]
