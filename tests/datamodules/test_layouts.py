"""Layouts of datasets, autodetection, and lists of sources."""

import os
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from tests.helpers.miniatures import (
    BOXES,
    FRENCH,
    FRUIT,
    GOOD_COCO,
    GOOD_VOC,
    GOOD_YOLO,
    LABELS,
    WNIDS,
    bind_source,
    build_folders,
    build_yolo,
    paths_of,
    save_grey,
    set_up_data,
    write,
    write_coco,
    write_devkit,
    write_ilsvrc,
    write_xml,
)
from yolo_lightning.datamodules import (
    COCOJson,
    ILSVRCDetection,
    ImageFolder,
    ImageNet,
    LabelCSV,
    VOCFolder,
    YOLOText,
)
from yolo_lightning.datamodules.autodetect import detection_source, label_source
from yolo_lightning.errors import InputError
from yolo_lightning.tree.wordtree import WordTree

# --- Pascal VOC and ILSVRC


def test_voc_years_are_concatenated(tmp_path, write_voc):
    write_devkit(tmp_path, write_voc, 2007, {"train": "b", "trainval": "ab"})
    write_devkit(tmp_path, write_voc, 2012, {"train": "a", "trainval": "ba"})
    write_devkit(tmp_path, write_voc, 2010, {"trainval": "a"})
    source = bind_source(VOCFolder(str(tmp_path), "trainval", years=[2012, 2007]))
    assert paths_of(source, tmp_path) == [
        "VOC2012/JPEGImages/2012_b.jpg",
        "VOC2012/JPEGImages/2012_a.jpg",
        "VOC2007/JPEGImages/2007_a.jpg",
        "VOC2007/JPEGImages/2007_b.jpg",
    ]
    difficult = [source.read(k).difficult.tolist() for k in range(4)]
    assert difficult == [[True], [False], [False], [True]]
    assert not source.read(0).crowd.any()
    with pytest.raises(InputError, match="VOC2008' not found"):
        VOCFolder(str(tmp_path), "trainval", years=[2008]).bind(FRUIT)
    with pytest.raises(InputError, match="no split 'test'; found: train, trainval, Annotations"):
        VOCFolder(str(tmp_path), "test", years=[2007]).bind(FRUIT)


def test_voc_devkit_without_years_raises_with_a_hint(tmp_path, write_voc):
    write_devkit(tmp_path, write_voc, 2007, {"train": "a"})
    write_devkit(tmp_path, write_voc, 2012, {"train": "a"})
    with pytest.raises(InputError, match=r"contains VOC2007, VOC2012: .*years: \[2007, …\]"):
        VOCFolder(str(tmp_path), "train").bind(FRUIT)


def test_missing_listed_voc_file_is_reported(tmp_path, write_voc):
    write_devkit(tmp_path, write_voc, 2007, {"train": "ax"})
    source = bind_source(VOCFolder(str(tmp_path / "VOC2007"), "train"))
    assert len(source) == 1
    xml = tmp_path / "VOC2007/Annotations/2007_x.xml"
    assert source.faults == [f"{xml}: listed but missing, skipped"]


def test_ilsvrc_boxes_are_zero_based(tmp_path):
    source = bind_source(ILSVRCDetection(str(write_ilsvrc(tmp_path))), WNIDS)
    below = "Data/DET/train/ILSVRC2013_train"
    assert paths_of(source, tmp_path) == [f"{below}/n01/n01_7.JPEG", f"{below}/n02/n02_3.JPEG"]
    boxes = [source.read(k).boxes_xyxy_px.tolist() for k in range(2)]
    assert boxes == [[[0, 5, 20, 30]], [[1, 1, 63, 47]]]
    assert [source.read(k).labels.tolist() for k in range(2)] == [[0], [1]]
    assert source.faults == []


def test_ilsvrc_splits_are_folders_or_image_sets(tmp_path):
    write_ilsvrc(tmp_path)
    whole = bind_source(ILSVRCDetection(str(tmp_path), "val"), WNIDS)
    assert paths_of(whole, tmp_path) == ["Data/DET/val/v_1.JPEG", "Data/DET/val/v_2.JPEG"]
    listed = bind_source(ILSVRCDetection(str(tmp_path), "val_part"), WNIDS)
    assert paths_of(listed, tmp_path) == ["Data/DET/val/v_2.JPEG"]
    gone = tmp_path / "Annotations/DET/val/v_9.xml"
    assert listed.faults == [f"{gone}: listed but missing, skipped"]
    with pytest.raises(InputError, match=r"no split 'tset' in Annotations/DET or .*: train, val"):
        ILSVRCDetection(str(tmp_path), "tset").bind(WNIDS)


