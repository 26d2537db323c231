"""Which source reads a dataset: told from its files."""

from pathlib import Path

from yolo_lightning.datamodules.annotated import AnnotatedImages
from yolo_lightning.datamodules.coco import COCOJson, is_coco
from yolo_lightning.datamodules.image_folder import ImageFolder, LabelCSV, images_below
from yolo_lightning.datamodules.imagenet import ImageNet
from yolo_lightning.datamodules.labelled import LabelledImages
from yolo_lightning.datamodules.voc import ILSVRCDetection, VOCFolder
from yolo_lightning.datamodules.yolo_txt import YOLOText
from yolo_lightning.errors import InputError

DETECTION_LAYOUTS = (
    "COCO JSON; a folder with Pascal VOC XML files; YOLO text (data.yaml, .data, or images/ beside "
    "labels/); ILSVRC folders"
)
_HELD_OUT = {"validation": ("val", "valid", "validation"), "test": ("test",)}
_SPLITS = {"train", "val", "valid", "validation", "test"}
LABEL_LAYOUTS = "a folder with one folder of images per class; ImageNet's; a CSV of path,label"


class AmbiguousLayout(InputError):
    """A folder holds more than one dataset, and nothing tells which is meant."""


def detection_source(place: str, split: str | None = None) -> AnnotatedImages:
    """Return the source that reads images with boxes.

    Args:
        place: a file or a folder.
        split: which part, where the layout has parts; the usual one for training by default.

    Raises:
        InputError: nothing there, or a layout that is not known.
    """
    path = _existing(place)
    if path.is_file():
        if path.suffix == ".json":
            return COCOJson(place)
        if path.suffix in (".yaml", ".yml", ".data", ".txt"):
            return YOLOText(place, split or "train")
    elif (path / "Annotations" / "DET").is_dir():
        return ILSVRCDetection(place, split or "train")
    elif (path / "Annotations" / "CLS-LOC").is_dir():
        return ILSVRCDetection(place, split or "train", "CLS-LOC")
    else:
        found = _detection_folder(path, place, split)
        if found is not None:
            return found
    raise InputError(f"{place}: no images with boxes recognised; known: {DETECTION_LAYOUTS}")


def _detection_folder(path: Path, place: str, split: str | None) -> AnnotatedImages | None:
    years = sorted(f.name for f in path.glob("VOC[0-9]*") if (f / "Annotations").is_dir())
    if years:
        numbers = [int(year.removeprefix("VOC")) for year in years]
        return VOCFolder(place, split or "trainval", numbers)
    if (path / "ImageSets" / "Main").is_dir():
        lists = {f.stem for f in (path / "ImageSets" / "Main").glob("*.txt")}
        return VOCFolder(
            place, split or next((n for n in ("trainval", "train") if n in lists), None)
        )
    for name in ("data.yaml", "dataset.yaml"):
        if (path / name).is_file():
            return YOLOText(str(path / name), split or "train")
    for folder in (path, path / "Annotations", path / "annotations"):
        if next(folder.glob("*.xml"), None):
            return VOCFolder(place, split)
    for folder in (path / (split or "train"), path):
        if next(folder.glob("*.xml"), None):
            return VOCFolder(place, split or "train")
    files = [*sorted(path.glob("*.json")), *sorted(path.glob("annotations/*.json"))]
    files += sorted((path / (split or "train")).glob("*.json"))
    coco = [file for file in files if is_coco(file)]
    if len(coco) > 1:
        named = [file for file in coco if (split or "train") in f"{file.parent.name}/{file.stem}"]
        named = [file for file in named if file.stem.startswith("instances")] or named
        if len(named) != 1:
            listed = ", ".join(str(file) for file in coco)
            raise AmbiguousLayout(f"{place}: several COCO files; name one of {listed}")
        coco = named
    if coco:
        return COCOJson(str(coco[0]))
    if (path / "labels").is_dir() or next(path.rglob("labels"), None):
        return YOLOText(place, split or "train")
    return None


def held_out(place: str, trained: AnnotatedImages) -> dict[str, AnnotatedImages]:
    """Return the parts of a dataset that its layout sets apart, by what a recipe calls them.

    Parts that hold images which are trained on are left out: VOC's `val` lies within `trainval`.

    Args:
        place: as for `detection_source`.
        trained: the part that is trained on.
    """
    used = {trained.image_name(k) for k in range(len(trained))}
    found: dict[str, AnnotatedImages] = {}
    for part, splits in _HELD_OUT.items():
        for split in splits:
            try:
                source = detection_source(place, split)
                names = {source.image_name(k) for k in range(len(source))}
            except InputError:
                continue  # this layout has no such part
            if names and not names & used:
                found[part] = source
                break
    return found


def label_source(place: str) -> LabelledImages:
    """Return the source that reads images with a label each.

    Args:
        place: a file or a folder.

    Raises:
        InputError: nothing there, or a layout that is not known.
    """
    path = _existing(place)
    if path.is_file():
        if path.suffix in (".csv", ".tsv"):
            return LabelCSV(place)
    elif (path / "Data" / "CLS-LOC").is_dir() or next(path.glob("train/n" + "[0-9]" * 8), None):
        return ImageNet(place)
    elif (path / "train").is_dir() and {f.name for f in _shown_folders(path)} <= _SPLITS:
        return label_source(str(path / "train"))
    elif any(next(images_below(f, []), None) for f in path.iterdir() if f.is_dir()):
        return ImageFolder(place)
    raise InputError(f"{place}: no images with labels recognised; known: {LABEL_LAYOUTS}")


def _existing(place: str) -> Path:
    path = Path(place).expanduser()
    if not path.exists():
        raise InputError(f"{place!r}: no such file or folder (working folder: {Path.cwd()})")
    return path


def _shown_folders(path: Path) -> list[Path]:
    return [f for f in path.iterdir() if f.is_dir() and not f.name.startswith(".")]
