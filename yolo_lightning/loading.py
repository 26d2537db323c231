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
        InputError: no such file, not a checkpoint of this program and version, or no such device.
    """
    checkpoint = read_checkpoint(path)
    kinds: dict[str, type[DetectorModule] | type[ClassifierModule]]
    kinds = {"DetectorModule": DetectorModule, "ClassifierModule": ClassifierModule}
    kind = kinds.get(str(checkpoint.get("module")))
    if kind is None:
        raise InputError(f"{path}: holds a {checkpoint.get('module')}; allowed: {', '.join(kinds)}")
    try:
        module = kind(**checkpoint["hyper_parameters"])
        module.load_state_dict(checkpoint["state_dict"])
    except (TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: not a checkpoint of this version ({reason})") from None
    try:
        module.eval().to(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {str(device)!r}: {str(error).splitlines()[0]}") from None
    return module
