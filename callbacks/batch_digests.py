"""What each step read, small enough to keep for every step and to compare between runs."""

import zlib
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from yolo_lightning.batches import ClassificationBatch, DetectionBatch
from yolo_lightning.tracking.logger import run_loggers

FILE = "steps.crc32"
_BYTES = 4


class BatchDigests(pl.Callback):
    """Write the CRC-32 of what a step reads, over all ranks, into a file of the run's folder.

    Little-endian uint32, one a batch, batch n at byte 4 n; 0 where none was trained. A resumed run
    writes the same numbers over the same places. The file joins the MLflow run after each
    validation and at the end, as ``batches/steps.crc32``: two runs read the same up to the first
    number that differs. Samples count by their numbers in their sources, and these by their
    fingerprints.
    """

    def __init__(self) -> None:
        self._sources: dict[str, list[str]] = {}
        self._order: Any = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the order of the samples and the fingerprints of their sources, on rank 0."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        self._order = getattr(data, "order", None)
        if trainer.is_global_zero and hasattr(data, "inputs"):
            read = [one for one in data.inputs() if one["use"] == "training"]
            for kind, holds in (("detection", "boxes"), ("classification", "image labels")):
                self._sources[kind] = [r["fingerprint"] for r in read if r["holds"] == holds]

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write the step's digest, on rank 0."""
        if not trainer.is_global_zero or self._order is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not isinstance(batch, DetectionBatch | ClassificationBatch):
            return
        plan = self._order.plan(batch.step)  # of the ranks together
        size = tuple(batch.images.shape[-2:])
        what = f"{plan.kind} {self._sources.get(plan.kind)} {size} {plan.indices}"
        digest = zlib.crc32(what.encode()) or 1
        path = self.path(trainer)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("r+b" if path.exists() else "w+b") as file:
                file.seek(_BYTES * batch.step)
                file.write(digest.to_bytes(_BYTES, "little"))
        except OSError:
            return  # a full disk, which the checkpoints will tell of

    @staticmethod
    def path(trainer: pl.Trainer) -> Path:
        """Return where the file lies."""
        return Path(trainer.default_root_dir) / "batches" / FILE

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the file."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._log(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the file."""
        self._log(trainer)

    def _log(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero and self.path(trainer).is_file():
            for logger in run_loggers(trainer):
                logger.log_file(self.path(trainer), "batches")
