"""The report of a training's last validation."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from yolo_lightning.evaluation.detection import DetectionEvaluation
from yolo_lightning.evaluation.report import ReportData, image_reader, images_read, write_report
from yolo_lightning.tracking.logger import run_loggers


class ValidationReport(pl.Callback):
    """Write the report of a detector's last validation when training ends, as `validate` does.

    It lies in ``report`` in the run's folder, and goes to every `RunLogger` as ``plots``. A process
    that has validated nothing writes none. What goes wrong here is a warning.
    """

    def __init__(self) -> None:
        self._step: int | None = None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note at which step the newest figures are measured."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._step = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the report, on rank 0."""
        evaluation = getattr(pl_module, "evaluation", None)
        if not isinstance(evaluation, DetectionEvaluation) or self._step is None:
            return
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        source = getattr(trainer.datamodule, "validation", None)  # type: ignore[attr-defined]
        if source is None:
            return
        folder = Path(trainer.default_root_dir) / "report"
        try:
            found = ReportData.of(evaluation, self._about(trainer, len(source)))
            said = write_report(folder, found, image_reader(source), source.image_name)
        except Exception as error:  # a report may fail, training may not
            rank_zero_warn(f"no report of the last validation: {type(error).__name__}: {error}")
            return
        print("\n".join([*said, f"report: {folder}"]))
        for logger in run_loggers(trainer):
            logger.log_folder(folder, "plots")

    def _about(self, trainer: pl.Trainer, images: int) -> dict[str, Any]:
        """Return where the figures come from, of a source with so many images."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        return {
            "command": "fit",
            "step": self._step,
            "image_size": data.image_size,
            "images": images_read(trainer.num_val_batches, data, trainer.world_size, images),
        }
