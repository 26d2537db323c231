"""From a checkpoint to the module that it holds."""

from pathlib import Path

import torch

from yolo_lightning.checkpoints.validation import read_checkpoint
from yolo_lightning.classifier import ClassifierModule
from yolo_lightning.detector import DetectorModule
from yolo_lightning.errors import InputError

Module = DetectorModule | ClassifierModule


def load(path: str | Path, device: str | torch.device = "cpu") -> Module:
    """Return the module of a checkpoint, trained or imported, ready to predict.

    Args:
        path: of the checkpoint.
        device: where its weights go.

    Raises:
        InputError: no such file, a damaged one, not a checkpoint of this program and version, or
            no such device.
    """
    checkpoint = read_checkpoint(path)
    kinds: dict[str, type[DetectorModule] | type[ClassifierModule]]
    kinds = {"DetectorModule": DetectorModule, "ClassifierModule": ClassifierModule}
    kind = kinds.get(str(checkpoint.get("module")))
    if kind is None:
        holds = str(checkpoint.get("module"))[:60]
        raise InputError(f"{path}: holds a {holds}; allowed: {', '.join(kinds)}")
    try:
        # as large as what the file holds: `read_checkpoint` has compared the two
        module = kind(**checkpoint["hyper_parameters"])
        module.load_state_dict(checkpoint["state_dict"])
    except InputError as error:
        raise InputError(f"{path}: {str(error)[:500]}") from None
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:500]
        raise InputError(f"{path}: not a checkpoint of this version ({reason})") from None
    return ready(module, device)


def ready(module: Module, device: str | torch.device) -> Module:
    """Return a module in evaluation mode, on a device.

    Raises:
        InputError: no such device.
    """
    try:
        return module.eval().to(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {str(device)!r}: {str(error).splitlines()[0]}") from None
