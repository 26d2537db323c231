"""Boxes from a table: one row per box, with the image, four numbers and the class."""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from yolo_lightning.datamodules.annotations import Annotations
from yolo_lightning.datamodules.dataset_files import (
    SPLITS,
    DatasetFiles,
    base_name,
    resolve_inside,
    table_rows,
    visible_folders,
)
from yolo_lightning.datamodules.files import AnnotatedImages
from yolo_lightning.datamodules.index import Index
from yolo_lightning.errors import InputError, require_file, require_folder

_CORNERS = ("x1", "y1", "x2", "y2")
_BOXES = (_CORNERS, ("x1", "y1", "w", "h"), ("xc", "yc", "w", "h"), ("x", "y", "w", "h"))
_COLUMNS = {  # names of columns in lower case, letters and digits only; the first that is found
    "image": "filename image imagepath path imgpath file imageid imagename img frame imagefile",
    "class": "class label classname name category labelname",
    "x1": "xmin x1 left bboxxmin", "y1": "ymin y1 top bboxymin",
    "x2": "xmax x2 right bboxxmax", "y2": "ymax y2 bottom bboxymax",
    "xc": "xcenter xcentre centerx centrex cx", "yc": "ycenter ycentre centery centrey cy",
    "x": "x bboxx", "y": "y bboxy",
    "w": "w boxwidth bboxwidth bboxw width", "h": "h boxheight bboxheight bboxh height",
    "width": "imagewidth imgwidth width", "height": "imageheight imgheight height",
}  # fmt: skip
_WITHOUT_HEADER = ("image", *_CORNERS, "class")  # as of keras-retinanet
ONLY_CLASS = "object"
"""The class of all boxes of a table without a column of classes."""
WANTED = (
    "a header such as filename,xmin,ymin,xmax,ymax,class or filename,xmin,ymin,width,height,class "
    "or filename,x_center,y_center,width,height,class, or rows of path,x1,y1,x2,y2,class; in px, "
    "or 0 … 1 of the image"
)
_MAX_FOLDERS, _MAX_TRIED = 50, 20  # searched for images; names that are looked for
_MAX_HEADER = 2**16  # characters
_DECIMAL_COMMA = re.compile(r"\A(-?\d*),(\d+)\Z")
_IMAGE_FOLDERS = ("images", "jpegimages", "image", "imgs", "img", *SPLITS)

Row = tuple[int, list[str]]


