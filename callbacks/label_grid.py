"""`LabelGrid`: draws the first batch of a training with its labels."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from yolo_lightning.batches import ClassificationBatch, DetectionBatch
from yolo_lightning.callbacks.multi_scale import resize
from yolo_lightning.images import Image
from yolo_lightning.visualization.drawing import draw_batch, save_image

_MAX_IMAGES, _MAX_SIDE = 18, 320


class LabelGrid(pl.Callback):
    """Draw images of the first batches as the network receives them, with their labels.

    ``training_boxes.jpg`` in the run folder holds those of the first batch with boxes,
    ``training_labels.jpg`` those of the first one with image labels. Errors become warnings.
    """

    def __init__(self) -> None:
        self._drawn: set[str] = set()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw the first batch of each kind, unless an earlier process has drawn it."""
        kinds = {DetectionBatch: "training_boxes.jpg", ClassificationBatch: "training_labels.jpg"}
        name = kinds.get(type(batch), "")
        if not name or name in self._drawn or not trainer.is_global_zero:
            return
        self._drawn.add(name)
        path = Path(trainer.default_root_dir) / name
        if trainer.fast_dev_run or path.exists():  # type: ignore[attr-defined]
            return
        try:
            save_image(path, _draw(batch, pl_module.tree.names))
        except Exception as error:  # a failed drawing must not stop training
            rank_zero_warn(f"cannot draw the first batch: {type(error).__name__}: {error}")


def _draw(batch: DetectionBatch | ClassificationBatch, names: Sequence[str]) -> Image:
    images = resize(batch.images[:_MAX_IMAGES], min(_MAX_SIDE, batch.images.shape[-1]))
    shown = replace(batch, images=(images * 255).round().byte())
    return draw_batch(shown.to("cpu"), names, _MAX_IMAGES)
