"""Boxes from Pascal VOC annotations, and from ImageNet's, which are written alike."""

import xml.etree.ElementTree as ET
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from yolo_lightning.datamodules.annotated import AnnotatedImages, Annotations
from yolo_lightning.datamodules.index import Parsed
from yolo_lightning.datamodules.listing import Listing
from yolo_lightning.datamodules.source import existing_folder
from yolo_lightning.errors import InputError
from yolo_lightning.images import is_image

_ANNOTATION_FOLDERS = ("Annotations", "annotations")
_IMAGE_FOLDERS = ("JPEGImages", "images")


class _XMLFolder(AnnotatedImages):
    """One XML file an image."""

    from_one = True
    """Whether pixels count from 1 and the last one is included, as VOC has it."""

    @abstractmethod
    def _files(
        self, faults: list[str], listing: Listing, lists: list[Path]
    ) -> list[tuple[Path, Path]]:
        """Return XML files and the folders that hold their images; note the lists that say so."""

    def _parse(self) -> Parsed:
        """Parse every XML file."""
        root, listing = self._key()[0].absolute(), Listing()
        about = Annotations(root, lambda image, number: f"{files[image]}: object {number}")
        lists: list[Path] = []
        pairs = self._files(about.faults, listing, lists)
        files: list[Path] = []
        for file, folder in pairs:
            document = _document(file, about.faults)
            if document is None:
                continue
            image = _image_of(file, folder, document, listing)
            if image is None:
                about.faults.append(f"{file}: its image is missing, skipped")
                continue
            files.append(file)
            self._add(about, document, str(image), file)
        return about.finish([*lists, *(file for file, _ in pairs), *listing.folders])

    def _add(self, about: Annotations, document: ET.Element, image: str, file: Path) -> None:
        width, height = (
            _integer(document.findtext(f"size/{side}")) for side in ("width", "height")
        )
        if not (width and height):
            about.faults.append(
                f"{file}: gives the size as {width} x {height}, the image's own holds"
            )
        about.add_image(image, (width, height) if width and height else (0, 0))
        for number, item in enumerate(document.iter("object"), start=1):
            name = item.findtext("name", "").strip()
            if not name:
                about.faults.append(f"{file}: object {number} has no name, skipped")
                continue
            box = _box_of(item, self.from_one)
            about.add_box(box, name, number, item.findtext("difficult", "0").strip() == "1")


