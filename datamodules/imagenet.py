"""ImageNet's image labels, in the folders of its unpacked archives."""

import csv
import os
import re
from pathlib import Path
from typing import Any

from yolo_lightning.datamodules.annotations import build_label_index
from yolo_lightning.datamodules.files import LabelledImages, iter_images, require_folder
from yolo_lightning.datamodules.index import Index
from yolo_lightning.errors import InputError
from yolo_lightning.images import is_image

_KAGGLE = "LOC_val_solution.csv"
_SYNSETS = ("imagenet_2012_validation_synset_labels.txt", "synset_labels.txt", "val_synsets.txt")
_META = "meta.mat"
_DEVKIT = "ILSVRC2012_validation_ground_truth.txt"
_NUMBER = re.compile(r"_(\d{8})$")


class ImageNet(LabelledImages):
    """ImageNet's classification images; labels are WordNet ids (wnids).

    Images lie in one folder per wnid (``train/n01440764/…``), or all in one folder (``val/…``).
    The labels of the latter are searched up to two levels below and above `root`: Kaggle's
    ``LOC_val_solution.csv``, a list with the wnid of each image in order, or the development kit.

    Args:
        root: the folder with ``train`` and ``val``, or with ``Data/CLS-LOC``.
        split: which folder.
        labels: file or folder with the labels of images in one folder, if not in a usual place.
        mapping: nodes by wnid, if the tree has other keys.
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

    def _cache_key(self) -> tuple[Path, dict[str, Any]]:
        root = require_folder(self.root, "ImageNet")
        labels = Path(self.labels).expanduser().absolute() if self.labels is not None else None
        return root, {"split": self.split, "labels": str(labels)}

    def _parse(self) -> Index:
        root = require_folder(self.root, "ImageNet").absolute()
        candidates = [root / self.split, root / "Data" / "CLS-LOC" / self.split]
        folder = next((candidate for candidate in candidates if candidate.is_dir()), None)
        if folder is None:
            folders = (f.name for f in root.iterdir() if f.is_dir() and f.name[:1] != ".")
            choices = ", ".join(sorted(folders))
            raise InputError(f"ImageNet {self.root!r}: no split {self.split!r}; found: {choices}")
        watched = [root, folder]
        names = sorted(name for name in os.listdir(folder) if is_image(Path(name)))
        faults: list[str] = []
        if names:
            file, wnids = self._read_labels(root, names, faults)
            watched += [file, file.parent / _META]
            images = [str((folder / name).relative_to(root)) for name in names if name in wnids]
            labels = [wnids[name] for name in names if name in wnids]
            origins = dict.fromkeys(labels, str(file))
        else:
            images, labels = [], []
            subfolders = sorted(f for f in folder.iterdir() if f.is_dir() and f.name[:1] != ".")
            for subfolder in subfolders:
                files = [str(file.relative_to(root)) for file in iter_images(subfolder, watched)]
                if not files:
                    faults.append(f"{subfolder}: no images")
                images.extend(files)
                labels.extend([subfolder.name] * len(files))
            origins = {label: str(folder / label) for label in dict.fromkeys(labels)}
        return build_label_index(root, images, labels, origins, faults, watched)

    def _read_labels(
        self, root: Path, names: list[str], faults: list[str]
    ) -> tuple[Path, dict[str, str]]:
        """Return the file with the labels of these images, and the wnid of each image."""
        file = self._find_label_file(root)
        if file.suffix == ".csv":
            rows = csv.reader(file.read_text(encoding="utf-8").splitlines())
            by_stem = {
                Path(row[0]).stem: row[1].split()[0]
                for row in rows
                if len(row) > 1 and row[1].strip()
            }
        else:
            lines = [line.split()[-1] for line in _read_lines(file)]
            if file.name == _DEVKIT:
                wnids = _read_devkit_wnids(file.parent / _META)
                lines = [wnids.get(line, "") for line in lines]
            numbers = [_NUMBER.search(Path(name).stem) for name in names]
            ranks = [int(n.group(1)) - 1 if n else k for k, n in enumerate(numbers)]
            if max(ranks) >= len(lines):
                raise InputError(
                    f"{file}: {len(lines)} labels for {max(ranks) + 1} images in the split "
                    f"{self.split!r}"
                )
            pairs = zip(names, ranks, strict=True)
            by_stem = {Path(name).stem: lines[rank] for name, rank in pairs}
        wnid_by_name = {name: by_stem.get(Path(name).stem, "") for name in names}
        unlabelled = [name for name, wnid in wnid_by_name.items() if not wnid]
        faults += [f"{file}: no label for {name}, skipped" for name in unlabelled]
        return file, {name: wnid for name, wnid in wnid_by_name.items() if wnid}

    def _find_label_file(self, root: Path) -> Path:
        file_names = (_KAGGLE, *_SYNSETS, _DEVKIT)
        start = Path(self.labels).expanduser() if self.labels is not None else root
        if start.is_file():
            return start
        if start.is_dir():
            patterns = ("", "*/", "*/*/", *(["../", "../../"] if self.labels is None else []))
            for name in file_names:
                for pattern in patterns:
                    for file in sorted(start.glob(pattern + name)):
                        return file
        raise InputError(
            f"ImageNet {self.root!r}: the images of {self.split!r} lie in one folder, and none of "
            f"{', '.join(file_names)} is below {str(start)!r}; set labels: PATH"
        )


def _read_lines(file: Path) -> list[str]:
    return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _read_devkit_wnids(meta: Path) -> dict[str, str]:
    """Return wnids by the development kit's own class numbers."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(str(meta), squeeze_me=True)["synsets"]
        return {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in synsets}
    except Exception as error:  # scipy raises many kinds for damaged files
        raise InputError(f"{meta}: not the development kit's list of synsets ({error})") from None
