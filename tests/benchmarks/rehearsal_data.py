"""The data of the rehearsal: COCO and ImageNet-22k in number of names, few photographs behind them.

The tree has the shape of the authors' tree of 9,418 nodes. Images are hard links to a few generated
photographs, and the class folders are links to one folder, so that all of it takes 0.5 GB.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np

from yolo_lightning.tree.labels import load_reviewed_labels

# of each level of the authors' tree, from the top: nodes, and those of them that have children
_NODES = (4, 18, 60, 161, 480, 1027, 1613, 1708, 1231, 918, 734, 580, 402, 228, 183, 61, 10)
_INNER = (4, 13, 26, 65, 131, 295, 344, 284, 194, 146, 135, 101, 47, 36, 21, 3)
_LARGEST_GROUP, _LARGEST_LEVEL = 149, 8
_BOXED_INNER = 44  # names of COCO that have nodes below them
_DARKNET_NAMES = {"aeroplane", "diningtable", "motorbike", "pottedplant", "sofa", "tvmonitor"}
_MAX_LINKS = 60_000  # ext4 allows 65,000 names of a file


@dataclass(frozen=True)
class Scale:
    """How much data is generated."""

    images: int = 118_000
    boxes: int = 860_000
    validation_images: int = 500
    folders: int = 21_841  # of ImageNet-22k
    images_per_folder: int = 641  # 14 million in all


TRUE_SIZE = Scale()
QUICK = Scale(images=200, boxes=1_400, validation_images=6, folders=9_500, images_per_folder=2)


def generate(folder: Path, scale: Scale) -> None:
    """Write all data to a folder, unless it holds that of this scale already."""
    done = folder / "scale.json"
    if done.is_file() and json.loads(done.read_text()) == asdict(scale):
        return
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = tree_rows(rng)
    text = "".join("\t".join(row) + "\n" for row in rows)
    (folder / "tree.tsv").write_text(text, encoding="utf-8")
    photographs = [photograph(folder / f"photograph{k}.jpg", rng) for k in range(16)]
    for split, images, boxes in (
        ("train2017", scale.images, scale.boxes),
        ("val2017", scale.validation_images, scale.validation_images * 7),
    ):
        _write_coco(folder / "coco", split, images, boxes, photographs, rng)
    _write_imagenet(folder / "imagenet22k", [row[0] for row in rows], scale, photographs)
    done.write_text(json.dumps(asdict(scale)))


def coco_names() -> list[str]:
    """Return COCO's 80 names, without those that only the original program uses."""
    return sorted(load_reviewed_labels()["coco"].keys() - _DARKNET_NAMES)


