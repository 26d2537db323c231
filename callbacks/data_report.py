"""What the data teaches, and what was repaired or skipped in it."""

from collections import Counter
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist

from yolo_lightning.batches import ClassificationBatch, DetectionBatch

_SHOWN = 10


class DataReport(pl.Callback):
    """Tell before training what each class learns from, and at the end what was faulty."""

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

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print what each class will learn from."""
        report = getattr(trainer.datamodule, "vocabulary_report", None)  # type: ignore[attr-defined]
        if report is not None and trainer.is_global_zero:
            print(report())

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the report."""
        self._report(trainer)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the report."""
        self._report(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the report after `validate`; inside `fit` there is more to come."""
        if trainer.state.fn == "validate":
            self._report(trainer)

    def _report(self, trainer: pl.Trainer) -> None:
        """Join what all ranks saw; rank 0 prints."""
        faults = Counter(getattr(trainer.datamodule, "source_faults", []))  # type: ignore[attr-defined]
        every: list[Counter[str] | None] = [self.faults]
        if dist.is_available() and dist.is_initialized():
            every = [None] * trainer.world_size
            dist.all_gather_object(every, self.faults)
        for seen in every:
            faults.update(seen or Counter())
        if faults and trainer.is_global_zero:
            print(f"Data: {len(faults)} repaired or skipped:")
            for fault in list(faults)[:_SHOWN]:
                print(f"  {fault}")
            if len(faults) > _SHOWN:
                print(f"  … and {len(faults) - _SHOWN} more")
        self.faults.clear()
