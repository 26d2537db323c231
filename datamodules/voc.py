"""Boxes from Pascal VOC XML files, and from ImageNet's, which have the same format."""

import os
import xml.etree.ElementTree as ET
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from yolo_lightning.datamodules.annotations import Annotations
from yolo_lightning.datamodules.dataset_files import (
    SPLITS,
    DatasetFiles,
    is_below,
    missing_split,
    resolve_inside,
    visible_folders,
)
from yolo_lightning.datamodules.files import AnnotatedImages
from yolo_lightning.datamodules.index import Index
from yolo_lightning.errors import InputError, read_bytes, require_folder
from yolo_lightning.images import is_image

# names of folders, in lower case
XML_FOLDERS = ("annotations", "annots", "annotation", "annot", "xmls", "xml", "labels")
_IMAGE_FOLDERS = ("jpegimages", "images", "image", "imgs", "img")
_MAX_FOLDERS, _MAX_TRIED = 50, 5  # folders searched for images, XML files whose image is searched

MAX_OBJECTS = 100_000  # of one image

XMLFiles = list[tuple[Path, Path]]  # XML files, and the folders of their images


class _XMLSource(AnnotatedImages):
    """One XML file per image."""

    one_based = True  # pixels count from 1, and boxes include their last pixel, as in VOC

    @abstractmethod
    def _list_files(self, root: Path, annotations: Annotations) -> XMLFiles:
        """Return the XML files of the split."""

    def _listed_files(self, folder: Path, file: Path, annotations: Annotations) -> list[Path]:
        """Return the XML files that an image set lists, the first word of each line.

        Those that are missing are reported.
        """
        files = []
        for number, line in enumerate(annotations.read_list(file), start=1):
            for name in line.split()[:1]:
                location = f"{file}:{number}"
                path = resolve_inside(f"{name}.xml", folder, self.allow_outside, location)
                xml = folder / path
                if annotations.exists(xml):
                    files.append(xml)
                else:
                    annotations.faults.append(f"{xml}: listed but missing, skipped")
        return files

    def _parse(self, root: Path) -> Index:
        files, prefix = list[Path](), os.path.join(root, "")
        annotations = Annotations(
            root,
            lambda image, number: f"{files[image]}: object {number}",
            allow_outside=self.allow_outside,
        )
        for file, folder in self._list_files(root, annotations):
            annotations.watched.append(file)
            annotations.require_inside(file)
            try:
                document = read_xml(file)
                count = sum(1 for _ in document.iter("object"))
                if count > MAX_OBJECTS:
                    raise InputError(f"{file}: {count:,} objects; allowed: {MAX_OBJECTS:,}")
            except InputError as error:
                annotations.faults.append(f"{error}, skipped")
                continue
            if document.find("image") is not None:
                annotations.faults.append(
                    f"{file}: CVAT's own format, skipped; export as Pascal VOC, COCO or YOLO"
                )
                continue
            image = _find_image(file, folder, document, annotations)
            if image is None:
                annotations.faults.append(f"{file}: its image is missing, skipped")
                continue
            files.append(file)
            self._add(annotations, document, str(image).removeprefix(prefix), file)
        return annotations.build_index()

    def _add(self, annotations: Annotations, document: ET.Element, image: str, file: Path) -> None:
        width, height = (_to_int(document.findtext(f"size/{side}")) for side in ("width", "height"))
        row = annotations.add_image(image, width, height, str(file))
        for number, item in enumerate(document.iter("object"), start=1):
            name = item.findtext("name", "").strip()
            if not name:
                annotations.faults.append(f"{file}: object {number} has no name, skipped")
                continue
            difficult = item.findtext("difficult", "0").strip() == "1"
            annotations.add_box(row, _parse_box(item, self.one_based), name, number, difficult)


