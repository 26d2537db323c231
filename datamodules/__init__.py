"""Sources of images, augmentation, the alternating sampler, and the datamodule."""

if __name__ != "yolo_lightning.datamodules":
    raise ImportError(
        f"this folder was imported as {__name__!r}; import it as 'yolo_lightning.datamodules'"
    )

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yolo_lightning.datamodules.box_csv import BoxCSV
    from yolo_lightning.datamodules.coco import COCOJson
    from yolo_lightning.datamodules.combined import CombinedDataModule
    from yolo_lightning.datamodules.image_folder import ImageFolder, LabelCSV
    from yolo_lightning.datamodules.imagenet import ImageNet
    from yolo_lightning.datamodules.shapes import ShapesDetection, ShapesImageLabels
    from yolo_lightning.datamodules.source import DetectionSource, ImageLabelSource
    from yolo_lightning.datamodules.transforms import (
        ClassificationAugmentation,
        DetectionAugmentation,
    )
    from yolo_lightning.datamodules.voc import ILSVRCDetection, VOCFolder
    from yolo_lightning.datamodules.yolo_txt import YOLOText

# imported on first use: reading annotations needs neither Lightning nor albumentations
_HOME = {
    "BoxCSV": "box_csv",
    "COCOJson": "coco",
    "ClassificationAugmentation": "transforms",
    "CombinedDataModule": "combined",
    "DetectionAugmentation": "transforms",
    "DetectionSource": "source",
    "ILSVRCDetection": "voc",
    "ImageFolder": "image_folder",
    "ImageLabelSource": "source",
    "ImageNet": "imagenet",
    "LabelCSV": "image_folder",
    "ShapesDetection": "shapes",
    "ShapesImageLabels": "shapes",
    "VOCFolder": "voc",
    "YOLOText": "yolo_txt",
}

__all__ = [
    "BoxCSV",
    "COCOJson",
    "ClassificationAugmentation",
    "CombinedDataModule",
    "DetectionAugmentation",
    "DetectionSource",
    "ILSVRCDetection",
    "ImageFolder",
    "ImageLabelSource",
    "ImageNet",
    "LabelCSV",
    "ShapesDetection",
    "ShapesImageLabels",
    "VOCFolder",
    "YOLOText",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