def write_archive(root: Path) -> str:
    """Write an image of the classification challenge, with its box."""
    write_xml(root / "Annotations/CLS-LOC/train/n01/n01_7.xml", "n01", (1, 2, 3, 4))
    save_grey(root / "Data/CLS-LOC/train/n01/n01_7.JPEG")
    return str(root)


def test_ilsvrc_boxes_of_the_classification_images(tmp_path):
    source = bind_source(ILSVRCDetection(write_archive(tmp_path), challenge="CLS-LOC"), WNIDS)
    assert source.read(0).boxes_xyxy_px.tolist() == [[1, 2, 3, 4]]


# --- YOLO text

NAMES = "names:\n  0: banana\n  1: apple\n"

# files that are written, the root, the split, and which images come
YOLO_LAYOUTS: dict[str, tuple[dict[str, str], str, str, list[str]]] = {
    "folders": (
        {"data.yaml": f"train: images/train\nval: images/val\n{NAMES}",
         "images/train/b.jpg": "labels/train/b.txt", "images/train/a.png": "labels/train/a.txt",
         "images/val/c.jpg": "labels/val/c.txt"},
        "data.yaml", "train", ["images/train/a.png", "images/train/b.jpg"]),
    "another split": (
        {"data.yaml": f"train: images/train\nval: images/val\n{NAMES}",
         "images/train/b.jpg": "labels/train/b.txt", "images/val/c.jpg": "labels/val/c.txt"},
        "data.yaml", "val", ["images/val/c.jpg"]),
    "folders below folders": (
        {"data.yaml": f"train: images\n{NAMES}", "images/b/a.jpg": "labels/b/a.txt",
         "images/a/b.jpg": "labels/a/b.txt"},
        "data.yaml", "train", ["images/a/b.jpg", "images/b/a.jpg"]),
    "a path above them": (
        {"set.yml": "path: the set\ntrain: images\nnames: [banana, apple]\n",
         "the set/images/a.jpg": "the set/labels/a.txt"},
        "set.yml", "train", ["the set/images/a.jpg"]),
    "several folders": (
        {"data.yaml": f"train: [images/two, images/one]\n{NAMES}",
         "images/one/a.jpg": "labels/one/a.txt", "images/two/b.jpg": "labels/two/b.txt"},
        "data.yaml", "train", ["images/two/b.jpg", "images/one/a.jpg"]),
    "a list": (
        {"data.yaml": f"train: lists/train.txt\n{NAMES}",
         "lists/train.txt": "images/b.jpg\n\n ./../images/a.jpg \n",
         "images/a.jpg": "labels/a.txt", "images/b.jpg": "labels/b.txt"},
        "data.yaml", "train", ["images/b.jpg", "images/a.jpg"]),
    "a list below a path": (
        {"conf/data.yaml": f"path: ../set\ntrain: train.txt\n{NAMES}",
         "set/train.txt": "./images/a.jpg\n", "set/images/a.jpg": "set/labels/a.txt"},
        "conf/data.yaml", "train", ["set/images/a.jpg"]),
    "a list alone": (
        {"train.txt": "images/a.jpg\n", "classes.txt": "banana\napple\n",
         "images/a.jpg": "labels/a.txt"},
        "train.txt", "train", ["images/a.jpg"]),
    "Roboflow": (
        {"data.yaml": "train: ../train/images\nval: ../valid/images\nnc: 2\n"
         "names: ['banana', 'apple']\n",
         "train/images/a.jpg": "train/labels/a.txt", "valid/images/b.jpg": "valid/labels/b.txt"},
        "data.yaml", "train", ["train/images/a.jpg"]),
    "Darknet": (
        {"obj.data": "classes = 2\ntrain = train.txt\nvalid = test.txt\nnames = obj.names\n"
         "backup = backup/\n", "obj.names": "banana\napple\n", "test.txt": "obj/b.jpg\n",
         "train.txt": "obj/a.jpg\n", "obj/a.jpg": "obj/a.txt", "obj/b.jpg": "obj/b.txt"},
        "obj.data", "val", ["obj/b.jpg"]),
    "Darknet, from the folder that it runs in": (
        {"data/obj.data": "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\n",
         "data/obj.names": "banana\napple\n", "data/train.txt": "data/obj/a.jpg\n",
         "data/obj/a.jpg": "data/obj/a.txt"},
        "data/obj.data", "train", ["data/obj/a.jpg"]),
    "Darknet's VOC": (
        {"voc.data": "train = train.txt\nnames = voc.names\n", "voc.names": "banana\napple\n",
         "train.txt": "VOC2007/JPEGImages/a.jpg\n",
         "VOC2007/JPEGImages/a.jpg": "VOC2007/labels/a.txt"},
        "voc.data", "train", ["VOC2007/JPEGImages/a.jpg"]),
    "a folder": (
        {"classes.txt": "banana\n\napple\n", "images/a.jpg": "labels/a.txt"},
        ".", "train", ["images/a.jpg"]),
    "a folder with splits": (
        {"x.names": "banana\napple\n", "obj.names/x.txt": "",
         "images/train/a.jpg": "labels/train/a.txt", "images/val/b.jpg": "labels/val/b.txt"},
        ".", "val", ["images/val/b.jpg"]),
    "a folder of splits": (
        {"data.yaml": NAMES, "train/images/a.jpg": "train/labels/a.txt",
         "val/images/b.jpg": "val/labels/b.txt"},
        ".", "val", ["val/images/b.jpg"]),
    "all in one folder": (
        {"obj.names": "banana\napple\n", "a.jpg": "a.txt", "b.jpg": "b.txt"},
        ".", "train", ["a.jpg", "b.jpg"]),
}  # fmt: skip


