"""From a checkpoint to the module that it holds."""

from pathlib import Path

import torch

from yolo_lightning.checkpoints import read_checkpoint
from yolo_lightning.classifier import ClassifierModule
from yolo_lightning.detector import DetectorModule
from yolo_lightning.errors import InputError


def load(path: str | Path, device: str | torch.device = "cpu") -> DetectorModule | ClassifierModule:
    """Return the module of a checkpoint, trained or imported, ready to predict.

    Args:
        path: of the checkpoint.
        device: where its weights go.

    Raises:
        InputError: no such file, or not a checkpoint of this program.
    """
    checkpoint = read_checkpoint(path)
    kinds: dict[str, type[DetectorModule] | type[ClassifierModule]]
    kinds = {"DetectorModule": DetectorModule, "ClassifierModule": ClassifierModule}
    kind = kinds.get(str(checkpoint.get("module")))
    if kind is None:
        raise InputError(f"{path}: holds a {checkpoint.get('module')}; allowed: {', '.join(kinds)}")
    module = kind(**checkpoint["hyper_parameters"])
    module.load_state_dict(checkpoint["state_dict"])
    module.eval().to(device)
    return module
