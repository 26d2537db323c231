"""Boxes from Darknet's and Ultralytics' text files: one line per object, relative to the image."""

import math
import os
from pathlib import Path
from typing import Any

import yaml

from yolo_lightning.datamodules.annotations import Annotations
from yolo_lightning.datamodules.files import (
    AnnotatedImages,
    FolderListing,
    is_below,
    resolve_inside,
)
from yolo_lightning.datamodules.index import Index
from yolo_lightning.errors import InputError
from yolo_lightning.images import is_image

_SPLITS = ("train", "val", "valid", "test")
_NAME_FILES = ("classes.txt", "obj.names", "_darknet.labels")


class YOLOText(AnnotatedImages):
    """Images with a text file each: ``class centre_x centre_y width height``, 0 … 1 of the image.

    Polygons (``class x1 y1 x2 y2 x3 y3 …``) become boxes. A missing or empty text file means no
    objects. Text files lie beside their images, or in a ``labels`` folder that mirrors ``images``.

    Args:
        root: Ultralytics' ``data.yaml``, Darknet's ``.data``, a list of image paths (``.txt``), or
            a folder with ``images`` and ``labels``.
        split: which of the lists or folders in `root`.
        names: the classes: a file with one name per line, or a list; by default those of `root`.
        mapping: nodes by class name, if the tree has other names.
        allow_outside: whether listed paths may lead out of the dataset's folder.
    """

    def __init__(
        self,
        root: str,
        split: str = "train",
        names: str | list[str] | None = None,
        mapping: dict[str, str] | None = None,
        allow_outside: bool = False,
    ) -> None:
        super().__init__(mapping)
        self.root, self.split, self.names = root, split, names
        self.allow_outside = allow_outside
        self.name = f"YOLO {root} ({split})"

    def _cache_key(self) -> tuple[Path, dict[str, Any]]:
        path = Path(self.root).expanduser().absolute()
        if not path.exists():
            raise InputError(f"YOLO text: {self.root!r} not found (working folder: {Path.cwd()})")
        folder = path if path.is_dir() else path.parent
        return folder, {
            "file": path.name,
            "split": self.split,
            "names": self.names,
            "from": str(Path.cwd()) if path.is_file() else "",  # lists may be relative to it
            "outside": self.allow_outside,
        }

    def _parse(self) -> Index:
        path, listing = Path(self.root).expanduser().absolute(), FolderListing()
        folder = path if path.is_dir() else path.parent
        description = _read_description(path)
        watched = [path]
        names = self._class_names(folder, description, watched)
        label_files: list[Path] = []
        annotations = Annotations(
            folder, lambda image, line: f"{label_files[image]}:{line}", normalized=True
        )
        faults = annotations.faults
        for image in self._list_images(path, folder, description, listing, watched, faults):
            file = _label_file(folder / image, listing)
            label_files.append(file)
            annotations.add_image(image)
            if listing.exists(file):
                watched.append(file)
                _add_lines(annotations, file, names)
            else:
                faults.append(f"{file}: no such file, {image} is treated as having no objects")
        return annotations.build_index([*watched, *listing.folders])

    def _class_names(
        self, folder: Path, description: dict[str, Any], watched: list[Path]
    ) -> list[str]:
        names = self.names if self.names is not None else description.get("names")
        if names is None:
            files = [folder / name for name in _NAME_FILES] + sorted(folder.glob("*.names"))
            names = next((str(file) for file in files if file.is_file()), None)
            if names is None:
                inner = folder / "data.yaml"
                names = _read_description(inner).get("names") if inner.is_file() else None
                watched.append(inner)
        if isinstance(names, str):
            file = Path(names).expanduser()
            file = file if file.is_absolute() or file.is_file() else folder / file
            if not file.is_file():
                raise InputError(f"{self.name}: file of names {names!r} not found")
            watched.append(file)
            lines = file.read_text(encoding="utf-8").splitlines()
            names = [line.strip() for line in lines if line.strip()]
        if isinstance(names, dict):
            try:
                by_number = {int(k): name for k, name in names.items()}
            except (TypeError, ValueError):
                raise InputError(
                    f"{self.name}: names must be numbered 0, 1, …; found {names}"
                ) from None
            names = [by_number.get(k, k) for k in range(max(by_number, default=-1) + 1)]
        if not isinstance(names, list) or not names:
            searched = ", ".join((*_NAME_FILES, "*.names", "data.yaml"))
            raise InputError(
                f"{self.name}: no names of classes; set names: [..], or add one of {searched}"
            )
        return [str(name) for name in names]

    def _list_images(
        self,
        path: Path,
        folder: Path,
        description: dict[str, Any],
        listing: FolderListing,
        watched: list[Path],
        faults: list[str],
    ) -> list[str]:
        """Return the images of the split, relative to the dataset's folder if they lie in it."""
        places, roots = [path], [folder]
        if description:
            places, roots = self._described_places(folder, description)
        elif path.is_dir():
            places = [self._split_folder(path)]
        images: list[str] = []
        for place in places:
            if place.is_dir():
                images += _images_below(place, folder, listing)
            else:
                watched.append(place)
                images += self._read_list(place, roots, listing, faults)
        return images

    def _described_places(
        self, folder: Path, description: dict[str, Any]
    ) -> tuple[list[Path], list[Path]]:
        """Return the split's files and folders, and the folders that its images may lie in."""
        alternative = "valid" if self.split == "val" else ""
        value = description.get(self.split, description.get(alternative))
        if not value:
            raise self._split_error([name for name in description if name in _SPLITS])
        base = Path(description.get("path") or "").expanduser()
        bases = [folder / base, Path.cwd() / base, folder, Path.cwd()]
        root = next((base for base in bases if base.is_dir()), folder)
        paths = value if isinstance(value, list) else [value]
        return [_find_described(str(path), bases, self.name) for path in paths], [folder, root]

    def _split_folder(self, path: Path) -> Path:
        candidates = [path / "images" / self.split, path / self.split / "images", path / "images",
                      path / self.split, path]  # fmt: skip
        folder = next(folder for folder in candidates if folder.is_dir())
        parent = path / "images" if folder == path / "images" else path
        splits = [name for name in _SPLITS if (parent / name).is_dir()]
        if folder in (path, path / "images") and splits:
            raise self._split_error(splits)
        return folder

    def _split_error(self, splits: list[str]) -> InputError:
        return InputError(f"{self.name}: no split {self.split!r}; found: {', '.join(splits)}")

    def _read_list(
        self, file: Path, roots: list[Path], listing: FolderListing, faults: list[str]
    ) -> list[str]:
        """Return the images in a list of paths; the first root is the dataset's folder."""
        folder, images = roots[0], []
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            text = line.strip()
            if not text:
                continue
            bases = [file.parent] if text.startswith("./") else [*roots, Path.cwd()]
            candidates = [Path(os.path.normpath(base / text)) for base in bases]
            path = next((path for path in candidates if listing.exists(path)), candidates[0])
            root = next((root for root in roots if is_below(path, root)), folder)
            image = resolve_inside(str(path), root, self.allow_outside, f"{file}:{number}")
            if root != folder:
                image = str(path)
            if listing.exists(folder / image):
                images.append(image)
            else:
                faults.append(f"{file}:{number}: {image} is missing, skipped")
        return images