def write_layout(root: Path, files: dict[str, str]) -> None:
    """Write files of text, and images with the files of their labels."""
    for name, content in files.items():
        if Path(name).suffix in (".jpg", ".png"):
            save_grey(root / name)
            write(root / content, GOOD_YOLO)
        else:
            write(root / name, content)


@pytest.mark.parametrize("layout", YOLO_LAYOUTS)
def test_yolo_layouts(tmp_path, monkeypatch, layout):
    files, root, split, expected = YOLO_LAYOUTS[layout]
    write_layout(tmp_path, files)
    monkeypatch.chdir(tmp_path)
    outside = layout == "a list below a path"  # a text, beside the dataset's folder
    source = bind_source(YOLOText(root, split, allow_outside=outside))
    assert [os.path.normpath(path) for path in paths_of(source, tmp_path)] == expected
    assert source.faults == []
    for k in range(len(source)):
        assert source.read(k).boxes_xyxy_px.tolist() == [[16, 12, 48, 36]]
        assert source.read(k).labels.tolist() == [0]


@pytest.mark.parametrize("root", ["../set/train.txt", "../set/data.yaml"])
def test_root_above_the_working_folder_is_inside(tmp_path, monkeypatch, root):
    lists = {"data.yaml": f"train: train.txt\n{NAMES}", "train.txt": "images/a.jpg\n"}
    write_layout(tmp_path / "set", {**lists, "images/a.jpg": "labels/a.txt"})
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    source = bind_source(YOLOText(root))
    assert source.image_path(0).resolve() == tmp_path / "set/images/a.jpg"


@pytest.mark.parametrize("absolute", [False, True])
def test_listed_images_outside_the_folder_need_allow_outside(tmp_path, absolute):
    write_layout(tmp_path / "outer", {"images/a.jpg": "labels/a.txt"})
    outer = tmp_path / "outer/images/a.jpg"
    line = f"{outer}\n" if absolute else "../outer/images/a.jpg\n"
    listed = write(tmp_path / "inner/train.txt", line)
    names = ["banana", "apple"]
    with pytest.raises(InputError, match=r"train\.txt:1: path .* leaves .*allow_outside: true"):
        YOLOText(str(listed), names=names).bind(FRUIT)
    source = bind_source(YOLOText(str(listed), names=names, allow_outside=True))
    assert source.image_path(0) == outer
    assert source.read(0).labels.tolist() == [0]


