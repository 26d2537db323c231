"""The newest state of a run, to resume from, and the one before it."""

import contextlib
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_warn

from yolo_lightning.checkpoints.io import (
    LAST,
    PART,
    PREVIOUS,
    DurableCheckpointIO,
    rotate,
    verify,
    write_durably,
)
from yolo_lightning.errors import InputError
from yolo_lightning.tracking.logger import run_loggers


class LastCheckpoint(Checkpoint):
    """Save ``checkpoints/last.ckpt`` in the run's folder every few steps and at the last one.

    The one before it stays as ``previous.ckpt``; at every moment one of the two is whole. A state
    that the disk does not take is a warning, and is tried again when the next one is due; a
    training whose last state cannot be saved ends in an error.

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
        self._saved_at = (-1, False)
        self._validation_is_due = False
        self._known_sound = False
        self._carried: tuple[int, dict[str, float]] = (0, {})

    @staticmethod
    def path(trainer: pl.Trainer) -> Path:
        """Return where the checkpoint lies."""
        return Path(trainer.default_root_dir) / "checkpoints" / LAST

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Have checkpoints written durably; remove what a killed run left half-written."""
        if stage != "fit":
            return
        write_durably(trainer)
        _same_state_on_all_ranks(trainer)
        if trainer.is_global_zero:
            for part in self.path(trainer).parent.glob(f"*{PART}"):
                with contextlib.suppress(OSError):
                    part.unlink()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that the state which training goes on from is saved."""
        self._saved_at = (trainer.global_step, False)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save where the step asks for it.

        Raises:
            InputError: the last step could not be saved.
        """
        if not is_whole_step(trainer, batch_idx):
            return  # no checkpoint holds half a gradient
        self._log_step(trainer)
        step = trainer.global_step
        self._validation_is_due = _validation_follows(trainer)
        if step == trainer.max_steps:
            self.save_now(trainer)
        elif self._validation_is_due or step % self.every_n_steps == 0:
            self._save(trainer)  # before a validation too: a stop in one only has to leave

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that it is done, before other callbacks save what it found."""
        self._validation_is_due = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what the validation chose, once the other checkpoints have."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Have a resumed training begin with the validation that was due or broken off.

        Lightning goes on in the middle of one, without what was measured before, and leaves out
        one that was due; so its first batch is written down as begun, and nothing of it as done.

        Until an epoch ends, each step logs the newest figures of both kinds of batches, so those of
        the kind that this step did not train go along.
        """
        if run_loggers(trainer):
            checkpoint["figures"] = self._figures(trainer)
        if not self._validation_is_due:
            return
        loops = checkpoint["loops"]["fit_loop"]
        for part in ("total", "current"):
            trained = loops["epoch_loop.batch_progress"][part]
            trained["completed"] = trained["processed"]
            loops["epoch_loop.val_loop.batch_progress"][part].update(
                ready=1, started=1, processed=0, completed=0
            )

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take over the figures of the steps before."""
        self._carried = (checkpoint["epoch"], checkpoint.get("figures", {}))

    def _figures(self, trainer: pl.Trainer) -> dict[str, float]:
        """Return the newest figures of this epoch's steps."""
        epoch, carried = self._carried
        results = trainer.fit_loop.epoch_loop._results.metrics(on_step=True)["log"]
        newest = convert_tensors_to_scalars(results)
        return {**(carried if epoch == trainer.current_epoch else {}), **newest}

    def _log_step(self, trainer: pl.Trainer) -> None:
        """Log figures before the step is saved: Lightning does it after, when a stop may come."""
        loggers = run_loggers(trainer)
        if loggers and trainer._logger_connector.should_update_logs:
            figures = self._figures(trainer)
            # last: MLflow's pages show the first one first
            figures = {**figures, "epoch": figures.get("epoch", trainer.current_epoch)}
            for logger in loggers:
                logger.log_metrics(figures, trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save after the last epoch.

        Raises:
            InputError: it could not be saved.
        """
        if trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs:
            self.save_now(trainer)

    def save_now(self, trainer: pl.Trainer) -> None:
        """Save this state; every rank calls it.

        Raises:
            InputError: it could not be saved, on every rank.
        """
        problem = self._save(trainer)
        if problem:
            folder = self.path(trainer).parent
            whole = [name for name in (LAST, PREVIOUS) if (folder / name).is_file()]
            raise InputError(
                f"step {trainer.global_step} could not be saved: {problem}; earlier steps are in "
                f"{folder}: {', '.join(whole) or 'none'}"
            )

    def _save(self, trainer: pl.Trainer) -> str:
        """Save unless this step is saved; return what went wrong, on every rank alike."""
        state = (trainer.global_step, self._validation_is_due)
        if self._saved_at == state or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return ""
        write_durably(trainer)  # else a full disk would leave the other ranks waiting
        last = self.path(trainer)
        fresh = last.with_name(last.name + PART)
        trainer.save_checkpoint(fresh, weights_only=False)  # every rank takes part, rank 0 writes
        problem = self._rotate(trainer, fresh, last) if trainer.is_global_zero else ""
        problem = trainer.strategy.broadcast(problem)
        if not problem:
            self._saved_at = state
        return problem

    def _rotate(self, trainer: pl.Trainer, fresh: Path, last: Path) -> str:
        """Let the fresh checkpoint be the last one, on rank 0; return what went wrong."""
        writer = trainer.strategy.checkpoint_io
        if isinstance(writer, DurableCheckpointIO) and writer.problem:
            return writer.problem
        try:
            if not self._known_sound:
                _drop_broken(last)
            rotate(fresh, last)
        except OSError as error:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
            problem = f"{last}: {error.strerror or error}"
            rank_zero_warn(f"checkpoint not written, {problem}; training goes on")
            return problem
        self._known_sound = True
        return ""


def most_over_ranks(trainer: pl.Trainer, value: int) -> int:
    """Return the largest value that a rank has; alone, a process asks no device."""
    if trainer.world_size == 1:
        return value
    own = torch.tensor(float(value), device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(own, reduce_op="max"))


def is_whole_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Tell whether an optimizer step ends with this batch of the epoch."""
    number = batch_idx + 1
    return number % trainer.accumulate_grad_batches == 0 or number == trainer.num_training_batches


def _same_state_on_all_ranks(trainer: pl.Trainer) -> None:
    """Refuse ranks that would go on from different steps.

    Raises:
        InputError: says what each rank found.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    path = Path(str(trainer.ckpt_path)) if trainer.ckpt_path else None
    own = f"{path.name}, {path.stat().st_size:,} bytes" if path and path.is_file() else "nothing"
    found: list[str] = [""] * trainer.world_size
    dist.all_gather_object(found, own)
    if len(set(found)) > 1:
        said = "; ".join(f"rank {rank}: {one}" for rank, one in enumerate(found))
        raise InputError(
            f"the ranks found different states to go on from ({said}); run folders have to lie "
            "where every rank can read them"
        )


def _validation_follows(trainer: pl.Trainer) -> bool:
    """Tell whether the batch that ends is followed by a validation."""
    loop = trainer.fit_loop.epoch_loop
    fetcher = trainer.fit_loop._data_fetcher
    has_images = bool(trainer.fit_loop.epoch_loop.val_loop.max_batches)
    return fetcher is not None and has_images and loop._should_check_val_fx(fetcher)


def _drop_broken(last: Path) -> None:
    """Keep a damaged checkpoint of an earlier process from taking the place of the sound one."""
    if not last.is_file():
        return
    try:
        verify(last)
    except InputError:
        last.unlink()
