"""Boxes from Pascal VOC XML files, and from ImageNet's, which have the same format."""

import xml.etree.ElementTree as ET
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from yolo_lightning.datamodules.annotations import Annotations
from yolo_lightning.datamodules.files import AnnotatedImages, FolderListing, require_folder
from yolo_lightning.datamodules.index import Index
from yolo_lightning.errors import InputError
from yolo_lightning.images import is_image

_ANNOTATION_FOLDERS = ("Annotations", "annotations")
_IMAGE_FOLDERS = ("JPEGImages", "images")


class _XMLSource(AnnotatedImages):
    """One XML file per image."""

    one_based = True  # pixels count from 1, and boxes include their last pixel, as in VOC

    @abstractmethod
    def _list_files(
        self, listing: FolderListing, faults: list[str], image_sets: list[Path]
    ) -> list[tuple[Path, Path]]:
        """Return XML files and the folders of their images; append to `faults` and `image_sets`."""

    def _parse(self) -> Index:
        root, listing = self._cache_key()[0].absolute(), FolderListing()
        files: list[Path] = []
        annotations = Annotations(root, lambda image, number: f"{files[image]}: object {number}")
        image_sets: list[Path] = []
        pairs = self._list_files(listing, annotations.faults, image_sets)
        for file, folder in pairs:
            document = _parse_xml(file, annotations.faults)
            if document is None:
                continue
            image = _find_image(file, folder, document, listing)
            if image is None:
                annotations.faults.append(f"{file}: its image is missing, skipped")
                continue
            files.append(file)
            self._add(annotations, document, str(image), file)
        watched = [*image_sets, *(file for file, _ in pairs), *listing.folders]
        return annotations.build_index(watched)

    def _add(self, annotations: Annotations, document: ET.Element, image: str, file: Path) -> None:
        width, height = (_to_int(document.findtext(f"size/{side}")) for side in ("width", "height"))
        if not (width and height):
            annotations.faults.append(
                f"{file}: gives the size as {width} x {height}, the size of the image file is used"
            )
        annotations.add_image(image, (width, height) if width and height else (0, 0))
        for number, item in enumerate(document.iter("object"), start=1):
            name = item.findtext("name", "").strip()
            if not name:
                annotations.faults.append(f"{file}: object {number} has no name, skipped")
                continue
            difficult = item.findtext("difficult", "0").strip() == "1"
            annotations.add_box(_parse_box(item, self.one_based), name, number, difficult)


class VOCFolder(_XMLSource):
    """A folder with Pascal VOC XML files; difficult objects are not trained on or evaluated.

    Layouts: ``Annotations`` and ``JPEGImages`` (or ``annotations`` and ``images``) with
    ``ImageSets/Main/<split>.txt``; one folder per split; XML files beside their images.

    Args:
        root: the folder, such as ``VOCdevkit/VOC2007``, or ``VOCdevkit`` with `years`.
        split: name of an image set or of a folder; None reads all XML files of `root`.
        years: such as [2007, 2012]: the folders ``VOC<year>`` in `root` to read.
        mapping: nodes by the names in the XML files, if the tree has other names.
    """

    def __init__(
        self,
        root: str,
        split: str | None = None,
        years: list[int] | None = None,
        mapping: dict[str, str] | None = None,
    ) -> None:
        super().__init__(mapping)
        self.root, self.split, self.years = root, split, years
        self.name = f"VOC {root}" + (f" ({split})" if split else "")

    def _cache_key(self) -> tuple[Path, dict[str, Any]]:
        root = require_folder(self.root, "VOC folder")
        return root, {"split": self.split, "years": self.years}

    def _list_files(
        self, listing: FolderListing, faults: list[str], image_sets: list[Path]
    ) -> list[tuple[Path, Path]]:
        root = require_folder(self.root, "VOC folder").absolute()
        if self.years is None:
            years = sorted(f.name for f in root.glob("VOC[0-9]*") if (f / "Annotations").is_dir())
            if years:
                raise InputError(
                    f"VOC folder {self.root!r} contains {', '.join(years)}: use one of them as "
                    f"root, or set years: [{years[0].removeprefix('VOC')}, …]"
                )
            return self._list_folder(root, listing, faults, image_sets)
        files = []
        for year in self.years:
            folder = require_folder(root / f"VOC{year}", "VOC year")
            files += self._list_folder(folder, listing, faults, image_sets)
        return files

    def _list_folder(
        self, root: Path, listing: FolderListing, faults: list[str], image_sets: list[Path]
    ) -> list[tuple[Path, Path]]:
        sets = root / "ImageSets" / "Main"
        names: list[str] | None = None
        if self.split is not None and (sets / f"{self.split}.txt").is_file():
            listing.names(sets)
            image_sets.append(sets / f"{self.split}.txt")
            names = _read_image_set(sets / f"{self.split}.txt")
        elif self.split is not None:
            if not (root / self.split).is_dir():
                choices = sorted(f.stem for f in sets.glob("*.txt")) if sets.is_dir() else []
                folders = (f.name for f in root.iterdir() if f.is_dir())
                choices += sorted(name for name in folders if not name.startswith("."))
                raise InputError(
                    f"VOC folder {self.root!r}: no split {self.split!r}; "
                    f"found: {', '.join(choices)}"
                )
            root = root / self.split
        xml_folder = next((root / n for n in _ANNOTATION_FOLDERS if (root / n).is_dir()), root)
        images = next((root / n for n in _IMAGE_FOLDERS if (root / n).is_dir()), xml_folder)
        entries = listing.names(xml_folder)
        if names is None:
            names = [name.removesuffix(".xml") for name in entries if name.endswith(".xml")]
        files = [xml_folder / f"{name}.xml" for name in names]
        return [(file, images) for file in _existing(files, listing, faults)]