def test_missing_listed_images_are_reported(tmp_path):
    write_layout(tmp_path, {"images/a.jpg": "labels/a.txt"})
    listed = write(tmp_path / "train.txt", f"images/gone.jpg\n{tmp_path}/images/a.jpg\n")
    source = bind_source(YOLOText(str(listed), names=["banana", "apple"]))
    assert paths_of(source, tmp_path) == ["images/a.jpg"]
    assert source.faults == [f"{listed}:1: images/gone.jpg is missing, skipped"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train: images\n", "no names of classes; set names: "),
        ("train: images\nnames: 2\n", "file of names '2' not found"),
        ("train: images\nnames: gone.names\n", r"file of names 'gone\.names' not found"),
        (f"train: nowhere\n{NAMES}", "'nowhere' not found, neither below"),
        (f"valid: images\n{NAMES}", "no split 'train'; found: valid"),
        ("- train\n", r"data\.yaml: expected lines such as train: images/train"),
        ("train: [images\n", r"data\.yaml:2: not YAML"),
    ],
)
def test_invalid_yolo_description_raises(tmp_path, monkeypatch, content, message):
    save_grey(tmp_path / "images/a.jpg")
    write(tmp_path / "data.yaml", content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        YOLOText("data.yaml").bind(FRUIT)


def test_yolo_names_with_string_keys(tmp_path):
    description = "train: images\nnames:\n  '0': banana\n  '1': apple\n"
    write_layout(tmp_path, {"images/a.jpg": "labels/a.txt", "data.yaml": description})
    source = bind_source(YOLOText(str(tmp_path / "data.yaml")))
    assert source.read(0).labels.tolist() == [0]


def test_yolo_texts_with_byte_order_marks_and_carriage_returns(tmp_path):
    texts = {"classes.txt": "banana\napple\n", "train.txt": "images/a.jpg\n"}
    write_layout(tmp_path, {**texts, "images/a.jpg": "labels/a.txt"})
    for name in (*texts, "labels/a.txt"):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_bytes(("\ufeff" + text.replace("\n", "\r\n")).encode())
    source = bind_source(YOLOText(str(tmp_path / "train.txt")))
    assert source.read(0).labels.tolist() == [0]
    assert source.faults == []


@pytest.mark.parametrize("name", ["classes.txt", "train.txt"])
def test_yolo_lists_that_are_not_text_raise(tmp_path, name):
    lists = {"classes.txt": "banana\napple\n", "train.txt": "images/a.jpg\n"}
    write_layout(tmp_path, {**lists, "images/a.jpg": "labels/a.txt"})
    (tmp_path / name).write_bytes(b"caf\xe9\n")
    with pytest.raises(InputError, match=f"{name}: not readable as UTF-8 text"):
        YOLOText(str(tmp_path / "train.txt")).bind(FRUIT)


def test_yolo_folders_may_be_links_and_hidden_files_are_skipped(tmp_path):
    write_layout(tmp_path / "far", {"a.jpg": "a.txt"})
    write(tmp_path / "set/data.yaml", f"train: images\n{NAMES}")
    write(tmp_path / "set/images/._b.jpg", "no image")
    (tmp_path / "set/images/linked").symlink_to(tmp_path / "far")
    write(tmp_path / "set/labels/linked/a.txt", "1 0.5 0.5 0.5 0.5\n")
    source = bind_source(YOLOText(str(tmp_path / "set/data.yaml")))
    assert paths_of(source, tmp_path) == ["set/images/linked/a.jpg"]
    assert source.read(0).labels.tolist() == [0]


def test_missing_split_of_a_yolo_folder_raises(tmp_path):
    for split in ("train", "val"):
        write_layout(tmp_path, {f"images/{split}/a.jpg": f"labels/{split}/a.txt"})
    with pytest.raises(InputError, match="no split 'tset'"):
        YOLOText(str(tmp_path), "tset", names=["banana", "apple"]).bind(FRUIT)


def test_missing_yolo_root_raises(tmp_path):
    with pytest.raises(InputError, match="YOLO dataset '.*gone' not found"):
        YOLOText(str(tmp_path / "gone")).bind(FRUIT)


# --- images with labels


def test_class_folders_may_be_links_and_loops_are_skipped(tmp_path):
    root = tmp_path / "set"
    save_grey(tmp_path / "elsewhere/deep/x.png")
    save_grey(root / "banana/y.png")
    (root / "apple").symlink_to(tmp_path / "elsewhere")
    (root / "banana/self").symlink_to(root / "banana")
    (root / "banana/again").mkdir()
    (root / "banana/again/up").symlink_to(root / "banana")
    source = bind_source(ImageFolder(str(root)))
    assert paths_of(source, root) == ["apple/deep/x.png", "banana/y.png"]
    assert [source.read(k)[1] for k in range(2)] == [0, 1]


def test_link_to_the_root_adds_no_duplicates(tmp_path):
    save_grey(tmp_path / "apple/x.png")
    save_grey(tmp_path / "banana/y.png")
    (tmp_path / "apple/root").symlink_to(tmp_path)
    source = bind_source(ImageFolder(str(tmp_path)))
    assert paths_of(source, tmp_path) == ["apple/x.png", "banana/y.png"]


@pytest.mark.parametrize("name", ["with space", "Äpfel, grün", "リンゴ", "a'b\"c"])
def test_folder_and_file_names_with_any_characters(tmp_path, name):
    save_grey(tmp_path / name / f"{name}.jpg")
    tree = WordTree.from_names([name, "other"])
    source = bind_source(ImageFolder(str(tmp_path)), tree)
    assert source.image_path(0) == tmp_path / name / f"{name}.jpg"
    assert source.read(0)[1] == 0


def test_file_name_that_is_not_utf8(tmp_path):
    (tmp_path / "apple").mkdir()
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/apple/caf\xe9.png")
    os.rename(save_grey(tmp_path / "x.png", 77), odd)
    bind_source(ImageFolder(str(tmp_path)))
    source = bind_source(ImageFolder(str(tmp_path)))  # once more, from the index
    assert source.image_name(0) == odd
    assert source.read(0)[0][0, 0].tolist() == [77] * 3


def test_hidden_files_are_skipped_and_empty_class_folders_reported(tmp_path):
    save_grey(tmp_path / "apple/x.png")
    save_grey(tmp_path / "apple/.cache/z.png")
    save_grey(tmp_path / ".thumbs/z.png")
    save_grey(tmp_path / "apple/._x.png")
    (tmp_path / "kiwi").mkdir()
    source = bind_source(ImageFolder(str(tmp_path)))
    assert paths_of(source, tmp_path) == ["apple/x.png"]
    assert source.faults == [f"{tmp_path / 'kiwi'}: no images"]


@pytest.mark.parametrize(
    "text",
    [
        "a.png,apple\nb 1.png,banana\n",
        "path,label\na.png,apple\nb 1.png,banana\n",
        "\ufefffile_name,class,split\na.png,apple,train\n\n b 1.png , banana ,val\n",
        "image\tlabel\na.png\tapple\nb 1.png\tbanana\n",
        "a.png;apple\nb 1.png;banana\n",
        'path,label\n"a.png","apple"\r\n"b 1.png","banana"\r\n',
    ],
)
def test_table_headers_delimiters_and_quotes(tmp_path, text):
    save_grey(tmp_path / "a.png")
    save_grey(tmp_path / "b 1.png")
    source = bind_source(LabelCSV(str(write(tmp_path / "table.csv", text))))
    assert paths_of(source, tmp_path) == ["a.png", "b 1.png"]
    assert [source.read(k)[1] for k in range(2)] == [0, 1]
    assert source.faults == []


def test_missing_images_of_a_table_are_reported(tmp_path):
    save_grey(tmp_path / "pictures/a.png")
    file = write(tmp_path / "table.csv", "path,label\ngone.png,apple\na.png,banana\n")
    source = bind_source(LabelCSV(str(file), root=str(tmp_path / "pictures")))
    assert paths_of(source, tmp_path) == ["pictures/a.png"]
    assert source.node_counts() == {1: {"banana": 1}}
    assert source.faults == [f"{file}:2: gone.png is missing, skipped"]
    with pytest.raises(InputError, match=r"contains no images: .*:2: gone\.png is missing"):
        LabelCSV(str(file)).bind(FRUIT)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png,apple\na.png\n", r"table\.csv:2: expected path,label$"),
        ("a.png;apple\n;apple\n", r"table\.csv:2: expected path;label$"),
        ("a.png,apple\n../b.png,apple\n", r"table\.csv:2: path '\.\./b\.png' leaves"),
        ("/etc/passwd,apple\n", r"table\.csv:1: path '/etc/passwd' leaves"),
    ],
)
def test_invalid_table_raises(tmp_path, text, message):
    save_grey(tmp_path / "a.png")
    with pytest.raises(InputError, match=message):
        LabelCSV(str(write(tmp_path / "table.csv", text))).bind(FRUIT)


