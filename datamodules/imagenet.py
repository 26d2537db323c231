"""ImageNet's image labels, in the folders that its archives unpack to."""

import csv
import os
import re
from pathlib import Path
from typing import Any

from yolo_lightning.datamodules.image_folder import images_below
from yolo_lightning.datamodules.index import Parsed
from yolo_lightning.datamodules.labelled import LabelledImages, label_index
from yolo_lightning.datamodules.source import existing_folder
from yolo_lightning.errors import InputError
from yolo_lightning.images import is_image

_KAGGLE = "LOC_val_solution.csv"
_SYNSETS = ("imagenet_2012_validation_synset_labels.txt", "synset_labels.txt", "val_synsets.txt")
_META = "meta.mat"
_DEVKIT = "ILSVRC2012_validation_ground_truth.txt"
_NUMBER = re.compile(r"_(\d{8})$")


class ImageNet(LabelledImages):
    """ImageNet's classification images; labels are wnids.

    Folders of wnids hold their images (``train/n01440764/…``). Where images lie in one folder
    (``val/ILSVRC2012_val_00000001.JPEG``), their labels come from Kaggle's
    ``LOC_val_solution.csv``, a list with a wnid for each image in order, or the development kit;
    these are looked for in `root`, up to two levels below it, and up to two above it.

    Args:
        root: the folder with ``train`` and ``val``, or with ``Data/CLS-LOC``.
        split: which folder.
        labels: file or folder that names the labels of images in one folder; found by itself where
            it has its usual name.
        mapping: nodes by wnid, where the tree has other keys.

    Raises:
        InputError: on `bind`: a missing folder, no labels to be found, lists that do not fit the
            images, or a wnid that is not in the tree.
    """

    def __init__(
        self,
        root: str,
        split: str = "train",
        labels: str | None = None,
        mapping: dict[str, str] | None = None,
    ) -> None:
        super().__init__(mapping)
        self.root, self.split, self.labels = root, split, labels
        self.name = f"ImageNet {root} ({split})"

    def _key(self) -> tuple[Path, dict[str, Any]]:
        root = existing_folder(self.root, "ImageNet")
        labels = Path(self.labels).expanduser().absolute() if self.labels is not None else None
        return root, {"split": self.split, "labels": str(labels)}

    def _parse(self) -> Parsed:
        """List wnid folders, or one folder of images and its labels."""
        root = existing_folder(self.root, "ImageNet").absolute()
        places = [root / self.split, root / "Data" / "CLS-LOC" / self.split]
        folder = next((place for place in places if place.is_dir()), None)
        if folder is None:
            folders = (f.name for f in root.iterdir() if f.is_dir() and f.name[:1] != ".")
            choices = ", ".join(sorted(folders))
            raise InputError(f"ImageNet {self.root!r}: no split {self.split!r}; found: {choices}")
        watched = [root, folder]
        loose = sorted(name for name in os.listdir(folder) if is_image(Path(name)))
        faults: list[str] = []
        if loose:
            file, wnids = self._labels_of(root, loose, faults)
            watched += [file, file.parent / _META]
            images = [str((folder / name).relative_to(root)) for name in loose if name in wnids]
            labels = [wnids[name] for name in loose if name in wnids]
            origins = dict.fromkeys(labels, str(file))
        else:
            images, labels = [], []
            below = sorted(f for f in folder.iterdir() if f.is_dir() and f.name[:1] != ".")
            for place in below:
                files = [str(file.relative_to(root)) for file in images_below(place, watched)]
                if not files:
                    faults.append(f"{place}: no images")
                images.extend(files)
                labels.extend([place.name] * len(files))
            origins = {label: str(folder / label) for label in dict.fromkeys(labels)}
        return label_index(root, images, labels, origins, faults, watched)

    def _labels_of(
        self, root: Path, names: list[str], faults: list[str]
    ) -> tuple[Path, dict[str, str]]:
        """Return the file that labels these images, and the wnid of each."""
        file = self._label_file(root)
        if file.suffix == ".csv":
            rows = csv.reader(file.read_text(encoding="utf-8").splitlines())
            by_stem = {
                Path(row[0]).stem: row[1].split()[0]
                for row in rows
                if len(row) > 1 and row[1].strip()
            }
        else:
            lines = [line.split()[-1] for line in _lines(file)]
            if file.name == _DEVKIT:
                wnid_of = _devkit_wnids(file.parent / _META)
                lines = [wnid_of.get(line, "") for line in lines]
            numbers = [_NUMBER.search(Path(name).stem) for name in names]
            ranks = [int(n.group(1)) - 1 if n else k for k, n in enumerate(numbers)]
            if max(ranks) >= len(lines):
                raise InputError(
                    f"{file}: {len(lines)} labels for {max(ranks) + 1} images in the split "
                    f"{self.split!r}"
                )
            pairs = zip(names, ranks, strict=True)
            by_stem = {Path(name).stem: lines[rank] for name, rank in pairs}
        found = {name: by_stem.get(Path(name).stem, "") for name in names}
        faults += [f"{file}: no label for {name}, skipped" for name, w in found.items() if not w]
        return file, {name: wnid for name, wnid in found.items() if wnid}

    def _label_file(self, root: Path) -> Path:
        wanted = (_KAGGLE, *_SYNSETS, _DEVKIT)
        start = Path(self.labels).expanduser() if self.labels is not None else root
        if start.is_file():
            return start
        if start.is_dir():
            patterns = ("", "*/", "*/*/", *(["../", "../../"] if self.labels is None else []))
            for name in wanted:
                for pattern in patterns:
                    for file in sorted(start.glob(pattern + name)):
                        return file
        raise InputError(
            f"ImageNet {self.root!r}: the images of {self.split!r} lie in one folder, and none of "
            f"{', '.join(wanted)} is below {str(start)!r}; name the one that you have: labels: PATH"
        )


def _lines(file: Path) -> list[str]:
    return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _devkit_wnids(meta: Path) -> dict[str, str]:
    """Return wnids by the development kit's own numbers, as it writes them."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(str(meta), squeeze_me=True)["synsets"]
        return {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in synsets}
    except Exception as error:  # scipy raises classes of its own for damaged files
        raise InputError(f"{meta}: not the development kit's list of synsets ({error})") from None
