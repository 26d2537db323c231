"""Loading a module from a checkpoint for inference."""

from pathlib import Path

import torch
from torch import nn

from yolo_lightning.checkpoints.validation import read_checkpoint
from yolo_lightning.classifier import ClassifierModule
from yolo_lightning.detector import DetectorModule
from yolo_lightning.errors import InputError
from yolo_lightning.models.networks import fold_for_prediction

Module = DetectorModule | ClassifierModule


def load(
    path: str | Path, device: str | torch.device = "cpu", backbone: nn.Module | None = None
) -> Module:
    """Load a trained or imported module from a checkpoint, in evaluation mode.

    Its predictions fold batch norm into the convolutions, see `fold_for_prediction`; it can be
    trained, exported and saved as any other.

    `backbone` is required if the checkpoint's backbone is a custom module: one of the same class
    and options. A class that a checkpoint names is never imported.

    Raises:
        InputError: the file does not exist, is damaged or is not a checkpoint of this version, or
            the device does not exist.
    """
    checkpoint = read_checkpoint(path)
    if backbone is not None:
        checkpoint["hyper_parameters"]["backbone"] = backbone
    module_classes: dict[str, type[DetectorModule] | type[ClassifierModule]]
    module_classes = {"DetectorModule": DetectorModule, "ClassifierModule": ClassifierModule}
    name = str(checkpoint.get("module"))
    module_class = module_classes.get(name)
    if module_class is None:
        raise InputError(f"{path}: holds a {name[:60]}; allowed: {', '.join(module_classes)}")
    try:
        # needs no more memory than the file: `read_checkpoint` has compared the two
        module = module_class(**checkpoint["hyper_parameters"])
        module.load_state_dict(checkpoint["state_dict"])
    except InputError as error:
        raise InputError(f"{path}: {str(error)[:500]}") from None
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:500]
        raise InputError(f"{path}: not a checkpoint of this version ({reason})") from None
    return prepare_for_inference(module, device)


def prepare_for_inference(module: Module, device: str | torch.device) -> Module:
    """Set evaluation mode, fold batch norm, and move the module to a device, which must exist."""
    fold_for_prediction(module)
    try:
        return module.eval().to(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {str(device)!r}: {str(error).splitlines()[0]}") from None


def select_device(name: str | None) -> torch.device:
    """Return the named CPU or CUDA device; None selects a GPU if available."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"--device is {name!r}; allowed: cpu, cuda, cuda:1 …")
    return device
