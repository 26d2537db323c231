"""Boxes from Darknet's and Ultralytics' text files: a line an object, relative to the image."""

import math
import os
from pathlib import Path
from typing import Any

import yaml

from yolo_lightning.datamodules.annotated import AnnotatedImages, Annotations
from yolo_lightning.datamodules.index import Parsed
from yolo_lightning.datamodules.listing import Listing, inside, within
from yolo_lightning.errors import InputError
from yolo_lightning.images import is_image

_SPLITS = ("train", "val", "valid", "test")
_NAME_FILES = ("classes.txt", "obj.names", "_darknet.labels")


class YOLOText(AnnotatedImages):
    """Images with a text file each: ``class centre_x centre_y width height``, 0 … 1 of the image.

    Polygons (``class x1 y1 x2 y2 x3 y3 …``) become the boxes around them. An image without a text
    file, or with an empty one, holds no objects. Text files lie beside their images, or in a
    ``labels`` folder that mirrors ``images``.

    Args:
        root: ``data.yaml`` as Ultralytics writes it, ``.data`` as Darknet has it, a list of image
            paths (``.txt``), or a folder with ``images`` and ``labels``.
        split: which of the lists or folders that `root` names.
        names: the classes: a file with a name a line, or a list; what `root` names by default.
        mapping: nodes by class name, where these are called otherwise in the tree.
        allow_outside: whether listed paths may lead out of the dataset's folder.

    Raises:
        InputError: on `bind`: a missing file or folder, no names, a label that is not in the tree.
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

    def _key(self) -> tuple[Path, dict[str, Any]]:
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

    def _parse(self) -> Parsed:
        """Read the text file of every image."""
        path, listing = Path(self.root).expanduser().absolute(), Listing()
        folder = path if path.is_dir() else path.parent
        description = _description(path)
        watched = [path]
        names = self._names(folder, description, watched)
        labels: list[Path] = []
        about = Annotations(folder, lambda image, line: f"{labels[image]}:{line}", normalised=True)
        for image in self._images(path, folder, description, listing, watched, about.faults):
            file = _labels_of(folder / image, listing)
            labels.append(file)
            about.add_image(image)
            if listing.has(file):
                watched.append(file)
                _add_lines(about, file, names)
            else:
                about.faults.append(f"{file}: no such file, {image} taken as without objects")
        return about.finish([*watched, *listing.folders])

    def _names(self, folder: Path, description: dict[str, Any], watched: list[Path]) -> list[str]:
        given = self.names if self.names is not None else description.get("names")
        if given is None:
            found = [folder / name for name in _NAME_FILES] + sorted(folder.glob("*.names"))
            given = next((str(file) for file in found if file.is_file()), None)
            if given is None:
                inner = folder / "data.yaml"
                given = _description(inner).get("names") if inner.is_file() else None
                watched.append(inner)
        if isinstance(given, str):
            file = Path(given).expanduser()
            file = file if file.is_absolute() or file.is_file() else folder / file
            if not file.is_file():
                raise InputError(f"{self.name}: file of names {given!r} not found")
            watched.append(file)
            lines = file.read_text(encoding="utf-8").splitlines()
            given = [line.strip() for line in lines if line.strip()]
        if isinstance(given, dict):
            try:
                by_number = {int(k): name for k, name in given.items()}
            except (TypeError, ValueError):
                raise InputError(f"{self.name}: names are numbered 0, 1, …: {given}") from None
            given = [by_number.get(k, k) for k in range(max(by_number, default=-1) + 1)]
        if not isinstance(given, list) or not given:
            looked = ", ".join((*_NAME_FILES, "*.names", "data.yaml"))
            raise InputError(
                f"{self.name}: no names of classes; give names: [..], or one of {looked}"
            )
        return [str(name) for name in given]

    def _images(
        self,
        path: Path,
        folder: Path,
        description: dict[str, Any],
        listing: Listing,
        watched: list[Path],
        faults: list[str],
    ) -> list[str]:
        """Return the images of the split, relative to the dataset's folder where they lie in it."""
        places, homes = [path], [folder]
        if description:
            places, homes = self._described(folder, description)
        elif path.is_dir():
            places = [self._split_folder(path)]
        found: list[str] = []
        for place in places:
            if place.is_dir():
                found += _images_below(place, folder, listing)
            else:
                watched.append(place)
                found += self._listed(place, homes, listing, faults)
        return found

    def _described(
        self, folder: Path, description: dict[str, Any]
    ) -> tuple[list[Path], list[Path]]:
        """Return the files and folders of the split, and the folders that its images may lie in."""
        named = description.get(self.split, description.get("valid" if self.split == "val" else ""))
        if not named:
            raise self._no_split([name for name in description if name in _SPLITS])
        base = Path(description.get("path") or "").expanduser()
        bases = [folder / base, Path.cwd() / base, folder, Path.cwd()]
        home = next((place for place in bases if place.is_dir()), folder)
        listed = named if isinstance(named, list) else [named]
        return [_existing(str(place), bases, self.name) for place in listed], [folder, home]

    def _split_folder(self, path: Path) -> Path:
        """Return the folder of the split's images."""
        tries = [path / "images" / self.split, path / self.split / "images", path / "images",
                 path / self.split, path]  # fmt: skip
        place = next(place for place in tries if place.is_dir())
        above = path / "images" if place == path / "images" else path
        splits = [name for name in _SPLITS if (above / name).is_dir()]
        if place in (path, path / "images") and splits:
            raise self._no_split(splits)
        return place

    def _no_split(self, found: list[str]) -> InputError:
        return InputError(f"{self.name}: no split {self.split!r}; found: {', '.join(found)}")

    def _listed(
        self, place: Path, homes: list[Path], listing: Listing, faults: list[str]
    ) -> list[str]:
        """Return the images that a list names; the first home is the dataset's folder."""
        folder, found = homes[0], []
        for number, line in enumerate(place.read_text(encoding="utf-8").splitlines(), start=1):
            text = line.strip()
            if not text:
                continue
            tries = [place.parent] if text.startswith("./") else [*homes, Path.cwd()]
            wholes = [Path(os.path.normpath(base / text)) for base in tries]
            whole = next((file for file in wholes if listing.has(file)), wholes[0])
            home = next((top for top in homes if within(whole, top)), folder)
            image = inside(str(whole), home, self.allow_outside, f"{place}:{number}")
            if home != folder:
                image = str(whole)
            if listing.has(folder / image):
                found.append(image)
            else:
                faults.append(f"{place}:{number}: {image} is missing, skipped")
        return found


