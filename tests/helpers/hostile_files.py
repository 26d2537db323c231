"""Hostile text files of datasets, trees and Darknet networks, and the commands that read them.

`CASES` maps a name to a function that writes files into a folder, and returns the arguments of
`yolo-lightning` and a word that its output must hold. No command may print a traceback, hang, or
show `SECRET`.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.images import write_image

Case = Callable[[Path], tuple[list[str], str]]

SECRET = "aws_secret_access_key"
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    """Add a function to `CASES` under its own name."""
    CASES[function.__name__] = function
    return function


def family(**variants: Any) -> Callable[[Callable[[Path, Any], tuple[list[str], str]]], None]:
    """Add a function to `CASES` once for each variant, which is its second argument."""

    def add(function: Callable[[Path, Any], tuple[list[str], str]]) -> None:
        for name, variant in variants.items():
            CASES[f"{function.__name__}_{name}"] = lambda f, v=variant: function(f, v)  # type: ignore[misc]

    return add


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def secret(folder: Path) -> Path:
    """Write a file with a secret outside the dataset."""
    return write(folder / "home" / "credentials.txt", f"{SECRET} = {SECRET}\n")


def check_data(folder: Path, path: Path) -> list[str]:
    return ["check-data", str(path), "--output", str(folder / "report")]


def init(folder: Path, path: Path) -> list[str]:
    """Return a command that reads a dataset without drawing it."""
    output = str(folder / "recipe.yaml")
    return ["init", str(path), "--output", output]


# YOLO text


def yolo(
    folder: Path, yaml: str | bytes = "train: images\nnames: [a, b]\n", label: Any = None
) -> Path:
    """Write a dataset of one image, and return its data.yaml."""
    write_image(folder / "data" / "images" / "x.jpg")
    write(folder / "data" / "labels" / "x.txt", "0 .5 .5 .5 .5\n" if label is None else label)
    return write(folder / "data" / "data.yaml", yaml)


def _bomb(levels: int = 9, width: int = 9) -> str:
    lines = [f"a0: &a0 [{', '.join(['lol'] * width)}]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * width)}]" for k in range(1, levels)]
    return "\n".join(lines) + "\n"


@family(
    giant_key="{30000000000: a}",
    negative_key="{-5: a}",
    key_of_5000_digits=f"{{{'9' * 5000}: a}}",
    infinite_key="{.inf: a}",
    nested="[[a, b], c]",
    nested_mapping="{0: {b: c}}",
    scalar_mapping="{a: b}",
    with_control_characters=r'["a\e[31mb\rc", d]',
    with_bidi_override='["a\u202eb", d]',
    of_a_megabyte=f"[{'a' * 2**20}]",
)
def yaml_names(folder: Path, names: str) -> tuple[list[str], str]:
    return init(folder, yolo(folder, f"train: images\nnames: {names}\n")), "data.yaml"


@family(
    alias_bomb=f"{_bomb()}train: images\nnames: *a8\n",
    deep_flow="train: images\nnames: " + "[" * 50_000,
    deep_block="\n".join("  " * k + "a:" for k in range(1_000)),
    python_tag="train: images\nnames: !!python/object/apply:os.getcwd []\n",
    sexagesimal=f"train: images\nnames: [a]\nx: {':'.join(['59'] * 200_000)}\nx: 1\n",
    impossible_date="train: images\nnames: [a]\nx: 2001-99-99\nx: 1\n",
    a_million_values="train: images\nnames: [" + "a," * 1_000_000 + "]\n",
    recursive="train: images\nnames: &a [*a]\n",
    list="- train\n",
    nul=b"train: images\0\n",
    not_utf8=b"train: \xff\xfe\n",
    train_is_a_mapping="train: {a: b}\nnames: [a]\n",
    path_is_a_list="path: [a]\ntrain: images\nnames: [a]\n",
)
def yaml(folder: Path, text: str | bytes) -> tuple[list[str], str]:
    return init(folder, yolo(folder, text)), "data.yaml"


@family(
    in_check_data=check_data,
    in_anchors=lambda folder, path: ["anchors", str(path), "--output", str(folder / "plots")],
    in_wordtree=lambda folder, path: [
        "wordtree", "build", "--detection", str(path), "--output", str(folder / "tree.tsv")
    ],
    in_benchmark=lambda folder, path: ["benchmark", str(path)],
)  # fmt: skip
def yaml_deep(folder: Path, command: Any) -> tuple[list[str], str]:
    return command(folder, yolo(folder, "train: images\nnames: " + "[" * 50_000)), "data.yaml"


@family(
    names_file="train: images\nnames: {file}\n",
    train_list="train: {file}\nnames: [a]\n",
    relative="train: ../home/credentials.txt\nnames: [a]\n",
    in_list="train: [images, {file}]\nnames: [a]\n",
)
def yaml_outside(folder: Path, text: str) -> tuple[list[str], str]:
    path = yolo(folder, text.format(file=secret(folder)))
    return init(folder, path), "allow_outside"


@case
def yaml_folder_elsewhere(folder: Path) -> tuple[list[str], str]:
    write_image(folder / "a" / "home" / "pictures" / "x.jpg")
    path = yolo(folder / "b" / "c", f"train: {folder / 'a' / 'home' / 'pictures'}\nnames: [a]\n")
    return init(folder, path), "allow_outside"


@case
def yaml_fifo(folder: Path) -> tuple[list[str], str]:
    path = yolo(folder)
    path.unlink()
    os.mkfifo(path)
    return init(folder, path), "data.yaml"


@case
def yaml_names_device(folder: Path) -> tuple[list[str], str]:
    return init(folder, yolo(folder, "train: images\nnames: /dev/zero\n")), "/dev/zero"


@case
def yaml_train_device(folder: Path) -> tuple[list[str], str]:
    return init(folder, yolo(folder, "train: /dev/zero\nnames: [a]\n")), "/dev/zero"


@case
def darknet_data_with_a_long_line(folder: Path) -> tuple[list[str], str]:
    yolo(folder)
    path = write(folder / "data" / "x.data", f"train = {'a' * 2**20}\nnames = b\n")
    return init(folder, path), "x.data"


@family(
    infinite_coordinate="0 1e400 .5 .5 .5\n",
    huge_coordinate="0 1e38 .5 1e38 .5\n",
    nan="nan nan nan nan nan\n",
    huge_class=f"1{'0' * 30} .5 .5 .5 .5\n",
    class_of_5000_digits=f"{'9' * 5000} .5 .5 .5 .5\n",
    long_line=("0 " * 2**21) + "\n",
    too_large="0 .5 .5 .5 .5\n" * 5_000_000,
    many_lines="0 .5 .5 .5 .5\n" * 110_000,
    nul=b"0 .5\0 .5 .5 .5\n",
    escape="\x1b[31m0 .5 .5 .5 .5\n",
)
def yolo_label(folder: Path, label: str | bytes) -> tuple[list[str], str]:
    return init(folder, yolo(folder, label=label)), "x.txt"


@case
def yolo_label_fifo(folder: Path) -> tuple[list[str], str]:
    path = yolo(folder)
    (folder / "data" / "labels" / "x.txt").unlink()
    os.mkfifo(folder / "data" / "labels" / "x.txt")
    return init(folder, path), "x.txt"


@case
def yolo_label_link_outside(folder: Path) -> tuple[list[str], str]:
    path = yolo(folder)
    (folder / "data" / "labels" / "x.txt").unlink()
    (folder / "data" / "labels" / "x.txt").symlink_to(secret(folder))
    return check_data(folder, path), "allow_outside"


@family(
    long_line="images/" + "a" * 2**20 + "\n",
    long_parts="images/" + "a/" * 2_000 + "x.jpg\n",
    nul=b"images/x\0.jpg\n",
    escape="images/x\x1b[31m.jpg\n",
    outside="../home/credentials.txt\n",
)
def yolo_list(folder: Path, text: str | bytes) -> tuple[list[str], str]:
    yolo(folder, "names: [a]\n")
    return init(folder, write(folder / "data" / "train.txt", text)), "train.txt"


@case
def yolo_list_link_outside(folder: Path) -> tuple[list[str], str]:
    path = yolo(folder, "train: list.txt\nnames: [a]\n")
    (folder / "data" / "list.txt").symlink_to(secret(folder))
    return init(folder, path), "allow_outside"


@case
def yolo_names_link_outside(folder: Path) -> tuple[list[str], str]:
    yolo(folder)
    (folder / "data" / "data.yaml").unlink()
    (folder / "data" / "classes.txt").symlink_to(secret(folder))
    return init(folder, folder / "data"), "allow_outside"


# COCO


def coco(folder: Path, **values: Any) -> Path:
    """Write a dataset of one image, with these values in place of its own."""
    write_image(folder / "data" / "x.jpg")
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}
    data = {
        "images": [{"id": 1, "file_name": "x.jpg", "width": 64, "height": 48}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [box],
    }
    second = {name.removeprefix("second_"): v for name, v in values.items() if "second_" in name}
    first = {name: v for name, v in values.items() if name in ("image", "category", "annotation")}
    whole = {name: v for name, v in values.items() if name in data}
    plural = {"image": "images", "category": "categories", "annotation": "annotations"}
    for name, changes in first.items():
        data[plural[name]][0] |= changes
    for name, item in second.items():
        data[plural[name]].append(item)
    return write(folder / "data" / "boxes.json", json.dumps(data | whole))


def coco_text(folder: Path, text: str) -> Path:
    write_image(folder / "data" / "x.jpg")
    return write(folder / "data" / "boxes.json", text)


_LONG = 10**400


@family(
    wide={"image": {"width": 9999999999999, "height": 48}},
    of_a_negative_size={"image": {"width": -5, "height": 48}},
    of_a_size_in_words={"image": {"width": "wide", "height": [1]}},
    id_is_a_list={"image": {"id": [1]}},
    id_is_huge={"image": {"id": _LONG}},
    id_is_infinite={"image": {"id": float("inf")}},
    file_name_with_nul={"image": {"file_name": "x\0.jpg"}},
    file_name_with_a_lone_surrogate={"image": {"file_name": "x\ud800.jpg"}},
    file_name_with_escape={"second_image": {"id": 2, "file_name": "\x1b[31m.jpg"}},
    file_name_of_a_megabyte={"second_image": {"id": 2, "file_name": "x" * 2**20}},
    file_name_outside={"second_image": {"id": 2, "file_name": "../home/credentials.txt"}},
    box_of_10_to_the_400={"annotation": {"bbox": [1, 1, _LONG, 9]}},
    box_of_1e38={"annotation": {"bbox": [3e38, 1, 3e38, 9]}},
    box_of_nan={"annotation": {"bbox": [float("nan"), 1, 2, 3]}},
    box_of_words={"annotation": {"bbox": ["a", "b", "c", "d"]}},
    box_is_a_mapping={"annotation": {"bbox": {"a": 1}}},
    box_is_long={"annotation": {"bbox": [1] * 100_000}},
    area_is_huge={"annotation": {"area": _LONG, "bbox": None}},
    annotation_id_is_a_list={"annotation": {"id": [[1] * 1000], "bbox": None}},
    image_id_is_a_list={"annotation": {"image_id": [1]}},
    image_id_is_a_mapping={"annotation": {"image_id": {"a": 1}}},
    category_id_is_a_list={"annotation": {"category_id": [1]}},
    category_id_of_a_category_is_a_list={"category": {"id": [1]}},
    category_id_is_null={"category": {"id": None}},
    category_twice={"second_category": {"id": 1, "name": "b"}},
    image_twice={"second_image": {"id": 1, "file_name": "x.jpg"}},
    name_is_a_list={"category": {"name": [1] * 100_000}},
    name_is_null={"category": {"name": None}},
    name_with_escape={"category": {"name": "\x1b]0;owned\x07a"}},
    name_with_a_lone_surrogate={"category": {"name": "a\ud800"}},
    name_of_a_megabyte={"category": {"name": "a" * 2**20}},
    images_is_null={"images": None},
    images_is_a_mapping={"images": {"a": 1}},
    annotations_are_numbers={"annotations": [1, 2]},
    categories_are_words={"categories": "abc"},
    ids_collide={"images": [
        {"id": k * (2**61 - 1), "file_name": "x.jpg"} for k in range(1, 20_000)
    ]},
)  # fmt: skip
def coco_value(folder: Path, values: dict[str, Any]) -> tuple[list[str], str]:
    secret(folder)
    return init(folder, coco(folder, **values)), "boxes.json"


@family(
    deep="[" * 200_000,
    deep_objects='{"a":' * 200_000,
    number_of_5000_digits=f'{{"categories": [{{"id": {"9" * 5000}}}]}}',
    nul="\0" * 1000,
    list="[1, 2]",
    truncated='{"images": [',
    text=SECRET,
    empty="",
)
def coco_json(folder: Path, text: str) -> tuple[list[str], str]:
    return init(folder, coco_text(folder, text)), "boxes.json"


@case
def coco_deep_in_wordtree(folder: Path) -> tuple[list[str], str]:
    path = coco_text(folder, "[" * 200_000)
    output = str(folder / "tree.tsv")
    return ["wordtree", "build", "--detection", str(path), "--output", output], "boxes.json"


@case
def coco_ids_as_lists_in_wordtree(folder: Path) -> tuple[list[str], str]:
    path = coco(folder, annotation={"category_id": [1]}, category={"id": {"a": 1}})
    output = str(folder / "tree.tsv")
    return ["wordtree", "build", "--detection", str(path), "--output", output], "boxes.json"


@case
def coco_fifo_in_the_folder(folder: Path) -> tuple[list[str], str]:
    (folder / "data").mkdir()
    os.mkfifo(folder / "data" / "boxes.json")
    return check_data(folder, folder / "data"), "data"


# VOC, ILSVRC


def voc(folder: Path, xml: str | bytes | None = None, **values: str) -> Path:
    """Write a dataset of one image, and return its folder."""
    parts = {"name": "a", "width": "64", "xmin": "1"} | values
    text = (
        f"<annotation><size><width>{parts['width']}</width><height>48</height></size><object>"
        f"<name>{parts['name']}</name><bndbox><xmin>{parts['xmin']}</xmin><ymin>1</ymin>"
        "<xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>"
    )
    write_image(folder / "data" / "JPEGImages" / "x.jpg")
    write(folder / "data" / "Annotations" / "x.xml", text if xml is None else xml)
    return folder / "data"


def _laughs(levels: int = 12) -> str:
    entities = ['<!ENTITY a0 "lolololololololololol">']
    entities += [f'<!ENTITY a{k} "{f"&a{k - 1};" * 10}">' for k in range(1, levels)]
    return f"<!DOCTYPE a [{''.join(entities)}]><annotation>&a{levels - 1};</annotation>"


@family(
    billion_laughs=_laughs(),
    quadratic=f'<!DOCTYPE a [<!ENTITY a "{"l" * 50_000}">]><a>{"&a;" * 5_000}</a>',
    external_entity='<!DOCTYPE a [<!ENTITY a SYSTEM "file:///etc/hostname">]><a>&a;</a>',
    deep="<a>" * 100_000,
    deep_and_closed="<a>" * 100_000 + "</a>" * 100_000,
    attributes="<a " + " ".join(f'x{k}="{k}"' for k in range(100_000)) + "/>",
    not_xml=SECRET,
    nul=b"\0" * 1000,
    unknown_encoding='<?xml version="1.0" encoding="utf-99"?><annotation/>',
)
def voc_xml(folder: Path, xml: str | bytes) -> tuple[list[str], str]:
    return init(folder, voc(folder, xml)), "x.xml"


@family(
    wide={"width": "9999999999999"},
    of_an_infinite_size={"width": "1e400"},
    of_a_size_of_5000_digits={"width": "9" * 5000},
    of_a_negative_size={"width": "-64"},
    infinite_corner={"xmin": "1e400"},
    huge_corner={"xmin": "-1e38"},
    corner_of_5000_digits={"xmin": "9" * 5000},
    name_of_a_megabyte={"name": "a" * 2**20},
    name_with_bidi_override={"name": "a\u202eb"},
    name_with_c1={"name": "a\u009b31mb"},
)
def voc_value(folder: Path, values: dict[str, str]) -> tuple[list[str], str]:
    return init(folder, voc(folder, **values)), "x.xml"


@case
def voc_fifo(folder: Path) -> tuple[list[str], str]:
    path = voc(folder)
    os.mkfifo(path / "Annotations" / "y.xml")
    return check_data(folder, path), "y.xml"


@case
def voc_fifo_in_wordtree(folder: Path) -> tuple[list[str], str]:
    path = voc(folder, name="goldfish")
    os.mkfifo(path / "Annotations" / "y.xml")
    output = str(folder / "tree.tsv")
    return ["wordtree", "build", "--detection", str(path), "--output", output], "tree.tsv"


@case
def voc_xml_link_outside(folder: Path) -> tuple[list[str], str]:
    path = voc(folder)
    (path / "Annotations" / "y.xml").symlink_to(secret(folder))
    return check_data(folder, path), "allow_outside"


@case
def voc_image_set_link_outside(folder: Path) -> tuple[list[str], str]:
    path = voc(folder)
    (path / "ImageSets" / "Main").mkdir(parents=True)
    (path / "ImageSets" / "Main" / "train.txt").symlink_to(secret(folder))
    return check_data(folder, path), "allow_outside"


@family(relative="../../home/secret", absolute="{folder}/home/secret", nul="x\0", long="x" * 2**20)
def voc_image_set_names(folder: Path, name: str) -> tuple[list[str], str]:
    write(folder / "home" / "secret.xml", SECRET)
    path = voc(folder)
    write(path / "ImageSets" / "Main" / "train.txt", name.format(folder=folder) + "\n")
    return check_data(folder, path), "train.txt"


@case
def ilsvrc_list_outside(folder: Path) -> tuple[list[str], str]:
    root = folder / "data"
    write(folder / "home" / "secret.xml", SECRET)
    write(root / "Annotations" / "DET" / "readme.txt", "")
    write(root / "ImageSets" / "DET" / "train.txt", "../../../../home/secret 1\n")
    return check_data(folder, root), "train.txt"


# image labels


@family(
    field_too_large=f'path,label\nx.jpg,"{"a" * 200_000}"\n',
    open_quote='path,label\nx.jpg,"a\n' + "x.jpg,b\n" * 50_000,
    nul=b"x.jpg,a\0\n",
    label_with_escape="x.jpg,\x1b[31ma\n",
    label_with_c1="x.jpg,\u009b31ma\n",
    path_outside="../home/credentials.txt,a\n",
    path_of_a_megabyte=f"{'x' * 2**17},a\n",
    not_a_table=f"{SECRET}\n",
)
def table(folder: Path, text: str | bytes) -> tuple[list[str], str]:
    secret(folder)
    write_image(folder / "data" / "x.jpg")
    return check_data(folder, write(folder / "data" / "labels.csv", text)), "labels.csv"


@family(link="link", field=None)
def imagenet_labels(folder: Path, kind: str | None) -> tuple[list[str], str]:
    root = folder / "data"
    write_image(root / "train" / "n01440764" / "x.jpg")
    write_image(root / "val" / "ILSVRC2012_val_00000001.jpg")
    (root / "Data" / "CLS-LOC").mkdir(parents=True)
    (root / "train").rename(root / "Data" / "CLS-LOC" / "val")
    write_image(root / "Data" / "CLS-LOC" / "train" / "ILSVRC2012_val_00000001.jpg")
    file = root / "LOC_val_solution.csv"
    if kind == "link":
        file.symlink_to(secret(folder))
        return check_data(folder, root), "allow_outside"
    write(file, f'ImageId,PredictionString\nILSVRC2012_val_00000001,"{"n" * 200_000}"\n')
    return check_data(folder, root), "LOC_val_solution.csv"


@case
def class_folder_with_escape(folder: Path) -> tuple[list[str], str]:
    write_image(folder / "data" / "a" / "x.jpg")
    (folder / "data" / "a").rename(folder / "data" / "\x1b[31ma")
    return check_data(folder, folder / "data"), "data"


# trees and hierarchies


def show(path: Path) -> list[str]:
    return ["wordtree", "show", str(path)]


@family(
    cycle="".join(f"k{k}\tk{(k + 1) % 50_000}\tn\n" for k in range(50_000)),
    chain="".join(f"k{k}\t{f'k{k - 1}' if k else '-'}\tn\n" for k in range(50_000)),
    too_large="".join(f"{k}\t-\tn\n" for k in range(110_000)),
    own_parent="a\ta\tb\n",
    unknown_parent="a" * 2**20 + "\t-\tn\n" + "b\t" + "c" * 2**20 + "\tn\n",
    unknown_parent_of_many="".join(f"k{k}\t-\tn\n" for k in range(30_000)) + "x\tk9x9x9\tn\n",
    escape="a\t-\t\x1b[31mb\n",
    key_with_c1="a\u009b31m\t-\tb\n",
    long_line="a" * 2**22,
    nul=b"a\t-\tb\0\n",
    secret=f"{SECRET}={SECRET}\n",
)
def tree(folder: Path, text: str | bytes) -> tuple[list[str], str]:
    return show(write(folder / "tree.tsv", text)), "tree.tsv"


@family(
    giant_parent="a 999999999\n",
    parent_of_5000_digits=f"a {'9' * 5000}\n",
    cycle="a 1\nb 0\n",
    chain="".join(f"k{k} {k - 1}\n" for k in range(50_000)),
    long_line="a " * 2**21,
    escape="a\x1b[31m -1\n",
)
def darknet_tree(folder: Path, text: str) -> tuple[list[str], str]:
    return show(write(folder / "net.tree", text)), "net.tree"


@case
def tree_fifo(folder: Path) -> tuple[list[str], str]:
    os.mkfifo(folder / "tree.tsv")
    return show(folder / "tree.tsv"), "tree.tsv"


@case
def tree_device(folder: Path) -> tuple[list[str], str]:
    return show(Path("/dev/zero")), "/dev/zero"


def _hierarchy(folder: Path, path: Path, option: str = "--hierarchy") -> list[str]:
    output = str(folder / "tree.tsv")
    inputs = (
        ["--names", str(write(folder / "names.txt", "goldfish\n"))]
        if option != "--hierarchy"
        else []
    )
    return ["wordtree", "build", *inputs, option, str(path), "--output", output]


@family(
    deep="[" * 50_000,
    deep_block="\n".join("  " * k + "a:" for k in range(1_000)),
    alias_bomb=_bomb(),
    recursive="a: &a [*a]\n",
    escape=r'{"a\e[31m": goldfish}' + "\n",
)
def hierarchy(folder: Path, text: str) -> tuple[list[str], str]:
    return _hierarchy(folder, write(folder / "parents.yaml", text)), "parents.yaml"


@family(
    chain="".join(f"k{k},{f'k{k - 1}' if k else 'goldfish'}\n" for k in range(3_000)),
    cycle="".join(f"k{k},k{(k + 1) % 3_000}\n" for k in range(3_000)),
    field_too_large=f'a,"{"b" * 200_000}"\n',
)
def hierarchy_table(folder: Path, text: str) -> tuple[list[str], str]:
    return _hierarchy(folder, write(folder / "parents.csv", text)), ""


@family(deep="[" * 50_000, alias_bomb=_bomb())
def mapping(folder: Path, text: str) -> tuple[list[str], str]:
    return _hierarchy(folder, write(folder / "means.yaml", text), "--mapping"), "means.yaml"


# Darknet networks


def _network(folder: Path, cfg: str | Path, *options: str) -> list[str]:
    file = cfg if isinstance(cfg, Path) else write(folder / "net.cfg", cfg)
    weights = write(folder / "net.weights", b"\0" * 64)
    output = str(folder / "net.ckpt")
    return ["darknet", "import", "--cfg", str(file), "--weights", str(weights), *options,
            "--output", output]  # fmt: skip


_NET = "[net]\nheight={size}\nwidth=64\n[convolutional]\nfilters={filters}\nsize=1\n"


@family(
    huge_size=_NET.format(size="9" * 5000, filters=1),
    infinite_size=_NET.format(size="1e400", filters=1),
    huge_filters=_NET.format(size=64, filters=10**9),
    long_value=_NET.format(size="9" * 2**20, filters=1),
    long_line="a" * 2**20,
    nul="[net]\n\0",
    many_sections="[net]\n" + "[convolutional]\n" * 20_000,
)
def cfg(folder: Path, text: str) -> tuple[list[str], str]:
    return _network(folder, text), "net.cfg"


@case
def cfg_fifo(folder: Path) -> tuple[list[str], str]:
    os.mkfifo(folder / "net.cfg")
    return _network(folder, folder / "net.cfg"), "net.cfg"


@case
def darknet_data_names_a_fifo(folder: Path) -> tuple[list[str], str]:
    os.mkfifo(folder / "net.names")
    write(folder / "net.data", "names = net.names\n")
    return _network(
        folder, _NET.format(size=64, filters=1), "--data", str(folder / "net.data")
    ), "net"


# the index


@family(
    arrays="arrays",
    metadata="metadata",
    offsets="offsets",
    classes="classes",
    fifo="fifo",
)
def index(folder: Path, kind: str) -> tuple[list[str], str]:
    """Write a complete index whose header or arrays do not fit the dataset."""
    import numpy as np

    from yolo_lightning.datamodules import index as indices
    from yolo_lightning.datamodules.autodetect import detection_source

    path = voc(folder)
    source = detection_source(str(path))
    root, options = source._cache_key()
    file = indices.cache_file(root, {"source": type(source).__name__, **options})
    assert file is not None
    good = source._parse(root)
    arrays, metadata = dict(good.arrays), good.metadata | {"fingerprint": "x"}
    if kind == "arrays":
        del arrays["boxes_xyxy"]
    elif kind == "metadata":
        metadata = {"names": 5}
    elif kind == "offsets":
        arrays["box_offsets"] = np.array([0, 2**40])
    elif kind == "classes":
        arrays["classes"] = np.array([7], np.int32)
    if kind == "fifo":
        file.unlink(missing_ok=True)
        os.mkfifo(file)
    else:
        indices.save(indices.Index(arrays, metadata, good.watched), file, 2**62)
    return ["anchors", str(path), "--num", "1", "--output", str(folder / "plots")], "1 boxes"


# tables of boxes, and lists of images

_HEADER = b"filename,width,height,class,xmin,ymin,xmax,ymax\n"


def box_table(folder: Path, rows: bytes) -> Path:
    """Write a dataset of one image, and return its table."""
    write_image(folder / "data" / "images" / "x.jpg")
    return write(folder / "data" / "boxes.csv", rows)


@family(
    open_quotation=(_HEADER + b'"x.jpg' + b"a" * 2**18, "not a table"),
    nul=(_HEADER + b"x.jpg,64,48,\0,1,1,9,9\n", "NUL"),
    not_utf8=(_HEADER + b"x.jpg,64,48,\xff,1,1,9,9\n", "UTF-8"),
    numbers=(
        _HEADER + b"x.jpg,1e999,-1,a,nan,1e999,-1e999,9\nx.jpg,64,48,a,1,1,9,9\n",
        "no usable",
    ),
    digits=(
        _HEADER + b"x.jpg,64,48,a," + b"9" * 5000 + b",1,9,9\nx.jpg,64,48,a,1,1,9,9\n",
        "csv:2",
    ),
    cells=(_HEADER + b"\n,\nx.jpg\n,,,,,,,,,,\n" + b"x.jpg,64,48,a,1,1,9,9\n", "boxes: a 1"),
    control_characters=(_HEADER + b"x.jpg,64,48,a\x1b[31m,1,1,9,9\n", "control characters"),
    name_with_control=(_HEADER + b"\x1b[31m.jpg,64,48,a,1,1,9,9\n", "its image is missing"),
    path_that_leaves=(
        _HEADER + b"../../home/x.jpg,64,48,a,1,1,9,9\n",
        "leaves the dataset's folder",
    ),
    absolute_path=(_HEADER + b"/etc/passwd,64,48,a,1,1,9,9\n", "leaves the dataset's folder"),
    long_path=(_HEADER + b"a" * 5000 + b",64,48,a,1,1,9,9\n", "cannot be the path"),
    long_header=(b"a," * 2**20 + b"\n", "wanted"),
    a_secret=(f"{SECRET} = {SECRET}\n".encode(), "wanted"),
)
def box_csv(folder: Path, case: tuple[bytes, str]) -> tuple[list[str], str]:
    return init(folder, box_table(folder, case[0])), case[1]


@case
def box_csv_that_links_to_a_secret(folder: Path) -> tuple[list[str], str]:
    table = box_table(folder, b"")
    table.unlink()
    table.symlink_to(write(folder / "home" / "boxes.csv", _HEADER + b"x.jpg,9,9,a,1,1,9,9\n"))
    return init(folder, table.parent), "is outside the dataset's folder"


@case
def box_csv_in_a_linked_folder(folder: Path) -> tuple[list[str], str]:
    write(folder / "home" / "annotations" / "boxes.csv", _HEADER + b"x.jpg,9,9,a,1,1,9,9\n")
    write_image(folder / "data" / "images" / "x.jpg")
    (folder / "data" / "annotations").symlink_to(folder / "home" / "annotations")
    return init(folder, folder / "data"), "is outside the dataset's folder"


@case
def a_linked_folder_alone(folder: Path) -> tuple[list[str], str]:
    write(folder / "home" / "set" / "boxes.csv", _HEADER + b"x.jpg,9,9,a,1,1,9,9\n")
    write_image(folder / "home" / "set" / "x.jpg")
    (folder / "data").mkdir()
    (folder / "data" / "x").symlink_to(folder / "home" / "set")
    return init(folder, folder / "data"), "no images with boxes recognised"


@case
def box_csv_that_is_a_fifo(folder: Path) -> tuple[list[str], str]:
    table = box_table(folder, b"")
    table.unlink()
    os.mkfifo(table)
    return init(folder, table.parent), "no images with boxes recognised"


@case
def a_folder_of_names_with_control_characters(folder: Path) -> tuple[list[str], str]:
    write_image(folder / "data" / "\x1b[31m\n\u202e" / "x.jpg")
    return init(folder, folder / "data"), "no images with boxes recognised"
