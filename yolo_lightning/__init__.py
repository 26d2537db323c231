"""Train YOLOv2 and YOLO9000 on boxes and image labels together, over a hierarchy of classes.

Public names are imported on first use, so that ``import yolo_lightning`` is fast.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from yolo_lightning.version import __version__

# Set before importing the libraries that read them: they check for updates or report usage, but
# this package uses the network only on request.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # no complaint where git is not installed

if TYPE_CHECKING:
    from yolo_lightning.classifier import ClassifierModule
    from yolo_lightning.cli.fit import Run, fit
    from yolo_lightning.datamodules.combined import CombinedDataModule
    from yolo_lightning.detector import DetectorModule
    from yolo_lightning.inference.loading import load
    from yolo_lightning.tree.wordtree import WordTree

__all__ = [
    "ClassifierModule",
    "CombinedDataModule",
    "DetectorModule",
    "Run",
    "WordTree",
    "__version__",
    "fit",
    "load",
]

_MODULES = {
    "ClassifierModule": "yolo_lightning.classifier",
    "CombinedDataModule": "yolo_lightning.datamodules.combined",
    "DetectorModule": "yolo_lightning.detector",
    "Run": "yolo_lightning.cli.fit",
    "WordTree": "yolo_lightning.tree.wordtree",
    "fit": "yolo_lightning.cli.fit",
    "load": "yolo_lightning.inference.loading",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use."""
    if name not in _MODULES:
        from yolo_lightning.errors import nearest

        hint = nearest(name, _MODULES)
        raise AttributeError(f"module 'yolo_lightning' has no attribute {name!r} {hint}".rstrip())
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
