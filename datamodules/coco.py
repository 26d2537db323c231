"""Boxes from annotation files in COCO's JSON format."""

import gc
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yolo_lightning.datamodules.annotations import AnnotationArrays, Annotations, build_index
from yolo_lightning.datamodules.files import (
    AnnotatedImages,
    FolderListing,
    require_file,
    require_folder,
    resolve_inside,
)
from yolo_lightning.datamodules.index import Index
from yolo_lightning.errors import InputError


class COCOJson(AnnotatedImages):
    """An annotation file in COCO's format and its images.

    Categories are matched by name, not by id. Regions of a crowd are not trained on, and are
    evaluated as in COCO, which also uses the areas of outlines for small, medium and large objects.

    Args:
        annotations: the file, such as ``annotations/instances_train2017.json``.
        images: folder of the images; by default searched near the file, such as in ``train2017``.
        mapping: nodes by category name, if the tree has other names.
        allow_outside: whether ``file_name`` may lead out of the folder of images.
    """

    def __init__(
        self,
        annotations: str,
        images: str | None = None,
        mapping: dict[str, str] | None = None,
        allow_outside: bool = False,
    ) -> None:
        super().__init__(mapping)
        self.annotations, self.images, self.allow_outside = annotations, images, allow_outside
        self.name = f"COCO {annotations}"

    def _cache_key(self) -> tuple[Path, dict[str, Any]]:
        self._file = require_file(self.annotations, "COCO annotations").absolute()
        images = (
            require_folder(self.images, "COCO images").absolute() if self.images is not None else ""
        )
        return self._file.parent, {
            "file": self._file.name,
            "images": str(images),
            "outside": self.allow_outside,
        }

    def _parse(self) -> Index:
        collecting = gc.isenabled()
        gc.disable()  # millions of objects are created and none is freed: collecting is wasted time
        try:
            return self._build_index(_load_json(self._file))
        except TypeError as error:  # a list or a dict where an id belongs
            raise InputError(f"{self._file}: not a COCO annotation file ({error})") from None
        finally:
            if collecting:
                gc.enable()

    def _build_index(self, data: dict[str, Any]) -> Index:
        listing = FolderListing()
        root = (
            Path(self.images).expanduser().absolute()
            if self.images is not None
            else _find_image_folder(self._file, data, listing)
        )
        faults: list[str] = []
        images, image_numbers = self._valid_images(data, root, listing, faults)
        category_names = {item["id"]: str(item["name"]) for item in data["categories"]}
        items = self._valid_annotations(data, image_numbers, category_names, faults)
        annotations = Annotations(
            root, lambda image, number: f"{self._file}: annotation {number} ({images[image][0]})"
        )
        annotations.faults = faults
        # categories of the same name are one class
        unique_names = dict.fromkeys(category_names.values())
        annotations.names = {name: number for number, name in enumerate(unique_names)}
        annotations.origins = [str(self._file)] * len(unique_names)
        classes = {key: annotations.names[name] for key, name in category_names.items()}
        item_images = np.array([image_numbers[item["image_id"]] for item in items], np.int64)
        order = np.argsort(item_images, kind="stable")
        arrays = AnnotationArrays(
            [name for name, _, _ in images],
            np.array([size for _, *size in images], np.int32).reshape(-1, 2),
            item_images[order],
            _corners(items)[order],
            np.array([classes[item["category_id"]] for item in items], np.int32)[order],
            np.array([_int64(item.get("id")) for item in items], np.int64)[order],
            np.zeros(len(items), np.bool_),
            np.array([bool(item.get("iscrowd")) for item in items], np.bool_)[order],
            np.array([_area(item.get("area")) for item in items], np.float32)[order],
        )
        return build_index(arrays, annotations, [self._file, *listing.folders])

    def _valid_annotations(
        self,
        data: dict[str, Any],
        image_numbers: dict[Any, int],
        categories: dict[Any, str],
        faults: list[str],
    ) -> list[dict[str, Any]]:
        of_images = [item for item in data["annotations"] if item.get("image_id") in image_numbers]
        if len(of_images) < len(data["annotations"]):
            listed = {item.get("id") for item in data["images"]}
            faults += [
                f"{self._file}: annotation {item.get('id')} belongs to no image "
                f"({item.get('image_id')!r}), skipped"
                for item in data["annotations"]
                if item.get("image_id") not in listed
            ]
        valid = [item for item in of_images if item.get("category_id") in categories]
        if len(valid) < len(of_images):
            faults += [
                f"{self._file}: annotation {item.get('id')} has the unknown category "
                f"{item.get('category_id')}, skipped"
                for item in of_images
                if item.get("category_id") not in categories
            ]
        return valid

    def _valid_images(
        self, data: dict[str, Any], root: Path, listing: FolderListing, faults: list[str]
    ) -> tuple[list[tuple[str, int, int]], dict[Any, int]]:
        """Return (path, width, height) of the images that exist, and their numbers by id."""
        images: list[tuple[str, int, int]] = []
        numbers: dict[Any, int] = {}
        for item in data["images"]:
            location = f"{self._file}: image {item.get('id')}"
            name = item.get("file_name")
            if not isinstance(name, str) or "id" not in item:
                faults.append(f"{location} has no id or no file_name, skipped")
                continue
            if item["id"] in numbers:
                faults.append(f"{location} is listed twice, one skipped")
                continue
            path = resolve_inside(name, root, self.allow_outside, location)
            if not listing.exists(root / path):
                faults.append(f"{location}: {root / path} is missing, skipped")
                continue
            numbers[item["id"]] = len(images)
            images.append((path, _length(item.get("width")), _length(item.get("height"))))
        return images, numbers


