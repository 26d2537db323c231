"""Image labels from one folder per class, or from a table of paths and labels."""

import os
from pathlib import Path
from typing import Any

from yolo_lightning.datamodules.annotations import ImageLabels
from yolo_lightning.datamodules.dataset_files import resolve_inside, visible_folders
from yolo_lightning.datamodules.files import LabelledImages
from yolo_lightning.datamodules.index import Index
from yolo_lightning.errors import InputError, expand, require_file, require_folder
from yolo_lightning.images import IMAGE_SUFFIXES

_HEADERS = ("path", "image", "file", "filename", "file_name", "image_path", "imageid")


class ImageFolder(LabelledImages):
    """Images in ``root/<class>/``, at any depth below it; a class is a key or a name of the tree.

    Args:
        root: the folder with one folder per class.
        mapping: nodes by folder name, if the tree has other names.
        skip_unknown: whether to leave out images whose class is not in the tree.
    """

    def __init__(
        self, root: str, mapping: dict[str, str] | None = None, skip_unknown: bool = False
    ) -> None:
        super().__init__(mapping, skip_unknown)
        self.root = root
        self.name = f"image folder {root}"

    def _cache_key(self) -> tuple[Path, dict[str, Any]]:
        return require_folder(self.root, "image folder").absolute(), {}

    def _parse(self, root: Path) -> Index:
        if not visible_folders(root):
            raise InputError(f"image folder: {self.root!r} contains no class folders")
        labels = ImageLabels(root)
        labels.watched.append(root)
        labels.add_class_folders(root)
        if not len(labels):
            raise InputError(f"image folder: {self.root!r} contains no images {IMAGE_SUFFIXES}")
        return labels.build_index()


class LabelCSV(LabelledImages):
    """A table of image paths and labels; a header such as ``path,label`` is skipped.

    Args:
        file: the table; columns are separated by commas, semicolons or tabs.
        root: folder that the paths are relative to; by default the table's own.
        mapping: nodes by label, if the tree has other names.
        allow_outside: whether paths may lead out of that folder.
        skip_unknown: whether to leave out images whose label is not in the tree.
    """

    def __init__(
        self,
        file: str,
        root: str | None = None,
        mapping: dict[str, str] | None = None,
        allow_outside: bool = False,
        skip_unknown: bool = False,
    ) -> None:
        super().__init__(mapping, skip_unknown)
        self.file, self.root, self.allow_outside = file, root, allow_outside
        self.name = f"table {file}"

    def _cache_key(self) -> tuple[Path, dict[str, Any]]:
        file = require_file(self.file, "table of labels").absolute()
        root = str(expand(self.root).absolute()) if self.root is not None else None
        return file.parent, {"file": file.name, "root": root, "outside": self.allow_outside}

    def _parse(self, root: Path) -> Index:
        file = require_file(self.file, "table of labels").absolute()
        labels = ImageLabels(require_folder(self.root or root, "folder of images").absolute())
        labels.allow(os.path.realpath(file))
        first = "".join(labels.read_list(file)[:1])
        delimiter = next((d for d in ("\t", ";") if d in first), ",")
        for number, row in labels.read_table(file, delimiter):
            cells = [cell.strip() for cell in row]
            if not cells or (number == 1 and cells[0].lower() in _HEADERS):
                continue
            if len(cells) < 2 or not all(cells[:2]):
                # without its text, which may be that of another file
                raise InputError(f"{file}:{number}: expected path{delimiter}label")
            self._add(labels, cells[0], cells[1], f"{file}:{number}")
        return labels.build_index()

    def _add(self, labels: ImageLabels, path: str, label: str, location: str) -> None:
        image = resolve_inside(path, labels.root, self.allow_outside, location)
        if not labels.exists(labels.root / image):
            # tables of competitions omit the suffix
            name = labels.find_image((labels.root / image).parent, Path(image).name)
            if name is None:
                labels.faults.append(f"{location}: {image} is missing, skipped")
                return
            image = str(Path(image).with_name(name))
        labels.add(image, label, location)