def test_table_paths_outside_with_allow_outside(tmp_path):
    save_grey(tmp_path / "b.png")
    file = write(tmp_path / "tables/table.csv", f"../b.png,apple\n{tmp_path}/b.png,banana\n")
    source = bind_source(LabelCSV(str(file), allow_outside=True))
    assert [source.image_path(k) for k in range(2)] == [tmp_path / "b.png"] * 2


def test_imagenet_folders_are_wnids(tmp_path):
    save_grey(tmp_path / "train/n02/n02_1.JPEG")
    save_grey(tmp_path / "train/n01/n01_1.JPEG")
    (tmp_path / "train/n03").mkdir()
    source = bind_source(ImageNet(str(tmp_path)), WNIDS)
    assert paths_of(source, tmp_path) == ["train/n01/n01_1.JPEG", "train/n02/n02_1.JPEG"]
    assert [source.read(k)[1] for k in range(2)] == [0, 1]
    assert source.faults == [f"{tmp_path / 'train/n03'}: no images"]
    with pytest.raises(InputError, match="no split 'val'; found: .*train"):
        ImageNet(str(tmp_path), "val").bind(WNIDS)


KAGGLE = """ImageId,PredictionString
ILSVRC2012_val_00000003,n01 1 2 3 4 n01 5 6 7 8
ILSVRC2012_val_00000001,n02 1 2 3 4\x20
ILSVRC2012_val_00000002,n01 1 2 3 4
"""


