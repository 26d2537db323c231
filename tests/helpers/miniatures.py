"""Miniature datasets in every layout, and helpers of the tests of sources."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from yolo_lightning.datamodules import (
    COCOJson,
    CombinedDataModule,
    ILSVRCDetection,
    ImageFolder,
    ImageNet,
    LabelCSV,
    VOCFolder,
    YOLOText,
)
from yolo_lightning.tree.wordtree import WordTree

FRUIT = WordTree.from_names(["apple", "banana"])
WNIDS = WordTree.from_names(["n01", "n02"])
WIDTH, HEIGHT = 64, 48

GOOD_VOC = ("banana", 1, 1, 10, 20)
GOOD_COCO = {"id": 1, "image_id": 5, "category_id": 3, "bbox": [0, 0, 10, 20]}
GOOD_YOLO = "1 0.5 0.5 0.5 0.5\n"


def quarters() -> Any:
    """Return an image of four quarters, each of one colour: JPEG keeps it, and no flip does."""
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    top, left = HEIGHT // 2, WIDTH // 2
    image[:top, :left] = 200, 40, 40
    image[:top, left:] = 40, 180, 60
    image[top:, :left] = 60, 60, 220
    image[top:, left:] = 230, 220, 70
    return image


def save(path: Path, image: Any = None, **options: Any) -> Path:
    """Save RGB pixels, or a Pillow image, in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = quarters() if image is None else image
    if not isinstance(whole, Image.Image):
        whole = Image.fromarray(whole)
    if path.suffix.lower() in (".jpg", ".jpeg"):
        options = {"quality": 95, "subsampling": 0, **options}
    whole.save(path, **options)
    return path


def save_grey(path: Path, value: int = 90, width: int = WIDTH, height: int = HEIGHT) -> Path:
    """Save a grey image."""
    return save(path, np.full((height, width, 3), value, np.uint8))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def bind_source(source: Any, tree: WordTree = FRUIT) -> Any:
    source.bind(tree)
    return source


def paths_of(source: Any, root: Path) -> list[str]:
    return [os.path.relpath(source.image_path(k), root) for k in range(len(source))]


def set_up_data(**options: Any) -> CombinedDataModule:
    defaults = {"tree": ["apple", "banana"], "image_size": 64, "num_workers": 0}
    data = CombinedDataModule(**{**defaults, **options})
    data.setup("fit")
    return data


# --- annotations


def write_xml(file: Path, name: str, box: tuple[int, int, int, int]) -> Path:
    x1, y1, x2, y2 = box
    return write(
        file,
        f"<annotation><filename>{file.stem}</filename><size><width>{WIDTH}</width>"
        f"<height>{HEIGHT}</height></size><object><name>{name}</name><bndbox><xmin>{x1}</xmin>"
        f"<ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object></annotation>",
    )


def write_devkit(root: Path, write_voc: Any, year: int, lists: dict[str, str]) -> None:
    folder = root / f"VOC{year}"
    for name in ("a", "b"):
        write_voc(
            folder / "Annotations", f"{year}_{name}", [GOOD_VOC], images="../JPEGImages",
            difficult=int(name == "b"),
        )  # fmt: skip
    for split, names in lists.items():
        listed = "".join(f"{year}_{name}\n" for name in names)
        write(folder / "ImageSets/Main" / f"{split}.txt", listed)


def write_ilsvrc(root: Path) -> Path:
    files = {
        "train/ILSVRC2013_train/n01/n01_7": ("n01", (0, 5, 20, 30)),
        "train/ILSVRC2013_train/n02/n02_3": ("n02", (1, 1, 63, 47)),
        "val/v_1": ("n02", (2, 3, 4, 5)),
        "val/v_2": ("n01", (2, 3, 4, 5)),
    }
    for name, (label, box) in files.items():
        write_xml(root / f"Annotations/DET/{name}.xml", label, box)
        save_grey(root / f"Data/DET/{name}.JPEG")
    write(root / "ImageSets/DET/val_part.txt", "v_2 1\nv_9 2\n")
    return root