class BoxCSV(AnnotatedImages):
    """A table of boxes, columns such as ``filename,width,height,class,xmin,ymin,xmax,ymax``.

    The header names the columns, in any order. Without one, rows are ``path,x1,y1,x2,y2,class``.
    Instead of the second corner, there may be the width and the height of the box, beside its first
    corner (``x`` or ``xmin``) or its centre (``x_center``). Values are px, or relative to the image
    if none is above 1. A row of an image with empty cells means no objects. Without a column of
    classes, all boxes are of one class, ``object``.

    Args:
        file: the table; columns are separated by commas, semicolons (and numbers may then have
            decimal commas) or tabs.
        images: folder of the images; by default searched near the table.
        mapping: nodes by class name, if the tree has other names.
        allow_outside: whether paths may lead out of the folder of images.
        exclusive_names: whether a box has the one name that fits best, so that a name means no
            other of these names below it in the tree; false if coarse and fine names are mixed.
        only: a text file that lists the images to use, one path a line; see `AnnotatedImages`.
        without: a text file that lists the images to leave out.
    """

    def __init__(
        self,
        file: str,
        images: str | None = None,
        mapping: dict[str, str] | None = None,
        allow_outside: bool = False,
        exclusive_names: bool = True,
        only: str | None = None,
        without: str | None = None,
    ) -> None:
        super().__init__(mapping, exclusive_names, only, without)
        self.file, self.images, self.allow_outside = file, images, allow_outside
        self.name = f"table {file}"

    def _cache_key(self) -> tuple[Path, dict[str, Any]]:
        file = require_file(self.file, "table of boxes").absolute()
        images = self.images and str(require_folder(self.images, "folder of images").absolute())
        return file.parent, {"file": file.name, "images": images, "outside": self.allow_outside}

    def _parse(self, root: Path) -> Index:
        file = root / Path(self.file).name
        table = DatasetFiles(root, self.allow_outside)
        columns, rows = _split_header(file, list(_read_rows(file, table)))
        names = [cells[columns["image"]] for _, cells in rows[:_MAX_TRIED]]
        folder = (
            _find_image_folder(file, names)
            if self.images is None
            else require_folder(self.images, "folder of images").absolute()
        )
        sides = next(names for names in _BOXES if set(names) <= columns.keys())
        boxes = [[_to_float(cells[columns[side]]) for side in sides] for _, cells in rows]
        finite = [value for box in boxes for value in box if math.isfinite(value)]
        is_relative = max(finite, default=2.0) <= 1
        if is_relative and "x" in columns:
            raise InputError(
                f"{file}:1: x and y, 0 … 1, are a corner or a centre; name the columns xmin and "
                "ymin, or x_center and y_center"
            )
        annotations = Annotations(
            folder,
            lambda image, number: f"{file}:{number}",
            normalized=is_relative,
            allow_outside=self.allow_outside,
        )
        annotations.watched += [*table.watched, root]
        images: dict[str, int | None] = {}
        if "class" not in columns:
            annotations.faults.append(f"{file}:1: no column of classes; all are {ONLY_CLASS!r}")
        for (number, cells), box in zip(rows, boxes, strict=True):
            name = cells[columns["image"]]
            if name not in images:
                location = f"{file}:{number}"
                images[name] = self._add_image(name, cells, columns, annotations, location)
            label = cells[columns["class"]] if "class" in columns else ONLY_CLASS
            row, texts = images[name], [cells[columns[side]] for side in sides]
            if row is None or not any(texts):
                continue  # its image is missing, which is reported; or it has no objects
            if label:
                annotations.add_box(row, _corners(box, sides), label, number)
            else:
                annotations.faults.append(f"{file}:{number}: has no class, skipped")
        return annotations.build_index()

    def _add_image(
        self, name: str, cells: list[str], columns: dict[str, int],
        annotations: Annotations, location: str,
    ) -> int | None:  # fmt: skip
        """Add an image and return its number; None if it is missing, which is reported."""
        path = _find_image(name, annotations, self.allow_outside, location)
        if path is None:
            annotations.faults.append(f"{location}: its image is missing, skipped")
            return None
        sizes = [_to_int(cells[columns[side]]) for side in ("width", "height") if side in columns]
        width, height = sizes if len(sizes) == 2 else (None, None)
        return annotations.add_image(path, width, height, location)

    def column(self, name: str) -> dict[str, str]:
        """Return the value of a column by name of the image, as the table gives it.

        Raises:
            InputError: there is no such column.
        """
        file = require_file(self.file, "table of boxes").absolute()
        rows = list(_read_rows(file, DatasetFiles(file.parent, self.allow_outside)))
        columns, _ = _split_header(file, rows)
        header = [cell.lower() for cell in rows[0][1]]
        if name.lower() not in header:
            raise InputError(f"{file}:1: no column {name!r}")
        number = header.index(name.lower())
        return {Path(cells[columns["image"]]).name: cells[number] for _, cells in rows[1:]}


def is_box_table(file: Path) -> bool:
    """Return whether the first line of a table names, or has, an image and the corners of a box."""
    try:
        if not file.is_file():
            return False
        with open(file, encoding="utf-8-sig", errors="replace") as stream:
            first = stream.readline(_MAX_HEADER)
        _split_header(file, list(_parse_rows([first], file)))
    except (InputError, OSError, ValueError):
        return False
    return True


def _read_rows(file: Path, table: DatasetFiles) -> Iterator[Row]:
    return _parse_rows(table.read_list(file), file)


def _parse_rows(lines: list[str], file: Path) -> Iterator[Row]:
    first = lines[0] if lines else ""
    delimiter = next((d for d in ("\t", ";") if d in first), ",")
    for number, row in table_rows(lines, file, delimiter):
        cells = [cell.strip() for cell in row]
        if delimiter == ";":  # as Excel writes it where 0.5 is 0,5
            cells = [_DECIMAL_COMMA.sub(r"\1.\2", cell) if "," in cell else cell for cell in cells]
        if any(cells):
            yield number, cells


