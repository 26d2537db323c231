"""`Preemption`: saves a checkpoint and stops on SIGTERM and SIGUSR1."""

import os
import subprocess
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from yolo_lightning import signals
from yolo_lightning.callbacks.last_checkpoint import (
    LastCheckpoint,
    completes_optimizer_step,
    max_over_ranks,
)

EXIT_PREEMPTED = 143  # 128 + SIGTERM, as schedulers expect

_REQUEUE_TIMEOUT_S = 20


class PreemptionExit(SystemExit):
    """Exit after all ranks have stopped and the checkpoint is saved."""

    def __init__(self, requeued: bool = False) -> None:
        super().__init__(EXIT_PREEMPTED)
        self.requeued = requeued


class Preemption(Checkpoint):
    """After each optimizer step, save and exit if any rank has received a stop signal.

    SIGUSR1, which `sbatch --signal` sends before the time limit, also requeues the SLURM job.
    SIGTERM does not: SLURM itself requeues preempted jobs, and a cancelled job must not return.
    """

    # Lightning's handlers save inside the handler, and leave the other ranks waiting if only one
    # receives SIGTERM. A `Checkpoint` callback is called last, when the step is complete.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Install the signal handlers and keep Lightning from replacing them."""
        if stage == "fit":
            signals.install_handlers()
            trainer._signal_connector.register_signal_handlers = _do_not_register  # type: ignore[method-assign]

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Stop if any rank received a signal; only after a complete optimizer step."""
        if completes_optimizer_step(trainer, batch_idx):
            self._stop_if_signalled(trainer)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop if any rank received a signal; resuming restarts the validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._stop_if_signalled(trainer)

    def _stop_if_signalled(self, trainer: pl.Trainer) -> None:
        number = max_over_ranks(trainer, signals.received_signal())
        if not number:
            return
        names = {int(stop_signal): stop_signal.name for stop_signal in signals.SIGNALS}
        callback = next((c for c in trainer.callbacks if isinstance(c, LastCheckpoint)), None)  # type: ignore[attr-defined]
        (callback or LastCheckpoint()).save_now(trainer)
        rank_zero_info(
            f"{names[number]}: stopped at step {trainer.global_step}, saved to "
            f"{LastCheckpoint.path(trainer)}"
        )
        requeued = False
        if number == signals.STOP_AND_REQUEUE and trainer.is_global_zero:
            requeued = requeue()
        trainer.strategy.barrier("preemption")
        raise PreemptionExit(requeued)


def _do_not_register() -> None:
    """Replace Lightning's registration of signal handlers."""


def requeue() -> bool:
    """Requeue this SLURM job; return whether it succeeded."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return False
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array is not None:
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    try:
        result = subprocess.run(
            ["scontrol", "requeue", job],
            capture_output=True,
            text=True,
            timeout=_REQUEUE_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        rank_zero_warn(f"job {job} could not be requeued: {error}")
        return False
    if result.returncode:
        rank_zero_warn(f"job {job} could not be requeued: {result.stderr.strip()}")
    return result.returncode == 0