def write_coco(
    file: Path,
    annotations: list[Any],
    images: list[Any] | None = None,
    categories: Any = ({"id": 3, "name": "banana"}, {"id": 90, "name": "apple"}),
) -> Path:
    if images is None:
        images = [{"id": 5, "file_name": "a.jpg", "width": WIDTH, "height": HEIGHT}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return write(file, json.dumps(content))


# --- every source in its usual layout: two images, one per label

FRENCH = {"pomme": "apple", "banane": "banana"}
PAIR = {"a": "pomme", "b": "banane"}


def build_voc(root: Path) -> Any:
    for name, label in PAIR.items():
        write_xml(root / f"{name}.xml", label, (1, 1, 10, 20))
        save_grey(root / f"{name}.jpg")
    return partial(VOCFolder, str(root))


def build_devkit(root: Path) -> Any:
    for name, label in PAIR.items():
        write_xml(root / f"Annotations/{name}.xml", label, (1, 1, 10, 20))
        save_grey(root / f"JPEGImages/{name}.jpg")
    write(root / "ImageSets/Main/trainval.txt", "a\nb\n")
    return partial(VOCFolder, str(root), "trainval")


def build_ilsvrc(root: Path) -> Any:
    for name, label in PAIR.items():
        write_xml(root / f"Annotations/DET/train/{name}/{name}.xml", label, (0, 0, 10, 20))
        save_grey(root / f"Data/DET/train/{name}/{name}.JPEG")
    return partial(ILSVRCDetection, str(root))


def build_coco(root: Path) -> Any:
    for name in PAIR:
        save_grey(root / f"images/{name}.jpg")
    images = [{"id": 5, "file_name": "a.jpg"}, {"id": 6, "file_name": "b.jpg"}]
    categories = [{"id": 3, "name": "banane"}, {"id": 90, "name": "pomme"}]
    annotations = [{**GOOD_COCO, "category_id": 90}, {**GOOD_COCO, "id": 2, "image_id": 6}]
    return partial(COCOJson, str(write_coco(root / "ann.json", annotations, images, categories)))


def write_yolo_pair(images: Path, labels: Path) -> None:
    for k, name in enumerate(PAIR):
        save_grey(images / f"{name}.jpg")
        write(labels / f"{name}.txt", f"{k} 0.078125 0.208333333 0.15625 0.416666667\n")


def build_yolo(root: Path) -> Any:
    write_yolo_pair(root / "images", root / "labels")
    return partial(
        YOLOText, str(write(root / "data.yaml", "train: images\nnames: [pomme, banane]\n"))
    )


def build_yolo_folder(root: Path) -> Any:
    build_yolo(root)
    return partial(YOLOText, str(root))


def build_yolo_flat(root: Path) -> Any:
    write_yolo_pair(root, root)
    write(root / "classes.txt", "pomme\nbanane\n")
    return partial(YOLOText, str(root))


def build_folders(root: Path) -> Any:
    for name, label in PAIR.items():
        save_grey(root / label / f"{name}.jpg")
    return partial(ImageFolder, str(root))


def build_table(root: Path) -> Any:
    for name in PAIR:
        save_grey(root / f"{name}.jpg")
    table = "path,label\na.jpg,pomme\nb.jpg,banane\n"
    return partial(LabelCSV, str(write(root / "table.csv", table)))


def build_imagenet(root: Path) -> Any:
    build_folders(root / "train")
    return partial(ImageNet, str(root))


def build_validation(root: Path) -> Any:
    for k in (1, 2):
        save_grey(root / f"val/ILSVRC2012_val_0000000{k}.JPEG")
    write(root / "val_synsets.txt", "pomme\nbanane\n")
    return partial(ImageNet, str(root), "val")


BOXES = {
    "VOC": build_voc,
    "VOC devkit": build_devkit,
    "ILSVRC": build_ilsvrc,
    "COCO": build_coco,
    "YOLO": build_yolo,
    "YOLO folder": build_yolo_folder,
    "YOLO in one folder": build_yolo_flat,
}
LABELS = {
    "class folders": build_folders,
    "table": build_table,
    "ImageNet": build_imagenet,
    "ImageNet validation": build_validation,
}
SOURCES = {**BOXES, **LABELS}
