"""`TrainingProgress`: a progress bar over all steps of a training, or lines in a log file."""

import contextlib
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from yolo_lightning.callbacks.last_checkpoint import is_logged_step

_SPEED = "speed/images_per_s"
_BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
_LINE_EVERY_S, _LINE_EVERY_SHARE = 30.0, 0.05


def total_losses(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Return short texts for the total losses among metrics, by name.

    A detector has one for images with boxes, and one for images with labels alone.
    """
    if "train/loss" in metrics or "train/cls_loss" in metrics:
        names = {"train/loss": "loss", "train/cls_loss": "labels"}
    else:
        names = {"train/loss_class": "loss"}  # of a classifier
    return {name: text for name, text in names.items() if name in metrics}


def final_step(trainer: pl.Trainer) -> int | None:
    """Return the optimizer step at which a training ends; None if only its time is limited."""
    limits = [trainer.max_steps] if trainer.max_steps > 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        batches = trainer.num_training_batches
        if not math.isinf(batches):
            # the last batches of an epoch make a step, even if they are too few
            limits.append(trainer.max_epochs * -(-int(batches) // trainer.accumulate_grad_batches))
    return min(limits, default=None)


class TrainingProgress(TQDMProgressBar):
    """Show the steps of a training, the time left, the loss, and images per second.

    On a terminal this is one bar over all steps, and other output is printed above it. Elsewhere,
    such as in a log file, it is a line every 30 s and every 5 % of the steps. `validate` and `test`
    show their batches in the same way. Losses and speed are those of the last logged step.
    """

    def __init__(self) -> None:
        is_terminal = sys.stdout is not None and sys.stdout.isatty()  # None: closed by the shell
        super().__init__(refresh_rate=int(is_terminal))
        self._figures = ""
        self._total: int | None = None
        self._start = self._last_line = (0, 0.0)  # step and time
        self._streams = contextlib.ExitStack()

    def _begin(self, step: int, total: float | None) -> None:
        self._total = None if total is None or math.isinf(total) else int(total)
        self._start = self._last_line = (step, time.monotonic())

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Create the bar, which begins at the step of the checkpoint."""
        self._begin(trainer.global_step, final_step(trainer))
        self.train_progress_bar = Tqdm(
            total=self._total, initial=trainer.global_step, disable=self.is_disabled,
            file=sys.stdout, dynamic_ncols=True, smoothing=0, mininterval=0.2, miniters=0,
            bar_format=_BAR_FORMAT,
        )  # fmt: skip
        if self.is_enabled:
            self._streams.enter_context(_print_above_bar())

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Keep the bar: it counts the steps of all epochs."""

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Update the bar; where the step is logged, also its figures."""
        if is_logged_step(trainer, batch_idx):  # a value makes a GPU wait
            self._read_figures(trainer)
        bar, step = self.train_progress_bar, trainer.global_step
        if bar.disable:
            self._print_line(trainer, "step", step)
        else:
            self._reset_text()
            bar.update(step - bar.n)

    def _reset_text(self) -> None:
        self.train_progress_bar.set_description_str(refresh=False)
        self.train_progress_bar.set_postfix_str(self._figures, refresh=False)

    def _read_figures(self, trainer: pl.Trainer) -> None:
        if not trainer.is_global_zero:
            return
        metrics = trainer.callback_metrics
        losses = total_losses(metrics)
        texts = [f"{text} {float(metrics[name]):.3g}" for name, text in losses.items()]
        if _SPEED in metrics:
            texts.append(f"{float(metrics[_SPEED]):.3g} images/s")
        self._figures = ", ".join(texts)

    def _print_line(self, trainer: pl.Trainer, unit: str, number: int) -> None:
        """Print a line of progress if the last one is long ago."""
        (last, last_s), now, total = self._last_line, time.monotonic(), self._total
        is_due = total is not None and number - last >= _LINE_EVERY_SHARE * total
        if not (is_due or now - last_s >= _LINE_EVERY_S or number == total) or number == last:
            return
        if not trainer.is_global_zero:
            return
        self._last_line = (number, now)
        texts, elapsed_s = [f"{unit} {number}"], now - self._start[1]
        if total is not None:
            remaining_s = elapsed_s / (number - self._start[0]) * (total - number)
            texts = [f"{unit} {number}/{total}", f"{Tqdm.format_interval(remaining_s)} left"]
        print(", ".join([*texts, *filter(None, [self._figures])]), flush=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the bar."""

    def on_train_end(self, *_: Any) -> None:
        """Close the bar."""
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Close the bar, so that messages follow on a new line."""
        self._close()

    def _close(self) -> None:
        if self._train_progress_bar is not None:
            self._reset_text()
            self.train_progress_bar.close()
        self._streams.close()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Create the bar of `validate`; in a training, its own bar names the batch."""
        if trainer.state.fn == "validate":
            self._begin(0, sum(trainer.num_val_batches))
            super().on_validation_start(trainer, pl_module)

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any, **options: Any) -> None:
        """Set the number of batches of `validate`."""
        if trainer.state.fn == "validate":
            super().on_validation_batch_start(trainer, *args, **options)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show the number of the batch."""
        total = trainer.num_val_batches[dataloader_idx]
        if trainer.state.fn == "validate":
            super().on_validation_batch_end(
                trainer, pl_module, outputs, batch, batch_idx, dataloader_idx
            )
            if self.is_disabled:
                self._print_line(trainer, "validation batch", batch_idx + 1)
        elif not trainer.sanity_checking and not self.train_progress_bar.disable:
            bar = self.train_progress_bar
            bar.set_postfix_str(refresh=False)
            # the first at once, since the bar stands still for all of the validation
            text = f"validation {batch_idx + 1}/{total}"
            bar.set_description_str(text, refresh=batch_idx == 0)
            bar.update(0)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar of `validate`."""
        if trainer.state.fn == "validate":
            super().on_validation_end(trainer, pl_module)
        elif not trainer.sanity_checking:
            self._reset_text()

    def on_sanity_check_start(self, *_: Any) -> None:
        """Show nothing: it takes a few batches."""

    def on_sanity_check_end(self, *_: Any) -> None:
        """Show nothing."""

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Create the bar of `test`."""
        self._begin(0, sum(trainer.num_test_batches))
        super().on_test_start(trainer, pl_module)

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show the number of the batch."""
        super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        if self.is_disabled:
            self._print_line(trainer, "test batch", batch_idx + 1)


class _AboveBar:
    """A terminal whose lines are printed above the progress bar."""

    def __init__(self, stream: TextIO, bar_stream: TextIO) -> None:
        self._stream, self._bar_stream, self._pid = stream, bar_stream, os.getpid()
        self._line = ""

    def write(self, text: str) -> int:
        """Write whole lines, and keep the rest for later."""
        if os.getpid() != self._pid:  # a forked loader worker has no bar
            return self._stream.write(text)
        lines, end, self._line = (self._line + text).rpartition("\n")
        if end:
            with Tqdm.external_write_mode(self._bar_stream):
                self._stream.write(lines + end)
                self._stream.flush()
        return len(text)

    def write_rest(self) -> None:
        """Write what no line break has ended."""
        self._stream.write(self._line)
        self._line = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _print_above_bar() -> Iterator[None]:
    """Print what others write above the bar, which is on stdout: prints, warnings, log messages."""
    output, error = sys.stdout, sys.stderr
    # a file of errors gets them as they come
    new_error: Any = _AboveBar(error, output) if error.isatty() else error
    new_output: Any = _AboveBar(output, output)
    loggers = [logging.getLogger(f"lightning{name}") for name in ("", ".pytorch", ".fabric")]
    handlers = [
        handler
        for logger in loggers
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is error
    ]
    for handler in handlers:
        handler.setStream(new_error)
    with contextlib.redirect_stdout(new_output), contextlib.redirect_stderr(new_error):
        yield
    for handler in handlers:
        handler.setStream(error)
    for stream in (new_output, new_error):
        if isinstance(stream, _AboveBar):
            stream.write_rest()
