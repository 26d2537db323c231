"""`Throughput`: logs the speed and the memory use of training."""

import time
from typing import Any

import lightning.pytorch as pl
import psutil
import torch

from yolo_lightning.callbacks.last_checkpoint import completes_optimizer_step, is_logged_step

_MIB = 2**20


class Throughput(pl.Callback):
    """Log speed and memory at every logged training step, as means since the last logged step.

    - ``speed/images_per_s``: images of both kinds, over all ranks.
    - ``speed/step_s``: seconds per optimizer step, everything included except validations, saved
      checkpoints, and the first step of a process.
    - ``speed/data_wait_share``: share of the time that rank 0 waits for its dataloader, 0 to 1.
    - ``memory/process_mib``: resident memory of the process of rank 0, without dataloader workers.
    - ``memory/gpu_peak_mib``: peak memory of tensors on the GPU of rank 0.
    """

    def __init__(self) -> None:
        self._warmed_up = self._paused = False
        self._step_end_s = self._fetch_start_s = 0.0
        self._reset()

    def _reset(self) -> None:
        self._total_s = self._waited_s = 0.0
        self._images = self._steps = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wrap the fetch hooks of the loop: no callback hook is called there."""
        loop = trainer.fit_loop.epoch_loop
        self._warmed_up = False

        def before_fetch() -> None:
            type(loop)._on_before_fetch(loop)
            self._fetch_start_s = time.perf_counter()
            if self._paused:
                self._step_end_s, self._paused = self._fetch_start_s, False

        def after_fetch() -> None:
            self._waited_s += time.perf_counter() - self._fetch_start_s
            type(loop)._on_after_fetch(loop)

        loop._on_before_fetch = before_fetch  # type: ignore[method-assign]
        loop._on_after_fetch = after_fetch  # type: ignore[method-assign]

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Pause the clock until the next batch is fetched."""
        self._paused = True

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Pause the clock until the next batch is fetched."""
        self._paused = True

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Add the batch; log the means if the step is logged."""
        now = time.perf_counter()
        self._total_s += now - self._step_end_s
        self._images += len(batch)
        self._step_end_s = now
        if not completes_optimizer_step(trainer, batch_idx):
            return
        self._steps += 1
        if not self._warmed_up:
            self._warmed_up = True
            self._reset()
        elif is_logged_step(trainer, batch_idx):
            metrics = self._metrics(trainer, pl_module.device)
            # tensors on the host: Lightning copies numbers to the device, and waits for it
            values = {name: torch.tensor(value) for name, value in metrics.items()}
            pl_module.log_dict(values, batch_size=1)
            self._reset()

    def _metrics(self, trainer: pl.Trainer, device: torch.device) -> dict[str, float]:
        metrics = {
            # ranks have equal shares of a batch
            "speed/images_per_s": self._images * trainer.world_size / self._total_s,
            "speed/step_s": self._total_s / self._steps,
            "speed/data_wait_share": self._waited_s / self._total_s,
            "memory/process_mib": psutil.Process().memory_info().rss / _MIB,
        }
        if device.type == "cuda":
            metrics["memory/gpu_peak_mib"] = torch.cuda.max_memory_allocated(device) / _MIB
            torch.cuda.reset_peak_memory_stats(device)
        return metrics