class VOCFolder(_XMLSource):
    """A folder with Pascal VOC XML files; difficult objects are not trained on or evaluated.

    Layouts: ``Annotations`` and ``JPEGImages`` (or ``annotations``, ``annots``, ``labels`` and so
    on beside ``images``) with ``ImageSets/Main/<split>.txt``; one folder per split, above or below
    these; XML files beside their images.

    Args:
        root: the folder, such as ``VOCdevkit/VOC2007``, or ``VOCdevkit`` with `years`.
        split: name of an image set or of a folder; None reads all XML files of `root`.
        years: such as [2007, 2012]: the folders ``VOC<year>`` in `root` to read.
        images: folder of the images; by default searched beside the XML files.
        mapping: nodes by the names in the XML files, if the tree has other names.
        allow_outside: whether XML files and image sets may lie outside the folder, or be links
            that lead out of it.
        exclusive_names: whether a box has the one name that fits best, so that a name means no
            other of these names below it in the tree; false if coarse and fine names are mixed.
        only: a text file that lists the images to use, one path a line; see `AnnotatedImages`.
        without: a text file that lists the images to leave out.
    """

    def __init__(
        self,
        root: str,
        split: str | None = None,
        years: list[int] | None = None,
        images: str | None = None,
        mapping: dict[str, str] | None = None,
        allow_outside: bool = False,
        exclusive_names: bool = True,
        only: str | None = None,
        without: str | None = None,
    ) -> None:
        super().__init__(mapping, exclusive_names, only, without)
        self.root, self.split, self.years, self.images = root, split, years, images
        self.allow_outside = allow_outside
        self.name = f"VOC {root}" + (f" ({split})" if split else "")

    def _cache_key(self) -> tuple[Path, dict[str, Any]]:
        root = require_folder(self.root, "VOC folder").absolute()
        images = self.images and str(require_folder(self.images, "folder of images").absolute())
        options = {"split": self.split, "years": self.years, "images": images}
        return root, {**options, "outside": self.allow_outside}

    def _list_files(self, root: Path, annotations: Annotations) -> XMLFiles:
        if self.years is not None:
            folders = [require_folder(root / f"VOC{year}", "VOC year") for year in self.years]
            return [pair for folder in folders for pair in self._list_folder(folder, annotations)]
        years = voc_years(root)
        if years:
            raise InputError(
                f"VOC folder {self.root!r} contains {', '.join(f'VOC{year}' for year in years)}: "
                f"use one of them as root, or set years: [{years[0]}, …]"
            )
        return self._list_folder(root, annotations)

    def _list_folder(self, root: Path, annotations: Annotations) -> XMLFiles:
        sets = root / "ImageSets" / "Main"
        image_set = sets / f"{self.split}.txt"
        is_listed = self.split is not None and image_set.is_file()
        xml_folder = xml_folder_of(root, None if is_listed else self.split)
        if xml_folder is None and self.split is not None and not is_listed:
            choices = sorted(f.stem for f in sets.glob("*.txt"))
            choices += [folder.name for folder in visible_folders(root)]
            raise missing_split(self.name, self.split, choices)
        xml_folder = xml_folder or root
        if is_listed:
            files = self._listed_files(xml_folder, image_set, annotations)
        else:
            names = (name for name in annotations.names(xml_folder) if is_xml(name))
            files = [xml_folder / name for name in names]
        images = (
            _image_folder(root, xml_folder, files[:_MAX_TRIED], annotations)
            if self.images is None
            else require_folder(self.images, "folder of images").absolute()
        )
        return [(file, images) for file in files]


class ILSVRCDetection(_XMLSource):
    """ImageNet's boxes, in the folders of its unpacked archives; labels are WordNet ids (wnids).

    Args:
        root: the folder with ``Annotations`` and ``Data`` (and ``ImageSets``).
        split: such as ``train`` or ``val``: a folder, or an image set in ``ImageSets``.
        challenge: ``DET``, 200 classes, or ``CLS-LOC``, 1,000.
        mapping: nodes by wnid, if the tree has other keys.
        allow_outside: whether XML files and image sets may lie outside the folder, or be links
            that lead out of it.
        exclusive_names: whether a box has the one name that fits best, so that a name means no
            other of these names below it in the tree; false if coarse and fine names are mixed.
        only: a text file that lists the images to use, one path a line; see `AnnotatedImages`.
        without: a text file that lists the images to leave out.
    """

    one_based = False

    def __init__(
        self,
        root: str,
        split: str = "train",
        challenge: str = "DET",
        mapping: dict[str, str] | None = None,
        allow_outside: bool = False,
        exclusive_names: bool = True,
        only: str | None = None,
        without: str | None = None,
    ) -> None:
        super().__init__(mapping, exclusive_names, only, without)
        self.root, self.split, self.challenge = root, split, challenge
        self.allow_outside = allow_outside
        self.name = f"ILSVRC {challenge} {root} ({split})"

    def _cache_key(self) -> tuple[Path, dict[str, Any]]:
        root = require_folder(self.root, "ILSVRC folder").absolute()
        options = {"split": self.split, "challenge": self.challenge}
        return root, {**options, "outside": self.allow_outside}

    def _list_files(self, root: Path, annotations: Annotations) -> XMLFiles:
        xml_folder = root / "Annotations" / self.challenge
        image_set = root / "ImageSets" / self.challenge / f"{self.split}.txt"
        if (xml_folder / self.split).is_dir():
            files = [f for f in annotations.walk(xml_folder / self.split) if f.suffix == ".xml"]
            files.sort()
        elif image_set.is_file():
            folder = xml_folder / self.split.partition("_")[0]
            files = self._listed_files(folder, image_set, annotations)
        else:
            where = f" in Annotations/{self.challenge} or ImageSets/{self.challenge}"
            choices = [folder.name for folder in visible_folders(xml_folder)]
            raise missing_split(self.name, self.split, choices, where)
        data = root / "Data" / self.challenge
        return [(file, data / os.path.relpath(file.parent, xml_folder)) for file in files]