class VOCFolder(_XMLFolder):
    """A folder with Pascal VOC XML files.

    Found by themselves: ``Annotations`` and ``JPEGImages`` (or ``annotations`` and ``images``)
    with ``ImageSets/Main/<split>.txt``; a folder per split; XML files beside their images.

    Args:
        root: the folder, such as ``VOCdevkit/VOC2007``, or ``VOCdevkit`` with `years`.
        split: name of an image set or of a folder; None reads all XML files of `root`.
        years: such as [2007, 2012]: folders ``VOC<year>`` of `root`, all of whose images are taken.
        mapping: nodes by the names in the XML, where these are called otherwise in the tree.

    Objects marked difficult are left out of training, as in the original program; evaluation
    neither asks for them nor punishes their detection.

    Raises:
        InputError: on `bind`: a missing folder or split, a label that is not in the tree.
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

    def _key(self) -> tuple[Path, dict[str, Any]]:
        root = existing_folder(self.root, "VOC folder")
        return root, {"split": self.split, "years": self.years}

    def _files(
        self, faults: list[str], listing: Listing, lists: list[Path]
    ) -> list[tuple[Path, Path]]:
        root = existing_folder(self.root, "VOC folder").absolute()
        if self.years is None:
            years = sorted(f.name for f in root.glob("VOC[0-9]*") if (f / "Annotations").is_dir())
            if years:
                raise InputError(
                    f"VOC folder {self.root!r} holds {', '.join(years)}: name one as root, or say "
                    f"years: [{years[0].removeprefix('VOC')}, …]"
                )
            return self._of(root, faults, listing, lists)
        found = []
        for year in self.years:
            folder = existing_folder(root / f"VOC{year}", "VOC year")
            found += self._of(folder, faults, listing, lists)
        return found

    def _of(
        self, root: Path, faults: list[str], listing: Listing, lists: list[Path]
    ) -> list[tuple[Path, Path]]:
        """Return the XML files of a folder or a year, and the folder of their images."""
        sets = root / "ImageSets" / "Main"
        names: list[str] | None = None
        if self.split is not None and (sets / f"{self.split}.txt").is_file():
            listing.names(sets)
            lists.append(sets / f"{self.split}.txt")
            lines = (sets / f"{self.split}.txt").read_text(encoding="utf-8").splitlines()
            names = [line.split()[0] for line in lines if line.strip()]
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
        there = listing.names(xml_folder)
        if names is None:
            names = [name.removesuffix(".xml") for name in there if name.endswith(".xml")]
        missing = [name for name in names if f"{name}.xml" not in there]
        faults += [f"{xml_folder / name}.xml: listed but missing, skipped" for name in missing]
        gone = set(missing)
        return [(xml_folder / f"{name}.xml", images) for name in names if name not in gone]


class ILSVRCDetection(_XMLFolder):
    """ImageNet's boxes, in the folders that its archives unpack to; names are wnids.

    Args:
        root: the folder with ``Annotations`` and ``Data`` (and ``ImageSets``).
        split: such as ``train`` or ``val``: a folder below, or a list in ``ImageSets``.
        challenge: ``DET``, 200 classes, or ``CLS-LOC``, 1,000.
        mapping: nodes by wnid, where the tree has other keys.

    Raises:
        InputError: on `bind`: a missing folder or split, a label that is not in the tree.
    """

    from_one = False

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

    def _key(self) -> tuple[Path, dict[str, Any]]:
        root = existing_folder(self.root, "ILSVRC folder")
        return root, {"split": self.split, "challenge": self.challenge}

    def _files(
        self, faults: list[str], listing: Listing, lists: list[Path]
    ) -> list[tuple[Path, Path]]:
        root = existing_folder(self.root, "ILSVRC folder").absolute()
        below = root / "Annotations" / self.challenge
        data = root / "Data" / self.challenge
        listed = root / "ImageSets" / self.challenge / f"{self.split}.txt"
        if (below / self.split).is_dir():
            xml = sorted(
                Path(folder) / name
                for folder in _folders_below(below / self.split)
                for name in listing.names(folder)
                if name.endswith(".xml")
            )
        elif listed.is_file():
            listing.names(listed.parent)
            lists.append(listed)
            lines = listed.read_text(encoding="utf-8").splitlines()
            split = self.split.partition("_")[0]
            xml = [below / split / f"{line.split()[0]}.xml" for line in lines if line.strip()]
            missing = [file for file in xml if not listing.has(file)]
            faults += [f"{file}: listed but missing, skipped" for file in missing]
            gone = set(missing)
            xml = [file for file in xml if file not in gone]
        else:
            choices = sorted(f.name for f in below.iterdir()) if below.is_dir() else []
            raise InputError(
                f"ILSVRC folder {self.root!r}: no split {self.split!r} in Annotations/"
                f"{self.challenge} or ImageSets/{self.challenge}; found: {', '.join(choices)}"
            )
        return [(file, data / file.parent.relative_to(below)) for file in xml]


def _folders_below(folder: Path) -> list[Path]:
    return [folder, *sorted(f for f in folder.rglob("*") if f.is_dir())]


def _document(file: Path, faults: list[str]) -> ET.Element | None:
    try:
        return ET.parse(file).getroot()
    except (ET.ParseError, OSError, ValueError) as error:
        faults.append(f"{file}: not readable XML ({error}), skipped")
        return None


def _image_of(file: Path, folder: Path, document: ET.Element, listing: Listing) -> Path | None:
    """Return the image that an XML file describes: by its own name, else by the name inside."""
    name = listing.image(folder, file.stem)
    if name is not None:
        return folder / name
    inner = folder / Path(document.findtext("filename", "").replace("\\", "/")).name
    return inner if is_image(inner) and listing.has(inner) else None


def _integer(text: str | None) -> int:
    try:
        return int(float(text or 0))
    except (ValueError, OverflowError):
        return 0


def _box_of(item: ET.Element, from_one: bool) -> Sequence[float]:
    """Return x1, y1, x2, y2 in px; NaN where there is no box."""
    try:
        x1, y1, x2, y2 = (
            float(item.findtext(f"bndbox/{side}") or "nan")
            for side in ("xmin", "ymin", "xmax", "ymax")
        )
    except ValueError:
        return [np.nan] * 4
    if not from_one:
        return [x1, y1, x2, y2]
    return [x1 - (x1 < x2), y1 - (y1 < y2), x2 - (x2 < x1), y2 - (y2 < y1)]
