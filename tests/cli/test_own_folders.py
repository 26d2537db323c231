"""Folders that people have: layouts that `init` recognises, and mistakes that it names."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.images import write_image
from yolo_lightning.cli.main import main
from yolo_lightning.datamodules.autodetect import detection_source, held_out

pytestmark = pytest.mark.usefixtures("known_step_time")

XML = """<annotation><size><width>64</width><height>48</height></size><object><name>{}</name>
<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>33</xmax><ymax>25</ymax></bndbox></object></annotation>"""
YOLO = "0 .5 .5 .5 .5\n"
CSV = "filename,width,height,class,xmin,ymin,xmax,ymax\n"
NAMES = "names: [cat]\n"


def images(*paths: str) -> object:
    return [write_image(Path("set") / path) for path in paths]


def text(path: str, content: str) -> object:
    file = Path("set") / path
    file.parent.mkdir(parents=True, exist_ok=True)
    return file.write_text(content)


def voc(xml: str, image: str, name: str = "cat") -> object:
    return text(xml, XML.format(name)), images(image)


def yolo(label: str, image: str, line: str = YOLO) -> object:
    return text(label, line), images(image)


def coco(file: str, *names: str) -> object:
    records = [{"id": k, "file_name": name} for k, name in enumerate(names)]
    boxes = [{"id": k, "image_id": k, "category_id": 1, "bbox": [1, 1, 20, 20]} for k in range(9)]
    content = {
        "images": records, "annotations": boxes[: len(names)],
        "categories": [{"id": 1, "name": "cat"}],
    }  # fmt: skip
    return text(file, json.dumps(content))


def rows(file: str, *lines: str) -> object:
    return text(file, "".join(f"{line}\n" for line in lines))


def splits(write: Callable[[str], object], *names: str) -> object:
    return [write(name) for name in names]


# name: files, source, numbers of images for training, validation and test
LAYOUTS: dict[str, tuple[Callable[[], object], str, tuple[int, int, int]]] = {
    "annots": (lambda: voc("annots/a.xml", "images/a.jpg"), "VOCFolder", (1, 0, 0)),
    "annotations": (lambda: voc("annotations/a.xml", "images/a.png"), "VOCFolder", (1, 0, 0)),
    "Annotations": (lambda: voc("Annotations/a.xml", "JPEGImages/a.jpg"), "VOCFolder", (1, 0, 0)),
    "labels with XML": (lambda: voc("labels/a.xml", "images/a.jpg"), "VOCFolder", (1, 0, 0)),
    "annotations/xmls": (lambda: voc("annotations/xmls/a.xml", "images/a.jpg"), "VOCFolder",
                         (1, 0, 0)),
    "own names of folders": (lambda: voc("voc_out/a.xml", "pictures/a.jpg"), "VOCFolder",
                             (1, 0, 0)),
    "XML beside images": (lambda: voc("a.XML", "a.jpg"), "VOCFolder", (1, 0, 0)),
    "splits above annots": (
        lambda: splits(lambda s: voc(f"{s}/annots/{s}.xml", f"{s}/images/{s}.jpg"),
                       "train", "valid", "test"), "VOCFolder", (1, 1, 1)),
    "splits below annots": (
        lambda: splits(lambda s: voc(f"annots/{s}/{s}.xml", f"images/{s}/{s}.jpg"),
                       "train", "val"), "VOCFolder", (1, 1, 0)),
    "one folder inside": (lambda: voc("set-master/annots/a.xml", "set-master/images/a.jpg"),
                          "VOCFolder", (1, 0, 0)),
    "YOLO with data.yaml": (
        lambda: (yolo("labels/train/a.txt", "images/train/a.jpg"),
                 yolo("labels/val/b.txt", "images/val/b.jpg"),
                 text("data.yaml", f"train: images/train\nval: images/val\n{NAMES}")),
        "YOLOText", (1, 1, 0)),
    "YOLO with config.yaml": (
        lambda: (yolo("labels/a.txt", "images/a.jpg"),
                 text("config.yaml", f"train: images\nnc: 1\n{NAMES}")), "YOLOText", (1, 0, 0)),
    "YOLO with the paths of another machine": (
        lambda: (yolo("train/labels/a.txt", "train/images/a.jpg"),
                 yolo("valid/labels/b.txt", "valid/images/b.jpg"),
                 text("data.yaml", f"train: /kaggle/x/train\nval: /kaggle/x/valid\n{NAMES}")),
        "YOLOText", (1, 1, 0)),
    "two folders inside": (
        lambda: (yolo("set/set/train/labels/a.txt", "set/set/train/images/a.jpg"),
                 text("set/set/data.yaml", f"train: train/images\n{NAMES}")),
        "YOLOText", (1, 0, 0)),
    "YOLO of CVAT": (
        lambda: (yolo("labels/train/a.txt", "images/train/a.jpg"),
                 rows("train.txt", "data/images/train/a.jpg"),
                 text("data.yaml", f"path: .\ntrain: train.txt\n{NAMES}")), "YOLOText", (1, 0, 0)),
    "YOLO texts beside images": (
        lambda: (yolo("a.txt", "a.jpg"), text("classes.txt", "cat\n")), "YOLOText", (1, 0, 0)),
    "YOLO of LabelImg": (
        lambda: (yolo("labels/a.txt", "images/a.jpg"), text("labels/classes.txt", "cat\n")),
        "YOLOText", (1, 0, 0)),
    "YOLO of LabelImg in splits": (
        lambda: splits(lambda s: (yolo(f"{s}/labels/{s}.txt", f"{s}/images/{s}.jpg"),
                                  text(f"{s}/labels/classes.txt", "\ufeffcat\r\n")),
                       "train", "val"),
        "YOLOText", (1, 1, 0)),
    "COCO in annotations": (
        lambda: (coco("annotations/instances_train.json", "a.jpg"),
                 coco("annotations/instances_val.json", "b.jpg"),
                 images("train/a.jpg", "val/b.jpg")), "COCOJson", (1, 1, 0)),
    "COCO of each split": (
        lambda: splits(lambda s: (coco(f"{s}/_annotations.coco.json", f"{s}.jpg"),
                                  images(f"{s}/{s}.jpg")), "train", "valid", "test"),
        "COCOJson", (1, 1, 1)),
    "CSV beside images": (
        lambda: (rows("labels.csv", CSV.strip(), "a.jpg,64,48,cat,1,1,33,25"),
                 images("images/a.jpg")), "BoxCSV", (1, 0, 0)),
    "CSV of RetinaNet": (
        lambda: (rows("annotations.csv", "images/a.jpg,1,1,33,25,cat", "images/b.jpg,,,,,"),
                 images("images/a.jpg", "images/b.jpg")), "BoxCSV", (2, 0, 0)),
    "CSV of each split": (
        lambda: (rows("train_labels.csv", CSV.strip(), "a.jpg,64,48,cat,1,1,33,25"),
                 rows("test_labels.csv", CSV.strip(), "b.jpg,64,48,cat,1,1,33,25"),
                 images("train/a.jpg", "test/b.jpg")), "BoxCSV", (1, 0, 1)),
    "CSV with decimal commas": (
        lambda: (rows("labels.csv", CSV.strip().replace(",", ";"), "a.jpg;64;48;cat;1,5;1,0;33;25"),
                 images("images/a.jpg")), "BoxCSV", (1, 0, 0)),
    "CSV in 0 … 1, other names, no suffix": (
        lambda: (rows("boxes.csv", "ImageID;LabelName;XMin;XMax;YMin;YMax", "a;cat;0;.5;0;.5"),
                 images("pictures/a.jpg")), "BoxCSV", (1, 0, 0)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    return tmp_path


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_recognised(name):
    write, kind, expected = LAYOUTS[name]
    write()
    training = detection_source("set")
    parts = {"detection": training, **held_out("set", training)}
    assert type(training).__name__ == kind
    counts = [len(parts.get(part, ())) for part in ("detection", "validation", "test")]
    assert tuple(counts) == expected
    assert all(set(+part.name_counts()) == {"cat"} for part in parts.values())
    assert not [fault for part in parts.values() for fault in part.load_index().metadata["faults"]]


def archive() -> object:
    return text("set.zip", "PK")


# name: files, options, and what the message holds
MISTAKES: dict[str, tuple[Callable[[], object], list[str], list[str]]] = {
    "nothing": (lambda: None, [], ["set: no images with boxes recognised; the folder is empty"]),
    "an archive": (archive, [], ["found 1 archive", "unpack the archive first"]),
    "images alone": (lambda: images("a.jpg", "b.jpg"), [], ["found 2 images", "but no boxes"]),
    "the folder of the images": (
        lambda: voc("annots/a.xml", "images/a.jpg"), ["set/images"],
        ["set/images: no images with boxes recognised; found 1 image", "the folder above"]),
    "class folders": (
        lambda: images("cat/a.jpg", "dog/b.jpg"), [],
        ["1 image in cat/", "one folder of images per class is for --classification"]),
    "XML without images": (
        lambda: text("annots/a.xml", XML.format("cat")), [],
        ["a.xml: its image is missing, skipped", "--images"]),
    "XML of CVAT": (
        lambda: (text("annotations.xml", '<annotations><image name="a.jpg"/></annotations>'),
                 images("images/a.jpg")), [],
        ["annotations.xml: CVAT's own format, skipped; export as Pascal VOC, COCO or YOLO"]),
    "images of another format": (
        lambda: (text("annots/a.xml", XML.format("cat")), text("images/a.tif", "II")), [],
        ["a.xml: its image is missing", "found 1 TIFF file\n", "convert the images to JPEG"]),
    "texts without names": (
        lambda: yolo("labels/a.txt", "images/a.jpg"), [],
        ["no names of classes", "init: --names"]),
    "texts in annotations": (
        lambda: yolo("annotations/a.txt", "images/a.jpg"), [],
        ["1 TXT file in annotations/", "YOLO texts lie beside their images, or in labels/"]),
    "texts in px": (
        lambda: yolo("labels/a.txt", "images/a.jpg", "0 50 50 100 100\n"), ["--names", "cat"],
        ["1 of 1 boxes are in px, such as ", "a.txt:1: '0 50 50 100 100'",
         "divide by its width and height"]),
    "JSON of LabelMe": (
        lambda: (images("a.jpg"), text("a.json", '{"shapes": []}')), [],
        ["1 JSON file", "the JSON is not COCO's (of LabelMe or VIA?)"]),
    "a JSON that is not COCO's": (
        lambda: text("a.json", "[]"), ["set/a.json"], ["a.json: not a COCO annotation file"]),
    "two COCO files": (
        lambda: (coco("a.json", "a.jpg"), coco("b.json", "a.jpg")), [],
        ["several COCO files; name one of set/a.json, set/b.json"]),
    "COCO without images": (
        lambda: coco("a.json", "a.jpg"), [], ["its images are in none of", "set their folder"]),
    "a CSV of labels": (
        lambda: (images("a.jpg"), rows("a.csv", "path,label", "a.jpg,cat")), [],
        ["1 CSV file", "the table needs columns such as filename,xmin"]),
    "a CSV with boxes in one column": (
        lambda: rows("a.csv", "image_id,bbox", 'a,"[1, 2, 3, 4]"'), ["set/a.csv"],
        ["a.csv: no images with boxes recognised", "filename,xmin,ymin,xmax,ymax,class"]),
    "a CSV without its images": (
        lambda: rows("a.csv", CSV.strip(), "a.jpg,64,48,cat,1,1,33,25"), [],
        ["contains nothing to train on", "a.csv:2: its image is missing"]),
    "images that are none": (
        lambda: (text("annots/a.xml", XML.format("cat")), text("images/a.jpg", "version 1")), [],
        ["none of 1 images is one: ", "a.jpg: not a readable image (allowed: JPEG, PNG"]),
    "TFRecord": (lambda: text("a.tfrecord", "x"), [], ["TFRecord and Parquet are not read"]),
    "a video": (lambda: text("a.mp4", "x"), [], ["found 1 video", "annotate frames"]),
    "a path that does not exist": (
        lambda: None, ["sett"], ["file or folder 'sett' not found (working folder: "]),
    "classes numbered from one": (
        lambda: yolo("labels/a.txt", "images/a.jpg", "1 .5 .5 .5 .5\n2 .5 .5 .5 .5\n"),
        ["--names", "cat,dog"],
        ["numbered from 1: no box has class 0, and 1 have 2, such as ", "a.txt:2; 'cat' is class 0",
         "put another name before it (init: --names)"]),
    "a class without a name": (
        lambda: yolo("labels/a.txt", "images/a.jpg", "7 .5 .5 .5 .5\n"), ["--names", "cat"],
        ["a.txt:1: class 7, allowed: 0 … 0, skipped"]),
    "--images of a format that knows them": (
        lambda: yolo("labels/a.txt", "images/a.jpg"), ["--images", "set/images"],
        ["this format says itself what its images are"]),
    "--images that does not exist": (
        lambda: voc("annots/a.xml", "images/a.jpg"), ["--images", "gone"],
        ["folder of images 'gone' not found"]),
    "a pattern that is none": (
        lambda: splits(lambda s: voc(f"{s}.xml", f"{s}.jpg"), "a", "b"), ["--group-by", "(["],
        ["--group-by '([': not a regular expression"]),
    "a pattern that matches nothing": (
        lambda: splits(lambda s: voc(f"{s}.xml", f"{s}.jpg"), "a", "b"), ["--group-by", "x\\d"],
        ["--group-by 'x\\\\d': found in no path such as 'a.jpg'"]),
    "one group": (
        lambda: splits(lambda s: voc(f"{s}.xml", f"{s}.jpg"), "a", "b"), ["--group-by", "jpg"],
        ["--group-by 'jpg': each group has most of the images, or all of a class"]),
    "a column that is none": (
        lambda: (rows("a.csv", CSV.strip(), "a.jpg,64,48,cat,1,1,33,25"), images("a.jpg")),
        ["--group-by", "video"], ["a.csv:1: no column 'video'"]),
    "a fraction in percent": (lambda: None, ["--val-fraction", "20"],
                              ["--val-fraction is 20.0; allowed: 0 … 1, such as 0.1"]),
    "no box at all": (
        lambda: yolo("labels/a.txt", "images/a.jpg", ""), ["--names", "cat"],
        ["contains nothing to train on", "a.txt: empty"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name, capsys):
    write, options, parts = MISTAKES[name]
    write()
    path = [] if options and not options[0].startswith("--") else ["set"]
    assert main(["init", *path, *options]) == 2
    error = capsys.readouterr().err
    for part in parts:
        assert part in error, error
    assert error.startswith("yolo-lightning: error: ")
    assert error.count("\n") <= 4
    assert os.listdir() == ["set"]


def test_messages_say_where_a_folder_above_is(tmp_path, monkeypatch, capsys):
    yolo("labels/a.txt", "images/a.jpg", YOLO + YOLO)
    (tmp_path / "work").mkdir()
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far/away")
    monkeypatch.chdir(tmp_path / "work")
    assert main(["init", "../set", "--names", "cat"]) == 0
    printed = capsys.readouterr().out
    assert f"\n  {tmp_path}/set/labels/a.txt:2 is listed twice, one skipped\n" in printed
    assert "root: ../set\n" in Path("set.yaml").read_text()
    # after a link, the folder above is that of its target
    assert main(["init", "../link/../set", "--names", "cat", "--output", "b.yaml"]) == 2
    assert "'../link/../set' not found" in capsys.readouterr().err
    os.rename(tmp_path / "set", tmp_path / "far/set")
    assert main(["init", "../link/../set", "--names", "cat", "--output", "b.yaml"]) == 0
    assert f"{tmp_path}/work/../link/../set/labels" in capsys.readouterr().out