def is_xml(name: str) -> bool:
    """Return whether a file has the suffix of an XML file."""
    return name[-4:].lower() == ".xml"


def xml_folder_of(root: Path, split: str | None = None) -> Path | None:
    """Return the first folder of a layout that has XML files, if there is one."""
    folders = _xml_folders(root, split)
    return next((f for f in folders if any(map(is_xml, DatasetFiles(f).names(f)))), None)


def _xml_folders(root: Path, split: str | None) -> list[Path]:
    named = _named_folders(root, XML_FOLDERS)
    if split is not None:
        return [*_xml_folders(root / split, None), *(folder / split for folder in named)]
    others = (f for f in visible_folders(root)[:_MAX_FOLDERS] if f.name not in SPLITS)
    return [*named, *(folder / "xmls" for folder in named), root, *others]


def _named_folders(parent: Path, names: Sequence[str]) -> list[Path]:
    """Return the folders of a folder that have these names in lower case, in order of the names."""
    folders = [folder for folder in visible_folders(parent) if folder.name.lower() in names]
    return sorted(folders, key=lambda folder: names.index(folder.name.lower()))


def _image_folder(
    root: Path, xml_folder: Path, files: list[Path], annotations: Annotations
) -> Path:
    """Return the folder of the images of XML files: one of a usual name, theirs, or one beside."""
    parents = [p for p in (xml_folder, *xml_folder.parents) if p == root or is_below(p, root)][:3]
    named = [folder for parent in parents for folder in _named_folders(parent, _IMAGE_FOLDERS)]
    others = [f for parent in parents[1:] for f in visible_folders(parent)[:_MAX_FOLDERS]]
    candidates = [xml_folder, *named, *others, *parents[1:]]
    candidates = [f for folder in candidates for f in (folder / xml_folder.name, folder)]
    for folder in candidates:
        if any(annotations.find_image(folder, file.stem) for file in files):
            return folder
    return next((f for f in named if f.is_dir()), xml_folder)


def voc_years(root: Path) -> list[int]:
    """Return the years of the folders such as ``VOC2007`` in a folder, ascending."""
    names = [f.name for f in root.glob("VOC[0-9]*") if (f / "Annotations").is_dir()]
    return sorted(int(name[3:]) for name in names if name[3:].isdecimal())


def read_xml(file: Path) -> ET.Element:
    """Return the root of an XML file.

    Raises:
        InputError: not XML, or with a document type, whose entities may grow without end.
    """
    content = read_bytes(file, "XML file")
    if b"<!DOCTYPE" in content or b"\0" in content:  # UTF-16 has NUL bytes
        raise InputError(f"{file}: not readable XML (a document type, or a NUL byte)")
    try:
        return ET.fromstring(content)
    except (ET.ParseError, ValueError, LookupError) as error:
        raise InputError(f"{file}: not readable XML ({error})") from None


def _find_image(
    file: Path, folder: Path, document: ET.Element, annotations: Annotations
) -> Path | None:
    """Return the image of the XML file's own name, else the one named in the file."""
    name = annotations.find_image(folder, file.stem)
    if name is not None:
        return folder / name
    named = folder / Path(document.findtext("filename", "").replace("\\", "/")).name
    return named if is_image(named) and annotations.exists(named) else None


def _to_int(text: str | None) -> int:
    try:
        return int(float(text or 0))
    except (ValueError, OverflowError):
        return 0


def _parse_box(item: ET.Element, one_based: bool) -> Sequence[float]:
    """Return x1, y1, x2, y2 in px; NaN if there is no box."""
    box = item.find("bndbox")  # once, since searching takes most of the time
    if box is None:
        return [np.nan] * 4
    try:
        x1, y1, x2, y2 = (
            float(box.findtext(side) or "nan") for side in ("xmin", "ymin", "xmax", "ymax")
        )
    except ValueError:
        return [np.nan] * 4
    if not one_based:
        return [x1, y1, x2, y2]
    # subtract 1 from the low corner, also where corners are swapped
    return [x1 - (x1 < x2), y1 - (y1 < y2), x2 - (x2 < x1), y2 - (y2 < y1)]