def write_meta(file: Path) -> None:
    """Write the list of synsets as the development kit has it: a struct array, one a row."""
    rows = [(1, "n02", "two"), (2, "n01", "one"), (3, "n09", "inner")]
    columns = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")]
    savemat(str(file), {"synsets": np.array(rows, columns)[:, None]})


def write_validation(root: Path, place: str = "val") -> Path:
    for k in (1, 2, 3):
        save_grey(root / place / f"ILSVRC2012_val_0000000{k}.JPEG")
    return root


@pytest.mark.parametrize(
    "kind",
    ["Kaggle", "synsets", "synsets below", "kit", "named file", "named folder", "archive"],
)
def test_imagenet_validation_labels_are_found(tmp_path, kind):
    place = "Data/CLS-LOC/val" if kind == "archive" else "val"
    root = write_validation(tmp_path / "set", place)
    labels = None
    if kind in ("Kaggle", "archive"):
        write(root / "LOC_val_solution.csv", KAGGLE)
    elif kind.startswith("synsets"):
        below = "a/b/" if kind == "synsets below" else ""
        write(root / f"{below}imagenet_2012_validation_synset_labels.txt", "n02\nn01\nn01\n")
    elif kind == "named file":
        labels = str(write(tmp_path / "mine.txt", "n02\nn01\nn01\n"))
    else:
        folder = (root if kind == "kit" else tmp_path) / "ILSVRC2012_devkit_t12/data"
        write(folder / "ILSVRC2012_validation_ground_truth.txt", "1\n2\n2\n")
        write_meta(folder / "meta.mat")
        labels = str(folder.parent) if kind == "named folder" else None
    outside = kind == "named file"
    source = bind_source(ImageNet(str(root), "val", labels, allow_outside=outside), WNIDS)
    assert [source.image_path(k).name[-6:] for k in range(3)] == ["1.JPEG", "2.JPEG", "3.JPEG"]
    assert [source.read(k)[1] for k in range(3)] == [1, 0, 0]
    assert source.node_counts() == {0: {"n01": 2}, 1: {"n02": 1}}
    assert source.faults == []


def test_subset_of_validation_images_has_the_right_labels(tmp_path):
    root = write_validation(tmp_path)
    (root / "val/ILSVRC2012_val_00000001.JPEG").unlink()
    write(root / "imagenet_2012_validation_synset_labels.txt", "n02\nn01\nn02\n")
    source = bind_source(ImageNet(str(root), "val"), WNIDS)
    assert [source.read(k)[1] for k in range(2)] == [0, 1]


def test_validation_images_without_a_label_are_reported(tmp_path):
    root = write_validation(tmp_path)
    file = write(root / "LOC_val_solution.csv", "\n".join(KAGGLE.splitlines()[:3]))
    source = bind_source(ImageNet(str(root), "val"), WNIDS)
    assert [source.read(k)[1] for k in range(2)] == [1, 0]
    assert source.faults == [f"{file}: no label for ILSVRC2012_val_00000002.JPEG, skipped"]


