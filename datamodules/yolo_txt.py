"""Boxes from Darknet's and Ultralytics' text files: one line per object, relative to the image."""

import contextlib
import os
import re
from pathlib import Path
from typing import Any

import yaml

from yolo_lightning.datamodules.annotations import Annotations
from yolo_lightning.datamodules.dataset_files import (
    ALLOW_OUTSIDE,
    DatasetFiles,
    UnsafePath,
    is_below,
    missing_split,
    resolve_inside,
)
from yolo_lightning.datamodules.files import AnnotatedImages
from yolo_lightning.datamodules.index import Index
from yolo_lightning.datamodules.yolo_lines import LineChecks, add_lines
from yolo_lightning.errors import (
    InputError,
    compose_yaml,
    expand,
    read_text,
    require_name,
    require_path,
    short,
)
from yolo_lightning.images import is_image

_SPLITS = ("train", "val", "valid", "test")
_NAME_FILES = ("classes.txt", "obj.names", "_darknet.labels", "*.names")
_DESCRIPTIONS = ("data.yaml", "dataset.yaml", "data.yml", "config.yaml", "*.yaml", "*.yml")
_MAX_CLASSES = 100_000
_NULLS = ("", "~", "null", "Null", "NULL")  # what YAML means by no value


class YOLOText(AnnotatedImages):
    """Images with a text file each: ``class centre_x centre_y width height``, 0 … 1 of the image.

    Polygons (``class x1 y1 x2 y2 x3 y3 …``) become boxes. A missing or empty text file means no
    objects. Text files lie beside their images, or in a ``labels`` folder that mirrors ``images``.

    Args:
        root: Ultralytics' ``data.yaml``, Darknet's ``.data``, a list of image paths (``.txt``), or
            a folder with ``images`` and ``labels``.
        split: which of the lists or folders in `root`.
        names: the classes: a file with one name per line, in `root` or elsewhere, or a list; by
            default those of `root`.
        mapping: nodes by class name, if the tree has other names.
        allow_outside: whether texts (of names, lists, boxes) and listed images may lie outside the
            dataset's folder. Folders of images that ``data.yaml`` names beside it, such as
            ``../train/images``, always may.
        exclusive_names: whether a box has the one name that fits best, so that a name means no
            other of these names below it in the tree; false if coarse and fine names are mixed.
        only: a text file that lists the images to use, one path a line; see `AnnotatedImages`.
        without: a text file that lists the images to leave out.
    """

    def __init__(
        self,
        root: str,
        split: str = "train",
        names: str | list[str] | None = None,
        mapping: dict[str, str] | None = None,
        allow_outside: bool = False,
        exclusive_names: bool = True,
        only: str | None = None,
        without: str | None = None,
    ) -> None:
        super().__init__(mapping, exclusive_names, only, without)
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
            root,
            lambda image, line: f"{label_files[image]}:{line}",
            normalized=True,
            allow_outside=self.allow_outside,
        )
        path = require_path(self.root, "YOLO dataset").absolute()
        annotations.watched.append(path)
        annotations.allow(os.path.realpath(path))
        description = _read_description(path, annotations)
        names = self._class_names(description, annotations)
        checks = LineChecks()
        for image in self._list_images(path, description, annotations):
            file = _label_file(root / image, annotations)
            label_files.append(file)
            row = annotations.add_image(image)
            if annotations.exists(file):
                add_lines(annotations, row, file, names, checks)
            else:
                annotations.faults.append(
                    f"{file}: no such file, {image} is treated as having no objects"
                )
        checks.report(self.name, names, annotations.faults)
        return annotations.build_index()

    def _class_names(self, description: dict[str, Any], annotations: Annotations) -> list[str]:
        root, origin = annotations.root, self.name
        names: Any = self.names if self.names is not None else description.get("names")
        if names is None:
            # LabelImg writes it beside the texts
            folders = (
                root,
                root / "labels",
                root / "labels" / self.split,
                root / self.split / "labels",
            )
            files = (f for d in folders for name in _NAME_FILES for f in sorted(d.glob(name)))
            names = next((str(file) for file in files if file.is_file()), None)
        if names is None and (file := find_description(root, self.allow_outside)):
            names = _read_description(file, annotations).get("names")
        if isinstance(names, str):
            candidates = [*(root / path for path in _variants(names)), expand(names)]
            file = next((file for file in candidates if os.path.exists(file)), None)
            if file is None:
                raise InputError(f"{self.name}: file of names {short(names)} not found")
            origin = str(file)
            names = [line.strip() for line in annotations.read_lines(file) if line.strip()]
        if isinstance(names, dict):
            numbers = [str(key) for key in names]
            wrong = [k for k in numbers if not re.fullmatch(r"\d{1,5}", k)]
            if wrong:
                raise InputError(
                    f"{self.name}: names must be numbered 0, 1, …, up to {_MAX_CLASSES - 1}; "
                    f"found {short(wrong[0])}"
                )
            by_number = dict(zip(map(int, numbers), names.values(), strict=True))
            names = [by_number.get(k, k) for k in range(max(by_number, default=-1) + 1)]
        if not isinstance(names, list) or not names:
            raise InputError(
                f"{self.name}: no names of classes; set names: [..] (init: --names), or add one "
                f"of {', '.join(_NAME_FILES)}, data.yaml"
            )
        nested = [name for name in names if isinstance(name, dict | list)]
        if nested or len(names) > _MAX_CLASSES:
            problem = f"the name {short(nested[0])}" if nested else f"{len(names):,} names"
            raise InputError(f"{origin}: {problem}; allowed: up to {_MAX_CLASSES:,} texts")
        return [require_name(str(name), origin) for name in names]

    def _list_images(
        self, path: Path, description: dict[str, Any], annotations: Annotations
    ) -> list[str]:
        """Return the images of the split, relative to the dataset's folder if they lie in it."""
        root = annotations.root
        sources, roots = [path], [root]
        if description:
            sources, roots = self._described_sources(description, annotations)
        elif path.is_dir():
            sources = [self._split_folder(path)]
        images: list[str] = []
        for source in sources:
            if source.is_dir():
                files = filter(is_image, annotations.walk(source))
                images += [str(file).removeprefix(os.path.join(root, "")) for file in files]
            else:
                images += self._read_list(source, roots, annotations)
        return images

    def list_images(self) -> list[str]:
        """Return the images of the split; no text with boxes is read.

        Raises:
            InputError: what the dataset names is not found, or lies outside of it.
        """
        path = require_path(self.root, "YOLO dataset").absolute()
        root = path if path.is_dir() else path.parent
        annotations = Annotations(root, lambda *_: "", allow_outside=self.allow_outside)
        annotations.allow(os.path.realpath(path))
        return self._list_images(path, _read_description(path, annotations), annotations)

    def _described_sources(
        self, description: dict[str, Any], annotations: Annotations
    ) -> tuple[list[Path], list[Path]]:
        """Return the split's files and folders, and the folders that its images may lie in."""
        root, alternative = annotations.root, "valid" if self.split == "val" else ""
        value = description.get(self.split, description.get(alternative))
        if not value:
            splits = [name for name in description if name in _SPLITS]
            raise missing_split(self.name, self.split, splits)
        paths, base = value if isinstance(value, list) else [value], description.get("path", "")
        for path in (*paths, base):
            if not isinstance(path, str):
                raise InputError(f"{self.name}: path {short(path)}; allowed: text")
        bases = [root / expand(base), Path.cwd() / base, root, Path.cwd()]
        sources = []
        for path in paths:
            candidates = [base / p for base in bases for p in _variants(path)]
            existing = next((c for c in candidates if os.path.exists(c)), None)
            if existing is None:
                raise InputError(
                    f"{self.name}: {short(path)} not found, neither below {short(str(bases[0]))} "
                    f"nor {short(str(bases[1]))}"
                )
            if existing.is_dir():
                self._allow_beside(existing, annotations)
            sources.append(existing)
        return sources, [root, next((base for base in bases if os.path.isdir(base)), root)]

    def _allow_beside(self, folder: Path, annotations: Annotations) -> None:
        """Allow the texts of a folder of images; it lies in the dataset's folder, or beside it."""
        folder = Path(os.path.normpath(folder))
        root = Path(os.path.normpath(annotations.root))
        if self.allow_outside or folder == root or is_below(folder, root):
            return
        if root.parent == root.parent.parent or not is_below(folder, root.parent):
            raise UnsafePath(
                f"{self.name}: {folder} is neither in the dataset's folder nor beside it; "
                f"{ALLOW_OUTSIDE}"
            )
        parts = folder.parts
        end = len(parts) - 1 - parts[::-1].index("images") if "images" in parts else len(parts) - 1
        base = os.path.realpath(Path(*parts[:end]))
        for name in (parts[end], "labels"):  # texts beside the images, or in a mirrored folder
            annotations.allow(os.path.join(base, name, *parts[end + 1 :]))

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
        for number, line in enumerate(annotations.read_list(file), start=1):
            text = line.strip()
            if not text:
                continue
            resolve_inside(text, folder, True, f"{file}:{number}")
            bases = [file.parent] if text.startswith("./") else [*roots, Path.cwd()]
            candidates = [
                Path(os.path.normpath(base / path)) for base in bases for path in _variants(text)
            ]
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


