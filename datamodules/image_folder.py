"""Image labels from one folder per class, or from a table of paths and labels."""

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from yolo_lightning.datamodules.annotations import build_label_index
from yolo_lightning.datamodules.files import (
    FolderListing,
    LabelledImages,
    iter_images,
    require_file,
    require_folder,
    resolve_inside,
)
from yolo_lightning.datamodules.index import Index
from yolo_lightning.errors import InputError
from yolo_lightning.images import IMAGE_SUFFIXES

_HEADERS = ("path", "image", "file", "filename", "file_name", "image_path", "imageid")


class ImageFolder(LabelledImages):
    """Images in ``root/<class>/``, at any depth below it; a class is a key or a name of the tree.

    Args:
        root: the folder with one folder per class.
        mapping: nodes by folder name, if the tree has other names.
    """

    def __init__(self, root: str, mapping: dict[str, str] | None = None) -> None:
        super().__init__(mapping)
        self.root = root
        self.name = f"image folder {root}"

    def _cache_key(self) -> tuple[Path, dict[str, Any]]:
        return require_folder(self.root, "image folder"), {}

    def _parse(self) -> Index:
        root = require_folder(self.root, "image folder").absolute()
        folders = sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))
        if not folders:
            raise InputError(f"image folder: {self.root!r} contains no class folders")
        images: list[str] = []
        labels: list[str] = []
        faults: list[str] = []
        watched: list[Path] = [root]
        for folder in folders:
            files = list(iter_images(folder, watched))
            if not files:
                faults.append(f"{folder}: no images")
            images.extend(os.path.relpath(file, root) for file in files)
            labels.extend([folder.name] * len(files))
        if not images:
            raise InputError(f"image folder: {self.root!r} contains no images {IMAGE_SUFFIXES}")
        origins = {name: f"image folder {root / name}" for name in dict.fromkeys(labels)}
        return build_label_index(root, images, labels, origins, faults, watched)


class LabelCSV(LabelledImages):
    """A table of image paths and labels; a header such as ``path,label`` is skipped.

    Args:
        file: the table; columns are separated by commas, semicolons or tabs.
        root: folder that the paths are relative to; by default the table's own.
        mapping: nodes by label, if the tree has other names.
        allow_outside: whether paths may lead out of that folder.
    """

    def __init__(
        self,
        file: str,
        root: str | None = None,
        mapping: dict[str, str] | None = None,
        allow_outside: bool = False,
    ) -> None:
        super().__init__(mapping)
        self.file, self.root, self.allow_outside = file, root, allow_outside
        self.name = f"table {file}"

    def _cache_key(self) -> tuple[Path, dict[str, Any]]:
        file = require_file(self.file, "table of labels").absolute()
        root = str(Path(self.root).expanduser().absolute()) if self.root is not None else None
        return file.parent, {"file": file.name, "root": root, "outside": self.allow_outside}

    def _parse(self) -> Index:
        file = require_file(self.file, "table of labels").absolute()
        root = require_folder(self.root or file.parent, "folder of images").absolute()
        images: list[str] = []
        labels: list[str] = []
        origins: dict[str, str] = {}
        faults: list[str] = []
        listing = FolderListing()
        for number, (path, label) in _read_rows(file):
            location = f"{file}:{number}"
            image = resolve_inside(path, root, self.allow_outside, location)
            if not listing.exists(root / image):
                # tables of competitions omit the suffix
                name = listing.find_image((root / image).parent, Path(image).name)
                image = image if name is None else str(Path(image).with_name(name))
            if not listing.exists(root / image):
                faults.append(f"{location}: {image} is missing, skipped")
                continue
            origins.setdefault(label, location)
            images.append(image)
            labels.append(label)
        watched = [file, *listing.folders]
        return build_label_index(root, images, labels, origins, faults, watched)


def _read_rows(file: Path) -> Iterator[tuple[int, tuple[str, str]]]:
    """Yield line numbers, and paths with their labels."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text ({error})") from None
    first = lines[0] if lines else ""
    delimiter = next((d for d in ("\t", ";") if d in first), ",")
    for number, row in enumerate(csv.reader(lines, delimiter=delimiter), start=1):
        if not row or (number == 1 and row[0].strip().lower() in _HEADERS):
            continue
        if len(row) < 2 or not row[0].strip() or not row[1].strip():
            raise InputError(
                f"{file}:{number}: expected path{delimiter}label; found {delimiter.join(row)!r}"
            )
        yield number, (row[0].strip(), row[1].strip())