class ILSVRCDetection(_XMLSource):
    """ImageNet's boxes, in the folders of its unpacked archives; labels are WordNet ids (wnids).

    Args:
        root: the folder with ``Annotations`` and ``Data`` (and ``ImageSets``).
        split: such as ``train`` or ``val``: a folder, or an image set in ``ImageSets``.
        challenge: ``DET``, 200 classes, or ``CLS-LOC``, 1,000.
        mapping: nodes by wnid, if the tree has other keys.
    """

    one_based = False

    def __init__(
        self,
        root: str,
        split: str = "train",
        challenge: str = "DET",
        mapping: dict[str, str] | None = None,
    ) -> None:
        super().__init__(mapping)
        self.root, self.split, self.challenge = root, split, challenge
        self.name = f"ILSVRC {challenge} {root} ({split})"

    def _cache_key(self) -> tuple[Path, dict[str, Any]]:
        root = require_folder(self.root, "ILSVRC folder")
        return root, {"split": self.split, "challenge": self.challenge}

    def _list_files(
        self, listing: FolderListing, faults: list[str], image_sets: list[Path]
    ) -> list[tuple[Path, Path]]:
        root = require_folder(self.root, "ILSVRC folder").absolute()
        xml_folder = root / "Annotations" / self.challenge
        data = root / "Data" / self.challenge
        image_set = root / "ImageSets" / self.challenge / f"{self.split}.txt"
        if (xml_folder / self.split).is_dir():
            split_folder = xml_folder / self.split
            subfolders = sorted(f for f in split_folder.rglob("*") if f.is_dir())
            files = sorted(
                folder / name
                for folder in (split_folder, *subfolders)
                for name in listing.names(folder)
                if name.endswith(".xml")
            )
        elif image_set.is_file():
            listing.names(image_set.parent)
            image_sets.append(image_set)
            split = self.split.partition("_")[0]
            names = _read_image_set(image_set)
            files = [xml_folder / split / f"{name}.xml" for name in names]
            files = _existing(files, listing, faults)
        else:
            choices = sorted(f.name for f in xml_folder.iterdir()) if xml_folder.is_dir() else []
            raise InputError(
                f"ILSVRC folder {self.root!r}: no split {self.split!r} in Annotations/"
                f"{self.challenge} or ImageSets/{self.challenge}; found: {', '.join(choices)}"
            )
        return [(file, data / file.parent.relative_to(xml_folder)) for file in files]


def _read_image_set(file: Path) -> list[str]:
    """Return the names in an image set, the first word of each line."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [line.split()[0] for line in lines if line.strip()]


def _existing(files: list[Path], listing: FolderListing, faults: list[str]) -> list[Path]:
    missing = {file for file in files if not listing.exists(file)}
    faults += [f"{file}: listed but missing, skipped" for file in files if file in missing]
    return [file for file in files if file not in missing]


def _parse_xml(file: Path, faults: list[str]) -> ET.Element | None:
    try:
        return ET.parse(file).getroot()
    except (ET.ParseError, OSError, ValueError) as error:
        faults.append(f"{file}: not readable XML ({error}), skipped")
        return None


def _find_image(
    file: Path, folder: Path, document: ET.Element, listing: FolderListing
) -> Path | None:
    """Return the image of the XML file's own name, else the one named in the file."""
    name = listing.find_image(folder, file.stem)
    if name is not None:
        return folder / name
    named = folder / Path(document.findtext("filename", "").replace("\\", "/")).name
    return named if is_image(named) and listing.exists(named) else None


def _to_int(text: str | None) -> int:
    try:
        return int(float(text or 0))
    except (ValueError, OverflowError):
        return 0


def _parse_box(item: ET.Element, one_based: bool) -> Sequence[float]:
    """Return x1, y1, x2, y2 in px; NaN if there is no box."""
    try:
        x1, y1, x2, y2 = (
            float(item.findtext(f"bndbox/{side}") or "nan")
            for side in ("xmin", "ymin", "xmax", "ymax")
        )
    except ValueError:
        return [np.nan] * 4
    if not one_based:
        return [x1, y1, x2, y2]
    # subtract 1 from the low corner, also where corners are swapped
    return [x1 - (x1 < x2), y1 - (y1 < y2), x2 - (x2 < x1), y2 - (y2 < y1)]
