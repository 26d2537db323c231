"""Choose the source for a dataset by its files."""

from pathlib import Path

from yolo_lightning.datamodules.coco import COCOJson, is_coco
from yolo_lightning.datamodules.files import AnnotatedImages, LabelledImages, iter_images
from yolo_lightning.datamodules.image_folder import ImageFolder, LabelCSV
from yolo_lightning.datamodules.imagenet import ImageNet
from yolo_lightning.datamodules.voc import ILSVRCDetection, VOCFolder
from yolo_lightning.datamodules.yolo_txt import YOLOText
from yolo_lightning.errors import InputError

DETECTION_LAYOUTS = (
    "COCO JSON; a folder with Pascal VOC XML files; YOLO text (data.yaml, .data, or images/ beside "
    "labels/); ILSVRC folders"
)
LABEL_LAYOUTS = "a folder with one folder of images per class; ImageNet's; a CSV of path,label"
_HELD_OUT_SPLITS = {"validation": ("val", "valid", "validation"), "test": ("test",)}
_SPLITS = {"train", "val", "valid", "validation", "test"}


class AmbiguousLayout(InputError):
    """A folder contains several datasets."""


def detection_source(path: str, split: str | None = None) -> AnnotatedImages:
    """Return the source for a file or folder of images with boxes; by default the training split.

    Raises:
        InputError: the path is missing, or its layout is unknown.
    """
    root = _require(path)
    if root.is_file():
        if root.suffix == ".json":
            return COCOJson(path)
        if root.suffix in (".yaml", ".yml", ".data", ".txt"):
            return YOLOText(path, split or "train")
    elif (root / "Annotations" / "DET").is_dir():
        return ILSVRCDetection(path, split or "train")
    elif (root / "Annotations" / "CLS-LOC").is_dir():
        return ILSVRCDetection(path, split or "train", "CLS-LOC")
    else:
        source = (
            _voc_source(root, path, split)
            or _coco_source(root, path, split)
            or _yolo_folder(root, path, split)
        )
        if source is not None:
            return source
    raise InputError(f"{path}: no images with boxes recognised; known: {DETECTION_LAYOUTS}")


def _voc_source(root: Path, path: str, split: str | None) -> AnnotatedImages | None:
    """Return the source for a VOC folder, or for a description of a YOLO dataset."""
    years = sorted(f.name for f in root.glob("VOC[0-9]*") if (f / "Annotations").is_dir())
    if years:
        numbers = [int(year.removeprefix("VOC")) for year in years]
        return VOCFolder(path, split or "trainval", numbers)
    if (root / "ImageSets" / "Main").is_dir():
        sets = {f.stem for f in (root / "ImageSets" / "Main").glob("*.txt")}
        default = next((name for name in ("trainval", "train") if name in sets), None)
        return VOCFolder(path, split or default)
    for name in ("data.yaml", "dataset.yaml"):
        if (root / name).is_file():
            return YOLOText(str(root / name), split or "train")
    for folder in (root, root / "Annotations", root / "annotations"):
        if next(folder.glob("*.xml"), None):
            return VOCFolder(path, split)
    for folder in (root / (split or "train"), root):
        if next(folder.glob("*.xml"), None):
            return VOCFolder(path, split or "train")
    return None


def _coco_source(root: Path, path: str, split: str | None) -> AnnotatedImages | None:
    files = [*sorted(root.glob("*.json")), *sorted(root.glob("annotations/*.json"))]
    files += sorted((root / (split or "train")).glob("*.json"))
    files = [file for file in files if is_coco(file)]
    if len(files) > 1:
        matches = [
            file for file in files if (split or "train") in f"{file.parent.name}/{file.stem}"
        ]
        matches = [file for file in matches if file.stem.startswith("instances")] or matches
        if len(matches) != 1:
            names = ", ".join(str(file) for file in files)
            raise AmbiguousLayout(f"{path}: several COCO files; name one of {names}")
        files = matches
    return COCOJson(str(files[0])) if files else None


def _yolo_folder(root: Path, path: str, split: str | None) -> AnnotatedImages | None:
    if (root / "labels").is_dir() or next(root.rglob("labels"), None):
        return YOLOText(path, split or "train")
    return None


def held_out(path: str, training: AnnotatedImages) -> dict[str, AnnotatedImages]:
    """Return the splits ``validation`` and ``test`` that share no images with training."""
    # VOC's val, for example, is a part of trainval
    training_names = {training.image_name(k) for k in range(len(training))}
    sources: dict[str, AnnotatedImages] = {}
    for part, splits in _HELD_OUT_SPLITS.items():
        for split in splits:
            try:
                source = detection_source(path, split)
                names = {source.image_name(k) for k in range(len(source))}
            except InputError:
                continue  # the layout has no such split
            if names and not names & training_names:
                sources[part] = source
                break
    return sources


def label_source(path: str) -> LabelledImages:
    """Return the source for a file or folder of images with one label each.

    Raises:
        InputError: the path is missing, or its layout is unknown.
    """
    root = _require(path)
    if root.is_file():
        if root.suffix in (".csv", ".tsv"):
            return LabelCSV(path)
    elif (root / "Data" / "CLS-LOC").is_dir() or next(root.glob("train/n" + "[0-9]" * 8), None):
        return ImageNet(path)
    elif (root / "train").is_dir() and {f.name for f in _visible_folders(root)} <= _SPLITS:
        return label_source(str(root / "train"))
    elif any(next(iter_images(f, []), None) for f in root.iterdir() if f.is_dir()):
        return ImageFolder(path)
    raise InputError(f"{path}: no images with labels recognised; known: {LABEL_LAYOUTS}")


def _require(path: str) -> Path:
    root = Path(path).expanduser()
    if not root.exists():
        raise InputError(f"{path!r}: no such file or folder (working folder: {Path.cwd()})")
    return root


def _visible_folders(root: Path) -> list[Path]:
    return [f for f in root.iterdir() if f.is_dir() and not f.name.startswith(".")]
