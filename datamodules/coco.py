"""Boxes from annotation files in COCO's JSON format."""

import gc
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from yolo_lightning.datamodules.annotations import Annotations
from yolo_lightning.datamodules.dataset_files import (
    DatasetFiles,
    UnsafePath,
    base_name,
    resolve_inside,
)
from yolo_lightning.datamodules.files import AnnotatedImages
from yolo_lightning.datamodules.index import Index
from yolo_lightning.errors import (
    MAX_ANNOTATION_BYTES,
    InputError,
    read_text,
    require_file,
    require_folder,
    short,
)

ID = int | str

_UPLOAD = re.compile(r"\A[0-9a-f]{8}-")  # which Label Studio puts before the names of files
_NOUNS = {"images": "image", "annotations": "annotation", "categories": "category"}


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
        only: a text file that lists the images to use, one path a line; see `AnnotatedImages`.
        without: a text file that lists the images to leave out.
    """

    def __init__(
        self,
        annotations: str,
        images: str | None = None,
        mapping: dict[str, str] | None = None,
        allow_outside: bool = False,
        exclusive_names: bool = True,
        only: str | None = None,
        without: str | None = None,
    ) -> None:
        super().__init__(mapping, exclusive_names, only, without)
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
            return self._build_index(file, load(file))
        finally:
            if collecting:
                gc.enable()

    def _build_index(self, file: Path, data: Any) -> Index:
        images, *_ = (_list_of(file, data, key) for key in _NOUNS)
        root = (
            _find_image_folder(file, images)
            if self.images is None
            else require_folder(self.images, "COCO images").absolute()
        )
        annotations = Annotations(
            root,
            lambda image, number: f"{file}: annotation {number} ({annotations.paths[image]})",
            allow_outside=self.allow_outside,
        )
        annotations.watched.append(file)
        categories = _names_by_id(file, data, annotations.faults)
        for name in categories.values():  # categories of the same name are one class
            annotations.add_class(name, str(file))
        rows = self._add_images(file, data, annotations)
        for location, item in _items(file, data, "annotations", annotations.faults):
            image, category = _id(item.get("image_id")), _id(item.get("category_id"))
            if image not in rows:
                image = short(item.get("image_id"))
                annotations.faults.append(f"{location} belongs to no image ({image}), skipped")
                continue
            row = rows[image]
            if row is None:
                continue  # its image is missing, which is reported already
            if category not in categories:
                category = short(item.get("category_id"))
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
        self, file: Path, data: Any, annotations: Annotations
    ) -> dict[ID | None, int | None]:
        """Add the images that exist; return numbers by id, None for those that are missing."""
        rows: dict[ID | None, int | None] = {}
        found: set[str] = set()
        for location, item in _items(file, data, "images", annotations.faults):
            key, name = _id(item.get("id")), item.get("file_name")
            if not isinstance(name, str) or key is None:
                annotations.faults.append(f"{location} has no id or no file_name, skipped")
                if key is not None:
                    rows.setdefault(key, None)
                continue
            if rows.get(key) is not None:
                annotations.faults.append(f"{location} is listed twice, one skipped")
                continue
            path = _find_image(name, annotations, location)
            if path is not None and path != name and path in found:
                fault = f"is that of another image too, as {name!r} is missing, skipped"
                annotations.faults.append(f"{location}: {annotations.root / path} {fault}")
                rows[key] = None
            elif path is not None:
                found.add(path)
                width, height = (_whole(item.get(side)) for side in ("width", "height"))
                rows[key] = annotations.add_image(path, width, height, location)
            else:
                missing = annotations.root / name
                annotations.faults.append(f"{location}: {missing} is missing, skipped")
                rows[key] = None
        return rows


def count_names(file: Path) -> Counter[str]:
    """Return the number of annotations by category; no image is needed.

    Raises:
        InputError: not COCO annotations.
    """
    data, faults = load(file), list[str]()
    names = _names_by_id(file, data, faults)
    counts = Counter(dict.fromkeys(names.values(), 0))
    for _, item in _items(file, data, "annotations", faults) if "annotations" in data else ():
        category = _id(item.get("category_id"))
        if category in names:
            counts[names[category]] += 1
    return counts


def _names_by_id(file: Path, data: Any, faults: list[str]) -> dict[ID | None, str]:
    names: dict[ID | None, str] = {}
    for location, item in _items(file, data, "categories", faults):
        key, name = _id(item.get("id")), item.get("name")
        if key is None or not isinstance(name, str | int | float):
            faults.append(f"{location} has no id or no name ({short(name)}), skipped")
        elif key in names:
            faults.append(f"{location} is listed twice, one skipped")
        else:
            names[key] = str(name)
    return names


def _list_of(file: Path, data: Any, key: str) -> list[Any]:
    items = data.get(key) if isinstance(data, dict) else None
    if not isinstance(items, list):
        raise InputError(f"{file}: not a COCO annotation file (no list {key!r})")
    return items


def _items(
    file: Path, data: Any, key: str, faults: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place of each entry of a list, for messages, and its values."""
    noun = _NOUNS[key]
    for item in _list_of(file, data, key):
        if isinstance(item, dict):
            number = item.get("id")
            yield f"{file}: {noun} {number if type(number) is int else short(number)}", item
        else:
            faults.append(f"{file}: {noun} {short(item)} is not an object, skipped")


