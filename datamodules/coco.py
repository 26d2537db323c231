"""Boxes from COCO's JSON."""

import gc
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yolo_lightning.datamodules.annotated import AnnotatedImages, Annotations, Raw, finish
from yolo_lightning.datamodules.index import Parsed
from yolo_lightning.datamodules.listing import Listing, inside
from yolo_lightning.datamodules.source import existing_file, existing_folder
from yolo_lightning.errors import InputError


class COCOJson(AnnotatedImages):
    """An annotation file in COCO's format and its images.

    Categories are labels by name; their ids, which have gaps in COCO itself, are never used as
    labels. Regions of a crowd are left out of training and count as COCO's evaluation counts them;
    the areas of the outlines decide there which objects are small, medium, large.

    Args:
        annotations: the file, such as ``annotations/instances_train2017.json``.
        images: folder of the images; by default the one among the usual ones that holds them
            (beside the file, ``images``, ``train2017``).
        mapping: nodes by category name, where these are called otherwise in the tree.
        allow_outside: whether ``file_name`` may lead out of the folder of images.

    Raises:
        InputError: on `bind`: a missing or malformed file, no images, a category that has boxes and
            is not in the tree.
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

    def _key(self) -> tuple[Path, dict[str, Any]]:
        self._file = existing_file(self.annotations, "COCO annotations").absolute()
        images = (
            existing_folder(self.images, "COCO images").absolute()
            if self.images is not None
            else ""
        )
        return self._file.parent, {
            "file": self._file.name,
            "images": str(images),
            "outside": self.allow_outside,
        }

    def _parse(self) -> Parsed:
        """Read the file; what it says twice or about nothing is skipped and named."""
        collecting = gc.isenabled()
        gc.disable()  # millions of objects come at once and none goes: looking for rings is in vain
        try:
            return self._collect(_read(self._file))
        except TypeError as error:  # a list or a dict where an id belongs
            raise InputError(f"{self._file}: not a COCO annotation file ({error})") from None
        finally:
            if collecting:
                gc.enable()

    def _collect(self, data: dict[str, Any]) -> Parsed:
        listing = Listing()
        root = (
            Path(self.images).expanduser().absolute()
            if self.images is not None
            else _images_beside(self._file, data, listing)
        )
        faults: list[str] = []
        images, places = self._usable_images(data, root, listing, faults)
        category_names = {item["id"]: str(item["name"]) for item in data["categories"]}
        known = self._usable_annotations(data, places, category_names, faults)
        about = Annotations(
            root, lambda image, number: f"{self._file}: annotation {number} ({images[image][0]})"
        )
        about.faults = faults
        # two categories of one name are one class
        about.names = {name: k for k, name in enumerate(dict.fromkeys(category_names.values()))}
        about.origins = [str(self._file)] * len(about.names)
        classes = {number: about.names[name] for number, name in category_names.items()}
        numbers = [item.get("id") for item in known]
        image_of = np.array([places[item["image_id"]] for item in known], np.int64)
        order = np.argsort(image_of, kind="stable")
        raw = Raw(
            [name for name, _, _ in images],
            np.array([size for _, *size in images], np.int32).reshape(-1, 2),
            image_of[order],
            _corners(known)[order],
            np.array([classes[item["category_id"]] for item in known], np.int32)[order],
            np.array(
                [n if isinstance(n, int) and abs(n) < 2**63 else 0 for n in numbers], np.int64
            )[order],
            np.zeros(len(known), np.bool_),
            np.array([bool(item.get("iscrowd")) for item in known], np.bool_)[order],
            np.array([_area(item.get("area")) for item in known], np.float32)[order],
        )
        return finish(raw, about, [self._file, *listing.folders])

    def _usable_annotations(
        self,
        data: dict[str, Any],
        places: dict[Any, int],
        categories: dict[Any, str],
        faults: list[str],
    ) -> list[dict[str, Any]]:
        """Return the annotations of known images and categories."""
        found = [item for item in data["annotations"] if item.get("image_id") in places]
        if len(found) < len(data["annotations"]):
            listed = {item.get("id") for item in data["images"]}
            faults += [
                f"{self._file}: annotation {item.get('id')} belongs to no image "
                f"({item.get('image_id')!r}), skipped"
                for item in data["annotations"]
                if item.get("image_id") not in listed
            ]
        known = [item for item in found if item.get("category_id") in categories]
        if len(known) < len(found):
            faults += [
                f"{self._file}: annotation {item.get('id')} has the unknown category "
                f"{item.get('category_id')}, skipped"
                for item in found
                if item.get("category_id") not in categories
            ]
        return known

    def _usable_images(
        self, data: dict[str, Any], root: Path, listing: Listing, faults: list[str]
    ) -> tuple[list[tuple[str, int, int]], dict[Any, int]]:
        """Return name, width and height of the images that are there, and their places by id."""
        images: list[tuple[str, int, int]] = []
        places: dict[Any, int] = {}
        for item in data["images"]:
            where = f"{self._file}: image {item.get('id')}"
            name = item.get("file_name")
            if not isinstance(name, str) or "id" not in item:
                faults.append(f"{where} has no id or no file_name, skipped")
                continue
            if item["id"] in places:
                faults.append(f"{where} stands there twice, one skipped")
                continue
            path = inside(name, root, self.allow_outside, where)
            if not listing.has(root / path):
                faults.append(f"{where}: {root / path} is missing, skipped")
                continue
            places[item["id"]] = len(images)
            images.append((path, _length(item.get("width")), _length(item.get("height"))))
        return images, places


def _images_beside(file: Path, data: dict[str, Any], listing: Listing) -> Path:
    """Return the usual folder that holds the images of an annotation file."""
    name = file.stem.removeprefix("instances_")
    above = file.parent.parent
    places = [file.parent, file.parent / "images", above / name, above / "images" / name,
              above / "images", above]  # fmt: skip
    wanted = [item.get("file_name") for item in data["images"][:20]]
    # an absolute path is found from anywhere; it tells of no folder unless all are such
    wanted = [w for w in wanted if isinstance(w, str) and not os.path.isabs(w)] or wanted
    for place in places:
        if any(isinstance(w, str) and listing.has(place / w) for w in wanted):
            return place
    looked = ", ".join(str(place) for place in places)
    raise InputError(f"{file}: its images are in none of {looked}; name their folder: images: …")


def _read(file: Path) -> dict[str, Any]:
    """Return the file's content, checked as far as everything else relies on it."""
    try:
        data = json.loads(file.read_bytes())
        lists = all(
            isinstance(item, dict)
            for name in ("images", "annotations", "categories")
            for item in data[name]
        )
        if not lists or not all("id" in c and "name" in c for c in data["categories"]):
            raise TypeError("lists of images, annotations and categories with id and name expected")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{file}: not a COCO annotation file ({error!r})") from None
    return data  # type: ignore[no-any-return]


def _corners(annotations: list[dict[str, Any]]) -> NDArray[np.float32]:
    """Return boxes as corners, px; NaN where an annotation has no box of four numbers."""
    found = [item.get("bbox") for item in annotations]
    try:
        boxes = np.array(found, np.float64).reshape(len(found), 4)
    except (TypeError, ValueError):
        boxes = np.array([_four(box) for box in found], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes.astype(np.float32)


def _four(box: Any) -> list[float]:
    try:
        values = [float(v) for v in box]
    except (TypeError, ValueError):
        values = []
    return values if len(values) == 4 else [np.nan] * 4


def _area(value: Any) -> float:
    """Return the area of an outline, square px; 0, the box's own, where it is none."""
    return float(value) if isinstance(value, int | float) and 0 < value < 1e10 else 0.0


def _length(value: Any) -> int:
    return value if isinstance(value, int) and 0 < value < 2**31 else 0


def is_coco(path: str | os.PathLike[str]) -> bool:
    """Tell whether a file looks like COCO annotations."""
    file = Path(path)
    if file.suffix != ".json" or not file.is_file():
        return False
    try:
        return {"images", "annotations", "categories"} <= set(json.loads(file.read_bytes()))
    except (ValueError, TypeError):
        return False