def test_missing_or_mismatching_validation_labels_raise(tmp_path):
    root = write_validation(tmp_path)
    with pytest.raises(InputError, match=r"LOC_val_solution\.csv.*labels: PATH"):
        ImageNet(str(root), "val").bind(WNIDS)
    file = write(root / "val_synsets.txt", "n01\nn02\n")
    with pytest.raises(InputError, match=f"{file}: 2 labels for 3 images in the split 'val'"):
        ImageNet(str(root), "val").bind(WNIDS)
    file.unlink()
    write(root / "data/ILSVRC2012_validation_ground_truth.txt", "1\n2\n2\n")
    with pytest.raises(InputError, match=r"meta\.mat: not the development kit's list of synsets"):
        ImageNet(str(root), "val").bind(WNIDS)


# --- autodetection


@pytest.mark.parametrize(
    ("kind", "place", "expected"),
    [
        ("VOC", ".", VOCFolder),
        ("VOC devkit", ".", VOCFolder),
        ("ILSVRC", ".", ILSVRCDetection),
        ("COCO", "ann.json", COCOJson),
        ("COCO", ".", COCOJson),
        ("YOLO", "data.yaml", YOLOText),
        ("YOLO", ".", YOLOText),
        ("YOLO folder", ".", YOLOText),
    ],
)
def test_autodetect_layouts_with_boxes(tmp_path, kind, place, expected):
    BOXES[kind](tmp_path)
    source = detection_source(str(tmp_path / place))
    assert type(source) is expected
    source.mapping = FRENCH
    source.bind(FRUIT)
    assert len(source) == 2
    assert source.node_counts() == {0: {"pomme": 1}, 1: {"banane": 1}}


def test_autodetect_imagenet_boxes(tmp_path):
    source = detection_source(write_archive(tmp_path))
    assert type(source) is ILSVRCDetection
    assert len(bind_source(source, WNIDS)) == 1


def test_autodetect_coco_archive(tmp_path):
    for split in ("train", "val"):
        save_grey(tmp_path / f"{split}2017/a.jpg")
        for kind in ("instances", "person_keypoints"):
            write_coco(tmp_path / f"annotations/{kind}_{split}2017.json", [GOOD_COCO])
    source = detection_source(str(tmp_path))
    assert source.name == f"COCO {tmp_path / 'annotations/instances_train2017.json'}"


@pytest.mark.parametrize("place", ["train.txt", "obj.data", "."])
def test_autodetect_yolo_lists_and_folders(tmp_path, place):
    lists = {"train.txt": "images/a.jpg\n", "obj.names": "banana\napple\n"}
    description = {"obj.data": "train = train.txt\nnames = obj.names\n"}
    write_layout(tmp_path, {**lists, **description, "images/a.jpg": "labels/a.txt"})
    source = detection_source(str(tmp_path / place))
    assert type(source) is YOLOText
    assert len(bind_source(source)) == 1


def test_autodetect_voc_years_image_sets_and_splits(tmp_path, write_voc):
    kit = tmp_path / "VOCdevkit"
    write_devkit(kit, write_voc, 2012, {"train": "a", "trainval": "ab"})
    write_devkit(kit, write_voc, 2007, {"train": "a", "trainval": "ab", "test": "b"})
    years = bind_source(detection_source(str(kit)))
    assert [path[:7] for path in paths_of(years, kit)] == ["VOC2007"] * 2 + ["VOC2012"] * 2
    year = bind_source(detection_source(str(kit / "VOC2007"), "test"))
    assert paths_of(year, kit) == ["VOC2007/JPEGImages/2007_b.jpg"]
    assert len(bind_source(detection_source(str(kit / "VOC2007")))) == 2
    splits = tmp_path / "splits"
    for split in ("train", "test"):
        write_voc(splits / split, split, [GOOD_VOC])
    assert paths_of(bind_source(detection_source(str(splits))), splits) == ["train/train.jpg"]
    assert paths_of(bind_source(detection_source(str(splits), "test")), splits) == ["test/test.jpg"]


def test_autodetect_chooses_the_coco_file_of_the_split(tmp_path):
    for split in ("train", "val"):
        save_grey(tmp_path / f"{split}2017/a.jpg")
        write_coco(tmp_path / f"annotations/instances_{split}2017.json", [GOOD_COCO])
    write(tmp_path / "annotations/captions_train2017.json", '{"images": [], "annotations": []}')
    train = bind_source(detection_source(str(tmp_path)))
    assert paths_of(train, tmp_path) == ["train2017/a.jpg"]
    val = bind_source(detection_source(str(tmp_path), "val"))
    assert paths_of(val, tmp_path) == ["val2017/a.jpg"]
    with pytest.raises(InputError, match=r"several COCO files; name one of .*instances_train2017"):
        detection_source(str(tmp_path), "test")


