"""Miniatures of the paper's datasets, in the folders and formats that the recipes expect."""

import json
from pathlib import Path

from tests.helpers.miniatures import HEIGHT, WIDTH, save_grey, write, write_xml

BOX = (1, 1, 30, 40)
COCO_NAMES = ("person", "potted plant", "tv", "dog")
# kit fox, English setter, Siberian husky, tiger cat
IMAGENET_WNIDS = ("n02119789", "n02100735", "n02110185", "n02123159")
# dog and domestic cat are shared with COCO, accordion and ant are not
DET_WNIDS = ("n02084071", "n02121808", "n02672831", "n02219486")


def write_paper_data(root: Path) -> dict[str, str]:
    """Write all datasets below a folder, and return the environment variables of the recipes."""
    _write_voc(root / "VOCdevkit")
    _write_coco(root / "coco")
    _write_imagenet(root / "imagenet", root / "imagenet22k")
    for wnid in DET_WNIDS:
        write_xml(root / f"ILSVRC/Annotations/DET/val/{wnid}.xml", wnid, BOX)
        save_grey(root / f"ILSVRC/Data/DET/val/{wnid}.JPEG")
    folders = {
        "VOC_DATA": "VOCdevkit", "COCO_DATA": "coco", "IMAGENET": "imagenet",
        "IMAGENET22K": "imagenet22k", "IMAGENET_DET": "ILSVRC",
    }  # fmt: skip
    return {name: str(root / folder) for name, folder in folders.items()}


def _write_voc(root: Path) -> None:
    for year, split in ((2007, "trainval"), (2007, "test"), (2012, "trainval")):
        names = [f"{year}_{split}_{k}" for k in range(2)]
        for name, label in zip(names, ("dog", "person"), strict=True):
            write_xml(root / f"VOC{year}/Annotations/{name}.xml", label, BOX)
            save_grey(root / f"VOC{year}/JPEGImages/{name}.jpg")
        write(root / f"VOC{year}/ImageSets/Main/{split}.txt", "\n".join(names) + "\n")


def _write_coco(root: Path) -> None:
    categories = [{"id": 7 * k + 1, "name": name} for k, name in enumerate(COCO_NAMES)]
    for split in ("train2017", "val2017"):
        images, annotations = [], []
        for k, category in enumerate(categories):
            name = f"{k:012}.jpg"
            save_grey(root / split / name)
            images.append({"id": k, "file_name": name, "width": WIDTH, "height": HEIGHT})
            annotations.append(
                {"id": k, "image_id": k, "category_id": category["id"], "bbox": [1, 1, 30, 40],
                 "area": 1200, "iscrowd": 0}
            )  # fmt: skip
        content = {"images": images, "annotations": annotations, "categories": categories}
        write(root / f"annotations/instances_{split}.json", json.dumps(content))


def _write_imagenet(root: Path, root_22k: Path) -> None:
    """Write ImageNet-1k, its validation images in one folder, and ImageNet-22k."""
    for k, wnid in enumerate(IMAGENET_WNIDS, start=1):
        save_grey(root / f"train/{wnid}/{wnid}_1.JPEG")
        save_grey(root / f"val/ILSVRC2012_val_{k:08}.JPEG")
        for number in range(2):
            save_grey(root_22k / wnid / f"{wnid}_{number}.JPEG")
    write(root / "val_synsets.txt", "\n".join(IMAGENET_WNIDS) + "\n")
