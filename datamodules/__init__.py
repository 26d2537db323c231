"""Data: sources, augmentation, the alternating sampler, the combined datamodule."""

if __name__ != "yolo_lightning.datamodules":
    raise ImportError(
        f"this folder was imported as {__name__!r}; import it as 'yolo_lightning.datamodules'"
    )

from yolo_lightning.datamodules.combined import CombinedDataModule
from yolo_lightning.datamodules.image_folder import ImageFolder
from yolo_lightning.datamodules.shapes import ShapesDetection, ShapesImageLabels
from yolo_lightning.datamodules.source import DetectionSource, ImageLabelSource
from yolo_lightning.datamodules.transforms import ClassificationAugmentation, DetectionAugmentation
from yolo_lightning.datamodules.voc import VOCFolder

__all__ = [
    "ClassificationAugmentation",
    "CombinedDataModule",
    "DetectionAugmentation",
    "DetectionSource",
    "ImageFolder",
    "ImageLabelSource",
    "ShapesDetection",
    "ShapesImageLabels",
    "VOCFolder",
]