def _read_description(path: Path) -> dict[str, Any]:
    """Return the content of a ``data.yaml`` or ``.data`` file; nothing for other paths."""
    if path.suffix == ".data":
        rows = (line.split("=", 1) for line in path.read_text("utf-8").splitlines() if "=" in line)
        content: Any = {key.strip(): value.strip() for key, value in rows}
    elif path.suffix in (".yaml", ".yml"):
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not YAML ({str(error).splitlines()[0]})") from None
    else:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected lines such as train: images/train")
    return content


def _find_described(path: str, bases: list[Path], name: str) -> Path:
    """Return an existing file or folder; some tools write one ``../`` too many."""
    for base in bases:
        for text in (path, path.removeprefix("../")):
            if (base / text).exists():
                return base / text
    raise InputError(f"{name}: {path!r} not found, neither below {bases[0]} nor {bases[1]}")


def _images_below(folder: Path, root: Path, listing: FolderListing) -> list[str]:
    """Return the images in a folder and below it, relative to `root` if they lie in it."""
    subfolders = (f for f in folder.rglob("*") if f.is_dir())
    visible = (f for f in subfolders if not any(p[:1] == "." for p in f.relative_to(folder).parts))
    files = (f / name for f in [folder, *sorted(visible)] for name in listing.names(f))
    images = [file for file in files if is_image(file)]
    return [str(f.relative_to(root)) if f.is_relative_to(root) else str(f) for f in images]


def _label_file(image: Path, listing: FolderListing) -> Path:
    """Return the text file of an image: in ``labels`` instead of ``images``, else beside it."""
    parts = list(image.parent.parts)
    beside = image.with_suffix(".txt")
    if "images" not in parts:
        mirrored = image.parent.parent / "labels" / beside.name
        return mirrored if not listing.exists(beside) and listing.exists(mirrored) else beside
    parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    mirrored = Path(*parts) / beside.name
    return beside if listing.exists(beside) and not listing.exists(mirrored) else mirrored


def _add_lines(annotations: Annotations, file: Path, names: list[str]) -> None:
    faults = annotations.faults
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        faults.append(f"{file}: not readable ({error}), its image is treated as having no objects")
        return
    rows = [(number, line.split()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        faults.append(f"{file}: empty, its image is treated as having no objects")
    for number, columns in rows:
        try:
            label = int(float(columns[0]))
            values = [float(column) for column in columns[1:]]
        except (ValueError, OverflowError):
            faults.append(f"{file}:{number}: {' '.join(columns)[:60]!r} is not an object, skipped")
            continue
        if not 0 <= label < len(names):
            faults.append(f"{file}:{number}: class {label}, allowed: 0 … {len(names) - 1}, skipped")
            continue
        annotations.add_box(_parse_box(values), names[label], number)


def _parse_box(values: list[float]) -> list[float]:
    """Return corners, 0 … 1; NaN if the numbers are not a box."""
    if not all(map(math.isfinite, values)):
        return [math.nan] * 4
    if len(values) >= 6 and len(values) % 2 == 0:  # a polygon
        return [min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])]
    if len(values) not in (4, 5):
        return [math.nan] * 4
    x, y, width, height = values[:4]
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
