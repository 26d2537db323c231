"""What was repaired or skipped in the data, counted and named."""

from collections import Counter
from typing import Any

import lightning.pytorch as pl

from yolo_lightning.batches import ClassificationBatch, DetectionBatch

_SHOWN = 10


class DataReport(pl.Callback):
    """Collect the faults of sources and batches; name them when training or evaluation ends."""

    def __init__(self) -> None:
        self.faults: Counter[str] = Counter()

    def _collect(self, batch: Any) -> None:
        if isinstance(batch, DetectionBatch | ClassificationBatch):
            self.faults.update(batch.faults)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Collect."""
        self._collect(batch)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect."""
        self._collect(batch)

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect."""
        self._collect(batch)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Print the report."""
        faults = list(getattr(trainer.datamodule, "source_faults", []))  # type: ignore[attr-defined]
        faults += list(self.faults)
        if faults and trainer.is_global_zero:
            print(f"Data: {len(faults)} repaired or skipped:")
            for fault in faults[:_SHOWN]:
                print(f"  {fault}")
            if len(faults) > _SHOWN:
                print(f"  … and {len(faults) - _SHOWN} more")
        self.faults.clear()
