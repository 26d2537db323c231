"""Choose the source for a dataset by its files."""

from pathlib import Path

from yolo_lightning.datamodules.coco import COCOJson, is_coco
from yolo_lightning.datamodules.dataset_files import DatasetFiles, UnsafePath, visible_folders
from yolo_lightning.datamodules.files import AnnotatedImages, LabelledImages
from yolo_lightning.datamodules.image_folder import ImageFolder, LabelCSV
from yolo_lightning.datamodules.imagenet import ImageNet
from yolo_lightning.datamodules.voc import ILSVRCDetection, VOCFolder, voc_years
from yolo_lightning.datamodules.yolo_txt import YOLOText
from yolo_lightning.errors import InputError, require_path
from yolo_lightning.images import is_image

DETECTION_LAYOUTS = (
    "COCO JSON; a folder with Pascal VOC XML files; YOLO text (data.yaml, .data, or images/ beside "
    "labels/); ILSVRC folders"
)
LABEL_LAYOUTS = "a folder with one folder of images per class; ImageNet's; a CSV of path,label"
_HELD_OUT_SPLITS = {"validation": ("val", "valid", "validation"), "test": ("test",)}
_SPLITS = {"train", "val", "valid", "validation", "test"}


class AmbiguousLayout(InputError):
    """A folder contains several datasets."""


def detection_source(
    path: str, split: str | None = None, allow_outside: bool = False
) -> AnnotatedImages:
    """Return the source for a file or folder of images with boxes; by default the training split.

    Args:
        path: the file or folder.
        split: the part of the dataset.
        allow_outside: whether the dataset may name files outside its folder; see the sources.

    Raises:
        InputError: the path is missing, or its layout is unknown.
    """
    source = _detection_source(path, split)
    source.allow_outside = allow_outside
    return source


def _detection_source(path: str, split: str | None) -> AnnotatedImages:
    root, train = require_path(path), split or "train"
    source: AnnotatedImages | None = None
    if root.suffix == ".json" and root.is_file():
        source = COCOJson(path)
    elif root.suffix in (".yaml", ".yml", ".data", ".txt") and root.is_file():
        source = YOLOText(path, train)
    elif root.is_dir():
        for challenge in ("DET", "CLS-LOC"):
            if (root / "Annotations" / challenge).is_dir():
                return ILSVRCDetection(path, train, challenge)
        source = _voc_source(root, path, split)
        if source is None:  # a source of no images is false
            source = _coco_source(root, path, train)
        if source is None and next(root.rglob("labels"), None):
            source = YOLOText(path, train)
    if source is None:
        raise InputError(f"{path}: no images with boxes recognised; known: {DETECTION_LAYOUTS}")
    return source


def _voc_source(root: Path, path: str, split: str | None) -> AnnotatedImages | None:
    """Return the source for a VOC folder, or for a description of a YOLO dataset."""
    years = voc_years(root)
    if years:
        return VOCFolder(path, split or "trainval", years)
    sets = root / "ImageSets" / "Main"
    if sets.is_dir():
        defaults = (name for name in ("trainval", "train") if (sets / f"{name}.txt").is_file())
        return VOCFolder(path, split or next(defaults, None))
    for name in ("data.yaml", "dataset.yaml"):
        if (root / name).is_file():
            return YOLOText(str(root / name), split or "train")
    for folder in (root, root / "Annotations", root / "annotations"):
        if next(folder.glob("*.xml"), None):
            return VOCFolder(path, split)
    if next((root / (split or "train")).glob("*.xml"), None):
        return VOCFolder(path, split or "train")
    return None


def _coco_source(root: Path, path: str, split: str) -> AnnotatedImages | None:
    patterns = ("*.json", "annotations/*.json", f"{split}/*.json")
    files = [f for p in patterns for f in sorted(root.glob(p)) if is_coco(f)]
    if len(files) > 1:
        matches = [file for file in files if split in f"{file.parent.name}/{file.stem}"]
        matches = [file for file in matches if file.stem.startswith("instances")] or matches
        if len(matches) != 1:
            names = ", ".join(str(file) for file in files)
            raise AmbiguousLayout(f"{path}: several COCO files; name one of {names}")
        files = matches
    return COCOJson(str(files[0])) if files else None


def held_out(path: str, training: AnnotatedImages) -> dict[str, AnnotatedImages]:
    """Return the splits ``validation`` and ``test`` that share no images with training."""
    # VOC's val, for example, is a part of trainval
    training_names = {training.image_name(k) for k in range(len(training))}
    sources: dict[str, AnnotatedImages] = {}
    for part, splits in _HELD_OUT_SPLITS.items():
        for split in splits:
            try:
                source = detection_source(path, split, training.allow_outside)
                names = {source.image_name(k) for k in range(len(source))}
            except UnsafePath:
                raise
            except InputError:
                continue  # the layout has no such split
            if names and not names & training_names:
                sources[part] = source
                break
    return sources


def label_source(path: str, allow_outside: bool = False) -> LabelledImages:
    """Return the source for a file or folder of images with one label each.

    Raises:
        InputError: the path is missing, or its layout is unknown.
    """
    source = _label_source(path)
    source.allow_outside = allow_outside
    return source


def _label_source(path: str) -> LabelledImages:
    root = require_path(path)
    if root.is_file():
        if root.suffix in (".csv", ".tsv"):
            return LabelCSV(path)
    elif (root / "Data" / "CLS-LOC").is_dir() or next(root.glob("train/n" + "[0-9]" * 8), None):
        return ImageNet(path)
    elif (root / "train").is_dir() and {f.name for f in visible_folders(root)} <= _SPLITS:
        return _label_source(str(root / "train"))
    elif any(any(map(is_image, DatasetFiles(root).walk(f))) for f in visible_folders(root)):
        return ImageFolder(path)
    raise InputError(f"{path}: no images with labels recognised; known: {LABEL_LAYOUTS}")