def _find_image(name: str, files: DatasetFiles, location: str) -> str | None:
    """Return the path of an image, also if a tool has put other folders or a hash before it."""
    unsafe, path = None, name
    try:
        path = resolve_inside(name, files.root, files.allow_outside, location)
    except UnsafePath as error:
        unsafe = error
    candidates = [path, *_shorter_names(name)] if unsafe is None else _shorter_names(name)
    found = next((c for c in candidates if files.exists(files.root / c)), None)
    if found is None and unsafe is not None:
        raise unsafe
    return found


def _shorter_names(name: str) -> list[str]:
    """Return the name of a file without its folders, and without the hash of an upload too."""
    base = base_name(name)
    return [name for name in (base, _UPLOAD.sub("", base)) if name]


def _find_image_folder(file: Path, items: list[Any]) -> Path:
    name = file.stem.removeprefix("instances_")
    parent = file.parent.parent
    folders = [file.parent, file.parent / "images", parent / name, parent / "images" / name,
               parent / "images", parent]  # fmt: skip
    values = (item.get("file_name") for item in items[:20] if isinstance(item, dict))
    names = [name for name in values if isinstance(name, str)]
    # an absolute path exists whatever the folder: use such names only if there are no others
    names = [name for name in names if not os.path.isabs(name)] or names
    for candidates in (names, [shorter for name in names for shorter in _shorter_names(name)]):
        for folder in folders:
            if any(os.path.exists(folder / name) for name in candidates):
                return folder
    searched = ", ".join(str(folder) for folder in folders)
    raise InputError(f"{file}: its images are in none of {searched}; set their folder: images: …")


def load(file: Path) -> Any:
    """Return the content of a file without outlines: COCO's take 2 GB, and none is used.

    Raises:
        InputError: not JSON, or too deep.
    """

    def without_outline(item: dict[str, Any]) -> dict[str, Any]:
        item.pop("segmentation", None)
        return item

    text = read_text(file, "COCO annotations", max_bytes=MAX_ANNOTATION_BYTES)
    try:
        return json.loads(text, object_hook=without_outline)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not a COCO annotation file ({error})") from None


def _id(value: Any) -> ID | None:
    """Return an id: text, or an integer of 64 bits; None if it is no id."""
    whole = value if type(value) is int else _whole(value)
    if type(whole) is int:
        return whole if abs(whole) < 2**63 else None
    return whole if isinstance(whole, str) else None


def _whole(value: Any) -> Any:
    """Return a float such as 640.0, which some tools write, as an integer; else the value."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


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


def is_coco(file: Path) -> bool:
    """Return whether a file has the keys of COCO annotations."""
    try:
        data = load(file)
    except InputError:
        return False
    return isinstance(data, dict) and set(_NOUNS) <= set(data)
