"""Check what callbacks monitor, before a training starts."""

import lightning.pytorch as pl

from yolo_lightning.errors import InputError, nearest, short
from yolo_lightning.training_module import TrainingModule

SETTINGS = ("epoch", "step", "train/lr", "train/image_size")  # logged, but no metrics
_MAX_SHOWN = 60


def check_monitors(trainer: pl.Trainer, model: TrainingModule) -> None:
    """Check that callbacks such as `ModelCheckpoint` monitor metrics that the model has.

    Raises:
        InputError: a metric has another name.
    """
    names = model.metric_names()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        monitor = getattr(callback, "monitor", None)
        if monitor is None or monitor in names or monitor in SETTINGS:
            continue
        more = ", …" if len(names) > _MAX_SHOWN else ""
        allowed = f"allowed: {', '.join(names[:_MAX_SHOWN])}{more}"
        raise InputError(
            f"trainer.callbacks: {type(callback).__name__} monitors {short(monitor)}; "
            f"{nearest(monitor, names)} {allowed}".replace(";  ", "; ")
        )