@pytest.mark.parametrize(
    ("kind", "place", "expected"),
    [("class folders", ".", ImageFolder), ("table", "table.csv", LabelCSV)],
)
def test_autodetect_layouts_with_labels(tmp_path, kind, place, expected):
    LABELS[kind](tmp_path)
    source = label_source(str(tmp_path / place))
    assert type(source) is expected
    assert source.name_counts() == {"pomme": 1, "banane": 1}


@pytest.mark.parametrize("folder", [".", "Data/CLS-LOC"])
def test_autodetect_imagenet(tmp_path, folder):
    save_grey(tmp_path / folder / "train/n01440764/n01440764_18.JPEG")
    save_grey(tmp_path / folder / "val/ILSVRC2012_val_00000001.JPEG")
    source = label_source(str(tmp_path))
    assert type(source) is ImageNet
    assert source.name_counts() == {"n01440764": 1}


@pytest.mark.parametrize("detect", [detection_source, label_source])
def test_autodetect_errors_list_the_known_layouts(tmp_path, detect):
    write(tmp_path / "notes.md", "nothing")
    known = {
        detection_source: r"[\s\S]*wanted: COCO JSON; .*VOC.*; YOLO text .*; a CSV of boxes; ILS",
        label_source: "; known: a folder with one folder of images per class; ImageNet's; a CSV",
    }[detect]
    for place in (tmp_path, tmp_path / "notes.md"):
        with pytest.raises(InputError, match=f"{place}: no images with .* recognised{known}"):
            detect(str(place))
    with pytest.raises(InputError, match="gone' not found"):
        detect(str(tmp_path / "gone"))


# --- several sources


def test_several_sources_are_concatenated(tmp_path, write_voc):
    write_voc(tmp_path / "voc", "a", [GOOD_VOC, ("apple", 2, 2, 9, 9)])
    write_voc(tmp_path / "voc", "b", [GOOD_VOC])
    yolo = build_yolo(tmp_path / "yolo")(mapping=FRENCH)
    write(tmp_path / "yolo/labels/b.txt", "7 0.5 0.5 0.1 0.1\n")
    folders = build_folders(tmp_path / "folders")(mapping=FRENCH)
    save_grey(tmp_path / "one/apple/x.png")
    data = set_up_data(
        detection=[VOCFolder(str(tmp_path / "voc")), yolo],
        classification=[folders, ImageFolder(str(tmp_path / "one"))],
        detection_batch_size=4,
        classification_batch_size=3,
    )
    boxes, labels = data.detection, data.classification
    assert boxes is not None
    assert labels is not None
    assert (len(boxes), len(labels)) == (4, 3)
    assert [boxes.image_name(k) for k in range(4)] == [
        str(tmp_path / name)
        for name in ("voc/a.jpg", "voc/b.jpg", "yolo/images/a.jpg", "yolo/images/b.jpg")
    ]
    assert [labels.image_name(k) for k in range(3)] == [
        str(tmp_path / name)
        for name in ("folders/banane/b.jpg", "folders/pomme/a.jpg", "one/apple/x.png")
    ]
    assert boxes.node_counts() == {0: {"apple": 1, "pomme": 1}, 1: {"banana": 2}}
    assert labels.node_counts() == {0: {"apple": 1, "pomme": 1}, 1: {"banane": 1}}
    assert [boxes.read(k).labels.tolist() for k in range(4)] == [[1, 0], [1], [0], []]
    assert [labels.read(k)[1] for k in range(3)] == [1, 0, 0]
    shapes, sizes = boxes.shapes_wh_px()
    np.testing.assert_allclose(shapes, [[10, 20], [8, 8], [10, 20], [10, 20]], rtol=1e-5)
    assert sizes.tolist() == [[64, 48]] * 4
    assert data.boxed_nodes.tolist() == [0, 1]
    bad = tmp_path / "yolo/labels/b.txt"
    assert data.source_faults == [f"{bad}:1: class 7, allowed: 0 … 1, skipped"]
    batches = list(data.train_dataloader())
    assert sorted(batches[0].sample_ids.tolist()) == [0, 1, 2, 3]
    assert sorted(batches[1].sample_ids.tolist()) == [0, 1, 2]


@pytest.mark.parametrize("kind", ["detection", "classification"])
def test_empty_list_of_sources_raises(kind):
    with pytest.raises(InputError, match="a list of sources is empty"):
        set_up_data(**{kind: []})
