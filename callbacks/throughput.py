"""How fast training goes, what it waits for, and how much memory it takes."""

import time
from typing import Any

import lightning.pytorch as pl
import psutil
import torch

from yolo_lightning.callbacks.last_checkpoint import is_whole_step

_MIB = 2**20


class Throughput(pl.Callback):
    """Log speed and memory at every training step that is logged, as means since the last one.

    ``speed/images_per_s`` are images of both kinds over all ranks; ``speed/step_s`` is an optimizer
    step; ``speed/data_wait_share`` is how much of the time the first rank's loop stood waiting for
    its loader, 0…1. ``memory/process_mib`` is resident in the first rank's process, without its
    loader's workers; ``memory/gpu_peak_mib`` is the most that tensors took on its GPU.

    What counts is wall time from the end of one step to the end of the next: fetching, moving,
    resizing, forward and backward, other ranks, other callbacks, logging. What does not count is a
    validation or a saved checkpoint, with all that happens between the same two batches, and the
    first step of a process, begun or resumed, which starts workers and warms everything up.
    """

    def __init__(self) -> None:
        self._begun = self._paused = False
        self._mark_s = self._fetch_s = 0.0
        self._forget()

    def _forget(self) -> None:
        self._total_s = self._waited_s = 0.0
        self._images = self._steps = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen to the loop where it fetches a batch: no callback is called there."""
        loop = trainer.fit_loop.epoch_loop
        self._begun = False

        def before_fetch() -> None:
            type(loop)._on_before_fetch(loop)
            self._fetch_s = time.perf_counter()
            if self._paused:
                self._mark_s, self._paused = self._fetch_s, False

        def after_fetch() -> None:
            self._waited_s += time.perf_counter() - self._fetch_s
            type(loop)._on_after_fetch(loop)

        loop._on_before_fetch = before_fetch  # type: ignore[method-assign]
        loop._on_after_fetch = after_fetch  # type: ignore[method-assign]

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count nothing until the next batch is asked for."""
        self._paused = True

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Count nothing until the next batch is asked for."""
        self._paused = True

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Add the batch; log where the step is logged."""
        now = time.perf_counter()
        self._total_s += now - self._mark_s
        self._images += len(batch)
        self._mark_s = now
        if not is_whole_step(trainer, batch_idx):
            return
        self._steps += 1
        if not self._begun:
            self._begun = True
            self._forget()
        elif trainer._logger_connector.should_update_logs:
            pl_module.log_dict(self._figures(trainer, pl_module.device), batch_size=1)
            self._forget()

    def _figures(self, trainer: pl.Trainer, device: torch.device) -> dict[str, float]:
        figures = {
            # ranks have equal shares of a batch
            "speed/images_per_s": self._images * trainer.world_size / self._total_s,
            "speed/step_s": self._total_s / self._steps,
            "speed/data_wait_share": self._waited_s / self._total_s,
            "memory/process_mib": psutil.Process().memory_info().rss / _MIB,
        }
        if device.type == "cuda":
            figures["memory/gpu_peak_mib"] = torch.cuda.max_memory_allocated(device) / _MIB
            torch.cuda.reset_peak_memory_stats(device)
        return figures