def _variants(path: str) -> tuple[str, ...]:
    """Return a path, also without the ``../`` and ``data/`` that tools write too many."""
    return path, path.removeprefix("../"), path.removeprefix("data/")


def find_description(folder: Path, allow_outside: bool = False) -> Path | None:
    """Return the ``data.yaml`` of a folder, whatever its name: the first one with names."""
    files = DatasetFiles(folder, allow_outside)
    for file in (file for name in _DESCRIPTIONS for file in sorted(folder.glob(name))):
        with contextlib.suppress(InputError):  # not YAML, or a link that leads out of the folder
            files.require_inside(file)
            if "names" in _read_description(file, files):
                return file
    return None


def _read_description(path: Path, annotations: DatasetFiles) -> dict[str, Any]:
    """Return the content of a ``data.yaml`` or ``.data`` file; nothing for other paths."""
    if path.suffix not in (".data", ".yaml", ".yml"):
        return {}
    annotations.watched.append(path)
    text = read_text(path, "YOLO dataset")
    if path.suffix == ".data":
        rows = (line.split("=", 1) for line in text.splitlines() if "=" in line)
        return {key.strip(): value.strip() for key, value in rows}
    content = _plain(compose_yaml(text, path), path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected lines such as train: images/train")
    return {key: value for key, value in content.items() if value not in _NULLS}


def _plain(node: yaml.Node | None, path: Path) -> Any:
    """Return YAML as lists, mappings and texts: a class may be called ``no``, or ``1.0``."""
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, path) for item in node.value]
    if not isinstance(node, yaml.MappingNode):
        return node.value if node is not None else None
    content: dict[str, Any] = {}
    for key, value in node.value:
        where = f"{path}:{key.start_mark.line + 1}: {short(key.value)}"
        if not isinstance(key, yaml.ScalarNode):
            raise InputError(f"{where} is no key; allowed: text")
        if key.value in content:
            raise InputError(f"{where} is set twice; remove one line")
        content[key.value] = _plain(value, path)
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
