"""Tables of boxes, and lists of the images of a source."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.images import write_image
from yolo_lightning import WordTree
from yolo_lightning.datamodules import BoxCSV, VOCFolder, YOLOText
from yolo_lightning.errors import InputError

HEADER = "filename,width,height,class,xmin,ymin,xmax,ymax"


def table(folder: Path, *rows: str) -> BoxCSV:
    for name in "ab":
        write_image(folder / f"images/{name}.jpg")
    (folder / "boxes.csv").write_text("\n".join(rows))
    return BoxCSV(str(folder / "boxes.csv"))


def boxes(source: BoxCSV) -> list[list[float]]:
    index = source.load_index()
    scale = [64, 48, 64, 48] if index.metadata["normalized"] else 1
    boxes_xyxy_px: list[list[float]] = (index.arrays["boxes_xyxy"] * scale).tolist()
    return boxes_xyxy_px


def test_columns_are_found_by_name_and_tables_may_have_none(tmp_path):
    rows = ["a.jpg,64,48,cat,1,2,33,26", "b.jpg,64,48,dog,3,4,20,30"]
    expected = [[1, 2, 33, 26], [3, 4, 20, 30]]
    source = table(tmp_path, HEADER, *rows)
    assert (boxes(source), source.name_counts()) == (expected, {"cat": 1, "dog": 1})
    other = ["Label;Y Max;Y Min;X Max;X Min;Image Path", "cat;26;2;33;1;a", "dog;30;4;20;3;b"]
    assert boxes(table(tmp_path, *other)) == expected
    plain = ["/content/a.jpg,1,2,33,26,cat", "C:\\data\\b.jpg,3,4,20,30,dog"]
    assert boxes(table(tmp_path, *plain)) == expected
    empty = table(tmp_path, "images/a.jpg,,,,,", "images/b.jpg,3,4,20,30,dog")
    assert (len(empty), boxes(empty)) == (2, expected[1:])


def test_corners_up_to_one_are_relative(tmp_path):
    source = table(tmp_path, "ImageID,XMin,XMax,YMin,YMax,LabelName", "a,0,.5,.25,1,cat")
    assert boxes(source) == [[0, 12, 32, 48]]
    source.bind(WordTree.from_names(["cat"]))
    assert source.read(0).boxes_xyxy_px.tolist() == [[0, 12, 32, 48]]


@pytest.mark.parametrize(
    "header_and_row",
    [
        "filename,xmin,ymin,width,height,class\na.jpg,1,2,32,24,cat",
        "filename,x_min,y_min,bbox_width,bbox_height,class\na.jpg,1,2,32,24,cat",
        "image_id,width,height,class,x,y,w,h\na,64,48,cat,1,2,32,24",
        "file_name,x,y,width,height,image_width,image_height,label\na.jpg,1,2,32,24,64,48,cat",
        "width,height,x,y,label,path\n32,24,1,2,cat,a.jpg",
        "filename,x_center,y_center,w,h,class\na.jpg,17,14,32,24,cat",
        "filename,class,X Center,Y Center,Width,Height\na.jpg,cat,.265625,.291666667,.5,.5",
        "filename,w,h,xmin,ymin,xmax,ymax,class\na.jpg,640,480,1,2,33,26,cat",
    ],
)
def test_boxes_may_have_a_width_and_a_height(tmp_path, header_and_row):
    source = table(tmp_path, *header_and_row.split("\n"))
    assert boxes(source) == [pytest.approx([1, 2, 33, 26], abs=1e-4)]
    assert source.name_counts() == {"cat": 1}
    assert not source.load_index().metadata["faults"]
    source.bind(WordTree.from_names(["cat"]))
    assert not source.read(0).faults


def test_faults_name_the_row(tmp_path):
    source = table(
        tmp_path, HEADER, "a.jpg,64,48,cat,1,2,33,26", "c.jpg,64,48,cat,1,2,33,26",
        "a.jpg,64,48,,1,2,33,26", "a.jpg,64,48,cat,1,2,x,26",
    )  # fmt: skip
    file = tmp_path / "boxes.csv"
    assert source.load_index().metadata["faults"] == [
        f"{file}:3: its image is missing, skipped", f"{file}:4: has no class, skipped",
        f"{file}:5 has no usable box, skipped",
    ]  # fmt: skip
    alone = table(tmp_path, "image,xmin,ymin,xmax,ymax", "a.jpg,1,2,33,26")
    assert alone.name_counts() == {"object": 1}
    assert "no column of classes; all are 'object'" in alone.load_index().metadata["faults"][0]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            "filename,class,xmin,ymin,ymax",
            "5 columns, among them those of image, class, x1, y1, y2",
        ),
        (
            "filename,class,x,y,width,height\na.jpg,cat,.5,.5,.3,.1",
            "x and y, 0 … 1, are a corner or",
        ),
        ("image_id,bbox", r"none of x1, y1, x2, y2; wanted: a header such as filename,xmin"),
        ("a.jpg,1,2,33,cat", "5 columns; none of image, x1, y1, x2, y2"),
        ("", "0 columns"),
    ],
)
def test_other_columns_are_refused_without_their_text(tmp_path, header, message):
    with pytest.raises(InputError, match=message) as caught:
        table(tmp_path, header).load_index()
    assert "33" not in str(caught.value)


def test_lists_divide_the_images_of_any_source(tmp_path):
    for k in range(5):
        write_image(tmp_path / f"set/images/{k}.jpg")
        (tmp_path / f"set/labels/{k}.txt").parent.mkdir(exist_ok=True)
        (tmp_path / f"set/labels/{k}.txt").write_text(f"0 .5 .5 .{k + 1} .5\n0 .5 .5 .1 .1\n")
    root, listed = str(tmp_path / "set"), tmp_path / "val.txt"
    listed.write_text("images/3.jpg\n\nimages/1.jpg\nimages/7.jpg\n")
    whole = YOLOText(root, names=["cat"])
    kept, rest = whole.with_list(only=str(listed)), whole.with_list(without=str(listed))
    tree = WordTree.from_names(["cat"])
    for source in (whole, kept, rest):
        source.bind(tree)
    assert [Path(kept.image_name(k)).name for k in range(len(kept))] == ["1.jpg", "3.jpg"]
    assert [Path(rest.image_name(k)).name for k in range(3)] == ["0.jpg", "2.jpg", "4.jpg"]
    for source, numbers in ((kept, [1, 3]), (rest, [0, 2, 4])):
        for k, number in enumerate(numbers):
            ours, its = source.read(k), whole.read(number)
            assert np.array_equal(ours.boxes_xyxy_px, its.boxes_xyxy_px)
            assert np.array_equal(ours.image, its.image)
        assert source.name_counts() == Counter(cat=2 * len(numbers))
        assert source.faults[-1].endswith(f"1 of 3 lines are no images of {whole.name}, skipped")
    assert len({source.fingerprint() for source in (whole, kept, rest)}) == 3
    assert len(whole) == 5


@pytest.mark.parametrize("kind", ["secret", "nul", "fifo", "gone"])
def test_hostile_lists_are_named_without_their_text(tmp_path, write_voc, kind):
    write_voc(tmp_path / "set", "a", [("cat", 1, 1, 20, 20)])
    listed = tmp_path / "list.txt"
    if kind == "fifo":
        os.mkfifo(listed)
    elif kind != "gone":
        listed.write_text("aws_secret = 1\n" if kind == "secret" else "a.jpg\0\n")
    source = VOCFolder(str(tmp_path / "set"), only=str(listed))
    words = {"secret": "none of its 1 lines is an image of VOC", "nul": "a NUL byte",
             "fifo": "is no regular file", "gone": "not found"}  # fmt: skip
    with pytest.raises(InputError, match=f"list.txt.*{words[kind]}") as caught:
        source.load_index()
    assert "aws" not in str(caught.value)


def test_a_sixth_column_and_boxes_in_px_are_named(tmp_path):
    for k in range(3):
        write_image(tmp_path / f"images/{k}.jpg")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/0.txt").write_text("0 .5 .5 .5 .5 .93\n0 .5 .5 .2 .2 .4\n")
    (tmp_path / "labels/1.txt").write_text("0 .5 .5 .5 .5\n0 50 50 100 100\n")
    (tmp_path / "labels/2.txt").write_text("0 .5 .5 1.2 .5\n")
    faults = YOLOText(str(tmp_path), names=["cat"]).load_index().metadata["faults"]
    labels = tmp_path / "labels"
    assert f"{labels}/1.txt:2: outside the image (in px?), skipped" in faults
    assert f"{labels}/2.txt:1 extends beyond the image, clipped" in faults
    (line,) = [fault for fault in faults if "a sixth column" in fault]
    assert line.startswith(f"{labels}/0.txt:1: a sixth column, as on 2 of 5 lines; it is not used")
    (tmp_path / "labels/2.txt").write_text("0 50 50 100 100\n" * 9)
    with pytest.raises(InputError, match=r"10 of 13 boxes are in px, such as .*1.txt:2: '0 50 50"):
        YOLOText(str(tmp_path), names=["cat"]).load_index()
