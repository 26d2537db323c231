"""The newest state of a run, to resume from."""

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from yolo_lightning.errors import InputError


class LastCheckpoint(Checkpoint):
    """Save ``checkpoints/last.ckpt`` in the run's folder every few steps and at the last one.

    Lightning's ``save_last`` writes only when the best checkpoint changes, and its
    ``every_n_train_steps`` leaves out what remains at the end.

    Args:
        every_n_steps: optimizer steps between two checkpoints.

    Raises:
        InputError: less than one step.
    """

    def __init__(self, every_n_steps: int = 1000) -> None:
        if every_n_steps < 1:
            raise InputError(
                f"LastCheckpoint: every_n_steps is {every_n_steps}; allowed: 1 or more"
            )
        self.every_n_steps = every_n_steps
        self._saved_at = -1

    @staticmethod
    def path(trainer: pl.Trainer) -> Path:
        """Return where the checkpoint lies."""
        return Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save where the step asks for it."""
        step = trainer.global_step
        if step % self.every_n_steps == 0 or step == trainer.max_steps:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save after the last epoch."""
        if trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs:
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        """Write beside the target, then rename: a run that dies here keeps the previous one."""
        if self._saved_at == trainer.global_step or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._saved_at = trainer.global_step
        target = self.path(trainer)
        fresh = target.with_suffix(".fresh")
        trainer.save_checkpoint(fresh)  # every rank takes part, rank 0 writes
        if trainer.is_global_zero:
            os.replace(fresh, target)
