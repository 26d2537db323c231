"""ImageNet's image labels, in the folders of its unpacked archives."""

import io
import os
import re
from pathlib import Path
from typing import Any

from yolo_lightning.datamodules.annotations import ImageLabels
from yolo_lightning.datamodules.dataset_files import missing_split, visible_folders
from yolo_lightning.datamodules.files import LabelledImages
from yolo_lightning.datamodules.index import Index
from yolo_lightning.errors import InputError, expand, read_bytes, require_folder
from yolo_lightning.images import is_image

_KAGGLE = "LOC_val_solution.csv"
_SYNSETS = ("imagenet_2012_validation_synset_labels.txt", "synset_labels.txt", "val_synsets.txt")
_META = "meta.mat"
_MAX_META_BYTES = 2**20  # its compressed parts may be a thousand times as large
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
        allow_outside: whether `labels` may lie outside the folder; a file in a usual place may not
            be a link to a file of another name.
        skip_unknown: whether to leave out images whose wnid is not in the tree.
    """

    def __init__(
        self,
        root: str,
        split: str = "train",
        labels: str | None = None,
        mapping: dict[str, str] | None = None,
        allow_outside: bool = False,
        skip_unknown: bool = False,
    ) -> None:
        super().__init__(mapping, skip_unknown)
        self.root, self.split, self.labels = root, split, labels
        self.allow_outside = allow_outside
        self.name = f"ImageNet {root} ({split})"

    def _cache_key(self) -> tuple[Path, dict[str, Any]]:
        root = require_folder(self.root, "ImageNet folder").absolute()
        labels = expand(self.labels).absolute() if self.labels is not None else None
        options = {"split": self.split, "labels": str(labels), "outside": self.allow_outside}
        return root, options

    def _parse(self, root: Path) -> Index:
        candidates = [root / self.split, root / "Data" / "CLS-LOC" / self.split]
        folder = next((candidate for candidate in candidates if candidate.is_dir()), None)
        if folder is None:
            choices = [folder.name for folder in visible_folders(root)]
            raise missing_split(self.name, self.split, choices)
        labels = ImageLabels(root, self.allow_outside)
        labels.watched.append(root)
        names = [name for name in labels.names(folder) if is_image(name)]
        if names:
            self._add_listed(labels, folder, names)
        else:
            labels.add_class_folders(folder)
        return labels.build_index()

    def _add_listed(self, labels: ImageLabels, folder: Path, names: list[str]) -> None:
        """Add the images of one folder, whose labels are in a file."""
        file = self._find_label_file(labels)
        if file.suffix == ".csv":
            rows = (row for _, row in labels.read_table(file) if len(row) > 1 and row[1].strip())
            wnids = {Path(row[0]).stem: row[1].split()[0] for row in rows}
        else:
            ordered = [line.split()[-1] for line in labels.read_lines(file) if line.strip()]
            if file.name == _DEVKIT:
                labels.watched.append(file.parent / _META)
                by_number = _read_devkit_wnids(file.parent / _META)
                ordered = [by_number.get(number, "") for number in ordered]
            numbers = [_NUMBER.search(Path(name).stem) for name in names]
            ranks = [int(n.group(1)) - 1 if n else k for k, n in enumerate(numbers)]
            if max(ranks) >= len(ordered):
                raise InputError(
                    f"{file}: {len(ordered)} labels for {max(ranks) + 1} images in the split "
                    f"{self.split!r}"
                )
            wnids = {Path(n).stem: ordered[rank] for n, rank in zip(names, ranks, strict=True)}
        for name in names:
            wnid = wnids.get(Path(name).stem)
            if wnid:
                labels.add(str((folder / name).relative_to(labels.root)), wnid, str(file))
            else:
                labels.faults.append(f"{file}: no label for {name}, skipped")

    def _find_label_file(self, labels: ImageLabels) -> Path:
        root, file_names = labels.root, (_KAGGLE, *_SYNSETS, _DEVKIT)
        start = expand(self.labels) if self.labels is not None else root
        if start.is_file():
            return start
        if start.is_dir():
            patterns = ("", "*/", "*/*/", *(["../", "../../"] if self.labels is None else []))
            for name in file_names:
                for pattern in patterns:
                    for file in sorted(start.glob(pattern + name)):
                        real = os.path.realpath(file)
                        if os.path.basename(real) == name:
                            labels.allow(real)
                        return file
        raise InputError(
            f"ImageNet {self.root!r}: the images of {self.split!r} lie in one folder, and none of "
            f"{', '.join(file_names)} is below {str(start)!r}; set labels: PATH"
        )


def _read_devkit_wnids(meta: Path) -> dict[str, str]:
    """Return wnids by the development kit's own class numbers."""
    from scipy.io import loadmat

    try:
        content = read_bytes(meta, max_bytes=_MAX_META_BYTES, is_text=False)
        synsets = loadmat(io.BytesIO(content), squeeze_me=True)["synsets"]
        return {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in synsets}
    except Exception as error:  # scipy raises many kinds for damaged files
        raise InputError(f"{meta}: not the development kit's list of synsets ({error})") from None
