"""Image labels from one folder per class, or from a table of paths and labels."""

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from yolo_lightning.datamodules.index import Parsed
from yolo_lightning.datamodules.labelled import LabelledImages, label_index
from yolo_lightning.datamodules.listing import Listing, inside
from yolo_lightning.datamodules.source import existing_file, existing_folder
from yolo_lightning.errors import InputError
from yolo_lightning.images import IMAGE_SUFFIXES, is_image

_HEADS = ("path", "image", "file", "filename", "file_name", "image_path", "imageid")


class ImageFolder(LabelledImages):
    """Images in ``root/<class>/``, at any depth below it; a class is a key or a name of the tree.

    Args:
        root: the folder that holds one folder per class.
        mapping: nodes by folder name, where these are called otherwise in the tree.

    Raises:
        InputError: on `bind`: no folder, no class folder, no image, or a class that is not in the
            tree.
    """

    def __init__(self, root: str, mapping: dict[str, str] | None = None) -> None:
        super().__init__(mapping)
        self.root = root
        self.name = f"image folder {root}"

    def _key(self) -> tuple[Path, dict[str, Any]]:
        return existing_folder(self.root, "image folder"), {}

    def _parse(self) -> Parsed:
        """List the files of every class folder."""
        root = existing_folder(self.root, "image folder").absolute()
        folders = sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))
        if not folders:
            raise InputError(f"image folder: {self.root!r} holds no class folders")
        images: list[str] = []
        labels: list[str] = []
        faults: list[str] = []
        watched: list[Path] = [root]
        for folder in folders:
            files = list(images_below(folder, watched))
            if not files:
                faults.append(f"{folder}: no images")
            images.extend(os.path.relpath(file, root) for file in files)
            labels.extend([folder.name] * len(files))
        if not images:
            raise InputError(f"image folder: {self.root!r} holds no images {IMAGE_SUFFIXES}")
        origins = {folder.name: f"image folder {folder}" for folder in folders}
        used = {name: origins[name] for name in dict.fromkeys(labels)}
        return label_index(root, images, labels, used, faults, watched)


class LabelCSV(LabelledImages):
    """A table of image paths and labels; a head such as ``path,label`` is recognised.

    Args:
        file: the table; columns are parted by commas, semicolons or tabs.
        root: folder that the paths are relative to; the table's own by default.
        mapping: nodes by label, where these are called otherwise in the tree.
        allow_outside: whether paths may lead out of that folder.

    Raises:
        InputError: on `bind`: a missing file, a line without a path and a label, no images, or a
            label that is not in the tree.
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

    def _key(self) -> tuple[Path, dict[str, Any]]:
        file = existing_file(self.file, "table of labels").absolute()
        root = str(Path(self.root).expanduser().absolute()) if self.root is not None else None
        return file.parent, {"file": file.name, "root": root, "outside": self.allow_outside}

    def _parse(self) -> Parsed:
        """Read the table; images that are missing are skipped and named."""
        file = existing_file(self.file, "table of labels").absolute()
        root = existing_folder(self.root or file.parent, "folder of images").absolute()
        images: list[str] = []
        labels: list[str] = []
        origins: dict[str, str] = {}
        faults: list[str] = []
        listing = Listing()
        for number, (path, label) in _rows(file):
            where = f"{file}:{number}"
            image = inside(path, root, self.allow_outside, where)
            place = root / image
            if not listing.has(place):
                # tables of competitions leave the ending out
                name = listing.image(place.parent, place.name)
                image = image if name is None else str(Path(image).with_name(name))
            if not listing.has(root / image):
                faults.append(f"{where}: {image} is missing, skipped")
                continue
            origins.setdefault(label, where)
            images.append(image)
            labels.append(label)
        return label_index(root, images, labels, origins, faults, [file, *listing.folders])


def _rows(file: Path) -> Iterator[tuple[int, tuple[str, str]]]:
    """Yield line numbers, paths and labels."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text ({error})") from None
    first = lines[0] if lines else ""
    mark = next((mark for mark in ("\t", ";") if mark in first), ",")
    for number, row in enumerate(csv.reader(lines, delimiter=mark), start=1):
        if not row or (number == 1 and row[0].strip().lower() in _HEADS):
            continue
        if len(row) < 2 or not row[0].strip() or not row[1].strip():
            raise InputError(f"{file}:{number}: expected path{mark}label; found {mark.join(row)!r}")
        yield number, (row[0].strip(), row[1].strip())


def images_below(folder: Path, watched: list[Path]) -> Iterator[Path]:
    """Yield the images in a folder and all below it, links followed once; say what was listed."""
    seen: set[str] = set()
    start = os.path.realpath(folder)
    for place, below, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen or (real != start and start.startswith(os.path.join(real, ""))):
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not name.startswith("."))
        watched.append(Path(place))
        for name in sorted(names):
            if not name.startswith(".") and is_image(Path(name)):
                yield Path(place) / name
