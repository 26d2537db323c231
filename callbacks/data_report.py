"""Report what the classes learn from, and which data was repaired or skipped."""

from collections import Counter
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist

from yolo_lightning.batches import ClassificationBatch, DetectionBatch
from yolo_lightning.errors import printable

_MAX_SHOWN, _MAX_KNOWN = 10, 2


class DataReport(pl.Callback):
    """Print what each class learns from before training, and faults of the data at the end."""

    def __init__(self) -> None:
        self.faults: Counter[str] = Counter()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the faults of a batch."""
        if isinstance(batch, DetectionBatch | ClassificationBatch):
            self.faults.update(batch.faults)

    on_validation_batch_end = on_train_batch_end
    on_test_batch_end = on_train_batch_end

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print what each class learns from."""
        report = getattr(trainer.datamodule, "vocabulary_report", None)  # type: ignore[attr-defined]
        if report is not None and trainer.is_global_zero:
            print(printable(report()))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the faults found while reading, those of all ranks, and the number of others."""
        known = [*dict.fromkeys(getattr(trainer.datamodule, "source_faults", []))]  # type: ignore[attr-defined]
        faults: Counter[str] = Counter()
        by_rank: list[Counter[str] | None] = [self.faults]
        if dist.is_available() and dist.is_initialized():
            by_rank = [None] * trainer.world_size
            dist.all_gather_object(by_rank, self.faults)
        for rank_faults in by_rank:
            faults.update(rank_faults or Counter())
        if known and trainer.is_global_zero:  # `init` has listed them
            print(f"Annotations: {len(known)} repaired or skipped; `check-data RECIPE` lists all:")
            print("\n".join(f"  {printable(fault)}" for fault in known[:_MAX_KNOWN]))
        if faults and trainer.is_global_zero:
            print(f"Data: {len(faults)} repaired or skipped while reading:")
            for fault in list(faults)[:_MAX_SHOWN]:
                print(f"  {printable(fault)}")
            if len(faults) > _MAX_SHOWN:
                print(f"  … and {len(faults) - _MAX_SHOWN} more")
        self.faults.clear()

    on_test_end = on_fit_end

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the faults after `validate`, but not for validation during `fit`."""
        if trainer.state.fn == "validate":
            self.on_fit_end(trainer, pl_module)