def _split_header(file: Path, rows: list[Row]) -> tuple[dict[str, int], list[Row]]:
    """Return column numbers, and the rows with boxes, each with at least these columns.

    Raises:
        InputError: no column of images, or of corners.
    """
    first = rows[0][1] if rows else []
    words = [re.sub(r"[^a-z0-9]", "", cell.lower()) for cell in first]
    columns = _name_columns(words)
    missing = [name for name in ("image", *_CORNERS) if name not in columns]
    if any(set(names) <= columns.keys() for names in _BOXES):
        missing = [name for name in missing if name == "image"]
    if not missing:
        rows = rows[1:]
    elif len(first) == len(_WITHOUT_HEADER) and all(map(_is_corner, first[1:5])):
        columns = {name: k for k, name in enumerate(_WITHOUT_HEADER)}
    else:  # without its text, which may be that of another file
        found = f", among them those of {', '.join(columns)}" if columns else ""
        raise InputError(
            f"{file}:1: {len(first)} columns{found}; none of {', '.join(missing)}; wanted: {WANTED}"
        )
    width = max(columns.values()) + 1
    return columns, [(n, cells + [""] * (width - len(cells))) for n, cells in rows]


def _name_columns(words: list[str]) -> dict[str, int]:
    """Return the numbers of the columns, of a box those of the first form that is complete."""
    columns: dict[str, int] = {}
    for name, aliases in _COLUMNS.items():
        found = [words.index(alias) for alias in aliases.split() if alias in words]
        columns |= {name: found[0]} if found else {}
    sides = next((names for names in _BOXES if set(names) <= columns.keys()), _CORNERS)
    unused = {name for names in _BOXES for name in names} - {*sides}
    if "w" in sides:  # `width` is that of the box, unless there is another column for it
        pairs = (("width", "w"), ("height", "h"))
        unused |= {name for name, side in pairs if columns.get(name) == columns[side]}
    return {name: number for name, number in columns.items() if name not in unused}


def _is_corner(text: str) -> bool:
    return not text or math.isfinite(_to_float(text))


def _to_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _to_int(text: str) -> int | None:
    if not text:
        return None
    value = _to_float(text)
    return int(value) if math.isfinite(value) else 0


def _corners(box: list[float], sides: tuple[str, ...]) -> list[float]:
    """Return x1, y1, x2, y2 of a box in one of the forms; NaN for what is no number."""
    if sides == _CORNERS:
        return box
    x, y, width, height = box
    if "xc" in sides:
        x, y = x - width / 2, y - height / 2
    return [x, y, x + width, y + height]


def _find_image_folder(file: Path, names: list[str]) -> Path:
    """Return the folder of the images: that of the table, one in it, or a usual one beside it."""
    near = [file.parent, *visible_folders(file.parent)[:_MAX_FOLDERS]]
    folders = [*near, *(inner for f in near[1:] for inner in visible_folders(f)[:_MAX_FOLDERS])]
    beside = visible_folders(file.parent.parent)
    folders += [f for f in beside if f.name.lower() in _IMAGE_FOLDERS]
    for is_base_name in (False, True):
        for folder in folders:
            files = DatasetFiles(folder)
            for name in names:
                path = base_name(name) if is_base_name else name
                if not os.path.isabs(path) and _existing(path, files):
                    return folder
    return file.parent


def _find_image(name: str, files: DatasetFiles, allow_outside: bool, location: str) -> str | None:
    """Return the path of an image, also without its suffix, or of one of its base name."""
    path = resolve_inside(
        base_name(name) if os.path.isabs(name) and not os.path.exists(name) else name,
        files.root,
        allow_outside,
        location,
    )
    return _existing(path, files) or _existing(base_name(name), files)


def _existing(path: str, files: DatasetFiles) -> str | None:
    if not Path(path).name or "\0" in path:
        return None
    if files.exists(files.root / path):
        return path
    found = files.find_image((files.root / path).parent, Path(path).name)
    return str(Path(path).with_name(found)) if found is not None else None