def tree_rows(rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """Return a tree of the authors' shape: 9,418 nodes, 4 roots, 1,846 groups, 17 levels."""
    first = np.cumsum([0, *_NODES])
    parents = np.full(first[-1], -1)
    for level, inner in enumerate(_INNER):
        sizes = _group_sizes(_NODES[level + 1], inner, level == _LARGEST_LEVEL, rng)
        above = first[level] + np.sort(rng.permutation(_NODES[level])[:inner])
        parents[first[level + 1] : first[level + 2]] = np.repeat(above, sizes)
    keys = [f"n{10_000_000 + node:08d}" for node in range(len(parents))]
    names = {node: f"class {node}" for node in range(len(parents))}
    names |= _boxed_names(parents.tolist(), rng)
    return [
        (keys[node], "-" if parent < 0 else keys[parent], names[node])
        for node, parent in enumerate(parents.tolist())
    ]


def _group_sizes(nodes: int, groups: int, has_largest: bool, rng: np.random.Generator) -> list[int]:
    """Return sizes of groups of siblings: many small ones, few large ones."""
    fixed = [_LARGEST_GROUP] if has_largest else []
    count, rest = groups - len(fixed), nodes - sum(fixed)
    weights = rng.pareto(1.5, count) + 0.2
    weights = np.minimum(weights / weights.sum(), 100 / rest)
    sizes = np.sort(2 + rng.multinomial(rest - 2 * count, weights / weights.sum()))
    only_children = count // 40  # the authors' tree has 46 in all
    sizes[:only_children] -= 1
    sizes[-1] += only_children
    return [*fixed, *rng.permutation(sizes).tolist()]


def _boxed_names(parents: list[int], rng: np.random.Generator) -> dict[int, str]:
    """Return nodes for the names of COCO, none of them below another one."""
    is_inner = np.bincount(np.array(parents)[np.array(parents) >= 0], minlength=len(parents)) > 0
    remaining, nodes = {True: _BOXED_INNER, False: 80 - _BOXED_INNER}, list[int]()
    for node in rng.permutation(np.arange(sum(_NODES[:4]), sum(_NODES[:14]))).tolist():
        path = _path(node, parents)
        related = any(other in path or node in _path(other, parents) for other in nodes)
        if remaining[bool(is_inner[node])] and not related:
            remaining[bool(is_inner[node])] -= 1
            nodes.append(node)
    return dict(zip(nodes, coco_names(), strict=True))


def _path(node: int, parents: list[int]) -> list[int]:
    path = [node]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path


def photograph(file: Path, rng: np.random.Generator) -> Path:
    """Write a JPEG of 640 x 480 px and about 150 kB, as COCO's are on average."""
    image = np.zeros((480, 640, 3), np.float32)
    for side, contrast in ((4, 90), (16, 50), (64, 25), (256, 15)):
        noise = rng.normal(0, contrast, (side * 3 // 4, side, 3)).astype(np.float32)
        image += cv2.resize(noise, (640, 480), interpolation=cv2.INTER_CUBIC)
    pixels = (image + 120).clip(0, 255).astype(np.uint8)
    if not cv2.imwrite(str(file), pixels, [cv2.IMWRITE_JPEG_QUALITY, 92]):
        raise OSError(f"{file} cannot be written")
    return file


def _link(photographs: list[Path], files: Iterator[Path]) -> None:
    """Give the photographs many names."""
    for number, file in enumerate(files):
        photograph = photographs[number % len(photographs)]
        if number // len(photographs) >= _MAX_LINKS:
            raise ValueError(f"more than {_MAX_LINKS} names for a photograph")
        os.link(photograph, file)


# --- COCO


def _write_coco(
    folder: Path,
    split: str,
    images: int,
    boxes: int,
    photographs: list[Path],
    rng: np.random.Generator,
) -> None:
    """Write a split: the JSON, as long as COCO's because it has outlines, and the images."""
    (folder / split).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    names = [f"{number:012d}.jpg" for number in range(1, images + 1)]
    _link(photographs, (folder / split / name for name in names))
    categories = [
        {"id": number + 1, "name": name, "supercategory": "thing"}
        for number, name in enumerate(coco_names())
    ]
    with (folder / "annotations" / f"instances_{split}.json").open("w", encoding="utf-8") as file:
        file.write('{"info": {}, "licenses": [], "images": [')
        for number, name in enumerate(names, start=1):
            item = {"license": 1, "file_name": name, "coco_url": f"http://example.org/{name}",
                    "height": 480, "width": 640, "id": number}  # fmt: skip
            file.write((", " if number > 1 else "") + json.dumps(item))
        file.write('], "annotations": [')
        for number, text in enumerate(_annotations(images, boxes, rng)):
            file.write((", " if number else "") + text)
        file.write(f'], "categories": {json.dumps(categories)}}}')


def _annotations(images: int, boxes: int, rng: np.random.Generator) -> Iterator[str]:
    """Yield annotations as text: sizes as in COCO, 1 % crowds; outlines are from a small pool."""
    outlines = []
    for _ in range(500):
        points = (rng.random(2 * int(rng.gamma(2, 12) + 3)) * 480).round(2)
        outlines.append(json.dumps([points.tolist()]))
    # a third of the classes of COCO hold nine tenths of its boxes
    frequency = rng.pareto(1.2, 80) + 0.05
    classes = rng.choice(80, boxes, p=frequency / frequency.sum()) + 1
    per_image = rng.gamma(1.2, 1.0, images)
    owners = rng.choice(images, boxes, p=per_image / per_image.sum()) + 1
    # medians and spread give 41 % below 32 px, 34 % below 96 px
    sides = np.exp(rng.normal(np.log(42), 1.25, boxes)).clip(4, 400)
    aspects = np.exp(rng.normal(0, 0.45, boxes))
    widths, heights = (sides * aspects).clip(3, 600), (sides / aspects).clip(3, 450)
    lefts, tops = rng.random(boxes) * (640 - widths), rng.random(boxes) * (480 - heights)
    crowds = rng.random(boxes) < 0.01
    table = np.column_stack([lefts, tops, widths, heights]).round(2).tolist()
    for number, box in enumerate(table):
        yield (
            f'{{"segmentation": {outlines[number % 500]}, "area": {0.6 * box[2] * box[3]:.4f}, '
            f'"iscrowd": {int(crowds[number])}, "image_id": {owners[number]}, "bbox": {box}, '
            f'"category_id": {classes[number]}, "id": {number + 1}}}'
        )


# --- ImageNet


def _write_imagenet(folder: Path, keys: list[str], scale: Scale, photographs: list[Path]) -> None:
    """Write one folder for each class: those of the tree, then others that it does not know."""
    shared = folder.parent / "shared_images"
    shared.mkdir()
    names = (f"n00000000_{number}.JPEG" for number in range(scale.images_per_folder))
    _link(photographs, (shared / name for name in names))
    folder.mkdir()
    others = (f"n{20_000_000 + number:08d}" for number in range(scale.folders))
    for key in [*keys, *others][: scale.folders]:
        (folder / key).symlink_to("../shared_images", target_is_directory=True)
