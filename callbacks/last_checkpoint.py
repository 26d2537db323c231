"""`LastCheckpoint`: saves the newest state of a run, and keeps the one before it."""

import contextlib
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from yolo_lightning.callbacks.step_flags import step_flags
from yolo_lightning.checkpoints.io import (
    LAST,
    PARTIAL_SUFFIX,
    PREVIOUS,
    DurableCheckpointIO,
    InBackground,
    rotate,
    use_durable_io,
    verify,
)
from yolo_lightning.errors import InputError
from yolo_lightning.tracking.logger import run_loggers
from yolo_lightning.training_module import TrainingModule


class LastCheckpoint(Checkpoint):
    """Save ``checkpoints/last.ckpt`` in the run folder every N steps or minutes, and at the end.

    The one before is kept as ``previous.ckpt``; one of the two is always complete. The training
    goes on while a thread writes a copy of the state: a process that is killed then (SIGKILL)
    resumes from the checkpoint before. Stop signals, errors and the end of the training wait for
    the thread. A write error is a warning, but if the final state cannot be saved, the training
    fails.

    A checkpoint from before a validation says so; a training that resumes from it starts with the
    validation, also where `max_steps` or `max_time` is reached. The last checkpoint of a training
    that `EarlyStopping` ended says so too: resuming ends at once, unless the recipe has other
    settings of it.

    Args:
        every_n_steps (optimizer steps): most between two checkpoints, 1 or more.
        every_minutes (minutes): most between two checkpoints, unless steps take longer.

    Raises:
        InputError: a value out of range.
    """

    # Lightning's save_last writes only when the best checkpoint changes, and its
    # every_n_train_steps omits the last steps

    def __init__(self, every_n_steps: int = 1000, every_minutes: float = 5) -> None:
        if every_n_steps < 1:
            raise InputError(
                f"LastCheckpoint: every_n_steps is {every_n_steps}; allowed: 1 or more"
            )
        if not every_minutes > 0:
            raise InputError(
                f"LastCheckpoint: every_minutes is {every_minutes:g}; allowed: more than 0"
            )
        self.every_n_steps, self.every_minutes = every_n_steps, every_minutes
        self._last_saved = (-1, False)  # global step, whether a validation is due
        self._last_saved_s = 0.0
        self._writes_in_background = False
        self._validation_is_due = False
        self._resumed_step = -1  # of a checkpoint from before its validation
        self._last_is_valid = False
        self._written: Path | None = None  # final state, to be published when training has ended
        self._resumed_metrics: tuple[int, dict[str, float]] = (0, {})  # epoch, metrics
        self._early_stopping: list[list[Any]] = []  # settings of the recipe
        self._resumed_early_stopping: list[list[Any]] = []  # settings of the resumed training

    @staticmethod
    def path(trainer: pl.Trainer) -> Path:
        """Return the path of the checkpoint."""
        return Path(trainer.default_root_dir) / "checkpoints" / LAST

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Install durable checkpoint writing; remove partial files of a killed run."""
        if stage != "fit":
            return
        use_durable_io(trainer)
        _check_same_checkpoint_on_ranks(trainer)
        self._early_stopping = _early_stopping_settings(trainer)
        for callback in _early_stopping_callbacks(trainer):
            if callback.monitor.startswith("val/"):  # at the end of an epoch, nothing is saved
                callback._check_on_train_epoch_end = False
        if trainer.is_global_zero:
            for file in self.path(trainer).parent.glob(f"*{PARTIAL_SUFFIX}"):
                with contextlib.suppress(OSError):
                    file.unlink()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End what EarlyStopping has ended; begin with the validation that a stop interrupted."""
        if _has_stopped_early(trainer) and self._resumed_early_stopping == self._early_stopping:
            trainer.should_stop = True
            rank_zero_info(
                "EarlyStopping has ended this training; to go on, change its settings in the recipe"
            )
        callbacks = _early_stopping_callbacks(trainer)
        for callback, settings in zip(callbacks, self._early_stopping, strict=True):
            callback.patience = settings[1]  # Lightning takes the checkpoint's
            if not trainer.should_stop:
                callback.stopping_reason = EarlyStoppingReason.NOT_STOPPED
        if self._resumed_step >= 0:
            _validate_first(trainer, self._resumed_step)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record that the initial state is already saved."""
        self._last_saved = (trainer.global_step, self._resumed_step >= 0)
        self._validation_is_due = self._resumed_step >= 0
        self._last_saved_s = time.monotonic()

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Tell the other ranks that the minutes have passed."""
        if trainer.world_size > 1:
            step_flags(trainer).set("save", int(self._minutes_have_passed()))

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
        """Save every N steps, before a validation, and after the last step."""
        if not completes_optimizer_step(trainer, batch_idx):
            return  # accumulated gradients are not saved
        if is_logged_step(trainer, batch_idx):
            self._log_step(trainer)
        step = trainer.global_step
        self._validation_is_due = _validation_follows(trainer)
        if step == trainer.max_steps or trainer.should_stop:  # the latter by `max_time`
            self.save_now(trainer)
        elif (
            self._validation_is_due  # so that a stop during it loses nothing
            or step % self.every_n_steps == 0
            or self._is_late(trainer)
        ):
            self._save(trainer, in_background=True)

    def _is_late(self, trainer: pl.Trainer) -> bool:
        """Return whether the minutes have passed; with several ranks, on one of them a step ago."""
        if trainer.world_size == 1:
            return self._minutes_have_passed()
        step_flags(trainer).read()
        latest = step_flags(trainer).latest
        # a step before the last checkpoint may ask for that one
        return bool(latest.all_ranks["save"]) and latest.step >= self._last_saved[0]

    def _minutes_have_passed(self) -> bool:
        return time.monotonic() - self._last_saved_s >= 60 * self.every_minutes

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record that the validation is done, before other callbacks save checkpoints."""
        self._validation_is_due = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the state after the validation and after the other checkpoint callbacks.

        The final state is published only when the report of this validation is written: if that is
        interrupted, a resumed training repeats the validation.
        """
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            ends = training_ends(trainer)
            self._save(trainer, publish=not ends, in_background=not ends)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Publish the final state."""
        self._raise_error(trainer, self._wait(trainer))
        if self._written is not None:
            self._raise_error(trainer, self._publish(trainer, self._written))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the step metrics; let a resumed training restart an unfinished validation."""
        checkpoint["step_metrics"] = self.step_metrics(trainer)
        checkpoint["validation_is_due"] = self._validation_is_due
        checkpoint["early_stopping"] = self._early_stopping
        if not self._validation_is_due:
            return
        # Lightning would count the batches of the validation before as those of this one
        loops = checkpoint["loops"]["fit_loop"]
        for part in ("total", "current"):
            progress = loops["epoch_loop.batch_progress"][part]
            progress["completed"] = progress["processed"]
        current = loops["epoch_loop.val_loop.batch_progress"]["current"]
        current.update(dict.fromkeys(current, 0))

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the step metrics, whether a validation is due, and when to stop early."""
        self._resumed_early_stopping = checkpoint.get("early_stopping", [])
        self._resumed_metrics = (checkpoint["epoch"], checkpoint.get("step_metrics", {}))
        is_due = checkpoint.get("validation_is_due", False)
        self._resumed_step = checkpoint["global_step"] if is_due else -1

    def step_metrics(self, trainer: pl.Trainer) -> dict[str, float]:
        """Return the newest values of this epoch's steps, also of those before a resume."""
        epoch, resumed = self._resumed_metrics
        results = trainer.fit_loop.epoch_loop._results.metrics(on_step=True)["log"]
        newest = convert_tensors_to_scalars(results)
        if isinstance(trainer.lightning_module, TrainingModule):
            newest |= trainer.lightning_module.newest_figures()
        return {**(resumed if epoch == trainer.current_epoch else {}), **newest}

    def _log_step(self, trainer: pl.Trainer) -> None:
        # called before saving: Lightning would log them after it, when a stop is possible
        loggers = run_loggers(trainer)
        if loggers:
            metrics = self.step_metrics(trainer)
            # epoch is the last one: MLflow's pages show metrics in this order
            metrics = {**metrics, "epoch": metrics.get("epoch", trainer.current_epoch)}
            for logger in loggers:
                logger.log_metrics(metrics, trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save after the last epoch."""
        if trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs:
            self.save_now(trainer)

    def save_now(self, trainer: pl.Trainer) -> None:
        """Save the current state; raise `InputError` if it fails. Call it on every rank."""
        self._raise_error(trainer, self._save(trainer))

    def _raise_error(self, trainer: pl.Trainer, error: str) -> None:
        if error:
            folder = self.path(trainer).parent
            existing = [name for name in (LAST, PREVIOUS) if (folder / name).is_file()]
            raise InputError(
                f"step {trainer.global_step} could not be saved: {error}; earlier steps are in "
                f"{folder}: {', '.join(existing) or 'none'}"
            )

    def _save(self, trainer: pl.Trainer, publish: bool = True, in_background: bool = False) -> str:
        """Save the state if it is new; return the error message, or "", on every rank.

        What is written in the background has no error yet; see `_wait`.
        """
        self._wait(trainer)
        state = (trainer.global_step, self._validation_is_due)
        if self._last_saved == state or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return ""
        use_durable_io(trainer)  # otherwise the other ranks would wait after a full disk
        last = self.path(trainer)
        new = last.with_name(last.name + PARTIAL_SUFFIX)
        if in_background and _can_write_in_background(trainer):
            option = InBackground(lambda: self._rotate(trainer, new, last))
            trainer.save_checkpoint(new, weights_only=False, storage_options=option)
            self._writes_in_background, error = True, ""
        else:
            self._written = new
            trainer.save_checkpoint(new, weights_only=False)  # collective, rank 0 writes
            error = self._publish(trainer, new) if publish else ""
        if not error:
            self._last_saved, self._last_saved_s = state, time.monotonic()
        return error

    def _wait(self, trainer: pl.Trainer) -> str:
        """Wait for the thread that writes; return the error message, or "", on every rank."""
        if not self._writes_in_background:
            return ""
        self._writes_in_background = False
        checkpoint_io, error = trainer.strategy.checkpoint_io, ""
        if trainer.is_global_zero and isinstance(checkpoint_io, DurableCheckpointIO):
            error = checkpoint_io.wait()
        error = str(trainer.strategy.broadcast(error))
        if error:
            self._last_saved = (-1, False)
        return error

    def _publish(self, trainer: pl.Trainer, new: Path) -> str:
        """Rename a written file to `last.ckpt`; return the error message on every rank."""
        self._written = None
        error = self._rotate(trainer, new, self.path(trainer)) if trainer.is_global_zero else ""
        return str(trainer.strategy.broadcast(error))

    def _rotate(self, trainer: pl.Trainer, new: Path, last: Path) -> str:
        checkpoint_io = trainer.strategy.checkpoint_io
        if isinstance(checkpoint_io, DurableCheckpointIO) and checkpoint_io.last_error:
            return checkpoint_io.last_error
        try:
            if not self._last_is_valid:
                _remove_if_damaged(last)
            rotate(new, last)
        except OSError as error:
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)
            message = f"{last}: {error.strerror or error}"
            rank_zero_warn(f"checkpoint not written, {message}; training continues")
            return message
        self._last_is_valid = True
        return ""


def _can_write_in_background(trainer: pl.Trainer) -> bool:
    """Return whether rank 0 alone writes, by this package's plugin; FSDP's ranks all write."""
    strategy = trainer.strategy
    is_own = isinstance(strategy.checkpoint_io, DurableCheckpointIO)
    return is_own and type(strategy).save_checkpoint is Strategy.save_checkpoint


def max_over_ranks(trainer: pl.Trainer, value: int) -> int:
    """Return the maximum over all ranks; with one rank, without using the device."""
    if trainer.world_size == 1:
        return value
    tensor = torch.tensor(float(value), device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(tensor, reduce_op="max"))


def completes_optimizer_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Return whether an optimizer step ends with this batch of the epoch."""
    number = batch_idx + 1
    return number % trainer.accumulate_grad_batches == 0 or number == trainer.num_training_batches


def is_logged_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Return whether this batch ends an optimizer step whose metrics are logged."""
    every, step = trainer.log_every_n_steps, trainer.global_step  # type: ignore[attr-defined]
    is_due = every > 0 and (step % every == 0 or trainer.should_stop)
    return completes_optimizer_step(trainer, batch_idx) and is_due


def training_ends(trainer: pl.Trainer) -> bool:
    """Return whether no training step follows the current one and its validation."""
    fit_loop = trainer.fit_loop
    is_last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
    return (
        trainer.global_step == trainer.max_steps
        or (trainer.should_stop and fit_loop._can_stop_early)
        or (is_last_epoch and fit_loop.epoch_loop._num_ready_batches_reached())
    )


def _early_stopping_callbacks(trainer: pl.Trainer) -> list[EarlyStopping]:
    return [callback for callback in trainer.callbacks if isinstance(callback, EarlyStopping)]  # type: ignore[attr-defined]


def _early_stopping_settings(trainer: pl.Trainer) -> list[list[Any]]:
    """Return monitor, patience, change that counts, and thresholds of each callback."""
    return [
        [c.monitor, c.patience, c.min_delta, c.stopping_threshold, c.divergence_threshold]
        for c in _early_stopping_callbacks(trainer)
    ]


def _has_stopped_early(trainer: pl.Trainer) -> bool:
    """Return whether EarlyStopping asked for the end, here or before resuming."""
    callbacks = _early_stopping_callbacks(trainer)
    return any(c.stopping_reason != EarlyStoppingReason.NOT_STOPPED for c in callbacks)


def _validate_first(trainer: pl.Trainer, step: int) -> None:
    """Replace the first turn of the loop by a validation, even if the training is at its end."""
    # Lightning ends at once where a limit is reached, so the limits hold again after that turn
    loop = trainer.fit_loop.epoch_loop
    max_steps, should_stop = loop.max_steps, trainer.should_stop
    loop.max_steps, trainer.should_stop = max_steps if max_steps == -1 else step + 1, False

    def advance(data_fetcher: Any) -> None:
        del loop.advance
        loop.max_steps, trainer.should_stop = max_steps, should_stop
        loop._should_check_val_fx = should_validate  # type: ignore[method-assign]

    def should_validate(data_fetcher: Any) -> bool:
        del loop._should_check_val_fx
        return True

    loop.advance = advance  # type: ignore[method-assign]


def _check_same_checkpoint_on_ranks(trainer: pl.Trainer) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        return
    path = Path(str(trainer.ckpt_path)) if trainer.ckpt_path else None
    file = f"{path.name}, {path.stat().st_size:,} bytes" if path and path.is_file() else "nothing"
    files: list[str] = [""] * trainer.world_size
    dist.all_gather_object(files, file)
    if len(set(files)) > 1:
        listed = "; ".join(f"rank {rank}: {name}" for rank, name in enumerate(files))
        raise InputError(
            f"the ranks found different checkpoints to resume from ({listed}); the run folder must "
            "be on a file system that every rank can read"
        )


def _validation_follows(trainer: pl.Trainer) -> bool:
    loop = trainer.fit_loop.epoch_loop
    fetcher = trainer.fit_loop._data_fetcher
    has_validation = bool(trainer.fit_loop.epoch_loop.val_loop.max_batches)
    return fetcher is not None and has_validation and loop._should_check_val_fx(fetcher)


def _remove_if_damaged(last: Path) -> None:
    # otherwise, rotating would replace the valid previous checkpoint by the damaged one
    if not last.is_file():
        return
    try:
        verify(last)
    except InputError:
        last.unlink()