def _find_image_folder(file: Path, data: dict[str, Any], listing: FolderListing) -> Path:
    name = file.stem.removeprefix("instances_")
    parent = file.parent.parent
    folders = [file.parent, file.parent / "images", parent / name, parent / "images" / name,
               parent / "images", parent]  # fmt: skip
    names = [item.get("file_name") for item in data["images"][:20]]
    # an absolute path exists whatever the folder: use such names only if there are no others
    names = [n for n in names if isinstance(n, str) and not os.path.isabs(n)] or names
    for folder in folders:
        if any(isinstance(name, str) and listing.exists(folder / name) for name in names):
            return folder
    searched = ", ".join(str(folder) for folder in folders)
    raise InputError(f"{file}: its images are in none of {searched}; set their folder: images: …")


def _load_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_bytes())
        valid = all(
            isinstance(item, dict)
            for name in ("images", "annotations", "categories")
            for item in data[name]
        )
        if not valid or not all("id" in c and "name" in c for c in data["categories"]):
            raise TypeError("lists of images, annotations and categories with id and name expected")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{file}: not a COCO annotation file ({error!r})") from None
    return data  # type: ignore[no-any-return]


def _corners(items: list[dict[str, Any]]) -> NDArray[np.float32]:
    """Return boxes (N, 4) as corners, px; NaN if a box is not four numbers."""
    values = [item.get("bbox") for item in items]
    try:
        boxes = np.array(values, np.float64).reshape(len(values), 4)
    except (TypeError, ValueError):
        boxes = np.array([_four_floats(box) for box in values], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes.astype(np.float32)


def _four_floats(box: Any) -> list[float]:
    try:
        values = [float(v) for v in box]
    except (TypeError, ValueError):
        values = []
    return values if len(values) == 4 else [np.nan] * 4


def _int64(value: Any) -> int:
    return value if isinstance(value, int) and abs(value) < 2**63 else 0


def _area(value: Any) -> float:
    """Return the area of an outline, square px; 0 if invalid."""
    return float(value) if isinstance(value, int | float) and 0 < value < 1e10 else 0.0


def _length(value: Any) -> int:
    return value if isinstance(value, int) and 0 < value < 2**31 else 0


def is_coco(path: str | os.PathLike[str]) -> bool:
    """Return whether a file has the keys of COCO annotations."""
    file = Path(path)
    if file.suffix != ".json" or not file.is_file():
        return False
    try:
        return {"images", "annotations", "categories"} <= set(json.loads(file.read_bytes()))
    except (ValueError, TypeError):
        return False
