"""Callback that writes a report of the last validation of a training."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from yolo_lightning.evaluation.detection import DetectionEvaluation
from yolo_lightning.evaluation.label_accuracy import LabelAccuracy
from yolo_lightning.evaluation.report import num_images_read, write_report
from yolo_lightning.tracking.logger import run_loggers


class ValidationReport(pl.Callback):
    """Write the report of the last validation, as `validate` does, when training ends."""

    def __init__(self) -> None:
        self._step: int | None = None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Store the step of the last validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._step = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the report, on rank 0."""
        evaluation = getattr(pl_module, "evaluation", None)
        if not isinstance(evaluation, DetectionEvaluation | LabelAccuracy) or self._step is None:
            return
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        source = getattr(trainer.datamodule, "validation", None)  # type: ignore[attr-defined]
        if source is None:
            return
        folder = Path(trainer.default_root_dir) / "report"
        try:
            metadata = self._metadata(trainer, source)
            summary = write_report(folder, evaluation, metadata, source)
        except Exception as error:  # a failed report must not stop training
            rank_zero_warn(f"no report of the last validation: {type(error).__name__}: {error}")
            return
        print("\n".join(summary), flush=True)
        for logger in run_loggers(trainer):
            logger.log_artifacts(folder, "plots")

    def _metadata(self, trainer: pl.Trainer, source: Any) -> dict[str, Any]:
        data = trainer.datamodule  # type: ignore[attr-defined]
        return {
            "command": "fit",
            "step": self._step,
            "image_size": data.image_size,
            "images": num_images_read(trainer.num_val_batches, data, trainer.world_size, source),
        }
