"""Stopping when the cluster asks for it, with nothing lost."""

import os
import subprocess
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from yolo_lightning import signals
from yolo_lightning.callbacks.last_checkpoint import LastCheckpoint, is_whole_step, most_over_ranks

STOPPED = 143
"""Exit code of a training that was asked to stop: 128 + SIGTERM, what schedulers expect."""

_REQUEUE_S = 20


class Preempted(SystemExit):
    """Ends the process once all ranks have agreed to, and the state is saved.

    Args:
        requeued: whether the job is in the queue again.
    """

    def __init__(self, requeued: bool = False) -> None:
        super().__init__(STOPPED)
        self.requeued = requeued


class Preemption(Checkpoint):
    """After each batch, ask all ranks whether one was told to stop; then save once and leave.

    SIGUSR1, which `sbatch --signal` sends before the limit, also puts the SLURM job back into the
    queue. SIGTERM does not: who preempts a job does so by himself, and who cancels one means it.

    Replaces Lightning's handlers: its own one saves inside the handler, and one rank alone that
    gets SIGTERM leaves the others waiting. A kind of checkpoint callback, since these come last,
    when the step is whole.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Listen, and keep Lightning from taking the signals over before the first step."""
        if stage == "fit":
            signals.listen()
            trainer._signal_connector.register_signal_handlers = _leave_them  # type: ignore[method-assign]

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Stop if any rank was asked to; never between two halves of an optimizer step."""
        if is_whole_step(trainer, batch_idx):
            self._stop_if_asked(trainer)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop if any rank was asked to; resuming begins the validation anew."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: pl.Trainer) -> None:
        number = most_over_ranks(trainer, signals.asked())
        if not number:
            return
        names = {int(one): one.name for one in signals.SIGNALS}
        keeper = next((c for c in trainer.callbacks if isinstance(c, LastCheckpoint)), None)  # type: ignore[attr-defined]
        (keeper or LastCheckpoint()).save_now(trainer)
        rank_zero_info(
            f"{names[number]}: stopped at step {trainer.global_step}, saved to "
            f"{LastCheckpoint.path(trainer)}"
        )
        requeued = False
        if number == signals.STOP_AND_REQUEUE and trainer.is_global_zero:
            requeued = requeue()
        trainer.strategy.barrier("preemption")
        raise Preempted(requeued)


def _leave_them() -> None:
    """Do nothing."""


def requeue() -> bool:
    """Put the SLURM job that this is back into the queue; tell whether that went well."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return False
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array is not None:
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job],
            capture_output=True,
            text=True,
            timeout=_REQUEUE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        rank_zero_warn(f"job {job} could not be put back into the queue: {error}")
        return False
    if done.returncode:
        rank_zero_warn(f"job {job} could not be put back into the queue: {done.stderr.strip()}")
    return done.returncode == 0
