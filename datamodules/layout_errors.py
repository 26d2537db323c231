"""What a dataset contains that is not recognised, and what to do about it."""

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from yolo_lightning.datamodules.dataset_files import DatasetFiles
from yolo_lightning.errors import InputError
from yolo_lightning.images import is_image

_MAX_FOLDERS, _MAX_SHOWN = 2_000, 6  # that are listed; that are shown
_KINDS = {
    "XML": (".xml",), "TXT": (".txt",), "JSON": (".json",), "CSV": (".csv", ".tsv"),
    "YAML": (".yaml", ".yml"), "archive": (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"),
    "TFRecord": (".tfrecord", ".tfrecords", ".record"), "Parquet": (".parquet", ".arrow"),
    "TIFF": (".tif", ".tiff"), "HEIC": (".heic", ".heif", ".avif"),
    "video": (".mp4", ".avi", ".mov", ".mkv"),
}  # fmt: skip

_OTHER_IMAGES = {"TIFF", "HEIC"}

_HINTS: list[tuple[Callable[[set[str]], bool], str]] = [
    (lambda kinds: "archive" in kinds and "image" not in kinds, "unpack the archive first"),
    (lambda kinds: bool(kinds & {"TFRecord", "Parquet"}),
     "TFRecord and Parquet are not read: export the dataset as COCO, Pascal VOC or YOLO"),
    (lambda kinds: bool(kinds & _OTHER_IMAGES) and "image" not in kinds,
     "TIFF and HEIC are not read: convert the images to JPEG or PNG"),
    (lambda kinds: "JSON" in kinds,
     "the JSON is not COCO's (of LabelMe or VIA?): export the annotations as COCO"),
    (lambda kinds: "CSV" in kinds,
     "the table needs columns such as filename,xmin,ymin,xmax,ymax,class (path,label for labels)"),
    (lambda kinds: "TXT" in kinds,
     "YOLO texts lie beside their images, or in labels/ beside images/"),
    (lambda kinds: kinds == {"image"},
     "there are images but no boxes: add the annotations, or give the folder above that has both; "
     "one folder of images per class is for --classification"),
    (lambda kinds: kinds == {"video"}, "annotate frames of the video first"),
]  # fmt: skip


class UnknownLayout(InputError):
    """A file or folder whose layout is not recognised."""


def describe_files(root: Path) -> str:
    """Return what files a folder has, such as ``164 XML files in annots/``, and what to do."""
    if not root.is_dir():
        return f"no images with boxes recognised{_hint({_kind(root.name)})}"
    counts = _count_files(root)
    shown = [
        f"{count:,} {_noun(kind, count)}" + (f" in {place}/" if place != "." else "")
        for (kind, place), count in counts.most_common(_MAX_SHOWN)
    ]
    more = " …" if len(counts) > _MAX_SHOWN else ""
    kinds = {kind for kind, _ in counts} - {"other"}
    found = f"found {', '.join(shown)}{more}" if shown else "the folder is empty"
    return f"no images with boxes recognised; {found}{_hint(kinds)}"


def describe_unread_images(root: Path) -> str:
    """Return how many images of other formats a folder has, and what to do; empty if none."""
    found = [
        f"{count:,} {_noun(kind, count)}"
        for (kind, _), count in _count_files(root).most_common()
        if kind in _OTHER_IMAGES
    ]
    return f"found {', '.join(found[:_MAX_SHOWN])}{_hint(_OTHER_IMAGES)}" if found else ""


def _count_files(root: Path) -> Counter[tuple[str, str]]:
    """Return how many files there are, by their kind and folder."""
    counts: Counter[tuple[str, str]] = Counter()
    folders = DatasetFiles(root).walk_folders(root)
    for parent, names in itertools.islice(folders, _MAX_FOLDERS):
        place = Path(parent).relative_to(root).as_posix()
        counts.update((_kind(name), place) for name in names)
    return counts


def _kind(name: str) -> str:
    if is_image(name):
        return "image"
    suffix = Path(name).suffix.lower()
    return next((kind for kind, suffixes in _KINDS.items() if suffix in suffixes), "other")


def _noun(kind: str, count: int) -> str:
    many = "" if count == 1 else "s"
    return f"{kind}{many}" if kind in ("image", "archive", "video") else f"{kind} file{many}"


def _hint(kinds: set[str]) -> str:
    return next((f"\n  {text}" for applies, text in _HINTS if applies(kinds)), "")
