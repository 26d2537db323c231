"""Boxes from Darknet's and Ultralytics' text files: one line per object, relative to the image."""

import math
import os
from pathlib import Path
from typing import Any

import yaml

from yolo_lightning.datamodules.annotations import Annotations
from yolo_lightning.datamodules.dataset_files import is_below, missing_split, resolve_inside
from yolo_lightning.datamodules.files import AnnotatedImages
from yolo_lightning.datamodules.index import Index
from yolo_lightning.errors import InputError, require_path
from yolo_lightning.images import is_image

_SPLITS = ("train", "val", "valid", "test")
_NAME_FILES = ("classes.txt", "obj.names", "_darknet.labels", "*.names")


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
        exclusive_names: whether a box has the one name that fits best, so that a name means no
            other of these names below it in the tree; false if coarse and fine names are mixed.
    """

    def __init__(
        self,
        root: str,
        split: str = "train",
        names: str | list[str] | None = None,
        mapping: dict[str, str] | None = None,
        allow_outside: bool = False,
        exclusive_names: bool = True,
    ) -> None:
        super().__init__(mapping, exclusive_names)
        self.root, self.split, self.names = root, split, names
        self.allow_outside = allow_outside
        self.name = f"YOLO {root} ({split})"

    def _cache_key(self) -> tuple[Path, dict[str, Any]]:
        path = require_path(self.root, "YOLO dataset").absolute()
        folder = path if path.is_dir() else path.parent
        return folder, {
            "file": path.name,
            "split": self.split,
            "names": self.names,
            "from": str(Path.cwd()) if path.is_file() else "",  # lists may be relative to it
            "outside": self.allow_outside,
        }

    def _parse(self, root: Path) -> Index:
        label_files: list[Path] = []
        annotations = Annotations(
            root, lambda image, line: f"{label_files[image]}:{line}", normalized=True
        )
        path = require_path(self.root, "YOLO dataset").absolute()
        annotations.watched.append(path)
        description = _read_description(path, annotations)
        names = self._class_names(description, annotations)
        for image in self._list_images(path, description, annotations):
            file = _label_file(root / image, annotations)
            label_files.append(file)
            row = annotations.add_image(image)
            if annotations.exists(file):
                _add_lines(annotations, row, file, names)
            else:
                annotations.faults.append(
                    f"{file}: no such file, {image} is treated as having no objects"
                )
        return annotations.build_index()

    def _class_names(self, description: dict[str, Any], annotations: Annotations) -> list[str]:
        root = annotations.root
        names = self.names if self.names is not None else description.get("names")
        if names is None:
            files = (file for name in _NAME_FILES for file in sorted(root.glob(name)))
            names = next((str(file) for file in files if file.is_file()), None)
        if names is None and (root / "data.yaml").is_file():
            names = _read_description(root / "data.yaml", annotations).get("names")
        if isinstance(names, str):
            file = Path(names).expanduser()
            file = file if file.is_file() else root / file
            if not file.is_file():
                raise InputError(f"{self.name}: file of names {names!r} not found")
            names = [line.strip() for line in annotations.read_lines(file) if line.strip()]
        if isinstance(names, dict):
            try:
                by_number = {int(k): name for k, name in names.items()}
            except (TypeError, ValueError):
                raise InputError(
                    f"{self.name}: names must be numbered 0, 1, …; found {names}"
                ) from None
            names = [by_number.get(k, k) for k in range(max(by_number, default=-1) + 1)]
        if not isinstance(names, list) or not names:
            raise InputError(
                f"{self.name}: no names of classes; set names: [..], or add one of "
                f"{', '.join(_NAME_FILES)}, data.yaml"
            )
        return [str(name) for name in names]

    def _list_images(
        self, path: Path, description: dict[str, Any], annotations: Annotations
    ) -> list[str]:
        """Return the images of the split, relative to the dataset's folder if they lie in it."""
        root = annotations.root
        sources, roots = [path], [root]
        if description:
            sources, roots = self._described_sources(root, description)
        elif path.is_dir():
            sources = [self._split_folder(path)]
        images: list[str] = []
        for source in sources:
            if source.is_dir():
                files = filter(is_image, annotations.walk(source))
                images += [str(f.relative_to(root) if f.is_relative_to(root) else f) for f in files]
            else:
                images += self._read_list(source, roots, annotations)
        return images

    def _described_sources(
        self, root: Path, description: dict[str, Any]
    ) -> tuple[list[Path], list[Path]]:
        """Return the split's files and folders, and the folders that its images may lie in."""
        alternative = "valid" if self.split == "val" else ""
        value = description.get(self.split, description.get(alternative))
        if not value:
            splits = [name for name in description if name in _SPLITS]
            raise missing_split(self.name, self.split, splits)
        base = Path(description.get("path") or "").expanduser()
        bases = [root / base, Path.cwd() / base, root, Path.cwd()]
        paths = [str(path) for path in (value if isinstance(value, list) else [value])]
        sources = []
        for path in paths:  # some tools write one ../ too many
            candidates = [base / p for base in bases for p in (path, path.removeprefix("../"))]
            existing = next((candidate for candidate in candidates if candidate.exists()), None)
            if existing is None:
                raise InputError(
                    f"{self.name}: {path!r} not found, neither below {bases[0]} nor {bases[1]}"
                )
            sources.append(existing)
        return sources, [root, next((base for base in bases if base.is_dir()), root)]

    def _split_folder(self, path: Path) -> Path:
        candidates = [path / "images" / self.split, path / self.split / "images", path / "images",
                      path / self.split, path]  # fmt: skip
        folder = next(folder for folder in candidates if folder.is_dir())
        parent = path / "images" if folder == path / "images" else path
        splits = [name for name in _SPLITS if (parent / name).is_dir()]
        if folder in (path, path / "images") and splits:
            raise missing_split(self.name, self.split, splits)
        return folder

    def _read_list(self, file: Path, roots: list[Path], annotations: Annotations) -> list[str]:
        """Return the images in a list of paths; the first root is the dataset's folder."""
        folder, images = roots[0], []
        for number, line in enumerate(annotations.read_lines(file), start=1):
            text = line.strip()
            if not text:
                continue
            bases = [file.parent] if text.startswith("./") else [*roots, Path.cwd()]
            candidates = [Path(os.path.normpath(base / text)) for base in bases]
            path = next((path for path in candidates if annotations.exists(path)), candidates[0])
            root = next((root for root in roots if is_below(path, root)), folder)
            image = resolve_inside(str(path), root, self.allow_outside, f"{file}:{number}")
            if root != folder:
                image = str(path)
            if annotations.exists(folder / image):
                images.append(image)
            else:
                annotations.faults.append(f"{file}:{number}: {image} is missing, skipped")
        return images


