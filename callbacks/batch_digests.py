"""`BatchDigests`: one checksum per step, to compare the batches of two runs."""

import os
import zlib
from pathlib import Path
from typing import IO, Any

import lightning.pytorch as pl

from yolo_lightning.batches import ClassificationBatch, DetectionBatch
from yolo_lightning.tracking.logger import run_loggers

FILE = "steps.crc32"
_BYTES = 4


class BatchDigests(pl.Callback):
    """Write a CRC-32 of each batch, over all ranks, to ``batches/steps.crc32`` in the run folder.

    Batch n has a little-endian uint32 at byte 4 n, 0 if it was not trained. Two runs read the same
    batches, by sample indices and fingerprints of sources, up to the first value that differs.
    """

    def __init__(self) -> None:
        self._sources: dict[str, list[str]] = {}
        self._order: Any = None
        self._file: IO[bytes] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the sample order and the fingerprints of the sources, on rank 0."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        self._order = getattr(data, "order", None)
        if trainer.is_global_zero and hasattr(data, "inputs"):
            inputs = [item for item in data.inputs() if item["use"] == "training"]
            for kind, holds in (("detection", "boxes"), ("classification", "image labels")):
                self._sources[kind] = [
                    item["fingerprint"] for item in inputs if item["holds"] == holds
                ]

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write the digest of the batch, on rank 0."""
        if not trainer.is_global_zero or self._order is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not isinstance(batch, DetectionBatch | ClassificationBatch):
            return
        plan = self._order.plan(batch.step)  # of all ranks
        size = tuple(batch.images.shape[-2:])
        content = f"{plan.kind} {self._sources.get(plan.kind)} {size} {plan.indices}"
        digest = zlib.crc32(content.encode()) or 1
        try:
            if self._file is None:
                self._file = self._open(trainer)
            content_bytes, offset = digest.to_bytes(_BYTES, "little"), _BYTES * batch.step
            os.pwrite(self._file.fileno(), content_bytes, offset)
        except OSError:
            return  # a full disk is reported when a checkpoint is saved

    def _open(self, trainer: pl.Trainer) -> IO[bytes]:
        """Open the file, and keep what earlier processes of the run wrote."""
        path = self.path(trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("r+b" if path.exists() else "w+b", buffering=0)  # a kill loses nothing

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    @staticmethod
    def path(trainer: pl.Trainer) -> Path:
        """Return the path of the file."""
        return Path(trainer.default_root_dir) / "batches" / FILE

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the file."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._log(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close and log the file."""
        self._close()
        self._log(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Close the file."""
        self._close()

    def _log(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero and self.path(trainer).is_file():
            for logger in run_loggers(trainer):
                logger.log_artifact(self.path(trainer), "batches")
