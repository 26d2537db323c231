"""Choose the source for a dataset by its files."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from yolo_lightning.datamodules.box_csv import BoxCSV, is_box_table
from yolo_lightning.datamodules.coco import COCOJson, is_coco
from yolo_lightning.datamodules.dataset_files import (
    SPLITS,
    DatasetFiles,
    UnsafePath,
    visible_folders,
)
from yolo_lightning.datamodules.files import AnnotatedImages, LabelledImages
from yolo_lightning.datamodules.image_folder import ImageFolder, LabelCSV
from yolo_lightning.datamodules.imagenet import ImageNet
from yolo_lightning.datamodules.layout_errors import UnknownLayout, describe_files
from yolo_lightning.datamodules.voc import (
    XML_FOLDERS,
    ILSVRCDetection,
    VOCFolder,
    voc_years,
    xml_folder_of,
)
from yolo_lightning.datamodules.yolo_txt import YOLOText, find_description
from yolo_lightning.errors import InputError, expand, require_path
from yolo_lightning.images import is_image

DETECTION_LAYOUTS = (
    "COCO JSON; a folder with Pascal VOC XML files; YOLO text (data.yaml, .data, images/ beside "
    "labels/, or texts beside images); a CSV of boxes; ILSVRC folders"
)
LABEL_LAYOUTS = "a folder with one folder of images per class; ImageNet's; a CSV of path,label"
_HELD_OUT_SPLITS = {"validation": ("val", "valid", "validation"), "test": ("test",)}
_MAX_FILES = 50  # of a folder that are opened: others are one for each image
_BOX_FOLDERS = {"images", "jpegimages", "ground_truth", *XML_FOLDERS}  # of boxes, no classes


class AmbiguousLayout(InputError):
    """A folder contains several datasets."""


def detection_source(
    path: str,
    split: str | None = None,
    allow_outside: bool = False,
    images: str | None = None,
    names: str | list[str] | None = None,
) -> AnnotatedImages:
    """Return the source for a file or folder of images with boxes; by default the training split.

    Args:
        path: the file or folder.
        split: the part of the dataset.
        allow_outside: whether the dataset may name files outside its folder; see the sources.
        images: folder of the images, if it is not found beside the annotations.
        names: the classes of YOLO texts, or a file with one a line, if the dataset has none.

    Raises:
        InputError: the path is missing, or its layout is unknown, or has no such option.
    """
    require_path(path)
    source = _detection_source(expand(path), split, allow_outside)
    source.allow_outside = allow_outside
    for name, value in (("images", images), ("names", names)):
        if value is not None and not hasattr(source, name):
            raise InputError(f"{source.name}: this format says itself what its {name} are")
        if value is not None:
            setattr(source, name, value)
    return source


def _detection_source(root: Path, split: str | None, allow_outside: bool) -> AnnotatedImages:
    path, train = str(root), split or "train"
    challenges = [c for c in ("DET", "CLS-LOC") if (root / "Annotations" / c).is_dir()]
    source: AnnotatedImages | None = None
    if not root.is_dir():
        source = _file_source(root, train)
    elif challenges:
        source = ILSVRCDetection(path, train, challenges[0])
    else:
        openers = (_voc_source, _coco_source, _yolo_source, _csv_source)
        found = (opener(root, path, split) for opener in openers)
        source = next((one for one in found if one is not None), None)  # one of no images is false
        folders = [f for f in visible_folders(root) if not f.is_symlink()]
        if isinstance(source, BoxCSV):
            DatasetFiles(root, allow_outside).require_inside(Path(source.file))
        if source is None and len(folders) == 1 and folders[0].name.lower() not in _BOX_FOLDERS:
            with contextlib.suppress(UnknownLayout):  # an archive is unpacked into one folder
                source = _detection_source(folders[0], split, allow_outside)
    if source is None:
        raise UnknownLayout(f"{path}: {describe_files(root)}\n  wanted: {DETECTION_LAYOUTS}")
    return source


def _file_source(file: Path, split: str) -> AnnotatedImages | None:
    suffix, path = file.suffix.lower(), str(file)
    if suffix == ".json":
        return COCOJson(path)
    if suffix in (".yaml", ".yml", ".data", ".txt"):
        return YOLOText(path, split)
    return BoxCSV(path) if suffix in (".csv", ".tsv") and is_box_table(file) else None


def _voc_source(root: Path, path: str, split: str | None) -> AnnotatedImages | None:
    """Return the source for a VOC folder; a description of a YOLO dataset goes first."""
    years = voc_years(root)
    if years:
        return VOCFolder(path, split or "trainval", years)
    sets = root / "ImageSets" / "Main"
    if sets.is_dir():
        defaults = (name for name in ("trainval", "train") if (sets / f"{name}.txt").is_file())
        return VOCFolder(path, split or next(defaults, None))
    described = find_description(root)
    if described is not None and (source := _described(described, split or "train")) is not None:
        return source
    for part in (split,) if split else (None, "train"):
        if xml_folder_of(root, part) is not None:
            return VOCFolder(path, part)
    return None


def _described(file: Path, split: str) -> AnnotatedImages | None:
    """Return the source of a ``data.yaml``, unless what it names is not found from here."""
    source = YOLOText(str(file), split)
    try:
        source.list_images()
    except UnsafePath:
        return source  # reading it raises the same, unless that is allowed
    except InputError:
        return None
    return source


def _coco_source(root: Path, path: str, split: str | None) -> AnnotatedImages | None:
    file = _one_of(root, path, split or "train", "json", is_coco, "COCO files")
    return COCOJson(str(file)) if file is not None else None


def _csv_source(root: Path, path: str, split: str | None) -> AnnotatedImages | None:
    file = _one_of(root, path, split or "train", "csv", is_box_table, "tables of boxes")
    return BoxCSV(str(file)) if file is not None else None


def _one_of(
    root: Path, path: str, split: str, suffix: str, is_known: Callable[[Path], bool], what: str
) -> Path | None:
    """Return the annotation file of a split, the only one or the one that is named so."""
    names = [f.name for f in visible_folders(root) if f.name.lower() in _BOX_FOLDERS]
    folders = dict.fromkeys([root, *(root / name for name in names), root / split])
    candidates = (f for d in folders for f in sorted(d.glob(f"*.{suffix}"))[:_MAX_FILES])
    files = [file for file in candidates if is_known(file)]
    if len(files) > 1:
        matches = [file for file in files if split in f"{file.parent.name}/{file.stem}"]
        matches = [file for file in matches if file.stem.startswith("instances")] or matches
        if len(matches) != 1:
            found = ", ".join(str(file) for file in files)
            raise AmbiguousLayout(f"{path}: several {what}; name one of {found}")
        files = matches
    return files[0] if files else None


def _yolo_source(root: Path, path: str, split: str | None) -> AnnotatedImages | None:
    folders = (root, root / (split or "train"), root / "images", root / "obj_train_data")
    inside = [folder.name.lower() for folder in visible_folders(root)]
    if len(inside) == 1 and inside[0] not in {"images", "labels", *SPLITS} and not _has_file(root):
        return None  # an archive is unpacked into one folder, which may have names of classes
    has_texts = next(root.rglob("labels"), None) is not None or any(map(_has_texts, folders))
    return YOLOText(path, split or "train") if has_texts else None


def _has_file(folder: Path) -> bool:
    return any(path.is_file() for path in folder.iterdir())


def _has_texts(folder: Path) -> bool:
    """Return whether an image has a text of its name beside it."""
    names = DatasetFiles(folder).names(folder)
    return any(f"{os.path.splitext(name)[0]}.txt" in names for name in names if is_image(name))


def held_out(path: str, training: AnnotatedImages) -> dict[str, AnnotatedImages]:
    """Return the splits ``validation`` and ``test`` that share no images with training."""
    # VOC's val, for example, is a part of trainval
    training_names = {training.image_name(k) for k in range(len(training))}
    sources: dict[str, AnnotatedImages] = {}
    for part, splits in _HELD_OUT_SPLITS.items():
        for split in splits:
            try:
                options = (getattr(training, name, None) for name in ("images", "names"))
                source = detection_source(path, split, training.allow_outside, *options)
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
    elif (root / "train").is_dir() and {f.name for f in visible_folders(root)} <= {*SPLITS}:
        return _label_source(str(root / "train"))
    else:
        folders = [f for f in visible_folders(root) if f.name.lower() not in _BOX_FOLDERS]
        if any(any(map(is_image, DatasetFiles(root).walk(f))) for f in folders):
            return ImageFolder(path)
    raise InputError(f"{path}: no images with labels recognised; known: {LABEL_LAYOUTS}")
