"""Data: sources, augmentation, the alternating sampler, the combined datamodule."""

if __name__ != "yolo_lightning.datamodules":
    raise ImportError(
        f"this folder was imported as {__name__!r}; import it as 'yolo_lightning.datamodules'"
    )

from yolo_lightning.datamodules.coco import COCOJson
from yolo_lightning.datamodules.combined import CombinedDataModule
from yolo_lightning.datamodules.image_folder import ImageFolder, LabelCSV
from yolo_lightning.datamodules.imagenet import ImageNet
from yolo_lightning.datamodules.shapes import ShapesDetection, ShapesImageLabels
from yolo_lightning.datamodules.source import DetectionSource, ImageLabelSource
from yolo_lightning.datamodules.transforms import ClassificationAugmentation, DetectionAugmentation
from yolo_lightning.datamodules.voc import ILSVRCDetection, VOCFolder
from yolo_lightning.datamodules.yolo_txt import YOLOText

__all__ = [
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