def _description(path: Path) -> dict[str, Any]:
    """Return what a ``data.yaml`` or a ``.data`` file says; nothing for other paths.

    Raises:
        InputError: it is malformed.
    """
    if path.suffix == ".data":
        rows = (line.split("=", 1) for line in path.read_text("utf-8").splitlines() if "=" in line)
        found: Any = {key.strip(): value.strip() for key, value in rows}
    elif path.suffix in (".yaml", ".yml"):
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not YAML ({str(error).splitlines()[0]})") from None
    else:
        return {}
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected lines such as train: images/train")
    return found


def _existing(place: str, bases: list[Path], name: str) -> Path:
    """Return the file or folder that a description names; some tools write one ``../`` too many."""
    for base in bases:
        for text in (place, place.removeprefix("../")):
            if (base / text).exists():
                return base / text
    raise InputError(f"{name}: {place!r} not found, neither below {bases[0]} nor {bases[1]}")


def _images_below(place: Path, folder: Path, listing: Listing) -> list[str]:
    below = (f for f in place.rglob("*") if f.is_dir())
    shown = (f for f in below if not any(p[:1] == "." for p in f.relative_to(place).parts))
    folders = [place, *sorted(shown)]
    files = (f / name for f in folders for name in listing.names(f))
    inner = [file for file in files if is_image(file)]
    return [str(f.relative_to(folder)) if f.is_relative_to(folder) else str(f) for f in inner]


def _labels_of(image: Path, listing: Listing) -> Path:
    """Return the text file of an image: in ``labels`` instead of ``images``, else beside it."""
    parts = list(image.parent.parts)
    beside = image.with_suffix(".txt")
    if "images" not in parts:
        mirrored = image.parent.parent / "labels" / beside.name
        return mirrored if not listing.has(beside) and listing.has(mirrored) else beside
    parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    mirrored = Path(*parts) / beside.name
    return beside if listing.has(beside) and not listing.has(mirrored) else mirrored


def _add_lines(about: Annotations, file: Path, names: list[str]) -> None:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        about.faults.append(f"{file}: not readable ({error}), taken as without objects")
        return
    rows = [(number, line.split()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        about.faults.append(f"{file}: empty, its image taken as without objects")
    for number, parts in rows:
        try:
            label = int(float(parts[0]))
            values = [float(part) for part in parts[1:]]
        except (ValueError, OverflowError):
            about.faults.append(f"{file}:{number}: {' '.join(parts)[:60]!r} is no object, skipped")
            continue
        if not 0 <= label < len(names):
            about.faults.append(
                f"{file}:{number}: class {label}, allowed: 0 … {len(names) - 1}, skipped"
            )
            continue
        about.add_box(_box_of(values), names[label], number)


def _box_of(values: list[float]) -> list[float]:
    """Return corners, 0 … 1; NaN where the numbers are no box."""
    if not all(map(math.isfinite, values)):
        return [math.nan] * 4
    if len(values) >= 6 and len(values) % 2 == 0:  # a polygon
        return [min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])]
    if len(values) not in (4, 5):
        return [math.nan] * 4
    x, y, width, height = values[:4]
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
