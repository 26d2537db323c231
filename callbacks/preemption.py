"""`Preemption`: saves a checkpoint and stops on Ctrl-C, SIGTERM and SIGUSR1."""

import os
import subprocess
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from yolo_lightning import signals
from yolo_lightning.callbacks.last_checkpoint import (
    LastCheckpoint,
    completes_optimizer_step,
    max_over_ranks,
    training_ends,
)
from yolo_lightning.callbacks.step_flags import step_flags
from yolo_lightning.errors import InputError
from yolo_lightning.tracking.logger import run_loggers

_REQUEUE_TIMEOUT_S = 20
_ORDER = [0, *signals.SIGNALS]


class Preemption(Checkpoint):
    """After each optimizer step, save and exit if any rank has received a stop signal.

    With several ranks, all of them stop after the next step.

    SIGUSR1, which `sbatch --signal` sends before the time limit, also requeues the SLURM job.
    SIGTERM does not: SLURM itself requeues preempted jobs, and a cancelled job must not return.
    Ctrl-C does the same as SIGTERM; pressed again, it ends the process at once.

    Args:
        grace_s: seconds after a signal until the process ends even if the step does not, such as
            when a disk or another rank hangs; the time to save the checkpoint is not counted.

    Raises:
        InputError: a value out of range.
    """

    # Lightning's handlers save inside the handler, and leave the other ranks waiting if only one
    # receives SIGTERM. A `Checkpoint` callback is called last, when the step is complete.

    def __init__(self, grace_s: float = signals.GRACE_S) -> None:
        if not grace_s > 0:
            raise InputError(f"Preemption: grace_s is {grace_s:g}; allowed: more than 0")
        self.grace_s = grace_s
        self._restore_handlers: Callable[[], None] = lambda: None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Install the signal handlers and keep Lightning from replacing them."""
        if stage != "fit":
            return
        self._restore_handlers = signals.install_handlers()
        signals.limit_stops(
            self.grace_s,
            lambda number: _end_run(trainer, number),
            lambda: _pending_images(trainer),
        )
        trainer._signal_connector.register_signal_handlers = _do_nothing  # type: ignore[method-assign]
        # it tells the other ranks of a signal that its handlers have received, in every step
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _do_nothing  # type: ignore[method-assign]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From now on, let Ctrl-C wait for the end of the step."""
        signals.defer_interrupts(True)

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Tell the other ranks of a signal."""
        if trainer.world_size > 1:
            step_flags(trainer).set("stop", _received_signal())

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Share the flags, unless another callback has done so."""
        if trainer.world_size > 1:
            step_flags(trainer).reduce(trainer.global_step)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Stop after a complete optimizer step if a signal came, to other ranks a step before."""
        if not completes_optimizer_step(trainer, batch_idx):
            return
        if trainer.world_size == 1:
            self._stop(trainer, _received_signal())
        else:
            step_flags(trainer).read()
            self._stop(trainer, int(step_flags(trainer).latest.all_ranks["stop"]))

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
            self._stop(trainer, max_over_ranks(trainer, _received_signal()))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop if any rank received a signal; after the last one, Ctrl-C waits no longer."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._stop(trainer, max_over_ranks(trainer, _received_signal()))
            if training_ends(trainer):
                signals.end_deferral()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the last step, let Ctrl-C wait no longer."""
        if training_ends(trainer):
            signals.end_deferral()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Let Ctrl-C end the upload of the rest."""
        signals.defer_interrupts(False)
        self._restore_handlers()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the handlers of a program that had its own."""
        if stage == "fit":
            self._restore_handlers()

    def _stop(self, trainer: pl.Trainer, position: int) -> None:
        """Save and stop for the signal at a position in `_ORDER`, the same on all ranks."""
        number = _ORDER[position]
        if not number:
            return
        signals.restart_grace()
        callback = next((c for c in trainer.callbacks if isinstance(c, LastCheckpoint)), None)  # type: ignore[attr-defined]
        (callback or LastCheckpoint()).save_now(trainer)
        path = LastCheckpoint.path(trainer)
        rank_zero_info(
            f"{signals.NAMES[number]}: stopped at step {trainer.global_step}, saved to {path}"
        )
        is_first = trainer.is_global_zero
        requeued = is_first and number == signals.STOP_AND_REQUEUE and requeue()
        trainer.strategy.barrier("preemption")
        stop = signals.Stop(number, requeued, path if is_first else None)
        if _is_child_of_rank_zero(trainer):
            stop.code = 0  # else Lightning kills rank 0 while it uploads the rest
        raise stop


def _received_signal() -> int:
    """Return the position of the received signal in `_ORDER`."""
    return _ORDER.index(signals.received_signal())


def _do_nothing() -> None:
    """Replace Lightning's handling of signals."""


def _is_child_of_rank_zero(trainer: pl.Trainer) -> bool:
    """Return whether Lightning, not a launcher, started this process."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return isinstance(environment, LightningEnvironment) and environment.local_rank() > 0


def _pending_images(trainer: pl.Trainer) -> str:
    """Return the images that are being read."""
    fit_loop = trainer.fit_loop
    for loop in (fit_loop.epoch_loop.val_loop, fit_loop):
        for loader in getattr(loop._combined_loader, "flattened", []):
            if images := getattr(loader, "pending_images", str)():
                return str(images)
    return ""


def _end_run(trainer: pl.Trainer, number: int) -> None:
    """Requeue the job and write the final status, when the process is about to be ended."""
    if not trainer.is_global_zero:
        return
    requeued = number == signals.STOP_AND_REQUEUE and requeue()
    for logger in run_loggers(trainer):
        logger.set_final_status("RUNNING" if requeued else "KILLED")
        logger.finalize("failed")


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
