"""Boxes from Pascal VOC annotations."""

import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from yolo_lightning.datamodules.source import (
    IMAGE_SUFFIXES,
    DetectionSample,
    DetectionSource,
    existing_folder,
    read_image,
    unique_nodes,
)
from yolo_lightning.errors import InputError
from yolo_lightning.wordtree import WordTree

_ANNOTATION_FOLDERS = ("Annotations", "annotations")
_IMAGE_FOLDERS = ("JPEGImages", "images")


@dataclass
class _Annotation:
    image: Path
    size_wh: tuple[int, int]
    boxes_xyxy_px: NDArray[np.float32]
    labels: NDArray[np.int64]
    difficult: NDArray[np.bool_]


class VOCFolder(DetectionSource):
    """A folder with Pascal VOC XML files.

    Found by themselves: ``Annotations`` and ``JPEGImages`` (or ``annotations`` and ``images``)
    with ``ImageSets/Main/<split>.txt``; a folder per split; XML files beside their images.

    Args:
        root: the folder, such as ``VOCdevkit/VOC2007``.
        split: name of an image set or of a folder; None reads all XML files of `root`.

    Objects marked difficult are left out of training, as in the original program; evaluation
    neither asks for them nor punishes their detection.

    Raises:
        InputError: on `bind`: a missing folder or split, a label that is not in the tree.
    """

    def __init__(self, root: str, split: str | None = None) -> None:
        self.root, self.split = root, split
        self.faults: list[str] = []

    def bind(self, tree: WordTree) -> None:
        """Parse every XML file and map its names to nodes."""
        self.faults = []
        files, images = self._files()
        found = [self._parse(file, images, tree) for file in files]
        self.annotations = [annotation for annotation in found if annotation is not None]
        if not self.annotations:
            raise InputError(
                f"VOC folder: no annotated images in {self.root!r}, split {self.split!r}"
            )
        self._nodes = unique_nodes([annotation.labels for annotation in self.annotations])

    def _files(self) -> tuple[list[Path], Path | None]:
        """Return the XML files and, where they are kept apart, the folder of images."""
        root = existing_folder(self.root, "VOC folder")
        sets = root / "ImageSets" / "Main"
        names: list[str] | None = None
        if self.split is not None and (sets / f"{self.split}.txt").is_file():
            lines = (sets / f"{self.split}.txt").read_text(encoding="utf-8").splitlines()
            names = [line.split()[0] for line in lines if line.strip()]
        elif self.split is not None:
            if not (root / self.split).is_dir():
                choices = sorted(f.stem for f in sets.glob("*.txt")) if sets.is_dir() else []
                choices += sorted(f.name for f in root.iterdir() if f.is_dir())
                raise InputError(
                    f"VOC folder {self.root!r}: no split {self.split!r}; "
                    f"found: {', '.join(choices)}"
                )
            root = root / self.split
        xml_folder = next((root / n for n in _ANNOTATION_FOLDERS if (root / n).is_dir()), root)
        images = next((root / n for n in _IMAGE_FOLDERS if (root / n).is_dir()), None)
        if names is None:
            return sorted(xml_folder.glob("*.xml")), images
        missing = [name for name in names if not (xml_folder / f"{name}.xml").is_file()]
        self.faults += [f"{xml_folder / name}.xml: listed but missing, skipped" for name in missing]
        gone = set(missing)
        return [xml_folder / f"{name}.xml" for name in names if name not in gone], images

    def _parse(self, file: Path, images: Path | None, tree: WordTree) -> _Annotation | None:
        """Read one XML file; None where it or its image cannot be used."""
        try:
            document = ET.parse(file).getroot()
        except (ET.ParseError, OSError) as error:
            self.faults.append(f"{file}: not readable XML ({error}), skipped")
            return None
        image = _image_of(file, images, document.findtext("filename", ""))
        if image is None:
            self.faults.append(f"{file}: its image is missing, skipped")
            return None
        width, height = (
            _integer(document.findtext(f"size/{side}")) for side in ("width", "height")
        )
        if not (width and height):
            self.faults.append(
                f"{file}: gives the size as {width} x {height}, the image's own holds"
            )
        boxes, labels, difficult = [], [], []
        for number, item in enumerate(document.iter("object"), start=1):
            box = _box_of(item)
            if box is None:
                self.faults.append(f"{file}: object {number} has no usable box, skipped")
                continue
            boxes.append(box)
            labels.append(tree.node(item.findtext("name", "").strip(), str(file)))
            difficult.append(item.findtext("difficult", "0").strip() == "1")
        return _Annotation(
            image,
            (width, height),
            np.array(boxes, dtype=np.float32).reshape(-1, 4),
            np.array(labels, dtype=np.int64),
            np.array(difficult, dtype=np.bool_),
        )

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.annotations)

    @property
    def nodes(self) -> Tensor:
        """int64, sorted: the nodes that boxes are labelled with."""
        return self._nodes

    def read(self, index: int) -> DetectionSample:
        """Return one sample, its boxes clipped to the image."""
        annotation = self.annotations[index]
        image = read_image(annotation.image)
        height, width = image.shape[:2]
        faults = []
        if all(annotation.size_wh) and annotation.size_wh != (width, height):
            stated = " x ".join(map(str, annotation.size_wh))
            faults.append(f"{annotation.image}: is {width} x {height}, its XML says {stated}")
        boxes = annotation.boxes_xyxy_px.clip(0, [width, height, width, height])
        whole = (boxes[:, 2:] - boxes[:, :2]).min(axis=1, initial=np.inf) >= 1
        if not whole.all():
            faults.append(f"{annotation.image}: {int((~whole).sum())} boxes outside it, skipped")
        return DetectionSample(
            image,
            boxes[whole].astype(np.float32),
            annotation.labels[whole],
            annotation.difficult[whole],
            faults,
        )


def _image_of(file: Path, images: Path | None, filename: str) -> Path | None:
    """Return the image that an XML file describes: by its own name, else by the name inside."""
    folder = images or file.parent
    candidates = [folder / (file.stem + suffix) for suffix in IMAGE_SUFFIXES]
    candidates += [folder / (file.stem + suffix.upper()) for suffix in IMAGE_SUFFIXES]
    if filename:
        candidates.append(folder / Path(filename.replace("\\", "/")).name)
    return next((path for path in candidates if path.is_file()), None)


def _integer(text: str | None) -> int:
    try:
        return int(float(text or 0))
    except ValueError:
        return 0


def _box_of(item: ET.Element) -> list[float] | None:
    """Return x1, y1, x2, y2 in px; VOC counts pixels from 1 and includes the last one."""
    try:
        x1, y1, x2, y2 = (
            float(item.findtext(f"bndbox/{side}") or "nan")
            for side in ("xmin", "ymin", "xmax", "ymax")
        )
    except ValueError:
        return None
    box = [x1 - 1, y1 - 1, x2, y2]
    usable = np.isfinite(box).all() and x2 > x1 and y2 > y1
    return box if usable else None