def _read_description(path: Path, annotations: Annotations) -> dict[str, Any]:
    """Return the content of a ``data.yaml`` or ``.data`` file; nothing for other paths."""
    if path.suffix == ".data":
        rows = (line.split("=", 1) for line in annotations.read_lines(path) if "=" in line)
        return {key.strip(): value.strip() for key, value in rows}
    if path.suffix not in (".yaml", ".yml"):
        return {}
    try:
        content = yaml.safe_load("\n".join(annotations.read_lines(path)))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected lines such as train: images/train")
    return content


def _label_file(image: Path, annotations: Annotations) -> Path:
    """Return the text file of an image: in ``labels`` instead of ``images``, else beside it."""
    parts = list(image.parent.parts)
    beside = image.with_suffix(".txt")
    if "images" not in parts:
        mirrored = image.parent.parent / "labels" / beside.name
        use_mirrored = not annotations.exists(beside) and annotations.exists(mirrored)
    else:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
        mirrored = Path(*parts) / beside.name
        use_mirrored = not annotations.exists(beside) or annotations.exists(mirrored)
    return mirrored if use_mirrored else beside


def _add_lines(annotations: Annotations, row: int, file: Path, names: list[str]) -> None:
    faults = annotations.faults
    try:
        lines = annotations.read_lines(file)
    except InputError as error:
        faults.append(f"{error}, its image is treated as having no objects")
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
        if 0 <= label < len(names):
            annotations.add_box(row, _parse_box(values), names[label], number)
        else:
            faults.append(f"{file}:{number}: class {label}, allowed: 0 … {len(names) - 1}, skipped")


def _parse_box(values: list[float]) -> list[float]:
    """Return corners, 0 … 1; NaN if the numbers are not a box."""
    if len(values) >= 6 and len(values) % 2 == 0:  # a polygon
        box = [min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])]
    elif len(values) in (4, 5):
        x, y, width, height = values[:4]
        box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    else:
        box = []
    return box if box and all(map(math.isfinite, values)) else [math.nan] * 4
