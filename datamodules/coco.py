"""Boxes from annotation files in COCO's JSON format."""

import gc
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from yolo_lightning.datamodules.annotations import Annotations
from yolo_lightning.datamodules.dataset_files import resolve_inside
from yolo_lightning.datamodules.files import AnnotatedImages
from yolo_lightning.datamodules.index import Index
from yolo_lightning.errors import InputError, require_file, require_folder


class COCOJson(AnnotatedImages):
    """An annotation file in COCO's format and its images.

    Categories are matched by name, not by id. Regions of a crowd are not trained on, and are
    evaluated as in COCO, which also uses the areas of outlines for small, medium and large objects.

    Args:
        annotations: the file, such as ``annotations/instances_train2017.json``.
        images: folder of the images; by default searched near the file, such as in ``train2017``.
        mapping: nodes by category name, if the tree has other names.
        allow_outside: whether ``file_name`` may lead out of the folder of images.
        exclusive_names: whether a box has the one name that fits best, so that a name means no
            other of these names below it in the tree; false if coarse and fine names are mixed.
    """

    def __init__(
        self,
        annotations: str,
        images: str | None = None,
        mapping: dict[str, str] | None = None,
        allow_outside: bool = False,
        exclusive_names: bool = True,
    ) -> None:
        super().__init__(mapping, exclusive_names)
        self.annotations, self.images, self.allow_outside = annotations, images, allow_outside
        self.name = f"COCO {annotations}"

    def _cache_key(self) -> tuple[Path, dict[str, Any]]:
        file = require_file(self.annotations, "COCO annotations").absolute()
        images = self.images and str(require_folder(self.images, "COCO images").absolute())
        return file.parent, {"file": file.name, "images": images, "outside": self.allow_outside}

    def _parse(self, root: Path) -> Index:
        file = root / Path(self.annotations).name
        collecting = gc.isenabled()
        gc.disable()  # millions of objects are created and none is freed: collecting is wasted time
        try:
            return self._build_index(file, _load(file))
        except InputError:
            raise
        # values of other types than expected, or a structure without the three lists
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{file}: not a COCO annotation file ({error!r})") from None
        finally:
            if collecting:
                gc.enable()

    def _build_index(self, file: Path, data: Any) -> Index:
        categories = {item["id"]: str(item["name"]) for item in data["categories"]}
        images, items = data["images"], data["annotations"]
        root = (
            _find_image_folder(file, images)
            if self.images is None
            else require_folder(self.images, "COCO images").absolute()
        )
        annotations = Annotations(
            root, lambda image, number: f"{file}: annotation {number} ({annotations.paths[image]})"
        )
        annotations.watched.append(file)
        for name in categories.values():  # categories of the same name are one class
            annotations.add_class(name, str(file))
        rows = self._add_images(file, images, annotations)
        for item in items:
            location, image = f"{file}: annotation {item.get('id')}", item.get("image_id")
            category = item.get("category_id")
            if image not in rows:
                annotations.faults.append(f"{location} belongs to no image ({image!r}), skipped")
                continue
            row = rows[image]
            if row is None:
                continue  # its image is missing, which is reported already
            if category not in categories:
                annotations.faults.append(
                    f"{location} has the unknown category {category}, skipped"
                )
                continue
            annotations.add_box(
                row, _corners(item.get("bbox")), categories[category], _int64(item.get("id")),
                crowd=bool(item.get("iscrowd")), area_px2=_area(item.get("area")),
            )  # fmt: skip
        return annotations.build_index()

    def _add_images(
        self, file: Path, items: list[dict[str, Any]], annotations: Annotations
    ) -> dict[Any, int | None]:
        """Add the images that exist; return numbers by id, None for those that are missing."""
        rows: dict[Any, int | None] = {}
        for item in items:
            location, name = f"{file}: image {item.get('id')}", item.get("file_name")
            if not isinstance(name, str) or "id" not in item:
                annotations.faults.append(f"{location} has no id or no file_name, skipped")
                rows.setdefault(item.get("id"), None)
                continue
            if rows.get(item["id"]) is not None:
                annotations.faults.append(f"{location} is listed twice, one skipped")
                continue
            path = resolve_inside(name, annotations.root, self.allow_outside, location)
            if annotations.exists(annotations.root / path):
                size_wh = _length(item.get("width")), _length(item.get("height"))
                rows[item["id"]] = annotations.add_image(path, size_wh)
            else:
                missing = annotations.root / path
                annotations.faults.append(f"{location}: {missing} is missing, skipped")
                rows[item["id"]] = None
        return rows


def _find_image_folder(file: Path, items: list[dict[str, Any]]) -> Path:
    name = file.stem.removeprefix("instances_")
    parent = file.parent.parent
    folders = [file.parent, file.parent / "images", parent / name, parent / "images" / name,
               parent / "images", parent]  # fmt: skip
    names = [n for n in (item.get("file_name") for item in items[:20]) if isinstance(n, str)]
    # an absolute path exists whatever the folder: use such names only if there are no others
    names = [name for name in names if not os.path.isabs(name)] or names
    for folder in folders:
        if any(os.path.exists(folder / name) for name in names):
            return folder
    searched = ", ".join(str(folder) for folder in folders)
    raise InputError(f"{file}: its images are in none of {searched}; set their folder: images: …")


def _load(file: Path) -> Any:
    """Return the content of a file without outlines: COCO's take 2 GB, and none is used."""

    def without_outline(item: dict[str, Any]) -> dict[str, Any]:
        item.pop("segmentation", None)
        return item

    return json.loads(file.read_bytes(), object_hook=without_outline)


def _corners(box: Any) -> list[float]:
    """Return x1, y1, x2, y2 in px; NaN if the box is not four numbers."""
    try:
        x, y, width, height = (float(value) for value in box)
    except (TypeError, ValueError, OverflowError):
        return [np.nan] * 4
    return [x, y, x + width, y + height]


def _int64(value: Any) -> int:
    return value if isinstance(value, int) and abs(value) < 2**63 else 0


def _area(value: Any) -> float:
    """Return the area of an outline, square px; 0 if invalid."""
    return float(value) if isinstance(value, int | float) and 0 < value < 1e10 else 0.0


def _length(value: Any) -> int:
    return value if isinstance(value, int) and 0 < value < 2**31 else 0


def is_coco(file: Path) -> bool:
    """Return whether a file has the keys of COCO annotations."""
    try:
        return {"images", "annotations", "categories"} <= set(_load(file))
    except (OSError, ValueError, TypeError, RecursionError):
        return False
